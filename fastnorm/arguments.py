"""What came in: arrays, parameters and options checked, and put into the form a pass takes.

Every error says what came in, what was expected, and what to write instead.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastnorm.elsewhere import Elsewhere, as_numpy

Array: TypeAlias = NDArray[Any]
Axes: TypeAlias = int | Sequence[int]
Activation: TypeAlias = Literal["relu", "silu", "gelu", "gelu_tanh"] | Callable[[Any], Any] | None

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")


def is_float(dtype: np.dtype[Any]) -> bool:
    """float16, float32, float64, or bfloat16 (a type of ml_dtypes, known by its name alone)."""
    return (dtype.kind == "f" and dtype.itemsize <= 8) or dtype.name == "bfloat16"


def as_array(value: ArrayLike, name: str) -> Array:
    """`value` as a float array the kernels can read: its own memory wherever that is possible."""
    array = as_numpy(value)
    dtype = array.dtype
    if not is_float(dtype):
        if dtype.kind not in "biu":
            raise TypeError(
                f"{name} has dtype {dtype}, expected float16, bfloat16, float32, float64, or "
                f"integers or booleans (computed in float64); write {name}.astype(np.float64) or "
                "another of these first"
            )
        return array.astype(np.float64)
    return _readable(array)


def as_numbers(value: ArrayLike, name: str) -> Array:
    """`as_array`, but integers and booleans stay what they are."""
    array = np.asarray(value)
    return _readable(array) if array.dtype.kind in "biu" else as_array(array, name)


def _readable(array: Array) -> Array:
    """`array`, or a copy where its elements do not lie as the kernels read them."""
    dtype = array.dtype
    odd = any(s % dtype.itemsize or (s == 0 and n > 1) for s, n in zip(array.strides, array.shape))
    if not dtype.isnative or not array.flags.aligned or odd:
        # "K" keeps the order of the axes in memory, and makes room where they were broadcast
        array = array.astype(dtype.newbyteorder("="), order="K", copy=True)
    return array


def computing_type(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """The type that arithmetic on this dtype runs in: float32, or float64 for float64."""
    return np.float64 if dtype.itemsize == 8 else np.float32


def machine_epsilon(dtype: np.dtype[Any]) -> float:
    """The distance from 1 to the next number of the type that is computed in."""
    return float(np.finfo(computing_type(dtype)).eps)


def parameter(value: ArrayLike, name: str, x: Array) -> Array:
    """A weight or bias in the type that is computed in."""
    return as_array(value, name).astype(computing_type(x.dtype), copy=False)


def check_ndim(x: Array, least: int, of: str, shape: str) -> None:
    """Refuse an x of fewer dimensions than `of` needs."""
    if x.ndim < least:
        raise ValueError(
            f"{of} got x of shape {x.shape}, expected at least {least} dimensions {shape}; "
            "write x.reshape(...) to add the missing ones"
        )


def check_eps(eps: float, name: str = "eps") -> float:
    """Return eps as a float; refuse one that is negative, infinite or not a number."""
    if not eps >= 0 or math.isinf(eps):
        raise ValueError(f"{name} is {eps}, expected a finite number, 0 or more, such as 1e-5")
    return float(eps)


def check_momentum(momentum: float) -> float:
    """Return momentum as a float; refuse one that is not from 0 to 1."""
    try:
        found = math.nan if isinstance(momentum, str) else float(momentum)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found <= 1:
        raise ValueError(
            f"momentum is {momentum!r}, expected a number from 0 to 1: the share of the batch in "
            "the running statistics"
        )
    return found


def channel_axis_of(x: Array, channel_axis: int, of: str, *, samples: bool = True) -> int:
    """Return the channels' axis, 0 or more; with `samples`, axis 0 must be left for those."""
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(
            f"{of} got channel_axis={channel_axis} for x of shape {x.shape}, expected "
            f"{-x.ndim} to {x.ndim - 1}; write channel_axis=1 for (N, C, ...), -1 for (N, ..., C)"
        )
    axis = channel_axis % x.ndim
    if samples and axis == 0:
        raise ValueError(
            f"{of} got channel_axis={channel_axis} for x of shape {x.shape}, but axis 0 holds the "
            "samples; write x[np.newaxis] and channel_axis=1 for one sample (C, ...)"
        )
    return axis


def spread(value: Array, shape: tuple[int, ...], name: str, expected: str) -> Array:
    """`value` with as many axes as `shape`, each of its length or 1."""
    padded = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    fits = value.ndim <= len(shape) and all(
        n in (1, whole) for n, whole in zip(padded.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {value.shape} for x of shape {shape}, {expected}")
    return padded


def along_channels(p: Array, name: str, x: Array, axis: int) -> Array:
    """A weight or bias of a channel norm, along the axes of x with the channels moved to axis 1."""
    samples, channels = (1 if axis == 0 else x.shape[0]), x.shape[axis]
    if p.shape == (channels,):
        return p.reshape((1, channels) + (1,) * (x.ndim - 2))
    if p.ndim == 2 and p.shape[0] in (1, samples) and p.shape[1] in (1, channels):
        return p.reshape(p.shape + (1,) * (x.ndim - 2))
    expected = (
        f"expected ({channels},) for each channel, ({samples}, {channels}) for each sample and "
        "channel, or a shape of as many dimensions as x that broadcasts against it"
    )
    if p.ndim < min(3, x.ndim):
        raise ValueError(f"{name} has shape {p.shape} for x of shape {x.shape}, {expected}")
    return np.moveaxis(spread(p, x.shape, name, expected), axis, 1)


def channel_parameter(value: ArrayLike | None, name: str, x: Array, axis: int) -> Array | None:
    """`along_channels` of what came in, if anything did, in the type that is computed in."""
    return None if value is None else along_channels(parameter(value, name, x), name, x, axis)


def along_axes(p: Array, name: str, x: Array, axes: tuple[int, ...]) -> Array:
    """A weight or bias of layer or RMS norm, along the axes of x."""
    own = tuple(x.shape[axis] for axis in axes)
    if p.shape == own:
        # axes in the order they were given; here in the order they stand
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        return p.transpose(order).reshape([n if a in axes else 1 for a, n in enumerate(x.shape)])
    expected = (
        f"expected {own}, or a shape that broadcasts against x for parameters of each sample, such "
        f"as {tuple(1 if a in axes else n for a, n in enumerate(x.shape[:1])) + x.shape[1:]}"
    )
    if p.ndim <= len(own):
        raise ValueError(f"{name} has shape {p.shape} for x of shape {x.shape}, {expected}")
    return spread(p, x.shape, name, expected)


def axis_parameter(
    value: ArrayLike | None, name: str, x: Array, axes: tuple[int, ...]
) -> Array | None:
    """`along_axes` of what came in, if anything did, in the type that is computed in."""
    return None if value is None else along_axes(parameter(value, name, x), name, x, axes)


def mask_of(where: ArrayLike | None, x: Array) -> Array | None:
    """Return `where` as booleans of the shape of x."""
    if where is None:
        return None
    mask = as_numpy(where)
    if mask.dtype != np.bool_:
        raise TypeError(f"where has dtype {mask.dtype}, expected bool; write where.astype(bool)")
    try:
        return np.broadcast_to(mask, x.shape, subok=True)  # an `Elsewhere` stays one
    except ValueError:
        raise ValueError(
            f"where has shape {mask.shape}, expected one that broadcasts to x of shape {x.shape}; "
            "add axes of length 1, as in where[:, np.newaxis]"
        ) from None


def unmask(value: Any, where: ArrayLike | None) -> tuple[Any, Any]:
    """The numbers of an `np.ma` array, and its mask as one more `where`; all else as it came."""
    ma = sys.modules.get("numpy.ma")
    if ma is None or not isinstance(value, ma.MaskedArray):
        return value, where
    numbers = ma.getdata(value, subok=False)
    if ma.getmask(value) is ma.nomask:
        return numbers, where
    kept = ~ma.getmaskarray(value)
    mask = mask_of(where, numbers)
    return numbers, kept if mask is None else kept & mask


def same_shape(value: ArrayLike, name: str, x: Array) -> Array:
    """Return `value` as an array of the shape of x."""
    array = as_array(value, name)
    if array.shape != x.shape:
        raise ValueError(
            f"{name} has shape {array.shape}, expected that of x, {x.shape}; write "
            f"np.broadcast_to({name}, x.shape) if it is to be repeated"
        )
    return array


def check_activation(activation: Activation) -> Activation:
    """Refuse an activation that the kernels neither have nor can call."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return activation
    numba = sys.modules.get("numba")
    if numba is not None and numba.extending.is_jitted(activation):
        return activation
    raise ValueError(
        f"activation is {activation!r}, expected None, one of "
        f"{', '.join(map(repr, ACTIVATIONS))}, or a function of one number compiled with Numba; "
        "write numba.njit(f)"
    )


def check_out(out: Array | None, x: Array) -> None:
    """Refuse an `out` of another type, memory, dtype or shape than x, or a read-only one."""
    if out is None:
        return
    shape, dtype = x.shape, x.dtype
    if isinstance(x, Elsewhere) and not isinstance(out, Elsewhere):
        raise TypeError(
            f"out is a {type(out).__name__}, expected an array where x is; write an empty array "
            "like x of the library that made it"
        )
    if not isinstance(out, np.ndarray):
        raise TypeError(
            f"out is a {type(out).__name__}, expected a NumPy array; write np.empty_like(x)"
        )
    if out.dtype.newbyteorder("=") != dtype.newbyteorder("="):
        raise TypeError(
            f"out has dtype {out.dtype}, expected {dtype} as x has; write np.empty_like(x)"
        )
    if out.shape != shape:
        raise ValueError(
            f"out has shape {out.shape}, expected {shape} as x has; write np.empty_like(x)"
        )
    if not out.flags.writeable:
        raise ValueError("out is read-only, expected a writable array; write np.empty_like(x)")


def check_running(
    mean: ArrayLike | None, var: ArrayLike | None, channels: int, *, written: bool
) -> None:
    """Check running statistics; those that are `written` must be arrays that can be."""
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is None:
            continue
        if written and not isinstance(value, np.ndarray):
            raise TypeError(
                f"{name} is a {type(value).__name__}, expected a NumPy array: it is updated in "
                f"place; write np.{'zeros' if name == 'running_mean' else 'ones'}({channels})"
            )
        array = as_numpy(value)
        if array.shape != (channels,):
            raise ValueError(
                f"{name} has shape {array.shape}, expected ({channels},): one for each channel"
            )
        if not is_float(array.dtype):
            raise TypeError(f"{name} has dtype {array.dtype}, expected a float dtype")
        if written and not array.flags.writeable:
            raise ValueError(f"{name} is read-only, and is updated in place; write {name}.copy()")


def statistic(value: ArrayLike, name: str, shape: tuple[int, ...], of: str) -> Array:
    """A mean or rstd as float64, one for each group."""
    array = as_array(value, name)
    if array.shape != shape:
        raise ValueError(
            f"{name} has shape {array.shape}, expected {shape}; give {of} what the forward "
            "function returned with return_stats=True"
        )
    return array.astype(np.float64, order="C", copy=False)


def require_two(counts: Array, of: str, instead: str, per: str = "channel") -> None:
    """Refuse statistics of a single value: their variance is 0, and 0/0 where it is unbiased."""
    if counts.size and counts.min() == 1:
        raise ValueError(
            f"{of} got one value per {per} to take statistics from, expected at least 2: nothing "
            f"but the bias is left of one; {instead}"
        )


def groups_of(num_groups: int, channels: int) -> int:
    """Return num_groups; refuse one that does not divide the channels."""
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | np.integer):
        raise TypeError(f"num_groups is {num_groups!r}, expected a whole number")
    if num_groups < 1 or channels % num_groups:
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        raise ValueError(
            f"num_groups={num_groups} does not divide the {channels} channels; "
            f"use one of {', '.join(map(str, divisors[-12:]))}"
        )
    return int(num_groups)


def reduced_axes(x: Array, axis: Axes | None, of: str) -> tuple[int, ...]:
    """The axes that NumPy's `axis` means, in order; None for all of them."""
    if axis is None:
        return tuple(range(x.ndim))
    axes = (axis,) if isinstance(axis, int | np.integer) else tuple(axis)
    places = {int(a) % max(x.ndim, 1) for a in axes if -x.ndim <= a < x.ndim}
    if len(places) != len(axes):
        raise ValueError(
            f"{of} got axis={axis!r} for x of shape {x.shape}, expected different axes from "
            f"{-x.ndim} to {x.ndim - 1}, or None for all of them"
        )
    return tuple(sorted(places))


def layer_axes(
    x: Array, normalized_shape: Axes | None, axis: Axes | None, of: str
) -> tuple[int, ...]:
    """The normalised axes, in the order given: that of the weight's own axes."""
    if (normalized_shape is None) == (axis is None):
        both = "neither" if axis is None else "both"
        raise ValueError(
            f"{of} got {both} of normalized_shape and axis, expected exactly one; write "
            f"{of}(x, x.shape[-1]) or {of}(x, axis=-1) for the last axis"
        )
    if axis is not None:
        axes = (axis,) if isinstance(axis, int | np.integer) else tuple(axis)
        wrong = [a for a in axes if not -x.ndim <= a < x.ndim]
        places = tuple(int(a) % x.ndim for a in axes) if not wrong else ()
        if wrong or not axes or len(set(places)) != len(places):
            raise ValueError(
                f"{of} got axis={axis!r} for x of shape {x.shape}, expected one or more different "
                f"axes from {-x.ndim} to {x.ndim - 1}"
            )
        return places
    shape = normalized_shape
    sizes = (int(shape),) if isinstance(shape, int | np.integer) else tuple(cast("Any", shape))
    if not sizes or x.shape[x.ndim - len(sizes) :] != sizes or len(sizes) > x.ndim:
        raise ValueError(
            f"{of} got normalized_shape={normalized_shape!r} for x of shape {x.shape}, expected "
            f"its trailing shape; write x.shape[-1] for the last axis, or axis=... for any others"
        )
    return tuple(range(x.ndim - len(sizes), x.ndim))
