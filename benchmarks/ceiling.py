"""The ceiling: the copy, also in C, with stores through the caches and with non-temporal ones."""

from __future__ import annotations

import ctypes

from fastnorm._bench.cases import Array
from fastnorm._bench.copying import Move, with_numpy

from . import native


def address(array: Array) -> int:
    at: int = array.__array_interface__["data"][0]  # .ctypes.data takes twice as long
    return at


def mover(threads: int, past: bool, march: str = "native") -> Move | None:
    """The C function on so many threads, its stores non-temporal or not; None without C."""
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


def moves(threads: int) -> list[Move]:
    """On one thread and on all, and in NumPy."""
    every = [mover(t, past) for t in sorted({1, threads}) for past in (False, True)]
    return [with_numpy] + [move for move in every if move is not None]
