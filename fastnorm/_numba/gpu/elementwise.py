"""Kernels of one thread to a number: copies, running statistics, local response norm."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastnorm._numba.gpu.blocking import BLOCK
from fastnorm._numba.gpu.elements import computing, loader, read_double, read_word, storer
from fastnorm._numba.gpu.package import arithmetic, cuda, kernel
from fastnorm._numba.gpu.views import divided, greater, lesser

fma = arithmetic.fma


class Average(NamedTuple):
    """How a running statistic moves; a record that is whole numbers alone."""

    channels: Any
    parts: Any
    step: Any  # from one channel of the running statistic to the next
    unbiased: Any


class Window(NamedTuple):
    """The channels that a response is of, and how x lies: (outer, channels, inner)."""

    channels: Any
    inner: Any
    size: Any


@cache
def convert(to: str, source: str, other: str, product: bool = False) -> Any:
    """The kernel for any strides: to = source + offset, source + other, or their product.

    One thread, one number.
    The plan holds the number of axes, the shape, and the strides of the three operands.
    """
    double = np.float64 in (computing(to), computing(source))
    real = np.float64 if double else np.float32
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
                second = load_other(other_at, o)
                value = real(value * second) if product else real(value + second)
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
        how: Any, running: Any, numbers: Any, counts: Any, momentum: Any
    ) -> None:  # fmt: skip
        channels = how.channels
        c = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        if c < channels:
            total = seen = np.float64(0.0)
            for part in range(how.parts):
                count = read_double(counts, part * channels + c)
                if count > 0.0:
                    value = read_double(numbers, part * channels + c)
                    if how.unbiased:
                        value *= count / (count - 1.0) if count != 1.0 else math.inf
                    total += value
                    seen += 1.0
            if seen > 0.0:
                moved = (1.0 - momentum) * load(running, c * how.step) + momentum * (total / seen)
                store(running, c * how.step, moved)

    return running_kernel


@cache
def response(kind: str) -> Any:
    """The kernel for `local_response_norm` of (outer, channels, inner), in float64."""
    load, store = loader(kind, np.float64), storer(kind)

    @kernel
    def response_kernel(
        count: Any, window: Any, x: Any, y: Any, alpha: Any, beta: Any, k: Any
    ) -> None:  # fmt: skip
        channels, inner, size = window
        index = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        if index < count:
            c = divided(divided(index, inner)[0], channels)[1]
            total = np.float64(0.0)
            low, high = greater(0, c - size // 2), lesser(channels, c + (size - 1) // 2 + 1)
            for other in range(low, high):
                value = load(x, index + (other - c) * inner)
                total = fma(value, value, total)
            store(y, index, load(x, index) * (k + alpha / size * total) ** -beta)

    return response_kernel
