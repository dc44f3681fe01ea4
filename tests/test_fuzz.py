"""Random calls, in processes of their own: a crash is a failure that names the call."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings

import fastnorm as fn

from . import test_backward  # noqa: F401  has @given, which may not be met first within another
from .fuzz.__main__ import run
from .fuzz.cases import SIZES, Case, cases
from .fuzz.checks import judge
from .helpers import BACKENDS, ROOT

# 3,000 in all, the same in every run. Numba's take a process that has compiled before.
SHARES = {"cython": 2000, "numba": 400, "numpy": 600}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_calls(backend: str) -> None:
    outcome = run(SHARES[backend], backend, "", seed=20)
    assert not outcome.story, outcome.story
    assert outcome.examples == SHARES[backend]


def test_sizes_go_beyond_every_block() -> None:
    """Whatever length a kernel does something else at, there are cases on either side of it."""
    sources = [*ROOT.glob("fastnorm/_core/kernels.pxi"), ROOT / "fastnorm/_numba/blocking.py"]
    found = set()
    for source in sources:
        if source.exists():
            text = source.read_text(encoding="utf-8")
            found |= set(re.findall(r"^ *[A-Z_]+ = (\d+(?: << \d+)?) +#", text, re.MULTILINE))
    lengths = {int(a) << int(b or 0) for a, _, b in (f.partition(" << ") for f in found)}
    assert lengths
    assert not {n for n in lengths if not {n, n + 1} <= set(SIZES)}


@settings(max_examples=25)
@given(cases(largest=3000))
def test_the_same_as_a_strategy(case: Case) -> None:
    with fn.backend("numpy"):
        judge(case)
