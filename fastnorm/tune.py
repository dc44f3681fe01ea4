"""``fastnorm tune``: measures what a schedule takes from the machine, beyond what its system tells.

A fact is the size of x from which one of two ways is faster: non-temporal stores or usual ones, two
threads or one. Both are timed at several sizes, in turn, as a user calls them. The size is chosen
with which least time is lost over all of them; where that saves next to nothing over what
`schedule` says without a measurement, nothing is kept. None of this changes a bit of a result.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm import limits, machine, machine_file, processor, schedule
from fastnorm._bench import text
from fastnorm._bench.timing import Contender
from fastnorm.machine import Machine
from fastnorm.runtime import on_machine

BUDGET = 16.0  # seconds, within which rounds begin
MIN_ROUNDS, MAX_ROUNDS = 2, 9
BLOCK = 0.012  # seconds of a turn
PAUSE = 2e-4  # seconds between calls, in which the other threads fall asleep
PAUSED_CALLS = 25  # of a turn
WORTH = 0.02  # of the time, that a measured size must save
NOISE = 0.05  # of a ratio between rounds, beyond which figures are not kept
BUSY = 10  # percent of the processors, at most, that others may use

MB = 1 << 20
STORES = tuple(4 * MB * 3**i // 2**i for i in range(8))  # 4 to 68 MB
SHARES = tuple(16384 << i for i in range(6))  # 16 to 512 kB
WAKES = tuple(131072 << i for i in range(6))  # 128 kB to 4 MB
ROW = 1024  # elements
CHANNELS = 64

_ALWAYS, _NEVER = 1, 1 << 47

Array = np.ndarray[Any, Any]
Call = Callable[[], Any]


# --- What is measured -----------------------------------------------------------------------------


class _Arrays:
    """Memory for x, dy and results of any size that is measured."""

    def __init__(self, size: int) -> None:
        rng, n = np.random.default_rng(0), size // 4
        numbers = rng.standard_normal(min(n, 1_000_003), np.float32)
        self._x, self._dy, self._y = np.resize(numbers, n), np.resize(numbers, n), np.zeros(n, "f4")

    def _rows(self, array: Array, size: int) -> Array:
        return array[: size // 4 // ROW * ROW].reshape(-1, ROW)

    def _last(self, array: Array, size: int) -> Array:
        """Channels-last: a sample of 32x32 positions, or part of one."""
        positions = size // 4 // CHANNELS
        return np.moveaxis(array[: positions * CHANNELS].reshape(1, positions, CHANNELS), -1, 1)

    def contiguous(self, size: int) -> Call:
        x, y = self._rows(self._x, size), self._rows(self._y, size)
        return lambda: fn.layer_norm(x, ROW, out=y)

    def strided(self, size: int) -> Call:
        x, y = self._last(self._x, size), self._last(self._y, size)
        return lambda: fn.batch_norm(x, training=True, out=y)

    def contiguous_backward(self, size: int) -> Call:
        x, dy = self._rows(self._x, size), self._rows(self._dy, size)
        _, mean, rstd = fn.layer_norm(x, ROW, return_stats=True)
        return lambda: fn.layer_norm_backward(dy, x, mean, rstd, ROW)

    def strided_backward(self, size: int) -> Call:
        x, dy = self._last(self._x, size), self._last(self._dy, size)
        _, *stats = fn.batch_norm(x, training=True, return_stats=True)
        return lambda: fn.batch_norm_backward(dy, x, *stats)


@dataclass(frozen=True)
class Question:
    """One fact of `Machine`, and how it is found."""

    fact: str
    what: str
    walk: str
    sizes: tuple[int, ...]
    default: Callable[[Machine], int]
    with_one: bool = False  # thread, as well as with all
    paused: bool = False

    def machines(self, here: Machine) -> tuple[Machine, Machine]:
        """Two that do at every size what this one does below the fact, and from it on."""
        if self.sizes is not STORES and not self.with_one:
            here = replace(here, serial_bytes=1, serial_backward_bytes=1, wake_bytes=1)
        return here.with_measured({self.fact: _NEVER}), here.with_measured({self.fact: _ALWAYS})


def _stores(columns: bool, backward: bool) -> Callable[[Machine], int]:
    return lambda here: schedule.non_temporal_from(here, columns, backward)


QUESTIONS = (
    Question(
        "non_temporal_bytes", "non-temporal stores, contiguous",
        "contiguous", STORES, _stores(False, False), True,
    ),
    Question(
        "non_temporal_strided_bytes", "non-temporal stores, strided",
        "strided", STORES, _stores(True, False), True,
    ),
    Question(
        "non_temporal_backward_bytes", "the same backward, contiguous",
        "contiguous_backward", STORES, _stores(False, True), True,
    ),
    Question(
        "non_temporal_backward_strided_bytes", "the same backward, strided",
        "strided_backward", STORES, _stores(True, True), True,
    ),
    Question(
        "serial_bytes", "threads that are awake",
        "contiguous", SHARES, lambda _: schedule.SERIAL_BYTES,
    ),
    Question(
        "serial_backward_bytes", "the same backward",
        "contiguous_backward", SHARES, lambda _: schedule.SERIAL_BYTES_BACKWARD,
    ),
    Question(
        "wake_bytes", "threads that sleep",
        "contiguous", WAKES, lambda _: schedule.WAKE_BYTES, paused=True,
    ),
)  # fmt: skip


# --- Measuring ------------------------------------------------------------------------------------


@dataclass
class _Point:
    """Both ways at one size, with one number of threads."""

    size: int
    call: Call
    machines: tuple[Machine, Machine]
    threads: int
    paused: bool
    times: list[tuple[float, float]] = field(default_factory=list)

    def turn(self) -> None:
        order = (0, 1) if len(self.times) % 2 else (1, 0)
        found = [0.0, 0.0]
        for i in order:
            with on_machine(self.machines[i]), fn.threads(self.threads):
                found[i] = _paused(self.call) if self.paused else Contender(self.call).block(BLOCK)
        self.times.append((found[0], found[1]))

    @property
    def ratios(self) -> list[float]:
        """The logarithm of how many times as long the second way takes, of each round."""
        return [math.log(above / below) for below, above in self.times]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def noise(self) -> float:
        """Half the middle half of the rounds' ratios."""
        quarters = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return (quarters[2] - quarters[0]) / 2


def _paused(call: Call) -> float:
    """The median of calls after each of which the other threads fall asleep."""
    times = []
    for _ in range(PAUSED_CALLS):
        start = time.perf_counter()
        while (begun := time.perf_counter()) - start < PAUSE:
            pass
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@dataclass(frozen=True)
class Answer:
    """What was found: bytes, or 0 where the size without a measurement is as good."""

    question: Question
    default: int
    bytes: int
    saves: float  # of the time, over all sizes
    ratios: dict[int, float]  # how many times as long the second way takes, by the size of x


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    machine: Machine
    answers: list[Answer]
    noise: float
    seconds: float

    @property
    def noisy(self) -> bool:
        """Whether others were at work, so that the figures are not to be kept."""
        return self.noise > NOISE

    @property
    def facts(self) -> dict[str, int]:
        """What is kept."""
        return {a.question.fact: a.bytes for a in self.answers if a.bytes}


def measure(here: Machine, report: Callable[[str], None] = lambda _: None) -> Found:
    """Time all that is asked of a machine, of which only what its system tells is known."""
    begun = time.monotonic()
    most = limits.memory() // 24
    questions = [q for q in QUESTIONS if here.cores > 1 or q.sizes is STORES]
    sizes = {q.fact: [n for n in q.sizes if n <= most] for q in questions}
    arrays = _Arrays(max((n for found in sizes.values() for n in found), default=ROW * 4))
    points: dict[str, list[_Point]] = {}
    for question in questions:
        counts = {1, here.cores} if question.with_one else {here.cores}
        points[question.fact] = [
            _Point(n, call, question.machines(here), threads, question.paused)
            for n in sizes[question.fact]
            for call in [getattr(arrays, question.walk)(n)]
            for threads in sorted(counts)
        ]
    for done in _rounds(begun):
        report(f"round {done + 1}")
        for found in points.values():
            for point in found:
                point.turn()
    every = [point.noise for found in points.values() for point in found]
    answers = [_answer(question, here, points[question.fact]) for question in questions]
    noise = statistics.median(every) if every else 0.0
    return Found(here, answers, noise, time.monotonic() - begun)


def _rounds(begun: float) -> Iterator[int]:
    """As many as there is time for."""
    longest = 0.0
    for done in range(MAX_ROUNDS):
        start = time.monotonic()
        if done >= MIN_ROUNDS and start - begun + longest > BUDGET:
            return
        yield done
        longest = max(longest, time.monotonic() - start)


def _answer(question: Question, here: Machine, points: Sequence[_Point]) -> Answer:
    default = question.default(here)
    ratios = {
        size: statistics.mean(p.ratio for p in points if p.size == size)
        for size in dict.fromkeys(p.size for p in points)
    }
    shown = {size: math.exp(ratio) for size, ratio in ratios.items()}
    found, saves = threshold(ratios, default)
    return Answer(question, default, found, saves, shown)


def threshold(ratios: dict[int, float], default: int) -> tuple[int, float]:
    """The size from which the second way is taken, and what that saves of the time over a default.

    `ratios` are the logarithms of how many times as long the second way takes, by size. 0 where the
    default is as good.
    """
    sizes = sorted(ratios)
    if not sizes:
        return 0, 0.0
    lost = [sum(ratios[size] for size in sizes[i:]) for i in range(len(sizes) + 1)]
    best = min(range(len(lost)), key=lost.__getitem__)
    usual = sum(size <= default for size in sizes)
    saves = (lost[usual] - lost[best]) / len(sizes)
    if saves < WORTH or best == usual:
        return 0, 0.0
    if best == 0:
        return sizes[0], saves
    if best == len(sizes):  # not below what was measured
        return sizes[-1] * 3 // 2, saves
    return math.isqrt(sizes[best - 1] * sizes[best]), saves


# --- What is kept, and printed --------------------------------------------------------------------


def keep(found: Found, file: Path) -> None:
    """Write the machine file."""
    comments = [
        "Written by `fastnorm tune`, read when fastnorm is imported, removed by",
        "`fastnorm tune --forget`. Bytes of x from which something pays; no result depends on it.",
    ]
    facts = machine.identity(found.machine) | {"date": date.today().isoformat()} | found.facts
    machine_file.write(file, facts, comments)


def to_dict(found: Found) -> dict[str, Any]:
    """For programs."""
    return {
        "machine": machine.identity(found.machine) | {"cores": found.machine.cores},
        "facts": found.facts,
        "noise": round(found.noise, 4),
        "seconds": round(found.seconds, 1),
        "measured": {
            answer.question.fact: {
                "without": answer.default,
                "saves": round(answer.saves, 4),
                "ratios": {str(size): round(r, 3) for size, r in answer.ratios.items()},
            }
            for answer in found.answers
        },
    }


def to_text(found: Found) -> str:
    """What is printed: a row for each fact."""
    here = found.machine
    lines = [
        f"{processor.name()}, {here.cores} cores",
        "",
        f"{'bytes of x from which these pay':36}{'as told':>10}{'measured':>10}{'saves':>7}",
    ]
    for answer in found.answers:
        told = text.size_of(answer.default) if answer.default < _NEVER else "never"
        measured = text.size_of(answer.bytes) if answer.bytes else "as told"
        saves = f"{answer.saves:.0%}" if answer.bytes else ""
        lines.append(f"  {answer.question.what:34}{told:>10}{measured:>10}{saves:>7}".rstrip())
    if here.cores < 2:
        lines.append("  (threads were not measured: this process has one processor)")
    lines += ["", f"{found.seconds:.0f} s; rounds differ by {found.noise:.0%}"]
    return "\n".join(lines)
