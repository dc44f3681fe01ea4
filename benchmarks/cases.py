"""The cases that benchmarks time: an operation of the table, and what it is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.operations import OPERATIONS, Operation

_OPERATIONS = {op.label: op for op in OPERATIONS}


@dataclass(frozen=True)
class Case:
    """One array under one operation."""

    label: str
    """Of the operation, as in tests/operations.py."""
    shape: tuple[int, ...]
    channels_last: bool = False
    num_groups: int | None = None

    def __str__(self) -> str:
        """A name for tables: "group_norm 8x256x32x32 channels-last"."""
        layout = " channels-last" if self.channels_last else ""
        return f"{self.label} {'x'.join(map(str, self.shape))}{layout}"

    @property
    def operation(self) -> Operation:
        return _OPERATIONS[self.label]

    def input(self) -> np.ndarray[Any, Any]:
        x = np.random.default_rng(0).standard_normal(self.shape, np.float32) + 1
        if not self.channels_last:
            return x
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)

    def parameters(self) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        return self.operation.parameters(self.shape, np.float32, rng, num_groups=self.num_groups)


_LAYER, _RMS = "layer_norm (normalized_shape)", "rms_norm"
_TRAINING, _INFERENCE = "batch_norm (training)", "batch_norm (inference)"

FORWARD = (
    Case(_LAYER, (8, 768)),
    Case(_LAYER, (4096, 768)),
    Case(_RMS, (4096, 768)),
    Case("group_norm", (8, 256, 32, 32), num_groups=32),
    Case("group_norm", (8, 256, 32, 32), channels_last=True, num_groups=32),
    Case("instance_norm", (8, 64, 64, 64)),
    Case(_TRAINING, (32, 64, 56, 56)),
    Case(_TRAINING, (32, 64, 56, 56), channels_last=True),
    Case(_INFERENCE, (32, 64, 56, 56)),
    Case(_INFERENCE, (32, 64, 56, 56), channels_last=True),
)

BACKWARD = tuple(case for case in FORWARD if case.label != _INFERENCE)
