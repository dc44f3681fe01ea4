"""fastnorm and what it can not surpass: memory, its own threads, NumPy, the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm._bench.cases import Case, data
from fastnorm._bench.copying import bytes_moved, copy
from fastnorm._bench.peers import check, fastnorm, reference
from fastnorm._bench.rows import COPY
from fastnorm._bench.timing import Contender

from .cases import CLIFF, OUT, THREADS
from .ceiling import moves


@pytest.mark.parametrize("case", OUT, ids=str)
def test_out(case: Case, compare: Any) -> None:
    """Into a given array: the time is the memory's."""
    arrays = data(case)
    peer = fastnorm(case, arrays)
    check("fastnorm", case, peer.answer(peer.call()), reference(case, arrays))
    copied = Contender(copy(case, arrays, moves(fn.get_num_threads())))
    moved = bytes_moved(case, arrays)
    compare("out", case, {"fastnorm": peer.contender(), COPY: copied}, bytes=moved)


@pytest.mark.parametrize("case", THREADS, ids=str)
def test_threads(case: Case, compare: Any) -> None:
    """All threads over one."""
    if fn.get_num_threads() == 1:
        pytest.skip("there is one thread")
    peer = fastnorm(case, data(case))
    alone = Contender(peer.call, partial(fn.threads, 1))
    compare("threads", case, {"fastnorm": peer.contender(), "one thread": alone})


@pytest.mark.parametrize("case", CLIFF, ids=str)
def test_cliff(case: Case, compare: Any) -> None:
    """Sizes by doubling: time over the copy's time must not jump."""
    size = case.bytes
    if (free := _free_memory()) < 6 * size:
        pytest.skip(f"{free / 1e9:.1f} GB are free, too few for {size / 1e9:.1f} GB and its copies")
    arrays = data(case)
    contenders = {
        "fastnorm": fastnorm(case, arrays).contender(),
        COPY: Contender(copy(case, arrays, moves(fn.get_num_threads()))),
    }
    moved = bytes_moved(case, arrays)
    compare("cliff", case, contenders, rounds=5, bytes=moved, function=case.operation.name)


def _free_memory() -> float:
    try:
        import psutil
    except ImportError:
        return float("inf")
    return float(psutil.virtual_memory().available)


def test_door(compare: Any) -> None:
    """The smallest call, and what NumPy takes for an empty result."""
    x = np.ones((1, 64), np.float32)
    weight, bias = np.ones(64, np.float32), np.zeros(64, np.float32)
    contenders = {
        "fastnorm": Contender(partial(fn.layer_norm, x, 64, weight, bias)),
        "np.empty_like": Contender(partial(np.empty_like, x)),
    }
    compare("door", "layer_norm 1x64", contenders)


PROGRAMS = {
    "import fastnorm": "import fastnorm",
    "import and a first group_norm": (
        "import fastnorm, numpy; fastnorm.group_norm(numpy.ones((2, 64, 8, 8), numpy.float32), 32)"
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_import(name: str, compare: Any) -> None:
    """Fresh processes; the first of each, which writes the bytecode, is not counted."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def process(program: str) -> None:
        command = [sys.executable, "-c", program]
        subprocess.run(command, env=environment, cwd=tempfile.gettempdir(), check=True)

    contenders = {
        "fastnorm": Contender(partial(process, PROGRAMS[name])),
        "import numpy": Contender(partial(process, "import numpy")),
    }
    compare("import", name, contenders, rounds=15)
