"""What ``fastnorm bench`` does: norms, their peers and a copy are timed.

The names in results are calls, as `fastnorm.calls` reads them.
"""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fastnorm as fn
from fastnorm import machine as machines
from fastnorm._bench import copying, machine, peers, text
from fastnorm._bench.cases import Case, data, wide
from fastnorm._bench.rows import COPY, Row, row
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, compete
from fastnorm._files.names import CannotUse
from fastnorm.calls import LAYOUTS, case_of
from fastnorm.workers import busy_processes

PEERS = tuple(name for name in peers.PEERS if name != "fastnorm")
# Timed where nothing is said, if installed; compiling takes longer than all the rest.
USUAL = tuple(name for name in PEERS if name != "torch.compile")
NEEDED = {
    "torch": (("torch",), "pip install torch"),
    "torch.compile": (("torch",), "pip install torch"),
    "onnxruntime": (("onnxruntime", "onnx"), "pip install onnxruntime onnx"),
    "jax": (("jax",), "pip install jax"),
    "numpy": ((), ""),
}
# What is said of a model's norms, all of them; and those of its norms that have channels.
OF_MODELS = ("layout", "dtype", "backward", "training")
CHANNELS = ("batch_norm", "instance_norm", "group_norm")


def missing(name: str) -> str | None:
    """What to type for a peer that is not installed; None for one that is."""
    modules, line = NEEDED[name]
    return line if any(find_spec(module) is None for module in modules) else None


# --- The norms of a model -------------------------------------------------------------------------


def of_model(
    name: str,
    given: tuple[int, ...] | None = None,
    *,
    layout: str = LAYOUTS[0],
    training: bool = False,
    **options: Any,
) -> tuple[list[Case], dict[str, Any]]:
    """The different calls of a PyTorch model's norms, and what is known of the model.

    The layout is that of norms with channels on axis 1. `norms_of` says what the model is asked
    for, and `case_of` what the other options are.
    """
    from fastnorm._bench.models import norms_of

    try:
        found = norms_of(name, given, training=training)
    except ValueError as error:
        raise CannotUse(f"--torch-model {name}: {error}") from None
    counts: Counter[Case] = Counter()
    for (function, shape, own), count in found.calls.items():
        more = dict(own)
        if len(shape) > 2 and (function.startswith(CHANNELS) or "axis" in more):
            more["layout"] = layout
        counts[case_of(function, shape, **more, **options)] += count
    about = {
        "name": name,
        "library": found.source,
        "input": found.given,
        "norms": counts.total(),
        "left out": dict(found.left_out),
        "counts": list(counts.values()),
    }
    return list(counts), about


def add_model(results: dict[str, Any], about: dict[str, Any]) -> None:
    """Put the model into the results: each row's count, and the time of all its norms."""
    rows, counts = results["rows"], about.pop("counts")
    each = len(rows) // len(counts)  # numbers of threads
    for i, r in enumerate(rows):
        r["count"] = counts[i // each]
    totals = []
    for i, first in enumerate(rows[:each]):
        alike = rows[i::each]
        seconds = {
            name: sum(r["count"] * r["seconds"][name] for r in alike)
            for name in first["seconds"]
            if all(name in r["seconds"] for r in alike)
        }
        totals.append({"threads": first["threads"], "seconds": seconds})
    results["model"] = about | {"totals": totals}


# --- The work -------------------------------------------------------------------------------------


def steps(cases: Sequence[Any], threads: Sequence[int], rounds: int = ROUNDS) -> int:
    """Return how often :func:`run` will report."""
    return len(cases) * len(threads) * (1 + rounds)


def run(
    cases: Sequence[Case],
    *,
    threads: Sequence[int],
    names: Sequence[str] = USUAL,
    load: int = 0,
    seconds: float = BLOCK,
    rounds: int = ROUNDS,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Time each case, its peers and a copy, with each number of threads.

    Of the peers those of these `names`, while `load` processes are kept busy; each contender for so
    many `rounds` of so many `seconds` at least. `report` is called `steps` times, with what is
    begun. The result is ready for JSON: ``machine``, ``method`` and ``rows``.
    """
    about = machine.facts() | {"busy": machine.busy(0.1)}
    del about["threads"]  # each row has its own
    with ExitStack() as stack:
        stack.enter_context(peers.settings_kept())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the peers' are theirs
        stack.enter_context(busy_processes(load))
        rows = [
            _compared(case, n, names, seconds, rounds, report) for case in cases for n in threads
        ]
    method = {"seconds": seconds, "rounds": rounds, "load": load, "copy": COPIED}
    return {"machine": about, "method": method, "rows": rows}


COPIED = (
    "as many bytes read and written with np.copyto (np.bitwise_xor where two arrays are read), on "
    "one thread or in parts on all, whichever is faster"
)


def _compared(
    case: Case,
    threads: int,
    names: Sequence[str],
    seconds: float,
    rounds: int,
    report: Callable[[str], None],
) -> Row:
    peers.set_torch_threads(threads)
    with fn.threads(threads), ThreadPoolExecutor(threads) as pool:
        threads = fn.get_num_threads()
        what = f"{case}, {text.threads(threads)}"
        report(f"{what}: are the results equal?")
        arrays = data(case)
        own = peers.PEERS["fastnorm"](case, arrays)
        contenders = {"fastnorm": own.contender()}
        expected = [wide(array) for array in own.answer(own.call())]
        absent: dict[str, str] = {}
        different: list[str] = []
        difference: dict[str, float] = {}
        for name in names:
            try:
                peer = peers.checked(name, case, arrays, expected)
            except peers.Absent as reason:
                absent[name] = str(reason)
                different += [name] if isinstance(reason, peers.Wrong) else []
            else:
                contenders[name] = peer.contender()
                difference[name] = peer.difference
        del expected
        moves: list[copying.Move] = [copying.with_numpy]
        moves += [copying.in_parts(pool, threads)] if threads > 1 else []
        contenders[COPY] = Contender(copying.copy(case, arrays, moves))
        compete(contenders, rounds, seconds, lambda: report(what))
        return row(
            case.kind,
            str(case),
            contenders,
            bytes=copying.bytes_moved(case, arrays),
            threads=threads,
            difference=difference,
            absent=absent,
            different=different,
            notes=_notes(contenders, threads),
        )


def _notes(contenders: dict[str, Contender], threads: int) -> list[str]:
    """In what the comparison is not one of equals."""
    cores = machines.here.cores
    notes = []
    if threads > cores:
        notes.append(f"{text.threads(threads)} share {cores} cores")
    if "numpy" in contenders and threads > 1:
        notes.append("numpy uses one thread, whatever is asked for")
    if "jax" in contenders and threads != cores:
        notes.append(f"jax uses all {cores} cores: that cannot be changed while it runs")
    return notes


# --- What was found -------------------------------------------------------------------------------


def to_text(results: dict[str, Any]) -> str:
    """Return it as tables for a terminal."""
    method = results["method"]
    parts = ["\n".join(text.facts(results["machine"]))]
    parts += [_table(each) for each in results["rows"]]
    parts += [_model(results["model"])] if "model" in results else []
    turn = text.seconds(method["seconds"])
    rounds = f"{method['rounds']} turn{'s' if method['rounds'] > 1 else ''}"
    load = f", while {method['load']} other processes were busy" if method["load"] else ""
    parts.append(
        f"time: the median of {rounds} of {turn} or more{load}.\n"
        "times: as long as fastnorm takes.\n"
        "spread: the middle half of the turns, as a share of the time.\n"
        "differs by: the most that any element differs from fastnorm's.\n"
        + "\n".join(textwrap.wrap(f"copy: {COPIED}.", 88))
        + "\nA result is a fresh array in each call, unless the case says out=."
    )
    return "\n\n".join(parts)


def _table(each: Row) -> str:
    """One case: a line for each contender, and what there is to say about it."""
    own = each["seconds"]["fastnorm"]
    lines = [["", "time", "times", "GB/s", "spread", "differs by"]]
    for name, taken in each["seconds"].items():
        off = each["difference"].get(name)
        lines.append(
            [
                f"  {name}",
                text.seconds(taken),
                text.times(taken / own),
                f"{each['bytes'] / taken / 1e9:.1f}",
                f"{100 * each['spread'][name]:.0f} %",
                "" if off is None else f"{off:.1e}",
            ]
        )
    count = f", {each['count']} times in the model" if each.get("count", 1) > 1 else ""
    told = [f"{each['case']}, {text.threads(each['threads'])}{count}"]
    told += [line.rstrip() for line in text.aligned(lines, "<>")]
    for name, reason in each["absent"].items():
        told.append(f"  {name}: {'DIFFERENT, ' if name in each['different'] else ''}{reason}")
    told += [f"  {note}" for note in each["notes"]]
    return "\n".join(told)


def _model(model: dict[str, Any]) -> str:
    """All norms of a model together."""
    given = "x".join(map(str, model["input"]))
    told = [f"all {model['norms']} norms of {model['library']}'s {model['name']}, input {given}"]
    for total in model["totals"]:
        seconds = total["seconds"]
        own = seconds["fastnorm"]
        parts = [f"{name} {text.seconds(t)} ({text.times(t / own)})" for name, t in seconds.items()]
        told.append(f"  {text.threads(total['threads'])}: {', '.join(parts)}")
    if model["left out"]:
        left = ", ".join(f"{count} {name}" for name, count in model["left out"].items())
        told.append(f"  left out, as fastnorm has no such function: {left}")
    return "\n".join(told)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the times of each case as bars, into a file of matplotlib's kinds."""
    from matplotlib.figure import Figure

    rows = results["rows"]
    heights = [1.1 + 0.28 * len(each["seconds"]) for each in rows]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False, gridspec_kw={"height_ratios": heights})
    for each, (axis,) in zip(rows, axes):
        names = list(each["seconds"])[::-1]
        times = [each["seconds"][name] for name in names]
        colours = ["C0" if name == "fastnorm" else "0.6" for name in names]
        bars = axis.barh(names, times, color=colours)
        axis.bar_label(bars, [text.seconds(taken) for taken in times], padding=3)
        axis.set_title(f"{each['case']}, {text.threads(each['threads'])}", loc="left", fontsize=10)
        axis.set_xlim(0, 1.2 * max(times))
        axis.xaxis.set_major_formatter(lambda taken, _: text.seconds(taken) if taken else "0")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
