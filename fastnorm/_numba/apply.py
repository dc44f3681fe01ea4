"""From x and a scale to y: the affine step, a residual and an activation, tile by tile.

Operands of a loop are flat arrays and where it begins in each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types

from fastnorm._numba import scalar
from fastnorm._numba.compiling import (
    deliver,
    inner,
    is_double,
    load,
    read,
    real,
    target,
    when_compiled,
    within,
)
from fastnorm._numba.moments import MEAN, REST
from fastnorm._numba.scales import INVERSE, OUT, UNIT
from fastnorm._numba.walks import ACTIVATION, BIAS, RAISED, RESIDUAL, WEIGHT, X, Y, at
from fastnorm.schedule import NUMBA_TILE

# --- Loops ----------------------------------------------------------------------------------------


@inner
def apply_folded(x, i, y, j, n, hi, r, shift):
    """A scale that has the affine step in it."""
    for k in range(n):
        y[j + k] = scalar.apply(x[i + k], hi, r, shift)


@inner
def apply_one(x, i, y, j, n, scale, w, b):
    """A scale, then one weight and one bias for the run."""
    hi, r, shift = scale
    for k in range(n):
        y[j + k] = scalar.fma(scalar.apply(x[i + k], hi, r, shift), w, b)


@inner
def apply_along(x, i, y, j, n, scale, affine, starts):
    """A scale, then a weight and a bias for each element."""
    hi, r, shift = scale
    weight, bias = affine
    w, b = starts
    for k in range(n):
        y[j + k] = scalar.fma(scalar.apply(x[i + k], hi, r, shift), weight[w + k], bias[b + k])


@inner
def in_double(v, scale, g, w, b):
    """One number that a float32 does not hold on the way."""
    t = (np.float64(v) * scale[UNIT, g] - scale[MEAN, g]) - scale[REST, g]
    r = scale[INVERSE, g]
    xhat = t * r
    return (xhat * w if math.isfinite(xhat) else t * (r * w)) + b


@inner
def holds_digits(v, hi, xhat):
    """Whether xhat, of a number that the statistics are not of, lost nothing; doubles always do."""
    return math.isfinite(xhat) and (abs(xhat) >= np.float32(scalar.LEAST) or v == hi)


@inner
def apply_slowly(source, into, n, scale, g, weights, always):
    """The step in float64, `always` or where a product leaves the type's range.

    So it may where a mask left a number out, or statistics are given; a weight may bring it back.
    """
    x, i = source
    y, j = into
    affine, starts, steps = weights
    weight, bias = affine
    w, b = starts
    hi = real(scale[MEAN, g], y)
    rstd = scale[INVERSE, g]
    r = real(rstd, y)
    shift = real(-((scale[MEAN, g] - np.float64(hi)) + scale[REST, g]) * rstd, y)
    for k in range(n):
        v, wk, bk = x[i + k], weight[w + k * steps[0]], bias[b + k * steps[1]]
        xhat = scalar.apply(v, hi, r, shift)
        if not always and (math.isfinite(xhat) if is_double(y) else holds_digits(v, hi, xhat)):
            y[j + k] = scalar.fma(xhat, wk, bk)
        else:
            y[j + k] = real(in_double(v, scale, g, np.float64(wk), np.float64(bk)), y)


@inner
def affine_after(y, j, n, affine, starts, steps):
    """The affine step of a norm that squashes first."""
    weight, bias = affine
    w, b = starts
    for k in range(n):
        y[j + k] = scalar.fma(y[j + k], weight[w + k * steps[0]], bias[b + k * steps[1]])


@inner
def add(y, j, n, residual, i):
    for k in range(n):
        y[j + k] += real(load(residual, i + k), y)


@when_compiled
def activate(activation: Any, y: Any, j: Any, n: Any, raised: Any) -> Any:
    """The activation of a pass, in place; a user's own may raise, and who called is told so."""
    if isinstance(activation, types.NoneType):
        return lambda activation, y, j, n, raised: None

    def call(activation, y, j, n, raised):
        if activation(0, y[j : j + n].ctypes.data, np.int64(n), 0, 0, 0) != 0:
            raised[0] = 1

    return call


@within
def finish(w, steps, arrays, place, y, j, n, along):
    """What follows the step, on n numbers that begin at an element of (a, b, p, s, c)."""
    a, b, p, s, c = place
    if w.residual:
        add(y, j, n, arrays[RESIDUAL], at(steps, RESIDUAL, a, b, p, s, c))
    if w.activation:
        activate(arrays[ACTIVATION], y, j, n, arrays[RAISED])
    if w.activation_first:
        starts = at(steps, WEIGHT, a, b, p, s, c), at(steps, BIAS, a, b, p, s, c)
        own = np.uintp(steps[WEIGHT, along]), np.uintp(steps[BIAS, along])
        affine_after(y, j, n, (arrays[WEIGHT], arrays[BIAS]), starts, own)


# --- Runs -----------------------------------------------------------------------------------------


@within
def apply_part(source, into, n, scale, g, weights, kinds):
    """The affine step of n elements: `own` are the steps of weights, which begin at `starts`.

    `kinds`: folded, weighted, and whether there may be numbers that the statistics are not of.
    """
    x, i = source
    y, j = into
    affine, starts, _ = weights
    weight, bias = affine
    folded, weighted, far = kinds
    wk, bk = real(1.0, y), real(-0.0, y)
    if weighted:
        wk, bk = weight[starts[0]], bias[starts[1]]
    mean, rstd = scale[MEAN, g], scale[INVERSE, g]
    hi = real(mean, y)
    lo = (mean - np.float64(hi)) + scale[REST, g]
    out = scale[OUT, g] != 0.0
    if folded and not is_double(y):
        r = rstd * np.float64(wk)
        if not out and scalar.holds(r):
            apply_folded(x, i, y, j, n, hi, real(r, y), real(np.float64(bk) - lo * r, y))
            return
        out = True
    if weighted and (out or (far and not folded)):
        apply_slowly(source, into, n, scale, g, weights, out)
    elif out:
        for k in range(n):
            y[j + k] = real(in_double(x[i + k], scale, g, 1.0, -0.0), y)
    elif folded or not weighted:
        apply_one(x, i, y, j, n, (hi, real(rstd, y), real(-lo * rstd, y)), wk, bk)
    else:
        apply_along(x, i, y, j, n, (hi, real(rstd, y), real(-lo * rstd, y)), affine, starts)


@within
def apply_run(w, steps, source, affine, place, n, scale, into):
    """The affine step of n elements of a run."""
    a, b, p, s = place
    starts = at(steps, WEIGHT, a, b, p, s, 0), at(steps, BIAS, a, b, p, s, 0)
    own = np.uintp(steps[WEIGHT, 3]), np.uintp(steps[BIAS, 3])
    weighted = w.weighted != 0 and w.activation_first == 0
    kinds = w.folded != 0, weighted, w.masked != 0 or w.given != 0
    apply_part(source, into, n, scale, 0, (affine, starts, own), kinds)


@within
def apply_runs(w, steps, arrays, place, split, scale, tile, spare):
    """A split of a group is applied.

    Through two tiles: LLVM does not vectorise a loop whose two arrays are one.
    """
    x, y, affine = arrays[X], arrays[Y], (arrays[WEIGHT], arrays[BIAS])
    a, b = place
    f = split * w.split
    last = min(f + w.split, w.length)
    while f < last:
        p = f // w.s
        s = f - p * w.s
        n = min(last - f, w.s - s)
        if not (w.plain and w.direct):
            n = min(n, NUMBA_TILE)
        m = np.uintp(n)
        source, i = read(x, at(steps, X, a, b, p, s, 0), m, spare)
        o = at(steps, Y, a, b, p, s, 0)
        t, j = target(y, o, tile, w.direct)
        apply_run(w, steps, (source, i), affine, (a, b, p, s), m, scale, (t, j))
        if not w.plain:
            finish(w, steps, arrays, (a, b, p, s, 0), t, j, m, 3)
        deliver(y, o, tile, m, w.direct)
        f += n


# --- Columns --------------------------------------------------------------------------------------

WEIGHTS, BIASES = 3, 5  # rows of what is known of columns, after hi, r and shift; OUT is another
COLUMNS = 6


@within
def spread(w, steps, affine, place, scale, columns, y):
    """From scales of groups to hi, r, shift and whether it is out of range, of each column.

    The affine step is in them where it can be. They are repeated for rows that are taken as one.
    """
    a, b, c, width = place
    weight, bias = affine
    any_out = False
    for j in range(width):
        g = j // w.neighbours
        mean, r = scale[MEAN, g], scale[INVERSE, g]
        hi = real(mean, y)
        lo = (mean - np.float64(hi)) + scale[REST, g]
        out = scale[OUT, g] != 0.0
        shift = -lo * r
        if w.folded and not is_double(y):
            r *= np.float64(weight[at(steps, WEIGHT, a, b, 0, 0, (c + j) // w.shared)])
            shift = np.float64(bias[at(steps, BIAS, a, b, 0, 0, (c + j) // w.shared)]) - lo * r
            out = out or not scalar.holds(r)
        any_out = any_out or out
        for k in range(j, width * w.joined, width):
            columns[0, k], columns[1, k], columns[2, k] = hi, real(r, y), real(shift, y)
            columns[OUT, k] = 1.0 if out else 0.0
            columns[WEIGHTS, k], columns[BIASES, k] = real(1.0, y), real(-0.0, y)
            if w.folded and not w.activation_first:
                columns[WEIGHTS, k] = weight[at(steps, WEIGHT, a, b, 0, 0, (c + j) // w.shared)]
                columns[BIASES, k] = bias[at(steps, BIAS, a, b, 0, 0, (c + j) // w.shared)]
    return any_out


@inner
def apply_row(x, i, y, j, n, columns):
    hi, r, shift = columns[0], columns[1], columns[2]
    for k in range(n):
        y[j + k] = scalar.apply(x[i + k], hi[k], r[k], shift[k])


@inner
def mend_row(w, source, into, n, columns, scale, weights):
    """The affine step of a row after it, and in float64 what the type did not hold on the way."""
    x, i = source
    y, j = into
    affine, starts, own = weights
    weight, bias = affine
    after = not w.folded or is_double(y)
    for k in range(n):
        wk, bk = weight[starts[0] + k * own[0]], bias[starts[1] + k * own[1]]
        xhat = y[j + k]
        lost = columns[OUT, k] != 0.0
        if not w.folded and not lost:
            held = math.isfinite(xhat)
            if not is_double(y):
                held = holds_digits(x[i + k], columns[0, k], xhat)
            lost = not held
        if lost:
            g = np.intp(k) // w.neighbours
            v = in_double(x[i + k], scale, g, np.float64(wk), np.float64(bk))
            y[j + k] = real(v, y)
        elif after:
            y[j + k] = scalar.fma(xhat, wk, bk)


@within
def apply_columns(w, steps, arrays, place, split, scale, known, tiles):
    """A split of the rows of each group of an item is applied.

    `known` is of its columns, and whether any is out of range.
    """
    columns, any_out = known
    tile, spare = tiles
    x, y, affine = arrays[X], arrays[Y], (arrays[WEIGHT], arrays[BIAS])
    a, b, c, width = place
    f = split * w.split
    last = min(f + w.split, w.length)
    first = w.activation_first != 0
    mended = any_out or (w.weighted and not (w.folded or first) and (w.masked or w.given))
    direct = w.direct != 0 and not mended  # what is mended is read once more
    one = np.uintp(1)
    while f < last:
        p = f // w.s
        s = f - p * w.s
        rows = min(last - f, w.s - s, w.joined)
        n = np.uintp(rows * width)
        source, i = read(x, at(steps, X, a, b, p, s, c), n, spare)
        o = at(steps, Y, a, b, p, s, c)
        t, j = target(y, o, tile, direct)
        apply_row(source, i, t, j, n, columns)
        starts = at(steps, WEIGHT, a, b, p, s, c), at(steps, BIAS, a, b, p, s, c)
        own = np.uintp(steps[WEIGHT, 4]), np.uintp(steps[BIAS, 4])
        weights = affine
        if w.folded or first:  # one for each column, or none yet
            weights = columns[WEIGHTS], columns[BIASES]
            starts, own = (np.uintp(0), np.uintp(0)), (one, one)
        if mended:
            for r in range(rows):
                k = np.uintp(r * width)
                row, into = (source, i + k), (t, j + k)
                mend_row(w, row, into, np.uintp(width), columns, scale, (weights, starts, own))
        elif w.weighted and not first and (not w.folded or is_double(y)):
            affine_after(t, j, n, weights, starts, own)
        if not w.plain:
            finish(w, steps, arrays, (a, b, p, s, c), t, j, n, 4)
        deliver(y, o, tile, n, direct)
        f += rows
