"""The norms inside a user's own `@njit` functions, in `prange` bodies too.

Numba finds `register` through its entry point (pyproject.toml): nothing needs to be imported but
fastnorm. What is compiled into the user's function is the row of `forward`: one thread, no
allocation but the result.

A row is the elements of one group side by side: arrays in another order are copied to that first.

Numba lets go of an array after its last use, and an address is none: whoever takes the address of
an array's memory is given the array, or uses it once more afterwards.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import overload

import fastnorm
from fastnorm._numba import scalar
from fastnorm._numba.apply import apply_scale
from fastnorm._numba.blocking import FIELDS, SCALE
from fastnorm._numba.memory import inner, is_double, read, write
from fastnorm._numba.moments import merge_into, moments
from fastnorm._numba.scales import rstd_of
from fastnorm.schedule import BLOCK, LANES


def register() -> None:
    """Importing this file has done it."""


# --- One row --------------------------------------------------------------------------------------


@inner
def row_moments(x, n, centred, into, part, lanes, kind):
    """Moments of n elements side by side: those of blocks, merged in order."""
    moments(x, min(n, BLOCK), centred, into, 1, lanes, kind)
    i = BLOCK
    size = 8 if is_double(kind) else 4
    while i < n:
        moments(x + i * size, min(n - i, BLOCK), centred, part, 1, lanes, kind)
        merge_into(into, part, 1, 1)
        i += BLOCK


@inner
def largest_unit(x, n):
    """The power of two that brings doubles to 1: 1 where they are all 0, or not all finite."""
    largest = 0.0
    for i in range(n):
        v = abs(read(x, i, np.float64))
        if not v < math.inf:
            return 1.0
        largest = max(largest, v)
    return math.ldexp(1.0, min(-math.frexp(largest)[1], 1000)) if largest > 0.0 else 1.0


@inner
def scaled_moments(x, n, unit, centred, into, part, lanes):
    """Moments of n doubles times `unit`, where their squares leave the range."""
    scaled = np.empty(n, np.float64)
    for i in range(n):
        scaled[i] = read(x, i, np.float64) * unit
    row_moments(scaled.ctypes.data, n, centred, into, part, lanes, np.float64)
    scaled[0] = 0.0


@inner
def row_scale(x, n, centred, eps, room, kind):
    """From a row to its scale, at `room` + FIELDS numbers twice over."""
    part = room + 8 * FIELDS
    scale = part + 8 * FIELDS
    lanes = scale + 8 * SCALE
    row_moments(x, n, centred, room, part, lanes, kind)
    unit = 1.0
    if is_double(kind):
        v = read(room, 3, np.float64) / n + eps
        if not 1e-270 < v < 1e270:
            unit = largest_unit(x, n)
        if unit != 1.0:
            scaled_moments(x, n, unit, centred, room, part, lanes)
    mean = read(room, 1, np.float64)
    _, rstd = rstd_of(
        np.float64(n), read(room, 3, np.float64), read(room, 4, np.float64), eps, unit, kind
    )
    out_of_range = unit != 1.0
    if not is_double(kind):
        out_of_range = not scalar.holds(rstd) or (rstd != 0.0 and abs(mean) >= scalar.MOST)
    write(scale, 0, mean)
    write(scale, 1, read(room, 2, np.float64))
    write(scale, 2, rstd)
    write(scale, 3, unit)
    write(scale, 4, 1.0 if out_of_range else 0.0)
    write(scale, 5, 0.0)
    return scale


ROOM = 2 * FIELDS + SCALE + 4 * LANES  # numbers of float64 that a row needs


@inner
def given_scale(mean, var, eps, room, kind):
    """The same of statistics that are given."""
    scale = room + 8 * 2 * FIELDS
    rstd = scalar.inverse_root(var + eps, 0.0) if var + eps != 0.0 else 0.0
    out_of_range = not is_double(kind) and (
        not scalar.holds(rstd) or (rstd != 0.0 and abs(mean) >= scalar.MOST)
    )
    write(scale, 0, mean)
    write(scale, 1, 0.0)
    write(scale, 2, rstd)
    write(scale, 3, 1.0)
    write(scale, 4, 1.0 if out_of_range else 0.0)
    write(scale, 5, 0.0)
    return scale


@inner
def scale_of(x, n, centred, eps, room, kind):
    """Of a row of n elements; of none, whatever."""
    return row_scale(x, n, centred, eps, room, kind) if n > 0 else room


@inner
def rows(x, y, n, weight, bias, centred, eps, kind):
    """Each row's own statistics, and weights along it; arrays."""
    room = np.empty(ROOM, np.float64)
    wv = 1 if weight.size > 0 else 0
    bv = 1 if bias.size > 0 else 0
    size = 8 if is_double(kind) else 4
    for i in range(x.size // n):
        start = i * n * size
        at = x.ctypes.data + start
        s = scale_of(at, n, centred, eps, room.ctypes.data, kind)
        w, b = address(weight), address(bias)
        apply_scale(
            at, y.ctypes.data + start, n, s, 1, (w, b, wv, bv), (False, False), (kind, kind)
        )
    room[0] = 0.0


@inner
def channels(x, y, s, n, count, weight, bias, kind):
    """Apply the scale at s to `count` channels of n elements, with one weight each."""
    size = 8 if is_double(kind) else 4
    if n == 1:
        wv = 1 if weight != 0 else 0
        bv = 1 if bias != 0 else 0
        apply_scale(x, y, count, s, 1, (weight, bias, wv, bv), (False, False), (kind, kind))
        return
    for c in range(count):
        w = weight + c * size if weight != 0 else 0
        b = bias + c * size if bias != 0 else 0
        at = c * n * size
        apply_scale(x + at, y + at, n, s, 1, (w, b, 0, 0), (True, False), (kind, kind))


# --- What came in ---------------------------------------------------------------------------------


def _kind(x: Any, of: str) -> Any:
    """The number that is computed in: that of x."""
    if not isinstance(x, types.Array) or x.dtype not in (types.float32, types.float64):
        raise TypingError(
            f"{of} inside compiled code got x of type {x}, expected an array of float32 or "
            "float64; write x.astype(np.float32) first"
        )
    return np.float64 if x.dtype == types.float64 else np.float32


def _is_none(value: Any) -> bool:
    return value is None or isinstance(value, types.NoneType | types.Omitted)


def _compiled(function: Any) -> Any:
    options = {"error_model": "numpy", "fastmath": False}
    return overload(function, jit_options=options, strict=False)


def _number(value: Any, shape: Any, kind: Any) -> Any:
    """A weight or bias of this shape, flat, in the type that is computed in; of None no numbers."""
    raise TypeError("for compiled code")


@_compiled(_number)
def _compiled_number(value: Any, shape: Any, kind: Any) -> Any:
    if _is_none(value):
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


def _check_running(value: Any, channels: Any) -> Any:
    """Refuse running statistics that are not one float for each channel."""
    raise TypeError("for compiled code")


@_compiled(_check_running)
def _compiled_check_running(value: Any, channels: Any) -> Any:
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


def _between(value: Any, least: Any, most: Any, name: Any) -> Any:
    """A number, option or flag of the caller's; refuse one that is not between these two."""
    raise TypeError("for compiled code")


@_compiled(_between)
def _compiled_between(value: Any, least: Any, most: Any, name: Any) -> Any:
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


EPS = "eps must be a finite number, 0 or more, such as 1e-5"
MOMENTUM = "momentum must be a number from 0 to 1"


def _flag(value: Any, name: Any) -> Any:
    """A flag of the caller's; refuse what is neither True nor False, nor 0 or 1."""
    raise TypeError("for compiled code")


@_compiled(_flag)
def _compiled_flag(value: Any, name: Any) -> Any:
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


def _groups(value: Any) -> Any:
    """A number of groups."""
    raise TypeError("for compiled code")


@_compiled(_groups)
def _compiled_groups(value: Any) -> Any:
    if not isinstance(value, types.Integer):
        raise TypingError(f"num_groups is a {value} inside compiled code, expected a whole number")
    return lambda value: value


@inner
def address(numbers):
    """Where numbers lie; 0 where there are none."""
    return numbers.ctypes.data if numbers.size > 0 else 0


def _trailing(shape: Any, normalized_shape: Any) -> Any:
    """The trailing shape, a tuple."""
    raise TypeError("for compiled code")


@_compiled(_trailing)
def _compiled_trailing(shape: Any, normalized_shape: Any) -> Any:
    message = "normalized_shape is not the trailing shape of x; write x.shape[-1] for the last axis"
    if isinstance(normalized_shape, types.Integer):

        def last(shape, normalized_shape):
            if len(shape) < 1 or shape[len(shape) - 1] != normalized_shape:
                raise ValueError(message)
            return (normalized_shape,)

        return last
    if isinstance(normalized_shape, types.UniTuple):

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


@inner
def product(shape):
    """How many elements a row of this shape has."""
    n = 1
    for size in shape:
        n *= size
    return n


# --- The norms ------------------------------------------------------------------------------------


@_compiled(fastnorm.layer_norm)
def layer_norm(
    x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> Any:
    """`fastnorm.layer_norm` for compiled code: the result is in C order."""
    kind = _kind(x, "layer_norm")

    def compiled(x, normalized_shape, weight=None, bias=None, eps=1e-5):
        own = _trailing(x.shape, normalized_shape)
        w = _number(weight, own, kind)
        b = _number(bias, own, kind)
        _between(eps, 0.0, math.inf, EPS)
        source = np.ascontiguousarray(x)
        y = np.empty(x.shape, kind)
        if x.size > 0:
            rows(source, y, product(own), w, b, True, eps, kind)
        return y

    return compiled


@_compiled(fastnorm.rms_norm)
def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    """`fastnorm.rms_norm` for compiled code: the result is in C order."""
    kind = _kind(x, "rms_norm")
    own = float(np.finfo(kind).eps)
    if _is_none(eps):

        def compiled(x, normalized_shape, weight=None, eps=None):
            return _rms(x, normalized_shape, weight, own, kind)

    else:

        def compiled(x, normalized_shape, weight=None, eps=None):
            return _rms(x, normalized_shape, weight, eps, kind)

    return compiled


@inner
def _rms(x, normalized_shape, weight, eps, kind):
    own = _trailing(x.shape, normalized_shape)
    w = _number(weight, own, kind)
    _between(eps, 0.0, math.inf, EPS)
    source = np.ascontiguousarray(x)
    y = np.empty(x.shape, kind)
    if x.size > 0:
        rows(source, y, product(own), w, np.empty(0, kind), False, eps, kind)
    return y


@inner
def _grouped(x, groups, weight, bias, eps, kind):
    """Group norm of (N, C, ...)."""
    samples = x.shape[0]
    c = x.shape[1]
    if groups < 1 or c % groups != 0:
        raise ValueError("num_groups does not divide the channels of x, which are on axis 1")
    if x.size == groups:
        raise ValueError("group_norm got one value per group, expected at least 2")
    w = _number(weight, (c,), kind)
    b = _number(bias, (c,), kind)
    _between(eps, 0.0, math.inf, EPS)
    source = np.ascontiguousarray(x)
    y = np.empty(x.shape, kind)
    if x.size > 0:
        size = 8 if is_double(kind) else 4
        each = c // groups
        n = x.size // (samples * c)
        room = np.empty(ROOM, np.float64)
        for i in range(samples * groups):
            start = i * each * n * size
            channel = i % groups * each * size
            s = scale_of(source.ctypes.data + start, each * n, True, eps, room.ctypes.data, kind)
            ws = address(w) + channel if w.size > 0 else 0
            bs = address(b) + channel if b.size > 0 else 0
            channels(source.ctypes.data + start, y.ctypes.data + start, s, n, each, ws, bs, kind)
        room[0] = 0.0
    return y


@_compiled(fastnorm.group_norm)
def group_norm(
    x: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> Any:
    """`fastnorm.group_norm` for compiled code, of (N, C, ...): the result is in C order."""
    kind = _channels_kind(x, "group_norm")

    def compiled(x, num_groups, weight=None, bias=None, eps=1e-5):
        return _grouped(x, _groups(num_groups), weight, bias, eps, kind)

    return compiled


@_compiled(fastnorm.instance_norm)
def instance_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: Any = True, momentum: Any = 0.1, eps: Any = 1e-5,
) -> Any:  # fmt: skip
    """`fastnorm.instance_norm` for compiled code, of (N, C, ...) and its own statistics."""
    kind = _channels_kind(x, "instance_norm")
    if not (_is_none(running_mean) and _is_none(running_var)):
        raise TypingError(
            "instance_norm inside compiled code takes no running statistics; use batch_norm"
        )

    def compiled(
        x, running_mean=None, running_var=None, weight=None, bias=None,
        use_input_stats=True, momentum=0.1, eps=1e-5,
    ):  # fmt: skip
        _between(momentum, 0.0, 1.0, MOMENTUM)
        if not _flag(use_input_stats, "use_input_stats must be True or False"):
            raise ValueError("instance_norm got use_input_stats=False without running statistics")
        if 0 < x.size == x.shape[0] * x.shape[1]:
            raise ValueError("instance_norm got one position per channel, expected at least 2")
        return _grouped(x, max(x.shape[1], 1), weight, bias, eps, kind)

    return compiled


@_compiled(fastnorm.batch_norm)
def batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: Any = False, momentum: Any = 0.1, eps: Any = 1e-5,
) -> Any:  # fmt: skip
    """`fastnorm.batch_norm` for compiled code, of (N, C, ...), in inference."""
    kind = _channels_kind(x, "batch_norm")
    if _is_none(running_mean) or _is_none(running_var):
        raise TypingError("batch_norm inside compiled code needs running_mean and running_var")

    def compiled(
        x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if _flag(training, "training must be True or False"):
            raise ValueError(
                "batch_norm inside compiled code is for inference: training must be False"
            )
        c = x.shape[1]
        _check_running(running_mean, c)
        _check_running(running_var, c)
        w = _number(weight, (c,), kind)
        b = _number(bias, (c,), kind)
        _between(eps, 0.0, math.inf, EPS)
        _between(momentum, 0.0, 1.0, MOMENTUM)
        source = np.ascontiguousarray(x)
        y = np.empty(x.shape, kind)
        if x.size > 0:
            size = 8 if is_double(kind) else 4
            n = x.size // (x.shape[0] * c)
            room = np.empty(ROOM, np.float64)
            for i in range(x.shape[0] * c):
                k = i % c
                s = given_scale(
                    np.float64(running_mean[k]),
                    np.float64(running_var[k]),
                    eps,
                    room.ctypes.data,
                    kind,
                )
                ws = address(w) + k * size if w.size > 0 else 0
                bs = address(b) + k * size if b.size > 0 else 0
                at = i * n * size
                channels(source.ctypes.data + at, y.ctypes.data + at, s, n, 1, ws, bs, kind)
            room[0] = 0.0
        return y

    return compiled


@_compiled(fastnorm.moments)
def moments_of(x: Any, axis: Any = None, ddof: Any = 0) -> Any:
    """`fastnorm.moments` for compiled code, of all of x: (mean, variance)."""
    kind = _kind(x, "moments")
    if not _is_none(axis):
        raise TypingError("moments inside compiled code is of all of x: axis must be None")

    def compiled(x, axis=None, ddof=0):
        _between(ddof, -math.inf, math.inf, "ddof must be a finite number: 0, or 1")
        mean = math.nan
        var = math.nan
        source = np.ascontiguousarray(x)
        if x.size > 0:
            room = np.empty(ROOM, np.float64)
            start = room.ctypes.data
            part = start + 8 * FIELDS
            lanes = part + 8 * (FIELDS + SCALE)
            row_moments(source.ctypes.data, x.size, True, start, part, lanes, kind)
            unit = 1.0
            if is_double(kind) and not 1e-270 < room[3] / x.size < 1e270:
                unit = largest_unit(source.ctypes.data, x.size)
                if unit != 1.0:
                    scaled_moments(source.ctypes.data, x.size, unit, True, start, part, lanes)
            mean = (room[1] + room[2]) / unit
            if x.size > ddof:
                var = max(room[3] + room[4], 0.0) / (x.size - ddof) / unit / unit
            if not math.isfinite(room[1]):
                # infinities of one sign; of both, or with what is no number, there is no mean
                mean = 0.0
                var = math.nan
                for v in source.flat:
                    if not math.isfinite(v):
                        mean += v
            source.ravel()[:0] = 0  # it is there until here
        return mean, var

    return compiled


def _channels_kind(x: Any, of: str) -> Any:
    kind = _kind(x, of)
    if x.ndim < 2:
        raise TypingError(f"{of} got an x of {x.ndim} dimension, expected at least 2: (N, C, ...)")
    return kind
