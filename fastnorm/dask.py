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
from operator import itemgetter
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.graph_manipulation import bind

from fastnorm import arguments, backward, elementwise, execution, functional, related
from fastnorm.arguments import Activation, Axes, check_ddof, check_eps, computing_type, is_float
from fastnorm.moments import (
    FIELDS,
    Scales,
    mean_of,
    merge,
    normalised_by,
    scales_of,
    var_of,
)
from fastnorm.moments import fields_of as fields_of_chunk
from fastnorm.moments import standardize as standardize_chunk

# Chunks that share a statistic, at most, that are kept in memory from the first to the second use.
KEPT = 16

Operands = dict[str, Any]  # arrays that broadcast against x, by their argument's name

# --- Operands -------------------------------------------------------------------------------------


def _dtype(x: Any) -> np.dtype[Any]:
    """The dtype of results; refuse what is not made of real numbers."""
    return arguments.as_array(np.empty(0, x.dtype), "x").dtype


def _refuse_out(out: Any) -> None:
    if out is not None:
        raise TypeError(
            "out= cannot be filled by a lazy result; write y = ... and store that, as with da.store"
        )


def _is_known(x: Any) -> None:
    if any(math.isnan(n) for n in x.shape):
        raise ValueError(
            f"x has shape {x.shape} with unknown sizes, expected known ones; write "
            "x.compute_chunk_sizes() first"
        )


def _operand(value: Any, name: str) -> Any:
    """Another array than x: one of Dask's, or of NumPy's; refuse what a mask hides."""
    if not isinstance(value, da.Array):
        return arguments.read(value, name)
    return value.map_blocks(arguments.read, name) if arguments.is_masked(value._meta) else value


def _lazy(value: Any, x: Any) -> Any:
    """An array that broadcasts against x, in chunks that lie as those of x do."""
    chunks = tuple(c if n == m else -1 for n, m, c in zip(value.shape, x.shape, x.chunks))
    if isinstance(value, da.Array):
        return value.rechunk(chunks)
    return da.from_array(value, chunks=chunks)


def _parameter(
    value: Any, name: str, x: Any, place: Callable[[Any, str], Any], wide: bool = False
) -> Any:
    """A weight or bias with as many axes as x; None stays None."""
    if value is None:
        return None
    value = _operand(value, name)
    if not isinstance(value, da.Array):
        value = arguments.as_array(value, name)
    elif not is_float(value.dtype):
        value = value.astype(np.float64)
    kind = np.float64 if wide else computing_type(_dtype(x))
    return _lazy(place(value.astype(kind), name), x)


def _on_channels(x: Any, axis: int) -> Callable[[Any, str], Any]:
    def place(p: Any, name: str) -> Any:
        return np.moveaxis(arguments.along_channels(p, name, x, axis), 1, axis)

    return place


def _on_axes(x: Any, axes: tuple[int, ...]) -> Callable[[Any, str], Any]:
    return lambda p, name: arguments.along_axes(p, name, x, axes)


def _mask_and_residual(x: Any, where: Any, residual: Any) -> Operands:
    """`where` and `residual` of the shape and in the chunks of x."""
    given: Operands = {}
    if where is not None:
        if isinstance(where, da.Array):
            mask = da.ma.filled(where, False) if arguments.is_masked(where._meta) else where
            arguments.mask_of(np.empty(mask.shape, mask.dtype), _shaped(x))  # checks
            mask = da.broadcast_to(mask, x.shape)
        else:
            mask = arguments.mask_of(where, _shaped(x))
        given["where"] = _lazy(mask, x)
    if residual is not None:
        added = _operand(residual, "residual")
        arguments.same_shape(np.broadcast_to(np.empty((), added.dtype), added.shape), "residual", x)
        given["residual"] = _lazy(added, x)
    return given


def _shaped(x: Any) -> Any:
    """Something of the shape of x that holds no memory."""
    return np.broadcast_to(np.empty((), x.dtype), x.shape)


def _given(**operands: Any) -> Operands:
    return {name: value for name, value in operands.items() if value is not None}


# --- Chunk by chunk -------------------------------------------------------------------------------


def _native(x: Any) -> Any:
    """A chunk in this machine's byte order: that of results, whatever that of x."""
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _call(x: Any, *operands: Any, names: tuple[str, ...], function: Any, **options: Any) -> Any:
    """`function` of one chunk of x and those of its operands."""
    return function(_native(x), **dict(zip(names, operands)), **options)


def _each(
    function: Callable[..., Any], x: Any, operands: Operands, dtype: Any, **options: Any
) -> Any:
    """`function` of every chunk of x and of its operands; results are shaped as the chunks."""
    return da.map_blocks(
        _call,
        x,
        *operands.values(),
        names=tuple(operands),
        function=function,
        name=f"fastnorm-{tokenize(function, x, operands, options)}",
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
        **options,
    )


def _part(tuples: Any, i: int, dtype: Any, ones: tuple[int, ...] = ()) -> Any:
    """Of an array whose chunks are tuples, the i-th of each; along `ones` these have length 1."""
    chunks = tuple((1,) * len(c) if a in ones else c for a, c in enumerate(tuples.chunks))
    return tuples.map_blocks(
        itemgetter(i), dtype=dtype, chunks=chunks, meta=np.empty((0,) * tuples.ndim, dtype)
    )


# --- Statistics across chunks ---------------------------------------------------------------------


def _chunk_fields(x: Any, *masks: Any, axes: tuple[int, ...]) -> Any:
    x, where = arguments.unmask(x, *masks or [None])
    array = arguments.as_numbers(x, "x")
    return fields_of_chunk(array, axes, arguments.mask_of(where, array))


def _merged(fields: Any, axis: Any = (), keepdims: bool = True) -> Any:
    """Fields merged along these axes, which stay with length 1."""
    for a in axis if isinstance(axis, tuple) else (axis,):
        while fields.shape[a] > 1:
            pairs = fields.shape[a] // 2
            index = [slice(None)] * fields.ndim
            first, second, rest = list(index), list(index), list(index)
            first[a] = slice(0, 2 * pairs, 2)
            second[a] = slice(1, 2 * pairs, 2)
            rest[a] = slice(2 * pairs, None)
            merged = merge(fields[tuple(first)], fields[tuple(second)])
            fields = np.concatenate([merged, fields[tuple(rest)]], axis=a)
    return fields


def _fields(x: Any, axes: tuple[int, ...], where: Any = None) -> Any:
    """The fields of x over these axes, which are kept as 1: a tree of merges."""
    masks = () if where is None else (where,)
    chunks = tuple((1,) * len(c) if a in axes else c for a, c in enumerate(x.chunks))
    parts = da.map_blocks(
        _chunk_fields,
        x,
        *masks,
        axes=axes,
        new_axis=0,
        chunks=((len(FIELDS),), *chunks),
        name=f"fastnorm-moments-{tokenize(x, masks, axes)}",
        dtype=np.float64,
        meta=np.empty((0,) * (x.ndim + 1)),
    )
    if not axes:
        return parts
    return da.reduction(
        parts,
        chunk=_merged,
        aggregate=_merged,
        axis=tuple(a + 1 for a in axes),
        keepdims=True,
        dtype=np.float64,
        meta=np.empty((0,) * (x.ndim + 1)),
    )


def _of_fields(function: Callable[..., Any], fields: Any, **options: Any) -> Any:
    meta = np.empty((0,) * (fields.ndim - 1))
    return fields.map_blocks(function, drop_axis=0, dtype=np.float64, meta=meta, **options)


def _grouped(array: Any, axis: int, size: int, together: Callable[[Any], Any], chunks: Any) -> Any:
    """What channels have, brought together for each group of `size`, and given to each of them.

    `together` takes and returns an array whose groups' members lie along the last axis.
    """

    def block(a: Any) -> Any:
        moved = np.moveaxis(a, axis, -1)
        groups = moved.reshape(*moved.shape[:-1], -1, size)
        same = np.broadcast_to(together(groups), groups.shape)
        return np.moveaxis(same.reshape(moved.shape), -1, axis)

    whole = array.rechunk({axis: -1})
    return whole.map_blocks(block, dtype=array.dtype, meta=whole._meta).rechunk({axis: chunks})


def _again(x: Any, fields: Any, axes: tuple[int, ...]) -> Any:
    """x for the second use: made anew after the first, where it is too much to be kept."""
    if math.prod(x.numblocks[a] for a in axes) <= KEPT:
        return x
    return bind(x, fields, seed=tokenize(x, fields))


def _scales(fields: Any, eps: float, ddof: float = 0, **options: Any) -> Operands:
    """What `_by_scales` takes of merged moments; options as for `scales_of`."""

    def part(name: str) -> Any:
        scale = partial(_scale, name=name, eps=eps, ddof=ddof, **options)
        return _of_fields(scale, fields)

    return {name: part(name) for name in Scales._fields}


def _scale(fields: Any, *, name: str, eps: float, ddof: float, **options: Any) -> Any:
    scales = scales_of(fields, eps, ddof, **options)
    return np.asarray(getattr(scales, name), np.float64)


def _by_scales(
    x: Any,
    mean: Any,
    rest: Any,
    rstd: Any,
    exponent: Any,
    weight: Any = None,
    bias: Any = None,
    **options: Any,
) -> Any:
    """One chunk normalised by the scales of all."""
    x, _ = arguments.unmask(x, None)
    array = arguments.as_array(x, "x")
    axes = [a for a in range(array.ndim) if mean.shape[a] == 1]
    scales = Scales(mean, rest, rstd, exponent.astype(np.int64))
    return normalised_by(scales, x, array, axes, weight, bias, **options)


def _rstd_of_x(fields: Any, eps: float, centred: bool) -> Any:
    return scales_of(fields, eps, centred=centred).rstd_of_x()


def _step(
    x: Any,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    residual: Any = None,
    activation: Activation = None,
    eps: float = 0.0,
) -> Any:
    """One chunk normalised by statistics that were given."""
    x, _ = arguments.unmask(x, None)
    array = arguments.as_array(x, "x")
    axes = [a for a in range(array.ndim) if mean.shape[a] == 1]
    given = np.array(mean, np.float64, order="C"), np.array(var, np.float64, order="C")
    options: dict[str, Any] = {"residual": residual, "activation": activation}
    norm = execution.Norm[Any](x, array, axes, weight, bias, given=given, eps=eps, **options)
    return norm.answer()


def _whole(x: Any, axes: tuple[int, ...], group: tuple[int, int] | None = None) -> bool:
    """Whether each chunk holds its groups whole."""
    if any(x.numblocks[a] > 1 for a in axes):
        return False
    return group is None or all(c % group[1] == 0 for c in x.chunks[group[0]])


def _normalised(
    x: Any,
    axes: tuple[int, ...],
    own: Callable[..., Any],
    affine: Operands,
    where: Any = None,
    residual: Any = None,
    activation: Activation = None,
    eps: float = 0.0,
    *,
    return_stats: bool,
    centred: bool = True,
    group: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Any norm by its own statistics: (y, mean, rstd), the last two (if asked for) as x has axes.

    `axes` share a statistic, and so do the channels of a `group` (their axis, how many). `own` is
    the function that does the same for a chunk that holds its groups whole.
    """
    _is_known(x)
    arguments.check_activation(activation)
    dtype, others = _dtype(x), _mask_and_residual(x, where, residual)
    if _whole(x, axes, group):
        more = {"activation": activation, "eps": eps, "return_stats": return_stats, **options}
        found = _each(own, x, affine | others, dtype, **more)
        if not return_stats:
            return found, None, None
        mean = _part(found, 1, np.float64, axes) if centred else None
        rstd = _part(found, 2 if centred else 1, np.float64, axes)
        return _part(found, 0, dtype), mean, rstd
    fields = _fields(x, axes, others.pop("where", None))
    if group is not None:
        channel, size = group
        together = partial(_merged, axis=-1)
        fields = _grouped(fields, channel + 1, size, together, x.chunks[channel])
    operands = _scales(fields, eps, centred=centred) | affine | others
    y = _each(_by_scales, _again(x, fields, axes), operands, dtype, activation=activation)
    rstd = _of_fields(_rstd_of_x, fields, eps=eps, centred=centred)
    return y, _of_fields(mean_of, fields) if centred else None, rstd


# --- The norms ------------------------------------------------------------------------------------


def _channels_axis(x: Any, channel_axis: int, of: str, *, samples: bool = True) -> int:
    arguments.check_ndim(x, 2, of, "(N, C, ...)")
    _is_known(x)
    return arguments.channel_axis_of(x, channel_axis, of, samples=samples)


def _check_running(mean: Any, var: Any, channels: int, *, updated: bool) -> None:
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is None:
            continue
        if updated and not isinstance(value, da.Array):
            raise TypeError(
                f"{name} is a {type(value).__name__}, and x a Dask array: a lazy call cannot "
                f"update it; write da.from_array({name}), which is updated lazily, or "
                "return_stats=True and update it from the computed statistics"
            )
        like = np.empty(value.shape, value.dtype) if isinstance(value, da.Array) else value
        first, second = (like, None) if name == "running_mean" else (None, like)
        arguments.check_running(first, second, channels, written=False)


def _update(running_mean: Any, running_var: Any, fields: Any, axis: int, momentum: float) -> None:
    """Dask arrays updated in place: from now on they stand for the moved statistics."""
    for running, function in ((running_mean, mean_of), (running_var, partial(var_of, ddof=1))):
        if running is not None:
            channel = fields.ndim
            running[...] = da.blockwise(
                _moved,
                (channel,),
                running.rechunk(-1),
                (channel,),
                fields.rechunk(-1),
                tuple(channel if a == axis + 1 else a for a in range(fields.ndim)),
                function=function,
                axis=axis,
                momentum=momentum,
                concatenate=True,
                dtype=running.dtype,
                meta=np.empty(0, running.dtype),
            )


def _moved(running: Any, fields: Any, *, function: Any, axis: int, momentum: float) -> Any:
    """The running statistics moved towards the average of what the samples have."""
    others = tuple(a for a in range(fields.ndim - 1) if a != axis)
    return execution.moved_running(running, function(fields), fields[0] > 0, momentum, others)


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    where: Any = None,
    residual: Any = None,
    activation: Activation = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """As :func:`fastnorm.batch_norm`; running statistics to be updated must be Dask arrays."""
    _refuse_out(out)
    axis = _channels_axis(x, channel_axis, "batch_norm", samples=False)
    channels, eps = x.shape[axis], check_eps(eps)
    _check_running(running_mean, running_var, channels, updated=training)
    place = _on_channels(x, axis)
    w, b = _parameter(weight, "weight", x, place), _parameter(bias, "bias", x, place)
    affine = _given(weight=w, bias=b)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm got training=False without running_mean and running_var, which it "
                "then normalises with; give both, or write training=True"
            )
        _is_known(x)
        arguments.check_activation(activation)
        mean = _parameter(running_mean, "running_mean", x, place, wide=True)
        var = _parameter(running_var, "running_var", x, place, wide=True)
        operands = {"mean": mean, "var": var} | affine | _mask_and_residual(x, None, residual)
        y = _each(_step, x, operands, _dtype(x), activation=activation, eps=eps)
        rstd = var.map_blocks(execution.rstd_of, eps, dtype=np.float64)
    else:
        axes = tuple(a for a in range(x.ndim) if a != axis)
        if where is None:
            count = np.array(math.prod(x.shape[a] for a in axes))
            instead = "use a larger batch, or training=False with running statistics"
            arguments.require_two(count, "batch_norm(training=True)", instead)
        y, mean, rstd = _normalised(
            x,
            axes,
            _batch_chunk,
            affine,
            where,
            residual,
            activation,
            eps,
            return_stats=return_stats,
            channel_axis=axis,
        )
        if running_mean is not None or running_var is not None:
            fields = _fields(x, axes, _mask_and_residual(x, where, None).get("where"))
            _update(running_mean, running_var, fields, axis, momentum)
    return (y, mean.reshape(channels), rstd.reshape(channels)) if return_stats else y


def _batch_chunk(x: Any, *, channel_axis: int, **options: Any) -> Any:
    found = functional.batch_norm(x, training=True, channel_axis=channel_axis, **options)
    if not options["return_stats"]:
        return found
    shape = [n if a == channel_axis else 1 for a, n in enumerate(x.shape)]
    return found[0], *(s.reshape(shape) for s in found[1:])


def instance_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    where: Any = None,
    residual: Any = None,
    activation: Activation = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """As :func:`fastnorm.instance_norm`; running statistics to be updated must be Dask arrays."""
    _refuse_out(out)
    axis = _channels_axis(x, channel_axis, "instance_norm")
    both = x.shape[0], x.shape[axis]
    shared: dict[str, Any] = {"residual": residual, "activation": activation}
    if not use_input_stats:
        y, mean, rstd = batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            eps=eps,
            channel_axis=axis,
            return_stats=True,
            **shared,
        )
        same = (da.broadcast_to(s, both) for s in (mean, rstd))
        return (y, *same) if return_stats else y
    _check_running(running_mean, running_var, both[1], updated=True)
    place = _on_channels(x, axis)
    affine = _given(
        weight=_parameter(weight, "weight", x, place), bias=_parameter(bias, "bias", x, place)
    )
    axes = tuple(a for a in range(1, x.ndim) if a != axis)
    if x.size:
        instead = "give x more positions, or write use_input_stats=False with running statistics"
        count = np.array(math.prod(x.shape[a] for a in axes))
        arguments.require_two(count, "instance_norm", instead)
    y, mean, rstd = _normalised(
        x,
        axes,
        _instance_chunk,
        affine,
        where,
        eps=check_eps(eps),
        return_stats=return_stats,
        channel_axis=axis,
        **shared,
    )
    if running_mean is not None or running_var is not None:
        fields = _fields(x, axes, _mask_and_residual(x, where, None).get("where"))
        _update(running_mean, running_var, fields, axis, momentum)
    return (y, mean.reshape(both), rstd.reshape(both)) if return_stats else y


def _kept(found: Any, x: Any, channel_axis: int, return_stats: bool, repeat: int = 1) -> Any:
    """Statistics (n, c) of a chunk along the axes of x."""
    if not return_stats:
        return found
    shape = [n if a in (0, channel_axis) else 1 for a, n in enumerate(x.shape)]
    return found[0], *(s.repeat(repeat, axis=1).reshape(shape) for s in found[1:])


def _instance_chunk(x: Any, *, channel_axis: int, return_stats: bool, **options: Any) -> Any:
    options |= {"channel_axis": channel_axis, "return_stats": return_stats}
    return _kept(functional.instance_norm(x, **options), x, channel_axis, return_stats)


def _group_chunk(
    x: Any, *, channel_axis: int, size: int, return_stats: bool, **options: Any
) -> Any:
    options |= {"channel_axis": channel_axis, "return_stats": return_stats}
    found = functional.group_norm(x, x.shape[channel_axis] // size, **options)
    return _kept(found, x, channel_axis, return_stats, size)


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    where: Any = None,
    residual: Any = None,
    activation: Activation = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """As :func:`fastnorm.group_norm`."""
    _refuse_out(out)
    axis = _channels_axis(x, channel_axis, "group_norm")
    groups = arguments.groups_of(num_groups, x.shape[axis])
    size = x.shape[axis] // groups
    place = _on_channels(x, axis)
    affine = _given(
        weight=_parameter(weight, "weight", x, place), bias=_parameter(bias, "bias", x, place)
    )
    axes = tuple(a for a in range(1, x.ndim) if a != axis)
    arguments.require_two(np.array(x.size // groups), "group_norm", "use fewer groups", "group")
    if x.size == x.shape[0] * groups:
        x = x.rechunk({0: -1})  # one value per group is refused of a single sample only
    y, mean, rstd = _normalised(
        x,
        axes,
        _group_chunk,
        affine,
        where,
        residual,
        activation,
        check_eps(eps),
        return_stats=return_stats,
        group=(axis, size),
        channel_axis=axis,
        size=size,
    )
    if not return_stats:
        return y
    both = x.shape[0], x.shape[axis]
    return y, mean.reshape(both)[:, ::size], rstd.reshape(both)[:, ::size]


def layer_norm(
    x: Any,
    normalized_shape: Axes | None = None,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: Axes | None = None,
    where: Any = None,
    residual: Any = None,
    activation: Activation = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """As :func:`fastnorm.layer_norm`."""
    _refuse_out(out)
    arguments.check_ndim(x, 1, "layer_norm", "(..., D)")
    _is_known(x)
    axes = arguments.layer_axes(x, normalized_shape, axis, "layer_norm")
    place = _on_axes(x, axes)
    affine = _given(
        weight=_parameter(weight, "weight", x, place), bias=_parameter(bias, "bias", x, place)
    )
    y, mean, rstd = _normalised(
        x,
        axes,
        functional.layer_norm,
        affine,
        where,
        residual,
        activation,
        check_eps(eps),
        return_stats=return_stats,
        axis=tuple(sorted(axes)),
    )
    return (y, mean, rstd) if return_stats else y


def rms_norm(
    x: Any,
    normalized_shape: Axes | None = None,
    weight: Any = None,
    eps: float | None = None,
    *,
    axis: Axes | None = None,
    weight_offset: float = 0.0,
    where: Any = None,
    residual: Any = None,
    activation: Activation = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """As :func:`fastnorm.rms_norm`."""
    _refuse_out(out)
    arguments.check_ndim(x, 1, "rms_norm", "(..., D)")
    _is_known(x)
    axes = arguments.layer_axes(x, normalized_shape, axis, "rms_norm")
    if weight is not None and weight_offset:
        weight = _operand(weight, "weight").astype("f8") + weight_offset
    eps = arguments.machine_epsilon(_dtype(x)) if eps is None else check_eps(eps)
    y, _, rstd = _normalised(
        x,
        axes,
        functional.rms_norm,
        _given(weight=_parameter(weight, "weight", x, _on_axes(x, axes))),
        where,
        residual,
        activation,
        eps,
        return_stats=return_stats,
        centred=False,
        axis=tuple(sorted(axes)),
    )
    return (y, rstd) if return_stats else y


def _sum(x: Any, addend: Any) -> Any:
    kind = computing_type(x.dtype)
    x, seen = arguments.unmask(x)
    with np.errstate(all="ignore"):
        total = (x.astype(kind) + addend.astype(kind)).astype(x.dtype)
    # what is hidden is added, too, and stays hidden
    return total if seen is None else np.ma.array(total, mask=~seen)


def _without_mask(x: Any) -> Any:
    return arguments.unmask(x)[0]


def _total(x: Any, residual: Any) -> Any:
    _is_known(x)
    x = x.astype(_dtype(x))
    added = _mask_and_residual(x, None, residual)["residual"]
    return _each(_sum, x, {"addend": added}, x.dtype)


def add_layer_norm(
    x: Any,
    residual: Any,
    normalized_shape: Axes,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> tuple[Any, Any]:
    """As :func:`fastnorm.add_layer_norm`."""
    total = _total(x, residual)
    y = layer_norm(total, normalized_shape, weight, bias, eps)
    return y, _each(_without_mask, total, {}, total.dtype)


def add_rms_norm(
    x: Any, residual: Any, normalized_shape: Axes, weight: Any = None, eps: float | None = None
) -> tuple[Any, Any]:
    """As :func:`fastnorm.add_rms_norm`."""
    total = _total(x, residual)
    y = rms_norm(total, normalized_shape, weight, eps)
    return y, _each(_without_mask, total, {}, total.dtype)


# --- Their relatives ------------------------------------------------------------------------------


def _scaled_to_length(
    x: Any, axes: tuple[int, ...], eps: float, weight: Any, own: Callable[[], Any]
) -> Any:
    """x / max(length, eps) * weight."""
    if _whole(x, axes):
        return own()
    fields = _fields(x, axes)
    operands = _scales(fields, eps, centred=False, length=True) | _given(weight=weight)
    return _each(_by_scales, _again(x, fields, axes), operands, _dtype(x))


def l2_normalize(x: Any, axis: Axes | None = -1, *, eps: float = 1e-12, out: Any = None) -> Any:
    """As :func:`fastnorm.l2_normalize`."""
    _refuse_out(out)
    _is_known(x)
    arguments.check_ndim(x, 1, "l2_normalize", "(..., D)")
    axes = arguments.layer_axes(x, None, range(x.ndim) if axis is None else axis, "l2_normalize")
    eps = check_eps(eps)
    return _scaled_to_length(
        x,
        axes,
        eps,
        None,
        lambda: _each(related.l2_normalize, x, {}, _dtype(x), axis=axes, eps=eps),
    )


def weight_norm(v: Any, g: Any, *, axis: Axes | None = 0) -> Any:
    """As :func:`fastnorm.weight_norm`."""
    _is_known(v)
    arguments.check_ndim(v, 1, "weight_norm", "(C, ...)")
    kept = () if axis is None else arguments.layer_axes(v, None, axis, "weight_norm")
    keepdims = tuple(n if a in kept else 1 for a, n in enumerate(v.shape))
    lengths = _operand(g, "g") if isinstance(g, da.Array) else arguments.as_array(g, "g")
    if lengths.shape == tuple(v.shape[a] for a in kept) and len(kept) <= 1:
        lengths = lengths.reshape(keepdims)
    if lengths.shape != keepdims:
        raise ValueError(
            f"g has shape {lengths.shape} for v of shape {v.shape}, expected {keepdims}: one "
            f"length for each slice along axis {axis}"
        )
    scale = _lazy(lengths.astype(computing_type(_dtype(v))), v)
    axes = tuple(a for a in range(v.ndim) if a not in kept)
    return _scaled_to_length(
        v,
        axes,
        0.0,
        scale,
        lambda: _each(related.weight_norm, v, {"g": scale}, _dtype(v), axis=kept or None),
    )


def weight_standardize(w: Any, *, eps: float = 1e-5) -> Any:
    """As :func:`fastnorm.weight_standardize`."""
    arguments.check_ndim(w, 2, "weight_standardize", "(C_out, ...)")
    return layer_norm(w, axis=tuple(range(1, w.ndim)), eps=eps)


def local_response_norm(
    x: Any,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    channel_axis: int = 1,
) -> Any:
    """As :func:`fastnorm.local_response_norm`."""
    axis = _channels_axis(x, channel_axis, "local_response_norm")
    options: dict[str, Any] = {"size": size, "alpha": alpha, "beta": beta, "k": k}
    options["channel_axis"] = axis
    related.local_response_norm(np.empty((0,) * x.ndim, x.dtype), **options)  # checks
    if x.numblocks[axis] == 1:
        return _each(related.local_response_norm, x, {}, _dtype(x), **options)
    return x.map_overlap(
        _call,
        names=(),
        function=related.local_response_norm,
        depth={axis: tuple(min(n, x.shape[axis] - 1) for n in (size // 2, (size - 1) // 2))},
        boundary="none",
        dtype=_dtype(x),
        meta=np.empty((0,) * x.ndim, _dtype(x)),
        **options,
    )


def _scaled(x: Any, factor: Any, bias: Any) -> Any:
    array = arguments.as_array(arguments.unmask(x)[0], "x")
    with np.errstate(all="ignore"):
        factor = factor.astype(computing_type(array.dtype))
    axes = [a for a, n in enumerate(factor.shape) if n == 1]
    return execution.scaled(x, array, 1.0, factor, bias, axes=axes).answer()


def global_response_norm(
    x: Any, weight: Any, bias: Any, *, eps: float = 1e-6, channel_axis: int = 1
) -> Any:
    """As :func:`fastnorm.global_response_norm`."""
    _is_known(x)
    axis = _channels_axis(x, channel_axis, "global_response_norm")
    place, eps = _on_channels(x, axis), check_eps(eps)
    w = _parameter(weight, "weight", x, place, wide=True)
    b = _parameter(bias, "bias", x, place)
    fields = _fields(x, tuple(a for a in range(1, x.ndim) if a != axis))

    def relative(f: Any) -> Any:
        with np.errstate(all="ignore"):
            length = np.sqrt(f[3] + f[4] + f[0] * (f[1] + f[2]) ** 2)
        return related.relative_lengths(length, f[5].astype(np.int64), axis, eps)

    together = _of_fields(relative, fields.rechunk({axis + 1: -1}))
    factor = 1.0 + w * together.rechunk({axis: x.chunks[axis]})
    operands = {"factor": _lazy(factor, x), "bias": b}
    return _each(_scaled, x, operands, _dtype(x))


def _elementwise(
    x: Any, *, function: str, weight: Any = None, bias: Any = None, **numbers: Any
) -> Any:
    """A public function that takes each element by itself."""
    arguments.check_ndim(x, 1, function, "(..., D)")
    expected = f"expected ({x.shape[-1]},) or a shape that broadcasts against x"

    def place(p: Any, name: str) -> Any:
        return arguments.spread(p, x.shape, name, expected)

    affine = _given(
        weight=_parameter(weight, "weight", x, place), bias=_parameter(bias, "bias", x, place)
    )
    return _each(getattr(elementwise, function), x, affine, _dtype(x), **numbers)


def __getattr__(name: str) -> Any:
    if name in elementwise.__all__ and not name.endswith("_backward"):
        return partial(_elementwise, function=name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


# --- Gradients ------------------------------------------------------------------------------------


def _gradients(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    place: Callable[[Any, str], Any],
    own: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    group: tuple[int, int] | None = None,
    offset: float = 0.0,
    training: bool = True,
    where: Any = None,
) -> tuple[Any, Any, Any]:
    """(dx, dweight, dbias); the sums over chunks are trees.

    By the kernels where groups lie whole in their chunks, otherwise by Dask's arrays of float64.
    `mean` (None: 0) and `rstd` have as many axes as x; `axes` are the reduced ones.
    """
    _is_known(x)
    dtype = _dtype(x)
    shape, kind = own, dtype
    if weight is not None:
        shape, kind = np.shape(weight), getattr(weight, "dtype", np.dtype(np.float64))
        kind = kind if is_float(kind) else np.dtype(np.float64)
    w = _parameter(np.ones(own) if weight is None else weight, "weight", x, place, wide=True)
    w = w + offset if weight is not None and offset else w
    slope = _lazy(_operand(dy, "dy"), x)
    if slope.shape != x.shape:
        raise ValueError(f"dy has shape {slope.shape}, expected that of x, {x.shape}")
    shared = tuple(a for a, n in enumerate(w.shape) if n == 1 != x.shape[a])

    def to_weight(a: Any) -> Any:
        total = a.sum(axis=shared, keepdims=True).reshape(w.shape)
        return _unplaced(total, shape, x, place, kind)

    others = _mask_and_residual(x, where, None)
    if training and axes and _whole(x, axes, group):
        operands = _given(slope=slope, rstd=rstd, weight=w, mean=mean) | others
        found = _each(_chunk_gradients, x, operands, dtype, axes=axes, group=group)
        sums = [to_weight(_part(found, i, np.float64, shared)) for i in (1, 2)]
        return _part(found, 0, dtype), sums[0], sums[1]

    def terms(slope: Any, x: Any) -> tuple[Any, Any, Any]:
        """dy, the standardised x and dy * w."""
        slope, wide = slope.astype(np.float64), _each(_wide, x, {}, np.float64)
        return slope, (wide if mean is None else wide - mean) * rstd, slope * w

    again = slope, x
    slope, standard, g = terms(slope, x)
    averages = []
    if training:

        def total(a: Any) -> Any:
            summed = a.sum(axis=axes, keepdims=True) if axes else a
            if group is None:
                return summed
            channel, size = group
            together = partial(np.sum, axis=-1, keepdims=True)
            return _grouped(summed, channel, size, together, x.chunks[channel])

        count = da.maximum(total(_each(_chosen, x, others, bool)), 1)  # of none it is not asked
        averages = [total(g * standard) / count]
        averages += [] if mean is None else [total(g) / count]
        if math.prod(x.numblocks[a] for a in axes) > KEPT:
            again = bind(again, averages, seed=tokenize(again, averages))
    _, standard_again, dx = terms(*again)
    if training:
        through = standard_again * averages[0]
        through = through if mean is None else through + averages[1]
        dx = da.where(_each(_chosen, again[1], others, bool), dx - through, dx)
    return (dx * rstd).astype(dtype), to_weight(slope * standard), to_weight(slope)


def _wide(x: Any) -> Any:
    return _without_mask(x).astype(np.float64)


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
) -> tuple[Any, Any, Any]:
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
    if mean is not None:
        return backward.layer_norm_backward(
            slope, x, mean, rstd, None, weight, axis=axes, where=where
        )
    dx, dweight = backward.rms_norm_backward(slope, x, rstd, None, weight, axis=axes, where=where)
    return dx, dweight, np.zeros_like(dweight)


def _unplaced(
    gradient: Any, shape: tuple[int, ...], x: Any, place: Callable[[Any, str], Any], kind: Any
) -> Any:
    """A gradient along the axes of x, as the weight of that shape lies."""
    order = place(np.arange(math.prod(shape)).reshape(shape), "weight").ravel()
    flat = gradient.reshape(-1).rechunk(-1)

    def unsort(values: Any) -> Any:
        out = np.empty_like(values)
        out[order] = values
        return out.reshape(shape).astype(kind)

    chunks = tuple((n,) for n in shape)
    if not shape:
        return flat.map_blocks(unsort, dtype=kind, drop_axis=0)
    new = list(range(1, len(shape)))
    return flat.map_blocks(unsort, dtype=kind, new_axis=new or None, chunks=chunks)


def _statistic(value: Any, name: str, x: Any, shape: tuple[int, ...], place: Any, of: str) -> Any:
    """A mean or rstd along the axes of x."""
    if np.shape(value) != shape:
        raise ValueError(
            f"{name} has shape {np.shape(value)}, expected {shape}; give {of} what the forward "
            "function returned with return_stats=True"
        )
    own = _operand(value, name)
    lazy = own if isinstance(own, da.Array) else da.from_array(own)
    return _lazy(place(lazy.astype(np.float64)), x)


def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    training: bool = True,
    channel_axis: int = 1,
    where: Any = None,
) -> Any:
    """As :func:`fastnorm.batch_norm_backward`."""
    of = "batch_norm_backward"
    axis = _channels_axis(x, channel_axis, of, samples=False)
    channels = x.shape[axis]
    kept = [n if a == axis else 1 for a, n in enumerate(x.shape)]
    m, r = (
        _statistic(s, name, x, (channels,), lambda s: s.reshape(kept), of)
        for s, name in ((mean, "mean"), (rstd, "rstd"))
    )
    axes = tuple(a for a in range(x.ndim) if a != axis)
    place = _on_channels(x, axis)
    options: dict[str, Any] = {"training": training, "where": where}
    return _gradients(dy, x, m, r, weight, place, (channels,), axes, **options)


def group_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    num_groups: int,
    weight: Any = None,
    *,
    channel_axis: int = 1,
    where: Any = None,
    of: str = "group_norm_backward",
) -> Any:
    """As :func:`fastnorm.group_norm_backward`."""
    axis = _channels_axis(x, channel_axis, of)
    channels = x.shape[axis]
    groups = arguments.groups_of(num_groups, channels)
    size = channels // groups
    kept = [n if a in (0, axis) else 1 for a, n in enumerate(x.shape)]
    m, r = (
        _statistic(
            s, name, x, (x.shape[0], groups), lambda s: da.repeat(s, size, axis=1).reshape(kept), of
        )
        for s, name in ((mean, "mean"), (rstd, "rstd"))
    )
    axes = tuple(a for a in range(1, x.ndim) if a != axis)
    place = _on_channels(x, axis)
    options: dict[str, Any] = {"group": (axis, size), "where": where}
    return _gradients(dy, x, m, r, weight, place, (channels,), axes, **options)


def instance_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    channel_axis: int = 1,
    where: Any = None,
) -> Any:
    """As :func:`fastnorm.instance_norm_backward`."""
    of = "instance_norm_backward"
    channels = x.shape[_channels_axis(x, channel_axis, of)]
    return group_norm_backward(
        dy, x, mean, rstd, channels, weight, channel_axis=channel_axis, where=where, of=of
    )


def _rows(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    normalized_shape: Axes | None,
    weight: Any,
    axis: Axes | None,
    *,
    of: str,
    where: Any,
    offset: float = 0.0,
) -> Any:
    arguments.check_ndim(x, 1, of, "(..., D)")
    _is_known(x)
    axes = arguments.layer_axes(x, normalized_shape, axis, of)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    m = None if mean is None else _statistic(mean, "mean", x, shape, lambda s: s, of)
    r = _statistic(rstd, "rstd", x, shape, lambda s: s, of)
    own = tuple(x.shape[a] for a in axes)
    place = _on_axes(x, axes)
    options: dict[str, Any] = {"offset": offset, "where": where}
    return _gradients(dy, x, m, r, weight, place, own, tuple(sorted(axes)), **options)


def layer_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    normalized_shape: Axes | None = None,
    weight: Any = None,
    *,
    axis: Axes | None = None,
    where: Any = None,
) -> Any:
    """As :func:`fastnorm.layer_norm_backward`."""
    options = {"of": "layer_norm_backward", "where": where}
    return _rows(dy, x, mean, rstd, normalized_shape, weight, axis, **options)


def rms_norm_backward(
    dy: Any,
    x: Any,
    rstd: Any,
    normalized_shape: Axes | None = None,
    weight: Any = None,
    *,
    axis: Axes | None = None,
    weight_offset: float = 0.0,
    where: Any = None,
) -> Any:
    """As :func:`fastnorm.rms_norm_backward`."""
    of = "rms_norm_backward"
    options = {"of": of, "where": where, "offset": weight_offset}
    return _rows(dy, x, None, rstd, normalized_shape, weight, axis, **options)[:2]


# --- Statistics -----------------------------------------------------------------------------------


def moments(
    x: Any,
    axis: Axes | None = None,
    *,
    where: Any = None,
    ddof: float = 0,
    keepdims: bool = False,
) -> tuple[Any, Any]:
    """As :func:`fastnorm.moments`; the results are Dask arrays, too."""
    axes = arguments.reduced_axes(x, axis, "moments")
    ddof = check_ddof(ddof)
    arguments.as_numbers(np.empty(0, x.dtype), "x")
    fields = _fields(x, axes, _mask_and_residual(x, where, None).get("where"))
    mean = _of_fields(mean_of, fields)
    var = _of_fields(var_of, fields, ddof=ddof)
    return (mean, var) if keepdims else (mean.squeeze(axes), var.squeeze(axes))


def standardize(
    x: Any,
    axis: Axes | None = None,
    *,
    where: Any = None,
    ddof: float = 0,
    eps: float = 0.0,
    out: Any = None,
) -> Any:
    """As :func:`fastnorm.standardize`."""
    _refuse_out(out)
    _is_known(x)
    axes = arguments.reduced_axes(x, axis, "standardize")
    ddof, eps = check_ddof(ddof), check_eps(eps)
    dtype, others = _dtype(x), _mask_and_residual(x, where, None)
    if _whole(x, axes):
        options = {"axis": axes, "ddof": ddof, "eps": eps}
        return _each(standardize_chunk, x, others, dtype, **options)
    fields = _fields(x, axes, others.get("where"))
    return _each(_by_scales, _again(x, fields, axes), _scales(fields, eps, ddof), dtype)


def fields_of(x: Any, axis: Axes | None, where: Any = None) -> Any:
    """Compute the fields of x without these axes: what an accumulator takes in."""
    axes = arguments.reduced_axes(x, axis, "Moments.update")
    arguments.as_numbers(np.empty(0, x.dtype), "batch")
    fields = _fields(x, axes, _mask_and_residual(x, where, None).get("where"))
    return np.asarray(fields.squeeze(tuple(a + 1 for a in axes)).compute())
