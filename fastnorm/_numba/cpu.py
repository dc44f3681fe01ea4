"""The backend: what the Cython kernels offer, carried out by those that Numba compiles.

Kernels are compiled on first use, for the kind of number at hand, and kept on disk by Numba.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastnorm import _core, runtime
from fastnorm._numba import activations, backward, blocking, forward
from fastnorm._numba.blocking import ADDRESSES, APPLY, FINALIZE, MOMENTS, PASS, WHOLE
from fastnorm._numba.extents import CHECKED, size_of_room, spans_of, watched
from fastnorm._numba.memory import COUNTERS, SOURCES, alone, compiling, together
from fastnorm.layout import Layout
from fastnorm.problem import OPERANDS
from fastnorm.repeated import Answer, Repeat, is_like
from fastnorm.runtime import empty_like, kernel_threads
from fastnorm.schedule import (
    BACKWARD_CHUNK,
    BACKWARD_SHARED_RUNS,
    BLOCK,
    ITEMS_PER_THREAD,
    NON_TEMPORAL_MIN_RUN,
    SHORT_RUN_BYTES,
    SPLIT_BLOCKS,
    TILE_ELEMENTS,
    TILE_GROUPS,
    TURNS_PER_THREAD,
    BackwardSchedule,
    Dtypes,
    ForwardSchedule,
)

Array = NDArray[Any]
Room: TypeAlias = tuple[int, ...]  # how many numbers each part of a thread's memory has

_KINDS = {"float32": np.float32, "float64": np.float64, "float16": np.int16, "bfloat16": np.uint16}


@lru_cache(maxsize=16)
def _kind_of(dtype: np.dtype[Any]) -> type:
    """The kind of numbers of a dtype, whose name NumPy makes up every time."""
    return _KINDS[dtype.name]


# --- Kernels and threads --------------------------------------------------------------------------


_kernels: dict[tuple[Any, ...], Any] = {}


def _kernel(compiler: Callable[..., Any], *kinds: type) -> int:
    """The address of a kernel for numbers of some kinds."""
    key = compiler, *kinds
    found = _kernels.get(key)
    if found is None:
        with compiling():
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = compiler(*kinds, SOURCES)
    return int(found.address)


def _takes_several() -> bool:
    """Whether several of Python's threads may meet in the layer that Numba's threads come from."""
    try:
        return numba.threading_layer() in ("omp", "tbb")
    except ValueError:  # none has started
        return False


# Of a layer in which two may not meet: that ends the process.
_sharing = threading.Lock()


def _share(
    kernel: int, record: int, items: int, threads: int, task: int, room: Room, static: bool = False
) -> None:
    """Let up to so many threads take turns at the items of a kernel, each with room of its own.

    `record` is the address of a record. With `static` the shares are
    fixed: each core then finds its own in its cache.
    """
    # OpenMP, of which Numba's threads may be, ends or hangs a forked child that asks it for some
    threads = 1 if runtime.forked else min(threads, items, numba.config.NUMBA_NUM_THREADS)
    locked = False
    if threads > 1 and not _takes_several():
        # the count does not know threads that were started without `threading`, the lock does
        locked = threading.active_count() == 1 and _sharing.acquire(blocking=False)
        threads = threads if locked else 1
    try:
        _run(kernel, record, items, threads, task, room, static)
    finally:
        if locked:
            _sharing.release()


def _run(
    kernel: int, record: int, items: int, threads: int, task: int, parts: Room, static: bool
) -> None:
    room = size_of_room(parts)
    memory = np.empty(threads * room + 63, np.uint8)
    start = _address(memory)
    start += -start % 64
    with watched(spans=spans_of(start, parts, threads)):
        _call(kernel, record, items, threads, task, start, room, static)


def _call(
    kernel: int,
    record: int,
    items: int,
    threads: int,
    task: int,
    start: int,
    room: int,
    static: bool,
) -> None:
    if threads == 1:
        alone(kernel, record, start, task)
    else:
        before = numba.get_num_threads()  # of this thread; theirs who called
        if before != threads:
            numba.set_num_threads(threads)
        turns = threads if static else min(items, TURNS_PER_THREAD * threads)
        try:
            together(kernel, record, start, room, turns, task, threads)
        finally:
            if before != threads:
                numba.set_num_threads(before)


# --- Operands -------------------------------------------------------------------------------------

_Strides: TypeAlias = tuple[int, ...]


def _plain_address(array: Array) -> int:
    return array.ctypes.data


# Where the first element of an array lies; the compiled kernels tell it in a fiftieth of the time.
_address: Callable[[Array], int] = getattr(_core.kernels, "address_of", _plain_address)


def _operand(strides: _Strides | None, size: int) -> _Strides:
    """What a record holds of an operand: room for its address, and strides in bytes."""
    return (0, 0, 0, 0, 0, 0) if strides is None else (0, *(stride * size for stride in strides))


def _in_five(array: Array, strides: _Strides, dims: _Strides) -> Array:
    """An array along the five dimensions, 1 long where it is broadcast."""
    shape = tuple(n if stride else 1 for n, stride in zip(dims, strides))
    return as_strided(array, shape, tuple(stride * array.itemsize for stride in strides))


def _converted(
    array: Array, strides: _Strides, dims: _Strides, computing: Any
) -> tuple[Array, _Strides]:
    """A copy in the type that is computed in, and its strides."""
    with np.errstate(all="ignore"):  # a weight of doubles may become infinite
        five = _in_five(array, strides, dims).astype(computing, order="C")
    return five, tuple(
        0 if n == 1 else stride // five.itemsize for n, stride in zip(five.shape, five.strides)
    )


# --- Forward --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Plan:
    """What a kernel is told of every pass of a layout, but for addresses."""

    template: Array  # a record as whole numbers
    kernel: int
    room: Room
    schedule: ForwardSchedule
    items: int
    width: int
    non_temporal: bool
    followed: bool  # by a residual or an activation
    half: bool


class _Asked(NamedTuple):
    """What is asked of a forward pass, without its arrays."""

    centred: bool = True
    given: bool = False
    scaling: int = 0
    eps: float = 0.0
    activation: Any = 0
    activation_first: bool = False


def _dtypes(**arrays: Array | None) -> Dtypes:
    return tuple((name, array.dtype) for name, array in arrays.items() if array is not None)


def _planes_follow(layout: Layout, *operands: str) -> bool:
    """Whether the planes of a group are one run of each of these operands."""
    p, s = layout.dims[2:4]
    steps = (layout.strides[name] for name in operands)
    return p == 1 or all(step[2] == s * step[3] for step in steps)


@lru_cache(maxsize=4096)
def _plan(layout: Layout, schedule: ForwardSchedule, dtypes: Dtypes, asked: _Asked) -> _Plan:
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
        kernel = _kernel(forward.compile_columns, kind, computing)
        room = forward.columns_parts(width)
    else:
        kernel = _kernel(forward.compile_runs, kind, computing)
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
    record = np.zeros(1, PASS)
    record[0] = (
        0,
        *(_operand(steps.get(name), sizes.get(name, size)) for name in OPERANDS),
        *(_operand(stats, 8) for _ in range(3)),
        a, b, p, s, c, layout.neighbours, layout.columns, centred, given, scaling,
        activations.address_of(activation, computing), activation_first, non_temporal,
        residual_real, addend_real, foldable, folded_groups, _planes_follow(layout, source),
        written and _planes_follow(layout, source, "y"), length, width, chunks, items,
        numeric.block, numeric.splits, 0, 0, 0, 0, 0, 0, kept, alone,
        non_temporal and foldable and kind is np.float32, activation == 1, layout.shared, eps,
    )  # fmt: skip
    return _Plan(
        record.view(np.int64),
        kernel,
        room,
        schedule,
        items,
        width,
        non_temporal,
        "residual" in types or activation != 0 or activation_first,
        size == 2,
    )


# Places in a record, counted in whole numbers: slices are set in a third of the time.
_DATA = slice(len(COUNTERS), len(COUNTERS) + 6 * len(ADDRESSES), 6)
_AT = {name: int(PASS.fields[name][1]) // 8 for name in blocking.NUMBERS}  # type: ignore[index]


def _addresses(arrays: Mapping[str, Array | None]) -> dict[str, int]:
    """Where the arrays of a forward pass are, in the order of a record; 0: there is none."""
    given = {name: arrays.get(name) for name in ADDRESSES}
    return {name: 0 if array is None else _address(array) for name, array in given.items()}


def run_pass(
    layout: Layout,
    schedule: ForwardSchedule,
    x: Array,
    y: Array | None,
    mean: Array,
    var: Array,
    rstd: Array,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    residual: Array | None = None,
    addend: Array | None = None,
    total: Array | None = None,
    centred: bool = True,
    given: bool = False,
    scaling: int = 0,
    eps: float = 0.0,
    activation: Any = 0,
    activation_first: bool = False,
    threads: int = 1,
    ticket: Any = None,
    statistics: tuple[int, ...] = (),
) -> bool:
    """One pass of `layout` over x into y (None: statistics alone); whether the activation raised.

    Fills mean, var and rstd, or reads the first two where `given`. `activation` is a number, or a
    function that Numba has compiled (`activations`).
    """
    computing = np.float64 if x.dtype == np.float64 else np.float32
    added = []
    for name, array in (("residual", residual), ("addend", addend)):
        if array is not None and array.dtype != x.dtype and array.dtype != computing:
            array, strides = _converted(array, layout.strides[name], layout.dims, computing)
            layout = replace(layout, strides={**layout.strides, name: strides})
        added.append(array)
    residual, addend = added
    arrays = {
        "x": x, "y": y, "residual": residual, "addend": addend, "total": total, "mask": mask,
        "weight": weight, "bias": bias, "mean": mean, "var": var, "rstd": rstd,
    }  # fmt: skip
    dtypes = _dtypes(**{name: arrays[name] for name in OPERANDS})
    asked = _Asked(centred, given, scaling, eps, activation, activation_first)
    plan = _plan(layout, schedule, dtypes, asked)
    record = plan.template.copy()
    at = _addresses(arrays)
    record[_DATA] = list(at.values())
    if y is not None and not plan.non_temporal and at["x"] != at["y"]:
        # from x to y, through no tile
        record[_AT["plain"]] = not plan.followed
        record[_AT["direct"]] = not plan.half and at["residual"] != at["y"]
    with watched(record, *arrays.values()):
        table = _tabulated(plan, record) if plan.schedule.tabulated else None
    with watched(record, table, *arrays.values()):
        _carry_out(plan, record, threads, given=given, written=y is not None)
    if isinstance(ticket, Repeat):
        ticket.answer = partial(_repeated, plan, arrays, ticket, given)
    return bool(record[_AT["raised"]])


def _tabulated(plan: _Plan, record: Array) -> Array:
    """The scales that all samples share, made once; the record tells of them."""
    chunks = int(record[_AT["chunks"]])
    table = np.empty(chunks * blocking.SCALE * plan.width)
    record[_AT["scales"]], record[_AT["items"]] = _address(table), chunks
    with watched(table):
        _share(plan.kernel, _address(record), chunks, 1, FINALIZE, plan.room)
    record[_AT["items"]] = plan.items
    return table


def _repeated(
    plan: _Plan,
    arrays: Mapping[str, Array | None],
    repeat: Repeat,
    by_running: bool,
    results: Sequence[Array],
) -> Answer | None:
    """How to answer calls like that of a pass with nothing but its plan; None: not so simply."""
    made = [name for name in ("y", "total") if arrays[name] is not None]
    places = repeat.places({name: arrays[name] for name in OPERANDS if name not in made})
    schedule = plan.schedule
    if CHECKED or places is None or len(made) != len(results) or schedule.blocking.splits > 1:
        return None
    if any(not is_like(result, repeat.call[places["x"]]) for result in results):
        return None
    running = repeat.named("running_mean", "running_var") if by_running else ()
    groups = 0 if (rstd := arrays["rstd"]) is None else rstd.size
    if running is None or any(repeat.call[i].size != groups for i in running):
        return None  # statistics are given that are no arguments
    template = plan.template.copy()
    if not plan.non_temporal:
        template[_AT["plain"]], template[_AT["direct"]] = not plan.followed, not plan.half
    at = {name: _DATA.start + _DATA.step * i for i, name in enumerate(ADDRESSES)}
    of_x, given = places["x"], [(at[name], place) for name, place in places.items()]
    into, statistics = [at[name] for name in made], slice(at["mean"], at["rstd"] + 1, _DATA.step)
    kernel, items, room = plan.kernel, plan.items, plan.room
    size, serial = size_of_room(room) + 63, schedule.threads(2) == 1

    def answer(call: tuple[Any, ...]) -> Any:
        x = call[of_x]
        results = [empty_like(x) for _ in into]
        unread = np.empty(groups)  # statistics, that nobody asks for
        alive = [unread]
        record = template.copy()
        for place, i in given:
            record[place] = _address(call[i])
        for place, result in zip(into, results):
            record[place] = _address(result)
        record[statistics] = _address(unread)
        if running:
            with np.errstate(all="ignore"):  # of a signaling NaN
                alive += [call[i].astype(np.float64, order="C") for i in running]
            record[at["mean"]], record[at["var"]] = _address(alive[1]), _address(alive[2])
            if schedule.tabulated:
                alive.append(_tabulated(plan, record))
        if serial:
            memory = np.empty(size, np.uint8)
            start = _address(memory)
            alone(kernel, _address(record), start + -start % 64, WHOLE)
        else:
            threads = schedule.threads(kernel_threads())
            static = schedule.sharing(threads) == "static"
            _share(kernel, _address(record), items, threads, WHOLE, room, static)
        return results[0] if len(results) == 1 else tuple(results)

    return answer


def _carry_out(
    plan: _Plan, record: Array, threads: int, *, given: bool = False, written: bool = False
) -> None:
    """Run a kernel of items on their own, or of splits where they are few and large."""
    kernel, room, items = plan.kernel, plan.room, plan.items
    splits = plan.schedule.blocking.splits
    where = _address(record)
    threads, sharing = plan.schedule.threads(threads), plan.schedule.sharing(threads)
    if sharing != "split":
        _share(kernel, where, items, threads, WHOLE, room, sharing == "static")
        return
    # few large groups: all threads take splits of each; the merge is in the splits' order
    parts = np.empty(items * splits * blocking.FIELDS * plan.width)
    scales = np.empty(items * blocking.SCALE * plan.width)
    record[_AT["parts"]], record[_AT["scales"]] = _address(parts), _address(scales)
    with watched(parts, scales):
        if not given:
            _share(kernel, where, items * splits, threads, MOMENTS, room)
        _share(kernel, where, items, 1, FINALIZE, room)
        if written:
            _share(kernel, where, items * splits, threads, APPLY, room)


def run_moments(
    layout: Layout,
    schedule: ForwardSchedule,
    x: Array,
    fields: Array,
    *,
    mask: Array | None = None,
    threads: int = 1,
) -> None:
    """Moments of x into `fields`: count, mean, its rest, sum of squared deviations, its rest.

    The strides of the first field are the layout's "stats".
    """
    plan = _plan(layout, schedule, _dtypes(x=x, mask=mask), _Asked())
    record = plan.template.copy()
    first = fields[0]
    at = _addresses({"x": x, "mask": mask, "mean": first, "var": first, "rstd": first})
    record[_DATA] = list(at.values())
    record[_AT["fields"]] = fields.strides[0]
    with watched(record, x, mask, fields):
        _carry_out(plan, record, threads)


# --- Backward -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _BackPlan:
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


class _AskedBack(NamedTuple):
    """What is asked of a backward pass, and how two arrays lie that may be copies."""

    centred: bool
    training: bool
    has_mean: bool
    dy: _Strides
    weight: _Strides | None


@lru_cache(maxsize=4096)
def _back_plan(
    layout: Layout, schedule: BackwardSchedule, dtypes: Dtypes, asked: _AskedBack
) -> _BackPlan:
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
    terms = a * b * backward.TERMS
    if layout.columns:
        width, chunks = numeric.width, numeric.chunks
        items = a * b * chunks
        compiler, room = backward.compile_columns, backward.columns_parts(width)
        sums = (a, b, segments, 2 * c)
        terms = items * backward.OF_COLUMN * width
    elif not inside:
        if p > 1 and s * size < SHORT_RUN_BYTES:
            # planes of a group that follow one another are walked as they lie, unless they are few
            # numbers (group norm 8x256x32x32 bfloat16 490 to 390 us)
            most = TILE_ELEMENTS if steps["x"][2] == s else SPLIT_BLOCKS * BLOCK
            width = max(1, min(most // (p * s), b, TILE_GROUPS))
        chunks = -(-b // width)
        items = a * chunks
        compiler, room = backward.compile_planes, backward.RUNS_PARTS
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
        compiler, room = backward.compile_rows, backward.RUNS_PARTS
    # those who share a weight, and their segments, at once: in the order of memory, as Cython does
    own = [stride != 0 for stride in shared]
    own[2 if layout.columns else 3] = False
    axes = tuple(axis for axis, n in enumerate(sums[:-1]) if n > 1 and not own[axis])
    record = np.zeros(1, backward.BACK)
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
    return _BackPlan(
        record.view(np.int64),
        _kernel(compiler, kind, stored, computing),
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


def _is_compact(strides: _Strides, dims: _Strides) -> bool:
    """Whether elements follow one another along the dimensions that have strides."""
    n = 1
    for stride, size in zip(reversed(strides), reversed(dims)):
        if stride not in (0, n):
            return False
        n *= size if stride else 1
    return True


_BACK_DATA = slice(len(COUNTERS), len(COUNTERS) + 6 * len(backward.OPERANDS), 6)
_BACK_OWN = slice(-3, None)  # sums, terms, collected


def run_backward(
    layout: Layout,
    schedule: BackwardSchedule,
    x: Array,
    dy: Array,
    dx: Array,
    *,
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    dweight: Array,
    dbias: Array | None,
    centred: bool = True,
    training: bool = True,
    threads: int = 1,
    ticket: Any = None,
    own: tuple[int, ...] = (),
) -> bool:
    """One backward pass of `layout`: fills dx, dweight and, unless it is None, dbias.

    `weight` (None: 1 everywhere) may lie in any order; `dbias` lies as `dweight` does.
    False where there is no kernel: where, among columns, the weight differs from row to row.
    """
    own_weights = layout.strides["dweight"]
    if layout.columns and (own_weights[2] or own_weights[3]):
        return False
    computing = np.float64 if x.dtype == np.float64 else np.float32
    dims, of_dy, weights = layout.dims, layout.strides["dy"], layout.strides.get("factor")
    if dy.dtype != x.dtype and dy.dtype != computing:
        dy, of_dy = _converted(dy, of_dy, dims, computing)
    in_place = weights is not None and weights[3] in (0, 1)
    if weight is not None and weights is not None and not (in_place and weight.dtype == computing):
        weight, weights = _converted(weight, weights, dims, computing)
    dtypes = _dtypes(x=x, dy=dy, dx=dx, weight=weight)
    asked = _AskedBack(centred, training, mean is not None, of_dy, weights)
    plan = _back_plan(layout, schedule, dtypes, asked)
    sums, terms = np.empty(plan.sums), np.empty(plan.terms)
    collected = np.empty((plan.items, plan.parts, 2, plan.cells))
    record = plan.template.copy()
    operands = (x, dy, dx, weight, mean, rstd)
    record[_BACK_DATA] = [0 if array is None else _address(array) for array in operands]
    record[_BACK_OWN] = _address(sums), _address(terms), _address(collected)
    with watched(record, *operands, sums, terms, collected):
        _carry_back(plan, record, threads, dims[0] * dims[1], training)
    with np.errstate(all="ignore"):  # of infinities, and beyond half precision
        totals = _totals(plan, layout, sums, collected)
        for gradient, total in zip((dweight, dbias), totals):
            if gradient is None:
                continue
            if plan.flat and gradient.flags.c_contiguous:
                gradient[...] = total.reshape(gradient.shape)
            else:
                _in_five(gradient, layout.strides["dweight"], dims)[...] = total
    if isinstance(ticket, Repeat) and plan.flat and not CHECKED:
        given = dict(zip(backward.OPERANDS, operands))
        ticket.answer = partial(_repeated_backward, plan, layout, given, training, ticket)
    return True


def _repeated_backward(
    plan: _BackPlan,
    layout: Layout,
    arrays: Mapping[str, Array | None],
    training: bool,
    repeat: Repeat,
    results: Sequence[Array],
) -> Answer | None:
    """How to answer calls like that of a backward pass with nothing but its plan."""
    places = repeat.places({name: array for name, array in arrays.items() if name != "dx"})
    if places is None or not is_like(results[0], repeat.call[places["x"]]):
        return None
    if not all(gradient.flags.c_contiguous for gradient in results[1:]):
        return None
    at = {name: _BACK_DATA.start + _BACK_DATA.step * i for i, name in enumerate(backward.OPERANDS)}
    of_x, given = places["x"], [(at[name], place) for name, place in places.items()]
    gradients = [(gradient.shape, gradient.dtype) for gradient in results[1:]]
    groups = layout.dims[0] * layout.dims[1]

    def answer(call: tuple[Any, ...]) -> Any:
        dx = empty_like(call[of_x])
        sums, terms = np.empty(plan.sums), np.empty(plan.terms)
        collected = np.empty((plan.items, plan.parts, 2, plan.cells))
        record = plan.template.copy()
        for place, i in given:
            record[place] = _address(call[i])
        record[at["dx"]] = _address(dx)
        record[_BACK_OWN] = _address(sums), _address(terms), _address(collected)
        _carry_back(plan, record, kernel_threads(), groups, training)
        with np.errstate(all="ignore"):
            totals = _totals(plan, layout, sums, collected)
            found = [t.reshape(shape).astype(kind) for t, (shape, kind) in zip(totals, gradients)]
        return dx, *found

    return answer


def _carry_back(plan: _BackPlan, record: Array, threads: int, groups: int, training: bool) -> None:
    """Run a kernel of tasks on their own, or shared out where they are few and large."""
    where = _address(record)
    kernel, room, items, segments = plan.kernel, plan.room, plan.items, plan.segments
    tasks, threads = items * plan.parts, plan.schedule.threads(threads)
    few = items < ITEMS_PER_THREAD * threads
    apart = plan.parts == 1 and few and (plan.inside or items % threads != 0)
    if threads == 1 or not apart or (segments == 1 and not plan.inside):
        _share(kernel, where, tasks, threads, WHOLE, room)
    elif plan.inside:
        if training:
            _share(kernel, where, groups * segments, threads, MOMENTS, room)
        _share(kernel, where, items, 1, FINALIZE, room)
        _share(kernel, where, plan.turns, threads, APPLY, room)
    else:
        _share(kernel, where, items * segments, threads, MOMENTS, room)
        _share(kernel, where, items, 1, FINALIZE, room)
        _share(kernel, where, items * segments, threads, APPLY, room)


def _totals(plan: _BackPlan, layout: Layout, sums: Array, collected: Array) -> tuple[Array, Array]:
    """dweight and dbias along the five dimensions, each 1 long where it is shared."""
    s, c = layout.dims[3:]
    if plan.inside:
        both = collected[:, 0] if plan.parts == 1 else np.add.reduce(collected, axis=1)
        shape = (*plan.owners, s, 1)
        return both[:, 0].reshape(shape), both[:, 1].reshape(shape)
    total = np.add.reduce(sums, axis=plan.axes, keepdims=True) if plan.axes else sums
    if not layout.columns:
        return total[..., 1, None], total[..., 0, None]
    # item by item those of dy, then those of dy xhat
    if plan.width >= c:
        first, second = total[..., :c], total[..., c:]
    else:
        first, second = np.empty((2, *total.shape[:3], c))
        for start in range(0, c, plan.width):
            n = min(plan.width, c - start)
            first[..., start : start + n] = total[..., 2 * start : 2 * start + n]
            second[..., start : start + n] = total[..., 2 * start + n : 2 * start + 2 * n]
    first, second = first[..., None, :], second[..., None, :]
    if c > 1 and layout.strides["dweight"][4] == 0:
        first, second = (np.add.reduce(v, axis=4, keepdims=True) for v in (first, second))
    return second, first
