"""The ceiling: as many bytes read and written as the case needs, with the same threads.

A norm reads x (and a residual, and dy) and writes its result. The ceiling does this and nothing
else, in C, with stores through the caches and with stores past them, on one thread and on all,
and in NumPy; of these the fastest is the one that counts. It writes where fastnorm writes: into the
array given as `out`, or into a fresh one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import native
from .cases import Case, Data
from .timing import fastest

Array = np.ndarray[Any, Any]
Move = Callable[[Array, Array, "Array | None"], Any]


def address(array: Array) -> int:
    at: int = array.__array_interface__["data"][0]  # .ctypes.data takes twice as long
    return at


def _numpy(y: Array, a: Array, b: Array | None) -> None:
    if b is None:
        np.copyto(y, a)
    else:
        np.bitwise_xor(a, b, out=y)


def mover(threads: int, past: bool, march: str = "native") -> Move | None:
    """The C function on so many threads, its stores past the caches or not; None without C."""
    library = native.load("copy", march)
    if library is None:
        return None
    move = library.move
    move.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    move.restype = None

    def run(y: Array, a: Array, b: Array | None) -> None:
        second = None if b is None else address(b)
        move(address(y), address(a), second, y.nbytes, threads, past)

    return run


def _moves(threads: int) -> list[Move]:
    every = [mover(t, past) for t in sorted({1, threads}) for past in (False, True)]
    return [_numpy] + [move for move in every if move is not None]


def _flat(array: Array) -> Array:
    """The bytes of an array in the order of memory, not copied."""
    strides = array.strides
    order = sorted(range(array.ndim), key=lambda axis: -strides[axis])
    return array.transpose(order).reshape(-1).view(np.uint64 if array.nbytes % 8 == 0 else np.uint8)


def copy(case: Case, data: Data, threads: int) -> Callable[[], Any]:
    """The fastest way found here to move the bytes of a case."""
    read = [_flat(array) for array in data.read]
    outputs = case.operation.outputs if not case.backward else 1
    pairs: list[tuple[Array, Array | None]] = [(read[0], read[-1])]
    if outputs == len(read):  # each result costs the reading of one array
        pairs = [(a, None) for a in read]
    out = None if data.out is None else _flat(data.out)

    def call(move: Move) -> list[Array]:
        written = []
        for a, b in pairs:
            y = np.empty_like(a) if out is None else out
            move(y, a, b)
            written.append(y)
        return written

    return fastest([partial(call, move) for move in _moves(threads)])


def bytes_moved(case: Case, data: Data) -> int:
    """Read and written."""
    outputs = case.operation.outputs if not case.backward else 1
    return (len(data.read) + outputs) * data.x.nbytes
