"""From checked arrays to a pass, and from that to what is returned: what the norms share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastnorm.arguments import (
    Activation,
    Array,
    asked,
    check_activation,
    check_out,
    is_float,
    lies_plainly,
    mask_of,
    same_shape,
)
from fastnorm.arrays import (
    ArrayView,
    assign,
    empty_on,
    is_writable,
    may_share_memory,
    pointer_of,
    to_device_of,
    to_host,
)
from fastnorm.backends import compute
from fastnorm.backends.fast_path import quick_forward
from fastnorm.description import Pass, Scaling
from fastnorm.runtime import empty_like

# --- Results --------------------------------------------------------------------------------------


def new_like(x: Array) -> Array:
    """Memory for a result, where x is and in its order."""
    if isinstance(x, ArrayView):
        return empty_on(x, x.shape, x.dtype, x.strides)
    return empty_like(x)


def destination(array: Array, out: Array | None, *inputs: Array | None) -> Array:
    """The array to compute into: `out` where the kernels can write there without harm."""
    if out is None:
        return new_like(array)
    usable = lies_plainly(out)
    for other in inputs:
        if usable and other is not None and may_share_memory(out, other):
            # in place is fine: each element is read before it is written
            usable = (
                out.strides == other.strides
                and out.shape == other.shape
                and out.dtype == other.dtype
                and pointer_of(out) == pointer_of(other)
            )
    return out if usable else new_like(array)


def delivered(y: Array, x: ArrayLike, out: Array | None = None) -> Array:
    """`y` where and in the byte order the caller expects it."""
    if out is not None:
        if y is not out:
            assign(out, y)
        return out
    dtype = asked(x, "dtype")
    if isinstance(dtype, np.dtype) and not dtype.isnative and is_float(dtype):
        return y.astype(dtype)
    return y


# --- The pass -------------------------------------------------------------------------------------


def rstd_of(var: Array, eps: float) -> Array:
    """1 / sqrt(var + eps), and 0 where that is 1 / 0: such a group is constant."""
    with np.errstate(all="ignore"):
        shifted = var + eps
        return np.where(shifted == 0, 0.0, 1.0 / np.sqrt(shifted))


def unknown(array: Array, shape: Sequence[int], count: int = 3) -> tuple[Array, ...]:
    """Room for mean, var and rstd; not a number where there is nothing to take them of."""
    if isinstance(array, ArrayView) and array.size:
        return tuple(empty_on(array, shape, np.float64) for _ in range(count))
    if array.size or isinstance(array, ArrayView):
        return tuple(to_device_of(array, part) for part in np.full([count, *shape], np.nan))
    # an array of nothing may have more groups than memory has room for
    return (np.broadcast_to(np.nan, shape),) * count


def handed_out(statistic: Array, *shape: int) -> Array:
    """A statistic of this shape for the caller, whose own it is to write."""
    own = statistic if is_writable(statistic) else statistic.copy()
    return own.reshape(shape)


def _as_it_is(array: Array) -> Array:
    return array


def run(
    x: ArrayLike,
    array: Array,
    axes: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    view: Callable[[Array], Array] = _as_it_is,
    where: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    addend: Array | None = None,
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
    if not (isinstance(array, ArrayView) and array.device.compiles(activation)):
        activation = check_activation(activation)
    mask = mask_of(where, array)
    added = None if residual is None else same_shape(residual, "residual", array)
    # last, when no other argument's code can change it any more
    into = check_out(out, array)
    weight, bias, added, addend, mask = (
        to_device_of(array, operand) for operand in (weight, bias, added, addend, mask)
    )
    seen = view(array)
    reduced = tuple(axis in axes for axis in range(seen.ndim))
    if given is None:
        kept = [1 if r else n for n, r in zip(seen.shape, reduced, strict=True)]
        mean, var, rstd = unknown(array, kept)
    else:
        mean, var = (to_device_of(array, part) for part in given)
        if isinstance(array, ArrayView):
            (rstd,) = unknown(array, mean.shape, 1)
        else:
            rstd = rstd_of(var, options.get("eps", 0.0))
    # a function of the user's may raise half way: what `out` holds is then as it was
    direct = None if callable(activation) and not isinstance(array, ArrayView) else into
    y = destination(array, direct, array, added, mask, weight, bias)
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
                addend=addend,
                activation="tanh" if squash else activation,
                activation_first=squash,
                given=given is not None,
                **options,
            )
        )
    y = delivered(y, x, into)
    return (y if out is None else out), mean, var, rstd


# What `quick_scaled` gives for the mean of what has none.
_NO_MEAN = np.zeros(1)


def quick_scaled(
    norm: int, second: Any, x: Any, factor: float, weight: Any, bias: Any,
    activation: Any = None, out: Array | None = None,
) -> Any:  # fmt: skip
    """What is known of such a call: the result of `scaled`, or `Unplanned` with the key for it."""
    return quick_forward(
        norm, None, second, x, weight, bias, 0.0, False, None, None, activation, out, False,
        _NO_MEAN, np.array([factor]),
    )  # fmt: skip


def scaled(
    x: ArrayLike, array: Array, axes: Sequence[int], factor: float, weight: Array | None,
    bias: Array | None, **options: Any,
) -> Array:  # fmt: skip
    """x * factor, then what `run` does after a norm; it goes along the `axes` at a time.

    Of those along which a weight differs, only the last in memory should be among them.
    """
    one = (1,) * array.ndim
    options |= {"given": (np.zeros(one), np.full(one, factor)), "scaling": Scaling.FACTOR}
    return run(x, array, axes, weight, bias, statistics=(1,), **options)[0]


# --- Views ----------------------------------------------------------------------------------------


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


# --- Range ----------------------------------------------------------------------------------------


def extremes(x: Array, axes: Sequence[int], mask: Array | None = None) -> tuple[Array, Array]:
    """The least and the greatest of 0 and each group, its axes kept as 1, in float64."""
    chosen: Any = True if mask is None else mask
    options: dict[str, Any] = {"axis": tuple(axes), "keepdims": True, "initial": 0}
    with np.errstate(all="ignore"):
        low, high = (extreme(x, where=chosen, **options) for extreme in (np.min, np.max))
        return low.astype(np.float64), high.astype(np.float64)


def exponents_of(largest: Array) -> Array:
    """Exponents of the powers of two that numbers up to `largest` are brought below 1 by.

    0 where that is 0, infinite or not a number.
    """
    return np.where(np.isfinite(largest), np.frexp(np.nan_to_num(largest))[1], 0)


# --- Running statistics ---------------------------------------------------------------------------


def counted(where: ArrayLike | None, array: Array, axes: tuple[int, ...]) -> Array:
    """How many elements enter each statistic, in the order of the axes that stay."""
    if where is None or not array.size:
        # one number for all, which broadcasts to each, and none where there is no statistic
        kept = [min(n, 1) for a, n in enumerate(array.shape) if a not in axes]
        return np.full(kept, math.prod(array.shape[a] for a in axes))
    mask: Any = mask_of(to_host(where), array)
    return np.asarray(np.count_nonzero(mask, axis=axes))


def update(
    running_mean: Any, running_var: Any, mean: Array, var: Array, counts: Array, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * average over axis 0, in float64.

    `mean`, `var` and `counts` are (parts, C). A part in which nothing was counted is left out, and
    so is a channel in which that holds for all parts.
    """
    counts = np.broadcast_to(counts, mean.shape)
    on_device = None
    moved = []
    for running, parts, unbiased in ((running_mean, mean, False), (running_var, var, True)):
        if isinstance(running, ArrayView):
            if on_device is None:
                on_device = to_device_of(mean, counts.astype(np.float64, order="C"))
            running.device.update_running(running, parts, on_device, momentum, unbiased=unbiased)
        elif running is not None:
            moved.append((running, _moved(running, to_host(parts), counts, momentum, unbiased)))
    # both are there before the first is written: without memory for it none is
    for running, values in moved:
        running[...] = values


def _moved(running: Array, parts: Array, counts: Array, momentum: float, unbiased: bool) -> Array:
    seen = counts > 0
    with np.errstate(all="ignore"):
        if unbiased:
            parts = parts * (counts / (counts - 1))
        average = np.sum(parts, axis=0, where=seen) / np.count_nonzero(seen, axis=0)
        values = (1 - momentum) * running.astype(np.float64) + momentum * average
        return np.where(seen.any(axis=0), values.astype(running.dtype), running)
