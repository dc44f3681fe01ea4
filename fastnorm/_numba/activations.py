"""Activations in loops over contiguous slices: ours, or a function of the user's.

Numba's kernels compile a function into themselves. The Cython kernels call a compiled loop by its
address.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, cfunc, typeof, types
from numba.core.errors import NumbaError, TypingError
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from fastnorm import _reference
from fastnorm._numba import scalar
from fastnorm._numba.apply import apply_affine
from fastnorm._numba.compiling import STRICT, compiling, inner
from fastnorm._numba.elements import real

OURS = 1  # stands for all of ours in a kernel, which is told the number of one

_OURS = tuple(
    (getattr(scalar, f"{name}32"), getattr(scalar, f"{name}64")) for name in _reference.IN_KERNELS
)


def is_jitted(act: Any) -> bool:
    """Whether a function is a user's, which Numba cannot tell from others on disk."""
    return isinstance(act, CPUDispatcher)


@inner
def _each(f, t):
    """One of ours, in place."""
    for i in range(t.size):
        t[i] = f(t[i])


def activate(act: Any, number: Any, t: Any, status: Any) -> Any:
    """The activation of a slice in place: None, a user's function, or one of ours by its number.

    The first number of `status` tells that a user's raised, the second for what.
    """
    raise TypeError("for compiled code")


@overload(activate, jit_options=STRICT, strict=False)
def _compiled_activate(act: Any, number: Any, t: Any, status: Any) -> Any:
    if isinstance(act, types.NoneType):
        return lambda act, number, t, status: None
    if isinstance(act, types.Integer):
        double = t.dtype == types.float64
        one, two, three, four, five, six = (functions[double] for functions in _OURS)

        def ours(act: Any, number: Any, t: Any, status: Any) -> None:
            if number == 1:
                _each(one, t)
            elif number == 2:
                _each(two, t)
            elif number == 3:
                _each(three, t)
            elif number == 4:
                _each(four, t)
            elif number == 5:
                _each(five, t)
            elif number == 6:
                _each(six, t)

        return ours

    def users(act: Any, number: Any, t: Any, status: Any) -> None:
        # a thread of a kernel has no way to raise
        try:
            for i in range(t.size):
                status[2] = t[i]
                t[i] = real(act(t[i]), t)
        except Exception:
            status[1] = status[2]
            status[0] = 1.0

    return users


# --- For the Cython kernels -----------------------------------------------------------------------


# In place where `scale` is 0, else of x by that scale, which lies apart from y: (x, y, n, scale,
# weight, bias), all but n addresses, 0 for what is not there. Returns 1 where f raised, else 0.
_LOOP = types.int64(*[types.intp] * 6)


@dataclass(slots=True, frozen=True, eq=False)
class _Loop:
    """A compiled loop, which must outlive every call of it."""

    compiled: Any
    status: NDArray[np.float64]  # whether the activation raised, and for which number


_loops: dict[tuple[Any, type], _Loop] = {}


@intrinsic
def _pointer(typingctx: Any, address: Any, kind: Any) -> Any:
    pointer = types.CPointer(kind.instance_type)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.intp, kind), codegen


def _loop(f: Callable[[Any], Any], kind: type, status_at: int) -> Any:
    @cfunc(_LOOP, **STRICT)
    def loop(x, y, n, scale, weight, bias):
        status = carray(_pointer(status_at, np.float64), 2)
        status[0] = 0.0
        to = carray(_pointer(y, kind), n)
        if scale != 0:
            source, s = carray(_pointer(x, kind), n), carray(_pointer(scale, kind), 3)
            w: Any = np.ones(1, kind)
            b: Any = np.zeros(1, kind)
            if weight != 0:
                w = carray(_pointer(weight, kind), n)
            if bias != 0:
                b = carray(_pointer(bias, kind), n)
            apply_affine(source, to, (s[0], s[1], s[2]), w, b)
        activate(f, 0, to, status)
        return int(status[0])

    return loop


def address_of(activation: Any, kind: type) -> int:
    """The address of the compiled loop (see `_LOOP`) of a user's activation.

    `kind` is what is computed in, `np.float32` or `np.float64`.
    """
    return int(_loop_of(activation, kind).compiled.address)


def _loop_of(activation: Any, kind: type) -> _Loop:
    key = activation, kind
    if key not in _loops:
        with compiling():
            if key not in _loops:
                status = np.zeros(2)
                check(activation, kind)
                loop = _loop(activation, kind, status.ctypes.data)
                _loops[key] = _Loop(loop, status)
    return _loops[key]


def check(activation: Any, kind: type) -> None:
    """Refuse a function that cannot be compiled to take one number and return one."""
    try:
        _check_result(activation, kind)
    except NumbaError as error:
        raise TypeError(
            f"activation {_name(activation)} cannot be compiled for one {kind.__name__}, expected "
            f"a function such as numba.njit(lambda x: max(x, 0)): {error}"
        ) from error


def _check_result(activation: Any, kind: type) -> None:
    """Refuse a function that is not of one number of this kind, one number."""
    taken = types.float64 if kind is np.float64 else types.float32
    try:
        signature = typeof(activation).get_call_type(activation.typingctx, (taken,), {})
    except TypeError as error:  # what Numba 0.60 says of a wrong number of arguments
        raise TypingError(str(error)) from error
    given, result = signature.args[0], signature.return_type
    if not isinstance(given, types.Float):
        raise TypeError(
            f"activation {_name(activation)} is compiled for {given}, expected one that takes a "
            f"{kind.__name__}; write numba.njit(f) without a signature"
        )
    if not isinstance(result, types.Float | types.Integer | types.Boolean):
        raise TypeError(
            f"activation {_name(activation)} returns {result} for one {kind.__name__}, expected "
            "one number on every path, such as numba.njit(lambda x: max(x, 0)) returns"
        )


def _name(activation: Any) -> str:
    return str(getattr(activation, "__name__", activation))


def raise_again(activation: Any, kind: type) -> None:
    """Raise what a user's activation raised in its loop, which can only tell that it did."""
    raise_for(activation, kind(_loops[activation, kind].status[1]))


def raise_for(activation: Any, value: Any) -> None:
    """Raise what a user's activation raises for a number."""
    message = f"activation {_name(activation)} raised for the number {value!r}"
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
