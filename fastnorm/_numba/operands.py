"""Arrays as kernels take them: flat, in the kinds that they know, with their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastnorm import _core
from fastnorm._numba.walks import STEPS

Array = NDArray[Any]
Strides = tuple[int, ...]

_HALVES = {"float16": "<i2", "bfloat16": "<u2"}


def _plain_address(array: Array) -> int:
    return array.ctypes.data


# Where the first element of an array lies; the compiled kernels tell it in a fiftieth of the time.
address: Callable[[Array], int] = getattr(_core.kernels, "address_of", _plain_address)


class _Memory:
    """All the memory from an operand's lowest element to its highest, as one array."""

    def __init__(self, array: Array, start: int, size: int, kind: str) -> None:
        self.array = array
        # written or not: Numba compiles a kernel once more for arrays that may not be
        self.__array_interface__ = {
            "version": 3, "data": (start, False), "shape": (size,), "typestr": kind,
        }  # fmt: skip


def flattener(array: Array, strides: Strides, dims: Strides) -> Callable[[Array], Array]:
    """What makes operands of arrays that lie like this one: of float16 and bfloat16 their bits."""
    half = array.dtype.itemsize == 2
    kind = _HALVES[array.dtype.name] if half else array.dtype.str
    low, high = ends(strides, dims) if array.size else (0, -1)
    offset, size = low * array.itemsize, high - low + 1

    def spanned(array: Array) -> Array:
        start = address(array) + offset
        return np.asarray(_Memory(array, start, size, kind))

    if half or not array.flags.c_contiguous:
        return spanned

    def packed(array: Array) -> Array:
        # a caller's own array may have its axes in another order than the operand
        flags = array.flags
        return array.reshape(-1) if flags.c_contiguous and flags.writeable else spanned(array)

    return packed


def flat(array: Array, strides: Strides, dims: Strides) -> Array:
    """An array as an operand."""
    return flattener(array, strides, dims)(array)


def ends(strides: Strides, dims: Strides) -> tuple[int, int]:
    """Where the lowest element is and where the highest, counted from the first."""
    spans = [step * (n - 1) for step, n in zip(strides, dims)]
    return sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans)


def steps_of(strides: Strides | None, dims: Strides) -> Strides:
    """An operand's row of steps; of one that is not there, whose only number is read."""
    if strides is None:
        return (0,) * STEPS
    return (*strides, -ends(strides, dims)[0])


def in_five(array: Array, strides: Strides, dims: Strides) -> Array:
    """An array along the five dimensions, 1 long where it is broadcast."""
    shape = tuple(n if stride else 1 for n, stride in zip(dims, strides))
    return as_strided(array, shape, tuple(stride * array.itemsize for stride in strides))


def converted(
    array: Array, strides: Strides, dims: Strides, dtype: Any, along: int | None = None
) -> tuple[Array, Strides]:
    """A copy in another type, with a number for each element `along` a dimension; its strides."""
    with np.errstate(all="ignore"):  # a weight of doubles may become infinite
        five = in_five(array, strides, dims)
        if along is not None:
            shape = (*five.shape[:along], dims[along], *five.shape[along + 1 :])
            five = np.broadcast_to(five, shape)
        five = five.astype(dtype, order="C")
    return five, tuple(
        0 if n == 1 else stride // five.itemsize for n, stride in zip(five.shape, five.strides)
    )
