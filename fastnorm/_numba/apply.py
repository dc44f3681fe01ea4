"""From contiguous slices of x, and the scale of their group, to y.

A weight or bias comes as a slice as long as that of x, or as one number.
"""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.compiling import inner, part
from fastnorm._numba.elements import get, is_double, put, real


@inner
def apply_folded(x, y, hi, r, shift):
    """Apply a scale that has the affine step in it."""
    for i in range(y.size):
        put(y, i, scalar.apply(get(x[i]), hi, r, shift))


@inner
def apply_affine(x, y, scale, w, b):
    """Apply a scale and then the affine step."""
    hi, r, shift = scale
    if w.size == y.size and b.size == y.size:
        for i in range(y.size):
            put(y, i, scalar.fma(scalar.apply(get(x[i]), hi, r, shift), w[i], b[i]))
    elif w.size == y.size and b.size == 1:
        for i in range(y.size):
            put(y, i, scalar.fma(scalar.apply(get(x[i]), hi, r, shift), w[i], b[0]))
    else:
        wv, bv = int(w.size == y.size), int(b.size == y.size)
        for i in range(y.size):
            put(y, i, scalar.fma(scalar.apply(get(x[i]), hi, r, shift), w[i * wv], b[i * bv]))


@inner
def exact(x, scale, w, b):
    """One number in float64."""
    mean, rest, rstd, unit, _ = scale
    t = (np.float64(x) * unit - mean) - rest
    v = t * rstd
    return (v * w if math.isfinite(v) else t * (rstd * w)) + b


@inner
def apply_exact(x, y, scale, affine, only_lost):
    """In float64: all, or what has left the range and may come back by its weight."""
    w, b = affine
    wv, bv = int(w.size == y.size), int(b.size == y.size)
    for i in range(y.size):
        if not (only_lost and math.isfinite(get(y[i]))):
            v = exact(get(x[i]), scale, np.float64(w[i * wv]), np.float64(b[i * bv]))
            put(y, i, real(v, y))


@part
def apply_run(x, y, scale, w, b, far):
    """Apply a scale and the affine step; `far`: the statistics may not be of these numbers."""
    mean, rest, rstd, _, out_of_range = scale
    hi = real(mean, x)
    lo = (mean - np.float64(hi)) + rest
    rw = rstd * np.float64(w[0])
    folded = not is_double(x) and w.size == 1 and b.size == 1 and scalar.holds(rw)
    if not out_of_range:
        if folded:
            apply_folded(x, y, hi, real(rw, x), real(np.float64(b[0]) - lo * rw, x))
        else:
            apply_affine(x, y, (hi, real(rstd, x), real(-lo * rstd, x)), w, b)
    if out_of_range or (far and not folded):
        apply_exact(x, y, scale, (w, b), not out_of_range)


@inner
def add(t, residual):
    """t += residual."""
    for i in range(t.size):
        t[i] += residual[i]


@inner
def affine_step(t, w, b):
    """The affine step alone, of a norm that squashes first."""
    wv, bv = int(w.size == t.size), int(b.size == t.size)
    for i in range(t.size):
        t[i] = scalar.fma(t[i], w[i * wv], b[i * bv])


@inner
def store(t, y):
    """Round to what y holds."""
    for i in range(y.size):
        put(y, i, t[i])


@inner
def add_to(x, addend, total):
    """x + addend, rounded to the type of x: what the norm is of, and the second result."""
    for i in range(total.size):
        put(total, i, real(get(x[i]) + addend[i], x))
