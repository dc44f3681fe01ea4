"""Activations as compiled loops over a tile in L1, known by their address: ours or a user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, cfunc, typeof, types
from numba.core.errors import NumbaError, TypingError
from numba.extending import overload
from numpy.typing import NDArray

from fastnorm import _formulas
from fastnorm._numba import scalar
from fastnorm._numba.compiling import SOURCES, STRICT, compiling, pointer, real

# For float32 and for float64; the first is of number 1, and 0 is none.
OURS = tuple(
    (getattr(scalar, f"{name}_32"), getattr(scalar, f"{name}_64")) for name in _formulas.IN_KERNELS
)

# In place where `scale` is 0, else of x by that scale, which lies apart from y: (x, y, n, scale,
# weight, bias), all but n addresses, 0 for what is not there. Returns 1 where f raised, else 0.
_LOOP = types.int64(*[types.intp] * 6)


@dataclass(slots=True, frozen=True, eq=False)
class _Loop:
    """A compiled loop, which must outlive every call of it."""

    compiled: Any
    refused: NDArray[np.float64]  # the number that the activation raised at last


_loops: dict[tuple[Any, type], _Loop] = {}


def _attempt(f: Any, t: Any, y: Any, refused: Any) -> Any:
    """f(t) as a number like those of y, and whether it raised."""
    raise TypeError("for compiled code")


@overload(_attempt, jit_options=STRICT, strict=False)
def _compiled_attempt(f: Any, t: Any, y: Any, refused: Any) -> Any:
    if not isinstance(f, types.Dispatcher):  # ours
        return lambda f, t, y, refused: (real(f(t), y), False)

    def attempt(f, t, y, refused):
        # who calls the loop has no GIL to raise with
        try:
            return real(f(t), y), False
        except Exception:
            carray(pointer(refused, np.float64), 1)[0] = t
            return real(0.0, y), True

    return attempt


def _loop(f: Callable[[Any], Any], kind: type, cache: bool, refused: int) -> Any:
    sources = SOURCES  # another key on disk when `scalar` has changed

    @cfunc(_LOOP, error_model="numpy", fastmath=False, cache=cache)
    def loop(x, y, n, scale, weight, bias):
        if sources == 0:
            return 0
        to = carray(pointer(y, kind), n)
        if scale == 0:
            for i in range(n):
                to[i], raised = _attempt(f, to[i], to, refused)
                if raised:
                    return 1
            return 0
        source, own = carray(pointer(x, kind), n), carray(pointer(scale, kind), 3)
        w, b = carray(pointer(weight, kind), n), carray(pointer(bias, kind), n)
        hi, r, shift = own[0], own[1], own[2]
        for i in range(n):
            t = scalar.apply(source[i], hi, r, shift)
            if weight != 0:
                t = scalar.fma(t, w[i], b[i] if bias != 0 else real(0.0, to))
            to[i], raised = _attempt(f, t, to, refused)
            if raised:
                return 1
        return 0

    return loop


def loop_of(activation: Any, kind: type) -> Any:
    """The compiled loop as what a kernel calls."""
    return _loop_of(activation, kind).compiled.ctypes


def address_of(activation: Any, kind: type) -> int:
    """The address of the compiled loop (see `_LOOP`) for a kind; 0 for no activation.

    `kind` is what is computed in, `np.float32` or `np.float64`. `activation` is a number of
    one of ours, or a function that `numba.njit` has compiled: of one number,
    one number.
    """
    if isinstance(activation, int) and activation == 0:
        return 0
    return int(_loop_of(activation, kind).compiled.address)


def _loop_of(activation: Any, kind: type) -> _Loop:
    key = activation, kind
    if key not in _loops:
        with compiling():
            if key not in _loops:
                _loops[key] = _compiled(activation, kind)
    return _loops[key]


def _compiled(activation: Any, kind: type) -> _Loop:
    refused = np.zeros(1)
    if isinstance(activation, int):
        return _Loop(_loop(OURS[activation - 1][kind is np.float64], kind, True, 0), refused)
    try:
        check_result(activation, kind)
        return _Loop(_loop(activation, kind, False, refused.ctypes.data), refused)
    except NumbaError as error:
        raise TypeError(
            f"{_named(activation)} cannot be compiled for one {kind.__name__}, expected "
            f"a function such as numba.njit(lambda x: max(x, 0)): {error}"
        ) from error


def check_result(activation: Any, kind: type) -> None:
    """Refuse a function that is not of one number of this kind, one number."""
    taken = types.float64 if kind is np.float64 else types.float32
    try:
        signature = typeof(activation).get_call_type(activation.typingctx, (taken,), {})
    except TypeError as error:  # what Numba 0.60 says of a wrong number of arguments
        raise TypingError(str(error)) from error
    given, result = signature.args[0], signature.return_type
    if not isinstance(given, types.Float):
        raise TypeError(
            f"{_named(activation)} is compiled for {given}, expected one that takes a "
            f"{kind.__name__}; write numba.njit(f) without a signature"
        )
    if not isinstance(result, types.Float | types.Integer | types.Boolean):
        raise TypeError(
            f"{_named(activation)} returns {result} for one {kind.__name__}, expected "
            "one number on every path, such as numba.njit(lambda x: max(x, 0)) returns"
        )


def _named(function: Any) -> str:
    """An activation, or the derivative of one, as errors tell of it."""
    return f"activation or derivative {getattr(function, '__name__', function)}"


def raise_again(activation: Any, kind: type) -> None:
    """Raise what a user's activation raised in a kernel, which can only tell that it did."""
    value = kind(_loops[activation, kind].refused[0])
    message = f"{_named(activation)} raised for the number {value!r}"
    try:
        activation(value)
    except Exception as error:
        message += f": {error!r}"
        if isinstance(error, ZeroDivisionError):
            message += "; numba.njit(error_model='numpy') divides as NumPy does"
        try:
            again = type(error)(message)
        except Exception:  # its class takes something else than a message
            again = RuntimeError(message)
        raise again from error
    raise RuntimeError(f"{message}, and does not when it is called with it again")


def apply(activation: Any, array: Any) -> Any:
    """A user's activation of an array of float32 or float64, in a new one."""
    result = np.array(array, order="C")
    kind = result.dtype.type
    loop = _loop_of(activation, kind)
    if loop.compiled.ctypes(0, result.ctypes.data, result.size, 0, 0, 0):
        raise_again(activation, kind)
    return result
