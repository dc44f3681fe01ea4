"""Activations as compiled loops over a tile in L1, known by their address: ours or a user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cfunc, types
from numba.core.errors import NumbaError

from fastnorm._numba import scalar
from fastnorm._numba.memory import SOURCES, compiling, read_real, real, write

# For float32 and for float64, in the order of backends.ACTIVATIONS from 1 on; 0 is none.
_OURS = (
    (scalar.relu, scalar.relu),
    (scalar.silu32, scalar.silu64),
    (scalar.gelu32, scalar.gelu64),
    (scalar.gelu_tanh32, scalar.gelu_tanh64),
    (scalar.tanh32, scalar.tanh64),
)

# In place where `scale` is 0, else of the step of x, which lies apart from y: (x, y, n, scale,
# weight, bias), all but n addresses, 0 for what is not there.
_LOOP = types.void(*[types.intp] * 6)

# The compiled loops, which must outlive every call of theirs.
_loops: dict[tuple[Any, type], Any] = {}


def _loop(f: Callable[[Any], Any], kind: type, cache: bool) -> Any:
    sources = SOURCES  # another key on disk when `scalar` has changed

    @cfunc(_LOOP, error_model="numpy", fastmath=False, cache=cache)
    def loop(x, y, n, scale, weight, bias):
        if sources == 0:
            return
        if scale == 0:
            for i in range(n):
                write(y, i, real(f(read_real(y, i, kind)), kind))
            return
        hi, r = read_real(scale, 0, kind), read_real(scale, 1, kind)
        shift, zero = read_real(scale, 2, kind), real(0.0, kind)
        if weight == 0:
            for i in range(n):
                t = scalar.step(read_real(x, i, kind), hi, r, shift)
                write(y, i, real(f(t), kind))
        elif bias == 0:
            for i in range(n):
                t = scalar.step(read_real(x, i, kind), hi, r, shift)
                write(y, i, real(f(scalar.fma(t, read_real(weight, i, kind), zero)), kind))
        else:
            for i in range(n):
                t = scalar.step(read_real(x, i, kind), hi, r, shift)
                w, b = read_real(weight, i, kind), read_real(bias, i, kind)
                write(y, i, real(f(scalar.fma(t, w, b)), kind))

    return loop


def address_of(activation: Any, kind: type) -> int:
    """The address of the compiled loop (see `_LOOP`) for a kind; 0 for no activation.

    `kind` is what is computed in, `np.float32` or `np.float64`. `activation` is a place in
    `backends.ACTIVATIONS`, or a function compiled with `numba.njit`: of one number, one number.
    """
    if isinstance(activation, int) and activation == 0:
        return 0
    return int(_loop_of(activation, kind).address)


def _loop_of(activation: Any, kind: type) -> Any:
    key = activation, kind
    if key not in _loops:
        with compiling():
            if key not in _loops:
                _loops[key] = _compiled(activation, kind)
    return _loops[key]


def _compiled(activation: Any, kind: type) -> Any:
    if isinstance(activation, int):
        return _loop(_OURS[activation - 1][kind is np.float64], kind, True)
    try:
        return _loop(activation, kind, False)
    except NumbaError as error:
        raise TypeError(
            f"activation {getattr(activation, '__name__', activation)} cannot be compiled for one "
            f"{kind.__name__}, expected a function such as numba.njit(lambda x: max(x, 0)): {error}"
        ) from error


def apply(activation: Any, array: Any) -> Any:
    """A user's activation of an array of float32 or float64, in a new one."""
    result = np.array(array, order="C")
    _loop_of(activation, result.dtype.type).ctypes(0, result.ctypes.data, result.size, 0, 0, 0)
    return result
