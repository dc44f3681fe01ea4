"""The kernel for gradients of groups of runs: sums of g and g xhat, g = weight dy, then dx.

The sums run in float64 from x - mean on: they are what training adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from fastnorm._numba.gpu.apply import parameter_loader
from fastnorm._numba.gpu.blocking import BLOCK, CHUNK
from fastnorm._numba.gpu.contiguous import APPLY, SUMS
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
from fastnorm._numba.gpu.gradients import gradient_of
from fastnorm._numba.gpu.package import arithmetic, cuda, device, kernel
from fastnorm._numba.gpu.reductions import team_sums
from fastnorm._numba.gpu.views import (
    BDX,
    BDY,
    BSTATS,
    BSUMS,
    BWEIGHT,
    BX,
    B,
    P,
    Place,
    S,
    Share,
    base,
    divided,
    lesser,
    onward,
    run_fetcher,
    view_of,
)

Function = Callable[..., Any]

fma = arithmetic.fma


@cache
def weight_loader(kind: str, real: Any, width: int) -> Function:
    """A function (place, n, aligned, into) that reads a chunk's weights; 1 without a weight."""
    load = parameter_loader(kind, real, width)

    @device
    def weights(place: Any, n: Any, aligned: Any, into: Any) -> None:
        if place.address == 0:
            for k in range(width):
                into[k] = real(1)
        else:
            load(place, n, aligned, into)

    return weights


@cache
def gradient_summer(kind: str, other: str, factor: str, team: int) -> Function:
    """A function: a thread's sums of g and g xhat."""
    real = computing(kind)
    width = CHUNK // size_of(kind)
    depth = 2  # chunks of x and of dy
    ahead = depth * width
    fetch = run_fetcher(kind, real, width, depth, team)
    fetch_slope = run_fetcher(other, real, width, depth, team)
    weights = weight_loader(factor, real, width)

    @device
    def sums(x: Any, dy: Any, weight: Any, means: Any, rstds: Any, share: Any) -> Any:
        v = cuda.local.array(ahead, real)
        g = cuda.local.array(ahead, real)
        w = cuda.local.array(width, real)
        ts = rstds.s
        one = second = np.float64(0.0)
        rows, jump = divided(team, share.cols)
        row, col = divided(share.first, share.cols)
        i = share.first
        while i < share.high:
            fetch(x, share, i, row, col, v)
            fetch_slope(dy, share, i, row, col, g)
            for j in range(depth):
                if i < share.high:
                    start = col * width
                    n = lesser(np.int64(width), share.s - start)
                    place = Place(weight.address, row * weight.p + start * weight.s, weight.s)
                    weights(place, n, share.aligned, w)
                    at = row * rstds.p + start * ts
                    rstd = read_double(rstds.address, at)
                    mean = read_double(means.address, at) if means.address != 0 else 0.0
                    for k in range(width):
                        if k < n:
                            if ts != 0 and k > 0:
                                rstd = read_double(rstds.address, at + k * ts)
                                mean = 0.0
                                if means.address != 0:
                                    mean = read_double(means.address, at + k * ts)
                            slope = np.float64(g[j * width + k]) * np.float64(w[k])
                            xhat = (np.float64(v[j * width + k]) - mean) * rstd
                            one += slope
                            second = fma(slope, xhat, second)
                i += team
                row, col = onward(row + rows, col + jump, share.cols)
        return one, second

    return sums


@cache
def gradient_applier(kind: str, other: str, factor: str, team: int) -> Function:
    """A function: dx of what a team sees; `own` are mean, rstd, c1, c2 and the group's length."""
    real = computing(kind)
    width = CHUNK // size_of(kind)
    load_chunk, store_chunk = chunk_loader(kind, real, width), chunk_storer(kind, width)
    load_slope = chunk_loader(other, real, width)
    weights = weight_loader(factor, real, width)
    gradient = gradient_of(kind)

    @device
    def apply(x: Any, dy: Any, dx: Any, weight: Any, share: Any, own: Any) -> None:
        mean, rstd, c1, c2, length = own
        v = cuda.local.array(width, real)
        g = cuda.local.array(width, real)
        w = cuda.local.array(width, real)
        rows, jump = divided(team, share.cols)
        row, col = divided(share.first, share.cols)
        i = share.first
        while i < share.high:
            start = col * width
            n = lesser(np.int64(width), share.s - start)
            load_chunk(x.address, row * x.p + start, n, share.aligned, v, 0)
            load_slope(dy.address, row * dy.p + start, n, share.aligned, g, 0)
            place = Place(weight.address, row * weight.p + start * weight.s, weight.s)
            weights(place, n, share.aligned, w)
            for k in range(width):
                v[k] = gradient(v[k], g[k], w[k], mean, rstd, c1, c2, length)
            store_chunk(dx.address, row * dx.p + start, n, share.aligned, v)
            i += team
            row, col = onward(row + rows, col + jump, share.cols)

    return apply


@cache
def run_gradients(kind: str, other: str, factor: str, team: int, mode: int) -> Any:
    """The kernel: one team for each group, or for each part of one."""
    real = computing(kind)
    size, other_size, factor_size = size_of(kind), size_of(other), size_of(factor)
    width = CHUNK // size
    load_weight = loader(factor, real)
    total = team_sums(team)
    sums_of = gradient_summer(kind, other, factor, team)
    apply = gradient_applier(kind, other, factor, team)
    teams = BLOCK // team

    @kernel
    def gradients_kernel(
        walk: Any, operands: Any, partial: Any, sums: Any, length: Any, weighted: Any
    ) -> None:
        scratch = cuda.shared.array((4, BLOCK), types.float64)
        plan, parts = walk.plan, walk.parts
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % team
        group, part = divided(np.int64(cuda.blockIdx.x) * teams + tid // team, parts)
        live = group < walk.groups
        a, b = divided(group if live else np.int64(0), read_word(plan, B))
        s = read_word(plan, S)
        cols = (s + (width - 1)) // width
        low = part * walk.size
        high = lesser(low + walk.size, read_word(plan, P) * cols) if live else low
        share = Share(s, cols, np.int64(low + lane), np.int64(high), np.int64(walk.aligned))
        x = view_of(plan, BX, operands.x, size, a, b, 0)
        dy = view_of(plan, BDY, operands.dy, other_size, a, b, 0)
        weight = view_of(plan, BWEIGHT, operands.weight, factor_size, a, b, 0)
        rstds = view_of(plan, BSTATS, operands.rstd, 8, a, b, 0)
        means = view_of(plan, BSTATS, operands.mean, 8, a, b, 0)
        one = second = np.float64(0.0)
        if mode != APPLY:
            one, second = sums_of(x, dy, weight, means, rstds, share)
            one, second, left, _ = total(one, second, 0.0, 0.0, scratch, tid - lane, lane)
            second += left
        if mode == SUMS:
            if live and lane == 0:
                write_double(partial, (group * parts + part) * 2, one)
                write_double(partial, (group * parts + part) * 2 + 1, second)
        else:
            if mode == APPLY and sums.g != 0:
                at = base(plan, BSUMS, a, b)
                one, second = read_double(sums.g, at), read_double(sums.gx, at)
            dx = view_of(plan, BDX, operands.dx, size, a, b, 0)
            mean = read_double(means.address, 0) if means.address != 0 else 0.0
            rstd = read_double(rstds.address, 0)
            if not weighted and weight.address != 0:
                # sums of dy alone, and one weight for all of the group
                value = np.float64(load_weight(weight.address, 0))
                one *= value
                second *= value
            c1 = one / length * rstd if means.address != 0 else 0.0
            c2 = second / length * rstd
            apply(x, dy, dx, weight, share, (mean, rstd, c1, c2, length))

    return gradients_kernel
