"""The backward pass, on the same five dimensions as the forward one: a twin of _core's.

    xhat = (x - mean) rstd            g = dy weight
    dx = rstd (g - sum(g)/count - xhat sum(g xhat)/count)        sums over a group
    dweight = sum(dy xhat)            dbias = sum(dy)            sums over what shares a weight

Where a weight is one number for a run, or a column, its two sums are those of whole planes, or of
segments of columns: they are kept in `sums`, serve the group, and are added up for the weight when
all is done. Where the weight differs along a run (layer and RMS norm), each element is a *cell*:
the group's sums are taken first and the weight's are collected with dx, by `parts` of those that
share it, whose number depends on the shape alone.

What a float32 cannot hold is computed in float64: sums that leave its range on the way, and dx
of a group that is *out of range*: by its statistics, its sums or its weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cfunc
from numba.extending import register_jitable

from fastnorm._numba import scalar
from fastnorm._numba.apply import deliver, store_non_temporal
from fastnorm._numba.blocking import APPLY, FINALIZE, MOMENTS, WHOLE, at, record_of
from fastnorm._numba.extents import part_at
from fastnorm._numba.lanes import add_pairs_to_lanes, added_up, apply_back_rows
from fastnorm._numba.memory import (
    KERNEL,
    STRICT,
    fence,
    fetch,
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
    summing,
    take,
    write,
)
from fastnorm.schedule import (
    BACKWARD_CHUNK,
    BACKWARD_SHARED_RUNS,
    BACKWARD_SPAN,
    BACKWARD_SPAN_ROWS,
    PAIR_LANES,
    PREFETCH_BYTES,
    TILE_GROUPS,
)

# numbers that dx needs of a group: mean, rstd, c1, c2, and whether it is out of range
TERMS = 5

OPERANDS = ("x", "dy", "dx", "weight", "mean", "rstd")
NUMBERS = (
    "a", "b", "p", "s", "c", "neighbours", "centred", "training", "non_temporal", "direct",
    "own_a", "own_b", "along_p", "sharers", "parts", "segments", "chunks", "width", "items",
    "cells", "joined", "together", "sums", "terms", "collected",
)  # fmt: skip
BACK = record_of(OPERANDS, NUMBERS)


# --- The sums of a run ----------------------------------------------------------------------------


@inner
def centring(mean, rstd, kind):
    """hi, r and shift of xhat = (x - hi) r + shift, as numbers that are computed in."""
    hi = real(mean, kind)
    return hi, real(rstd, kind), real(-(mean - np.float64(hi)) * rstd, kind)


@inner
def xhat_of(x, i, hi, r, shift, kind):
    """One element, normalised, for a sum. The shift of doubles, which have no rest, is 0."""
    if is_double(kind):
        return (load(x, i, kind) - hi) * r
    return scalar.apply(load(x, i, kind), hi, r, shift)


@summing
def sums_out_of_range(x, dy, n, mean, weight, kind, stored):
    """Of dy weight and of dy weight (x - mean), where float32 cannot hold xhat."""
    first = 0.0
    second = 0.0
    for i in range(n):
        t = np.float64(load(dy, i, stored))
        if weight != 0:
            t *= np.float64(read_real(weight, i, kind))
        first += t
        second += t * deviation(load(x, i, kind), mean)
    return first, second


@inner
def deviation(x, mean):
    """x - mean, in float64."""
    return np.float64(x) - mean


@inner
def is_out_of_range(mean, rstd, kind):
    """Whether float32 cannot hold what a group is scaled by."""
    if is_double(kind) or rstd == 0.0:
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
    """Whether float32 could hold the terms of two sums.

    If not, a product, or a sum of four, has left its range, or was so small that digits were lost,
    or all of it.
    """
    a, b = abs(first), abs(second)
    return a > 2.0**-100 and b > 2.0**-100 and a + b < math.inf


@inner
def add_run(q, place, n, statistics, weight, in_double, lanes, kinds):
    """Add the two sums of n elements of a run to PAIR_LANES lanes each; no weight (0) is 1."""
    a, b, p, t = place
    mean, rstd = statistics
    kind, stored = kinds
    x = at(q.x, a, b) + p * q.x.p + t * q.x.s
    dy = at(q.dy, a, b) + p * q.dy.p + t * q.dy.s
    if in_double or is_out_of_range(mean, rstd, kind):
        one, two = sums_out_of_range(x, dy, n, mean, weight, kind, stored)
        write(lanes, 0, read(lanes, 0, np.float64) + one)
        write(lanes, PAIR_LANES, read(lanes, PAIR_LANES, np.float64) + two * rstd)
        return
    scale = centring(mean, rstd, kind)
    if weight == 0:
        add_pairs_to_lanes(x, dy, None, n, scale, lanes, kinds)
    else:
        add_pairs_to_lanes(x, dy, weight, n, scale, lanes, kinds)


@inner
def fetch_plane(operand, a, b, p, t, n, kind):
    """Ask for the same in a group's next plane: planes apart leave the prefetcher behind."""
    i = at(operand, a, b) + (p + 1) * operand.p + t * operand.s
    end = i + n * size_of(kind)
    while i < end:
        fetch(i)
        i += 64


@inner
def segment_at(q, segment):
    """Elements [first, last) of a group: within a plane where planes have weights of their own."""
    if q.joined:
        return segment * BACKWARD_SPAN, min((segment + 1) * BACKWARD_SPAN, q.p * q.s)
    of_plane = q.segments // q.p
    p = segment // of_plane
    first = p * q.s + (segment - p * of_plane) * BACKWARD_SPAN
    return first, min(first + BACKWARD_SPAN, (p + 1) * q.s)


@inner
def add_segment(q, place, segment, weighted, in_double, lanes, kinds):
    """Fill the lanes of each of `width` groups side by side with the two sums of a segment."""
    a, b, width = place
    kind, stored = kinds
    f, last = segment_at(q, segment)
    for j in range(2 * PAIR_LANES * width):
        write(lanes, j, 0.0)
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = min(last - f, q.s - t)
        for k in range(width):
            mean, rstd = read_group(q, a, b + k, np.int64(0))
            weight = 0
            if weighted and q.weight.data != 0:
                weight = at(q.weight, a, b + k) + p * q.weight.p + t * q.weight.s
            if width > 1 and q.p > 1:
                fetch_plane(q.x, a, b + k, p, t, n, kind)
                fetch_plane(q.dy, a, b + k, p, t, n, stored)
            own = lanes + 16 * PAIR_LANES * k
            add_run(q, (a, b + k, p, t), n, (mean, rstd), weight, in_double, own, kinds)
        f += n


@inner
def segment_sums(q, place, segment, weighted, lanes, kinds):
    """The two sums of a segment of `width` groups side by side, of g where it is `weighted`."""
    a, b, width = place
    add_segment(q, place, segment, weighted, np.bool_(False), lanes, kinds)
    for k in range(width):
        own = lanes + 16 * PAIR_LANES * k
        into = q.sums + 16 * ((a * q.b + b + k) * q.segments + segment)
        first, second = added_up(own), added_up(own + 8 * PAIR_LANES)
        if not is_double(kinds[0]) and not holds_terms(first, second):
            add_segment(q, (a, b + k, np.int64(1)), segment, weighted, np.bool_(True), own, kinds)
            first, second = added_up(own), added_up(own + 8 * PAIR_LANES)
        write(into, 0, first)
        write(into, 1, second)


@summing
def are_finite(v, n):
    """Whether n doubles at an address are."""
    nothing = 0.0
    for i in range(n):
        nothing += 0.0 * read(v, i, np.float64)
    return nothing == 0.0


@inner
def range_of_weights(q, a, b, kind):
    """The least magnitude but for 0 of the weights of a group that differ inside, and the greatest.

    By the bits of floats less their sign, which are in the same order: comparisons of whole numbers
    vectorise. Less 1 a zero is the largest.
    """
    least, most = np.uint32(0xFFFFFFFF), np.uint32(0)
    if not is_double(kind) and q.weight.data != 0:
        for p in range(q.p if q.weight.p != 0 else 1):
            weight = at(q.weight, a, b) + p * q.weight.p
            for i in range(q.s):
                size = np.uint32(read(weight, i, np.uint32) & np.uint32(0x7FFFFFFF))
                most = max(most, size)
                least = min(least, np.uint32(size - np.uint32(1)))
    lowest = np.uint32(least + np.uint32(1)).view(np.float32)
    return np.float64(lowest), np.float64(np.uint32(most).view(np.float32))


@inner
def group_terms(q, a, b, weights, kind):
    """What dx needs of a group, from the sums of its segments.

    `weights` are the range of those that differ inside, or None where each plane has one.
    """
    mean, rstd = read_group(q, a, b, np.int64(0))
    first = 0.0
    second = 0.0
    group = a * q.b + b
    out_of_range = is_out_of_range(mean, rstd, kind)
    for segment in range(q.segments):
        w = 1.0
        if weights is None and q.weight.data != 0:
            p = 0 if q.joined else segment // (q.segments // q.p)
            w = np.float64(read_real(at(q.weight, a, b) + p * q.weight.p, 0, kind))
            out_of_range = out_of_range or not scalar.holds(w * rstd)
        of = q.sums + 16 * (group * q.segments + segment)
        first += w * read(of, 0, np.float64)
        second += w * read(of, 1, np.float64)
    count = np.float64(q.p * q.s)
    c1 = rstd * (first / count) if q.training and q.centred else 0.0
    c2 = rstd * (second / count) if q.training else 0.0
    if weights is not None:
        for w in weights:
            out_of_range = out_of_range or not scalar.holds(w * rstd)
    out_of_range = (out_of_range or not holds_sums(c1, c2, count)) and not is_double(kind)
    into = q.terms + 8 * TERMS * group
    write(into, 0, mean)
    write(into, 1, rstd)
    write(into, 2, c1)
    write(into, 3, c2)
    write(into, 4, 1.0 if out_of_range else 0.0)


@inner
def read_group(q, a, b, offset):
    """Mean and rstd of a group."""
    mean = 0.0
    if q.mean.data != 0:
        mean = read(at(q.mean, a, b) + offset * q.mean.c, 0, np.float64)
    return mean, read(at(q.rstd, a, b) + offset * q.rstd.c, 0, np.float64)


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


# --- Columns --------------------------------------------------------------------------------------


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


# --- The kernels ----------------------------------------------------------------------------------


def compile_planes(kind: type, stored: type, computed: type, sources: int) -> Any:
    """The kernel of runs with one weight each, for x of a kind and dy of its own."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_planes(record, memory, turn, turns, task):
        if sources != 0:
            planes(record, memory, turn, turns, task, kind, stored)

    return kernel_of_planes


def compile_rows(kind: type, stored: type, computed: type, sources: int) -> Any:
    """The kernel of runs along which the weight differs, for x of a kind and dy of its own."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_rows(record, memory, turn, turns, task):
        if sources != 0:
            rows(record, memory, turn, turns, task, kind, stored)

    return kernel_of_rows


def compile_columns(kind: type, stored: type, computed: type, sources: int) -> Any:
    """The kernel of columns, for x of a kind and dy of its own."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_columns(record, memory, turn, turns, task):
        if sources != 0:
            columns(record, memory, turn, turns, task, kind, stored, computed)

    return kernel_of_columns
