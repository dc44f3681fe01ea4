"""The three numbers of the first page, from files in benchmarks/results."""

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


def setup(app):
    """Register the directive."""
    app.add_directive("site-figures", SiteFigures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
