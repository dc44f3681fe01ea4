"""The command line: ``python -m fastnorm``, and the script ``fastnorm``.

Results go to stdout, progress and warnings to stderr. Every command is a function of the parsed
arguments that returns an exit status: 0, 1 for what went wrong on the way, or 2 for what cannot be
used. What a command needs beyond NumPy is imported in that function.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import fastnorm as fn
from fastnorm import bench, machine, machine_file
from fastnorm._bench.cases import Case
from fastnorm._bench.machine import busy
from fastnorm._bench.timing import BLOCK, ROUNDS
from fastnorm._files.images import MODES
from fastnorm._files.names import CannotUse, escaped, in_json, reason_of, say
from fastnorm._files.parts import MAX_PIXELS
from fastnorm.arguments import ACTIVATIONS, did_you_mean
from fastnorm.runtime import MOST_THREADS
from fastnorm.terminal import Progress, Rate, lacks, say_json, warn

# More processes than any machine has use for.
MOST_WORKERS = 1024
# The share of the processors, in percent, beyond which others make times doubtful.
BUSY = 20
PICTURES = (".png", ".svg", ".pdf")


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
    if sys.stderr is None:  # closed, and so is what Python makes of it
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        warn("cannot write the results: stdout is closed")
        return 1
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the results has seen enough
        _drop_output()
        return 141  # as of a program that ends by SIGPIPE
    except OSError as error:
        _drop_output()
        warn(f"cannot write the results: {error.strerror or error}")
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    status: int = arguments.command(arguments)
    return status


def _drop_output() -> None:
    """Send what waits to be written to stdout nowhere, or the interpreter tries it once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file
        return


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Name what cannot be used, in a form that is safe to print."""
        super().error(escaped(message))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # "--option=--" has no value for argparse, which goes on with an empty list instead of one
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            self.error(f"argument {'/'.join(action.option_strings)}: '--' is no value")
        return super()._get_values(action, arg_strings)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastnorm", description="Normalization for NumPy arrays on the CPU.")
    parser.add_argument("--version", action="version", version=f"fastnorm {fn.__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

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

    _add_bench(commands)

    _add_tune(commands)

    about = "show versions, instruction sets, threads and backends"
    info = commands.add_parser("info", help=about, description=f"{about.capitalize()}.")
    info.set_defaults(command=_info)
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.add_argument(
        "--explain",
        metavar="CALL",
        help='how a call would be carried out, as in "group_norm 8x256x32x32 channels-last"',
    )
    info.add_argument(
        "--machine",
        metavar="MACHINE",
        help='with --explain: on another machine, such as "zen5" or "l2=2M,l3=16M"',
    )

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
    placement.add_argument("--plot", type=_picture, metavar="FILE", help="draw what was found")
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
        "--mode",
        choices=MODES,
        metavar="MODE",
        help=f"convert images of 8 bits first, to one of {', '.join(MODES)}",
    )
    stats.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        metavar="S",
        help="divide everything by S: 255 for statistics of images from 0 to 1",
    )
    stats.add_argument(
        "--nodata",
        type=_number,
        metavar="V",
        help="numbers equal to V are none; so are those that a file says are",
    )
    stats.add_argument("--ignore-nan", action="store_true", help="NaN is no number")
    stats.add_argument(
        "--max-pixels",
        type=_positive,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse images of more pixels (default: %(default)s)",
    )
    stats.add_argument("--by", choices=["folder"], help="statistics of each folder, too")
    stats.add_argument("--skip-bad", action="store_true", help="list unreadable files, and go on")
    stats.add_argument(
        "--workers", type=_workers, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    stats.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask cluster that does the work"
    )
    stats.add_argument("--json", action="store_true", help="print the numbers as JSON")
    stats.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw the histogram of each channel: .png, .svg or .pdf",
    )
    return parser


def _add_tune(commands: Any) -> None:
    about = "measure this machine, in 20 seconds, for schedules that fit it"
    parser = commands.add_parser(
        "tune",
        help=about,
        description="Measure from which sizes non-temporal stores, a second thread and waking one "
        "that sleeps pay on this machine, and keep that in a file of the user's configuration "
        "folder, which is used whenever fastnorm is imported from then on. No result depends on "
        "it. 'fastnorm info' says what is in use; FASTNORM_MACHINE comes first.",
    )
    parser.set_defaults(command=_tune)
    parser.add_argument("--dry-run", action="store_true", help="print what is found, keep nothing")
    parser.add_argument("--forget", action="store_true", help="remove the file")
    parser.add_argument("--force", action="store_true", help="also while others are at work")
    parser.add_argument("--json", action="store_true", help="print what is found as JSON")


def _add_bench(commands: Any) -> None:
    about = "time norms against NumPy, PyTorch, ONNX Runtime and JAX, and against a copy"
    parser = commands.add_parser(
        "bench",
        help=about,
        description="Time norms against peers and a copy. Public functions are called as a user "
        "calls them, all in turn in one process; results are compared first. A result is a fresh "
        "array in each call. The copy reads and writes as many bytes with np.copyto, into a fresh "
        "array, on one thread or in parts on all, whichever is faster.",
        epilog='Options of a call may stand in it: fastnorm bench "group_norm 8x256x32x32 '
        '--num-groups 32" "layer_norm 4096x768 --backward". After it they are for all calls.',
    )
    parser.set_defaults(command=_bench)
    parser.add_argument(
        "calls", nargs="*", metavar="CALL", help='function and shape: "layer_norm 4096x768"'
    )
    parser.add_argument(
        "--torch-model",
        metavar="NAME",
        help="in place of CALL: the norms of a model of torchvision or transformers, as resnet50 "
        "or bert, which is not downloaded",
    )
    parser.add_argument(
        "--input", metavar="SHAPE", help="of the model: 8x3x224x224, or 4x512 tokens"
    )
    parser.add_argument(
        "--threads",
        type=_list_of_threads,
        metavar="N,N,...",
        help=f"numbers of threads, one after the other (default: {fn.get_num_threads()})",
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        metavar="NAME,NAME,...",
        help=f"of {', '.join(bench.PEERS)}; or none (default: {', '.join(bench.USUAL)}; those "
        "that are installed)",
    )
    parser.add_argument(
        "--load", type=_workers, default=0, metavar="N", help="processes kept busy meanwhile"
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=BLOCK,
        metavar="S",
        help="of each turn, at least (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=ROUNDS,
        metavar="N",
        help="in which each has a turn (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw the times as bars")
    _add_call_options(parser)


def _add_call_options(parser: argparse.ArgumentParser) -> None:
    """What may stand in a CALL, and after it; absent where it is not given."""
    of_calls = parser.add_argument_group("options of calls")

    def add(flag: str, **more: Any) -> None:
        of_calls.add_argument(flag, default=argparse.SUPPRESS, **more)

    add(
        "--num-groups",
        type=_positive,
        metavar="N",
        help="of group_norm (32, or what divides that too)",
    )
    add(
        "--layout",
        type=_one_of(*bench.LAYOUTS),
        metavar="NAME",
        help=f"{' or '.join(bench.LAYOUTS)}",
    )
    add("--dtype", type=_one_of(*bench.DTYPES), metavar="NAME", help=", ".join(bench.DTYPES))
    add("--backward", action="store_true", help="the gradients instead")
    add(
        "--activation",
        type=_one_of(*ACTIVATIONS),
        metavar="NAME",
        help=f"after the norm: {', '.join(ACTIVATIONS)}",
    )
    add("--residual", action="store_true", help="an array added after the norm")
    add("--training", action="store_true", help="batch_norm: statistics of the batch")
    add("--axis", type=int, metavar="A", help="layer_norm: over axis 1, the channels, or -1")
    add("--out", action="store_true", help="into an array that is there already")


class _CallParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CannotUse(message)


# --- Arguments ------------------------------------------------------------------------------------


def _one_of(*choices: str) -> Callable[[str], str]:
    def chosen(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(choices)}{did_you_mean(text, choices)}"
            )
        return text

    return chosen


def _list_of_threads(text: str) -> list[int]:
    counts = dict.fromkeys(_positive(number.strip()) for number in text.split(","))
    if max(counts) > MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"{str(max(counts))!r} is more than the {MOST_THREADS} threads that kernels start here"
        )
    return list(counts)


def _peers(text: str) -> list[str]:
    if text == "none":
        return []
    return list(dict.fromkeys(_one_of(*bench.PEERS)(name.strip()) for name in text.split(",")))


def _seconds(text: str) -> float:
    if not 0 < _number(text) <= 60:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, and 60 at most")
    return float(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _workers(text: str) -> int:
    if _positive(text) > MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MOST_WORKERS} processes")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


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
        raise argparse.ArgumentTypeError(
            f"there is no directory {str(path.parent)!r} for {path.name!r}"
        )
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _picture(text: str) -> Path:
    path = _new_file(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a picture, expected one that ends in {', '.join(PICTURES)}"
        )
    return path


# --- The commands ---------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    if lacks("demo"):
        return 2
    from fastnorm import demo

    _warn_of_slow_times()
    with Progress(demo.STEPS) as progress:
        result, picture = demo.run(arguments.size, arguments.threads, progress)
    try:
        arguments.output.write_bytes(picture)
    except OSError as error:
        warn(f"cannot write the picture: {error}")
        return 2
    picture_at = str(arguments.output)
    if arguments.json:
        say_json(result.to_dict() | {"picture": in_json(picture_at)})
    else:
        say(f"{result.to_text()}\n\nThe picture is in {escaped(picture_at)}", sys.stdout)
    return 0


def _warn_of_slow_times() -> None:
    if fn.get_backend() == "numpy":
        warn("no compiled kernels in use: these are NumPy's times; see 'fastnorm info'")


def _bench(arguments: argparse.Namespace) -> int:
    model: dict[str, Any] | None = None
    try:
        if arguments.torch_model is None:
            cases = _cases(arguments)
        else:
            cases, model = _model(arguments)
        names = arguments.peers
        for name in names or ():
            if (line := bench.missing(name)) is not None:
                raise CannotUse(f"--peers {name} is not installed: {line}")
    except CannotUse as error:
        warn(str(error))
        return 2
    if arguments.plot and lacks("demo", "matplotlib"):
        return 2
    threads = arguments.threads or [fn.get_num_threads()]
    _warn_of_slow_times()
    try:
        with Progress(bench.steps(cases, threads, arguments.rounds)) as progress:
            results = bench.run(
                cases,
                threads=threads,
                names=bench.USUAL if names is None else names,
                load=arguments.load,
                seconds=arguments.seconds,
                rounds=arguments.rounds,
                report=progress,
            )
    except (OSError, MemoryError) as error:  # processes cannot be started, for example
        warn(f"this cannot be timed: {reason_of(error)}")
        return 1
    if model is not None:
        bench.add_model(results, model)
    busy = results["machine"]["busy"]
    if busy is not None and busy > BUSY:
        warn(f"others used {busy:.0f} % of the processors: these times may be far off")
    different = [
        f"{each['case']}: {each['absent'][n]}"
        for each in results["rows"]
        for n in each["different"]
    ]
    for told in different:
        warn(f"DIFFERENT RESULT, not timed: {told}")
    if arguments.plot:
        try:
            bench.draw(results, arguments.plot)
        except OSError as error:
            warn(f"cannot write the picture: {error}")
            return 2
    if arguments.json:
        say_json(results)
    else:
        say(bench.to_text(results), sys.stdout)
    return 1 if different else 0


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.forget and (arguments.dry_run or arguments.force or arguments.json):
        warn("--forget stands alone")
        return 2
    file = machine_file.path()
    if arguments.forget:
        return _forget(file)
    if fn.get_backend() != "cython":
        warn("tune times the compiled kernels, and they are not in use; see 'fastnorm info'")
        return 2
    if file is None and not arguments.dry_run:
        warn("there is no configuration folder: set XDG_CONFIG_HOME or HOME (Windows: APPDATA)")
        return 2
    from fastnorm import tune

    share = busy()
    others = f"others use {share:.0f} % of the processors" if share else ""
    if share is not None and share > tune.BUSY:
        if not (arguments.force or arguments.dry_run):
            warn(f"{others}: nothing is measured; try again later, or say --force")
            return 1
        warn(f"{others}: what is measured now may be far off")
    try:
        with Progress(tune.MAX_ROUNDS) as progress:
            found = tune.measure(machine.found(), progress)
    except (MemoryError, OSError) as error:
        warn(f"this machine cannot be measured: {reason_of(error)}")
        return 1
    if arguments.json:
        say_json(tune.to_dict(found))
    else:
        say(tune.to_text(found), sys.stdout)
    if arguments.dry_run or file is None:
        return 0
    if found.noisy and not arguments.force:
        warn(f"rounds differ by {found.noise:.0%}: the machine is busy, and nothing is written")
        return 1
    try:
        tune.keep(found, file)
    except OSError as error:
        warn(f"cannot write {file}: {reason_of(error)}")
        return 1
    warn(f"written to {file}; 'fastnorm tune --forget' removes it")
    if machine.source.named:
        warn("FASTNORM_MACHINE is set, and comes first")
    return 0


def _forget(file: Path | None) -> int:
    try:
        removed = file is not None and machine_file.remove(file)
    except OSError as error:
        warn(f"cannot remove {file}: {reason_of(error)}")
        return 1
    say(f"removed {escaped(str(file))}" if removed else "there is no machine file", sys.stdout)
    return 0


def _for_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of calls that stand after them."""
    names = {flag[2:].replace("-", "_") for flag in bench.OPTIONS}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _model(arguments: argparse.Namespace) -> tuple[list[Case], dict[str, Any]]:
    if arguments.calls:
        raise CannotUse(f"--torch-model is in place of CALL, which is {arguments.calls[0]!r}")
    options = _for_all(arguments)
    for name in options.keys() - set(bench.OF_MODELS):
        raise CannotUse(f"--torch-model does not take --{name.replace('_', '-')}: it is of a CALL")
    given = arguments.input
    shape = None if given is None else bench.shape_of("--input", given)
    return bench.of_model(arguments.torch_model, shape, **options)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """What the calls ask for; the options after them are for all that take them."""
    calls: list[list[str]] = []
    for text in arguments.calls:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise CannotUse(f"CALL {text!r} cannot be read: {error}") from None
        if calls and words and bench.SHAPE.fullmatch(words[0]):  # without quotes
            calls[-1] += words
        else:
            calls.append(words)
    if arguments.input is not None:
        raise CannotUse("--input is of --torch-model, which is not given")
    if not calls:
        raise CannotUse('bench needs a CALL, as in "layer_norm 4096x768"')
    parser = _CallParser(prog="CALL", add_help=False, allow_abbrev=False)
    _add_call_options(parser)
    for_all = _for_all(arguments)
    read = [bench.words_of(" ".join(words), words) for words in calls]
    functions = {name for name, _, _ in read}
    for option, function in bench.OWN.items():
        if option in for_all and function not in functions:
            raise CannotUse(f"--{option.replace('_', '-')} is of {function}, which is not called")
    cases = []
    for name, shape, words in read:
        options = {k: v for k, v in for_all.items() if bench.OWN.get(k, name) == name}
        try:
            options |= vars(parser.parse_args(words))
        except CannotUse as error:
            raise CannotUse(f"CALL {name}: {error}") from None
        cases.append(bench.case_of(name, shape, **options))
    return cases


def _placement(arguments: argparse.Namespace) -> int:
    if arguments.plot and lacks("demo", "matplotlib"):
        return 2
    from fastnorm import placement
    from fastnorm._bench import machine

    parts = [arguments.part] if arguments.part else placement.PARTS
    depths = arguments.depths or placement.DEPTHS
    with Progress(placement.steps(parts, depths, arguments.seeds)) as progress:
        results = placement.run(
            parts, depths, arguments.seeds, progress, training_steps=arguments.steps
        )
    if arguments.plot:
        try:
            placement.draw(results, arguments.plot)
        except OSError as error:
            warn(f"cannot write the picture: {error}")
            return 2
    if arguments.json:
        say_json({"machine": machine.facts()} | results)
    else:
        say(placement.to_text(results), sys.stdout)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    if arguments.explain is not None:
        return _explain(arguments.explain, arguments.machine or "", arguments.json)
    if arguments.machine is not None:
        warn("--machine is of --explain, which is not given")
        return 2
    if arguments.json:
        say_json(fn.show_config("dicts"))
    else:
        fn.show_config()
    return 0


def _explain(call: str, on: str, json: bool) -> int:
    try:
        if json:
            say_json(fn.explain(call, machine=on, mode="dicts"))
        else:
            fn.explain(call, machine=on)
    except (ValueError, MemoryError) as error:
        warn(str(error) or "there is no memory for such an array")
        return 2
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from fastnorm import stats
    from fastnorm._files import names, parts, reading, report

    options = parts.Options(
        axis=arguments.axis,
        mode=arguments.mode,
        histogram=arguments.plot is not None,
        nodata=arguments.nodata,
        ignore_nan=arguments.ignore_nan,
        max_pixels=arguments.max_pixels,
    )
    try:
        files, bad = stats.files_of(arguments.paths, arguments.skip_bad)
        needed = sorted(reading.needs_of(files.found))
        needed += ["matplotlib"] if arguments.plot else []
        if needed and lacks("stats", *needed):
            return 2
        if arguments.scheduler is not None and lacks("dask"):
            return 2
        with Rate() as rate:
            found, complete = stats.collect(
                files.found,
                options,
                key=arguments.key,
                by_folder=arguments.by == "folder",
                skip_bad=arguments.skip_bad,
                workers=arguments.workers,
                scheduler=arguments.scheduler,
                begin=rate.begin,
                advance=rate.advance,
            )
    except names.CannotUse as error:
        warn(str(error))
        return 2
    except names.CannotRead as error:
        warn(f"{error}; --skip-bad lists such files and goes on")
        return 1
    found.bad[:0] = bad
    for path, reason in found.bad:
        warn(f"left out {path}: {reason}")
    if files.passed:
        count = files.passed.total()
        warn(
            f"passed over {count} file{'s' if count > 1 else ''} of kinds that are not read: "
            f"{', '.join(sorted(files.passed))}"
        )
    if not complete:
        warn(f"interrupted: these are the statistics of {found.parts} of {rate.total} {rate.unit}s")
    status = 0 if complete else 130
    if not found.moments:
        warn("nothing could be read" if complete else "nothing had been read yet")
        return status or 1
    total, scale = found.total, arguments.scale
    not_finite = report.not_finite_channels(total, scale)
    advice = _advice(found.not_finite, options.ignore_nan) if found.not_finite else ""
    for channel in not_finite:
        warn(f"{channel}{advice}")
    status = status or (1 if not_finite else 0)
    if arguments.plot is not None and found.histogram is not None:
        kind = arguments.plot.suffix[1:].lower()
        try:
            arguments.plot.write_bytes(report.plot(found.histogram, total, scale, kind))
        except OSError as error:
            warn(f"cannot write the picture: {error}")
            status = status or 1
    line = None if not_finite else report.normalize_line(total, scale)
    if arguments.json:
        result: dict[str, Any] = report.summary(total, scale) | {
            "scale": scale,
            f"{rate.unit}s": found.parts,
            "complete": complete,
            "left out": [
                {"path": in_json(path), "reason": in_json(reason)} for path, reason in found.bad
            ],
            "normalize": line,
            "moments": None if not_finite else total.to_dict(),
        }
        if arguments.by:
            each = sorted(found.moments.items())
            result["folders"] = {in_json(name): report.summary(m, scale) for name, m in each}
        say_json(result)
    else:
        for row in report.table(found.moments, total, scale):
            say(row, sys.stdout)
        if line is not None:
            say(f"\n{line}", sys.stdout)
    return status


def _advice(path: str, ignored: bool) -> str:
    """Where the first number is that is none, and what to do about it."""
    if ignored:
        return f"; {path} has an infinity"
    return f"; {path} has NaN or an infinity; --ignore-nan leaves out NaN"
