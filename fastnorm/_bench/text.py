"""Figures in words, for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value / 1e-9)} ns"


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 99.95 else f"{value:.0f}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def size_of(count: float) -> str:
    units = ("bytes", "kB", "MB", "GB")
    power = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**power:.3g} {units[power]}"


def threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of a table: the side that each column is at, < or >; the last is of the rest, too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = sides.ljust(len(widths), sides[-1])
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths)) for row in rows]


def facts(machine: dict[str, Any]) -> list[str]:
    """The machine in short lines."""
    busy = machine.get("busy")
    busy = "an unknown share" if busy is None else f"{busy:.0f} % of the processors at the start"
    caches = ", ".join(f"{level} {size_of(size)}" for level, size in machine["caches"].items())
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    used = f"; {machine['threads']} threads used" if "threads" in machine else ""
    compiler = f"{machine['compiler'] or 'no C compiler'}; " if "compiler" in machine else ""
    return [
        f"{machine['processor']}, {machine['cores']} cores{used}",
        f"instruction set {machine['instruction set']}" + (f"; {caches}" if caches else ""),
        f"{machine['system']}, Python {machine['python']}, {versions}",
        f"{compiler}{machine['date']}; others used {busy}",
    ]
