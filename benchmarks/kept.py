"""Results that are kept in results/, one beside the other for each machine: JSON, and a page."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastnorm._bench import machine, text

from . import report

RESULTS = Path(__file__).parent / "results"
BUSY = 10  # percent of the processors that others may use


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """With what all such programs take."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--short", action="store_true", help="a look that keeps nothing")
    made.add_argument("--force", action="store_true", help="keep it, whoever else is at work")
    return made


def about() -> dict[str, Any]:
    """The machine, and how busy others keep it now."""
    found = machine.facts() | {"busy": machine.busy()}
    if (found["busy"] or 0) > BUSY:
        say(f"others use {found['busy']:.0f} % of the processors: what follows may be far off")
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def stem(facts: dict[str, Any], what: str) -> str:
    """The name of the files, without what kind they are."""
    words = report.name_of(facts).rpartition("-threads")[0].rpartition("-")[0]
    return f"{words}-{what}"


def marked(ratio: float, asked: float) -> str:
    """A ratio, in bold where it is above what is asked."""
    return f"**{ratio:.2f}**" if ratio > asked else f"{ratio:.2f}"


def totals(columns: Iterable[Sequence[float]], between: str = "") -> list[str]:
    """The last two rows of a table: what its columns come to."""
    columns = list(columns)
    return [
        f"| {what} |{between} {' | '.join(f'**{of(column):.2f}**' for column in columns)} |"
        for what, of in (("geometric mean", statistics.geometric_mean), ("at most", max))
    ]


def keep(
    what: str,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    lines: Iterable[str],
    given: argparse.Namespace,
) -> None:
    """Print a page, and write it and its figures; not those of a busy machine, or a short look."""
    page = "\n".join([*(f"- {fact}" for fact in text.facts(facts)), "", *lines]) + "\n"
    print(page, end="")
    if given.short:
        return
    if (facts["busy"] or 0) > BUSY and not given.force:
        say("nothing is kept of it: the machine was busy (--force keeps it)")
        return
    at = RESULTS / stem(facts, what)
    at.with_suffix(".md").write_text(page, encoding="utf-8")
    figures = report.rounded({"machine": facts, "rows": rows})
    at.with_suffix(".json").write_text(report.dump(figures), encoding="utf-8")
    say(f"kept in {at}.md and .json")
