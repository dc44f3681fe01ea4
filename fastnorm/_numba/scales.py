"""From moments to the scale of a group: mean, its rest, rstd, unit, and whether out of range.

What a float32 cannot hold (data at 1e38 or 1e-42) is out of range, and applied in float64. Doubles
whose squares leave the range are taken times a power of two, the unit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from fastnorm._numba import scalar
from fastnorm._numba.compiling import STRICT, inner
from fastnorm._numba.elements import is_double
from fastnorm._numba.moments import moments_of_blocks

RSTD, NORM, FACTOR = 0, 1, 2  # problem.Scaling


@inner
def scale_of_unit(found, eps, scaling, unit, x):
    """Mean, its rest, variance and scale of a group, from moments of x times `unit`."""
    double = is_double(x)
    count, mean, rest, m2, m2_rest = found
    if count == 0.0:
        mean = m2 = math.nan
    if not (double and math.isfinite(m2_rest)):
        m2_rest = 0.0
    var = (m2 + m2_rest) / count
    small = eps * unit * unit
    v = var + small
    var_rest = 0.0
    if double:
        var_rest = (scalar.fma(-var, count, m2) + m2_rest) / count + ((var - v) + small)
    # a constant group with eps = 0 is all bias: its scale is 0, not infinity
    rstd = scalar.inverse_root(v, var_rest) if v != 0.0 else 0.0
    if scaling == NORM:
        rstd = scalar.inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
        if math.sqrt(m2) < eps * unit:
            rstd = 1.0 / (eps * unit)
    return mean, rest, var, rstd


@inner
def scale_of_given(mean, var, eps, scaling, x):
    """The same of statistics that are given."""
    rstd = var
    if scaling != FACTOR:
        rstd = scalar.inverse_root(var + eps, 0.0) if var + eps != 0.0 else 0.0
    return mean, 0.0, rstd, 1.0, out_of_range(mean, rstd, x)


@inner
def out_of_range(mean, rstd, x):
    """Whether a float32 cannot hold them."""
    holds = scalar.holds(rstd) and not (rstd != 0.0 and abs(mean) >= scalar.MOST)
    return not (holds or is_double(x))


@inner
def leaves_range(found, eps, scaling):
    """Whether the squares of a group of doubles are too large or too small."""
    v = found[3] / found[0] + eps if scaling == RSTD else found[3]
    return found[0] > 0.0 and not 1e-270 < v < 1e270


@inner
def rescaled(values, found, centred):
    """Moments of a group times a unit that brings it to 1, and the unit; `values` is overwritten.

    Without one where elements are no numbers or infinite (the mean of centred ones is their sum),
    or where all are the same.
    """
    largest = 0.0
    odd = 0.0
    constant = True
    for v in values:
        if math.isfinite(v):
            largest = max(largest, abs(v))
            constant = constant and v == values[0]
        else:
            odd += v
    if odd != 0.0:
        mean = odd if centred else math.nan
        # what is not a number leaves moments as they were found
        known = (found[0], mean, math.nan, math.nan, 0.0)
        return known if mean == mean else found, 1.0
    if largest == 0.0 or (constant and centred):
        return (found[0], values[0] if centred else 0.0, 0.0, 0.0, 0.0), 1.0
    unit = math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))
    for i in range(values.size):
        values[i] *= unit
    return moments_of_blocks(values, centred), unit


@inner
def chosen_doubles(x, mask, masked, place):
    """A copy of the chosen elements of a group; `place` is as `in_range` has it."""
    dims, of_x, of_mask = place
    values = np.empty(dims[0] * dims[1] * dims[2])
    n = 0
    for p in range(dims[0]):
        for s in range(dims[1]):
            for c in range(dims[2]):
                if mask is not None:
                    m = of_mask[0] + p * of_mask[1] + s * of_mask[2] + c * of_mask[3]
                    if masked and not mask[m]:
                        continue
                values[n] = x[of_x[0] + p * of_x[1] + s * of_x[2] + c * of_x[3]]
                n += 1
    return values[:n]


def in_range(found: Any, eps: Any, asked: Any, x: Any, mask: Any, place: Any) -> Any:
    """The moments of a group, rescaled where its squares leave the range of doubles, and the unit.

    `asked` is scaling, centred and masked; `place` how many elements along p, s and c, and of x and
    the mask where the first lies and the strides of these three.
    """
    raise TypeError("for compiled code")


@overload(in_range, jit_options=STRICT, strict=False)
def _in_range(found: Any, eps: Any, asked: Any, x: Any, mask: Any, place: Any) -> Any:
    if x.dtype != types.float64:
        return lambda found, eps, asked, x, mask, place: (found, 1.0)

    def doubles_in_range(found: Any, eps: Any, asked: Any, x: Any, mask: Any, place: Any) -> Any:
        scaling, centred, masked = asked
        if not leaves_range(found, eps, scaling):
            return found, 1.0
        return rescaled(chosen_doubles(x, mask, masked, place), found, centred)

    return doubles_in_range
