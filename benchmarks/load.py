"""One thread and two, beside busy programs: what users have who share their machine.

    python -m benchmarks.load           # 3 minutes; prints a table and keeps it in results/
    python -m benchmarks.load --short   # a look, which keeps nothing

A busy program computes for nothing on one thread. Times are means, as a user has them, not the
medians or least times of the other tables: what a call waits for others is what is looked for.
PyTorch, ONNX Runtime (forward) and JAX are timed where they are installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import fastnorm as fn
from fastnorm._bench import text
from fastnorm._bench.cases import Case, data
from fastnorm._bench.peers import PEERS, Absent, set_torch_threads
from fastnorm._bench.timing import turns
from fastnorm.workers import busy_processes

from . import kept

SECONDS = 1.0  # of each contender, load and case
ROUNDS = 7
THREADS = 2
RIVALS = ("torch", "onnxruntime", "jax")
LOADS = (0, 1, 2)

_FORWARD = (
    Case("layer_norm (normalized_shape)", (64, 768)),  # 0.2 MB
    Case("group_norm", (4, 64, 32, 32), num_groups=32),  # 1 MB
    Case("batch_norm (training)", (8, 64, 56, 56)),  # 6 MB
    Case("layer_norm (normalized_shape)", (3500, 768)),  # 11 MB
    Case("group_norm", (8, 160, 64, 64), num_groups=32),  # 21 MB
)
CASES = _FORWARD + tuple(replace(case, backward=True) for case in _FORWARD)

Call = Callable[[], Any]
Contenders = dict[str, tuple[Call, Callable[[], Any]]]  # what is called, and inside of what


def contenders(case: Case) -> Contenders:
    """fastnorm with one thread and with two, and its rivals."""
    arrays = data(case)
    own = PEERS["fastnorm"](case, arrays)
    found: Contenders = {
        "one thread": (own.call, partial(fn.threads, 1)),
        "two threads": (own.call, partial(fn.threads, THREADS)),
    }
    for name in RIVALS:
        try:
            peer = PEERS[name](case, arrays)
            with peer.around():
                peer.call()
        except Absent:
            continue
        found[name] = (peer.call, peer.around)
    return found


def mean_times(found: Contenders, seconds: float) -> dict[str, float]:
    """Seconds a call, of all calls that were made in turns."""
    spent, calls = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0)
    for order in turns(list(found), ROUNDS):
        for name in order:
            call, around = found[name]
            with around():
                call()
                start = now = time.perf_counter()
                while now - start < seconds / ROUNDS:
                    call()
                    calls[name] += 1
                    now = time.perf_counter()
            spent[name] += now - start
    return {name: spent[name] / calls[name] for name in found}


def table(rows: list[dict[str, Any]]) -> list[str]:
    rivals = [name for name in RIVALS if any(name in row["times"] for row in rows)]
    ratios = [("two threads", "one thread"), *((name, "two threads") for name in rivals)]
    heads = ["two over one", *(f"{name} over two" for name in rivals)]
    lines = [
        f"| busy programs | case | one thread | two threads | {' | '.join(heads)} |",
        f"| --- | --- | --- | --- |{' --- |' * len(ratios)}",
    ]

    def ratio(row: dict[str, Any], of: str, to: str) -> float | None:
        return row["times"][of] / row["times"][to] if of in row["times"] else None

    for load in sorted({row["load"] for row in rows}):
        here = [row for row in rows if row["load"] == load]
        for row in here:
            one, two = (text.seconds(row["times"][name]) for name in ("one thread", "two threads"))
            over = [ratio(row, of, to) for of, to in ratios]
            cells = " | ".join("" if r is None else f"{r:.2f}" for r in over)
            lines.append(f"| {load} | {row['case']} | {one} | {two} | {cells} |")
        means = []
        for of, to in ratios:
            found = [r for row in here if (r := ratio(row, of, to)) is not None]
            means.append(f"**{statistics.geometric_mean(found):.2f}**" if found else "")
        lines.append(f"| {load} | geometric mean | | | {' | '.join(means)} |")
    return lines


def main() -> None:
    parser = kept.parser("load", __doc__)
    parser.add_argument("--seconds", type=float, help=f"of each contender and case ({SECONDS})")
    given = parser.parse_args()
    seconds = given.seconds or (SECONDS / 10 if given.short else SECONDS)
    given.short = given.short or seconds < SECONDS
    fn.set_num_threads(THREADS)
    facts = kept.about()
    set_torch_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for load in LOADS:
        with busy_processes(load):
            for case in CASES:
                kept.say(f"{load} busy: {case}")
                times = mean_times(contenders(case), seconds)
                rows.append({"load": load, "case": str(case), "times": times})
    kept.keep("load", facts, rows, table(rows), given)


if __name__ == "__main__":
    main()
