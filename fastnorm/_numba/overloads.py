"""The norms inside a user's own `@njit` functions, in `prange` bodies too.

Numba finds `register` through its entry point (pyproject.toml): nothing needs to be imported but
fastnorm. What is compiled into the user's function is the rows of `inside`, for one thread.

A row is the elements of one group side by side: arrays in another order are copied to that first.
"""

from __future__ import annotations

import numpy as np
from numba.core.errors import TypingError

import fastnorm
from fastnorm._numba import asked
from fastnorm._numba.compiling import making
from fastnorm._numba.inside import moments_of, normalized


def register() -> None:
    """Importing this file has done it."""


@making
def _normalized(x, n, per, affine, norm, given, f, kind):
    """Rows of n elements, of which `per` after one another have one weight; in C order."""
    source, y = asked.plain(x, kind), np.empty(x.shape, kind)
    normalized((source.reshape(-1), y.reshape(-1)), n, per, affine, norm, None, given, f)
    return y


# --- Of the trailing axes -------------------------------------------------------------------------


@making
def _layer(x, normalized_shape, weight, bias, centred, eps, f, kind):
    own = asked.trailing(x.shape, normalized_shape)
    affine, norm = asked.affine_of(weight, bias, own, kind), (centred, asked.eps_of(eps), 0.0)
    return _normalized(x, asked.product(own, 0, len(own)), 1, affine, norm, None, f, kind)


@asked.stands_for(fastnorm.layer_norm, 1)
def layer_norm(kind, f, **_):
    """`fastnorm.layer_norm` for compiled code."""

    def compiled(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, activation=None):
        asked.known(activation)
        return _layer(x, normalized_shape, weight, bias, True, eps, f, kind)

    return compiled


@asked.stands_for(fastnorm.rms_norm, 1)
def rms_norm(kind, f, eps, **_):
    """`fastnorm.rms_norm` for compiled code."""
    own, left_out = float(np.finfo(kind).eps), asked.is_none(eps)

    def compiled(x, normalized_shape=None, weight=None, eps=None, activation=None):
        asked.known(activation)
        least = own if left_out else eps
        return _layer(x, normalized_shape, weight, None, False, least, f, kind)

    return compiled


# --- Of channels ----------------------------------------------------------------------------------


@making
def _grouped(x, groups, weight, bias, eps, f, kind):
    """Group norm of (N, C, ...)."""
    c = x.shape[1]
    if groups < 1 or c % groups != 0:
        raise ValueError("num_groups does not divide the channels of x, which are on axis 1")
    if x.size == groups:
        raise ValueError("group_norm got one value per group, expected at least 2")
    affine, norm = asked.affine_of(weight, bias, (c,), kind), (True, asked.eps_of(eps), 0.0)
    n = asked.product(x.shape, 2, x.ndim)
    return _normalized(x, c // groups * n, n, affine, norm, None, f, kind)


@asked.stands_for(fastnorm.group_norm, 2)
def group_norm(kind, f, **_):
    """`fastnorm.group_norm` for compiled code, of (N, C, ...)."""

    def compiled(x, num_groups, weight=None, bias=None, eps=1e-5, activation=None):
        asked.known(activation)
        return _grouped(x, asked.groups_of(num_groups), weight, bias, eps, f, kind)

    return compiled


@asked.stands_for(fastnorm.instance_norm, 2)
def instance_norm(kind, f, running_mean, running_var, **_):
    """`fastnorm.instance_norm` for compiled code, of (N, C, ...) and its own statistics."""
    if not (asked.is_none(running_mean) and asked.is_none(running_var)):
        raise TypingError(
            "instance_norm inside compiled code takes no running statistics; use batch_norm"
        )

    def compiled(
        x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
        momentum=0.1, eps=1e-5, activation=None,
    ):  # fmt: skip
        asked.known(activation)
        asked.momentum_of(momentum)
        if not asked.use_input_stats_of(use_input_stats):
            raise ValueError("instance_norm got use_input_stats=False without running statistics")
        if 0 < x.size == x.shape[0] * x.shape[1]:
            raise ValueError("instance_norm got one position per channel, expected at least 2")
        return _grouped(x, max(x.shape[1], 1), weight, bias, eps, f, kind)

    return compiled


@asked.stands_for(fastnorm.batch_norm, 2)
def batch_norm(kind, f, running_mean, running_var, **_):
    """`fastnorm.batch_norm` for compiled code, of (N, C, ...), in inference."""
    if asked.is_none(running_mean) or asked.is_none(running_var):
        raise TypingError("batch_norm inside compiled code needs running_mean and running_var")

    def compiled(
        x, running_mean=None, running_var=None, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5, activation=None,
    ):  # fmt: skip
        asked.known(activation)
        if asked.training_of(training):
            raise ValueError(
                "batch_norm inside compiled code is for inference: training must be False"
            )
        asked.momentum_of(momentum)
        c = (x.shape[1],)
        given = (
            asked.running_of(running_mean, c, np.float64, 0.0),
            asked.running_of(running_var, c, np.float64, 0.0),
        )
        affine, norm = asked.affine_of(weight, bias, c, kind), (True, asked.eps_of(eps), 0.0)
        n = asked.product(x.shape, 2, x.ndim)
        return _normalized(x, n, n, affine, norm, given, f, kind)

    return compiled


# --- Of any axes ----------------------------------------------------------------------------------


@asked.stands_for(fastnorm.moments, 1)
def moments(kind, f, x, axis, keepdims, **_):
    """`fastnorm.moments` for compiled code: (mean, variance), in C order."""
    stays = x.ndim - asked.count_of(axis, x.ndim)
    shape = (1,) * (x.ndim if asked.keeps(keepdims) else stays)

    def compiled(x, axis=None, where=None, ddof=0, keepdims=False):
        order = asked.order_of(x, axis)
        mask, source = asked.mask_of(where, x, order), asked.turned(x, order, kind)
        groups = asked.product(source.shape, 0, stays)
        mean, var = np.empty(groups), np.empty(groups)
        n = asked.product(source.shape, stays, x.ndim)
        moments_of(source.reshape(-1), n, mask, asked.ddof_of(ddof), mean, var)
        own = order, source.shape, stays
        return asked.in_shape(mean, shape, *own), asked.in_shape(var, shape, *own)

    return compiled


@asked.stands_for(fastnorm.standardize, 1)
def standardize(kind, f, x, axis, **_):
    """`fastnorm.standardize` for compiled code: the result is in C order."""
    stays = x.ndim - asked.count_of(axis, x.ndim)

    def compiled(x, axis=None, where=None, ddof=0, eps=0.0):
        order = asked.order_of(x, axis)
        mask, source = asked.mask_of(where, x, order), asked.turned(x, order, kind)
        y = np.empty(source.shape, kind)
        n, norm = (
            asked.product(source.shape, stays, x.ndim),
            (True, asked.eps_of(eps), asked.ddof_of(ddof)),
        )
        affine = asked.affine_of(None, None, (), kind)
        normalized((source.reshape(-1), y.reshape(-1)), n, n, affine, norm, mask, None, f)
        return asked.turned_back(y, order, x.shape)

    return compiled
