"""The copy that times are compared with: as many bytes read and written as the case needs, no more.

A norm reads x (and a residual, and dy) and writes its result. The copy does this and nothing else,
and writes where fastnorm writes: into the array given as `out`, or into a fresh one. Of several
ways to move the bytes the fastest is the one that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from fastnorm._bench.cases import Array, Case, Data
from fastnorm._bench.timing import fastest

Move = Callable[[Array, Array, "Array | None"], Any]
"""Writes into the first array what is in the second, or that xor the third."""


def with_numpy(y: Array, a: Array, b: Array | None) -> None:
    """Move with one call of NumPy's."""
    if b is None:
        np.copyto(y, a)
    else:
        np.bitwise_xor(a, b, out=y)


def in_parts(pool: Executor, threads: int) -> Move:
    """Move with as many such calls as threads at once: NumPy lets go of its lock meanwhile."""

    def move(y: Array, a: Array, b: Array | None) -> None:
        bounds = [len(y) * i // threads for i in range(threads + 1)]
        parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        pieces = [(y[part], a[part], None if b is None else b[part]) for part in parts]
        others = [pool.submit(with_numpy, *piece) for piece in pieces[1:]]
        with_numpy(*pieces[0])
        for other in others:
            other.result()

    return move


def copy(case: Case, data: Data, moves: Sequence[Move]) -> Callable[[], Any]:
    """The fastest of `moves`, over the bytes of a case."""
    read = [_flat(array) for array in data.read]
    pairs: list[tuple[Array, Array | None]] = [(read[0], read[-1] if len(read) > 1 else None)]
    if case.written == len(read):  # each result costs the reading of one array
        pairs = [(a, None) for a in read]
    out = None if data.out is None else _flat(data.out)

    def call(move: Move) -> list[Array]:
        written = []
        for a, b in pairs:
            y = np.empty_like(a) if out is None else out
            move(y, a, b)
            written.append(y)
        return written

    return fastest([partial(call, move) for move in moves])


def bytes_moved(case: Case, data: Data) -> int:
    """Read and written."""
    return (len(data.read) + case.written) * data.x.nbytes


def _flat(array: Array) -> Array:
    """The bytes of an array in the order of memory, not copied."""
    strides = array.strides
    order = sorted(range(array.ndim), key=lambda axis: -strides[axis])
    return array.transpose(order).reshape(-1).view(np.uint64 if array.nbytes % 8 == 0 else np.uint8)
