"""Groups that are one row each with weights at most, from their sums to their output."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.apply import apply_affine, apply_plain, convert, store_non_temporal
from fastnorm._numba.blocking import RSTD, at
from fastnorm._numba.lanes import apply_lines
from fastnorm._numba.memory import inner, is_double, load, read_real, real, size_of, store, write
from fastnorm._numba.moments import double_moments, fetch_ahead, squares, sums, sums_about
from fastnorm._numba.runs import apply_runs
from fastnorm._numba.scales import finalize, loses_digits, rstd_of
from fastnorm.schedule import APPLY_ELEMENTS, NON_TEMPORAL_TILE, SHORT_ROW


@inner
def apply_row_alone(q, x, y, n, scale, parameters, tile, kinds):
    """A row is applied, whose scale has the affine step in it where it can be."""
    hi, r, shift = scale
    weight, bias = parameters
    kind, tiled = kinds
    folded = q.foldable != 0 and not is_double(kind)
    wv = 1 if q.foldable == 0 else 0
    bv = 1 if wv and bias != 0 else 0
    if q.plain:
        if folded:
            apply_plain(x, y, n, hi, r, shift, kind, kind)
        else:
            apply_affine(x, y, n, scale, (weight, bias, wv, bv), (kind, kind))
        return
    size = size_of(kind)
    i = 0
    while i < n:
        m = min((-(y + size * i)) % 64 // size, n - i)
        lines = q.non_temporal != 0 and m == 0 and n - i >= 64 // size
        if lines:
            m = (n - i) // (64 // size) * (64 // size)
        elif m == 0 or not q.non_temporal:
            m = min(n - i, APPLY_ELEMENTS)
        at_x, at_y = x + size * i, y + size * i
        w = weight + q.weight.s * i if weight != 0 else 0
        b = bias + q.bias.s * i if bias != 0 else 0
        zero = real(0.0, kind)
        if lines:
            if folded:
                apply_lines(at_x, at_y, size * m, scale, (None, None), None, (None, None, 1))
            elif bv:
                apply_lines(at_x, at_y, size * m, scale, (w, b), None, (None, None, 1))
            elif wv:
                apply_lines(at_x, at_y, size * m, scale, (w, zero), None, (None, None, 1))
            else:
                one = read_real(w, 0, kind) if w != 0 else real(1.0, kind)
                other = read_real(b, 0, kind) if b != 0 else zero
                apply_lines(at_x, at_y, size * m, scale, (one, other), None, (None, None, 1))
        else:
            # through a tile where x and y are one array
            if folded:
                apply_plain(at_x, tile, m, hi, r, shift, kind, tiled)
            else:
                apply_affine(at_x, tile, m, scale, (w, b, wv, bv), kinds)
            convert(tile, at_y, m, kind)
        i += m


@inner
def lined_up(w, y, n, room, kind):
    """A copy of w as far from the beginning of a line as y: a load that crosses one takes two."""
    if w == 0:
        return w
    copy = room + (y - room) % 64
    for i in range(n):
        write(copy, i, read_real(w, i, kind))
    return copy


@inner
def sum_of_row(q, a, b, i, n, tile, kind):
    """x + addend of row i, where they lie when their moments are taken."""
    x, e, to = at(q.x, a, b), at(q.addend, a, b), at(q.total, a, b)
    t = tile + (i & 1) * n * size_of(kind) if q.non_temporal else to
    f = 0
    while f < n:
        m = min(n - f, NON_TEMPORAL_TILE)
        skipped = f * size_of(kind)
        at_x, at_e, at_t = x + skipped, e + skipped, t + skipped
        fetch_ahead(at_x, m * size_of(kind))
        fetch_ahead(at_e, m * size_of(kind))
        for j in range(m):
            store(at_t, j, real(load(at_x, j, kind) + load(at_e, j, kind), kind), kind)
        f += m
    if q.non_temporal:
        store_non_temporal(to, t, n * size_of(kind))
    return t


@inner
def rows(q, first, last, room, kinds):
    """Groups [first, last) that are rows with weights at most, one after the other.

    Short ones are applied after the sums of the next, which hide how long a quotient and a root
    take; of long ones the cache would have lost the beginning by then.
    """
    whole, own, work, tile, spare, kept = room
    kind, tiled = kinds
    n = q.length
    count = np.float64(n)
    late = n < SHORT_ROW and not is_double(kind)
    weight, bias = q.weight.data, q.bias.data
    # one number for each row, or other numbers along each
    each = q.foldable or (q.weight.a | q.weight.b | q.bias.a | q.bias.b) != 0
    if not each and last - first >= 8:
        y = at(q.y, first // q.b, first % q.b)
        weight = lined_up(weight, y, n, kept, kind)
        bias = lined_up(bias, y, n, kept + n * size_of(tiled) + 64, kind)
    hi = r = shift = real(0.0, kind)
    before = before_y = np.int64(0)
    before_w, before_v = weight, bias
    for i in range(first, last):
        a = i // q.b
        b = i - a * q.b
        x = at(q.x, a, b)
        y = at(q.y, a, b)
        w, v = weight, bias
        if each:
            w = at(q.weight, a, b) if weight != 0 else 0
            v = at(q.bias, a, b) if bias != 0 else 0
        if q.total.data != 0:
            x = sum_of_row(q, a, b, i, n, tile, kind)
        mean = rest = m2_rest = 0.0
        if is_double(kind):
            mean, rest, m2, m2_rest = double_moments(x, n, q.centred != 0, work)
        elif q.centred:
            mean, m2 = sums(x, n, kind)
        else:
            m2 = squares(x, n, kind)
        if late and before != 0:
            apply_row_alone(
                q, before, before_y, n, (hi, r, shift), (before_w, before_v), spare, kinds
            )
        if q.centred and not is_double(kind):
            mean, rest, m2, again = scalar.moments_of_sums(count, mean, m2, 0.0)
            if again and math.isfinite(mean):
                pivot = np.float64(np.float32(mean))
                one, two = sums_about(x, n, pivot, kind)
                mean, rest, m2, again = scalar.moments_of_sums(count, one, two, pivot)
        var, rstd = rstd_of(count, m2, m2_rest, q.eps, 1.0, kind)
        size = m2 if q.scaling != RSTD else m2 / count + q.eps
        if q.scaling != RSTD:
            rstd = scalar.inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
            if math.sqrt(m2) < q.eps:
                rstd = 1.0 / q.eps
        hi = real(mean, kind)
        lo = (mean - np.float64(hi)) + rest
        if is_double(kind):
            held = 1e-270 < size < 1e270
            rw, c = rstd, 0.0
        else:
            rw = rstd * np.float64(read_real(w, 0, kind)) if q.foldable and w != 0 else rstd
            c = np.float64(read_real(v, 0, kind)) if q.foldable and v != 0 else 0.0
            held = scalar.holds(rstd) and scalar.holds(rw)
            held = held and (rstd == 0.0 or abs(mean) < scalar.MOST)
            held = held and not loses_digits(q, var, rstd)
        if not held:
            # what its type cannot hold
            before = np.int64(0)
            if q.total.data != 0 and q.non_temporal:
                x = at(q.total, a, b)
            write(whole, 0, count)
            write(whole, 1, mean)
            write(whole, 2, rest)
            write(whole, 3, m2)
            write(whole, 4, m2_rest)
            finalize(q, a, b, np.int64(0), np.int64(1), whole, own, kind)
            apply_runs(q, (a, b, np.int64(1)), np.int64(0), own, (tile, spare), kinds)
            continue
        if q.mean.data != 0:
            write(at(q.mean, a, b), 0, mean)
            write(at(q.var, a, b), 0, var)
            write(at(q.rstd, a, b), 0, rstd)
        r = real(rw, kind)
        shift = real(c - lo * rw if q.foldable and not is_double(kind) else -lo * rw, kind)
        before, before_y, before_w, before_v = x, y, w, v
        if not late:
            apply_row_alone(q, x, y, n, (hi, r, shift), (w, v), spare, kinds)
    if late and before != 0:
        apply_row_alone(q, before, before_y, n, (hi, r, shift), (before_w, before_v), spare, kinds)
