"""Threads, forks, exits and signals at once: nothing hangs, no bit is wrong.

    python -m tests.stress                       # a minute
    python -m tests.stress --seconds 1200        # twenty, as before a release
    python -m tests.stress --seed 17 --programs 1    # one of them again

One random program after the other, two at a time. In each, several threads call functions of many
shapes, and compare every bit with what one thread gave. Meanwhile it forks, and children do the
same, fork, and end or are killed; a timer's signals call kernels, Ctrl-C comes during others; and
numbers of threads change. It ends in one of many ways, while threads are at work. Now and then
it is the threads alone, in C, under ThreadSanitizer.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import fastnorm as fn

ROOT = Path(__file__).parent.parent
SECONDS = 60.0
PATIENCE = 300  # seconds, after which a program hangs
CHILD_PATIENCE = 120
AT_ONCE = 2
PROGRAM = ("-m", "tests.stress")  # what Python is called with
SANITIZED = 150  # programs from one run under ThreadSanitizer to the next

Array = np.ndarray[Any, Any]


# --- One program ----------------------------------------------------------------------------------


class Wrong(BaseException):
    """No Exception: nothing catches it by chance."""


class Program:
    """Calls, what is right for them, and what is done meanwhile; all of it follows from a seed."""

    def __init__(self, seed: int, backend: str) -> None:
        self.rng = random.Random(seed)
        self.counts = {"calls": 0, "forks": 0}
        fn.set_backend(backend)
        with fn.threads(1):
            self.calls = [(f, f()) for f in self._functions(np.random.default_rng(seed))]
        self.stop = time.monotonic() + self.rng.uniform(0.5, 3)

    def _functions(self, numbers: np.random.Generator) -> list[Callable[[], Any]]:
        def array(*shape: int) -> Array:
            return numbers.standard_normal(shape, np.float32)

        rows, small, planes = array(3000, 500), array(5, 50), array(6, 32, 40, 40)
        long, last = array(2, 400_000), np.moveaxis(array(6, 30, 30, 64), -1, 1)
        big = array(2200, 2000)  # its result of 17 MB is kept
        _, mean, rstd = fn.layer_norm(rows, 500, return_stats=True)
        given = numbers.random((6, 32, 40, 40)) < 0.5
        every: list[Callable[[], Any]] = [
            lambda: fn.layer_norm(rows, 500),
            lambda: fn.layer_norm(small, 50),
            lambda: fn.rms_norm(long, 400_000),
            lambda: fn.layer_norm(big, 2000),
            lambda: fn.group_norm(planes, 8, activation="silu"),
            lambda: fn.group_norm(last, 8),
            lambda: fn.instance_norm(planes, where=given),
            lambda: fn.batch_norm(planes, training=True),
            lambda: fn.batch_norm(last, training=True),
            lambda: fn.layer_norm_backward(rows[::-1], rows, mean, rstd, 500),
        ]
        return self.rng.sample(every, self.rng.randint(3, len(every)))

    def check(self, rng: random.Random) -> None:
        """Any call; every bit is compared."""
        call, right = rng.choice(self.calls)
        for found, expected in zip(_tuple(call()), _tuple(right)):
            bits = [v.view(f"u{v.itemsize}") for v in (found, expected)]
            if not np.array_equal(*bits):
                raise Wrong("a bit is wrong")
        self.counts["calls"] += 1

    # what goes on in threads

    def work(self, seed: int, endless: bool) -> None:
        rng = random.Random(seed)
        try:
            while endless or time.monotonic() < self.stop:
                with fn.threads(rng.choice((1, 2, 3, 8))):
                    self.check(rng)
                if rng.random() < 0.2:
                    time.sleep(rng.random() / 500)
        except BaseException as error:
            give_up(error)

    def start(self, endless: bool) -> threading.Thread:
        thread = threading.Thread(
            target=self.work, args=(self.rng.random(), endless), daemon=endless
        )
        thread.start()
        return thread

    # what the first thread does

    def fork(self, depth: int = 0) -> None:
        """A child that does the same, and ends by itself or not."""
        self.counts["forks"] += 1
        end = self.rng.choice(("leaves", "exits", "exits", "is killed", "is ended"))
        seed = self.rng.random()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._be_a_child(random.Random(seed), end, depth)
        if end.startswith("is "):
            time.sleep(self.rng.random() / 50)
            os.kill(child, signal.SIGKILL if end == "is killed" else signal.SIGTERM)
        limit = time.monotonic() + CHILD_PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > limit:
                os.kill(child, signal.SIGKILL)
                raise Wrong("a forked child hangs")
            time.sleep(0.001)
        code = os.waitstatus_to_exitcode(ended[1])
        if code not in {"is killed": (0, -9), "is ended": (0, -15)}.get(end, (0,)):
            raise Wrong(f"a forked child that {end} returned {code}")

    def _be_a_child(self, rng: random.Random, end: str, depth: int) -> NoReturn:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.rng, self.stop = rng, time.monotonic() + rng.random() / 5
            if rng.random() < 0.5:
                self.start(endless=True)
            for _ in range(rng.randint(1, 6)):
                self.check(rng)
            if depth < 2 and rng.random() < 0.3:
                self.fork(depth + 1)
            if end == "exits":
                sys.exit(0)  # through the handlers of the end, with threads at work
            os._exit(0)
        except SystemExit:
            raise
        except BaseException as error:
            give_up(error)

    def interrupt(self) -> None:
        """Ctrl-C during a kernel is raised once, after it."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        limit = time.monotonic() + 60
        try:
            wait = self.rng.random() / 200
            threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)).start()
            while time.monotonic() < limit:
                self.check(self.rng)
        except KeyboardInterrupt:
            return
        raise Wrong("no KeyboardInterrupt")

    def change(self) -> None:
        fn.set_num_threads(self.rng.choice((1, 2, 3, 5, 16)))
        if self.rng.random() < 0.3:
            fn.trim_memory()

    def handle(self, *_: Any) -> None:
        """A timer's signal, which comes once more when this one is done."""
        try:
            self.check(self.rng)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            give_up(error)
        signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(0.001, 0.02))

    def run(self) -> None:
        atexit.register(self.check, random.Random(0))
        endless = self.rng.random() < 0.5
        started = [self.start(endless) for _ in range(self.rng.randint(1, 5))]
        if self.rng.random() < 0.5:
            signal.signal(signal.SIGALRM, self.handle)
            signal.setitimer(signal.ITIMER_REAL, 0.005)
        acts = [lambda: self.check(self.rng)] * 6 + [self.fork] * 2 + [self.change]
        acts += [self.interrupt] if self.rng.random() < 0.3 else []
        while time.monotonic() < self.stop:
            self.rng.choice(acts)()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not endless:
            for thread in started:
                thread.join()

    def end(self) -> None:
        """In one of the ways in which processes end; what is printed says in which."""
        how = self.rng.choice((*ENDS, "returns", "returns"))
        told = " ".join(f"{n} {what}," for what, n in self.counts.items())
        os.write(1, f"{told} ends: {how}\n".encode())
        if how == "leaves":
            os._exit(0)
        if ENDS.get(how, 0) < 0:
            number = -ENDS[how]
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if how == "raises":
            sys.exit(3)


# How a program may end, and what it returns then.
ENDS = {"returns": 0, "leaves": 0, "raises": 3, "killed": -9, "ended": -15, "interrupted": -2}


def _tuple(value: Any) -> tuple[Array, ...]:
    return value if isinstance(value, tuple) else (value,)


def give_up(error: BaseException) -> NoReturn:
    """End at once, of whatever thread or child."""
    os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(70)


def one(seed: int, backend: str) -> None:
    try:
        program = Program(seed, backend)
        program.run()
    except SystemExit:  # a forked child's
        raise
    except BaseException as error:
        give_up(error)
    program.end()


# --- All of them ----------------------------------------------------------------------------------


def judged(seed: int, backend: str) -> tuple[int, int, str]:
    """Calls, forks, and what is wrong: nothing, as a rule."""
    command = [sys.executable, "-W", "ignore", *PROGRAM, "--one", backend, "--seed", str(seed)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            _kill(process)
            out, err = process.communicate()
            return 0, 0, f"hangs\n{out}{err}"
        _kill(process)  # whom it may have left behind
    counted, _, how = out.strip().rpartition(" ends: ")
    words = counted.split()
    if how not in ENDS or process.returncode != ENDS[how] or err:
        return 0, 0, f"returned {process.returncode}\n{out}{err}"
    return int(words[0]), int(words[2]), ""


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def sanitized() -> str:
    """The threads alone under ThreadSanitizer: what is wrong."""
    command = [sys.executable, "-m", "tests.kernels", "threads"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return f"ThreadSanitizer\n{run.stdout}{run.stderr}" if run.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S")
    parser.add_argument("--programs", type=int, default=1 << 30, metavar="N", help="at most")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first program")
    parser.add_argument("--backend", help="of all of them (default: each that has kernels)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.seed, given.one)
        return 0
    from .helpers import BACKENDS

    names = [given.backend] if given.backend else [n for n in BACKENDS if n != "numpy"]
    stop = time.monotonic() + given.seconds
    calls = forks = programs = faults = 0
    lock, numbers = threading.Lock(), iter(range(given.seed, given.seed + given.programs))

    def run() -> None:
        nonlocal calls, forks, programs, faults
        while time.monotonic() < stop:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            # most of them the first, whose threads are our own
            backend = names[number % 5 == 4 and len(names) > 1]
            found = judged(number, backend)
            wrong = found[2]
            if number % SANITIZED == SANITIZED - 1:
                wrong = wrong or sanitized()
            with lock:
                calls, forks, programs = calls + found[0], forks + found[1], programs + 1
                if wrong:
                    faults += 1
                    again = f"--programs 1 --seed {number} --backend {backend}"
                    print(f"python -m tests.stress {again}: {wrong}", flush=True)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for future in [pool.submit(run) for _ in range(AT_ONCE)]:
            future.result()
    print(f"{programs} programs, {calls} calls, {forks} forks: {faults} faults")
    return int(faults > 0 or programs == 0)


if __name__ == "__main__":
    sys.exit(main())
