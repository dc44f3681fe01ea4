"""The command line: ``python -m fastnorm``, and the script ``fastnorm``.

Results go to stdout, progress and warnings to stderr. Every command is a function of the parsed
arguments that returns an exit status: 0, or 1 for what went wrong on the way; what cannot be used,
which is 2, it raises. What a command needs beyond NumPy is imported in that function.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastnorm as fn
from fastnorm import bench, calls, machine, machine_file, options
from fastnorm._bench.cases import Case
from fastnorm._bench.machine import busy, facts
from fastnorm._files.names import CannotRead, CannotUse, escaped, in_json, reason_of, say
from fastnorm.options import parser as _parser
from fastnorm.terminal import Progress, Rate, require, say_json, warn

# The share of the processors, in percent, beyond which others make times doubtful.
BUSY = 20


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
    try:
        return _COMMANDS[arguments.command](arguments)
    except CannotUse as error:
        warn(str(error))
        return 2


def _drop_output() -> None:
    """Send what waits to be written to stdout nowhere, or the interpreter tries it once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file
        return


# --- What commands have in common -----------------------------------------------------------------


def _tell(as_json: bool, numbers: Callable[[], Any], text: Callable[[], str]) -> None:
    """Print what was found, as JSON or as text."""
    if as_json:
        say_json(numbers())
    else:
        say(text(), sys.stdout)


def _drawn(draw: Callable[[], Any]) -> bool:
    """Whether a picture could be drawn into its file; it is told why not."""
    try:
        draw()
    except OSError as error:
        warn(f"cannot write the picture: {error}")
        return False
    return True


def _warn_of_slow_times() -> None:
    if fn.get_backend() == "numpy":
        warn("no compiled kernels in use: these are NumPy's times; see 'fastnorm info'")


# --- The commands ---------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    require("demo")
    from fastnorm import demo

    _warn_of_slow_times()
    with Progress(demo.STEPS) as progress:
        result, picture = demo.run(arguments.size, arguments.threads, progress)
    path = str(arguments.output)
    if not _drawn(lambda: arguments.output.write_bytes(picture)):
        return 2
    _tell(
        arguments.json,
        lambda: result.to_dict() | {"picture": in_json(path)},
        lambda: f"{result.to_text()}\n\nThe picture is in {escaped(path)}",
    )
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    model: dict[str, Any] | None = None
    if arguments.torch_model is None:
        cases = _cases(arguments)
    else:
        cases, model = _model(arguments)
    names = arguments.peers
    for name in names or ():
        if (line := bench.missing(name)) is not None:
            raise CannotUse(f"--peers {name} is not installed: {line}")
    if arguments.plot:
        require("demo", "matplotlib")
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
    if arguments.plot and not _drawn(lambda: bench.draw(results, arguments.plot)):
        return 2
    _tell(arguments.json, lambda: results, lambda: bench.to_text(results))
    return 1 if different else 0


def _model(arguments: argparse.Namespace) -> tuple[list[Case], dict[str, Any]]:
    if arguments.calls:
        raise CannotUse(f"--torch-model is in place of CALL, which is {arguments.calls[0]!r}")
    for_all = options.of_calls(arguments)
    for name in for_all.keys() - set(bench.OF_MODELS):
        raise CannotUse(f"--torch-model does not take --{name.replace('_', '-')}: it is of a CALL")
    given = arguments.input
    shape = None if given is None else calls.shape_of("--input", given)
    return bench.of_model(arguments.torch_model, shape, **for_all)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """What the calls ask for; the options after them are for all that take them."""
    given: list[list[str]] = []
    for text in arguments.calls:
        words = calls.split(text)
        if given and words and calls.SHAPE.fullmatch(words[0]):  # without quotes
            given[-1] += words
        else:
            given.append(words)
    if arguments.input is not None:
        raise CannotUse("--input is of --torch-model, which is not given")
    if not given:
        raise CannotUse('bench needs a CALL, as in "layer_norm 4096x768"')
    for_all = options.of_calls(arguments)
    read = [calls.read(" ".join(words), words) for words in given]
    functions = {name for name, _, _ in read}
    for option, function in calls.OWN.items():
        if option in for_all and function not in functions:
            raise CannotUse(f"--{option.replace('_', '-')} is of {function}, which is not called")
    cases = []
    for name, shape, own in read:
        taken = {k: v for k, v in for_all.items() if calls.OWN.get(k, name) == name}
        cases.append(calls.case_of(name, shape, **(taken | own)))
    return cases


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.forget and (arguments.dry_run or arguments.force or arguments.json):
        raise CannotUse("--forget stands alone")
    file = machine_file.path()
    if arguments.forget:
        return _forget(file)
    if fn.get_backend() != "cython":
        raise CannotUse(
            "tune times the compiled kernels, and they are not in use; see 'fastnorm info'"
        )
    if file is None and not arguments.dry_run:
        raise CannotUse(
            "there is no configuration folder: set XDG_CONFIG_HOME or HOME (Windows: APPDATA)"
        )
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
    _tell(arguments.json, lambda: tune.to_dict(found), lambda: tune.to_text(found))
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


def _placement(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        require("demo", "matplotlib")
    from fastnorm import placement

    parts = [arguments.part] if arguments.part else placement.PARTS
    depths = arguments.depths or placement.DEPTHS
    with Progress(placement.steps(parts, depths, arguments.seeds)) as progress:
        results = placement.run(
            parts, depths, arguments.seeds, progress, training_steps=arguments.steps
        )
    if arguments.plot and not _drawn(lambda: placement.draw(results, arguments.plot)):
        return 2
    _tell(
        arguments.json,
        lambda: {"machine": facts()} | results,
        lambda: placement.to_text(results),
    )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    if arguments.explain is None and arguments.machine is not None:
        raise CannotUse("--machine is of --explain, which is not given")
    mode = "dicts" if arguments.json else "stdout"
    found: Any
    if arguments.explain is None:
        found = fn.show_config(mode)
    else:
        try:
            found = fn.explain(arguments.explain, machine=arguments.machine or "", mode=mode)
        except (ValueError, MemoryError) as error:
            raise CannotUse(str(error) or "there is no memory for such an array") from None
    if arguments.json:
        say_json(found)
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from fastnorm import stats
    from fastnorm._files import parts, reading

    asked = parts.Options(
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
        if needed:
            require("stats", *needed)
        if arguments.scheduler is not None:
            require("dask")
        with Rate() as rate:
            found, complete = stats.collect(
                files.found,
                asked,
                key=arguments.key,
                by_folder=arguments.by == "folder",
                skip_bad=arguments.skip_bad,
                workers=arguments.workers,
                scheduler=arguments.scheduler,
                begin=rate.begin,
                advance=rate.advance,
            )
    except CannotRead as error:
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
    told = _tell_statistics(found, rate.unit, complete, arguments)
    return status or told


def _tell_statistics(found: Any, unit: str, complete: bool, arguments: argparse.Namespace) -> int:
    """Print them and draw the histogram: 1 where one is no number, or the picture not written."""
    from fastnorm._files import report

    total, scale = found.total, arguments.scale
    not_finite = report.not_finite_channels(total, scale)
    advice = ""
    if path := found.not_finite:
        what = "an infinity" if arguments.ignore_nan else "NaN or an infinity"
        leave = "" if arguments.ignore_nan else "; --ignore-nan leaves out NaN"
        advice = f"; {path} has {what}{leave}"
    for channel in not_finite:
        warn(f"{channel}{advice}")
    drawn = True
    if arguments.plot is not None and found.histogram is not None:
        kind = arguments.plot.suffix[1:].lower()
        drawn = _drawn(
            lambda: arguments.plot.write_bytes(report.plot(found.histogram, total, scale, kind))
        )
    line = None if not_finite else report.normalize_line(total, scale)
    if arguments.json:
        result: dict[str, Any] = report.summary(total, scale) | {
            "scale": scale,
            f"{unit}s": found.parts,
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
    return 1 if not_finite or not drawn else 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "bench": _bench,
    "tune": _tune,
    "info": _info,
    "placement": _placement,
    "stats": _stats,
}
