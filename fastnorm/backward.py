"""The backward functions: from dy, the gradient of the result, to those of x, weight and bias.

Each describes the same pass as its forward function in functional.py does, and hands it over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastnorm.arguments import (
    Array,
    Axes,
    along_axes,
    along_channels,
    as_array,
    cast,
    channel_axis_of,
    check_flag,
    check_ndim,
    computing_type,
    groups_of,
    layer_axes,
    mask_of,
    number,
    same_shape,
    statistic,
    unmask,
    whole,
)
from fastnorm.arrays import ArrayView, empty_on, plus, to_device_of
from fastnorm.backends import compute_backward
from fastnorm.backends.fast_path import (
    BATCH,
    GROUP,
    INFERENCE,
    INSTANCE,
    LAYER,
    RMS,
    Unplanned,
    quick_backward,
)
from fastnorm.description import BackwardPass
from fastnorm.passes import channels_second, delivered, new_like, split_groups
from fastnorm.routing import door_of, send

Gradients = tuple[Array, Array, Array]

# A weight of at most 1/256 of x is converted at once, a larger one as it is read.
SMALL = 256


def _ordered(shape: tuple[int, ...], dtype: np.dtype[Any], x: Array, axes: Sequence[int]) -> Array:
    """An array whose axes lie in memory in the order in which these axes of x do; or where x is."""
    if isinstance(x, ArrayView):
        return empty_on(x, shape, dtype)
    order = sorted(range(len(shape)), key=lambda i: -abs(x.strides[axes[i]]))
    return np.empty([shape[i] for i in order], dtype).transpose(np.argsort(order))


def _run(
    dy: ArrayLike,
    x: ArrayLike,
    array: Array,
    reduced: tuple[bool, ...],
    mean: Array | None,
    rstd: Array,
    weight: ArrayLike | None,
    own: tuple[int, ...],
    axes: tuple[int, ...],
    place: Callable[[Array], Array],
    *,
    view: Callable[[Array], Array] = lambda array: array,
    bias: bool = True,
    weight_offset: float = 0.0,
    training: bool = True,
    where: ArrayLike | None = None,
    key: bytes | None = None,
) -> Gradients:
    """Compute (dx, dweight, dbias); without `bias` the last is empty.

    `view` shows an array of the shape of x along the axes that the norm works on, `place` does so
    for a parameter; `own` is the shape of a weight that is not there, along these `axes` of x.
    """
    mean, rstd = to_device_of(array, mean), to_device_of(array, rstd)
    slope = to_device_of(array, same_shape(dy, "dy", array))
    mask = to_device_of(array, mask_of(where, array))
    dx = new_like(array)
    placed = like = None
    shape, dtype = own, array.dtype
    if weight is not None:
        like = given = to_device_of(array, as_array(weight, "weight"))
        shape, dtype = given.shape, given.dtype
        if weight_offset:
            given = plus(given, weight_offset)
        if given.size <= array.size // SMALL or isinstance(array, ArrayView):
            given = cast(given, computing_type(array.dtype))
        placed = place(given)
    along = axes if shape == own else range(-len(shape), 0)
    dweight = _ordered(shape, dtype, array, along)
    dbias = _ordered(shape, dtype, array, along) if bias else np.empty(0)
    if key is not None:
        usual = np.empty(own, dtype) if like is None else np.empty_like(like)
        if usual.strides != dweight.strides:
            key = None  # a plan makes the usual ones
    into = place(dweight)
    if array.size:
        compute_backward(
            BackwardPass(
                view(array),
                view(slope),
                view(dx),
                reduced,
                mean,
                rstd,
                placed,
                into,
                place(dbias) if bias else None,
                training,
                view(mask) if mask is not None and training else None,
                key,
                own,
            )
        )
    else:
        dweight, dbias = (
            to_device_of(array, np.zeros(part.shape, dtype)) for part in (dweight, dbias)
        )
    return delivered(dx, x), dweight, dbias


def _channels(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None,
    channel_axis: int,
    function: Callable[..., Any],
    *,
    batch: bool = False,
    num_groups: int | None = None,
    training: bool = True,
    where: ArrayLike | None = None,
) -> Gradients:
    """The channel norms. Statistics are one for each channel, or for each sample and group."""
    of = function.__name__
    if training is not True and training is not False:
        training = check_flag(training, "training")
    split = function is group_norm_backward
    norm = GROUP if split else INSTANCE
    if batch:
        norm = BATCH if training else INFERENCE
    key = None
    if where is None:
        found = quick_backward(norm, num_groups, channel_axis, dy, x, mean, rstd, weight)
        if type(found) is not Unplanned:
            return found
        key = found.key
    if split:
        num_groups = whole(num_groups, "num_groups")
    if (door := door_of(x)) is not None:
        gradients: Gradients = send(door, function, locals())
        return gradients
    x, where = unmask(x, where)
    array = as_array(x, "x")
    check_ndim(array, 2, of, "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, of, samples=not batch)
    channels = array.shape[axis]
    view = channels_second(axis)
    groups = channels if num_groups is None else groups_of(num_groups, channels)
    if split:
        view = split_groups(axis, channels, groups)
    shape = (channels,) if batch else (array.shape[0], groups)
    kept = (1, channels) if batch else shape
    place = (*kept, *[1] * (array.ndim - 1 if split else array.ndim - 2))

    def placed(p: Array) -> Array:
        along = along_channels(p, "weight", array, axis)
        return view(np.moveaxis(along, 1, axis)) if split else along

    return _run(
        dy,
        x,
        array,
        tuple((a == 0 and batch) or a > 1 for a in range(len(place))),
        statistic(mean, "mean", shape, of).reshape(place),
        statistic(rstd, "rstd", shape, of).reshape(place),
        weight,
        (channels,),
        (axis,),
        placed,
        view=view,
        training=training,
        where=where,
        key=key if where is None else None,
    )


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
) -> Gradients:
    r"""Gradients of :func:`batch_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = \textstyle\sum dy \, \hat{x}, \quad db = \sum dy

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

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one (C,), in the dtype of `x`.

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
        dy, x, mean, rstd, weight, channel_axis, batch_norm_backward, batch=True,
        training=training, where=where,
    )  # fmt: skip


def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    where: ArrayLike | None = None,
) -> Gradients:
    r"""Gradients of :func:`instance_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = \textstyle\sum dy \, \hat{x}, \quad db = \sum dy

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

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one (C,), in the dtype of `x`.

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
    return _channels(dy, x, mean, rstd, weight, channel_axis, instance_norm_backward, where=where)


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
) -> Gradients:
    r"""Gradients of :func:`group_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = \textstyle\sum dy \, \hat{x}, \quad db = \sum dy

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

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one (C,), in the dtype of `x`.

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
        dy, x, mean, rstd, weight, channel_axis, group_norm_backward, num_groups=num_groups,
        where=where,
    )  # fmt: skip


def _rows(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike | None,
    rstd: ArrayLike,
    normalized_shape: Axes | None,
    weight: ArrayLike | None,
    axis: Axes | None,
    function: Callable[..., Any],
    *,
    weight_offset: float = 0.0,
    where: ArrayLike | None = None,
) -> Any:
    of, key = function.__name__, None
    if where is None and type(weight_offset) is float and weight_offset == 0.0:
        norm = RMS if mean is None else LAYER
        found = quick_backward(norm, normalized_shape, axis, dy, x, mean, rstd, weight)
        if type(found) is not Unplanned:
            return found
        key = found.key
    weight_offset = number(weight_offset, "weight_offset")
    if (door := door_of(x)) is not None:
        return send(door, function, locals())
    x, where = unmask(x, where)
    array = as_array(x, "x")
    axes = layer_axes(array, normalized_shape, axis, of)
    shape = tuple(1 if a in axes else n for a, n in enumerate(array.shape))
    gradients = _run(
        dy,
        x,
        array,
        tuple(a in axes for a in range(array.ndim)),
        None if mean is None else statistic(mean, "mean", shape, of),
        statistic(rstd, "rstd", shape, of),
        weight,
        tuple(array.shape[a] for a in axes),
        axes,
        lambda p: along_axes(p, "weight", array, axes),
        bias=mean is not None,
        weight_offset=weight_offset,
        where=where,
        key=key if where is None else None,
    )
    return gradients if mean is not None else gradients[:2]


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
) -> Gradients:
    r"""Gradients of :func:`layer_norm`.

    .. math::

       \hat{x} = (x - \mathrm{mean}) \, \mathrm{rstd}, \quad g = dy \cdot w, \quad
       dx = \mathrm{rstd} \, (g - \overline{g} - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = \textstyle\sum dy \, \hat{x}, \quad db = \sum dy

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

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight, dbias
        The shape and dtype of `weight`; without one the normalised shape, in the dtype of `x`.

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
    if mean is None:
        raise ValueError("layer_norm_backward got mean=None; use rms_norm_backward without one")
    gradients: Gradients = _rows(
        dy, x, mean, rstd, normalized_shape, weight, axis, layer_norm_backward, where=where
    )
    return gradients


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
) -> tuple[Array, Array]:
    r"""Gradients of :func:`rms_norm`.

    .. math::

       \hat{x} = x \, \mathrm{rstd}, \quad g = dy \cdot (w + w_0), \quad
       dx = \mathrm{rstd} \, (g - \hat{x} \, \overline{g \hat{x}}), \quad
       dw = \textstyle\sum dy \, \hat{x}

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

    Returns
    -------
    dx
        The shape, dtype and memory order of `x`.
    dweight
        The shape and dtype of `weight`; without one the normalised shape, in the dtype of `x`.

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
    gradients: tuple[Array, Array] = _rows(
        dy, x, None, rstd, normalized_shape, weight, axis, rms_norm_backward,
        weight_offset=weight_offset, where=where,
    )  # fmt: skip
    return gradients
