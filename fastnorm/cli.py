"""The command line: ``python -m fastnorm``, and the script ``fastnorm``.

Results go to stdout, progress and warnings to stderr. Every command is a function of the parsed
arguments that returns an exit status: 0, or 2 for what cannot be used. What a command needs beyond
NumPy is imported in that function.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import fastnorm as fn

# The extra in pyproject.toml, and what it brings: {import: distribution}.
_EXTRAS = {
    "demo": {"matplotlib": "matplotlib", "PIL": "pillow", "sklearn": "scikit-learn"},
    "stats": {
        "PIL": "pillow",
        "h5py": "h5py",
        "matplotlib": "matplotlib",
        "tqdm": "tqdm",
        "zarr": "zarr",
    },
    "dask": {"dask": "dask", "distributed": "distributed"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv
        The arguments after the program's name; None takes them from ``sys.argv``.

    Returns
    -------
    int
        The exit status. argparse raises SystemExit by itself for ``--help``, ``--version`` and
        arguments it cannot read.
    """
    arguments = _parser().parse_args(argv)
    status: int = arguments.command(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastnorm", description="Normalization for NumPy arrays on the CPU."
    )
    parser.add_argument("--version", action="version", version=f"fastnorm {fn.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    about = "normalise feature maps of photographs: times, errors and a picture"
    demo = commands.add_parser("demo", help=about, description=f"{about.capitalize()}.")
    demo.set_defaults(command=_demo)
    demo.add_argument(
        "--output",
        type=_new_file,
        default="demo.png",
        metavar="PNG",
        help="where the picture goes (default: %(default)s)",
    )
    demo.add_argument("--json", action="store_true", help="print the numbers as JSON")
    demo.add_argument(
        "--threads",
        type=_positive,
        default=fn.get_num_threads(),
        metavar="N",
        help="of fastnorm and of PyTorch (default: %(default)s)",
    )
    # for tests: the side of the feature maps
    demo.add_argument("--size", type=_positive, default=256, help=argparse.SUPPRESS)

    about = "show versions, instruction sets, threads and backends"
    info = commands.add_parser("info", help=about, description=f"{about.capitalize()}.")
    info.set_defaults(command=_info)
    info.add_argument("--json", action="store_true", help="print it as JSON")

    about = "study where a transformer has its norms: gradients, residual stream, training"
    placement = commands.add_parser("placement", help=about, description=f"{about.capitalize()}.")
    placement.set_defaults(command=_placement)
    placement.add_argument(
        "--part", choices=("gradient", "residual", "training"), help="run this one (default: all)"
    )
    placement.add_argument(
        "--depths",
        type=_depths,
        metavar="N,N,...",
        help="numbers of layers at initialisation (default: 2,4,6,8,12,16,24,32,48)",
    )
    placement.add_argument(
        "--seeds",
        type=_positive,
        default=3,
        metavar="N",
        help="networks of each kind (default: %(default)s)",
    )
    placement.add_argument("--plot", type=_new_file, metavar="FILE", help="draw what was found")
    placement.add_argument("--json", action="store_true", help="print the numbers as JSON")
    # for tests: of each training
    placement.add_argument("--steps", type=_positive, help=argparse.SUPPRESS)
    about = "mean and standard deviation of images and arrays in files"
    stats = commands.add_parser("stats", help=about, description=f"{about.capitalize()}.")
    stats.set_defaults(command=_stats)
    stats.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="images, .npy, .npz, Zarr and HDF5 arrays, and folders of them",
    )
    stats.add_argument(
        "--axis",
        type=_axes,
        metavar="A,B,...",
        help="the axes that share a statistic (default: of images all but the channels, which are "
        "last; of arrays all)",
    )
    stats.add_argument("--key", default="", help="which array, in files of several")
    stats.add_argument(
        "--mode", help="convert images to this mode of Pillow first, such as RGB or L"
    )
    stats.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        metavar="S",
        help="divide everything by S: 255 for statistics of images from 0 to 1",
    )
    stats.add_argument("--by", choices=["folder"], help="statistics of each folder, too")
    stats.add_argument("--skip-bad", action="store_true", help="list unreadable files, and go on")
    stats.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    stats.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask cluster that does the work"
    )
    stats.add_argument("--json", action="store_true", help="print the numbers as JSON")
    stats.add_argument(
        "--plot",
        type=_new_file,
        metavar="FILE",
        help="draw the histogram of each channel: .png, .svg or .pdf",
    )
    return parser


# --- Arguments ------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _depths(text: str) -> list[int]:
    return [_positive(number.strip()) for number in text.split(",")]


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.0 < scale < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return scale


def _axes(text: str) -> tuple[int, ...]:
    try:
        axes = tuple(int(part) for part in text.split(","))
    except ValueError:
        axes = ()
    if not axes or len(set(axes)) != len(axes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different axes such as 0,2,3")
    return axes


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory: name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory '{path.parent}' for {path.name!r}")
    return path


# --- What is told on stderr -----------------------------------------------------------------------


def _warn(text: str) -> None:
    print(f"fastnorm: {text}", file=sys.stderr)


def _lacks(extra: str, *modules: str) -> bool:
    """Whether a library of `extra`, or of it one of `modules`, is missing; say what to install."""
    wanted = {m: name for m, name in _EXTRAS[extra].items() if m in modules or not modules}
    missing = [name for module, name in wanted.items() if find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        _warn(f"this needs {names}: install with pip install 'fastnorm-kernels[{extra}]'")
    return bool(missing)


class _Progress:
    """A bar on stderr while the ``with`` block runs; nothing where stderr is no terminal."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._visible = sys.stderr.isatty()

    def __call__(self, step: str) -> None:
        """Show that `step` begins."""
        width = 24
        bar = "#" * (width * self._done // self._steps)
        self._write(f"[{bar:-<{width}}] {step}")
        self._done += 1

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write("")

    def _write(self, line: str) -> None:
        if self._visible:
            # to the start of the line, and delete to its end
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


# --- The commands ---------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    if _lacks("demo"):
        return 2
    from fastnorm import demo

    if fn.get_backend() == "numpy":
        _warn("no compiled kernels in use: these are NumPy's times; see 'fastnorm info'")
    with _Progress(demo.STEPS) as progress:
        result, picture = demo.run(arguments.size, arguments.threads, progress)
    try:
        arguments.output.write_bytes(picture)
    except OSError as error:
        _warn(f"cannot write the picture: {error}")
        return 2
    if arguments.json:
        print(json.dumps(result.to_dict() | {"picture": str(arguments.output)}, indent=2))
    else:
        print(f"{result.to_text()}\n\nThe picture is in {arguments.output}")
    return 0


def _placement(arguments: argparse.Namespace) -> int:
    if arguments.plot and _lacks("demo", "matplotlib"):
        return 2
    from fastnorm import placement

    parts = [arguments.part] if arguments.part else placement.PARTS
    depths = arguments.depths or placement.DEPTHS
    with _Progress(placement.steps(parts, depths, arguments.seeds)) as progress:
        results = placement.run(
            parts, depths, arguments.seeds, progress, training_steps=arguments.steps
        )
    if arguments.plot:
        try:
            placement.draw(results, arguments.plot)
        except (OSError, ValueError) as error:  # ValueError: a format that is not known
            _warn(f"cannot write the picture: {error}")
            return 2
    print(json.dumps(results, indent=1) if arguments.json else placement.to_text(results))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    if arguments.json:
        config: dict[str, Any] | None = fn.show_config("dicts")
        print(json.dumps(config, indent=2))
    else:
        fn.show_config()
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from fastnorm import stats

    options = stats.Options(arguments.axis, arguments.mode, arguments.plot is not None)
    try:
        files = stats.files_of(arguments.paths)
        kinds = {kind for _, kind in files}
        needed = [stats.NEEDS[kind][0] for kind in sorted(kinds & stats.NEEDS.keys())]
        needed += ["matplotlib"] if arguments.plot else []
        if needed and _lacks("stats", *needed):
            return 2
        if arguments.scheduler is not None and _lacks("dask"):
            return 2
        with _Rate() as rate:
            found, complete = stats.collect(
                files,
                options,
                key=arguments.key,
                by_folder=arguments.by == "folder",
                skip_bad=arguments.skip_bad,
                workers=arguments.workers,
                scheduler=arguments.scheduler,
                begin=rate.begin,
                advance=rate.advance,
            )
    except stats.CannotUse as error:
        _warn(str(error))
        return 2
    except stats.CannotRead as error:
        _warn(f"{error}; --skip-bad lists such files and goes on")
        return 1
    for path, reason in found.bad:
        _warn(f"left out {path}: {reason}")
    if not complete:
        _warn(
            f"interrupted: these are the statistics of {found.parts} of {rate.total} {rate.unit}s"
        )
    status = 0 if complete else 130
    if not found.moments:
        _warn("nothing could be read" if complete else "nothing had been read yet")
        return status or 1
    total, scale = found.total, arguments.scale
    if arguments.plot is not None and found.histogram is not None:
        kind = arguments.plot.suffix[1:] or "png"
        try:
            arguments.plot.write_bytes(stats.plot(found.histogram, total, scale, kind))
        except (OSError, ValueError) as error:  # ValueError: matplotlib knows no such format
            _warn(f"cannot write the picture: {error}")
            status = 2
    line = stats.normalize_line(total, scale)
    if arguments.json:
        result: dict[str, Any] = stats.summary(total, scale) | {
            "scale": scale,
            f"{rate.unit}s": found.parts,
            "complete": complete,
            "left out": [{"path": path, "reason": reason} for path, reason in found.bad],
            "normalize": line,
            "moments": total.to_dict(),
        }
        if arguments.by:
            each = sorted(found.moments.items())
            result["folders"] = {name: stats.summary(m, scale) for name, m in each}
        print(json.dumps(result, indent=2))
    else:
        print(f"{stats.table(found, scale)}\n\n{line}")
    return status


class _Rate:
    """A bar on stderr with the rate and the time left; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self.total, self.unit = 0, "part"
        self._bar: Any = None

    def begin(self, total: int, unit: str) -> None:
        """Show a bar for so many parts."""
        self.total, self.unit = total, unit
        if sys.stderr.isatty() and find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True)

    def advance(self, parts: int) -> None:
        """Show that so many more are done."""
        if self._bar is not None:
            self._bar.update(parts)

    def __enter__(self) -> _Rate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
