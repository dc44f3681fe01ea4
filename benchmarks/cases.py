"""The one table of what is timed: an operation of tests/operations.py, and what it is called with.

`make bench` times CASES, OUT and THREADS beside the peers, the gate times GATE, and
tests/test_benchmarks.py checks every peer's result on shrunken copies of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import fastnorm as fn
from tests.operations import OPERATIONS, Operation

Array = np.ndarray[Any, Any]

_OPERATIONS = {op.label: op for op in OPERATIONS}

SMALL = 8 * 768  # elements: up to here the call costs more than the arithmetic


@dataclass(frozen=True)
class Case:
    """One call."""

    label: str
    """Of the operation, as in tests/operations.py."""
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


def _numbers(case: Case, seed: int, mean: float = 0.0) -> Array:
    """Normal numbers; large arrays repeat them, which no contender notices."""
    rng, size = np.random.default_rng(seed), math.prod(case.shape)
    block = rng.standard_normal(min(size, 1_000_003), np.float32) + np.float32(mean)
    flat = np.resize(block.astype(dtype_of(case.dtype)), size)
    if not case.channels_last:
        return flat.reshape(case.shape)
    last = (case.shape[0], *case.shape[2:], case.shape[1])
    return np.moveaxis(flat.reshape(last), -1, 1)


def data(case: Case) -> Data:
    """Make the arrays of a case, the same ones every time."""
    op, rng = case.operation, np.random.default_rng(1)
    dtype = dtype_of(case.dtype)
    parameters = op.parameters(case.shape, dtype, rng, num_groups=case.num_groups)
    residual = parameters.pop("residual", None)
    if op.name == "instance_norm":
        # Not every peer keeps running statistics for it, and few users do.
        parameters = {k: v for k, v in parameters.items() if not k.startswith("running")}
    x = _numbers(case, 0, mean=1.0)
    if case.residual or residual is not None:
        residual = _numbers(case, 2)
    dy = _numbers(case, 3) if case.backward else None
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


# --- The table ------------------------------------------------------------------------------------

_layer = partial(Case, "layer_norm (normalized_shape)")
_rms = partial(Case, "rms_norm")
_group = partial(Case, "group_norm", num_groups=32)
_instance = partial(Case, "instance_norm")
_training = partial(Case, "batch_norm (training)")
_inference = partial(Case, "batch_norm (inference)")
_add_layer = partial(Case, "add_layer_norm")
_add_rms = partial(Case, "add_rms_norm")

_LAYER_SHAPES = ((1, 64), (8, 768), (64, 768), (4096, 768), (4096, 1024), (8192, 4096))
_RMS_SHAPES = ((8, 768), (4096, 768), (8192, 4096))
_GROUP_SHAPES = ((2, 64, 8, 8), (8, 256, 32, 32), (2, 320, 64, 64), (2, 256, 128, 128))
_INSTANCE_SHAPES = ((8, 64, 64, 64), (4, 64, 256, 256), (1, 16, 128, 128, 128))
_BATCH_SHAPES = ((32, 64, 56, 56), (64, 512, 8, 8), (32, 256, 28, 28))
_LAYOUTS = (False, True)

_FORWARD = (
    *(_layer(shape) for shape in _LAYER_SHAPES),
    *(_rms(shape) for shape in _RMS_SHAPES),
    *(_group(shape, channels_last=last) for shape in _GROUP_SHAPES for last in _LAYOUTS),
    *(_instance(shape) for shape in _INSTANCE_SHAPES),
    *(_training(shape, channels_last=last) for shape in _BATCH_SHAPES for last in _LAYOUTS),
    *(_inference(shape, channels_last=last) for shape in _BATCH_SHAPES for last in _LAYOUTS),
    _layer((4096, 768), dtype="bfloat16"),
    _rms((4096, 768), dtype="bfloat16"),
    _group((8, 256, 32, 32), dtype="bfloat16"),
    _layer((4096, 768), dtype="float64"),
    _group((8, 256, 32, 32), dtype="float64"),
    _training((64, 512, 8, 8), dtype="float64"),
)

_BACKWARD = tuple(
    replace(case, backward=True) for case in _FORWARD if case.label != "batch_norm (inference)"
)

_FUSED = (
    _group((8, 256, 32, 32), activation="silu"),
    _group((2, 320, 64, 64), activation="silu"),
    _add_rms((8, 768)),
    _add_rms((4096, 768)),
    _add_rms((2048, 4096)),
    _add_layer((4096, 768)),
    *(
        _inference(shape, channels_last=last, residual=True, activation="relu")
        for shape in ((32, 64, 56, 56), (32, 256, 28, 28))
        for last in _LAYOUTS
    ),
)

CASES = _FORWARD + _BACKWARD + _FUSED

# A dozen for the README, which shows every case that fastnorm loses as well.
SHOWN = (
    _layer((8, 768)),
    _layer((4096, 768)),
    _rms((4096, 768)),
    _group((8, 256, 32, 32)),
    _group((8, 256, 32, 32), channels_last=True),
    _instance((8, 64, 64, 64)),
    _training((32, 64, 56, 56)),
    _inference((32, 64, 56, 56)),
    _layer((4096, 768), backward=True),
    _group((8, 256, 32, 32), backward=True),
    _group((8, 256, 32, 32), activation="silu"),
    _add_rms((4096, 768)),
    _inference((32, 64, 56, 56), residual=True, activation="relu"),
)

# Over 100 MB, each group within 1 MB: what is left is the traffic with memory.
OUT = tuple(
    replace(case, out=True)
    for case in (
        _layer((8192, 4096)),
        _rms((8192, 4096)),
        _group((8, 256, 128, 128)),
        _instance((8, 64, 256, 256)),
        _inference((64, 128, 64, 64)),
    )
)

# Input and result fit in the last level of cache of a small server; and one plane of 67 MB.
THREADS = (
    _layer((4096, 768)),
    _rms((4096, 768)),
    _group((8, 256, 32, 32)),
    _group((8, 256, 32, 32), channels_last=True),
    _instance((8, 64, 64, 64)),
    _training((64, 512, 8, 8)),
    _training((64, 512, 8, 8), channels_last=True),
    _inference((64, 512, 8, 8)),
    replace(_layer((4096, 768)), backward=True),
    replace(_group((8, 256, 32, 32)), backward=True),
    _instance((1, 1, 256, 256, 256)),
)


def cliff(size: int) -> tuple[Case, ...]:
    """Cases whose x has `size` bytes: more rows, or more samples of 64 kB, of the same kind."""
    return _layer((size // 4096, 1024)), _group((size // 65536, 64, 16, 16))


CLIFF = tuple(case for power in range(16, 32) for case in cliff(1 << power))  # 64 kB to 2 GB

# For the gate: every kernel, small enough for caches, where timing is steady.
_ROWS, _PLANES = (64, 768), (2, 64, 32, 32)
_GATE_FORWARD = (
    _layer((1, 64)),
    _layer((8, 768)),
    _layer(_ROWS),
    _layer((1024, 1024)),
    _rms(_ROWS),
    _group((2, 64, 8, 8)),
    _group(_PLANES),
    _group(_PLANES, channels_last=True),
    _instance((2, 32, 64, 64)),
    _training((8, 64, 16, 16)),
    _training((8, 64, 16, 16), channels_last=True),
    _inference((8, 64, 16, 16)),
    _inference((8, 64, 16, 16), channels_last=True),
    _layer(_ROWS, dtype="bfloat16"),
    _layer(_ROWS, dtype="float64"),
    _group(_PLANES, dtype="bfloat16"),
)
GATE = (
    *_GATE_FORWARD,
    *(
        replace(case, backward=True)
        for case in (
            _layer(_ROWS),
            _rms(_ROWS),
            _group(_PLANES),
            _group(_PLANES, channels_last=True),
            _training((8, 64, 16, 16)),
            _training((8, 64, 16, 16), channels_last=True),
        )
    ),
    _group(_PLANES, activation="silu"),
    _add_rms(_ROWS),
    _inference((8, 64, 16, 16), residual=True, activation="relu"),
    _layer((9216, 1024), out=True),  # past the caches
)
# Of these on two threads.
GATE_THREADS = (_layer((1024, 1024)),)
