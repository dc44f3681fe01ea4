"""What is timed: an operation, and what it is called with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm.operations import OPERATIONS, Operation

Array = np.ndarray[Any, Any]

_OPERATIONS = {op.label: op for op in OPERATIONS}

GROUPS = 32  # of channels, where a name says nothing else
SMALL = 8 * 768  # elements: up to here the call costs more than the arithmetic


@dataclass(frozen=True)
class Case:
    """One call."""

    label: str
    """Of the operation, as in operations.py."""
    shape: tuple[int, ...]
    num_groups: int | None = None
    channels_last: bool = False
    dtype: str = "float32"
    backward: bool = False
    activation: str | None = None
    residual: bool = False
    out: bool = False
    """Whether the result goes into an array that is already there."""

    def __str__(self) -> str:
        """A name for tables: "group_norm 8x256x32x32 channels-last + silu"."""
        words = [self.label.replace(" (normalized_shape)", ""), "x".join(map(str, self.shape))]
        words += [f"num_groups={self.num_groups}"] if self.num_groups not in (None, GROUPS) else []
        words += ["channels-last"] if self.channels_last else []
        words += [self.dtype] if self.dtype != "float32" else []
        words += ["+ residual"] if self.residual else []
        words += [f"+ {self.activation}"] if self.activation else []
        words += ["backward"] if self.backward else []
        return " ".join(words + (["out="] if self.out else []))

    @property
    def operation(self) -> Operation:
        return _OPERATIONS[self.label]

    @property
    def kind(self) -> str:
        """The table that the case belongs in."""
        if self.backward:
            return "backward"
        fused = self.activation or self.residual or self.operation.outputs > 1
        return "fused" if fused else "forward"

    @property
    def written(self) -> int:
        """How many arrays of x's size are the result."""
        return 1 if self.backward else self.operation.outputs

    @property
    def small(self) -> bool:
        return math.prod(self.shape) <= SMALL

    @property
    def bytes(self) -> int:
        """Of x."""
        return math.prod(self.shape) * int(dtype_of(self.dtype).itemsize)

    def cut(self, most: int) -> Case:
        """The same with at most so many elements an axis; channels in groups stay."""
        kept = 1 if self.num_groups else None
        shape = (n if axis == kept else min(n, most) for axis, n in enumerate(self.shape))
        return replace(self, shape=tuple(shape))


@dataclass(frozen=True)
class Data:
    """The arrays of a case. Parameters are copied by those who change them."""

    x: Array
    parameters: dict[str, Any]
    """Keyword arguments of fastnorm's function and the reference's, without residual and out."""
    residual: Array | None = None
    dy: Array | None = None
    out: Array | None = None

    @property
    def read(self) -> list[Array]:
        """The arrays of x's size that every contender must read."""
        return [a for a in (self.x, self.residual, self.dy) if a is not None]


def dtype_of(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def wide(x: Any) -> Any:
    """What is of 16 bits as float32, which it is computed in."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def _numbers(case: Case, seed: int, mean: float = 0.0) -> Array:
    """Normal numbers; large arrays repeat them, which no contender notices."""
    rng, size = np.random.default_rng(seed), math.prod(case.shape)
    block = rng.standard_normal(min(size, 1_000_003), np.float32) + np.float32(mean)
    return _laid(case, np.resize(block.astype(dtype_of(case.dtype)), size))


def blank(case: Case, seed: int, mean: float = 0.0) -> Array:
    """Zeros, of which no page is touched, as they lie in memory."""
    return _laid(case, np.zeros(math.prod(case.shape), dtype_of(case.dtype)))


def _laid(case: Case, flat: Array) -> Array:
    if not case.channels_last:
        return flat.reshape(case.shape)
    n, c, *positions = case.shape
    return np.moveaxis(flat.reshape(n, *positions, c), -1, 1)


def data(case: Case, numbers: Callable[..., Array] = _numbers) -> Data:
    """Make the arrays of a case, the same ones every time; large ones are of `numbers`."""
    op, rng = case.operation, np.random.default_rng(1)
    dtype = dtype_of(case.dtype)
    parameters = op.parameters(case.shape, dtype, rng, num_groups=case.num_groups)
    residual = parameters.pop("residual", None)
    if op.name == "instance_norm":
        # Not every peer keeps running statistics for it, and few users do.
        parameters = {k: v for k, v in parameters.items() if not k.startswith("running")}
    x = numbers(case, 0, mean=1.0)
    if case.residual or residual is not None:
        residual = numbers(case, 2)
    dy = numbers(case, 3) if case.backward else None
    return Data(x, parameters, residual, dy, np.empty_like(x) if case.out else None)


def arguments(case: Case, data: Data) -> dict[str, Any]:
    """What the forward function takes after x, with copies of what it changes."""
    given = {k: v.copy() if k.startswith("running") else v for k, v in data.parameters.items()}
    given |= {} if data.residual is None else {"residual": data.residual}
    given |= {"activation": case.activation} if case.activation else {}
    return given | ({} if data.out is None else {"out": data.out})


def gradient_arguments(
    case: Case, data: Data, module: Any = fn
) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The backward function's name and arguments, the statistics being those of `module`."""
    op = case.operation
    _, *stats = getattr(module, op.name)(data.x, **arguments(case, data), return_stats=True)
    options = {k: data.parameters[k] for k in op.backward_keywords if k in data.parameters}
    return str(op.backward), (data.dy, data.x, *stats), options
