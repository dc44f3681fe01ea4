"""Numbers in the GPU's memory: one at a time, or in chunks of what 16 bytes of x hold.

Memory is meant by its address. A chunk is loaded at once where addresses allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fastnorm._numba.gpu.blocking import CHUNK
from fastnorm._numba.gpu.package import (
    arithmetic,
    device,
    double_of,
    load_words,
    reader,
    store_words,
    words_of,
    writer,
)

Function = Callable[..., Any]

read_word, read_byte, read_double = reader(np.int64), reader(np.uint8), reader(np.float64)
write_double = writer(np.float64)

# dtype: how it lies in memory, and what makes a float32 of it and back
_BITS = {
    "float16": (arithmetic.from_f16, arithmetic.to_f16),
    "bfloat16": (arithmetic.from_bf16, arithmetic.to_bf16),
}


def size_of(kind: str) -> int:
    """Bytes of a number of this dtype."""
    return 2 if kind in _BITS else np.dtype(kind).itemsize


def computing(kind: str) -> Any:
    """What a dtype is computed in: float32, or float64 for float64 and for integers."""
    return np.float32 if kind in (*_BITS, "float32") else np.float64


@cache
def loader(kind: str, real: Any) -> Function:
    """A function (address, index) that reads a number of this dtype as a `real`."""
    if kind in _BITS:
        bits, convert = reader(np.uint16), _BITS[kind][0]
        return device(lambda address, index: real(convert(bits(address, index))))
    stored: Any = np.uint8 if kind == "bool" else np.dtype(kind).type
    number = reader(stored)
    return device(lambda address, index: real(number(address, index)))


@cache
def storer(kind: str) -> Function:
    """A function (address, index, value) that rounds a number to this dtype and writes it."""
    if kind in _BITS:
        bits, convert = writer(np.uint16), _BITS[kind][1]
        single = np.float32
        return device(lambda address, index, value: bits(address, index, convert(single(value))))
    real: Any = np.dtype(kind).type
    number = writer(real)
    return device(lambda address, index, value: number(address, index, real(value)))


@cache
def chunk_loader(kind: str, real: Any, width: int) -> Function:
    """A function (address, index, n, aligned, into, first) that reads n of `width` numbers.

    They go to into[first], ...; 16 bytes at a time where `aligned` and the chunk is a whole one.
    """
    load = loader(kind, real)
    size = size_of(kind)
    words = width * size // CHUNK
    if kind in _BITS:
        convert = _BITS[kind][0]

        @device
        def load_aligned(address: Any, into: Any, first: Any) -> None:
            for i in range(words):
                four = load_words(address + CHUNK * i)
                for k in range(4):
                    into[first + 8 * i + 2 * k] = real(
                        convert(np.uint16(four[k] & np.uint32(0xFFFF)))
                    )
                    into[first + 8 * i + 2 * k + 1] = real(
                        convert(np.uint16(four[k] >> np.uint32(16)))
                    )

    elif kind == "float32":

        @device
        def load_aligned(address: Any, into: Any, first: Any) -> None:
            for i in range(words):
                four = load_words(address + CHUNK * i)
                for k in range(4):
                    into[first + 4 * i + k] = real(four[k].view(np.float32))

    elif kind == "float64":

        @device
        def load_aligned(address: Any, into: Any, first: Any) -> None:
            for i in range(words):
                four = load_words(address + CHUNK * i)
                into[first + 2 * i] = real(double_of(four[0], four[1]))
                into[first + 2 * i + 1] = real(double_of(four[2], four[3]))

    else:
        words = 0
        load_aligned = device(lambda address, into, first: None)

    whole = words * CHUNK == width * size and words > 0

    @device
    def load_chunk(
        address: Any, index: Any, n: Any, aligned: Any, into: Any, first: Any
    ) -> None:  # fmt: skip
        if whole and aligned and n == width:
            load_aligned(address + index * size, into, first)
        else:
            for k in range(width):
                into[first + k] = load(address, index + k) if k < n else real(0)

    return load_chunk


@cache
def chunk_storer(kind: str, width: int) -> Function:
    """A function (address, index, n, aligned, values) that writes n of `width` numbers."""
    store = storer(kind)
    size = size_of(kind)
    if kind in _BITS:
        convert = _BITS[kind][1]

        @device
        def pair(low: Any, high: Any) -> Any:
            high_bits = np.uint32(np.uint32(convert(high)) << np.uint32(16))
            return np.uint32(np.uint32(convert(low)) | high_bits)

        @device
        def store_aligned(address: Any, v: Any) -> None:
            a, b = pair(v[0], v[1]), pair(v[2], v[3])
            store_words(address, a, b, pair(v[4], v[5]), pair(v[6], v[7]))

    elif kind == "float32":

        @device
        def store_aligned(address: Any, v: Any) -> None:
            a, b = v[0].view(np.uint32), v[1].view(np.uint32)
            store_words(address, a, b, v[2].view(np.uint32), v[3].view(np.uint32))

    else:

        @device
        def store_aligned(address: Any, v: Any) -> None:
            a, b = words_of(v[0])
            c, d = words_of(v[1])
            store_words(address, a, b, c, d)

    @device
    def store_chunk(address: Any, index: Any, n: Any, aligned: Any, values: Any) -> None:
        if aligned and n == width:
            store_aligned(address + index * size, values)
        else:
            for k in range(width):
                if k < n:
                    store(address, index + k, values[k])

    return store_chunk
