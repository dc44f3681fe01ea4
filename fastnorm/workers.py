"""Processes that share work, and end at once when their user wants them to."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def processes(
    count: int, initializer: Callable[[], Any] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Processes of their own, started and not forked; an error, or Ctrl-C, ends them at once.

    A child forked from a process that has used threads could wait for one for ever. Tasks must be
    handed out under `interrupts_held`, which is when the processes start.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer)
    try:
        yield pool
    except BaseException:  # what they are at is of no use any more
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits meanwhile, and never reaches a process that is started here."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
