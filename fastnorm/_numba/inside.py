"""Rows inside a user's own `@njit` functions: their statistics, and what is made of them.

A row is the elements of one group side by side, in a flat array of float32 or float64. This is the
pass of `forward` for one thread, without a plan. Weights and biases are flat too, and equally many.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.apply import apply_part
from fastnorm._numba.compiling import inner, is_double, making, real
from fastnorm._numba.moments import FIELDS, sums
from fastnorm._numba.scales import rescaled, rstd_of, write_scale
from fastnorm._numba.walks import STATS, STEPS, X
from fastnorm.schedule import NUMBA_TILE

Row = namedtuple("Row", "length s neighbours masked centred")


# --- The statistics of a row ----------------------------------------------------------------------


@inner
def block_moments(x, i, n, centred):
    """Moments of n elements that begin at i."""
    pivot = np.float64(x[i]) if centred and is_double(x) else 0.0
    first, second = sums(x, i, np.uintp(n), pivot)
    if not centred:
        return np.float64(n), 0.0, 0.0, second, 0.0
    mean, rest, m2, again = scalar.moments_of_sums(np.float64(n), first, second, pivot)
    if (again or is_double(x)) and math.isfinite(mean):
        pivot = mean if is_double(x) else np.float64(np.float32(mean))
        first, second = sums(x, i, np.uintp(n), pivot)
        mean, rest, m2, again = scalar.moments_of_sums(np.float64(n), first, second, pivot)
    m2_rest = (second - m2) - first * (first / n) if is_double(x) else 0.0
    return np.float64(n), mean, rest, m2, m2_rest


@making
def statistics_of(x, i, n, centred, eps):
    """Mean, its rest, variance and rstd, all of x times a unit, and that; of no elements NaN."""
    if n == 0:
        return math.nan, 0.0, math.nan, math.nan, 1.0
    moments = block_moments(x, i, min(n, NUMBA_TILE), centred)
    for k in range(NUMBA_TILE, n, NUMBA_TILE):
        more = block_moments(x, i + np.uintp(k), min(n - k, NUMBA_TILE), centred)
        moments = scalar.merge(moments, more)
    _, mean, rest, m2, m2_rest = moments
    unit = 1.0
    if is_double(x) and not 1e-270 < m2 / n + eps < 1e270:
        steps = np.zeros((STATS + 1, STEPS), np.int64)
        steps[X, 3], steps[X, 5] = 1, i
        row, mask = Row(n, n, 1, 0, 1 if centred else 0), np.zeros(1, np.bool_)
        other, other_rest, other_m2, unit = rescaled(row, steps, x, mask, (0, 0, 0))
        if other == other:
            mean, rest, m2, m2_rest = other, other_rest, other_m2, 0.0
    var, rstd = rstd_of(np.float64(n), m2, m2_rest, eps, unit, is_double(x))
    return mean, rest, var, rstd, unit


@making
def chosen(x, i, n, mask, room):
    """Those of n elements that a mask has, side by side: where they are, and how many."""
    if mask is None:
        return x, i, n
    count = 0
    for k in range(np.uintp(n)):
        if mask[i + k]:
            room[count] = x[i + k]
            count += 1
    return room, np.uintp(0), count


@making
def left_of(count, ddof):
    """What is left of 1 where a variance is divided by count - ddof in place of count."""
    return (count - ddof) / count if count > max(ddof, 0.0) else math.nan


@making
def moments_of(x, n, mask, ddof, mean, var):
    """Mean and variance of each row of n elements."""
    room = np.empty(0 if mask is None else n, x.dtype)
    for g in range(mean.size):
        row, i, count = chosen(x, np.uintp(g * n), n, mask, room)
        m, rest, v, _, unit = statistics_of(row, i, count, True, 0.0)
        mean[g] = (m + rest if math.isfinite(m) else m) / unit
        var[g] = v / left_of(count, ddof) / unit / unit


# --- From x to y ----------------------------------------------------------------------------------


@inner
def apply_row(x, y, start, n, per, scale, affine):
    """A row by its scale.

    `per` elements that follow one another have one weight; if that is 1, there is one for each.
    """
    channels = affine[0].size
    along = per == 1 and n > 1
    done = 0
    while done < n:
        m = min(NUMBA_TILE, n - done if along else per - done % per)
        i = start + np.uintp(done)
        c, step = np.uintp(np.intp(i) // per % channels), np.uintp(along)
        kinds = not along, True, False
        apply_part((x, i), (y, i), np.uintp(m), scale, 0, (affine, (c, c), (step, step)), kinds)
        done += m


@making
def normalized(arrays, n, per, affine, norm, mask, given, f):
    """Rows of n elements, by their own statistics or by those `given` for each channel: arrays.

    `norm`: whether it is centred, eps and ddof.
    """
    x, y = arrays
    centred, eps, ddof = norm
    per = n if affine[0].size == 1 else per
    room = np.empty(0 if mask is None else n, x.dtype)
    scale = np.empty((FIELDS, 1))
    for g in range(x.size // max(n, 1)):
        start = np.uintp(g * n)
        if given is None:
            row, i, count = chosen(x, start, n, mask, room)
            # sqrt(n / (n - ddof) var + eps) in terms of a variance with ddof = 0
            left = left_of(count, ddof)
            mean, rest, var, rstd, unit = statistics_of(row, i, count, centred, eps * left)
            rstd *= np.float64(real(math.sqrt(left), x))
        else:
            c = g % given[0].size
            mean, rest, var, unit = given[0][c], 0.0, given[1][c] + eps, 1.0
            rstd = scalar.inverse_root(var, 0.0) if var != 0.0 else 0.0
        found = mean, rest, var, rstd, unit
        write_scale(x, scale, 0, found, per == 1 and n > 1)
        apply_row(x, y, start, n, per, scale, affine)
        if f is not None:
            for k in range(start, start + np.uintp(n)):
                y[k] = real(f(y[k]), y)
