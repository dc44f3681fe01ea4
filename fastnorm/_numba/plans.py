"""What a kernel is told of every call of a kind: its record but for addresses, and its sizes.

Kernels are compiled on first use, for the kind of number at hand, and kept on disk by Numba.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastnorm._numba import (
    activations,
    back_columns,
    back_rows,
    back_sums,
    backward,
    blocking,
    forward,
)
from fastnorm._numba.blocking import ADDRESSES, PASS
from fastnorm._numba.memory import COUNTERS, SOURCES, compiling
from fastnorm.layout import Layout
from fastnorm.problem import OPERANDS
from fastnorm.schedule import (
    BACKWARD_CHUNK,
    BACKWARD_SHARED_RUNS,
    BLOCK,
    NON_TEMPORAL_MIN_RUN,
    SHORT_RUN_BYTES,
    SPLIT_BLOCKS,
    TILE_ELEMENTS,
    TILE_GROUPS,
    BackwardSchedule,
    Dtypes,
    ForwardSchedule,
)

Array = NDArray[Any]
Room: TypeAlias = tuple[int, ...]  # how many numbers each part of a thread's memory has
Strides: TypeAlias = tuple[int, ...]

_KINDS = {"float32": np.float32, "float64": np.float64, "float16": np.int16, "bfloat16": np.uint16}


@lru_cache(maxsize=16)
def _kind_of(dtype: np.dtype[Any]) -> type:
    """The kind of numbers of a dtype, whose name NumPy makes up every time."""
    return _KINDS[dtype.name]


_kernels: dict[tuple[Any, ...], Any] = {}


def kernel_of(compiler: Callable[..., Any], *kinds: type) -> int:
    """The address of a kernel for numbers of some kinds."""
    key = compiler, *kinds
    found = _kernels.get(key)
    if found is None:
        with compiling():
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = compiler(*kinds, SOURCES)
    return int(found.address)


def _operand(strides: Strides | None, size: int) -> Strides:
    """What a record holds of an operand: room for its address, and strides in bytes."""
    return (0, 0, 0, 0, 0, 0) if strides is None else (0, *(stride * size for stride in strides))


# --- Forward --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Plan:
    """What a kernel is told of every pass of a layout, but for addresses."""

    template: Array  # a record as whole numbers
    kernel: int
    room: Room
    schedule: ForwardSchedule
    items: int
    width: int


class Asked(NamedTuple):
    """What is asked of a forward pass, without its arrays."""

    centred: bool = True
    given: bool = False
    scaling: int = 0
    eps: float = 0.0
    activation: Any = 0
    activation_first: bool = False


def dtypes_of(**arrays: Array | None) -> Dtypes:
    return tuple((name, array.dtype) for name, array in arrays.items() if array is not None)


def _planes_follow(layout: Layout, *operands: str) -> bool:
    """Whether the planes of a group are one run of each of these operands."""
    p, s = layout.dims[2:4]
    steps = (layout.strides[name] for name in operands)
    return p == 1 or all(step[2] == s * step[3] for step in steps)


@lru_cache(maxsize=4096)
def plan_of(layout: Layout, schedule: ForwardSchedule, dtypes: Dtypes, asked: Asked) -> Plan:
    types = dict(dtypes)
    kind = _kind_of(types["x"])
    computing = np.float64 if kind is np.float64 else np.float32
    written = "y" in types
    size = types["x"].itemsize
    real = np.dtype(computing).itemsize
    centred, given, scaling, eps, activation, activation_first = asked
    numeric = schedule.blocking
    a, b, p, s, c = layout.dims
    length = numeric.length
    steps = layout.strides
    weights = [steps.get(name, (0,) * 5) for name in ("weight", "bias")]
    width, chunks, items = schedule.width, schedule.chunks, schedule.items
    non_temporal = written and schedule.non_temporal
    # short planes of doubles that lie apart, which are not copied together here
    apart = schedule.path == "gathered" and s * size % 64 == 0
    non_temporal |= apart and schedule.direct_non_temporal
    foldable = schedule.foldable
    # rows one by one: of float16, too, which is converted a row at a time
    alone = schedule.single_rows and not (non_temporal and size == 2)
    alone &= "mask" not in types and ("total" not in types or kind is np.float32)
    kept = 0
    if alone:
        width, chunks, items = 1, b, a * b
        kept = 0 if foldable else 2 * -(-(length * real + 64) // 8)
    if layout.columns:
        kernel = kernel_of(forward.compile_columns, kind, computing)
        room = forward.columns_parts(width)
    else:
        kernel = kernel_of(forward.compile_runs, kind, computing)
        room = forward.runs_parts(width, kept)
    tabulated = schedule.tabulated
    folded_groups = (
        foldable
        and not layout.columns
        and kind is not np.float64
        and not any(w[2] or (tabulated and w[0]) for w in weights)
    )
    stats = steps["stats"]
    residual_real, addend_real = (types.get(name) == computing for name in ("residual", "addend"))
    sizes = {"mask": 1, "weight": real, "bias": real}
    sizes |= {"residual": real if residual_real else size, "addend": real if addend_real else size}
    source = "total" if "total" in steps else "x"  # what the norm is of
    # from x to y, through no tile: not where y is x, or the residual (`tell_in_place`)
    direct = written and not non_temporal and size != 2
    followed = "residual" in types or activation != 0 or activation_first
    plain = written and not non_temporal and not followed
    record = np.zeros(1, PASS)
    record[0] = (
        0,
        *(_operand(steps.get(name), sizes.get(name, size)) for name in OPERANDS),
        *(_operand(stats, 8) for _ in range(3)),
        a, b, p, s, c, layout.neighbours, layout.columns, centred, given, scaling,
        activations.address_of(activation, computing), activation_first, non_temporal,
        residual_real, addend_real, foldable, folded_groups, _planes_follow(layout, source),
        written and _planes_follow(layout, source, "y"), length, width, chunks, items,
        numeric.block, numeric.splits, 0, 0, plain, direct, 0, 0, kept, alone,
        non_temporal and foldable and kind is np.float32, activation == 1, layout.shared, eps,
    )  # fmt: skip
    return Plan(record.view(np.int64), kernel, room, schedule, items, width)


# Places in a record, counted in whole numbers: slices are set in a third of the time.
_FIRST, _STEP = len(COUNTERS), len(_operand(None, 0))
DATA = slice(_FIRST, _FIRST + _STEP * len(ADDRESSES), _STEP)
DATA_OF = {name: _FIRST + _STEP * i for i, name in enumerate(ADDRESSES)}
AT = {name: int(PASS.fields[name][1]) // 8 for name in blocking.NUMBERS}  # type: ignore[index]


def tell_in_place(record: Array, x: int, residual: int, y: int) -> None:
    """Tell a record of a result that is written over x, or over the residual."""
    if y == x:
        record[AT["plain"]] = record[AT["direct"]] = 0
    elif y == residual:
        record[AT["direct"]] = 0


# --- Backward -------------------------------------------------------------------------------------


@dataclass(slots=True)
class BackPlan:
    """What a kernel is told of every backward pass of a layout, but for addresses."""

    template: Array  # a record as whole numbers
    kernel: int
    room: Room
    items: int
    segments: int
    inside: bool  # the weight differs along a run
    turns: int  # of dx alone, where it does
    owners: tuple[int, ...]  # the cells' shape, where it does
    parts: int
    cells: int
    sums: tuple[int, ...]  # the shape of the sums
    axes: tuple[int, ...]  # along which they are added up
    terms: int
    width: int
    schedule: BackwardSchedule
    flat: bool  # whether dweight lies as the sums do


class AskedBack(NamedTuple):
    """What is asked of a backward pass, and how two arrays lie that may be copies."""

    centred: bool
    training: bool
    has_mean: bool
    dy: Strides
    weight: Strides | None


@lru_cache(maxsize=4096)
def back_plan_of(
    layout: Layout, schedule: BackwardSchedule, dtypes: Dtypes, asked: AskedBack
) -> BackPlan:
    types = dict(dtypes)
    kind = _kind_of(types["x"])
    computing = np.float64 if kind is np.float64 else np.float32
    stored = kind if types["dy"] == types["x"] else computing
    size, real = types["x"].itemsize, np.dtype(computing).itemsize
    numeric = schedule.blocking
    a, b, p, s, c = layout.dims
    steps = layout.strides
    shared = steps["dweight"]
    inside, segments = numeric.inside, numeric.segments
    non_temporal = schedule.non_temporal
    if layout.columns and not schedule.always_non_temporal:
        non_temporal &= c * size >= NON_TEMPORAL_MIN_RUN  # rows are stored one by one
    # across planes, unless these have weights of their own
    joined = layout.columns or inside or shared[2] == 0 or p == 1
    sharers = parts = chunks = width = turns = together = 1
    cells = 0
    owners: tuple[int, ...] = ()
    sums: tuple[int, ...] = (a, b, 1, segments, 2) if joined else (a, b, p, segments // p, 2)
    terms = a * b * back_sums.TERMS
    if layout.columns:
        width, chunks = numeric.width, numeric.chunks
        items = a * b * chunks
        compiler, room = backward.compile_columns, back_columns.columns_parts(width)
        sums = (a, b, segments, 2 * c)
        terms = items * back_columns.OF_COLUMN * width
    elif not inside:
        if p > 1 and s * size < SHORT_RUN_BYTES:
            # planes of a group that follow one another are walked as they lie, unless they are few
            # numbers (group norm 8x256x32x32 bfloat16 490 to 390 us)
            most = TILE_ELEMENTS if steps["x"][2] == s else SPLIT_BLOCKS * BLOCK
            width = max(1, min(most // (p * s), b, TILE_GROUPS))
        chunks = -(-b // width)
        items = a * chunks
        compiler, room = backward.compile_planes, back_rows.RUNS_PARTS
    else:
        owners = (a if shared[0] else 1, b if shared[1] else 1, p if shared[2] else 1)
        items = owners[0] * owners[1]
        sharers = a * b // items
        cells = owners[2] * s
        # few large groups in two sweeps, in one part, and four at a time even where they do not
        # stay in L2
        parts = numeric.parts
        together = BACKWARD_SHARED_RUNS if numeric.sweeps else schedule.together
        turns = items * owners[2] * -(-s // BACKWARD_CHUNK)
        compiler, room = backward.compile_rows, back_rows.RUNS_PARTS
    # those who share a weight, and their segments, at once: in the order of memory, as Cython does
    own = [stride != 0 for stride in shared]
    own[2 if layout.columns else 3] = False
    axes = tuple(axis for axis, n in enumerate(sums[:-1]) if n > 1 and not own[axis])
    record = np.zeros(1, back_sums.BACK)
    stats = steps["stats"]
    record[0] = (
        0,
        _operand(steps["x"], size),
        _operand(asked.dy, real if stored is computing else size),
        _operand(steps["dx"], size),
        _operand(asked.weight, real),
        _operand(stats if asked.has_mean else None, 8),
        _operand(stats, 8),
        a, b, p, s, c, layout.neighbours, asked.centred, asked.training, non_temporal,
        not non_temporal, shared[0] != 0, shared[1] != 0, shared[2] != 0, sharers, parts,
        segments, chunks, width, items, cells, joined, together, 0, 0, 0,
    )  # fmt: skip
    return BackPlan(
        record.view(np.int64),
        kernel_of(compiler, kind, stored, computing),
        room,
        items,
        segments,
        inside,
        turns,
        owners,
        parts,
        cells,
        sums,
        axes,
        terms,
        width,
        schedule,
        _is_compact(shared, layout.dims),
    )


def _is_compact(strides: Strides, dims: Strides) -> bool:
    """Whether elements follow one another along the dimensions that have strides."""
    n = 1
    for stride, size in zip(reversed(strides), reversed(dims)):
        if stride not in (0, n):
            return False
        n *= size if stride else 1
    return True


BACK_DATA = slice(_FIRST, _FIRST + _STEP * len(back_sums.OPERANDS), _STEP)
BACK_DATA_OF = {name: _FIRST + _STEP * i for i, name in enumerate(back_sums.OPERANDS)}
BACK_OWN = -3, -2, -1  # sums, terms, collected
