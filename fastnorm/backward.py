"""The backward functions: from dy, the gradient of the result, to those of x, weight and bias.

Each describes the same problem as its forward function in functional.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numpy.typing import ArrayLike

from fastnorm.arguments import (
    Activation,
    Array,
    Axes,
    along_axes,
    along_channels,
    channel_axis_of,
    grouped,
    groups_of,
    layer_axes,
    statistic,
    taken,
)
from fastnorm.dispatch import public
from fastnorm.execution import After, Request, channels_second
from fastnorm.execution import Gradients as Described

__all__ = [
    "batch_norm_backward",
    "layer_norm_backward",
    "instance_norm_backward",
    "group_norm_backward",
    "rms_norm_backward",
]

Gradients = tuple[Array, ...]  # dx, dweight, dbias, and that of a residual where there is one

# A function compiled with Numba, "central" for central differences, or None.
Derivative = Callable[[float], float] | str | None

# A call with a function of the user's is described each time.
AFTER = {"derivative": "uncached"}

_AFTER = """bias, residual, activation
        As the forward function got them, if its result was activated: dy is then multiplied by the
        slope of the activation at what went into it, which is computed again. Without an activation
        no gradient depends on them.
    derivative
        Of an `activation` that is a function of your own: its derivative, compiled with
        ``numba.njit`` as well, or ``"central"``, the difference quotient :math:`(f(v + h) -
        f(v - h)) / 2h` in float64 with :math:`h = 6 \\cdot 10^{-6} \\max(1, |v|)`, good to about
        nine digits where f is smooth; at a kink it is the mean of both sides."""


def _channels(
    of: str,
    dy: ArrayLike,
    x: ArrayLike,
    statistics: tuple[ArrayLike, ArrayLike],
    weight: ArrayLike | None,
    channel_axis: int,
    *,
    num_groups: int | None = None,
    training: bool = True,
    where: ArrayLike | None = None,
    after: After,
) -> Described[Any]:
    """The channel norms. Statistics are one for each channel, or for each sample and group."""
    batch, split = of == "batch_norm_backward", of == "group_norm_backward"
    array, where = taken(x, where, of, 2, "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, of, samples=not batch)
    channels = array.shape[axis]
    groups = channels if num_groups is None else groups_of(num_groups, channels)
    view = partial(grouped, groups=groups, axis=axis) if split else channels_second(axis)
    shape = (channels,) if batch else (array.shape[0], groups)
    kept = (1, channels) if batch else shape
    place = (*kept, *[1] * (array.ndim - 1 if split else array.ndim - 2))
    mean, rstd = (
        statistic(value, name, shape, of).reshape(place)
        for value, name in zip(statistics, ("mean", "rstd"))
    )

    def placed(p: Array, name: str) -> Array:
        along = along_channels(p, name, array, axis)
        return grouped(along, groups) if split else along

    return Described(
        dy,
        x,
        array,
        tuple([(a == 0 and batch) or a > 1 for a in range(len(place))]),
        mean,
        rstd,
        weight,
        (channels,),
        (axis,),
        placed,
        view,
        of_channels=True,
        training=training,
        where=where,
        after=after,
    )


@public(meaning=AFTER)
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    training: bool = True,
    channel_axis: int = 1,
    where: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    derivative: Derivative = None,
) -> Request[Gradients]:
    r"""Gradients of :func:`batch_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = {\textstyle\sum} dy \, \hat{x}, \quad db = \sum dy

    The bars are averages over a channel's samples and positions. Both terms are absent with
    ``training=False``, where the statistics do not depend on `x`.

    Parameters
    ----------
    dy
        The gradient of the result: the shape of `x`, any float dtype.
    x
        What the forward function got: (N, C, ...), or with the channels on `channel_axis`.
    mean, rstd
        (C,): what the forward function returned with ``return_stats=True``; in inference the
        running mean and ``1 / sqrt(running_var + eps)``.
    weight
        As the forward function got it.
    training
        Whether the statistics came from `x`.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.
    where
        As the forward function got it: dx goes through the statistics for these elements alone. The
        mask of an ``np.ma`` array hides more of them.
    %(after)s

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one (C,), in the dtype of `x`.
    dresidual
        Only with `residual`, whose dtype it has: the gradient of what was activated.

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
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> y, mean, rstd = fn.batch_norm(x, training=True, return_stats=True)
    >>> dx, dweight, dbias = fn.batch_norm_backward(np.ones_like(x), x, mean, rstd)
    >>> dx.ravel(), dbias  # all results moved by the same: no input does that
    (array([0., 0., 0.]), array([3.]))
    """
    return _channels(
        "batch_norm_backward", dy, x, (mean, rstd), weight, channel_axis,
        training=training, where=where, after=After(bias, residual, activation, derivative),
    )  # fmt: skip


@public(meaning=AFTER)
def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    where: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    derivative: Derivative = None,
) -> Request[Gradients]:
    r"""Gradients of :func:`instance_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = {\textstyle\sum} dy \, \hat{x}, \quad db = \sum dy

    The bars are averages over a sample's and channel's positions. Where the forward function used
    running statistics, its gradients are those of :func:`batch_norm_backward` with
    ``training=False``.

    Parameters
    ----------
    dy
        The gradient of the result: the shape of `x`, any float dtype.
    x
        What the forward function got: (N, C, ...), or with the channels on `channel_axis`.
    mean, rstd
        (N, C): what the forward function returned with ``return_stats=True``.
    weight
        As the forward function got it.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.
    where
        As the forward function got it: dx goes through the statistics for these elements alone. The
        mask of an ``np.ma`` array hides more of them.
    %(after)s

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one (C,), in the dtype of `x`.
    dresidual
        Only with `residual`, whose dtype it has: the gradient of what was activated.

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
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[[0.0, 1.0, 5.0]]])
    >>> y, mean, rstd = fn.instance_norm(x, return_stats=True)
    >>> dx, dweight, dbias = fn.instance_norm_backward(np.ones_like(x), x, mean, rstd)
    >>> dx.ravel(), dbias
    (array([0., 0., 0.]), array([3.]))
    """
    return _channels(
        "instance_norm_backward", dy, x, (mean, rstd), weight, channel_axis,
        where=where, after=After(bias, residual, activation, derivative),
    )  # fmt: skip


@public(meaning=AFTER)
def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    where: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    derivative: Derivative = None,
) -> Request[Gradients]:
    r"""Gradients of :func:`group_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = {\textstyle\sum} dy \, \hat{x}, \quad db = \sum dy

    The bars are averages over a group's channels and positions.

    Parameters
    ----------
    dy
        The gradient of the result: the shape of `x`, any float dtype.
    x
        What the forward function got: (N, C, ...), or with the channels on `channel_axis`.
    mean, rstd
        (N, num_groups): what the forward function returned with ``return_stats=True``.
    num_groups, weight
        As the forward function got them.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.
    where
        As the forward function got it: dx goes through the statistics for these elements alone. The
        mask of an ``np.ma`` array hides more of them.
    %(after)s

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one (C,), in the dtype of `x`.
    dresidual
        Only with `residual`, whose dtype it has: the gradient of what was activated.

    Raises
    ------
    ValueError
        If `num_groups` does not divide the channels, or shapes do not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Wu and He, "Group Normalization", 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[[0.0], [1.0], [5.0]]])
    >>> y, mean, rstd = fn.group_norm(x, 1, return_stats=True)
    >>> dx, dweight, dbias = fn.group_norm_backward(np.ones_like(x), x, mean, rstd, 1)
    >>> dx.ravel(), dbias
    (array([0., 0., 0.]), array([1., 1., 1.]))
    """
    return _channels(
        "group_norm_backward", dy, x, (mean, rstd), weight, channel_axis,
        num_groups=num_groups, where=where, after=After(bias, residual, activation, derivative),
    )  # fmt: skip


def _rows(
    of: str,
    dy: ArrayLike,
    x: ArrayLike,
    statistics: tuple[ArrayLike | None, ArrayLike],
    normalized_shape: Axes | None,
    weight: ArrayLike | None,
    axis: Axes | None,
    *,
    weight_offset: float = 0.0,
    where: ArrayLike | None = None,
    after: After,
) -> Described[Any]:
    array, where = taken(x, where, of, 0)
    axes = layer_axes(array, normalized_shape, axis, of)
    shape = tuple([1 if a in axes else n for a, n in enumerate(array.shape)])
    mean, rstd = statistics
    return Described(
        dy,
        x,
        array,
        tuple([a in axes for a in range(array.ndim)]),
        None if mean is None else statistic(mean, "mean", shape, of),
        statistic(rstd, "rstd", shape, of),
        weight,
        tuple([array.shape[a] for a in axes]),
        axes,
        lambda p, name: along_axes(p, name, array, axes),
        weight_offset=weight_offset,
        where=where,
        after=after,
    )


def _mean_is_there(mean: Any, name: str) -> Any:
    if mean is None:
        raise ValueError("layer_norm_backward got mean=None; use rms_norm_backward without one")
    return mean


@public(checks={"mean": _mean_is_there}, meaning=AFTER)
def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    normalized_shape: Axes | None = None,
    weight: ArrayLike | None = None,
    *,
    axis: Axes | None = None,
    where: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    derivative: Derivative = None,
) -> Request[Gradients]:
    r"""Gradients of :func:`layer_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = {\textstyle\sum} dy \, \hat{x}, \quad db = \sum dy

    The bars are averages over the normalised axes, the sums run over what shares a weight.

    Parameters
    ----------
    dy
        The gradient of the result: the shape of `x`, any float dtype.
    x
        What the forward function got: any shape of at least 1 dimension.
    mean, rstd
        The shape of `x` with the normalised axes kept as 1: what the forward function returned with
        ``return_stats=True``.
    normalized_shape, weight, axis
        As the forward function got them.
    where
        As the forward function got it: dx goes through the statistics for these elements alone. The
        mask of an ``np.ma`` array hides more of them.
    %(after)s

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one the normalised shape, in the dtype of `x`.
    dresidual
        Only with `residual`, whose dtype it has: the gradient of what was activated.

    Raises
    ------
    ValueError
        For both or neither of `normalized_shape` and `axis`, or shapes that do not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[0.0, 1.0, 5.0]])
    >>> y, mean, rstd = fn.layer_norm(x, 3, return_stats=True)
    >>> dx, dweight, dbias = fn.layer_norm_backward(np.ones_like(x), x, mean, rstd, 3)
    >>> dx, dbias
    (array([[0., 0., 0.]]), array([1., 1., 1.]))
    """
    return _rows(
        "layer_norm_backward", dy, x, (mean, rstd), normalized_shape, weight, axis,
        where=where, after=After(bias, residual, activation, derivative),
    )  # fmt: skip


@public(meaning=AFTER)
def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    rstd: ArrayLike,
    normalized_shape: Axes | None = None,
    weight: ArrayLike | None = None,
    *,
    axis: Axes | None = None,
    weight_offset: float = 0.0,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    derivative: Derivative = None,
) -> Request[Gradients]:
    r"""Gradients of :func:`rms_norm`.

    .. math::

       \hat{x} = x \, \mathrm{rstd}, \quad g = dy \cdot (w + w_0), \quad
       dx = \mathrm{rstd} \, (g - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = {\textstyle\sum} dy \, \hat{x}

    The bar is the average over the normalised axes, the sum runs over what shares a weight.

    Parameters
    ----------
    dy
        The gradient of the result: the shape of `x`, any float dtype.
    x
        What the forward function got: any shape of at least 1 dimension.
    rstd
        The shape of `x` with the normalised axes kept as 1: what the forward function returned with
        ``return_stats=True``.
    normalized_shape, weight, axis, weight_offset
        As the forward function got them.
    where
        As the forward function got it: dx goes through the statistics for these elements alone. The
        mask of an ``np.ma`` array hides more of them.
    %(after)s

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight
        The shape and dtype of `weight`; without one the normalised shape, in the dtype of `x`.
    dresidual
        Only with `residual`, whose dtype it has: the gradient of what was activated.

    Raises
    ------
    ValueError
        For both or neither of `normalized_shape` and `axis`, or shapes that do not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[3.0, -4.0]])
    >>> y, rstd = fn.rms_norm(x, 2, eps=0.0, return_stats=True)
    >>> dx, dweight = fn.rms_norm_backward(x, x, rstd, 2)  # a longer x gives the same
    >>> np.allclose(dx, 0)
    True
    """
    return _rows(
        "rms_norm_backward", dy, x, (None, rstd), normalized_shape, weight, axis,
        weight_offset=weight_offset, where=where,
        after=After(None, residual, activation, derivative),
    )  # fmt: skip


for _norm in (
    batch_norm_backward,
    layer_norm_backward,
    instance_norm_backward,
    group_norm_backward,
    rms_norm_backward,
):
    if _norm.__doc__:  # absent under python -OO
        _shared = _AFTER.removeprefix("bias, " if _norm is rms_norm_backward else "")
        _norm.__doc__ = _norm.__doc__.replace("%(after)s", _shared)
