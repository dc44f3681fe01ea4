"""The norms as modules, with the options, the behaviour and the state of those in ``torch.nn``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastnorm import backward, functional
from fastnorm.arguments import (
    MOST_AXES,
    Array,
    Axes,
    channel_parameter,
    check_eps,
    check_flag,
    check_momentum,
    computing_type,
    groups_of,
    require_two,
    same_shape,
    unmask,
    whole,
    whole_numbers,
)
from fastnorm.execution import Running, update_running
from fastnorm.fields import FIELDS, Scales, fields_of, normalised_by, scales_of
from fastnorm.moments import Moments
from fastnorm.nn.bases import (
    ChannelNorm,
    Gradients,
    Norm,
    Saved,
    count_of,
    elements,
    named,
    with_mask,
)


class BatchNorm(ChannelNorm):
    r"""Batch normalization, over samples and positions.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    In training the statistics are those of the batch, and the running ones move towards them; in
    inference they are the running ones, or those of the batch where there are none. Setting the
    attribute `track_running_stats` to False stops the running ones where they are. ``BatchNorm1d``,
    ``BatchNorm2d`` and ``BatchNorm3d`` take 2 or 3, 4, and 5 dimensions alone.

    Parameters
    ----------
    num_features
        The number of channels.
    eps
        Added to the variance, in the units of x squared.
    momentum
        The share of the batch in the new running statistics, 0 to 1; None for the average of all
        batches.
    affine
        Whether there is a weight, (num_features,), and with `bias` a bias.
    track_running_stats
        Whether there are running statistics.
    bias
        Whether there is a bias.
    channel_axis
        The axis of the channels: 1, or -1 for channels-last.
    dtype
        Of parameters and running statistics, whatever that of `x`.
    comm
        A communicator of mpi4py: the batch is what all its processes have got, one part each, and
        results, running statistics and gradients are those of one process with all of it. The
        gradients of weight and bias are sums over all parts, the same in each process. Every
        process must make the same calls; a part may be empty.

    Raises
    ------
    ValueError
        For an `eps` or a `num_features` that cannot be; on a call, for an `x` that does not fit.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.nn.BatchNorm(2, momentum=0.5)
    >>> y = m(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> m.running_mean
    array([ 1., 10.], dtype=float32)
    >>> dx = m.backward(np.ones_like(y))
    >>> m.grad["bias"]
    array([2., 2.], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        dtype: DTypeLike = np.float32,
        comm: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats,
            bias=bias, channel_axis=channel_axis, dtype=dtype,
        )  # fmt: skip
        self.comm = comm
        self._recorded: Moments | None = None  # takes in every x while nn.recalibrate runs

    def _forward(self, x: ArrayLike) -> tuple[Array, Saved]:
        array = self._checked(x)
        if self._recorded is not None:
            self._recorded.merge(self._moments(array, x))
            y, mean, rstd, _ = self._normalised(x, array, (None, None), 0.0)
            return y, (with_mask(array, x), mean, rstd, None)
        counted = self._buffers.get("num_batches_tracked")
        tracking = self.training and self.track_running_stats
        if not self.training and any(part is not None for part in self._running):
            y, mean, rstd = functional.batch_norm(x, *self._running, **self._given)
            return y, (with_mask(array, x), mean, rstd, None)
        momentum = 0.0 if self.momentum is None else check_momentum(self.momentum)
        if tracking and self.momentum is None and counted is not None:
            if counted < 0:
                raise ValueError(
                    f"num_batches_tracked is {counted}, expected 0 or more; write "
                    "reset_running_stats()"
                )
            momentum = 1.0 / (int(counted) + 1)
        running = self._running if tracking else (None, None)
        y, mean, rstd, count = self._normalised(x, array, running, momentum)
        if tracking and counted is not None:
            counted += 1
        return y, (with_mask(array, x), mean, rstd, count)

    def _moments(self, array: Array, x: ArrayLike) -> Moments:
        """Those of each channel of `array`, x checked, as of values in one more axis."""
        kept = unmask(x, None)[1]
        where = None if kept is None else np.moveaxis(kept, self.channel_axis, 0)
        moved = np.moveaxis(array, self.channel_axis, 0)
        fields = fields_of(moved, tuple(range(1, moved.ndim)), where)
        return Moments(1)._take(fields.reshape(len(FIELDS), len(moved)))

    def _normalised(
        self, x: ArrayLike, array: Array, running: tuple[Any, Any], momentum: float
    ) -> tuple[Array, Array, Array, Any]:
        """By the statistics of the batch, which move the running ones: (y, mean, rstd, count)."""
        if self.comm is None:
            options = self._given | {"training": True, "momentum": momentum}
            return *functional.batch_norm(x, *running, **options), array.size // self.num_features
        total: Any = self._moments(array, x).allreduce(self.comm)
        require_two(total.count, "BatchNorm in training", "use a larger batch, or eval()")
        assert total._fields is not None  # this process has added its own
        scales = scales_of(total._fields, self.eps)
        y = self._by_scales(x, array, scales, **self._affine)
        if total.count.all():
            mean, var, counts = (s[np.newaxis] for s in (total.mean, total.var(), total.count))
            update_running(Running(*running, counts, momentum), mean, var)
        return y, total.mean, scales.rstd_of_x(), total.count

    def _by_scales(
        self,
        x: ArrayLike,
        array: Array,
        scales: Scales,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        residual: Array | None = None,
    ) -> Array:
        """Each channel by its scale, which is not from this part of the batch alone."""
        axis = self.channel_axis
        moved = np.moveaxis(array, axis, 1)
        place = (1, -1) + (1,) * (array.ndim - 2)
        w, b = (
            channel_parameter(value, name, moved, 1)
            for value, name in ((weight, "weight"), (bias, "bias"))
        )
        y = normalised_by(
            Scales(*(part.reshape(place) for part in scales)),
            x,
            moved,
            (0, *range(2, array.ndim)),
            w,
            b,
            residual=None if residual is None else np.moveaxis(residual, axis, 1),
        )
        return np.moveaxis(y, 1, axis)

    def _backward(self, dy: ArrayLike, saved: Saved) -> Gradients:
        array, mean, rstd, count = saved
        weight, axis = self._affine["weight"], self.channel_axis
        if self.comm is not None and count is not None:
            return self._synchronised(dy, saved)
        return named(
            backward.batch_norm_backward(
                dy, array, mean, rstd, weight, training=count is not None, channel_axis=axis
            )
        )

    def _synchronised(self, dy: ArrayLike, saved: Saved) -> Gradients:
        """The gradients of a batch that lies in several processes."""
        array, mean, rstd, count = saved
        array, where = unmask(array)
        axis: dict[str, Any] = {"channel_axis": self.channel_axis}
        wide = array.astype(computing_type(array.dtype), copy=False)
        slope = same_shape(dy, "dy", array).astype(wide.dtype, copy=False)
        # sums over this part, then over all: of dy * xhat, and of dy
        weight = np.ones(self.num_features)
        _, *own = backward.batch_norm_backward(
            slope, wide, mean, rstd, weight, training=False, **axis
        )
        dweight, dbias = sum(self.comm.allgather(np.stack(own)))
        if self.affine:
            weight = self._affine["weight"].astype(np.float64)
        with np.errstate(all="ignore"):
            scale = weight * rstd
            through_var, through_mean = (
                -scale * s / np.maximum(count, 1) for s in (dweight, dbias)
            )
        # dx = rstd * w * (dy - mean(dy) - xhat * mean(dy * xhat)), as two steps of the forward pass
        zero, one = np.zeros(self.num_features), np.ones(self.num_features)
        directly = functional.batch_norm(slope, zero, one, scale, eps=0.0, **axis)
        none = np.zeros_like(mean)
        scales = Scales(mean, none, rstd, none.astype(np.int64))
        dx = self._by_scales(wide, wide, scales, through_var, through_mean, directly)
        if where is not None:
            dx = np.where(where, dx, directly)
        return dx.astype(array.dtype, copy=False), {"weight": dweight, "bias": dbias}


class InstanceNorm(ChannelNorm):
    r"""Instance normalization, over the positions of each sample and channel.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    The statistics are those of `x`; in inference, if `track_running_stats`, the running ones.
    ``InstanceNorm1d``, ``InstanceNorm2d`` and ``InstanceNorm3d`` take 3, 4 and 5 dimensions alone,
    and one sample (C, ...) without its batch axis.

    Parameters
    ----------
    num_features, eps, affine, bias, channel_axis, dtype
        As for :class:`BatchNorm`.
    momentum
        The share of the batch in the new running statistics, 0 to 1; None counts as 0, as in
        PyTorch.
    track_running_stats
        Whether there are running statistics. Batches are not counted, as in PyTorch.

    Raises
    ------
    ValueError
        For an `eps` or a `num_features` that cannot be; on a call, for an `x` that does not fit.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.nn.InstanceNorm(1, eps=0.0)
    >>> m(np.array([[[1.0, 3.0]], [[10.0, 30.0]]])).ravel()
    array([-1.,  1., -1.,  1.])
    """

    def _is_one_sample(self, array: Array) -> bool:
        return bool(self._ndims) and array.ndim == min(self._ndims)

    def _forward(self, x: ArrayLike) -> tuple[Array, Saved]:
        array = self._checked(x)
        alone = array.ndim > np.ndim(x)  # one sample without a batch axis
        own = self.training or not self.track_running_stats
        y, mean, rstd = functional.instance_norm(
            np.expand_dims(x, 0) if alone else x,
            *self._running,
            use_input_stats=own,
            momentum=0.0 if self.momentum is None else check_momentum(self.momentum),
            **self._given,
        )
        return y[0] if alone else y, (with_mask(array, x), mean, rstd, own, alone)

    def _backward(self, dy: ArrayLike, saved: Saved) -> Gradients:
        array, mean, rstd, own, alone = saved
        weight, axis = self._affine["weight"], self.channel_axis
        if alone:
            dy = same_shape(dy, "dy", array[0])[np.newaxis]
        if own:
            gradients = backward.instance_norm_backward(
                dy, array, mean, rstd, weight, channel_axis=axis
            )
        else:
            # the running statistics, the same for each sample; of no samples, none
            mean, rstd = (s[0] if len(s) else np.zeros(self.num_features) for s in (mean, rstd))
            gradients = backward.batch_norm_backward(
                dy, array, mean, rstd, weight, training=False, channel_axis=axis
            )
        dx, *others = gradients
        return named((dx[0] if alone else dx, *others))


class BatchNorm1d(BatchNorm):
    """:class:`BatchNorm` of (N, C) or (N, C, L), and of no other number of dimensions."""

    _ndims = 2, 3


class BatchNorm2d(BatchNorm):
    """:class:`BatchNorm` of (N, C, H, W), and of no other number of dimensions."""

    _ndims = (4,)


class BatchNorm3d(BatchNorm):
    """:class:`BatchNorm` of (N, C, D, H, W), and of no other number of dimensions."""

    _ndims = (5,)


class InstanceNorm1d(InstanceNorm):
    """:class:`InstanceNorm` of (N, C, L), or of one sample (C, L)."""

    _ndims = 2, 3


class InstanceNorm2d(InstanceNorm):
    """:class:`InstanceNorm` of (N, C, H, W), or of one sample (C, H, W)."""

    _ndims = 3, 4


class InstanceNorm3d(InstanceNorm):
    """:class:`InstanceNorm` of (N, C, D, H, W), or of one sample (C, D, H, W)."""

    _ndims = 4, 5


class GroupNorm(Norm):
    r"""Group normalization, over groups of neighbouring channels of each sample.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    Parameters
    ----------
    num_groups
        How many groups the channels form; a divisor of `num_channels`.
    num_channels
        The number of channels.
    affine
        Whether there is a weight, (num_channels,), and with `bias` a bias.
    eps, bias, channel_axis, dtype
        As for :class:`BatchNorm`.

    Raises
    ------
    ValueError
        If `num_groups` does not divide `num_channels`; on a call, for an `x` that does not fit.

    References
    ----------
    Wu and He, "Group Normalization", 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.nn.GroupNorm(2, 4, eps=0.0)
    >>> m(np.array([[[1.0], [3.0], [10.0], [30.0]]])).ravel()
    array([-1.,  1., -1.,  1.])
    """

    _function = "group_norm"
    _takes = ("num_groups", "weight", "bias", "eps", "channel_axis")
    _shown = ("num_groups", "num_channels", "eps", "affine", "bias", "channel_axis")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_channels = count_of(num_channels, "num_channels")
        self.num_groups = groups_of(num_groups, self.num_channels)
        self.eps = check_eps(eps)
        self.affine = check_flag(affine, "affine")
        super().__init__((self.num_channels,), self.affine, check_flag(bias, "bias"), dtype)
        self.channel_axis = whole(channel_axis, "channel_axis")

    def _checked(self, x: ArrayLike) -> Array:
        array = elements(x)
        if array.ndim > 1:
            self._check_channels(array, "num_channels")
        return array


def _shape(normalized_shape: Axes) -> tuple[int, ...]:
    shape = whole_numbers(normalized_shape, "normalized_shape")
    if not 0 < len(shape) <= MOST_AXES:
        has = f"has {len(shape)} sizes" if shape else "is empty"
        raise ValueError(f"normalized_shape {has}, expected one size or more, up to {MOST_AXES}")
    return tuple(count_of(n, "normalized_shape") for n in shape)


class LayerNorm(Norm):
    r"""Layer normalization, over the trailing axes of each sample.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot w + b

    Parameters
    ----------
    normalized_shape
        The trailing shape: an int or a sequence of ints.
    eps
        Added to the variance, in the units of x squared.
    elementwise_affine
        Whether there is a weight, of the shape `normalized_shape`, and with `bias` a bias.
    bias
        Whether there is a bias.
    dtype
        Of the parameters, whatever that of `x`.

    Raises
    ------
    ValueError
        For a shape or `eps` that cannot be; on a call, for an `x` that does not fit.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.nn.LayerNorm(2, eps=0.0)
    >>> m(np.array([[1.0, 3.0], [10.0, 30.0]]))
    array([[-1.,  1.],
           [-1.,  1.]])
    """

    _function = "layer_norm"
    _takes = ("normalized_shape", "weight", "bias", "eps")
    _shown = ("normalized_shape", "eps", "elementwise_affine", "bias")

    def __init__(
        self,
        normalized_shape: Axes,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        weight = check_flag(elementwise_affine, "elementwise_affine")
        self.eps = check_eps(eps)
        super().__init__(self.normalized_shape, weight, check_flag(bias, "bias"), dtype)
        self.elementwise_affine = weight


class RMSNorm(Norm):
    r"""Root mean square normalization, over the trailing axes of each sample.

    .. math:: y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot w

    Parameters
    ----------
    normalized_shape
        The trailing shape: an int or a sequence of ints.
    eps
        Added to the mean square, in the units of x squared; None is the machine epsilon of the
        type that is computed in: float32's, or float64's where `x` is of doubles.
    elementwise_affine
        Whether there is a weight, of the shape `normalized_shape`.
    dtype
        Of the weight, whatever that of `x`.

    Raises
    ------
    ValueError
        For a shape or `eps` that cannot be; on a call, for an `x` that does not fit.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.nn.RMSNorm(2, eps=0.0)
    >>> m(np.array([[3.0, -3.0], [0.5, 0.5]]))
    array([[ 1., -1.],
           [ 1.,  1.]])
    """

    _function = "rms_norm"
    _takes = ("normalized_shape", "weight", "eps")
    _shown = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: Axes,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        self.eps = eps if eps is None else check_eps(eps)
        self.elementwise_affine = check_flag(elementwise_affine, "elementwise_affine")
        super().__init__(self.normalized_shape, self.elementwise_affine, False, dtype)
