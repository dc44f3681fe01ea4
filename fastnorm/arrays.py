"""Arrays of a device: where their numbers lie, for code that reads no number.

The public functions check an array, view it and describe a pass over it. For an array in a device's
memory they do that with an `ArrayView`; what allocates, copies or computes is asked of its device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fastnorm.problem import Array, BackwardProblem, Problem

Shape = tuple[int, ...]


class Device(Protocol):
    """What computes where an array's numbers are."""

    def empty(self, like: ArrayView, shape: Shape, dtype: np.dtype[Any], axes: Shape) -> ArrayView:
        """Memory where `like` is, without gaps; the strides `axes` say in which order."""

    def to_device_of(self, like: ArrayView, array: Array) -> ArrayView:
        """A copy where `like` is of an array in the host's memory."""

    def to_host(self, array: ArrayView) -> Array:
        """A copy of an array in the host's memory."""

    def convert(self, source: ArrayView, into: ArrayView, offset: float = 0.0) -> None:
        """Fill `into` with source + offset, in its own dtype."""

    def compiles(self, activation: Any) -> bool:
        """Whether this activation, which NumPy's arrays may not have, can be compiled there."""

    def forward(self, p: Problem) -> None:
        """Execute a pass."""

    def backward(self, p: BackwardProblem) -> None:
        """Execute a backward pass."""

    def update_running(
        self, running: ArrayView, parts: Any, counts: Any, momentum: float, *, unbiased: bool
    ) -> None:
        """`execution.update_running` of one running statistic."""

    def local_response_norm(
        self, x: ArrayView, y: ArrayView, axis: int, size: int, scalars: tuple[float, float, float]
    ) -> None:
        """Fill y with `local_response_norm` of x; the scalars are alpha, beta and k."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ArrayView:
    """A view of a device's memory."""

    pointer: int
    shape: Shape
    strides: Shape  # in bytes
    dtype: np.dtype[Any]
    device: Device
    owner: Any  # the array whose memory it is, of the library that made it
    writable: bool = True

    __array_ufunc__ = None  # no arithmetic

    def __array__(self, *given: Any, **named: Any) -> Array:
        raise TypeError("the numbers of an array on a device are not read here")

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        step = self.itemsize
        for n, stride in zip(reversed(self.shape), reversed(self.strides)):
            if n != 1 and stride != step:
                return self.size == 0
            step *= n
        return True

    def transpose(self, axes: Sequence[int]) -> ArrayView:
        """The axes in another order."""
        shape, strides = (tuple(part[a] for a in axes) for part in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)

    def flip(self, axes: Sequence[int]) -> ArrayView:
        """These axes the other way round."""
        if self.size == 0:
            return self
        first = sum(self.strides[a] * (self.shape[a] - 1) for a in axes)
        strides = tuple(-s if a in axes else s for a, s in enumerate(self.strides))
        return replace(self, pointer=self.pointer + first, strides=strides)

    def broadcast_to(self, shape: Sequence[int]) -> ArrayView:
        """NumPy's `broadcast_to`; the view is not for writing."""
        added = len(shape) - self.ndim
        own = (1,) * added + self.shape
        if added < 0 or any(n not in (1, whole) for n, whole in zip(own, shape)):
            raise ValueError(f"shape {self.shape} does not broadcast to {tuple(shape)}")
        strides = (0,) * added + self.strides
        steps = tuple(s if n == all_ else 0 for s, n, all_ in zip(strides, own, shape))
        return replace(self, shape=tuple(shape), strides=steps, writable=False)

    def reshape(self, *shape: Any) -> ArrayView:
        """Another shape of the same memory; ValueError where that takes a copy."""
        new: Shape = tuple(shape[0]) if len(shape) == 1 and np.ndim(shape[0]) else shape
        if math.prod(new) != self.size:
            raise ValueError(f"cannot reshape {self.shape} to {new}")
        return replace(self, shape=new, strides=_reshaped(self, new))

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ArrayView:
        """A copy on the device in another dtype, in C order or in its own."""
        dtype = np.dtype(dtype)
        if not copy and dtype == self.dtype and (order != "C" or self.contiguous):
            return self
        axes = (0,) * self.ndim if order == "C" else self.strides
        made = self.device.empty(self, self.shape, dtype, axes)
        self.device.convert(self, made)
        return made

    def copy(self) -> ArrayView:
        """A copy on the device, in C order."""
        return self.astype(self.dtype, order="C")


def _reshaped(array: ArrayView, shape: Shape) -> Shape:
    """The strides of an array in another shape."""
    # stretches of memory without gaps, the innermost last: how many elements, how far apart
    stretches: list[tuple[int, int]] = []
    for n, step in zip(array.shape, array.strides):
        if stretches and stretches[-1][1] == step * n:
            stretches[-1] = (stretches[-1][0] * n, step)
        elif n != 1:
            stretches.append((n, step))
    strides: list[int] = []
    left, step = 1, array.itemsize
    for n in reversed(shape):
        if left == 1 and n != 1 and stretches:
            left, step = stretches.pop()
        strides.append(step)
        if left % max(n, 1) and array.size:
            raise ValueError(
                f"an array of shape {array.shape} and strides {array.strides} "
                f"has no view of shape {shape}"
            )
        left, step = left // max(n, 1), step * n
    return tuple(reversed(strides))


# --- What differs between the two kinds -----------------------------------------------------------


def to_host(value: Any) -> Any:
    """What came in, with its numbers in the host's memory."""
    return value.device.to_host(value) if isinstance(value, ArrayView) else value


def to_device_of(x: Any, operand: Any) -> Any:
    """An operand of a pass over x, where x is."""
    if not isinstance(x, ArrayView) or operand is None or isinstance(operand, ArrayView):
        return operand
    return x.device.to_device_of(x, operand)


def empty_on(x: ArrayView, shape: Sequence[int], dtype: Any, axes: Shape | None = None) -> Any:
    """Memory where x is: in C order, or in that of the strides `axes`."""
    shape = tuple(int(n) for n in shape)
    return x.device.empty(x, shape, np.dtype(dtype), axes or (0,) * len(shape))


def plus(array: Any, offset: float) -> Any:
    """array + offset, in float64."""
    if isinstance(array, ArrayView):
        made = array.device.empty(array, array.shape, np.dtype(np.float64), array.strides)
        array.device.convert(array, made, offset)
        return made
    with np.errstate(all="ignore"):
        return array.astype(np.float64) + offset


def assign(target: Any, source: Any) -> None:
    """Fill one array with the numbers of another, both on one device or in the host's memory."""
    if isinstance(target, ArrayView):
        target.device.convert(source, target)
    else:
        np.copyto(target, source)


def broadcast_to(array: Any, shape: Sequence[int]) -> Any:
    """NumPy's `broadcast_to` of either kind."""
    if isinstance(array, ArrayView):
        return array.broadcast_to(shape)
    return np.broadcast_to(array, shape)


def flip(array: Any, axes: tuple[int, ...]) -> Any:
    """These axes the other way round."""
    return array.flip(axes) if isinstance(array, ArrayView) else np.flip(array, axes)


def moveaxis(array: Any, source: int, destination: int) -> Any:
    """NumPy's `moveaxis` of either kind: it asks for `transpose` alone."""
    return np.moveaxis(array, source, destination)


def one_of_a_batch(steps: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether there is room for more samples a step of axis 0 apart, behind or between each other.

    Such a step is that of a batch, of which this sample is a slice; others are anything.
    """
    longer = [(step, n) for step, n in zip(steps, shape) if n > 1]
    within = sum((n - 1) * step for step, n in longer if step <= steps[0])
    return bool(longer) and steps[0] > within


def is_writable(array: Any) -> bool:
    """Whether an array may be written to."""
    return bool(array.writable if isinstance(array, ArrayView) else array.flags.writeable)


def pointer_of(array: Any) -> int:
    """The address of an array's first element."""
    return int(array.pointer if isinstance(array, ArrayView) else array.ctypes.data)


def may_share_memory(one: Any, other: Any) -> bool:
    """Whether the memory of two arrays may overlap."""
    if not (isinstance(one, ArrayView) and isinstance(other, ArrayView)):
        return bool(np.may_share_memory(one, other))
    (low, high), (first, last) = _bounds(one), _bounds(other)
    return low < last and first < high


def _bounds(array: ArrayView) -> tuple[int, int]:
    """The addresses of the first byte and of that after the last."""
    if array.size == 0:
        return array.pointer, array.pointer
    ends = [step * (n - 1) for n, step in zip(array.shape, array.strides)]
    low = array.pointer + sum(min(end, 0) for end in ends)
    return low, array.pointer + sum(max(end, 0) for end in ends) + array.itemsize
