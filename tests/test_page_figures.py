"""Figures in sentences and tables of pages are those of the files that commands wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest

from .helpers import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def page(name: str) -> str:
    """A page with single spaces, without what makes numbers bold."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").replace("**", "").split())


def kept(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def newest(kind: str) -> Any:
    """The results of that kind that were measured last."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in RESULTS.glob(f"*-{kind}.json")]
    return max(found, key=lambda results: results["machine"]["date"])


def signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def spread(values: Iterable[float], digits: int) -> str:
    values = list(values)
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


# --- What each page has to say --------------------------------------------------------------------


def placement() -> Iterator[str]:
    found = kept("placement.json")
    machine = found["machine"]
    yield f"computed on an {machine['processor']}, {machine['instruction set']}, {machine['date']}."
    for name, of in found["gradient"].items():
        cells = [
            f"{of['norms'][i]:.2f} ± {of['spread'][i]:.2f}"
            for i in map(of["depths"].index, (2, 12, 48))
        ]
        yield " - ".join([f"* - {name}", *cells, signed(of["slope"])])
    (steep, flat), (low, high) = (
        (min(slopes), max(slopes))
        for slopes in (found["gradient"][name]["slopes"] for name in ("pre", "post"))
    )
    yield (
        f"slopes of single seeds are {signed(flat)} to {signed(steep)} with Pre-LN and "
        f"{signed(low)} to {signed(high)} with Post-LN"
    )
    pre, post, peri, deep = (found["residual"][n] for n in ("pre", "post", "peri", "deepnorm"))
    off = 100 * (post["mean"] / post["expected"] - 1)
    yield f"{post['mean']:.3f} d with Post-LN"
    yield f"the mean of 48 layers and three networks, {off:.1f} %"
    yield f"{pre['sizes'][1]:.2f} d after layer 1 ("
    low, high = pre["lower"][48], pre["upper"][48]
    yield f"{pre['sizes'][48]:.2f} d after layer 48 ({low:.0f} and {high:.0f})"
    yield f"ends at {peri['sizes'][48]:.1f} d. DeepNorm stays at {deep['mean']:.1f} d"
    training = found["training"]
    yield f"{training['characters'] / 1000:.0f} thousand characters"
    yield f"0.1 nats below {training['entropy']:.2f}"
    best = min(training["runs"], key=lambda run: run["loss"])
    assert (best["placement"], best["warmup"], best["lr"]) == ("deepnorm", False, 0.008)
    yield f"one run of three has the lowest loss of all, {best['loss']:.2f}."
    post = [run for run in training["runs"] if run["placement"] == "post"]
    tried = [
        [run["loss"] for run in post if (run["warmup"], run["lr"]) == way]
        for way in product((False, True), training["rates"])
    ]
    yield f"best loss of Post-LN, {spread(min(tried, key=statistics.mean), 2)}, takes a high rate"
    for name in ("pre", "post", "peri", "deepnorm"):
        for warmup in (False, True):
            cells = []
            for rate in training["rates"]:
                runs = [
                    run
                    for run in training["runs"]
                    if (run["placement"], run["warmup"], run["lr"]) == (name, warmup, rate)
                ]
                diverged = sum(run["diverged"] for run in runs)
                cells.append(
                    spread([run["loss"] for run in runs], 2)
                    + (f", {diverged} of {len(runs)} diverged" if diverged else "")
                )
            yield " - ".join(["yes" if warmup else f"{name} - no", *cells])


def digits() -> Iterator[str]:
    found = kept("digits.json")
    cpu, versions = found["machine"]["cpu"], found["machine"]["versions"]
    machine = f"{cpu['name']}, {cpu['instruction set used']}"
    yield f"printed on an {machine}, with NumPy {versions['numpy']}."
    runs = found["runs"]
    sizes = list(dict.fromkeys(run["batch_size"] for run in runs))
    loss: dict[tuple[str, str, int], float] = {}
    for network, norm in dict.fromkeys((run["network"], run["norm"]) for run in runs):
        right, wrong = [], []
        for size in sizes:
            own = [
                run
                for run in runs
                if (run["network"], run["norm"], run["batch_size"]) == (network, norm, size)
            ]
            right.append(spread([100 * run["accuracy"] for run in own], 1))
            wrong.append(spread([run["loss"] for run in own], 4))
            loss[network, norm, size] = statistics.mean(run["loss"] for run in own)
        yield " - ".join([norm, *right])
        yield " - ".join([norm, *wrong])
    wide, narrow = (loss[n, "batch", 2] / loss[n, "batch", 32] for n in ("wide", "narrow"))
    yield f"rises {wide:.0f}-fold from batches of 32 to batches of 2 in the wide network"
    yield f"more than {narrow // 50 * 50:.0f}-fold in the narrow one"


def shares() -> Iterator[str]:
    found: dict[tuple[bool, int], list[float]] = {}
    for row in newest("shares")["rows"]:
        share = row["times"]["copy"] / row["times"]["fastnorm"]
        found.setdefault((row["bytes"] <= 16 << 20, row["load"]), []).append(share)
    low, high = (1 / of(found[True, 0]) for of in (max, min))
    yield f"a quiet norm takes {low:.1f} to {high:.1f} times as long as a copy; from 32 MB on less."
    yield f"Up to 16 MB a quiet norm takes {low:.1f} to {high:.1f} times as long as a copy, beside"
    low, high = (1 / of(found[True, 1]) for of in (max, min))
    yield f"beside a busy program between {low:.1f} and {high:.1f} times."
    quiet, busy = ([of(found[False, load]) for of in (min, max)] for load in (0, 1))
    yield f"the copy takes {quiet[0]:.1f} to {quiet[1]:.1f} times as long as the norm"
    yield f"beside a busy program {busy[0]:.1f} to {busy[1]:.1f} times."
    assert quiet[0] > 1


def beside_others() -> tuple[float, float, float]:
    """Two threads over one, in geometric mean and at most, and PyTorch over two."""
    times = [row["times"] for row in newest("load")["rows"] if row["load"] == 1]
    waits = [t["two threads"] / t["one thread"] for t in times]
    others = [t["torch"] / t["two threads"] for t in times]
    return geometric_mean(waits), max(waits), geometric_mean(others)


def threads() -> Iterator[str]:
    yield f"{beside_others()[1]:.2f} times at most in what was measured"
    yield f"thread that is awake, {newest('cores')['machine']['hand_out'] * 1e6:.1f} µs"


def readme() -> Iterator[str]:
    mean, most, torch = beside_others()
    yield f"{mean:.2f} times in geometric mean over ten calls of 0.2 to 21 MB, {most:.2f} at most"
    yield f"PyTorch takes {torch:.1f} times as long as fastnorm"


SAYS = {
    "docs/placement.rst": placement,
    "docs/digits.rst": digits,
    "docs/speed.rst": shares,
    "docs/threads.rst": threads,
    "README.md": readme,
}


@pytest.mark.parametrize("name", SAYS)
def test_a_page_says_what_was_measured(name: str) -> None:
    text = page(name)
    missing = [sentence for sentence in SAYS[name]() if sentence not in text]
    assert not missing


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.md")), ids=lambda path: path.stem)
def test_a_kept_page_has_its_figures_beside_it(path: Path) -> None:
    assert path.with_suffix(".json").exists()
