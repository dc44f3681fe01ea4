"""What comes in where a user's own `@njit` function calls a norm: taken, or refused.

What a type tells is refused when that function is compiled, with a TypingError, the rest when it
runs. A function of this kind has a name for Python's side and what stands for it when compiled.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import numpy as np
from numba import literally, types
from numba.core.errors import NumbaError, TypingError
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import overload
from numpy.exceptions import AxisError

from fastnorm._formulas import ACTIVATIONS, IN_KERNELS
from fastnorm._numba import activations
from fastnorm._numba.memory import STRICT, inner
from fastnorm.arguments import did_you_mean

# What to write in place of an option that only Python has.
_INSTEAD = {
    "axis": "normalise x.transpose(...), whose last axes are those",
    "channel_axis": "give x.transpose(...), whose channels are on axis 1",
    "where": "take what counts into an array of its own",
    "residual": "add it to the result, and apply an activation to the sum",
    "weight_offset": "write weight + weight_offset",
    "out": "write out[...] = and the call",
    "return_stats": "fastnorm.moments(x, axis) has the mean and the variance",
}


def stands_for(function: Any) -> Callable[[Any], Any]:
    """What takes the place of a public function: with its signature, and fewer options."""
    public, name = inspect.signature(function), function.__name__

    def register(typed: Any) -> Any:
        known = inspect.signature(typed).parameters

        def checked(*args: Any, **options: Any) -> Any:
            try:
                given = public.bind(*args, **options).arguments
            except TypeError as error:
                raise TypingError(f"{name} inside compiled code: {error}") from error
            for option in given:
                if option not in known:
                    raise TypingError(
                        f"{name} takes no {option}= inside compiled code; {_INSTEAD[option]}"
                    )
            return typed(*args, **options)

        checked.__name__ = checked.__qualname__ = name
        # literals first: an activation is known by its name, the dimensions by `keepdims`
        _compiled(function, prefer_literal=True)(checked)
        return typed

    return register


def _compiled(function: Any, **options: Any) -> Any:
    return overload(function, jit_options=STRICT, strict=False, **options)


def when_compiled(typed: Any = None, **options: Any) -> Any:
    """A function for compiled code alone; `typed` makes it for arguments of some types."""
    if typed is None:
        return partial(when_compiled, **options)

    @wraps(typed)
    def stub(*_: Any) -> Any:
        raise TypeError("for compiled code")

    _compiled(stub, **options)(typed)
    return stub


def is_none(value: Any) -> bool:
    own = getattr(value, "value", value)  # of an argument that was left out
    return own is None or isinstance(own, types.NoneType)


# --- x --------------------------------------------------------------------------------------------


def kind_of(x: Any, of: str, least: int) -> Any:
    """The number that is computed in: that of x, float64 for integers and booleans."""
    dtype = getattr(x, "dtype", None)
    if not isinstance(x, types.Array) or not (
        dtype in (types.float32, types.float64) or isinstance(dtype, types.Integer | types.Boolean)
    ):
        instead = "write x.astype(np.float32) first"
        if dtype == types.float16:
            instead = "Numba has no float16 on the CPU: give x.astype(np.float32) from outside"
        raise TypingError(
            f"{of} inside compiled code got x of type {x}, expected an array of float32 or "
            f"float64, integers or booleans; {instead}"
        )
    if x.ndim < least:
        raise TypingError(
            f"{of} inside compiled code got an x of {x.ndim} dimensions, expected at least {least}"
        )
    return np.float32 if dtype == types.float32 else np.float64


@when_compiled
def plain(x: Any, kind: Any) -> Any:
    """x in C order and this type: itself, or a copy."""
    if x.layout == "C" and x.dtype == kind.instance_type:
        return lambda x, kind: x

    def copied(x, kind):
        y = np.empty(x.shape, kind)
        y[...] = x
        return y

    return copied


# --- Numbers and flags ----------------------------------------------------------------------------


@when_compiled
def number_of(value: Any, shape: Any, kind: Any) -> Any:
    """A weight or bias of this shape, flat, in the type that is computed in; of None no numbers."""
    if is_none(value):
        return lambda value, shape, kind: np.empty(0, kind)
    real = types.Float | types.Integer | types.Boolean
    if not isinstance(value, types.Array) or not isinstance(value.dtype, real):
        raise TypingError(
            f"weight or bias is a {value} inside compiled code, expected an array of real numbers, "
            "or None"
        )
    message = (
        "weight or bias has not the shape that is normalised together, or one number for each "
        "channel: inside compiled code no other shape is taken"
    )
    if value.ndim != len(shape):
        raise TypingError(f"{message}; got {value}, expected {len(shape)} dimensions")

    def given(value, shape, kind):
        for i in range(len(shape)):
            if value.shape[i] != shape[i]:
                raise ValueError(message)
        return np.ascontiguousarray(value).astype(kind).ravel()

    return given


@when_compiled
def check_running(value: Any, channels: Any) -> Any:
    """Refuse running statistics that are not one float for each channel."""
    if not (
        isinstance(value, types.Array) and value.ndim == 1 and isinstance(value.dtype, types.Float)
    ):
        raise TypingError(
            f"running_mean or running_var is a {value} inside compiled code, expected an array of "
            "floats, one for each channel"
        )

    def check(value, channels):
        if value.size != channels:
            raise ValueError("running_mean and running_var must have one number for each channel")

    return check


@when_compiled
def check_between(value: Any, least: Any, most: Any, name: Any) -> Any:
    """A number, option or flag of the caller's; refuse one that is not between these two."""
    own = getattr(value, "value", value)  # of an argument that was left out
    if not isinstance(own, types.Float | types.Integer | float | int) or isinstance(own, bool):
        raise TypingError(
            f"eps, momentum or ddof is a {value} inside compiled code, expected a finite number"
        )

    def check(value, least, most, name):
        if not (least <= value <= most and abs(value) < math.inf):
            raise ValueError(name)
        return value

    return check


@when_compiled
def flag(value: Any, name: Any) -> Any:
    """A flag of the caller's; refuse what is neither True nor False, nor 0 or 1."""
    own = getattr(value, "value", value)
    if not isinstance(own, types.Boolean | types.Integer | bool):
        raise TypingError(
            f"training or use_input_stats is a {value} inside compiled code, expected True or False"
        )

    def check(value, name):
        if value != 0 and value != 1:
            raise ValueError(name)
        return value != 0

    return check


@when_compiled
def groups_of(value: Any) -> Any:
    """A number of groups."""
    if not isinstance(value, types.Integer):
        raise TypingError(f"num_groups is a {value} inside compiled code, expected a whole number")
    return lambda value: value


@when_compiled
def trailing(shape: Any, normalized_shape: Any) -> Any:
    """The trailing shape, a tuple."""
    message = "normalized_shape is not the trailing shape of x; write x.shape[-1] for the last axis"
    if isinstance(normalized_shape, types.Integer):

        def last(shape, normalized_shape):
            if len(shape) < 1 or shape[len(shape) - 1] != normalized_shape:
                raise ValueError(message)
            return (normalized_shape,)

        return last
    if isinstance(normalized_shape, types.UniTuple) and len(normalized_shape):

        def several(shape, normalized_shape):
            before = len(shape) - len(normalized_shape)
            if before < 0:
                raise ValueError(message)
            for i in range(len(normalized_shape)):
                if shape[before + i] != normalized_shape[i]:
                    raise ValueError(message)
            return normalized_shape

        return several
    raise TypingError(
        f"normalized_shape is a {normalized_shape} inside compiled code, expected the trailing "
        "shape of x: a whole number, or a tuple of them"
    )


# --- Activations ----------------------------------------------------------------------------------


_EXPECTED = (
    f"expected None, one of {', '.join(map(repr, ACTIVATIONS))}, or a function of one number that "
    "numba.njit has compiled"
)


def _name_of(activation: Any) -> Any:
    return getattr(activation, "literal_value", getattr(activation, "value", None))


def function_of(activation: Any, kind: Any) -> Any:
    """The function of one number that an activation is; None for none."""
    name = _name_of(activation)
    if isinstance(name, str) and name in ACTIVATIONS:
        return activations.OURS[IN_KERNELS.index(name)][kind is np.float64]
    if isinstance(name, str) or is_none(activation) or isinstance(activation, types.UnicodeType):
        return None  # `known` refuses a name that is none of ours, and asks for one's value
    if not isinstance(activation, types.Dispatcher):
        raise TypingError(f"activation is {activation} inside compiled code, {_EXPECTED}")
    try:
        activations.check_result(activation.dispatcher, kind)
    except (TypeError, NumbaError) as error:
        raise TypingError(str(error)) from error
    return _by_type(activation.dispatcher)


@cache
def _by_type(function: Any) -> Any:
    """A function of the user's, known by its type: its address would keep a caller off the disk."""

    def own(v: Any) -> Any:
        raise TypeError("for compiled code")

    _compiled(own)(lambda v: lambda v: function(v))
    return own


@when_compiled(prefer_literal=True)
def known(activation: Any) -> Any:
    """See that a name is known when the caller is compiled; refuse what is none of ours."""
    name = _name_of(activation)
    if isinstance(name, str) and name not in ACTIVATIONS:
        # when it runs, as Python does: here Numba would ask for its value once more, and for ever
        message = f"activation is {name!r}, {_EXPECTED}" + did_you_mean(name, tuple(ACTIVATIONS))

        def refuse(activation):
            raise ValueError(message)

        return refuse
    if isinstance(activation, types.UnicodeType):
        return lambda activation: literally(activation)
    return lambda activation: None


# --- Axes -----------------------------------------------------------------------------------------


def constant(value: Any, name: str) -> bool:
    """A flag that decides the type of a result."""
    own = getattr(value, "literal_value", getattr(value, "value", value))
    if not isinstance(own, bool | int) or own not in (0, 1):
        raise TypingError(
            f"{name} is a {value} inside compiled code, expected True or False themselves: they "
            "decide how many dimensions the result has"
        )
    return bool(own)


def count_of(axis: Any, ndim: int) -> int:
    """How many axes these are."""
    if is_none(axis):
        return ndim
    if isinstance(axis, types.Integer):
        return 1
    if isinstance(axis, types.BaseTuple) and all(isinstance(a, types.Integer) for a in axis):
        return len(axis)
    raise TypingError(
        f"axis is a {axis} inside compiled code, expected None, a whole number or a tuple of them"
    )


@when_compiled
def order_of(x: Any, axis: Any) -> Any:
    """The axes that stay, then those that are reduced."""
    start, count = tuple(range(x.ndim)), count_of(axis, x.ndim)
    if is_none(axis) or count == 0:
        return lambda x, axis: start
    if count > x.ndim:
        raise TypingError(f"axis is a {axis} inside compiled code, but x has {x.ndim} dimensions")
    if isinstance(axis, types.Integer):
        return lambda x, axis: _sorted(start, (np.intp(axis),))
    if all(isinstance(a, types.IntegerLiteral) for a in axis):
        given = tuple(a.literal_value for a in axis)
        return lambda x, axis: _sorted(start, given)
    if isinstance(axis, types.UniTuple):
        return lambda x, axis: _sorted(start, axis)
    raise TypingError(f"axis is a {axis} inside compiled code, expected numbers of one type")


@inner
def _sorted(order, axes):
    ndim = len(order)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise AxisError("axis is out of range: x has no such axis")
    stays = 0
    reduced = ndim - len(axes)
    for a in range(ndim):
        found = 0
        for axis in axes:
            if axis == a or axis == a - ndim:
                found += 1
        if found > 1:
            raise ValueError("axis has the same axis of x twice")
        if found == 1:
            order = tuple_setitem(order, reduced, a)
            reduced += 1
        else:
            order = tuple_setitem(order, stays, a)
            stays += 1
    return order


@inner
def _as_it_is(order):
    in_place = 0
    for i in range(len(order)):
        in_place += order[i] == i
    return in_place == len(order)


@when_compiled
def turned(x: Any, order: Any, kind: Any) -> Any:
    """x with its axes in this order, in C order and this type."""
    if x.ndim < 2:
        return lambda x, order, kind: plain(x, kind)

    def of_axes(x, order, kind):
        if _as_it_is(order):
            return plain(x, kind)
        return plain(x.transpose(order), kind)

    return of_axes


@when_compiled
def turned_back(y: Any, order: Any, shape: Any) -> Any:
    """What has its axes in this order, in C order again."""
    if y.ndim < 2:
        return lambda y, order, shape: y

    def back(y, order, shape):
        if _as_it_is(order):
            return y
        into = np.empty(shape, y.dtype)
        into.transpose(order)[...] = y
        return into

    return back


@inner
def shape_of_groups(shape, order, of, stays):
    """How many groups there are along the axes that stay, the first of `of`; else 1, or nothing."""
    for i in range(stays):
        shape = tuple_setitem(shape, i if len(shape) == stays else order[i], of[i])
    return shape


@inner
def product(shape, first):
    """How many elements there are along the axes from the first on."""
    n = 1
    for i in range(first, len(shape)):
        n *= shape[i]
    return n


@when_compiled
def mask_of(where: Any, x: Any, order: Any) -> Any:
    """A mask whose elements are in the order of those of x; of None no elements."""
    if is_none(where):
        return lambda where, x, order: np.empty(0, np.bool_)
    if isinstance(where, types.Boolean):
        return lambda where, x, order: turned(np.broadcast_to(where, x.shape), order, np.bool_)
    if not (isinstance(where, types.Array) and isinstance(where.dtype, types.Boolean)):
        raise TypingError(f"where is a {where} inside compiled code, expected an array of bool")
    message = "where has not a shape that broadcasts to that of x"
    extra = x.ndim - where.ndim
    if extra < 0:
        raise TypingError(f"{message}: got {where}, and x has {x.ndim} dimensions")

    def given(where, x, order):
        for i in range(where.ndim):
            if where.shape[i] != 1 and where.shape[i] != x.shape[extra + i]:
                raise ValueError(message)
        return turned(np.broadcast_to(where, x.shape), order, np.bool_)

    return given
