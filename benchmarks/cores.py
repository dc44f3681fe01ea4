"""How time goes with the number of threads: a model, from what one core does.

    python -m benchmarks.cores           # 2 minutes; prints tables and keeps them in results/
    python -m benchmarks.cores --short   # a look, which keeps nothing

What is measured, on this machine (`Facts`):
- the time of each function on one thread, by the size of x: the curve of one core;
- the bytes that a copy moves in a second, on one core and on all: what memory gives them;
- how long it takes to hand work to a thread that is awake.

What follows (`predicted`): each of n threads takes its share of the items. It works at the rate
that the curve has for a share, where that stays in the core's own cache, and for the whole array
elsewhere. Nothing goes faster than memory gives n cores. Handing out takes as long for each
doubling of threads, and partial sums of gradients are merged by one of them.

Predictions are compared with times of one thread and two, of sizes that are not on the curve: 15 %
is what they may be off. For more cores than were measured, what memory gives is assumed, and said.
"""

from __future__ import annotations

import math
import statistics
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm import machine
from fastnorm._bench import text
from fastnorm._bench.cases import Case, data
from fastnorm._bench.peers import PEERS
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, compete
from fastnorm.backends import recorder
from fastnorm.runtime import on_machine
from fastnorm.schedule import BackwardSchedule, ForwardSchedule

from . import ceiling, kept
from .threads import FUNCTIONS

ASKED = 0.15
# 1 kB to 64 MB, in smaller steps where the caches end
CURVE = (*(1024 << i for i in range(11)), *(round((1 << 21) * 2 ** (i / 2)) for i in range(11)))
CHECKED = tuple(196_608 << i for i in range(0, 9, 2))  # 192 kB to 48 MB: between those
COPIED = 96 << 20
HANDED_OUT = 1 << 15  # bytes of x, so few that handing out is most of the time
CELL = 16  # bytes: two partial sums


@dataclass(frozen=True)
class Facts:
    """What was measured of a machine."""

    curves: dict[str, dict[int, float]]  # seconds of one thread, by function and bytes of x
    copy_one: float  # bytes in a second, read and written
    copy_all: float
    cores: int
    hand_out: float  # seconds, to one thread
    l2: int
    last_cache: int

    def alone(self, function: str, size: float) -> float:
        """Seconds of one thread, between the sizes that were measured."""
        curve = self.curves[function]
        sizes = sorted(curve)
        i = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        low, high = sizes[i - 1], sizes[i]
        along = (math.log(size) - math.log(low)) / (math.log(high) - math.log(low))
        return math.exp((1 - along) * math.log(curve[low]) + along * math.log(curve[high]))

    def per_byte(self, function: str, size: float) -> float:
        """Seconds for a byte of x, without what a call costs whatever its size."""
        least = min(self.curves[function].values())
        return max(self.alone(function, size) - least, 0.0) / size

    def memory(self, threads: int) -> float:
        """Bytes in a second that memory gives so many cores, as far as it was measured."""
        if threads <= 1 or self.cores <= 1:
            return self.copy_one
        # from one to all, in equal steps
        along = min((threads - 1) / (self.cores - 1), 1.0)
        return self.copy_one + along * max(self.copy_all - self.copy_one, 0.0)


@dataclass(frozen=True)
class Work:
    """What the schedule of a call says."""

    bytes: int  # of x
    units: int  # that are shared out
    max_threads: int  # 0: as many as there are
    merged: int  # bytes of partial sums
    non_temporal: bool
    arrays: int  # of x's size, read and written

    def threads(self, threads: int) -> int:
        return min(threads, self.max_threads or threads, max(self.units, 1))


def work(case: Case) -> Work:
    """As it would be on the machine at hand, without a call."""
    call = PEERS["fastnorm"](case, data(case)).call
    with recorder.recording() as asked:
        call()
    (asked_for,) = asked
    found = asked_for.schedule(machine.here)
    names = dict(asked_for.dtypes)
    arrays = sum(name in names for name in ("x", "dy", "y", "dx"))
    units, merged = _shared(found)
    return Work(found.bytes, units, found.max_threads, merged, found.non_temporal, arrays)


def _shared(found: ForwardSchedule | BackwardSchedule) -> tuple[int, int]:
    if isinstance(found, ForwardSchedule):
        return found.items * found.blocking.splits, 0
    fixed = found.blocking
    if fixed.sweeps:
        return fixed.owners * fixed.sharers * fixed.segments, 0
    return fixed.owners * fixed.parts, fixed.owners * fixed.parts * fixed.cells * CELL


def predicted(
    facts: Facts,
    function: str,
    given: Work,
    threads: int,
    memory: Callable[[int], float] | None = None,
) -> float:
    """Seconds of a call; `memory` says what it gives so many cores, where that is assumed."""
    n = given.threads(threads)
    if n == 1:
        return facts.alone(function, given.bytes)
    gives = memory or facts.memory
    # the most that one thread takes, where the units do not come out even
    share = given.bytes * math.ceil(given.units / n) / given.units
    own = share * given.arrays <= facts.l2 and not given.non_temporal
    least = min(facts.curves[function].values())
    computed = share * facts.per_byte(function, share if own else given.bytes)
    if given.bytes * given.arrays > facts.last_cache:
        # of what one core draws from memory, n draw as much as it gives them
        drawn = given.bytes * facts.per_byte(function, given.bytes) * facts.copy_one / gives(n)
        computed = max(computed, drawn)
    merging = given.merged / facts.copy_one
    return least + computed + merging + facts.hand_out * math.log2(n)


# --- Measuring ------------------------------------------------------------------------------------


def measured(rounds: int, seconds: float, sizes: Sequence[int] = CURVE) -> Facts:
    here = machine.here
    curves: dict[str, dict[int, float]] = {}
    for name, of in FUNCTIONS.items():
        kept.say(f"one thread: {name}")
        found: dict[int, float] = {}
        for size in sizes:
            case = of(size)
            found[case.bytes] = _time(case, 1, rounds, seconds)
        curves[name] = steadied(found)
    one, every = (_copy(n, rounds, seconds) for n in (1, here.cores))
    handed = _hand_out(rounds, seconds) if here.cores > 1 else 0.0
    return Facts(curves, one, every, here.cores, handed, here.l2, here.last_cache)


def steadied(curve: dict[int, float]) -> dict[int, float]:
    """No size takes longer than a larger one: what it seems to take longer is others' doing."""
    least, found = math.inf, {}
    for size in sorted(curve, reverse=True):
        least = min(least, curve[size])
        found[size] = least
    return dict(sorted(found.items()))


def _time(case: Case, threads: int, rounds: int, seconds: float) -> float:
    contender = Contender(PEERS["fastnorm"](case, data(case)).call, partial(fn.threads, threads))
    compete({"fastnorm": contender}, rounds, seconds)
    return contender.seconds


def _copy(threads: int, rounds: int, seconds: float) -> float:
    """Of the fastest way to move bytes, so many threads at once."""
    x = np.ones(COPIED // 8)
    y = np.empty_like(x)
    moves = [ceiling.mover(threads, past) for past in (False, True)]
    ways = {i: Contender(partial(move, y, x, None)) for i, move in enumerate(moves) if move}
    if not ways:
        ways = {0: Contender(partial(np.copyto, y, x))}
    compete(ways, rounds, seconds)
    return 2 * x.nbytes / min(way.seconds for way in ways.values())


def _hand_out(rounds: int, seconds: float) -> float:
    """What two threads take longer than half of the time of one."""
    case = FUNCTIONS["layer"](HANDED_OUT)
    call = PEERS["fastnorm"](case, data(case)).call
    least = _time(FUNCTIONS["layer"](1024), 1, rounds, seconds)
    two = machine.here.with_measured({"serial_bytes": 1, "wake_bytes": 1})
    with on_machine(two):
        ways = {n: Contender(call, partial(fn.threads, n)) for n in (1, 2)}
        compete(ways, rounds, seconds)
    one, both = (ways[n].seconds for n in (1, 2))
    return max(both - least - (one - least) / 2, 0.0)


def checks(facts: Facts, rounds: int, seconds: float, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Predictions and times of one thread and two; two on a machine that has them."""
    rows = []
    for name, of in FUNCTIONS.items():
        for size in sizes:
            case = of(size)
            given = work(case)
            for threads in (1, 2)[: facts.cores]:
                kept.say(f"{case}, {threads} threads")
                rows.append(
                    {
                        "function": name,
                        "case": str(case),
                        "bytes": given.bytes,
                        "threads": threads,
                        "measured": _time(case, threads, rounds, seconds),
                        "predicted": predicted(facts, name, given, threads),
                    }
                )
    return rows


# --- More cores than there are --------------------------------------------------------------------

THREADS = (1, 2, 4, 8, 16, 32, 64, 128)
EXAMPLES = {
    "layer, 3 MB": ("layer", 3 << 20),
    "layer, 64 MB": ("layer", 64 << 20),
    "group, 64 MB": ("group", 64 << 20),
    "batch, training, 64 MB": ("batch, training", 64 << 20),
    "layer, backward, 64 MB": ("layer, backward", 64 << 20),
}
# Assumed, of no machine in particular: 80 % of twelve channels of DDR5-4800, for 64 cores.
SOCKET_BYTES, SOCKET_CORES = 0.8 * 12 * 38.4e9, 64


def socket(facts: Facts, sockets: int, touched_by_one: bool) -> Callable[[int], float]:
    """What memory gives n cores: sockets are filled one after the other.

    Where one thread has touched all pages first, they all lie with its socket.
    """

    def gives(threads: int) -> float:
        used = min(math.ceil(threads / SOCKET_CORES), sockets)
        return min(threads * facts.copy_one, SOCKET_BYTES * (1 if touched_by_one else used))

    return gives


def forecast(facts: Facts) -> list[dict[str, Any]]:
    """How many times as fast as on one thread: computed, not measured."""
    rows = []
    for label, (name, size) in EXAMPLES.items():
        given = work(FUNCTIONS[name](size))
        for pages, one in (("touched by those who use them", False), ("touched by one", True)):
            memory = socket(facts, 2, one)
            times = {n: predicted(facts, name, given, n, memory) for n in THREADS}
            faster = {str(n): times[1] / times[n] for n in THREADS}
            rows.append({"example": label, "pages": pages, "faster": faster})
    return rows


# --- The page -------------------------------------------------------------------------------------


def off(row: dict[str, Any]) -> float:
    """By how much a prediction is off, as a share of what was measured."""
    return abs(float(row["predicted"]) / float(row["measured"]) - 1)


def lines(facts: Facts, checked: Sequence[dict[str, Any]], ahead: Sequence[Any]) -> list[str]:
    page = [
        (
            f"A copy moves {facts.copy_one / 1e9:.1f} GB/s on one core, "
            f"{facts.copy_all / 1e9:.1f} on {facts.cores}. "
            f"Work is handed to a thread in {text.seconds(facts.hand_out)}."
        ),
        "",
        "| case | threads | measured | predicted | off by |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in checked:
        share = f"{off(row):.0%}"
        page.append(
            f"| {row['case']} | {row['threads']} | {text.seconds(row['measured'])} | "
            f"{text.seconds(row['predicted'])} | {f'**{share}**' if off(row) > ASKED else share} |"
        )
    for threads in sorted({row["threads"] for row in checked}):
        shares = [off(row) for row in checked if row["threads"] == threads]
        page.append(
            f"| median, and most, of {threads} | {threads} | | | "
            f"**{statistics.median(shares):.0%}**, {max(shares):.0%} |"
        )
    page += [
        "",
        (
            "Computed, not measured: how many times as fast as one thread, with such cores, two "
            f"sockets of {SOCKET_CORES} and {SOCKET_BYTES / 1e9:.0f} GB/s each."
        ),
        "",
        f"| call | pages | {' | '.join(map(str, THREADS))} |",
        f"| --- | --- |{' ---: |' * len(THREADS)}",
    ]
    for row in ahead:
        cells = " | ".join(f"{row['faster'][str(n)]:.1f}" for n in THREADS)
        page.append(f"| {row['example']} | {row['pages']} | {cells} |")
    return page


def main() -> int:
    given = kept.parser("cores", __doc__).parse_args()
    if fn.get_backend() != "cython":
        raise SystemExit("this is for the compiled kernels, and they are not in use")
    about = kept.about()
    rounds, seconds = (3, BLOCK / 6) if given.short else (ROUNDS, BLOCK)
    facts = measured(rounds, seconds)
    checked = checks(facts, rounds, seconds, CHECKED[1::2] if given.short else CHECKED)
    ahead = forecast(facts)
    about |= {
        "copy_one": facts.copy_one,
        "copy_all": facts.copy_all,
        "hand_out": facts.hand_out,
        "curves": {name: {str(n): t for n, t in c.items()} for name, c in facts.curves.items()},
    }
    kept.keep("cores", about, [*checked, *ahead], lines(facts, checked, ahead), given)
    return int(max(map(off, checked)) > ASKED)


if __name__ == "__main__":
    sys.exit(main())
