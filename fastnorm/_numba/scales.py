"""From moments to the scale of a group: mean, its rest, rstd, unit and whether it is out of range.

What a float32 cannot hold (data at 1e38 or 1e-42) is out of range and applied in float64. Doubles
whose squares leave the range are taken times a power of two, their `unit`.
"""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.compiling import inner, is_double, load, within
from fastnorm._numba.moments import COUNT, M2, M2_REST, MEAN, REST
from fastnorm._numba.walks import MASK, STATS, X, at

RSTD, NORM, FACTOR = 0, 1, 2  # problem.Scaling
# Rows of a scale, of which MEAN and REST are those of moments.
INVERSE, UNIT, OUT = 0, 3, 4


@inner
def element(w, steps, x, mask, place, i):
    """The i-th number of a group in float64, and whether it is chosen."""
    a, b, c = place
    k = i // w.length
    f = i - k * w.length
    p, s = f // w.s, f % w.s
    chosen = not w.masked or mask[at(steps, MASK, a, b, p, s, c + k)] != 0
    return np.float64(load(x, at(steps, X, a, b, p, s, c + k))), chosen


@inner
def rescaled(w, steps, x, mask, place):
    """Moments of a group whose squares leave float64's range: mean, rest, M2 and unit; rare.

    The mean of numbers that are not all finite is their sum; where all are the same there is none
    but that.
    """
    n = w.length * w.neighbours
    count = 0
    first = largest = odd = 0.0
    constant = True
    for i in range(n):
        v, chosen = element(w, steps, x, mask, place, i)
        if chosen and not math.isfinite(v):
            odd += v
        elif chosen:
            first = v if count == 0 else first
            constant = constant and v == first
            largest = max(largest, abs(v))
            count += 1
    if odd != 0.0:
        return odd if w.centred else math.nan, math.nan, math.nan, 1.0
    if largest == 0.0 or (constant and w.centred):
        return first, 0.0, 0.0, 1.0
    unit = math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))
    pivot = first * unit if w.centred else 0.0
    for turn in range(2):
        total = rest = squares = squares_rest = 0.0
        for i in range(n):
            v, chosen = element(w, steps, x, mask, place, i)
            d = v * unit - pivot if chosen else 0.0
            total, lost = scalar.two_sum(total, d)
            rest += lost
            squares, lost = scalar.two_sum(squares, d * d)
            squares_rest += lost
        off = (total + rest) / count if w.centred else 0.0
        if turn == 0 and w.centred:
            pivot += off
    return pivot, off, (squares + squares_rest) - count * off * off, unit


@inner
def rstd_of(count, m2, m2_rest, eps, unit, double):
    """Variance and 1 / sqrt(variance + eps), both of x times `unit`."""
    # where a rounded mean is far off, much of a double's is in m2_rest; with an infinity it is NaN
    var = ((m2 + m2_rest) if double and math.isfinite(m2_rest) else m2) / count
    small = eps * unit * unit
    v = var + small
    rest = 0.0
    if double:
        rest = (scalar.fma(-var, count, m2) + m2_rest) / count + ((var - v) + small)
    # a constant group with eps = 0 is all bias: its scale is 0, not infinity
    return var, scalar.inverse_root(v, rest) if v != 0.0 else 0.0


@within
def write_scale(x, scale, g, numbers, apart):
    """The scale of group g, and whether it is out of range; `apart`: a weight comes after it."""
    mean, rest, var, rstd, unit = numbers
    out = unit != 1.0
    if not is_double(x):
        out = not scalar.holds(rstd) or (rstd != 0.0 and abs(mean) >= scalar.MOST)
        # where eps is that much more than the variance a float32 holds too few digits of xhat
        out = out or (apart and var > 0.0 and var * rstd * rstd < 2.0**-200)
    scale[MEAN, g], scale[REST, g], scale[INVERSE, g] = mean, rest, rstd
    scale[UNIT, g], scale[OUT, g] = unit, 1.0 if out else 0.0


@within
def finalize(w, eps, steps, operands, place, into, statistics, writes):
    """The scale of group g of an item, in place of its moments or by statistics that are given."""
    x, mask = operands
    scale, g = into
    mean_of, var_of, rstd_at = statistics
    a, b, c = place
    i = at(steps, STATS, a, b, 0, 0, c // w.neighbours)
    rest, unit = 0.0, 1.0
    if w.given:
        mean, var = mean_of[i], var_of[i]
        rstd = var
        if w.scaling != FACTOR:
            rstd = scalar.inverse_root(var + eps, 0.0) if var + eps != 0.0 else 0.0
    else:
        count, mean, rest = scale[COUNT, g], scale[MEAN, g], scale[REST, g]
        m2, m2_rest = scale[M2, g], scale[M2_REST, g]
        if count == 0.0:
            mean = m2 = math.nan
        if is_double(x) and count > 0.0:
            v = m2 / count + eps if w.scaling == RSTD else m2
            if not 1e-270 < v < 1e270:
                other, other_rest, other_m2, unit = rescaled(w, steps, x, mask, place)
                if other == other:
                    mean, rest, m2, m2_rest = other, other_rest, other_m2, 0.0
        var, rstd = rstd_of(count, m2, m2_rest, eps, unit, is_double(x))
        if w.scaling == NORM:
            rstd = scalar.inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
            if math.sqrt(m2) < eps * unit:
                rstd = 1.0 / (eps * unit)
        if writes:
            mean_of[i], var_of[i] = mean / unit, var / unit / unit
            rstd_at[i] = rstd * unit
    apart = w.weighted != 0 and w.folded == 0 and w.given == 0 and w.scaling == RSTD
    write_scale(x, scale, g, (mean, rest, var, rstd, unit), apart)
