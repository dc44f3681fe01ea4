"""The backward pass on a GPU: sums of parameters' gradients, those of groups, and dx."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastnorm._numba.gpu import blocking
from fastnorm._numba.gpu.blocking import BLOCK, CHUNK, blocks_of
from fastnorm._numba.gpu.contiguous import APPLY, SUMS, WHOLE
from fastnorm._numba.gpu.contiguous_backward import run_gradients
from fastnorm._numba.gpu.launch import address, device_of, launch, plan_of
from fastnorm._numba.gpu.scales import merge_sums
from fastnorm._numba.gpu.strided_backward import column_gradients, column_slopes
from fastnorm._numba.gpu.views import BackwardOperands, Sums, Walk
from fastnorm._numba.gpu.walks import described, is_aligned, numbers_of, walk_of
from fastnorm.arrays import ArrayView, empty_on
from fastnorm.layout import Layout
from fastnorm.problem import BackwardProblem

Pair = tuple[ArrayView, ArrayView]  # sums of g and of g xhat


def backward(p: BackwardProblem) -> None:
    """Execute a backward pass on the device."""
    x: Any = p.x
    # What weight and bias get are sums of dy xhat and of dy over what shares them.
    own = tuple(n == 1 for n in p.dweight.shape)
    whole = zip(own, p.reduced, x.shape, strict=True)
    same = all(mine == theirs or n == 1 for mine, theirs, n in whole)
    with device_of(x):
        sums = _sums(p, own, p.dweight.shape, same=same, weighted=False)
        for gradient, total in ((p.dbias, sums[0]), (p.dweight, sums[1])):
            if gradient is not None:
                x.device.convert(total, gradient)
        _slopes(p, sums if same else None)


@dataclass(slots=True, eq=False, repr=False)
class _Launch:
    """What the kernels of one walk backward have in common."""

    x: ArrayView
    layout: Layout
    kinds: tuple[str, str, str]  # the dtypes of x, of dy and of the weight
    walk: Walk
    blocks: int
    team: int
    at: BackwardOperands


def _prepared(operands: dict[str, Any], layout: Layout) -> _Launch:
    x = operands["x"]
    width = CHUNK // x.itemsize
    each = "each" if "each" in operands else "stats"
    plan = plan_of(x, numbers_of(layout, ("x", "dy", "dx", "weight", each, "stats")))
    chunks = {n: o for n, o in operands.items() if n in ("x", "dy", "dx", "weight")}
    walk, blocks, team = walk_of(layout, plan, width, is_aligned(layout, width, chunks))
    kind = x.dtype.name
    factor = operands["weight"].dtype.name if "weight" in operands else kind
    kinds = (kind, operands["dy"].dtype.name, factor)
    rstd = next(n for n in ("each", "rstd", "stats") if n in operands)
    names = ("x", "dy", "dx", "weight", "mean", rstd)
    at = BackwardOperands(*(address(operands.get(n)) for n in names))
    return _Launch(x, layout, kinds, walk, blocks, team, at)


def _sums(
    p: BackwardProblem, reduced: tuple[bool, ...], shape: Any, *, same: bool, weighted: bool
) -> Pair:
    """Sums of g and of g xhat over the reduced axes, of this shape; g = dy, or weight dy.

    `same`: these axes are those of the statistics, and the sums lie as they do. Otherwise an
    element has a mean and rstd of its own, and the sums lie as x does.
    """
    like: Any = p.x
    axes = None if same else like.strides
    sums = (empty_on(like, shape, np.float64, axes), empty_on(like, shape, np.float64, axes))
    operands: dict[str, Any] = {"x": p.x, "dy": p.dy, "stats": sums[0], "gx": sums[1]}
    operands["rstd" if same else "each"] = p.rstd
    if p.mean is not None:
        operands["mean"] = p.mean
    if weighted and p.weight is not None:
        operands["weight"] = p.weight
    # all of them, or none: the kernels walk rstd and mean by the strides of the sums
    statistics = ("stats", "gx", "rstd", "mean")
    stays, written = (statistics, ()) if same else ((), statistics[:2])
    layout, operands, write_back = described(operands, reduced, stays, written)
    own = _prepared(operands, layout)
    a, b, *_, columns = layout.dims
    partial = empty_on(own.x, (a * b * own.walk.parts * columns * 2,), np.float64)
    totals = Sums(address(operands["stats"]), address(operands["gx"]))
    if layout.columns:
        kernel = column_gradients(*own.kinds, same)
        launch(kernel, own.blocks, own.x, own.walk, own.at, address(partial))
    else:
        kernel = run_gradients(*own.kinds, own.team, SUMS)
        launch(kernel, own.blocks, own.x, own.walk, own.at, address(partial), totals, 1.0, 1)
    lanes = blocking.lanes_of(own.walk.parts * layout.neighbours)
    blocks = blocks_of(own.walk.groups, BLOCK // lanes)
    launch(merge_sums(lanes), blocks, own.x, own.walk, address(partial), totals)
    write_back()
    return sums


def _slopes(p: BackwardProblem, sums: Pair | None) -> None:
    """dx; `sums` are those of dy alone, where the weight is one for each group."""
    weighted = sums is None
    operands: dict[str, Any] = {"x": p.x, "dy": p.dy, "dx": p.dx, "stats": p.rstd}
    others = {"mean": p.mean, "weight": p.weight}
    operands |= {name: array for name, array in others.items() if array is not None}
    stays = ("stats", "mean", "g", "gx")
    layout, walked, write_back = described(operands, p.reduced, stays, ("dx",))
    own = _prepared(walked, layout)
    whole = p.training and sums is None and not layout.columns and own.walk.parts == 1
    if p.training and not whole:
        if sums is None:
            kept = [1 if r else n for n, r in zip(p.x.shape, p.reduced, strict=True)]
            sums = _sums(p, p.reduced, kept, same=True, weighted=True)
        operands |= {"g": sums[0], "gx": sums[1]}
        layout, walked, write_back = described(operands, p.reduced, stays, ("dx",))
        own = _prepared(walked, layout)
    totals = Sums(address(walked.get("g")), address(walked.get("gx")))
    length = float(math.prod(n for n, r in zip(p.x.shape, p.reduced, strict=True) if r))
    if layout.columns:
        kernel = column_slopes(*own.kinds)
        launch(kernel, own.blocks, own.x, own.walk, own.at, totals, length, int(weighted))
    else:
        kernel = run_gradients(*own.kinds, own.team, WHOLE if whole else APPLY)
        launch(kernel, own.blocks, own.x, own.walk, own.at, 0, totals, length, int(weighted))
    write_back()
