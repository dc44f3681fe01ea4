"""What becomes of memory: flat after many calls, no reference after an error, none to be had."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .helpers import BACKENDS, run_python

LINUX = sys.platform.startswith("linux")

# --- Flat -----------------------------------------------------------------------------------------

# A million calls where tests are asked to take long.
CALLS = 1_000_000 if float(os.environ.get("FASTNORM_STRESS_SECONDS", "0")) >= 20 else 20_000

FLAT = """
import gc, os, sys
import numpy as np, fastnorm as fn
fn.set_backend({name!r})
rng = np.random.default_rng(0)
x, image = rng.standard_normal((6, 40), np.float32), rng.standard_normal((2, 8, 5, 6), np.float32)
w, b = np.ones(8, np.float32), np.zeros(8, np.float32)
mean, var = np.zeros(8), np.ones(8)
out, mask = np.empty_like(image), image > -1
_, m, r = fn.layer_norm(x, 40, return_stats=True)

def refused():
    for wrong in (lambda: fn.layer_norm(x, 40, eps=-1.0), lambda: fn.group_norm(image, 3),
                  lambda: fn.layer_norm(x, 40, out=image), lambda: fn.rms_norm(x, 41)):
        try:
            wrong()
        except ValueError:
            pass

kinds = [
    lambda: fn.layer_norm(x, 40),
    lambda: fn.rms_norm(x, 40, return_stats=True),
    lambda: fn.layer_norm_backward(x, x, m, r, 40),
    lambda: fn.batch_norm(image, mean, var, w, b, training=True),
    lambda: fn.batch_norm(image, mean, var, w, b),
    lambda: fn.group_norm(image, 4, w, b, activation="silu", residual=image, out=out),
    lambda: fn.instance_norm(image[:, :, ::-1], where=mask),
    lambda: fn.add_layer_norm(x, x, 40),
    lambda: fn.l2_normalize(x),
    lambda: fn.moments(image, (0, 2)),
    lambda: fn.Moments().update(x).var(),
    refused,
]

def run(n):
    for i in range(n):
        kinds[i % len(kinds)]()

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

run({calls})
seen = [(resident(), sys.getallocatedblocks())]
for _ in range(3):
    run({calls})
    seen.append((resident(), sys.getallocatedblocks()))
print(*(min(b - a for a, b in zip(of, of[1:])) for of in zip(*seen)))
"""


@pytest.mark.skipif(not LINUX, reason="what is resident is read from /proc")
@pytest.mark.parametrize("name", BACKENDS)
def test_memory_is_flat(name: str) -> None:
    """Of any leak of 32 bytes a call, or an object in a call of one kind, something is seen.

    A leak grows in every round. What the interpreter keeps, up to thousands of names in its cache
    of attributes, comes to an end: the round that grew least counts.
    """
    # what has no plans takes a hundred times as long
    calls = CALLS if name == "cython" else CALLS // 5
    run = run_python("-c", FLAT.format(name=name, calls=calls), timeout=3600)
    assert run.returncode == 0, run.stderr
    grown, objects = map(int, run.stdout.split())
    assert objects < calls // 20
    assert grown < max(32 * calls, 1 << 19)


# --- References after errors ----------------------------------------------------------------------


def refused(x: Any, image: Any, other: Any) -> list[Callable[[], Any]]:
    """Calls that are errors, of arguments and behind; others of their kind are cached."""
    locked = x.copy()
    locked.flags.writeable = False
    return [
        lambda: fn.layer_norm(x, 40, eps=-1.0),
        lambda: fn.layer_norm(x, 40, eps=float("nan")),
        lambda: fn.layer_norm(x, 40, activation="dance"),
        lambda: fn.layer_norm(x, 40, out=locked),
        lambda: fn.layer_norm(x, 40, out=image),
        lambda: fn.layer_norm(x, 40, residual=image),
        lambda: fn.layer_norm(x, 40, where=image),
        lambda: fn.layer_norm(x, 41),
        lambda: fn.layer_norm(x, 40, image),
        lambda: fn.layer_norm(x, axis=7),
        lambda: fn.rms_norm(x, 40, other.astype(complex)),
        lambda: fn.group_norm(image, 3),
        lambda: fn.batch_norm(image, other, other, training=True),
        lambda: fn.batch_norm(image, training=False),
        lambda: fn.add_layer_norm(x, image, 40),
        lambda: fn.layer_norm_backward(x, x, other, other, 40),
        lambda: fn.layer_norm_backward(image, x, other, other, 40),
        lambda: fn.moments(x, axis=5),
        lambda: fn.standardize(x, out=image),
        lambda: fn.Moments(axis=(0, 3)).update(x),
        lambda: fn.l2_normalize(x.astype(object)),
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_an_error_keeps_no_reference(name: str) -> None:
    x, image, other = np.ones((6, 40), "f4"), np.ones((2, 8, 5, 6), "f4"), np.ones(7, "f4")
    with fn.backend(name):
        for _ in range(2):
            fn.layer_norm(x, 40)
        wrong = refused(x, image, other)
        for call in wrong:  # what is kept once, such as a compiled pattern
            with pytest.raises((ValueError, TypeError)):
                call()
        gc.collect()
        before = [sys.getrefcount(a) for a in (x, image, other)]
        for call in wrong * 3:
            with suppress(ValueError, TypeError):
                call()
        gc.collect()
        assert [sys.getrefcount(a) for a in (x, image, other)] == before
        watched = [weakref.ref(a) for a in (x, image, other)]
        del x, image, other, wrong, call
        gc.collect()
        assert [ref() for ref in watched] == [None] * 3


# --- No memory ------------------------------------------------------------------------------------

# For each call: it is carried out twice, then once for every n with the n-th allocation failing.
FAILING = """
import ctypes, gc, itertools, sys
import numpy as np, fastnorm as fn
fn.set_backend({name!r})
shim = ctypes.CDLL(None)
fail_at, allocations = shim.fail_at, shim.allocations
fail_at.argtypes, allocations.restype = [ctypes.c_long], ctypes.c_long
rng = np.random.default_rng(0)
def array(*shape, kind=np.float32):
    return rng.standard_normal(shape).astype(kind)
w, b = array(8), array(8)
half = array(8).astype(np.float16)
calls = []
for x in (array(3, 8, 5, 6), array(2, 8, 150, 151), array(3, 8, 5, 6).astype(np.float64),
          array(2, 8, 50, 60).astype(np.float16), array(3, 8, 5, 6)[:, :, ::-1],
          array(3, 50, 60, 8).transpose(0, 3, 1, 2)):
    shape = x.shape[1:]
    kind = x.dtype
    c = [v.astype(kind) for v in (w, b)]
    other = array(*x.shape).astype(kind)
    mean, rstd = np.zeros((3 if len(x) == 3 else 2, 8)), np.ones((len(x), 8))
    each, offset = (array(*shape).astype(kind) for _ in range(2))
    stats = [np.zeros((len(x), 1, 1, 1)), np.ones((len(x), 1, 1, 1))]
    of_groups = [np.zeros((len(x), 4)), np.ones((len(x), 4))]
    running = [np.zeros(8), np.ones(8)]
    out = np.zeros_like(x)
    calls += [
        (fn.layer_norm, (x, shape, each, offset), dict(return_stats=True)),
        (fn.layer_norm, (x, shape), dict(out=out)),
        (fn.rms_norm, (x, shape, each), dict()),
        (fn.group_norm, (x, 4, *c), dict(activation="silu", residual=other)),
        (fn.group_norm, (x, 4), dict(where=other > 0)),
        (fn.instance_norm, (x, *running, *c), dict()),
        (fn.batch_norm, (x, *running, *c), dict(training=True)),
        (fn.batch_norm, (x, *running, half, half), dict()),
        (fn.batch_norm, (x, *running), dict(training=True, where=other > -1, return_stats=True)),
        (fn.add_layer_norm, (x, other, shape, each, offset), dict()),
        (fn.layer_norm_backward, (other, x, *stats, shape, each), dict()),
        (fn.group_norm_backward, (other, x, *of_groups, 4, c[0]), dict()),
        (fn.l2_normalize, (x,), dict()),
        (fn.moments, (x, (0, 2)), dict()),
        (fn.standardize, (x, 1), dict()),
    ]
if {large}:
    big = array(6000, 1024)
    calls = [
        (fn.layer_norm, (big, 1024), dict()),
        (fn.rms_norm_backward, (big, big, np.ones((6000, 1)), 1024), dict()),
    ]

def arrays(v):
    return [a for a in v if isinstance(a, np.ndarray)]
def same(a, b):
    a, b = (v if isinstance(v, tuple) else (v,) for v in (a, b))
    return all(np.array_equal(np.asarray(p), np.asarray(q), equal_nan=True) for p, q in zip(a, b))

tried = 0
for number, (function, given, options) in enumerate(calls):
    whole = arrays((*given, *options.values()))
    before = [a.copy() for a in whole]
    def restore():
        for a, was in zip(whole, before):
            a[...] = was
    for _ in range(2):
        right = function(*given, **options)
        right = tuple(np.array(a) for a in (right if isinstance(right, tuple) else (right,)))
        after = [a.copy() for a in whole]
        restore()
    where = f"{{function.__name__}} {{number}}"
    for n in itertools.count(1):
        result = error = None
        gc.disable()
        fail_at(n)
        try:
            result = function(*given, **options)
        except MemoryError as e:
            error = e
        except SystemError as e:  # where NumPy gets no memory it may forget to say so
            if "without" not in str(e) or "cyfunction" in str(e) or "cython" in str(e):
                raise
            error = e
        finally:
            fail_at(0)
        gc.enable()
        if error is None:
            assert same(result, right), f"{{where}}: wrong numbers without the allocation {{n}}"
            changed = [not np.array_equal(a, c) for a, c in zip(whole, after)]
            assert not any(changed), f"{{where}}: arguments {{changed}} after allocation {{n}}"
            restore()
        else:
            changed = [not np.array_equal(a, c) for a, c in zip(whole, before)]
            assert not any(changed), f"{{where}}: arguments {{changed}} changed at allocation {{n}}"
        tried += 1
        if allocations() < n:
            break
    assert same(function(*given, **options), right), f"{{where}}: wrong numbers afterwards"
    restore()
print(tried, len(calls))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that makes allocations fail."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not LINUX or compiler is None:
        pytest.skip("needs a C compiler, and the dynamic linker of Linux")
    library = tmp_path_factory.mktemp("shim") / "failing.so"
    source = Path(__file__).with_name("failing_malloc.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


# In several threads Numba's own allocate, and end the process where they can not.
KERNELS = [
    (name, n) for name in BACKENDS for n in (1, 2) if name == "cython" or (name, n) == ("numba", 1)
]


@pytest.mark.parametrize(("name", "threads"), KERNELS)
@pytest.mark.parametrize("large", [False, True])
def test_an_allocator_that_fails(shim: str, name: str, threads: int, large: bool) -> None:
    """A MemoryError or the right result, whichever allocation it is; and no argument is changed."""
    program = FAILING.format(name=name, large=large)
    run = run_python("-c", program, LD_PRELOAD=shim, FASTNORM_NUM_THREADS=str(threads))
    assert run.returncode == 0, run.stderr[-3000:]
    tried, calls = map(int, run.stdout.split())
    assert tried > 2 * calls, "something is allocated by every call"
