"""Columns side by side, or neighbours that share a statistic: their moments, and their output."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.apply import activate, add, affine, apply_out_of_range, deliver, is_tiny
from fastnorm._numba.blocking import FIELDS, at, chosen
from fastnorm._numba.lanes import apply_lines
from fastnorm._numba.memory import (
    inner,
    is_double,
    load,
    merged,
    read,
    read_real,
    real,
    size_of,
    store,
    write,
)
from fastnorm._numba.moments import merge_into
from fastnorm.schedule import PREFETCH_BYTES, SPLIT_ROWS


@inner
def rows_sums(x, step, n, width, one, two, kind):
    """Add x and its square over n rows to the sums of each column, eight rows at a time."""
    while n >= 8:
        x1, x2, x3, x4 = x + step, x + 2 * step, x + 3 * step, x + 4 * step
        x5, x6, x7 = x + 5 * step, x + 6 * step, x + 7 * step
        for c in range(width):
            d0, d1 = np.float64(load(x, c, kind)), np.float64(load(x1, c, kind))
            d2, d3 = np.float64(load(x2, c, kind)), np.float64(load(x3, c, kind))
            d4, d5 = np.float64(load(x4, c, kind)), np.float64(load(x5, c, kind))
            d6, d7 = np.float64(load(x6, c, kind)), np.float64(load(x7, c, kind))
            even = scalar.mac(d6, d6, scalar.mac(d4, d4, scalar.mac(d2, d2, d0 * d0)))
            odd = scalar.mac(d7, d7, scalar.mac(d5, d5, scalar.mac(d3, d3, d1 * d1)))
            total = ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
            write(one, c, read(one, c, np.float64) + total)
            write(two, c, read(two, c, np.float64) + (even + odd))
        x += 8 * step
        n -= 8
    while n > 0:
        for c in range(width):
            d = np.float64(load(x, c, kind))
            write(one, c, read(one, c, np.float64) + d)
            write(two, c, scalar.mac(d, d, read(two, c, np.float64)))
        x += step
        n -= 1


@inner
def rows_sums_about(x, step, n, width, pivot, one, two, kind):
    """The same of x - pivot: a sum about zero costs a third less."""
    while n > 0:
        for c in range(width):
            d = np.float64(load(x, c, kind)) - read(pivot, c, np.float64)
            write(one, c, read(one, c, np.float64) + d)
            write(two, c, scalar.mac(d, d, read(two, c, np.float64)))
        x += step
        n -= 1


@inner
def columns_sums(q, base, rows, width, pivot, sums, kind):
    """Sums of x, or of x - pivot, and of its square over some rows, for each column."""
    first, last = rows
    one, two = sums
    for c in range(width):
        write(one, c, 0.0)
        write(two, c, 0.0)
    f = first
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = min(last - f, q.s - t)
        x = base + p * q.x.p + t * q.x.s
        if pivot == 0:
            rows_sums(x, q.x.s, n, width, one, two, kind)
        else:
            rows_sums_about(x, q.x.s, n, width, pivot, one, two, kind)
        f += n


@inner
def add_neighbours(groups, k, v):
    """Sums of k neighbouring columns."""
    for g in range(groups):
        total = read(v, g * k, np.float64)
        for j in range(1, k):
            total += read(v, g * k + j, np.float64)
        write(v, g, total)


@merged
def columns_block(q, place, rows, into, work, kind):
    """Moments over rows [first, last) of each group of floats, of columns c, c + 1, ... < width."""
    a, b, c, width = place
    first, last = rows
    k = q.neighbours
    groups = width // k
    base = at(q.x, a, b) + c * q.x.c
    one = work
    two = one + 8 * width
    pivot = two + 8 * width
    for j in range(width):
        write(pivot, j, 0.0)
    columns_sums(q, base, rows, width, np.int64(0), (one, two), kind)
    if k > 1:
        add_neighbours(groups, k, one)
        add_neighbours(groups, k, two)
    count = np.float64((last - first) * k)
    any_again = False
    for g in range(groups):
        mean = rest = 0.0
        m2 = read(two, g, np.float64)
        if q.centred:
            mean, rest, m2, again = scalar.moments_of_sums(count, read(one, g, np.float64), m2, 0.0)
            if again and math.isfinite(mean):
                any_again = True
                for j in range(k):
                    write(pivot, g * k + j, np.float64(np.float32(mean)))
        write(into, g, count)
        write(into, groups + g, mean)
        write(into, 2 * groups + g, rest)
        write(into, 3 * groups + g, m2)
        write(into, 4 * groups + g, 0.0)
    if not any_again:
        return
    # about the means, for the columns from the first to the last that need it
    low = 0
    while read(pivot, low * k, np.float64) == 0.0:
        low += 1
    high = groups
    while read(pivot, (high - 1) * k, np.float64) == 0.0:
        high -= 1
    some = (high - low) * k
    from_low, about_low = base + low * k * q.x.c, pivot + 8 * low * k
    columns_sums(q, from_low, rows, some, about_low, (one, two), kind)
    if k > 1:
        add_neighbours(high - low, k, one)
        add_neighbours(high - low, k, two)
    for g in range(low, high):
        about = read(pivot, g * k, np.float64)
        if about != 0.0:
            d, d2 = read(one, g - low, np.float64), read(two, g - low, np.float64)
            mean, rest, m2, again = scalar.moments_of_sums(count, d, d2, about)
            write(into, groups + g, mean)
            write(into, 2 * groups + g, rest)
            write(into, 3 * groups + g, m2)


@merged
def columns_double(q, place, rows, into, work):
    """Moments over rows [first, last) for each column of doubles, four rows at a time.

    Twice: about the first row, then about those means, the sum of squares kept as two numbers.
    """
    a, b, c, width = place
    first, last = rows
    base = at(q.x, a, b) + c * q.x.c
    pivot = work
    total = pivot + 8 * width
    m2 = into + 24 * width
    m2_rest = into + 32 * width
    step = q.x.s
    count = np.float64(last - first)
    for j in range(FIELDS * width):
        write(into, j, 0.0)
    for j in range(width):
        p = first // q.s
        x = base + p * q.x.p + (first - p * q.s) * step
        write(pivot, j, read(x, j, np.float64) if q.centred else 0.0)
    for turn in range(0 if q.centred else 1, 2):
        for j in range(width):
            write(total, j, 0.0)
        f = first
        while f < last:
            p = f // q.s
            t = f - p * q.s
            n = min(last - f, q.s - t)
            x = base + p * q.x.p + t * step
            f += n
            while n > 0:
                if n >= 4:
                    x1, x2, x3 = x + step, x + 2 * step, x + 3 * step
                    if turn == 0:
                        for j in range(width):
                            v = read(pivot, j, np.float64)
                            d0, d1 = read(x, j, np.float64) - v, read(x1, j, np.float64) - v
                            d2, d3 = read(x2, j, np.float64) - v, read(x3, j, np.float64) - v
                            write(total, j, read(total, j, np.float64) + ((d0 + d1) + (d2 + d3)))
                    else:
                        for j in range(width):
                            v = read(pivot, j, np.float64)
                            d0, d1 = read(x, j, np.float64) - v, read(x1, j, np.float64) - v
                            d2, d3 = read(x2, j, np.float64) - v, read(x3, j, np.float64) - v
                            squared = scalar.mac(d0, d0, d1 * d1) + scalar.mac(d2, d2, d3 * d3)
                            high, lost = scalar.two_sum(read(m2, j, np.float64), squared)
                            write(m2, j, high)
                            write(m2_rest, j, read(m2_rest, j, np.float64) + lost)
                            write(total, j, read(total, j, np.float64) + ((d0 + d1) + (d2 + d3)))
                    x += 4 * step
                    n -= 4
                    continue
                for j in range(width):
                    d = read(x, j, np.float64) - read(pivot, j, np.float64)
                    write(total, j, read(total, j, np.float64) + d)
                    if turn == 1:
                        high, lost = scalar.two_sum(read(m2, j, np.float64), d * d)
                        write(m2, j, high)
                        write(m2_rest, j, read(m2_rest, j, np.float64) + lost)
                x += step
                n -= 1
        for j in range(width):
            d = read(total, j, np.float64)
            write(into, j, count)
            if turn == 0:
                write(pivot, j, read(pivot, j, np.float64) + d / count)
            elif q.centred:
                write(into, width + j, read(pivot, j, np.float64))
                write(into, 2 * width + j, d / count)
                write(m2_rest, j, read(m2_rest, j, np.float64) - d * (d / count))


@inner
def deviation(q, mask, place, x, j, about, kind):
    """x - about of a column of row (p, t); what the mask leaves out adds nothing."""
    p, t = place
    if not chosen(q, mask, p, t, j):
        return 0.0
    return np.float64(load(x, j, kind)) - about


@merged
def columns_chosen(q, place, rows, into, work, kind):
    """Moments over the chosen of rows [first, last) for each column, four rows at a time.

    As `columns_double` takes them: about the first of them, then about that mean.
    """
    a, b, c, width = place
    first, last = rows
    base = at(q.x, a, b) + c * q.x.c
    mask = at(q.mask, a, b) + c * q.mask.c
    pivot = work
    total = pivot + 8 * width
    mean, m2, m2_rest = into + 8 * width, into + 24 * width, into + 32 * width
    step = q.x.s
    for j in range(FIELDS * width):
        write(into, j, 0.0)
    for i in range(first, last):
        p = i // q.s
        t = i - p * q.s
        for j in range(width):
            if chosen(q, mask, p, t, j):
                if read(into, j, np.float64) == 0.0:
                    v = np.float64(load(base + p * q.x.p + t * step, j, kind))
                    write(pivot, j, v if q.centred else 0.0)
                write(into, j, read(into, j, np.float64) + 1.0)
    for turn in range(0 if q.centred else 1, 2):
        about = pivot if turn == 0 else mean
        for j in range(width):
            write(total, j, 0.0)
        i = first
        while i < last:
            p = i // q.s
            t = i - p * q.s
            n = 4 if min(last - i, q.s - t) >= 4 else 1
            x = base + p * q.x.p + t * step
            for j in range(width):
                v = read(about, j, np.float64)
                d = squared = deviation(q, mask, (p, t), x, j, v, kind)
                squared *= d
                if n == 4:
                    d1 = deviation(q, mask, (p, t + 1), x + step, j, v, kind)
                    d2 = deviation(q, mask, (p, t + 2), x + 2 * step, j, v, kind)
                    d3 = deviation(q, mask, (p, t + 3), x + 3 * step, j, v, kind)
                    squared = scalar.mac(d, d, d1 * d1) + scalar.mac(d2, d2, d3 * d3)
                    d = (d + d1) + (d2 + d3)
                write(total, j, read(total, j, np.float64) + d)
                if turn == 1:
                    high, lost = scalar.two_sum(read(m2, j, np.float64), squared)
                    write(m2, j, high)
                    write(m2_rest, j, read(m2_rest, j, np.float64) + lost)
            i += n
        for j in range(width):
            count = read(into, j, np.float64)
            if q.centred and count > 0.0:
                d = read(total, j, np.float64)
                if turn == 0:
                    write(mean, j, read(pivot, j, np.float64) + d / count)
                else:
                    write(into, 2 * width + j, d / count)
                    write(m2_rest, j, read(m2_rest, j, np.float64) - d * (d / count))


@inner
def columns_moments(q, place, split, into, room, kind):
    """Moments of a split of each group: those of its blocks merged in order, then neighbours."""
    width = place[3]
    part, every, work = room
    k = q.neighbours
    groups = width // k
    span = max(q.block, SPLIT_ROWS - SPLIT_ROWS % q.block)
    first = split * span
    last = min(first + span, q.length)
    if not is_double(kind) and q.mask.data == 0:
        columns_block(q, place, (first, last), into, work, kind)
        return
    whole = into if k == 1 else every
    f = first
    while True:
        end = min(f + q.block, last)
        into_here = whole if f == first else part
        if q.mask.data != 0:
            columns_chosen(q, place, (f, end), into_here, work, kind)
        else:
            columns_double(q, place, (f, end), into_here, work)
        if f > first:
            merge_into(whole, part, width, width)
        f = end
        if f >= last:
            break
    if k > 1:
        for g in range(groups):
            for j in range(1, k):
                merge_into(whole + 8 * g * k, whole + 8 * (g * k + j), np.int64(1), width)
            for field in range(FIELDS):
                write(into, field * groups + g, read(whole, field * width + g * k, np.float64))


@merged
def spread(q, a, b, c, width, scale, along, kind):
    """From scales of groups to hi, r and shift of columns, the affine step in them where it can be.

    `along` has room for four numbers for each column: the last tells whether it is out of range:
    so is a product of rstd and weight that a float32 cannot hold, too. Returns whether any is.
    """
    k = q.neighbours
    groups = width // k
    hi = along
    r = hi + 8 * width
    shift = r + 8 * width
    out_of_range = shift + 8 * width
    folded = q.foldable != 0 and not is_double(kind)
    own = k if q.shared else 1  # columns with one weight
    weight = 0
    bias = 0
    if folded and q.weight.data != 0:
        weight = at(q.weight, a, b) + c // own * q.weight.c
    if folded and q.bias.data != 0:
        bias = at(q.bias, a, b) + c // own * q.bias.c
    any_out_of_range = False
    for g in range(groups):
        mean = read(scale, g, np.float64)
        rstd = read(scale, 2 * groups + g, np.float64)
        lo = (mean - np.float64(real(mean, kind))) + read(scale, groups + g, np.float64)
        for j in range(g * k, g * k + k):
            i = j // own
            w = np.float64(read_real(weight + i * q.weight.c, 0, kind)) if weight != 0 else 1.0
            v = np.float64(read_real(bias + i * q.bias.c, 0, kind)) if bias != 0 else 0.0
            write(hi, j, real(mean, kind))
            write(r, j, real(rstd * w, kind))
            write(shift, j, real(v - lo * (rstd * w), kind))
            apart = read(scale, 4 * groups + g, np.float64) != 0.0 or (
                folded and not scalar.holds(rstd * w)
            )
            write(out_of_range, j, 1.0 if apart else 0.0)
            any_out_of_range = any_out_of_range or apart
    return any_out_of_range


@inner
def shared_row(q, o, place, row, kind):
    """A row of weights of which each group of neighbours shares one; 0 where there are none."""
    a, b, c, width = place
    if o.data == 0:
        return 0
    k = q.neighbours
    own = at(o, a, b) + c // k * o.c
    for g in range(width // k):
        for j in range(g * k, g * k + k):
            write(row, j, read_real(own, 0, kind))
        own += o.c
    return row


@inner
def column_of_row(x, i, along, width, kind):
    """One element of a row, with the scale of its column."""
    hi, r = read_real(along, i, kind), read_real(along + 8 * width, i, kind)
    return scalar.apply(load(x, i, kind), hi, r, read_real(along + 16 * width, i, kind))


@inner
def apply_row(x, y, along, width, affine, kinds):
    """A row is applied, with one scale for each column."""
    weight, bias, wv, bv = affine
    kind, to = kinds
    n = width
    if weight == 0 and bias == 0:
        for i in range(n):
            store(y, i, column_of_row(x, i, along, width, kind), to)
        return
    w = read_real(weight, 0, kind) if weight != 0 else real(1.0, kind)
    b = read_real(bias, 0, kind) if bias != 0 else real(0.0, kind)
    if wv and bv:
        for i in range(n):
            v = column_of_row(x, i, along, width, kind)
            store(y, i, scalar.fma(v, read_real(weight, i, kind), read_real(bias, i, kind)), to)
    elif wv:
        for i in range(n):
            v = column_of_row(x, i, along, width, kind)
            store(y, i, scalar.fma(v, read_real(weight, i, kind), b), to)
    elif bv:
        for i in range(n):
            v = column_of_row(x, i, along, width, kind)
            store(y, i, scalar.fma(v, w, read_real(bias, i, kind)), to)
    else:
        for i in range(n):
            store(y, i, scalar.fma(column_of_row(x, i, along, width, kind), w, b), to)


@inner
def row_folded(q, x, y, e, along, width, past, kind):
    """A row of floats is applied, the affine step in the scale, with residual and activation."""
    size = size_of(kind)
    n = width * size // 64 * 64
    scale = along, along + 8 * width, along + 16 * width
    none = None, None
    if past:
        if e != 0 and q.relu:
            apply_lines(x, y, n, scale, none, e, (1, PREFETCH_BYTES, 1))
        elif e != 0:
            apply_lines(x, y, n, scale, none, e, (None, PREFETCH_BYTES, 1))
        elif q.relu:
            apply_lines(x, y, n, scale, none, None, (1, PREFETCH_BYTES, 1))
        else:
            apply_lines(x, y, n, scale, none, None, (None, PREFETCH_BYTES, 1))
        return
    if e != 0 and q.relu:
        apply_lines(x, y, n, scale, none, e, (1, None, None))
    elif e != 0:
        apply_lines(x, y, n, scale, none, e, (None, None, None))
    elif q.relu:
        apply_lines(x, y, n, scale, none, None, (1, None, None))
    else:
        apply_lines(x, y, n, scale, none, None, (None, None, None))
    for i in range(n // size, width):
        t = column_of_row(x, i, along, width, kind)
        if e != 0:
            t = real(t + load(e, i, kind), kind)
        if q.relu:
            t = real(scalar.relu(t), kind)
        store(y, i, t, kind)


@merged
def apply_columns(q, place, split, scale, along, any_out_of_range, room, kinds):
    """A split of each group of an item is applied; `room` is a tile and a spare."""
    a, b, c, width = place
    tile, spare = room
    kind = kinds[0]
    k = q.neighbours
    groups = width // k
    source = q.total if q.total.data != 0 else q.x
    span = max(q.block, SPLIT_ROWS - SPLIT_ROWS % q.block)
    first = split * span
    last = min(first + span, q.length)
    affined = (q.foldable == 0 or is_double(kind)) and not q.activation_first
    wv = 1 if q.weight.c != 0 else 0
    bv = 1 if q.bias.c != 0 else 0
    number = 8 if is_double(kind) else 4  # bytes of one that is computed in
    folded = q.foldable != 0 and size_of(kind) == 4 and not any_out_of_range
    folded = folded and (q.activation == 0 or q.relu != 0)
    shared_weight = shared_bias = 0
    if q.shared:
        shared_weight = shared_row(q, q.weight, place, along + 32 * width, kind)
        shared_bias = shared_row(q, q.bias, place, along + 40 * width, kind)
    p = first // q.s
    t = first - p * q.s
    for _ in range(first, last):
        if t == q.s:
            p, t = p + 1, 0
        x = at(source, a, b) + c * source.c + p * source.p + t * source.s
        y = at(q.y, a, b) + c * q.y.c + p * q.y.p + t * q.y.s
        weight = shared_weight
        bias = shared_bias
        if q.weight.data != 0 and not q.shared:
            weight = at(q.weight, a, b) + c * q.weight.c + p * q.weight.p + t * q.weight.s
        if q.bias.data != 0 and not q.shared:
            bias = at(q.bias, a, b) + c * q.bias.c + p * q.bias.p + t * q.bias.s
        w = weight if affined else 0
        v = bias if affined else 0
        # numbers that the statistics are not of may leave the range, and come back by their weight
        far = w != 0 and (q.mask.data != 0 or (q.given != 0 and q.foldable == 0))
        if q.plain and not any_out_of_range and not far:
            apply_row(x, y, along, width, (w, v, wv, bv), (kind, kind))
            t += 1
            continue
        residual = 0
        if q.residual.data != 0:
            residual = at(q.residual, a, b) + c * q.residual.c + p * q.residual.p + t * q.residual.s
        t += 1
        if folded and (q.non_temporal == 0 or (y | (width * size_of(kind))) % 64 == 0):
            row_folded(q, x, y, residual, along, width, q.non_temporal != 0, kind)
            continue
        # what is out of range is read once more, and may lie where y does
        direct = q.direct and not any_out_of_range and not far
        target = y if direct else tile
        apply_row(x, target, along, width, (w, v, wv, bv), kinds)
        if any_out_of_range or far:
            w = 0 if q.activation_first else weight
            v = 0 if q.activation_first else bias
            for j in range(width):
                s = scale + 8 * (j // k)
                hi, r = read_real(along, j, kind), read_real(along + 8 * width, j, kind)
                if (any_out_of_range and read(along + 24 * width, j, np.float64) != 0.0) or (
                    far
                    and (
                        not math.isfinite(read_real(target, j, kind))
                        or is_tiny(load(x, j, kind), hi, r, kind)
                    )
                ):
                    apply_out_of_range(
                        x + j * source.c,
                        target + j * number,
                        1,
                        (
                            read(s, 0, np.float64),
                            read(s, groups, np.float64),
                            read(s, 2 * groups, np.float64),
                            read(s, 3 * groups, np.float64),
                        ),
                        (
                            0 if w == 0 else w + j * wv * number,
                            0 if v == 0 else v + j * bv * number,
                            0,
                            0,
                        ),
                        kinds,
                    )
        if q.residual.data != 0:
            add(target, residual, width, q.residual_real != 0, kind)
        if q.activation != 0:
            activate(q, target, width)
        if q.activation_first:
            affine(target, weight, bias, wv, bv, width, kind)
        if not direct:
            deliver(tile, spare, y, width, q.non_temporal != 0, kind)
