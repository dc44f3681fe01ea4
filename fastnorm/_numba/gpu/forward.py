"""The forward pass on a GPU: which kernels, in which order, over which memory."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from fastnorm._numba.gpu import blocking
from fastnorm._numba.gpu.blocking import BLOCK, CHUNK, blocks_of
from fastnorm._numba.gpu.contiguous import APPLY, SUMS, WHOLE, runs
from fastnorm._numba.gpu.copies import fill
from fastnorm._numba.gpu.launch import address, device_of, launch, plan_of
from fastnorm._numba.gpu.scales import PARTIAL, SCALE, given_scale, merge_parts
from fastnorm._numba.gpu.strided import column_apply, column_moments
from fastnorm._numba.gpu.views import Operands, Options, Statistics, Walk
from fastnorm._numba.gpu.walks import described, is_aligned, numbers_of, walk_of
from fastnorm._numba.slopes import slope_of
from fastnorm.arrays import ArrayView, empty_on
from fastnorm.layout import ALIKE, Layout
from fastnorm.problem import OPERANDS, Problem

_PLAN = ("x", "y", "other", "total", "mask", "weight", "bias", "stats")


def forward(p: Problem) -> None:
    """Execute a pass on the device."""
    x: Any = p.x
    if p.dy is not None:
        return _multiplied_by_slope(p)
    operands = {n: array for n in OPERANDS if (array := getattr(p, n)) is not None}
    operands |= {"mean": p.mean, "var": p.var, "stats": p.rstd}
    with device_of(x):
        layout, operands, write_back = described(
            operands, p.reduced, ("mean", "var", "stats"), ("y", "total")
        )
        (_columns if layout.columns else _runs)(p, layout, operands)
        write_back()
    return None


def _multiplied_by_slope(p: Problem) -> None:
    """The slope of the activation by a pass, and dy times that by another."""
    x, y, dy = (cast(ArrayView, array) for array in (p.x, p.y, p.dy))
    if x.dtype != y.dtype:  # of half precision
        x = empty_on(x, x.shape, y.dtype, x.strides)
        fill(x, cast(ArrayView, p.x))
    forward(slope_of(p, x))
    fill(y, y, other=dy, product=True)


def _added(operands: dict[str, Any]) -> str:
    """The name of what is added."""
    return "addend" if "addend" in operands else "residual"


def _walk(p: Problem, layout: Layout, operands: dict[str, Any]) -> tuple[Walk, int, int]:
    """How the kernels walk: what is read or written in chunks must be aligned."""
    x = operands["x"]
    names = [_added(operands) if n == "other" else n for n in _PLAN]
    plan = plan_of(x, numbers_of(layout, names))
    chunks = {n: o for n, o in operands.items() if n not in (*ALIKE, "stats", "mask")}
    width = CHUNK // x.itemsize
    return walk_of(layout, plan, width, is_aligned(layout, width, chunks))


def _addresses(operands: dict[str, Any]) -> tuple[Operands, Statistics]:
    """Where the operands are."""
    names = ("x", "y", _added(operands), "total", "mask", "weight", "bias")
    at = Operands(*(address(operands.get(n)) for n in names))
    return at, Statistics(*(address(operands[n]) for n in ("mean", "var", "stats")))


def _options(p: Problem) -> Options:
    return Options(float(p.eps), int(p.centred), int(p.scaling))


def _scale(
    p: Problem, x: ArrayView, walk: Walk, partial: ArrayView | None, adjacent: int, at: Statistics
) -> ArrayView:
    """Merge the moments of parts, or take the statistics given; the scale of each group."""
    scale: ArrayView = empty_on(x, (walk.groups * SCALE,), np.float64)
    if p.given:
        blocks = blocks_of(walk.groups)
        launch(given_scale, blocks, x, walk, _options(p), address(scale), at)
    else:
        lanes = blocking.lanes_of(walk.parts * adjacent)
        merge = merge_parts(lanes, p.x.dtype.name == "float64")
        blocks = blocks_of(walk.groups, BLOCK // lanes)
        launch(merge, blocks, x, walk, address(partial), _options(p), address(scale), at)
    return scale


def _runs(p: Problem, layout: Layout, operands: dict[str, Any]) -> None:
    x: ArrayView = operands["x"]
    kind = p.x.dtype.name
    added = operands.get(_added(operands))
    other = kind if added is None else added.dtype.name
    walk, blocks, team = _walk(p, layout, operands)
    at, statistics = _addresses(operands)
    options = _options(p)
    choice = (kind, other, team)
    last = (p.activation if at.y else None, p.activation_first)
    if walk.parts == 1 and not p.given:
        kernel = runs(*choice, WHOLE, *last)
        return launch(kernel, blocks, x, walk, at, options, 0, 0, statistics)
    partial = None
    if not p.given:
        partial = empty_on(x, (walk.groups * walk.parts * PARTIAL,), np.float64)
        kernel = runs(*choice, SUMS, None, False)
        launch(kernel, blocks, x, walk, at, options, address(partial), 0, statistics)
    scale = _scale(p, x, walk, partial, layout.neighbours, statistics)
    if at.y:
        kernel = runs(*choice, APPLY, *last)
        launch(kernel, blocks, x, walk, at, options, 0, address(scale), statistics)
    return None


def _columns(p: Problem, layout: Layout, operands: dict[str, Any]) -> None:
    if "addend" in operands:
        total = operands["total"]
        fill(total, operands["x"], other=operands["addend"])
        strides = dict(layout.strides)
        strides["x"] = strides["total"]
        layout = Layout(layout.columns, layout.dims, layout.neighbours, strides)
        operands = {n: o for n, o in operands.items() if n not in ("addend", "total")}
        operands["x"] = total
    x: ArrayView = operands["x"]
    kind = p.x.dtype.name
    added = operands.get("residual")
    other = kind if added is None else added.dtype.name
    walk, blocks, _ = _walk(p, layout, operands)
    at, statistics = _addresses(operands)
    a, b, *_, columns = layout.dims
    partial = None
    if not p.given:
        partial = empty_on(x, (a * b * walk.parts * columns * PARTIAL,), np.float64)
        launch(column_moments(kind), blocks, x, walk, at, _options(p), address(partial))
    scale = _scale(p, x, walk, partial, layout.neighbours, statistics)
    if at.y:
        kernel = column_apply(kind, other, p.activation, p.activation_first)
        launch(kernel, blocks, x, walk, at, address(scale))
