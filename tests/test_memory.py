"""Memory of large results, which is kept for the next ones."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core

from .helpers import COMPILED, run_python

pytestmark = pytest.mark.skipif(
    not COMPILED or not sys.platform.startswith("linux"), reason="kept on Linux alone"
)

ROWS = 6000  # of 1024 float32: 25 MB


def large() -> Any:
    return np.ones((ROWS, 1024), np.float32)


def result(x: Any) -> Any:
    fn.layer_norm(x[:1], 1024)
    for _ in range(2):  # the second is answered from the cache
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


def test_pages_are_fetched_once() -> None:
    """Results of one, three and twelve megabytes: the C library would fetch those that die anew."""
    program = """
import resource
import numpy as np, fastnorm as fn
xs = [np.ones((rows, 768), np.float32) for rows in (350, 1024, 4096)]
def step():
    for x in xs:
        y, *stats = fn.layer_norm(x, 768, return_stats=True)
        dx = fn.layer_norm_backward(x, x, *stats, 768)[0]
        del y, dx
for _ in range(3):
    step()
found = []
for _ in range(11):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(found)[5])  # the system may take some pages away when others want memory
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # 1,000 and more where nothing is kept


def test_a_bad_limit_is_an_error() -> None:
    environment = {"FASTNORM_KEEP_MB": "much", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", "import fastnorm"], env=environment, capture_output=True, text=True
    )
    assert done.returncode
    assert "FASTNORM_KEEP_MB='much'" in done.stderr


# --- Given back -----------------------------------------------------------------------------------


def kept_by(x: Any) -> int:
    """Bytes that are kept after a result has been freed."""
    fn.trim_memory()
    result(x)
    return fn.trim_memory()


def test_kept_memory_is_given_back_when_asked() -> None:
    x = large()
    assert kept_by(x) >= x.nbytes
    assert fn.trim_memory() == 0
    y = fn.layer_norm(x, 1024)
    assert fn.trim_memory() == 0, "what is in use is not given back"
    np.testing.assert_array_equal(y, 0)


def limited(program: str, limit: str) -> str:
    """What a program prints that begins with x, of 25 MB, and sets a limit with `limit(bytes)`."""
    begin = f"""
import gc, os, resource, sys
import numpy as np, fastnorm as fn
x = np.ones((6000, 1024), np.float32)
fn.set_num_threads(1)
fn.layer_norm(x, 1024), fn.layer_norm(x, 1024)
def limit(more):
    "Let this process have so many bytes more than it has."
    field = {{"RLIMIT_AS": 0, "RLIMIT_DATA": 5}}[{limit!r}]
    used = int(open("/proc/self/statm").read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(getattr(resource, {limit!r}), (used + more, resource.RLIM_INFINITY))
"""
    run = run_python("-c", begin + program)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_no_memory_while_some_is_kept(limit: str) -> None:
    """240 MB are kept when the limit comes; results of another size need them."""
    program = """
results = [fn.layer_norm(x, 1024) for _ in range(8)]
tall = np.ones((20_000, 1024), np.float32)  # 82 MB
del results
limit(30 << 20)
y = fn.layer_norm(tall, 1024)
print(y.shape[0], fn.trim_memory())
"""
    assert limited(program, limit) == "20000 0"


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_nothing_is_kept_under_a_limit_of_the_process(limit: str) -> None:
    program = """
fn.trim_memory()
limit(1 << 30)
for _ in range(3):
    fn.layer_norm(x, 1024)
print(fn.trim_memory())
"""
    assert limited(program, limit) == "0"


def test_memory_that_is_not_there_is_an_error() -> None:
    program = """
tall = np.ones((20_000, 1024), np.float32)  # 82 MB
fn.trim_memory()
limit(30 << 20)
for _ in range(3):
    try:
        fn.layer_norm(tall, 1024)
    except MemoryError:
        print("MemoryError")
print(float(fn.layer_norm(x, 1024).max()))
"""
    assert limited(program, "RLIMIT_AS").split() == [*["MemoryError"] * 3, "0.0"]


@pytest.mark.parametrize(
    ("used", "files", "keeps"),
    [
        (100 << 20, None, True),
        (1500 << 20, None, False),
        # pages of files that nobody reads just now are as good as free
        (1500 << 20, "anon 1\ninactive_file 1400000000\nactive_file 5", True),
        (1500 << 20, "inactive_file 3\ntotal_inactive_file 1400000000", True),
        (1500 << 20, "inactive_file 99999999999999999999", True),
    ],
)
def test_nothing_is_kept_near_the_limit_of_a_container(
    used: int, files: str | None, keeps: bool, tmp_path: Path
) -> None:
    """Of 2,000 MB: twice the 256 that may be kept must be left."""
    current, stat = tmp_path / "memory.current", tmp_path / "memory.stat"
    current.write_text(f"{used}\n", encoding="ascii")
    if files is not None:
        stat.write_text(files, encoding="ascii")
    x = large()
    _core.kernels.watch_memory(2000 << 20, os.fsencode(current), os.fsencode(stat))
    try:
        assert bool(kept_by(x)) == keeps
        y = fn.layer_norm(x, 1024)
        current.write_text(f"{1900 << 20}\n", encoding="ascii")
        stat.unlink(missing_ok=True)
        time.sleep(0.15)  # it is read ten times a second
        del y
        assert fn.trim_memory() == 0
        current.unlink()  # nobody says: it is kept
        time.sleep(0.15)
        assert kept_by(x)
    finally:
        _core.kernels.watch_memory(0, b"", b"")


@pytest.mark.parametrize("value", ["much", "-1", "²", "1.5", "99999999999999", "9" * 5000])
def test_bad_limits_of_what_is_kept(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNORM_KEEP_MB", value)
    with pytest.raises(ValueError, match=r"FASTNORM_KEEP_MB=.*0 or more"):
        _core._keep_at_most()


@pytest.mark.parametrize(("value", "size"), [("", 256 << 20), (" 0 ", 0), ("5", 5 << 20)])
def test_good_limits_of_what_is_kept(
    value: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNORM_KEEP_MB", value)
    assert _core._keep_at_most() == size
