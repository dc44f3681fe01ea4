"""The backward pass: which kernel, with which arrays, and weights' gradients from its sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fastnorm._numba import backward_contiguous as contiguous
from fastnorm._numba import backward_strided as strided
from fastnorm._numba.backward_loops import APPLY, MOMENTS, WHOLE
from fastnorm._numba.compiling import SOURCES, compiling
from fastnorm._numba.operands import (
    Array,
    Strides,
    array_type,
    computed,
    converted,
    flat,
    in_five,
    nothing,
    steps_of,
)
from fastnorm._numba.threads import run
from fastnorm.layout import Layout
from fastnorm.schedule import BACKWARD_CHUNK, ITEMS_PER_THREAD, BackwardSchedule

_NOWHERE = (0, 0, 0, 0, 0)
_kernels: dict[tuple[Any, ...], Any] = {}


def _kernel(compiler: Any, dtypes: tuple[Any, ...], parallel: bool) -> Any:
    """The kernel for x and dy of some types, compiled on its first use."""
    key = compiler, dtypes, parallel
    found = _kernels.get(key)
    if found is None:
        x, dy = dtypes
        double = types.float64
        kept = 4 if compiler is strided.compile_columns else 3
        arrays = types.Tuple(
            [
                array_type(x), array_type(dy), array_type(x, writable=True),
                array_type(computed(x)), array_type(np.float64), array_type(np.float64),
                *(types.Array(double, n, "C") for n in (kept, 3)),
            ]
        )  # fmt: skip
        whole = types.Array(types.int64, 1, "C")
        signature = types.void(
            types.int64, types.int64, types.int64, types.Array(types.int64, 2, "C"), whole, arrays
        )
        with compiling():
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = compiler(signature, parallel, SOURCES)
    return found


@dataclass(slots=True)
class _Plan:
    """What a kernel is told of every backward pass of a layout."""

    kernel_of: Any
    steps: Array
    numbers: Array
    items: int
    segments: int  # of an item; of a group where the weight differs along a run
    groups: int
    inside: bool  # the weight differs along a run
    parts: int
    chunks: int  # of all owners, where it does
    sums: tuple[int, ...]
    collected: tuple[int, ...]
    five: tuple[int, ...]  # the sums along the five dimensions
    axes: tuple[int, ...]  # along which they are added up
    statistics: Strides  # dims, of which c counts groups


class _Asked(NamedTuple):
    """What is asked of a backward pass, and how arrays lie that may be copies."""

    centred: bool
    training: bool
    mean: bool
    dy: Strides
    weight: Strides


@lru_cache(maxsize=4096)
def _plan(layout: Layout, schedule: BackwardSchedule, dtypes: tuple[Any, ...], q: _Asked) -> _Plan:
    blocking, steps = schedule.blocking, layout.strides
    a, b, p, s, c = layout.dims
    own = [stride != 0 for stride in steps["dweight"]]
    stats = steps["stats"]
    dims = layout.dims
    counted = (a, b, p, s, c // layout.neighbours)
    full = [steps_of(lie, dims) for lie in (steps["x"], q.dy, steps["dx"], q.weight)]
    groups = [steps_of(lie, counted) for lie in (stats if q.mean else _NOWHERE, stats)]
    segments, items, collected, chunks = blocking.segments, a * b, (0, 0, 0), 1
    if layout.columns:
        if blocking.width > strided.ROOM:
            raise AssertionError(f"a tile of {blocking.width} columns")
        compiler, items = strided.compile_columns, a * b * blocking.chunks
        sums: tuple[int, ...] = (a * b, segments, 2, c)
        five: tuple[int, ...] = (a, b, segments, 2, c)
        numbers: tuple[int, ...] = (
            a, b, p, s, c, q.centred, q.training, segments, layout.neighbours, blocking.width,
            blocking.chunks,
        )  # fmt: skip
        shared = (not own[0], not own[1], True, False, not own[4])
    else:
        compiler = contiguous.compile_rows if blocking.inside else contiguous.compile_planes
        if blocking.inside:
            items = blocking.owners * blocking.parts
            collected = (items, 2, blocking.cells)
            chunks = blocking.owners * (p if own[2] else 1) * -(-s // BACKWARD_CHUNK)
        of_plane = 0 if blocking.inside else blocking.plane_segments
        sums = (a * b, segments, 2)
        five = (a, b, p, of_plane, 2) if of_plane else (a, b, 1, segments, 2)
        numbers = (
            a, b, p, s, q.centred, q.training, segments, of_plane, *own[:3],
            a * b // blocking.owners, blocking.parts,
        )  # fmt: skip
        shared = (not own[0], not own[1], not own[2], True, False)
    return _Plan(
        partial(_kernel, compiler, dtypes),
        np.array(full + groups, np.int64),
        np.array(numbers, np.int64),
        items,
        segments,
        a * b,
        blocking.inside,
        blocking.parts,
        chunks,
        sums,
        collected,
        five,
        tuple(axis for axis, n in enumerate(five) if n > 1 and shared[axis]),
        counted,
    )


def _compact(shape: Strides) -> Strides:
    """Strides in elements of an array in memory order; 0 where it is 1 long."""
    steps, n = [], 1
    for size in reversed(shape):
        steps.append(n if size > 1 else 0)
        n *= size
    return tuple(reversed(steps))


def _ones(layout: Layout, inside: bool, dtype: Any) -> tuple[Array, Strides]:
    """A weight of 1 everywhere, and its strides."""
    return np.ones(layout.dims[3] if inside else 1, dtype), (0, 0, 0, int(inside), 0)


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
    dims, gradients = layout.dims, layout.strides["dweight"]
    if layout.columns and (gradients[2] or gradients[3]):
        return False
    real, inside = computed(x.dtype), schedule.blocking.inside
    of_dy = layout.strides["dy"]
    if dy.dtype != x.dtype and dy.dtype != real:
        dy, of_dy = converted(dy, of_dy, dims, real)
    if weight is None:
        weight, weights = _ones(layout, inside, real)
    else:
        weights = layout.strides["factor"]
        if inside and weights[3] != 1:
            five = in_five(weight, weights, dims)
            five = np.broadcast_to(five, (*five.shape[:3], dims[3], 1))
            weight, weights = five.astype(real, order="C"), _compact(five.shape)
        elif weight.dtype != real:
            weight, weights = converted(weight, weights, dims, real)
    asked = _Asked(centred, training, mean is not None, of_dy, weights)
    plan = _plan(layout, schedule, (x.dtype, dy.dtype), asked)
    stats = layout.strides["stats"]
    sums, collected = np.empty(plan.sums), np.empty(plan.collected)
    arrays = (
        flat(x, layout.strides["x"], dims),
        flat(dy, of_dy, dims),
        flat(dx, layout.strides["dx"], dims),
        flat(weight, weights, dims),
        nothing(np.float64) if mean is None else flat(mean, stats, plan.statistics),
        flat(rstd, stats, plan.statistics),
        sums,
        collected,
    )
    _share(plan, schedule.threads(threads), training, arrays)
    with np.errstate(all="ignore"):  # of infinities, and beyond half precision
        for gradient, total in zip((dweight, dbias), _totals(plan, layout, sums, collected)):
            if gradient is not None:
                in_five(gradient, gradients, dims)[...] = total
    return True


def _share(plan: _Plan, threads: int, training: bool, arrays: tuple[Array, ...]) -> None:
    """Run a kernel on items one by one, or on segments of items where they are few and large."""

    def carry_out(task: int, items: int, threads: int) -> None:
        run(plan.kernel_of, items, threads, task, plan.steps, plan.numbers, arrays)

    few = plan.items < ITEMS_PER_THREAD * threads
    apart = few and (plan.parts == 1 if plan.inside else plan.items % threads != 0)
    if threads == 1 or not apart or (plan.segments == 1 and not plan.inside):
        carry_out(WHOLE, plan.items, threads)
    else:
        if training or not plan.inside:
            carry_out(
                MOMENTS, (plan.groups if plan.inside else plan.items) * plan.segments, threads
            )
        carry_out(APPLY, plan.chunks if plan.inside else plan.items * plan.segments, threads)


def _totals(plan: _Plan, layout: Layout, sums: Array, collected: Array) -> tuple[Array, Array]:
    """dweight and dbias along the five dimensions, each 1 long where it is shared."""
    if plan.inside:
        parts = collected.reshape(-1, plan.parts, *plan.collected[1:])
        both = parts[:, 0] if plan.parts == 1 else np.add.reduce(parts, axis=1)
        own = [n if stride else 1 for n, stride in zip(layout.dims, layout.strides["dweight"])]
        return both[:, 0].reshape(own), both[:, 1].reshape(own)
    total = sums.reshape(plan.five)
    total = np.add.reduce(total, axis=plan.axes, keepdims=True) if plan.axes else total
    if layout.columns:
        return total[:, :, :, 1:], total[:, :, :, :1]
    return total[..., 1, None], total[..., 0, None]
