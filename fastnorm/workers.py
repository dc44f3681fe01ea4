"""Processes that share work, and end at once when their user wants them to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
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
    pool = ProcessPoolExecutor(count, context, _begin, (initializer,))
    try:
        yield pool
    except BaseException:  # what they are at is of no use any more
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(initializer: Callable[[], Any] | None) -> None:
    """Begin a process: it ends with the one that started it, which it would wait for for ever."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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


# It ends by itself when its stdin does: with the process that started it, however that goes.
_BUSY = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print(flush=True)
while True:
    pass
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """As many processes that compute for nothing, each on one thread, inside a ``with`` block."""
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            with interrupts_held():
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BUSY],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                stack.callback(_end, process)
            started.append(process)
        for process in started:
            if process.stdout is not None:
                process.stdout.readline()  # it computes
        yield


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes its pipes and waits
        process.kill()
