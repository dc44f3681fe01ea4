"""Arrays in memory of their own: a page nobody may touch on either side, known bytes in between."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers import PAGE, guarded

Array = np.ndarray[Any, Any]
Layout = dict[str, Any]

FILLER = 0xFF  # as a float of any size this is not a number, as a bool it is none


class Arena:
    """`size` bytes that end where a page begins that can not be touched, or begin after one."""

    def __init__(self, size: int, *, at_end: bool = True, gap: int = 0) -> None:
        room = -(-max(size + gap, 1) // PAGE) * PAGE
        self.bytes = guarded((room,), np.uint8)
        self.bytes[:] = FILLER
        self.begin = room - size - gap if at_end else gap
        self.before = self.bytes
        self.written: list[Array] = []

    def array(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], strides: list[int], shift: int = 0
    ) -> Array:
        """An array whose lowest byte is `shift` bytes behind the arena's beginning."""
        place = self.begin + shift - lowest(shape, strides)
        found: Array = np.ndarray(shape, dtype, self.bytes, place, strides)
        return found

    def remember(self) -> None:
        """Take what is there now for what should be there again after each call."""
        self.before = self.bytes.copy()

    def restore(self) -> None:
        self.bytes[:] = self.before

    def check(self, what: str) -> None:
        """Fail if anything has changed but the arrays in `written`."""
        right = self.before
        if self.written:
            right = right.copy()
            start = self.bytes.ctypes.data
            for array in filter(np.size, self.written):
                place = array.ctypes.data - start
                same: Array = np.ndarray(array.shape, array.dtype, right, place, array.strides)
                same[...] = array
        if not np.array_equal(right, self.bytes):
            wrong = np.flatnonzero(right != self.bytes)
            raise AssertionError(
                f"{wrong.size} bytes of or around {what} were changed, the first "
                f"{wrong[0] - self.begin} bytes behind its lowest"
            )


def lowest(shape: tuple[int, ...], strides: list[int]) -> int:
    return 0 if 0 in shape else sum((n - 1) * s for n, s in zip(shape, strides) if n > 1 and s < 0)


def extent(shape: tuple[int, ...], strides: list[int], size: int) -> int:
    """Bytes from the lowest to the end of the highest element."""
    if 0 in shape:
        return 0
    return size + sum((n - 1) * abs(s) for n, s in zip(shape, strides) if n > 1)


def axes_in_memory(ndim: int, order: str) -> list[int]:
    """The axes from the outermost to the innermost."""
    axes = list(range(ndim))
    if order == "F":
        return axes[::-1]
    if order == "last" and ndim > 1:  # channels-last
        return [axes[0], *axes[2:], axes[1]]
    if order == "swapped":
        return [*axes[-1:], *axes[1:-1], *axes[:1]] if ndim > 1 else axes
    return axes


def strides_of(shape: tuple[int, ...], size: int, layout: Layout) -> list[int]:
    ndim = len(shape)
    if not ndim:
        return []
    order = axes_in_memory(ndim, layout.get("order", "C"))
    at = layout.get("axis", 0) % ndim
    strides = [0] * ndim
    step = size + layout.get("extra", 0)
    for axis in reversed(order):
        strides[axis] = step * (layout.get("step", 1) if axis == at else 1)
        padding = size * layout.get("pad", 0) if axis == at else 0
        step = strides[axis] * max(shape[axis], 1) + padding
    if layout.get("repeated"):
        strides[at] = 0
    if layout.get("windows"):
        strides[order[0]] = size  # the outermost rows begin one element apart
    for axis in layout.get("flip", []):
        strides[axis % ndim] *= -1
    if "odd" in layout:
        strides = [s + layout["odd"] if n == 1 else s for n, s in zip(shape, strides)]
    return strides


def place(values: Array, layout: Layout) -> tuple[Array, Arena]:
    """The same numbers laid out so; where elements share memory they are what was written last."""
    dtype = values.dtype.newbyteorder("S") if layout.get("swap") else values.dtype
    strides = strides_of(values.shape, dtype.itemsize, layout)
    size = extent(values.shape, strides, dtype.itemsize)
    if size > 8 * values.nbytes + PAGE:  # spread too far
        strides = strides_of(values.shape, dtype.itemsize, {})
        size = extent(values.shape, strides, dtype.itemsize)
    gap = 1 if layout.get("misaligned") else 0
    arena = Arena(size, at_end=not layout.get("front"), gap=gap)
    array = arena.array(values.shape, dtype, strides)
    array[...] = values
    if layout.get("locked"):
        array.flags.writeable = False
    return array, arena
