"""What is read at once, how, and what comes of it: the words that the readers share."""

from __future__ import annotations

import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastnorm._files.names import CannotUse

Array: TypeAlias = NDArray[Any]

# What is read at once, in bytes, where the numbers can be had in pieces.
BLOCK = 8 << 20
# What is read at once where they cannot: a chunk of a file, a row, an image for --axis.
MOST = 1 << 30
# What a chunk takes, at least: to find it, and to say where it is.
CHUNK = 1 << 13
# An array of so many bytes of which so small a share is stored is taken for a mistake or a trap:
# reading it would take long, and find nothing but the fill value.
GIANT, SHARE = 1 << 36, 1000
# How many statistics there may be: each takes some dozens of bytes in each process, and up to half
# a kilobyte until it is printed.
STATISTICS = 1 << 22
# How many numbers a file may say stand for none.
NODATA = 64
# An image's pixels, unless --max-pixels says otherwise: Pillow's own limit.
MAX_PIXELS = 178_956_970


@dataclass(frozen=True)
class Part:
    """Something that a worker reads: an image, or a block of an array."""

    path: str
    kind: str  # "image", "npy", "npz", "zarr", "hdf5"
    group: str = ""
    key: str = ""  # of an array in a file of several
    index: tuple[slice, ...] = ()


@dataclass(frozen=True)
class Source:
    """A file, and how it is cut into parts; they are made as they are asked for."""

    path: str
    kind: str
    group: str = ""
    key: str = ""
    cuts: tuple[tuple[int, int], ...] = ()  # of each axis of an array: its length, and the step

    def __len__(self) -> int:
        return math.prod(-(-n // step) for n, step in self.cuts)

    def parts(self) -> Iterator[Part]:
        """Return the parts in order."""
        for index in indices(self.cuts):
            yield Part(self.path, self.kind, self.group, self.key, index)


def indices(cuts: tuple[tuple[int, int], ...]) -> Iterator[tuple[slice, ...]]:
    """Return the blocks of an array, of each of whose axes the length and the step are given."""
    pieces = [[slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in cuts]
    return itertools.product(*pieces)


@dataclass
class Stored:
    """An array in a file: what is known of it before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None = None
    attributes: dict[str, Any] | None = None

    def cost(self, block: Iterable[int]) -> int:
        """How many bytes a block of this shape takes, in whole chunks, the smallest ones too."""
        block = tuple(block)
        if self.chunks is None:
            return math.prod(block) * self.dtype.itemsize
        count = math.prod(-(-n // step) for n, step in zip(block, self.chunks))
        return count * max(math.prod(self.chunks) * self.dtype.itemsize, CHUNK)


class ArrayFile(ABC):
    """A file of arrays."""

    @abstractmethod
    def names(self) -> list[str]:
        """What its arrays are called."""

    @abstractmethod
    def describe(self, key: str) -> Stored:
        """Shape, dtype and what else is to be known of an array before it is read."""

    @abstractmethod
    def stored(self, key: str) -> int:
        """How many bytes of the array there are."""

    @abstractmethod
    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        """Numbers of an array in pieces, of which none is large; `axes` are those reduced."""

    def linked(self) -> str:
        """What to say of arrays that are in other files; nothing where there can be none."""
        return ""


@dataclass(frozen=True)
class Options:
    """How parts are read."""

    axis: tuple[int, ...] | None = None  # None: all but the channels of an image, all of an array
    mode: str | None = None  # what images are converted to
    histogram: bool = False
    nodata: float | None = None
    ignore_nan: bool = False
    max_pixels: int = MAX_PIXELS
    # What the first part is that could be read; all others must be alike.
    shape: tuple[int, ...] | None = None  # of the statistics; None before any are known
    number_kind: str = ""
    first: str = ""  # its path


@dataclass
class Block:
    """Numbers, and what their file says about them."""

    array: Array
    number_kind: str  # what they are; numbers of different sorts do not belong together
    nodata: tuple[float, ...] = ()  # numbers that stand for none
    scale: float = 1.0
    offset: float = 0.0

    def left_out(self, options: Options) -> Array | None:
        """Return a mask of the numbers that do not count; None where all do."""
        own = self.nodata if options.nodata is None else (*self.nodata, options.nodata)
        also = (math.nan,) if options.ignore_nan and self.array.dtype.kind == "f" else ()
        mask: Array | None = None
        for value in (*own, *also):
            hit = _equal(self.array, value)
            if hit is not None:
                mask = hit if mask is None else mask | hit
        return mask

    def numbers(self) -> Array:
        """Return what the stored numbers stand for."""
        if (self.scale, self.offset) == (1.0, 0.0):
            return self.array
        with np.errstate(all="ignore"):
            return self.array.astype(np.float64) * self.scale + self.offset


def _equal(x: Array, value: float) -> Array | None:
    """Where x is `value`, as its dtype has it; None where no element can be."""
    if x.dtype.kind == "f":
        with np.errstate(all="ignore"):
            return np.isnan(x) if math.isnan(value) else x == x.dtype.type(value)
    if not math.isfinite(value) or value != int(value):
        return None
    low, high = (0, 1) if x.dtype.kind == "b" else (np.iinfo(x.dtype).min, np.iinfo(x.dtype).max)
    return x == int(value) if low <= int(value) <= high else None


def axes_of(ndim: int, shape: tuple[int, ...], options: Options, path: str) -> tuple[int, ...]:
    """Return the reduced axes of an array, 0 or more; refuse those that it does not have."""
    if options.axis is None:
        return tuple(range(ndim))
    places = {a % ndim for a in options.axis if -ndim <= a < ndim}
    if len(places) != len(options.axis):
        size = f"shape {shape}" if shape else f"{ndim} axes"
        raise CannotUse(
            f"{path!r} has {size}, and --axis is axis={options.axis}: expected different axes from "
            f"{-ndim} to {ndim - 1}"
        )
    return tuple(sorted(places))


def check_statistics(kept: tuple[int, ...]) -> None:
    """Refuse more statistics than memory is taken for."""
    if math.prod(kept) > STATISTICS:
        raise ValueError(
            f"with this --axis it has {math.prod(kept):,} means, more than {STATISTICS:,}"
        )


def there(found: os.stat_result) -> int:
    """Return how many bytes of a file are there, where that is known."""
    return min(found.st_size, max(getattr(found, "st_blocks", found.st_size) * 512, 4096))


def check_giant(nominal: int, stored: int, name: str) -> None:
    """Refuse an array of gigantic size of which next to nothing is stored."""
    if nominal >= GIANT and stored * SHARE < nominal:
        raise ValueError(
            f"{name} says it is of {nominal:,} bytes, of which {stored:,} are stored: the rest is "
            "empty; cut it to the part that has numbers"
        )


def check_numeric(dtype: np.dtype[Any], name: str) -> None:
    """Refuse a dtype that is no real number; objects above all, for they can run code."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {dtype}, expected real numbers of 8 bytes at most, or booleans"
        )
