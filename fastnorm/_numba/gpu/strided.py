"""The kernels for columns: groups whose numbers are a row of memory apart.

A block takes LANES chunks of columns and some of the rows; each thread has a chunk's columns to
itself. One kernel writes the moments of each column, another one applies scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fastnorm._numba.gpu.apply import finalizer
from fastnorm._numba.gpu.blocking import BLOCK, CHUNK, LANES, ROWS, depth_of
from fastnorm._numba.gpu.elements import chunk_loader, computing, read_byte, read_word, size_of
from fastnorm._numba.gpu.package import arithmetic, cuda, device, kernel
from fastnorm._numba.gpu.reductions import column_extents, column_spreader, column_totals
from fastnorm._numba.gpu.scales import (
    Moments,
    pivot_of,
    read_scale,
    unit_of,
    write_moments,
)
from fastnorm._numba.gpu.views import (
    ADJACENT,
    BIAS,
    MASK,
    OTHER,
    WEIGHT,
    B,
    C,
    Place,
    X,
    Y,
    column_fetcher,
    corner_of,
    divided,
    lesser,
    tile_of,
    view_of,
)

Function = Callable[..., Any]

fma, apply_scale, two_sum = arithmetic.fma, arithmetic.apply, arithmetic.two_sum
moments_of_sums, holds = arithmetic.moments_of_sums, arithmetic.holds


class ColumnSums(NamedTuple):
    """Of each of a thread's columns: the sums of x - pivot and of its square, and a count."""

    one: Any
    second: Any
    rest: Any  # what rounding lost of `second`
    count: Any


@device
def counts(mask: Any, p: Any, q: Any, k: Any) -> Any:
    """Whether the mask lets a number be counted."""
    at = p * mask.p + q * mask.s + k * mask.c
    return mask.address == 0 or read_byte(mask.address, at) != 0


@cache
def extent_finder(kind: str) -> Function:
    """A function: the least and the largest number of each of a thread's columns."""
    real = computing(kind)
    width = CHUNK // size_of(kind)
    depth = depth_of(width)
    ahead = depth * width
    fetch = column_fetcher(kind, real, width, depth)

    @device
    def extents(x: Any, mask: Any, tile: Any, least: Any, most: Any) -> None:
        v = cuda.local.array(ahead, real)
        for k in range(width):
            least[k], most[k] = math.inf, -math.inf
        i = tile.first
        while i < tile.high:
            fetch(x, tile, i, v)
            for j in range(depth):
                p, q = divided(i, tile.s)
                for k in range(width):
                    if (i < tile.high and k < tile.n) and counts(mask, p, q, k):
                        number = np.float64(v[j * width + k])
                        least[k] = number if number < least[k] else least[k]
                        most[k] = number if number > most[k] else most[k]
                i += ROWS

    return extents


@cache
def summer(kind: str) -> Function:
    """A function: for each of a thread's columns what `contiguous` sums for one group."""
    real = computing(kind)
    double = real is np.float64
    width = CHUNK // size_of(kind)
    depth = depth_of(width)
    ahead = depth * width
    fetch = column_fetcher(kind, real, width, depth)

    @device
    def sums_about(x: Any, mask: Any, tile: Any, pivots: Any, units: Any, sums: Any) -> None:
        v = cuda.local.array(ahead, real)
        one, second, rest, count = sums.one, sums.second, sums.rest, sums.count
        for k in range(width):
            one[k] = second[k] = rest[k] = count[k] = np.float64(0.0)
        i = tile.first
        while i < tile.high:
            fetch(x, tile, i, v)
            for j in range(depth):
                p, q = divided(i, tile.s)
                for k in range(width):
                    if (i < tile.high and k < tile.n) and counts(mask, p, q, k):
                        if double:
                            d = v[j * width + k] * units[k] - pivots[k]
                            square = d * d
                            second[k], lost = two_sum(second[k], square)
                            rest[k] += lost + fma(d, d, -square)
                        else:
                            d = np.float64(v[j * width + k]) - pivots[k]
                            second[k] = fma(d, d, second[k])
                        one[k] += d
                        if mask.address != 0:
                            count[k] += 1.0
                i += ROWS

    return sums_about


@cache
def column_moments(kind: str) -> Any:
    """The kernel that writes the moments of each column, over some of the rows."""
    double = computing(kind) is np.float64
    size = size_of(kind)
    width = CHUNK // size
    across = LANES * width
    extents, sums_about = extent_finder(kind), summer(kind)
    totals, extents_of = column_totals(width), column_extents(width)
    spread = column_spreader(width)
    shared_size = BLOCK * width

    @kernel
    def moments_kernel(walk: Any, operands: Any, options: Any, partial: Any) -> None:
        shared = cuda.shared.array(shared_size, types.float64)
        tid = np.int64(cuda.threadIdx.x)
        plan, parts = walk.plan, walk.parts
        corner = corner_of(plan, parts, width)
        tile = tile_of(walk, corner, tid, width)
        columns = read_word(plan, C)
        at = corner.column + tid % LANES * width if tile.n > 0 else np.int64(0)
        x = view_of(plan, X, operands.x, size, corner.a, corner.b, at)
        mask = view_of(plan, MASK, operands.mask, 1, corner.a, corner.b, at)
        pivots = cuda.local.array(width, types.float64)
        units = cuda.local.array(width, types.float64)
        one = cuda.local.array(width, types.float64)
        second = cuda.local.array(width, types.float64)
        left = cuda.local.array(width, types.float64)
        numbers = cuda.local.array(width, types.float64)
        sums = ColumnSums(one, second, left, numbers)
        pivot: Any = np.float64(0.0)
        unit: Any = np.float64(1.0)
        for k in range(width):
            pivots[k], units[k] = pivot, unit
        if double:
            extents(x, mask, tile, one, second)
            least, most = extents_of(one, second, shared, tid)
            unit = unit_of(least, most)
            pivot = pivot_of(least, most, unit) if options.centred else 0.0
            spread(unit, shared, tid, units)
            spread(pivot, shared, tid, pivots)
        sums_about(x, mask, tile, pivots, units, sums)
        low = corner.part * walk.size
        count = np.float64(tile.high - low)
        if mask.address != 0:
            count = totals(numbers, shared, tid)
        total = totals(one, shared, tid)
        m2 = totals(second, shared, tid)
        if double:
            m2 += totals(left, shared, tid)
        mean = rest = np.float64(0.0)
        mine = tid < across and corner.column + tid < columns
        if options.centred:
            square = m2
            mean, rest, m2, again = moments_of_sums(count, total, square, pivot)
            if cuda.syncthreads_or(1 if (mine and again) or double else 0):
                # a column's result must not depend on its neighbours: each for itself
                repeated = (again or double) and abs(mean) < math.inf
                pivot = mean if repeated else pivot
                spread(pivot, shared, tid, pivots)
                sums_about(x, mask, tile, pivots, units, sums)
                total = totals(one, shared, tid)
                square = totals(second, shared, tid)
                if double:
                    square += totals(left, shared, tid)
                mean, rest, m2, again = moments_of_sums(count, total, square, pivot)
        if mine:
            row = (corner.a * read_word(plan, B) + corner.b) * parts + corner.part
            moments = Moments(count, mean, rest, m2, 0.0, unit)
            write_moments(partial, row * columns + corner.column + tid, moments)

    return moments_kernel


@cache
def column_apply(kind: str, other: str, activation: Any, first: bool) -> Any:
    """The kernel that applies scales of columns, from x to y."""
    real = computing(kind)
    double = real is np.float64
    size, other_size = size_of(kind), size_of(other)
    width = CHUNK // size
    parameter_size = np.dtype(real).itemsize
    load_chunk = chunk_loader(kind, real, width)
    finalize = finalizer(kind, other, activation, first)

    @device
    def scale_of_column(plan: Any, groups: Any, column: Any, scale: Any) -> Any:
        group = groups + divided(column, read_word(plan, ADJACENT))[0]
        return read_scale(scale, group)

    @kernel
    def apply_kernel(walk: Any, operands: Any, scale: Any) -> None:
        tid = np.int64(cuda.threadIdx.x)
        plan = walk.plan
        corner = corner_of(plan, walk.parts, width)
        tile = tile_of(walk, corner, tid, width)
        if tile.n <= 0:
            return
        columns = read_word(plan, C)
        a, b = corner.a, corner.b
        at = corner.column + tid % LANES * width
        x = view_of(plan, X, operands.x, size, a, b, at)
        y = view_of(plan, Y, operands.y, size, a, b, at)
        other = view_of(plan, OTHER, operands.other, other_size, a, b, at)
        weight = view_of(plan, WEIGHT, operands.weight, parameter_size, a, b, at)
        bias = view_of(plan, BIAS, operands.bias, parameter_size, a, b, at)
        ready = cuda.local.array(width, real)
        v = cuda.local.array(width, real)
        w = cuda.local.array(width, real)
        hi = cuda.local.array(width, real)
        r = cuda.local.array(width, real)
        shift = cuda.local.array(width, real)
        out_of_range = False
        groups = (a * read_word(plan, B) + b) * (columns // read_word(plan, ADJACENT))
        for k in range(width):
            if k < tile.n:
                own = scale_of_column(plan, groups, at + k, scale)
                hi[k] = real(own.mean)
                r[k] = real(own.rstd)
                shift[k] = real(-((own.mean - np.float64(hi[k])) + own.rest) * own.rstd)
                out_of_range = out_of_range or own.unit != 1.0
                out_of_range = out_of_range or (not double and not holds(own.rstd))
            else:
                hi[k] = r[k] = shift[k] = real(0)
        i = tile.first
        p, q = divided(i, tile.s)
        if i < tile.high:
            load_chunk(x.address, p * x.p + q * x.s, tile.n, tile.aligned, ready, 0)
        while i < tile.high:
            for k in range(width):
                v[k] = apply_scale(ready[k], hi[k], r[k], shift[k])
            if out_of_range:
                for k in range(width):
                    # read again: this is rare, and the numbers would take registers always
                    own = scale_of_column(plan, groups, lesser(at + k, columns - 1), scale)
                    if own.unit != 1.0 or (not double and not holds(own.rstd)):
                        scaled = np.float64(ready[k]) * own.unit
                        v[k] = real(((scaled - own.mean) - own.rest) * own.rstd)
            to = Place(y.address, p * y.p + q * y.s, np.int64(1))
            added = Place(other.address, p * other.p + q * other.s, np.int64(1))
            weights = Place(weight.address, p * weight.p + q * weight.s, weight.c)
            biases = Place(bias.address, p * bias.p + q * bias.s, bias.c)
            i += ROWS
            p, q = divided(i, tile.s)
            if i < tile.high:  # the next row is on its way while this one is finished
                load_chunk(x.address, p * x.p + q * x.s, tile.n, tile.aligned, ready, 0)
            finalize(v, w, to, added, weights, biases, tile.n, tile.aligned)

    return apply_kernel
