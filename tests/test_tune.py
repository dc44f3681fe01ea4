"""`fastnorm tune`: what it finds, the file it keeps, and what else may lie in that file's place."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import cli, limits, machine, machine_file, tune
from fastnorm.machine import MEASURED, Machine
from fastnorm.runtime import on_machine

from .helpers import BACKENDS, COMPILED, ROOT, assert_same_bits, run_python

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and permissions as POSIX has them")
compiled = pytest.mark.skipif(not COMPILED, reason="the compiled kernels are timed")

FACTS = dict(zip(MEASURED, range(1 << 20, 1 << 24, 1 << 20)))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine file is in this test."""
    monkeypatch.delenv("FASTNORM_MACHINE", raising=False)
    for name in ("XDG_CONFIG_HOME", "APPDATA", "HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    found = machine_file.path()
    assert found is not None
    assert tmp_path in found.parents
    return found


def kept(file: Path, **facts: Any) -> None:
    machine_file.write(file, machine.identity(machine.found()) | facts, ["A comment."])


def used() -> tuple[Machine, machine.Source, list[str]]:
    """The machine as an import would have it, and what is said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, source = machine.at_hand()
    return found, source, [str(each.message) for each in said]


# --- The file -------------------------------------------------------------------------------------


def test_what_was_measured_is_used_later(file: Path) -> None:
    before, source, _ = used()
    assert (before.measured, source.text) == ({}, "the system")
    kept(file, date="2026-11-28", **FACTS)
    found, source, said = used()
    assert found.measured == FACTS
    assert found.caches == machine.found().caches
    assert str(file) in source.text
    assert not said
    assert not source.passed_over
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_machine_that_is_named_comes_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(file, **FACTS)
    for text, l2 in (("zen5", 1 << 20), ("l2=3M", 3 << 20), ("system", machine.found().l2)):
        monkeypatch.setenv("FASTNORM_MACHINE", text)
        found, source, said = used()
        assert (found.l2, found.measured, said) == (l2, {}, [])
        assert source.text == f"FASTNORM_MACHINE={text}"
    # the file itself may be named, on whatever machine
    monkeypatch.setenv("FASTNORM_MACHINE", str(file))
    assert used()[0].measured == FACTS


def _huge(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(1 << 40)


def _unreadable(file: Path) -> None:
    file.symlink_to(file)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder": (lambda file: file.mkdir(), "is no file"),
    "a link to itself": (_unreadable, "symbolic links"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "is no file"),
    "a pipe": (lambda file: os.mkfifo(file), "is no file"),
    "huge": (_huge, "has more than"),
    "binary": (lambda file: file.write_bytes(b"\x7fELF\xff\x00"), "damaged: no text"),
    "zeros": (lambda file: file.write_bytes(bytes(100)), "line 1 is no name"),
    "empty": (lambda file: file.write_bytes(b""), "or of another version"),
    "words": (lambda file: file.write_text("format = 1\nhello\n"), "line 2 is no name"),
    "two of a name": (lambda file: kept(file) or _add(file, "format = 1"), "line 8 is no"),
    "another version": (lambda file: file.write_text("format = 2\n"), "of another version"),
    "another machine": (lambda file: file.write_text("format = 1\nl2 = 7\n"), "another machine"),
    "another processor": (
        lambda file: _change(file, "processor = ", "processor = I "),
        "another m",
    ),
    "no such fact": (lambda file: kept(file, speed=1), "damaged: speed"),
    "caches to order": (lambda file: kept(file, cores=1), "damaged: cores"),
    "a number that is none": (lambda file: kept(file, wake_bytes="1e5"), "damaged: wake_bytes"),
    "a negative number": (lambda file: kept(file, wake_bytes=-5), "damaged: wake_bytes"),
    "nothing": (lambda file: kept(file, wake_bytes=0), "damaged: wake_bytes"),
    "a number without end": (lambda file: kept(file, wake_bytes="9" * 9999), "damaged: wake_bytes"),
    "escape codes": (lambda file: kept(file, wake_bytes="\x1b[2J"), "damaged: wake_bytes"),
}


def _add(file: Path, line: str) -> None:
    file.write_text(file.read_text() + line + "\n")


def _change(file: Path, old: str, new: str) -> None:
    kept(file, **FACTS)
    file.write_text(file.read_text().replace(old, new))


@posix
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_used_is_passed_over(file: Path, kind: str) -> None:
    """With one warning, which says what is wrong with which file, and what to do."""
    make, reason = HOSTILE[kind]
    file.parent.mkdir()
    make(file)
    found, source, said = used()
    assert (found.measured, source.text) == ({}, "the system")
    (warning,) = said
    assert warning.startswith(f"{file} is not used: ")
    assert reason in warning
    assert "fastnorm tune --forget" in warning
    assert source.passed_over
    assert warning.startswith(source.passed_over)
    assert len(warning) < 500
    assert warning.isprintable()


def test_a_file_that_may_not_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    assert used()[2] == []  # none is there, as far as can be seen
    monkeypatch.undo()
    kept(file, **FACTS)
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(machine_file.Unusable, match="may not be read"):
        machine_file.read(file)


@posix
@pytest.mark.parametrize("options", [(), ("-W", "error"), ("-I",)], ids=str)
def test_no_import_fails_for_it(file: Path, options: tuple[str, ...]) -> None:
    file.parent.mkdir()
    os.mkfifo(file)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    program += "import fastnorm as fn; print(fn.show_config('dicts')['machine']['passed over'])"
    run = run_python(*options, "-c", program, XDG_CONFIG_HOME=str(file.parent.parent))
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{file} is not used: it is no file\n"
    assert run.stderr.count("is not used") == (options != ("-W", "error"))


def test_no_folder_for_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError

    for name in ("XDG_CONFIG_HOME", "APPDATA", "FASTNORM_MACHINE"):
        monkeypatch.setenv(name, "" if name != "XDG_CONFIG_HOME" else "relative")
    monkeypatch.setattr(Path, "home", none)
    assert machine_file.path() is None
    assert used()[1].text == "the system"


def test_show_config_says_what_is_in_use(file: Path) -> None:
    kept(file, **FACTS)
    code = "import fastnorm as fn; fn.show_config()"
    out = run_python("-c", code, XDG_CONFIG_HOME=str(file.parent.parent)).stdout
    assert f"taken from: the system and {file}, which fastnorm tune wrote\n" in out
    assert f"measured: {', '.join(f'{name} {n}' for name, n in FACTS.items())}\n" in out


def test_it_is_read_in_no_time() -> None:
    """What is imported for it is imported anyway."""
    code = "import sys, fastnorm; print({'tempfile', 'fastnorm.tune'} & sys.modules.keys())"
    assert run_python("-c", code).stdout == "set()\n"


# --- What follows from it -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "numpy"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_no_bit_depends_on_what_was_measured(backend: str, channels_last: bool) -> None:
    rng = np.random.default_rng(0)
    shape = (6, 24, 24, 64) if channels_last else (6, 64, 24, 24)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    if channels_last:
        x, dy = (np.moveaxis(array, -1, 1) for array in (x, dy))
    rows = np.ascontiguousarray(x).reshape(-1, 576)

    def everything() -> list[Any]:
        y, mean, rstd = fn.group_norm(x, 16, return_stats=True)
        row, row_mean, row_rstd = fn.layer_norm(rows, 576, return_stats=True)
        return [
            *(y, mean, rstd, row, row_mean, row_rstd),
            *fn.batch_norm(x, training=True, return_stats=True),
            *fn.group_norm_backward(dy, x, mean, rstd, 16),
            *fn.layer_norm_backward(rows[::-1], rows, row_mean, row_rstd, 576),
            fn.layer_norm(rows.astype(np.float64), 576),
            fn.layer_norm(rows.astype(np.float16), 576),
        ]

    with fn.backend(backend), fn.threads(2):
        with on_machine(Machine(l3=32 << 20)):
            right = everything()
        for n in (1, 1 << 40):
            with on_machine(Machine().with_measured(dict.fromkeys(MEASURED, n))):
                found = everything()
            for one, other in zip(found, right):
                assert_same_bits(one, other)


def test_each_fact_decides_what_it_says() -> None:
    call = "layer_norm 4096x1024"  # 16 MB

    def explained(text: str, facts: str) -> dict[str, Any]:
        (found,) = fn.explain(text, threads=2, machine=f"zen5,{facts}", mode="dicts") or ()
        return found

    for backward, last, fact in (
        ("", "", "non_temporal_bytes"),
        (" --backward", "", "non_temporal_backward_bytes"),
        ("", " channels-last", "non_temporal_strided_bytes"),
        (" --backward", " channels-last", "non_temporal_backward_strided_bytes"),
    ):
        text = f"batch_norm 64x64x32x32{last} --training{backward}" if last else call + backward
        assert explained(text, f"{fact}=64M")["stores"] == "usual"
        assert explained(text, f"{fact}=2M")["stores"] == "non-temporal"
        assert explained(call, "serial_bytes=64M")["threads"] == 1
    assert explained(f"{call} --backward", "serial_backward_bytes=64M")["threads"] == 1
    assert explained("layer_norm 16x768", "serial_bytes=1K")["threads"] == 2


def test_a_reason_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    fn.explain("layer_norm 4096x768", machine="zen5,non_temporal_bytes=2M")
    assert (
        "x is 12 MB; non-temporal ones pay from 2 MB on, as measured\n" in capsys.readouterr().out
    )


# --- Measuring ------------------------------------------------------------------------------------

_SIZES = tuple(1 << power for power in range(20, 26))


def _ratios(*times: float) -> dict[int, float]:
    return {size: math.log(time) for size, time in zip(_SIZES, times)}


@pytest.mark.parametrize(
    ("times", "default", "low", "high"),
    [
        ((1.5, 1.4, 1.2, 0.8, 0.7, 0.6), 1 << 24, 1 << 22, 1 << 23),
        ((1.5, 1.4, 1.2, 0.8, 0.7, 0.6), 1 << 21, 1 << 22, 1 << 23),
        ((1.5, 1.4, 1.2, 0.8, 0.7, 0.6), 5 << 20, 0, 0),  # as good
        ((0.5, 0.5, 0.5, 0.5, 0.5, 0.5), 1 << 24, 1 << 20, 1 << 20),
        ((2.0, 2.0, 2.0, 2.0, 2.0, 2.0), 1 << 24, 1 << 25, 1 << 26),
        ((2.0, 2.0, 2.0, 2.0, 2.0, 2.0), 1 << 40, 0, 0),
        ((1.01, 0.99, 1.01, 0.99, 1.01, 0.99), 1 << 24, 0, 0),  # not worth it
        ((1.5, 0.9, 1.2, 0.8, 0.7, 0.6), 1 << 24, 1 << 22, 1 << 23),  # one of them disturbed
        ((), 1 << 24, 0, 0),
    ],
)
def test_the_size_with_which_least_time_is_lost(
    times: tuple[float, ...], default: int, low: int, high: int
) -> None:
    found, saves = tune.threshold(_ratios(*times), default)
    assert low <= found <= high
    assert (saves > tune.WORTH) == bool(found)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, few rounds, and nobody else at work."""
    monkeypatch.setattr(cli, "busy", lambda: 1.0)
    small = tuple(
        tune.replace(q, sizes=tuple(size // 64 for size in q.sizes[:2])) for q in tune.QUESTIONS
    )
    monkeypatch.setattr(tune, "QUESTIONS", small)
    monkeypatch.setattr(tune, "BUDGET", 0.0)
    monkeypatch.setattr(tune, "BLOCK", 1e-4)
    monkeypatch.setattr(tune, "PAUSED_CALLS", 2)
    monkeypatch.setattr(tune, "NOISE", 1e9)


@compiled
@pytest.mark.usefixtures("quick")
def test_tune_and_forget(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "non-temporal stores, contiguous" in out
    assert not err
    assert not file.exists()
    assert cli.main(["tune"]) == 0
    assert capsys.readouterr().err.startswith(f"fastnorm: written to {file}; ")
    found, source, said = used()
    assert str(file) in source.text
    assert not said
    assert cli.main(["tune", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["facts"]) <= set(MEASURED)
    assert used()[0].measured == told["facts"]
    assert set(found.measured) <= set(MEASURED)
    assert cli.main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == f"removed {file}\n"
    assert not file.exists()
    assert cli.main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == "there is no machine file\n"


@compiled
@pytest.mark.usefixtures("quick")
def test_nothing_is_kept_of_a_busy_machine(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "busy", lambda: 87.0)
    assert cli.main(["tune"]) == 1
    out, err = capsys.readouterr()
    assert (out, file.exists()) == ("", False)
    assert err.startswith("fastnorm: others use 87 % of the processors: nothing is measured")
    monkeypatch.setattr(cli, "busy", lambda: None)
    monkeypatch.setattr(tune, "NOISE", -1.0)
    assert cli.main(["tune"]) == 1
    assert "the machine is busy, and nothing is written" in capsys.readouterr().err
    assert not file.exists()
    assert cli.main(["tune", "--force"]) == 0
    assert file.exists()


@compiled
@pytest.mark.usefixtures("quick")
def test_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune.measure(Machine(cores=1))
    assert not any("serial" in a.question.fact for a in found.answers)
    assert "threads were not measured" in tune.to_text(found)


@compiled
@posix
@pytest.mark.usefixtures("quick")
def test_a_file_that_cannot_be_written(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.mkdir(parents=True)
    (file / "inside").touch()
    assert cli.main(["tune"]) == 1
    assert f"fastnorm: cannot write {file}: " in capsys.readouterr().err
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert cli.main(["tune", "--forget"]) == 1
    assert f"fastnorm: cannot remove {file}: " in capsys.readouterr().err


def test_what_tune_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--forget", "--json"]) == 2
    assert capsys.readouterr().err == "fastnorm: --forget stands alone\n"
    with fn.backend("numpy"):
        assert cli.main(["tune"]) == 2
    assert "tune times the compiled kernels" in capsys.readouterr().err


@pytest.mark.slow
@compiled
def test_it_takes_less_than_20_seconds(file: Path) -> None:
    """Of a machine of its own; other tests may run beside this one."""
    run = run_python("-m", "fastnorm", "tune", "--force", "--json", XDG_CONFIG_HOME=str(file))
    assert run.returncode == 0, run.stderr
    seconds = json.loads(run.stdout)["seconds"]
    assert seconds < 20 * (3 if limits.processors() < 4 or sys.platform != "linux" else 1)
