"""The norms inside a user's own `@njit` functions, in `prange` bodies too.

Numba finds `register` through its entry point (pyproject.toml): nothing needs to be imported but
fastnorm. What is compiled into the user's function is the rows of `inside`: one thread, no
allocation but the result.

A row is the elements of one group side by side: arrays in another order are copied to that first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.core.errors import TypingError

import fastnorm
from fastnorm._numba.asked import (
    check_between,
    check_running,
    constant,
    count_of,
    flag,
    function_of,
    groups_of,
    is_none,
    kind_of,
    known,
    mask_of,
    number_of,
    order_of,
    plain,
    product,
    shape_of_groups,
    stands_for,
    trailing,
    turned,
    turned_back,
)
from fastnorm._numba.inside import (
    ROOM,
    address,
    channels,
    given_scale,
    rows,
    scale_of,
    standardized,
    statistics,
)
from fastnorm._numba.memory import inner, size_of

EPS = "eps must be a finite number, 0 or more, such as 1e-5"
MOMENTUM = "momentum must be a number from 0 to 1"
DDOF = "ddof must be a finite number: 0, or 1"


def register() -> None:
    """Importing this file has done it."""


# --- Of the trailing axes -------------------------------------------------------------------------


@inner
def _layer(x, normalized_shape, affine, norm, f, kind):
    """Layer or RMS norm; `norm` is whether it is centred, and eps."""
    own = trailing(x.shape, normalized_shape)
    w = number_of(affine[0], own, kind)
    b = number_of(affine[1], own, kind)
    check_between(norm[1], 0.0, math.inf, EPS)
    source = plain(x, kind)
    y = np.empty(x.shape, kind)
    if x.size > 0:
        rows(source, y, product(own, 0), (w, b), norm, f, kind)
    return y


@stands_for(fastnorm.layer_norm)
def layer_norm(
    x: Any, normalized_shape: Any = None, weight: Any = None, bias: Any = None, eps: Any = 1e-5,
    activation: Any = None,
) -> Any:  # fmt: skip
    """`fastnorm.layer_norm` for compiled code: the result is in C order."""
    kind = kind_of(x, "layer_norm", 1)
    f = function_of(activation, kind)

    def compiled(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, activation=None):
        known(activation)
        return _layer(x, normalized_shape, (weight, bias), (True, eps), f, kind)

    return compiled


@stands_for(fastnorm.rms_norm)
def rms_norm(
    x: Any, normalized_shape: Any = None, weight: Any = None, eps: Any = None,
    activation: Any = None,
) -> Any:  # fmt: skip
    """`fastnorm.rms_norm` for compiled code: the result is in C order."""
    kind = kind_of(x, "rms_norm", 1)
    f = function_of(activation, kind)
    own = float(np.finfo(kind).eps)
    if is_none(eps):

        def compiled(x, normalized_shape=None, weight=None, eps=None, activation=None):
            known(activation)
            return _layer(x, normalized_shape, (weight, None), (False, own), f, kind)

    else:

        def compiled(x, normalized_shape=None, weight=None, eps=None, activation=None):
            known(activation)
            return _layer(x, normalized_shape, (weight, None), (False, eps), f, kind)

    return compiled


# --- Of channels ----------------------------------------------------------------------------------


@inner
def _grouped(x, groups, affine, eps, f, kind):
    """Group norm of (N, C, ...)."""
    samples = x.shape[0]
    c = x.shape[1]
    if groups < 1 or c % groups != 0:
        raise ValueError("num_groups does not divide the channels of x, which are on axis 1")
    if x.size == groups:
        raise ValueError("group_norm got one value per group, expected at least 2")
    w = number_of(affine[0], (c,), kind)
    b = number_of(affine[1], (c,), kind)
    check_between(eps, 0.0, math.inf, EPS)
    source = plain(x, kind)
    y = np.empty(x.shape, kind)
    if x.size > 0:
        each = c // groups
        n = x.size // (samples * c)
        room = np.empty(ROOM, np.float64)
        for i in range(samples * groups):
            start = i * each * n * size_of(kind)
            channel = i % groups * each * size_of(kind)
            at = source.ctypes.data + start
            s = scale_of(at, each * n, True, eps, room.ctypes.data, kind)
            ws = address(w) + channel if w.size > 0 else 0
            bs = address(b) + channel if b.size > 0 else 0
            channels(at, y.ctypes.data + start, s, n, each, (ws, bs), f, kind)
        room[0] = 0.0
    return y


@stands_for(fastnorm.group_norm)
def group_norm(
    x: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5,
    activation: Any = None,
) -> Any:  # fmt: skip
    """`fastnorm.group_norm` for compiled code, of (N, C, ...): the result is in C order."""
    kind = kind_of(x, "group_norm", 2)
    f = function_of(activation, kind)

    def compiled(x, num_groups, weight=None, bias=None, eps=1e-5, activation=None):
        known(activation)
        return _grouped(x, groups_of(num_groups), (weight, bias), eps, f, kind)

    return compiled


@stands_for(fastnorm.instance_norm)
def instance_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: Any = True, momentum: Any = 0.1, eps: Any = 1e-5, activation: Any = None,
) -> Any:  # fmt: skip
    """`fastnorm.instance_norm` for compiled code, of (N, C, ...) and its own statistics."""
    kind = kind_of(x, "instance_norm", 2)
    f = function_of(activation, kind)
    if not (is_none(running_mean) and is_none(running_var)):
        raise TypingError(
            "instance_norm inside compiled code takes no running statistics; use batch_norm"
        )

    def compiled(
        x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
        momentum=0.1, eps=1e-5, activation=None,
    ):  # fmt: skip
        known(activation)
        check_between(momentum, 0.0, 1.0, MOMENTUM)
        if not flag(use_input_stats, "use_input_stats must be True or False"):
            raise ValueError("instance_norm got use_input_stats=False without running statistics")
        if 0 < x.size == x.shape[0] * x.shape[1]:
            raise ValueError("instance_norm got one position per channel, expected at least 2")
        return _grouped(x, max(x.shape[1], 1), (weight, bias), eps, f, kind)

    return compiled


@inner
def _by_running(x, running, affine, eps, f, kind):
    """Batch norm of (N, C, ...) by the statistics of each channel."""
    c = x.shape[1]
    mean, var = running
    check_running(mean, c)
    check_running(var, c)
    w = number_of(affine[0], (c,), kind)
    b = number_of(affine[1], (c,), kind)
    check_between(eps, 0.0, math.inf, EPS)
    source = plain(x, kind)
    y = np.empty(x.shape, kind)
    if x.size > 0:
        n = x.size // (x.shape[0] * c)
        room = np.empty(ROOM, np.float64)
        for i in range(x.shape[0] * c):
            k = i % c
            s = given_scale(np.float64(mean[k]), np.float64(var[k]), eps, room.ctypes.data, kind)
            ws = address(w) + k * size_of(kind) if w.size > 0 else 0
            bs = address(b) + k * size_of(kind) if b.size > 0 else 0
            at = i * n * size_of(kind)
            channels(source.ctypes.data + at, y.ctypes.data + at, s, n, 1, (ws, bs), f, kind)
        room[0] = 0.0
    return y


@stands_for(fastnorm.batch_norm)
def batch_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    training: Any = False, momentum: Any = 0.1, eps: Any = 1e-5, activation: Any = None,
) -> Any:  # fmt: skip
    """`fastnorm.batch_norm` for compiled code, of (N, C, ...), in inference."""
    kind = kind_of(x, "batch_norm", 2)
    f = function_of(activation, kind)
    if is_none(running_mean) or is_none(running_var):
        raise TypingError("batch_norm inside compiled code needs running_mean and running_var")

    def compiled(
        x, running_mean=None, running_var=None, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5, activation=None,
    ):  # fmt: skip
        known(activation)
        if flag(training, "training must be True or False"):
            raise ValueError(
                "batch_norm inside compiled code is for inference: training must be False"
            )
        check_between(momentum, 0.0, 1.0, MOMENTUM)
        return _by_running(x, (running_mean, running_var), (weight, bias), eps, f, kind)

    return compiled


# --- Of any axes ----------------------------------------------------------------------------------


@stands_for(fastnorm.moments)
def moments(
    x: Any, axis: Any = None, where: Any = None, ddof: Any = 0, keepdims: Any = False
) -> Any:
    """`fastnorm.moments` for compiled code: (mean, variance), in C order."""
    kind = kind_of(x, "moments", 1)
    stays = x.ndim - count_of(axis, x.ndim)
    shape = (1,) * (x.ndim if constant(keepdims, "keepdims") else stays)
    if not shape:

        def compiled(x, axis=None, where=None, ddof=0, keepdims=False):
            check_between(ddof, -math.inf, math.inf, DDOF)
            order = order_of(x, axis)
            mask = mask_of(where, x, order)
            mean, var = np.empty(1), np.empty(1)
            statistics(turned(x, order, kind), x.size, mask, ddof, mean, var, kind)
            return mean[0], var[0]

    else:

        def compiled(x, axis=None, where=None, ddof=0, keepdims=False):
            check_between(ddof, -math.inf, math.inf, DDOF)
            order = order_of(x, axis)
            mask = mask_of(where, x, order)
            source = turned(x, order, kind)
            own = shape_of_groups(shape, order, source.shape, stays)
            mean, var = np.empty(own), np.empty(own)
            n = product(source.shape, stays)
            statistics(source, n, mask, ddof, mean.reshape(-1), var.reshape(-1), kind)
            return mean, var

    return compiled


@stands_for(fastnorm.standardize)
def standardize(x: Any, axis: Any = None, where: Any = None, ddof: Any = 0, eps: Any = 0.0) -> Any:
    """`fastnorm.standardize` for compiled code: the result is in C order."""
    kind = kind_of(x, "standardize", 1)
    stays = x.ndim - count_of(axis, x.ndim)

    def compiled(x, axis=None, where=None, ddof=0, eps=0.0):
        check_between(ddof, -math.inf, math.inf, DDOF)
        check_between(eps, 0.0, math.inf, EPS)
        order = order_of(x, axis)
        mask = mask_of(where, x, order)
        source = turned(x, order, kind)
        y = np.empty(source.shape, kind)
        if x.size > 0:
            standardized(source, y, product(source.shape, stays), mask, ddof, eps, kind)
        return turned_back(y, order, x.shape)

    return compiled
