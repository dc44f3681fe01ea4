"""The backward pass over contiguous runs: a group is p runs of s elements.

Where a weight is one number for a run its two sums are those of whole runs: they are kept, serve
the group, and are added up for the weight when all is done (`planes`). Where it differs along a run
(layer and RMS norm) each element is a cell: the group's sums are taken first and the weights' are
collected with dx, by parts of those that share them, whose number depends on the shape alone
(`rows`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from fastnorm._numba import backward_loops as loops
from fastnorm._numba.backward_loops import APPLY, DX, DY, MEAN, MOMENTS, RSTD, WEIGHT, WHOLE, X
from fastnorm._numba.compiling import CHECKED, KERNEL, inner
from fastnorm._numba.elements import real
from fastnorm.schedule import BACKWARD_CHUNK, BACKWARD_SPAN

# Places of whole numbers.
A, B, P, S, CENTRED, TRAINING, SEGMENTS, OF_PLANE, OWN_A, OWN_B, OWN_P, SHARERS, PARTS = range(13)


@inner
def at(steps, operand, a, b, p, s):
    """Where an operand has element (a, b, p, s)."""
    first = a * steps[operand, 0] + b * steps[operand, 1]
    return first + p * steps[operand, 2] + s * steps[operand, 3] + steps[operand, 5]


@inner
def elements_of(segment, numbers):
    """Elements [first, last) of a group: within a plane where planes have weights of their own."""
    s, of_plane = numbers[S], numbers[OF_PLANE]
    if of_plane == 0:
        first = segment * BACKWARD_SPAN
        return first, min(first + BACKWARD_SPAN, numbers[P] * s)
    p = segment // of_plane
    first = p * s + (segment - p * of_plane) * BACKWARD_SPAN
    return first, min(first + BACKWARD_SPAN, (p + 1) * s)


# --- Runs with one weight each --------------------------------------------------------------------


@inner
def plane_terms(group, sums, weight, first_weight, steps, numbers, rstd):
    """c1 and c2 of a group, from the sums of its segments."""
    first = second = 0.0
    of_plane = numbers[OF_PLANE]
    for segment in range(numbers[SEGMENTS]):
        p = segment // of_plane if of_plane else 0
        w = np.float64(weight[first_weight + p * steps[WEIGHT, 2]])
        first += w * sums[group, segment, 0]
        second += w * sums[group, segment, 1]
    count = np.float64(numbers[P] * numbers[S])
    return rstd * (first / count) if numbers[CENTRED] else 0.0, rstd * (second / count)


@inner
def planes(first, last, task, steps, numbers, arrays):
    """Sums and dx (or one of them) of groups, or of segments of groups where it is one of them."""
    x, dy, dx, weight, means, rstds, sums, _ = arrays
    s, segments, training = numbers[S], numbers[SEGMENTS], numbers[TRAINING] != 0
    for i in range(first, last):
        group, begin, end = i, 0, segments
        if task != WHOLE:
            group, begin = i // segments, i % segments
            end = begin + 1
        a, b = group // numbers[B], group % numbers[B]
        mean, rstd = means[at(steps, MEAN, a, b, 0, 0)], rstds[at(steps, RSTD, a, b, 0, 0)]
        centre, out = loops.centring(mean, rstd, x), loops.is_out_of_range(mean, rstd, x)
        if task != APPLY:
            for segment in range(begin, end):
                one = two = 0.0
                j, stop = elements_of(segment, numbers)
                while j < stop:
                    p, t = j // s, j % s
                    n = min(stop - j, s - t)
                    q, r = at(steps, X, a, b, p, t), at(steps, DY, a, b, p, t)
                    if CHECKED:
                        loops.check(arrays, (q, r, 0), n)
                    if out:
                        both = loops.sums_out_of_range(
                            x[q : q + n], dy[r : r + n], weight[:0], mean, rstd
                        )
                    else:
                        both = loops.sums_of_pairs(x[q : q + n], dy[r : r + n], centre)
                    one += both[0]
                    two += both[1]
                    j += n
                sums[group, segment, 0], sums[group, segment, 1] = one, two
        if task != MOMENTS:
            w0 = at(steps, WEIGHT, a, b, 0, 0)
            c1 = c2 = 0.0
            if training:
                c1, c2 = plane_terms(group, sums, weight, w0, steps, numbers, rstd)
            for segment in range(begin, end):
                j, stop = elements_of(segment, numbers)
                while j < stop:
                    p, t = j // s, j % s
                    n = min(stop - j, s - t)
                    q, r = at(steps, X, a, b, p, t), at(steps, DY, a, b, p, t)
                    u, w = at(steps, DX, a, b, p, t), w0 + p * steps[WEIGHT, 2]
                    if CHECKED:
                        loops.check(arrays, (q, r, u), n)
                    to, own = dx[u : u + n], weight[w : w + 1]
                    if not training:
                        loops.apply_given(dy[r : r + n], to, own, rstd, out)
                    elif out:
                        group_of = mean, rstd, c1, c2
                        loops.apply_out_of_range(x[q : q + n], dy[r : r + n], to, own, group_of)
                    else:
                        wr = real(np.float64(weight[w]) * rstd, x)
                        scale = wr, real(c1, x), real(c2, x)
                        loops.apply_run(x[q : q + n], dy[r : r + n], to, centre, scale)
                    j += n


# --- Runs along which the weight differs ----------------------------------------------------------


@inner
def group_of(owner, sharer, numbers):
    """(a, b) of one of those that share the weights of an owner."""
    b = numbers[B]
    if numbers[OWN_A] and numbers[OWN_B]:
        return owner // b, owner % b
    if numbers[OWN_A]:
        return owner, sharer
    if numbers[OWN_B]:
        return sharer, owner
    return sharer // b, sharer % b


@inner
def row_sums(group, segment, steps, numbers, arrays):
    """The sums of g and g xhat over a segment of a group, along which the weight differs."""
    x, dy, _, weight, means, rstds, sums, _ = arrays
    a, b, s = group // numbers[B], group % numbers[B], numbers[S]
    mean, rstd = means[at(steps, MEAN, a, b, 0, 0)], rstds[at(steps, RSTD, a, b, 0, 0)]
    centre, out = loops.centring(mean, rstd, x), loops.is_out_of_range(mean, rstd, x)
    one = two = 0.0
    j, stop = elements_of(segment, numbers)
    while j < stop:
        p, t = j // s, j % s
        n = min(stop - j, s - t)
        q, r = at(steps, X, a, b, p, t), at(steps, DY, a, b, p, t)
        w = at(steps, WEIGHT, a, b, p, t)
        if CHECKED:
            loops.check(arrays, (q, r, 0), n)
        if out:
            both = loops.sums_out_of_range(
                x[q : q + n], dy[r : r + n], weight[w : w + n], mean, rstd
            )
        else:
            both = loops.sums_of_weighted(x[q : q + n], dy[r : r + n], weight[w : w + n], centre)
        one += both[0]
        two += both[1]
        j += n
    sums[group, segment, 0], sums[group, segment, 1] = one, two


@inner
def row_terms(group, sums, numbers, rstd):
    """c1 and c2 of a group, from the sums of its segments."""
    first = second = 0.0
    if numbers[TRAINING]:
        for segment in range(numbers[SEGMENTS]):
            first += sums[group, segment, 0]
            second += sums[group, segment, 1]
    count = np.float64(numbers[P] * numbers[S])
    return rstd * (first / count) if numbers[CENTRED] else 0.0, rstd * (second / count)


@inner
def apply_row(group, cells, gradients, steps, numbers, arrays):
    """dx of n elements of a plane of a group, and what they add to the gradients of weights."""
    x, dy, dx, weight, means, rstds, sums, _ = arrays
    p, t, n = cells
    a, b = group // numbers[B], group % numbers[B]
    mean, rstd = means[at(steps, MEAN, a, b, 0, 0)], rstds[at(steps, RSTD, a, b, 0, 0)]
    c1, c2 = row_terms(group, sums, numbers, rstd)
    q, r = at(steps, X, a, b, p, t), at(steps, DY, a, b, p, t)
    u, w = at(steps, DX, a, b, p, t), at(steps, WEIGHT, a, b, p, t)
    if CHECKED:
        loops.check(arrays, (q, r, u), n)
    own, to = weight[w : w + n], dx[u : u + n]
    out = loops.is_out_of_range(mean, rstd, x)
    if out:
        loops.collect_out_of_range(x[q : q + n], dy[r : r + n], gradients, mean, rstd)
        scales = mean, rstd, c1, c2
        loops.apply_out_of_range(x[q : q + n], dy[r : r + n], to, own, scales)
    else:
        scale = loops.centring(mean, rstd, x), real(c1, x), real(c2, x)
        loops.collect_run(x[q : q + n], dy[r : r + n], to, own, gradients, scale)
    if not numbers[TRAINING]:
        loops.apply_given(dy[r : r + n], to, own, rstd, out)


@inner
def rows(first, last, task, steps, numbers, arrays):
    """All of parts of owners; or the sums of segments of groups; or dx of chunks of owners."""
    p, s, segments, sharers = numbers[P], numbers[S], numbers[SEGMENTS], numbers[SHARERS]
    chunks, parts = (s + BACKWARD_CHUNK - 1) // BACKWARD_CHUNK, numbers[PARTS]
    for i in range(first, last):
        if task == MOMENTS:
            row_sums(i // segments, i % segments, steps, numbers, arrays)
            continue
        # planes [p0, p1) and chunks [t0, t1) of sharers [begin, end)
        owner, part = i // parts, i % parts
        begin, end = sharers * part // parts, sharers * (part + 1) // parts
        p0, p1, t0, t1 = 0, p, 0, chunks
        if task == APPLY:
            owner, t0 = i // chunks, i % chunks
            t1, part, begin, end = t0 + 1, 0, 0, sharers
            if numbers[OWN_P]:
                owner, p0 = owner // p, owner % p
                p1 = p0 + 1
        kept = arrays[loops.COLLECTED][owner * parts + part]
        for k in range(p0, p1 if numbers[OWN_P] else p0 + 1):
            first_cell, last_cell = k * s + t0 * BACKWARD_CHUNK, k * s + min(t1 * BACKWARD_CHUNK, s)
            kept[0, first_cell:last_cell] = 0.0
            kept[1, first_cell:last_cell] = 0.0
        for j in range(begin, end):
            a, b = group_of(owner, j, numbers)
            group = a * numbers[B] + b
            if task == WHOLE and numbers[TRAINING]:
                for segment in range(segments):
                    row_sums(group, segment, steps, numbers, arrays)
            for k in range(p0, p1):
                for t in range(t0 * BACKWARD_CHUNK, min(t1 * BACKWARD_CHUNK, s), BACKWARD_CHUNK):
                    n = min(BACKWARD_CHUNK, s - t)
                    cell = k * s + t if numbers[OWN_P] else t
                    into = kept[0, cell : cell + n], kept[1, cell : cell + n]
                    apply_row(group, (k, t, n), into, steps, numbers, arrays)


# --- The kernels ----------------------------------------------------------------------------------


def compile_planes(signature: Any, parallel: bool, sources: int) -> Any:
    """The kernel of runs with one weight each."""
    key = sources + parallel

    @njit(signature, parallel=parallel, cache=not CHECKED, **KERNEL)
    def kernel_of_planes(turns, items, task, steps, numbers, arrays):
        if key != 0:
            for i in prange(turns):
                first, last = items * i // turns, items * (i + 1) // turns
                planes(first, last, task, steps, numbers, arrays)

    return kernel_of_planes


def compile_rows(signature: Any, parallel: bool, sources: int) -> Any:
    """The kernel of runs along which the weight differs."""
    key = sources + parallel

    @njit(signature, parallel=parallel, cache=not CHECKED, **KERNEL)
    def kernel_of_rows(turns, items, task, steps, numbers, arrays):
        if key != 0:
            for i in prange(turns):
                first, last = items * i // turns, items * (i + 1) // turns
                rows(first, last, task, steps, numbers, arrays)

    return kernel_of_rows
