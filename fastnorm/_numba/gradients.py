"""Sums of dy and dy xhat, what dx needs of a group, and dx."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.compiling import (
    deliver,
    inner,
    is_double,
    read,
    real,
    summing,
    target,
    within,
)
from fastnorm._numba.walks import at
from fastnorm.schedule import NUMBA_TILE

# Arrays of a pass back, of which the first have steps.
OPERANDS = ("x", "dy", "dx", "weight", "stats")
X, DY, DX, WEIGHT, MEAN_OF = range(5)
STATS = MEAN_OF  # rstd lies as the mean does
RSTD_OF, SUMS, COLLECTED, ROOM, TILES, ONE, RANGES = range(5, 12)

TERMS = 5  # numbers that dx needs of a group
MEAN, RSTD, C1, C2, OUT = range(TERMS)

# --- Loops ----------------------------------------------------------------------------------------


@inner
def deviation(x, mean):
    """x - mean in float64: not to be reordered by a sum."""
    return np.float64(x) - mean


@inner
def xhat_of(x, hi, r, shift):
    return np.float64(scalar.apply(x, hi, r, shift))


@summing
def pairs(x, i, dy, j, n, scale):
    """Of dy and of dy xhat, over a run."""
    hi, r, shift = scale
    first = second = 0.0
    for k in range(n):
        t = np.float64(dy[j + k])
        first += t
        second += t * xhat_of(x[i + k], hi, r, shift)
    return first, second


@summing
def weighted_pairs(x, i, dy, j, n, scale, weight, w):
    """The same of dy weight."""
    hi, r, shift = scale
    first = second = 0.0
    for k in range(n):
        t = np.float64(dy[j + k]) * np.float64(weight[w + k])
        first += t
        second += t * xhat_of(x[i + k], hi, r, shift)
    return first, second


@summing
def pairs_in_double(x, i, dy, j, n, statistics, weights):
    """The same where a float32 cannot hold xhat; weights, where they begin and their step."""
    mean, rstd = statistics
    weight, w, step = weights
    first = second = 0.0
    for k in range(n):
        t = np.float64(dy[j + k]) * np.float64(weight[w + k * step])
        first += t
        second += t * deviation(x[i + k], mean)
    return first, second * rstd


@inner
def apply_back(source, slope, into, n, scale, terms):
    x, i = source
    dy, j = slope
    dx, o = into
    hi, r, shift = scale
    wr, c1, c2 = terms
    for k in range(n):
        dx[o + k] = scalar.apply_back(x[i + k], dy[j + k], hi, r, shift, wr, c1, c2)


@inner
def apply_back_in_double(source, slope, into, n, terms, g, weights):
    """dx of a group that is out of range, or one by given statistics, in which x has no part."""
    x, i = source
    dy, j = slope
    dx, o = into
    weight, w, step = weights
    mean, rstd, c1, c2 = terms[MEAN, g], terms[RSTD, g], terms[C1, g], terms[C2, g]
    for k in range(n):
        wk = np.float64(weight[w + k * step])
        if terms[OUT, g] < 0.0:
            dx[o + k] = real(np.float64(dy[j + k]) * (wk * rstd), dx)
        else:
            xhat = (np.float64(x[i + k]) - mean) * rstd
            dx[o + k] = real(rstd * (np.float64(dy[j + k]) * wk) - c1 - xhat * c2, dx)


@inner
def collect_in_double(source, slope, n, statistics, into, cell):
    """Add what a run has for the gradients of its weights and biases, in float64."""
    x, i = source
    dy, j = slope
    mean, rstd = statistics
    for k in range(n):
        t = np.float64(dy[j + k])
        into[0, cell + k] += t * ((np.float64(x[i + k]) - mean) * rstd)
        into[1, cell + k] += t


@inner
def apply_back_along(source, slope, into, n, scale, terms, weights):
    """dx of a run along which the weight differs."""
    x, i = source
    dy, j = slope
    dx, o = into
    c1, c2 = terms
    weight, w = weights
    hi, r, shift = scale
    for k in range(n):
        wr = weight[w + k] * r
        dx[o + k] = scalar.apply_back(x[i + k], dy[j + k], hi, r, shift, wr, c1, c2)


@inner
def collect(source, slope, n, scale, into, cell):
    """Add what a run has for the gradients of its weights and biases."""
    x, i = source
    dy, j = slope
    gw, gb = into[0], into[1]
    hi, r, shift = scale
    for k in range(n):
        t = np.float64(dy[j + k])
        gw[cell + k] += t * xhat_of(x[i + k], hi, r, shift)
        gb[cell + k] += t


# --- What float32 holds ---------------------------------------------------------------------------


@inner
def is_out_of_range(mean, rstd, x):
    """Whether float32 cannot hold what a group is scaled by."""
    if is_double(x) or rstd == 0.0:
        return False
    return not scalar.holds(rstd) or abs(mean) >= scalar.MOST


@inner
def holds_sums(c1, c2, count):
    """Whether float32 can hold c1 and xhat c2, no xhat being above the root of the count.

    Their digits, too; and both are below 2^102, half a unit of the largest float32: where dy wr
    leaves its range, dx does.
    """
    size = c1 * c1 + c2 * c2 * count
    return (size > 2.0**-204 and size < 2.0**204) or size == 0.0


@inner
def holds_terms(first, second):
    """Whether no term of two sums left float32's range, or lost its digits."""
    return abs(second) > 2.0**-100 and abs(first) + abs(second) < math.inf


@inner
def statistics_of(arrays, i):
    mean, rstd = arrays[MEAN_OF], arrays[RSTD_OF]
    return mean[i], rstd[i]


@inner
def centring(mean, rstd, tile):
    """hi, r and shift of xhat = (x - hi) r + shift, as numbers that are computed in."""
    hi = real(mean, tile)
    return hi, real(rstd, tile), real(-(mean - np.float64(hi)) * rstd, tile)


# --- Runs -----------------------------------------------------------------------------------------


@inner
def segment_at(w, segment):
    """Elements [first, last) of a group: within a plane where planes have weights of their own."""
    plane = w.length // w.planes
    p = segment // w.segments
    first = p * plane + segment % w.segments * w.span
    return first, min(first + w.span, (p + 1) * plane)


@within
def run_sums(w, steps, arrays, place, segment, along, tiles):
    """The two sums of a segment of `width` groups side by side, of dy weight if it is `along`."""
    a, b, width = place
    x, dy, weight, sums = arrays[X], arrays[DY], arrays[WEIGHT], arrays[SUMS]
    f, last = segment_at(w, segment)
    each = w.planes * w.segments
    for k in range(width):
        into = 2 * ((a * w.b + b + k) * each + segment)
        sums[into] = sums[into + 1] = 0.0
    while f < last:
        p = f // w.run
        n = min(last - f, w.run - (f - p * w.run), NUMBA_TILE)
        m = np.uintp(n)
        for k in range(width):
            source, i = read(x, at(steps, X, a, b + k, p, f - p * w.run, 0), m, tiles[0])
            slope, j = read(dy, at(steps, DY, a, b + k, p, f - p * w.run, 0), m, tiles[1])
            mean, rstd = statistics_of(arrays, at(steps, STATS, a, b + k, 0, 0, 0))
            scale = centring(mean, rstd, tiles[0])
            o = np.uintp(0)
            if along:
                o = at(steps, WEIGHT, a, b + k, p, f - p * w.run, 0)
                first, second = weighted_pairs(source, i, slope, j, m, scale, weight, o)
            else:
                first, second = pairs(source, i, slope, j, m, scale)
            if not is_double(x) and (
                is_out_of_range(mean, rstd, x) or not holds_terms(first, second)
            ):
                one, step = (weight, np.uintp(1)) if along else (arrays[ONE], np.uintp(0))
                first, second = pairs_in_double(
                    source, i, slope, j, m, (mean, rstd), (one, o, step)
                )
            into = 2 * ((a * w.b + b + k) * each + segment)
            sums[into] += first
            sums[into + 1] += second
        f += n


@inner
def least_and_most(weight, w, n):
    """The least magnitude but for 0 of some floats less one bit, and the greatest, as their bits.

    These are in the order of magnitudes, and comparisons of whole numbers vectorise.
    """
    least, most = np.uint32(0xFFFFFFFF), np.uint32(0)
    for k in range(n):
        size = np.uint32(np.float32(weight[w + k]).view(np.uint32) & np.uint32(0x7FFFFFFF))
        most = max(most, size)
        least = min(least, np.uint32(size - np.uint32(1)))  # of a zero the largest
    return least, most


@inner
def range_of_weights(w, steps, weight, a, b):
    """The least magnitude but for 0 of weights that differ inside a group, and the greatest."""
    least, most = np.uint32(0xFFFFFFFF), np.uint32(0)
    if w.weighted and not is_double(weight):
        for p in range(w.p if w.along_p else 1):
            low, high = least_and_most(weight, at(steps, WEIGHT, a, b, p, 0, 0), np.uintp(w.s))
            least, most = min(least, low), max(most, high)
    lowest = np.uint32(least + np.uint32(1)).view(np.float32)
    return np.float64(lowest), np.float64(np.uint32(most).view(np.float32))


@within
def group_terms(w, steps, arrays, place, weights, along, terms, g):
    """What dx needs of a group, from the sums of its segments; `weights` are the range of those."""
    a, b = place
    x, weight, sums = arrays[X], arrays[WEIGHT], arrays[SUMS]
    mean, rstd = statistics_of(arrays, at(steps, STATS, a, b, 0, 0, 0))
    first = second = 0.0
    out = is_out_of_range(mean, rstd, x)
    each = w.planes * w.segments
    for segment in range(each):
        wk = 1.0
        if not along:
            wk = np.float64(weight[at(steps, WEIGHT, a, b, segment // w.segments, 0, 0)])
            out = out or not scalar.holds(wk * rstd)
        of = 2 * ((a * w.b + b) * each + segment)
        first += wk * sums[of]
        second += wk * sums[of + 1]
    out = out or not (scalar.holds(weights[0] * rstd) and scalar.holds(weights[1] * rstd))
    count = np.float64(w.p * w.s)
    c1 = rstd * (first / count) if w.training and w.centred else 0.0
    c2 = rstd * (second / count) if w.training else 0.0
    out = (out or not holds_sums(c1, c2, count)) and not is_double(x)
    terms[MEAN, g], terms[RSTD, g], terms[C1, g], terms[C2, g] = mean, rstd, c1, c2
    terms[OUT, g] = (1.0 if out else 0.0) if w.training else -1.0


@within
def apply_run(w, steps, arrays, place, segment, terms, tiles):
    """dx of a segment of `width` groups side by side, whose runs have one weight each."""
    a, b, width = place
    x, dy, dx, weight = arrays[X], arrays[DY], arrays[DX], arrays[WEIGHT]
    f, last = segment_at(w, segment)
    while f < last:
        p = f // w.s
        s = f - p * w.s
        n = min(last - f, w.s - s, NUMBA_TILE)
        m = np.uintp(n)
        for k in range(width):
            source, i = read(x, at(steps, X, a, b + k, p, s, 0), m, tiles[0])
            slope, j = read(dy, at(steps, DY, a, b + k, p, s, 0), m, tiles[1])
            o = at(steps, DX, a, b + k, p, s, 0)
            t, q = target(dx, o, tiles[2], True)
            v = at(steps, WEIGHT, a, b + k, p, 0, 0)
            if terms[OUT, k] != 0.0:
                weights = weight, v, np.uintp(0)
                apply_back_in_double((source, i), (slope, j), (t, q), m, terms, k, weights)
            else:
                scale = centring(terms[MEAN, k], terms[RSTD, k], t)
                wr = real(np.float64(weight[v]) * terms[RSTD, k], t)
                c1, c2 = real(terms[C1, k], t), real(terms[C2, k], t)
                apply_back((source, i), (slope, j), (t, q), m, scale, (wr, c1, c2))
            deliver(dx, o, t, m, True)
        f += n


@within
def apply_cells(w, steps, arrays, place, between, terms, collected, tiles):
    """dx of elements of a run along which the weight differs; what they add to its gradients."""
    a, b, p = place
    x, dy, dx, weight = arrays[X], arrays[DY], arrays[DX], arrays[WEIGHT]
    f, last = between
    while f < last:
        n = min(last - f, NUMBA_TILE)
        m = np.uintp(n)
        source, i = read(x, at(steps, X, a, b, p, f, 0), m, tiles[0])
        slope, j = read(dy, at(steps, DY, a, b, p, f, 0), m, tiles[1])
        o, v = at(steps, DX, a, b, p, f, 0), at(steps, WEIGHT, a, b, p, f, 0)
        t, q = target(dx, o, tiles[2], True)
        cell = np.uintp((p * w.s if w.along_p else 0) + f)
        if terms[OUT, 0] != 0.0:
            mean, rstd = terms[MEAN, 0], terms[RSTD, 0]
            collect_in_double((source, i), (slope, j), m, (mean, rstd), collected, cell)
            weights = weight, v, np.uintp(1)
            apply_back_in_double((source, i), (slope, j), (t, q), m, terms, 0, weights)
        else:
            scale = centring(terms[MEAN, 0], terms[RSTD, 0], t)
            c1, c2 = real(terms[C1, 0], t), real(terms[C2, 0], t)
            collect((source, i), (slope, j), m, scale, collected, cell)
            apply_back_along((source, i), (slope, j), (t, q), m, scale, (c1, c2), (weight, v))
        deliver(dx, o, t, m, True)
        f += n
