"""What type checkers know of the public functions and modules."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastnorm as fn

from .helpers import ROOT

# Each line that ends in a remark: "# is" what a checker says the expression is, "# no" an error.
PROGRAM = """\
import numpy as np

import fastnorm as fn
from fastnorm.arguments import Array

x = np.ones((2, 4, 3))
flag = bool(input())
reveal_type(fn.layer_norm(x, 3))  # is array
reveal_type(fn.layer_norm(x, 3, return_stats=False))  # is array
reveal_type(fn.layer_norm(x, axis=-1, return_stats=True))  # is tuple of 3
reveal_type(fn.layer_norm(x, 3, return_stats=flag))  # is either
reveal_type(fn.batch_norm(x, training=True, return_stats=True))  # is tuple of 3
reveal_type(fn.batch_norm(x, training=True))  # is array
reveal_type(fn.instance_norm(x))  # is array
reveal_type(fn.instance_norm(x, return_stats=True))  # is tuple of 3
reveal_type(fn.group_norm(x, 2, activation="relu"))  # is array
reveal_type(fn.group_norm(x, 2, return_stats=True))  # is tuple of 3
reveal_type(fn.rms_norm([[1.0, 2.0]], 2))  # is array
reveal_type(fn.rms_norm(x, 3, return_stats=True))  # is tuple of 2
y, mean, rstd = fn.layer_norm(x, 3, return_stats=True)
reveal_type(rstd)  # is array
reveal_type(fn.moments(x)[0])  # is statistic
reveal_type(fn.standardize(x))  # is array
m = fn.Moments(0).update(x)
reveal_type(m)  # is Moments
reveal_type(m.mean)  # is statistic
reveal_type(m.var(ddof=1))  # is statistic
reveal_type(m.std())  # is statistic
reveal_type(fn.l2_normalize(x))  # is array
norm = fn.nn.BatchNorm(4)
reveal_type(norm(x))  # is array
reveal_type(norm.weight)  # is array or None
reveal_type(norm.running_var)  # is array or None
reveal_type(norm.num_batches_tracked)  # is array or None
reveal_type(norm.num_features)  # is int
reveal_type(norm.eps)  # is float
reveal_type(norm.momentum)  # is float or None
reveal_type(norm.training)  # is bool
reveal_type(norm.grad)  # is arrays by name
reveal_type(fn.nn.LayerNorm(3).bias)  # is array or None
reveal_type(fn.nn.LayerNorm(3).normalized_shape)  # is shape
reveal_type(fn.nn.GroupNorm(2, 4).num_groups)  # is int
reveal_type(fn.nn.RMSNorm(3).eps)  # is float or None
block = fn.nn.TransformerBlock(8, 2)
reveal_type(block.d_model)  # is int
reveal_type(block.causal)  # is bool
norm.wieght  # no
norm.runing_mean  # no
norm.weight.shape  # no
norm.momentum = "0.1"  # no
fn.nn.InstanceNorm(4).num_feature  # no
block.d_modell  # no
block.placement = "sandwich"  # no
fn.nn.TransformerBlock(8, 2, activation="Relu")  # no
fn.nn.BatchNorm("4")  # no
norm.load_state_dict(norm.state_dict())
norm.load_statedict({})  # no
fn.nn.LayerNorm(3).evall()  # no
fn.layer_norm(x, 3, activation="Relu")  # no
fn.layer_norm(x, "3")  # no
fn.layer_norm(x, 3, return_stat=True)  # no
fn.group_norm(2, x)  # no
fn.batch_norm(x, momentum="0.1")  # no
fn.layer_norms(x, 3)  # no
m.update(x).meann  # no
fn.set_num_threads("2")  # no
"""

_ARRAY = r"(numpy\.)?ndarray\[[^\n]*Any\]\]"
KINDS = {
    "array": rf"{_ARRAY}",
    "tuple of 3": rf"tuple\[{_ARRAY}, {_ARRAY}, {_ARRAY}\]",
    "tuple of 2": rf"tuple\[{_ARRAY}, {_ARRAY}\]",
    "either": rf"{_ARRAY} \| tuple\[.*\]",
    "statistic": r"(numpy\.)?float64 \| (numpy\.)?ndarray\[.*float64\]\]",
    "array or None": rf"{_ARRAY} \| None",
    "arrays by name": rf"dict\[str, {_ARRAY}\]",
    "shape": r"tuple\[int, \.\.\.\]",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "float or None": r"float \| None|None \| float",
    "Moments": r"(fastnorm\.moments\.)?Moments",
}


def check(said: dict[int, str]) -> None:
    """Compare what was said of each line with its remark."""
    faults = []
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        words, remark = said.get(number, ""), line.partition("  # ")[2]
        if remark.startswith("is "):
            found = re.search(r'(?:Revealed type is|Type of .* is) "(.*)"', words)
            kind = found.group(1).replace("builtins.", "") if found else words
            if not re.fullmatch(KINDS[remark[3:]], kind):
                faults.append((line, words))
        elif (remark == "no") != bool(words):
            faults.append((line, words))
    assert not faults, faults


def test_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [
            # strict, as the configuration has it
            *(sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context"),
            *("--config-file", str(ROOT / "pyproject.toml"), "--no-pretty"),
            str(tmp_path / "program.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if place := re.match(r".*program\.py:(\d+): (.*)", line):
            said[int(place[1])] = said.get(int(place[1]), "") + place[2]
    check(said)


def test_pyright(tmp_path: Path) -> None:
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"]}}')
    done = subprocess.run(
        ["pyright", "--pythonpath", sys.executable, "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if place := re.match(r".*program\.py:(\d+):\d+ - (.*)", line):
            said[int(place[1])] = said.get(int(place[1]), "") + place[2]
    check(said)


def test_the_package_lists_its_public_names() -> None:
    assert {name for name in dir(fn) if not name.startswith("__")} == set(fn.__all__)
    for name in fn.__all__:
        assert hasattr(fn, name), name
