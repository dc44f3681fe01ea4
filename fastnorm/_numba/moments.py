"""Sums of x and of its square, their moments, and the merge of those of parts.

Moments are five numbers of float64: count, mean and its rest, sum of squared deviations and its
rest. Of floats they are summed about zero, and once more about the mean where squares cancel;
doubles, which have no bits to spare, always are, about their first element and then about the mean.
"""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.compiling import inner, is_double, load, read, read_rows, summing, within
from fastnorm._numba.walks import MASK, X, at
from fastnorm.schedule import CHAIN, MIN_BLOCK_ROWS, NUMBA_TILE

FIELDS = 5  # numbers of moments
COUNT, MEAN, REST, M2, M2_REST = range(FIELDS)
# What is summed up for each group or column on the way, and whether once more.
FIRST, SECOND, SECOND_REST, NUMBER, PIVOT, AGAIN = range(6)
SUMS = 6

# --- Loops ----------------------------------------------------------------------------------------


@inner
def deviation(x, pivot):
    """x - pivot in float64: not to be reordered by a sum."""
    return np.float64(x) - pivot


@summing
def sums(x, at_x, n, pivot):
    """Of x - pivot and of its square, over a run."""
    first = second = 0.0
    for i in range(n):
        d = deviation(x[at_x + i], pivot)
        first += d
        second += d * d
    return first, second


@inner
def add_rows(x, at_x, step, rows, n, total):
    """Add rows, four at a time, to the sums of each column."""
    first, second, rest, pivot = total[FIRST], total[SECOND], total[SECOND_REST], total[PIVOT]
    for r in range(np.uintp(0), rows, np.uintp(4)):
        row = at_x + r * step
        for j in range(n):
            v = pivot[j]
            i = row + j
            d0, d1 = deviation(x[i], v), deviation(x[i + step], v)
            i += step + step
            d2, d3 = deviation(x[i], v), deviation(x[i + step], v)
            first[j] += (d0 + d1) + (d2 + d3)
            squares = scalar.mac(d0, d0, d1 * d1) + scalar.mac(d2, d2, d3 * d3)
            if is_double(x):
                second[j], lost = scalar.two_sum(second[j], squares)
                rest[j] += lost
            else:
                second[j] += squares


@inner
def add_row(x, at_x, n, total):
    """Add one row."""
    first, second, rest, pivot = total[FIRST], total[SECOND], total[SECOND_REST], total[PIVOT]
    for j in range(n):
        d = deviation(x[at_x + j], pivot[j])
        first[j] += d
        second[j], lost = scalar.two_sum(second[j], d * d)
        rest[j] += lost


@inner
def add_chosen(x, at_x, n, total, mask, at_mask, step):
    """Add the chosen ones of a row."""
    for j in range(n):
        if mask[at_mask + j * step]:
            d = deviation(x[at_x + j], total[PIVOT, j])
            total[NUMBER, j] += 1.0
            total[FIRST, j] += d
            total[SECOND, j], lost = scalar.two_sum(total[SECOND, j], d * d)
            total[SECOND_REST, j] += lost


# --- From sums to moments -------------------------------------------------------------------------


@within
def begin(total, n, turn):
    for j in range(n):
        for field in (FIRST, SECOND, SECOND_REST, NUMBER):
            total[field, j] = 0.0
        if turn == 0:
            total[PIVOT, j] = 0.0


@within
def conclude(w, x, total, groups, turn, into):
    """Moments of the sums of each group; whether there is another turn."""
    any_again = False
    for g in range(groups):
        if turn == 1 and total[AGAIN, g] == 0.0:
            continue
        count, first, second = total[NUMBER, g], total[FIRST, g], total[SECOND, g]
        again = False
        mean = rest = 0.0
        m2, m2_rest = second, total[SECOND_REST, g]
        if w.centred:
            pivot = total[PIVOT, g * w.neighbours]
            mean, rest, m2, again = scalar.moments_of_sums(count, first, second + m2_rest, pivot)
            if is_double(x) and count > 0.0:
                m2_rest = (second - m2) + m2_rest - first * (first / count)
            else:
                m2_rest = 0.0
        into[COUNT, g], into[MEAN, g], into[REST, g] = count, mean, rest
        into[M2, g], into[M2_REST, g] = m2, m2_rest
        again = turn == 0 and w.centred != 0 and math.isfinite(mean) and (again or is_double(x))
        total[AGAIN, g] = 1.0 if again else 0.0
        any_again = any_again or again
        if again:
            for j in range(g * w.neighbours, (g + 1) * w.neighbours):
                total[PIVOT, j] = mean if is_double(x) else np.float64(np.float32(mean))
    return any_again


@inner
def gather(w, steps, x, mask, place, f, last, tile):
    """Copy up to a tile of (chosen) elements of a group from f on: how many, and where it ended."""
    a, b = place
    n = 0
    while f < last and n < NUMBA_TILE:
        p = f // w.s
        s = f - p * w.s
        m = min(last - f, w.s - s, NUMBA_TILE - n)
        i = at(steps, X, a, b, p, s, 0)
        if w.masked:
            o, step = at(steps, MASK, a, b, p, s, 0), np.uintp(steps[MASK, 3])
            for k in range(np.uintp(m)):
                if mask[o + k * step]:
                    tile[np.uintp(n)] = load(x, i + k)
                    n += 1
        else:
            for k in range(np.uintp(m)):
                tile[np.uintp(n) + k] = load(x, i + k)
            n += m
        f += m
    return n, f


@within
def runs_moments(w, steps, operands, place, split, into, room):
    """Moments of a split of a group: of its (chosen) elements in their order, NUMBA_TILE at a time.

    So where its planes lie, and what lies between them, decides no bit.
    """
    x, mask = operands
    total, tile = room
    a, b = place
    last = min((split + 1) * w.split, w.length)
    for turn in range(2):
        begin(total, 1, turn)
        f = split * w.split
        while f < last:
            p = f // w.run
            n = min(last - f, NUMBA_TILE)
            if not w.masked and n <= w.run - (f - p * w.run):
                o = at(steps, X, a, b, p, f - p * w.run, 0)
                source, i = read(x, o, np.uintp(n), tile)
                f += n
            else:
                n, f = gather(w, steps, x, mask, place, f, last, tile)
                source, i = tile, np.uintp(0)
            if turn == 0 and is_double(x) and w.centred and total[NUMBER, 0] == 0.0 and n > 0:
                total[PIVOT, 0] = source[i]
            for k in range(0, n, CHAIN if is_double(x) else NUMBA_TILE):
                m = min(n - k, CHAIN if is_double(x) else NUMBA_TILE)
                d, squares = sums(source, i + np.uintp(k), np.uintp(m), total[PIVOT, 0])
                total[FIRST, 0] += d
                total[SECOND, 0], lost = scalar.two_sum(total[SECOND, 0], squares)
                total[SECOND_REST, 0] += lost
            total[NUMBER, 0] += n
        if not conclude(w, x, total, 1, turn, into):
            return


@within
def columns_moments(w, steps, operands, place, split, into, room):
    """Moments of a split of rows, of each group of columns."""
    x, mask = operands
    total, tile = room
    a, b, c, width = place
    first = split * w.split
    last = min(first + w.split, w.length)
    n, step = np.uintp(width), np.uintp(steps[X, 3])
    for turn in range(2):
        begin(total, width, turn)
        if turn == 0 and is_double(x) and w.centred:
            first_of_columns(w, steps, x, mask, place, (first, last), total)
        f = first
        while f < last:
            p = f // w.s
            s = f - p * w.s
            rows = min(last - f, w.s - s)
            i = at(steps, X, a, b, p, s, c)
            if w.masked or rows < 4:
                source, i = read(x, i, n, tile)
                if w.masked:
                    m = at(steps, MASK, a, b, p, s, c)
                    add_chosen(source, i, n, total, mask, m, np.uintp(steps[MASK, 4]))
                else:
                    add_row(source, i, n, total)
                f += 1
                continue
            rows = min(rows - rows % 4, MIN_BLOCK_ROWS)
            source, i, apart = read_rows(x, i, step, rows, n, tile)
            add_rows(source, i, apart, np.uintp(rows), n, total)
            f += rows
        if not w.masked:
            for j in range(width):
                total[NUMBER, j] = last - first
        add_neighbours(total, width, w.neighbours)
        if not conclude(w, x, total, width // w.neighbours, turn, into):
            return


@inner
def add_neighbours(total, width, neighbours):
    """Add up the sums of the columns of each group."""
    for field in (FIRST, SECOND, SECOND_REST, NUMBER):
        for g in range(width // neighbours):
            added = 0.0
            for j in range(g * neighbours, (g + 1) * neighbours):
                added += total[field, j]
            total[field, g] = added


@inner
def first_of_columns(w, steps, x, mask, place, rows, total):
    """The first chosen element of each group of columns, about which it is summed at first."""
    a, b, c, width = place
    first, last = rows
    for g in range(width // w.neighbours):
        found = False
        f = first
        while f < last and not found:
            p = f // w.s
            for j in range(g * w.neighbours, (g + 1) * w.neighbours):
                chosen = True
                if w.masked:
                    chosen = mask[at(steps, MASK, a, b, p, f - p * w.s, c + j)] != 0
                if chosen and not found:
                    found = True
                    v = np.float64(load(x, at(steps, X, a, b, p, f - p * w.s, c + j)))
                    for i in range(g * w.neighbours, (g + 1) * w.neighbours):
                        total[PIVOT, i] = v
            f += 1


# --- Merging --------------------------------------------------------------------------------------


@inner
def merge_into(into, other, n):
    """Merge the moments of n groups into others."""
    for g in range(n):
        one = into[COUNT, g], into[MEAN, g], into[REST, g], into[M2, g], into[M2_REST, g]
        two = other[COUNT, g], other[MEAN, g], other[REST, g], other[M2, g], other[M2_REST, g]
        (
            into[COUNT, g], into[MEAN, g], into[REST, g], into[M2, g], into[M2_REST, g]
        ) = scalar.merge(one, two)  # fmt: skip
