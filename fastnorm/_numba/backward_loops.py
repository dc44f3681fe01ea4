"""The backward pass over one contiguous slice: the sums, dx, and what weights' gradients collect.

    xhat = (x - mean) rstd            g = dy weight
    dx = rstd (g - sum(g)/count - xhat sum(g xhat)/count)        sums over a group
    dweight = sum(dy xhat)            dbias = sum(dy)            sums over what shares a weight

With c1 and c2, the two means times rstd. A loop writes one array, or one and a tile: LLVM gives up
where it would have to check more than eight pairs of arrays for overlap.
"""

from __future__ import annotations

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.compiling import inner, summing
from fastnorm._numba.elements import get, is_double, put, real

# Rows of `steps`, the strides of operands, and their places among the arrays of a kernel; behind
# them is what a kernel keeps: the sums of segments, and gradients of parts.
X, DY, DX, WEIGHT, MEAN, RSTD, SUMS, COLLECTED = range(8)

WHOLE, MOMENTS, APPLY = range(3)  # what a kernel is asked to do


@inner
def is_out_of_range(mean, rstd, x):
    """Whether float32 cannot hold what a group is scaled by."""
    if is_double(x) or rstd == 0.0:
        return False
    return not scalar.holds(rstd) or abs(mean) >= scalar.MOST


@inner
def centring(mean, rstd, x):
    """hi, r and shift of xhat = (x - hi) r + shift, as numbers that are computed in."""
    hi = real(mean, x)
    return hi, real(rstd, x), real(-(mean - np.float64(hi)) * rstd, x)


@inner
def check(arrays, starts, n):
    """Raise where n elements of x, dy and dx from `starts` on would leave them: with CHECKED."""
    x, dy, dx = starts
    if max(x + n - arrays[X].size, dy + n - arrays[DY].size, dx + n - arrays[DX].size) > 0:
        raise IndexError("a slice is out of bounds")
    if min(x, dy, dx) < 0:
        raise IndexError("a slice is out of bounds")


# --- Sums of a group ------------------------------------------------------------------------------


@summing
def sums_of_pairs(x, dy, centre):
    """Of dy and dy xhat."""
    hi, r, shift = centre
    first = second = 0.0
    for i in range(x.size):
        g = np.float64(get(dy[i]))
        first += g
        second += g * np.float64(scalar.apply(get(x[i]), hi, r, shift))
    return first, second


@summing
def sums_of_weighted(x, dy, weight, centre):
    """Of g and g xhat."""
    hi, r, shift = centre
    first = second = 0.0
    for i in range(x.size):
        g = np.float64(get(dy[i]) * weight[i])
        first += g
        second += g * np.float64(scalar.apply(get(x[i]), hi, r, shift))
    return first, second


@inner
def sums_out_of_range(x, dy, weight, mean, rstd):
    """The same in float64, where float32 cannot hold xhat; `weight` is empty, or as long as x."""
    first = second = 0.0
    for i in range(x.size):
        g = np.float64(get(dy[i]))
        if weight.size > 0:
            g *= np.float64(weight[i])
        first += g
        second += g * (np.float64(get(x[i])) - mean)
    return first, second * rstd


# --- dx -------------------------------------------------------------------------------------------


@inner
def apply_run(x, dy, dx, centre, scale):
    """dx of a slice with one weight; `scale` is that times rstd, c1 and c2."""
    hi, r, shift = centre
    wr, c1, c2 = scale
    for i in range(x.size):
        put(dx, i, scalar.apply_back(get(x[i]), get(dy[i]), hi, r, shift, wr, c1, c2))


@inner
def apply_out_of_range(x, dy, dx, weight, group):
    """dx of a slice in float64; `weight` has one number, or as many as x."""
    mean, rstd, c1, c2 = group
    along = 1 if weight.size > 1 else 0
    for i in range(x.size):
        xhat = (np.float64(get(x[i])) - mean) * rstd
        g = rstd * np.float64(get(dy[i])) * np.float64(weight[i * along])
        put(dx, i, real(g - c1 - xhat * c2, x))


@inner
def apply_given(dy, dx, weight, rstd, in_double):
    """dx by given statistics, in which x, out of range or not, has no part."""
    along = 1 if weight.size > 1 else 0
    wr = real(np.float64(weight[0]) * rstd, dx)
    for i in range(dy.size):
        t, w = get(dy[i]), weight[i * along]
        v = t * wr if along == 0 else t * (w * real(rstd, dx))
        put(dx, i, real(rstd * np.float64(t) * np.float64(w), dx) if in_double else v)


# --- dx and gradients of weights along a slice ----------------------------------------------------


@inner
def collect_run(x, dy, dx, weight, gradients, scale):
    """dx of a slice; dy xhat and dy are added to the gradients of its weights and biases."""
    of_weight, of_bias = gradients
    (hi, r, shift), c1, c2 = scale
    for i in range(x.size):
        t = get(dy[i])
        xhat = scalar.apply(get(x[i]), hi, r, shift)
        put(dx, i, scalar.fma(-xhat, c2, scalar.fma(t, weight[i] * r, -c1)))
        of_weight[i] += np.float64(t) * np.float64(xhat)
    for i in range(dy.size):
        of_bias[i] += np.float64(get(dy[i]))


@inner
def collect_out_of_range(x, dy, gradients, mean, rstd):
    """Add the same, xhat in float64."""
    of_weight, of_bias = gradients
    for i in range(x.size):
        t = np.float64(get(dy[i]))
        of_weight[i] += t * ((np.float64(get(x[i])) - mean) * rstd)
        of_bias[i] += t
