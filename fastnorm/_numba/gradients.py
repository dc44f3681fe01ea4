"""Sums of dy and dy xhat, what dx needs of a group, and dx."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.compiling import (
    deliver,
    inner,
    is_double,
    load,
    read,
    read_rows,
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
OF_COLUMN = 6  # and that it needs of each column, as numbers that are computed in
HI, R, SHIFT, WR, COLUMN_C1, COLUMN_C2 = range(OF_COLUMN)

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


# --- Columns --------------------------------------------------------------------------------------


@inner
def add_pairs(source, slope, n, own, sums, first, second):
    """Add dy and dy xhat of four rows to the sums of each column."""
    x, i, x_step = source
    dy, j, dy_step = slope
    hi, r, shift = own[HI], own[R], own[SHIFT]
    for k in range(n):
        h, v, d = hi[k], r[k], shift[k]
        x0, y0 = i + k, j + k
        x2, y2 = x0 + x_step + x_step, y0 + dy_step + dy_step
        t0, t1 = np.float64(dy[y0]), np.float64(dy[y0 + dy_step])
        t2, t3 = np.float64(dy[y2]), np.float64(dy[y2 + dy_step])
        d0, d1 = xhat_of(x[x0], h, v, d), xhat_of(x[x0 + x_step], h, v, d)
        d2, d3 = xhat_of(x[x2], h, v, d), xhat_of(x[x2 + x_step], h, v, d)
        sums[first + k] += (t0 + t1) + (t2 + t3)
        sums[second + k] += scalar.mac(t0, d0, t1 * d1) + scalar.mac(t2, d2, t3 * d3)


@inner
def add_pair(source, slope, n, own, sums, first, second):
    """The same of one row."""
    x, i, _ = source
    dy, j, _ = slope
    hi, r, shift = own[HI], own[R], own[SHIFT]
    for k in range(n):
        t = np.float64(dy[j + k])
        sums[first + k] += t
        sums[second + k] += t * xhat_of(x[i + k], hi[k], r[k], shift[k])


@inner
def column_in_double(w, steps, arrays, place, rows, mean, rstd):
    """The two sums of a column."""
    a, b, c = place
    x, dy = arrays[X], arrays[DY]
    first = second = 0.0
    for f in range(rows[0], rows[1]):
        p, s = f // w.s, f % w.s
        t = np.float64(load(dy, at(steps, DY, a, b, p, s, c)))
        first += t
        d = (np.float64(load(x, at(steps, X, a, b, p, s, c))) - mean) * rstd
        second = scalar.mac(t, d, second)
    return first, second


@within
def columns_sums(w, steps, arrays, place, segment, terms, own, tiles):
    """Sums of a segment of rows, for each column."""
    a, b, c, width = place
    x, dy, sums = arrays[X], arrays[DY], arrays[SUMS]
    first = np.uintp(2 * ((a * w.b + b) * w.segments + segment) * w.c + c)
    second = first + np.uintp(w.c)
    n = np.uintp(width)
    for k in range(n):
        sums[first + k] = sums[second + k] = 0.0
    f = segment * w.span
    last = min(f + w.span, w.length)
    while f < last:
        p = f // w.s
        s = f - p * w.s
        rows = min(last - f, w.s - s)
        take = 4 if rows >= 4 else 1
        i, j = at(steps, X, a, b, p, s, c), at(steps, DY, a, b, p, s, c)
        x_step, dy_step = np.uintp(steps[X, 3]), np.uintp(steps[DY, 3])
        source, i, x_step = read_rows(x, i, x_step, take, n, tiles[0])
        slope, j, dy_step = read_rows(dy, j, dy_step, take, n, tiles[1])
        if take == 4:
            add_pairs((source, i, x_step), (slope, j, dy_step), n, own, sums, first, second)
        else:
            add_pair((source, i, x_step), (slope, j, dy_step), n, own, sums, first, second)
        f += take
    for k in range(width):
        mean, rstd = terms[MEAN, k], terms[RSTD, k]
        held = holds_terms(sums[first + np.uintp(k)], sums[second + np.uintp(k)])
        if not is_double(x) and (is_out_of_range(mean, rstd, x) or not held):
            sums[first + np.uintp(k)], sums[second + np.uintp(k)] = column_in_double(
                w, steps, arrays, (a, b, c + k), (segment * w.span, last), mean, rstd
            )


@within
def column_terms(w, steps, arrays, place, summed, terms, own):
    """What the sums need of each column, and once they are there what dx does."""
    a, b, c, width = place
    x, weight, sums = arrays[X], arrays[WEIGHT], arrays[SUMS]
    count = np.float64(w.length * w.neighbours)
    for g in range(width // w.neighbours):
        columns = range(g * w.neighbours, (g + 1) * w.neighbours)
        mean, rstd = statistics_of(arrays, at(steps, STATS, a, b, 0, 0, c // w.neighbours + g))
        first = second = 0.0
        if summed and w.training:
            for k in columns:
                wk = np.float64(weight[at(steps, WEIGHT, a, b, 0, 0, c + k)])
                for segment in range(w.segments):
                    of = 2 * ((a * w.b + b) * w.segments + segment) * w.c + c + k
                    first += wk * sums[of]
                    second += wk * sums[of + w.c]
        c1 = rstd * (first / count) if w.centred else 0.0
        c2 = rstd * (second / count)
        for k in columns:
            wr = np.float64(weight[at(steps, WEIGHT, a, b, 0, 0, c + k)]) * rstd
            own[HI, k], own[R, k], own[SHIFT, k] = centring(mean, rstd, own)
            own[WR, k] = real(wr, own)
            own[COLUMN_C1, k], own[COLUMN_C2, k] = real(c1, own), real(c2, own)
            out = is_out_of_range(mean, rstd, x) or not scalar.holds(wr)
            out = (out or not holds_sums(c1, c2, count)) and not is_double(x)
            terms[MEAN, k], terms[RSTD, k], terms[C1, k], terms[C2, k] = mean, rstd, c1, c2
            terms[OUT, k] = (1.0 if out else 0.0) if w.training else -1.0


@inner
def apply_back_row(x, i, dy, j, dx, o, n, own):
    hi, r, shift = own[HI], own[R], own[SHIFT]
    wr, c1, c2 = own[WR], own[COLUMN_C1], own[COLUMN_C2]
    for k in range(n):
        dx[o + k] = scalar.apply_back(
            x[i + k], dy[j + k], hi[k], r[k], shift[k], wr[k], c1[k], c2[k]
        )


@within
def columns_apply(w, steps, arrays, place, segment, terms, own, tiles):
    """dx of a segment of rows."""
    a, b, c, width = place
    x, dy, dx, weight = arrays[X], arrays[DY], arrays[DX], arrays[WEIGHT]
    n = np.uintp(width)
    any_out = False
    for k in range(width):
        any_out = any_out or terms[OUT, k] != 0.0
    f = segment * w.span
    for f in range(segment * w.span, min((segment + 1) * w.span, w.length)):
        p = f // w.s
        s = f - p * w.s
        source, i = read(x, at(steps, X, a, b, p, s, c), n, tiles[0])
        slope, j = read(dy, at(steps, DY, a, b, p, s, c), n, tiles[1])
        o = at(steps, DX, a, b, p, s, c)
        t, q = target(dx, o, tiles[2], True)
        apply_back_row(source, i, slope, j, t, q, n, own)
        if any_out:
            for k in range(width):
                if terms[OUT, k] != 0.0:
                    u = np.uintp(k)
                    v = at(steps, WEIGHT, a, b, 0, 0, c + k)
                    column = (source, i + u), (slope, j + u), (t, q + u)
                    weights = weight, v, np.uintp(0)
                    apply_back_in_double(
                        column[0], column[1], column[2], np.uintp(1), terms, k, weights
                    )
        deliver(dx, o, t, n, True)
