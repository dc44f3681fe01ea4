"""Two minutes of threads, forks, exits and signals at once (stress.py), and what it notices."""

from __future__ import annotations

import os

import numpy as np
import pytest

from . import stress
from .helpers import BACKENDS, run_python

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="POSIX's processes and signals"),
    pytest.mark.skipif(len(BACKENDS) < 2, reason="no kernels"),
]

BACKEND = BACKENDS[0]


@pytest.mark.slow
def test_nothing_hangs_and_no_bit_is_wrong() -> None:
    run = run_python("-m", "tests.stress", "--seconds", str(stress.SECONDS))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith(": 0 faults\n")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("calls = itertools.count(); fn.layer_norm = wrong", "a bit is wrong"),
        ("stress.Program.check = lambda *_: os.abort()", "returned -6"),
        ("stress.Program.run = lambda _: time.sleep(1000)", "hangs"),
        ("stress.Program._be_a_child = lambda *_: os._exit(9)", "a forked child that"),
        ("print('what?', file=sys.stderr)", "what?"),
    ],
)
def test_it_notices(fault: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made to go wrong, in some of a few programs."""
    program = f"""
import itertools, os, sys, time
import fastnorm as fn
from tests import stress
right = fn.layer_norm
def wrong(*given, **named):
    y = right(*given, **named)
    if next(calls) % 20 == 19 and not named:
        y.flat[7] = -y.flat[7]
    return y
{fault}
sys.exit(stress.main())
"""
    monkeypatch.setattr(stress, "PROGRAM", ("-c", program))
    monkeypatch.setattr(stress, "PATIENCE", 15 if told == "hangs" else stress.PATIENCE)
    seeds = range(1 if told == "hangs" else 4)
    found = [stress.judged(seed, BACKEND)[2] for seed in seeds]
    assert any(told in each for each in found), found


def test_bits_are_compared() -> None:
    program, ones = stress.Program(1, BACKEND), np.ones(3, np.float32)
    program.calls = [(ones.copy, ones)]
    program.check(program.rng)
    program.calls = [(lambda: np.nextafter(ones, np.float32(2)), ones)]
    with pytest.raises(stress.Wrong):
        program.check(program.rng)
    program.calls = [(lambda: -np.zeros(3), np.zeros(3))]
    with pytest.raises(stress.Wrong):
        program.check(program.rng)
