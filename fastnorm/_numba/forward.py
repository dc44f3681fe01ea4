"""The forward pass, on the five dimensions that layout.py finds: a twin of the kernels in _core.

    a, b   kept axes: each (a, b) has statistics of its own
    p, s   reduced axes: the elements (p, s) share a statistic
    c      columns: neighbours in memory with a statistic each, or `neighbours` with one together

With one column the innermost axis is s and a group is a list of contiguous *runs*; with many it is
c. Both do the same three things, block by block: moments, merge, step. Blocks and pieces depend on
the shape alone and are merged in their order, so that results do not depend on the threads.

Everything a kernel needs to know is in one record, `PASS`; memory is known by its address, and so
is an activation: a compiled loop that is called for a tile in L1 (`activations`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cfunc, njit

from fastnorm._numba import scalar
from fastnorm._numba.memory import (
    AHEAD,
    COUNTERS,
    KERNEL,
    LANES,
    STRICT,
    add_to_lanes,
    call,
    exact_squares,
    fence,
    fetch,
    is_double,
    is_half,
    load,
    read,
    read_real,
    real,
    record_at,
    size_of,
    step_lines,
    store,
    stream_line,
    sums_in_lanes,
    take,
    write,
)

BLOCK = 4096  # elements of a run whose moments are taken at once: fits L1
PIECE = 16  # blocks that one thread takes when a group is shared out
CHAIN = 256  # doubles before the lanes are added up: short chains round less
CHUNK = 2048  # elements that are stepped at once where more than one loop goes over them
BUNDLE = 16  # groups of runs that are taken side by side, at most
BESIDE = 4096  # elements of them, at most
ALONE = 256  # elements of a row that is not worth taking with others
SHORT = 2048  # elements of a row whose step waits for the sums of the next
PAST = 256  # elements that go past the caches at a time where more than one loop goes over them
AWAITED = 1 << 18  # bytes of a group, at most, beside which the next one fits in L2
NEARBY = 4096  # bytes: runs shorter than this are walked in the order of memory
ABREAST = 512  # columns up to this number are taken as whole rows
COLUMNS = 256  # of more, so many are taken side by side, at most (or one group of neighbours)
SQUARE = 16384  # elements of a block of columns: fits L2
PIECE_ROWS = 1024  # rows that one thread takes
FIELDS = 5  # numbers of moments
SCALE = 8  # numbers of the scale of a group

RSTD, NORM, FACTOR = 0, 1, 2  # backends.Scaling
WHOLE, MOMENTS, FINISH, STEPS = range(4)  # what a kernel is asked to do

OPERAND = np.dtype([(name, np.int64) for name in ("data", "a", "b", "p", "s", "c")])
OPERANDS = (
    "x", "y", "mask", "weight", "bias", "residual", "addend", "total", "mean", "var", "rstd",
)  # fmt: skip
NUMBERS = (
    "a", "b", "p", "s", "c", "neighbours", "columns", "centred", "given", "scaling", "activation",
    "activation_first", "stream", "residual_real", "addend_real", "foldable", "folded_groups",
    "whole_planes", "length", "width", "chunks", "items", "block", "pieces", "parts", "scales",
    "plain", "direct", "fields", "alone", "past", "relu",
)  # fmt: skip
PASS = np.dtype(
    [(name, np.int64) for name in COUNTERS]
    + [(name, OPERAND) for name in OPERANDS]
    + [(name, np.int64) for name in NUMBERS]
    + [("eps", np.float64)]
)

# Called by kernels alone: no door for Python or C is compiled.
INNER = {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "nogil": True,
    "error_model": "numpy",
}
inner = njit(fastmath=False, **INNER)
# Sums alone may be reordered, into as many lanes as the processor has.
summing = njit(fastmath={"reassoc", "nsz", "contract"}, **INNER)


# --- Sums -----------------------------------------------------------------------------------------


@inner
def fetch_ahead(x, size):
    """Ask for `size` bytes that are read AHEAD from now.

    A loop that reads one block, then writes another, keeps losing the processor's own prefetcher.
    """
    i = 0
    while i < size:
        fetch(x + AHEAD + i)
        i += 64


@summing
def half_sums(x, n, pivot):
    """Of x - pivot and of its square, of float16."""
    first = 0.0
    second = 0.0
    for i in range(n):
        d = np.float64(load(x, i, np.int16)) - pivot
        first += d
        second += d * d
    return first, second


@inner
def sums(x, n, kind):
    """Of x and of its square."""
    if is_half(kind):
        fetch_ahead(x, 2 * n)
        return half_sums(x, n, 0.0)
    first, second = sums_in_lanes(x, n // LANES, None, AHEAD, kind)
    for i in range(n - n % LANES, n):
        d = np.float64(load(x, i, kind))
        first += d
        second = scalar.mac(d, d, second)
    return first, second


@inner
def sums_about(x, n, pivot, kind):
    """Of x - pivot and of its square."""
    if is_half(kind):
        return half_sums(x, n, pivot)
    first, second = sums_in_lanes(x, n // LANES, pivot, 0, kind)
    for i in range(n - n % LANES, n):
        d = np.float64(load(x, i, kind)) - pivot
        first += d
        second = scalar.mac(d, d, second)
    return first, second


@inner
def squares(x, n, kind):
    """The sum of the squares of x."""
    return sums(x, n, kind)[1]


@inner
def fold(v, half):
    """Add the upper half of 2 * half sums to the lower."""
    for j in range(half):
        write(v, j, read(v, j, np.float64) + read(v, j + half, np.float64))


@inner
def deviations(x, n, pivot, lanes):
    """The sum of x - pivot of doubles, in the order of the Cython kernels (fn_deviations)."""
    if n % LANES == 0:
        return sums_in_lanes(x, n // LANES, pivot, AHEAD, np.float64)[0]
    for j in range(LANES):
        write(lanes, j, 0.0)
    add_to_lanes(x, n // LANES, pivot, AHEAD, lanes, None)
    fold(lanes, 16)
    fold(lanes, 8)
    i = n - n % LANES
    while i + 8 <= n:
        for j in range(8):
            write(lanes, j, read(lanes, j, np.float64) + (read(x, i + j, np.float64) - pivot))
        i += 8
    rest = 0.0
    while i < n:
        rest += read(x, i, np.float64) - pivot
        i += 1
    fold(lanes, 4)
    fold(lanes, 2)
    return read(lanes, 0, np.float64) + read(lanes, 1, np.float64) + rest


@inner
def halve(total, rest, first, half):
    add_exactly(total, rest, total + 8 * half, half)
    fold(rest, half)
    fold(first, half)


@inner
def deviations_about(x, n, mean, lanes):
    """What `exact_squares` sums up, of any number of doubles."""
    total = lanes + 8 * LANES
    rest = total + 8 * LANES
    first = rest + 8 * LANES
    for j in range(3 * LANES):
        write(total, j, 0.0)
    i = 0
    while i < n:
        end = min(i + CHAIN, n)
        whole = (end - i) // LANES
        for j in range(LANES):
            write(lanes, j, 0.0)
        add_to_lanes(x + 8 * i, whole, mean, 0, first, lanes)
        i += whole * LANES
        for j in range(end - i):
            d = read(x, i + j, np.float64) - mean
            write(lanes, j, scalar.mac(d, d, read(lanes, j, np.float64)))
            write(first, j, read(first, j, np.float64) + d)
        i = end
        add_exactly(total, rest, lanes, LANES)
    halve(total, rest, first, 16)
    halve(total, rest, first, 8)
    halve(total, rest, first, 4)
    halve(total, rest, first, 2)
    halve(total, rest, first, 1)
    return read(first, 0, np.float64), read(total, 0, np.float64), read(rest, 0, np.float64)


@inner
def double_moments(x, n, centred, lanes):
    """Mean, its rest, M2 and its rest of doubles, which have no bits to spare.

    Twice: about the first element, so that a constant block has exactly its mean, then about that.
    A sum of squares would round the same way each time where squares are equal, as those of black
    and white pixels are: LANES of them are added up in short chains, and the chains exactly.
    Every sum is in the order of the Cython kernels: in float64 another one shows.
    """
    mean = 0.0
    if centred:
        pivot = read(x, 0, np.float64)
        mean = pivot + deviations(x, n, pivot, lanes) / n
    if n % LANES == 0:
        deviation, m2, m2_rest = exact_squares(x, n // LANES, CHAIN // LANES, mean)
    else:
        deviation, m2, m2_rest = deviations_about(x, n, mean, lanes)
    if not centred:
        return 0.0, 0.0, m2, m2_rest
    mean_rest = deviation / n
    return mean, mean_rest, m2, m2_rest - deviation * mean_rest


@inner
def add_exactly(total, rest, v, n):
    """Add n numbers to sums kept as two numbers each."""
    for j in range(n):
        high, lost = scalar.two_sum(read(total, j, np.float64), read(v, j, np.float64))
        write(total, j, high)
        write(rest, j, read(rest, j, np.float64) + lost)


@inner
def moments(x, n, centred, into, step, lanes, kind):
    """The moments of n numbers side by side into into[0], into[step] ...; `lanes` is room."""
    write(into, 0, np.float64(n))
    mean = rest = m2 = m2_rest = 0.0
    if n > 0:
        if is_double(kind):
            mean, rest, m2, m2_rest = double_moments(x, n, centred, lanes)
        elif not centred:
            m2 = squares(x, n, kind)
        else:
            first, second = sums(x, n, kind)
            mean, rest, m2, again = scalar.moments_of_sums(np.float64(n), first, second, 0.0)
            if again and math.isfinite(mean):
                pivot = np.float64(np.float32(mean))
                first, second = sums_about(x, n, pivot, kind)
                mean, rest, m2, again = scalar.moments_of_sums(np.float64(n), first, second, pivot)
    write(into, step, mean)
    write(into, 2 * step, rest)
    write(into, 3 * step, m2)
    write(into, 4 * step, m2_rest)


@inner
def merge_into(into, other, n, step):
    """Merge n moments beside one another into others."""
    for i in range(n):
        count, mean, rest, m2, m2_rest = scalar.merge(
            read(into, i, np.float64),
            read(into, step + i, np.float64),
            read(into, 2 * step + i, np.float64),
            read(into, 3 * step + i, np.float64),
            read(into, 4 * step + i, np.float64),
            read(other, i, np.float64),
            read(other, step + i, np.float64),
            read(other, 2 * step + i, np.float64),
            read(other, 3 * step + i, np.float64),
            read(other, 4 * step + i, np.float64),
        )
        write(into, i, count)
        write(into, step + i, mean)
        write(into, 2 * step + i, rest)
        write(into, 3 * step + i, m2)
        write(into, 4 * step + i, m2_rest)


# --- From moments to a scale ----------------------------------------------------------------------


@inner
def at(o, a, b):
    """Where an operand keeps what belongs to group (a, b)."""
    return o.data + a * o.a + b * o.b


@inner
def chosen(q, mask, p, s, c):
    """Whether an element enters the statistics of its group; `mask` is where its begins, or 0."""
    return mask == 0 or read(mask + p * q.mask.p + s * q.mask.s + c * q.mask.c, 0, np.uint8) != 0


@inner
def power_sum(q, x, mask, unit, pivot, square):
    """Compensated sum of x * unit - pivot, or of its square, over a group of doubles."""
    source = q.total if q.total.data != 0 else q.x
    total = 0.0
    rest = 0.0
    for k in range(q.neighbours):
        for p in range(q.p):
            for s in range(q.s):
                if chosen(q, mask, p, s, k):
                    v = (
                        read(x + p * source.p + s * source.s + k * source.c, 0, np.float64) * unit
                        - pivot
                    )
                    total, lost = scalar.two_sum(total, v * v if square else v)
                    rest += lost
    return total + rest


@inner
def rescue(q, x, mask):
    """Moments of one group whose squares leave float64's range, on x * unit: slow, rare.

    (whether there was something to rescue, mean, rest, M2, unit): nothing where an element is not a
    number or infinite (mean NaN) or where all are the same (mean that, M2 0).
    """
    source = q.total if q.total.data != 0 else q.x
    count = 0
    largest = 0.0
    first = 0.0
    constant = True
    for k in range(q.neighbours):
        for p in range(q.p):
            for s in range(q.s):
                if chosen(q, mask, p, s, k):
                    v = read(x + p * source.p + s * source.s + k * source.c, 0, np.float64)
                    if not math.isfinite(v):
                        return False, math.nan, math.nan, math.nan, 1.0
                    if count == 0:
                        first = v
                    constant = constant and v == first
                    largest = max(largest, abs(v))
                    count += 1
    if count == 0:
        return False, math.nan, 0.0, math.nan, 1.0
    if largest == 0.0 or (constant and q.centred):
        return False, first, 0.0, 0.0, 1.0
    unit = math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))
    mean = 0.0
    rest = 0.0
    if q.centred:
        mean = first * unit
        mean += power_sum(q, x, mask, unit, mean, False) / count
        rest = power_sum(q, x, mask, unit, mean, False) / count
    m2 = power_sum(q, x, mask, unit, mean, True) - count * rest * rest
    return True, mean, rest, m2, unit


@inner
def rstd_of(count, m2, m2_rest, eps, unit, kind):
    """Variance and 1 / sqrt(variance + eps) of a group, both of x times the power of two `unit`."""
    var = m2 / count
    small = eps * unit * unit
    v = var + small
    var_rest = 0.0
    if is_double(kind):
        var_rest = (scalar.fma(-var, count, m2) + m2_rest) / count + ((var - v) + small)
    # a constant group with eps = 0 is all bias: its scale is 0, not infinity
    return var, scalar.inverse_root(v, var_rest) if v != 0.0 else 0.0


@inner
def finish(q, a, b, c, n, of, scale, kind):
    """From the moments of n groups to what the step needs; the statistics are written out.

    Mean, rest, rstd, unit, whether it is wide, whether it is folded, and then rstd * weight and
    bias - lo * rstd * weight. What a float32 cannot hold (data at 1e38 or 1e-42) is wide: its step
    runs in float64, on x times the power of two `unit`.
    """
    source = q.total if q.total.data != 0 else q.x
    for g in range(n):
        if q.columns:
            place = (c // q.neighbours + g) * q.mean.c
            offset, group = c + g * q.neighbours, b
        else:
            place = 0
            offset, group = 0, b + g
        if q.fields != 0:
            # moments as they are, for statistics that are merged with others
            for field in range(FIELDS):
                out = at(q.mean, a, group) + place + field * q.fields
                write(out, 0, read(of, field * n + g, np.float64))
            continue
        unit = 1.0
        rest = 0.0
        if q.given:
            mean = read(at(q.mean, a, group) + place, 0, np.float64)
            var = read(at(q.var, a, group) + place, 0, np.float64)
            rstd = var
            if q.scaling != FACTOR:
                rstd = scalar.inverse_root(var + q.eps, 0.0) if var + q.eps != 0.0 else 0.0
        else:
            count = read(of, g, np.float64)
            mean = read(of, n + g, np.float64)
            rest = read(of, 2 * n + g, np.float64)
            m2 = read(of, 3 * n + g, np.float64)
            m2_rest = read(of, 4 * n + g, np.float64)
            if count == 0.0:
                mean = m2 = math.nan
            if is_double(kind):
                v = m2 / count + q.eps if q.scaling == RSTD else m2
                if not 1e-270 < v < 1e270 and count > 0.0:
                    x = at(source, a, group) + offset * source.c
                    mask = 0 if q.mask.data == 0 else at(q.mask, a, group) + offset * q.mask.c
                    found, other_mean, other_rest, other_m2, unit = rescue(q, x, mask)
                    if found or other_mean == other_mean:
                        mean, rest, m2, m2_rest = other_mean, other_rest, other_m2, 0.0
            var, rstd = rstd_of(count, m2, m2_rest, q.eps, unit, kind)
            if q.scaling != RSTD:
                rstd = scalar.inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
                if math.sqrt(m2) < q.eps * unit:
                    rstd = 1.0 / (q.eps * unit)
            if q.mean.data != 0:
                write(at(q.mean, a, group) + place, 0, mean / unit)
                write(at(q.var, a, group) + place, 0, var / unit / unit)
                write(at(q.rstd, a, group) + place, 0, rstd * unit)
        wide = unit != 1.0
        if not is_double(kind):
            wide = not scalar.holds(rstd) or (rstd != 0.0 and abs(mean) >= scalar.MOST)
        write(scale, g, mean)
        write(scale, n + g, rest)
        write(scale, 2 * n + g, rstd)
        write(scale, 3 * n + g, unit)
        write(scale, 4 * n + g, 1.0 if wide else 0.0)
        write(scale, 5 * n + g, 0.0)
        if q.folded_groups and not wide:
            w = 1.0
            v = 0.0
            if q.weight.data != 0:
                w = np.float64(read_real(at(q.weight, a, group), 0, kind))
            if q.bias.data != 0:
                v = np.float64(read_real(at(q.bias, a, group), 0, kind))
            lo = (mean - np.float64(real(mean, kind))) + rest
            if scalar.holds(rstd * w):
                write(scale, 5 * n + g, 1.0)
                write(scale, 6 * n + g, rstd * w)
                write(scale, 7 * n + g, v - lo * (rstd * w))


# --- Beside the affine step -----------------------------------------------------------------------


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
def affine(t, weight, bias, wv, bv, n, kind):
    """t = t weight + bias, of a norm that squashes first; addresses of 0 for what is not there."""
    for i in range(n):
        w = read_real(weight, i * wv, kind) if weight != 0 else real(1.0, kind)
        b = read_real(bias, i * bv, kind) if bias != 0 else real(0.0, kind)
        write(t, i, scalar.fma(read_real(t, i, kind), w, b))


@inner
def stream(to, source, size):
    """Copy `size` bytes past the caches."""
    head = min((-to) % 64, size)
    i = 0
    while i < head:
        write(to, i, read(source, i, np.uint8))
        i += 1
    while i + 64 <= size:
        stream_line(to + i, source + i)
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
        stream(y, spare, 2 * n)
    else:
        stream(y, t, size_of(kind) * n)


# --- The step of a run ----------------------------------------------------------------------------


@inner
def steps_wide(x, y, n, mean, rest, rstd, unit, weight, bias, wv, bv, kind, to):
    """What float32 cannot hold, in float64."""
    for i in range(n):
        t = ((np.float64(load(x, i, kind)) * unit - mean) - rest) * rstd
        w = np.float64(read_real(weight, i * wv, kind)) if weight != 0 else 1.0
        b = np.float64(read_real(bias, i * bv, kind)) if bias != 0 else 0.0
        store(y, i, real(t * w + b, kind), to)


@inner
def steps_plain(x, y, n, hi, r, shift, kind, to):
    """The step where the affine one is in the scale."""
    for i in range(n):
        store(y, i, scalar.step(load(x, i, kind), hi, r, shift), to)


@inner
def steps_affine(x, y, n, hi, r, shift, weight, bias, wv, bv, kind, to):
    """The step and then the affine one; addresses of 0 for what is not there."""
    w = real(1.0, kind)
    b = real(0.0, kind)
    if weight != 0 and not wv:
        w = read_real(weight, 0, kind)
    if bias != 0 and not bv:
        b = read_real(bias, 0, kind)
    if wv and bv:
        for i in range(n):
            t = scalar.step(load(x, i, kind), hi, r, shift)
            store(y, i, scalar.fma(t, read_real(weight, i, kind), read_real(bias, i, kind)), to)
    elif wv:
        for i in range(n):
            t = scalar.step(load(x, i, kind), hi, r, shift)
            store(y, i, scalar.fma(t, read_real(weight, i, kind), b), to)
    elif bv:
        for i in range(n):
            t = scalar.step(load(x, i, kind), hi, r, shift)
            store(y, i, scalar.fma(t, w, read_real(bias, i, kind)), to)
    else:
        for i in range(n):
            store(y, i, scalar.fma(scalar.step(load(x, i, kind), hi, r, shift), w, b), to)


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
def steps(x, y, n, s, apart, weight, bias, wv, bv, foldable, kind, to):
    """The step of a run whose scale is at `s`, its numbers `apart`; written as numbers of `to`."""
    if foldable and not is_double(kind):
        hi, r, shift, holds = scale_of_run(s, apart, weight, bias, kind)
        if holds:
            steps_plain(x, y, n, hi, r, shift, kind, to)
            return
    mean = read(s, 0, np.float64)
    rest = read(s, apart, np.float64)
    rstd = read(s, 2 * apart, np.float64)
    if read(s, 4 * apart, np.float64) != 0.0:
        unit = read(s, 3 * apart, np.float64)
        steps_wide(x, y, n, mean, rest, rstd, unit, weight, bias, wv, bv, kind, to)
        return
    hi = real(mean, kind)
    lo = (mean - np.float64(hi)) + rest
    r = real(rstd, kind)
    steps_affine(x, y, n, hi, r, real(-lo * rstd, kind), weight, bias, wv, bv, kind, to)


@inner
def steps_beside(x, y, residual, n, hi, r, shift, kind):
    """The step of some floats and, unless it is None, a residual."""
    for i in range(n):
        t = scalar.step(load(x, i, kind), hi, r, shift)
        if residual is not None:
            t = real(t + load(residual, i, kind), kind)
        write(y, i, t)


@inner
def steps_past(q, x, y, residual, n, hi, r, shift, ahead, tile, kind):
    """The step of a run of floats, and what is beside it, past the caches."""
    size = size_of(kind)
    straight = q.relu != 0 or q.activation == 0
    i = 0
    while i < n:
        m = min((-(y + size * i)) % 64 // size, n - i)
        lines = m == 0 and n - i >= 64 // size
        if lines:
            m = (n - i if straight else min(n - i, PAST)) // (64 // size) * (64 // size)
        elif m == 0:
            m = n - i
        at_x, at_y = x + size * i, y + size * i
        beside = residual + size * i
        if lines and straight:
            if residual != 0 and q.relu:
                step_lines(at_x, at_y, size * m, hi, r, shift, None, None, beside, 1, ahead, 1)
            elif residual != 0:
                step_lines(at_x, at_y, size * m, hi, r, shift, None, None, beside, None, ahead, 1)
            elif q.relu:
                step_lines(at_x, at_y, size * m, hi, r, shift, None, None, None, 1, ahead, 1)
            else:
                step_lines(at_x, at_y, size * m, hi, r, shift, None, None, None, None, ahead, 1)
        else:
            if residual != 0:
                steps_beside(at_x, tile, beside, m, hi, r, shift, kind)
            else:
                steps_beside(at_x, tile, None, m, hi, r, shift, kind)
            if q.activation != 0:
                call(q.activation, tile, m)
            stream(at_y, tile, size * m)
        i += m


@inner
def step_run(q, a, b, p, t, n, s, apart, tile, spare, kind, tiled):
    """Elements [t, t + n) of plane p of group (a, b), from x to y."""
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
    if q.plain:
        steps(x, y, n, s, apart, weight, bias, wv, bv, q.foldable != 0, kind, kind)
        return
    if q.past:
        hi, r, shift, holds = scale_of_run(s, apart, weight, bias, kind)
        if holds:
            residual = 0
            if q.residual.data != 0:
                residual = at(q.residual, a, b) + p * q.residual.p + t * q.residual.s
            ahead = AHEAD
            if not q.given and q.length * source.s <= AWAITED:
                ahead = source.b  # this group lies in cache, the next one does not yet
            steps_past(q, x, y, residual, n, hi, r, shift, ahead, tile, kind)
            return
    i = 0
    while i < n:
        # through a tile in L1 where x, y and the residual may be one array
        m = min(n - i, CHUNK)
        size = size_of(kind)
        target = y + i * size if q.direct else tile
        w = weight + i * q.weight.s if weight != 0 else 0
        v = bias + i * q.bias.s if bias != 0 else 0
        steps(x + i * size, target, m, s, apart, w, v, wv, bv, q.foldable != 0, kind, tiled)
        if q.residual.data != 0:
            residual = at(q.residual, a, b) + p * q.residual.p + (t + i) * q.residual.s
            add(target, residual, m, q.residual_real != 0, kind)
        if q.activation != 0:
            call(q.activation, target, m)
        if q.activation_first:
            w = 0
            v = 0
            if q.weight.data != 0:
                w = at(q.weight, a, b) + p * q.weight.p + (t + i) * q.weight.s
            if q.bias.data != 0:
                v = at(q.bias, a, b) + p * q.bias.p + (t + i) * q.bias.s
            affine(target, w, v, 1 if q.weight.s != 0 else 0, 1 if q.bias.s != 0 else 0, m, kind)
        if not q.direct:
            deliver(tile, spare, y + i * size, m, q.stream != 0, kind)
        i += m


# --- Runs -----------------------------------------------------------------------------------------


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
        n = last - f if q.whole_planes else min(last - f, q.s - t)
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
def runs_block(q, a, b, width, first, last, into, work, tile, kind, tiled):
    """Moments of elements [first, last) of each of `width` groups."""
    source = q.total if q.total.data != 0 else q.x
    if q.total.data != 0:
        for k in range(width):
            add_runs(q, a, b + k, first, last, kind)
    if is_double(kind) or q.mask.data != 0:
        for k in range(width):
            p = first // q.s
            t = first - p * q.s
            if q.mask.data == 0 and (last - first <= q.s - t or q.whole_planes):
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
                    n = last - f if q.whole_planes else min(last - f, q.s - t)
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
def runs_moments(q, a, b, width, piece, into, part, work, tile, kind, tiled):
    """Moments of a piece of each of `width` groups: those of its blocks, merged in order."""
    first = piece * BLOCK * PIECE
    last = min(first + BLOCK * PIECE, q.length)
    f = first
    while True:
        end = min(f + BLOCK, last)
        runs_block(q, a, b, width, f, end, into if f == first else part, work, tile, kind, tiled)
        if f > first:
            merge_into(into, part, width, width)
        f = end
        if f >= last:
            return


@inner
def runs_step(q, a, b, width, piece, scale, tile, spare, kind, tiled):
    """The step of a piece of each of `width` groups."""
    source = q.total if q.total.data != 0 else q.x
    f = piece * BLOCK * PIECE
    last = min(f + BLOCK * PIECE, q.length)
    while f < last:
        p = f // q.s
        t = f - p * q.s
        n = min(last - f, q.s - t)
        if (
            q.weight.s == 0
            and q.bias.s == 0
            and q.weight.p == 0
            and q.bias.p == 0
            and q.whole_planes
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
                steps_plain(x, y, n, hi, r, shift, kind, kind)
            else:
                step_run(q, a, b + k, p, t, n, scale + 8 * k, width, tile, spare, kind, tiled)
        f += n


# --- Rows one by one ------------------------------------------------------------------------------


@inner
def step_row_alone(q, x, y, n, hi, r, shift, weight, bias, tile, kind, tiled):
    """The step of one row, whose scale has the affine one in it where it can be."""
    folded = q.foldable != 0 and not is_double(kind)
    wv = q.foldable == 0
    bv = wv and bias != 0
    if q.plain:
        if folded:
            steps_plain(x, y, n, hi, r, shift, kind, kind)
        else:
            steps_affine(x, y, n, hi, r, shift, weight, bias, wv, bv, kind, kind)
        return
    size = size_of(kind)
    i = 0
    while i < n:
        m = min((-(y + size * i)) % 64 // size, n - i)
        lines = q.stream != 0 and m == 0 and n - i >= 64 // size
        if lines:
            m = (n - i) // (64 // size) * (64 // size)
        elif m == 0 or not q.stream:
            m = min(n - i, CHUNK)
        at_x, at_y = x + size * i, y + size * i
        w = weight + q.weight.s * i if weight != 0 else 0
        b = bias + q.bias.s * i if bias != 0 else 0
        zero = real(0.0, kind)
        if lines:
            if folded:
                step_lines(at_x, at_y, size * m, hi, r, shift, None, None, None, None, None, 1)
            elif bv:
                step_lines(at_x, at_y, size * m, hi, r, shift, w, b, None, None, None, 1)
            elif wv:
                step_lines(at_x, at_y, size * m, hi, r, shift, w, zero, None, None, None, 1)
            else:
                one = read_real(w, 0, kind) if w != 0 else real(1.0, kind)
                other = read_real(b, 0, kind) if b != 0 else zero
                step_lines(at_x, at_y, size * m, hi, r, shift, one, other, None, None, None, 1)
        else:
            # by way of a tile where x and y are one array
            if folded:
                steps_plain(at_x, tile, m, hi, r, shift, kind, tiled)
            else:
                steps_affine(at_x, tile, m, hi, r, shift, w, b, wv, bv, kind, tiled)
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
    t = tile + (i & 1) * n * size_of(kind) if q.stream else to
    f = 0
    while f < n:
        m = min(n - f, PAST)
        skipped = f * size_of(kind)
        at_x, at_e, at_t = x + skipped, e + skipped, t + skipped
        fetch_ahead(at_x, m * size_of(kind))
        fetch_ahead(at_e, m * size_of(kind))
        for j in range(m):
            store(at_t, j, real(load(at_x, j, kind) + load(at_e, j, kind), kind), kind)
        f += m
    if q.stream:
        stream(to, t, n * size_of(kind))
    return t


@inner
def rows(q, first, last, whole, own, work, tile, spare, kind, tiled):
    """Groups [first, last) that are rows with nothing beside weights, one after the other.

    Short ones are stepped after the sums of the next, which hide how long a quotient and a root
    take; of long ones the cache would have lost the beginning by then.
    """
    n = q.length
    count = np.float64(n)
    late = n < SHORT and not is_double(kind)
    weight, bias = q.weight.data, q.bias.data
    if not q.foldable and last - first >= 8:
        y = at(q.y, first // q.b, first % q.b)
        kept = spare + 8 * CHUNK
        weight = lined_up(weight, y, n, kept, kind)
        bias = lined_up(bias, y, n, kept + n * size_of(tiled) + 64, kind)
    hi = r = shift = real(0.0, kind)
    before = before_y = 0
    for i in range(first, last):
        a = i // q.b
        b = i - a * q.b
        x = at(q.x, a, b)
        y = at(q.y, a, b)
        w, v = weight, bias
        if q.foldable:
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
            step_row_alone(q, before, before_y, n, hi, r, shift, w, v, spare, kind, tiled)
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
        if not held:
            # what its type cannot hold
            before = 0
            if q.total.data != 0 and q.stream:
                x = at(q.total, a, b)
            write(whole, 0, count)
            write(whole, 1, mean)
            write(whole, 2, rest)
            write(whole, 3, m2)
            write(whole, 4, m2_rest)
            finish(q, a, b, 0, 1, whole, own, kind)
            runs_step(q, a, b, 1, 0, own, tile, spare, kind, tiled)
            continue
        if q.mean.data != 0:
            write(at(q.mean, a, b), 0, mean)
            write(at(q.var, a, b), 0, var)
            write(at(q.rstd, a, b), 0, rstd)
        r = real(rw, kind)
        shift = real(c - lo * rw if q.foldable and not is_double(kind) else -lo * rw, kind)
        before, before_y = x, y
        if not late:
            step_row_alone(q, x, y, n, hi, r, shift, w, v, spare, kind, tiled)
    if late and before != 0:
        step_row_alone(q, before, before_y, n, hi, r, shift, weight, bias, spare, kind, tiled)


def runs_room(width):
    """Bytes that a thread needs."""
    return 8 * (FIELDS * width * 3 + SCALE * width + 2 * width + 4 * LANES + BLOCK + CHUNK + 8)


@inner
def runs(record, memory, turn, turns, task, kind, tiled):
    """What `task` asks for, of all items or pieces of items; each turn is taken by one thread."""
    q = record_at(record, PASS)
    width = q.width
    total = q.items if task == WHOLE or task == FINISH else q.items * q.pieces
    whole = memory
    part = whole + 8 * FIELDS * width
    other = part + 8 * FIELDS * width
    own = other + 8 * FIELDS * width
    work = own + 8 * SCALE * width
    tile = work + 8 * (2 * width + 4 * LANES)
    tile += -tile % 64
    spare = tile + 8 * BLOCK
    while turn < turns:
        if q.alone:
            begin, end = total * turn // turns, total * (turn + 1) // turns
            rows(q, begin, end, whole, own, work + 16 * width, tile, spare, kind, tiled)
            turn = take(record)
            continue
        for i in range(total * turn // turns, total * (turn + 1) // turns):
            item = i if task == WHOLE or task == FINISH else i // q.pieces
            a = item // q.chunks
            b = (item - a * q.chunks) * width
            n = min(width, q.b - b)
            scale = own
            if task == MOMENTS:
                runs_moments(
                    q,
                    a,
                    b,
                    n,
                    i - item * q.pieces,
                    q.parts + i * 8 * FIELDS * width,
                    part,
                    work,
                    tile,
                    kind,
                    tiled,
                )
                continue
            if q.scales != 0:
                scale = q.scales + item * 8 * SCALE * width
            if task == FINISH:
                merged = q.parts + item * q.pieces * 8 * FIELDS * width
                if not q.given:
                    for piece in range(1, q.pieces):
                        merge_into(merged, merged + piece * 8 * FIELDS * width, n, n)
                finish(q, a, b, 0, n, merged, scale, kind)
            elif task == STEPS:
                runs_step(q, a, b, n, i - item * q.pieces, scale, tile, spare, kind, tiled)
            else:
                if q.given and q.scales != 0:
                    scale = q.scales + (item - a * q.chunks) * 8 * SCALE * width
                else:
                    if not q.given:
                        runs_moments(q, a, b, n, 0, whole, part, work, tile, kind, tiled)
                        for piece in range(1, q.pieces):
                            runs_moments(q, a, b, n, piece, other, part, work, tile, kind, tiled)
                            merge_into(whole, other, n, n)
                    finish(q, a, b, 0, n, whole, scale, kind)
                if q.y.data != 0:
                    for piece in range(q.pieces):
                        runs_step(q, a, b, n, piece, scale, tile, spare, kind, tiled)
        turn = take(record)
    if q.stream:
        fence()


# --- Columns --------------------------------------------------------------------------------------


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
def columns_sums(q, base, first, last, width, pivot, one, two, kind):
    """Sums of x, or of x - pivot, and of its square over rows [first, last), for each column."""
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
    """Sums of k columns beside one another."""
    for g in range(groups):
        total = read(v, g * k, np.float64)
        for j in range(1, k):
            total += read(v, g * k + j, np.float64)
        write(v, g, total)


@inner
def columns_block(q, a, b, c, width, first, last, into, work, kind):
    """Moments over rows [first, last) of each group of floats."""
    k = q.neighbours
    groups = width // k
    base = at(q.x, a, b) + c * q.x.c
    one = work
    two = one + 8 * width
    pivot = two + 8 * width
    for j in range(width):
        write(pivot, j, 0.0)
    columns_sums(q, base, first, last, width, 0, one, two, kind)
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
    columns_sums(q, base + low * k * q.x.c, first, last, some, pivot + 8 * low * k, one, two, kind)
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


@inner
def columns_double(q, a, b, c, width, first, last, into, work):
    """Moments over rows [first, last) for each column of doubles, four rows at a time.

    Twice: about the first row, then about those means, the sum of squares kept as two numbers.
    """
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
def columns_chosen(q, a, b, c, width, first, last, into, work, kind):
    """Moments over the chosen of rows [first, last) for each column.

    Twice: about the first of them, then about that mean, each square added exactly.
    """
    base = at(q.x, a, b) + c * q.x.c
    mask = at(q.mask, a, b) + c * q.mask.c
    pivot = work
    total = pivot + 8 * width
    for j in range(FIELDS * width):
        write(into, j, 0.0)
    for turn in range(2):
        for j in range(width):
            write(total, j, 0.0)
        for i in range(first, last):
            p = i // q.s
            t = i - p * q.s
            x = base + p * q.x.p + t * q.x.s
            for j in range(width):
                if not chosen(q, mask, p, t, j):
                    continue
                v = np.float64(load(x, j, kind))
                if turn == 0:
                    if read(into, j, np.float64) == 0.0:
                        write(pivot, j, v)
                    write(into, j, read(into, j, np.float64) + 1.0)
                    write(total, j, read(total, j, np.float64) + (v - read(pivot, j, np.float64)))
                else:
                    d = v - read(into, width + j, np.float64)
                    m2, lost = scalar.two_sum(read(into, 3 * width + j, np.float64), d * d)
                    write(into, 3 * width + j, m2)
                    write(into, 4 * width + j, read(into, 4 * width + j, np.float64) + lost)
                    write(total, j, read(total, j, np.float64) + d)
        for j in range(width):
            count = read(into, j, np.float64)
            if q.centred and count > 0.0:
                d = read(total, j, np.float64)
                if turn == 0:
                    write(into, width + j, read(pivot, j, np.float64) + d / count)
                else:
                    write(into, 2 * width + j, d / count)
                    write(
                        into, 4 * width + j, read(into, 4 * width + j, np.float64) - d * (d / count)
                    )


@inner
def columns_moments(q, a, b, c, width, piece, into, part, every, work, kind):
    """Moments of a piece of each group: those of its blocks merged in order, then neighbours."""
    k = q.neighbours
    groups = width // k
    span = max(q.block, PIECE_ROWS - PIECE_ROWS % q.block)
    first = piece * span
    last = min(first + span, q.length)
    if not is_double(kind) and q.mask.data == 0:
        columns_block(q, a, b, c, width, first, last, into, work, kind)
        return
    whole = into if k == 1 else every
    f = first
    while True:
        end = min(f + q.block, last)
        into_here = whole if f == first else part
        if q.mask.data != 0:
            columns_chosen(q, a, b, c, width, f, end, into_here, work, kind)
        else:
            columns_double(q, a, b, c, width, f, end, into_here, work)
        if f > first:
            merge_into(whole, part, width, width)
        f = end
        if f >= last:
            break
    if k > 1:
        for g in range(groups):
            for j in range(1, k):
                merge_into(whole + 8 * g * k, whole + 8 * (g * k + j), 1, width)
            for field in range(FIELDS):
                write(into, field * groups + g, read(whole, field * width + g * k, np.float64))


@inner
def spread(q, a, b, c, width, scale, along, kind):
    """From scales of groups to hi, r and shift of columns, the affine step in them where it can be.

    `along` has room for four numbers for each column: the last tells whether it is wide, which is
    also what a product of rstd and weight is that a float32 cannot hold. Returns whether any is.
    """
    k = q.neighbours
    groups = width // k
    hi = along
    r = hi + 8 * width
    shift = r + 8 * width
    wide = shift + 8 * width
    folded = q.foldable != 0 and not is_double(kind)
    weight = 0
    bias = 0
    if folded and q.weight.data != 0:
        weight = at(q.weight, a, b) + c * q.weight.c
    if folded and q.bias.data != 0:
        bias = at(q.bias, a, b) + c * q.bias.c
    any_wide = False
    for g in range(groups):
        mean = read(scale, g, np.float64)
        rstd = read(scale, 2 * groups + g, np.float64)
        lo = (mean - np.float64(real(mean, kind))) + read(scale, groups + g, np.float64)
        for j in range(g * k, g * k + k):
            w = np.float64(read_real(weight + j * q.weight.c, 0, kind)) if weight != 0 else 1.0
            v = np.float64(read_real(bias + j * q.bias.c, 0, kind)) if bias != 0 else 0.0
            write(hi, j, real(mean, kind))
            write(r, j, real(rstd * w, kind))
            write(shift, j, real(v - lo * (rstd * w), kind))
            apart = read(scale, 4 * groups + g, np.float64) != 0.0 or (
                folded and not scalar.holds(rstd * w)
            )
            write(wide, j, 1.0 if apart else 0.0)
            any_wide = any_wide or apart
    return any_wide


@inner
def column_of_row(x, i, along, width, kind):
    """One element of a row, with the scale of its column."""
    hi, r = read_real(along, i, kind), read_real(along + 8 * width, i, kind)
    return scalar.step(load(x, i, kind), hi, r, read_real(along + 16 * width, i, kind))


@inner
def step_row(x, y, n, along, width, weight, bias, wv, bv, kind, to):
    """The step of a row, one scale for each column."""
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
    """The folded step of a row of floats, and what is beside it."""
    size = size_of(kind)
    n = width * size // 64 * 64
    hi, r, shift = along, along + 8 * width, along + 16 * width
    if past:
        if e != 0 and q.relu:
            step_lines(x, y, n, hi, r, shift, None, None, e, 1, AHEAD, 1)
        elif e != 0:
            step_lines(x, y, n, hi, r, shift, None, None, e, None, AHEAD, 1)
        elif q.relu:
            step_lines(x, y, n, hi, r, shift, None, None, None, 1, AHEAD, 1)
        else:
            step_lines(x, y, n, hi, r, shift, None, None, None, None, AHEAD, 1)
        return
    if e != 0 and q.relu:
        step_lines(x, y, n, hi, r, shift, None, None, e, 1, None, None)
    elif e != 0:
        step_lines(x, y, n, hi, r, shift, None, None, e, None, None, None)
    elif q.relu:
        step_lines(x, y, n, hi, r, shift, None, None, None, 1, None, None)
    else:
        step_lines(x, y, n, hi, r, shift, None, None, None, None, None, None)
    for i in range(n // size, width):
        t = column_of_row(x, i, along, width, kind)
        if e != 0:
            t = real(t + load(e, i, kind), kind)
        if q.relu:
            t = real(scalar.relu(t), kind)
        store(y, i, t, kind)


@inner
def columns_step(q, a, b, c, width, piece, scale, along, any_wide, tile, spare, kind, tiled):
    """The step of a piece of each group of an item."""
    k = q.neighbours
    groups = width // k
    source = q.total if q.total.data != 0 else q.x
    span = max(q.block, PIECE_ROWS - PIECE_ROWS % q.block)
    first = piece * span
    last = min(first + span, q.length)
    affined = (q.foldable == 0 or is_double(kind)) and not q.activation_first
    wv = 1 if q.weight.c != 0 else 0
    bv = 1 if q.bias.c != 0 else 0
    folded = q.foldable != 0 and size_of(kind) == 4 and not any_wide
    folded = folded and (q.activation == 0 or q.relu != 0)
    p = first // q.s
    t = first - p * q.s
    for _ in range(first, last):
        if t == q.s:
            p, t = p + 1, 0
        x = at(source, a, b) + c * source.c + p * source.p + t * source.s
        y = at(q.y, a, b) + c * q.y.c + p * q.y.p + t * q.y.s
        weight = 0
        bias = 0
        if q.weight.data != 0:
            weight = at(q.weight, a, b) + c * q.weight.c + p * q.weight.p + t * q.weight.s
        if q.bias.data != 0:
            bias = at(q.bias, a, b) + c * q.bias.c + p * q.bias.p + t * q.bias.s
        w = weight if affined else 0
        v = bias if affined else 0
        if q.plain and not any_wide:
            step_row(x, y, width, along, width, w, v, wv, bv, kind, kind)
            t += 1
            continue
        residual = 0
        if q.residual.data != 0:
            residual = at(q.residual, a, b) + c * q.residual.c + p * q.residual.p + t * q.residual.s
        t += 1
        if folded and (q.stream == 0 or (y | (width * size_of(kind))) % 64 == 0):
            row_folded(q, x, y, residual, along, width, q.stream != 0, kind)
            continue
        target = y if q.direct else tile
        step_row(x, target, width, along, width, w, v, wv, bv, kind, tiled)
        if any_wide:
            w = 0 if q.activation_first else weight
            v = 0 if q.activation_first else bias
            for j in range(width):
                s = scale + 8 * (j // k)
                if read(along + 24 * width, j, np.float64) != 0.0:
                    steps_wide(
                        x + j * source.c,
                        target + j * (8 if is_double(kind) else 4),
                        1,
                        read(s, 0, np.float64),
                        read(s, groups, np.float64),
                        read(s, 2 * groups, np.float64),
                        read(s, 3 * groups, np.float64),
                        0 if w == 0 else w + j * q.weight.c,
                        0 if v == 0 else v + j * q.bias.c,
                        0,
                        0,
                        kind,
                        tiled,
                    )
        if q.residual.data != 0:
            add(target, residual, width, q.residual_real != 0, kind)
        if q.activation != 0:
            call(q.activation, target, width)
        if q.activation_first:
            affine(target, weight, bias, wv, bv, width, kind)
        if not q.direct:
            deliver(tile, spare, y, width, q.stream != 0, kind)


def columns_room(width):
    """Bytes that a thread needs."""
    return 8 * (FIELDS * width * 4 + SCALE * width + 3 * width + 4 * width + 2 * width + 16)


@inner
def columns(record, memory, turn, turns, task, kind, tiled):
    """What `task` asks for, of all items or pieces of items; each turn is taken by one thread."""
    q = record_at(record, PASS)
    width = q.width
    total = q.items if task == WHOLE or task == FINISH else q.items * q.pieces
    whole = memory
    part = whole + 8 * FIELDS * width
    other = part + 8 * FIELDS * width
    every = other + 8 * FIELDS * width
    own = every + 8 * FIELDS * width
    work = own + 8 * SCALE * width
    along = work + 8 * 3 * width
    tile = along + 8 * 4 * width
    tile += -tile % 64
    spare = tile + 8 * width
    while turn < turns:
        for i in range(total * turn // turns, total * (turn + 1) // turns):
            item = i if task == WHOLE or task == FINISH else i // q.pieces
            outer = item // q.chunks
            c = (item - outer * q.chunks) * width
            a = outer // q.b
            b = outer - a * q.b
            n = min(width, q.c - c)
            groups = n // q.neighbours
            scale = own
            if task == MOMENTS:
                into = q.parts + i * 8 * FIELDS * width
                columns_moments(q, a, b, c, n, i - item * q.pieces, into, part, every, work, kind)
                continue
            if q.scales != 0:
                scale = q.scales + item * 8 * SCALE * width
            if task == FINISH:
                merged = q.parts + item * q.pieces * 8 * FIELDS * width
                if not q.given:
                    for piece in range(1, q.pieces):
                        merge_into(merged, merged + piece * 8 * FIELDS * width, groups, groups)
                finish(q, a, b, c, groups, merged, scale, kind)
                continue
            if task == WHOLE:
                if not q.given:
                    columns_moments(q, a, b, c, n, 0, whole, part, every, work, kind)
                    for piece in range(1, q.pieces):
                        columns_moments(q, a, b, c, n, piece, other, part, every, work, kind)
                        merge_into(whole, other, groups, groups)
                finish(q, a, b, c, groups, whole, scale, kind)
            if q.y.data != 0:
                any_wide = spread(q, a, b, c, n, scale, along, kind)
                begin = 0 if task == WHOLE else i - item * q.pieces
                end = q.pieces if task == WHOLE else begin + 1
                for piece in range(begin, end):
                    columns_step(
                        q, a, b, c, n, piece, scale, along, any_wide, tile, spare, kind, tiled
                    )
        turn = take(record)
    if q.stream:
        fence()


# --- The kernels ----------------------------------------------------------------------------------
# Closures over a kind: Numba keeps each on disk under its own key, and `SOURCES` makes that another
# when a file it was compiled from has changed.


def compile_runs(kind: type, computed: type, sources: int) -> Any:
    """The kernel of runs, for numbers of a kind."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_runs(record, memory, turn, turns, task):
        if sources != 0:
            runs(record, memory, turn, turns, task, kind, computed)

    return kernel_of_runs


def compile_columns(kind: type, computed: type, sources: int) -> Any:
    """The kernel of columns, for numbers of a kind."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_columns(record, memory, turn, turns, task):
        if sources != 0:
            columns(record, memory, turn, turns, task, kind, computed)

    return kernel_of_columns
