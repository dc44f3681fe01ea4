"""From x and a scale to y: affine step, residual, activation."""

from __future__ import annotations

import math

import numpy as np

from fastnorm._numba import scalar
from fastnorm._numba.blocking import at
from fastnorm._numba.lanes import apply_lines
from fastnorm._numba.memory import (
    call,
    inner,
    is_double,
    load,
    read,
    read_real,
    real,
    size_of,
    store,
    store_line,
    write,
)
from fastnorm.schedule import APPLY_ELEMENTS, NON_TEMPORAL_TILE, PREFETCH_BYTES, PREFETCH_WINDOW

# --- Residual and activation ----------------------------------------------------------------------


@inner
def add(t, residual, n, is_real, kind):
    """t += residual."""
    if is_real:
        for i in range(n):
            write(t, i, real(read_real(t, i, kind) + read_real(residual, i, kind), kind))
    else:
        for i in range(n):
            write(t, i, real(read_real(t, i, kind) + load(residual, i, kind), kind))


@inner
def activate(q, t, n):
    """The activation of a pass, in place; a user's own may raise, and who called is told so."""
    if call(q.activation, t, n) != 0:
        q.raised = 1


@inner
def affine(t, weight, bias, wv, bv, n, kind):
    """t = t weight + bias, of a norm that squashes first; addresses of 0 for what is not there."""
    for i in range(n):
        w = read_real(weight, i * wv, kind) if weight != 0 else real(1.0, kind)
        b = read_real(bias, i * bv, kind) if bias != 0 else real(0.0, kind)
        write(t, i, scalar.fma(read_real(t, i, kind), w, b))


@inner
def store_non_temporal(to, source, size):
    """Copy `size` bytes with non-temporal stores."""
    head = min((-to) % 64, size)
    i = 0
    while i < head:
        write(to, i, read(source, i, np.uint8))
        i += 1
    while i + 64 <= size:
        store_line(to + i, source + i)
        i += 64
    while i < size:
        write(to, i, read(source, i, np.uint8))
        i += 1


@inner
def convert(t, y, n, kind):
    """Round n numbers to their kind in memory."""
    for i in range(n):
        store(y, i, read_real(t, i, kind), kind)


@inner
def deliver(t, spare, y, n, past, kind):
    """n numbers of a tile to y; `spare` has room for them."""
    if not past:
        convert(t, y, n, kind)
    elif size_of(kind) == 2:
        convert(t, spare, n, kind)
        store_non_temporal(y, spare, 2 * n)
    else:
        store_non_temporal(y, t, size_of(kind) * n)


# --- Scale and affine step ------------------------------------------------------------------------


@inner
def apply_out_of_range(x, y, n, scale, affine, kinds):
    """What float32 cannot hold, in float64; `scale` is mean, rest, rstd and unit."""
    mean, rest, rstd, unit = scale
    weight, bias, wv, bv = affine
    kind, to = kinds
    for i in range(n):
        t = (np.float64(load(x, i, kind)) * unit - mean) - rest
        w = np.float64(read_real(weight, i * wv, kind)) if weight != 0 else 1.0
        b = np.float64(read_real(bias, i * bv, kind)) if bias != 0 else 0.0
        v = t * rstd * w if math.isfinite(t * rstd) else t * (rstd * w)
        store(y, i, real(v + b, kind), to)


@inner
def apply_plain(x, y, n, hi, r, shift, kind, to):
    """Apply a scale that has the affine step in it."""
    for i in range(n):
        store(y, i, scalar.apply(load(x, i, kind), hi, r, shift), to)


@inner
def apply_affine(x, y, n, scale, affine, kinds):
    """Apply a scale and then the affine step; addresses of 0 for what is not there.

    `scale` is hi, r and shift; `affine` the addresses of weight and bias, and how far apart their
    numbers are; `kinds` those of x and of y.
    """
    hi, r, shift = scale
    weight, bias, wv, bv = affine
    kind, to = kinds
    w = real(1.0, kind)
    b = real(0.0, kind)
    if weight != 0 and not wv:
        w = read_real(weight, 0, kind)
    if bias != 0 and not bv:
        b = read_real(bias, 0, kind)
    if wv and bv:
        for i in range(n):
            t = scalar.apply(load(x, i, kind), hi, r, shift)
            store(y, i, scalar.fma(t, read_real(weight, i, kind), read_real(bias, i, kind)), to)
    elif wv:
        for i in range(n):
            t = scalar.apply(load(x, i, kind), hi, r, shift)
            store(y, i, scalar.fma(t, read_real(weight, i, kind), b), to)
    elif bv:
        for i in range(n):
            t = scalar.apply(load(x, i, kind), hi, r, shift)
            store(y, i, scalar.fma(t, w, read_real(bias, i, kind)), to)
    else:
        for i in range(n):
            store(y, i, scalar.fma(scalar.apply(load(x, i, kind), hi, r, shift), w, b), to)


@inner
def is_tiny(x, hi, r, kind):
    """Whether (x - hi) r, below 2^-100, may have lost digits: doubles have no more to give."""
    d = real(x - hi, kind)
    return not is_double(kind) and d != 0.0 and abs(real(d * r, kind)) < np.float32(7.9e-31)


@inner
def apply_far(x, y, n, s, apart, affine, kinds):
    """`apply_affine` of numbers that the statistics are not of.

    A mask left them out, or they were given. A product that leaves the type's range may come back
    by its weight.
    """
    weight, bias, wv, bv = affine
    kind, to = kinds
    mean = read(s, 0, np.float64)
    rest = read(s, apart, np.float64)
    rstd = read(s, 2 * apart, np.float64)
    hi = real(mean, kind)
    r = real(rstd, kind)
    shift = real(-((mean - np.float64(hi)) + rest) * rstd, kind)
    for i in range(n):
        v = load(x, i, kind)
        w = read_real(weight, i * wv, kind)
        b = read_real(bias, i * bv, kind) if bias != 0 else real(0.0, kind)
        t = scalar.apply(v, hi, r, shift)
        if math.isfinite(t) and not is_tiny(v, hi, r, kind):
            store(y, i, scalar.fma(t, w, b), to)
        else:
            far = ((np.float64(v) - mean) - rest) * (rstd * np.float64(w)) + np.float64(b)
            store(y, i, real(far, kind), to)


@inner
def scale_of_run(s, apart, weight, bias, kind):
    """hi, r, shift of a run, the affine step in them, and whether a float32 can hold them."""
    mean = read(s, 0, np.float64)
    hi = real(mean, kind)
    if read(s, 5 * apart, np.float64) != 0.0:
        r = real(read(s, 6 * apart, np.float64), kind)
        return hi, r, real(read(s, 7 * apart, np.float64), kind), True
    lo = (mean - np.float64(hi)) + read(s, apart, np.float64)
    rw = read(s, 2 * apart, np.float64)
    b = 0.0
    if weight != 0:
        rw *= np.float64(read_real(weight, 0, kind))
    if bias != 0:
        b = np.float64(read_real(bias, 0, kind))
    holds = scalar.holds(rw) and read(s, 4 * apart, np.float64) == 0.0
    return hi, real(rw, kind), real(b - lo * rw, kind), holds


@inner
def apply_scale(x, y, n, s, apart, affine, foldable_far, kinds):
    """Apply the scale at `s`, its numbers `apart`, to a run; written as numbers of `to`.

    Whether the affine step may be in the scale, and whether the statistics may not be of these
    numbers, is in `foldable_far`.
    """
    weight, bias, _, _ = affine
    foldable, far = foldable_far
    kind, to = kinds
    out_of_range = read(s, 4 * apart, np.float64) != 0.0
    if foldable and not is_double(kind):
        hi, r, shift, holds = scale_of_run(s, apart, weight, bias, kind)
        if holds:
            apply_plain(x, y, n, hi, r, shift, kind, to)
            return
        out_of_range = True
    mean = read(s, 0, np.float64)
    rest = read(s, apart, np.float64)
    rstd = read(s, 2 * apart, np.float64)
    if out_of_range:
        unit = read(s, 3 * apart, np.float64)
        apply_out_of_range(x, y, n, (mean, rest, rstd, unit), affine, kinds)
        return
    if far and weight != 0:
        apply_far(x, y, n, s, apart, affine, kinds)
        return
    hi = real(mean, kind)
    lo = (mean - np.float64(hi)) + rest
    r = real(rstd, kind)
    apply_affine(x, y, n, (hi, r, real(-lo * rstd, kind)), affine, kinds)


@inner
def apply_with_residual(x, y, residual, n, hi, r, shift, kind):
    """Apply a scale to some floats and, unless it is None, add a residual."""
    for i in range(n):
        t = scalar.apply(load(x, i, kind), hi, r, shift)
        if residual is not None:
            t = real(t + load(residual, i, kind), kind)
        write(y, i, t)


@inner
def apply_non_temporal(q, arrays, n, scale, ahead, tile, kind):
    """Apply a scale, a residual and an activation to a run of floats, with non-temporal stores."""
    x, y, residual = arrays
    hi, r, shift = scale
    size = size_of(kind)
    in_lines = q.relu != 0 or q.activation == 0
    i = 0
    while i < n:
        m = min((-(y + size * i)) % 64 // size, n - i)
        lines = m == 0 and n - i >= 64 // size
        if lines:
            m = (
                (n - i if in_lines else min(n - i, NON_TEMPORAL_TILE))
                // (64 // size)
                * (64 // size)
            )
        elif m == 0:
            m = n - i
        at_x, at_y = x + size * i, y + size * i
        added = residual + size * i
        if lines and in_lines:
            if residual != 0 and q.relu:
                apply_lines(at_x, at_y, size * m, scale, (None, None), added, (1, ahead, 1))
            elif residual != 0:
                apply_lines(at_x, at_y, size * m, scale, (None, None), added, (None, ahead, 1))
            elif q.relu:
                apply_lines(at_x, at_y, size * m, scale, (None, None), None, (1, ahead, 1))
            else:
                apply_lines(at_x, at_y, size * m, scale, (None, None), None, (None, ahead, 1))
        else:
            if residual != 0:
                apply_with_residual(at_x, tile, added, m, hi, r, shift, kind)
            else:
                apply_with_residual(at_x, tile, None, m, hi, r, shift, kind)
            if q.activation != 0:
                activate(q, tile, m)
            store_non_temporal(at_y, tile, size * m)
        i += m


@inner
def apply_run(q, place, n, s, apart, room, kinds):
    """Elements [t, t + n) of plane p of group (a, b), from x to y; `room` is a tile and a spare."""
    a, b, p, t = place
    tile, spare = room
    kind = kinds[0]
    source = q.total if q.total.data != 0 else q.x
    x = at(source, a, b) + p * source.p + t * source.s
    y = at(q.y, a, b) + p * q.y.p + t * q.y.s
    weight = 0
    bias = 0
    if q.weight.data != 0 and not q.activation_first:
        weight = at(q.weight, a, b) + p * q.weight.p + t * q.weight.s
    if q.bias.data != 0 and not q.activation_first:
        bias = at(q.bias, a, b) + p * q.bias.p + t * q.bias.s
    wv = 1 if weight != 0 and q.weight.s != 0 else 0
    bv = 1 if bias != 0 and q.bias.s != 0 else 0
    far = q.mask.data != 0 or (q.given != 0 and q.foldable == 0)
    foldable_far = q.foldable != 0, far
    if q.plain:
        apply_scale(x, y, n, s, apart, (weight, bias, wv, bv), foldable_far, (kind, kind))
        return
    if q.direct_non_temporal:
        hi, r, shift, holds = scale_of_run(s, apart, weight, bias, kind)
        if holds:
            residual = 0
            if q.residual.data != 0:
                residual = at(q.residual, a, b) + p * q.residual.p + t * q.residual.s
            ahead = PREFETCH_BYTES
            if not q.given and q.length * source.s <= PREFETCH_WINDOW:
                ahead = source.b  # this group lies in cache, the next one does not yet
            apply_non_temporal(q, (x, y, residual), n, (hi, r, shift), ahead, tile, kind)
            return
    i = 0
    while i < n:
        # through a tile in L1 where x, y and the residual may be one array
        m = min(n - i, APPLY_ELEMENTS)
        size = size_of(kind)
        target = y + i * size if q.direct else tile
        w = weight + i * q.weight.s if weight != 0 else 0
        v = bias + i * q.bias.s if bias != 0 else 0
        apply_scale(x + i * size, target, m, s, apart, (w, v, wv, bv), foldable_far, kinds)
        if q.residual.data != 0:
            residual = at(q.residual, a, b) + p * q.residual.p + (t + i) * q.residual.s
            add(target, residual, m, q.residual_real != 0, kind)
        if q.activation != 0:
            activate(q, target, m)
        if q.activation_first:
            w = 0
            v = 0
            if q.weight.data != 0:
                w = at(q.weight, a, b) + p * q.weight.p + (t + i) * q.weight.s
            if q.bias.data != 0:
                v = at(q.bias, a, b) + p * q.bias.p + (t + i) * q.bias.s
            affine(target, w, v, 1 if q.weight.s != 0 else 0, 1 if q.bias.s != 0 else 0, m, kind)
        if not q.direct:
            deliver(tile, spare, y + i * size, m, q.non_temporal != 0, kind)
        i += m
