"""Channels-last memory over channels-first, of every dtype, and masks over no mask.

    python -m benchmarks.layouts           # 1 minute; prints two tables and keeps them in results/
    python -m benchmarks.layouts --short   # a short look, which keeps nothing

Public functions, results allocated, in turn in blocks of 30 ms. Asked: channels-last 1.3 times
channels-first at most, and 1.15 in geometric mean; a masked layer norm 1.6 times the one without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm._bench import text
from fastnorm._bench.cases import Case, data
from fastnorm._bench.peers import PEERS
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, compete

from . import kept

LAST, MASKED = 1.3, 1.6
DTYPES = ("float32", "float64", "float16", "bfloat16")
SHAPE = (8, 64, 32, 32)
ROWS, PLANES = (4096, 768), (8, 64, 56, 56)

_FORWARD = (
    Case("group_norm", SHAPE, num_groups=8),
    Case("batch_norm (training)", SHAPE),
    Case("batch_norm (inference)", SHAPE),
)
CASES = (*_FORWARD, *(replace(case, backward=True) for case in _FORWARD[:2]))

Calls = dict[str, Callable[[], Any]]


def ratios(calls: Calls, of: str, rounds: int, seconds: float) -> tuple[float, dict[str, float]]:
    """Seconds of one call, and how many times as long each of the others takes."""
    contenders = {name: Contender(call) for name, call in calls.items()}
    compete(contenders, rounds, seconds)
    one = contenders[of].seconds
    return one, {name: each.seconds / one for name, each in contenders.items() if name != of}


def layouts() -> Iterator[tuple[str, Calls]]:
    """Each case and dtype, on both kinds of memory."""
    for dtype in DTYPES:
        for case in CASES:
            both = {
                name: replace(case, dtype=dtype, channels_last=name == "last")
                for name in ("first", "last")
            }
            calls = {name: PEERS["fastnorm"](c, data(c)).call for name, c in both.items()}
            yield str(both["first"]), calls


def masks() -> Iterator[tuple[str, Calls]]:
    """Rows, and channels-last planes, of which different masks leave parts out."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal(ROWS, np.float32), np.ones(ROWS[1], np.float32)
    lengths = rng.integers(ROWS[1] // 2, ROWS[1] + 1, (ROWS[0], 1))
    chosen: Mapping[str, Any] = {
        "none": None,
        "whole rows": rng.random((ROWS[0], 1)) < 0.8,
        "padding": np.arange(ROWS[1]) < lengths,
        "any numbers": rng.random(ROWS) < 0.8,
    }
    yield (
        "layer_norm 4096x768",
        {
            name: lambda mask=mask: fn.layer_norm(x, ROWS[1], weight, weight, where=mask)
            for name, mask in chosen.items()
        },
    )
    n, channels, *positions = PLANES
    memory = rng.standard_normal((n, *positions, channels), np.float32)
    planes = np.moveaxis(memory, -1, 1)
    padding = np.arange(positions[1]) < rng.integers(positions[1] // 2, positions[1], (n, 1, 1, 1))
    chosen = {
        "none": None,
        "whole rows": rng.random((n, 1, *positions)) < 0.8,
        "padding": np.broadcast_to(padding, (n, 1, *positions)),
        "any numbers": np.moveaxis(rng.random(memory.shape) < 0.8, -1, 1),
    }
    yield (
        "group_norm 8x64x56x56 channels-last",
        {
            name: lambda mask=mask: fn.group_norm(planes, 8, where=mask)
            for name, mask in chosen.items()
        },
    )


def table(rows: list[dict[str, Any]], asked: float) -> list[str]:
    names = list(rows[0]["ratios"])
    page = [
        f"| case | {rows[0]['of']} | {' | '.join(names)} |",
        f"| --- |{' ---: |' * (1 + len(names))}",
    ]
    for row in rows:
        cells = [kept.marked(r, asked) for r in row["ratios"].values()]
        page.append(f"| {row['case']} | {text.seconds(row['seconds'])} | {' | '.join(cells)} |")
    return page + kept.totals(([row["ratios"][name] for row in rows] for name in names), " |")


def main() -> int:
    parser = kept.parser("layouts", __doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(1)")
    given = parser.parse_args()
    fn.set_num_threads(given.threads)
    facts = kept.about()
    rounds, seconds = (3, BLOCK / 6) if given.short else (ROUNDS, BLOCK)
    rows: list[dict[str, Any]] = []
    for of, cases in (("first", layouts()), ("none", masks())):
        for case, calls in cases:
            kept.say(case)
            one, found = ratios(calls, of, rounds, seconds)
            rows.append({"case": case, "of": of, "seconds": one, "ratios": found})
    by_layout = [row for row in rows if row["of"] == "first"]
    by_mask = [row for row in rows if row["of"] == "none"]
    page = [
        f"Channels-last over channels-first, {LAST} at most is asked; threads: {given.threads}.",
        "",
        *table(by_layout, LAST),
        "",
        f"Masks over none, {MASKED} at most is asked.",
        "",
        *table(by_mask, MASKED),
    ]
    kept.keep("layouts", facts, rows, page, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
