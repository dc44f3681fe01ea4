"""Every case beside every peer: `make bench`."""

from __future__ import annotations

from typing import Any

import pytest

import fastnorm as fn

from . import ceiling
from .cases import CASES, Case, data
from .peers import PEERS, Absent, checked, reference
from .rows import COPY
from .timing import Contender


@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed(case: Case, compare: Any) -> None:
    arrays = data(case)
    exact = reference(case, arrays)
    contenders: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name in PEERS:
        try:
            contenders[name] = checked(name, case, arrays, exact).contender()
        except Absent as reason:
            absent[name] = str(reason)
    del exact
    contenders[COPY] = Contender(ceiling.copy(case, arrays, fn.get_num_threads()))
    moved = ceiling.bytes_moved(case, arrays)
    compare(case.kind, case, contenders, bytes=moved, absent=absent, small=case.small)
