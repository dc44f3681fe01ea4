"""The gate: a kernel that has become half as slow again does not pass. `make bench-gate`.

Seconds differ between machines, and from one minute to the next. So each case is timed in turn with
a yardstick of the same kind and size on the same machine, and the ratio of the two is compared with
the stored one. Both times are the least of many short ones: noise only ever adds to a time, so the
least is what is steady. (The least of many ratios would not do: a disturbed yardstick lowers a
ratio and hides a slow kernel.)

A case fails when its ratio exceeds the stored one LIMIT times after each of TRIES, over which the
least times are kept and between which some time passes. LIMIT is as far above what noise was seen
to do as it is below the 1.5 that must be caught. A ratio far below the stored one is measured again
as well: either the yardstick was disturbed, which would hide a slow kernel, or there is good news.

Ratios are stored for each instruction set that kernels are built for; the yardstick is compiled for
the same one. A processor whose instruction set has none is measured with a narrower one that has.
They are of one processor, which is stored with them. On another the arithmetic and the memory may
stand in another proportion, so the gate is wider there (ELSEWHERE) until its ratios are stored.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from timeit import Timer
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm import machine
from fastnorm._bench.cases import Case, data
from fastnorm._bench.machine import processor
from fastnorm._bench.peers import fastnorm
from fastnorm._bench.timing import Contender, compete

from . import native
from .cases import GATE, GATE_THREADS
from .ceiling import address, mover

STORED = Path(__file__).with_name("gate.json")
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")

# Ten runs of unchanged kernels gave 0.83 to 1.17 times the stored ratios; and 0.01 once, where a
# yardstick on two threads had to wait for a processor.
LIMIT = 1.25
ELSEWHERE = 2.5  # on another processor than the stored ratios are of
LOW = 0.7
SHORT = 2e-5  # seconds
TRIES = 4
PAUSE = 5.0  # seconds before another try
PROCESSES = 3  # that are measured for the stored file
ROUNDS = 10
BLOCK = 0.02  # seconds of a turn
PAGE = 4096  # bytes, after which addresses look alike to the processor's memory

Ratios = dict[str, float]
"""By the name of a case."""

# --- One case -------------------------------------------------------------------------------------


def names() -> dict[str, tuple[Case, int]]:
    """Every case with its number of threads, by name."""
    alone = {str(case): (case, 1) for case in GATE}
    return alone | {f"{case} on 2 threads": (case, 2) for case in GATE_THREADS}


class Pair:
    """A case and its yardstick, and the least time that each has taken so far."""

    def __init__(self, case: Case, threads: int = 1, slow: float = 1.0) -> None:
        call = fastnorm(case, data(case)).call
        around = partial(fn.threads, threads)
        self.case = Contender(slowed(call, slow) if slow > 1 else call, around)
        self.yardstick = Contender(yardstick(case, threads))

    def ratio(self) -> float:
        """Time both in turn once more; return what their least times say now."""
        compete({"case": self.case, "yardstick": self.yardstick}, ROUNDS, BLOCK)
        return self.case.least / self.yardstick.least


def yardstick(case: Case, threads: int) -> Callable[[], Any]:
    """What takes its time for the same reasons: the call, the arithmetic, or memory."""
    if case.small:
        # Placed as in every other process: by where malloc puts them it took 0.55 to 0.78 µs.
        size = 4 * math.prod(case.shape)
        room = np.zeros(size + size + 3 * PAGE, np.uint8)
        start = -address(room) % PAGE
        after = start + -(-size // PAGE) * PAGE + PAGE // 2
        x, y = (room[at : at + size].view(np.float32) for at in (start, after))
        return partial(np.add, x, x, y)
    x = np.ones((case.bytes // 4096, 1024), np.float32)
    y, march = np.empty_like(x), used() if used() in LEVELS else "native"
    library, move = native.load("yardstick", march), mover(threads, case.out, march)
    if library is None or move is None:
        raise SystemExit("the gate needs a C compiler: its yardstick is compiled on the spot")
    if case.out:
        return partial(move, y, x, None)
    run = library.rows
    run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_ssize_t, ctypes.c_int]
    run.restype = None
    return lambda: run(address(y), address(x), len(x), threads)


def slowed(call: Callable[[], Any], factor: float) -> Callable[[], Any]:
    """The call, made to take `factor` times as long."""
    owed = 0.0

    def repeated() -> None:
        nonlocal owed
        owed += factor
        while owed >= 1:
            call()
            owed -= 1

    def delayed() -> None:
        start = time.perf_counter()
        call()
        end = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass

    # of the short ones many are timed at once; reading the clock would itself take too long
    return repeated if min(Timer(call).repeat(5, 1)) < SHORT else delayed


# --- All of them ----------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)  # it may be a pipe that someone watches


def judge(
    pairs: dict[str, Callable[[], float]],
    stored: Ratios,
    say: Callable[[str], object] = _say,
    pause: float = PAUSE,
    limit: float = LIMIT,
) -> list[str]:
    """Measure, again where needed; return the names of those that are too slow, or not stored.

    `pairs` holds for each case a function that measures once more and returns the ratio.
    """
    low = LOW if limit == LIMIT else 0.0
    failed = [name for name in pairs if name not in stored]
    failed += [name for name in stored if name not in pairs]
    for name in failed:
        say(f"{name}: {'is not in the stored file' if name in pairs else 'is no case any more'}")
    left = [name for name in pairs if name in stored]
    for attempt in range(TRIES):
        if attempt and left:
            say(f"again, after {pause:.0f} s: {len(left)}")
            time.sleep(pause)
        shares = {}
        for name in left:
            shares[name] = share = pairs[name]() / stored[name]
            doubt = "  is slow" if share > limit else "  is low" if share < low else ""
            say(f"{share:5.2f}  {name}{doubt}")
        left = [name for name, share in shares.items() if not low <= share <= limit]
    for name in left:
        if shares[name] < low:
            say(f"{name} has become faster; store that with make bench-gate-update")
    return failed + [name for name in left if shares[name] > limit]


def used() -> str:
    """The instruction set that fastnorm's kernels use in this process."""
    return str((fn.show_config("dicts") or {})["cpu"]["instruction set used"])


def at_level(level: str, *arguments: str) -> int:
    """The exit status of this program in another process, for at most this instruction set."""
    command = [sys.executable, "-m", "benchmarks.gate", *arguments]
    return subprocess.run(command, env=os.environ | {"FASTNORM_CPU": level}).returncode


def load() -> dict[str, Ratios]:
    """The stored ratios, by instruction set."""
    found: dict[str, Ratios] = json.loads(STORED.read_text(encoding="utf-8"))["ratios"]
    return found


def limit() -> float:
    """How many times the stored ratio may be reached on this processor."""
    there = json.loads(STORED.read_text(encoding="utf-8"))["processor"]
    if there == processor():
        return LIMIT
    print(f"the ratios are of {there}, and this is {processor()}: make bench-gate-update stores it")
    return ELSEWHERE


def levels(widest: str) -> tuple[str, ...]:
    """The instruction sets that one includes, itself the last of them."""
    return LEVELS[: LEVELS.index(widest) + 1] if widest in LEVELS else ()


def chosen(widest: str, stored: Iterable[str]) -> list[str]:
    """Those that have stored ratios."""
    return [level for level in levels(widest) if level in stored]


def check(slow: tuple[str, str] | None) -> int:
    """Run the gate in this process; return the exit status."""
    every, stored = names(), load().get(used())
    if stored is None:
        raise SystemExit(f"{STORED} has no ratios for {used()}")
    factors = {} if slow is None else {slow[1]: float(slow[0])}
    if unknown := set(factors) - set(every):
        raise SystemExit(f"no case is called {unknown.pop()!r}; there are {', '.join(every)}")
    pairs = {
        name: Pair(case, threads, factors.get(name, 1.0)).ratio
        for name, (case, threads) in every.items()
        if threads <= machine.here.cores
    }
    if machine.here.cores < 2:  # the stored ones are of two
        stored = {k: v for k, v in stored.items() if every.get(k, (None, 1))[1] == 1}
    allowed = limit()
    print(f"{used()}: how many times as slow as stored; fails above {allowed}")
    start = time.monotonic()
    failed = judge(pairs, stored, limit=allowed)
    took = f"{time.monotonic() - start:.0f} s"
    print(f"failed: {', '.join(failed)} ({took})" if failed else f"all passed ({took})")
    return 1 if failed else 0


def measure(path: Path) -> int:
    """Write the ratios of this process into a file."""
    ratios = {}
    for name, (case, threads) in names().items():
        pair = Pair(case, threads)
        ratios[name] = [pair.ratio() for _ in range(2)][-1]
        _say(f"{used()} {ratios[name]:8.3f}  {name}")
    path.write_text(json.dumps(ratios), encoding="utf-8")
    return 0


def update() -> int:
    """Store the median of several processes, for each instruction set that is to be had.

    Where an array comes to lie differs between processes, and some calls take 10 % longer for it.
    """
    stored: dict[str, Ratios] = {}  # all anew: they are of one processor
    for level in levels(used()):
        found: list[Ratios] = []
        for _ in range(PROCESSES):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "ratios.json")
                if at_level(level, "--measure", str(path)):
                    return 1
                found.append(json.loads(path.read_text(encoding="utf-8")))
        medians = {name: statistics.median(ratios[name] for ratios in found) for name in found[0]}
        stored[level] = {name: float(f"{ratio:.4g}") for name, ratio in medians.items()}
    everything = {"processor": processor(), "ratios": dict(sorted(stored.items()))}
    text = json.dumps(everything, indent=1, ensure_ascii=False)
    STORED.write_text(text + "\n", encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--update", action="store_true", help="store what is measured now")
    parser.add_argument("--all", action="store_true", help="every instruction set, not the best")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run it N times")
    parser.add_argument(
        "--slow", nargs=2, metavar=("FACTOR", "CASE"), help="slow one case down, to see it fail"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if fn.get_backend() != "cython":
        raise SystemExit("the gate is for the compiled kernels, and they are not in use")
    if options.measure:
        return measure(options.measure)
    if options.here:
        return check(options.slow)
    if options.update:
        return update()
    able = chosen(used(), load())
    if not able:
        raise SystemExit(f"no ratios are stored for {used()}, nor for a part of it, in {STORED}")
    slow = ["--slow", *options.slow] if options.slow else []
    runs = (able if options.all else able[-1:]) * options.repeat
    statuses = [at_level(level, "--here", *slow) for level in runs]
    if len(runs) > 1:
        print(f"{statuses.count(0)} of {len(runs)} runs passed")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
