"""Timing in turns.

The contenders of one case run in one process, one after the other, round after round, each for a
block of 30 ms or more, so that a drift of the machine hits all of them. Shorter turns would be
unfair: the threads of two OpenMP runtimes, or of a thread pool, go on spinning for a while after a
call and take the processors from whoever comes next. So the first calls of a block are not counted.

A contender's figure is the median over the rounds of its blocks' medians. Short calls are timed
many at once, until what is timed takes 100 µs: reading the clock would cost too much otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from timeit import Timer
from typing import Any, TypeVar

T = TypeVar("T")

BLOCK = 0.03  # seconds that are timed in a turn
WARM = 0.005  # seconds before them
BATCH = 1e-4  # seconds that are timed at once, at least
ROUNDS = 7  # odd, so that a median is one of them


@dataclass
class Contender:
    """One way to do it, and how long it took."""

    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered once for a whole block, as a user enters torch.inference_mode."""
    medians: list[float] = field(default_factory=list)
    """Seconds a call, one number for each block."""
    least: float = float("inf")
    """The fastest batch of all blocks."""

    def block(self, seconds: float = BLOCK) -> float:
        """Run one turn; return its median, in seconds a call."""
        timer = Timer(self.call)  # calls it in a loop, results dropped, no garbage collection
        with self.around():
            least = min(_until(min(WARM, seconds), timer, 1))
            times = _until(seconds, timer, max(1, round(BATCH / least)))
        self.medians.append(statistics.median(times))
        self.least = min(self.least, *times)
        return self.medians[-1]

    @property
    def seconds(self) -> float:
        return statistics.median(self.medians)

    @property
    def spread(self) -> float:
        """The middle half of the blocks, as a share of the figure."""
        if len(self.medians) < 2:
            return 0.0
        quarters = statistics.quantiles(self.medians, n=4, method="inclusive")
        return (quarters[2] - quarters[0]) / self.seconds


def _until(seconds: float, timer: Timer, batch: int) -> list[float]:
    """Seconds a call, batch by batch, until `seconds` have passed."""
    times, passed = [], 0.0
    while passed < seconds:
        taken = timer.timeit(batch)
        times.append(taken / batch)
        passed += taken
    return times


def turns(names: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """The order of each round: every other one backwards, starting one further on."""
    for i in range(rounds):
        order = [*names[i % len(names) :], *names[: i % len(names)]]
        yield order[::-1] if i % 2 else order


def compete(
    contenders: Mapping[T, Contender],
    rounds: int = ROUNDS,
    seconds: float = BLOCK,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Time them all in turn; `report` is called before each round."""
    for order in turns(list(contenders), rounds):
        report()
        for name in order:
            contenders[name].block(seconds)


def fastest(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The call that is fastest in three short turns, or in one where they are long."""
    contenders = [Contender(call) for call in calls]
    for order in turns(range(len(calls)), 3 if len(calls) > 1 else 0):
        taken = sum(contenders[i].block(BLOCK / 10) for i in order)
        if taken > 1:
            break
    return min(contenders, key=lambda c: c.least).call
