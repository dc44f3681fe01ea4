"""Forks and other processes, the end of one, Ctrl-C, signals, and interpreters inside another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .helpers import BACKENDS, COMPILED, ROOT, run_python

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX's processes and signals")

KERNELS = [name for name in BACKENDS if name != "numpy"]
by_kernels = pytest.mark.parametrize("name", KERNELS)

# Every program has the arrays, what is right for them (computed by one thread), and a check.
BEGIN = """
import _thread, os, signal, sys, threading, time
import numpy as np, fastnorm as fn
fn.set_backend({name!r})
rng = np.random.default_rng(0)
x = rng.standard_normal((3000, 500), np.float32)
small = rng.standard_normal((5, 50), np.float32)
with fn.threads(1):
    right, small_right = fn.layer_norm(x, 500), fn.layer_norm(small, 50)
fn.set_num_threads(2)
def check():
    for _ in range(2):  # the second from the cache, where there is one
        assert np.array_equal(fn.layer_norm(x, 500), right)
        assert np.array_equal(fn.layer_norm(small, 50), small_right)
def forked(f):
    "What a forked child returned for f: 0 if it was right."
    child = os.fork()
    if child == 0:
        try:
            f()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    limit = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > limit:
            os.kill(child, signal.SIGKILL)
            raise SystemExit("a forked child hangs")
        time.sleep(0.001)
    return ended[1]
"""


def good(name: str, program: str, *options: str, **environment: str) -> str:
    """What a program printed, which must end well."""
    code = BEGIN.format(name=name) + program
    run = run_python("-W", "ignore::DeprecationWarning", *options, "-c", code, **environment)
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)
    return run.stdout


# --- Forks ----------------------------------------------------------------------------------------


@by_kernels
def test_forks_after_use_and_in_a_thread(name: str) -> None:
    program = """
check()
assert forked(check) == 0
assert forked(lambda: (check(), forked(check) and 1 / 0)) == 0  # and in a child of it
ends = []
thread = threading.Thread(target=lambda: (check(), ends.append(forked(check)), check()))
thread.start()
thread.join()
with fn.threads(2):
    ends.append(forked(lambda: fn.get_num_threads() == 2 or 1 / 0))
    ends.append(forked(check))
check()
print(ends)
"""
    assert good(name, program).strip() == "[0, 0, 0]"


@pytest.mark.skipif(not COMPILED, reason="Numba's threads do not outlive a fork")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted on Linux")
def test_a_fork_during_the_first_call_that_uses_threads() -> None:
    program = """
fn.set_num_threads(4)
x = np.zeros((2048, 1024), np.float32)
thread = threading.Thread(target=fn.layer_norm, args=(x, 1024))
thread.start()  # it starts the others
def child():
    for _ in range(50):
        fn.layer_norm(x, 1024)
    assert len(os.listdir("/proc/self/task")) == 4
print(forked(child))
thread.join()
"""
    for _ in range(5):
        assert good("cython", program).strip() == "0"


@by_kernels
def test_forks_while_kernels_run_in_other_threads(name: str) -> None:
    program = """
big = rng.standard_normal((8000, 1000), np.float32)  # 32 MB: its results are kept
stop = threading.Event()
def run():
    while not stop.is_set():
        fn.layer_norm(big, 1000)
threads = [threading.Thread(target=run) for _ in range(3)]
for thread in threads:
    thread.start()
def child():
    check()
    fn.layer_norm(big, 1000)
    fn.trim_memory()
ends = [forked(child) for _ in range(4)]
stop.set()
for thread in threads:
    thread.join()
check()
print(ends)
"""
    assert good(name, program).strip() == str([0] * 4)


def test_a_fork_while_numba_compiles_in_another_thread() -> None:
    """The child would wait for the lock of a thread that it does not have."""
    program = """
import numba
from numba.core.compiler_lock import global_compiler_lock
held = threading.Event()
def compiles():
    with global_compiler_lock:
        held.set()
        time.sleep(1)
thread = threading.Thread(target=compiles)
thread.start()
held.wait()
twice = numba.njit(lambda v: 2 * v)
print(forked(lambda: fn.layer_norm(small, 50, activation=twice)))
thread.join()
"""
    assert good("numba", program).strip() == "0"


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_threads_that_threading_does_not_know(layer: str) -> None:
    """Two in Numba's workqueue layer end the process."""
    program = """
left = [0] * 4
def run(i):
    stop = time.monotonic() + 1
    while time.monotonic() < stop or left[i] < 3:
        assert np.array_equal(fn.layer_norm(x, 500), right)
        left[i] += 1
    left[i] = -1
check()
for i in range(4):
    _thread.start_new_thread(run, (i,))
limit = time.monotonic() + 60
while left != [-1] * 4:
    assert time.monotonic() < limit, left
    time.sleep(0.01)
"""
    chosen = {} if layer == "default" else {"NUMBA_THREADING_LAYER": layer}
    good("numba", program, **chosen)


# --- Processes of other kinds ---------------------------------------------------------------------

WORKER = """
import os
import numpy as np, fastnorm as fn

def norm(seed):
    x = np.random.default_rng(seed).standard_normal((1200, 500), np.float32)
    return fn.layer_norm(x, 500)[::100].copy()
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_of_processes(method: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    program = f"""
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, {str(tmp_path)!r})
import numpy as np
from worker import norm
if __name__ == "__main__":
    right = [norm(seed) for seed in range(6)]
    context = multiprocessing.get_context({method!r})
    with ProcessPoolExecutor(2, context) as pool:
        assert all(np.array_equal(a, b) for a, b in zip(pool.map(norm, range(6)), right))
    with context.Pool(2) as pool:
        assert all(np.array_equal(a, b) for a, b in zip(pool.map(norm, range(6)), right))
"""
    script = tmp_path / "main.py"
    script.write_text(program, encoding="utf-8")
    run = run_python("-W", "ignore::DeprecationWarning", str(script), PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr


def test_lokys_processes(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, fastnorm as fn
from joblib import Parallel, delayed
xs = [np.random.default_rng(i).standard_normal((1200, 500), np.float32) for i in range(4)]
right = [fn.layer_norm(x, 500) for x in xs]
for backend in ("loky", "threading", "multiprocessing"):
    jobs = Parallel(2, backend=backend)(delayed(fn.layer_norm)(x, 500) for x in xs)
    assert all(np.array_equal(a, b) for a, b in zip(jobs, right)), backend
"""
    script = tmp_path / "main.py"
    script.write_text(program, encoding="utf-8")
    run = run_python("-W", "ignore", str(script), PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_workers_of_a_data_loader(torch: object, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, fastnorm as fn
class Normalised(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        x = np.random.default_rng(i).standard_normal((600, 500), np.float32)
        return fn.layer_norm(x, 500)
if __name__ == "__main__":
    data = Normalised()
    right = np.stack([data[i] for i in range(6)])
    torch.nn.functional.layer_norm(torch.ones(2000, 500), (500,))  # its threads are there, too
    for method in ("fork", "spawn"):
        found = torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context=method)
        assert np.array_equal(torch.cat(list(found)).numpy(), right), method
"""
    script = tmp_path / "main.py"
    script.write_text(program, encoding="utf-8")
    run = run_python("-W", "ignore", str(script), PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr


# --- The end of a process, and signals ------------------------------------------------------------


@by_kernels
def test_the_end_while_kernels_run_in_daemon_threads(name: str) -> None:
    program = """
big = rng.standard_normal((4000, 1000), np.float32)
check()
def run():
    while True:
        fn.layer_norm(big, 1000), fn.layer_norm(small, 50)
for _ in range(4):
    threading.Thread(target=run, daemon=True).start()
time.sleep(0.2)
print("end", flush=True)
"""
    for _ in range(3):
        assert good(name, program).strip() == "end"


@by_kernels
def test_ctrl_c_during_a_kernel(name: str) -> None:
    """It is raised when the kernel is done, once, and the process goes on as before."""
    program = """
signal.signal(signal.SIGINT, signal.default_int_handler)
big = rng.standard_normal((20000, 1000), np.float32)
check()
for i in range(5):
    begun = time.monotonic()
    try:
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        while time.monotonic() < begun + 30:
            fn.layer_norm(big, 1000)
        raise SystemExit("no KeyboardInterrupt")
    except KeyboardInterrupt:
        pass
    while threading.active_count() > 1:
        time.sleep(0.001)
    check()
print("usable")
"""
    assert good(name, program).strip() == "usable"


@by_kernels
def test_calls_inside_signal_handlers(name: str) -> None:
    program = """
handled = [0]
def handle(*_):
    check()
    handled[0] += 1
    signal.setitimer(signal.ITIMER_REAL, 0.003)  # and again, but not before this one is done
check()
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.003)
stop = time.monotonic() + 1
while time.monotonic() < stop or handled[0] < 5:
    check()
signal.setitimer(signal.ITIMER_REAL, 0)
check()
print("done")
"""
    assert good(name, program).strip() == "done"


def test_interpreters_inside_another() -> None:
    """Refused or working, never a crash; and the first one goes on."""
    program = """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
check()
inside = '''
try:
    import numpy as np
    import fastnorm as fn
    y = fn.layer_norm(np.arange(6.0), 6)
    assert abs(float(y.sum())) < 1e-12
except Exception as error:
    assert type(error).__name__ in ("ImportError", "RuntimeError", "UserWarning"), repr(error)
'''
for _ in range(2):
    other = interpreters.create()
    interpreters.run_string(other, inside)
    check()
    interpreters.destroy(other)
check()
print("usable")
"""
    assert good(BACKENDS[0], program).strip() == "usable"


# --- What is said at a terminal -------------------------------------------------------------------


@pytest.mark.skipif("numba" not in BACKENDS, reason="Numba compiles")
@pytest.mark.parametrize(("terminal", "patience"), [(True, 0.05), (True, 60), (False, 0.05)])
def test_a_line_while_numba_compiles(terminal: bool, patience: float) -> None:
    """Once, where it takes long, and only for somebody who sits there."""
    import pty

    program = f"""
import numba, numpy as np, fastnorm as fn
from fastnorm._numba import compiling
compiling.PATIENCE = {patience}
fn.set_backend("numba")
for n in (2, 3):
    f = numba.njit(lambda v: v * n)  # never on disk
    fn.layer_norm(np.ones((2, 8)), 8, activation=f)
"""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=theirs if terminal else subprocess.STDOUT,
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(120) == 0
    if terminal:
        os.set_blocking(ours, False)
        time.sleep(0.05)
        with suppress(OSError):  # nothing was said, and nobody is at the other end
            said += os.read(ours, 10_000)
    os.close(ours)
    assert said.count(b"Numba compiles") == (terminal and patience < 1)
    assert len(said.splitlines()) == (terminal and patience < 1)
