"""Groups that are lists of runs, backward: a weight for each run, or weights along it."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.apply import store_non_temporal
from fastnorm._numba.back_sums import (
    BACK,
    TERMS,
    are_finite,
    centring,
    fetch_plane,
    group_terms,
    range_of_weights,
    segment_at,
    segment_sums,
)
from fastnorm._numba.blocking import FINALIZE, MOMENTS, WHOLE, at
from fastnorm._numba.extents import part_at
from fastnorm._numba.lanes import apply_back_rows
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
    size_of,
    store,
    take,
    write,
)
from fastnorm.schedule import (
    BACKWARD_CHUNK,
    BACKWARD_SHARED_RUNS,
    PAIR_LANES,
    PREFETCH_BYTES,
    TILE_GROUPS,
)

# --- Runs with one weight each --------------------------------------------------------------------


@inner
def scale_at(terms, kind):
    """hi, r, shift, c1 and c2 of a group whose terms are at an address."""
    hi, r, shift = centring(read(terms, 0, np.float64), read(terms, 1, np.float64), kind)
    c1, c2 = real(read(terms, 2, np.float64), kind), real(read(terms, 3, np.float64), kind)
    return hi, r, shift, c1, c2


@inner
def apply_out_of_range(x, dy, dx, n, terms, weight, along, kinds):
    """dx of n elements of a run in float64; no weight (0) is 1."""
    kind, stored = kinds
    mean = read(terms, 0, np.float64)
    rstd = read(terms, 1, np.float64)
    first = read(terms, 2, np.float64)
    second = read(terms, 3, np.float64)
    for i in range(n):
        xhat = (np.float64(load(x, i, kind)) - mean) * rstd
        w = np.float64(read_real(weight, i * along, kind)) if weight != 0 else 1.0
        v = rstd * (np.float64(load(dy, i, stored)) * w) - first - xhat * second
        store(dx, i, real(v, kind), kind)


@inner
def apply_run(x, dy, dx, n, terms, weight, ahead, kinds):
    """dx of n elements of a run that share a weight; asked for so many bytes ahead."""
    kind = kinds[0]
    if read(terms, 4, np.float64) != 0.0:
        apply_out_of_range(x, dy, dx, n, terms, weight, 0, kinds)
        return
    w = np.float64(read_real(weight, 0, kind)) if weight != 0 else 1.0
    wr = real(w * read(terms, 1, np.float64), kind)
    scales = (scale_at(terms, kind),)
    apply_back_rows((x, dy, dx), (0, 0, ahead), n, scales, wr, (None, None), kinds)


@inner
def apply_apart(dy, dx, n, terms, weight, along, kind, stored):
    """dx of n elements by given statistics, in which x, out of range or not, has no part.

    In float64, which holds any product of two floats: it is the same whatever weights others have.
    """
    rstd = read(terms, 1, np.float64)
    for i in range(n):
        w = np.float64(read_real(weight, i * along, kind)) if weight != 0 else 1.0
        store(dx, i, real(np.float64(load(dy, i, stored)) * (w * rstd), kind), kind)


@merged
def apply_segment(q, a, b, width, segment, tile, kind, stored):
    """dx of a segment of `width` groups side by side."""
    f, last = segment_at(q, segment)
    # where dx goes in one piece (group norm 8x256x32x32 860 to 740 us, one thread, out of L2)
    ahead = PREFETCH_BYTES if q.direct and (width == 1 or q.p == 1) else 0
    while f < last:
        p = f // q.s
        start = f - p * q.s
        end = min(q.s, start + last - f)
        for k in range(width):
            terms = q.terms + 8 * TERMS * (a * q.b + b + k)
            weight = at(q.weight, a, b + k) + p * q.weight.p if q.weight.data != 0 else 0
            if width > 1 and q.p > 1:
                fetch_plane(q.x, a, b + k, p, start, end - start, kind)
                fetch_plane(q.dy, a, b + k, p, start, end - start, stored)
                fetch_plane(q.dx, a, b + k, p, start, end - start, kind)
            t = start
            while t < end:
                n = end - t if q.direct else min(end - t, BACKWARD_CHUNK)
                x = at(q.x, a, b + k) + p * q.x.p + t * q.x.s
                dy = at(q.dy, a, b + k) + p * q.dy.p + t * q.dy.s
                dx = at(q.dx, a, b + k) + p * q.dx.p + t * q.dx.s
                to = dx if q.direct else tile
                if q.training:
                    apply_run(x, dy, to, n, terms, weight, ahead, (kind, stored))
                else:
                    apply_apart(dy, to, n, terms, weight, 0, kind, stored)
                if not q.direct:
                    store_non_temporal(dx, tile, n * size_of(kind))
                t += n
        f += end - start


# Numbers of each part of a thread's memory: a tile, and sums of groups side by side.
RUNS_PARTS = (BACKWARD_SHARED_RUNS * BACKWARD_CHUNK, 2 * PAIR_LANES * TILE_GROUPS)


@merged
def planes(record, memory, turn, turns, task, kind, stored):
    """What `task` asks for, of all items or planes of items; each turn is taken by one thread."""
    q = record_at(record, BACK)
    width = q.width
    tile, lanes = part_at(memory, RUNS_PARTS, 0), part_at(memory, RUNS_PARTS, 1)
    total = q.items if task == WHOLE or task == FINALIZE else q.items * q.segments
    while turn < turns:
        for i in range(total * turn // turns, total * (turn + 1) // turns):
            item = i if task == WHOLE or task == FINALIZE else i // q.segments
            a = item // q.chunks
            b = (item - a * q.chunks) * width
            n = min(width, q.b - b)
            first = 0 if task == WHOLE else i - item * q.segments
            last = q.segments if task == WHOLE else first + 1
            if task == WHOLE or task == MOMENTS:
                for segment in range(first, last):
                    segment_sums(q, (a, b, n), segment, False, lanes, (kind, stored))
            if task == WHOLE or task == FINALIZE:
                for k in range(n):
                    group_terms(q, a, b + k, None, kind)
            if task != MOMENTS and task != FINALIZE:
                for segment in range(first, last):
                    apply_segment(q, a, b, n, segment, tile, kind, stored)
        turn = take(record)
    if q.non_temporal:
        fence()


# --- Runs along which the weight differs ----------------------------------------------------------


@inner
def group_of(q, owner, sharer):
    """(a, b) of one of those that share the weights of an owner."""
    if q.own_a and q.own_b:
        a = owner // q.b
        return a, owner - a * q.b
    if q.own_a:
        return owner, sharer
    if q.own_b:
        return sharer, owner
    a = sharer // q.b
    return a, sharer - a * q.b


@inner
def collect_out_of_range(x, dy, n, terms, gw, gb, kind, stored):
    """Add what a run has for the gradients of its weights and biases, in float64."""
    mean = read(terms, 0, np.float64)
    rstd = read(terms, 1, np.float64)
    for i in range(n):
        t = np.float64(load(dy, i, stored))
        write(gb, i, read(gb, i, np.float64) + t)
        d = (np.float64(load(x, i, kind)) - mean) * rstd
        write(gw, i, scalar.mac(t, d, read(gw, i, np.float64)))


@inner
def apply_along(arrays, steps, n, terms, count, weight, sums, kinds):
    """dx of n elements of one run or four, and what they add to the gradients of their weights."""
    x, dy, dx = arrays
    gw, gb = sums
    kind, stored = kinds
    size = 8 * TERMS
    own = scale_at(terms, kind)
    if count == BACKWARD_SHARED_RUNS:
        second, third = scale_at(terms + size, kind), scale_at(terms + 2 * size, kind)
        scales = own, second, third, scale_at(terms + 3 * size, kind)
        if weight != 0:
            apply_back_rows(arrays, steps, n, scales, weight, sums, kinds)
        else:
            apply_back_rows(arrays, steps, n, scales, None, sums, kinds)
    elif read(terms, 4, np.float64) != 0.0:
        collect_out_of_range(x, dy, n, terms, gw, gb, kind, stored)
        apply_out_of_range(x, dy, dx, n, terms, weight, 1, kinds)
    elif weight != 0:
        apply_back_rows(arrays, steps, n, (own,), weight, sums, kinds)
    else:
        apply_back_rows(arrays, steps, n, (own,), None, sums, kinds)


@inner
def apply_sharers(q, sharers, p, t, n, sums, tile, kinds):
    """dx of n elements of a plane of sharers [first, last), and what these add to the gradients."""
    owner, first, last = sharers
    kind, stored = kinds
    size = 8 * TERMS
    i = first
    while i < last:
        a, b = group_of(q, owner, i)
        count = 1
        # four neighbours in b, or in a where b is the owners'
        neighbours = q.b - b if not q.own_b else q.a - a
        if q.own_b:
            neighbours = neighbours if q.b == 1 else 1  # their terms lie apart
        # with one of them out of range all four are taken alone; those after begin where they would
        left = min(last - i, q.together - (i - first) % q.together)
        if min(left, neighbours) == BACKWARD_SHARED_RUNS and not (q.own_a and q.own_b):
            count = BACKWARD_SHARED_RUNS
        terms = q.terms + size * (a * q.b + b)
        for k in range(count):
            if read(terms + k * size, 4, np.float64) != 0.0:
                count = 1
        x = at(q.x, a, b) + p * q.x.p + t * q.x.s
        dy = at(q.dy, a, b) + p * q.dy.p + t * q.dy.s
        dx = at(q.dx, a, b) + p * q.dx.p + t * q.dx.s
        steps = (q.x.a, q.dy.a, q.dx.a) if q.own_b else (q.x.b, q.dy.b, q.dx.b)
        weight = 0
        if q.weight.data != 0:
            weight = at(q.weight, a, b) + p * q.weight.p + t * q.weight.s
        row_bytes = n * size_of(kind)
        to, into = (dx, steps) if q.direct else (tile, (steps[0], steps[1], row_bytes))
        apply_along((x, dy, to), into, n, terms, count, weight, sums, kinds)
        for k in range(count):
            if not q.training:
                row = dy + k * steps[1]
                apply_apart(row, to + k * into[2], n, terms + k * size, weight, 1, kind, stored)
            if not q.direct:
                store_non_temporal(dx + k * steps[2], tile + k * row_bytes, row_bytes)
        i += count


@inner
def mend_cells(q, sharers, cell, n, sums, tile, kinds):
    """Those of n cells that are not finite once more in float64, of sharers [first, last).

    They are sums of products of floats, one of which may have left their range.
    """
    owner, first, last = sharers
    gw, gb = sums
    kind, stored = kinds
    if is_double(kind) or (are_finite(gw, n) and are_finite(gb, n)):
        return
    plane = cell // q.s
    t = cell - plane * q.s
    again = tile, tile + 8 * n
    for j in range(2 * n):
        write(tile, j, 0.0)
    for i in range(first, last):
        a, b = group_of(q, owner, i)
        terms = q.terms + 8 * TERMS * (a * q.b + b)
        for p in range(plane, plane + 1 if q.along_p else q.p):
            x = at(q.x, a, b) + p * q.x.p + t * q.x.s
            dy = at(q.dy, a, b) + p * q.dy.p + t * q.dy.s
            collect_out_of_range(x, dy, n, terms, again[0], again[1], kind, stored)
    for j in range(n):
        if not (math.isfinite(read(gw, j, np.float64)) and math.isfinite(read(gb, j, np.float64))):
            write(gw, j, read(again[0], j, np.float64))
            write(gb, j, read(again[1], j, np.float64))


@merged
def rows(record, memory, turn, turns, task, kind, stored):
    """What `task` asks for, of all parts of owners, segments of groups, or chunks of owners."""
    q = record_at(record, BACK)
    kinds = kind, stored
    tile, lanes = part_at(memory, RUNS_PARTS, 0), part_at(memory, RUNS_PARTS, 1)
    chunks = (q.s + BACKWARD_CHUNK - 1) // BACKWARD_CHUNK
    total = q.items * q.parts  # owners times parts
    if task == MOMENTS:
        total = q.a * q.b * q.segments
    elif task == FINALIZE:
        total = q.items
    elif task != WHOLE:
        total = q.items * (q.p if q.along_p else 1) * chunks
    while turn < turns:
        for i in range(total * turn // turns, total * (turn + 1) // turns):
            if task == MOMENTS:
                group = i // q.segments
                place = group // q.b, group % q.b, np.int64(1)
                segment_sums(q, place, i - group * q.segments, True, lanes, kinds)
            elif task == FINALIZE:
                a, b = group_of(q, i, np.int64(0))
                weights = range_of_weights(q, a, b, kind)
                for j in range(q.sharers):
                    a, b = group_of(q, i, j)
                    group_terms(q, a, b, weights, kind)
            elif task == WHOLE:
                owner = i // q.parts
                a, b = group_of(q, owner, np.int64(0))
                weights = range_of_weights(q, a, b, kind)
                part = i - owner * q.parts
                gw = q.collected + 16 * q.cells * i
                gb = gw + 8 * q.cells
                for j in range(2 * q.cells):
                    write(gw, j, 0.0)
                begin = first = q.sharers * part // q.parts
                last = q.sharers * (part + 1) // q.parts
                while first < last:
                    end = min(first + q.together, last)
                    for j in range(first, end):
                        a, b = group_of(q, owner, j)
                        if q.training:
                            for segment in range(q.segments):
                                segment_sums(q, (a, b, np.int64(1)), segment, True, lanes, kinds)
                        group_terms(q, a, b, weights, kind)
                    for p in range(q.p):
                        cell = p * q.s if q.along_p else 0
                        t = 0
                        while t < q.s:
                            n = min(BACKWARD_CHUNK, q.s - t)
                            into = gw + 8 * (cell + t), gb + 8 * (cell + t)
                            apply_sharers(
                                q, (owner, first, end), p, np.int64(t), n, into, tile, kinds
                            )
                            t += BACKWARD_CHUNK
                    first = end
                for cell in range(0, q.cells, q.s):
                    for t in range(0, q.s, BACKWARD_CHUNK):
                        n = min(BACKWARD_CHUNK, q.s - t)
                        into = gw + 8 * (cell + t), gb + 8 * (cell + t)
                        mend_cells(q, (owner, begin, last), cell + t, n, into, tile, kinds)
            else:
                plane = i // chunks
                t = (i - plane * chunks) * BACKWARD_CHUNK
                n = min(BACKWARD_CHUNK, q.s - t)
                owner = plane // q.p if q.along_p else plane
                cell = (plane - owner * q.p) * q.s + t if q.along_p else t
                gw = q.collected + 16 * q.cells * owner + 8 * cell
                gb = gw + 8 * q.cells
                for j in range(n):
                    write(gw, j, 0.0)
                    write(gb, j, 0.0)
                first = plane - owner * q.p if q.along_p else 0
                begin = np.int64(0)
                while begin < q.sharers:  # in the order in which one thread adds them up
                    end = min(begin + q.together, q.sharers)
                    for p in range(first, first + 1 if q.along_p else q.p):
                        apply_sharers(q, (owner, begin, end), p, t, n, (gw, gb), tile, kinds)
                    begin = end
                mend_cells(q, (owner, np.int64(0), q.sharers), cell, n, (gw, gb), tile, kinds)
        turn = take(record)
    if q.non_temporal:
        fence()
