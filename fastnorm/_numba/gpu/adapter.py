"""The adapter for arrays on a GPU: the public functions' own code, on views of another memory.

An array of any library is shown to that code as an `ArrayView`, whose numbers it never reads. What
allocates, converts or computes is asked of the view's device, the `Gpu`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastnorm._numba.gpu.backward import backward
from fastnorm._numba.gpu.blocking import blocks_of
from fastnorm._numba.gpu.copies import fill
from fastnorm._numba.gpu.elementwise import Average, Window, response, running_average
from fastnorm._numba.gpu.forward import forward
from fastnorm._numba.gpu.launch import address, device_of, launch, wait_for_all
from fastnorm._numba.gpu.libraries import dense_strides, handles, library_of
from fastnorm._numba.gpu.package import SIMULATED, cuda, is_scalar_function
from fastnorm.arrays import ArrayView, Shape, assign, empty_on, moveaxis
from fastnorm.problem import Array, BackwardProblem, Problem


@functools.cache
def _has_driver() -> bool:
    return SIMULATED or bool(cuda.is_available())


def execute(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call a public function with arguments of which some are on a GPU: x is."""
    views = {name: view_of(v) if handles(v) else v for name, v in given.items()}
    if not _has_driver():
        raise RuntimeError(
            f"{function.__name__} got an array on a GPU, and CUDA's driver cannot be loaded here, "
            "expected one that can; install it, or write x.get() or x.cpu() for the host's memory"
        )
    wait_for_all([v for v in views.values() if isinstance(v, ArrayView)])
    return _delivered(function(**views))


def view_of(x: Any) -> ArrayView:
    """Show an array of any library."""
    memory = library_of(x).memory(x)
    dtype = memory.dtype
    numpys = dtype.kind in "biufc" and dtype.type.__module__ == "numpy"
    if not numpys and dtype.name != "bfloat16":
        raise TypeError(
            f"an array on the GPU has dtype {dtype}, expected float16, bfloat16, float32, float64, "
            "or integers or booleans; convert it in its library first"
        )
    steps = (memory.address, *memory.strides)
    if any(step % dtype.alignment for step in steps) or not dtype.isnative:
        raise ValueError(
            f"an array on the GPU has dtype {dtype.str}, strides {memory.strides} and address "
            f"{memory.address:#x}, expected numbers in the GPU's byte order at multiples of their "
            "size; write x.copy() in its library first"
        )
    return ArrayView(
        memory.address, memory.shape, memory.strides, dtype, GPU, x, not memory.readonly
    )


def _delivered(result: Any) -> Any:
    """A view as the array of the library's that it shows."""
    if isinstance(result, tuple):
        return tuple(_delivered(part) for part in result)
    if not isinstance(result, ArrayView):
        return result
    owner = result.owner
    return owner if tuple(owner.shape) == result.shape else owner.reshape(result.shape)


class Gpu:
    """The device of all views here: which GPU it is, is asked of the array's library."""

    def empty(self, like: ArrayView, shape: Shape, dtype: np.dtype[Any], axes: Shape) -> ArrayView:
        """Memory of the library that made `like`, on its GPU."""
        dense = dense_strides(shape, axes, dtype.itemsize)
        return view_of(library_of(like.owner).empty(like.owner, shape, dtype, dense))

    def to_device_of(self, like: ArrayView, array: Array) -> ArrayView:
        """A copy of an array in the host's memory, of the library that made `like`."""
        made = library_of(like.owner).from_host(like.owner, np.ascontiguousarray(array))
        return view_of(made).reshape(array.shape)

    def to_host(self, array: ArrayView) -> Array:
        """A copy in the host's memory."""
        library = library_of(array.owner)
        other = library.name == "Numba" and not hasattr(array.owner, "copy_to_host")
        # into memory that can be copied as a whole
        whole = array.copy() if other or not array.contiguous else array
        return library_of(whole.owner).to_host(whole.owner).reshape(array.shape)

    def convert(self, source: ArrayView, into: ArrayView, offset: float = 0.0) -> None:
        """Fill `into` with source + offset."""
        fill(into, source, offset=offset)

    def compiles(self, activation: Any) -> bool:
        """Whether this is a function that Numba can compile."""
        return is_scalar_function(activation)

    def forward(self, p: Problem) -> None:
        """Execute a pass."""
        forward(p)

    def backward(self, p: BackwardProblem) -> None:
        """Execute a backward pass."""
        backward(p)

    def update_running(
        self, running: ArrayView, parts: Any, counts: Any, momentum: float, *, unbiased: bool
    ) -> None:
        """Move a running statistic towards the average of parts."""
        n, channels = parts.shape
        how = Average(channels, n, running.strides[0] // running.itemsize, int(unbiased))
        at = [address(array) for array in (running, parts, counts)]
        with device_of(running):
            kernel = running_average(running.dtype.name)
            launch(kernel, blocks_of(channels), running, how, *at, float(momentum))

    def local_response_norm(
        self, x: ArrayView, y: ArrayView, axis: int, size: int, scalars: tuple[float, float, float]
    ) -> None:
        """`local_response_norm` of x, channels last or with the positions together."""
        last = moveaxis(x, axis, -1)
        moved = last if last.contiguous else moveaxis(x, axis, 1)
        source, target = moved, y
        if not moved.contiguous:
            source, target = moved.copy(), empty_on(x, moved.shape, x.dtype)
        if x.size:
            inner = 1 if moved is last else math.prod(moved.shape[2:])
            window = Window(x.shape[axis], inner, size)
            given = (x.size, window, address(source), address(target))
            with device_of(x):
                kernel = response(x.dtype.name)
                launch(kernel, blocks_of(x.size), x, *given, *map(float, scalars))
        if target is not y:
            assign(y, moveaxis(target, 1, axis))


GPU = Gpu()
