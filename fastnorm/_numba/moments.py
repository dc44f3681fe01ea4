"""Moments of contiguous slices: count, mean and its rest, sum of squared deviations and its rest.

Sums are of float64. The order in which a slice is added up depends on its length alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from fastnorm._numba import scalar
from fastnorm._numba.compiling import STRICT, inner, summing
from fastnorm._numba.elements import get
from fastnorm.schedule import BLOCK, CHAIN

NONE = (0.0, 0.0, 0.0, 0.0, 0.0)  # the moments of no numbers


@summing
def sums(x):
    """Of x and of its square."""
    first = 0.0
    second = 0.0
    for i in range(x.size):
        v = np.float64(get(x[i]))
        first += v
        second += v * v
    return first, second


@summing
def sums_about(x, pivot):
    """Of x - pivot and of its square."""
    first = 0.0
    second = 0.0
    for i in range(x.size):
        v = np.float64(get(x[i])) - pivot
        first += v
        second += v * v
    return first, second


@inner
def chains_about(x, pivot):
    """The same of doubles, the sum of squares as two numbers.

    One sum of all squares would round the same way each time where they are equal, as those of
    black and white pixels are: short chains are added up, and those exactly.
    """
    first = second = rest = 0.0
    for i in range(0, x.size, CHAIN):
        one, two = sums_about(x[i : i + CHAIN], pivot)
        first += one
        second, lost = scalar.two_sum(second, two)
        rest += lost
    return first, second, rest


@inner
def moments_of_floats(x, centred):
    """Of numbers computed in float32: from their sums, about their mean where that is far off."""
    count = np.float64(x.size)
    first, second = sums(x)
    if not centred:
        return count, 0.0, 0.0, second, 0.0
    mean, rest, m2, again = scalar.moments_of_sums(count, first, second, 0.0)
    if again and math.isfinite(mean):
        pivot = np.float64(np.float32(mean))
        first, second = sums_about(x, pivot)
        mean, rest, m2, again = scalar.moments_of_sums(count, first, second, pivot)
    return count, mean, rest, m2, 0.0


@inner
def moments_of_doubles(x, centred):
    """Of doubles, which have no bits to spare: about the first element, then about that mean.

    So a constant slice has exactly its mean.
    """
    count = np.float64(x.size)
    mean = 0.0
    if centred and x.size > 0:
        mean = x[0] + chains_about(x, x[0])[0] / count
    first, m2, m2_rest = chains_about(x, mean)
    if not centred or x.size == 0:
        return count, 0.0, 0.0, m2, m2_rest
    rest = first / count
    return count, mean, rest, m2, m2_rest - first * rest


def moments(x: Any, centred: Any) -> Any:
    """Moments of a slice."""
    raise TypeError("for compiled code")


@overload(moments, jit_options=STRICT, strict=False)
def _moments(x: Any, centred: Any) -> Any:
    if x.dtype == types.float64:
        return lambda x, centred: moments_of_doubles(x, centred)
    return lambda x, centred: moments_of_floats(x, centred)


@inner
def moments_of_blocks(x, centred):
    """Those of blocks of a slice, merged in their order."""
    found = moments(x[:BLOCK], centred)
    for i in range(BLOCK, x.size, BLOCK):
        found = scalar.merge(found, moments(x[i : i + BLOCK], centred))
    return found
