"""Groups that are lists of contiguous runs: their moments, and their output."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.apply import apply_plain, apply_run
from fastnorm._numba.blocking import at
from fastnorm._numba.memory import inner, is_double, load, read, read_real, real, store, write
from fastnorm._numba.moments import merge_into, moments, squares, sums, sums_about
from fastnorm.schedule import BLOCK, SPLIT_BLOCKS


@inner
def add_runs(q, a, b, first, last, kind):
    """x + addend, rounded to the kind of x: what the norm is of, and the second result."""
    f = first
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = min(last - f, q.s - t)
        x = at(q.x, a, b) + p * q.x.p + t * q.x.s
        addend = at(q.addend, a, b) + p * q.addend.p + t * q.addend.s
        total = at(q.total, a, b) + p * q.total.p + t * q.total.s
        if q.addend_real:
            for i in range(n):
                store(total, i, real(load(x, i, kind) + read_real(addend, i, kind), kind), kind)
        else:
            for i in range(n):
                store(total, i, real(load(x, i, kind) + load(addend, i, kind), kind), kind)
        f += n


@inner
def fetch_run(q, a, b, first, last, tile, kind):
    """Elements [first, last) of a group that are chosen, side by side in a tile: how many."""
    source = q.total if q.total.data != 0 else q.x
    k = 0
    f = first
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = min(last - f, q.s - t)
        x = at(source, a, b) + p * source.p + t * source.s
        if q.mask.data == 0:
            for i in range(n):
                write(tile, k + i, load(x, i, kind))
            k += n
        else:
            mask = at(q.mask, a, b) + p * q.mask.p + t * q.mask.s
            for i in range(n):
                if read(mask, i * q.mask.s, np.uint8):
                    write(tile, k, load(x, i, kind))
                    k += 1
        f += n
    return k


@inner
def sums_of_runs(q, a, b, width, first, last, into, kind):
    """Sums of x and of its square over elements [first, last) of `width` groups side by side."""
    source = q.total if q.total.data != 0 else q.x
    for k in range(2 * width):
        write(into, k, 0.0)
    f = first
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = last - f if q.whole_sums else min(last - f, q.s - t)
        for k in range(width):
            x = at(source, a, b + k) + p * source.p + t * source.s
            if q.centred:
                one, two = sums(x, n, kind)
                write(into, k, read(into, k, np.float64) + one)
            else:
                two = squares(x, n, kind)
            write(into, width + k, read(into, width + k, np.float64) + two)
        f += n


@inner
def runs_block(q, place, first, last, into, room, kinds):
    """Moments of elements [first, last) of each of `width` groups from (a, b) on."""
    a, b, width = place
    work, tile = room
    kind, tiled = kinds
    source = q.total if q.total.data != 0 else q.x
    if q.total.data != 0:
        for k in range(width):
            add_runs(q, a, b + k, first, last, kind)
    if is_double(kind) or q.mask.data != 0:
        for k in range(width):
            p = first // q.s
            t = first - p * q.s
            if q.mask.data == 0 and (last - first <= q.s - t or q.whole_sums):
                x = at(source, a, b + k) + p * source.p + t * source.s
                moments(
                    x, last - first, q.centred != 0, into + 8 * k, width, work + 16 * width, tiled
                )
            else:
                n = fetch_run(q, a, b + k, first, last, tile, kind)
                moments(tile, n, q.centred != 0, into + 8 * k, width, work + 16 * width, tiled)
        return
    sums_of_runs(q, a, b, width, first, last, work, kind)
    count = np.float64(last - first)
    for k in range(width):
        mean = rest = 0.0
        m2 = read(work, width + k, np.float64)
        if q.centred:
            mean, rest, m2, again = scalar.moments_of_sums(
                count, read(work, k, np.float64), m2, 0.0
            )
            if again and math.isfinite(mean):
                pivot = np.float64(np.float32(mean))
                one = two = 0.0
                f = first
                while f < last:
                    p = f // q.s
                    t = f - p * q.s
                    n = last - f if q.whole_sums else min(last - f, q.s - t)
                    x = at(source, a, b + k) + p * source.p + t * source.s
                    d, d2 = sums_about(x, n, pivot, kind)
                    one += d
                    two += d2
                    f += n
                mean, rest, m2, again = scalar.moments_of_sums(count, one, two, pivot)
        write(into, k, count)
        write(into, width + k, mean)
        write(into, 2 * width + k, rest)
        write(into, 3 * width + k, m2)
        write(into, 4 * width + k, 0.0)


@inner
def runs_moments(q, place, split, into, part, room, kinds):
    """Moments of a split of each of `width` groups: those of its blocks, merged in order."""
    width = place[2]
    first = split * BLOCK * SPLIT_BLOCKS
    last = min(first + BLOCK * SPLIT_BLOCKS, q.length)
    f = first
    while True:
        end = min(f + BLOCK, last)
        runs_block(q, place, f, end, into if f == first else part, room, kinds)
        if f > first:
            merge_into(into, part, width, width)
        f = end
        if f >= last:
            return


@inner
def apply_runs(q, place, split, scale, room, kinds):
    """A split of each of `width` groups is applied; `room` is a tile and a spare."""
    a, b, width = place
    kind = kinds[0]
    source = q.total if q.total.data != 0 else q.x
    f = split * BLOCK * SPLIT_BLOCKS
    last = min(f + BLOCK * SPLIT_BLOCKS, q.length)
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = min(last - f, q.s - t)
        if (
            q.weight.s == 0
            and q.bias.s == 0
            and q.weight.p == 0
            and q.bias.p == 0
            and q.whole_output
            and q.plain
        ):
            n = last - f
        for k in range(width):
            if q.plain and q.folded_groups and read(scale, 5 * width + k, np.float64) != 0.0:
                x = at(source, a, b + k) + p * source.p + t * source.s
                y = at(q.y, a, b + k) + p * q.y.p + t * q.y.s
                hi = real(read(scale, k, np.float64), kind)
                r = real(read(scale, 6 * width + k, np.float64), kind)
                shift = real(read(scale, 7 * width + k, np.float64), kind)
                apply_plain(x, y, n, hi, r, shift, kind, kind)
            else:
                apply_run(q, (a, b + k, p, t), n, scale + 8 * k, width, room, kinds)
        f += n
