"""Rows inside a user's own `@njit` functions: their statistics, and what is made of them.

A row is the elements of one group side by side. This is the row of `forward`: one thread, no
allocation but the result, and of a mask's row one that holds what it leaves.

Numba lets go of an array after its last use, and an address is none: whoever takes the address of
an array's memory is given the array, or uses it once more afterwards.
"""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.apply import apply_scale
from fastnorm._numba.blocking import FIELDS, SCALE
from fastnorm._numba.memory import inner, is_double, read, read_real, real, size_of, write
from fastnorm._numba.moments import merge_into, moments
from fastnorm._numba.scales import rstd_of
from fastnorm.schedule import APPLY_ELEMENTS, BLOCK, LANES

# --- The scale of a row ---------------------------------------------------------------------------


@inner
def row_moments(x, n, centred, into, part, lanes, kind):
    """Moments of n elements side by side: those of blocks, merged in order."""
    moments(x, min(n, BLOCK), centred, into, 1, lanes, kind)
    i = BLOCK
    while i < n:
        moments(x + i * size_of(kind), min(n - i, BLOCK), centred, part, 1, lanes, kind)
        merge_into(into, part, 1, 1)
        i += BLOCK


@inner
def largest_unit(x, n):
    """The power of two that brings doubles to 1: 1 where they are all 0, or not all finite."""
    largest = 0.0
    for i in range(n):
        v = abs(read(x, i, np.float64))
        if not v < math.inf:
            return 1.0
        largest = max(largest, v)
    return math.ldexp(1.0, min(-math.frexp(largest)[1], 1000)) if largest > 0.0 else 1.0


@inner
def scaled_moments(x, n, unit, centred, into, part, lanes):
    """Moments of n doubles times `unit`, where their squares leave the range."""
    scaled = np.empty(n, np.float64)
    for i in range(n):
        scaled[i] = read(x, i, np.float64) * unit
    row_moments(scaled.ctypes.data, n, centred, into, part, lanes, np.float64)
    scaled[0] = 0.0


@inner
def write_scale(scale, numbers, out_of_range, kind):
    """What `apply_scale` reads: mean, rest, rstd, unit, and whether float32 cannot hold them."""
    mean, rest, rstd, unit = numbers
    out_of_range = out_of_range or unit != 1.0
    if not is_double(kind):
        far = rstd != 0.0 and abs(mean) >= scalar.MOST
        out_of_range = out_of_range or not scalar.holds(rstd) or far
    write(scale, 0, mean)
    write(scale, 1, rest)
    write(scale, 2, rstd)
    write(scale, 3, unit)
    write(scale, 4, 1.0 if out_of_range else 0.0)
    write(scale, 5, 0.0)


@inner
def row_scale(x, n, centred, eps, room, kind):
    """From a row to its scale, at `room` + FIELDS numbers twice over."""
    part = room + 8 * FIELDS
    scale = part + 8 * FIELDS
    lanes = scale + 8 * SCALE
    row_moments(x, n, centred, room, part, lanes, kind)
    unit = 1.0
    if is_double(kind):
        v = read(room, 3, np.float64) / n + eps
        if not 1e-270 < v < 1e270:
            unit = largest_unit(x, n)
        if unit != 1.0:
            scaled_moments(x, n, unit, centred, room, part, lanes)
    mean = read(room, 1, np.float64)
    var, rstd = rstd_of(
        np.float64(n), read(room, 3, np.float64), read(room, 4, np.float64), eps, unit, kind
    )
    # where eps is that much more than the variance, a float32 would hold too few digits of xhat
    vanishes = not is_double(kind) and var > 0.0 and var * rstd * rstd < 2.0**-200
    write_scale(scale, (mean, read(room, 2, np.float64), rstd, unit), vanishes, kind)
    return scale


ROOM = 2 * FIELDS + SCALE + 4 * LANES  # numbers of float64 that a row needs


@inner
def given_scale(mean, var, eps, room, kind):
    """The same of statistics that are given."""
    scale = room + 8 * 2 * FIELDS
    rstd = scalar.inverse_root(var + eps, 0.0) if var + eps != 0.0 else 0.0
    write_scale(scale, (mean, 0.0, rstd, 1.0), False, kind)
    return scale


@inner
def scale_of(x, n, centred, eps, room, kind):
    """Of a row of n elements; of none, no numbers."""
    if n > 0:
        return row_scale(x, n, centred, eps, room, kind)
    return given_scale(math.nan, math.nan, eps, room, kind)


# --- From x to y ----------------------------------------------------------------------------------


@inner
def deliver(x, y, n, s, affine, foldable_far, f, kind):
    """A run by the scale at s, and through an activation while a tile of it is in L1.

    What is one number for the run is `foldable`; all else is as for `apply_scale`.
    """
    if f is None:
        apply_scale(x, y, n, s, 1, affine, foldable_far, (kind, kind))
        return
    weight, bias, wv, bv = affine
    size = size_of(kind)
    i = 0
    while i < n:
        m = min(n - i, APPLY_ELEMENTS)
        own = weight + i * wv * size, bias + i * bv * size, wv, bv
        at = y + i * size
        apply_scale(x + i * size, at, m, s, 1, own, foldable_far, (kind, kind))
        for j in range(m):
            write(at, j, real(f(read_real(at, j, kind)), kind))
        i += m


@inner
def address(numbers):
    """Where numbers lie; 0 where there are none."""
    return numbers.ctypes.data if numbers.size > 0 else 0


@inner
def rows(x, y, n, affine, norm, f, kind):
    """Each row's own statistics, and weights along it; arrays. `norm`: whether centred, and eps."""
    weight, bias = affine
    centred, eps = norm
    room = np.empty(ROOM, np.float64)
    wv = 1 if weight.size > 0 else 0
    bv = 1 if bias.size > 0 else 0
    for i in range(x.size // n):
        start = i * n * size_of(kind)
        at = x.ctypes.data + start
        s = scale_of(at, n, centred, eps, room.ctypes.data, kind)
        own = address(weight), address(bias), wv, bv
        deliver(at, y.ctypes.data + start, n, s, own, (False, False), f, kind)
    room[0] = 0.0


@inner
def channels(x, y, s, n, count, affine, f, kind):
    """Apply the scale at s to `count` channels of n elements, with one weight each."""
    weight, bias = affine
    wv = 1 if weight != 0 else 0
    bv = 1 if bias != 0 else 0
    if n == 1:
        deliver(x, y, count, s, (weight, bias, wv, bv), (False, False), f, kind)
        return
    for c in range(count):
        w = weight + c * wv * size_of(kind)
        b = bias + c * bv * size_of(kind)
        at = c * n * size_of(kind)
        deliver(x + at, y + at, n, s, (w, b, 0, 0), (True, False), f, kind)


# --- Rows of which a mask leaves some -------------------------------------------------------------


@inner
def chosen(x, mask, n, into, kind):
    """Copy those of n elements that a mask has; how many they are."""
    count = 0
    for i in range(n):
        if read(mask, i, np.uint8) != 0:
            write(into, count, read_real(x, i, kind))
            count += 1
    return count


@inner
def standardized(x, y, n, mask, ddof, eps, kind):
    """Each row less its mean and by its deviation; arrays, a mask of no elements has them all."""
    room = np.empty(ROOM, np.float64)
    own = np.empty(n if mask.size > 0 else 0, kind)
    weight = np.empty(1, kind)
    for i in range(x.size // n):
        start = i * n * size_of(kind)
        at = x.ctypes.data + start
        row = at
        count = n
        if mask.size > 0:
            row = own.ctypes.data
            count = chosen(at, mask.ctypes.data + i * n, n, row, kind)
        # sqrt(n / (n - ddof) var + eps) in terms of a variance with ddof = 0
        left = (count - ddof) / count if count > max(ddof, 0) else math.nan
        least = eps * left if left == left else eps
        s = scale_of(row, count, True, least, room.ctypes.data, kind)
        weight[0] = math.sqrt(left)
        w = weight.ctypes.data if ddof != 0 else 0
        far = mask.size > 0
        deliver(at, y.ctypes.data + start, n, s, (w, 0, 0, 0), (True, far), None, kind)
    room[0] = own.size + weight.size


@inner
def mean_and_var(x, n, ddof, room, kind):
    """Of n elements side by side."""
    if n == 0:
        return math.nan, math.nan
    part = room + 8 * FIELDS
    lanes = part + 8 * (FIELDS + SCALE)
    row_moments(x, n, True, room, part, lanes, kind)
    unit = 1.0
    if is_double(kind) and not 1e-270 < read(room, 3, np.float64) / n < 1e270:
        unit = largest_unit(x, n)
        if unit != 1.0:
            scaled_moments(x, n, unit, True, room, part, lanes)
    mean = read(room, 1, np.float64)
    if not math.isfinite(mean):
        # infinities of one sign; of both, or with what is no number, there is no mean
        mean = 0.0
        for i in range(n):
            v = np.float64(read_real(x, i, kind))
            mean += 0.0 if math.isfinite(v) else v
        return mean, math.nan
    m2 = max(read(room, 3, np.float64) + read(room, 4, np.float64), 0.0)
    var = m2 / (n - ddof) / unit / unit if n > ddof else math.nan
    return (mean + read(room, 2, np.float64)) / unit, var


@inner
def statistics(x, n, mask, ddof, mean, var, kind):
    """Mean and variance of each row; arrays, a mask of no elements has them all."""
    room = np.empty(ROOM, np.float64)
    own = np.empty(n if mask.size > 0 else 0, kind)
    for i in range(mean.size):
        row = x.ctypes.data + i * n * size_of(kind)
        count = n
        if mask.size > 0:
            count = chosen(row, mask.ctypes.data + i * n, n, own.ctypes.data, kind)
            row = own.ctypes.data
        mean[i], var[i] = mean_and_var(row, count, ddof, room.ctypes.data, kind)
    room[0] = own.size
