"""Groups side by side in memory, forward: rows of c columns, `neighbours` of them a group.

Moments of the columns of a tile are five stretches of an array, one for each field.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from fastnorm._numba import plan, scalar
from fastnorm._numba.activations import activate, is_jitted
from fastnorm._numba.apply import add, affine_step, exact, store
from fastnorm._numba.compiling import KERNEL, STRICT, inner, part, summing
from fastnorm._numba.elements import get, is_double, piece, put, real
from fastnorm._numba.runs import at, read_moments, write_moments
from fastnorm._numba.scales import in_range, out_of_range, scale_of_given, scale_of_unit

# --- Sums -----------------------------------------------------------------------------------------


@inner
def row(steps, operand, place, i):
    """Where row i of a tile of columns begins."""
    a, b, c, n_s = place
    p = i // n_s
    o = at(steps, operand, a, b) + c * steps[operand, 4]
    return o + p * steps[operand, 2] + (i - p * n_s) * steps[operand, 3]


@summing
def add_eight(x, step, one, two):
    """Add eight rows, and their squares, to the sums of each column."""
    n = one.size
    r0, r1, r2 = x[:n], piece(x, step, n), x[2 * step : 2 * step + n]
    r3, r4 = x[3 * step : 3 * step + n], x[4 * step : 4 * step + n]
    r5, r6 = x[5 * step : 5 * step + n], x[6 * step : 6 * step + n]
    r7 = x[7 * step : 7 * step + n]
    # in two loops: LLVM would not vectorise one that writes both
    for c in range(n):
        d0, d1, d2 = np.float64(get(r0[c])), np.float64(get(r1[c])), np.float64(get(r2[c]))
        d3, d4, d5 = np.float64(get(r3[c])), np.float64(get(r4[c])), np.float64(get(r5[c]))
        d6, d7 = np.float64(get(r6[c])), np.float64(get(r7[c]))
        one[c] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
    for c in range(n):
        d0, d1, d2 = np.float64(get(r0[c])), np.float64(get(r1[c])), np.float64(get(r2[c]))
        d3, d4, d5 = np.float64(get(r3[c])), np.float64(get(r4[c])), np.float64(get(r5[c]))
        d6, d7 = np.float64(get(r6[c])), np.float64(get(r7[c]))
        even = ((d0 * d0 + d2 * d2) + d4 * d4) + d6 * d6
        odd = ((d1 * d1 + d3 * d3) + d5 * d5) + d7 * d7
        two[c] += even + odd


@inner
def add_row(x, pivot, one, two):
    """Add one row less its pivots, and its squares."""
    for c in range(one.size):
        d = np.float64(get(x[c])) - pivot[c]
        one[c] += d
        two[c] = scalar.mac(d, d, two[c])


@inner
def fill(v, value):
    """The same number everywhere."""
    for c in range(v.size):
        v[c] = value


@inner
def add_neighbours(v, k):
    """Sums of k neighbouring columns each, at the beginning of v."""
    if k > 1:
        for g in range(v.size // k):
            total = v[g * k]
            for j in range(1, k):
                total += v[g * k + j]
            v[g] = total


@inner
def column_sums(x, told, place, rows, pivot, sums):
    """Sums of x - pivot and of its square over rows [first, last), of each group."""
    numbers, steps = told[0], told[1]
    n = pivot.size
    i, last, about_zero = rows
    one, two = sums[:n], sums[n : 2 * n]
    fill(one, 0.0)
    fill(two, 0.0)
    while i < last:
        o = row(steps, plan.SOURCE, place, i)
        if about_zero and i + 8 <= last and i % place[3] + 8 <= place[3]:
            add_eight(x[o:], steps[plan.SOURCE, 3], one, two)
            i += 8
        else:
            add_row(piece(x, o, n), pivot, one, two)
            i += 1
    add_neighbours(one, numbers[plan.NEIGHBOURS])
    add_neighbours(two, numbers[plan.NEIGHBOURS])


# --- Moments --------------------------------------------------------------------------------------


@inner
def of_floats(x, told, place, rows, into, room):
    """Moments of a split of rows: about zero, and about the mean where that is far off."""
    numbers = told[0]
    k = numbers[plan.NEIGHBOURS]
    n = into.size // 5
    pivot, sums = room[:n], room[n : 3 * n]
    fill(pivot, 0.0)
    count = np.float64((rows[1] - rows[0]) * k)
    again = True
    about_zero = True
    while again:
        column_sums(x, told, place, (rows[0], rows[1], about_zero), pivot, sums)
        again = False
        for g in range(n // k):
            about = pivot[g * k]
            found = (0.0, 0.0, sums[n + g], False)
            if numbers[plan.CENTRED]:
                found = scalar.moments_of_sums(count, sums[g], sums[n + g], about)
            if about_zero or about != 0.0:
                write_moments(into, g, n, (count, found[0], found[1], found[2], 0.0))
            if about_zero and found[3] and math.isfinite(found[0]):
                again = True
                fill(pivot[g * k : g * k + k], np.float64(np.float32(found[0])))
        about_zero = False


@inner
def deviations(x, mask, places, pivot, d):
    """A row less its pivots; 0 for what a mask leaves out."""
    o, m, step, masked = places
    source = piece(x, o, d.size)
    for c in range(d.size):
        d[c] = np.float64(get(source[c])) - pivot[c]
    if mask is not None and masked:
        for c in range(d.size):
            if not mask[m + c * step]:
                d[c] = 0.0


@inner
def add_squares(d, m2, m2_rest):
    """Add squares to sums that are kept as two numbers."""
    for c in range(d.size):
        high, lost = scalar.two_sum(m2[c], d[c] * d[c])
        m2[c] = high
        m2_rest[c] += lost


@part
def find_pivots(x, mask, told, place, rows, into):
    """The first chosen element of each column, and how many are chosen."""
    numbers, steps = told[0], told[1]
    n = into.size // 5
    fill(into, 0.0)
    for i in range(rows[0], rows[1]):
        o, m = row(steps, plan.SOURCE, place, i), row(steps, plan.MASK, place, i)
        for c in range(n):
            if mask is not None:  # noqa: SIM102 - or a mask that is None would be compiled
                if numbers[plan.MASKED] and not mask[m + c * steps[plan.MASK, 4]]:
                    continue
            if into[c] == 0.0 and numbers[plan.CENTRED]:
                into[n + c] = np.float64(get(x[o + c]))
            into[c] += 1.0
        if not numbers[plan.MASKED]:
            fill(into[:n], np.float64(rows[1] - rows[0]))
            break


@part
def block_in_two(x, mask, told, place, rows, into, room):
    """Moments of each column over some rows: about the first chosen, and then about that mean.

    For doubles, which have no bits to spare, and for masks.
    """
    numbers, steps = told[0], told[1]
    n = into.size // 5
    find_pivots(x, mask, told, place, rows, into)
    d, total = room[:n], room[n : 2 * n]
    mean = into[n : 2 * n]
    step, masked = steps[plan.MASK, 4], numbers[plan.MASKED] != 0
    for turn in range(0 if numbers[plan.CENTRED] else 1, 2):
        fill(total, 0.0)
        for i in range(rows[0], rows[1]):
            o, m = row(steps, plan.SOURCE, place, i), row(steps, plan.MASK, place, i)
            deviations(x, mask, (o, m, step, masked), mean, d)
            add(total, d)
            if turn:
                add_squares(d, into[3 * n : 4 * n], into[4 * n :])
        if numbers[plan.CENTRED]:
            for c in range(n):
                if into[c] > 0.0:
                    deviation = total[c] / into[c]
                    if turn:
                        into[2 * n + c] = deviation
                        into[4 * n + c] -= total[c] * deviation
                    else:
                        mean[c] += deviation


@inner
def in_two(x, mask, told, place, rows, into, room):
    """Those of blocks, merged in their order, and of neighbours."""
    numbers = told[0]
    first, last = rows
    n = into.size // 5
    k = numbers[plan.NEIGHBOURS]
    some = room[2 * n : 7 * n]
    for f in range(first, last, numbers[plan.BLOCK_ROWS]):
        block = f, min(f + numbers[plan.BLOCK_ROWS], last)
        block_in_two(x, mask, told, place, block, some, room)
        merge_columns(into, some, n, f == first)
    if k > 1:
        for g in range(n // k):
            found = read_moments(into, g * k, n)
            for j in range(1, k):
                found = scalar.merge(found, read_moments(into, g * k + j, n))
            write_moments(into, g, n, found)


@inner
def merge_columns(into, some, groups, first):
    """Merge moments side by side into others, or copy the first."""
    n = into.size // 5
    for g in range(groups):
        found = read_moments(some, g, n)
        if not first:
            found = scalar.merge(read_moments(into, g, n), found)
        write_moments(into, g, n, found)


def split_moments(x: Any, mask: Any, told: Any, place: Any, rows: Any, into: Any, room: Any) -> Any:
    """Moments of rows [first, last) of each column, neighbours together."""
    raise TypeError("for compiled code")


@overload(split_moments, jit_options=STRICT, strict=False)
def _split_moments(
    x: Any, mask: Any, told: Any, place: Any, rows: Any, into: Any, room: Any
) -> Any:
    def two(x: Any, mask: Any, told: Any, place: Any, rows: Any, into: Any, room: Any) -> None:
        in_two(x, mask, told, place, rows, into, room)

    def one(x: Any, mask: Any, told: Any, place: Any, rows: Any, into: Any, room: Any) -> None:
        of_floats(x, told, place, rows, into, room)

    def either(x: Any, mask: Any, told: Any, place: Any, rows: Any, into: Any, room: Any) -> None:
        if told[0][plan.MASKED]:
            in_two(x, mask, told, place, rows, into, room)
        else:
            of_floats(x, told, place, rows, into, room)

    if x.dtype == types.float64:
        return two
    return one if isinstance(mask, types.NoneType) else either


# --- Output ---------------------------------------------------------------------------------------


@inner
def scale_of_column_group(x, mask, told, place, g, found, stats):
    """The scale of group g of a tile; its statistics are written where somebody wants them."""
    numbers, steps, eps = told
    a, b, c, _ = place
    k = numbers[plan.NEIGHBOURS]
    o = at(steps, plan.STATS, a, b) + (c // k + g) * steps[plan.STATS, 4]
    if numbers[plan.GIVEN]:
        return scale_of_given(stats[0][o], stats[1][o], eps, numbers[plan.SCALING], x)
    unit = 1.0
    if is_double(x):
        asked = numbers[plan.SCALING], numbers[plan.CENTRED] != 0, numbers[plan.MASKED] != 0
        of_x, of_mask = steps[plan.SOURCE], steps[plan.MASK]
        where = (
            (numbers[plan.P], numbers[plan.S], k),
            (row(steps, plan.SOURCE, place, 0) + g * k * of_x[4], of_x[2], of_x[3], of_x[4]),
            (
                row(steps, plan.MASK, place, 0) + g * k * of_mask[4],
                of_mask[2],
                of_mask[3],
                of_mask[4],
            ),
        )
        found, unit = in_range(found, eps, asked, x, mask, where)
    mean, rest, var, rstd = scale_of_unit(found, eps, numbers[plan.SCALING], unit, x)
    if numbers[plan.WITH_STATS]:
        stats[0][o] = mean / unit
        stats[1][o] = var / unit / unit
        stats[2][o] = rstd * unit
    return mean, rest, rstd, unit, unit != 1.0 or out_of_range(mean, rstd, x)


@part
def spread(x, told, place, scales, parameters, along):
    """From scales of groups to those of columns, the affine step in them where it can be.

    `along` is hi, r and shift, and whether a column is out of range; returns whether any is.
    """
    numbers, steps = told[0], told[1]
    weight, bias = parameters
    hi, r, shift, out = along
    k = numbers[plan.NEIGHBOURS]
    wo, bo = row(steps, plan.WEIGHT, place, 0), row(steps, plan.BIAS, place, 0)
    folded = numbers[plan.FOLDED] != 0
    any_out = False
    for j in range(hi.size):
        mean, rest, rstd, _, flag = read_moments(scales, 5 * (j // k), 1)
        lo = (mean - np.float64(real(mean, x))) + rest
        w = np.float64(weight[wo + j * steps[plan.WEIGHT, 4]]) if folded else 1.0
        v = np.float64(bias[bo + j * steps[plan.BIAS, 4]]) if folded else 0.0
        hi[j] = real(mean, x)
        r[j] = real(rstd * w, x)
        shift[j] = real(v - lo * (rstd * w), x)
        is_out = flag != 0.0 or (folded and not scalar.holds(rstd * w))
        out[j] = 1.0 if is_out else 0.0
        any_out = any_out or is_out
    return any_out


@inner
def apply_row_folded(x, y, hi, r, shift):
    """A row, the affine step in its scales."""
    for c in range(y.size):
        put(y, c, scalar.apply(get(x[c]), hi[c], r[c], shift[c]))


@inner
def apply_row_affine(x, y, along, w, b):
    """A row, and then the affine step."""
    hi, r, shift, _ = along
    if w.size == y.size and b.size == y.size:
        for c in range(y.size):
            put(y, c, scalar.fma(scalar.apply(get(x[c]), hi[c], r[c], shift[c]), w[c], b[c]))
    else:
        wv, bv = int(w.size == y.size), int(b.size == y.size)
        for c in range(y.size):
            t = scalar.apply(get(x[c]), hi[c], r[c], shift[c])
            put(y, c, scalar.fma(t, w[c * wv], b[c * bv]))


@inner
def mend_row(x, y, scales, out, affine, k):
    """In float64: what is out of range, and what has left it and may come back by its weight."""
    w, b = affine
    wv, bv = int(w.size == y.size), int(b.size == y.size)
    for c in range(y.size):
        if out[c] != 0.0 or not math.isfinite(get(y[c])):
            mean, rest, rstd, unit, _ = read_moments(scales, 5 * (c // k), 1)
            scale = mean, rest, rstd, unit, True
            v = exact(get(x[c]), scale, np.float64(w[c * wv]), np.float64(b[c * bv]))
            put(y, c, real(v, y))


@part
def apply_columns(told, place, operands, residual, room, scales, rows, act):
    """Some rows of a tile of columns, from x to y."""
    numbers, steps = told[0], told[1]
    x, y, weight, bias, status = operands
    along, tile, one, zero = room
    any_out = spread(x, told, place, scales, (weight, bias), along)
    n = tile.size
    after = numbers[plan.ACTIVATION_FIRST] != 0
    mend = any_out or numbers[plan.FAR] != 0
    # what is mended is read once more, and may lie where y does
    direct = numbers[plan.DIRECT] != 0 and not mend
    for i in range(rows[0], rows[1]):
        o, to = row(steps, plan.SOURCE, place, i), row(steps, plan.Y, place, i)
        source, target = piece(x, o, n), piece(y, to, n)
        if direct and numbers[plan.FOLDED]:
            apply_row_folded(source, target, along[0], along[1], along[2])
            continue
        wo, bo = row(steps, plan.WEIGHT, place, i), row(steps, plan.BIAS, place, i)
        w = piece(weight, wo, n if steps[plan.WEIGHT, 4] else 1)
        v = piece(bias, bo, n if steps[plan.BIAS, 4] else 1)
        if numbers[plan.FOLDED] or after:
            apply_row_folded(source, tile, along[0], along[1], along[2])
        else:
            apply_row_affine(source, tile, along, w, v)
        if mend:
            before = one if after else w, zero if after else v
            mend_row(source, tile, scales, along[3], before, numbers[plan.NEIGHBOURS])
        if residual is not None and numbers[plan.WITH_RESIDUAL]:
            e = row(steps, plan.RESIDUAL, place, i)
            add(tile, piece(residual, e, n))
        activate(act, numbers[plan.ACTIVATION], tile, status)
        if after and act is not None:
            affine_step(tile, w, v)
        store(tile, target)


# --- The kernel -----------------------------------------------------------------------------------


@inner
def columns(work, told, arrays, y, residual, mask, act):
    """What a task asks for, of tiles [begin, end) of columns, or of splits of tiles.

    `y`, `residual` and `mask` may be None.
    """
    task, begin, end = work
    numbers, steps = told[0], told[1]
    x, weight, bias, mean, var, rstd, parts, status = arrays
    width, chunks, splits = numbers[plan.WIDTH], numbers[plan.CHUNKS], numbers[plan.SPLITS]
    k = numbers[plan.NEIGHBOURS]
    doubles = np.empty(22 * width)
    lanes = np.empty(5 * width + 2, weight.dtype)
    lanes[5 * width], lanes[5 * width + 1] = 1.0, 0.0  # the weight and bias of no step
    one, zero = lanes[5 * width : 5 * width + 1], lanes[5 * width + 1 :]
    each = 1 if task == plan.WHOLE else splits
    before = -1
    for i in range(begin, end):
        item = i // each
        split = i - item * each
        outer = item // chunks
        a = outer // numbers[plan.B]
        c = (item - outer * chunks) * width
        n = min(width, numbers[plan.C] - c)
        place = a, outer - a * numbers[plan.B], c, numbers[plan.S]
        found, some = doubles[: 5 * n], doubles[5 * n : 10 * n]
        scales, room = doubles[10 * n : 15 * n], doubles[15 * n : 22 * n]
        if item != before or task == plan.MOMENTS:
            before = item
            for other in range(split if task == plan.MOMENTS else 0, splits):
                if numbers[plan.GIVEN]:
                    break
                if task != plan.WHOLE:
                    o = 5 * width * (item * splits + other)
                    some = parts[o : o + 5 * n]
                if task != plan.APPLY:
                    first = other * numbers[plan.SPLIT]
                    last = min(first + numbers[plan.SPLIT], numbers[plan.P] * numbers[plan.S])
                    split_moments(x, mask, told, place, (first, last), some, room)
                if task == plan.MOMENTS:
                    break
                merge_columns(found, some, n // k, other == 0)
            if task == plan.MOMENTS:
                continue
            for g in range(n // k):
                m = read_moments(found, g, n)
                if y is None and numbers[plan.FIELDS]:
                    o = at(steps, plan.STATS, a, place[1]) + (c // k + g) * steps[plan.STATS, 4]
                    write_moments(mean, o, numbers[plan.FIELDS], m)
                else:
                    s = scale_of_column_group(x, mask, told, place, g, m, (mean, var, rstd))
                    flag = 1.0 if s[4] else 0.0
                    write_moments(scales, 5 * g, 1, (s[0], s[1], s[2], s[3], flag))
        if y is not None:
            along = lanes[:n], lanes[n : 2 * n], lanes[2 * n : 3 * n], lanes[3 * n : 4 * n]
            first = split * numbers[plan.SPLIT]
            last = numbers[plan.P] * numbers[plan.S]
            if task == plan.APPLY:
                last = min(last, first + numbers[plan.SPLIT])
            operands = x, y, weight, bias, status
            own = along, lanes[4 * n : 5 * n], one, zero
            apply_columns(told, place, operands, residual, own, scales, (first, last), act)


def compile_columns(signature: Any, act: Any, parallel: bool, sources: int) -> Any:
    """The kernel of columns; `act` is an activation or None."""
    key = sources + parallel  # not the same on disk

    @njit(signature, parallel=parallel, cache=not is_jitted(act), **KERNEL)
    def kernel(
        turns, items, task, numbers, steps, eps, x, weight, bias, mean, var, rstd, parts, status,
        y, residual, mask, _added, _tiles,
    ):  # fmt: skip
        if key != 0:
            arrays = x, weight, bias, mean, var, rstd, parts, status
            told = numbers, steps, eps
            for turn in prange(turns):
                work = task, items * turn // turns, items * (turn + 1) // turns
                columns(work, told, arrays, y, residual, mask, act)

    return kernel
