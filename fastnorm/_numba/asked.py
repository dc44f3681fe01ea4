"""What comes in where a user's own `@njit` function calls a norm: taken, or refused.

What a type tells is refused when that function is compiled, with a TypingError, the rest when it
runs. A function of this kind has a name for Python's side and what stands for it when compiled.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import literally, types
from numba.core.errors import NumbaError, TypingError
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import overload
from numpy.exceptions import AxisError

from fastnorm._formulas import ACTIVATIONS, IN_KERNELS
from fastnorm._numba import activations
from fastnorm._numba.compiling import STRICT, making, when_compiled
from fastnorm.arguments import did_you_mean

HERE = "inside compiled code"
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


def stands_for(function: Any, least: int) -> Callable[[Any], Any]:
    """What takes the place of a public function of an x of at least so many dimensions.

    It makes the compiled function, with fewer options, from the type that is computed in, the
    activation and the arguments' types.
    """
    public, name = inspect.signature(function), function.__name__

    def register(typed: Any) -> Any:
        def checked(*args: Any, **options: Any) -> Any:
            try:
                given = public.bind(*args, **options)
            except TypeError as error:
                raise TypingError(f"{name} {HERE}: {error}") from error
            named = list(given.arguments)
            given.apply_defaults()
            kind = kind_of(given.arguments["x"], f"{name} {HERE}", least)
            f = function_of(given.arguments.get("activation"), kind)
            compiled = typed(kind, f, **given.arguments)
            for option in named:
                if option not in inspect.signature(compiled).parameters:
                    raise TypingError(f"{name} takes no {option}= {HERE}; {_INSTEAD[option]}")
            return compiled

        checked.__name__ = checked.__qualname__ = name
        # literals first: an activation is known by its name, the dimensions by `keepdims`
        overload(function, jit_options=STRICT, strict=False, prefer_literal=True)(checked)
        return typed

    return register


def _own(value: Any) -> Any:
    """What the type of an argument tells of its value: of a literal, and of one left out."""
    return getattr(value, "literal_value", getattr(value, "value", value))


def is_none(value: Any) -> bool:
    return isinstance(value, types.NoneType) or _own(value) is None


# --- x --------------------------------------------------------------------------------------------


def kind_of(x: Any, of: str, least: int) -> Any:
    """The number that is computed in: that of x, float64 for integers and booleans."""
    dtype = getattr(x, "dtype", None)
    taken = isinstance(dtype, types.Float | types.Integer | types.Boolean)
    if not (isinstance(x, types.Array) and taken and dtype != types.float16):
        instead = "write x.astype(np.float32) first"
        if dtype == types.float16:
            instead = "Numba has no float16 on the CPU: give x.astype(np.float32) from outside"
        raise TypingError(
            f"{of} got x of type {x}, expected an array of float32 or float64, integers or "
            f"booleans; {instead}"
        )
    if x.ndim < least:
        raise TypingError(f"{of} got an x of {x.ndim} dimensions, expected at least {least}")
    return np.float32 if dtype == types.float32 else np.float64


@when_compiled
def plain(x: Any, kind: Any) -> Any:
    """x in C order and this type: itself, or a copy."""
    if x.layout == "C" and x.dtype == kind.dtype:
        return lambda x, kind: x

    def copied(x, kind):
        y = np.empty(x.shape, kind)
        y[...] = x
        return y

    return copied


# --- Numbers and flags ----------------------------------------------------------------------------

# What of a type is taken as a number or a flag, and never True for a number.
_TAKEN: dict[type, Any] = {
    float: types.Float | types.Integer | float | int,
    int: types.Integer,
    bool: types.Boolean | types.Integer | bool,
}


def _option(name: str, expected: str, kind: type, least: float, most: float) -> Any:
    """A number or a flag of the caller's; refuse one that is not between these two."""
    message = f"{name} must be {expected}"

    @when_compiled
    def option(value: Any) -> Any:
        own = getattr(value, "value", value)  # of an argument that was left out
        if not isinstance(own, _TAKEN[kind]) or (isinstance(own, bool) and kind is not bool):
            raise TypingError(f"{name} is a {value} {HERE}, expected {expected}")

        def check(value):
            if not (least <= value <= most and -math.inf < value < math.inf):
                raise ValueError(message)
            return kind(value)

        return check

    return option


eps_of = _option("eps", "a finite number, 0 or more, such as 1e-5", float, 0.0, math.inf)
momentum_of = _option("momentum", "a number from 0 to 1", float, 0.0, 1.0)
ddof_of = _option("ddof", "a finite number: 0, or 1", float, -math.inf, math.inf)
groups_of = _option("num_groups", "a whole number", int, -math.inf, math.inf)
training_of = _option("training", "True or False", bool, 0, 1)
use_input_stats_of = _option("use_input_stats", "True or False", bool, 0, 1)


def _array(name: str, expected: str, taken: Any) -> Any:
    """An array of the caller's, flat and of a kind, for None of neutral numbers; refuse others."""

    @when_compiled
    def array(value: Any, shape: Any, kind: Any, neutral: Any) -> Any:
        if is_none(value):
            return lambda value, shape, kind, neutral: np.full(
                product(shape, 0, len(shape)), neutral, kind
            )
        if not (isinstance(value, types.Array) and isinstance(value.dtype, taken)):
            raise TypingError(f"{name} is a {value} {HERE}, expected {expected}")
        message = f"{name} has another shape than {expected}, which {HERE} is none that broadcasts"
        if value.ndim != len(shape):
            raise TypingError(f"{message}; got {value}, expected {len(shape)} dimensions")

        def given(value, shape, kind, neutral):
            if value.shape != shape:
                raise ValueError(message)
            return plain(value, kind).reshape(-1)

        return given

    return array


running_of = _array(
    "running_mean or running_var", "an array of floats, one for each channel", types.Float
)
_weight_of = _array(
    "weight or bias",
    "an array of real numbers, one for each element that is normalised together or each channel",
    types.Float | types.Integer | types.Boolean,
)


@when_compiled
def affine_of(weight: Any, bias: Any, shape: Any, kind: Any) -> Any:
    """Weights and biases of this shape, flat; one of each that changes nothing for none at all."""
    if is_none(weight) and is_none(bias):
        return lambda weight, bias, shape, kind: (np.full(1, 1.0, kind), np.full(1, -0.0, kind))
    return lambda weight, bias, shape, kind: (
        _weight_of(weight, shape, kind, 1.0),
        _weight_of(bias, shape, kind, -0.0),
    )


@when_compiled
def trailing(shape: Any, normalized_shape: Any) -> Any:
    """The trailing shape, a tuple."""
    if isinstance(normalized_shape, types.Integer):
        return lambda shape, normalized_shape: trailing(shape, (np.intp(normalized_shape),))
    if not (isinstance(normalized_shape, types.UniTuple) and len(normalized_shape)):
        raise TypingError(
            f"normalized_shape is a {normalized_shape} {HERE}, expected the trailing shape of x: "
            "a whole number, or a tuple of them"
        )
    message = "normalized_shape is not the trailing shape of x; write x.shape[-1] for the last axis"
    before = max(len(shape) - len(normalized_shape), 0)

    def found(shape, normalized_shape):
        if shape[before:] != normalized_shape:
            raise ValueError(message)
        return normalized_shape

    return found


@making
def product(lengths, first, last):
    """How many elements there are along these axes."""
    n = 1
    for i in range(first, last):
        n *= lengths[i]
    return n


# --- Activations ----------------------------------------------------------------------------------

_EXPECTED = (
    f"expected None, one of {', '.join(map(repr, ACTIVATIONS))}, or a function of one number that "
    "numba.njit has compiled"
)


def function_of(activation: Any, kind: Any) -> Any:
    """The function of one number that an activation is; None for none."""
    name = _own(activation)
    if isinstance(name, str) and name in ACTIVATIONS:
        return activations.OURS[IN_KERNELS.index(name)][kind is np.float64]
    if isinstance(name, str) or is_none(activation) or isinstance(activation, types.UnicodeType):
        return None  # `known` refuses a name that is none of ours, and asks for one's value
    if not isinstance(activation, types.Dispatcher):
        raise TypingError(f"activation is {activation} {HERE}, {_EXPECTED}")
    try:
        activations.check_result(activation.dispatcher, kind)
    except (TypeError, NumbaError) as error:
        raise TypingError(str(error)) from error
    return _by_type(activation.dispatcher)


@cache
def _by_type(function: Any) -> Any:
    """A function of the user's, known by its type: its address would keep a caller off the disk."""
    return when_compiled(lambda v: lambda v: function(v))


def known(activation: Any) -> Any:
    """See that a name is known when the caller is compiled; refuse what is none of ours."""
    raise TypeError("for compiled code")


@overload(known, jit_options=STRICT, strict=False, prefer_literal=True)
def _known(activation: Any) -> Any:
    name = _own(activation)
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


def keeps(keepdims: Any) -> bool:
    """A flag that decides the type of a result."""
    own = _own(keepdims)
    if isinstance(own, bool | int) and own in (0, 1):
        return bool(own)
    raise TypingError(
        f"keepdims is a {keepdims} {HERE}, expected True or False themselves: they decide how many "
        "dimensions the result has"
    )


def count_of(axis: Any, ndim: int) -> int:
    """How many axes these are."""
    if is_none(axis):
        return ndim
    axes = axis if isinstance(axis, types.BaseTuple) else (axis,)
    if not all(isinstance(a, types.Integer) for a in axes):
        expected = "expected None, a whole number or a tuple of them"
        raise TypingError(f"axis is a {axis} {HERE}, {expected}")
    if len(axes) > ndim:
        raise TypingError(f"axis is a {axis} {HERE}, but x has {ndim} dimensions")
    return len(axes)


@when_compiled
def order_of(x: Any, axis: Any) -> Any:
    """The axes that stay, then those that are reduced."""
    start = tuple(range(x.ndim))
    if is_none(axis) or not count_of(axis, x.ndim):
        return lambda x, axis: start
    if isinstance(axis, types.Integer):
        return lambda x, axis: _sorted(start, (np.intp(axis),))
    if all(isinstance(a, types.IntegerLiteral) for a in axis):
        given = tuple(a.literal_value for a in axis)
        return lambda x, axis: _sorted(start, given)
    if isinstance(axis, types.UniTuple):
        return lambda x, axis: _sorted(start, axis)
    raise TypingError(f"axis is a {axis} {HERE}, expected numbers of one type")


@making
def _sorted(order, axes):
    stays, reduced = 0, len(order) - len(axes)
    for axis in axes:
        if not -len(order) <= axis < len(order):
            raise AxisError("axis is out of range: x has no such axis")
    for a in range(len(order)):
        found = 0
        for axis in axes:
            found += axis == a or axis == a - len(order)
        if found > 1:
            raise ValueError("axis has the same axis of x twice")
        order = tuple_setitem(order, reduced if found else stays, a)
        stays, reduced = stays + 1 - found, reduced + found
    return order


@when_compiled
def turned(x: Any, order: Any, kind: Any) -> Any:
    """x with its axes in this order, in C order and this type."""
    start = tuple(range(x.ndim))
    return lambda x, order, kind: (
        plain(x, kind) if order == start else plain(x.transpose(order), kind)
    )


@when_compiled
def turned_back(y: Any, order: Any, shape: Any) -> Any:
    """What has its axes in this order, in C order again."""
    start = tuple(range(y.ndim))

    def back(y, order, shape):
        if order == start:
            return y
        into = np.empty(shape, y.dtype)
        into.transpose(order)[...] = y
        return into

    return back


@when_compiled
def in_shape(numbers: Any, shape: Any, order: Any, of: Any, stays: Any) -> Any:
    """Numbers of groups in a shape of ones, which are along axes that stay, the first of `of`."""
    if not len(shape):
        return lambda numbers, shape, order, of, stays: numbers[0]
    kept = len(shape) == len(of)

    def shaped(numbers, shape, order, of, stays):
        for i in range(stays):
            shape = tuple_setitem(shape, order[i] if kept else i, of[i])
        return numbers.reshape(shape)

    return shaped


@when_compiled
def mask_of(where: Any, x: Any, order: Any) -> Any:
    """A mask, flat, whose elements are in the order of those of x; None for none."""
    if is_none(where):
        return lambda where, x, order: None
    if isinstance(where, types.Boolean):
        return lambda where, x, order: np.full(x.size, where)
    if not (isinstance(where, types.Array) and isinstance(where.dtype, types.Boolean)):
        raise TypingError(f"where is a {where} {HERE}, expected an array of bool")
    message = "where has not a shape that broadcasts to that of x"
    extra = x.ndim - where.ndim
    if extra < 0:
        raise TypingError(f"{message}: got {where}, and x has {x.ndim} dimensions")

    def given(where, x, order):
        for i in range(where.ndim):
            if where.shape[i] != 1 and where.shape[i] != x.shape[extra + i]:
                raise ValueError(message)
        return turned(np.broadcast_to(where, x.shape), order, np.bool_).reshape(-1)

    return given
