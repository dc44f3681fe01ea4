"""The random calls of tests/fuzz: what they are made of."""

from __future__ import annotations

import re

from hypothesis import given, settings

import fastnorm as fn

from . import test_backward  # noqa: F401  has @given, which may not be met first within another
from .fuzz.cases import SIZES, Case, cases
from .fuzz.checks import judge
from .helpers import ROOT


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
