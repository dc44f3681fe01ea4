"""What a process and a context choose: threads, backend, and the memory that is kept.

Nothing here computes. The kernels are told of each choice, so that a cached call asks no Python.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastnorm import _core, limits, machine

Array = NDArray[Any]

# --- Choices of a context -------------------------------------------------------------------------


class Choice:
    """What one `with` block has chosen; compared by identity."""

    __slots__ = ("backend", "serial", "threads")

    def __init__(
        self, backend: str | None = None, threads: int | None = None, serial: bool = False
    ) -> None:
        self.backend, self.threads, self.serial = backend, threads, serial


class _Here(NamedTuple):
    """What the `with` blocks around have chosen; the kernels read the first two by their place."""

    answers: bool | None  # whether calls are answered from plans; None: as in the process
    kernel_threads: int  # 0: as in the process
    backend: str | None
    threads: int | None
    choices: tuple[Choice, ...]  # from the outermost in


# A thread begins with none, a task with those of where it was made.
_here: ContextVar[_Here | None] = ContextVar("fastnorm", default=None)


def _choose(choices: tuple[Choice, ...]) -> None:
    backend = threads = None
    serial = False
    for choice in choices:
        backend = choice.backend or backend
        threads = choice.threads or threads
        serial |= choice.serial
    answers = None if backend is None else backend == "cython"
    kernel_threads = 1 if serial else min(threads or 0, MOST_THREADS)
    if _core.kernels is not None:
        _core.kernels.set_scope(_here)
    _here.set(_Here(answers, kernel_threads, backend, threads, choices) if choices else None)


@contextmanager
def scope(choice: Choice) -> Iterator[None]:
    """Add a choice to this context's; in the end take away this one, whatever came after it.

    A generator may end after blocks that began later, or in another context, where it is not found.
    """
    here = _here.get()
    _choose((*(here.choices if here else ()), choice))
    try:
        yield
    finally:
        here = _here.get()
        if here is not None:
            _choose(tuple(other for other in here.choices if other is not choice))


# --- The process's backend ------------------------------------------------------------------------

_current = ""


def _tell_kernels() -> None:
    """Tell the kernels what cached calls need to know of the process."""
    if _core.kernels is not None:
        n, limit = (min(n, MOST_THREADS) for n in (_threads, _limit or MOST_THREADS))
        _core.kernels.set_state(_current == "cython", n, limit)


def set_process_backend(name: str) -> None:
    """Make `name` what computes where no context has chosen."""
    global _current
    _current = name
    _tell_kernels()


def chosen_backend() -> str:
    """The backend of this context, or else the process's."""
    here = _here.get()
    return _current if here is None or here.backend is None else here.backend


# --- Threads --------------------------------------------------------------------------------------

# Whether this process is a forked child. The compiled kernels work there as anywhere.
forked = False


def _in_child() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

# However many are asked for, kernels start no more: threads beyond the processors gain nothing.
MOST_THREADS = max(64, os.cpu_count() or 1)


def _default_threads() -> int:
    value = os.environ.get("FASTNORM_NUM_THREADS", "").strip()
    if value:
        n = limits.whole_number(value)
        if not n:
            raise ValueError(
                f"FASTNORM_NUM_THREADS={value!r} is no number of threads: set it to 1 or more, or "
                "unset it"
            )
        return n
    # OpenMP's is a list, one for each level of nesting; what OpenMP does not take is passed over
    n = limits.whole_number(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
    return n if n and n < 1 << 31 else machine.here.cores


_threads = _default_threads()
# What others have limited the process to (threadpools.py), or None.
_limit: int | None = None


def kernel_threads() -> int:
    """How many threads a kernel may use here."""
    here = _here.get()
    return min((here and here.kernel_threads) or _threads, _limit or MOST_THREADS, MOST_THREADS)


def process_threads() -> int:
    """The largest number of threads a call may use where no context has chosen."""
    return min(_threads, _limit or _threads)


def limit_threads(n: int) -> None:
    """Use no more than `n` threads, whatever has been chosen, until `set_num_threads`.

    As many as the process has chosen are no limit: so one ends, when what was before is set again.
    """
    global _limit
    _limit = max(n, 1) if n < _threads else None
    _tell_kernels()


def serial() -> AbstractContextManager[None]:
    """Run kernels on one thread inside a ``with`` block, between products of matrices.

    BLAS and OpenMP, of which Numba's threads may be, each keep their threads spinning after a call.
    Where the two take turns on the same processors they wait for each other.
    """
    return scope(Choice(serial=True))


def _number_of_threads(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"num_threads is {n!r:.60}, expected a whole number, 1 or more")
    return int(n)


def set_num_threads(n: int) -> None:
    """Set the largest number of threads a call may use, for the whole process.

    Results do not depend on it, bit for bit. Small arrays use one thread whatever it is. Inside
    ``with fn.threads(...)`` that block's own choice stays.

    Parameters
    ----------
    n
        1 or more. At import it is ``FASTNORM_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the
        number of processors that this process may use, by its affinity and its container's quota.
        Kernels start 64 threads at most, or one for each processor of the machine.

    Raises
    ------
    ValueError
        If `n` is not a whole number, or is less than 1.

    Examples
    --------
    >>> import fastnorm as fn
    >>> before = fn.get_num_threads()
    >>> fn.set_num_threads(1)
    >>> fn.get_num_threads()
    1
    >>> fn.set_num_threads(before)
    """
    global _threads, _limit
    _threads, _limit = _number_of_threads(n), None
    _tell_kernels()


def get_num_threads() -> int:
    """Return the largest number of threads a call may use.

    Returns
    -------
    int
        What was asked for, or fewer inside ``threadpoolctl.threadpool_limits``.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.get_num_threads() >= 1
    True
    """
    here = _here.get()
    n = (here and here.threads) or _threads
    return min(n, _limit or n)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use at most `n` threads inside a ``with`` block.

    The choice is this context's, as with :func:`backend`.

    Parameters
    ----------
    n
        As for :func:`set_num_threads`.

    Raises
    ------
    ValueError
        If `n` is not a whole number, or is less than 1.

    Examples
    --------
    >>> import fastnorm as fn
    >>> with fn.threads(1):
    ...     print(fn.get_num_threads())
    1
    """
    with scope(Choice(threads=_number_of_threads(n))):
        yield


# --- The machine ----------------------------------------------------------------------------------


@contextmanager
def on_machine(other: machine.Machine) -> Iterator[None]:
    """Take schedules for another machine inside a ``with`` block: the whole process, for tests."""
    before = machine.exchange(other)
    _forget_schedules()
    try:
        yield
    finally:
        machine.exchange(before)
        _forget_schedules()


def _forget_schedules() -> None:
    if _core.kernels is not None:
        _core.kernels.forget()


# --- Memory ---------------------------------------------------------------------------------------


def _empty_like(array: Array) -> Array:
    return np.empty_like(array, subok=False)


# Memory for a result, in the order of another array: from what is kept, where there is any.
empty_like: Callable[[Array], Array] = getattr(_core.kernels, "empty_like", _empty_like)


def trim_memory() -> int:
    """Give the memory that is kept for results back to the system.

    Results of 256 kB and more come from memory that is kept when they are freed, up to
    ``FASTNORM_KEEP_MB``. Arrays in use are not touched, and later results are kept again.

    Returns
    -------
    int
        How many bytes that was.

    Examples
    --------
    >>> import fastnorm as fn
    >>> freed = fn.trim_memory()
    >>> fn.trim_memory()
    0
    """
    return 0 if _core.kernels is None else int(_core.kernels.trim())
