"""First weights: drawn at once on several threads, into memory that lies together."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate, groupby
from threading import Thread
from typing import Any, TypeAlias

import numpy as np

from fastnorm.arguments import Array, shown
from fastnorm.runtime import get_num_threads

Random: TypeAlias = "np.random.Generator | int | None"  # NumPy imports it when it is asked for

# So many first weights are drawn and scaled at once, for the same reason, and so many are what a
# thread takes next: 0.7 ms. OpenBLAS's threads spin for 0.1 s once NumPy is imported. With one of
# them about a thread gets half a processor, and with equal halves the other would wait for it.
_DRAWN = 1 << 16
_SHARE = 1 << 19

_HUGE_PAGE = 1 << 21  # bytes


def together(shapes: Iterable[tuple[int, ...]], dtype: np.dtype[Any]) -> list[Array]:
    """Empty arrays in one piece of memory, which begins where a huge page does.

    NumPy asks for such pages from 4 MB on. Arrays by themselves begin anywhere, and have small ones
    at both ends: those of six blocks of 512 numbers were 12 thousand page faults.
    """
    shapes = list(shapes)
    ends = list(accumulate(map(math.prod, shapes), initial=0))
    size = ends[-1] * dtype.itemsize
    if size < _HUGE_PAGE:
        return [np.empty(shape, dtype) for shape in shapes]
    whole = np.empty(size + _HUGE_PAGE, np.uint8)  # no memory until it is written
    start = -whole.__array_interface__["data"][0] % _HUGE_PAGE
    memory = whole[start : start + size].view(dtype)
    return [memory[a:b].reshape(shape) for a, b, shape in zip(ends, ends[1:], shapes)]


def generator(rng: Random) -> np.random.Generator:
    """A generator, or that of a seed."""
    try:
        return np.random.default_rng(rng)
    except Exception:  # NumPy's, and whatever somebody's object raises
        raise TypeError(
            f"rng is {shown(rng)}, expected a generator of np.random, a whole number of at least 0 "
            "as the seed of one, or None"
        ) from None


def draw(weights: list[tuple[Array, float]], generator: np.random.Generator) -> None:
    """Fill each array with uniform numbers between minus and plus its bound.

    They are those that `generator` gives in this order, on however many threads, and it goes on
    after them. (Normal numbers would take longer than to import and run all of it.)
    """
    pieces, count = [], 0
    for array, bound in weights:
        flat = array.reshape(-1)
        starts = range(0, flat.size, _DRAWN)
        pieces += [(count + i, flat[i : i + _DRAWN], bound) for i in starts]
        count += flat.size
    shares = [list(group) for _, group in groupby(pieces, lambda piece: piece[0] // _SHARE)]
    bits = generator.bit_generator
    # only these can begin anywhere, and only what is drawn in place is sure to succeed
    jumps = _steps(bits)
    in_place = all(array.dtype == np.float32 and array.flags.writeable for array, _ in weights)
    if len(shares) < 2 or not (jumps and in_place):
        _fill(pieces, generator)
        return
    with bits.lock:
        jobs = [(share, _ahead(bits, share[0][0])) for share in shares]
        bits.state = _ahead(bits, count).bit_generator.state

    def work() -> None:
        with suppress(IndexError):  # nothing is left
            while True:
                _fill(*jobs.pop())

    threads = [Thread(target=work) for _ in range(min(get_num_threads(), len(jobs)) - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()


def _steps(bits: Any) -> bool:
    """Whether a generator makes two numbers of 32 bits at each step, and can begin at any."""
    return type(bits) in (np.random.PCG64, np.random.PCG64DXSM)


def _ahead(bits: Any, count: int) -> np.random.Generator:
    """A generator at where `bits` will be after `count` numbers of 32 bits.

    A step makes two of them, of which the second waits to be drawn.
    """
    own = type(bits)(0)
    own.state = bits.state
    generator = np.random.Generator(own)
    if count > 0:
        count -= own.state["has_uint32"]
        own.advance(count // 2)  # none waits after that
        if count % 2:
            generator.random(dtype=np.float32)
    return generator


def _fill(pieces: list[tuple[int, Array, float]], generator: np.random.Generator) -> None:
    bits = generator.bit_generator
    # as _ahead knows them, with no number waiting: whole steps take 0.8 of the time
    whole = _steps(bits) and not bits.state["has_uint32"] and sys.byteorder == "little"
    for _, piece, bound in pieces:
        whole = whole and piece.dtype == np.float32 and piece.size % 2 == 0
        if whole:
            drawn = generator.integers(0, 1 << 64, piece.size // 2, np.uint64).view(np.uint32)
            drawn >>= 8  # the 24 bits of a float
            drawn -= 1 << 23
            piece[...] = drawn.view(np.int32)
            piece *= bound / (1 << 23)
            continue
        kind: Any = np.float64 if piece.dtype == np.float64 else np.float32
        values = piece if piece.dtype == kind else np.empty(piece.shape, kind)
        generator.random(out=values, dtype=kind)
        values -= 0.5
        values *= 2 * bound
        if values is not piece:
            piece[...] = values
