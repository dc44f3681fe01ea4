"""Launching a kernel: on which GPU and stream, with how many blocks, over which plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np

from fastnorm._numba.gpu.blocking import BLOCK
from fastnorm._numba.gpu.libraries import Library, library_of
from fastnorm._numba.gpu.package import SIMULATED, configured, cuda
from fastnorm.arrays import ArrayView


def device_of(x: ArrayView) -> AbstractContextManager[Any]:
    """The GPU of x, in use inside a `with` block."""
    number = library_of(x.owner).device(x.owner)
    if number is None or SIMULATED:
        return nullcontext()
    context: AbstractContextManager[Any] = cuda.gpus[number]
    return context


def launch(kernel: Any, blocks: int, x: ArrayView, *given: Any) -> None:
    """Run a kernel on the stream of x."""
    pointer = library_of(x.owner).stream(x.owner)
    stream = 0 if SIMULATED or not pointer else cuda.external_stream(pointer)
    configured(kernel, blocks, BLOCK, stream)(*given)


@lru_cache(maxsize=1024)
def _stored(numbers: tuple[int, ...], device: int | None) -> tuple[int, Any]:
    """Whole numbers on the device, once for all calls: their address, and what holds them."""
    array = cuda.to_device(np.array(numbers, np.int64))
    cuda.synchronize()  # a later call may be on another stream
    return Library().memory(array).address, array


def plan_of(x: ArrayView, numbers: Sequence[int]) -> int:
    """The address of a pass's numbers, on the GPU of x."""
    device = library_of(x.owner).device(x.owner)
    if device is None and not SIMULATED:
        device = cuda.get_current_device().id
    return _stored(tuple(numbers), device)[0]


def address(array: ArrayView | None) -> int:
    """Where an operand begins; 0 for one that is not there."""
    return 0 if array is None else array.pointer


def wait_for_all(views: Sequence[ArrayView]) -> None:
    """See that all operands are on one GPU, and ready on the first one's stream."""
    if not views:
        return
    first = views[0].owner
    library = library_of(first)
    device, stream = library.device(first), library.stream(first)
    for view in views[1:]:
        own = library_of(view.owner)
        other = own.device(view.owner)
        if None not in (device, other) and other != device:
            raise ValueError(
                f"x lies on GPU {device} and another operand on GPU {other}, expected both on one; "
                "use its library to move it there first"
            )
        pointer = own.stream(view.owner)
        if pointer != stream and not SIMULATED:
            (cuda.external_stream(pointer) if pointer else cuda.default_stream()).synchronize()
