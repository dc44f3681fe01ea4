"""Further norms: of lengths, weights and responses, and what takes a norm's place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from fastnorm.arguments import (
    Activation,
    Array,
    Axes,
    along_channels,
    axis_parameter,
    cast,
    channel_axis_of,
    computing_type,
    layer_axes,
    number,
    parameter,
    taken,
)
from fastnorm.arrays import ArrayView, to_host
from fastnorm.backends import at_hand
from fastnorm.dispatch import public
from fastnorm.execution import (
    Done,
    Norm,
    Request,
    channels_second,
    delivered,
    exponents_of,
    extremes,
    new_like,
    scaled,
    unknown,
)
from fastnorm.problem import Problem, Scaling
from fastnorm.runtime import chosen_backend

__all__ = [
    "l2_normalize",
    "local_response_norm",
    "global_response_norm",
    "weight_norm",
    "weight_standardize",
]

# Sums of squares between these have lost nothing to the range of float64.
_LEAST_SQUARE, _MOST_SQUARE = 1e-270, 1e270


@public()
def l2_normalize(
    x: ArrayLike, axis: Axes | None = -1, *, eps: float = 1e-12, out: Array | None = None
) -> Request[Array]:
    r"""Divide by the Euclidean norm along an axis.

    .. math:: y = \frac{x}{\max(\lVert x \rVert_2, \epsilon)}

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    axis
        The axis or axes the norm is taken over; None for all.
    eps
        The least norm divided by, in the units of x.
    out
        The array to write into; may be `x` itself.

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.

    Raises
    ------
    ValueError
        For an `out` that does not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    ``torch.nn.functional.normalize``.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.l2_normalize(np.array([3.0, 4.0]))
    array([0.6, 0.8])
    """
    array, where = taken(x, None, "l2_normalize", int(axis is None))
    axes = layer_axes(array, None, range(array.ndim) if axis is None else axis, "l2_normalize")
    return Norm(x, array, axes, eps=eps, where=where, out=out, centred=False, scaling=Scaling.NORM)


@public(cached=False, checks={"alpha": number})
def local_response_norm(
    x: ArrayLike,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    channel_axis: int = 1,
) -> Request[Array]:
    r"""Divide each value by a power of the mean square of its neighbouring channels.

    .. math:: y_c = x_c \left(k + \frac{\alpha}{n} \sum_{c'} x_{c'}^2\right)^{-\beta}

    The sum runs over the n = `size` channels from ``c - size // 2`` to ``c + (size - 1) // 2``,
    of which those outside `x` count as 0.

    Parameters
    ----------
    x
        (N, C, ...), or with the channels on `channel_axis`; at least 2 dimensions.
    size
        How many neighbouring channels, 1 or more.
    alpha, beta, k
        The scale of the mean square, the exponent, and what is added.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.

    Raises
    ------
    ValueError
        For shapes or a `size` that do not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
    Networks", 2012; scaled by `size` as ``torch.nn.functional.local_response_norm`` is.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.local_response_norm(np.array([[1.0, 2.0]]), 1, alpha=3.0, beta=0.5)
    array([[0.5      , 0.5547002]])
    """
    array, where = taken(x, None, "local_response_norm", 2, "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "local_response_norm")
    y = new_like(array)
    if isinstance(array, ArrayView):
        array.device.local_response_norm(array, y, axis, size, (alpha, beta, k))
        return Done(delivered(y, x))
    if not array.size:  # of which there may be any number of samples
        return Done(delivered(y, x))
    chosen = np.broadcast_to(np.True_ if where is None else where, array.shape)
    moved, result, counted = (np.moveaxis(a, axis, 1) for a in (array, y, chosen))
    with np.errstate(all="ignore"):
        # sample by sample, in float64: what is needed besides x and y is the size of one sample
        for sample, target, counts in zip(moved, result, counted, strict=True):
            wide = sample.astype(np.float64)
            seen = np.where(counts, wide, 0.0)
            target[...] = _respond(wide, seen, size, alpha, beta, k)
    return Done(delivered(y, x))


def _respond(x: Array, seen: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """`local_response_norm` of one sample of doubles, (C, ...), of which some are `seen`, or 0."""
    channels = len(x)
    most = channels - 1  # the farthest neighbour that there can be

    def around(values: Array) -> Iterator[tuple[slice, Array]]:
        """Where a channel has a neighbour at some distance, and that neighbour's values."""
        for shift in range(-min(size // 2, most), min((size - 1) // 2, most) + 1):
            low, high = max(0, -shift), min(channels, channels - shift)
            if low < high:
                yield slice(low, high), values[low + shift : high + shift]

    squared = np.zeros_like(x)
    for place, squares in around(seen * seen):
        squared[place] += squares
    base = k + alpha / size * squared
    y: Array = x * base**-beta
    if (good := (abs(base) > _LEAST_SQUARE) & (abs(base) < _MOST_SQUARE)).all():
        return y
    # Squares that leave the range: of numbers brought to 1 by a power of two, k by its square. From
    # the root r of the sum, as (x / r) r^(1 - 2 beta), whose factors are in range if y is.
    largest = np.zeros_like(x)
    for place, sizes in around(abs(seen)):
        np.maximum(largest[place], sizes, out=largest[place])
    exponent = exponents_of(largest)
    if k:
        exponent = np.maximum(exponent, math.frexp(k)[1] // 2)
    squared[...] = 0
    for place, values in around(seen):
        squared[place] += np.ldexp(values, -exponent[place]) ** 2
    base = np.ldexp(k, -2 * exponent) + alpha / size * squared
    root = np.sqrt(abs(base))
    half = exponent // 2  # r itself may be too small to have all its digits
    power = np.ldexp(root, half) ** (1 - 2 * beta) * np.sign(base) ** -beta
    power *= np.ldexp(1.0, exponent - half) ** (1 - 2 * beta)
    rescued = np.ldexp(x, -exponent) / root * power
    return np.where(good | ~np.isfinite(largest), y, rescued)


@public(meaning={"v": "x", "g": "weight"})
def weight_norm(v: ArrayLike, g: ArrayLike, *, axis: Axes | None = 0) -> Request[Array]:
    r"""Give each slice of a weight the length `g`.

    .. math:: w = g \frac{v}{\lVert v \rVert_2}

    Parameters
    ----------
    v
        The direction, any shape of at least 1 dimension.
    g
        The lengths: the shape of `v` with all axes but `axis` kept as 1, or (v.shape[axis],).
    axis
        The axis, or axes, each of whose slices has a length; None for one length in all.

    Returns
    -------
    w
        The shape, dtype and memory order of `v`. A slice of zeros stays zero.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Salimans and Kingma, "Weight Normalization", 2016, arXiv:1602.07868.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.weight_norm(np.array([[3.0, 4.0]]), np.array([10.0]))
    array([[6., 8.]])
    """
    array, where = taken(v, None, "weight_norm", 1, "(C, ...)", "v")
    kept = () if axis is None else layer_axes(array, None, axis, "weight_norm")
    lengths = parameter(g, "g", array)
    keepdims = tuple(n if a in kept else 1 for a, n in enumerate(array.shape))
    if lengths.shape == tuple(array.shape[a] for a in kept) and len(kept) <= 1:
        lengths = lengths.reshape(keepdims)
    if lengths.shape != keepdims:
        raise ValueError(
            f"g has shape {lengths.shape} for v of shape {array.shape}, expected {keepdims}: one "
            f"length for each slice along axis {axis}"
        )
    axes = tuple(a for a in range(array.ndim) if a not in kept)
    return Norm(v, array, axes, lengths, where=where, centred=False, scaling=Scaling.NORM)


@public(meaning={"w": "x"})
def weight_standardize(w: ArrayLike, *, eps: float = 1e-5) -> Request[Array]:
    r"""Give each output channel of a weight mean 0 and variance 1.

    .. math:: y = \frac{w - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}}

    Parameters
    ----------
    w
        (C_out, ...), at least 2 dimensions; statistics are over all axes but the first.
    eps
        Added to the variance, in the units of w squared.

    Returns
    -------
    y
        The shape, dtype and memory order of `w`.

    Raises
    ------
    ValueError
        For fewer than 2 dimensions.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel Normalization and
    Weight Standardization", 2019, arXiv:1903.10520.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.weight_standardize(np.array([[1.0, 3.0], [10.0, 30.0]]), eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    array, where = taken(w, None, "weight_standardize", 2, "(C_out, ...)", "w")
    return Norm(w, array, range(1, array.ndim), eps=eps, where=where)


@public(cached=False)
def global_response_norm(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike, *, eps: float = 1e-6, channel_axis: int = 1
) -> Request[Array]:
    r"""Scale each channel by its length relative to that of the other channels.

    .. math:: y = w \cdot x \cdot \frac{\lVert x_{n,c} \rVert_2}
              {\mathrm{mean}_{c'} \lVert x_{n,c'} \rVert_2 + \epsilon} + b + x

    Parameters
    ----------
    x
        (N, C, ...), or with the channels on `channel_axis`; at least 2 dimensions. The norms are
        over the positions.
    weight, bias
        (C,), a number or (1,); or (N, C) or any shape that broadcasts against `x`.
    eps
        Added to the mean norm, in the units of x.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Woo et al., "ConvNeXt V2", 2023, arXiv:2301.00808.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[[1.0], [3.0]]])
    >>> fn.global_response_norm(x, np.ones(2), np.zeros(2), eps=0.0).ravel()
    array([1.5, 7.5])
    """
    array, where = taken(x, None, "global_response_norm", 2, "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "global_response_norm")
    w, b = (
        along_channels(parameter(to_host(value), name, array), name, array, axis)
        for value, name in ((weight, "weight"), (bias, "bias"))
    )
    # what a mask hides is 0 in the lengths
    moved = np.moveaxis(array if where is None else np.where(where, array, 0), axis, 1)
    if not array.size:
        return Done(delivered(new_like(array), x))
    places = moved.shape[:2] + (1,) * (array.ndim - 2)
    mean, var, rstd = unknown(array, places)
    reduced = tuple(a >= 2 for a in range(array.ndim))
    backend = array.device if isinstance(array, ArrayView) else at_hand[chosen_backend()]
    backend.forward(Problem(moved, None, reduced, mean, var, rstd, centred=False))
    squares, exponent = to_host(var), np.zeros(places, np.int64)
    if array.dtype == np.float64 and not isinstance(array, ArrayView):
        good = (squares > _LEAST_SQUARE) & (squares < _MOST_SQUARE)
        if not good.all():
            axes = range(2, array.ndim)
            low, high = extremes(moved, axes)
            exponent = np.where(good, 0, exponents_of(np.maximum(-low, high)))
            with np.errstate(all="ignore"):
                rescaled = np.ldexp(moved, -exponent)
            # it may lie otherwise in memory than x: the sums of the others are as they were
            mean, again, rstd = unknown(array, places)
            backend.forward(Problem(rescaled, None, reduced, mean, again, rstd, centred=False))
            var = np.where(good, squares, again)
    with np.errstate(all="ignore"):
        length = np.sqrt(to_host(var) * math.prod(moved.shape[2:]))
        factor = 1.0 + w.astype(np.float64) * relative_lengths(length, exponent, 1, eps)
        factor = cast(factor, computing_type(array.dtype))
    return Done(_scaled_channels(x, factor, b, axis))


@public(adapters=False)
def _scaled_channels(x: ArrayLike, weight: Array, bias: Array, channel_axis: int) -> Request[Array]:
    """x * weight + bias, both along the axes of x with the channels moved to axis 1."""
    array, _ = taken(x, None, "global_response_norm")
    axes = range(2, array.ndim)
    return scaled(x, array, 1.0, weight, bias, axes=axes, view=channels_second(channel_axis))


def relative_lengths(length: Array, exponent: Array, axis: int, eps: float) -> Array:
    """Lengths times 2^exponent over their mean along an axis plus eps; 0 where that is 0 / 0."""
    with np.errstate(all="ignore"):
        # in the unit of the largest, or of eps
        own = np.where(length > 0, exponent, -1100)
        unit = np.maximum(own.max(axis, keepdims=True), math.frexp(eps)[1] if eps else -1100)
        unit = np.where(unit == -1100, 0, unit)
        length = np.ldexp(length, exponent - unit)
        whole = length.mean(axis=axis, keepdims=True) + np.ldexp(eps, -unit)
        return np.where(whole == 0, 0.0, length / whole)


@public(adapters=False)
def activate(
    x: ArrayLike,
    activation: Activation,
    bias: ArrayLike | None = None,
    *,
    out: Array | None = None,
) -> Request[Array]:
    r"""Add a bias and apply an activation, in one pass over memory.

    .. math:: y = f(x + b)

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    activation
        ``"relu"``, ``"relu6"``, ``"silu"``, ``"gelu"`` (of the error function),
        ``"gelu_tanh"`` or None.
    bias
        (D,), the last axis of `x`.
    out
        The array to write into, of the shape and dtype of `x`; may be `x` itself.

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.

    Raises
    ------
    ValueError
        For another activation, or shapes that do not fit.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.nn.activate(np.array([1.0, -2.0]), "relu", np.array([1.0, 1.0]))
    array([2., 0.])
    """
    array, _ = taken(x, None, "activate")
    added = axis_parameter(bias, "bias", array, (array.ndim - 1,))
    return scaled(x, array, 1.0, None, added, activation=activation, out=out)
