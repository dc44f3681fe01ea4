"""The command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastnorm as fn
from fastnorm import cli

from .helpers import run_python


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "instruction set used" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fn.show_config("dicts")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert fn.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["demo", "--threads", "0"],
        ["demo", "--output", "/no/such/folder/a.png"],
        ["demo", "--output", "."],
        ["info", "--yaml"],
    ],
    ids=" ".join,
)
def test_unusable_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage" in captured.err


def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "demo.png"
    options = ["--size", "48", "--output", str(picture)]
    run = run_python("-m", "fastnorm", "demo", "--json", *options)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "picture" in json.loads(run.stdout)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000
    text = run_python("-m", "fastnorm", "demo", *options)
    for name in ("batch", "layer", "instance", "group", "rms", "fastnorm", "NumPy"):
        assert name in text.stdout


def test_a_missing_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pip install 'fastnorm[demo]'" in captured.err
