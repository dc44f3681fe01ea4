"""What norms as modules have in common: weight and bias, channels, running statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastnorm import backward, functional
from fastnorm.arguments import (
    Array,
    as_array,
    channel_axis_of,
    check_eps,
    check_flag,
    check_momentum,
    shown,
    unmask,
    whole,
)
from fastnorm.nn.module import Module, check_room, parameter_type

Saved = tuple[Any, ...]
Gradients = tuple[Array, dict[str, Array]]


def named(gradients: tuple[Array, ...]) -> Gradients:
    """(dx, dweight, dbias), or without the last, as a module wants them."""
    dx, *others = gradients
    return dx, dict(zip(("weight", "bias"), others))


def count_of(value: int, name: str) -> int:
    """Return a number of features, channels or layers; refuse what is no such number."""
    expected = "a whole number, 1 or more"
    found = whole(value, name, expected)
    if found < 1:
        raise ValueError(f"{name} is {shown(found)}, expected {expected}")
    return found


def elements(x: ArrayLike) -> Array:
    """The elements of `x`, hidden ones too: what a mask leaves out is for the norm to say."""
    return as_array(unmask(x)[0], "x")


def with_mask(array: Array, x: ArrayLike) -> Array:
    """What a backward pass wants: `array`, the numbers of x, with the mask that x has."""
    where = unmask(x)[1]
    return array if where is None else np.ma.array(array, mask=~where.reshape(array.shape))


class Norm(Module):
    """A norm with a weight of ones and a bias of zeros, each of which may be None instead."""

    weight: Array | None
    bias: Array | None
    channel_axis: int  # of those with channels

    _function = ""  # that it calls, and the attributes that this takes
    _takes: tuple[str, ...] = ()

    def __init__(self, shape: tuple[int, ...], weight: bool, bias: bool, dtype: DTypeLike) -> None:
        super().__init__()
        kind = parameter_type(dtype)
        check_room(type(self).__name__, [shape], kind)
        self._absent |= {"weight", "bias"}
        if weight:
            self._add_parameter("weight", np.ones(shape, kind))
        if weight and bias:
            self._add_parameter("bias", np.zeros(shape, kind))

    @property
    def _affine(self) -> dict[str, Any]:
        return {name: self._parameters.get(name) for name in ("weight", "bias")}

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        for name, array in self._parameters.items():
            array[...] = name == "weight"

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        return options | ({"bias": self.bias is not None} if "bias" in options else {})

    def _checked(self, x: ArrayLike) -> Array:
        return elements(x)

    def _check_channels(self, array: Array, name: str) -> None:
        """Refuse an array of other channels than there are, of which `name` is the attribute."""
        own, of = getattr(self, name), type(self).__name__
        found = array.shape[channel_axis_of(array, self.channel_axis, of)]
        if found != own:
            raise ValueError(
                f"{of} got x of shape {array.shape} with {found} channels on axis "
                f"{self.channel_axis}, expected {own}; write {name}={found}, or channel_axis=-1 "
                "where the channels are last"
            )

    def _forward(self, x: ArrayLike) -> tuple[Array, Saved]:
        array = self._checked(x)
        given = {name: getattr(self, name) for name in self._takes}
        y, *stats = getattr(functional, self._function)(x, **given, return_stats=True)
        return y, (with_mask(array, x), *stats)

    def _backward(self, dy: ArrayLike, saved: Saved) -> Gradients:
        given = {name: getattr(self, name) for name in self._takes if name not in ("bias", "eps")}
        return named(getattr(backward, f"{self._function}_backward")(dy, *saved, **given))


class ChannelNorm(Norm):
    """Batch and instance norm: one weight, bias and running statistic for each channel."""

    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: Array | None

    _ndims: tuple[int, ...] = ()  # the numbers of dimensions that are taken; none: 2 or more
    _shown = (
        "num_features", "eps", "momentum", "affine", "track_running_stats", "bias", "channel_axis",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = count_of(num_features, "num_features")
        self.eps = check_eps(eps)
        self.affine = check_flag(affine, "affine")
        super().__init__((self.num_features,), self.affine, check_flag(bias, "bias"), dtype)
        self.momentum = momentum if momentum is None else check_momentum(momentum)
        self.track_running_stats = check_flag(track_running_stats, "track_running_stats")
        self.channel_axis = whole(channel_axis, "channel_axis")
        self._absent |= {"running_mean", "running_var", "num_batches_tracked"}
        if track_running_stats:
            kind = parameter_type(dtype)
            self._buffers["running_mean"] = np.zeros(num_features, kind)
            self._buffers["running_var"] = np.ones(num_features, kind)
            self._buffers["num_batches_tracked"] = np.zeros((), np.int64)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1, the count of batches to 0.

        Without `track_running_stats` they stay what they are.
        """
        if self.track_running_stats:
            for name, array in self._buffers.items():
                array[...] = name == "running_var"

    def reset_parameters(self) -> None:
        """Set the weight to 1, the bias to 0, and the running statistics back, too."""
        super().reset_parameters()
        self.reset_running_stats()

    def _checked(self, x: ArrayLike) -> Array:
        array = elements(x)
        name = type(self).__name__
        if self._ndims and array.ndim not in self._ndims:
            numbers = " or ".join(f"{n}D" for n in self._ndims)
            raise ValueError(
                f"{name} got x of shape {array.shape}: expected {numbers} input (got {array.ndim}D "
                f"input); use {name[:-2]}, which takes any number of positions' axes"
            )
        if array.ndim < 2:
            raise ValueError(f"{name} got x of shape {array.shape}, expected (N, C, ...)")
        if self._is_one_sample(array):
            array = array[np.newaxis]
        self._check_channels(array, "num_features")
        return array

    def _is_one_sample(self, array: Array) -> bool:
        """Whether that is one sample without a batch axis."""
        return False

    @property
    def _running(self) -> tuple[Any, Any]:
        return self.running_mean, self.running_var

    @property
    def _given(self) -> dict[str, Any]:
        """What its function takes in every mode."""
        options = {"eps": self.eps, "channel_axis": self.channel_axis, "return_stats": True}
        return self._affine | options
