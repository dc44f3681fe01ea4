"""The command line's commands and options, and what their values may be."""

from __future__ import annotations

import argparse
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import fastnorm as fn
from fastnorm import bench
from fastnorm._bench.timing import BLOCK, ROUNDS
from fastnorm._files.images import MODES
from fastnorm._files.names import escaped
from fastnorm._files.parts import MAX_PIXELS
from fastnorm.arguments import did_you_mean
from fastnorm.calls import OPTIONS, name_of
from fastnorm.runtime import MOST_THREADS

# More processes than any machine has use for.
MOST_WORKERS = 1024
PICTURES = (".png", ".svg", ".pdf")


# --- What values may be ---------------------------------------------------------------------------


def _one_of(*choices: str) -> Callable[[str], str]:
    def chosen(text: str) -> str:
        if text not in choices:
            meant = did_you_mean(text, choices)
            raise ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{meant}")
        return text

    return chosen


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _positives(text: str) -> list[int]:
    return [_positive(number.strip()) for number in text.split(",")]


def _threads(text: str) -> list[int]:
    counts = list(dict.fromkeys(_positives(text)))
    if max(counts) > MOST_THREADS:
        raise ArgumentTypeError(
            f"{str(max(counts))!r} is more than the {MOST_THREADS} threads that kernels start here"
        )
    return counts


def _workers(text: str) -> int:
    if _positive(text) > MOST_WORKERS:
        raise ArgumentTypeError(f"{text!r} is more than {MOST_WORKERS} processes")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None


def _seconds(text: str) -> float:
    if not 0 < _number(text) <= 60:
        raise ArgumentTypeError(f"{text!r} is no number above 0, and 60 at most")
    return float(text)


def _scale(text: str) -> float:
    with suppress(ValueError):
        if 0.0 < float(text) < math.inf:
            return float(text)
    raise ArgumentTypeError(f"{text!r} is not a positive number")


def _axes(text: str) -> tuple[int, ...]:
    with suppress(ValueError):
        found = tuple(int(part) for part in text.split(","))
        if len(set(found)) == len(found):
            return found
    raise ArgumentTypeError(f"{text!r} is not a list of different axes such as 0,2,3")


def _peers(text: str) -> list[str]:
    if text == "none":
        return []
    return list(dict.fromkeys(_one_of(*bench.PEERS)(name.strip()) for name in text.split(",")))


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"{text!r} is a directory: name a file in it")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"there is no directory {str(path.parent)!r} for {path.name!r}")
    if path.exists() and not path.is_file():
        raise ArgumentTypeError(f"{text!r} is no file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _picture(text: str) -> Path:
    path = _new_file(text)
    if path.suffix.lower() not in PICTURES:
        ends = f"expected one that ends in {', '.join(PICTURES)}"
        raise ArgumentTypeError(f"{text!r} is no name of a picture, {ends}")
    return path


# --- Parsers --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Name what cannot be used, in a form that is safe to print."""
        super().error(escaped(message))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # "--option=--" has no value for argparse, which goes on with an empty list instead of one
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            self.error(f"argument {'/'.join(action.option_strings)}: '--' is no value")
        return super()._get_values(action, arg_strings)

    def option(
        self,
        flag: str,
        help: str,
        type: Callable[[str], Any] = str,
        metavar: str | None = None,
        shown: Any = None,
        **more: Any,
    ) -> None:
        """Add an option with a value; `shown` is a default that the help tells of."""
        if shown is not None:
            help, more = f"{help} (default: %(default)s)", more | {"default": shown}
        if type is not str:
            more["type"] = type
        self.add_argument(flag, help=help, metavar=metavar, **more)

    def switch(self, flag: str, help: str = "print the numbers as JSON") -> None:
        """Add an option without a value."""
        self.add_argument(flag, help=help, action="store_true")


def _add_call_options(parser: argparse.ArgumentParser) -> None:
    """What may stand in a CALL, and after it; absent where it is not given."""
    of_calls = parser.add_argument_group("options of calls")
    for flag, (about, value, choices) in OPTIONS.items():
        kind: dict[str, Any] = {"action": "store_true"}
        if value is not None:
            whole = _positive if value == "N" else int
            kind = {"type": _one_of(*choices) if choices else whole, "metavar": value}
        of_calls.add_argument(flag, default=argparse.SUPPRESS, help=about, **kind)


def of_calls(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of calls that stand after them."""
    names = set(map(name_of, OPTIONS))
    return {name: value for name, value in vars(arguments).items() if name in names}


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; ``command`` is the name of the command, or None."""
    found = _Parser(prog="fastnorm", description="Normalization for NumPy arrays on the CPU.")
    found.add_argument("--version", action="version", version=f"fastnorm {fn.__version__}")
    commands = found.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (about, add_options, more) in _COMMANDS.items():
        told: dict[str, Any] = {"description": f"{about.capitalize()}."} | more
        add_options(commands.add_parser(name, help=about, **told))
    return found


def _add_demo(parser: _Parser) -> None:
    parser.option("--output", "where the picture goes", _new_file, "PNG", "demo.png")
    parser.switch("--json")
    threads = fn.get_num_threads()
    parser.option("--threads", "of fastnorm and of PyTorch", _positive, "N", threads)
    # for tests: the side of the feature maps
    parser.option("--size", argparse.SUPPRESS, _positive, default=256)


def _add_bench(parser: _Parser) -> None:
    call = 'function and shape: "layer_norm 4096x768"'
    parser.add_argument("calls", nargs="*", metavar="CALL", help=call)
    model = (
        "in place of CALL: the norms of a model of torchvision or transformers, as resnet50 or "
        "bert, which is not downloaded"
    )
    parser.option("--torch-model", model, metavar="NAME")
    parser.option("--input", "of the model: 8x3x224x224, or 4x512 tokens", metavar="SHAPE")
    threads = f"numbers of threads, one after the other (default: {fn.get_num_threads()})"
    parser.option("--threads", threads, _threads, "N,N,...")
    usual = f"(default: {', '.join(bench.USUAL)}; those that are installed)"
    peers = f"of {', '.join(bench.PEERS)}; or none {usual}"
    parser.option("--peers", peers, _peers, "NAME,NAME,...")
    parser.option("--load", "processes kept busy meanwhile", _workers, "N", default=0)
    parser.option("--seconds", "of each turn, at least", _seconds, "S", BLOCK)
    parser.option("--rounds", "in which each has a turn", _positive, "N", ROUNDS)
    parser.switch("--json", "print the figures as JSON")
    parser.option("--plot", "draw the times as bars", _picture, "FILE")
    _add_call_options(parser)


def _add_tune(parser: _Parser) -> None:
    parser.switch("--dry-run", "print what is found, keep nothing")
    parser.switch("--forget", "remove the file")
    parser.switch("--force", "also while others are at work")
    parser.switch("--json", "print what is found as JSON")


def _add_info(parser: _Parser) -> None:
    parser.switch("--json", "print it as JSON")
    call = 'how a call would be carried out, as in "group_norm 8x256x32x32 channels-last"'
    parser.option("--explain", call, metavar="CALL")
    machine = 'with --explain: on another machine, such as "zen5" or "l2=2M,l3=16M"'
    parser.option("--machine", machine, metavar="MACHINE")


def _add_placement(parser: _Parser) -> None:
    parts = ("gradient", "residual", "training")
    parser.option("--part", "run this one (default: all)", choices=parts)
    depths = "numbers of layers at initialisation (default: 2,4,6,8,12,16,24,32,48)"
    parser.option("--depths", depths, _positives, "N,N,...")
    parser.option("--seeds", "networks of each kind", _positive, "N", 3)
    parser.option("--plot", "draw what was found", _picture, "FILE")
    parser.switch("--json")
    # for tests: of each training
    parser.option("--steps", argparse.SUPPRESS, _positive)


def _add_stats(parser: _Parser) -> None:
    paths = "images, .npy, .npz, Zarr and HDF5 arrays, and folders of them"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=paths)
    axis = (
        "the axes that share a statistic (default: of images all but the channels, which are "
        "last; of arrays all)"
    )
    parser.option("--axis", axis, _axes, "A,B,...")
    parser.option("--key", "which array, in files of several", default="")
    modes = f"convert images of 8 bits first, to one of {', '.join(MODES)}"
    parser.option("--mode", modes, metavar="MODE", choices=MODES)
    scale = "divide everything by S: 255 for statistics of images from 0 to 1"
    parser.option("--scale", scale, _scale, "S", default=1.0)
    nodata = "numbers equal to V are none; so are those that a file says are"
    parser.option("--nodata", nodata, _number, "V")
    parser.switch("--ignore-nan", "NaN is no number")
    parser.option("--max-pixels", "refuse images of more pixels", _positive, "N", MAX_PIXELS)
    parser.option("--by", "statistics of each folder, too", choices=["folder"])
    parser.switch("--skip-bad", "list unreadable files, and go on")
    parser.option("--workers", "processes", _workers, "N", 1)
    parser.option("--scheduler", "of a Dask cluster that does the work", metavar="ADDRESS")
    parser.switch("--json")
    plot = "draw the histogram of each channel: .png, .svg or .pdf"
    parser.option("--plot", plot, _picture, "FILE")


# Of each command what it does, its options, and what argparse tells of it.
_COMMANDS: dict[str, tuple[str, Callable[[_Parser], None], dict[str, str]]] = {
    "demo": ("normalise feature maps of photographs: times, errors and a picture", _add_demo, {}),
    "bench": (
        "time norms against NumPy, PyTorch, ONNX Runtime and JAX, and against a copy",
        _add_bench,
        {
            "description": "Time norms against peers and a copy. Public functions are called as a "
            "user calls them, all in turn in one process; results are compared first. A result is "
            "a fresh array in each call. The copy reads and writes as many bytes with np.copyto, "
            "into a fresh array, on one thread or in parts on all, whichever is faster.",
            "epilog": "Options of a call may stand in it: fastnorm bench "
            '"group_norm 8x256x32x32 --num-groups 32" "layer_norm 4096x768 --backward". After it '
            "they are for all calls.",
        },
    ),
    "tune": (
        "measure this machine, in 20 seconds, for schedules that fit it",
        _add_tune,
        {
            "description": "Measure from which sizes non-temporal stores, a second thread and "
            "waking one that sleeps pay on this machine, and keep that in a file of the user's "
            "configuration folder, which is used whenever fastnorm is imported from then on. No "
            "result depends on it. 'fastnorm info' says what is in use; FASTNORM_MACHINE comes "
            "first."
        },
    ),
    "info": ("show versions, instruction sets, threads and backends", _add_info, {}),
    "placement": (
        "study where a transformer has its norms: gradients, residual stream, training",
        _add_placement,
        {},
    ),
    "stats": ("mean and standard deviation of images and arrays in files", _add_stats, {}),
}
