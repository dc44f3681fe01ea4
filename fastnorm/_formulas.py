"""The steps of norms in plain NumPy, over any axes: statistics, the normalization, activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array: TypeAlias = NDArray[Any]
Axis: TypeAlias = int | tuple[int, ...] | None
Maybe: TypeAlias = Array | None
Activation: TypeAlias = str | Callable[[float], float] | None

# NaN and infinity are ordinary data here, and a group of nothing has the mean 0/0: no warnings.
quiet = np.errstate(all="ignore")


def axes_of(axis: Axis, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))


def sum_over(values: Array, axis: Axis) -> Array:
    """Sum over `axis`, kept as 1. Copied, as NumPy adds pairwise only along contiguous memory."""
    axes = tuple(sorted(axes_of(axis, values.ndim)))
    kept = tuple(a for a in range(values.ndim) if a not in axes)
    shape = tuple(1 if a in axes else size for a, size in enumerate(values.shape))
    summed = math.prod(values.shape[a] for a in axes)
    rows = values.transpose(kept + axes).reshape(math.prod(shape), summed)
    total: Array = np.ascontiguousarray(rows).sum(axis=1).reshape(shape)
    return total


def _inside(shape: tuple[int, ...], where: Maybe) -> Array:
    """Which elements enter the statistics."""
    return np.broadcast_to(True if where is None else np.asarray(where, bool), shape)


def count_of(shape: tuple[int, ...], axis: Axis, where: Maybe) -> Array:
    """How many elements enter each group's statistics."""
    return sum_over(_inside(shape, where).astype(np.int64), axis)


def reciprocal(divisor: Array) -> Array:
    """1 / divisor, and 0 where that is 1 / 0: such a group is constant."""
    with np.errstate(all="ignore"):
        return np.where(divisor == 0, 0.0, 1.0 / divisor)


def rstd_of(var: Array, eps: float) -> Array:
    """1 / sqrt(var + eps)."""
    with np.errstate(all="ignore"):
        return reciprocal(np.sqrt(var + eps))


def _statistics(
    x: Array, axis: Axis, where: Maybe, *, centred: bool = True, total: bool = False
) -> tuple[Array, Array, Array, Array]:
    """(hi, lo, var, std) of each group; hi + lo is the mean, to more digits than one number holds.

    `centred=False` measures from 0 instead of from the mean; `total` adds the squares up instead of
    averaging them, so std is the Euclidean norm.
    """
    axes = axes_of(axis, x.ndim)
    inside, count = _inside(x.shape, where), count_of(x.shape, axes, where)

    def average(values: Array) -> Array:
        return sum_over(np.where(inside, values, 0), axes) / count

    # A power of two per group brings max|x| into [1/2, 1): exact, and its square is in range.
    biggest = np.max(abs(x), axis=axes, keepdims=True, where=inside, initial=0)
    finite = np.isfinite(biggest)
    exponent = np.frexp(np.where(finite, biggest, 0))[1]
    x = np.ldexp(x, -exponent)

    hi = lo = np.zeros_like(biggest)
    if centred:
        # Around the first mean the numbers are as small as the spread, and so is their rounding.
        # In a constant group they are a few units in the last place, which add up exactly: hi is
        # the constant itself, lo and the variance are 0.
        first = average(x)
        rest = np.where(finite, average(x - first), 0)
        hi = first + rest
        lo = np.where(finite, (first - hi) + rest, 0)

    # Centred in two steps: what the mean is still off by, squared, is below any rounding.
    squares = ((x - hi) - lo) ** 2
    var = sum_over(np.where(inside, squares, 0), axes) if total else average(squares)
    std = np.sqrt(var)
    return (
        np.ldexp(hi, exponent),
        np.ldexp(lo, exponent),
        np.ldexp(var, 2 * exponent),
        np.ldexp(std, exponent),
    )


@quiet
def moments(
    x: Array, axis: Axis, *, where: Maybe = None, dtype: DTypeLike = np.float64
) -> tuple[Array, Array]:
    """Mean and biased variance of each group, the reduced axes kept as 1."""
    mean, _, var, _ = _statistics(np.asarray(x).astype(dtype), axis, where)
    return mean, var


@quiet
def norm(x: Array, axis: Axis, *, where: Maybe = None, dtype: DTypeLike = np.float64) -> Array:
    """Euclidean norm of each group, the reduced axes kept as 1."""
    return _statistics(np.asarray(x).astype(dtype), axis, where, centred=False, total=True)[3]


@quiet
def normalize(
    x: Array,
    axis: Axis,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
    *,
    centred: bool = True,
    where: Maybe = None,
    residual: Maybe = None,
    activation: Activation = None,
    given: tuple[ArrayLike, ArrayLike] | None = None,
    scale: str = "rstd",
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array, Array, Array]:
    """activation((x - mean) * rstd * weight + bias + residual) -> (y, mean, var, rstd).

    Statistics are taken over `axis` and kept as 1, or are the mean and variance that are `given`.
    `centred=False` leaves the mean at 0 (RMS). `scale="l2"` divides by max(norm, eps) instead, and
    var is then the sum of squares. A group with var + eps = 0 has rstd 0, so its y is exactly bias.
    Take rstd rather than computing it from var: var leaves the range before its root does.
    Only x - mean itself has to be in range.
    """
    x = np.asarray(x).astype(dtype)
    if given is not None:
        hi, var = (np.asarray(statistic).astype(dtype) for statistic in given)
        lo, std = np.zeros_like(hi), np.sqrt(var)
    else:
        l2 = scale == "l2"
        hi, lo, var, std = _statistics(x, axis, where, centred=centred and not l2, total=l2)

    eps_ = x.dtype.type(eps)
    divisor = np.maximum(std, eps_) if scale == "l2" else np.hypot(std, np.sqrt(eps_))
    divisor = np.where(divisor == 0, np.inf, divisor)
    y = ((x - hi) - lo) / divisor  # in two steps: see hi and lo in _statistics
    y = affine(y, dtype, weight, bias, residual)
    return activate(y, activation), hi, var, 1 / divisor


def affine(y: Array, dtype: DTypeLike, weight: Maybe, *terms: Maybe) -> Array:
    """Y * weight + bias + residual, with what there is of them."""
    if weight is not None:
        y = y * np.asarray(weight).astype(dtype)
    for term in terms:
        if term is not None:
            y = y + np.asarray(term).astype(dtype)
    return y


@quiet
def normalize_backward(
    dy: Array,
    x: Array,
    axis: Axis,
    mean: ArrayLike,
    rstd: Array,
    weight: Maybe = None,
    *,
    centred: bool = True,
    training: bool = True,
    where: Maybe = None,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array, Array]:
    """(dx, dy * xhat, dy); the last two, summed over what weight and bias broadcast, are theirs.

    With g = dy * weight: dx = rstd * (g - [average of g] - [xhat * average of g * xhat]). The first
    bracket is the way through the mean (not if `centred=False`), the second the way through the
    variance; neither where the statistics were given (`training=False`). Every element was
    normalised, so the sums are of all of them; only those `where` the statistics came from moved
    these: the averages divide by their number, and the brackets are theirs alone.
    """
    dy, x, mean, rstd = (np.asarray(array).astype(dtype) for array in (dy, x, mean, rstd))
    xhat = (x - mean) * rstd
    g = dy if weight is None else dy * np.asarray(weight).astype(dtype)
    dx = g
    if training:
        count = count_of(x.shape, axis, where)
        if centred:
            dx = dx - sum_over(g, axis) / count
        dx = dx - xhat * (sum_over(g * xhat, axis) / count)
    if where is not None:
        dx = np.where(where, dx, g)
    return dx * rstd, dy * xhat, dy


# --- Activations ---------------------------------------------------------------------------------


@quiet
def activate(y: Array, name: Activation) -> Array:
    """The activation called `name`, or any function of one float, applied to each element."""
    if name is None:
        return y
    if callable(name):  # float64: what a function compiled by numba can take
        called = np.vectorize(name, otypes=[np.float64])(y.astype(np.float64))
        z: Array = called.astype(y.dtype)
        return z
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name](y)


def _gelu_tanh(y: Array) -> Array:
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which cancels nothing
    u = np.sqrt(2 / _pi(y.dtype)) * (y + y.dtype.type("0.044715") * y**3)
    z: Array = y / (1 + np.exp(-2 * u))
    return z


def _gated(y: Array, u: Array, du: Array | int) -> Array:
    """Derivative of y / (1 + exp(-u)): beyond 700 all or nothing passes, and exp stays in range."""
    y, e = np.clip(y, -700, 700), np.exp(-np.clip(u, -700, 700))
    slope: Array = (1 + y * du * (e / (1 + e))) / (1 + e)
    return slope


def _gelu_tanh_slope(y: Array) -> Array:
    y = np.clip(y, -700, 700)
    cubic, root = y.dtype.type("0.044715"), 2 * np.sqrt(2 / _pi(y.dtype))
    return _gated(y, root * (y + cubic * y**3), root * (1 + 3 * cubic * y**2))


def _pi(dtype: np.dtype[Any]) -> Any:
    return dtype.type("3.14159265358979323846264338327950288")


def _normal_cdf(y: Array) -> Array:
    """P(Z < y) of the standard normal distribution, relatively accurate in the lower tail too."""
    cdf: Array
    if y.dtype == np.float64:
        cdf = np.vectorize(math.erfc, otypes=[np.float64])(-y * math.sqrt(0.5)) / 2
        return cdf
    _, tail = _normal_halves(abs(y))
    cdf = np.where(y < 0, tail, 1 - tail)
    return cdf


def _erf(y: Array) -> Array:
    erf: Array
    if y.dtype == np.float64:
        erf = np.vectorize(math.erf, otypes=[np.float64])(y)
        return erf
    within, _ = _normal_halves(abs(y) * np.sqrt(y.dtype.type(2)))
    erf = np.copysign(2 * within, y)
    return erf


def _normal_halves(z: Array) -> tuple[Array, Array]:
    """P(0 < Z < z) and P(Z > z), both relatively accurate."""
    z = np.minimum(z, 200)  # the density underflows long before 200
    # exp(-z^2/2) amplifies the rounding of z^2, so z is split into a part whose square is exact.
    coarse = np.round(z * 16) / 16
    density = np.exp(-(coarse**2) / 2) * np.exp(-(z - coarse) * (z + coarse) / 2)
    density /= np.sqrt(2 * _pi(z.dtype))
    # Below 2: 1/2 - density * (z + z^3/3 + z^5/(3*5) + ...). At z = 2, 60 terms reach 1e-40.
    small = np.minimum(z, 2)
    term = series = small
    for k in range(1, 60):
        term = term * small**2 / (2 * k + 1)
        series = series + term
    # From 2 on: Laplace's continued fraction, density / (z + 1/(z + 2/(z + 3/...))).
    large = np.maximum(z, 2)
    fraction = large
    for k in range(200, 0, -1):
        fraction = large + k / fraction
    within, beyond = density * series, density / fraction
    central = z < 2
    return np.where(central, within, 0.5 - beyond), np.where(central, 0.5 - within, beyond)


# What a caller may name, and what takes the place of a norm. The kernels number all of them in this
# order, from 1 on (FN_ACTIVATIONS in _core/activations.h); Numba and the GPU compile `relu_32` and
# `relu_64` of _numba/scalar.py, and so on.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "gelu": lambda y: y * _normal_cdf(y),
    "gelu_tanh": _gelu_tanh,
}
SQUASHES: dict[str, Callable[[Array], Array]] = {"tanh": np.tanh, "erf": _erf}
# The derivative of each. NaN passes the first two, as in PyTorch.
SLOPES: dict[str, Callable[[Array], Array]] = {
    "relu": lambda y: np.where(y <= 0, 0, 1),
    "relu6": lambda y: np.where((y <= 0) | (y >= 6), 0, 1),
    "silu": lambda y: _gated(y, y, 1),
    "gelu": lambda y: _normal_cdf(y) + y * np.exp(-y * y / 2) / np.sqrt(2 * _pi(y.dtype)),
    "gelu_tanh": _gelu_tanh_slope,
    "tanh": lambda u: 1 / np.cosh(u) ** 2,
    "erf": lambda u: 2 / np.sqrt(_pi(u.dtype)) * np.exp(-u * u),
}
IN_KERNELS = (*ACTIVATIONS, *SQUASHES)
