"""What a schedule for another machine costs on this one: how well thresholds are placed.

    python -m benchmarks.models           # 4 minutes; prints a table and keeps it in results/
    python -m benchmarks.models --short   # a look at some cases, which keeps nothing

Every case of cases.py runs as this machine has it, and as each of fastnorm.machine.MODELS would,
with this machine's processors, in turn. Where a model decides the same, nothing is timed, and it
costs nothing. Asked: 25 % at most.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import fastnorm as fn
from fastnorm import machine
from fastnorm._bench import text
from fastnorm._bench.cases import Case, data
from fastnorm._bench.peers import PEERS
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, compete
from fastnorm.backends import recorder
from fastnorm.machine import MODELS, Machine
from fastnorm.runtime import on_machine

from . import kept
from .cases import CASES

ASKED = 1.25
AGAIN = 1.15  # a ratio beyond which a case is timed once more, with longer turns
OWN = "own"

Schedules = list[dict[str, Any]]


def decided(call: Callable[[], Any], on: Machine) -> Schedules:
    """Each pass of a call, as another machine would carry it out."""
    with recorder.recording() as asked:
        call()
    return [asdict(each.schedule(on)) for each in asked]


def differs(own: Schedules, other: Schedules) -> list[str]:
    """What is decided otherwise."""
    return sorted({name for a, b in zip(own, other) for name in a if a[name] != b[name]})


def measured(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """A row: what each model decides otherwise, and how many times as long that takes."""
    here = machine.here
    call = PEERS["fastnorm"](case, data(case)).call
    models = {name: replace(model, cores=here.cores) for name, model in MODELS.items()}
    own = decided(call, here)
    otherwise = {name: differs(own, decided(call, model)) for name, model in models.items()}
    chosen = {OWN: here} | {name: models[name] for name in models if otherwise[name]}
    times: dict[str, float] = {}
    for longer in (1, 3):
        contenders = {
            name: Contender(call, partial(on_machine, model)) for name, model in chosen.items()
        }
        if len(chosen) > 1:
            compete(contenders, rounds, seconds * longer)
            times |= {name: each.seconds for name, each in contenders.items()}
        if all(times[name] < AGAIN * times[OWN] for name in chosen if name in times):
            break
    return {
        "case": str(case),
        "seconds": times.get(OWN),
        "otherwise": {name: found for name, found in otherwise.items() if found},
        "ratios": {name: times[name] / times[OWN] if name in times else 1.0 for name in MODELS},
    }


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A page: a row for each case in which any model decides otherwise."""
    page = [
        (
            "How many times as long a call takes with the schedule for another machine; = : it "
            f"decides the same. Asked: {ASKED} at most."
        ),
        "",
        f"| case | own | {' | '.join(MODELS)} |",
        f"| --- | ---: |{' ---: |' * len(MODELS)}",
    ]
    for row in rows:
        if not row["otherwise"]:
            continue
        cells = [
            kept.marked(r, ASKED) if name in row["otherwise"] else "="
            for name, r in row["ratios"].items()
        ]
        page.append(f"| {row['case']} | {text.seconds(row['seconds'])} | {' | '.join(cells)} |")
    same = sum(not row["otherwise"] for row in rows)
    page.append(f"| {same} other cases | |{' = |' * len(MODELS)}")
    return page + kept.totals(([row["ratios"][name] for row in rows] for name in MODELS), " |")


def main() -> int:
    parser = kept.parser("models", __doc__)
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(2)")
    given = parser.parse_args()
    if fn.get_backend() != "cython":
        raise SystemExit("this is for the compiled kernels, and they are not in use")
    fn.set_num_threads(given.threads)
    facts, rows = kept.about(), []
    cases = CASES[::8] if given.short else CASES
    for i, case in enumerate(cases, 1):
        kept.say(f"[{i}/{len(cases)}] {case}")
        rows.append(measured(case, 3 if given.short else ROUNDS, BLOCK / (3 if given.short else 1)))
    kept.keep("models", facts, rows, lines(rows), given)
    return int(max(r for row in rows for r in row["ratios"].values()) > ASKED)


if __name__ == "__main__":
    sys.exit(main())
