"""Markdown from the figures: `python -m benchmarks.report results.json [--readme README.md]`.

What comes in is pytest-benchmark's JSON, or the smaller one that is written with the Markdown.
Both go into benchmarks/results under a name that says which machine it was.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fastnorm._bench.peers import PEERS
from fastnorm._bench.rows import COPY, Row
from fastnorm._bench.text import facts, seconds, size_of, times

from .cases import SHOWN

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

TORCH = "torch"
TITLES = {
    "forward": "Forward",
    "backward": "Backward",
    "fused": "Fused",
    "out": "Into a given array",
    "threads": "Threads",
    "cliff": "Sizes",
    "door": "The smallest call",
    "import": "Import",
}
COMPARED = ("forward", "backward", "fused")

# --- One row --------------------------------------------------------------------------------------


def describe(row: Row) -> str:
    """One line for the terminal."""
    parts = [seconds(next(iter(row["seconds"].values())))]
    if "gigabytes_per_second" in row:
        parts.append(f"{row['gigabytes_per_second']:.0f} GB/s")
    if "share_of_copy" in row:
        parts.append(f"{times(row['share_of_copy'])} of the copy")
    parts += [f"{name} {times(ratio)}x" for name, ratio in row["ratios"].items()]
    return f"{row['case']}: {', '.join(parts)}"


def losing(row: Row) -> bool:
    """Whether a peer is faster."""
    return row["kind"] in COMPARED and min(row["ratios"].values(), default=1.0) < 1


# --- Tables ---------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    under = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, under, *lines))


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Those with a figure, or with a reason for having none."""
    return [name for name in PEERS if any(name in row["ratios"] | row["absent"] for row in rows)]


def _ratio(row: Row, name: str) -> str:
    ratio = row["ratios"].get(name)
    return f"**{times(ratio)}**" if ratio is not None and ratio < 1 else times(ratio)


def compared(rows: Sequence[Row]) -> str:
    """Each case and each peer; where fastnorm loses, the case is marked and the ratio bold."""
    peers = peers_of(rows)
    head = ["case", "time", "GB/s", "of the copy", *peers]
    lines = [
        [
            ("▼ " if losing(row) else "") + row["case"],
            seconds(row["seconds"]["fastnorm"]),
            f"{row['gigabytes_per_second']:.1f}",
            times(row["share_of_copy"]),
            *(_ratio(row, name) for name in peers),
        ]
        for row in rows
    ]
    return table(head, lines)


def _out(rows: Sequence[Row]) -> str:
    head = ["case", "time", "the copy", "GB/s", "of the copy"]
    return table(
        head,
        (
            [
                row["case"],
                seconds(row["seconds"]["fastnorm"]),
                seconds(row["seconds"][COPY]),
                f"{row['gigabytes_per_second']:.1f}",
                times(row["share_of_copy"]),
            ]
            for row in rows
        ),
    )


def _beside(rows: Sequence[Row], other: str, ratio: Callable[[Row], float]) -> str:
    lines = (
        [
            row["case"],
            seconds(row["seconds"]["fastnorm"]),
            seconds(row["seconds"][other]),
            times(ratio(row)),
        ]
        for row in rows
    )
    return table(["case", "time", other, "times"], lines)


def steps(rows: Sequence[Row]) -> Iterator[tuple[Row, float, float | None]]:
    """Each size with (time over the copy's time) and how that rose from the size before."""
    before: dict[str, float] = {}
    for row in rows:
        over = 1 / row["share_of_copy"]
        last = before.get(row["function"])
        yield row, over, None if last is None else over / last
        before[row["function"]] = over


def _cliff(rows: Sequence[Row]) -> str:
    lines = (
        [
            row["case"],
            size_of(row["bytes"] / 2),
            seconds(row["seconds"]["fastnorm"]),
            times(over),
            times(step),
        ]
        for row, over, step in steps(sorted(rows, key=lambda row: str(row["function"])))
    )
    return table(["case", "size", "time", "over the copy", "risen by"], lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    **dict.fromkeys(COMPARED, compared),
    "out": _out,
    "threads": lambda rows: _beside(rows, "one thread", lambda row: row["ratios"]["one thread"]),
    "cliff": _cliff,
    "door": lambda rows: _beside(rows, "np.empty_like", _longer),
    "import": lambda rows: _beside(rows, "import numpy", _longer),
}


def _longer(row: Row) -> float:
    """How many times as long as the other contender fastnorm takes."""
    (ratio,) = row["ratios"].values()
    return float(1 / ratio)


# --- What was asked -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """One figure that is asked for, and how it is taken from the rows of a kind."""

    what: str
    kind: str
    wanted: float
    figure: Callable[[list[Row]], float | None]
    """None where no row tells."""
    at_most: bool = False
    where: Callable[[Row], bool] = lambda row: True

    def measured(self, rows: Sequence[Row]) -> float | None:
        chosen = [row for row in rows if row["kind"] == self.kind and self.where(row)]
        return self.figure(chosen) if chosen else None

    def met(self, value: float) -> bool:
        return value <= self.wanted if self.at_most else value >= self.wanted


def _torch(rows: list[Row]) -> list[float]:
    return [row["ratios"][TORCH] for row in rows if TORCH in row["ratios"]]


def _best(rows: list[Row]) -> list[float]:
    """Compared with the fastest peer of each case."""
    return [min(row["ratios"].values()) for row in rows if row["ratios"]]


def _of(
    total: Callable[[list[float]], float], values: Callable[[list[Row]], list[float]]
) -> Callable[[list[Row]], float | None]:
    def figure(rows: list[Row]) -> float | None:
        found = values(rows)
        return total(found) if found else None

    return figure


def _door(rows: list[Row]) -> float:
    (row,) = rows
    return float(row["seconds"]["fastnorm"] / (2 * row["seconds"]["np.empty_like"] + 0.5e-6))


def _begins(*beginnings: str) -> Callable[[Row], bool]:
    return lambda row: row["case"].startswith(beginnings)


def _fits(row: Row) -> bool:
    return "256x256x256" not in row["case"]


def _shares(rows: list[Row]) -> list[float]:
    return [row["share_of_copy"] for row in rows]


def _faster(rows: list[Row]) -> list[float]:
    return [row["ratios"]["one thread"] for row in rows]


def _rises(rows: list[Row]) -> list[float]:
    return [step for _, _, step in steps(rows) if step is not None]


def _longest(rows: list[Row]) -> list[float]:
    return [_longer(row) for row in rows]


DEMANDS = (
    Demand("forward, geometric mean, PyTorch", "forward", 3.0, _of(geometric_mean, _torch)),
    Demand("forward, geometric mean, best peer", "forward", 2.0, _of(geometric_mean, _best)),
    Demand("forward, least, any peer", "forward", 1.0, _of(min, _best)),
    Demand(
        "calls up to 8x768, least, PyTorch",
        "forward",
        4.0,
        _of(min, _torch),
        where=lambda row: row["small"],
    ),
    Demand("1x64 over (2 empty_like + 0.5 µs)", "door", 1.0, _door, at_most=True),
    Demand("backward, geometric mean, PyTorch", "backward", 2.0, _of(geometric_mean, _torch)),
    Demand("backward, least, PyTorch", "backward", 1.0, _of(min, _torch)),
    Demand("backward, least, any peer", "backward", 1.0, _of(min, _best)),
    Demand(
        "group norm + SiLU, least, PyTorch",
        "fused",
        4.0,
        _of(min, _torch),
        where=_begins("group_norm"),
    ),
    Demand(
        "add_rms_norm, least, PyTorch",
        "fused",
        4.0,
        _of(min, _torch),
        where=_begins("add_rms_norm"),
    ),
    Demand(
        "batch norm + residual + ReLU, least, PyTorch",
        "fused",
        2.5,
        _of(min, _torch),
        where=_begins("batch_norm"),
    ),
    Demand("fused, least, any peer", "fused", 1.0, _of(min, _best)),
    Demand("out= over 100 MB, least share of the copy", "out", 0.85, _of(min, _shares)),
    Demand("all threads over one, in cache, least", "threads", 1.7, _of(min, _faster), where=_fits),
    Demand(
        "all threads over one, 1x1x256x256x256",
        "threads",
        1.0,
        _of(min, _faster),
        where=lambda row: not _fits(row),
    ),
    Demand("size doubled, highest rise over the copy", "cliff", 1.3, _of(max, _rises), True),
    Demand(
        "import over import numpy",
        "import",
        1.25,
        _of(max, _longest),
        True,
        where=_begins("import fastnorm"),
    ),
    Demand(
        "import and first group_norm over import numpy",
        "import",
        1.4,
        _of(max, _longest),
        True,
        where=_begins("import and"),
    ),
)


def summary(rows: Sequence[Row]) -> str:
    """What was asked, and what was measured."""
    lines = []
    for demand in DEMANDS:
        value = demand.measured(rows)
        wanted = f"{'≤' if demand.at_most else '≥'} {demand.wanted}"
        verdict = "not measured" if value is None else "yes" if demand.met(value) else "**no**"
        lines.append([demand.what, wanted, times(value), verdict])
    return table(["what", "wanted", "measured", "met"], lines)


# --- The whole, and the README --------------------------------------------------------------------


EXPLAINED = """\
Times are medians over rounds in which all contenders took turns; a result is allocated in each call
unless the case says `out=`. A peer's column says how many times as long as fastnorm it takes. Bold,
and marked ▼: it is faster. – : it can not run the case. "The copy" moves as many bytes with as many
threads as fast as was found possible, through the caches or past them, and into a fresh array where
the case returns one.
"""


def render(results: dict[str, Any]) -> str:
    """The whole report."""
    rows = results["rows"]
    parts = ["# Benchmarks", "\n".join(f"- {fact}" for fact in facts(results["machine"]))]
    parts += [EXPLAINED.strip(), restless(rows), "## Asked and measured", summary(rows)]
    for kind, title in TITLES.items():
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            parts += [f"## {title}", TABLES[kind](chosen)]
    absent: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row.get("absent", {}).items():
            absent.setdefault(f"{name}: {reason}", []).append(row["case"])
    if absent:
        lines = [
            f"- {told} ({cases[0] if len(cases) == 1 else f'{len(cases)} cases'})"
            for told, cases in sorted(absent.items())
        ]
        parts += ["## Why there is a dash", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def restless(rows: Sequence[Row]) -> str:
    """How many figures are worth less than the others."""
    count = sum(row["spread"].get("fastnorm", 0.0) > 0.2 for row in rows)
    return (
        f"In {count} of {len(rows)} rows the middle half of fastnorm's rounds lay more than 20 % "
        "apart: the machine was not quiet."
        if count
        else "In no row did the middle half of fastnorm's rounds lie more than 20 % apart."
    )


def compact(results: dict[str, Any], link: str) -> str:
    """For the README: some rows, all losing ones, the machine."""
    shown = {str(case) for case in SHOWN}
    rows = [row for row in results["rows"] if row["kind"] in COMPARED]
    chosen = [row for row in rows if row["case"] in shown or losing(row)]
    machine = results["machine"]
    lost = sum(map(losing, rows))
    slower = (
        f"Of {len(rows)} cases a peer is faster in {lost}, which are all listed here, marked ▼."
    )
    if not lost:
        slower = f"In none of {len(rows)} cases a peer is faster."
    text = (
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction set']}, "
        f"{machine['date']}; `make bench` measures it. Of the copy: how long that takes over what "
        "fastnorm takes. A peer's column says how many times as long as fastnorm it takes. "
        f"{slower} [All of them]({link})."
    )
    return f"{compared(chosen)}\n\n{text}"


def insert(readme: str, text: str) -> str:
    """The README with `text` between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the README needs the markers {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def load(path: Path) -> dict[str, Any]:
    """The machine and the rows, of pytest-benchmark's JSON or of this module's own."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" in found:
        rows = [b["extra_info"] for b in found["benchmarks"] if "kind" in b["extra_info"]]
        found = {"machine": found["machine_info"], "rows": rows}
    found = rounded(found)
    return found


def rounded(value: Any) -> Any:
    """Four digits are more than any figure here is good for."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def dump(results: dict[str, Any]) -> str:
    """One line for each row: what changed can be read."""
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in results["rows"])
    machine = json.dumps(results["machine"], ensure_ascii=False)
    return f'{{\n"machine": {machine},\n"rows": [\n{rows}\n]\n}}\n'


def name_of(machine: dict[str, Any]) -> str:
    words = re.findall(r"[a-z0-9]+", machine["processor"].lower())
    return "-".join([*words, str(machine["threads"]), "threads"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON")
    parser.add_argument("--name", help="of the files (default: the machine)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where they go")
    parser.add_argument("--readme", type=Path, help="put the short table into this file, too")
    options = parser.parse_args()
    results = load(options.results)
    options.folder.mkdir(parents=True, exist_ok=True)
    page = options.folder / f"{options.name or name_of(results['machine'])}.md"
    page.write_text(render(results), encoding="utf-8")
    page.with_suffix(".json").write_text(dump(results), encoding="utf-8")
    print(page)
    if options.readme:
        link = page.resolve().relative_to(options.readme.resolve().parent).as_posix()
        text = insert(options.readme.read_text(encoding="utf-8"), compact(results, link))
        options.readme.write_text(text, encoding="utf-8")
        print(options.readme)


if __name__ == "__main__":
    main()
