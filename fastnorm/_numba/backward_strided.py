"""The backward pass over columns side by side in memory: groups are columns, or a few neighbours.

An item is a tile of whole columns. Rows are summed up column by column, a segment of rows at a
time; weights and what dx needs of a group are numbers of columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from fastnorm._numba import backward_loops as loops
from fastnorm._numba import scalar
from fastnorm._numba.backward_loops import (
    APPLY,
    DX,
    DY,
    MEAN,
    MOMENTS,
    RSTD,
    WEIGHT,
    WHOLE,
    X,
)
from fastnorm._numba.compiling import CHECKED, KERNEL, inner
from fastnorm._numba.elements import get, put, real
from fastnorm.schedule import BACKWARD_SPAN_ROWS, MAX_UNTILED_COLUMNS

# Places of whole numbers.
A, B, P, S, C, CENTRED, TRAINING, SEGMENTS, NEIGHBOURS, WIDTH, CHUNKS = range(11)

# What is known of the columns of a tile: as many numbers of each, one behind the other.
ROOM = MAX_UNTILED_COLUMNS
HI, R, SHIFT, WR, C1, C2 = 0, ROOM, 2 * ROOM, 3 * ROOM, 4 * ROOM, 5 * ROOM
# In float64, where the sums of a segment are, too.
MEANS, RSTDS, WEIGHTS, FIRST, SECOND, LOW, HIGH = (k * ROOM for k in range(7))


@inner
def tile_of(item, numbers):
    """(a, b, first column, columns) of an item."""
    outer, c = item // numbers[CHUNKS], item % numbers[CHUNKS] * numbers[WIDTH]
    return outer // numbers[B], outer % numbers[B], c, min(numbers[WIDTH], numbers[C] - c)


@inner
def at(steps, operand, tile, row, numbers):
    """Where an operand has the first column of a tile in a row."""
    a, b, c, _ = tile
    first = a * steps[operand, 0] + b * steps[operand, 1] + c * steps[operand, 4]
    first += steps[operand, 5]
    return first + row // numbers[S] * steps[operand, 2] + row % numbers[S] * steps[operand, 3]


@inner
def rows_of(segment, numbers):
    """Rows [first, last) of a segment."""
    first = segment * BACKWARD_SPAN_ROWS
    return first, min(first + BACKWARD_SPAN_ROWS, numbers[P] * numbers[S])


@inner
def describe(tile, real_known, known, steps, numbers, arrays):
    """Fill in what is known of each column; return whether any is out of range."""
    x, _, _, weight, means, rstds, _, _ = arrays
    a, b, c, n = tile
    w = a * steps[WEIGHT, 0] + b * steps[WEIGHT, 1] + c * steps[WEIGHT, 4] + steps[WEIGHT, 5]
    m = a * steps[MEAN, 0] + b * steps[MEAN, 1] + steps[MEAN, 5]
    r = a * steps[RSTD, 0] + b * steps[RSTD, 1] + steps[RSTD, 5]
    out = False
    for j in range(n):
        k = (c + j) // numbers[NEIGHBOURS]
        mean, rstd = means[m + k * steps[MEAN, 4]], rstds[r + k * steps[RSTD, 4]]
        v = np.float64(weight[w + j * steps[WEIGHT, 4]])
        known[MEANS + j], known[RSTDS + j], known[WEIGHTS + j] = mean, rstd, v
        hi, scale, shift = loops.centring(mean, rstd, x)
        real_known[HI + j], real_known[R + j], real_known[SHIFT + j] = hi, scale, shift
        real_known[WR + j] = real(v * rstd, x)
        out = out or loops.is_out_of_range(mean, rstd, x)
    return out


# --- Sums -----------------------------------------------------------------------------------------


@inner
def add_row(x, dy, known, both):
    """Add dy and dy xhat of a row to the sums of its columns."""
    for j in range(x.size):
        t = np.float64(get(dy[j]))
        xhat = scalar.apply(get(x[j]), known[HI + j], known[R + j], known[SHIFT + j])
        both[j] += t
        both[ROOM + j] += t * np.float64(xhat)


@inner
def add_rows(rows, dys, known, both):
    """The same of three rows, which touches the sums less often."""
    x0, x1, x2 = rows
    dy0, dy1, dy2 = dys
    for j in range(x0.size):
        hi, r, shift = known[HI + j], known[R + j], known[SHIFT + j]
        t0, t1 = np.float64(get(dy0[j])), np.float64(get(dy1[j]))
        t2 = np.float64(get(dy2[j]))
        d0 = np.float64(scalar.apply(get(x0[j]), hi, r, shift))
        d1 = np.float64(scalar.apply(get(x1[j]), hi, r, shift))
        d2 = np.float64(scalar.apply(get(x2[j]), hi, r, shift))
        both[j] += (t0 + t1) + t2
        both[ROOM + j] += scalar.fma(t2, d2, scalar.fma(t1, d1, t0 * d0))


@inner
def segment_sums(tile, segment, real_known, known, steps, numbers, arrays):
    """The sums of dy and dy xhat over a segment of rows, for each column."""
    x, dy = arrays[X], arrays[DY]
    x_step, dy_step, width = steps[X, 3], steps[DY, 3], tile[3]
    both = known[FIRST : FIRST + 2 * ROOM]
    both[:] = 0.0
    i, last = rows_of(segment, numbers)
    while i < last:
        n = min(last - i, numbers[S] - i % numbers[S])
        p, q = at(steps, X, tile, i, numbers), at(steps, DY, tile, i, numbers)
        i += n
        if CHECKED:
            loops.check(arrays, (p + (n - 1) * x_step, q + (n - 1) * dy_step, 0), width)
        while n >= 3:
            p1, p2, q1, q2 = p + x_step, p + 2 * x_step, q + dy_step, q + 2 * dy_step
            rows = x[p : p + width], x[p1 : p1 + width], x[p2 : p2 + width]
            dys = dy[q : q + width], dy[q1 : q1 + width], dy[q2 : q2 + width]
            add_rows(rows, dys, real_known, both)
            p, q, n = p2 + x_step, q2 + dy_step, n - 3
        while n > 0:
            add_row(x[p : p + width], dy[q : q + width], real_known, both)
            p += x_step
            q += dy_step
            n -= 1
    c = tile[2]
    sums = arrays[loops.SUMS][tile[0] * numbers[B] + tile[1], segment]
    for j in range(width):
        sums[0, c + j], sums[1, c + j] = both[j], both[ROOM + j]


@inner
def sums_out_of_range(tile, segment, known, steps, numbers, arrays):
    """The second sum again, in float64, of the columns that float32 cannot hold."""
    x, dy = arrays[X], arrays[DY]
    first, last = rows_of(segment, numbers)
    for j in range(tile[3]):
        mean, rstd = known[MEANS + j], known[RSTDS + j]
        if loops.is_out_of_range(mean, rstd, x):
            total = 0.0
            for i in range(first, last):
                v = np.float64(get(x[at(steps, X, tile, i, numbers) + j]))
                total += np.float64(get(dy[at(steps, DY, tile, i, numbers) + j])) * (v - mean)
            group = tile[0] * numbers[B] + tile[1]
            arrays[loops.SUMS][group, segment, 1, tile[2] + j] = total * rstd


@inner
def tile_terms(tile, real_known, known, numbers, arrays):
    """c1 and c2 of each column, from the sums of its group; c2 in float64 and both as known."""
    a, b, c, width = tile
    sums, k = arrays[loops.SUMS][a * numbers[B] + b], numbers[NEIGHBOURS]
    count = np.float64(numbers[P] * numbers[S] * k)
    known[LOW : LOW + 2 * ROOM] = 0.0
    if numbers[TRAINING]:
        for segment in range(numbers[SEGMENTS]):
            for j in range(width):
                known[LOW + j] += sums[segment, 0, c + j]
                known[HIGH + j] += sums[segment, 1, c + j]
    for begin in range(0, width, k):
        first = second = 0.0
        for j in range(begin, begin + k):
            first += known[WEIGHTS + j] * known[LOW + j]
            second += known[WEIGHTS + j] * known[HIGH + j]
        for j in range(begin, begin + k):
            known[LOW + j] = known[RSTDS + j] * (first / count) if numbers[CENTRED] else 0.0
            known[HIGH + j] = known[RSTDS + j] * (second / count)
            real_known[C1 + j] = real(known[LOW + j], arrays[X])
            real_known[C2 + j] = real(known[HIGH + j], arrays[X])


# --- dx -------------------------------------------------------------------------------------------


@inner
def apply_row(x, dy, dx, known):
    """dx of a row."""
    for j in range(x.size):
        v = scalar.apply_back(
            get(x[j]), get(dy[j]), known[HI + j], known[R + j], known[SHIFT + j],
            known[WR + j], known[C1 + j], known[C2 + j],
        )  # fmt: skip
        put(dx, j, v)


@inner
def apply_given_row(dy, dx, known):
    """dx of a row by given statistics, in which x, out of range or not, has no part."""
    for j in range(dy.size):
        put(dx, j, get(dy[j]) * known[WR + j])


@inner
def apply_segment(tile, segment, known, steps, numbers, arrays):
    """dx of a segment of rows."""
    x, dy, dx, n = arrays[X], arrays[DY], arrays[DX], tile[3]
    first, last = rows_of(segment, numbers)
    for i in range(first, last):
        q, r = at(steps, X, tile, i, numbers), at(steps, DY, tile, i, numbers)
        u = at(steps, DX, tile, i, numbers)
        if CHECKED:
            loops.check(arrays, (q, r, u), n)
        if numbers[TRAINING]:
            apply_row(x[q : q + n], dy[r : r + n], dx[u : u + n], known)
        else:
            apply_given_row(dy[r : r + n], dx[u : u + n], known)


@inner
def apply_out_of_range(tile, segment, known, steps, numbers, arrays):
    """The same again, in float64, of the columns that float32 cannot hold."""
    x, dy, dx = arrays[X], arrays[DY], arrays[DX]
    first, last = rows_of(segment, numbers)
    for j in range(tile[3]):
        mean, rstd = known[MEANS + j], known[RSTDS + j]
        if loops.is_out_of_range(mean, rstd, x):
            for i in range(first, last):
                t = np.float64(get(dy[at(steps, DY, tile, i, numbers) + j]))
                v = rstd * t * known[WEIGHTS + j]
                if numbers[TRAINING]:
                    xhat = (np.float64(get(x[at(steps, X, tile, i, numbers) + j])) - mean) * rstd
                    v = v - known[LOW + j] - xhat * known[HIGH + j]
                put(dx, at(steps, DX, tile, i, numbers) + j, real(v, x))


@inner
def columns(bounds, task, steps, numbers, arrays, real_known, known):
    """Sums and dx (or one of them) of tiles, or of segments of tiles where it is one of them."""
    segments, described = numbers[SEGMENTS], -1
    out = False
    for i in range(bounds[0], bounds[1]):
        item, begin, end = i, 0, segments
        if task != WHOLE:
            item, begin = i // segments, i % segments
            end = begin + 1
        tile = tile_of(item, numbers)
        if item != described:
            out = describe(tile, real_known, known, steps, numbers, arrays)
        if task != APPLY:
            for segment in range(begin, end):
                segment_sums(tile, segment, real_known, known, steps, numbers, arrays)
                if out:
                    sums_out_of_range(tile, segment, known, steps, numbers, arrays)
        if task != MOMENTS:
            if item != described:
                tile_terms(tile, real_known, known, numbers, arrays)
            for segment in range(begin, end):
                apply_segment(tile, segment, real_known, steps, numbers, arrays)
                if out:
                    apply_out_of_range(tile, segment, known, steps, numbers, arrays)
        described = item


def compile_columns(signature: Any, parallel: bool, sources: int) -> Any:
    """The kernel of columns."""
    key = sources + parallel

    @njit(signature, parallel=parallel, cache=not CHECKED, **KERNEL)
    def kernel_of_columns(turns, items, task, steps, numbers, arrays):
        if key != 0:
            real_known = np.empty((turns, 6 * ROOM), arrays[WEIGHT].dtype)
            known = np.empty((turns, 7 * ROOM))
            for i in prange(turns):
                bounds = items * i // turns, items * (i + 1) // turns
                columns(bounds, task, steps, numbers, arrays, real_known[i], known[i])

    return kernel_of_columns
