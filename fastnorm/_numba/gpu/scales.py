"""From the sums of a team to moments, from those of parts to a group's, and to its scale.

Doubles whose squares leave the range are taken times a power of two: the *unit* of their moments.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fastnorm._numba.gpu.blocking import BLOCK
from fastnorm._numba.gpu.elements import read_double, read_word, write_double
from fastnorm._numba.gpu.package import arithmetic, cuda, device, kernel
from fastnorm._numba.gpu.views import ADJACENT, BSUMS, STATS, C, divided, greater, lesser, statistic

PARTIAL = 6  # numbers of a part: count, mean, its rest, M2, its rest, unit
SCALE = 4  # numbers of a group: mean, its rest, rstd, unit

LARGE, SMALL = 2.0**400, 2.0**-400
SHRINK, GROW = 2.0**-600, 2.0**600

# How a group's statistics become its scale: `problem.Scaling`.
NORM, FACTOR = 1, 2

fma, merge, inverse_root = arithmetic.fma, arithmetic.merge, arithmetic.inverse_root


class Moments(NamedTuple):
    """Of numbers times `unit`: mean and M2, each in two parts."""

    count: Any
    mean: Any
    rest: Any
    m2: Any
    m2_rest: Any
    unit: Any


class Scale(NamedTuple):
    """What takes x to xhat: ((x unit - mean) - rest) rstd."""

    mean: Any
    rest: Any
    rstd: Any
    unit: Any


@device
def unit_of(low: Any, high: Any) -> Any:
    """The power of two to take numbers between these times, so that their squares stay in range."""
    largest = greater(abs(low), abs(high))
    if largest > LARGE and largest < math.inf:
        return SHRINK
    if largest < SMALL and largest > 0.0:
        return GROW
    return 1.0


@device
def pivot_of(low: Any, high: Any, unit: Any) -> Any:
    """A number of the group, so that a constant one has just its mean; 0 if some are infinite."""
    return high * unit if abs(low) < math.inf and abs(high) < math.inf else 0.0


# --- Scales ---------------------------------------------------------------------------------------


@device
def scale_of(moments: Any, options: Any) -> Any:
    """(mean, var, rstd) from moments of numbers times a unit; rstd of var to twice the digits."""
    count, mean, m2, unit = moments.count, moments.mean, moments.m2, moments.unit
    eps = options.eps
    if count == 0.0:  # of no elements: not a number
        return math.nan, math.nan, math.nan
    # where a rounded mean is far off, much is in m2_rest
    var = ((m2 + moments.m2_rest) if abs(moments.m2_rest) > m2 * 2.0**-50 else m2) / count
    if options.scaling == NORM:
        rstd = inverse_root(m2, moments.m2_rest) if m2 != 0.0 else 0.0
        if math.sqrt(m2) < eps * unit:
            rstd = 1.0 / (eps * unit)
        return mean, var, rstd
    shift = (eps * unit) * unit
    v = var + shift
    rest = (fma(-var, count, m2) + moments.m2_rest) / count + ((var - v) + shift)
    if shift == math.inf:  # the variance is nothing next to eps
        return mean, var, inverse_root(eps, 0.0) / unit
    # a constant group with eps = 0 is all bias: its scale is 0, not infinity
    return mean, var, inverse_root(v, rest) if v != 0.0 else 0.0


@device
def read_scale(scale: Any, group: Any) -> Any:
    """A group's scale."""
    at = group * SCALE
    return Scale(
        read_double(scale, at),
        read_double(scale, at + 1),
        read_double(scale, at + 2),
        read_double(scale, at + 3),
    )


@device
def write_scale(scale: Any, group: Any, own: Any) -> None:
    """A group's scale, for the kernel that applies it."""
    write_double(scale, SCALE * group, own.mean)
    write_double(scale, SCALE * group + 1, own.rest)
    write_double(scale, SCALE * group + 2, own.rstd)
    write_double(scale, SCALE * group + 3, own.unit)


@device
def write_statistics(statistics: Any, at: Any, own: Any, var: Any) -> None:
    """A group's statistics, for the caller."""
    write_double(statistics.mean, at, own.mean / own.unit)
    write_double(statistics.var, at, var / own.unit / own.unit)
    write_double(statistics.rstd, at, own.rstd * own.unit)


# --- Moments of parts -----------------------------------------------------------------------------


@device
def write_moments(partial: Any, part: Any, moments: Any) -> None:
    """The moments of a part."""
    at = part * PARTIAL
    write_double(partial, at, moments.count)
    write_double(partial, at + 1, moments.mean)
    write_double(partial, at + 2, moments.rest)
    write_double(partial, at + 3, moments.m2)
    write_double(partial, at + 4, moments.m2_rest)
    write_double(partial, at + 5, moments.unit)


@cache
def merge_parts(lanes: int, double: bool) -> Any:
    """The kernel that merges the moments of a group's parts: `lanes` threads to a group."""
    teams = BLOCK // lanes

    @kernel
    def merge_kernel(
        walk: Any, partial: Any, options: Any, scale: Any, statistics: Any
    ) -> None:  # fmt: skip
        scratch = cuda.shared.array((BLOCK, PARTIAL), types.float64)
        plan, parts = walk.plan, walk.parts
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % lanes
        group = np.int64(cuda.blockIdx.x) * teams + tid // lanes
        live = group < walk.groups
        columns = read_word(plan, C)
        adjacent = read_word(plan, ADJACENT)
        outer, c = divided(group, columns // adjacent)
        count = mean = rest = m2 = m2_rest = 0.0
        unit = 1.0
        if live:
            if double:  # the least unit of all, which the others are brought to
                unit = GROW
                for i in range(parts * adjacent):
                    part, k = divided(i, adjacent)
                    at = ((outer * parts + part) * columns + c * adjacent + k) * PARTIAL
                    unit = lesser(unit, read_double(partial, at + 5))
            for i in range(lane, parts * adjacent, lanes):
                part, k = divided(i, adjacent)
                at = ((outer * parts + part) * columns + c * adjacent + k) * PARTIAL
                f = unit / read_double(partial, at + 5)
                other = (
                    read_double(partial, at),
                    read_double(partial, at + 1) * f,
                    read_double(partial, at + 2) * f,
                    read_double(partial, at + 3) * f * f,
                    read_double(partial, at + 4) * f * f,
                )
                count, mean, rest, m2, m2_rest = merge((count, mean, rest, m2, m2_rest), other)
        if lanes > 1:
            scratch[tid, 0] = count
            scratch[tid, 1] = mean
            scratch[tid, 2] = rest
            scratch[tid, 3] = m2
            scratch[tid, 4] = m2_rest
            cuda.syncthreads()
            if lane == 0:
                for i in range(tid + 1, tid + lanes):
                    other = (
                        scratch[i, 0], scratch[i, 1], scratch[i, 2], scratch[i, 3], scratch[i, 4],
                    )  # fmt: skip
                    count, mean, rest, m2, m2_rest = merge((count, mean, rest, m2, m2_rest), other)
        if live and lane == 0:
            moments = Moments(count, mean, rest, m2, m2_rest, unit)
            mean, var, rstd = scale_of(moments, options)
            own = Scale(mean, rest, rstd, unit)
            write_scale(scale, group, own)
            write_statistics(statistics, statistic(plan, STATS, group), own, var)

    return merge_kernel


@kernel
def given_scale(walk: Any, options: Any, scale: Any, statistics: Any) -> None:
    """The scale of groups whose mean and variance are given."""
    group = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
    if group < walk.groups:
        at = statistic(walk.plan, STATS, group)
        mean, var = read_double(statistics.mean, at), read_double(statistics.var, at)
        rstd = var
        if options.scaling != FACTOR:
            shifted = var + options.eps
            rstd = inverse_root(shifted, 0.0) if shifted != 0.0 else 0.0
        write_scale(scale, group, Scale(mean, 0.0, rstd, 1.0))
        write_double(statistics.rstd, at, rstd)


@cache
def merge_sums(lanes: int) -> Any:
    """The kernel that adds up the sums of a group's parts: `lanes` threads to a group."""
    teams = BLOCK // lanes

    @kernel
    def merge_kernel(walk: Any, partial: Any, sums: Any) -> None:
        scratch = cuda.shared.array((BLOCK, 2), types.float64)
        plan, parts = walk.plan, walk.parts
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % lanes
        group = np.int64(cuda.blockIdx.x) * teams + tid // lanes
        live = group < walk.groups
        columns, adjacent = read_word(plan, C), read_word(plan, ADJACENT)
        outer, c = divided(group, columns // adjacent)
        g = gx = np.float64(0.0)
        if live:
            for i in range(lane, parts * adjacent, lanes):
                part, k = divided(i, adjacent)
                at = ((outer * parts + part) * columns + c * adjacent + k) * 2
                g += read_double(partial, at)
                gx += read_double(partial, at + 1)
        if lanes > 1:
            scratch[tid, 0] = g
            scratch[tid, 1] = gx
            cuda.syncthreads()
            if lane == 0:
                for i in range(tid + 1, tid + lanes):
                    g += scratch[i, 0]
                    gx += scratch[i, 1]
        if live and lane == 0:
            at = statistic(plan, BSUMS, group)
            write_double(sums.g, at, g)
            write_double(sums.gx, at, gx)

    return merge_kernel
