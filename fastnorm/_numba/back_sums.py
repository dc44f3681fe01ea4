"""What the backward pass is told, the sums of its runs, and what dx needs of a group."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.blocking import at, record_of
from fastnorm._numba.lanes import add_pairs_to_lanes, added_up
from fastnorm._numba.memory import (
    fetch,
    inner,
    is_double,
    load,
    read,
    read_real,
    real,
    size_of,
    summing,
    write,
)
from fastnorm.schedule import (
    BACKWARD_SPAN,
    PAIR_LANES,
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
