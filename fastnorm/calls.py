"""Calls as they are written: "group_norm 8x256x32x32 channels-last bfloat16 + silu".

The names of cases in results are such calls. `case_of` makes of one what is timed, or explained.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from fastnorm import limits
from fastnorm._bench import text
from fastnorm._bench.cases import GROUPS, Case
from fastnorm._files.names import CannotUse
from fastnorm.arguments import ACTIVATIONS, did_you_mean
from fastnorm.operations import OPERATIONS

FUNCTIONS = tuple(dict.fromkeys(op.name for op in OPERATIONS))
DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("channels-first", "channels-last")
MOST = 2**40  # bytes, beyond which no x is tried
ARRAYS = 10  # of x's size, or of float64, that a case needs at once
SHAPE = re.compile(r"[0-9]+(?:[x,][0-9]+)*")


class Option(NamedTuple):
    """What may stand in a call, and after all of them."""

    help: str
    value: str | None = None
    """What stands for its value, which is a whole number without `choices`; None: it has none."""
    choices: tuple[str, ...] = ()


OPTIONS = {
    "--num-groups": Option("of group_norm (32, or what divides that too)", "N"),
    "--layout": Option(" or ".join(LAYOUTS), "NAME", LAYOUTS),
    "--dtype": Option(", ".join(DTYPES), "NAME", DTYPES),
    "--backward": Option("the gradients instead"),
    "--activation": Option(f"after the norm: {', '.join(ACTIVATIONS)}", "NAME", ACTIVATIONS),
    "--residual": Option("an array added after the norm"),
    "--training": Option("batch_norm: statistics of the batch"),
    "--axis": Option("layer_norm: over axis 1, the channels, or -1", "A"),
    "--out": Option("into an array that is there already"),
}
# Those that only one function has.
OWN = {"num_groups": "group_norm", "training": "batch_norm", "axis": "layer_norm"}
# What names of cases say in words.
WORDS: dict[str, dict[str, Any]] = {
    "channels-last": {"layout": "channels-last"},
    "backward": {"backward": True},
    "residual": {"residual": True},
    "out=": {"out": True},
    "(training)": {"training": True},
    "(inference)": {},
    "(axis)": {"axis": 1},
    "+": {},
    **{name: {"dtype": name} for name in DTYPES},
    **{str(name): {"activation": name} for name in ACTIVATIONS},
}


def name_of(flag: str) -> str:
    """The argument of `case_of` that an option is."""
    return flag[2:].replace("-", "_")


def split(call: str) -> list[str]:
    """The words of a call."""
    try:
        return shlex.split(call)
    except ValueError as error:
        raise CannotUse(f"CALL {call!r} cannot be read: {error}") from None


def read(call: str, words: Sequence[str]) -> tuple[str, tuple[int, ...], dict[str, Any]]:
    """The function of a call, the shape, and the other arguments of `case_of`.

    The call is as it was written, for messages. `CannotUse` says that it has no function, no shape,
    or a word that says nothing here.
    """
    expected = 'expected a function and a shape, as in "layer_norm 4096x768"'
    if not words:
        raise CannotUse(f"CALL is {call!r}, {expected}")
    name = words[0]
    if name not in FUNCTIONS:
        meant = did_you_mean(name, FUNCTIONS)
        known = f"one of {', '.join(FUNCTIONS)}"
        raise CannotUse(f"CALL {call!r} begins with {name!r}, expected {known}{meant}")
    shape: tuple[int, ...] | None = None
    options: dict[str, Any] = {}
    rest = iter(words[1:])
    for word in rest:
        if word.startswith(("--", "num_groups=")):
            options |= _option(call, word.replace("num_groups=", "--num-groups="), rest)
        elif word in WORDS:
            options |= WORDS[word]
        elif shape is None:
            shape = shape_of(f"CALL {call!r}", word)
        else:
            meant = did_you_mean(word, tuple(WORDS))
            raise CannotUse(f"CALL {call!r} has {word!r}, expected an option{meant}")
    if shape is None:
        raise CannotUse(f"CALL {call!r} has no shape, {expected}")
    return name, shape, options


def _option(call: str, word: str, rest: Iterator[str]) -> dict[str, Any]:
    """An option that begins with this word; its value may be the first of the others."""
    flag, given, value = word.partition("=")
    has = f"CALL {call!r} has {flag}"
    if flag not in OPTIONS:
        known = f"one of {', '.join(OPTIONS)}"
        raise CannotUse(f"{has}, expected {known}{did_you_mean(flag, tuple(OPTIONS))}")
    option = OPTIONS[flag]
    if option.value is None:
        if given:
            raise CannotUse(f"{has} with {value!r}, expected it alone")
        return {name_of(flag): True}
    found = value if given else next(rest, None)
    if found is None:
        raise CannotUse(f"{has}: expected one argument, as it needs a value")
    if option.choices:
        if found not in option.choices:
            known = f"one of {', '.join(option.choices)}"
            meant = did_you_mean(found, option.choices)
            raise CannotUse(f"{has} {found!r}, expected {known}{meant}")
        return {name_of(flag): found}
    if not re.fullmatch("-?[0-9]{1,9}", found):
        raise CannotUse(f"{has} {found!r}, expected a whole number")
    return {name_of(flag): int(found)}


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

    `CannotUse` says that the function does not take that, or that PyTorch and fastnorm refuse the
    shape.
    """
    which = {"batch_norm": f"batch_norm ({'training' if training else 'inference'})"}
    which["layer_norm"] = f"layer_norm ({'axis' if axis == 1 else 'normalized_shape'})"
    (op,) = (op for op in OPERATIONS if op.label == which.get(name, name))
    given = f"{name} {'x'.join(map(str, shape))}"
    last = layout != LAYOUTS[0]
    channels = "channel_axis" in op.features or axis == 1
    own = {"axis": axis == 1, "training": training, "num_groups": num_groups is not None}
    refusals = {
        f"--axis {axis}: expected 1 or -1": axis not in (-1, 1),
        **{
            f"--{option.replace('_', '-')}: it is of {OWN[option]}": asked and name != OWN[option]
            for option, asked in own.items()
        },
        "--activation": activation is not None and "activation" not in op.features,
        "--residual": residual and "residual" not in op.features,
        "--out": out and "out" not in op.features,
        "--backward: its gradients are not timed": backward and bool(op.elementwise_backward),
        "--backward: there is no such function": backward and not op.backward,
        "--activation, --residual or --out with --backward": (
            backward and (activation is not None or residual or out)
        ),
        "--layout: it has no channel axis": last and not channels,
    }
    for what, refused in refusals.items():
        if refused:
            raise CannotUse(f"{given} does not take {what}")
    least = max(op.min_ndim, 3 if last else 1)
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
    case = Case(op.label, shape, num_groups, last, dtype, backward, activation, residual, out)
    needed, there = ARRAYS * max(case.bytes, 4 * math.prod(shape)), limits.memory()
    if case.bytes > MOST or needed > there:
        raise CannotUse(
            f"{given} would take {text.size_of(needed)} with its results and copies, expected at "
            f"most the {text.size_of(there)} that this machine has"
        )
    return case


def case_of_text(call: str) -> Case:
    """What a text such as "group_norm 8x256x32x32 channels-last" says."""
    name, shape, options = read(call, split(call))
    return case_of(name, shape, **options)
