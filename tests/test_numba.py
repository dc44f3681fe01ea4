"""The Numba backend as Cython's; a user's functions in and around the norms, threads, forks.

What every backend must do (accuracy, gradients, features, determinism) is tested with each of them
in the other files.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import fastnorm as fn
from fastnorm.operations import OPERATIONS, Operation

from .helpers import (
    BACKENDS,
    BF16,
    COMPILED,
    DTYPES,
    F16,
    F32,
    F64,
    PATIENCE,
    SINGLE_AND_DOUBLE,
    Array,
    assert_same_bits,
    call,
    channels_last,
    data,
    named,
    non_temporal,
    run_python,
    together,
    ulps,
    without,
)

LAYOUTS = {"channels-first": np.ascontiguousarray, "channels-last": channels_last}

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
with_cython = pytest.mark.skipif(not COMPILED, reason="no compiled kernels to compare with")


# --- The same numbers as Cython's -----------------------------------------------------------------


@with_cython
@by_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("op", OPERATIONS, ids=named)
def test_one_unit_from_cython(op: Operation, dtype: Any, layout: str) -> None:
    """Numbers are added up in another order, and then rounded in one place.

    Float64 by three units of the largest number: each is within one and a half of exact, and what
    precedes a bias may be as large.
    """
    x = LAYOUTS[layout](data((6, 32, 12, 11), dtype, 30.0))
    p = op.parameters(x.shape, F64 if dtype == F64 else F32, np.random.default_rng(0))
    with fn.backend("cython"):
        right = together(call(op, x, p))
    with fn.backend("numba"):
        ours = together(call(op, x, p))
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == b.dtype
        assert a.strides == b.strides
        scale = np.maximum(abs(b.astype(F64)), 1.0)
        if dtype == F64:
            scale = np.full_like(scale, scale.max())
        assert ulps(a, b, dtype, scale=scale).max() <= (3 if dtype == F64 else 1)


@with_cython
@by_layout
@pytest.mark.parametrize("shape", [(3, 7, 33, 35), (1, 4, 400, 401)], ids=str)
def test_doubles_with_options(shape: tuple[int, ...], layout: str) -> None:
    """Several tiles, splits and rests of lanes; masks, residuals and activations."""
    x, residual = (LAYOUTS[layout](data(shape, F64, 3.0, seed=s)) for s in range(2))
    where = np.random.default_rng(2).random(shape) > 0.3
    for options in ({}, {"where": where}, {"residual": residual, "activation": "relu"}):
        results = []
        for name in ("cython", "numba"):
            with fn.backend(name):
                results.append(
                    (fn.instance_norm(x, **options), fn.layer_norm(x, axis=(2, 3), **options))
                )
        for right, ours in zip(*results, strict=True):
            size = np.full_like(right, abs(right).max())
            assert ulps(ours, right, F64, scale=size).max() <= 3


@with_cython
@pytest.mark.parametrize("length", [300, 768, 3072])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_rows_one_by_one(dtype: Any, length: int) -> None:
    """Among rows whose scale their type cannot hold; non-temporal, in place and alone."""
    kind = F64 if dtype == F64 else F32
    x, residual = data((24, length), dtype, 3.0), data((24, length), dtype, 0.0, seed=1)
    w, b = data((2, length), kind, 1.0, seed=2)
    big = {F32: 1e30, F64: 1e200}.get(dtype, 1.0)
    x[3], x[5], x[7], x[9, 0] = x[3] * dtype.type(big), np.nan, 2.0, np.inf
    x[11] = x[11] / dtype.type(big)
    cases: list[Callable[[Array, Array], Any]] = [
        lambda x, e: fn.layer_norm(x, length, w, b),
        lambda x, e: fn.layer_norm(x, length, w),
        lambda x, e: fn.layer_norm(x, length, return_stats=True),
        lambda x, e: fn.rms_norm(x, length, w),
        lambda x, e: fn.add_rms_norm(x, e, length, w),
        lambda x, e: fn.add_layer_norm(x, e, length, w, b),
    ]

    def results(case: Callable[[Array, Array], Any], *arrays: Array) -> tuple[Array, ...]:
        found = together(case(*arrays))
        for v in found:
            v[np.isnan(v)] = np.nan  # one sign for all
        return found

    for case in cases:
        with fn.backend("cython"):
            right = results(case, x, residual)
        with fn.backend("numba"):
            ours = results(case, x, residual)
            alone = results(case, x[4:5], residual[4:5])
            with non_temporal():
                past = results(case, x, residual)
        for one, two, three, four in zip(ours, past, alone, right, strict=True):
            assert_same_bits(one, two)
            assert_same_bits(one[4:5], three)
            if one.dtype == dtype:
                finite = np.isfinite(four.astype(F64))
                assert_same_bits(finite, np.isfinite(one.astype(F64)))
                size = np.maximum(abs(np.where(finite, four, 0).astype(F64)), 1.0)
                if dtype == F64:
                    size = np.maximum(size, size.max(axis=1, keepdims=True))
                off = ulps(one[finite], four[finite], dtype, scale=size[finite])
                assert off.max() <= (3 if dtype == F64 else 1)
    with fn.backend("numba"):
        z = x.copy()
        (y,) = results(cases[0], x, residual)
        (z,) = results(lambda x, e: fn.layer_norm(x, length, w, b, out=x), z, residual)
        assert_same_bits(z, y)


@with_cython
@by_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.backward], ids=named)
def test_gradients_one_unit_from_cython(op: Operation, dtype: Any, layout: str) -> None:
    x, dy = (
        LAYOUTS[layout](data((6, 32, 12, 11), dtype, r, seed=s)) for r, s in ((3.0, 0), (0, 1))
    )
    p = op.parameters(x.shape, F64 if dtype == F64 else F32, np.random.default_rng(0))
    y, *stats = call(op, x, without(p, "weight", "bias"), return_stats=True)
    keywords = {k: p[k] for k in op.backward_keywords if k in p}
    results = []
    for name in ("cython", "numba"):
        with fn.backend(name):
            results.append(getattr(fn, str(op.backward))(dy, x, *stats, **keywords))
    positive = getattr(fn, str(op.backward))(abs(dy), x, *stats, **keywords)[1:]
    # the largest terms of each formula: rstd w dy xhat^2, and the sums of |dy xhat| and of |dy|
    xhat = max(1.0, abs(y.astype(F64)).max())
    term = stats[-1].max() * abs(p["weight"]).max() * abs(dy.astype(F64)).max() * xhat**2
    added = abs(positive[-1].astype(F64)).max() * xhat
    for right, ours, largest in zip(*results, (term, added, added)):
        assert ours.dtype == right.dtype
        size = abs(right.astype(F64)).max()
        scale = np.full(right.shape, size if dtype != F64 else max(size, largest))
        assert ulps(ours, right, right.dtype, scale=scale).max() <= 1


@with_cython
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(64, 8192), (9, 20000), (4, 4097), (4, 70001)], ids=str)
def test_gradients_of_long_rows(shape: tuple[int, int], threads: int) -> None:
    """Rows of several tiles, and so few of them that threads share their elements out."""
    x, dy, w = data(shape, F64, 3.0), data(shape, F64, 0, seed=1), data(shape[-1:], F64, 1.0)
    stats = fn.layer_norm(x, shape[-1], return_stats=True)[1:]
    results = []
    for name, count in (("cython", 1), ("numba", threads)):
        with fn.backend(name), fn.threads(count):
            results.append(fn.layer_norm_backward(dy, x, *stats, shape[-1], w))
    # the largest terms of dx, and as many of the sums as there are rows
    term = (
        stats[-1].max() * abs(w).max() * abs(dy).max() * abs((x - stats[0]) * stats[1]).max() ** 2
    )
    for right, ours, size in zip(*results, (term, *[term * shape[0]] * 2), strict=True):
        assert ulps(ours, right, F64, scale=np.maximum(abs(right), size)).max() <= 1


@by_layout
@pytest.mark.parametrize("shape", [(16, 64, 24, 24), (3, 4, 320, 321), (1, 4, 400, 401)], ids=str)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.backward], ids=named)
def test_gradients_for_any_number_of_threads(
    op: Operation, shape: tuple[int, ...], layout: str
) -> None:
    x, dy = (LAYOUTS[layout](data(shape, F32, 3.0, seed=i)) for i in range(2))
    p = op.parameters(shape, F32, np.random.default_rng(0))
    keywords = {k: p[k] for k in op.backward_keywords if k in p}
    with fn.backend("numba"):
        _, *stats = call(op, x, p, return_stats=True)
        with fn.threads(1):
            serial = getattr(fn, str(op.backward))(dy, x, *stats, **keywords)
        with fn.threads(2):
            shared = getattr(fn, str(op.backward))(dy, x, *stats, **keywords)
    for a, b in zip(serial, shared, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=named)
def test_every_number_of_16_bits_comes_and_goes(dtype: Any) -> None:
    """With statistics that are given, 0 and 1, dx is dy: rounded, where that is of float32."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(1, 1, -1)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32)
    with np.errstate(invalid="ignore"):
        halves = every.astype(F32).view(np.uint32).ravel()
    between = np.concatenate([halves + k for k in (0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    single = np.concatenate([bits, between]).astype(np.uint32).view(F32)
    single = single[~np.isnan(single)].reshape(1, 1, -1)
    for dy in (every, single):
        x = np.zeros(dy.shape, dtype)
        with fn.backend("numba"):
            dx, *_ = fn.batch_norm_backward(dy, x, np.zeros(1), np.ones(1), training=False)
        with np.errstate(over="ignore", invalid="ignore"):  # NumPy's casts
            np.testing.assert_array_equal(dx.astype(F64), dy.astype(dtype).astype(F64))


@pytest.mark.slow
def test_without_fused_multiply_adds() -> None:
    """An older processor multiplies, then adds: a rounding more, within three units."""
    run = run_python(
        *("-m", "pytest", "tests/test_accuracy.py", "-k", "units and numba and float32"),
        *("-q", "-p", "no:cacheprovider"),
        NUMBA_CPU_NAME="nehalem",
        NUMBA_CPU_FEATURES="",
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


# --- A user's activation --------------------------------------------------------------------------


@numba.njit
def softshrink(v: Any) -> Any:
    """A scalar function with a branch."""
    if v > 0.5:
        return v - 0.5
    return v + 0.5 if v < -0.5 else 0.0 * v


@numba.njit
def relu(v: Any) -> Any:
    return max(v, np.float32(0))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@by_layout
def test_activation_of_a_user(layout: str, dtype: Any, name: str) -> None:
    x = LAYOUTS[layout](data((3, 8, 12, 11), dtype, 1.0))
    residual = LAYOUTS[layout](data((3, 8, 12, 11), dtype, 0.0, seed=1))
    w, b = np.random.default_rng(0).standard_normal((2, 8)).astype(F64 if dtype == F64 else F32)
    with fn.backend(name):
        before = fn.group_norm(x, 2, w, b, residual=residual).astype(F64)
        y = fn.group_norm(x, 2, w, b, residual=residual, activation=softshrink)
    right = np.where(before > 0.5, before - 0.5, np.where(before < -0.5, before + 0.5, 0.0))
    assert y.dtype == dtype
    assert y.strides == x.strides
    # what came before was rounded once more on the way here
    assert ulps(y, right, dtype, scale=abs(before)).max() <= 1.5


def test_activation_of_a_user_in_every_norm() -> None:
    x = data((4, 6, 5, 7), F32, 2.0)
    for op in OPERATIONS:
        if "activation" in op.features:
            p = op.parameters(x.shape, F32, np.random.default_rng(0), num_groups=3)
            right = call(op, x, p, activation="relu")
            for _ in range(2):  # described, and then known
                assert_same_bits(call(op, x, p, activation=relu), right)
            y = x.copy()  # the step is then not fused, but followed by the function
            call(op, y, p, activation=relu, out=y)
            assert_same_bits(y, right)


@pytest.mark.parametrize("given", ["weight bias", "weight", "bias", ""])
def test_activation_of_a_user_after_every_affine_step(given: str) -> None:
    x = data((7, 300), F32, 2.0)
    p = {k: data((300,), F32, 1.0, seed=i) for i, k in enumerate(given.split())}
    right = fn.layer_norm(x, 300, activation="relu", **p)
    assert (right == 0).any()
    assert_same_bits(fn.layer_norm(x, 300, activation=relu, **p), right)


def test_activations_that_cannot_be() -> None:
    x = data((4, 6), F32)
    kept = x.copy()
    with pytest.raises(ValueError, match=r"numba\.njit"):
        fn.layer_norm(x, 6, activation=lambda v: v)
    for wrong in (numba.njit(lambda v, w: v), numba.njit(lambda v: v.shape)):
        with pytest.raises(TypeError, match="cannot be compiled"):
            fn.layer_norm(x, 6, activation=wrong, out=x)
    assert_same_bits(x, kept)


class Refused(ArithmeticError):
    """An error of a user's own, which cannot be made of a message alone."""

    def __init__(self, number: float, limit: float) -> None:
        super().__init__(number, limit)


@numba.njit
def at_most_two(v: Any) -> Any:
    if v > 2.0:
        raise ValueError("more than two")
    return v


@numba.njit
def refusing(v: Any) -> Any:
    if v > 2.0:
        raise Refused(v, 2.0)
    return v


@numba.njit
def inverse(v: Any) -> Any:
    return 1 / v


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_an_activation_that_raises(dtype: Any, backend: str) -> None:
    """It does so in the caller, in whichever thread and however often; nothing given is changed."""
    big = data((64, 40, 60), dtype, 0.0)
    big[-1, -1, -1] = 100  # the last number of the last thread
    w, b = np.ones((2, 60), F32 if dtype != F64 else F64)
    for x in (big, big[-1:, -3:]):
        kept, out = x.copy(), np.full_like(x, 3)
        for _ in range(3):  # described, and then known
            for given in ({}, {"weight": w, "bias": b}, {"residual": x}, {"out": out}, {"out": x}):
                with pytest.raises(ValueError, match=r"at_most_two raised .*more than two"):
                    fn.layer_norm(x, 60, activation=at_most_two, **given)
        assert_same_bits(x, kept)
        assert (out == 3).all()
        mean, var = np.zeros((2, x.shape[1]), F32)
        with pytest.raises(ValueError, match="at_most_two"):
            fn.batch_norm(x, mean, var, training=True, activation=at_most_two)
        assert not mean.any()
        assert not var.any()
        with pytest.raises(RuntimeError, match=r"refusing raised .*Refused") as raised:
            fn.layer_norm(channels_last(x), axis=(1, 2), activation=refusing)
        assert isinstance(raised.value.__cause__, Refused)
    # and a call that raised leaves nothing behind
    zeros = np.zeros((4, 6), dtype)
    assert_same_bits(fn.layer_norm(zeros, 6, activation=at_most_two), zeros)


def test_division_by_zero_in_an_activation(backend: str) -> None:
    """As the function itself divides: Numba's own way raises, NumPy's does not."""
    x = np.zeros((3, 4), F32)
    with pytest.raises(ZeroDivisionError, match=r"inverse raised .*error_model='numpy'"):
        fn.layer_norm(x, 4, activation=inverse)
    infinite = fn.layer_norm(x, 4, activation=numba.njit(error_model="numpy")(inverse.py_func))
    assert np.isposinf(infinite).all()


NUMBERS = [
    numba.njit(f)
    for f in (lambda v: v > 0, lambda v: 3, lambda v: np.int8(v), lambda v: np.float64(v))
]
RETURNED: dict[str, Callable[[Any], Any]] = {
    "array": lambda v: np.ones(3),
    "array of no dimension": lambda v: np.zeros(()),
    "complex": lambda v: 1j * v,
    "string": lambda v: "one",
    "None": lambda v: None,
    "sometimes None": lambda v: None if v > 0 else v,
    "tuple": lambda v: (v, v),
    "list": lambda v: [v],
}


@pytest.mark.parametrize("what", RETURNED)
def test_activations_that_return_no_number(what: str, backend: str) -> None:
    x = data((4, 6), F32)
    kept = x.copy()
    for _ in range(2):
        with pytest.raises(TypeError, match=r"returns .*expected one number"):
            fn.layer_norm(x, 6, activation=numba.njit(RETURNED[what]), out=x)
    assert_same_bits(x, kept)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=named)
def test_activations_that_return_other_numbers(dtype: Any, backend: str) -> None:
    x = data((4, 6), dtype)
    right = fn.layer_norm(x, 6)
    for f in NUMBERS:
        y = fn.layer_norm(x, 6, activation=f)
        exact = np.array([f(v) for v in right.ravel()], dtype).reshape(right.shape)
        assert_same_bits(y, exact)
    with pytest.raises(TypeError, match="compiled for int64"):
        fn.layer_norm(x, 6, activation=numba.njit("int64(int64)")(lambda v: v))


# --- Threads and forks ----------------------------------------------------------------------------

SECONDS = float(os.environ.get("FASTNORM_STRESS_SECONDS", "3"))


def _work() -> list[tuple[str, Callable[[], Any]]]:
    """Calls of both backends that use several threads and take well under a millisecond or two."""
    rows, planes = data((256, 1000), F32, 3.0), data((4, 16, 40, 40), F32, 3.0)
    big = data((1, 1, 500, 601), F32, 3.0)  # one group, shared out
    return [
        ("rows", lambda: fn.layer_norm(rows, 1000)),
        ("planes", lambda: fn.group_norm(planes, 4, activation="silu")),
        ("one", lambda: fn.instance_norm(big)),
    ]


STRESS = """
import sys, threading, time
sys.path.insert(0, {root!r})
from tests.test_numba import stress
stress({seconds})
"""


def stress(seconds: float) -> None:
    """Eight threads at both backends at once, then forks: an error at a wrong number.

    The choice of a backend is the process's: every thread calls what the last one has chosen.
    """
    work = _work()
    right = {}
    for name in ("cython", "numba") if COMPILED else ("numba",):
        with fn.backend(name), fn.threads(1):
            for label, f in work:
                right[label, name] = f()
    wrong: list[str] = []
    stop = time.monotonic() + seconds
    counts = [0] * 8

    def run(i: int) -> None:
        while time.monotonic() < stop:
            label, f = work[(i + counts[i]) % len(work)]
            if i < 2:
                fn.set_backend(("cython", "numba")[counts[i] % 2] if COMPILED else "numba")
            y = f()
            allowed = [r for (of, _), r in right.items() if of == label]
            if not any(np.array_equal(y, r) for r in allowed):
                wrong.append(label)
            counts[i] += 1

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    assert min(counts) > 0, counts
    for i in range(20):
        fn.set_backend("numba" if i % 2 or not COMPILED else "cython")
        for _, f in work:
            f()  # in threads, if there are any
        child = os.fork()
        if child == 0:
            good = all(np.array_equal(f(), right[of, fn.get_backend()]) for of, f in work)
            os._exit(0 if good else 1)
        limit = time.monotonic() + PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            assert time.monotonic() < limit, "a forked child hangs"
            time.sleep(0.001)
        assert ended[1] == 0, f"child {i} ended with {ended[1]}"


@pytest.mark.slow
@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system"
)
@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_threads_and_forks(layer: str) -> None:
    """No hang, crash or wrong number, whichever layer Numba's threads are from."""
    code = STRESS.format(root=str(Path(__file__).parent.parent), seconds=SECONDS)
    chosen = {} if layer == "default" else {"NUMBA_THREADING_LAYER": layer}
    run = run_python(
        "-W", "ignore::DeprecationWarning", "-c", code, timeout=SECONDS + PATIENCE,
        FASTNORM_NUM_THREADS="2", **chosen,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


# --- The kernels on disk --------------------------------------------------------------------------

ONCE = (
    "import numpy as np, fastnorm as fn; fn.set_backend('numba'); "
    "print(fn.layer_norm(np.arange(6.0), 6).sum())"
)


@pytest.mark.skipif(os.name == "nt", reason="folders that cannot be written are made with chmod")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Kernels are then compiled for this process alone."""
    tmp_path.chmod(0o500)
    folder = (
        tmp_path / "cache" if os.geteuid() else Path("/proc/fastnorm")
    )  # root may write anywhere
    run = run_python("-c", ONCE, NUMBA_CACHE_DIR=str(folder))
    assert run.returncode == 0, run.stderr
    assert abs(float(run.stdout)) < 1e-12


# --- What is said while it compiles ---------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_who_waits_at_a_terminal_is_told_why_once(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call takes some seconds; a program whose output goes elsewhere stays silent."""
    from fastnorm._numba import compiling

    said = io.StringIO()
    monkeypatch.setattr(said, "isatty", lambda: terminal)
    monkeypatch.setattr(compiling.sys, "stderr", said)
    monkeypatch.setattr(compiling, "_told", False)
    monkeypatch.setattr(compiling, "PATIENCE", 60.0)
    with compiling.compiling():
        pass  # soon enough
    assert said.getvalue() == ""
    monkeypatch.setattr(compiling, "PATIENCE", 0.001)
    for _ in range(2):
        with compiling.compiling():
            time.sleep(0.2)
    line = "fastnorm: Numba compiles the kernels, for some seconds, once: they are kept on disk\n"
    assert said.getvalue() == (line if terminal else "")
