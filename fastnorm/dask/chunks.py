"""Chunks of Dask arrays: operands that lie as they do, functions of each, statistics of many."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.graph_manipulation import bind

from fastnorm import arguments
from fastnorm.fields import FIELDS, Scales, merge, scales_of
from fastnorm.fields import fields_of as fields_of_chunk

# Chunks that share a statistic, at most, that are kept in memory from the first to the second use.
KEPT = 16

Operands: TypeAlias = dict[str, Any]  # arrays that broadcast against x, by their argument's name
Place: TypeAlias = Callable[[Any, str], Any]  # lays a weight or bias along the axes of x
Body: TypeAlias = Callable[..., Any]


def adapts(
    function: Callable[..., Any], ndim: int = 0, shape: str = "(..., D)", *, sized: bool = True
) -> Callable[[Body], Callable[..., Any]]:
    """Make a body the one of `function` for Dask arrays: of its signature, and by name.

    The body gets all arguments but `out` by name, with an x of at least `ndim` dimensions, all of
    them known if it is to be `sized`. Options have been checked on the way here (dispatch.py).
    """
    signature, of = inspect.signature(function), function.__name__

    def decorated(body: Body) -> Callable[..., Any]:
        @wraps(function)
        def of_lazy(*given: Any, **named: Any) -> Any:
            call = signature.bind(*given, **named)
            call.apply_defaults()
            named = call.arguments
            if named.pop("out", None) is not None:
                raise TypeError(
                    "out= cannot be filled by a lazy result; write y = ... and store that, as "
                    "with da.store"
                )
            x = named["x"] if "x" in named else next(iter(named.values()))
            arguments.check_ndim(x, ndim, of, shape)
            if sized and any(math.isnan(n) for n in x.shape):
                raise ValueError(
                    f"x has shape {x.shape} with unknown sizes, expected known ones; write "
                    "x.compute_chunk_sizes() first"
                )
            arguments.check_activation(named.get("activation"))
            return body(**named)

        of_lazy.__doc__ = f"As :func:`fastnorm.{of}`; lazy."
        of_lazy.__module__ = "fastnorm.dask"
        return of_lazy

    return decorated


# --- Operands -------------------------------------------------------------------------------------


def dtype_of(x: Any, name: str = "x") -> np.dtype[Any]:
    """The dtype that an array is read in, that of results; refuse one not of real numbers."""
    return arguments.as_array(np.empty(0, x.dtype), name).dtype


def operand(value: Any, name: str) -> Any:
    """Another array than x: one of Dask's, or of NumPy's; refuse what a mask hides."""
    if not isinstance(value, da.Array):
        return arguments.read(value, name)
    return value.map_blocks(arguments.read, name) if arguments.is_masked(value._meta) else value


def lying_as(value: Any, x: Any) -> Any:
    """An array that broadcasts against x, in chunks that lie as those of x do."""
    chunks = tuple(c if n == m else -1 for n, m, c in zip(value.shape, x.shape, x.chunks))
    if isinstance(value, da.Array):
        return value.rechunk(chunks)
    return da.from_array(value, chunks=chunks)


def parameter(value: Any, name: str, x: Any, place: Place, wide: bool = False) -> Any:
    """A weight or bias with as many axes as x, in the type computed in, or `wide` in float64."""
    value = operand(value, name)
    kind = np.float64 if wide else arguments.computing_type(dtype_of(x))
    return lying_as(place(value.astype(dtype_of(value, name)).astype(kind), name), x)


def parameters(x: Any, place: Place, *, wide: bool = False, **given: Any) -> Operands:
    """Those that are there."""
    return {
        name: parameter(value, name, x, place, wide)
        for name, value in given.items()
        if value is not None
    }


def on_channels(x: Any, axis: int) -> Place:
    """How a channel norm's parameters lie along x."""
    return lambda p, name: np.moveaxis(arguments.along_channels(p, name, x, axis), 1, axis)


def on_axes(x: Any, axes: tuple[int, ...]) -> Place:
    """How layer or RMS norm's parameters lie along x."""
    return lambda p, name: arguments.along_axes(p, name, x, axes)


def mask_chunked_as(where: Any, x: Any) -> Operands:
    """`where`, if it is there, of the shape and in the chunks of x."""
    if where is None:
        return {}
    if isinstance(where, da.Array):
        mask = da.ma.filled(where, False) if arguments.is_masked(where._meta) else where
        arguments.mask_of(np.broadcast_to(np.empty((), mask.dtype), mask.shape), x)  # checks
        return {"where": lying_as(da.broadcast_to(mask, x.shape), x)}
    return {"where": lying_as(arguments.mask_of(where, x), x)}


def chunked_as(value: Any, name: str, x: Any) -> Any:
    """An array of the shape of x, in its chunks."""
    array = operand(value, name)
    dtype_of(array, name)  # checks
    if array.shape != x.shape:
        raise ValueError(
            f"{name} has shape {array.shape}, expected that of x, {x.shape}; write "
            f"np.broadcast_to({name}, x.shape) if it is to be repeated"
        )
    return lying_as(array, x)


# --- Chunk by chunk -------------------------------------------------------------------------------


def _call(x: Any, *operands: Any, names: tuple[str, ...], function: Any, **options: Any) -> Any:
    """`function` of a chunk of x, in this machine's byte order as results are, and its operands."""
    x = x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
    return function(x, **dict(zip(names, operands)), **options)


def each(
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


def part(tuples: Any, i: int, dtype: Any, ones: tuple[int, ...] = ()) -> Any:
    """Of an array whose chunks are tuples, the i-th of each; along `ones` these have length 1."""
    chunks = tuple((1,) * len(c) if a in ones else c for a, c in enumerate(tuples.chunks))
    return tuples.map_blocks(
        itemgetter(i), dtype=dtype, chunks=chunks, meta=np.empty((0,) * tuples.ndim, dtype)
    )


def are_whole(x: Any, axes: tuple[int, ...], group: tuple[int, int] | None = None) -> bool:
    """Whether each chunk holds its groups whole: what shares a statistic."""
    if any(x.numblocks[a] > 1 for a in axes):
        return False
    return group is None or all(c % group[1] == 0 for c in x.chunks[group[0]])


# --- Statistics across chunks ---------------------------------------------------------------------


def _chunk_fields(x: Any, *masks: Any, axes: tuple[int, ...]) -> Any:
    x, where = arguments.unmask(x, *masks or [None])
    array = arguments.as_numbers(x, "x")
    return fields_of_chunk(array, axes, arguments.mask_of(where, array))


def merged(fields: Any, axis: Any = (), keepdims: bool = True) -> Any:
    """Fields merged along these axes, which stay with length 1."""
    for a in axis if isinstance(axis, tuple) else (axis,):
        while fields.shape[a] > 1:
            pairs = fields.shape[a] // 2
            along = [slice(None)] * (a % fields.ndim)
            first, second, rest = (
                fields[(*along, piece)]
                for piece in (
                    slice(0, 2 * pairs, 2),
                    slice(1, 2 * pairs, 2),
                    slice(2 * pairs, None),
                )
            )
            fields = np.concatenate([merge(first, second), rest], axis=a)
    return fields


def fields_over(x: Any, axes: tuple[int, ...], where: Any = None) -> Any:
    """The fields of x over these axes, which are kept as 1: a tree of merges."""
    masks = tuple(mask_chunked_as(where, x).values())
    chunks = tuple((1,) * len(c) if a in axes else c for a, c in enumerate(x.chunks))
    same: dict[str, Any] = {"dtype": np.float64, "meta": np.empty((0,) * (x.ndim + 1))}
    parts = da.map_blocks(
        _chunk_fields,
        x,
        *masks,
        axes=axes,
        new_axis=0,
        chunks=((len(FIELDS),), *chunks),
        name=f"fastnorm-moments-{tokenize(x, masks, axes)}",
        **same,
    )
    if not axes:
        return parts
    places = tuple(a + 1 for a in axes)
    return da.reduction(parts, chunk=merged, aggregate=merged, axis=places, keepdims=True, **same)


def of_fields(function: Callable[..., Any], fields: Any, **options: Any) -> Any:
    """What a function makes of merged fields."""
    meta = np.empty((0,) * (fields.ndim - 1))
    return fields.map_blocks(function, drop_axis=0, dtype=np.float64, meta=meta, **options)


def scales_by(fields: Any, **options: Any) -> Operands:
    """The scales of merged fields, by their names; options as for `scales_of`."""
    return {field: of_fields(_scale, fields, field=field, **options) for field in Scales._fields}


def _scale(fields: Any, *, field: str, **options: Any) -> Any:
    return np.asarray(getattr(scales_of(fields, **options), field), np.float64)


def grouped(array: Any, axis: int, size: int, together: Callable[[Any], Any], chunks: Any) -> Any:
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


def again(read: Any, after: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """What was read already, for the second use: made anew where it is too much to be kept."""
    if math.prod(x.numblocks[a] for a in axes) <= KEPT:
        return read
    return bind(read, after, seed=tokenize(read, after))
