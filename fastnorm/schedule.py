"""How a pass is carried out: the only home of every size and threshold of the CPU kernels.

`forward_schedule` and `backward_schedule` are pure functions of a layout, dtypes and a machine.
They run no kernel and read no number of an array. Kernels carry out what they are told; what
depends on numbers found on the way (a group out of range) or on an address they decide themselves.

There are two kinds of decisions, kept apart:

- *Numeric blocking* decides in which order numbers are added up, hence the last bits of results. It
  follows from shape, strides and dtypes alone: never from machine, threads or batch.
- *Tuning* decides no bit: tiles, threads, kinds of stores.

`setup.py` reads the whole numbers below, without importing this file, and writes them into the
header that the compiled kernels are built with: a threshold is changed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from fastnorm.machine import Machine

# --- Numeric blocking: these decide bits ----------------------------------------------------------
# A change gives results other last bits, and is said in the change log.

# partial sums side by side, forward and backward, and how many numbers are added up before they are
# folded into one: short chains round less
LANES = 32
PAIR_LANES = 16
CHAIN = 256

# a group that is contiguous: elements of a block whose moments are taken at once, which L1 holds,
# and blocks of a split, which one thread takes when a group is shared out
BLOCK = 4096
SPLIT_BLOCKS = 16

# elements of a run that Numba's kernels sum up at once; loops go over as many one after the other,
# in L1
NUMBA_TILE = 2048

# groups side by side in memory (strided reductions). A tile is whole rows of up to so many columns,
# or so many columns of more; a block is of so many elements, which L2 holds; a split is of so many
# rows, whose partial sums cost at most 1 % of x
MAX_UNTILED_COLUMNS = 512
COLUMN_TILE = 256
ROW_TILE_ELEMENTS = 16384
MIN_BLOCK_ROWS = 16
SPLIT_ROWS = 1024

# neighbours in memory that share a statistic: fewer are too short to walk along, and are taken as
# columns and merged. 32 lanes are filled twice. Planes that follow one another are one run, however
# short: what is between them is a weight, which costs less than a short row does. Backward, so are
# planes of so many elements of which each sample has one (batch norm), a step of so many elements
# apart: of a shorter one columns make rows that are long enough. More planes than that lie on more
# pages than the TLB has entries for
MIN_RUN = 64
BACKWARD_MIN_RUN = 16
BACKWARD_MIN_SAMPLE = 2048
BACKWARD_MAX_PLANES = 128

# by given statistics: planes of at most so many elements, of so many samples or more, are taken as
# columns, whose scales are then made for a sample's row once; of float16 and bfloat16, whose
# conversion gains by it, longer ones. On an Intel Xeon (family 6, model 167) float32 takes 0.5 to
# 0.8 of the time, 1.2 to 1.6 with planes of 25 or 49; float16 0.6 to 0.96 up to 36, 1.2 with 49
SHORT_PLANE = 16
SHORT_PLANE_OF_HALF = 32
SHORT_PLANES = {2: SHORT_PLANE_OF_HALF, 4: SHORT_PLANE}  # by bytes of an element
MIN_SAMPLES = 8

# backward: groups of runs shorter than these bytes are taken side by side, at most so many;
# elements of a run, and rows, that are summed at a time (sums of rows cost at most 2 % of x);
# elements of a run whose weights' gradients are collected at once, and runs that share the trip to
# those gradients
SHORT_RUN_BYTES = 4096
TILE_GROUPS = 16
BACKWARD_SPAN = 65536
BACKWARD_SPAN_ROWS = 512
BACKWARD_CHUNK = 1024
BACKWARD_SHARED_RUNS = 4
# bytes of x and dy that stay in L2 from the sums to the step
BACKWARD_CACHED_BYTES = 1 << 18
# parts of those that share a weight: at most, elements that make one worth its sums, bytes of all
# sums (besides 1 % of x); tasks below which large groups are taken in two sweeps; cells of a task
# of its own
BACKWARD_PARTS = 64
BACKWARD_PART_ELEMENTS = 16384
BACKWARD_SUM_BYTES = 2 << 20
BACKWARD_FEW_TASKS = 8
BACKWARD_OWN_CELLS = 8192

# --- Tuning: these decide no bit ------------------------------------------------------------------

# groups of contiguous runs side by side have so many elements, at most
TILE_ELEMENTS = 4096
# a row of fewer elements is not worth taking alone, unless there are few rows; a shorter row is
# applied after the sums of the next, which hide how long a quotient and a root take
MIN_ROW = 256
FEW_ROWS = 4
SHORT_ROW = 2048
# short rows of columns that follow one another are one, up to so many elements (Numba's kernels)
NUMBA_JOINED = 512

# bytes that are asked for in advance; bytes of a group for which L2 has room twice: for this one
# and the next
PREFETCH_BYTES = 4096
PREFETCH_WINDOW = 1 << 18

# Non-temporal stores pay where a result would push out what is still to be read. x and y go through
# the cache together: from so many of 32 parts of the last cache of bytes of x on, forward;
# backward, where dy and dx go through it too, and where columns are read in two sweeps. A shorter
# run ends in lines that are half written: that costs more than all that is gained. These are for
# machines that were not measured (`fastnorm tune`): others use the last cache too, so that not all
# that is told is there. Calls of these sizes take 0.7 to 1.1 times as long with them, larger ones
# 0.6 to 0.9 times (AMD EPYC, family 25 model 17, two cores, 32 MB told).
LAST_CACHE_PARTS = 32
NON_TEMPORAL_PARTS = 13
NON_TEMPORAL_PARTS_BACKWARD = 10
NON_TEMPORAL_PARTS_BACKWARD_STRIDED = 8
NON_TEMPORAL_MIN_RUN = 1024
# elements stored at a time, through a tile in L1
NON_TEMPORAL_TILE = 256

# bytes of x, where a machine was not measured: below which a second thread costs more than it
# helps; below which it is over before a thread that sleeps has woken (in the 50 to 100 us that this
# takes)
SERIAL_BYTES = 1 << 17
SERIAL_BYTES_BACKWARD = 1 << 16
WAKE_BYTES = 1 << 20
# bytes of x: for each thread, up to which shares are fixed once and each core finds its own in its
# cache (Numba's kernels; the compiled ones always begin with their own); below which giving up the
# interpreter's lock costs more
STATIC_BYTES_PER_THREAD = 1 << 20
GIL_RELEASE_MIN_BYTES = 1 << 15
# threads take turns at so many shares each; fewer items than so many for each thread are split
TURNS_PER_THREAD = 8
ITEMS_PER_THREAD = 4


# --- What a schedule follows from -----------------------------------------------------------------


class Walk(Protocol):
    """A pass over memory, as `layout.Layout` describes it; strides are in elements."""

    @property
    def columns(self) -> bool: ...  # noqa: D102
    @property
    def dims(self) -> tuple[int, int, int, int, int]: ...  # noqa: D102
    @property
    def neighbours(self) -> int: ...  # noqa: D102
    @property
    def strides(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102
    @property
    def shared(self) -> bool: ...  # noqa: D102


Dtypes = tuple[tuple[str, "np.dtype[Any]"], ...]  # of the operands that are there, by their names


class _Type:
    """What counts of a dtype, whose name NumPy makes up every time."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.name, self.size = dtype.name, dtype.itemsize
        self.half = self.name in ("float16", "bfloat16")


_type = lru_cache(maxsize=64)(_Type)


_NONE = (0, 0, 0, 0, 0)


def _tiles_of_columns(columns: int, neighbours: int) -> tuple[int, int]:
    """How many columns a tile has, and how many tiles there are."""
    groups, tiles = columns // neighbours, 1
    if columns > MAX_UNTILED_COLUMNS:
        tiles = max(1, min(groups, -(-columns // COLUMN_TILE)))
    width = -(-groups // tiles) * neighbours
    return width, -(-columns // width)


@lru_cache(maxsize=64)
def non_temporal_from(machine: Machine, columns: bool, backward: bool = False) -> int:
    """Bytes of x from which non-temporal stores pay, as measured or by the last cache."""
    if backward:
        measured = machine.non_temporal_backward_bytes
        parts = NON_TEMPORAL_PARTS_BACKWARD
        if columns:
            measured = machine.non_temporal_backward_strided_bytes
            parts = NON_TEMPORAL_PARTS_BACKWARD_STRIDED
    else:
        measured, parts = machine.non_temporal_bytes, NON_TEMPORAL_PARTS
        if columns:
            measured = machine.non_temporal_strided_bytes
    told = 0 if machine.always_non_temporal else measured
    return told or machine.last_cache // LAST_CACHE_PARTS * parts


# --- Forward --------------------------------------------------------------------------------------

Path = Literal["rows", "gathered", "pipelined", "items"]
# How an item is carried out, the first that fits:
#   rows       each a group of its own, from its sums to its result in one loop
#   gathered   short planes of doubles that lie apart are copied together first
#   pipelined  tiles of short groups: the sums of one while the one before is applied
#   items      one after the other: moments of its blocks, merged; then the step
PATHS: tuple[Path, ...] = ("items", "pipelined", "gathered", "rows")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ForwardBlocking:
    """What decides the bits of a forward pass."""

    length: int  # reduced elements of a group, or rows of columns
    column_tile: int  # columns of an item; 0 along runs
    block: int  # elements, or rows, whose moments are taken at once
    split_length: int  # elements, or rows, of a group that one thread takes where it is shared out
    splits: int
    bf16_direct: bool  # sums convert bfloat16 on the way


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ForwardSchedule:
    """How a forward pass is carried out."""

    blocking: ForwardBlocking
    path: Path
    width: int  # columns of an item; along runs, groups side by side
    chunks: int  # items side by side
    items: int
    foldable: bool  # a weight is one number for a run or a column
    single_rows: bool  # groups are rows with weights at most, whatever their dtype
    tabulated: bool  # given statistics: each scale is made once for all samples
    non_temporal: bool  # y is stored without going through the caches
    direct: bool  # x and y are read and written where they lie, not through tiles
    direct_non_temporal: bool  # or read where they lie, with non-temporal stores
    bytes: int  # of x
    max_threads: int  # 1, or 0: as many as there are
    small: bool  # not worth waking a thread that sleeps
    static_threads: int  # from so many threads on their shares are fixed
    releases_gil: bool

    def threads(self, threads: int) -> int:
        """How many of so many threads are used."""
        return min(threads, self.max_threads) if self.max_threads else threads

    def sharing(self, threads: int) -> Literal["alone", "split", "static", "dynamic"]:
        """How items are shared out; "split": all threads take splits of each group."""
        threads = self.threads(threads)
        if threads == 1:
            return "alone"
        few = self.items < ITEMS_PER_THREAD * threads and self.items % threads != 0
        if self.blocking.splits > 1 and few:
            return "split"
        return "static" if threads >= self.static_threads else "dynamic"


@lru_cache(maxsize=4096)
def forward_schedule(
    layout: Walk,
    dtypes: Dtypes,
    machine: Machine,
    *,
    given: bool = False,
    activation: Any = None,
    activation_first: bool = False,
) -> ForwardSchedule:
    """How a forward pass is carried out on a machine.

    `given`: statistics are read. `activation` is None, a name, or a function of the user's. The
    schedule holds for any number of threads (`sharing`): a cached call keeps it.
    """
    types = {name: _type(dtype) for name, dtype in dtypes}
    steps = {name: layout.strides[name] for name in types}
    x, columns = types["x"], layout.columns
    a, b, p, s, c = layout.dims
    length, nbytes = p * s, a * b * p * s * c * x.size
    written, masked, summed = "y" in types, "mask" in types, "total" in types
    single, double = x.name == "float32", x.name == "float64"
    planes_follow = p == 1 or steps["x"][2] == s
    # is a weight one number for a run or a column, or one of each element along a run?
    w, v = steps.get("weight", _NONE), steps.get("bias", _NONE)
    first = 2 if columns else 3
    foldable = not (activation_first or any(w[first:4]) or any(v[first:4]))
    if given and layout.neighbours > 1 and not layout.shared and (w[4] or v[4]):
        foldable = False  # of one sample these columns are a run, along which weights differ
    along = w[3] != 0 and (v[3] != 0 or "bias" not in types)
    alone = activation is None and "residual" not in types
    plain = alone and not masked

    # items, and what decides bits
    if columns:
        width, chunks = _tiles_of_columns(c, layout.neighbours)
        items = a * b * chunks
        block = min(max(ROW_TILE_ELEMENTS // width, MIN_BLOCK_ROWS), SPLIT_ROWS)
        split_length = max(block, SPLIT_ROWS - SPLIT_ROWS % block)
    else:
        # one group after the other, or several that lie side by side
        width = TILE_ELEMENTS // max(length, 1)
        if width == 1 and length <= BLOCK:
            width = 2
        if p > 1 and s * x.size < SHORT_RUN_BYTES:
            width = max(width, SPLIT_BLOCKS * BLOCK // max(length, 1))
        width = max(1, min(width, b, TILE_GROUPS))
        chunks = -(-b // width)
        items = a * chunks
        block, split_length = BLOCK, SPLIT_BLOCKS * BLOCK
    splits = max(1, -(-length // split_length))
    bf16_direct = plain and written and x.name == "bfloat16" and not summed and "dy" not in types
    bf16_direct = bf16_direct and (foldable if columns else planes_follow and (foldable or along))
    blocking = ForwardBlocking(
        length, width if columns else 0, block, split_length, splits, bf16_direct
    )

    # stores; of a sum and its norm four arrays go through the caches, not two
    run = width if columns else s
    if columns and written and steps["y"][3] == width:
        run *= s  # rows that follow one another
    through = 2 * nbytes if summed else nbytes
    long = machine.always_non_temporal or run * x.size >= NON_TEMPORAL_MIN_RUN
    pays = non_temporal_from(machine, columns)
    # bfloat16 that is converted on the way keeps to arithmetic, and tiles cost more than is gained
    long = long and (machine.always_non_temporal or not bf16_direct)
    # a gradient through an activation is read again at once
    non_temporal = through >= pays and long and "dy" not in types
    # all that is of x's size lies there as numbers that are computed in
    native = (single or double) and written and not callable(activation)
    native = native and all(
        types[name].name == x.name for name in ("residual", "addend") if name in types
    )
    direct_non_temporal = native and non_temporal and single and foldable

    # the path
    path: Path = "items"
    own = written and not (columns or given)
    whole = own and not masked
    added = single and types["addend"].name == x.name if summed else False
    single_rows = own and alone and not activation_first and p == 1 and length <= BLOCK
    single_rows = single_rows and (not masked or (single and not summed))
    single_rows = single_rows and (length >= MIN_ROW or a * b < FEW_ROWS)
    single_rows = single_rows and (foldable or (along and w[1] == v[1] == 0))
    if single_rows and (added if summed else single or double or (bf16_direct > non_temporal)):
        path = "rows"
        width, chunks, items = 1, b, a * b
    elif double:
        # planes are read three times, and where they lie a power of two apart they fall into a few
        # sets of the caches, which lose them in between
        apart = p > 1 and steps["x"][3] == 1 and steps["x"][2] != s
        if whole and apart and splits == 1 and s * x.size < SHORT_RUN_BYTES and not summed:
            path = "gathered"
            # y would push out what is still to be read
            direct_non_temporal = nbytes >= pays
    elif whole and length <= BLOCK and planes_follow:
        fits = single or (x.half and width * length <= 2 * BLOCK)
        if added and p == 1 if summed else fits:
            path = "pipelined"

    # a scale that many planes share is made once: one costs as much as normalising 50 numbers
    shared = layout.strides["stats"][0] == w[0] == v[0] == 0
    tabulated = given and not columns and a > 1 and shared and splits == 1
    return ForwardSchedule(
        blocking, path, width, chunks, items, foldable, single_rows, tabulated, non_temporal,
        native and not non_temporal, direct_non_temporal, nbytes,
        1 if nbytes < (machine.serial_bytes or SERIAL_BYTES) else 0,
        nbytes < (machine.wake_bytes or WAKE_BYTES),
        min(nbytes // STATIC_BYTES_PER_THREAD + 1, 1 << 30),
        nbytes >= GIL_RELEASE_MIN_BYTES,
    )  # fmt: skip


# --- Backward -------------------------------------------------------------------------------------
# A *cell* is what the sums of a group and those of a weight have in common (_core/backward.h).
# Items whose weight is the same one (`sharers` of an `owner`) add into the same cells, in their
# order; a fixed number of `parts` of them, merged in order, can run in parallel.

BackwardPath = Literal["rows", "groups", "items", "sweeps"]
# How those who share a weight are carried out:
#   rows    at equal distances, four at a time, from their sums to dx and the weights' gradients
#   groups  of planes with a weight each, from their sums to dx
#   items   one after the other, from the sums to dx while they are in cache
#   sweeps  the sums of all, then dx of all: each sweep is shared out among the threads
BACKWARD_PATHS: tuple[BackwardPath, ...] = ("items", "rows", "groups", "sweeps")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BackwardBlocking:
    """What decides the bits of a backward pass."""

    length: int  # reduced elements of a group, or rows of columns
    width: int  # columns of an item; along runs, groups side by side
    chunks: int  # items side by side
    own: tuple[bool, bool, bool]  # whether the weight differs along a, b and c of items
    inside: bool  # whether it differs within a run, or from row to row
    owners: int
    sharers: int  # of an owner: items = owners * sharers
    span: int  # elements, or rows, that are summed at a time
    segments: int  # of an item
    plane_segments: int  # of each plane where planes' weights differ, else 0
    cell_p: int  # from one plane's, row's or column's cell to the next
    cell_s: int
    cell_c: int
    cells: int  # of an owner
    parts: int
    sweeps: bool  # few large groups, or sums too many to keep: the two sweeps apart


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BackwardSchedule:
    """How a backward pass is carried out."""

    blocking: BackwardBlocking
    path: BackwardPath
    together: int  # items of an owner that are taken together
    few_owners: bool  # fewer than make tasks enough: their segments are shared out
    convert_weight: bool  # to the computing type, once for all rows
    non_temporal: bool  # dx is stored without going through the caches
    bf16_direct: bool  # bfloat16 is converted on the way
    bytes: int  # of x
    max_threads: int  # 1, or 0: as many as there are
    small: bool  # not worth waking a thread that sleeps
    always_non_temporal: bool  # whatever the sizes

    def threads(self, threads: int) -> int:
        """How many of so many threads are used."""
        return min(threads, self.max_threads) if self.max_threads else threads

    def sharing(self, threads: int) -> Literal["alone", "split", "dynamic"]:
        """How work is shared out; "split": all threads take segments of each owner."""
        if self.threads(threads) == 1:
            return "alone"
        return "split" if self.blocking.sweeps and self.few_owners else "dynamic"


@lru_cache(maxsize=4096)
def backward_schedule(
    layout: Walk, dtypes: Dtypes, machine: Machine, *, training: bool = True
) -> BackwardSchedule:
    """How a backward pass is carried out on a machine; the layout's "factor" is the weight."""
    types = {name: _type(dtype) for name, dtype in dtypes}
    x = types["x"]
    blocking = _backward_blocking(layout, x.size)
    a, b, _, s, _ = layout.dims
    nbytes = blocking.owners * blocking.sharers * blocking.width * blocking.length * x.size
    run = blocking.width if layout.columns else s
    if layout.columns and not blocking.inside and layout.strides["dx"][3] == blocking.width:
        run *= s  # rows that follow one another
    long = machine.always_non_temporal or run * types["dx"].size >= NON_TEMPORAL_MIN_RUN
    full = [types[name].name for name in ("x", "dy", "dx")]
    on_the_way = all(name == "bfloat16" for name in full)
    on_the_way = on_the_way and not (layout.columns and blocking.inside)
    long = long and (machine.always_non_temporal or not on_the_way)
    past = nbytes >= non_temporal_from(machine, layout.columns, backward=True) and long
    half = on_the_way and not past
    real = "float64" if x.name == "float64" else "float32"
    direct = half or all(name == real for name in full)
    in_cache = (
        blocking.inside
        and not layout.columns
        and blocking.length * BACKWARD_SHARED_RUNS * 2 * x.size <= BACKWARD_CACHED_BYTES
    )
    path: BackwardPath = "items"
    native = "weight" not in types or types["weight"].name == real
    w = layout.strides["factor"] if "weight" in types else _NONE
    in_place = native and w[4 if layout.columns else 3] in (0, 1)
    convert = blocking.inside and not (layout.columns or in_place or any(w[:3]))
    if blocking.sweeps:
        path = "sweeps"
    elif (
        in_cache
        and training
        and direct
        and blocking.width == layout.dims[2] == blocking.owners == 1
        and 1 in (a, b)
        and (in_place or convert)
    ):
        path = "rows"
    elif (
        blocking.plane_segments == 1
        and training
        and direct
        and native
        and not layout.columns
        and not past
    ):
        path = "groups"
    together = BACKWARD_SHARED_RUNS if in_cache else 1
    if blocking.sweeps:
        together = blocking.sharers
    return BackwardSchedule(
        blocking, path, together, blocking.owners < BACKWARD_FEW_TASKS, convert, past, half, nbytes,
        1 if nbytes < (machine.serial_backward_bytes or SERIAL_BYTES_BACKWARD) else 0,
        nbytes < (machine.wake_bytes or WAKE_BYTES),
        machine.always_non_temporal,
    )  # fmt: skip


def _backward_blocking(layout: Walk, size: int) -> BackwardBlocking:
    a, b, p, s, c = layout.dims
    columns, length = layout.columns, p * s
    w = layout.strides["dweight"]
    own_a, own_b, own_c = w[0] != 0, w[1] != 0, columns and w[4] != 0
    inside = w[3] != 0 or (columns and w[2] != 0)
    if columns:
        width, chunks = _tiles_of_columns(c, layout.neighbours)
        items = a * b * chunks
        owners = (a if own_a else 1) * (b if own_b else 1) * (chunks if own_c else 1)
    else:
        width = 1
        if own_b and not inside and s * size < SHORT_RUN_BYTES:
            # groups of short runs side by side, as they lie in memory
            width = min(
                b // BACKWARD_FEW_TASKS, TILE_GROUPS, SPLIT_BLOCKS * BLOCK // max(length, 1)
            )
            width = max(1, width)
        chunks = -(-b // width)
        items = a * chunks
        owners = (a if own_a else 1) * (chunks if own_b else 1)
    sharers = items // owners

    cell_c = int(w[4] != 0 if columns else width > 1)
    cells = width if cell_c else 1
    cell_s = cells if w[3] else 0
    cells *= s if w[3] else 1
    cell_p = cells if w[2] else 0
    cells *= p if w[2] else 1

    span = BACKWARD_SPAN_ROWS if columns else BACKWARD_SPAN
    plane_segments = 0
    if w[2] and p > 1 and not inside:
        plane_segments = -(-s // span)
        segments = p * plane_segments
    else:
        segments = -(-length // span)

    elements = owners * sharers * width * length
    sum_bytes = 16 * cells * owners
    allowed = (BACKWARD_SUM_BYTES + elements * size // 100) // sum_bytes
    parts = min(
        sharers, max(BACKWARD_PARTS // owners, 1), elements // BACKWARD_PART_ELEMENTS, allowed
    )
    parts = max(parts, 1)
    few = owners * parts < BACKWARD_FEW_TASKS
    # groups of short planes are not long, and in sweeps each plane costs as much as 100 numbers
    few = few and not (plane_segments and s < MIN_RUN)
    sweeps = few and elements >= BACKWARD_FEW_TASKS * BACKWARD_PART_ELEMENTS
    sweeps = sweeps or (inside and parts == 1 and cells > BACKWARD_OWN_CELLS)
    parts = 1 if sweeps else parts
    return BackwardBlocking(
        length, width, chunks, (own_a, own_b, own_c), inside, owners, sharers, span, segments,
        plane_segments, cell_p, cell_s, cell_c, cells, parts, sweeps,
    )  # fmt: skip
