"""Sums of dy and dy xhat of columns side by side, what dx needs of them, and dx."""

from __future__ import annotations

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
    target,
    within,
)
from fastnorm._numba.gradients import (
    C1,
    C2,
    DX,
    DY,
    MEAN,
    OUT,
    RSTD,
    STATS,
    SUMS,
    WEIGHT,
    X,
    apply_back_in_double,
    centring,
    holds_sums,
    holds_terms,
    is_out_of_range,
    statistics_of,
    xhat_of,
)
from fastnorm._numba.walks import at

OF_COLUMN = 6  # numbers that are computed in that dx needs of each column
HI, R, SHIFT, WR, COLUMN_C1, COLUMN_C2 = range(OF_COLUMN)


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
