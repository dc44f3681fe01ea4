"""The kernel for groups whose numbers are runs in memory: sums, and from x and a scale to y.

A group is summed by a team of threads, or in parts by several; parts are merged in order. Within a
team, x - pivot and its square are summed in float64, as in the Cython kernels: threads that have a
pivot in common only add, where each merge would divide. A float32 costs two additions and a
conversion for its 8 bytes of memory, read and written. Sums of pairs of floats would take ten
operations, and would gain where doubles are slow, which is not on the GPUs of data centres. Doubles
are summed twice, the second time about their mean, and their squares with what rounding lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from fastnorm._numba.gpu.apply import finalizer
from fastnorm._numba.gpu.blocking import BLOCK, CHUNK, depth_of
from fastnorm._numba.gpu.elements import (
    chunk_loader,
    chunk_storer,
    computing,
    read_byte,
    read_word,
    size_of,
)
from fastnorm._numba.gpu.package import arithmetic, cuda, device, kernel
from fastnorm._numba.gpu.reductions import team_extent, team_sums
from fastnorm._numba.gpu.scales import (
    Moments,
    Scale,
    pivot_of,
    read_scale,
    scale_of,
    unit_of,
    write_moments,
    write_statistics,
)
from fastnorm._numba.gpu.views import (
    BIAS,
    MASK,
    OTHER,
    STATS,
    TOTAL,
    WEIGHT,
    B,
    P,
    Place,
    S,
    Share,
    X,
    Y,
    counted,
    divided,
    lesser,
    onward,
    run_fetcher,
    statistic,
    view_of,
)

Function = Callable[..., Any]

fma, apply_scale, two_sum = arithmetic.fma, arithmetic.apply, arithmetic.two_sum
moments_of_sums, holds = arithmetic.moments_of_sums, arithmetic.holds

WHOLE, SUMS, APPLY = range(3)  # sums and step at once, sums of parts, step with a scale given


@cache
def adder(kind: str, other: str, team: int) -> Function:
    """A function that writes x + other, rounded, to `total`."""
    real = computing(kind)
    width = CHUNK // size_of(kind)
    load_chunk, store_chunk = chunk_loader(kind, real, width), chunk_storer(kind, width)
    load_other = chunk_loader(other, real, width)

    @device
    def add(x: Any, other: Any, total: Any, share: Any) -> None:
        v = cuda.local.array(width, real)
        w = cuda.local.array(width, real)
        rows, jump = divided(team, share.cols)
        row, col = divided(share.first, share.cols)
        i = share.first
        while i < share.high:
            start = col * width
            n = lesser(np.int64(width), share.s - start)
            load_chunk(x.address, row * x.p + start, n, share.aligned, v, 0)
            load_other(other.address, row * other.p + start, n, share.aligned, w, 0)
            for k in range(width):
                v[k] = real(v[k] + w[k])
            store_chunk(total.address, row * total.p + start, n, share.aligned, v)
            i += team
            row, col = onward(row + rows, col + jump, share.cols)

    return add


@device
def counts(mask: Any, row: Any, place: Any) -> Any:
    """Whether the mask lets a number be counted."""
    return mask.address == 0 or read_byte(mask.address, row * mask.p + place * mask.s) != 0


@cache
def extent_finder(kind: str, team: int) -> Function:
    """A function: the least and the largest number that a thread sees."""
    real = computing(kind)
    width = CHUNK // size_of(kind)
    depth = depth_of(width)
    ahead = depth * width
    fetch = run_fetcher(kind, real, width, depth, team)

    @device
    def extent(x: Any, mask: Any, share: Any) -> Any:
        v = cuda.local.array(ahead, real)
        least, most = math.inf, -math.inf
        rows, jump = divided(team, share.cols)
        row, col = divided(share.first, share.cols)
        i = share.first
        while i < share.high:
            fetch(x, share, i, row, col, v)
            for j in range(depth):
                start = col * width
                n = lesser(np.int64(width), share.s - start) if i < share.high else np.int64(0)
                for k in range(width):
                    if k < n and counts(mask, row, start + k):
                        number = np.float64(v[j * width + k])
                        least = number if number < least else least
                        most = number if number > most else most
                i += team
                row, col = onward(row + rows, col + jump, share.cols)
        return least, most

    return extent


@cache
def summer(kind: str, team: int) -> Function:
    """A function: a thread's sums of x - pivot, of its square, what rounding lost, and a count."""
    real = computing(kind)
    double = real is np.float64
    width = CHUNK // size_of(kind)
    depth = depth_of(width)
    ahead = depth * width
    fetch = run_fetcher(kind, real, width, depth, team)

    @device
    def sums_about(x: Any, mask: Any, share: Any, pivot: Any, unit: Any) -> Any:
        v = cuda.local.array(ahead, real)
        one = second = rest = count = np.float64(0.0)
        rows, jump = divided(team, share.cols)
        row, col = divided(share.first, share.cols)
        i = share.first
        while i < share.high:
            fetch(x, share, i, row, col, v)
            for j in range(depth):
                start = col * width
                n = lesser(np.int64(width), share.s - start) if i < share.high else np.int64(0)
                for k in range(width):
                    if k < n and counts(mask, row, start + k):
                        if double:
                            d = v[j * width + k] * unit - pivot
                            square = d * d
                            second, lost = two_sum(second, square)
                            rest += lost + fma(d, d, -square)
                        else:
                            d = np.float64(v[j * width + k]) - pivot
                            second = fma(d, d, second)
                        one += d
                        if mask.address != 0:
                            count += 1.0
                i += team
                row, col = onward(row + rows, col + jump, share.cols)
        return one, second, rest, count

    return sums_about


@cache
def moment_taker(kind: str, team: int) -> Function:
    """A function: the moments of what a team sees; every thread of it gets them."""
    double = computing(kind) is np.float64
    width = CHUNK // size_of(kind)
    total, extent_of = team_sums(team), team_extent(team)
    extent, sums_about = extent_finder(kind, team), summer(kind, team)

    @device
    def moments_of(
        x: Any, mask: Any, share: Any, low: Any, centred: Any, scratch: Any, tid: Any
    ) -> Any:
        lane = tid % team
        offset = tid - lane
        pivot, unit = 0.0, 1.0
        if double:
            least, most = extent(x, mask, share)
            least, most = extent_of(least, most, scratch, offset, lane)
            unit = unit_of(least, most)
            pivot = pivot_of(least, most, unit) if centred else 0.0
        one, second, left, count = sums_about(x, mask, share, pivot, unit)
        one, second, left, count = total(one, second, left, count, scratch, offset, lane)
        if mask.address == 0:
            count = np.float64(counted(share.high, share, width) - counted(low, share, width))
        mean = rest = np.float64(0.0)
        m2 = second + left
        if centred:
            mean, rest, m2, again = moments_of_sums(count, one, m2, pivot)
            if (double or again) and abs(mean) < math.inf:  # an infinite mean stays
                pivot = mean
                one, second, left, number = sums_about(x, mask, share, pivot, unit)
                one, second, left, number = total(one, second, left, number, scratch, offset, lane)
                mean, rest, m2, again = moments_of_sums(count, one, second + left, pivot)
        return Moments(count, mean, rest, m2, 0.0, unit)

    return moments_of


@cache
def applier(kind: str, other: str, team: int, activation: Any, first: bool) -> Function:
    """A function: from x and a scale to y, for what a team sees."""
    real = computing(kind)
    double = real is np.float64
    width = CHUNK // size_of(kind)
    load_chunk = chunk_loader(kind, real, width)
    finalize = finalizer(kind, other, activation, first)

    @device
    def apply(
        x: Any, y: Any, other: Any, weight: Any, bias: Any, share: Any, scale: Any
    ) -> None:  # fmt: skip
        ready = cuda.local.array(width, real)
        v = cuda.local.array(width, real)
        w = cuda.local.array(width, real)
        mean, rest, rstd, unit = scale.mean, scale.rest, scale.rstd, scale.unit
        hi = real(mean)
        r = real(rstd)
        shift = real(-((mean - np.float64(hi)) + rest) * rstd)
        out_of_range = unit != 1.0 or (not double and not holds(rstd))
        rows, jump = divided(team, share.cols)
        row, col = divided(share.first, share.cols)
        i = share.first
        if i < share.high:
            n = lesser(np.int64(width), share.s - col * width)
            load_chunk(x.address, row * x.p + col * width, n, share.aligned, ready, 0)
        while i < share.high:
            for k in range(width):
                if out_of_range:
                    v[k] = real(((np.float64(ready[k]) * unit - mean) - rest) * rstd)
                else:
                    v[k] = apply_scale(ready[k], hi, r, shift)
            i += team
            now, start = row, col * width
            n = lesser(np.int64(width), share.s - start)
            row, col = onward(row + rows, col + jump, share.cols)
            if i < share.high:  # the next chunk is on its way while this one is finished
                ahead_n = lesser(np.int64(width), share.s - col * width)
                load_chunk(x.address, row * x.p + col * width, ahead_n, share.aligned, ready, 0)
            finalize(
                v,
                w,
                Place(y.address, now * y.p + start, np.int64(1)),
                Place(other.address, now * other.p + start, np.int64(1)),
                Place(weight.address, now * weight.p + start * weight.s, weight.s),
                Place(bias.address, now * bias.p + start * bias.s, bias.s),
                n,
                share.aligned,
            )

    return apply


@cache
def runs(kind: str, other: str, team: int, mode: int, activation: Any, first: bool) -> Any:
    """The kernel for groups of runs: one team for each group, or for each part of one."""
    size, other_size = size_of(kind), size_of(other)
    width = CHUNK // size
    parameter_size = np.dtype(computing(kind)).itemsize
    add, moments_of = adder(kind, other, team), moment_taker(kind, team)
    apply = applier(kind, other, team, activation, first)
    teams = BLOCK // team

    @kernel
    def runs_kernel(
        walk: Any, operands: Any, options: Any, partial: Any, scale: Any, statistics: Any
    ) -> None:
        scratch = cuda.shared.array((4, BLOCK), types.float64)
        plan, parts = walk.plan, walk.parts
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % team
        # every thread takes part in every sum: what is beyond the end has nothing to add
        group, part = divided(np.int64(cuda.blockIdx.x) * teams + tid // team, parts)
        live = group < walk.groups
        a, b = divided(group if live else np.int64(0), read_word(plan, B))
        s = read_word(plan, S)
        cols = (s + (width - 1)) // width
        low = part * walk.size
        high = lesser(low + walk.size, read_word(plan, P) * cols) if live else low
        share = Share(s, cols, np.int64(low + lane), np.int64(high), np.int64(walk.aligned))
        x = view_of(plan, X, operands.x, size, a, b, 0)
        other = view_of(plan, OTHER, operands.other, other_size, a, b, 0)
        total = view_of(plan, TOTAL, operands.total, size, a, b, 0)
        own = Scale(0.0, 0.0, 0.0, 1.0)
        if mode != APPLY and total.address != 0:
            add(x, other, total, share)
        if total.address != 0:
            # each thread reads what it wrote itself
            x = total
            other = view_of(plan, OTHER, np.int64(0), other_size, a, b, 0)
        if mode != APPLY:
            mask = view_of(plan, MASK, operands.mask, 1, a, b, 0)
            moments = moments_of(x, mask, share, low, options.centred, scratch, tid)
            if mode == SUMS:
                if live and lane == 0:
                    write_moments(partial, group * parts + part, moments)
            else:
                mean, var, rstd = scale_of(moments, options)
                own = Scale(mean, moments.rest, rstd, moments.unit)
                if live and lane == 0:
                    write_statistics(statistics, statistic(plan, STATS, group), own, var)
        else:
            own = read_scale(scale, group if live else np.int64(0))
        if mode != SUMS and operands.y != 0:
            y = view_of(plan, Y, operands.y, size, a, b, 0)
            weight = view_of(plan, WEIGHT, operands.weight, parameter_size, a, b, 0)
            bias = view_of(plan, BIAS, operands.bias, parameter_size, a, b, 0)
            apply(x, y, other, weight, bias, share, own)

    return runs_kernel
