"""The kernels called directly, in C and without Python: for every instruction set of this machine.

`tests/kernels/check_kernels.c` compares each family of them with plain loops in long double.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fastnorm import _core

from .helpers import ROOT

SOURCE = ROOT / "tests/kernels/check_kernels.c"
# As setup.py has them. -O1 is enough for what is checked, and takes a quarter of the time.
FLAGS = ["-std=c11", "-O1", "-fno-fast-math", "-ffp-contract=off", "-fopenmp", "-DFN_CHECKED=1"]
ABI = {"x86-64-v4": ["-mprefer-vector-width=512"]}


def check(
    compiler: list[str], flags: list[str], folder: Path, run: tuple[str, ...] = (), *options: str
) -> None:
    """Build the program and let it find nothing."""
    program = folder / "check_kernels"
    command = [*compiler, *FLAGS, *flags, "-I", str(ROOT / "fastnorm/_core"), str(SOURCE), "-lm"]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert not built.returncode, built.stderr
    ran = subprocess.run([*run, str(program), *options], capture_output=True, text=True)
    assert not ran.returncode, ran.stdout + ran.stderr


def levels() -> list[str]:
    """The instruction sets of this machine that kernels are built for; none where it is another."""
    found = _core.level_found
    return list(_core.LEVELS[: _core.LEVELS.index(found) + 1]) if found in _core.LEVELS else [""]


@pytest.mark.slow
@pytest.mark.parametrize("level", levels())
def test_kernels_alone(level: str, tmp_path: Path) -> None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not shutil.which(compiler[0]):
        pytest.skip("there is no C compiler")
    flags = [f"-march={level}", *ABI.get(level, [])] if level else []
    check(compiler, flags, tmp_path)


@pytest.mark.slow
def test_kernels_for_aarch64(tmp_path: Path) -> None:
    """NEON's, where a cross compiler and an emulator are at hand."""
    compiler, emulator = "aarch64-linux-gnu-gcc", shutil.which("qemu-aarch64")
    if not shutil.which(compiler) or not emulator:
        pytest.skip("there is no cross compiler for AArch64, or no qemu-aarch64")
    check([compiler], ["-static"], tmp_path, (emulator,), "short")
