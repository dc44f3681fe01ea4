"""The kernels called directly, in C and without Python: for every instruction set of this machine.

`tests/kernels/check_kernels.c` compares each family of them with plain loops in long double.
"""

from __future__ import annotations

import os

import pytest

from fastnorm import _core

from .helpers import run_python
from .kernels.__main__ import can_build, can_cross_build


def levels() -> list[str]:
    """The instruction sets of this machine that kernels are built for."""
    found = _core.level_found
    return list(_core.LEVELS[: _core.LEVELS.index(found) + 1]) if found in _core.LEVELS else []


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="there is no C compiler")
@pytest.mark.parametrize("level", levels() or ["plain"])
def test_kernels_alone(level: str) -> None:
    run = run_python("-m", "tests.kernels", level)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="there is no C compiler")
def test_threads_alone() -> None:
    run = run_python("-m", "tests.kernels", "threads")
    assert run.returncode == 0, run.stdout + run.stderr


def test_aarch64_is_tried_where_that_is_asked() -> None:
    assert can_cross_build() or not os.environ.get("FASTNORM_AARCH64")


@pytest.mark.slow
@pytest.mark.skipif(not can_cross_build(), reason="no cross compiler for AArch64, or no emulator")
def test_kernels_for_aarch64() -> None:
    """NEON's."""
    run = run_python("-m", "tests.kernels", "aarch64")
    assert run.returncode == 0, run.stdout + run.stderr
