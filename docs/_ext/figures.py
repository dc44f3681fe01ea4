"""What was measured, from files in benchmarks/results: three numbers, and tables."""

import json
import statistics
from pathlib import Path

from docutils.nodes import raw
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"


def newest(kind):
    """The results of that kind that were measured last."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in RESULTS.glob(f"*-{kind}.json")]
    return max(found, key=lambda results: results["machine"]["date"])


def figures():
    """A number, what it is, the command, and the facts of the machine, three times."""
    accuracy, threads, load = newest("accuracy"), newest("threads"), newest("load")
    (row,) = [r for r in accuracy["rows"] if r["mean_over_std"] == 10**6]
    ours, *others = row["errors"].values()
    digits, power = f"{ours:.0e}".split("e")
    yield (
        f"{digits} × 10<sup>−{abs(int(power))}</sup>",
        (
            "standard deviations is the largest error where the mean is a million of them."
            f" Of {len(others)} other libraries: {min(others):.1g} to {max(others):.1g}."
        ),
        "python -m benchmarks.accuracy",
        accuracy["machine"],
    )
    ratios = [r["ratios"]["torch"] for r in threads["rows"] if r["ratios"].get("torch")]
    faster = sum(ratio < 1 for ratio in ratios)
    yield (
        f"{statistics.geometric_mean(ratios):.1f} times",
        (
            f"as long as fastnorm: what PyTorch takes, geometric mean of {len(ratios)} calls."
            f" It is faster in {faster or 'none'} of them."
        ),
        "make bench",
        threads["machine"],
    )
    times = [row["times"] for row in load["rows"] if row["load"] == 1]
    waits = [t["two threads"] / t["one thread"] for t in times]
    others = [t["torch"] / t["two threads"] for t in times]
    yield (
        f"{statistics.geometric_mean(others):.1f} times",
        (
            "as long as fastnorm: what PyTorch takes next to a program that keeps a processor busy,"
            " both with two threads. Of fastnorm, one thread takes"
            f" {1 / statistics.geometric_mean(waits):.2f} times as long as two there."
        ),
        "python -m benchmarks.load",
        load["machine"],
    )


class SiteFigures(SphinxDirective):
    """``.. site-figures::`` shows them."""

    def run(self):
        """Return the list, and note the files that it was made from."""
        for path in RESULTS.glob("*.json"):
            self.env.note_dependency(str(path))
        items = [
            f"<li><strong>{number}</strong>{text}<br><small><code>{command}</code>,"
            f" {machine['processor']}, {machine['threads']} threads, {machine['date']}</small></li>"
            for number, text, command, machine in figures()
        ]
        html = f'<ul class="figures">{"".join(items)}</ul>'
        return [raw("", html, format="html")]


class KeptTable(SphinxDirective):
    """``.. kept-table:: transformer`` shows the tables of that kind, one for each machine."""

    required_arguments = 1

    def run(self):
        """Return the tables, each under the facts of its machine."""
        lines = []
        for path in sorted(RESULTS.glob(f"*-{self.arguments[0]}.md")):
            self.env.note_dependency(str(path))
            lines += as_rst(path.read_text(encoding="utf-8"))
        if not lines:
            raise self.error(f"benchmarks/results has no *-{self.arguments[0]}.md")
        return self.parse_text_to_nodes("\n".join(lines))


def as_rst(page):
    """The lines of a page that `benchmarks.kept` wrote: its facts, and its table."""
    written = page.splitlines()
    facts = [line.removeprefix("- ") for line in written if line.startswith("- ")]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in written
        if line.startswith("|") and not line.startswith("| ---")
    ]
    table = [f"   {'*' if i == 0 else ' '} - {cell}" for row in rows for i, cell in enumerate(row)]
    return ["; ".join(facts), "", ".. list-table::", "   :header-rows: 1", "", *table, ""]


def setup(app):
    """Register the directives."""
    app.add_directive("site-figures", SiteFigures)
    app.add_directive("kept-table", KeptTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
