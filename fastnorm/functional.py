"""The front door for NumPy arrays: check what came in, describe it as a pass, compute.

Every norm here is the same few lines: name the axes that share a statistic, lay weight and bias
along theirs, and hand the pass to the backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

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
    check_activation,
    check_eps,
    check_ndim,
    check_out,
    check_running,
    computing_type,
    groups_of,
    is_float,
    layer_axes,
    mask_of,
    parameter,
    require_two,
    same_shape,
    spread,
)
from fastnorm.backends import (
    ADD_LAYER,
    ADD_RMS,
    BATCH,
    GROUP,
    INFERENCE,
    INSTANCE,
    LAYER,
    RMS,
    Pass,
    Scaling,
    Unplanned,
    compute,
    empty_like,
    quick_forward,
)
from fastnorm.routing import door_of, send

Result: TypeAlias = Any  # an array, or (y, mean, rstd) with return_stats

# --- The pass -------------------------------------------------------------------------------------


def _result(array: Array, out: Array | None, *inputs: Array | None) -> Array:
    """The array to compute into: `out` where the kernels can write there without harm."""
    if out is None:
        return empty_like(array)
    usable = out.dtype.isnative and out.flags.aligned
    usable = usable and not any(s % out.itemsize for s in out.strides)
    for other in inputs:
        if usable and other is not None and np.may_share_memory(out, other):
            # in place is fine: each element is read before it is written
            usable = (
                out.strides == other.strides
                and out.shape == other.shape
                and out.dtype == other.dtype
                and out.ctypes.data == other.ctypes.data
            )
    return out if usable else np.empty_like(array, subok=False)


def delivered(y: Array, x: ArrayLike, out: Array | None = None) -> Array:
    """`y` where and in the byte order the caller expects it."""
    if out is not None:
        if y is not out:
            np.copyto(out, y)
        return out
    dtype = getattr(x, "dtype", y.dtype)
    if isinstance(dtype, np.dtype) and not dtype.isnative and is_float(dtype):
        return y.astype(dtype)
    return y


def _rstd(var: Array, eps: float) -> Array:
    """1 / sqrt(var + eps), and 0 where that is 1 / 0: such a group is constant."""
    shifted = var + eps
    with np.errstate(all="ignore"):
        return np.where(shifted == 0, 0.0, 1.0 / np.sqrt(shifted))


def _channels(value: ArrayLike | None, name: str, x: Array, axis: int) -> Array | None:
    return None if value is None else channel_parameter(value, name, x, axis)


def _axes(value: ArrayLike | None, name: str, x: Array, axes: tuple[int, ...]) -> Array | None:
    return None if value is None else axis_parameter(value, name, x, axes)


def _as_it_is(array: Array) -> Array:
    return array


def _run(
    x: ArrayLike,
    array: Array,
    axes: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    view: Callable[[Array], Array] = _as_it_is,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    out: Array | None = None,
    given: tuple[Array, Array] | None = None,
    squash: bool = False,
    **options: Any,
) -> tuple[Array, Array, Array, Array]:
    """Check the shared arguments and compute: (y, mean, var, rstd).

    `view` shows an array of the shape of x along the axes that the norm works on; `axes` are the
    reduced ones among those. The statistics keep the view's axes, the reduced ones as 1. `squash`
    applies tanh before the affine step.
    """
    checked = check_activation(activation)
    mask = mask_of(where, array)
    added = None if residual is None else same_shape(residual, "residual", array)
    check_out(out, array.shape, array.dtype)
    seen = view(array)
    reduced = tuple(axis in axes for axis in range(seen.ndim))
    if given is None:
        kept = [1 if r else n for n, r in zip(seen.shape, reduced, strict=True)]
        mean, var, rstd = np.full([3, *kept], np.nan)
    else:
        mean, var = given
        rstd = _rstd(var, options.get("eps", 0.0))
    y = _result(array, out, array, added, mask, weight, bias)
    if array.size:
        compute(
            Pass(
                seen,
                view(y),
                reduced,
                mean,
                var,
                rstd,
                weight,
                bias,
                mask=None if mask is None else view(mask),
                residual=None if added is None else view(added),
                activation="tanh" if squash else checked,
                activation_first=squash,
                given=given is not None,
                **options,
            )
        )
    return delivered(y, x, out), mean, var, rstd


# --- Channel norms: batch, instance, group --------------------------------------------------------


def channels_second(axis: int) -> Callable[[Array], Array]:
    """Show an array of the shape of x with the channels, on `axis`, moved to axis 1."""
    return _as_it_is if axis == 1 else lambda array: np.moveaxis(array, axis, 1)


def split_groups(axis: int, channels: int, groups: int) -> Callable[[Array], Array]:
    """Show an array of the shape of x as (N, groups, channels of a group, ...)."""
    second = channels_second(axis)

    def split(array: Array) -> Array:
        moved = second(array)
        size = moved.shape[1]  # 1 where a parameter is broadcast along the channels
        both = (groups, channels // groups) if size == channels else (1, 1)
        return moved.reshape(moved.shape[:1] + both + moved.shape[2:])

    return split


def _update(
    running_mean: Any, running_var: Any, mean: Array, var: Array, counts: Array, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * average over axis 0, in float64.

    `mean`, `var` and `counts` are (parts, C). A part in which nothing was counted is left out, and
    so is a channel in which that holds for all parts.
    """
    counts = np.broadcast_to(counts, mean.shape)
    seen = counts > 0
    with np.errstate(all="ignore"):
        unbiased = var * (counts / (counts - 1))
        for running, parts in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                average = np.sum(parts, axis=0, where=seen) / np.count_nonzero(seen, axis=0)
                moved = (1 - momentum) * running.astype(np.float64) + momentum * average
                np.copyto(running, moved, where=seen.any(axis=0), casting="same_kind")


def _counted(where: ArrayLike | None, array: Array, axes: tuple[int, ...]) -> Array:
    """How many elements enter each statistic."""
    if where is None:
        return np.array(math.prod(array.shape[a] for a in axes))
    return np.asarray(np.count_nonzero(mask_of(where, array), axis=axes))  # type: ignore[arg-type]


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
) -> Result:
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
        (C,), or (N, C) or any shape that broadcasts against `x` for parameters of each sample.
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
    found = quick_forward(
        BATCH if training else INFERENCE,
        None,
        channel_axis,
        x,
        weight,
        bias,
        eps,
        return_stats,
        where,
        residual,
        activation,
        out,
        True,
        running_mean,
        running_var,
        momentum,
    )
    if type(found) is not Unplanned:
        return found
    if (door := door_of(x)) is not None:
        return send(door, batch_norm, locals())
    array = as_array(x, "x")
    check_ndim(array, 2, "batch_norm", "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "batch_norm", samples=False)
    channels = array.shape[axis]
    eps = check_eps(eps)
    check_running(running_mean, running_var, channels, written=training)
    w = _channels(weight, "weight", array, axis)
    b = _channels(bias, "bias", array, axis)
    view = channels_second(axis)
    shared: dict[str, Any] = {
        "view": view,
        "where": where,
        "residual": residual,
        "activation": activation,
        "out": out,
        "key": found.key,
        "statistics": (channels,),
    }
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm got training=False without running_mean and running_var, which it "
                "then normalises with; give both, or write training=True"
            )
        place = (1, channels) + (1,) * (array.ndim - 2)
        given = (
            np.array(running_mean, np.float64, order="C").reshape(place),
            np.array(running_var, np.float64, order="C").reshape(place),
        )
        # In the order of memory: where the channels are neighbours all rows at once, for which the
        # scales are computed once; otherwise every sample on its own.
        together = array.strides[axis] == array.itemsize or array.ndim == 2
        axes = (0, *range(2, array.ndim)) if together else tuple(range(2, array.ndim))
        y, mean, _, rstd = _run(x, array, axes, w, b, eps=eps, given=given, **shared)
    else:
        axes = (0, *range(2, array.ndim))
        counts = _counted(where, array, tuple(a for a in range(array.ndim) if a != axis))
        require_two(counts, "batch_norm(training=True)", "statistics")
        y, mean, var, rstd = _run(x, array, axes, w, b, eps=eps, **shared)
        if array.size:
            parts = (1, channels)
            mean, var = mean.reshape(parts), var.reshape(parts)
            _update(running_mean, running_var, mean, var, counts, momentum)
    if return_stats:
        return y, mean.reshape(channels), rstd.reshape(channels)
    return y


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
) -> Result:
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
        (C,), or (N, C) (conditional instance norm, AdaIN) or any shape that broadcasts against
        `x` (SPADE) for parameters of each sample.
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
        one position per channel where a running variance is to be updated.
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
    key = None
    if use_input_stats and running_mean is None and running_var is None:
        found = quick_forward(
            INSTANCE,
            None,
            channel_axis,
            x,
            weight,
            bias,
            eps,
            return_stats,
            where,
            residual,
            activation,
            out,
        )
        if type(found) is not Unplanned:
            return found
        key = found.key
    if (door := door_of(x)) is not None:
        return send(door, instance_norm, locals())
    array = as_array(x, "x")
    check_ndim(array, 2, "instance_norm", "(N, C, ...)")
    if not use_input_stats:
        channel_axis_of(array, channel_axis, "instance_norm")
        if running_mean is None or running_var is None:
            raise ValueError(
                "instance_norm got use_input_stats=False without running_mean and running_var, "
                "which it then normalises with; give both, or write use_input_stats=True"
            )
        result = batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            False,
            momentum,
            eps,
            channel_axis=channel_axis,
            where=where,
            residual=residual,
            activation=activation,
            out=out,
            return_stats=return_stats,
        )
        if not return_stats:
            return result
        y, mean, rstd = result
        both = (array.shape[0], mean.size)
        return y, np.broadcast_to(mean, both).copy(), np.broadcast_to(rstd, both).copy()
    axis = channel_axis_of(array, channel_axis, "instance_norm")
    samples, channels = array.shape[0], array.shape[axis]
    eps = check_eps(eps)
    check_running(running_mean, running_var, channels, written=True)
    w = _channels(weight, "weight", array, axis)
    b = _channels(bias, "bias", array, axis)
    counts = _counted(where, array, tuple(a for a in range(1, array.ndim) if a != axis))
    if running_var is not None:
        require_two(counts, "instance_norm with running_var", "a running variance")
    y, mean, var, rstd = _run(
        x,
        array,
        range(2, array.ndim),
        w,
        b,
        eps=eps,
        view=channels_second(axis),
        where=where,
        residual=residual,
        activation=activation,
        out=out,
        key=key,
        statistics=(samples, channels),
    )
    mean, var = mean.reshape(samples, channels), var.reshape(samples, channels)
    if array.size:
        _update(running_mean, running_var, mean, var, counts, momentum)
    if return_stats:
        return y, mean, rstd.reshape(samples, channels)
    return y


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
) -> Result:
    r"""Normalise each group of neighbouring channels of each sample.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    Parameters
    ----------
    x
        (N, C, ...), or with the channels on `channel_axis`; at least 2 dimensions.
    num_groups
        How many groups the C channels form; a divisor of C.
    weight, bias
        (C,), or (N, C) (FiLM) or any shape that broadcasts against `x` for parameters of each
        sample.
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
        If `num_groups` does not divide the channels, or shapes do not fit.
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
    found = quick_forward(
        GROUP,
        num_groups,
        channel_axis,
        x,
        weight,
        bias,
        eps,
        return_stats,
        where,
        residual,
        activation,
        out,
    )
    if type(found) is not Unplanned:
        return found
    if (door := door_of(x)) is not None:
        return send(door, group_norm, locals())
    array = as_array(x, "x")
    check_ndim(array, 2, "group_norm", "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "group_norm")
    samples, channels = array.shape[0], array.shape[axis]
    groups = groups_of(num_groups, channels)
    eps = check_eps(eps)
    split = split_groups(axis, channels, groups)

    def parameter(value: ArrayLike | None, name: str) -> Array | None:
        placed = _channels(value, name, array, axis)
        return None if placed is None else split(np.moveaxis(placed, 1, axis))

    y, mean, _, rstd = _run(
        x,
        array,
        range(2, array.ndim + 1),
        parameter(weight, "weight"),
        parameter(bias, "bias"),
        eps=eps,
        view=split,
        where=where,
        residual=residual,
        activation=activation,
        out=out,
        key=found.key,
        statistics=(samples, groups),
    )
    if return_stats:
        return y, mean.reshape(samples, groups), rstd.reshape(samples, groups)
    return y


# --- Layer and RMS norm ---------------------------------------------------------------------------


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
) -> Result:
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
        The shape `normalized_shape`, or that of the axes in `axis`; or any shape that broadcasts
        against `x`, such as (N, 1, D) (AdaLN), for parameters of each sample.
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
    found = quick_forward(
        LAYER,
        normalized_shape,
        axis,
        x,
        weight,
        bias,
        eps,
        return_stats,
        where,
        residual,
        activation,
        out,
    )
    if type(found) is not Unplanned:
        return found
    if (door := door_of(x)) is not None:
        return send(door, layer_norm, locals())
    array = as_array(x, "x")
    check_ndim(array, 1, "layer_norm", "(..., D)")
    axes = layer_axes(array, normalized_shape, axis, "layer_norm")
    y, mean, _, rstd = _run(
        x,
        array,
        axes,
        _axes(weight, "weight", array, axes),
        _axes(bias, "bias", array, axes),
        eps=check_eps(eps),
        where=where,
        residual=residual,
        activation=activation,
        out=out,
        key=found.key,
        statistics=tuple(1 if a in axes else n for a, n in enumerate(array.shape)),
    )
    return (y, mean, rstd) if return_stats else y


def _machine_epsilon(dtype: np.dtype[Any]) -> float:
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def _offset_weight(weight: ArrayLike | None, offset: float, x: Array) -> ArrayLike | None:
    """weight + offset, added in float64 and rounded once."""
    if weight is None or offset == 0.0:
        return weight
    return as_array(weight, "weight").astype(np.float64) + offset


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
) -> Result:
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
        The shape `normalized_shape`, or that of the axes in `axis`; or any shape that broadcasts
        against `x` for parameters of each sample.
    eps
        Added to the mean square, in the units of x squared; None is the machine epsilon of the
        dtype of `x`, as in PyTorch.
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
    key = None
    if weight_offset == 0.0:
        found = quick_forward(
            RMS,
            normalized_shape,
            axis,
            x,
            weight,
            None,
            0.0 if eps is None else eps,
            return_stats,
            where,
            residual,
            activation,
            out,
            eps is not None,
        )
        if type(found) is not Unplanned:
            return found
        key = found.key
    if (door := door_of(x)) is not None:
        return send(door, rms_norm, locals())
    array = as_array(x, "x")
    check_ndim(array, 1, "rms_norm", "(..., D)")
    axes = layer_axes(array, normalized_shape, axis, "rms_norm")
    weight = _offset_weight(weight, weight_offset, array)
    eps = _machine_epsilon(array.dtype) if eps is None else check_eps(eps)
    y, _, _, rstd = _run(
        x,
        array,
        axes,
        _axes(weight, "weight", array, axes),
        eps=eps,
        centred=False,
        where=where,
        residual=residual,
        activation=activation,
        out=out,
        key=key,
        statistics=tuple(1 if a in axes else n for a, n in enumerate(array.shape)),
    )
    return (y, rstd) if return_stats else y


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
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
    found = quick_forward(
        ADD_LAYER, normalized_shape, None, x, weight, bias, eps, False, None, residual
    )
    if type(found) is not Unplanned:
        return found
    if (door := door_of(x)) is not None:
        return send(door, add_layer_norm, locals())
    return add_norm(
        "add_layer_norm", x, residual, normalized_shape, weight, bias, eps, key=found.key
    )


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes,
    weight: ArrayLike | None = None,
    eps: float | None = None,
) -> tuple[Array, Array]:
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
    own, value = eps is not None, 0.0 if eps is None else eps
    found = quick_forward(
        ADD_RMS,
        normalized_shape,
        None,
        x,
        weight,
        None,
        value,
        False,
        None,
        residual,
        None,
        None,
        own,
    )
    if type(found) is not Unplanned:
        return found
    if (door := door_of(x)) is not None:
        return send(door, add_rms_norm, locals())
    return add_norm("add_rms_norm", x, residual, normalized_shape, weight, None, eps, key=found.key)


def add_norm(
    name: str,
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: Axes,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float | None,
    *,
    out: Array | None = None,
    total: Array | None = None,
    key: bytes | None = None,
) -> tuple[Array, Array]:
    """`add_layer_norm` or `add_rms_norm`, into arrays that may be given; `total` may be `x`."""
    array = as_array(x, "x")
    eps = _machine_epsilon(array.dtype) if eps is None else check_eps(eps)
    check_ndim(array, 1, name, "(..., D)")
    axes = layer_axes(array, normalized_shape, None, name)
    addend = same_shape(residual, "residual", array)
    if total is None:
        total = empty_like(array)
    y, *_ = _run(
        x,
        array,
        axes,
        _axes(weight, "weight", array, axes),
        _axes(bias, "bias", array, axes),
        out=out,
        eps=eps,
        centred=name == "add_layer_norm",
        addend=addend,
        total=total,
        key=key,
    )
    return y, delivered(total, x)


# --- The small ones -------------------------------------------------------------------------------


def l2_normalize(
    x: ArrayLike, axis: Axes | None = -1, *, eps: float = 1e-12, out: Array | None = None
) -> Array:
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
        For an axis that `x` does not have, or an `out` that does not fit.
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
    if (door := door_of(x)) is not None:
        return send(door, l2_normalize, locals())
    array = as_array(x, "x")
    check_ndim(array, 1, "l2_normalize", "(..., D)")
    axes = layer_axes(array, None, range(array.ndim) if axis is None else axis, "l2_normalize")
    eps = check_eps(eps)
    return _run(x, array, axes, centred=False, scaling=Scaling.NORM, eps=eps, out=out)[0]


def local_response_norm(
    x: ArrayLike,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    channel_axis: int = 1,
) -> Array:
    r"""Divide each value by a power of the mean square of its neighbouring channels.

    .. math:: y_c = x_c \Big(k + \frac{\alpha}{n} \sum_{c'} x_{c'}^2\Big)^{-\beta}

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
    if (door := door_of(x)) is not None:
        return send(door, local_response_norm, locals())
    array = as_array(x, "x")
    check_ndim(array, 2, "local_response_norm", "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "local_response_norm")
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"size is {size!r}, expected a whole number of channels, 1 or more")
    y = np.empty_like(array, subok=False)
    moved, result = (np.moveaxis(a, axis, 1) for a in (array, y))
    channels = moved.shape[1]
    with np.errstate(all="ignore"):
        # sample by sample, in float64: what is beside x and y is the size of one sample
        for sample, target in zip(moved, result, strict=True):
            wide = sample.astype(np.float64)
            squares = wide * wide
            near = np.zeros_like(wide)
            for shift in range(-(size // 2), (size - 1) // 2 + 1):
                low, high = max(0, -shift), min(channels, channels - shift)
                if low < high:
                    near[low:high] += squares[low + shift : high + shift]
            target[...] = wide * (k + alpha / size * near) ** -beta
    return delivered(y, x)


def weight_norm(v: ArrayLike, g: ArrayLike, *, axis: Axes | None = 0) -> Array:
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
    if (door := door_of(v)) is not None:
        return send(door, weight_norm, locals())
    array = as_array(v, "v")
    check_ndim(array, 1, "weight_norm", "(C, ...)")
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
    return _run(v, array, axes, lengths, centred=False, scaling=Scaling.NORM)[0]


def weight_standardize(w: ArrayLike, *, eps: float = 1e-5) -> Array:
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
    if (door := door_of(w)) is not None:
        return send(door, weight_standardize, locals())
    array = as_array(w, "w")
    check_ndim(array, 2, "weight_standardize", "(C_out, ...)")
    return _run(w, array, range(1, array.ndim), eps=check_eps(eps))[0]


def global_response_norm(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike, *, eps: float = 1e-6, channel_axis: int = 1
) -> Array:
    r"""Scale each channel by its length relative to that of the other channels.

    .. math:: y = w \cdot x \cdot \frac{\lVert x_{n,c} \rVert_2}
              {\mathrm{mean}_{c'} \lVert x_{n,c'} \rVert_2 + \epsilon} + b + x

    Parameters
    ----------
    x
        (N, C, ...), or with the channels on `channel_axis`; at least 2 dimensions. The norms are
        over the positions.
    weight, bias
        (C,), or (N, C) or any shape that broadcasts against `x`.
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
    if (door := door_of(x)) is not None:
        return send(door, global_response_norm, locals())
    array = as_array(x, "x")
    check_ndim(array, 2, "global_response_norm", "(N, C, ...)")
    axis = channel_axis_of(array, channel_axis, "global_response_norm")
    w = channel_parameter(weight, "weight", array, axis)
    b = channel_parameter(bias, "bias", array, axis)
    eps = check_eps(eps)
    moved = np.moveaxis(array, axis, 1)
    if not array.size:
        return delivered(np.empty_like(array, subok=False), x)
    places = moved.shape[:2] + (1,) * (array.ndim - 2)
    mean, var, rstd = np.zeros(places), np.empty(places), np.empty(places)
    reduced = tuple(a >= 2 for a in range(array.ndim))
    compute(Pass(moved, None, reduced, mean, var, rstd, centred=False))
    length = np.sqrt(var * math.prod(moved.shape[2:]))
    with np.errstate(all="ignore"):
        relative = length / (length.mean(axis=1, keepdims=True) + eps)
    factor = (1.0 + w.astype(np.float64) * relative).astype(computing_type(array.dtype))
    return _scaled(x, array, 1.0, factor, b, view=channels_second(axis))


def _scaled(
    x: ArrayLike,
    array: Array,
    factor: float,
    weight: Array | None,
    bias: Array | None,
    **options: Any,
) -> Array:
    """x * factor, then the rest of a step: a pass with no statistics of its own."""
    one = (1,) * array.ndim
    given = np.zeros(one), np.full(one, factor)
    return _run(
        x, array, range(array.ndim), weight, bias, given=given, scaling=Scaling.FACTOR, **options
    )[0]


def dynamic_tanh(
    x: ArrayLike,
    alpha: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> Array:
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
    if (door := door_of(x)) is not None:
        return send(door, dynamic_tanh, locals())
    array = as_array(x, "x")
    check_ndim(array, 1, "dynamic_tanh", "(..., D)")
    factor = as_array(alpha, "alpha")
    if factor.size != 1:
        raise ValueError(f"alpha has shape {factor.shape}, expected one number")
    expected = f"expected ({array.shape[-1]},) or a shape that broadcasts against x"

    def placed(value: ArrayLike | None, name: str) -> Array | None:
        if value is None:
            return None
        return spread(parameter(value, name, array), array.shape, name, expected)

    w, b = placed(weight, "weight"), placed(bias, "bias")
    return _scaled(x, array, float(factor.reshape(())), w, b, squash=True)


def activate(
    x: ArrayLike,
    activation: Activation,
    bias: ArrayLike | None = None,
    *,
    out: Array | None = None,
) -> Array:
    r"""Add a bias and apply an activation, in one pass over memory.

    .. math:: y = f(x + b)

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    activation
        ``"relu"``, ``"silu"``, ``"gelu"`` (of the error function), ``"gelu_tanh"`` or None.
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
    array = as_array(x, "x")
    check_ndim(array, 1, "activate", "(..., D)")
    added = _axes(bias, "bias", array, (array.ndim - 1,))
    return _scaled(x, array, 1.0, None, added, activation=activation, out=out)


# --- Docstrings -----------------------------------------------------------------------------------

# What five norms share is written once.
_SHARED = """\
where
        bool, broadcasts to `x`: only these elements enter the statistics; every element is
        normalised.
    residual
        The shape of `x`: added after the affine step and before the activation.
    activation
        ``"relu"``, ``"silu"``, ``"gelu"`` (of the error function), ``"gelu_tanh"``, None, or a
        function of one number compiled with ``numba.njit``, which becomes part of the pass.
    out
        The array to write into, of the shape and dtype of `x`; may be `x` itself.
    return_stats
        Whether to return the statistics too."""

for _norm in (batch_norm, instance_norm, group_norm, layer_norm, rms_norm):
    if _norm.__doc__:  # absent under python -OO
        _norm.__doc__ = _norm.__doc__.replace("%(shared)s", _SHARED)
