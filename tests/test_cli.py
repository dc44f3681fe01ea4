"""The command line: what it prints where, its exit statuses, and the demonstration's parts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import cli, demo

Array = np.ndarray[Any, Any]

needs_demo = pytest.mark.skipif(
    None in map(find_spec, ("matplotlib", "PIL", "sklearn")), reason="needs fastnorm-kernels[demo]"
)

NO_KERNELS = "fastnorm: no compiled kernels in use: these are NumPy's times; see 'fastnorm info'\n"
WITHOUT_TORCH = ("fastnorm", "numpy")
# A float32 result is half a unit off at best. Subtracting the mean as a pair, multiplying by rstd
# and rounding rstd itself are half a unit each, twice that where the result is just above a power
# of two; tests/test_accuracy.py derives and holds the bound of each norm.
FEW = 4.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- Versions and configuration -------------------------------------------------------------------


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastnorm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"fastnorm {fn.__version__}\n", "")


def test_info_is_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    fn.show_config()
    expected = capsys.readouterr()
    assert cli.main(["info"]) == 0
    assert capsys.readouterr() == expected


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == fn.show_config("dicts")
    assert err == ""


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_alone_it_prints_the_help(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "fastnorm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for name in ("bench", "demo", "info", "placement", "stats"):
        assert f"\n    {name}" in done.stdout


# --- How it ends ----------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices as POSIX has them")


def fastnorm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastnorm", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


@posix
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["stats", "x.npy"]], ids=str)
def test_nobody_reads_or_nothing_can_be_written(arguments: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(9.0))
    arguments = [str(tmp_path / a) if a.endswith(".npy") else a for a in arguments]
    with Path("/dev/full").open("w") as full:
        done = fastnorm(*arguments, stdout=full)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("fastnorm: cannot write the results: ")
    reading, writing = os.pipe()
    os.close(reading)
    done = fastnorm(*arguments, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@posix
@pytest.mark.parametrize(
    ("closed", "status", "told"),
    [(">&-", 1, "fastnorm: cannot write the results: stdout is closed\n"), ("2>&-", 0, "")],
)
def test_closed_streams(closed: str, status: int, told: str) -> None:
    command = ["sh", "-c", f'"$0" -m fastnorm info {closed}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, told)


INTERRUPTED = """
import os, signal, sys
from fastnorm import cli

def stop(frame, event, argument):
    module = frame.f_globals.get("__name__", "")
    if module.startswith("fastnorm.") and frame.f_code.co_name in ("photographs", "run", "work"):
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.setprofile(stop)
sys.exit(cli.main(sys.argv[1:]))
"""


@needs_demo
@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is a signal")
@pytest.mark.parametrize("command", ["demo", "placement", "stats"])
def test_ctrl_c_is_quiet(command: str, tmp_path: Path) -> None:
    """Interrupted where its work begins."""
    np.save(tmp_path / "x.npy", np.arange(9.0))
    arguments = {"demo": ["--output", str(tmp_path / "x.png")], "stats": [str(tmp_path / "x.npy")]}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, command, *arguments.get(command, [])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert done.stderr == "" or command == "stats"


AMONG_PROCESSES = """
import os, signal, sys, threading
from fastnorm import cli, workers
import fastnorm as fn

def handed_out(pool, *arguments, map=workers.ProcessPoolExecutor.map):
    threading.Timer(0.3, os.killpg, (0, signal.SIGINT)).start()  # as a terminal does: to all
    return map(pool, *arguments)

signal.signal(signal.SIGINT, signal.default_int_handler)
workers.ProcessPoolExecutor.map = handed_out
fn.set_num_threads(2)
sys.exit(cli.main(["placement", "--part", "training"]))
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Ctrl-C is sent to a process group")
def test_ctrl_c_is_quiet_among_processes() -> None:
    """They are still starting, and would print a traceback each."""
    done = subprocess.run(
        [sys.executable, "-c", AMONG_PROCESSES],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@posix
def test_names_are_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape codes, line breaks, bytes that are no text, and letters that stdout does not have."""
    folders = {b"a\x1b[31m\nb": r"a\x1b[31m\nb", "é".encode(): r"\xe9", b"\xff": r"\xff"}
    for name in folders:
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        try:
            folder.mkdir()
        except OSError:
            pytest.skip("this file system takes no such names")
        np.save(folder / "x.npy", np.arange(3.0))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = fastnorm("stats", str(tmp_path), "--by", "folder", env=environment, **PIPED)
    assert (found.returncode, found.stderr) == (0, "")
    for shown in folders.values():
        assert f"{tmp_path}/{shown} " in found.stdout
    found = fastnorm("stats", str(tmp_path), "--by", "folder", "--json", env=environment, **PIPED)
    for name in json.loads(found.stdout)["folders"]:
        name.encode("utf-8")  # no half of a surrogate pair
    for arguments in (["stats", "\x1b[2Jno\nwhere"], ["stats", "x", "--\x1b]0;\n"], ["\x1bdo"]):
        with suppress(SystemExit):
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert out == ""
        assert "\x1b" not in err
        assert r"\x1b" in err


PIPED: dict[str, Any] = {"stdout": subprocess.PIPE}


# --- What cannot be used --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["dance"], "dance"),
        (["info", "--yaml"], "--yaml"),
        (["demo", "--threads", "0"], "'0' is not a whole number, 1 or more"),
        (["demo", "--threads", "two"], "'two' is not a whole number, 1 or more"),
        (["demo", "--output", "."], "'.' is a directory"),
        (["demo", "--output", "nowhere/demo.png"], "there is no directory 'nowhere'"),
    ],
)
def test_unusable_arguments(
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err


def test_missing_library(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo", "--output", str(tmp_path / "demo.png")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "fastnorm: this needs matplotlib and scikit-learn: "
        "install with pip install 'fastnorm-kernels[demo]'\n"
    )
    assert not list(tmp_path.iterdir())


@needs_demo
def test_picture_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert cli.main(["demo", "--size", "16", "--output", str(tmp_path / "demo.png")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastnorm: cannot write the picture: ")


# --- The demonstration ----------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        return picture.size


@needs_demo
def test_demo_prints_a_table_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = fn.get_num_threads()
    assert cli.main(["demo", "--size", "32", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ("" if fn.get_backend() != "numpy" else NO_KERNELS)
    assert out.isascii()
    rows = [line.split()[0] for line in out.splitlines() if " | " in line]
    assert rows[2:] == ["batch", "layer", "instance", "group", "rms"]
    assert "threads: 1 " in out
    assert all(f"{norm.name}:" in out and norm.takeaway in out for norm in demo.NORMS)
    assert "ulp" not in out
    assert out.endswith("The picture is in demo.png\n")
    assert png_size(tmp_path / "demo.png") == (1500, 1340)
    assert fn.get_num_threads() == threads


@needs_demo
def test_demo_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    path = tmp_path / "picture.png"
    assert cli.main(["demo", "--size", "32", "--json", "--output", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["picture"] == str(path)
    assert path.exists()
    assert found["shape"] == [8, 16, 32, 32]
    assert tuple(found["versions"]) == WITHOUT_TORCH
    assert [row["norm"] for row in found["norms"]] == [norm.name for norm in demo.NORMS]
    for row in found["norms"]:
        for numbers in (row["milliseconds"], row["times_as_long"], row["ulps"]):
            assert tuple(numbers) == WITHOUT_TORCH
            assert min(numbers.values()) > 0
        ratio = row["milliseconds"]["numpy"] / row["milliseconds"]["fastnorm"]
        assert row["times_as_long"] == pytest.approx({"fastnorm": 1.0, "numpy": ratio})
        assert row["ulps"]["fastnorm"] <= FEW
    # what the project is for: the mean of a float32 is off by 1e4 * 2^-24 spreads or more
    assert found["offset"]["ulps"]["fastnorm"] <= FEW
    assert found["offset"]["ulps"]["numpy"] > 1e5


@needs_demo
def test_demo_warns_where_nothing_is_compiled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with fn.backend("numpy"):
        cli.main(["demo", "--size", "16", "--output", str(tmp_path / "demo.png")])
    assert capsys.readouterr().err == NO_KERNELS


@needs_demo
def test_demo_compares_with_pytorch(torch: Any) -> None:
    before = torch.get_num_threads()
    result, _ = demo.run(32, 1)
    assert torch.get_num_threads() == before
    assert result.versions["torch"] == torch.__version__
    assert all("torch" in row.milliseconds for row in result.norms)
    # PyTorch answers the same question: a different norm would be off by some of its spread
    x = demo.convolve(demo.photographs(32), np.stack(list(demo.filters().values())))
    for norm in demo.NORMS:
        y = demo.contenders(norm, x, torch)["torch"]()
        np.testing.assert_allclose(y, demo.exactly(norm, x), rtol=0, atol=1e-4)


@needs_demo
def test_progress_bar_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["demo", "--size", "16", "--output", str(tmp_path / "demo.png")]) == 0
    shown = terminal.getvalue().split("\r\x1b[K")
    assert len([step for step in shown if step.startswith("[")]) == demo.STEPS
    assert shown[-1] == ""  # nothing of the bar is left
    assert "\r" not in capsys.readouterr().out


@needs_demo
def test_photographs_are_photographs() -> None:
    images = demo.photographs(64)
    assert images.shape == (8, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    red, green, blue = images[0, :, :8].mean((1, 2))
    assert red < green < blue, "the sky of the first photograph is blue"
    assert (images.std((1, 2, 3)) > 0.05).all(), "no cut is plain"


def test_convolution_is_the_sum_it_says() -> None:
    rng = np.random.default_rng(0)
    images, kernels = rng.random((2, 3, 9, 8)), rng.random((4, 3, 5, 5))
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (2, 3))
    expected = np.einsum("nrhwij,crij->nchw", windows, kernels[..., ::-1, ::-1])
    y = demo.convolve(images, kernels)
    assert y.dtype == np.float32
    # 75 products of at most 1: sums below 75 are rounded once, to float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=2.0**-17)


def test_filters_answer_to_what_they_are_for() -> None:
    bank = demo.filters()
    assert len(bank) == 16
    totals = {name: kernel.sum() for name, kernel in bank.items()}
    for name, total in totals.items():
        plain = 1.0 if "light" in name else 0.0  # of a white image
        assert total == pytest.approx(plain, abs=1e-12), name


def test_ulps_by_hand() -> None:
    exact = np.array([1.0, -4.0, 2.0**-30, 0.0])
    # units of float32: 2^-23 at 1, 2^-21 at 4, and 2^-43 for everything below 2^-20
    for i, error in enumerate((2.0**-23, 2.0**-21, 2.0**-43, 2.0**-43)):
        y = exact.copy()
        y[i] += 3 * error
        assert demo.ulps(y, exact) == 3.0
    assert np.isnan(demo.ulps(np.array([np.nan]), np.array([1.0])))


def test_what_is_not_a_number_is_null_in_json() -> None:
    row = demo.Comparison("batch", "channel", "N", {"numpy": 1.0}, {}, {"numpy": float("nan")})
    offset = demo.Offset("batch", 1e4, {"numpy": float("inf")}, {"numpy": 0.5})
    found = demo.Result({"numpy": "2"}, 1, (1, 2), [row], offset).to_dict()
    assert found["norms"][0]["ulps"] == {"numpy": None}
    assert found["offset"]["ulps"] == {"numpy": None}
    json.dumps(found, allow_nan=False)
