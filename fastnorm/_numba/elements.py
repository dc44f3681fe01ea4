"""One element of an array, as a number that is computed in.

An array of float16 comes as its bits in int16, one of bfloat16 in uint16; they are computed in
float32, as float32 is, and float64 in float64. What is asked of a type is decided when a kernel is
compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from fastnorm._numba import scalar
from fastnorm._numba.compiling import CHECKED, STRICT, inner


@inner
def piece(x, o, n):
    """Elements [o, o + n) of x: a slice ends where x does, which is told where indices are."""
    if CHECKED and not 0 <= o <= o + n <= x.size:
        raise IndexError("out of bounds")
    return x[o : o + n]


def _only_compiled(*_: Any) -> Any:
    raise TypeError("for compiled code")


def get(v: Any) -> Any:
    """A stored number as one that is computed in."""
    return _only_compiled(v)


def put(y: Any, i: Any, v: Any) -> Any:
    """Store v as element i of y, rounded to what y holds."""
    return _only_compiled(y, i, v)


def real(v: Any, x: Any) -> Any:
    """The number v in the type that elements of the array x are computed in."""
    return _only_compiled(v, x)


def is_double(x: Any) -> Any:
    """Whether elements of the array x are float64."""
    return _only_compiled(x)


@overload(get, jit_options=STRICT, strict=False)
def _get(v: Any) -> Any:
    if v == types.int16:
        return lambda v: scalar.from_f16(np.uint16(v))
    if v == types.uint16:
        return lambda v: scalar.from_bf16(v)
    return lambda v: v


@overload(put, jit_options=STRICT, strict=False)
def _put(y: Any, i: Any, v: Any) -> Any:
    def put_f16(y: Any, i: Any, v: Any) -> None:
        y[i] = np.int16(scalar.to_f16(v))

    def put_bf16(y: Any, i: Any, v: Any) -> None:
        y[i] = scalar.to_bf16(v)

    def put_float(y: Any, i: Any, v: Any) -> None:
        y[i] = v

    return {types.int16: put_f16, types.uint16: put_bf16}.get(y.dtype, put_float)


@overload(real, jit_options=STRICT, strict=False)
def _real(v: Any, x: Any) -> Any:
    if x.dtype == types.float64:
        return lambda v, x: np.float64(v)
    return lambda v, x: np.float32(v)


@overload(is_double, jit_options=STRICT, strict=False)
def _is_double(x: Any) -> Any:
    double = x.dtype == types.float64
    return lambda x: double
