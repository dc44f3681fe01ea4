"""Threads for kernels, and the parts in which a pass is carried out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fastnorm import _core, runtime
from fastnorm._numba import blocking
from fastnorm._numba.blocking import APPLY, FINALIZE, MOMENTS, WHOLE
from fastnorm._numba.extents import size_of_room, spans_of, watched
from fastnorm._numba.memory import alone, together
from fastnorm._numba.plans import AT, BackPlan, Plan, Room
from fastnorm.layout import Layout
from fastnorm.schedule import ITEMS_PER_THREAD, TURNS_PER_THREAD

Array = NDArray[Any]


def _plain_address(array: Array) -> int:
    return array.ctypes.data


# Where the first element of an array lies; the compiled kernels tell it in a fiftieth of the time.
address: Callable[[Array], int] = getattr(_core.kernels, "address_of", _plain_address)


def scratch(size: int) -> tuple[Array, int]:
    """So many bytes for a kernel, and where they begin: at a line of the caches."""
    memory = np.empty(size // 8 + 9)
    start = address(memory)
    return memory, start + -start % 64


# --- Threads --------------------------------------------------------------------------------------


def _takes_several() -> bool:
    """Whether several of Python's threads may meet in the layer that Numba's threads come from."""
    try:
        return numba.threading_layer() in ("omp", "tbb")
    except ValueError:  # none has started
        return False


# Of a layer in which two may not meet: that ends the process.
_sharing = threading.Lock()


def share(
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
    size = size_of_room(room)
    try:
        memory, start = scratch(threads * size)
        with watched(spans=spans_of(start, room, threads)):
            if threads == 1:
                alone(kernel, record, start, task)
            else:
                turns = threads if static else min(items, TURNS_PER_THREAD * threads)
                _together(kernel, record, start, size, turns, task, threads)
        del memory
    finally:
        if locked:
            _sharing.release()


def _together(
    kernel: int, record: int, start: int, size: int, turns: int, task: int, threads: int
) -> None:
    before = numba.get_num_threads()  # of this thread; theirs who called
    if before != threads:
        numba.set_num_threads(threads)
    try:
        together(kernel, record, start, size, turns, task, threads)
    finally:
        if before != threads:
            numba.set_num_threads(before)


# --- Passes ---------------------------------------------------------------------------------------


def tabulated(plan: Plan, record: Array) -> Array:
    """The scales that all samples share, made once; the record tells of them."""
    chunks = int(record[AT["chunks"]])
    table = np.empty(chunks * blocking.SCALE * plan.width)
    record[AT["scales"]], record[AT["items"]] = address(table), chunks
    with watched(table):
        share(plan.kernel, address(record), chunks, 1, FINALIZE, plan.room)
    record[AT["items"]] = plan.items
    return table


def carry_out(
    plan: Plan, record: Array, threads: int, *, given: bool = False, written: bool = False
) -> None:
    """Run a kernel of items on their own, or of splits where they are few and large."""
    kernel, room, items = plan.kernel, plan.room, plan.items
    splits = plan.schedule.blocking.splits
    where = address(record)
    threads, sharing = plan.schedule.threads(threads), plan.schedule.sharing(threads)
    if sharing != "split":
        share(kernel, where, items, threads, WHOLE, room, sharing == "static")
        return
    # few large groups: all threads take splits of each; the merge is in the splits' order
    parts = np.empty(items * splits * blocking.FIELDS * plan.width)
    scales = np.empty(items * blocking.SCALE * plan.width)
    record[AT["parts"]], record[AT["scales"]] = address(parts), address(scales)
    with watched(parts, scales):
        if not given:
            share(kernel, where, items * splits, threads, MOMENTS, room)
        share(kernel, where, items, 1, FINALIZE, room)
        if written:
            share(kernel, where, items * splits, threads, APPLY, room)


def carry_back(plan: BackPlan, record: Array, threads: int, groups: int, training: bool) -> None:
    """Run a kernel of tasks on their own, or shared out where they are few and large."""
    where = address(record)
    kernel, room, items, segments = plan.kernel, plan.room, plan.items, plan.segments
    tasks, threads = items * plan.parts, plan.schedule.threads(threads)
    few = items < ITEMS_PER_THREAD * threads
    apart = plan.parts == 1 and few and (plan.inside or items % threads != 0)
    if threads == 1 or not apart or (segments == 1 and not plan.inside):
        share(kernel, where, tasks, threads, WHOLE, room)
    elif plan.inside:
        if training:
            share(kernel, where, groups * segments, threads, MOMENTS, room)
        share(kernel, where, items, 1, FINALIZE, room)
        share(kernel, where, plan.turns, threads, APPLY, room)
    else:
        share(kernel, where, items * segments, threads, MOMENTS, room)
        share(kernel, where, items, 1, FINALIZE, room)
        share(kernel, where, items * segments, threads, APPLY, room)


def totals(plan: BackPlan, layout: Layout, kept: Array) -> tuple[Array, Array]:
    """dweight and dbias, from what was collected inside or from sums."""
    if plan.inside:
        both = kept[:, 0] if plan.parts == 1 else np.add.reduce(kept, axis=1)
        return both[:, 0], both[:, 1]
    total = np.add.reduce(kept, axis=plan.axes, keepdims=True) if plan.axes else kept
    if not layout.columns:
        return total[..., 1], total[..., 0]
    # item by item those of dy, then those of dy xhat
    c = layout.dims[4]
    if plan.width >= c:
        first, second = total[..., :c], total[..., c:]
    else:
        first, second = np.empty((2, *total.shape[:3], c))
        for start in range(0, c, plan.width):
            n = min(plan.width, c - start)
            first[..., start : start + n] = total[..., 2 * start : 2 * start + n]
            second[..., start : start + n] = total[..., 2 * start + n : 2 * start + 2 * n]
    if c > 1 and layout.strides["dweight"][4] == 0:
        first, second = (np.add.reduce(v, axis=3, keepdims=True) for v in (first, second))
    return second, first
