"""What ``fastnorm bench`` does: norms, their peers and a copy are timed.

A call is written as in "group_norm 8x256x32x32 channels-last bfloat16 + silu"; the names in results
are such calls. `case_of` makes of one what `fastnorm._bench` times.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm import limits
from fastnorm import machine as machines
from fastnorm._bench import copying, machine, peers, text
from fastnorm._bench.cases import GROUPS, Array, Case, data
from fastnorm._bench.rows import COPY, Row, row
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, compete
from fastnorm._files.names import CannotUse
from fastnorm.arguments import ACTIVATIONS, did_you_mean
from fastnorm.operations import OPERATIONS
from fastnorm.workers import busy_processes

FUNCTIONS = tuple(dict.fromkeys(op.name for op in OPERATIONS))
DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("channels-first", "channels-last")
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
MOST = 2**40  # bytes, beyond which no x is tried
ARRAYS = 10  # of x's size, or of float64, that a case needs at once

# --- A call ---------------------------------------------------------------------------------------

# What names of cases say in words, as options.
WORDS = {
    "channels-last": ["--layout", "channels-last"],
    "backward": ["--backward"],
    "residual": ["--residual"],
    "out=": ["--out"],
    "(training)": ["--training"],
    "(inference)": [],
    "(axis)": ["--axis", "1"],
    "+": [],
    **{name: ["--dtype", name] for name in DTYPES},
    **{str(name): ["--activation", name] for name in ACTIVATIONS},
}
# What may stand in a call, and whether it takes a value.
OPTIONS = {
    "--num-groups": True,
    "--layout": True,
    "--dtype": True,
    "--backward": False,
    "--activation": True,
    "--residual": False,
    "--training": False,
    "--axis": True,
    "--out": False,
}
_OPTIONS = ", ".join(OPTIONS)
# Those that only one function has.
OWN = {"num_groups": "group_norm", "training": "batch_norm", "axis": "layer_norm"}
# What is said of a model's norms, all of them; and those of its norms that have channels.
OF_MODELS = ("layout", "dtype", "backward", "training")
CHANNELS = ("batch_norm", "instance_norm", "group_norm")
SHAPE = re.compile(r"[0-9]+(?:[x,][0-9]+)*")


def words_of(call: str, words: Sequence[str]) -> tuple[str, tuple[int, ...], list[str]]:
    """The function of a call, the shape, and everything else as options.

    Parameters
    ----------
    call
        As it was written, for messages.
    words
        Its words.

    Raises
    ------
    CannotUse
        If it has no function, no shape, or a word that says nothing here.
    """
    expected = 'expected a function and a shape, as in "layer_norm 4096x768"'
    if not words:
        raise CannotUse(f"CALL is {call!r}, {expected}")
    name, *rest = words
    if name not in FUNCTIONS:
        meant = did_you_mean(name, FUNCTIONS)
        known = f"one of {', '.join(FUNCTIONS)}"
        raise CannotUse(f"CALL {call!r} begins with {name!r}, expected {known}{meant}")
    shape: tuple[int, ...] | None = None
    options: list[str] = []
    value = False
    for word in rest:
        if value:
            options.append(word)
            value = False
        elif word.startswith("--"):
            flag, given, _ = word.partition("=")
            if flag not in OPTIONS:
                meant = did_you_mean(flag, tuple(OPTIONS))
                raise CannotUse(f"CALL {call!r} has {flag}, expected one of {_OPTIONS}{meant}")
            options.append(word)
            value = OPTIONS[flag] and not given
        elif word in WORDS:
            options += WORDS[word]
        elif word.startswith("num_groups="):
            options += ["--num-groups", word.partition("=")[2]]
        elif shape is None:
            shape = shape_of(f"CALL {call!r}", word)
        else:
            meant = did_you_mean(word, tuple(WORDS))
            raise CannotUse(f"CALL {call!r} has {word!r}, expected an option{meant}")
    if shape is None:
        raise CannotUse(f"CALL {call!r} has no shape, {expected}")
    return name, shape, options


def shape_of(what: str, word: str) -> tuple[int, ...]:
    """From "8x256x32x32"; `what` is for messages."""
    if not SHAPE.fullmatch(word):
        raise CannotUse(f"{what} has {word!r} for a shape, expected one like 8x256x32x32")
    for digits in (sizes := re.split("[x,]", word)):
        if len(digits) > 12 or int(digits) < 1:
            raise CannotUse(f"{what} has an axis of {digits} elements, expected 1 or more")
    return tuple(map(int, sizes))


def case_of(
    name: str,
    shape: tuple[int, ...],
    *,
    num_groups: int | None = None,
    layout: str = LAYOUTS[0],
    dtype: str = "float32",
    backward: bool = False,
    activation: str | None = None,
    residual: bool = False,
    training: bool = False,
    axis: int = -1,
    out: bool = False,
) -> Case:
    """What is timed of a function on a shape.

    Raises
    ------
    CannotUse
        If the function does not take that, or PyTorch and fastnorm refuse the shape.
    """
    which = {"batch_norm": f"batch_norm ({'training' if training else 'inference'})"}
    which["layer_norm"] = f"layer_norm ({'axis' if axis == 1 else 'normalized_shape'})"
    (op,) = (op for op in OPERATIONS if op.label == which.get(name, name))
    given = f"{name} {'x'.join(map(str, shape))}"
    channels = "channel_axis" in op.features or axis == 1
    refusals: list[tuple[bool, str]] = [
        (axis not in (-1, 1), f"--axis {axis}: expected 1 or -1"),
        (axis == 1 and name != OWN["axis"], f"--axis: it is of {OWN['axis']}"),
        (training and name != OWN["training"], f"--training: it is of {OWN['training']}"),
        (
            num_groups is not None and name != OWN["num_groups"],
            f"--num-groups: it is of {OWN['num_groups']}",
        ),
        (activation is not None and "activation" not in op.features, "--activation"),
        (residual and "residual" not in op.features, "--residual"),
        (out and "out" not in op.features, "--out"),
        (
            backward and op.elementwise_backward is not None,
            "--backward: its gradients are not timed",
        ),
        (backward and op.backward is None, "--backward: there is no such function"),
        (
            backward and (activation is not None or residual or out),
            "--activation, --residual or --out with --backward",
        ),
        (layout != LAYOUTS[0] and not channels, "--layout: it has no channel axis"),
    ]
    for refused, what in refusals:
        if refused:
            raise CannotUse(f"{given} does not take {what}")
    least = max(op.min_ndim, 3 if layout != LAYOUTS[0] else 1)
    if len(shape) < least:
        why = " for channels-last" if least > op.min_ndim else ""
        raise CannotUse(f"{given} has {len(shape)} axes, expected {least} or more{why}")
    if op.grouped:
        num_groups = math.gcd(GROUPS, shape[1]) if num_groups is None else num_groups
        if num_groups < 1 or shape[1] % num_groups:
            few = range(1, min(shape[1], 4096) + 1)
            divisors = ", ".join(str(n) for n in few if shape[1] % n == 0)
            raise CannotUse(
                f"{given} got --num-groups {num_groups} for {shape[1]} channels, expected a "
                f"divisor: {divisors}"
            )
    if op.refuses(shape, num_groups=num_groups):
        raise CannotUse(f"{given} has one value for each statistic, expected two or more")
    if dtype == "bfloat16" and find_spec("ml_dtypes") is None:
        raise CannotUse("--dtype bfloat16 needs ml_dtypes: pip install ml_dtypes")
    last = layout != LAYOUTS[0]
    case = Case(op.label, shape, num_groups, last, dtype, backward, activation, residual, out)
    needed, there = ARRAYS * max(case.bytes, 4 * math.prod(shape)), limits.memory()
    if case.bytes > MOST or needed > there:
        raise CannotUse(
            f"{given} would take {text.size_of(needed)} with its results and copies, expected at "
            f"most the {text.size_of(there)} that this machine has"
        )
    return case


def case_of_text(call: str) -> Case:
    """What a text such as "group_norm 8x256x32x32 channels-last" says.

    Raises
    ------
    CannotUse
        If it says nothing here.
    """
    try:
        words = shlex.split(call)
    except ValueError as error:
        raise CannotUse(f"CALL {call!r} cannot be read: {error}") from None
    name, shape, rest = words_of(call, words)
    choices = {"layout": LAYOUTS, "dtype": DTYPES, "activation": tuple(ACTIVATIONS)}
    options: dict[str, Any] = {}
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        option = flag[2:].replace("-", "_")
        if not OPTIONS[flag]:
            options[option] = True
            continue
        if not given:
            if not rest:
                raise CannotUse(f"CALL {call!r}: {flag} needs a value")
            value = rest.pop(0)
        if option in choices and value not in choices[option]:
            expected = f"expected one of {', '.join(choices[option])}"
            meant = did_you_mean(value, choices[option])
            raise CannotUse(f"CALL {call!r} has {flag} {value!r}, {expected}{meant}")
        if option not in choices and not re.fullmatch("-?[0-9]{1,9}", value):
            raise CannotUse(f"CALL {call!r} has {flag} {value!r}, expected a whole number")
        options[option] = value if option in choices else int(value)
    return case_of(name, shape, **options)


def of_model(
    name: str,
    given: tuple[int, ...] | None = None,
    *,
    layout: str = LAYOUTS[0],
    training: bool = False,
    **options: Any,
) -> tuple[list[Case], dict[str, Any]]:
    """The different calls of a PyTorch model's norms, and what is known of the model.

    Parameters
    ----------
    name, given, training
        As for `fastnorm._bench.models.norms_of`.
    layout
        Of the norms with channels on axis 1.
    options
        As for :func:`case_of`.

    Raises
    ------
    CannotUse
        If there is no such model here, or it cannot be run.
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


def missing(name: str) -> str | None:
    """What to type for a peer that is not installed; None for one that is."""
    modules, line = NEEDED[name]
    return line if any(find_spec(module) is None for module in modules) else None


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

    Parameters
    ----------
    cases
        From :func:`case_of`.
    threads
        Numbers of threads.
    names
        Of the peers, from `PEERS`.
    load
        How many processes are kept busy meanwhile.
    seconds
        Of each turn, at least.
    rounds
        In which each contender has a turn.
    report
        Called `steps` times, with what is begun.

    Returns
    -------
    dict
        Ready for JSON: ``machine``, ``method`` and ``rows``.
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
        what = f"{case}, {_of_threads(threads)}"
        report(f"{what}: are the results equal?")
        arrays = data(case)
        own = peers.PEERS["fastnorm"](case, arrays)
        contenders = {"fastnorm": own.contender()}
        expected = [_wide(array) for array in own.answer(own.call())]
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


def _wide(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _notes(contenders: dict[str, Contender], threads: int) -> list[str]:
    """In what the comparison is not one of equals."""
    cores = machines.here.cores
    notes = []
    if threads > cores:
        notes.append(f"{_of_threads(threads)} share {cores} cores")
    if "numpy" in contenders and threads > 1:
        notes.append("numpy uses one thread, whatever is asked for")
    if "jax" in contenders and threads != cores:
        notes.append(f"jax uses all {cores} cores: that cannot be changed while it runs")
    return notes


def _of_threads(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"


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
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    count = f", {each['count']} times in the model" if each.get("count", 1) > 1 else ""
    told = [f"{each['case']}, {_of_threads(each['threads'])}{count}"]
    told += [line.rstrip() for line in aligned]
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
        told.append(f"  {_of_threads(total['threads'])}: {', '.join(parts)}")
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
        axis.set_title(f"{each['case']}, {_of_threads(each['threads'])}", loc="left", fontsize=10)
        axis.set_xlim(0, 1.2 * max(times))
        axis.xaxis.set_major_formatter(lambda taken, _: text.seconds(taken) if taken else "0")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
