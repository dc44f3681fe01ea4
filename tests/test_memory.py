"""Memory of large results, which is kept for the next ones."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core

from .helpers import COMPILED

pytestmark = pytest.mark.skipif(
    not COMPILED or not sys.platform.startswith("linux"), reason="kept on Linux alone"
)

ROWS = 6000  # of 1024 float32: 25 MB


def large() -> Any:
    return np.ones((ROWS, 1024), np.float32)


def result(x: Any) -> Any:
    fn.layer_norm(x[:1], 1024)
    for _ in range(2):  # the second is answered from a plan
        y = fn.layer_norm(x, 1024)
    return y


@pytest.fixture(autouse=True)
def limit() -> Any:
    yield
    _core.kernels.keep_at_most(256 << 20)


def test_a_freed_result_is_used_again() -> None:
    x = large()
    y = result(x)
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.ctypes.data % 64 == 0
    place = y.ctypes.data
    other = fn.layer_norm(x, 1024)
    assert other.ctypes.data != place, "a living result keeps its memory"
    view = y[5:]
    del y
    gc.collect()
    assert fn.layer_norm(x, 1024).ctypes.data != place, "a view keeps it, too"
    del view
    kept = {fn.layer_norm(x, 1024).ctypes.data for _ in range(3)}
    assert len(kept) == 1, "each of these was freed before the next"


def test_other_sizes_and_orders() -> None:
    rng = np.random.default_rng(0)
    for rows in (4096, 4100, 5000, 9000, 4096):
        x = rng.standard_normal((rows, 1024), np.float32)
        for array in (x, x.reshape(2, -1, 1024).transpose(0, 2, 1)):
            kept = [fn.instance_norm(array) if array.ndim == 3 else fn.layer_norm(array, 1024)]
            kept += [fn.instance_norm(array) if array.ndim == 3 else fn.layer_norm(array, 1024)]
            assert kept[1].strides == array.strides
            np.testing.assert_array_equal(*kept)


def test_a_result_can_be_resized_and_copied() -> None:
    y = result(large())
    y[:] = 7
    y.resize((2 * ROWS, 1024), refcheck=False)
    assert (y[:ROWS] == 7).all()
    assert (y[ROWS:] == 0).all()
    y.resize((3, 1024), refcheck=False)
    assert (y == 7).all()


def test_nothing_is_kept_beyond_the_limit() -> None:
    program = """
import os
import numpy as np, fastnorm as fn
x = np.ones((6000, 1024), np.float32)
for _ in range(3):
    y = fn.layer_norm(x, 1024)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
del y
print((before - resident()) / x.nbytes)
"""
    for megabytes, freed in ((0, 1.0), (256, 0.0)):
        environment = {"FASTNORM_KEEP_MB": str(megabytes), "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert abs(float(done.stdout) - freed) < 0.2


def test_a_bad_limit_is_an_error() -> None:
    environment = {"FASTNORM_KEEP_MB": "much", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", "import fastnorm"], env=environment, capture_output=True, text=True
    )
    assert done.returncode
    assert "FASTNORM_KEEP_MB='much'" in done.stderr
