"""The kernels for the GPU: sums over groups, and the step from x to y or from dy to dx.

A pass comes as `layout.describe` has it: kept (a, b), reduced (p, s), columns c, and the strides
of every operand. A *chunk* is what 16 bytes of x hold; a thread takes one at a time, with one load
where the addresses allow it. A group is summed by a team of threads, or in parts by several blocks;
parts are merged in order by `scalar.merge`. Which thread adds what depends on the shape alone.

Within a team, x - pivot and its square are summed in float64, as in the Cython kernels: threads
that have a pivot in common only add, where each merge would divide. A float32 costs two additions
and a conversion for its 8 bytes of memory, read and written. Sums of pairs of floats would take ten
operations, and would gain where doubles are slow, which is not on the GPUs of data centres. Doubles
are summed twice, the second time about their mean, and their squares with what rounding lost.

All in one file: the simulator finds `cuda` in the globals of the kernel alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numba import types

from fastnorm._numba.gpu_package import (
    SIMULATED,
    arithmetic,
    cuda,
    device,
    double_of,
    kernel,
    load_words,
    reader,
    scalar_function,
    store_words,
    words_of,
    writer,
)

Function = Callable[..., Any]

# --- How work is cut ------------------------------------------------------------------------------

# threads of a warp and of a block; every one of the simulator's is a thread of Python's
WARP, BLOCK = (8, 16) if SIMULATED else (32, 256)
LANES = 2 if SIMULATED else 8  # neighbouring chunks, 128 bytes of a row of columns
ROWS = BLOCK // LANES  # rows that a block of columns has under way
CHUNK = 16  # bytes
SHORT = 256  # chunks of a group that a warp sums alone
PART = 4096  # chunks of a part of a larger group, at least
PART_ROWS = 256  # rows of a part of columns, at least
MOST_PARTS = 1024
MOST_ROW_PARTS = 256  # of columns

# What a plan holds: five dimensions, how many columns share a statistic, five strides per operand.
A, B, P, S, C, NEIGHBOURS, STRIDES = range(7)
(X, Y, OTHER, TOTAL, MASK, WEIGHT, BIAS, STATS) = range(8)
OPERANDS = 8


def depth_of(width: int) -> int:
    """How many chunks a thread asks for before it adds up the first: so that many bytes are due."""
    return min(4, 16 // width)


PARTIAL = 6  # numbers of a part: count, mean, its rest, M2, its rest, unit
SCALE = 4  # numbers of a group: mean, its rest, rstd, unit

# Doubles whose squares leave the range are taken times a power of two.
LARGE, SMALL = 2.0**400, 2.0**-400
SHRINK, GROW = 2.0**-600, 2.0**600

# How a group's statistics become its scale: `description.Scaling`.
NORM, FACTOR = 1, 2

read_word, read_byte, read_double = reader(np.int64), reader(np.uint8), reader(np.float64)
write_double = writer(np.float64)
fma, step = arithmetic.fma, arithmetic.step
two_sum, merge = arithmetic.two_sum, arithmetic.merge
moments_of_sums, inverse_root = arithmetic.moments_of_sums, arithmetic.inverse_root
holds = arithmetic.holds


@device
def lesser(a: Any, b: Any) -> Any:
    """The lesser of two: `min` of two numbers fails to compile for Numba's own `cuda` (0.68)."""
    return a if a < b else b


@device
def greater(a: Any, b: Any) -> Any:
    """The greater of two."""
    return a if a > b else b


# --- Numbers in memory ----------------------------------------------------------------------------

# dtype: how it lies in memory, and what makes a float32 of it and back
_BITS = {
    "float16": (arithmetic.from_f16, arithmetic.to_f16),
    "bfloat16": (arithmetic.from_bf16, arithmetic.to_bf16),
}


def size_of(kind: str) -> int:
    """Bytes of a number of this dtype."""
    return 2 if kind in _BITS else np.dtype(kind).itemsize


def computing(kind: str) -> Any:
    """What a dtype is computed in: float32, or float64 for float64 and for integers."""
    return np.float32 if kind in (*_BITS, "float32") else np.float64


@cache
def loader(kind: str, real: Any) -> Function:
    """A function (address, index) that reads a number of this dtype as a `real`."""
    if kind in _BITS:
        bits, convert = reader(np.uint16), _BITS[kind][0]
        return device(lambda address, index: real(convert(bits(address, index))))
    stored: Any = np.uint8 if kind == "bool" else np.dtype(kind).type
    number = reader(stored)
    return device(lambda address, index: real(number(address, index)))


@cache
def storer(kind: str) -> Function:
    """A function (address, index, value) that rounds a number to this dtype and writes it."""
    if kind in _BITS:
        bits, convert = writer(np.uint16), _BITS[kind][1]
        single = np.float32
        return device(lambda address, index, value: bits(address, index, convert(single(value))))
    real: Any = np.dtype(kind).type
    number = writer(real)
    return device(lambda address, index, value: number(address, index, real(value)))


@cache
def chunk_loader(kind: str, real: Any, width: int) -> Function:
    """A function (address, index, n, aligned, into, first) that reads n of `width` numbers.

    They go to into[first], ...; 16 bytes at a time where `aligned` and the chunk is a whole one.
    """
    load = loader(kind, real)
    size = size_of(kind)
    words = width * size // CHUNK
    if kind in _BITS:
        convert = _BITS[kind][0]

        @device
        def load_aligned(address: Any, into: Any, first: Any) -> None:
            for i in range(words):
                four = load_words(address + CHUNK * i)
                for k in range(4):
                    into[first + 8 * i + 2 * k] = real(
                        convert(np.uint16(four[k] & np.uint32(0xFFFF)))
                    )
                    into[first + 8 * i + 2 * k + 1] = real(
                        convert(np.uint16(four[k] >> np.uint32(16)))
                    )

    elif kind == "float32":

        @device
        def load_aligned(address: Any, into: Any, first: Any) -> None:
            for i in range(words):
                four = load_words(address + CHUNK * i)
                for k in range(4):
                    into[first + 4 * i + k] = real(four[k].view(np.float32))

    elif kind == "float64":

        @device
        def load_aligned(address: Any, into: Any, first: Any) -> None:
            for i in range(words):
                four = load_words(address + CHUNK * i)
                into[first + 2 * i] = real(double_of(four[0], four[1]))
                into[first + 2 * i + 1] = real(double_of(four[2], four[3]))

    else:
        words = 0
        load_aligned = device(lambda address, into, first: None)

    whole = words * CHUNK == width * size and words > 0

    @device
    def load_chunk(
        address: Any, index: Any, n: Any, aligned: Any, into: Any, first: Any
    ) -> None:  # fmt: skip
        if whole and aligned and n == width:
            load_aligned(address + index * size, into, first)
        else:
            for k in range(width):
                into[first + k] = load(address, index + k) if k < n else real(0)

    return load_chunk


@cache
def chunk_storer(kind: str, width: int) -> Function:
    """A function (address, index, n, aligned, values) that writes n of `width` numbers."""
    store = storer(kind)
    size = size_of(kind)
    if kind in _BITS:
        convert = _BITS[kind][1]

        @device
        def pair(low: Any, high: Any) -> Any:
            high_bits = np.uint32(np.uint32(convert(high)) << np.uint32(16))
            return np.uint32(np.uint32(convert(low)) | high_bits)

        @device
        def store_aligned(address: Any, v: Any) -> None:
            a, b = pair(v[0], v[1]), pair(v[2], v[3])
            store_words(address, a, b, pair(v[4], v[5]), pair(v[6], v[7]))

    elif kind == "float32":

        @device
        def store_aligned(address: Any, v: Any) -> None:
            a, b = v[0].view(np.uint32), v[1].view(np.uint32)
            store_words(address, a, b, v[2].view(np.uint32), v[3].view(np.uint32))

    else:

        @device
        def store_aligned(address: Any, v: Any) -> None:
            a, b = words_of(v[0])
            c, d = words_of(v[1])
            store_words(address, a, b, c, d)

    @device
    def store_chunk(address: Any, index: Any, n: Any, aligned: Any, values: Any) -> None:
        if aligned and n == width:
            store_aligned(address + index * size, values)
        else:
            for k in range(width):
                if k < n:
                    store(address, index + k, values[k])

    return store_chunk


@device
def divided(n: Any, by: Any) -> Any:
    """Quotient and remainder, without a division where there is nothing to divide."""
    if n < by:
        return np.int64(0), np.int64(n)
    quotient = np.int64(n) // np.int64(by)
    return quotient, np.int64(n) - quotient * np.int64(by)


@device
def onward(row: Any, col: Any, cols: Any) -> Any:
    """(row, col) where col may have passed the end of a row by less than a row."""
    if col >= cols:
        return row + 1, col - cols
    return row, col


@cache
def run_fetcher(kind: str, real: Any, width: int, depth: int, team: int) -> Function:
    """A function that reads a thread's next `depth` chunks of runs of s numbers, `step` apart.

    (address, step, row, col, cols, s, i, high, aligned, into): of chunks i, i + team, ... < high.
    All loads come before the first use, so that enough bytes are under way.
    """
    load_chunk = chunk_loader(kind, real, width)

    @device
    def fetch(
        address: Any, step: Any, row: Any, col: Any, cols: Any, s: Any, i: Any, high: Any,
        aligned: Any, into: Any,
    ) -> None:  # fmt: skip
        rows, jump = divided(team, cols)
        for j in range(depth):
            if i < high:
                start = col * width
                n = lesser(np.int64(width), s - start)
                load_chunk(address, row * step + start, n, aligned, into, j * width)
            i += team
            row, col = onward(row + rows, col + jump, cols)

    return fetch


@cache
def column_fetcher(kind: str, real: Any, width: int, depth: int) -> Function:
    """The same for chunks of columns: rows i, i + ROWS, ... < high, as (p, s)."""
    load_chunk = chunk_loader(kind, real, width)

    @device
    def fetch(
        address: Any, p_step: Any, s_step: Any, s: Any, i: Any, high: Any, n: Any, aligned: Any,
        into: Any,
    ) -> None:  # fmt: skip
        for j in range(depth):
            if i < high:
                p, q = divided(i, s)
                load_chunk(address, p * p_step + q * s_step, n, aligned, into, j * width)
            i += ROWS

    return fetch


@device
def base(plan: Any, operand: Any, a: Any, b: Any) -> Any:
    """Elements from an operand's first to that of group (a, b)."""
    at = STRIDES + 5 * operand
    return a * read_word(plan, at + A) + b * read_word(plan, at + B)


@device
def stride(plan: Any, operand: Any, axis: Any) -> Any:
    """Elements from one index along an axis to the next."""
    return read_word(plan, STRIDES + 5 * operand + axis)


# --- Sums of a team -------------------------------------------------------------------------------


@cache
def team_sums(team: int) -> Function:
    """Sums (first, second, rest of second, third) over a team; every thread gets them.

    By shuffles within a warp, then over warps in their order. `lane` counts a team's threads,
    `offset` is where its own `scratch` begins.
    """
    if SIMULATED:

        def total_in_turn(
            first: Any, second: Any, rest: Any, third: Any, scratch: Any, offset: int, lane: int
        ) -> Any:
            for row, value in enumerate((first, second, rest, third)):
                scratch[row, offset + lane] = value
            cuda.syncthreads()
            if lane == 0:
                mine = slice(offset, offset + team)
                scratch[0, offset], scratch[3, offset] = (scratch[r, mine].sum() for r in (0, 3))
                whole, lost = 0.0, scratch[2, mine].sum()
                for value in scratch[1, mine]:
                    whole, left = two_sum(whole, value)
                    lost += left
                scratch[1, offset], scratch[2, offset] = whole, lost
            cuda.syncthreads()
            result = tuple(scratch[row, offset] for row in range(4))
            cuda.syncthreads()
            return result

        return total_in_turn

    warps = team // WARP

    @device
    def total(
        first: Any, second: Any, rest: Any, third: Any, scratch: Any, offset: Any, lane: Any
    ) -> Any:
        distance = 16
        while distance > 0:
            first += cuda.shfl_xor_sync(0xFFFFFFFF, first, distance)
            third += cuda.shfl_xor_sync(0xFFFFFFFF, third, distance)
            rest += cuda.shfl_xor_sync(0xFFFFFFFF, rest, distance)
            second, lost = two_sum(second, cuda.shfl_xor_sync(0xFFFFFFFF, second, distance))
            rest += lost
            distance //= 2
        if warps > 1:
            if lane % WARP == 0:
                warp = lane // WARP
                scratch[0, warp] = first
                scratch[1, warp] = second
                scratch[2, warp] = rest
                scratch[3, warp] = third
            cuda.syncthreads()
            first = third = 0.0
            second = rest = 0.0
            for warp in range(warps):
                first += scratch[0, warp]
                third += scratch[3, warp]
                second, lost = two_sum(second, scratch[1, warp])
                rest += scratch[2, warp] + lost
            cuda.syncthreads()
        return first, second, rest, third

    return total


@cache
def team_extent(team: int) -> Function:
    """The least and the largest number over a team."""
    if SIMULATED:

        def extent_in_turn(low: Any, high: Any, scratch: Any, offset: int, lane: int) -> Any:
            scratch[0, offset + lane], scratch[1, offset + lane] = low, high
            cuda.syncthreads()
            low = scratch[0, offset : offset + team].min()
            high = scratch[1, offset : offset + team].max()
            cuda.syncthreads()
            return low, high

        return extent_in_turn

    warps = team // WARP

    @device
    def extent(low: Any, high: Any, scratch: Any, offset: Any, lane: Any) -> Any:
        distance = 16
        while distance > 0:
            low = lesser(low, cuda.shfl_xor_sync(0xFFFFFFFF, low, distance))
            high = greater(high, cuda.shfl_xor_sync(0xFFFFFFFF, high, distance))
            distance //= 2
        if warps > 1:
            if lane % WARP == 0:
                scratch[0, lane // WARP] = low
                scratch[1, lane // WARP] = high
            cuda.syncthreads()
            for warp in range(warps):
                low = lesser(low, scratch[0, warp])
                high = greater(high, scratch[1, warp])
            cuda.syncthreads()
        return low, high

    return extent


@device
def unit_of(low: Any, high: Any) -> Any:
    """The power of two to take numbers between these times, so that their squares stay in range."""
    largest = greater(abs(low), abs(high))
    if largest > LARGE and largest < math.inf:
        return SHRINK
    if largest < SMALL and largest > 0.0:
        return GROW
    return 1.0


@device
def pivot_of(low: Any, high: Any, unit: Any) -> Any:
    """A number of the group, so that a constant one has just its mean; 0 if some are infinite."""
    return high * unit if abs(low) < math.inf and abs(high) < math.inf else 0.0


@device
def counted(chunks: Any, cols: Any, s: Any, width: Any) -> Any:
    """How many numbers the first so many chunks hold, with `cols` to a run of s numbers."""
    row, col = divided(chunks, cols)
    return row * s + lesser(col * width, s)


# --- From moments to a scale ----------------------------------------------------------------------


@device
def scale_of(
    count: Any, mean: Any, m2: Any, m2_rest: Any, unit: Any, eps: Any, scaling: Any
) -> Any:
    """(mean, var, rstd) from moments of numbers times `unit`; rstd of var to twice the digits."""
    if count == 0.0:  # of no elements: not a number
        return math.nan, math.nan, math.nan
    var = m2 / count
    if scaling == NORM:
        rstd = inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
        if math.sqrt(m2) < eps * unit:
            rstd = 1.0 / (eps * unit)
        return mean, var, rstd
    shift = (eps * unit) * unit
    v = var + shift
    rest = (fma(-var, count, m2) + m2_rest) / count + ((var - v) + shift)
    if shift == math.inf:  # the variance is nothing beside eps
        return mean, var, inverse_root(eps, 0.0) / unit
    # a constant group with eps = 0 is all bias: its scale is 0, not infinity
    return mean, var, inverse_root(v, rest) if v != 0.0 else 0.0


@device
def statistic(plan: Any, operand: Any, group: Any) -> Any:
    """Where what an operand has for a group, counted in the order (a, b, c), lies."""
    per_row = read_word(plan, C) // read_word(plan, NEIGHBOURS)
    outer, c = divided(group, per_row)
    a, b = divided(outer, read_word(plan, B))
    return base(plan, operand, a, b) + c * stride(plan, operand, C)


@device
def write_scale(
    scale: Any, group: Any, at: Any, mean: Any, rest: Any, var: Any, rstd: Any, unit: Any,
    means: Any, variances: Any, rstds: Any,
) -> None:  # fmt: skip
    """A group's statistics for the caller, and for the step where `scale` is an address."""
    if scale != 0:
        write_double(scale, SCALE * group, mean)
        write_double(scale, SCALE * group + 1, rest)
        write_double(scale, SCALE * group + 2, rstd)
        write_double(scale, SCALE * group + 3, unit)
    write_double(means, at, mean / unit)
    write_double(variances, at, var / unit / unit)
    write_double(rstds, at, rstd * unit)


@cache
def merge_parts(lanes: int, double: bool) -> Any:
    """The kernel that merges the moments of a group's parts: `lanes` threads to a group."""
    teams = BLOCK // lanes

    @kernel
    def merge_kernel(
        plan: Any, groups: Any, parts: Any, partial: Any, eps: Any, scaling: Any, scale: Any,
        means: Any, variances: Any, rstds: Any,
    ) -> None:  # fmt: skip
        scratch = cuda.shared.array((BLOCK, PARTIAL), types.float64)
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % lanes
        group = np.int64(cuda.blockIdx.x) * teams + tid // lanes
        live = group < groups
        columns = read_word(plan, C)
        near = read_word(plan, NEIGHBOURS)
        outer, c = divided(group, columns // near)
        count = mean = rest = m2 = m2_rest = 0.0
        unit = 1.0
        if live:
            if double:  # the least unit of all, which the others are brought to
                unit = GROW
                for i in range(parts * near):
                    part, k = divided(i, near)
                    at = ((outer * parts + part) * columns + c * near + k) * PARTIAL
                    unit = lesser(unit, read_double(partial, at + 5))
            for i in range(lane, parts * near, lanes):
                part, k = divided(i, near)
                at = ((outer * parts + part) * columns + c * near + k) * PARTIAL
                f = unit / read_double(partial, at + 5)
                count, mean, rest, m2, m2_rest = merge(
                    count, mean, rest, m2, m2_rest,
                    read_double(partial, at),
                    read_double(partial, at + 1) * f,
                    read_double(partial, at + 2) * f,
                    read_double(partial, at + 3) * f * f,
                    read_double(partial, at + 4) * f * f,
                )  # fmt: skip
        if lanes > 1:
            scratch[tid, 0] = count
            scratch[tid, 1] = mean
            scratch[tid, 2] = rest
            scratch[tid, 3] = m2
            scratch[tid, 4] = m2_rest
            cuda.syncthreads()
            if lane == 0:
                for i in range(tid + 1, tid + lanes):
                    count, mean, rest, m2, m2_rest = merge(
                        count, mean, rest, m2, m2_rest,
                        scratch[i, 0], scratch[i, 1], scratch[i, 2], scratch[i, 3], scratch[i, 4],
                    )  # fmt: skip
        if live and lane == 0:
            mean, var, rstd = scale_of(count, mean, m2, m2_rest, unit, eps, scaling)
            at = statistic(plan, STATS, group)
            write_scale(
                scale, group, at, mean, rest, var, rstd, unit, means, variances, rstds
            )  # fmt: skip

    return merge_kernel


@kernel
def given_scale(
    plan: Any, groups: Any, eps: Any, scaling: Any, scale: Any, means: Any, variances: Any,
    rstds: Any,
) -> None:  # fmt: skip
    """The scale of groups whose mean and variance are given."""
    group = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
    if group < groups:
        at = statistic(plan, STATS, group)
        mean, var = read_double(means, at), read_double(variances, at)
        rstd = var
        if scaling != FACTOR:
            rstd = inverse_root(var + eps, 0.0) if var + eps != 0.0 else 0.0
        write_double(scale, SCALE * group, mean)
        write_double(scale, SCALE * group + 1, 0.0)
        write_double(scale, SCALE * group + 2, rstd)
        write_double(scale, SCALE * group + 3, 1.0)
        write_double(rstds, at, rstd)


# --- Activations ----------------------------------------------------------------------------------

_SINGLE = {"silu": "silu32", "gelu": "gelu32", "gelu_tanh": "gelu_tanh32", "tanh": "tanh32"}


@lru_cache(maxsize=256)
def activation_of(activation: Any, real: Any) -> Any:
    """A function real -> real: an activation by its name, or one of the user's own."""
    if activation is None:
        return device(lambda x: x)
    if callable(activation):
        function = scalar_function(activation)
    elif activation == "relu":
        function = arithmetic.relu
    else:
        name = _SINGLE[activation]
        function = getattr(arithmetic, name if real is np.float32 else name[:-2] + "64")
    return device(lambda x: real(function(x)))


# --- The step of one chunk ------------------------------------------------------------------------


@cache
def stepper(kind: str, other: str, activation: Any, first: bool) -> Function:
    """A function that takes a chunk of xhat to y and writes it.

    Affine step, residual, activation; `first` applies the activation before these.
    """
    real = computing(kind)
    parameter = np.dtype(real).name
    width = CHUNK // size_of(kind)
    act = activation_of(activation, real)
    load_other, load_parameter = chunk_loader(other, real, width), loader(parameter, real)
    load_parameters = chunk_loader(parameter, real, width)
    store_chunk = chunk_storer(kind, width)
    before, after = first, not first

    @device
    def parameters(address: Any, at: Any, along: Any, n: Any, aligned: Any, into: Any) -> None:
        if along != 0:
            load_parameters(address, at, n, aligned, into, 0)
        else:
            value = load_parameter(address, at)
            for k in range(width):
                into[k] = value

    @device
    def finish(
        v: Any, w: Any, y: Any, y_at: Any, other: Any, other_at: Any, weight: Any, weight_at: Any,
        weight_along: Any, bias: Any, bias_at: Any, bias_along: Any, n: Any, aligned: Any,
    ) -> None:  # fmt: skip
        if before:
            for k in range(width):
                v[k] = act(v[k])
        if weight != 0:
            parameters(weight, weight_at, weight_along, n, aligned, w)
            if bias != 0:
                biases = cuda.local.array(width, real)
                parameters(bias, bias_at, bias_along, n, aligned, biases)
                for k in range(width):
                    v[k] = fma(v[k], w[k], biases[k])
            else:
                for k in range(width):
                    v[k] = real(v[k] * w[k])
        elif bias != 0:
            parameters(bias, bias_at, bias_along, n, aligned, w)
            for k in range(width):
                v[k] = real(v[k] + w[k])
        if other != 0:
            load_other(other, other_at, n, aligned, w, 0)
            for k in range(width):
                v[k] = real(v[k] + w[k])
        if after:
            for k in range(width):
                v[k] = act(v[k])
        store_chunk(y, y_at, n, aligned, v)

    return finish


# --- Forward, runs --------------------------------------------------------------------------------

WHOLE, SUMS, STEP = range(3)  # sums and step at once, sums of parts, step with a scale given


@cache
def runs(kind: str, other: str, team: int, mode: int, activation: Any, first: bool) -> Any:
    """The kernel for groups of runs: one team for each group, or for each part of one."""
    real = computing(kind)
    double = real is np.float64
    size = size_of(kind)
    other_size = size_of(other)
    width = CHUNK // size
    parameter_size = np.dtype(real).itemsize
    load_chunk, store_chunk = chunk_loader(kind, real, width), chunk_storer(kind, width)
    load_other = chunk_loader(other, real, width)
    depth = depth_of(width)
    ahead = depth * width
    fetch = run_fetcher(kind, real, width, depth, team)
    total, extent_of = team_sums(team), team_extent(team)
    finish = stepper(kind, other, activation, first)
    teams = BLOCK // team

    @device
    def add(
        plan: Any, x: Any, xp: Any, other: Any, sums: Any, s: Any, cols: Any, low: Any, high: Any,
        lane: Any, aligned: Any,
    ) -> None:  # fmt: skip
        """x + other, rounded, into `sums`."""
        v = cuda.local.array(width, real)
        w = cuda.local.array(width, real)
        op, tp = stride(plan, OTHER, P), stride(plan, TOTAL, P)
        rows, jump = divided(team, cols)
        row, col = divided(low + lane, cols)
        i = low + lane
        while i < high:
            n = lesser(np.int64(width), s - col * width)
            load_chunk(x, row * xp + col * width, n, aligned, v, 0)
            load_other(other, row * op + col * width, n, aligned, w, 0)
            for k in range(width):
                v[k] = real(v[k] + w[k])
            store_chunk(sums, row * tp + col * width, n, aligned, v)
            i += team
            row, col = onward(row + rows, col + jump, cols)

    @device
    def extent(
        x: Any, xp: Any, mask: Any, mp: Any, ms: Any, s: Any, cols: Any, low: Any, high: Any,
        lane: Any, aligned: Any,
    ) -> Any:  # fmt: skip
        """The least and the largest number that a thread sees."""
        v = cuda.local.array(ahead, real)
        least, most = math.inf, -math.inf
        rows, jump = divided(team, cols)
        row, col = divided(low + lane, cols)
        i = low + lane
        while i < high:
            fetch(x, xp, row, col, cols, s, i, high, aligned, v)
            for j in range(depth):
                start = col * width
                n = lesser(np.int64(width), s - start) if i < high else np.int64(0)
                for k in range(width):
                    if k < n and (mask == 0 or read_byte(mask, row * mp + (start + k) * ms) != 0):
                        number = np.float64(v[j * width + k])
                        least = number if number < least else least
                        most = number if number > most else most
                i += team
                row, col = onward(row + rows, col + jump, cols)
        return least, most

    @device
    def sums_about(
        x: Any, xp: Any, mask: Any, mp: Any, ms: Any, s: Any, cols: Any, low: Any, high: Any,
        lane: Any, aligned: Any, pivot: Any, unit: Any,
    ) -> Any:  # fmt: skip
        """A thread's sums of x - pivot, of its square, what rounding lost of that, and a count."""
        v = cuda.local.array(ahead, real)
        one = second = rest = count = np.float64(0.0)
        rows, jump = divided(team, cols)
        row, col = divided(low + lane, cols)
        i = low + lane
        while i < high:
            fetch(x, xp, row, col, cols, s, i, high, aligned, v)
            for j in range(depth):
                start = col * width
                n = lesser(np.int64(width), s - start) if i < high else np.int64(0)
                for k in range(width):
                    if k < n and (mask == 0 or read_byte(mask, row * mp + (start + k) * ms) != 0):
                        if double:
                            d = v[j * width + k] * unit - pivot
                            square = d * d
                            second, lost = two_sum(second, square)
                            rest += lost + fma(d, d, -square)
                        else:
                            d = np.float64(v[j * width + k]) - pivot
                            second = fma(d, d, second)
                        one += d
                        if mask != 0:
                            count += 1.0
                i += team
                row, col = onward(row + rows, col + jump, cols)
        return one, second, rest, count

    @device
    def step_all(
        plan: Any, x: Any, xp: Any, y: Any, other: Any, weight: Any, bias: Any, s: Any, cols: Any,
        low: Any, high: Any, lane: Any, aligned: Any, mean: Any, rest: Any, rstd: Any, unit: Any,
    ) -> None:  # fmt: skip
        ready = cuda.local.array(width, real)
        v = cuda.local.array(width, real)
        w = cuda.local.array(width, real)
        yp, op = stride(plan, Y, P), stride(plan, OTHER, P)
        wp, ws = stride(plan, WEIGHT, P), stride(plan, WEIGHT, S)
        bp, bs = stride(plan, BIAS, P), stride(plan, BIAS, S)
        hi = real(mean)
        r = real(rstd)
        shift = real(-((mean - np.float64(hi)) + rest) * rstd)
        wide = unit != 1.0 or (not double and not holds(rstd))
        rows, jump = divided(team, cols)
        row, col = divided(low + lane, cols)
        i = low + lane
        if i < high:
            n = lesser(np.int64(width), s - col * width)
            load_chunk(x, row * xp + col * width, n, aligned, ready, 0)
        while i < high:
            for k in range(width):
                if wide:
                    v[k] = real(((np.float64(ready[k]) * unit - mean) - rest) * rstd)
                else:
                    v[k] = step(ready[k], hi, r, shift)
            i += team
            now, start, n = row, col * width, lesser(np.int64(width), s - col * width)
            row, col = onward(row + rows, col + jump, cols)
            if i < high:  # the next chunk is on its way while this one is finished
                ahead_n = lesser(np.int64(width), s - col * width)
                load_chunk(x, row * xp + col * width, ahead_n, aligned, ready, 0)
            finish(
                v, w, y, now * yp + start, other, now * op + start, weight, now * wp + start * ws,
                ws, bias, now * bp + start * bs, bs, n, aligned,
            )  # fmt: skip

    @kernel
    def runs_kernel(
        plan: Any, aligned: Any, groups: Any, parts: Any, per: Any, x: Any, y: Any, other: Any,
        total_at: Any, mask: Any, weight: Any, bias: Any, eps: Any, centred: Any, scaling: Any,
        partial: Any, scale: Any, means: Any, variances: Any, rstds: Any,
    ) -> None:  # fmt: skip
        scratch = cuda.shared.array((4, BLOCK), types.float64)
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % team
        offset = tid - lane
        # every thread takes part in every sum: what is beyond the end has nothing to add
        group, part = divided(np.int64(cuda.blockIdx.x) * teams + tid // team, parts)
        live = group < groups
        a, b = divided(group if live else np.int64(0), read_word(plan, B))
        s = read_word(plan, S)
        cols = (s + (width - 1)) // width
        low = part * per
        high = lesser(low + per, read_word(plan, P) * cols) if live else low
        xp = stride(plan, X, P)
        x += base(plan, X, a, b) * size
        other += base(plan, OTHER, a, b) * other_size if other != 0 else 0
        sums = total_at + base(plan, TOTAL, a, b) * size if total_at != 0 else np.int64(0)
        if mode == STEP and total_at != 0:
            x, xp, other = sums, stride(plan, TOTAL, P), np.int64(0)
        if mode != STEP:
            mp, ms = stride(plan, MASK, P), stride(plan, MASK, S)
            mask += base(plan, MASK, a, b) if mask != 0 else 0
            if total_at != 0:
                add(plan, x, xp, other, sums, s, cols, low, high, lane, aligned)
                # each thread reads what it wrote itself
                x, xp, other = sums, stride(plan, TOTAL, P), np.int64(0)
            pivot, unit = 0.0, 1.0
            if double:
                least, most = extent(x, xp, mask, mp, ms, s, cols, low, high, lane, aligned)
                least, most = extent_of(least, most, scratch, offset, lane)
                unit = unit_of(least, most)
                pivot = pivot_of(least, most, unit) if centred else 0.0
            one, second, left, count = sums_about(
                x, xp, mask, mp, ms, s, cols, low, high, lane, aligned, pivot, unit
            )
            one, second, left, count = total(one, second, left, count, scratch, offset, lane)
            if mask == 0:
                count = np.float64(counted(high, cols, s, width) - counted(low, cols, s, width))
            mean = rest = m2_rest = np.float64(0.0)
            m2 = second + left
            if centred:
                mean, rest, m2, again = moments_of_sums(count, one, m2, pivot)
                if (double or again) and abs(mean) < math.inf:  # beside an infinity it is that
                    pivot = mean
                    one, second, left, number = sums_about(
                        x, xp, mask, mp, ms, s, cols, low, high, lane, aligned, pivot, unit
                    )
                    one, second, left, number = total(
                        one, second, left, number, scratch, offset, lane
                    )
                    mean, rest, m2, again = moments_of_sums(count, one, second + left, pivot)
            if mode == SUMS:
                if live and lane == 0:
                    at = (group * parts + part) * PARTIAL
                    write_double(partial, at, count)
                    write_double(partial, at + 1, mean)
                    write_double(partial, at + 2, rest)
                    write_double(partial, at + 3, m2)
                    write_double(partial, at + 4, m2_rest)
                    write_double(partial, at + 5, unit)
            else:
                mean, var, rstd = scale_of(count, mean, m2, m2_rest, unit, eps, scaling)
                if live and lane == 0:
                    at = statistic(plan, STATS, group)
                    write_scale(
                        np.int64(0), group, at, mean, rest, var, rstd, unit, means, variances, rstds
                    )
        else:
            at = (group if live else np.int64(0)) * SCALE
            mean, rest = read_double(scale, at), read_double(scale, at + 1)
            rstd, unit = read_double(scale, at + 2), read_double(scale, at + 3)
        if mode != SUMS and y != 0:
            y += base(plan, Y, a, b) * size
            weight += base(plan, WEIGHT, a, b) * parameter_size if weight != 0 else 0
            bias += base(plan, BIAS, a, b) * parameter_size if bias != 0 else 0
            step_all(
                plan, x, xp, y, other, weight, bias, s, cols, low, high, lane, aligned, mean, rest,
                rstd, unit,
            )  # fmt: skip

    return runs_kernel


# --- Forward, columns -----------------------------------------------------------------------------


@device
def tile_of(plan: Any, parts: Any, width: Any) -> Any:
    """(a, b, part, first column) of this block: LANES chunks of columns, some of the rows."""
    tiles = (read_word(plan, C) + (LANES * width - 1)) // (LANES * width)
    rest, tile = divided(np.int64(cuda.blockIdx.x), tiles)
    outer, part = divided(rest, parts)
    a, b = divided(outer, read_word(plan, B))
    return a, b, part, tile * LANES * width


@cache
def column_totals(width: int) -> Function:
    """Sums over a block's rows of what each thread has for its `width` columns, in their order.

    Threads 0, 1, ... get those of the block's columns.
    """
    across = LANES * width

    @device
    def totals(values: Any, shared: Any, tid: Any) -> Any:
        for k in range(width):
            shared[tid * width + k] = values[k]
        cuda.syncthreads()
        whole = np.float64(0.0)
        if tid < across:
            for row in range(ROWS):
                whole += shared[row * across + tid]
        cuda.syncthreads()
        return whole

    return totals


@cache
def column_extents(width: int) -> Function:
    """The least and the largest of each of a block's columns, likewise."""
    across = LANES * width

    @device
    def extents(least: Any, most: Any, shared: Any, tid: Any) -> Any:
        low, high = math.inf, -math.inf
        for k in range(width):
            shared[tid * width + k] = least[k]
        cuda.syncthreads()
        if tid < across:
            for row in range(ROWS):
                low = lesser(low, shared[row * across + tid])
        cuda.syncthreads()
        for k in range(width):
            shared[tid * width + k] = most[k]
        cuda.syncthreads()
        if tid < across:
            for row in range(ROWS):
                high = greater(high, shared[row * across + tid])
        cuda.syncthreads()
        return low, high

    return extents


@cache
def column_moments(kind: str) -> Any:
    """The kernel that writes the moments of each column, over some of the rows."""
    real = computing(kind)
    double = real is np.float64
    size = size_of(kind)
    width = CHUNK // size
    across = LANES * width
    depth = depth_of(width)
    ahead = depth * width
    fetch = column_fetcher(kind, real, width, depth)
    totals, extents_of = column_totals(width), column_extents(width)
    shared_size = BLOCK * width

    @device
    def extents(
        plan: Any, x: Any, mask: Any, n: Any, low: Any, high: Any, aligned: Any, least: Any,
        most: Any,
    ) -> None:  # fmt: skip
        v = cuda.local.array(ahead, real)
        for k in range(width):
            least[k], most[k] = math.inf, -math.inf
        xp, xs = stride(plan, X, P), stride(plan, X, S)
        mp, ms, mc = stride(plan, MASK, P), stride(plan, MASK, S), stride(plan, MASK, C)
        s = read_word(plan, S)
        while low < high:
            fetch(x, xp, xs, s, low, high, n, aligned, v)
            for j in range(depth):
                p, q = divided(low, s)
                for k in range(width):
                    if (low < high and k < n) and (
                        mask == 0 or read_byte(mask, p * mp + q * ms + k * mc) != 0
                    ):
                        number = np.float64(v[j * width + k])
                        least[k] = number if number < least[k] else least[k]
                        most[k] = number if number > most[k] else most[k]
                low += ROWS

    @device
    def sums_about(
        plan: Any, x: Any, mask: Any, n: Any, low: Any, high: Any, aligned: Any, pivots: Any,
        units: Any, one: Any, second: Any, rest: Any, count: Any,
    ) -> None:  # fmt: skip
        """For each of a thread's columns what `runs` sums for one group."""
        v = cuda.local.array(ahead, real)
        for k in range(width):
            one[k] = second[k] = rest[k] = count[k] = np.float64(0.0)
        xp, xs = stride(plan, X, P), stride(plan, X, S)
        mp, ms, mc = stride(plan, MASK, P), stride(plan, MASK, S), stride(plan, MASK, C)
        s = read_word(plan, S)
        while low < high:
            fetch(x, xp, xs, s, low, high, n, aligned, v)
            for j in range(depth):
                p, q = divided(low, s)
                for k in range(width):
                    if (low < high and k < n) and (
                        mask == 0 or read_byte(mask, p * mp + q * ms + k * mc) != 0
                    ):
                        if double:
                            d = v[j * width + k] * units[k] - pivots[k]
                            square = d * d
                            second[k], lost = two_sum(second[k], square)
                            rest[k] += lost + fma(d, d, -square)
                        else:
                            d = np.float64(v[j * width + k]) - pivots[k]
                            second[k] = fma(d, d, second[k])
                        one[k] += d
                        if mask != 0:
                            count[k] += 1.0
                low += ROWS

    @device
    def spread(value: Any, shared: Any, tid: Any, first: Any, into: Any) -> None:
        """What the threads have for a block's columns, to those that add these columns."""
        if tid < across:
            shared[tid] = value
        cuda.syncthreads()
        for k in range(width):
            into[k] = shared[first + k]
        cuda.syncthreads()

    @kernel
    def moments_kernel(
        plan: Any, aligned: Any, parts: Any, per: Any, x: Any, mask: Any, centred: Any,
        partial: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(shared_size, types.float64)
        tid = np.int64(cuda.threadIdx.x)
        first = tid % LANES * width
        a, b, part, column = tile_of(plan, parts, width)
        columns = read_word(plan, C)
        n = greater(np.int64(0), lesser(np.int64(width), columns - column - first))
        low, high = part * per, lesser(part * per + per, read_word(plan, P) * read_word(plan, S))
        start = low + tid // LANES
        at = column + first if n > 0 else np.int64(0)
        x += (base(plan, X, a, b) + at) * size
        mask += base(plan, MASK, a, b) + at * stride(plan, MASK, C) if mask != 0 else 0
        pivots = cuda.local.array(width, types.float64)
        units = cuda.local.array(width, types.float64)
        one = cuda.local.array(width, types.float64)
        second = cuda.local.array(width, types.float64)
        left = cuda.local.array(width, types.float64)
        counts = cuda.local.array(width, types.float64)
        pivot: Any = np.float64(0.0)
        unit: Any = np.float64(1.0)
        for k in range(width):
            pivots[k], units[k] = pivot, unit
        if double:
            extents(plan, x, mask, n, start, high, aligned, one, second)
            least, most = extents_of(one, second, shared, tid)
            unit = unit_of(least, most)
            pivot = pivot_of(least, most, unit) if centred else 0.0
            spread(unit, shared, tid, first, units)
            spread(pivot, shared, tid, first, pivots)
        sums_about(plan, x, mask, n, start, high, aligned, pivots, units, one, second, left, counts)
        count = np.float64(high - low)
        if mask != 0:
            count = totals(counts, shared, tid)
        total = totals(one, shared, tid)
        m2 = totals(second, shared, tid)
        if double:
            m2 += totals(left, shared, tid)
        mean = rest = np.float64(0.0)
        if centred:
            square = m2
            mean, rest, m2, again = moments_of_sums(count, total, square, pivot)
            mine = tid < across and column + tid < columns
            if cuda.syncthreads_or(1 if (mine and again) or double else 0):
                # a column's result must not depend on its neighbours: each for itself
                repeated = (again or double) and abs(mean) < math.inf
                pivot = mean if repeated else pivot
                spread(pivot, shared, tid, first, pivots)
                sums_about(
                    plan, x, mask, n, start, high, aligned, pivots, units, one, second, left, counts
                )
                total = totals(one, shared, tid)
                square = totals(second, shared, tid)
                if double:
                    square += totals(left, shared, tid)
                mean, rest, m2, again = moments_of_sums(count, total, square, pivot)
        if tid < across and column + tid < columns:
            at = (((a * read_word(plan, B) + b) * parts + part) * columns + column + tid) * PARTIAL
            write_double(partial, at, count)
            write_double(partial, at + 1, mean)
            write_double(partial, at + 2, rest)
            write_double(partial, at + 3, m2)
            write_double(partial, at + 4, 0.0)
            write_double(partial, at + 5, unit)

    return moments_kernel


@cache
def column_step(kind: str, other: str, activation: Any, first_of_all: bool) -> Any:
    """The kernel for the step of columns."""
    real = computing(kind)
    double = real is np.float64
    size = size_of(kind)
    other_size = size_of(other)
    width = CHUNK // size
    parameter_size = np.dtype(real).itemsize
    load_chunk = chunk_loader(kind, real, width)
    finish = stepper(kind, other, activation, first_of_all)

    @kernel
    def step_kernel(
        plan: Any, aligned: Any, parts: Any, per: Any, x: Any, y: Any, other: Any, weight: Any,
        bias: Any, scale: Any,
    ) -> None:  # fmt: skip
        tid = np.int64(cuda.threadIdx.x)
        first = tid % LANES * width
        a, b, part, column = tile_of(plan, parts, width)
        columns = read_word(plan, C)
        near = read_word(plan, NEIGHBOURS)
        n = lesser(np.int64(width), columns - column - first)
        if n <= 0:
            return
        at = column + first
        low, high = part * per, lesser(part * per + per, read_word(plan, P) * read_word(plan, S))
        x += (base(plan, X, a, b) + at) * size
        y += (base(plan, Y, a, b) + at) * size
        xp, xs = stride(plan, X, P), stride(plan, X, S)
        yp, ys = stride(plan, Y, P), stride(plan, Y, S)
        op, os = stride(plan, OTHER, P), stride(plan, OTHER, S)
        wp, ws, wc = stride(plan, WEIGHT, P), stride(plan, WEIGHT, S), stride(plan, WEIGHT, C)
        bp, bs, bc = stride(plan, BIAS, P), stride(plan, BIAS, S), stride(plan, BIAS, C)
        other += (base(plan, OTHER, a, b) + at) * other_size if other != 0 else 0
        weight += (base(plan, WEIGHT, a, b) + at * wc) * parameter_size if weight != 0 else 0
        bias += (base(plan, BIAS, a, b) + at * bc) * parameter_size if bias != 0 else 0
        ready = cuda.local.array(width, real)
        v = cuda.local.array(width, real)
        w = cuda.local.array(width, real)
        hi = cuda.local.array(width, real)
        r = cuda.local.array(width, real)
        shift = cuda.local.array(width, real)
        wide = False
        groups = (a * read_word(plan, B) + b) * (columns // near)
        for k in range(width):
            if k < n:
                group = (groups + divided(at + k, near)[0]) * SCALE
                mean, rest = read_double(scale, group), read_double(scale, group + 1)
                rstd, unit = read_double(scale, group + 2), read_double(scale, group + 3)
                hi[k] = real(mean)
                r[k] = real(rstd)
                shift[k] = real(-((mean - np.float64(hi[k])) + rest) * rstd)
                wide = wide or unit != 1.0 or (not double and not holds(rstd))
            else:
                hi[k] = r[k] = shift[k] = real(0)
        s = read_word(plan, S)
        i = low + tid // LANES
        p, q = divided(i, s)
        if i < high:
            load_chunk(x, p * xp + q * xs, n, aligned, ready, 0)
        while i < high:
            for k in range(width):
                v[k] = step(ready[k], hi[k], r[k], shift[k])
            if wide:
                for k in range(width):
                    # read again: this is rare, and the numbers would take registers always
                    group = (groups + divided(lesser(at + k, columns - 1), near)[0]) * SCALE
                    mean, rest = read_double(scale, group), read_double(scale, group + 1)
                    rstd, unit = read_double(scale, group + 2), read_double(scale, group + 3)
                    if unit != 1.0 or (not double and not holds(rstd)):
                        v[k] = real(((np.float64(ready[k]) * unit - mean) - rest) * rstd)
            y_at, other_at = p * yp + q * ys, p * op + q * os
            weight_at, bias_at = p * wp + q * ws, p * bp + q * bs
            i += ROWS
            p, q = divided(i, s)
            if i < high:  # the next row is on its way while this one is finished
                load_chunk(x, p * xp + q * xs, n, aligned, ready, 0)
            finish(
                v, w, y, y_at, other, other_at, weight, weight_at, wc, bias, bias_at, bc, n, aligned
            )

    return step_kernel


# --- Backward -------------------------------------------------------------------------------------

(BX, BDY, BDX, BWEIGHT, BRSTD, BSUMS) = range(6)  # the operands of a backward plan


@cache
def run_gradients(kind: str, other: str, factor: str, team: int, mode: int) -> Any:
    """The kernel for gradients of groups of runs: sums of g and g xhat, g = weight dy, then dx.

    The sums run in float64 from x - mean on: they are what training adds up.
    """
    real = computing(kind)
    size, other_size, factor_size = size_of(kind), size_of(other), size_of(factor)
    width = CHUNK // size
    load_chunk = chunk_loader(kind, real, width)
    load_slope = chunk_loader(other, real, width)
    load_weight = loader(factor, real)
    load_weights = chunk_loader(factor, real, width)
    depth = 2  # chunks of x and of dy
    ahead = depth * width
    fetch = run_fetcher(kind, real, width, depth, team)
    fetch_slope = run_fetcher(other, real, width, depth, team)
    store_chunk = chunk_storer(kind, width)
    total = team_sums(team)
    teams = BLOCK // team
    slopes = gradient_step(kind)

    @device
    def weights(address: Any, at: Any, along: Any, n: Any, aligned: Any, into: Any) -> None:
        if address == 0:
            for k in range(width):
                into[k] = real(1)
        elif along != 0:
            load_weights(address, at, n, aligned, into, 0)
        else:
            value = load_weight(address, at)
            for k in range(width):
                into[k] = value

    @device
    def sums(
        plan: Any, x: Any, dy: Any, weight: Any, means: Any, rstds: Any, s: Any, cols: Any,
        low: Any, high: Any, lane: Any, aligned: Any,
    ) -> Any:  # fmt: skip
        v = cuda.local.array(ahead, real)
        g = cuda.local.array(ahead, real)
        w = cuda.local.array(width, real)
        xp, dp = stride(plan, BX, P), stride(plan, BDY, P)
        wp, ws = stride(plan, BWEIGHT, P), stride(plan, BWEIGHT, S)
        tp, ts = stride(plan, BRSTD, P), stride(plan, BRSTD, S)
        one = second = np.float64(0.0)
        rows, jump = divided(team, cols)
        row, col = divided(low + lane, cols)
        i = low + lane
        while i < high:
            fetch(x, xp, row, col, cols, s, i, high, aligned, v)
            fetch_slope(dy, dp, row, col, cols, s, i, high, aligned, g)
            for j in range(depth):
                if i < high:
                    start = col * width
                    n = lesser(np.int64(width), s - start)
                    weights(weight, row * wp + start * ws, ws, n, aligned, w)
                    at = row * tp + start * ts
                    rstd = read_double(rstds, at)
                    mean = read_double(means, at) if means != 0 else 0.0
                    for k in range(width):
                        if k < n:
                            if ts != 0 and k > 0:
                                rstd = read_double(rstds, at + k * ts)
                                mean = read_double(means, at + k * ts) if means != 0 else 0.0
                            slope = np.float64(g[j * width + k]) * np.float64(w[k])
                            xhat = (np.float64(v[j * width + k]) - mean) * rstd
                            one += slope
                            second = fma(slope, xhat, second)
                i += team
                row, col = onward(row + rows, col + jump, cols)
        return one, second

    @kernel
    def gradients_kernel(
        plan: Any, aligned: Any, groups: Any, parts: Any, per: Any, x: Any, dy: Any, dx: Any,
        weight: Any, means: Any, rstds: Any, partial: Any, ones: Any, seconds: Any, length: Any,
        weighted: Any,
    ) -> None:  # fmt: skip
        scratch = cuda.shared.array((4, BLOCK), types.float64)
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % team
        group, part = divided(np.int64(cuda.blockIdx.x) * teams + tid // team, parts)
        live = group < groups
        a, b = divided(group if live else np.int64(0), read_word(plan, B))
        s = read_word(plan, S)
        cols = (s + (width - 1)) // width
        low = part * per
        high = lesser(low + per, read_word(plan, P) * cols) if live else low
        x += base(plan, BX, a, b) * size
        dy += base(plan, BDY, a, b) * other_size
        weight += base(plan, BWEIGHT, a, b) * factor_size if weight != 0 else 0
        statistics = base(plan, BRSTD, a, b) * 8
        rstds += statistics
        means += statistics if means != 0 else 0
        one = second = np.float64(0.0)
        if mode != STEP:
            one, second = sums(plan, x, dy, weight, means, rstds, s, cols, low, high, lane, aligned)
            one, second, left, _ = total(one, second, 0.0, 0.0, scratch, tid - lane, lane)
            second += left
        if mode == SUMS:
            if live and lane == 0:
                write_double(partial, (group * parts + part) * 2, one)
                write_double(partial, (group * parts + part) * 2 + 1, second)
        else:
            if mode == STEP and ones != 0:
                at = base(plan, BSUMS, a, b)
                one, second = read_double(ones, at), read_double(seconds, at)
            dx += base(plan, BDX, a, b) * size
            v = cuda.local.array(width, real)
            g = cuda.local.array(width, real)
            w = cuda.local.array(width, real)
            xp, dp, up = stride(plan, BX, P), stride(plan, BDY, P), stride(plan, BDX, P)
            wp, ws = stride(plan, BWEIGHT, P), stride(plan, BWEIGHT, S)
            mean = read_double(means, 0) if means != 0 else 0.0
            rstd = read_double(rstds, 0)
            if not weighted and weight != 0:
                # sums of dy alone, and one weight for all of the group
                value = np.float64(load_weight(weight, 0))
                one *= value
                second *= value
            c1 = one / length * rstd if means != 0 else 0.0
            c2 = second / length * rstd
            rows, jump = divided(team, cols)
            row, col = divided(low + lane, cols)
            i = low + lane
            while i < high:
                start = col * width
                n = lesser(np.int64(width), s - start)
                load_chunk(x, row * xp + start, n, aligned, v, 0)
                load_slope(dy, row * dp + start, n, aligned, g, 0)
                weights(weight, row * wp + start * ws, ws, n, aligned, w)
                for k in range(width):
                    v[k] = slopes(v[k], g[k], w[k], mean, rstd, c1, c2)
                store_chunk(dx, row * up + start, n, aligned, v)
                i += team
                row, col = onward(row + rows, col + jump, cols)

    return gradients_kernel


@device
def step_back(
    x: Any, dy: Any, hi: Any, r: Any, shift: Any, wr: Any, c1: Any, c2: Any
) -> Any:  # fmt: skip
    """dx of one element. By given statistics c2 is 0: x, out of range or not, has no part in it."""
    v = arithmetic.step_back(x, dy, hi, r, shift, wr, c1, c2)
    return v if c2 != 0 else fma(dy, wr, -c1)


@cache
def gradient_step(kind: str) -> Function:
    """A function (x, dy, weight, mean, rstd, c1, c2) -> dx of one element."""
    real = computing(kind)
    double = real is np.float64

    @device
    def slope(x: Any, dy: Any, w: Any, mean: Any, rstd: Any, c1: Any, c2: Any) -> Any:
        # what does not depend on the element is computed once, ahead of the loop
        hi = real(mean)
        shift = (mean - np.float64(hi)) * rstd
        if double or holds(rstd):
            r = real(rstd)
            return step_back(x, dy, hi, r, real(-shift), real(w * r), real(c1), real(c2))
        wide = np.float64(w) * rstd
        return real(
            step_back(np.float64(x), np.float64(dy), np.float64(hi), rstd, -shift, wide, c1, c2)
        )

    return slope


@cache
def column_gradients(kind: str, other: str, factor: str, same: bool) -> Any:
    """The kernel that sums g and g xhat of each column, over some of the rows.

    `same`: a group has one mean and rstd; otherwise each element has its own.
    """
    real = computing(kind)
    size, other_size, factor_size = size_of(kind), size_of(other), size_of(factor)
    width = CHUNK // size
    across = LANES * width
    depth = 2  # chunks of x and of dy
    ahead = depth * width
    fetch = column_fetcher(kind, real, width, depth)
    fetch_slope = column_fetcher(other, real, width, depth)
    load_weight = loader(factor, real)
    totals_of = column_totals(width)
    shared_size = BLOCK * width

    @kernel
    def gradients_kernel(
        plan: Any, aligned: Any, parts: Any, per: Any, x: Any, dy: Any, weight: Any, means: Any,
        rstds: Any, partial: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(shared_size, types.float64)
        tid = np.int64(cuda.threadIdx.x)
        first = tid % LANES * width
        a, b, part, column = tile_of(plan, parts, width)
        columns = read_word(plan, C)
        n = greater(np.int64(0), lesser(np.int64(width), columns - column - first))
        low, high = part * per, lesser(part * per + per, read_word(plan, P) * read_word(plan, S))
        at = column + first if n > 0 else np.int64(0)
        wc, tc = stride(plan, BWEIGHT, C), stride(plan, BRSTD, C)
        near = read_word(plan, NEIGHBOURS)
        x += (base(plan, BX, a, b) + at) * size
        dy += (base(plan, BDY, a, b) + at) * other_size
        weight += (base(plan, BWEIGHT, a, b) + at * wc) * factor_size if weight != 0 else 0
        statistics = base(plan, BRSTD, a, b)
        v = cuda.local.array(ahead, real)
        g = cuda.local.array(ahead, real)
        one = cuda.local.array(width, types.float64)
        second = cuda.local.array(width, types.float64)
        for k in range(width):
            one[k] = second[k] = np.float64(0.0)
        s = read_word(plan, S)
        xp, xs = stride(plan, BX, P), stride(plan, BX, S)
        dp, ds = stride(plan, BDY, P), stride(plan, BDY, S)
        wp, ws = stride(plan, BWEIGHT, P), stride(plan, BWEIGHT, S)
        tp, ts = stride(plan, BRSTD, P), stride(plan, BRSTD, S)
        i = low + tid // LANES
        while i < high:
            fetch(x, xp, xs, s, i, high, n, aligned, v)
            fetch_slope(dy, dp, ds, s, i, high, n, aligned, g)
            for j in range(depth):
                p, q = divided(i, s)
                for k in range(width):
                    if i < high and k < n:
                        c = divided(at + k, near)[0] if same else at + k
                        place = statistics + p * tp + q * ts + c * tc
                        slope = np.float64(g[j * width + k])
                        if weight != 0:
                            slope *= np.float64(load_weight(weight, p * wp + q * ws + k * wc))
                        mean = read_double(means, place) if means != 0 else 0.0
                        xhat = (np.float64(v[j * width + k]) - mean) * read_double(rstds, place)
                        one[k] += slope
                        second[k] = fma(slope, xhat, second[k])
                i += ROWS
        total_one = totals_of(one, shared, tid)
        total_second = totals_of(second, shared, tid)
        if tid < across and column + tid < columns:
            at = (((a * read_word(plan, B) + b) * parts + part) * columns + column + tid) * 2
            write_double(partial, at, total_one)
            write_double(partial, at + 1, total_second)

    return gradients_kernel


@cache
def column_slopes(kind: str, other: str, factor: str) -> Any:
    """The kernel for dx of columns."""
    real = computing(kind)
    double = real is np.float64
    size, other_size, factor_size = size_of(kind), size_of(other), size_of(factor)
    width = CHUNK // size
    load_chunk = chunk_loader(kind, real, width)
    load_slope = chunk_loader(other, real, width)
    load_weight = loader(factor, real)
    store_chunk = chunk_storer(kind, width)
    slopes = gradient_step(kind)

    @device
    def constants(
        plan: Any, a: Any, b: Any, column: Any, weight: Any, weight_at: Any, means: Any,
        rstds: Any, ones: Any, seconds: Any, length: Any, weighted: Any,
    ) -> Any:  # fmt: skip
        """Mean, rstd, c1 and c2 of a column."""
        c = divided(column, read_word(plan, NEIGHBOURS))[0]
        place = base(plan, BRSTD, a, b) + c * stride(plan, BRSTD, C)
        rstd = read_double(rstds, place)
        mean = read_double(means, place) if means != 0 else 0.0
        one = two = 0.0
        if ones != 0:
            f = rstd / length
            if not weighted and weight != 0:
                # sums of dy alone, and one weight for all of the group
                f *= np.float64(load_weight(weight, weight_at))
            place = base(plan, BSUMS, a, b) + c * stride(plan, BSUMS, C)
            one = read_double(ones, place) * f if means != 0 else 0.0
            two = read_double(seconds, place) * f
        return mean, rstd, one, two

    @kernel
    def slopes_kernel(
        plan: Any, aligned: Any, parts: Any, per: Any, x: Any, dy: Any, dx: Any, weight: Any,
        means: Any, rstds: Any, ones: Any, seconds: Any, length: Any, weighted: Any,
    ) -> None:  # fmt: skip
        tid = np.int64(cuda.threadIdx.x)
        first = tid % LANES * width
        a, b, part, column = tile_of(plan, parts, width)
        columns = read_word(plan, C)
        n = lesser(np.int64(width), columns - column - first)
        if n <= 0:
            return
        at = column + first
        low, high = part * per, lesser(part * per + per, read_word(plan, P) * read_word(plan, S))
        wc = stride(plan, BWEIGHT, C)
        x += (base(plan, BX, a, b) + at) * size
        dx += (base(plan, BDX, a, b) + at) * size
        dy += (base(plan, BDY, a, b) + at) * other_size
        weight += (base(plan, BWEIGHT, a, b) + at * wc) * factor_size if weight != 0 else 0
        v = cuda.local.array(width, real)
        g = cuda.local.array(width, real)
        hi = cuda.local.array(width, real)
        r = cuda.local.array(width, real)
        shift = cuda.local.array(width, real)
        c1 = cuda.local.array(width, real)
        c2 = cuda.local.array(width, real)
        wide = False
        for k in range(width):
            hi[k] = r[k] = shift[k] = c1[k] = c2[k] = real(0)
            if k < n:
                mean, rstd, one, two = constants(
                    plan, a, b, at + k, weight, k * wc, means, rstds, ones, seconds, length,
                    weighted,
                )  # fmt: skip
                hi[k] = real(mean)
                r[k] = real(rstd)
                shift[k] = real((np.float64(hi[k]) - mean) * rstd)
                c1[k], c2[k] = real(one), real(two)
                wide = wide or (not double and not holds(rstd))
        s = read_word(plan, S)
        xp, xs = stride(plan, BX, P), stride(plan, BX, S)
        dp, ds = stride(plan, BDY, P), stride(plan, BDY, S)
        up, us = stride(plan, BDX, P), stride(plan, BDX, S)
        wp, ws = stride(plan, BWEIGHT, P), stride(plan, BWEIGHT, S)
        for i in range(low + tid // LANES, high, ROWS):
            p, q = divided(i, s)
            load_chunk(x, p * xp + q * xs, n, aligned, v, 0)
            load_slope(dy, p * dp + q * ds, n, aligned, g, 0)
            for k in range(width):
                if k < n:
                    w = real(1)
                    if weight != 0:
                        w = load_weight(weight, p * wp + q * ws + k * wc)
                    if wide:  # computed again: rare, and it would take registers always
                        mean, rstd, one, two = constants(
                            plan, a, b, at + k, weight, k * wc, means, rstds, ones, seconds,
                            length, weighted,
                        )  # fmt: skip
                        v[k] = slopes(v[k], g[k], w, mean, rstd, one, two)
                    else:
                        v[k] = step_back(
                            v[k], g[k], hi[k], r[k], shift[k], real(w * r[k]), c1[k], c2[k]
                        )
            store_chunk(dx, p * up + q * us, n, aligned, v)

    return slopes_kernel


@cache
def merge_sums(lanes: int) -> Any:
    """The kernel that adds up the sums of a group's parts: `lanes` threads to a group."""
    teams = BLOCK // lanes

    @kernel
    def merge_kernel(
        plan: Any, groups: Any, parts: Any, partial: Any, ones: Any, seconds: Any
    ) -> None:  # fmt: skip
        scratch = cuda.shared.array((BLOCK, 2), types.float64)
        tid = np.int64(cuda.threadIdx.x)
        lane = tid % lanes
        group = np.int64(cuda.blockIdx.x) * teams + tid // lanes
        live = group < groups
        columns, near = read_word(plan, C), read_word(plan, NEIGHBOURS)
        outer, c = divided(group, columns // near)
        one = second = np.float64(0.0)
        if live:
            for i in range(lane, parts * near, lanes):
                part, k = divided(i, near)
                at = ((outer * parts + part) * columns + c * near + k) * 2
                one += read_double(partial, at)
                second += read_double(partial, at + 1)
        if lanes > 1:
            scratch[tid, 0] = one
            scratch[tid, 1] = second
            cuda.syncthreads()
            if lane == 0:
                for i in range(tid + 1, tid + lanes):
                    one += scratch[i, 0]
                    second += scratch[i, 1]
        if live and lane == 0:
            at = statistic(plan, BSUMS, group)
            write_double(ones, at, one)
            write_double(seconds, at, second)

    return merge_kernel


# --- The rest -------------------------------------------------------------------------------------


@cache
def convert(to: str, source: str, other: str) -> Any:
    """The kernel for any strides: to = source + offset, or source + other. One thread, one number.

    The plan holds the number of axes, the shape, and the strides of the three operands.
    """
    real = (
        np.float32
        if "float64" not in (computing(to).__name__, computing(source).__name__)
        else (np.float64)
    )
    load, load_other, store = loader(source, real), loader(other, real), storer(to)

    @kernel
    def convert_kernel(
        plan: Any, count: Any, to_at: Any, source_at: Any, other_at: Any, offset: Any
    ) -> None:
        index = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        if index < count:
            axes = read_word(plan, 0)
            left = index
            i = j = o = np.int64(0)
            for axis in range(axes, 0, -1):
                left, at = divided(left, read_word(plan, axis))
                i += at * read_word(plan, axes + axis)
                j += at * read_word(plan, 2 * axes + axis)
                o += at * read_word(plan, 3 * axes + axis)
            value = load(source_at, j)
            if other_at != 0:
                value = real(value + load_other(other_at, o))
            store(to_at, i, real(value + offset))

    return convert_kernel


@cache
def running_average(kind: str) -> Any:
    """The kernel that moves a running mean or variance: one thread, one channel.

    `numbers` are (parts, channels), `counts` how much each is of; a part of nothing is left out.
    """
    load, store = loader(kind, np.float64), storer(kind)

    @kernel
    def running_kernel(
        channels: Any, parts: Any, running: Any, step: Any, numbers: Any, counts: Any,
        unbiased: Any, momentum: Any,
    ) -> None:  # fmt: skip
        c = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        if c < channels:
            total = seen = np.float64(0.0)
            for part in range(parts):
                count = read_double(counts, part * channels + c)
                if count > 0.0:
                    value = read_double(numbers, part * channels + c)
                    if unbiased:
                        value *= count / (count - 1.0) if count != 1.0 else math.inf
                    total += value
                    seen += 1.0
            if seen > 0.0:
                moved = (1.0 - momentum) * load(running, c * step) + momentum * (total / seen)
                store(running, c * step, moved)

    return running_kernel


@cache
def response(kind: str) -> Any:
    """The kernel for `local_response_norm` of (outer, channels, inner), in float64."""
    load, store = loader(kind, np.float64), storer(kind)

    @kernel
    def response_kernel(
        count: Any, channels: Any, inner: Any, x: Any, y: Any, size: Any, alpha: Any, beta: Any,
        k: Any,
    ) -> None:  # fmt: skip
        index = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        if index < count:
            c = divided(divided(index, inner)[0], channels)[1]
            total = np.float64(0.0)
            for near in range(greater(0, c - size // 2), lesser(channels, c + (size - 1) // 2 + 1)):
                value = load(x, index + (near - c) * inner)
                total = fma(value, value, total)
            store(y, index, load(x, index) * (k + alpha / size * total) ** -beta)

    return response_kernel
