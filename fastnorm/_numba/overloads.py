"""The norms inside a user's own `@njit` functions, in `prange` bodies too.

Numba finds `register` through its entry point (pyproject.toml): nothing needs to be imported but
fastnorm. What is compiled into the user's function is the row of `forward`: one thread, no
allocation but the result.

A row is the elements of one group side by side: arrays in another order are copied to that first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import overload

import fastnorm
from fastnorm._numba.apply import apply_run
from fastnorm._numba.compiling import STRICT, inner
from fastnorm._numba.moments import moments_of_blocks
from fastnorm._numba.scales import RSTD, in_range, out_of_range, scale_of_given, scale_of_unit


def register() -> None:
    """Importing this file has done it."""


# --- One row --------------------------------------------------------------------------------------


@inner
def row_moments(x, centred, eps):
    """Moments of the elements of x, which lie side by side, times a unit, and that."""
    found = moments_of_blocks(x, centred)
    place = (1, x.size, 1), (0, 0, 1, 0), (0, 0, 0, 0)
    return in_range(found, eps, (RSTD, centred, False), x, None, place)


@inner
def row_scale(x, centred, eps):
    """From a row to its scale."""
    found, unit = row_moments(x, centred, eps)
    mean, rest, _, rstd = scale_of_unit(found, eps, RSTD, unit, x)
    return mean, rest, rstd, unit, unit != 1.0 or out_of_range(mean, rstd, x)


@inner
def rows(x, y, weight, bias, centred, eps):
    """Each row's own statistics, and weights along it; rows are as long as x.shape[1]."""
    for i in range(x.shape[0]):
        apply_run(x[i], y[i], row_scale(x[i], centred, eps), weight, bias, False)


@inner
def channels(x, y, scale, weight, bias):
    """Apply one scale to channels, the rows of x, with one weight each."""
    if x.shape[1] == 1:
        apply_run(x.ravel(), y.ravel(), scale, weight, bias, False)
        return
    for c in range(x.shape[0]):
        w = weight[min(c, weight.size - 1) :][:1]
        b = bias[min(c, bias.size - 1) :][:1]
        apply_run(x[c], y[c], scale, w, b, False)


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
    return overload(function, jit_options=STRICT, strict=False)


def _number(value: Any, shape: Any, kind: Any, otherwise: Any) -> Any:
    """A weight or bias of this shape, flat, in the type that is computed in; of None one number."""
    raise TypeError("for compiled code")


@_compiled(_number)
def _compiled_number(value: Any, shape: Any, kind: Any, otherwise: Any) -> Any:
    if _is_none(value):
        return lambda value, shape, kind, otherwise: np.full(1, kind(otherwise))
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

    def given(value, shape, kind, otherwise):
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
        w = _number(weight, own, kind, 1)
        b = _number(bias, own, kind, 0)
        _between(eps, 0.0, math.inf, EPS)
        source = np.ascontiguousarray(x)
        y = np.empty(x.shape, kind)
        if x.size > 0:
            n = product(own)
            whole = (x.size // n, n)
            rows(source.reshape(whole), y.reshape(whole), w, b, True, eps)
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
    w = _number(weight, own, kind, 1)
    _between(eps, 0.0, math.inf, EPS)
    source = np.ascontiguousarray(x)
    y = np.empty(x.shape, kind)
    if x.size > 0:
        n = product(own)
        whole = (x.size // n, n)
        rows(source.reshape(whole), y.reshape(whole), w, np.zeros(1, kind), False, eps)
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
    w = _number(weight, (c,), kind, 1)
    b = _number(bias, (c,), kind, 0)
    _between(eps, 0.0, math.inf, EPS)
    source = np.ascontiguousarray(x)
    y = np.empty(x.shape, kind)
    if x.size > 0:
        each = c // groups
        whole = (samples * groups, each, x.size // (samples * c))
        source, to = source.reshape(whole), y.reshape(whole)
        for i in range(samples * groups):
            k = i % groups * each
            ws, bs = w[min(k, w.size - 1) :][:each], b[min(k, b.size - 1) :][:each]
            channels(source[i], to[i], row_scale(source[i].ravel(), True, eps), ws, bs)
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
        w = _number(weight, (c,), kind, 1)
        b = _number(bias, (c,), kind, 0)
        _between(eps, 0.0, math.inf, EPS)
        _between(momentum, 0.0, 1.0, MOMENTUM)
        source = np.ascontiguousarray(x)
        y = np.empty(x.shape, kind)
        if x.size > 0:
            whole = (x.shape[0] * c, x.size // (x.shape[0] * c))
            source, to = source.reshape(whole), y.reshape(whole)
            for i in range(x.shape[0] * c):
                k = i % c
                mean, var = np.float64(running_mean[k]), np.float64(running_var[k])
                scale = scale_of_given(mean, var, eps, RSTD, source)
                ws, bs = w[min(k, w.size - 1) :][:1], b[min(k, b.size - 1) :][:1]
                apply_run(source[i], to[i], scale, ws, bs, True)
        return y

    return compiled


@_compiled(fastnorm.moments)
def moments_of(x: Any, axis: Any = None, ddof: Any = 0) -> Any:
    """`fastnorm.moments` for compiled code, of all of x: (mean, variance)."""
    _kind(x, "moments")
    if not _is_none(axis):
        raise TypingError("moments inside compiled code is of all of x: axis must be None")

    def compiled(x, axis=None, ddof=0):
        _between(ddof, -math.inf, math.inf, "ddof must be a finite number: 0, or 1")
        mean = math.nan
        var = math.nan
        source = np.ascontiguousarray(x)
        if x.size > 0:
            flat = source.ravel()
            found, unit = row_moments(flat, True, 0.0)
            mean = (found[1] + found[2]) / unit
            if x.size > ddof:
                rest = found[4] if math.isfinite(found[4]) else 0.0
                var = max(found[3] + rest, 0.0) / (x.size - ddof) / unit / unit
            if not math.isfinite(found[1]):
                # infinities of one sign; of both, or with what is no number, there is no mean
                mean = 0.0
                var = math.nan
                for v in flat:
                    if not math.isfinite(v):
                        mean += v
        return mean, var

    return compiled


def _channels_kind(x: Any, of: str) -> Any:
    kind = _kind(x, of)
    if x.ndim < 2:
        raise TypingError(f"{of} got an x of {x.ndim} dimension, expected at least 2: (N, C, ...)")
    return kind
