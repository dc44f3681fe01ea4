"""Arrays as the kernels take them: one contiguous dimension, and strides along five.

A kernel finds element (a, b, p, s, c) of an operand at the sum of its index times its strides, in
elements, from where the first one lies. The flat view has the elements that the strides reach, from
the lowest to the highest in memory: a slice of it cannot leave the array.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastnorm.arrays import flip

Array: TypeAlias = NDArray[Any]
Strides: TypeAlias = tuple[int, ...]

_BITS: dict[Any, np.dtype[Any]] = {
    "float16": np.dtype(np.int16),
    "bfloat16": np.dtype(np.uint16),
    "bool": np.dtype("u1"),
}
_stored: dict[np.dtype[Any], np.dtype[Any]] = {}  # a dtype makes up its name every time


def stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which kernels see numbers of this one."""
    if dtype not in _stored:
        _stored[dtype] = _BITS.get(str(dtype.name), dtype)
    return _stored[dtype]


def computed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which numbers of this one are computed."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def array_type(dtype: Any, *, writable: bool = False) -> types.Array:
    """The Numba type of a flat array; inputs are never written."""
    kind = getattr(types, stored(np.dtype(dtype)).name)
    return types.Array(kind, 1, "C", readonly=not writable)


def flat(array: Array, strides: Strides, dims: Strides) -> Array:
    """The elements from the lowest to the highest in memory that these strides reach."""
    kind = stored(array.dtype)
    if array.dtype is not kind:
        array = array.view(kind)
    if array.flags.c_contiguous:
        return array.reshape(-1)
    array = flip(array, tuple(i for i, stride in enumerate(array.strides) if stride < 0))
    n = 1 + sum(abs(stride) * (size - 1) for stride, size in zip(strides, dims))
    return as_strided(array, (n,), (array.itemsize,), writeable=array.flags.writeable)


def steps_of(strides: Strides, dims: Strides) -> Strides:
    """Five strides, and where the first element lies in what `flat` returns."""
    first = sum(-stride * (size - 1) for stride, size in zip(strides, dims) if stride < 0)
    return (*strides, first)


def converted(array: Array, strides: Strides, dims: Strides, dtype: Any) -> tuple[Array, Strides]:
    """A copy in another type, and its strides; 1 long where the array is broadcast."""
    five = in_five(array, strides, dims)
    with np.errstate(all="ignore"):  # a weight of doubles may become infinite
        five = five.astype(dtype, order="C")
    return five, tuple(
        0 if n == 1 else stride // five.itemsize for n, stride in zip(five.shape, five.strides)
    )


def in_five(array: Array, strides: Strides, dims: Strides) -> Array:
    """An array along the five dimensions, 1 long where it is broadcast."""
    shape = tuple(n if stride else 1 for n, stride in zip(dims, strides))
    return as_strided(array, shape, tuple(stride * array.itemsize for stride in strides))


_nothing: dict[Any, Array] = {}


def nothing(dtype: Any) -> Array:
    """What stands for an operand that is not there: one number, with strides of 0."""
    kind = stored(np.dtype(dtype))
    if kind not in _nothing:
        _nothing[kind] = np.zeros(1, kind)
    return _nothing[kind]
