"""A norm's share of a copy's speed, by its size: on a quiet machine, and beside a busy program.

    python -m benchmarks.shares           # 2 minutes; prints a table and keeps it in results/
    python -m benchmarks.shares --short   # a look, which keeps nothing

The copy moves as many bytes by as many threads into fresh memory, as the norm does. Times are means
of all calls, as in `benchmarks.load`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import fastnorm as fn
from fastnorm._bench import text
from fastnorm._bench.cases import data
from fastnorm._bench.copying import copy
from fastnorm._bench.peers import PEERS
from fastnorm.workers import busy_processes

from . import kept
from .cases import cliff
from .ceiling import moves
from .load import THREADS, mean_times

SECONDS = 0.7  # of each contender, load and case
LOADS = (0, 1)
POWERS = range(16, 28)  # 64 kB to 128 MB


def measured(power: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each function at 2^power bytes of x."""
    rows = []
    for case in cliff(1 << power):
        arrays = data(case)
        calls = {
            "copy": copy(case, arrays, moves(THREADS)),
            "fastnorm": PEERS["fastnorm"](case, arrays).call,
        }
        times = mean_times({name: (call, nullcontext) for name, call in calls.items()}, seconds)
        rows.append({"function": case.operation.name, "bytes": arrays.x.nbytes, "times": times})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each size and function: time of the copy over that of the norm, at each load."""
    found: dict[tuple[int, str], dict[int, str]] = {}
    for row in rows:
        share = row["times"]["copy"] / row["times"]["fastnorm"]
        found.setdefault((row["bytes"], row["function"]), {})[row["load"]] = f"{share:.2f}"
    heads = ["quiet" if load == 0 else f"{load} busy" for load in LOADS]
    return [
        f"| bytes of x | function | {' | '.join(heads)} |",
        f"| --- | --- |{' --- |' * len(LOADS)}",
        *(
            f"| {text.size_of(size)} | {function} | {' | '.join(shares[load] for load in LOADS)} |"
            for (size, function), shares in sorted(found.items())
        ),
    ]


def main() -> None:
    parser = kept.parser("shares", __doc__)
    given = parser.parse_args()
    seconds = SECONDS / 10 if given.short else SECONDS
    fn.set_num_threads(THREADS)
    facts = kept.about()
    rows: list[dict[str, Any]] = []
    for load in LOADS:
        with busy_processes(load):
            for power in POWERS:
                kept.say(f"{load} busy: {1 << power} bytes")
                rows += [{"load": load} | row for row in measured(power, seconds)]
    kept.keep("shares", facts, rows, table(rows), given)


if __name__ == "__main__":
    main()
