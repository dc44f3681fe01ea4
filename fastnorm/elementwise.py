"""What takes the place of a norm, each element by itself: y = w f(alpha x + shift) + b."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from fastnorm.arguments import Array, as_array, cast, parameter, same_shape, spread, taken
from fastnorm.arrays import ArrayView, to_device_of, to_host
from fastnorm.dispatch import public
from fastnorm.execution import Done, Request, delivered, new_like, scaled

__all__ = [
    "derf",
    "derf_backward",
    "dynamic_tanh",
    "dynamic_tanh_backward",
]


@public()
def dynamic_tanh(
    x: ArrayLike,
    alpha: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> Request[Array]:
    r"""Squash each value: a layer without statistics that stands in for a norm.

    .. math:: y = w \tanh(\alpha x) + b

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    alpha
        One number.
    weight, bias
        Any shape that broadcasts against `x`: (D,) along the last axis, (C, 1, 1) for NCHW.

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Zhu, Chen, He, LeCun and Liu, "Transformers without Normalization", 2025, arXiv:2503.10622.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.dynamic_tanh(np.array([0.0, 100.0]), 0.5, np.array([1.0, 2.0]))
    array([0., 2.])
    """
    return _squashed("tanh", "dynamic_tanh", x, alpha, 0.0, weight, bias)


@public(cached=False, devices=False)
def dynamic_tanh_backward(
    dy: ArrayLike, x: ArrayLike, alpha: ArrayLike, weight: ArrayLike | None = None
) -> Request[tuple[Array, ...]]:
    r"""Gradients of `dynamic_tanh`.

    Parameters
    ----------
    dy
        The gradient of y: the shape of `x`.
    x, alpha, weight
        As they were given to `dynamic_tanh`.

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dalpha
        The shape of `alpha`.
    dweight, dbias
        The shape and dtype of `weight`, or without one (D,), the last axis of `x`, and its dtype.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x, dy = np.array([0.0, 100.0]), np.array([1.0, 1.0])
    >>> dx, dalpha, dweight, dbias = fn.dynamic_tanh_backward(dy, x, 0.5)
    >>> dx.round(3), dweight
    (array([0.5, 0. ]), array([0., 1.]))
    """
    dx, dalpha, _, *affine = _gradients(
        "tanh", _slope_of_tanh, "dynamic_tanh_backward", dy, x, alpha, 0.0, weight
    )
    return Done((dx, dalpha, *affine))


def _slope_of_tanh(u: Array) -> Array:
    e = np.exp(-2.0 * abs(u))  # 1 - tanh^2 would cancel
    slope: Array = 4.0 * e / (1.0 + e) ** 2
    return slope


@public(cached=False)
def derf(
    x: ArrayLike,
    alpha: ArrayLike,
    shift: ArrayLike = 0.0,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> Request[Array]:
    r"""Squash each value by the error function: a layer that stands in for a norm.

    .. math:: y = w \operatorname{erf}(\alpha x + s) + b

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    alpha, shift
        One number each.
    weight, bias
        Any shape that broadcasts against `x`: (D,) along the last axis, (C, 1, 1) for NCHW.

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Chen, Lu, Zhu, Sun and Liu, "Stronger Normalization-Free Transformers", 2025, arXiv:2512.10938.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.derf(np.array([-1.0, 100.0]), 0.5, 0.5, np.array([1.0, 2.0]))
    array([0., 2.])
    """
    return _squashed("erf", "derf", x, alpha, shift, weight, bias)


@public(cached=False, devices=False)
def derf_backward(
    dy: ArrayLike,
    x: ArrayLike,
    alpha: ArrayLike,
    shift: ArrayLike = 0.0,
    weight: ArrayLike | None = None,
) -> Request[tuple[Array, ...]]:
    r"""Gradients of `derf`.

    Parameters
    ----------
    dy
        The gradient of y: the shape of `x`.
    x, alpha, shift, weight
        As they were given to `derf`.

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dalpha, dshift
        The shapes of `alpha` and `shift`.
    dweight, dbias
        The shape and dtype of `weight`, or without one (D,), the last axis of `x`, and its dtype.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x, dy = np.array([0.0, 100.0]), np.array([1.0, 1.0])
    >>> dx, dalpha, dshift, dweight, dbias = fn.derf_backward(dy, x, 0.5)
    >>> dx.round(3), dweight
    (array([0.564, 0.   ]), array([0., 1.]))
    """
    return Done(_gradients("erf", _slope_of_erf, "derf_backward", dy, x, alpha, shift, weight))


def _slope_of_erf(u: Array) -> Array:
    slope: Array = 2.0 / math.sqrt(math.pi) * np.exp(-u * u)
    return slope


# --- Any f, by its name in _formulas.SQUASHES ----------------------------------------------------

# Elements that a gradient takes at once, in float64.
_AT_ONCE = 1 << 15

# A smaller factor would bring numbers that are not far out to the end of float64's range.
_LEAST_FACTOR = 1e-300


def _squashed(
    f: str, of: str, x: ArrayLike, alpha: ArrayLike, shift: ArrayLike,
    weight: ArrayLike | None, bias: ArrayLike | None,
) -> Request[Array]:  # fmt: skip
    """y = weight f(alpha x + shift) + bias, as `of`, whose name that is."""
    array, _ = taken(x, None, of)
    factor, added = (
        float(_number(value, name).reshape(()))
        for value, name in ((alpha, "alpha"), (shift, "shift"))
    )
    w, b = (
        None if value is None else _along(parameter(value, name, array), name, array)
        for value, name in ((weight, "weight"), (bias, "bias"))
    )
    if added == 0.0:
        return scaled(x, array, factor, w, b, squash=f)
    # alpha (x - centre): a kernel subtracts what a float32 does not hold of the centre, too
    with np.errstate(all="ignore"):
        centre = float(np.float64(-added) / factor)
    if abs(factor) >= _LEAST_FACTOR and math.isfinite(centre):
        return scaled(x, array, factor, w, b, squash=f, centre=centre)
    with np.errstate(all="ignore"):
        y = _of_doubles(f, to_host(array).astype(np.float64) * factor + added)
        y = y * (1.0 if w is None else to_host(w)) + (0.0 if b is None else to_host(b))
    y = cast(y, array.dtype)
    if isinstance(array, ArrayView):
        return Done(delivered(to_device_of(array, y), x))
    result = new_like(array)
    result[...] = y
    return Done(delivered(result, x))


def _gradients(
    f: str, slope: Callable[[Array], Array], of: str, dy: ArrayLike, x: ArrayLike,
    alpha: ArrayLike, shift: ArrayLike, weight: ArrayLike | None,
) -> tuple[Array, ...]:  # fmt: skip
    """(dx, dalpha, dshift, dweight, dbias) of `_squashed`; `slope` is the derivative of f."""
    array, _ = taken(x, None, of)
    rise = same_shape(dy, "dy", array)
    numbers = _number(alpha, "alpha"), _number(shift, "shift")
    factor, added = (float(number.reshape(())) for number in numbers)
    given = np.ones(array.shape[-1:], array.dtype) if weight is None else as_array(weight, "weight")
    w = cast(_along(given, "weight", array), np.float64)
    axes = tuple(axis for axis, n in enumerate(w.shape) if n == 1)
    dweight, dbias = np.zeros_like(w), np.zeros_like(w)
    dalpha = dshift = 0.0
    dx = new_like(array)
    rows = max(1, _AT_ONCE * len(array) // max(array.size, 1))
    with np.errstate(all="ignore"):
        for first in range(0, len(array) if array.size else 0, rows):
            at = slice(first, first + rows)
            own = at if len(w) > 1 else slice(None)
            g, v = rise[at].astype(np.float64), array[at].astype(np.float64)
            u = factor * v + added
            dweight[own] += (g * _of_doubles(f, u)).sum(axis=axes, keepdims=True)
            dbias[own] += g.sum(axis=axes, keepdims=True)
            g *= w[own] * slope(u)
            dalpha += float((g * v).sum())
            dshift += float(g.sum())
            dx[at] = g * factor
        dweight, dbias = (
            cast(total.reshape(given.shape), given.dtype) for total in (dweight, dbias)
        )
    of_numbers = [
        cast(np.full(number.shape, total), number.dtype)
        for number, total in zip(numbers, (dalpha, dshift), strict=True)
    ]
    return (delivered(dx, x), *of_numbers, dweight, dbias)


def _of_doubles(f: str, u: Array) -> Array:
    return scaled(u, u, 1.0, squash=f).answer()


def _number(value: ArrayLike, name: str) -> Array:
    found = as_array(to_host(value), name)
    if found.size != 1:
        raise ValueError(f"{name} has shape {found.shape}, expected one number")
    return found


def _along(value: Array, name: str, array: Array) -> Array:
    """A weight or bias with as many axes as x."""
    expected = f"expected ({array.shape[-1]},) or a shape that broadcasts against x"
    return spread(value, array.shape, name, expected)
