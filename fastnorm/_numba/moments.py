"""Sums, the moments of what lies side by side, and their merge.

Moments are five numbers, `step` apart: count, mean and its rest, sum of squared deviations and its
rest.
"""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.lanes import add_to_lanes, exact_squares, sums_in_lanes
from fastnorm._numba.memory import fetch, inner, is_double, is_half, load, read, summing, write
from fastnorm.schedule import CHAIN, LANES, PREFETCH_BYTES


@inner
def fetch_ahead(x, size):
    """Ask for `size` bytes that are read PREFETCH_BYTES from now.

    A loop that reads one block, then writes another, keeps losing the processor's own prefetcher.
    """
    i = 0
    while i < size:
        fetch(x + PREFETCH_BYTES + i)
        i += 64


@summing
def half_sums(x, n, pivot):
    """Of x - pivot and of its square, of float16."""
    first = 0.0
    second = 0.0
    for i in range(n):
        d = np.float64(load(x, i, np.int16)) - pivot
        first += d
        second += d * d
    return first, second


@inner
def sums(x, n, kind):
    """Of x and of its square."""
    if is_half(kind):
        fetch_ahead(x, 2 * n)
        return half_sums(x, n, 0.0)
    first, second = sums_in_lanes(x, n // LANES, None, PREFETCH_BYTES, kind)
    for i in range(n - n % LANES, n):
        d = np.float64(load(x, i, kind))
        first += d
        second = scalar.mac(d, d, second)
    return first, second


@inner
def sums_about(x, n, pivot, kind):
    """Of x - pivot and of its square."""
    if is_half(kind):
        return half_sums(x, n, pivot)
    first, second = sums_in_lanes(x, n // LANES, pivot, 0, kind)
    for i in range(n - n % LANES, n):
        d = np.float64(load(x, i, kind)) - pivot
        first += d
        second = scalar.mac(d, d, second)
    return first, second


@inner
def squares(x, n, kind):
    """The sum of the squares of x."""
    return sums(x, n, kind)[1]


@inner
def fold(v, half):
    """Add the upper half of 2 * half sums to the lower."""
    for j in range(half):
        write(v, j, read(v, j, np.float64) + read(v, j + half, np.float64))


@inner
def deviations(x, n, pivot, lanes):
    """The sum of x - pivot of doubles, in the order of the Cython kernels (fn_deviations)."""
    if n % LANES == 0:
        return sums_in_lanes(x, n // LANES, pivot, PREFETCH_BYTES, np.float64)[0]
    for j in range(LANES):
        write(lanes, j, 0.0)
    add_to_lanes(x, n // LANES, pivot, PREFETCH_BYTES, lanes, None)
    fold(lanes, 16)
    fold(lanes, 8)
    i = n - n % LANES
    while i + 8 <= n:
        for j in range(8):
            write(lanes, j, read(lanes, j, np.float64) + (read(x, i + j, np.float64) - pivot))
        i += 8
    rest = 0.0
    while i < n:
        rest += read(x, i, np.float64) - pivot
        i += 1
    fold(lanes, 4)
    fold(lanes, 2)
    return read(lanes, 0, np.float64) + read(lanes, 1, np.float64) + rest


@inner
def halve(total, rest, first, half):
    add_exactly(total, rest, total + 8 * half, half)
    fold(rest, half)
    fold(first, half)


@inner
def deviations_about(x, n, mean, lanes):
    """What `exact_squares` sums up, of any number of doubles."""
    total = lanes + 8 * LANES
    rest = total + 8 * LANES
    first = rest + 8 * LANES
    for j in range(3 * LANES):
        write(total, j, 0.0)
    i = 0
    while i < n:
        end = min(i + CHAIN, n)
        whole = (end - i) // LANES
        for j in range(LANES):
            write(lanes, j, 0.0)
        add_to_lanes(x + 8 * i, whole, mean, 0, first, lanes)
        i += whole * LANES
        for j in range(end - i):
            d = read(x, i + j, np.float64) - mean
            write(lanes, j, scalar.mac(d, d, read(lanes, j, np.float64)))
            write(first, j, read(first, j, np.float64) + d)
        i = end
        add_exactly(total, rest, lanes, LANES)
    halve(total, rest, first, 16)
    halve(total, rest, first, 8)
    halve(total, rest, first, 4)
    halve(total, rest, first, 2)
    halve(total, rest, first, 1)
    return read(first, 0, np.float64), read(total, 0, np.float64), read(rest, 0, np.float64)


@inner
def double_moments(x, n, centred, lanes):
    """Mean, its rest, M2 and its rest of doubles, which have no bits to spare.

    Twice: about the first element, so that a constant block has exactly its mean, then about that.
    A sum of squares would round the same way each time where squares are equal, as those of black
    and white pixels are: LANES of them are added up in short chains, and the chains exactly.
    Every sum is in the order of the Cython kernels: in float64 another one shows.
    """
    mean = 0.0
    if centred:
        pivot = read(x, 0, np.float64)
        mean = pivot + deviations(x, n, pivot, lanes) / n
    if n % LANES == 0:
        deviation, m2, m2_rest = exact_squares(x, n // LANES, CHAIN // LANES, mean)
    else:
        deviation, m2, m2_rest = deviations_about(x, n, mean, lanes)
    if not centred:
        return 0.0, 0.0, m2, m2_rest
    mean_rest = deviation / n
    return mean, mean_rest, m2, m2_rest - deviation * mean_rest


@inner
def add_exactly(total, rest, v, n):
    """Add n numbers to sums kept as two numbers each."""
    for j in range(n):
        high, lost = scalar.two_sum(read(total, j, np.float64), read(v, j, np.float64))
        write(total, j, high)
        write(rest, j, read(rest, j, np.float64) + lost)


@inner
def moments(x, n, centred, into, step, lanes, kind):
    """The moments of n numbers side by side into into[0], into[step] ...; `lanes` is room."""
    write(into, 0, np.float64(n))
    mean = rest = m2 = m2_rest = 0.0
    if n > 0:
        if is_double(kind):
            mean, rest, m2, m2_rest = double_moments(x, n, centred, lanes)
        elif not centred:
            m2 = squares(x, n, kind)
        else:
            first, second = sums(x, n, kind)
            mean, rest, m2, again = scalar.moments_of_sums(np.float64(n), first, second, 0.0)
            if again and math.isfinite(mean):
                pivot = np.float64(np.float32(mean))
                first, second = sums_about(x, n, pivot, kind)
                mean, rest, m2, again = scalar.moments_of_sums(np.float64(n), first, second, pivot)
    write(into, step, mean)
    write(into, 2 * step, rest)
    write(into, 3 * step, m2)
    write(into, 4 * step, m2_rest)


@inner
def merge_into(into, other, n, step):
    """Merge n moments, side by side, into others."""
    for i in range(n):
        one = (
            read(into, i, np.float64),
            read(into, step + i, np.float64),
            read(into, 2 * step + i, np.float64),
            read(into, 3 * step + i, np.float64),
            read(into, 4 * step + i, np.float64),
        )
        two = (
            read(other, i, np.float64),
            read(other, step + i, np.float64),
            read(other, 2 * step + i, np.float64),
            read(other, 3 * step + i, np.float64),
            read(other, 4 * step + i, np.float64),
        )
        count, mean, rest, m2, m2_rest = scalar.merge(one, two)
        write(into, i, count)
        write(into, step + i, mean)
        write(into, 2 * step + i, rest)
        write(into, 3 * step + i, m2)
        write(into, 4 * step + i, m2_rest)
