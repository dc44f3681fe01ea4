"""From xhat to y: affine step, residual and activation of one chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from fastnorm._numba.gpu.blocking import CHUNK
from fastnorm._numba.gpu.elements import chunk_loader, chunk_storer, computing, loader, size_of
from fastnorm._numba.gpu.package import arithmetic, cuda, device, scalar_function

Function = Callable[..., Any]

fma = arithmetic.fma


@lru_cache(maxsize=256)
def activation_of(activation: Any, real: Any) -> Any:
    """A function real -> real: an activation by its name, or one of the user's own."""
    if activation is None:
        return device(lambda x: x)
    if callable(activation):
        function = scalar_function(activation)
    else:
        function = getattr(arithmetic, f"{activation}_{32 if real is np.float32 else 64}")
    return device(lambda x: real(function(x)))


@cache
def parameter_loader(kind: str, real: Any, width: int) -> Function:
    """A function (place, n, aligned, into) that reads n numbers, or one for all of a chunk."""
    load_one, load_chunk = loader(kind, real), chunk_loader(kind, real, width)

    @device
    def load(place: Any, n: Any, aligned: Any, into: Any) -> None:
        if place.stride != 0:
            load_chunk(place.address, place.index, n, aligned, into, 0)
        else:
            value = load_one(place.address, place.index)
            for k in range(width):
                into[k] = value

    return load


@cache
def finalizer(kind: str, other: str, activation: Any, first: bool) -> Function:
    """A function that takes a chunk of xhat to y and writes it; `w` is room for another chunk.

    Affine step, residual, activation; `first` applies the activation before these.
    """
    real = computing(kind)
    width = CHUNK // size_of(kind)
    act = activation_of(activation, real)
    load_other = chunk_loader(other, real, width)
    parameters = parameter_loader(np.dtype(real).name, real, width)
    store_chunk = chunk_storer(kind, width)
    before, after = first, not first

    @device
    def finalize(
        v: Any, w: Any, y: Any, other: Any, weight: Any, bias: Any, n: Any, aligned: Any
    ) -> None:  # fmt: skip
        if before:
            for k in range(width):
                v[k] = act(v[k])
        if weight.address != 0:
            parameters(weight, n, aligned, w)
            if bias.address != 0:
                biases = cuda.local.array(width, real)
                parameters(bias, n, aligned, biases)
                for k in range(width):
                    v[k] = fma(v[k], w[k], biases[k])
            else:
                for k in range(width):
                    v[k] = real(v[k] * w[k])
        elif bias.address != 0:
            parameters(bias, n, aligned, w)
            for k in range(width):
                v[k] = real(v[k] + w[k])
        if other.address != 0:
            load_other(other.address, other.index, n, aligned, w, 0)
            for k in range(width):
                v[k] = real(v[k] + w[k])
        if after:
            for k in range(width):
                v[k] = act(v[k])
        store_chunk(y.address, y.index, n, aligned, v)

    return finalize
