"""The functions of fastnorm for Dask arrays: the same names and arguments, and lazy results.

Importing it is not needed: ``fn.layer_norm(x)`` of a ``dask.array.Array`` comes here by itself.

- Where what shares a statistic lies in one chunk, each chunk is normalised on its own: no data goes
  from one to another.
- Where it does not, the moments of all chunks are merged as a tree, and the chunks are normalised
  with the result. If they are many, they are read a second time instead of being kept.
- ``running_mean`` and ``running_var`` that are to be updated must be Dask arrays: updating them in
  place is then lazy, too. A NumPy array cannot change later, when something is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

from fastnorm import arguments, backward, elementwise, execution, functional, related
from fastnorm._formulas import rstd_of
from fastnorm.arguments import Axes, channel_axis_of, computing_type, taken
from fastnorm.dask.chunks import (
    adapts,
    again,
    are_whole,
    chunked_as,
    dtype_of,
    each,
    fields_over,
    grouped,
    lying_as,
    mask_chunked_as,
    merged,
    of_fields,
    on_axes,
    on_channels,
    operand,
    parameter,
    parameters,
    part,
    scales_by,
)
from fastnorm.dask.gradients import channel_gradients, row_gradients
from fastnorm.fields import Scales, mean_of, normalised_by, scales_of, var_of
from fastnorm.moments import moments as moments_of_arrays
from fastnorm.moments import standardize as standardize_arrays

CHANNELS = "(N, C, ...)"

# --- Any norm -------------------------------------------------------------------------------------


def _normalised(
    x: Any,
    axes: tuple[int, ...],
    own: Callable[..., Any],
    affine: dict[str, Any],
    *,
    where: Any = None,
    residual: Any = None,
    group: tuple[int, int] | None = None,
    centred: bool = True,
    length: bool = False,
    **options: Any,
) -> Any:
    """Any norm by its own statistics: y, or (y, mean, rstd), the last two as x has axes.

    `axes` share a statistic, and so do the channels of a `group` (their axis, how many). `own` is
    the function that does the same for a chunk that holds its groups whole, and `options` are its;
    `centred` and `length` are those of `scales_of`.
    """
    dtype, others = dtype_of(x), mask_chunked_as(where, x)
    if residual is not None:
        others["residual"] = chunked_as(residual, "residual", x)
    return_stats = options.get("return_stats", False)
    if are_whole(x, axes, group):
        found = each(own, x, affine | others, dtype, **options)
        if not return_stats:
            return found
        stats = [part(found, i, np.float64, axes) for i in range(1, 3 if centred else 2)]
        return part(found, 0, dtype), *stats
    fields = fields_over(x, axes, others.pop("where", None))
    if group is not None:
        channel, size = group
        together = partial(merged, axis=-1)
        fields = grouped(fields, channel + 1, size, together, x.chunks[channel])
    scaling = {name: options[name] for name in ("eps", "ddof") if name in options}
    scales = scales_by(fields, centred=centred, length=length, **scaling)
    activation = options.get("activation")
    chunks = again(x, fields, x, axes)
    y = each(_by_scales, chunks, scales | affine | others, dtype, activation=activation)
    if not return_stats:
        return y
    mean = [of_fields(mean_of, fields)] if centred else []
    return y, *mean, of_fields(_rstd_of_x, fields, centred=centred, **scaling)


def _axes_of(array: Any, statistic: Any) -> list[int]:
    """The axes of a chunk that share this statistic."""
    return [a for a in range(array.ndim) if statistic.shape[a] == 1]


def _by_scales(
    x: Any, mean: Any, rest: Any, rstd: Any, exponent: Any, **operands_and_options: Any
) -> Any:
    """One chunk normalised by the scales of all."""
    array, _ = taken(x, None, "", 0)
    scales = Scales(mean, rest, rstd, exponent.astype(np.int64))
    return normalised_by(scales, x, array, _axes_of(array, mean), **operands_and_options)


def _rstd_of_x(fields: Any, **options: Any) -> Any:
    return scales_of(fields, **options).rstd_of_x()


def _by_running(x: Any, running_mean: Any, running_var: Any, **operands_and_options: Any) -> Any:
    """One chunk normalised by statistics that were given."""
    array, _ = taken(x, None, "", 0)
    axes = _axes_of(array, running_mean)
    mean, var = (np.array(s, np.float64, order="C") for s in (running_mean, running_var))
    options = operands_and_options | {"given": (mean, var)}
    return execution.Norm[Any](x, array, axes, **options).answer()


# --- Channel norms: batch, instance, group --------------------------------------------------------


def _channel_chunk(
    x: Any, *, norm: Any, channel_axis: int, size: int | None = None, **options: Any
) -> Any:
    """A channel norm of a chunk that holds its groups whole, of `size` channels if it is by groups.

    Statistics lie along the axes of x, those of a group once for each of its channels.
    """
    if size is not None:
        options["num_groups"] = x.shape[channel_axis] // size
    found = norm(x, channel_axis=channel_axis, **options)
    if not options["return_stats"]:
        return found
    kept = (channel_axis,) if norm is functional.batch_norm else (0, channel_axis)
    shape = [n if a in kept else 1 for a, n in enumerate(x.shape)]
    return found[0], *(s.repeat(size or 1, axis=-1).reshape(shape) for s in found[1:])


def _statistics_of(found: Any, shape: tuple[int, ...]) -> Any:
    """What a channel norm returns, its statistics in their own shape."""
    if not isinstance(found, tuple):
        return found
    return found[0], *(s.reshape(shape) for s in found[1:])


def _check_running(mean: Any, var: Any, channels: int, *, updated: bool) -> None:
    for name, value in (("running_mean", mean), ("running_var", var)):
        if updated and value is not None and not isinstance(value, da.Array):
            raise TypeError(
                f"{name} is a {type(value).__name__}, and x a Dask array: a lazy call cannot "
                f"update it; write da.from_array({name}), which is updated lazily, or "
                "return_stats=True and update it from the computed statistics"
            )
    mean, var = (np.empty(s.shape, s.dtype) if isinstance(s, da.Array) else s for s in (mean, var))
    arguments.check_running(mean, var, channels, written=False)


def _update(
    x: Any, axes: tuple[int, ...], where: Any, running: tuple[Any, Any], axis: int, momentum: float
) -> None:
    """Dask arrays updated in place: from now on they stand for the moved statistics."""
    if all(statistic is None for statistic in running):
        return
    fields = fields_over(x, axes, where)
    channel = fields.ndim
    for statistic, function in zip(running, (mean_of, partial(var_of, ddof=1))):
        if statistic is not None:
            statistic[...] = da.blockwise(
                _moved,
                (channel,),
                statistic.rechunk(-1),
                (channel,),
                fields.rechunk(-1),
                tuple(channel if a == axis + 1 else a for a in range(fields.ndim)),
                function=function,
                axis=axis,
                momentum=momentum,
                concatenate=True,
                dtype=statistic.dtype,
                meta=np.empty(0, statistic.dtype),
            )


def _moved(running: Any, fields: Any, *, function: Any, axis: int, momentum: float) -> Any:
    """The running statistics moved towards the average of what the samples have."""
    others = tuple(a for a in range(fields.ndim - 1) if a != axis)
    return execution.moved_running(running, function(fields), fields[0] > 0, momentum, others)


@adapts(functional.batch_norm, 2, CHANNELS)
def batch_norm(
    x: Any,
    *,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: float,
    eps: float,
    channel_axis: int,
    where: Any,
    return_stats: bool,
    **options: Any,
) -> Any:
    """Running statistics that are to be updated must be Dask arrays."""
    axis = channel_axis_of(x, channel_axis, "batch_norm", samples=False)
    channels, place = x.shape[axis], on_channels(x, axis)
    running = running_mean, running_var
    _check_running(*running, channels, updated=training)
    affine = parameters(x, place, weight=weight, bias=bias)
    if training:
        axes = tuple(a for a in range(x.ndim) if a != axis)
        if where is None:
            count = math.prod(x.shape[a] for a in axes)
            instead = "use a larger batch, or training=False with running statistics"
            arguments.require_two(count, "batch_norm(training=True)", instead)
        options |= {"training": True, "channel_axis": axis, "norm": functional.batch_norm}
        options |= {"eps": eps, "where": where, "return_stats": return_stats}
        found = _normalised(x, axes, _channel_chunk, affine, **options)
        _update(x, axes, where, running, axis, momentum)
        return _statistics_of(found, (channels,))
    if running_mean is None or running_var is None:
        raise ValueError(
            "batch_norm got training=False without running_mean and running_var, which it "
            "then normalises with; give both, or write training=True"
        )
    given = parameters(x, place, wide=True, running_mean=running_mean, running_var=running_var)
    if (residual := options.pop("residual")) is not None:
        affine["residual"] = chunked_as(residual, "residual", x)
    y = each(_by_running, x, given | affine, dtype_of(x), eps=eps, **options)
    if not return_stats:
        return y
    rstd = given["running_var"].map_blocks(rstd_of, eps, dtype=np.float64)
    return _statistics_of((y, given["running_mean"], rstd), (channels,))


@adapts(functional.instance_norm, 2, CHANNELS)
def instance_norm(
    x: Any,
    *,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    use_input_stats: bool,
    momentum: float,
    channel_axis: int,
    where: Any,
    **options: Any,
) -> Any:
    """Running statistics that are to be updated must be Dask arrays."""
    axis = channel_axis_of(x, channel_axis, "instance_norm")
    both, running = (x.shape[0], x.shape[axis]), (running_mean, running_var)
    if not use_input_stats:
        found = batch_norm(x, *running, weight, bias, channel_axis=axis, **options)
        if not options["return_stats"]:
            return found
        return found[0], *(da.broadcast_to(s, both) for s in found[1:])
    _check_running(*running, both[1], updated=True)
    affine = parameters(x, on_channels(x, axis), weight=weight, bias=bias)
    axes = tuple(a for a in range(1, x.ndim) if a != axis)
    if x.size:
        instead = "give x more positions, or write use_input_stats=False with running statistics"
        arguments.require_two(math.prod(x.shape[a] for a in axes), "instance_norm", instead)
    options |= {"norm": functional.instance_norm, "channel_axis": axis, "where": where}
    found = _normalised(x, axes, _channel_chunk, affine, **options)
    _update(x, axes, where, running, axis, momentum)
    return _statistics_of(found, both)


@adapts(functional.group_norm, 2, CHANNELS)
def group_norm(
    x: Any, *, num_groups: int, weight: Any, bias: Any, channel_axis: int, **options: Any
) -> Any:
    """A group of channels may be cut by chunks."""
    axis = channel_axis_of(x, channel_axis, "group_norm")
    samples, channels = x.shape[0], x.shape[axis]
    groups = arguments.groups_of(num_groups, channels)
    size = channels // groups
    affine = parameters(x, on_channels(x, axis), weight=weight, bias=bias)
    arguments.require_two(x.size // groups, "group_norm", "use fewer groups", "group")
    if x.size == samples * groups:
        x = x.rechunk({0: -1})  # one value per group is refused of a single sample only
    axes = tuple(a for a in range(1, x.ndim) if a != axis)
    options |= {"norm": functional.group_norm, "channel_axis": axis, "size": size}
    found = _normalised(x, axes, _channel_chunk, affine, group=(axis, size), **options)
    if not options["return_stats"]:
        return found
    y, *statistics = _statistics_of(found, (samples, channels))
    return y, *(s[:, ::size] for s in statistics)


# --- Layer and RMS norm ---------------------------------------------------------------------------


@adapts(functional.layer_norm, 1)
def layer_norm(
    x: Any, *, normalized_shape: Any, weight: Any, bias: Any, axis: Any, **options: Any
) -> Any:
    """By the chunks' own function, or by merged moments."""
    axes = arguments.layer_axes(x, normalized_shape, axis, "layer_norm")
    affine = parameters(x, on_axes(x, axes), weight=weight, bias=bias)
    options["axis"] = tuple(sorted(axes))
    return _normalised(x, axes, functional.layer_norm, affine, **options)


@adapts(functional.rms_norm, 1)
def rms_norm(
    x: Any,
    *,
    normalized_shape: Any,
    weight: Any,
    eps: float | None,
    axis: Any,
    weight_offset: float,
    **options: Any,
) -> Any:
    """By the chunks' own function, or by merged moments."""
    axes = arguments.layer_axes(x, normalized_shape, axis, "rms_norm")
    if weight is not None and weight_offset:
        weight = operand(weight, "weight").astype("f8") + weight_offset
    affine = parameters(x, on_axes(x, axes), weight=weight)
    options["eps"] = arguments.machine_epsilon(dtype_of(x)) if eps is None else eps
    options["axis"] = tuple(sorted(axes))
    return _normalised(x, axes, functional.rms_norm, affine, centred=False, **options)


def _sum(x: Any, addend: Any) -> Any:
    kind = computing_type(x.dtype)
    x, seen = arguments.unmask(x)
    with np.errstate(all="ignore"):
        total = (x.astype(kind) + addend.astype(kind)).astype(x.dtype)
    # what is hidden is added, too, and stays hidden
    return total if seen is None else np.ma.array(total, mask=~seen)


def _without_mask(x: Any) -> Any:
    return arguments.unmask(x)[0]


def _added(norm: Callable[..., Any], x: Any, residual: Any, **options: Any) -> tuple[Any, Any]:
    """The norm of x + residual, and that sum."""
    x = x.astype(dtype_of(x))
    total = each(_sum, x, {"addend": chunked_as(residual, "residual", x)}, x.dtype)
    return norm(total, **options), each(_without_mask, total, {}, total.dtype)


add_layer_norm = adapts(functional.add_layer_norm)(partial(_added, layer_norm))
add_rms_norm = adapts(functional.add_rms_norm)(partial(_added, rms_norm))

# --- Their relatives ------------------------------------------------------------------------------


@adapts(related.l2_normalize, 1)
def l2_normalize(x: Any, *, axis: Axes | None, eps: float) -> Any:
    """By the chunks' own function, or by merged lengths."""
    axes = arguments.layer_axes(x, None, range(x.ndim) if axis is None else axis, "l2_normalize")
    options: dict[str, Any] = {"axis": axes, "eps": eps, "centred": False, "length": True}
    return _normalised(x, axes, related.l2_normalize, {}, **options)


@adapts(related.weight_norm, 1, "(C, ...)")
def weight_norm(v: Any, *, g: Any, axis: Axes | None) -> Any:
    """By the chunks' own function, or by merged lengths."""
    kept = () if axis is None else arguments.layer_axes(v, None, axis, "weight_norm")
    keepdims = tuple(n if a in kept else 1 for a, n in enumerate(v.shape))

    def place(lengths: Any, name: str) -> Any:
        if lengths.shape == tuple(v.shape[a] for a in kept) and len(kept) <= 1:
            lengths = lengths.reshape(keepdims)
        if lengths.shape != keepdims:
            raise ValueError(
                f"g has shape {lengths.shape} for v of shape {v.shape}, expected {keepdims}: one "
                f"length for each slice along axis {axis}"
            )
        return lengths

    scale = {"weight": parameter(g, "g", v, place)}
    axes = tuple(a for a in range(v.ndim) if a not in kept)
    options: dict[str, Any] = {"axis": kept or None, "centred": False, "length": True}
    return _normalised(v, axes, _weight_norm_chunk, scale, **options)


def _weight_norm_chunk(v: Any, weight: Any, axis: Any) -> Any:
    return related.weight_norm(v, weight, axis=axis)


@adapts(related.weight_standardize, 2, "(C_out, ...)")
def weight_standardize(w: Any, *, eps: float) -> Any:
    """Layer norm over all axes but the first."""
    return layer_norm(w, axis=tuple(range(1, w.ndim)), eps=eps)


@adapts(related.local_response_norm, 2, CHANNELS)
def local_response_norm(x: Any, *, size: int, channel_axis: int, **options: Any) -> Any:
    """Chunks are seen with as many of their neighbours' channels as reach theirs."""
    axis = channel_axis_of(x, channel_axis, "local_response_norm")
    options |= {"size": size, "channel_axis": axis}
    related.local_response_norm(np.empty((0,) * x.ndim, x.dtype), **options)  # checks
    own = partial(each, related.local_response_norm, operands={}, dtype=dtype_of(x), **options)
    if x.numblocks[axis] == 1:
        return own(x=x)
    depth = {axis: tuple(min(n, x.shape[axis] - 1) for n in (size // 2, (size - 1) // 2))}
    seen = da.overlap.overlap(x, depth=depth, boundary="none")
    return da.overlap.trim_internal(own(x=seen), depth, boundary="none")


@adapts(related.global_response_norm, 2, CHANNELS)
def global_response_norm(x: Any, *, weight: Any, bias: Any, eps: float, channel_axis: int) -> Any:
    """Lengths are merged, however the chunks lie."""
    axis = channel_axis_of(x, channel_axis, "global_response_norm")
    place = on_channels(x, axis)
    w = parameter(weight, "weight", x, place, wide=True)
    b = parameter(bias, "bias", x, place)
    fields = fields_over(x, tuple(a for a in range(1, x.ndim) if a != axis))

    def relative(f: Any) -> Any:
        with np.errstate(all="ignore"):
            length = np.sqrt(f[3] + f[4] + f[0] * (f[1] + f[2]) ** 2)
        return related.relative_lengths(length, f[5].astype(np.int64), axis, eps)

    together = of_fields(relative, fields.rechunk({axis + 1: -1}))
    factor = 1.0 + w * together.rechunk({axis: x.chunks[axis]})
    return each(_scaled, x, {"factor": lying_as(factor, x), "bias": b}, dtype_of(x))


def _scaled(x: Any, factor: Any, bias: Any) -> Any:
    array, _ = taken(x, None, "", 0)
    with np.errstate(all="ignore"):
        factor = factor.astype(computing_type(array.dtype))
    return execution.scaled(x, array, 1.0, factor, bias, axes=_axes_of(array, factor)).answer()


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A public function that takes each element by itself, for Dask arrays."""

    def body(x: Any, *, weight: Any, bias: Any, **numbers: Any) -> Any:
        expected = f"expected ({x.shape[-1]},) or a shape that broadcasts against x"

        def place(p: Any, name: str) -> Any:
            return arguments.spread(p, x.shape, name, expected)

        affine = parameters(x, place, weight=weight, bias=bias)
        return each(function, x, affine, dtype_of(x), **numbers)

    return adapts(function, 1, sized=False)(body)


dynamic_tanh, derf = _elementwise(elementwise.dynamic_tanh), _elementwise(elementwise.derf)

# --- Gradients ------------------------------------------------------------------------------------

batch_norm_backward, instance_norm_backward, group_norm_backward = (
    adapts(function, 2, CHANNELS)(partial(channel_gradients, function.__name__))
    for function in (
        backward.batch_norm_backward,
        backward.instance_norm_backward,
        backward.group_norm_backward,
    )
)
layer_norm_backward, rms_norm_backward = (
    adapts(function, 1)(partial(row_gradients, function.__name__))
    for function in (backward.layer_norm_backward, backward.rms_norm_backward)
)

# --- Statistics -----------------------------------------------------------------------------------


@adapts(moments_of_arrays, sized=False)
def moments(x: Any, *, axis: Axes | None, where: Any, ddof: float, keepdims: bool) -> Any:
    """The results are Dask arrays, too."""
    axes = arguments.reduced_axes(x, axis, "moments")
    dtype_of(x)  # checks
    fields = fields_over(x, axes, where)
    found = of_fields(mean_of, fields), of_fields(var_of, fields, ddof=ddof)
    return found if keepdims else tuple(s.squeeze(axes) for s in found)


@adapts(standardize_arrays)
def standardize(x: Any, *, axis: Axes | None, **options: Any) -> Any:
    """By the chunks' own function, or by merged moments."""
    axes = arguments.reduced_axes(x, axis, "standardize")
    return _normalised(x, axes, standardize_arrays, {}, axis=axes, **options)


def fields_of(x: Any, axis: Axes | None, where: Any = None) -> Any:
    """Compute the fields of x without these axes: what an accumulator takes in."""
    axes = arguments.reduced_axes(x, axis, "Moments.update")
    dtype_of(x, "batch")  # checks
    fields = fields_over(x, axes, where)
    return np.asarray(fields.squeeze(tuple(a + 1 for a in axes)).compute())
