"""The kernels called directly, in C and without Python: for every instruction set of this machine.

`tests/kernels/check_kernels.c` compares each family of them with plain loops in long double.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from fastnorm import _core

from .kernels.__main__ import can_build, can_cross_build


def levels() -> list[str]:
    """The instruction sets of this machine that kernels are built for."""
    found = _core.level_found
    return list(_core.LEVELS[: _core.LEVELS.index(found) + 1]) if found in _core.LEVELS else []


Process = subprocess.CompletedProcess[str]


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="there is no C compiler")
@pytest.mark.parametrize(
    "level",
    [
        pytest.param(level, marks=pytest.mark.own_process("-m", "tests.kernels", level))
        for level in levels() or ["plain"]
    ],
)
def test_kernels_alone(level: str, own_process: Process) -> None:
    assert own_process.returncode == 0, own_process.stdout + own_process.stderr


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="there is no C compiler")
@pytest.mark.own_process("-m", "tests.kernels", "threads")
def test_threads_alone(own_process: Process) -> None:
    assert own_process.returncode == 0, own_process.stdout + own_process.stderr


def test_aarch64_is_tried_where_that_is_asked() -> None:
    assert can_cross_build() or not os.environ.get("FASTNORM_AARCH64")


@pytest.mark.slow
@pytest.mark.skipif(not can_cross_build(), reason="no cross compiler for AArch64, or no emulator")
@pytest.mark.own_process("-m", "tests.kernels", "aarch64")
def test_kernels_for_aarch64(own_process: Process) -> None:
    """NEON's."""
    assert own_process.returncode == 0, own_process.stdout + own_process.stderr
