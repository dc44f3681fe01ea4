"""Every operation of fastnorm in plain NumPy: slow, obvious, and the oracle of every test.

Each function has the name, the argument order and the defaults of the public one, without ``out``,
and a keyword-only ``dtype``: the precision it computes in and answers in (tests pass
``np.longdouble``). Rounding to the dtype of ``x`` is the caller's. Lists and numbers are taken for
arrays. What a function hands on as it is stands in ``**options``: `_channel_norm`, `layer_norm` and
`normalize` say what that may be.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastnorm import _formulas
from fastnorm._formulas import (
    SLOPES,
    SQUASHES,
    Array,
    Axis,
    Maybe,
    affine,
    axes_of,
    count_of,
    norm,
    normalize,
    normalize_backward,
    quiet,
    sum_over,
)

# Nothing here needs them: they are for who compares with them.
ACTIVATIONS, IN_KERNELS = _formulas.ACTIVATIONS, _formulas.IN_KERNELS
activate, moments = _formulas.activate, _formulas.moments

Shape: TypeAlias = int | tuple[int, ...] | None
Gradients: TypeAlias = tuple[Array, Array, Array]


# --- Where weight and bias lie --------------------------------------------------------------------
# `places` says which axis of x each axis of a parameter runs along.


def _channel_places(shape: tuple[int, ...], x: Array, channel_axis: int) -> tuple[int, ...]:
    """(C,) is per channel, (N, C) per sample and channel, the rest broadcasts as in NumPy."""
    channel = channel_axis % x.ndim
    sample = 0 if channel else 1
    if len(shape) == 1:
        return (channel,)
    if len(shape) == 2 and shape[0] in (1, x.shape[sample]) and shape[1] in (1, x.shape[channel]):
        return (sample, channel)
    return tuple(range(x.ndim - len(shape), x.ndim))


def _layer_places(shape: tuple[int, ...], x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the normalised axes in the order given; the rest broadcasts as in NumPy."""
    if shape == tuple(x.shape[a] for a in axes):
        return axes
    return tuple(range(x.ndim - len(shape), x.ndim))


def _place(parameter: Array, places: tuple[int, ...], ndim: int) -> Array:
    """The parameter as an array that broadcasts against x."""
    values = np.asarray(parameter)
    shape = [1] * ndim
    for place, size in zip(places, values.shape, strict=True):
        shape[place] = size
    return values.transpose(sorted(range(len(places)), key=places.__getitem__)).reshape(shape)


def _collect(values: Array, places: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The reverse of `_place` for gradients: sum over every axis that the parameter broadcast."""
    sizes = dict(zip(places, shape, strict=True))
    broadcast = tuple(a for a in range(values.ndim) if sizes.get(a, 1) == 1)
    others = tuple(a for a in range(values.ndim) if a not in places)
    return sum_over(values, broadcast).transpose(places + others).reshape(shape)


# --- Channel norms: x as (N, G, C/G, *positions) --------------------------------------------------


def _split(array: Array, x: Array, groups: int, channel_axis: int) -> Array:
    """`array`, broadcast to x, as (N, G, C/G, *positions)."""
    moved = np.moveaxis(np.broadcast_to(np.asarray(array), x.shape), channel_axis, 1)
    n, c, *positions = moved.shape
    return moved.reshape(n, groups, c // max(groups, 1), *positions)


def _unsplit(array: Array, x: Array, channel_axis: int) -> Array:
    moved = np.moveaxis(x, channel_axis, 1)
    return np.moveaxis(array.reshape(moved.shape), 1, channel_axis)


def _split_axes(ndim: int, batch: bool) -> tuple[int, ...]:
    """What shares a statistic: a group's channels and positions; for batch norm samples too."""
    return (0, *range(2, ndim)) if batch else tuple(range(2, ndim))


def _channel_norm(
    x: Array,
    groups: int | None,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    *,
    channel_axis: int = 1,
    batch: bool = False,
    running: tuple[Maybe, Maybe] = (None, None),
    use_input_stats: bool = True,
    momentum: float = 0.1,
    where: Maybe = None,
    residual: Maybe = None,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    x = np.asarray(x)
    groups = x.shape[channel_axis] if groups is None else groups
    xs = _split(x, x, groups, channel_axis)

    def split(array: Maybe) -> Maybe:
        return None if array is None else _split(array, x, groups, channel_axis)

    def placed(p: Maybe) -> Maybe:
        return (
            None if p is None else _place(p, _channel_places(np.shape(p), x, channel_axis), x.ndim)
        )

    if not use_input_stats:
        if running[0] is None or running[1] is None:
            raise ValueError("statistics that are not the input's: running_mean and running_var")
        place = (1, groups, *[1] * (xs.ndim - 2))
        options["given"] = tuple(np.asarray(r).reshape(place) for r in running)
    axes = _split_axes(xs.ndim, batch)
    where = split(where)
    y, *statistics = normalize(
        xs,
        axes,
        split(placed(weight)),
        split(placed(bias)),
        eps,
        where=where,
        residual=split(residual),
        **options,
    )
    mean, var, rstd = (s.reshape(s.shape[:2]) for s in statistics)
    if use_input_stats:
        count = count_of(xs.shape, axes, where).reshape(mean.shape)
        _update(running[0], mean, count, momentum)
        _update(running[1], var * count / (count - 1), count, momentum)
    y = _unsplit(y, x, channel_axis)
    shape = (groups,) if batch else (len(xs), groups)
    stats = (np.broadcast_to(s if not batch else s[0], shape) for s in (mean, rstd))
    return (y, *stats) if return_stats else y


def _update(running: Maybe, batch: Array, count: Array, momentum: float) -> None:
    """Move `running` to the samples' average statistic; what counted nothing changes nothing."""
    if running is None:
        return
    average = np.where(count > 0, batch, 0).sum(axis=0) / (count > 0).sum(axis=0)
    updated = (1 - momentum) * running.astype(batch.dtype) + momentum * average
    np.copyto(running, updated, casting="unsafe", where=(count > 0).any(axis=0))


def _channel_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    groups: int | None,
    weight: Maybe,
    *,
    channel_axis: int = 1,
    batch: bool = False,
    where: Maybe = None,
    **options: Any,
) -> Gradients:
    x = np.asarray(x)
    channels = x.shape[channel_axis]
    groups = channels if groups is None else groups
    weight = np.ones(channels) if weight is None else np.asarray(weight)
    places = _channel_places(weight.shape, x, channel_axis)
    dys, xs, weights = (
        _split(array, x, groups, channel_axis) for array in (dy, x, _place(weight, places, x.ndim))
    )
    shape = (1 if batch else len(xs), groups) + (1,) * (xs.ndim - 2)
    mean, rstd = np.reshape(mean, shape), np.reshape(rstd, shape)
    axes = _split_axes(xs.ndim, batch)
    if where is not None:
        options["where"] = _split(where, x, groups, channel_axis)
    gradients = normalize_backward(dys, xs, axes, mean, rstd, weights, **options)
    dx, dy_xhat, dy = (_unsplit(g, x, channel_axis) for g in gradients)
    return dx, _collect(dy_xhat, places, weight.shape), _collect(dy, places, weight.shape)


@quiet
def batch_norm(
    x: Array,
    running_mean: Maybe = None,
    running_var: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **options: Any,
) -> Any:
    """Each channel over samples and positions; if not training, by the running statistics."""
    options |= {"running": (running_mean, running_var), "momentum": momentum}
    options |= {"batch": True, "use_input_stats": training}
    return _channel_norm(x, None, weight, bias, eps, **options)


@quiet
def batch_norm_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Maybe = None, **options: Any
) -> Gradients:
    """dx, dweight, dbias."""
    return _channel_norm_backward(dy, x, mean, rstd, None, weight, batch=True, **options)


@quiet
def instance_norm(
    x: Array,
    running_mean: Maybe = None,
    running_var: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **options: Any,
) -> Any:
    """Each channel of each sample over its positions."""
    options |= {"running": (running_mean, running_var), "momentum": momentum}
    options |= {"use_input_stats": use_input_stats}
    return _channel_norm(x, None, weight, bias, eps, **options)


@quiet
def instance_norm_backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Maybe = None, **options: Any
) -> Gradients:
    """dx, dweight, dbias."""
    return _channel_norm_backward(dy, x, mean, rstd, None, weight, **options)


@quiet
def group_norm(
    x: Array,
    num_groups: int,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
    **options: Any,
) -> Any:
    """Each group of neighbouring channels of each sample, over its channels and positions."""
    return _channel_norm(x, num_groups, weight, bias, eps, **options)


@quiet
def group_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    num_groups: int,
    weight: Maybe = None,
    **options: Any,
) -> Gradients:
    """dx, dweight, dbias."""
    return _channel_norm_backward(dy, x, mean, rstd, num_groups, weight, **options)


# --- Layer and RMS norm ---------------------------------------------------------------------------


def _layer_axes(x: Array, normalized_shape: Shape, axis: Axis) -> tuple[int, ...]:
    if normalized_shape is None and axis is not None:
        return axes_of(axis, x.ndim)
    if normalized_shape is not None and axis is None:
        return tuple(range(x.ndim - np.size(normalized_shape), x.ndim))
    raise ValueError("give exactly one of normalized_shape and axis")


def _layer_parameter(
    p: Maybe, x: Array, axes: tuple[int, ...], dtype: DTypeLike, offset: float = 0.0
) -> Maybe:
    """A weight or bias as it broadcasts against x, with an offset added."""
    if p is None:
        return None
    placed = _place(p, _layer_places(np.shape(p), x, axes), x.ndim)
    shifted: Array = placed.astype(dtype) + offset
    return shifted


@quiet
def layer_norm(
    x: Array,
    normalized_shape: Shape = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
    *,
    axis: Axis = None,
    weight_offset: float = 0.0,
    return_stats: bool = False,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> Any:
    """Over the trailing axes of `normalized_shape`, or over `axis`."""
    x = np.asarray(x)
    axes = _layer_axes(x, normalized_shape, axis)
    weight = _layer_parameter(weight, x, axes, dtype, weight_offset)
    bias = _layer_parameter(bias, x, axes, dtype)
    y, mean, _, rstd = normalize(x, axes, weight, bias, eps, dtype=dtype, **options)
    return (y, mean, rstd) if return_stats else y


@quiet
def layer_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    normalized_shape: Shape = None,
    weight: Maybe = None,
    *,
    axis: Axis = None,
    weight_offset: float = 0.0,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> Gradients:
    """dx, dweight, dbias."""
    x = np.asarray(x)
    axes = _layer_axes(x, normalized_shape, axis)
    shape = tuple(x.shape[a] for a in axes) if weight is None else np.shape(weight)
    weight = _layer_parameter(weight, x, axes, dtype, weight_offset)
    dx, dy_xhat, dy = normalize_backward(dy, x, axes, mean, rstd, weight, dtype=dtype, **options)
    places = _layer_places(shape, x, axes)
    return dx, _collect(dy_xhat, places, shape), _collect(dy, places, shape)


def _machine_epsilon(dtype: np.dtype[Any]) -> float:
    """The spacing at 1 of the type that fastnorm computes `dtype` in: integers in float64."""
    single = dtype.name in ("float16", "bfloat16", "float32")
    return float(np.finfo(np.float32 if single else np.float64).eps)


@quiet
def rms_norm(
    x: Array,
    normalized_shape: Shape = None,
    weight: Maybe = None,
    eps: float | None = None,
    *,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """Over the axes of layer_norm: x / sqrt(average of x^2 + eps) * (weight + weight_offset)."""
    eps = _machine_epsilon(np.asarray(x).dtype) if eps is None else eps
    options |= {"centred": False, "return_stats": True}
    y, _, rstd = layer_norm(x, normalized_shape, weight, None, eps, **options)
    return (y, rstd) if return_stats else y


@quiet
def rms_norm_backward(
    dy: Array,
    x: Array,
    rstd: Array,
    normalized_shape: Shape = None,
    weight: Maybe = None,
    **options: Any,
) -> tuple[Array, Array]:
    """dx, dweight."""
    options["centred"] = False
    mean = np.zeros_like(rstd)
    return layer_norm_backward(dy, x, mean, rstd, normalized_shape, weight, **options)[:2]


def _add(x: Array, residual: Array) -> Array:
    """Add in x's dtype, rounding once: float64 is wide enough for all narrower types."""
    x, residual = np.asarray(x), np.asarray(residual)
    wide = np.result_type(x, residual, np.float64)
    floating = x.dtype.kind == "f" or x.dtype.name == "bfloat16"
    total: Array = x.astype(wide) + residual.astype(wide)
    return total.astype(x.dtype if floating else np.float64)


@quiet
def add_layer_norm(
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
    *,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array]:
    """layer_norm(x + residual), and x + residual in x's dtype."""
    total = _add(x, residual)
    return layer_norm(total, normalized_shape, weight, bias, eps, dtype=dtype), total


@quiet
def add_rms_norm(
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Maybe = None,
    eps: float | None = None,
    *,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array]:
    """rms_norm(x + residual), and x + residual in x's dtype."""
    total = _add(x, residual)
    return rms_norm(total, normalized_shape, weight, eps, dtype=dtype), total


# --- The others -----------------------------------------------------------------------------------


def l2_normalize(
    x: Array, axis: Axis = -1, *, eps: float = 1e-12, dtype: DTypeLike = np.float64
) -> Array:
    """Unit vectors: x / max(||x||, eps)."""
    return normalize(x, axis, eps=eps, scale="l2", dtype=dtype)[0]


def standardize(
    x: Array,
    axis: Axis = None,
    *,
    eps: float = 0.0,
    where: Maybe = None,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Z-scores: (x - mean) / sqrt(var + eps)."""
    return normalize(x, axis, eps=eps, where=where, dtype=dtype)[0]


@quiet
def local_response_norm(
    x: Array,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    channel_axis: int = 1,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Divide by (k + alpha * average of x^2 over `size` channels around, zeros outside)^beta."""
    x = np.moveaxis(np.asarray(x).astype(dtype), channel_axis, 0)
    squares = np.pad(x**2, [(size // 2, (size - 1) // 2)] + [(0, 0)] * (x.ndim - 1))
    windows = sum(squares[i : i + len(x)] for i in range(size))
    return np.moveaxis(x / (k + alpha * windows / size) ** beta, 0, channel_axis)


def weight_norm(v: Array, g: Array, *, axis: Axis = 0, dtype: DTypeLike = np.float64) -> Array:
    """Length g, direction v: g * v / ||v||, the norm over all axes but `axis`; 0 where v is."""
    v, g = np.asarray(v), np.asarray(g)
    kept = () if axis is None else axes_of(axis, v.ndim)
    normed = tuple(a for a in range(v.ndim) if a not in kept)
    if g.ndim == 1 and len(kept) == 1:
        g = _place(g, kept, v.ndim)
    return normalize(v, normed, g, eps=0.0, scale="l2", dtype=dtype)[0]


def weight_standardize(w: Array, *, eps: float = 1e-5, dtype: DTypeLike = np.float64) -> Array:
    """(w - mean) / sqrt(var + eps) of each output channel (axis 0)."""
    return normalize(w, tuple(range(1, np.ndim(w))), eps=eps, dtype=dtype)[0]


@quiet
def global_response_norm(
    x: Array,
    weight: Array,
    bias: Array,
    *,
    eps: float = 1e-6,
    channel_axis: int = 1,
    dtype: DTypeLike = np.float64,
) -> Array:
    """With Nx a channel's norm over its sample's average norm: weight * (x * Nx) + bias + x."""
    x = np.asarray(x).astype(dtype)
    channel = channel_axis % x.ndim
    positions = tuple(a for a in range(x.ndim) if a not in (0 if channel else 1, channel))
    size = norm(x, positions, dtype=dtype)
    average = sum_over(size, channel) / x.shape[channel] + eps
    response = x * (size / np.where(average == 0, np.inf, average))
    weight, bias = (
        _place(p, _channel_places(np.shape(p), x, channel), x.ndim).astype(dtype)
        for p in (weight, bias)
    )
    y: Array = weight * response + bias + x
    return y


def dynamic_tanh(
    x: Array, alpha: Array, weight: Maybe = None, bias: Maybe = None, **options: Any
) -> Array:
    """No statistics: weight * tanh(alpha * x) + bias."""
    return _squashed("tanh", x, alpha, 0, weight, bias, **options)


def dynamic_tanh_backward(
    dy: Array, x: Array, alpha: Array, weight: Maybe = None, **options: Any
) -> tuple[Array, ...]:
    """(dx, dalpha, dweight, dbias)."""
    dx, dalpha, _, *affine = _squashed_backward("tanh", dy, x, alpha, 0, weight, **options)
    return (dx, dalpha, *affine)


def derf(
    x: Array,
    alpha: Array,
    shift: ArrayLike = 0.0,
    weight: Maybe = None,
    bias: Maybe = None,
    **options: Any,
) -> Array:
    """No statistics: weight * erf(alpha * x + shift) + bias."""
    return _squashed("erf", x, alpha, shift, weight, bias, **options)


def derf_backward(
    dy: Array,
    x: Array,
    alpha: Array,
    shift: ArrayLike = 0.0,
    weight: Maybe = None,
    **options: Any,
) -> tuple[Array, ...]:
    """(dx, dalpha, dshift, dweight, dbias)."""
    return _squashed_backward("erf", dy, x, alpha, shift, weight, **options)


@quiet
def _squashed(
    f: str,
    x: Array,
    alpha: Array,
    shift: ArrayLike,
    weight: Maybe,
    bias: Maybe,
    dtype: DTypeLike = np.float64,
) -> Array:
    """weight * f(alpha * x + shift) + bias."""
    x, alpha, shift = (np.asarray(p).astype(dtype) for p in (x, alpha, shift))
    return affine(SQUASHES[f](alpha * x + shift), dtype, weight, bias)


@quiet
def _squashed_backward(
    f: str,
    dy: Array,
    x: Array,
    alpha: Array,
    shift: ArrayLike,
    weight: Maybe,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, ...]:
    """(dx, dalpha, dshift, dweight, dbias)."""
    weight = np.ones(np.shape(x)[-1:]) if weight is None else weight
    dy, x, alpha, shift, w = (np.asarray(p).astype(dtype) for p in (dy, x, alpha, shift, weight))
    u = alpha * x + shift
    du = dy * w * SLOPES[f](u)
    placed = (1,) * (x.ndim - w.ndim) + w.shape
    kept = tuple(a for a, n in enumerate(placed) if n == 1)
    dweight, dbias = (sum_over(v, kept).reshape(w.shape) for v in (dy * SQUASHES[f](u), dy))
    dalpha, dshift = (
        sum_over(v, None).reshape(number.shape) for v, number in ((du * x, alpha), (du, shift))
    )
    return du * alpha, dalpha, dshift, dweight, dbias
