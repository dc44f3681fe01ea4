"""From moments to the scale of a group, and to what its output needs of it."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.blocking import FACTOR, FIELDS, RSTD, at, chosen
from fastnorm._numba.memory import inner, is_double, read, read_real, real, write


@inner
def power_sum(q, x, mask, unit, pivot, square):
    """Compensated sum of x * unit - pivot, or of its square, over a group of doubles."""
    source = q.total if q.total.data != 0 else q.x
    total = 0.0
    rest = 0.0
    for k in range(q.neighbours):
        for p in range(q.p):
            for s in range(q.s):
                if chosen(q, mask, p, s, k):
                    v = (
                        read(x + p * source.p + s * source.s + k * source.c, 0, np.float64) * unit
                        - pivot
                    )
                    total, lost = scalar.two_sum(total, v * v if square else v)
                    rest += lost
    return total + rest


@inner
def rescaled_moments(q, x, mask):
    """Moments of one group whose squares leave float64's range, on x * unit: slow, rare.

    (whether there was something to rescale, mean, rest, M2, unit): nothing where elements are no
    numbers or infinite (the mean of centred ones is their sum) or where all are the same (mean
    that, M2 0).
    """
    source = q.total if q.total.data != 0 else q.x
    count = 0
    largest = 0.0
    first = 0.0
    odd = 0.0
    constant = True
    for k in range(q.neighbours):
        for p in range(q.p):
            for s in range(q.s):
                if chosen(q, mask, p, s, k):
                    v = read(x + p * source.p + s * source.s + k * source.c, 0, np.float64)
                    if not math.isfinite(v):
                        odd += v
                        continue
                    if count == 0:
                        first = v
                    constant = constant and v == first
                    largest = max(largest, abs(v))
                    count += 1
    if odd != 0.0:
        return False, odd if q.centred else math.nan, math.nan, math.nan, 1.0
    if count == 0:
        return False, math.nan, 0.0, math.nan, 1.0
    if largest == 0.0 or (constant and q.centred):
        return False, first, 0.0, 0.0, 1.0
    unit = math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))
    mean = 0.0
    rest = 0.0
    if q.centred:
        mean = first * unit
        mean += power_sum(q, x, mask, unit, mean, False) / count
        rest = power_sum(q, x, mask, unit, mean, False) / count
    m2 = power_sum(q, x, mask, unit, mean, True) - count * rest * rest
    return True, mean, rest, m2, unit


@inner
def rstd_of(count, m2, m2_rest, eps, unit, kind):
    """Variance and 1 / sqrt(variance + eps) of a group, both of x times the power of two `unit`."""
    # where a rounded mean is far off, much of a double's is in m2_rest; with an infinity it is NaN
    var = ((m2 + m2_rest) if is_double(kind) and math.isfinite(m2_rest) else m2) / count
    small = eps * unit * unit
    v = var + small
    var_rest = 0.0
    if is_double(kind):
        var_rest = (scalar.fma(-var, count, m2) + m2_rest) / count + ((var - v) + small)
    # a constant group with eps = 0 is all bias: its scale is 0, not infinity
    return var, scalar.inverse_root(v, var_rest) if v != 0.0 else 0.0


@inner
def loses_digits(q, var, rstd):
    """Whether a float32 holds too few digits of xhat for a weight that is not in its scale.

    So it is where eps is that much more than the variance.
    """
    apart = q.weight.data != 0 and q.foldable == 0 and q.given == 0 and q.scaling == RSTD
    return apart and var > 0.0 and var * rstd * rstd < 2.0**-200


@inner
def finalize(q, a, b, c, n, of, scale, kind):
    """From the moments of n groups to what their output needs; the statistics are written out.

    Mean, rest, rstd, unit, whether it is out of range, whether it is folded, and then rstd * weight
    and bias - lo * rstd * weight. What a float32 cannot hold (data at 1e38 or 1e-42) is out of
    range, and applied in float64, on x times the power of two `unit`.
    """
    source = q.total if q.total.data != 0 else q.x
    for g in range(n):
        if q.columns:
            place = (c // q.neighbours + g) * q.mean.c
            offset, group = c + g * q.neighbours, b
        else:
            place = 0
            offset, group = 0, b + g
        if q.fields != 0:
            # moments as they are, for statistics that are merged with others
            for field in range(FIELDS):
                out = at(q.mean, a, group) + place + field * q.fields
                write(out, 0, read(of, field * n + g, np.float64))
            continue
        unit = 1.0
        rest = 0.0
        if q.given:
            mean = read(at(q.mean, a, group) + place, 0, np.float64)
            var = read(at(q.var, a, group) + place, 0, np.float64)
            rstd = var
            if q.scaling != FACTOR:
                rstd = scalar.inverse_root(var + q.eps, 0.0) if var + q.eps != 0.0 else 0.0
        else:
            count = read(of, g, np.float64)
            mean = read(of, n + g, np.float64)
            rest = read(of, 2 * n + g, np.float64)
            m2 = read(of, 3 * n + g, np.float64)
            m2_rest = read(of, 4 * n + g, np.float64)
            if count == 0.0:
                mean = m2 = math.nan
            if is_double(kind):
                v = m2 / count + q.eps if q.scaling == RSTD else m2
                if not 1e-270 < v < 1e270 and count > 0.0:
                    x = at(source, a, group) + offset * source.c
                    mask = 0 if q.mask.data == 0 else at(q.mask, a, group) + offset * q.mask.c
                    found, other_mean, other_rest, other_m2, unit = rescaled_moments(q, x, mask)
                    if found or other_mean == other_mean:
                        mean, rest, m2, m2_rest = other_mean, other_rest, other_m2, 0.0
            var, rstd = rstd_of(count, m2, m2_rest, q.eps, unit, kind)
            if q.scaling != RSTD:
                rstd = scalar.inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
                if math.sqrt(m2) < q.eps * unit:
                    rstd = 1.0 / (q.eps * unit)
            if q.mean.data != 0:
                write(at(q.mean, a, group) + place, 0, mean / unit)
                write(at(q.var, a, group) + place, 0, var / unit / unit)
                write(at(q.rstd, a, group) + place, 0, rstd * unit)
        out_of_range = unit != 1.0
        if not is_double(kind):
            out_of_range = not scalar.holds(rstd) or (rstd != 0.0 and abs(mean) >= scalar.MOST)
            out_of_range = out_of_range or loses_digits(q, var, rstd)
        write(scale, g, mean)
        write(scale, n + g, rest)
        write(scale, 2 * n + g, rstd)
        write(scale, 3 * n + g, unit)
        write(scale, 4 * n + g, 1.0 if out_of_range else 0.0)
        write(scale, 5 * n + g, 0.0)
        if q.folded_groups and not out_of_range:
            w = 1.0
            v = 0.0
            if q.weight.data != 0:
                w = np.float64(read_real(at(q.weight, a, group), 0, kind))
            if q.bias.data != 0:
                v = np.float64(read_real(at(q.bias, a, group), 0, kind))
            lo = (mean - np.float64(real(mean, kind))) + rest
            if scalar.holds(rstd * w):
                write(scale, 5 * n + g, 1.0)
                write(scale, 6 * n + g, rstd * w)
                write(scale, 7 * n + g, v - lo * (rstd * w))
            else:  # as it is for columns
                write(scale, 4 * n + g, 1.0)
