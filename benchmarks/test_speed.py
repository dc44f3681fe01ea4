"""Every case and every peer: `make bench`."""

from __future__ import annotations

from typing import Any

import pytest

import fastnorm as fn
from fastnorm._bench.cases import Case, data
from fastnorm._bench.copying import bytes_moved, copy
from fastnorm._bench.peers import PEERS, Absent, checked, reference
from fastnorm._bench.rows import COPY
from fastnorm._bench.timing import Contender

from .cases import CASES
from .ceiling import moves


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
    contenders[COPY] = Contender(copy(case, arrays, moves(fn.get_num_threads())))
    moved = bytes_moved(case, arrays)
    compare(case.kind, case, contenders, bytes=moved, absent=absent, small=case.small)
