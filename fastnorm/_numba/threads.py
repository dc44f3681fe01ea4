"""How many threads a kernel runs in, and when it runs in none but the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba

from fastnorm import runtime


def _takes_several() -> bool:
    """Whether several of Python's threads may meet in the layer that Numba's threads come from."""
    try:
        return numba.threading_layer() in ("omp", "tbb")
    except ValueError:  # none has started
        return False


# Of a layer in which two may not meet: that ends the process.
_sharing = threading.Lock()


def run(kernel_of: Callable[[bool], Any], items: int, threads: int, *args: Any) -> None:
    """Let up to so many threads share the items of a kernel: each takes as many, side by side.

    `kernel_of` returns the kernel, compiled for several threads or for one.
    """
    # OpenMP, of which Numba's threads may be, ends or hangs a forked child that asks it for some
    threads = 1 if runtime.forked else min(threads, items, numba.config.NUMBA_NUM_THREADS)
    if threads <= 1:
        kernel_of(False)(1, items, *args)
        return
    kernel = kernel_of(True)
    locked = False
    if not _takes_several():
        # the count does not know threads that were started without `threading`, the lock does
        locked = threading.active_count() == 1 and _sharing.acquire(blocking=False)
        if not locked:
            kernel_of(False)(1, items, *args)
            return
    try:
        before = numba.get_num_threads()  # of this thread; theirs who called
        if before != threads:
            numba.set_num_threads(threads)
        try:
            kernel(threads, items, *args)
        finally:
            if before != threads:
                numba.set_num_threads(before)
    finally:
        if locked:
            _sharing.release()
