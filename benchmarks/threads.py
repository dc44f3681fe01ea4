"""Two threads and one, at every size from 1 kB to 64 MB: where the second is worth it.

    python -m benchmarks.threads           # 3 minutes; prints a table and keeps it in results/
    python -m benchmarks.threads --short   # a look at some sizes, which keeps nothing

Public functions on arrays of float32, results allocated, called again and again: both in turn, in
blocks of 30 ms. Asked: two threads never take more than 5 % longer than one. What seems to is timed
once more, with longer turns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import fastnorm as fn
from fastnorm import machine
from fastnorm._bench import text
from fastnorm._bench.cases import Case, data
from fastnorm._bench.peers import PEERS
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, compete

from . import kept

ASKED = 1.05
AGAIN = 1.02  # a ratio beyond which a size is timed once more
FIRST, LAST, STEP = 1 << 10, 1 << 26, 1.5

_FLOAT = 4
_ROW = 256
_CHANNELS = 32
_SAMPLE = 1 << 16  # bytes, at most
_BATCH = 8


def layer(size: int) -> Case:
    return Case("layer_norm (normalized_shape)", (size // (_FLOAT * _ROW), _ROW))


def group(size: int) -> Case:
    """Samples of 64 kB, or one that is smaller."""
    samples = max(1, size // _SAMPLE)
    positions = max(1, size // (_FLOAT * samples * _CHANNELS))
    return Case("group_norm", (samples, _CHANNELS, positions), num_groups=8)


def batch(size: int) -> Case:
    positions = max(1, size // (_FLOAT * _BATCH * _CHANNELS))
    return Case("batch_norm (training)", (_BATCH, _CHANNELS, positions))


def backward(size: int) -> Case:
    return replace(layer(size), backward=True)


FUNCTIONS = {
    "layer": layer,
    "group": group,
    "batch, training": batch,
    "layer, backward": backward,
}


def sizes(step: float = STEP) -> Iterator[int]:
    """Bytes of x, the last of them among them."""
    size = float(FIRST)
    while size < LAST * 0.99:
        if size == FIRST or size > 2 * FIRST:
            yield round(size / FIRST) * FIRST
        size *= step
    yield LAST


def measured(
    function: str, case: Case, threads: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """A row: seconds of one thread and of several, and their ratio."""
    call = PEERS["fastnorm"](case, data(case)).call
    tries = []
    for longer in (1, 3):
        contenders = {n: Contender(call, partial(fn.threads, n)) for n in (1, threads)}
        compete(contenders, rounds, seconds * longer)
        tries.append({n: each.seconds for n, each in contenders.items()})
        if tries[-1][threads] <= AGAIN * tries[-1][1]:
            break
    best = min(tries, key=lambda times: times[threads] / times[1])
    return {
        "function": function,
        "case": str(case),
        "bytes": case.bytes,
        "one": best[1],
        "threads": best[threads],
        "ratio": best[threads] / best[1],
    }


def lines(rows: Sequence[dict[str, Any]], threads: int) -> list[str]:
    """A page: a row for each size, a column for each function."""
    names = list(dict.fromkeys(row["function"] for row in rows))
    by_size: dict[int, dict[str, float]] = {}
    for name in names:
        chosen = [row for row in rows if row["function"] == name]
        for size, row in zip(sorted({row["asked"] for row in rows}), chosen):
            by_size.setdefault(size, {})[name] = row["ratio"]
    page = [
        f"Times of {threads} threads over those of one; {ASKED} at most is asked.",
        "",
        f"| x | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for size, found in by_size.items():
        cells = [kept.marked(r, ASKED) for r in found.values()]
        page.append(f"| {text.size_of(size)} | {' | '.join(cells)} |")
    return page + kept.totals([r[name] for r in by_size.values()] for name in names)


def main() -> int:
    parser = kept.parser("threads", __doc__)
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(2)")
    given = parser.parse_args()
    if machine.here.cores < given.threads:
        raise SystemExit(f"this process has {machine.here.cores} processors")
    fn.set_num_threads(given.threads)
    facts, rows = kept.about(), []
    rounds, seconds = (3, BLOCK / 6) if given.short else (ROUNDS, BLOCK)
    for size in sizes(8.0 if given.short else STEP):
        kept.say(text.size_of(size))
        for name, of in FUNCTIONS.items():
            row = measured(name, of(size), given.threads, rounds, seconds)
            rows.append({"asked": size, **row})
    kept.keep("thread-curve", facts, rows, lines(rows, given.threads), given)
    return int(max(row["ratio"] for row in rows) > ASKED)


if __name__ == "__main__":
    sys.exit(main())
