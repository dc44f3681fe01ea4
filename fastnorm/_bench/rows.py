"""One row of figures: what a benchmark keeps in the JSON and the report reads."""

from __future__ import annotations

from typing import Any

from fastnorm._bench.timing import Contender

Row = dict[str, Any]

COPY = "copy"  # the contender that is the ceiling


def row(kind: str, case: str, contenders: dict[str, Contender], **more: Any) -> Row:
    """The figures of contenders of which the first is fastnorm.

    `ratios` says how many times as long as fastnorm each of the others takes. `more` are the
    `bytes` read and written, the peers `absent` with the reason, and what a kind needs besides.
    """
    seconds = {name: contender.seconds for name, contender in contenders.items()}
    own, *others = seconds
    figures: Row = {
        "kind": kind,
        "case": case,
        "seconds": seconds,
        "spread": {name: contender.spread for name, contender in contenders.items()},
        "ratios": {name: seconds[name] / seconds[own] for name in others if name != COPY},
        **more,
    }
    if "bytes" in more:
        figures["gigabytes_per_second"] = more["bytes"] / seconds[own] / 1e9
    if COPY in seconds:
        figures["share_of_copy"] = seconds[COPY] / seconds[own]
    return figures
