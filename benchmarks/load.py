"""One thread and two, beside busy programs: what users have who share their machine.

    python -m benchmarks.load                 # 2 minutes; prints a table and keeps it in results/
    python -m benchmarks.load --seconds 0.2   # a short look, which keeps nothing

A busy program computes for nothing on one thread. Times are means, as a user has them, not the
medians or least times of the other tables: what a call waits for others is what is looked for.
PyTorch is timed where it is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fastnorm as fn
from fastnorm._bench import machine, text
from fastnorm._bench.cases import Case, data
from fastnorm._bench.peers import PEERS, Absent, set_torch_threads
from fastnorm._bench.timing import turns
from fastnorm.workers import busy_processes

RESULTS = Path(__file__).parent / "results"
SECONDS = 1.0  # of each contender, load and case
ROUNDS = 7
THREADS = 2
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


def contenders(case: Case) -> dict[str, tuple[Call, Callable[[], Any]]]:
    """What is called, and inside of what."""
    arrays = data(case)
    own = PEERS["fastnorm"](case, arrays)
    found: dict[str, tuple[Call, Callable[[], Any]]] = {
        "one thread": (own.call, partial(fn.threads, 1)),
        "two threads": (own.call, partial(fn.threads, THREADS)),
    }
    try:
        torch = PEERS["torch"](case, arrays)
    except Absent:
        return found
    return found | {"torch": (torch.call, torch.around)}


def mean_times(case: Case, seconds: float) -> dict[str, float]:
    """Seconds a call, of all calls that were made in turns."""
    found = contenders(case)
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
    lines = [
        "| busy programs | case | one thread | two threads | two over one | torch over two |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def ratio(row: dict[str, Any], of: str, to: str) -> float | None:
        return row["times"][of] / row["times"][to] if of in row["times"] else None

    for load in sorted({row["load"] for row in rows}):
        here = [row for row in rows if row["load"] == load]
        for row in here:
            one, two = (text.seconds(row["times"][name]) for name in ("one thread", "two threads"))
            over = ratio(row, "two threads", "one thread"), ratio(row, "torch", "two threads")
            ratios = " | ".join("" if r is None else f"{r:.2f}" for r in over)
            lines.append(f"| {load} | {row['case']} | {one} | {two} | {ratios} |")
        means = []
        for of, to in (("two threads", "one thread"), ("torch", "two threads")):
            found = [r for row in here if (r := ratio(row, of, to)) is not None]
            means.append(f"**{statistics.geometric_mean(found):.2f}**" if found else "")
        lines.append(f"| {load} | geometric mean | | | {' | '.join(means)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=SECONDS)
    seconds = parser.parse_args().seconds
    fn.set_num_threads(THREADS)
    about = machine.facts() | {"busy": machine.busy()}
    set_torch_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for load in LOADS:
        with busy_processes(load):
            rows += [
                {"load": load, "case": str(case), "times": mean_times(case, seconds)}
                for case in CASES
            ]
    lines = [*text.facts(about), "", *table(rows)]
    print("\n".join(lines))
    if seconds >= SECONDS:
        name = "-".join(about["processor"].lower().replace("(", "").replace(")", "").split())
        kept = RESULTS / f"{name.replace(',', '')}-load"
        kept.with_suffix(".json").write_text(
            json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
        kept.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
