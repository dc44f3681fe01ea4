"""The kernels for gradients of columns: sums of g and g xhat, g = weight dy, and dx."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from fastnorm._numba.gpu.blocking import BLOCK, CHUNK, LANES, ROWS
from fastnorm._numba.gpu.elements import (
    chunk_loader,
    chunk_storer,
    computing,
    loader,
    read_double,
    read_word,
    size_of,
    write_double,
)
from fastnorm._numba.gpu.gradients import gradient, gradient_of, holds_group, holds_weight
from fastnorm._numba.gpu.package import arithmetic, cuda, device, kernel
from fastnorm._numba.gpu.reductions import column_totals
from fastnorm._numba.gpu.views import (
    ADJACENT,
    BDX,
    BDY,
    BSTATS,
    BSUMS,
    BWEIGHT,
    BX,
    B,
    C,
    base,
    column_fetcher,
    corner_of,
    divided,
    stride,
    tile_of,
    view_of,
)

fma = arithmetic.fma


@cache
def column_gradients(kind: str, other: str, factor: str, same: bool) -> Any:
    """The kernel that sums g and g xhat of each column, over some of the rows.

    `same`: a group has one mean and rstd; otherwise each element has its own.
    """
    real = computing(kind)
    size, other_size, factor_size = size_of(kind), size_of(other), size_of(factor)
    width = CHUNK // size
    across = LANES * width
    depth = 2  # chunks of x and of dy
    ahead = depth * width
    fetch = column_fetcher(kind, real, width, depth)
    fetch_slope = column_fetcher(other, real, width, depth)
    load_weight = loader(factor, real)
    totals_of = column_totals(width)
    shared_size = BLOCK * width

    @kernel
    def gradients_kernel(walk: Any, operands: Any, partial: Any) -> None:
        shared = cuda.shared.array(shared_size, types.float64)
        tid = np.int64(cuda.threadIdx.x)
        plan, parts = walk.plan, walk.parts
        corner = corner_of(plan, parts, width)
        tile = tile_of(walk, corner, tid, width)
        columns = read_word(plan, C)
        a, b = corner.a, corner.b
        at = corner.column + tid % LANES * width if tile.n > 0 else np.int64(0)
        adjacent = read_word(plan, ADJACENT)
        x = view_of(plan, BX, operands.x, size, a, b, at)
        dy = view_of(plan, BDY, operands.dy, other_size, a, b, at)
        weight = view_of(plan, BWEIGHT, operands.weight, factor_size, a, b, at)
        rstds = view_of(plan, BSTATS, operands.rstd, 8, a, b, 0)
        means = view_of(plan, BSTATS, operands.mean, 8, a, b, 0)
        v = cuda.local.array(ahead, real)
        g = cuda.local.array(ahead, real)
        one = cuda.local.array(width, types.float64)
        second = cuda.local.array(width, types.float64)
        for k in range(width):
            one[k] = second[k] = np.float64(0.0)
        i = tile.first
        while i < tile.high:
            fetch(x, tile, i, v)
            fetch_slope(dy, tile, i, g)
            for j in range(depth):
                p, q = divided(i, tile.s)
                for k in range(width):
                    if i < tile.high and k < tile.n:
                        c = divided(at + k, adjacent)[0] if same else at + k
                        place = p * rstds.p + q * rstds.s + c * rstds.c
                        slope = np.float64(g[j * width + k])
                        if weight.address != 0:
                            own = p * weight.p + q * weight.s + k * weight.c
                            slope *= np.float64(load_weight(weight.address, own))
                        mean = read_double(means.address, place) if means.address != 0 else 0.0
                        rstd = read_double(rstds.address, place)
                        xhat = (np.float64(v[j * width + k]) - mean) * rstd
                        one[k] += slope
                        second[k] = fma(slope, xhat, second[k])
                i += ROWS
        total_one = totals_of(one, shared, tid)
        total_second = totals_of(second, shared, tid)
        if tid < across and corner.column + tid < columns:
            row = (a * read_word(plan, B) + b) * parts + corner.part
            place = (row * columns + corner.column + tid) * 2
            write_double(partial, place, total_one)
            write_double(partial, place + 1, total_second)

    return gradients_kernel


@cache
def column_slopes(kind: str, other: str, factor: str) -> Any:
    """The kernel for dx of columns."""
    real = computing(kind)
    double = real is np.float64
    size, other_size, factor_size = size_of(kind), size_of(other), size_of(factor)
    width = CHUNK // size
    load_chunk = chunk_loader(kind, real, width)
    load_slope = chunk_loader(other, real, width)
    load_weight = loader(factor, real)
    store_chunk = chunk_storer(kind, width)
    gradient_of_one = gradient_of(kind)

    @device
    def constants(
        plan: Any, operands: Any, sums: Any, corner: Any, column: Any, value: Any, length: Any
    ) -> Any:  # fmt: skip
        """Mean, rstd, c1 and c2 of a column; the sums are taken times `value`."""
        c = divided(column, read_word(plan, ADJACENT))[0]
        a, b = corner.a, corner.b
        place = base(plan, BSTATS, a, b) + c * stride(plan, BSTATS, C)
        rstd = read_double(operands.rstd, place)
        mean = read_double(operands.mean, place) if operands.mean != 0 else 0.0
        one = two = 0.0
        if sums.g != 0:
            f = rstd / length * value
            place = base(plan, BSUMS, a, b) + c * stride(plan, BSUMS, C)
            one = read_double(sums.g, place) * f if operands.mean != 0 else 0.0
            two = read_double(sums.gx, place) * f
        return mean, rstd, one, two

    @device
    def value_of(weight: Any, k: Any, weighted: Any) -> Any:
        """What sums of dy alone are taken times: one weight for all of a column."""
        value = np.float64(1.0)
        if not weighted and weight.address != 0:
            value = np.float64(load_weight(weight.address, k * weight.c))
        return value

    @kernel
    def slopes_kernel(walk: Any, operands: Any, sums: Any, length: Any, weighted: Any) -> None:
        tid = np.int64(cuda.threadIdx.x)
        plan = walk.plan
        corner = corner_of(plan, walk.parts, width)
        tile = tile_of(walk, corner, tid, width)
        if tile.n <= 0:
            return
        a, b = corner.a, corner.b
        at = corner.column + tid % LANES * width
        x = view_of(plan, BX, operands.x, size, a, b, at)
        dy = view_of(plan, BDY, operands.dy, other_size, a, b, at)
        dx = view_of(plan, BDX, operands.dx, size, a, b, at)
        weight = view_of(plan, BWEIGHT, operands.weight, factor_size, a, b, at)
        v = cuda.local.array(width, real)
        g = cuda.local.array(width, real)
        hi = cuda.local.array(width, real)
        r = cuda.local.array(width, real)
        shift = cuda.local.array(width, real)
        c1 = cuda.local.array(width, real)
        c2 = cuda.local.array(width, real)
        out_of_range = False
        for k in range(width):
            hi[k] = r[k] = shift[k] = c1[k] = c2[k] = real(0)
            if k < tile.n:
                value = value_of(weight, k, weighted)
                mean, rstd, one, two = constants(
                    plan, operands, sums, corner, at + k, value, length
                )  # fmt: skip
                hi[k] = real(mean)
                r[k] = real(rstd)
                shift[k] = real((np.float64(hi[k]) - mean) * rstd)
                c1[k], c2[k] = real(one), real(two)
                out_of_range = out_of_range or not holds_group(rstd, one, two, length)
        for i in range(tile.first, tile.high, ROWS):
            p, q = divided(i, tile.s)
            load_chunk(x.address, p * x.p + q * x.s, tile.n, tile.aligned, v, 0)
            load_slope(dy.address, p * dy.p + q * dy.s, tile.n, tile.aligned, g, 0)
            for k in range(width):
                if k < tile.n:
                    w = real(1)
                    if weight.address != 0:
                        own = p * weight.p + q * weight.s + k * weight.c
                        w = load_weight(weight.address, own)
                    wr = real(w * r[k])
                    if not double and (out_of_range or not holds_weight(w, wr)):
                        # computed again: rare, and it would take registers always
                        value = value_of(weight, k, weighted)
                        mean, rstd, one, two = constants(
                            plan, operands, sums, corner, at + k, value, length
                        )  # fmt: skip
                        v[k] = gradient_of_one(v[k], g[k], w, mean, rstd, one, two, length)
                    else:
                        v[k] = gradient(v[k], g[k], hi[k], r[k], shift[k], wr, c1[k], c2[k])
            store_chunk(dx.address, p * dx.p + q * dx.s, tile.n, tile.aligned, v)

    return slopes_kernel
