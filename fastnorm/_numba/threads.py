"""How a kernel is shared out among Numba's threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numba

from fastnorm import runtime
from fastnorm._numba.compiling import CHECKED, compiling

# Of a layer in which two of Python's threads may not meet: that ends the process.
_sharing = threading.Lock()


def _takes_several() -> bool:
    """Whether several of Python's threads may meet in the layer that Numba's threads come from."""
    try:
        return numba.threading_layer() in ("omp", "tbb")
    except ValueError:  # none has started
        return False


@contextmanager
def _held(threads: int) -> Iterator[int]:
    """So many threads, or one where the layer cannot give any now."""
    # OpenMP, of which Numba's threads may be, ends or hangs a forked child that asks it for some
    threads = 1 if runtime.forked else min(threads, numba.config.NUMBA_NUM_THREADS)
    if threads == 1 or _takes_several():
        yield threads
    # the count does not know threads that were started without `threading`, the lock does
    elif threading.active_count() > 1 or not _sharing.acquire(blocking=False):
        yield 1
    else:
        try:
            yield threads
        finally:
            _sharing.release()


@cache
def warm_for(*kinds: Any) -> set[Any]:
    """Kernels that were called before for arrays of these kinds."""
    return set()


def share(
    kernel: tuple[Any, Any], warm: set[Any], threads: int, task: int, items: int, *given: Any
) -> None:
    """Carry out so many items by the kernel for one thread or by that for several."""
    alone, shared = kernel
    threads = min(threads, items)
    if threads <= 1 or CHECKED:  # an error in one of several threads ends in no exception
        run(alone, warm, task, items, *given)
        return
    with _held(threads) as held:
        if held == 1:
            run(alone, warm, task, items, *given)
            return
        before = numba.get_num_threads()  # of this thread; theirs who called
        numba.set_num_threads(held)
        try:
            run(shared, warm, task, items, *given, held)
        finally:
            numba.set_num_threads(before)


def run(kernel: Any, warm: set[Any], *given: Any) -> None:
    """Call a kernel; who waits for it to be compiled is told."""
    if kernel in warm:
        kernel(*given)
        return
    with compiling():
        kernel(*given)
    warm.add(kernel)
