"""Columns side by side, or neighbours that share a statistic, backward."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from fastnorm._numba import scalar
from fastnorm._numba.apply import deliver
from fastnorm._numba.back_sums import (
    BACK,
    deviation,
    holds_sums,
    holds_terms,
    is_out_of_range,
    read_group,
    xhat_of,
)
from fastnorm._numba.blocking import APPLY, FINALIZE, MOMENTS, WHOLE, at
from fastnorm._numba.extents import part_at
from fastnorm._numba.memory import (
    fence,
    inner,
    is_double,
    load,
    merged,
    read,
    read_real,
    real,
    record_at,
    store,
    take,
    write,
)
from fastnorm.schedule import (
    BACKWARD_SPAN_ROWS,
)


@merged
def columns_terms_at(q, a, b, c, width, into, kind):
    """mean, rstd, hi, r, shift of columns c, c + 1 ... as arrays, and whether out of range."""
    for j in range(width):
        mean, rstd = read_group(q, a, b, (c + j) // q.neighbours)
        write(into, j, mean)
        write(into, width + j, rstd)
        write(into + 16 * width, j, real(mean, kind))
        write(into + 24 * width, j, real(rstd, kind))
        write(into + 32 * width, j, real(-(mean - np.float64(real(mean, kind))) * rstd, kind))
        write(into + 88 * width, j, 1.0 if is_out_of_range(mean, rstd, kind) else 0.0)


@inner
def rows_pairs(x, dy, steps, n, width, into, sums, kinds):
    """Add dy and dy xhat over n rows to the sums of each column, four rows at a time."""
    x_step, dy_step = steps
    first, second = sums
    kind, stored = kinds
    hi = into + 16 * width
    r = into + 24 * width
    shift = into + 32 * width
    while n >= 4:
        x1, x2, x3 = x + x_step, x + 2 * x_step, x + 3 * x_step
        y1, y2, y3 = dy + dy_step, dy + 2 * dy_step, dy + 3 * dy_step
        for c in range(width):
            h, v, d = read_real(hi, c, kind), read_real(r, c, kind), read_real(shift, c, kind)
            t0, t1 = load(dy, c, stored), load(y1, c, stored)
            t2, t3 = load(y2, c, stored), load(y3, c, stored)
            d0, d1 = xhat_of(x, c, h, v, d, kind), xhat_of(x1, c, h, v, d, kind)
            d2, d3 = xhat_of(x2, c, h, v, d, kind), xhat_of(x3, c, h, v, d, kind)
            both = scalar.mac(t0, d0, t1 * d1) + scalar.mac(t2, d2, t3 * d3)
            write(first, c, read(first, c, np.float64) + np.float64((t0 + t1) + (t2 + t3)))
            write(second, c, read(second, c, np.float64) + np.float64(both))
        x += 4 * x_step
        dy += 4 * dy_step
        n -= 4
    while n > 0:
        for c in range(width):
            h, v, d = read_real(hi, c, kind), read_real(r, c, kind), read_real(shift, c, kind)
            t = load(dy, c, stored)
            write(first, c, read(first, c, np.float64) + np.float64(t))
            xhat = xhat_of(x, c, h, v, d, kind)
            if is_double(kind):
                total = scalar.mac(np.float64(t), np.float64(xhat), read(second, c, np.float64))
            else:
                total = read(second, c, np.float64) + np.float64(t * xhat)
            write(second, c, total)
        x += x_step
        dy += dy_step
        n -= 1


@inner
def columns_sums(q, place, segment, into, kinds):
    """Sums of a segment of rows, for each column, into `sums`."""
    a, b, c, width = place
    kind, stored = kinds
    first = q.sums + 16 * (((a * q.b + b) * q.segments + segment) * q.c + c)
    second = first + 8 * width
    for j in range(2 * width):
        write(first, j, 0.0)
    f = segment * BACKWARD_SPAN_ROWS
    last = min(f + BACKWARD_SPAN_ROWS, q.p * q.s)
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = min(last - f, q.s - t)
        x = at(q.x, a, b) + p * q.x.p + t * q.x.s + c * q.x.c
        dy = at(q.dy, a, b) + p * q.dy.p + t * q.dy.s + c * q.dy.c
        rows_pairs(x, dy, (q.x.s, q.dy.s), n, width, into, (first, second), kinds)
        f += n
    for j in range(width):
        held = holds_terms(read(first, j, np.float64), read(second, j, np.float64))
        if (not held and not is_double(kind)) or read(into + 88 * width, j, np.float64) != 0.0:
            mean, rstd = read(into, j, np.float64), read(into, width + j, np.float64)
            one = 0.0
            two = 0.0
            for i in range(segment * BACKWARD_SPAN_ROWS, last):
                p = i // q.s
                t = i - p * q.s
                x = at(q.x, a, b) + p * q.x.p + t * q.x.s + c * q.x.c
                dy = at(q.dy, a, b) + p * q.dy.p + t * q.dy.s + c * q.dy.c
                g = np.float64(load(dy, j, stored))
                one += g
                two = scalar.mac(g, deviation(load(x, j, kind), mean) * rstd, two)
            write(first, j, one)
            write(second, j, two)


@merged
def finalize_columns(q, a, b, c, width, into, kind):
    """From sums to wr, c1 and c2 of each column, in float64 and then rounded."""
    k = q.neighbours
    count = np.float64(q.p * q.s * k)
    for g in range(width // k):
        first = 0.0
        second = 0.0
        for j in range(g * k, g * k + k):
            w = 1.0
            if q.weight.data != 0:
                w = np.float64(read_real(at(q.weight, a, b) + (c + j) * q.weight.c, 0, kind))
            write(into + 40 * width, j, w * read(into, width + j, np.float64))
            if q.training:
                one = 0.0
                two = 0.0
                for segment in range(q.segments):
                    of = q.sums + 16 * (((a * q.b + b) * q.segments + segment) * q.c + c)
                    one += w * read(of, j, np.float64)
                    two += w * read(of, width + j, np.float64)
                first += one
                second += two
        for j in range(g * k, g * k + k):
            rstd = read(into, width + j, np.float64)
            write(into + 48 * width, j, rstd * (first / count) if q.centred else 0.0)
            write(into + 56 * width, j, rstd * (second / count))
    for j in range(width):
        wr, c1 = read(into + 40 * width, j, np.float64), read(into + 48 * width, j, np.float64)
        c2 = read(into + 56 * width, j, np.float64)
        if not is_double(kind) and not (scalar.holds(wr) and holds_sums(c1, c2, count)):
            write(into + 88 * width, j, 1.0)
        for field in range(3):
            v = read(into + (40 + 8 * field) * width, j, np.float64)
            write(into + (64 + 8 * field) * width, j, real(v, kind))


@inner
def apply_row(x, dy, dx, width, into, kind, stored, to):
    """dx of a row."""
    hi, r, shift = into + 16 * width, into + 24 * width, into + 32 * width
    wr, c1, c2 = into + 64 * width, into + 72 * width, into + 80 * width
    for j in range(width):
        v = scalar.apply_back(
            load(x, j, kind), load(dy, j, stored), read_real(hi, j, kind), read_real(r, j, kind),
            read_real(shift, j, kind), read_real(wr, j, kind), read_real(c1, j, kind),
            read_real(c2, j, kind),
        )  # fmt: skip
        store(dx, j, v, to)


@inner
def apply_row_apart(dy, dx, width, into, kind, stored, to):
    """dx of a row by given statistics, in which x, out of range or not, has no part."""
    for j in range(width):
        wr = read(into + 40 * width, j, np.float64)
        store(dx, j, real(np.float64(load(dy, j, stored)) * wr, kind), to)


@inner
def apply_columns(q, place, segment, into, room, kinds):
    """dx of a segment of rows; `room` is a tile and a spare."""
    a, b, c, width = place
    tile, spare = room
    kind, stored, computed = kinds
    any_out_of_range = False
    for j in range(width):
        any_out_of_range = any_out_of_range or read(into + 88 * width, j, np.float64) != 0.0
    last = min((segment + 1) * BACKWARD_SPAN_ROWS, q.p * q.s)
    for i in range(segment * BACKWARD_SPAN_ROWS, last):
        p = i // q.s
        t = i - p * q.s
        x = at(q.x, a, b) + p * q.x.p + t * q.x.s + c * q.x.c
        dy = at(q.dy, a, b) + p * q.dy.p + t * q.dy.s + c * q.dy.c
        dx = at(q.dx, a, b) + p * q.dx.p + t * q.dx.s + c * q.dx.c
        if q.direct and not any_out_of_range:
            if q.training:
                apply_row(x, dy, dx, width, into, kind, stored, kind)
            else:
                apply_row_apart(dy, dx, width, into, kind, stored, kind)
            continue
        if q.training:
            apply_row(x, dy, tile, width, into, kind, stored, computed)
        else:
            apply_row_apart(dy, tile, width, into, kind, stored, computed)
        if any_out_of_range:
            for j in range(width):
                if read(into + 88 * width, j, np.float64) != 0.0:
                    d = np.float64(load(x, j, kind)) - read(into, j, np.float64)
                    xhat = d * read(into, width + j, np.float64)
                    g = np.float64(load(dy, j, stored))
                    if q.training:  # as `apply_out_of_range`: of one element nothing is left
                        if q.weight.data != 0:
                            w = read_real(at(q.weight, a, b) + (c + j) * q.weight.c, 0, kind)
                            g *= np.float64(w)
                        v = read(into, width + j, np.float64) * g
                        v -= read(into + 48 * width, j, np.float64)
                        v -= xhat * read(into + 56 * width, j, np.float64)
                    else:
                        v = g * read(into + 40 * width, j, np.float64)
                    write(tile, j, real(v, kind))
        deliver(tile, spare, dx, width, q.non_temporal != 0, kind)


OF_COLUMN = 12  # numbers that dx needs of each column


@register_jitable
def columns_parts(width):
    """Numbers of each part of a thread's memory: what is known of the columns, tile, spare."""
    return OF_COLUMN * width, width, width


@merged
def columns(record, memory, turn, turns, task, kind, stored, computed):
    """What `task` asks for, of all items or segments of items; each turn is taken by one thread."""
    q = record_at(record, BACK)
    width = q.width
    room = columns_parts(width)
    own, tile = part_at(memory, room, 0), part_at(memory, room, 1)
    spare = part_at(memory, room, 2)
    total = q.items if task == WHOLE or task == FINALIZE else q.items * q.segments
    while turn < turns:
        for i in range(total * turn // turns, total * (turn + 1) // turns):
            item = i if task == WHOLE or task == FINALIZE else i // q.segments
            outer = item // q.chunks
            c = (item - outer * q.chunks) * width
            a = outer // q.b
            b = outer - a * q.b
            n = min(width, q.c - c)
            into = (
                own if task == WHOLE or task == MOMENTS else q.terms + 8 * OF_COLUMN * width * item
            )
            if task != APPLY:
                columns_terms_at(q, a, b, c, n, into, kind)
            first = 0 if task == WHOLE else i - item * q.segments
            last = q.segments if task == WHOLE else first + 1
            if task == WHOLE or task == MOMENTS:
                for segment in range(first, last):
                    columns_sums(q, (a, b, c, n), segment, into, (kind, stored))
            if task == WHOLE or task == FINALIZE:
                finalize_columns(q, a, b, c, n, into, kind)
            if task == WHOLE or task == APPLY:
                for segment in range(first, last):
                    kinds = kind, stored, computed
                    apply_columns(q, (a, b, c, n), segment, into, (tile, spare), kinds)
        turn = take(record)
    if q.non_temporal:
        fence()
