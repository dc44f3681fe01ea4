"""Norms on the threads that PyTorch lends: while these are awake, with the bits of one thread."""

from __future__ import annotations

import sys

import pytest

from .helpers import COMPILED, run_python

pytest.importorskip("fastnorm.torch")

pytestmark = pytest.mark.skipif(
    not (COMPILED and sys.platform.startswith("linux")), reason="borrowed on Linux alone"
)

PROGRAM = """
import os, threading, time
import torch
import fastnorm as fn
import fastnorm.torch as fnt

fn.set_num_threads(2)
torch.set_num_threads(2)
x = torch.randn(512, 1536)  # 3 MB: a thread that sleeps is woken for it
w = torch.rand(1536)

def norm():
    return fnt.layer_norm(x, 1536, w)

def operator():
    return x.abs()  # on both of PyTorch's threads

def threads():
    return len(os.listdir("/proc/self/task"))

with fn.threads(1):
    right = norm()
"""


def printed(program: str) -> list[str]:
    """The words that such a program prints."""
    ended = run_python("-c", PROGRAM + program, timeout=120, OMP_NUM_THREADS="2")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_the_bits_are_those_of_one_thread_whoever_takes_the_turns() -> None:
    """Helpers of our own that are still awake leave such a call to PyTorch's threads."""
    program = """
x.requires_grad_()
dy = torch.randn(512, 1536)

def both():
    return norm(), *torch.autograd.grad(norm(), [x], dy)

with fn.threads(1):
    right = both()
for n in range(300):
    if n % 10 == 0:
        time.sleep(0.01)  # PyTorch's threads fall asleep: our own are woken
    if n % 3:
        operator()
    for found, wanted in zip(both(), right, strict=True):
        assert torch.equal(found, wanted), n
"""
    printed(program)


LENT = """
import ctypes
import numpy as np
from fastnorm import _core

PART = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
RUN = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, PART, ctypes.c_void_p
)

borrowed, sleeper = [], None

@RUN
def lent(begin, end, grain, part, work):
    borrowed.append(end)
    if sleeper:
        sleeper.submit(part, 1, end, work).result()
    else:
        part(1, end, work)  # the caller is all threads but the first, and then that
    part(begin, 1, work)
    return 0

address = ctypes.cast(lent, ctypes.c_void_p).value
half = np.random.default_rng(0).standard_normal((256, 1536)).astype(np.float16)
with fn.threads(1):
    wanted = fn.layer_norm(half, 1536).tobytes()

def result(borrows, count):
    _core.kernels.borrow_threads(address if borrows else 0, 0)
    with fn.threads(count):
        return fn.layer_norm(half, 1536)
"""


def test_threads_that_are_awake_take_the_turns() -> None:
    """Here it is the caller, whose processor time goes on whatever else the machine is at."""
    program = """
there = threads()
for n in range(1, 6):
    assert result(True, 2).tobytes() == wanted
    assert len(borrowed) == n
print(threads() - there)
"""
    assert printed(LENT + program) == ["0"]


def test_threads_that_sleep_are_not_waited_for() -> None:
    """A first job finds out which they are; then helpers of our own take part."""
    program = """
from concurrent.futures import ThreadPoolExecutor
sleeper = ThreadPoolExecutor(1)
result(True, 2)
time.sleep(0.5)  # until it waits for more
there = threads()
for _ in range(5):
    assert result(True, 2).tobytes() == wanted
print(len(borrowed), threads() - there)
"""
    assert printed(LENT + program) == ["1", "1"]


def test_helpers_that_are_awake_leave_a_job_to_threads_that_are_lent() -> None:
    """Both would be the same thread of the job, and use the same scratch memory."""
    program = """
for _ in range(1000):
    result(False, 2)  # its helper looks for work for some microseconds more
    assert result(True, 2).tobytes() == wanted
"""
    printed(LENT + program)


def test_a_job_after_one_on_lent_threads_has_its_own_threads_alone() -> None:
    """A helper with a number beyond them would use scratch memory that is not there."""
    program = """
for _ in range(1000):
    result(False, 8)
    result(True, 8)
    assert result(False, 2).tobytes() == wanted
"""
    printed(LENT + program)


def test_the_lesser_number_of_threads_holds() -> None:
    program = """
operator()
there = threads()
norm()
time.sleep(0.5)
torch.set_num_threads(1)
for _ in range(3):
    assert torch.equal(norm(), right)
    time.sleep(0.01)
print(threads() - there)
torch.set_num_threads(8)
fn.set_num_threads(1)
norm()
print(threads() - there)
fn.set_num_threads(16)
assert torch.equal(norm(), right)
"""
    assert printed(program) == ["0", "0"]


def test_a_forked_child_works_without_its_parents_threads() -> None:
    program = """
operator(), norm()
for _ in range(3):
    child = os.fork()
    if not child:
        # NumPy compares: PyTorch's own operators wait for threads that the child has not
        os._exit(0 if all((norm().numpy() == right.numpy()).all() for _ in range(3)) else 1)
    operator(), norm()
    print(os.waitpid(child, 0)[1])
"""
    assert printed(program) == ["0"] * 3


def test_many_python_threads_at_once() -> None:
    program = """
wrong = []

def work():
    for _ in range(60):
        operator()
        if not torch.equal(norm(), right):
            wrong.append(1)

workers = [threading.Thread(target=work) for _ in range(6)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
print(len(wrong))
"""
    assert printed(program) == ["0"]


def test_a_thread_that_is_lent_keeps_its_own_rounding() -> None:
    """One that took the caller's would flush subnormals of PyTorch's operators from then on."""
    program = """
tiny = torch.full((1 << 20,), 1e-40)
assert int((tiny * 0.5).count_nonzero()) == 1 << 20
torch.set_flush_denormal(True)  # of this thread alone
for _ in range(20):
    operator(), norm()
torch.set_flush_denormal(False)
print(int((tiny * 0.5).count_nonzero()) - (1 << 20))
"""
    assert printed(program) == ["0"]
