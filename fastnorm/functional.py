"""The norms: each checks what came in and describes it; the wrapper (dispatch.py) does the rest.

Every norm here is the same few lines: name the axes that share a statistic, and lay weight and bias
along theirs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike

from fastnorm.arguments import (
    Activation,
    Array,
    Axes,
    as_array,
    axis_parameter,
    channel_axis_of,
    channel_parameter,
    check_running,
    grouped,
    groups_of,
    layer_axes,
    machine_epsilon,
    require_two,
    same_shape,
    taken,
)
from fastnorm.arrays import plus, to_device_of
from fastnorm.dispatch import public
from fastnorm.execution import (
    Norm,
    Request,
    Running,
    channels_second,
    counted,
    new_like,
)
from fastnorm.schedule import MIN_SAMPLES, SHORT_PLANES

__all__ = [
    "batch_norm",
    "layer_norm",
    "instance_norm",
    "group_norm",
    "rms_norm",
    "add_layer_norm",
    "add_rms_norm",
]

# What a norm returns with `return_stats`, and where that is not known before.
WithStats: TypeAlias = tuple[Array, Array, Array]
WithRstd: TypeAlias = tuple[Array, Array]

# --- Channel norms: batch, instance, group --------------------------------------------------------


@overload
def batch_norm(
    x: ArrayLike, running_mean: ArrayLike | None = None, running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None, bias: ArrayLike | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *, channel_axis: int = 1,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def batch_norm(
    x: ArrayLike, running_mean: ArrayLike | None = None, running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None, bias: ArrayLike | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *, channel_axis: int = 1,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[True],
) -> WithStats: ...  # fmt: skip
@overload
def batch_norm(
    x: ArrayLike, running_mean: ArrayLike | None = None, running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None, bias: ArrayLike | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *, channel_axis: int = 1,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: bool,
) -> Array | WithStats: ...  # fmt: skip
@public(meaning={"where": "uncached"})  # how many it leaves is asked each time
def batch_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Array | None = None,
    return_stats: bool = False,
) -> Request[Array | WithStats]:
    r"""Normalise each channel over all samples and positions.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    In training the mean and the biased variance are those of the batch, and the running
    statistics move towards them; in inference they are the running statistics.

    Parameters
    ----------
    x
        (N, C, ...), or with the channels on `channel_axis`; at least 2 dimensions.
    running_mean, running_var
        (C,), any float dtype. In training they may be None and are otherwise updated in place,
        ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance.
    weight, bias
        (C,), a number or (1,); or (N, C) or any shape that broadcasts against `x` for parameters of
        each sample.
    training
        Whether statistics come from the batch.
    momentum
        The share of the batch in the new running statistics, 0 to 1.
    eps
        Added to the variance, in the units of x squared.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.
    %(shared)s

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.
    mean, rstd
        With `return_stats`: (C,) float64, in training those of the batch.

    Raises
    ------
    ValueError
        For shapes that do not fit; in inference without running statistics; in training with one
        value per channel. Nothing has been written then.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> fn.batch_norm(x, training=True, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> fn.batch_norm(x, np.array([2.0, 20.0]), np.array([1.0, 100.0]), eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    array, where = taken(x, where, "batch_norm", 2, "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "batch_norm", samples=False)
    channels = array.shape[axis]
    means, variances = check_running(running_mean, running_var, channels, written=training)
    norm: Norm[Any] = Norm(
        x,
        array,
        (0, *range(2, array.ndim)),
        channel_parameter(weight, "weight", array, axis),
        channel_parameter(bias, "bias", array, axis),
        eps,
        where,
        residual,
        activation,
        out,
        view=channels_second(axis),
        statistics=(channels,),
        return_stats=return_stats,
    )
    if training:
        counts = counted(where, array, tuple(a for a in range(array.ndim) if a != axis))
        require_two(
            counts,
            "batch_norm(training=True)",
            "use a larger batch, or training=False with running statistics",
        )
        norm.running = Running(means, variances, counts, momentum)
        return norm
    if means is None or variances is None:
        raise ValueError(
            "batch_norm got training=False without running_mean and running_var, which it "
            "then normalises with; give both, or write training=True"
        )
    return _by_running(norm, means, variances, axis)


def _by_running(norm: Norm[Any], means: Array, variances: Array, axis: int) -> Norm[Any]:
    """The same norm by given statistics of each channel, which are on `axis`."""
    array = norm.array
    place = (1, array.shape[axis]) + (1,) * (array.ndim - 2)
    with np.errstate(all="ignore"):  # of a signaling NaN
        norm.given = (
            means.astype(np.float64, order="C").reshape(place),
            variances.astype(np.float64, order="C").reshape(place),
        )
    # In the order of memory: where the channels are neighbours, or planes are short, all rows at
    # once, for which the scales are computed once; otherwise, or with weights of its own, every
    # sample by itself.
    size, step = array.itemsize, array.strides[axis]
    plane = math.prod(n for a, n in enumerate(array.shape) if a not in (0, axis))
    together = array.ndim == 2 or (step == size and array.shape[axis] > 1)
    if isinstance(array, np.ndarray) and step == plane * size:
        together |= plane <= SHORT_PLANES.get(size, 0) and array.shape[0] >= MIN_SAMPLES
    together &= all(p is None or p.shape[0] == 1 for p in (norm.weight, norm.bias))
    norm.axes = (0, *range(2, array.ndim)) if together else tuple(range(2, array.ndim))
    return norm


@overload
def instance_norm(
    x: ArrayLike, running_mean: ArrayLike | None = None, running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None, bias: ArrayLike | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5, *, channel_axis: int = 1,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def instance_norm(
    x: ArrayLike, running_mean: ArrayLike | None = None, running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None, bias: ArrayLike | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5, *, channel_axis: int = 1,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[True],
) -> WithStats: ...  # fmt: skip
@overload
def instance_norm(
    x: ArrayLike, running_mean: ArrayLike | None = None, running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None, bias: ArrayLike | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5, *, channel_axis: int = 1,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: bool,
) -> Array | WithStats: ...  # fmt: skip
@public(meaning={"running_mean": "uncached", "running_var": "uncached"})
def instance_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Array | None = None,
    return_stats: bool = False,
) -> Request[Array | WithStats]:
    r"""Normalise each channel of each sample over its positions.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    Parameters
    ----------
    x
        (N, C, ...), or with the channels on `channel_axis`; at least 2 dimensions.
    running_mean, running_var
        (C,), any float dtype. With `use_input_stats` they may be None and are otherwise updated
        in place with the average over the samples of their means and unbiased variances.
    weight, bias
        (C,), a number or (1,); or (N, C) (conditional instance norm, AdaIN) or any shape that
        broadcasts against `x` (SPADE) for parameters of each sample.
    use_input_stats
        Whether statistics come from `x`; otherwise they are the running statistics.
    momentum
        The share of `x` in the new running statistics, 0 to 1.
    eps
        Added to the variance, in the units of x squared.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.
    %(shared)s

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.
    mean, rstd
        With `return_stats`: (N, C) float64.

    Raises
    ------
    ValueError
        For shapes that do not fit; without `use_input_stats` and without running statistics; with
        `use_input_stats` and one position per channel.
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
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> fn.instance_norm(x, eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    array, where = taken(x, where, "instance_norm", 2, "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "instance_norm")
    samples, channels = array.shape[0], array.shape[axis]
    means, variances = check_running(running_mean, running_var, channels, written=use_input_stats)
    norm: Norm[Any] = Norm(
        x,
        array,
        range(2, array.ndim),
        channel_parameter(weight, "weight", array, axis),
        channel_parameter(bias, "bias", array, axis),
        eps,
        where,
        residual,
        activation,
        out,
        view=channels_second(axis),
        statistics=(samples, channels),
        return_stats=return_stats,
    )
    if use_input_stats:
        positions = tuple(a for a in range(1, array.ndim) if a != axis)
        # only running statistics ask what a mask leaves over, and only a variance for two
        chosen = None if means is None and variances is None else where
        counts = counted(chosen, array, positions)
        require_two(
            counted(None, array, positions) if running_var is None else counts,
            "instance_norm",
            "give x more positions, or write use_input_stats=False with running statistics",
        )
        norm.running = Running(means, variances, counts, momentum)
        return norm
    if means is None or variances is None:
        raise ValueError(
            "instance_norm got use_input_stats=False without running_mean and running_var, "
            "which it then normalises with; give both, or write use_input_stats=True"
        )
    return _by_running(norm, means, variances, axis)


@overload
def group_norm(
    x: ArrayLike, num_groups: int, weight: ArrayLike | None = None, bias: ArrayLike | None = None,
    eps: float = 1e-5, *, channel_axis: int = 1, where: ArrayLike | None = None,
    residual: ArrayLike | None = None, activation: Activation = None, out: Array | None = None,
    return_stats: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def group_norm(
    x: ArrayLike, num_groups: int, weight: ArrayLike | None = None, bias: ArrayLike | None = None,
    eps: float = 1e-5, *, channel_axis: int = 1, where: ArrayLike | None = None,
    residual: ArrayLike | None = None, activation: Activation = None, out: Array | None = None,
    return_stats: Literal[True],
) -> WithStats: ...  # fmt: skip
@overload
def group_norm(
    x: ArrayLike, num_groups: int, weight: ArrayLike | None = None, bias: ArrayLike | None = None,
    eps: float = 1e-5, *, channel_axis: int = 1, where: ArrayLike | None = None,
    residual: ArrayLike | None = None, activation: Activation = None, out: Array | None = None,
    return_stats: bool,
) -> Array | WithStats: ...  # fmt: skip
@public()
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Array | None = None,
    return_stats: bool = False,
) -> Request[Array | WithStats]:
    r"""Normalise each group of neighbouring channels of each sample.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    Parameters
    ----------
    x
        (N, C, ...), or with the channels on `channel_axis`; at least 2 dimensions.
    num_groups
        How many groups the C channels form; a divisor of C.
    weight, bias
        (C,), a number or (1,); or (N, C) (FiLM) or any shape that broadcasts against `x` for
        parameters of each sample.
    eps
        Added to the variance, in the units of x squared.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.
    %(shared)s

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.
    mean, rstd
        With `return_stats`: (N, num_groups) float64.

    Raises
    ------
    ValueError
        If `num_groups` does not divide the channels, or shapes do not fit; of one sample with one
        value per group, as in PyTorch.
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
    >>> x = np.array([[[1.0], [3.0], [10.0], [30.0]]])
    >>> fn.group_norm(x, 2, eps=0.0).ravel()
    array([-1.,  1., -1.,  1.])
    """
    array, where = taken(x, where, "group_norm", 2, "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "group_norm")
    samples, channels = array.shape[0], array.shape[axis]
    groups = groups_of(num_groups, channels)
    # all of the batch together, as PyTorch counts them
    if array.size == groups:
        require_two(1, "group_norm", "use fewer groups", "group")
    return Norm(
        x,
        array,
        range(2, array.ndim + 1),
        channel_parameter(weight, "weight", array, axis, groups),
        channel_parameter(bias, "bias", array, axis, groups),
        eps,
        where,
        residual,
        activation,
        out,
        view=partial(grouped, groups=groups, axis=axis),
        statistics=(samples, groups),
        return_stats=return_stats,
    )


# --- Layer and RMS norm ---------------------------------------------------------------------------


@overload
def layer_norm(
    x: ArrayLike, normalized_shape: Axes | None = None, weight: ArrayLike | None = None,
    bias: ArrayLike | None = None, eps: float = 1e-5, *, axis: Axes | None = None,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def layer_norm(
    x: ArrayLike, normalized_shape: Axes | None = None, weight: ArrayLike | None = None,
    bias: ArrayLike | None = None, eps: float = 1e-5, *, axis: Axes | None = None,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[True],
) -> WithStats: ...  # fmt: skip
@overload
def layer_norm(
    x: ArrayLike, normalized_shape: Axes | None = None, weight: ArrayLike | None = None,
    bias: ArrayLike | None = None, eps: float = 1e-5, *, axis: Axes | None = None,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: bool,
) -> Array | WithStats: ...  # fmt: skip
@public()
def layer_norm(
    x: ArrayLike,
    normalized_shape: Axes | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: Axes | None = None,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Array | None = None,
    return_stats: bool = False,
) -> Request[Array | WithStats]:
    r"""Normalise each sample over its trailing axes, or over any others.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    normalized_shape
        The trailing shape to normalise over: an int or a sequence of ints. Give either this or
        `axis`.
    weight, bias
        The shape `normalized_shape`, or that of the axes in `axis`, or what broadcasts to it, such
        as a number; or any shape that broadcasts against `x`, such as (N, 1, D) (AdaLN), for
        parameters of each sample.
    eps
        Added to the variance, in the units of x squared.
    axis
        The axis or axes to normalise over: ``axis=1`` is the LayerNorm2d of an NCHW array.
    %(shared)s

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.
    mean, rstd
        With `return_stats`: float64, the shape of `x` with the normalised axes kept as 1.

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
    >>> fn.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    array, where = taken(x, where, "layer_norm", 0)
    axes = layer_axes(array, normalized_shape, axis, "layer_norm")
    return Norm(
        x,
        array,
        axes,
        axis_parameter(weight, "weight", array, axes),
        axis_parameter(bias, "bias", array, axes),
        eps,
        where,
        residual,
        activation,
        out,
        statistics=tuple([1 if a in axes else n for a, n in enumerate(array.shape)]),
        return_stats=return_stats,
    )


@overload
def rms_norm(
    x: ArrayLike, normalized_shape: Axes | None = None, weight: ArrayLike | None = None,
    eps: float | None = None, *, axis: Axes | None = None, weight_offset: float = 0.0,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def rms_norm(
    x: ArrayLike, normalized_shape: Axes | None = None, weight: ArrayLike | None = None,
    eps: float | None = None, *, axis: Axes | None = None, weight_offset: float = 0.0,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: Literal[True],
) -> WithRstd: ...  # fmt: skip
@overload
def rms_norm(
    x: ArrayLike, normalized_shape: Axes | None = None, weight: ArrayLike | None = None,
    eps: float | None = None, *, axis: Axes | None = None, weight_offset: float = 0.0,
    where: ArrayLike | None = None, residual: ArrayLike | None = None,
    activation: Activation = None, out: Array | None = None, return_stats: bool,
) -> Array | WithRstd: ...  # fmt: skip
@public()
def rms_norm(
    x: ArrayLike,
    normalized_shape: Axes | None = None,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: Axes | None = None,
    weight_offset: float = 0.0,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Array | None = None,
    return_stats: bool = False,
) -> Request[Array | WithRstd]:
    r"""Divide each sample by the root mean square over its trailing axes, or over any others.

    .. math:: y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot (w + w_0)

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    normalized_shape
        The trailing shape to normalise over: an int or a sequence of ints. Give either this or
        `axis`.
    weight
        The shape `normalized_shape`, or that of the axes in `axis`, or what broadcasts to it, such
        as a number; or any shape that broadcasts against `x` for parameters of each sample.
    eps
        Added to the mean square, in the units of x squared; None is the machine epsilon of the
        type that is computed in (float32 for half precision), as in PyTorch since 2.13.
    axis
        The axis or axes to normalise over.
    weight_offset
        Added to the weight: 1.0 for weights stored as their distance from 1 (Gemma).
    %(shared)s

    Returns
    -------
    y
        The shape, dtype and memory order of `x`.
    rstd
        With `return_stats`: 1 / sqrt(mean(x^2) + eps), float64, the shape of `x` with the
        normalised axes kept as 1.

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
    >>> fn.rms_norm(np.array([[3.0, -3.0], [0.5, 0.5]]), 2, eps=0.0)
    array([[ 1., -1.],
           [ 1.,  1.]])
    """
    array, where = taken(x, where, "rms_norm", 0)
    axes = layer_axes(array, normalized_shape, axis, "rms_norm")
    if weight is not None and weight_offset:
        weight = plus(to_device_of(array, as_array(weight, "weight")), weight_offset)
    return Norm(
        x,
        array,
        axes,
        axis_parameter(weight, "weight", array, axes),
        None,
        machine_epsilon(array.dtype) if eps is None else eps,
        where,
        residual,
        activation,
        out,
        centred=False,
        statistics=tuple([1 if a in axes else n for a, n in enumerate(array.shape)]),
        return_stats=return_stats,
    )


@public()
def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Request[tuple[Array, Array]]:
    r"""Add two arrays and layer-normalise the sum, in one pass over memory.

    .. math:: s = x + r, \quad y = \mathrm{layer\_norm}(s)

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    residual
        The shape of `x`.
    normalized_shape, weight, bias, eps
        As for :func:`layer_norm`.

    Returns
    -------
    y
        ``layer_norm(x + residual)``, in the dtype of `x`.
    total
        ``x + residual``, rounded to the dtype of `x`; `y` is of these rounded numbers.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> y, total = fn.add_layer_norm(np.array([[1.0, 2.0]]), np.array([[0.0, 1.0]]), 2, eps=0.0)
    >>> y, total
    (array([[-1.,  1.]]), array([[1., 3.]]))
    """
    return _add_norm("add_layer_norm", x, residual, normalized_shape, weight, bias, eps)


@public()
def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes,
    weight: ArrayLike | None = None,
    eps: float | None = None,
) -> Request[tuple[Array, Array]]:
    r"""Add two arrays and RMS-normalise the sum, in one pass over memory.

    .. math:: s = x + r, \quad y = \mathrm{rms\_norm}(s)

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    residual
        The shape of `x`.
    normalized_shape, weight, eps
        As for :func:`rms_norm`.

    Returns
    -------
    y
        ``rms_norm(x + residual)``, in the dtype of `x`.
    total
        ``x + residual``, rounded to the dtype of `x`; `y` is of these rounded numbers.

    Raises
    ------
    ValueError
        For shapes that do not fit.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> y, total = fn.add_rms_norm(np.array([[1.0, -2.0]]), np.array([[2.0, -1.0]]), 2, eps=0.0)
    >>> y, total
    (array([[ 1., -1.]]), array([[ 3., -3.]]))
    """
    return _add_norm("add_rms_norm", x, residual, normalized_shape, weight, None, eps)


def _add_norm(
    name: str,
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float | None,
    *,
    total: Array | None = None,
) -> Norm[tuple[Array, Array]]:
    array, where = taken(x, None, name, 0)
    axes = layer_axes(array, normalized_shape, None, name)
    return Norm(
        x,
        array,
        axes,
        axis_parameter(weight, "weight", array, axes),
        axis_parameter(bias, "bias", array, axes),
        machine_epsilon(array.dtype) if eps is None else eps,
        where,
        addend=same_shape(residual, "residual", array),
        total=new_like(array) if total is None else total,
        centred=name == "add_layer_norm",
    )


def add_norm(
    name: str, x: ArrayLike, residual: ArrayLike, normalized_shape: Axes,
    weight: ArrayLike | None, bias: ArrayLike | None, eps: float | None,
    *, out: Array | None = None, total: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """`add_layer_norm` or `add_rms_norm`, into arrays that may be given; `total` may be `x`."""
    norm = _add_norm(name, x, residual, normalized_shape, weight, bias, eps, total=total)
    norm.out = out
    return norm.answer()


# --- Docstrings -----------------------------------------------------------------------------------

# What five norms share is written once.
_SHARED = """\
where
        bool, broadcasts to `x`: only these elements enter the statistics; every element is
        normalised.
    residual
        The shape of `x`: added after the affine step and before the activation.
    activation
        ``"relu"``, ``"relu6"`` (min(max(y, 0), 6)), ``"silu"``, ``"gelu"`` (of the error
        function), ``"gelu_tanh"``, None, or a function of one number compiled with
        ``numba.njit``, which becomes part of the pass.
    out
        The array to write into, of the shape and dtype of `x`; may be `x` itself.
    return_stats
        Whether to return the statistics too."""

for _norm in (batch_norm, instance_norm, group_norm, layer_norm, rms_norm):
    if _norm.__doc__:  # absent under python -OO
        _norm.__doc__ = _norm.__doc__.replace("%(shared)s", _SHARED)
