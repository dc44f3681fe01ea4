"""Gradients of the norms of Dask arrays: by the kernels chunk by chunk, or across chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

from fastnorm import arguments, backward
from fastnorm.arguments import Axes, channel_axis_of, is_float
from fastnorm.dask.chunks import (
    Place,
    again,
    are_whole,
    chunked_as,
    dtype_of,
    each,
    grouped,
    lying_as,
    mask_chunked_as,
    on_axes,
    on_channels,
    operand,
    parameter,
    parameters,
    part,
)
from fastnorm.execution import through_activation
from fastnorm.problem import Problem


def _gradients(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    place: Place,
    own: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    group: tuple[int, int] | None = None,
    weight_offset: float = 0.0,
    training: bool = True,
    where: Any = None,
    **after: Any,
) -> tuple[Any, ...]:
    """(dx, dweight, dbias), and that of a residual; the sums over chunks are trees.

    By the kernels where groups lie whole in their chunks, otherwise by Dask's arrays of float64.
    `mean` (None: 0) and `rstd` have as many axes as x; `axes` are the reduced ones.
    """
    dtype = dtype_of(x)
    if weight is None:
        weight, weight_offset = np.ones(own, dtype), 0.0
    kind = getattr(weight, "dtype", np.dtype(np.float64))
    kind = kind if is_float(kind) else np.dtype(np.float64)
    w = parameter(weight, "weight", x, place, wide=True)
    w = w + weight_offset if weight_offset else w
    slope = _through_activation(chunked_as(dy, "dy", x), x, mean, rstd, w, place, **after)
    residual = after.get("residual")
    last = () if residual is None else (slope.astype(dtype_of(operand(residual, "residual"))),)
    shared = tuple(a for a, n in enumerate(w.shape) if n == 1 != x.shape[a])

    def to_weight(a: Any) -> Any:
        total = a.sum(axis=shared, keepdims=True).reshape(w.shape)
        return _unplaced(total, np.shape(weight), place, kind)

    others = mask_chunked_as(where, x)
    if training and axes and are_whole(x, axes, group):
        operands = {"slope": slope, "rstd": rstd, "weight": w}
        operands |= others if mean is None else {"mean": mean} | others
        found = each(_chunk_gradients, x, operands, dtype, axes=axes, group=group)
        sums = (to_weight(part(found, i, np.float64, shared)) for i in (1, 2))
        return part(found, 0, dtype), *sums, *last

    def terms(slope: Any, x: Any) -> tuple[Any, Any, Any]:
        """dy, the standardised x and dy * w."""
        slope, wide = slope.astype(np.float64), each(_wide, x, {}, np.float64)
        return slope, (wide if mean is None else wide - mean) * rstd, slope * w

    def total(a: Any) -> Any:
        summed = a.sum(axis=axes, keepdims=True) if axes else a
        if group is None:
            return summed
        channel, size = group
        together = partial(np.sum, axis=-1, keepdims=True)
        return grouped(summed, channel, size, together, x.chunks[channel])

    read = slope, x
    slope, standard, g = terms(*read)
    averages = []
    if training:
        count = da.maximum(total(each(_chosen, x, others, bool)), 1)  # of none it is not asked
        averages = [total(a) / count for a in (g * standard, *([] if mean is None else [g]))]
        read = again(read, averages, x, axes)
    _, standard_again, dx = terms(*read)
    if training:
        through = standard_again * averages[0]
        through = through if mean is None else through + averages[1]
        dx = da.where(each(_chosen, read[1], others, bool), dx - through, dx)
    return (dx * rstd).astype(dtype), to_weight(slope * standard), to_weight(slope), *last


def _through_activation(
    dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, place: Place, *,
    bias: Any = None, residual: Any = None, activation: Any, derivative: Any,
) -> Any:  # fmt: skip
    """The gradient of what went into the activation."""
    slope = arguments.check_derivative(activation, derivative)
    operands = {"dy": dy, "rstd": rstd, "weight": weight} | parameters(x, place, bias=bias)
    if residual is not None:
        operands["residual"] = chunked_as(residual, "residual", x)
    if slope is None:
        return dy
    operands |= {} if mean is None else {"mean": mean}
    computing = arguments.computing_type(dtype_of(x))
    return each(
        _chunk_through, x, operands, computing, activation=activation, derivative=derivative
    )


def _chunk_through(
    x: Any, *, rstd: Any, weight: Any, activation: Any, derivative: Any, mean: Any = None,
    bias: Any = None, residual: Any = None, dy: Any,
) -> Any:  # fmt: skip
    array = arguments.as_array(arguments.unmask(x)[0], "x")
    computing = arguments.computing_type(array.dtype)
    y = np.empty(array.shape, computing)
    if not y.size:
        return y
    return through_activation(
        Problem(
            array,
            y,
            tuple([n == 1 for n in rstd.shape]),
            np.zeros_like(rstd) if mean is None else np.ascontiguousarray(mean),
            np.ascontiguousarray(rstd),
            np.empty_like(rstd),
            weight.astype(computing),
            bias,
            residual=residual if residual is None else arguments.as_array(residual, "residual"),
            dy=arguments.as_array(dy, "dy"),
            centred=mean is not None,
            activation=arguments.check_derivative(activation, derivative),
        )
    )


def _wide(x: Any) -> Any:
    return arguments.unmask(x)[0].astype(np.float64)


def _chosen(x: Any, where: Any = None) -> Any:
    """Which elements of a chunk statistics are of."""
    x, where = arguments.unmask(x, where)
    mask = arguments.mask_of(where, x)
    return np.broadcast_to(True, x.shape) if mask is None else mask


def _chunk_gradients(
    x: Any,
    slope: Any,
    rstd: Any,
    weight: Any,
    mean: Any = None,
    where: Any = None,
    *,
    axes: Any,
    group: Any,
) -> Any:
    """(dx, dweight, dbias) of a chunk that holds its groups whole; the last two along its axes."""
    if group is not None and group[1] > 1:
        channel, size = group
        channels = x.shape[channel]
        mean, rstd = (
            np.moveaxis(s, channel, 1).reshape(len(x), channels)[:, ::size] for s in (mean, rstd)
        )
        return backward.group_norm_backward(
            slope, x, mean, rstd, channels // size, weight, channel_axis=channel, where=where
        )
    options = {"weight": weight, "axis": axes, "where": where}
    if mean is not None:
        return backward.layer_norm_backward(slope, x, mean, rstd, **options)
    dx, dweight = backward.rms_norm_backward(slope, x, rstd, **options)
    return dx, dweight, np.zeros_like(dweight)


def _unplaced(gradient: Any, shape: tuple[int, ...], place: Place, kind: Any) -> Any:
    """A gradient along the axes of x, as the weight of that shape lies."""
    order = place(np.arange(math.prod(shape)).reshape(shape), "weight").ravel()
    flat = gradient.reshape(-1).rechunk(-1)

    def unsort(values: Any) -> Any:
        out = np.empty_like(values)
        out[order] = values
        return out.reshape(shape).astype(kind)

    if not shape:
        return flat.map_blocks(unsort, dtype=kind, drop_axis=0)
    chunks = tuple((n,) for n in shape)
    new = list(range(1, len(shape)))
    return flat.map_blocks(unsort, dtype=kind, new_axis=new or None, chunks=chunks)


def _statistic(
    value: Any, name: str, x: Any, shape: tuple[int, ...], of: str, place: Callable[[Any], Any]
) -> Any:
    """A mean or rstd along the axes of x."""
    if np.shape(value) != shape:
        raise ValueError(
            f"{name} has shape {np.shape(value)}, expected {shape}; give {of} what the forward "
            "function returned with return_stats=True"
        )
    own = operand(value, name)
    lazy = own if isinstance(own, da.Array) else da.from_array(own)
    return lying_as(place(lazy.astype(np.float64)), x)


def channel_gradients(
    of: str,
    dy: Any,
    x: Any,
    *,
    mean: Any,
    rstd: Any,
    weight: Any,
    channel_axis: int,
    num_groups: int | None = None,
    **options: Any,
) -> Any:
    """Of the channel norms: statistics are one for each channel, or for each sample and group."""
    batch = of == "batch_norm_backward"
    axis = channel_axis_of(x, channel_axis, of, samples=not batch)
    channels = x.shape[axis]
    size, kept, shape = 1, [axis], [channels]
    if not batch:
        groups = arguments.groups_of(channels if num_groups is None else num_groups, channels)
        size, kept, shape = channels // groups, [0, axis], [x.shape[0], groups]
        options["group"] = (axis, size)
    places = [n if a in kept else 1 for a, n in enumerate(x.shape)]
    m, r = (
        _statistic(
            s, name, x, tuple(shape), of, lambda s: da.repeat(s, size, axis=-1).reshape(places)
        )
        for s, name in ((mean, "mean"), (rstd, "rstd"))
    )
    axes = tuple(a for a in range(x.ndim) if a not in kept)
    return _gradients(dy, x, m, r, weight, on_channels(x, axis), (channels,), axes, **options)


def row_gradients(
    of: str,
    dy: Any,
    x: Any,
    *,
    rstd: Any,
    normalized_shape: Axes | None,
    weight: Any,
    axis: Axes | None,
    mean: Any = None,
    **options: Any,
) -> Any:
    """Of layer norm, and without a mean of RMS norm."""
    axes = arguments.layer_axes(x, normalized_shape, axis, of)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    centred = of == "layer_norm_backward"
    m = _statistic(mean, "mean", x, shape, of, lambda s: s) if centred else None
    r = _statistic(rstd, "rstd", x, shape, of, lambda s: s)
    own, place = tuple(x.shape[a] for a in axes), on_axes(x, axes)
    found = _gradients(dy, x, m, r, weight, place, own, tuple(sorted(axes)), **options)
    return found if centred else (*found[:2], *found[3:])
