"""Calls like one before, which Numba's kernels answer without a description."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

import fastnorm as fn
from fastnorm import machine, repeated
from fastnorm.operations import OPERATIONS, Operation

from .helpers import (
    DTYPES,
    F32,
    F64,
    Array,
    assert_same_bits,
    call,
    channels_last,
    data,
    named,
    run_python,
    together,
)

LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "channels-first": np.ascontiguousarray,
    "channels-last": channels_last,
    "gaps": lambda x: np.repeat(x, 2, 0)[::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
}


@pytest.fixture(autouse=True)
def _with_numba() -> Any:
    repeated._answers.clear()
    with fn.backend("numba"):
        yield
    repeated._answers.clear()


def described(f: Callable[[], Any]) -> tuple[Array, ...]:
    """The results of a call that is described."""
    repeated._answers.clear()
    return together(f())


def kept() -> int:
    return len(repeated._answers)


CASES = [(F32, layout) for layout in LAYOUTS] + [(d, "channels-first") for d in DTYPES if d != F32]


@pytest.mark.parametrize(("dtype", "layout"), CASES, ids=named)
@pytest.mark.parametrize("op", OPERATIONS, ids=named)
def test_the_same_bits_as_a_described_call(op: Operation, dtype: Any, layout: str) -> None:
    """Of other numbers, in new arrays, forward and backward."""
    kind = F64 if dtype == F64 else F32
    for shape in ((3, 8, 5, 7), (2, 8, 33, 41)):
        ours, right = [], []
        for seed in range(3):
            x, dy = (LAYOUTS[layout](data(shape, dtype, 3.0, seed=seed + k)) for k in (0, 9))
            p = op.parameters(shape, kind, np.random.default_rng(seed))
            stats: Any = ()
            if op.backward:
                with fn.backend("numpy"):
                    without = {k: v for k, v in p.items() if k not in ("weight", "bias")}
                    _, *stats = call(op, x, without, return_stats=True)

            def run(x: Any = x, dy: Any = dy, p: Any = p, stats: Any = stats) -> tuple[Array, ...]:
                results = together(call(op, x, p))
                if op.backward:
                    keywords = {k: p[k] for k in op.backward_keywords if k in p}
                    results += together(getattr(fn, str(op.backward))(dy, x, *stats, **keywords))
                return results

            ours += [run(), run()]
            right += [described(run)] * 2
        for own, other in zip(ours, right, strict=True):
            for a, b in zip(own, other, strict=True):
                assert_same_bits(a, b)
                assert (a.strides, a.dtype) == (b.strides, b.dtype)


def test_such_calls_are_kept_and_results_are_new() -> None:
    x, e, dy = (data((6, 64), F32, 1.0, seed=s) for s in range(3))
    w, b = data((2, 64), F32, 1.0, seed=3)
    z, each = data((3, 4, 5, 7), F32, 1.0), data((4,), F32, 1.0)
    mean, rstd = fn.layer_norm(x, 64, return_stats=True)[1:]
    calls: list[Callable[[], Any]] = [
        lambda: fn.layer_norm(x, 64, w, b),
        lambda: fn.rms_norm(x, 64, w),
        lambda: fn.add_rms_norm(x, e, 64, w),
        lambda: fn.group_norm(x, 4, activation="silu"),
        lambda: fn.layer_norm(x, 64, where=x > 0),
        lambda: fn.instance_norm(z),
        lambda: fn.batch_norm(z, None, None, each, training=True),
        lambda: fn.batch_norm(z, each + 1, each**2, each),
        lambda: fn.batch_norm(x, w.astype(F64), b**2),
        lambda: fn.layer_norm_backward(dy, x, mean, rstd, 64, w),
        lambda: fn.rms_norm_backward(dy, x, rstd, 64, w),
        lambda: fn.layer_norm(x, 64, w, b, return_stats=True),
        lambda: fn.rms_norm(x, 64, w, return_stats=True),
        lambda: fn.group_norm(z, 2, each, return_stats=True),
        lambda: fn.batch_norm(z, None, None, each, training=True, return_stats=True),
        lambda: fn.batch_norm(z, each + 1, each**2, each, return_stats=True),
        lambda: fn.layer_norm(x, 64, w, b, out=np.empty_like(x)),
        lambda: fn.group_norm(x, 4, residual=e, out=np.empty_like(x), return_stats=True),
        lambda: fn.batch_norm(z, each + 1, each**2, each, out=np.empty_like(z)),
    ]
    repeated._answers.clear()
    for i, f in enumerate(calls):
        results = [together(f()) for _ in range(3)]
        assert kept() == i + 1, i
        right = [array.copy() for array in results[0]]
        for others in (results[1:], results[2:]):
            for own, array in zip(right, results[0], strict=True):
                assert_same_bits(array, own)
                array[...] = 7
            for arrays in others:
                for own, array in zip(right, arrays, strict=True):
                    assert_same_bits(array, own)
            results = others


def test_whatever_differs_is_another_call() -> None:
    x = data((6, 64), F32, 1.0)
    w, b = data((2, 64), F32, 1.0, seed=1)
    fn.layer_norm(x, 64, w, b)
    others: list[Callable[[], Any]] = [
        lambda: fn.layer_norm(x, 64, w, b, eps=1e-3),
        lambda: fn.layer_norm(x, 64, w),
        lambda: fn.layer_norm(x, 64, bias=w),
        lambda: fn.layer_norm(x, 64, w, w),
        lambda: fn.layer_norm(x, (64,), w, b),
        lambda: fn.layer_norm(x, axis=0),
        lambda: fn.layer_norm(x, axis=1),
        lambda: fn.layer_norm(x[::2], 64, w, b),
        lambda: fn.layer_norm(x[:3], 64, w, b),
        lambda: fn.layer_norm(x.T.copy().T, 64, w, b),
        lambda: fn.layer_norm(x.astype(F64), 64, w, b),
        lambda: fn.layer_norm(x.astype(">f4"), 64, w, b),
        lambda: fn.layer_norm(x, 64, w.astype(F64), b),
        lambda: fn.layer_norm(x, 64, w, b, activation="relu"),
        lambda: fn.layer_norm(x, 64, w, b, where=x > 0),
        lambda: fn.layer_norm(x, 64, w, b, residual=x),
        lambda: fn.layer_norm(x, 64, w, b, return_stats=True),
        lambda: fn.layer_norm(x[:, :1].astype(F64), 1, return_stats=True),
        lambda: fn.layer_norm(x.tolist(), 64, w, b),
        lambda: fn.rms_norm(x, 64, w),
        lambda: fn.add_layer_norm(x, x, 64, w, b),
        lambda: fn.layer_norm(x, 64, w, b, out=np.empty_like(x)),
        lambda: fn.layer_norm(x, 64, w, b, out=np.empty((64, 6), F32).T),
        lambda: fn.layer_norm(x, 64, w, b, out=np.empty((6, 128), F32)[:, ::2]),
        lambda: fn.layer_norm(x, 64, w, b, out=np.empty_like(x), return_stats=True),
        lambda: fn.layer_norm(x, 64, w, b, out=np.empty(x.shape, ">f4")),
    ]
    right = [described(f) for f in others]
    fn.layer_norm(x, 64, w, b)
    for f, results in zip(others, right, strict=True):
        for _ in range(3):
            for own, other in zip(together(f()), results, strict=True):
                assert_same_bits(own, other)
                assert (own.dtype, own.strides) == (other.dtype, other.strides)


def test_calls_that_are_nearly_the_same() -> None:
    """One array in two places and then two; functions with arguments of the same types."""
    x, e, dy = (data((6, 64), F32, 1.0, seed=s) for s in range(3))
    w, b = data((2, 64), F32, 1.0, seed=3)
    z, each = data((3, 4, 5, 7), F32, 1.0), data((4,), F32, 1.0)
    mean, rstd = fn.layer_norm(x, 64, return_stats=True)[1:]
    pairs: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: fn.add_rms_norm(x, x, 64), lambda: fn.add_rms_norm(x, e, 64)),
        (lambda: fn.layer_norm(x, 64, w, w), lambda: fn.layer_norm(x, 64, w, b)),
        (lambda: fn.group_norm(x, 4, residual=x), lambda: fn.group_norm(x, 4, residual=e)),
        (
            lambda: fn.layer_norm_backward(x, x, mean, rstd, 64),
            lambda: fn.layer_norm_backward(dy, x, mean, rstd, 64),
        ),
        (
            lambda: fn.layer_norm_backward(dy, x, rstd, rstd, 64),
            lambda: fn.layer_norm_backward(dy, x, mean, rstd, 64),
        ),
        (
            lambda: fn.batch_norm(z, None, None, each, training=True),
            lambda: fn.instance_norm(z, None, None, each),
        ),
    ]
    for pair in pairs:
        right = {f: described(f) for f in pair}
        for one, two in (pair, pair[::-1]):
            repeated._answers.clear()
            for f in (one, one, two, two, one):
                for own, other in zip(together(f()), right[f], strict=True):
                    assert_same_bits(own, other)


def test_what_is_written_or_refused_is_never_kept() -> None:
    x = data((6, 64), F32, 1.0)
    right = fn.layer_norm(x, 64)
    count = kept()
    for _ in range(2):
        with pytest.raises(ValueError, match="eps"):
            fn.layer_norm(x, 64, eps=-1.0)
        with pytest.raises(ValueError, match="normalized_shape"):
            fn.layer_norm(x, 63)
        with pytest.raises(TypeError):
            fn.layer_norm(x, 64, np.array(["a"] * 64))

        @numba.njit
        def half(v: Any) -> Any:
            return v / 2

        assert_same_bits(fn.layer_norm(x, 64, activation=half), right / 2)
    assert kept() == count


def test_out_is_judged_each_time() -> None:
    """Its shape and strides do not tell whether it may be written, nor what it overlaps."""
    x, e = (data((6, 64), F32, 1.0, seed=s) for s in range(2))
    w, b = data((2, 64), F32, 1.0, seed=3)
    right = fn.layer_norm(x, 64, w, b, residual=e)
    count = kept()

    def norm(out: Array, x: Array = x, w: Array = w, e: Array = e) -> None:
        assert fn.layer_norm(x, 64, w, b, residual=e, out=out) is out

    mine = x.copy()
    norm(mine, x=mine)
    assert kept() == count + 1
    for _ in range(2):
        out = np.empty_like(x)
        norm(out)
        assert_same_bits(out, right)
        assert kept() == count + 1
        mine = x.copy()
        norm(mine, x=mine)
        assert_same_bits(mine, right)
        mine = e.copy()
        norm(mine, e=mine)
        assert_same_bits(mine, right)
        for ahead in (64, 1):  # of x and of the residual, in memory of both
            memory = np.empty(x.size + ahead, F32)
            parts = memory[:-ahead].reshape(x.shape), memory[ahead:].reshape(x.shape)
            for into, own in (parts, parts[::-1]):
                own[...] = x
                norm(into, x=own)
                assert_same_bits(into, right)
                own[...] = e
                norm(into, e=own)
                assert_same_bits(into, right)
        out = np.empty_like(x)
        out[3] = w
        norm(out, w=out[3])
        assert_same_bits(out, right)
        out = np.full_like(x, 7)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            norm(out)
        assert (out == 7).all()
        with pytest.raises(TypeError, match="out has dtype"):
            norm(np.empty(x.shape))
        with pytest.raises(ValueError, match="out has shape"):
            norm(np.empty((6, 65), F32))
        with pytest.raises(ValueError, match="share memory"):
            norm(np.lib.stride_tricks.as_strided(np.empty(400, F32), x.shape, (4, 4)))
    assert kept() == count + 1


@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
def test_running_statistics_move_each_time(dtype: Any) -> None:
    z = data((3, 4, 5, 7), F32, 1.0)
    w = data((4,), F32, 1.0, seed=3)
    for stats in (False, True):
        for given in ((True, True), (True, False), (False, True)):
            ours, theirs = (
                [np.full(4, n, dtype) if there else None for n, there in enumerate(given)]
                for _ in range(2)
            )

            def norm(running: Any, x: Array = z, stats: bool = stats) -> Any:
                return fn.batch_norm(x, *running, w, training=True, return_stats=stats)

            rights = [described(lambda r=theirs, k=k: norm(r, z * k)) for k in range(1, 5)]  # type: ignore[misc]
            repeated._answers.clear()
            for k, right in enumerate(rights, 1):
                for own, other in zip(together(norm(ours, z * k)), right, strict=True):
                    assert_same_bits(own, other)
                assert kept() == 1
            for mine, other in zip(ours, theirs):
                if mine is None or other is None:
                    continue
                assert_same_bits(mine, other)
                mine.flags.writeable = False
                with pytest.raises(ValueError, match="read-only"):
                    norm(ours)
                assert_same_bits(mine, other)
                mine.flags.writeable = True


def test_what_a_mask_leaves_is_asked_each_time() -> None:
    """Batch norm refuses a channel of one value: which mask that is, its shape does not tell."""
    z = data((3, 4, 5, 7), F32, 1.0)
    mask = np.ones(z.shape, bool)
    for _ in range(3):
        fn.batch_norm(z, None, None, training=True, where=mask)
    mask[:, 1] = False
    mask[0, 1, 0, 0] = True
    for _ in range(2):
        with pytest.raises(ValueError, match="one value"):
            fn.batch_norm(z, None, None, training=True, where=mask)


def test_arrays_that_are_not_aligned() -> None:
    x = data((6, 64), F32, 1.0)
    right = fn.layer_norm(x, 64)
    odd = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(F32).reshape(x.shape)
    assert not odd.flags.aligned
    assert repeated.key_of(None, (odd,)) != repeated.key_of(None, (x,))
    for _ in range(3):
        assert_same_bits(fn.layer_norm(odd, 64), right)


def test_another_machine_has_other_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data((6, 64), F32, 1.0)
    right = fn.layer_norm(x, 64)
    assert kept() == 1
    before = list(repeated._answers.values())
    monkeypatch.setattr(machine, "here", machine.MODELS["laptop"])
    assert_same_bits(fn.layer_norm(x, 64), right)
    assert kept() == 1
    assert list(repeated._answers.values()) != before
    fn.rms_norm(x, 64)
    assert kept() == 2


def test_threads_and_the_backend_are_those_of_the_call() -> None:
    x = data((4096, 96), F32, 1.0)
    with fn.threads(1):
        right = fn.layer_norm(x, 96)
    for n in (2, 1, 2):
        with fn.threads(n):
            assert_same_bits(fn.layer_norm(x, 96), right)
    with fn.backend("numpy"):
        other = fn.layer_norm(x, 96)
    assert abs(other - right).max() < 1e-5
    assert kept() == 1


def test_one_long_call_is_shared_out_as_before() -> None:
    """A few large groups, which all threads split."""
    x = data((1, 2, 400, 401), F32, 3.0)
    right = described(lambda: fn.instance_norm(x))
    for n in (1, 2):
        with fn.threads(n):
            assert_same_bits(fn.instance_norm(x), right[0])


def test_many_kinds_of_calls() -> None:
    """No more are kept than there is room for."""
    x = np.ones((2, 8), F32)
    for i in range(repeated._MOST + 2):
        repeated._answers[(i,)] = lambda call: None
    fn.layer_norm(x, 8)
    assert kept() == 1


def test_importing_fastnorm_imports_no_numba() -> None:
    code = "import sys, fastnorm as fn; assert 'numba' not in sys.modules"
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr


def test_arrays_of_a_call_go_with_it() -> None:
    """Of one that is described, too: the garbage collector is not waited for."""
    x, dy, w = data((6, 64), F32, 1.0), data((6, 64), F32, 0.0, seed=1), data((64,), F32, 1.0)
    mean, rstd = fn.layer_norm(x, 64, return_stats=True)[1:]
    calls: list[Callable[[], Any]] = [
        lambda: fn.layer_norm(x, 64, w),
        lambda: fn.layer_norm(x, 64, w, w),  # two arguments that are one array: never kept
        lambda: fn.layer_norm_backward(dy, x, mean, rstd, 64, w),
        lambda: fn.batch_norm(x.T, None, None, training=True),
    ]
    gc.disable()
    try:
        for f in calls:
            repeated._answers.clear()
            for _ in range(3):
                y = together(f())[0]
                gone = weakref.ref(y)
                del y
                assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_a_view_whose_channels_are_elsewhere(dtype: Any) -> None:
    """It is packed once its channels are on axis 1, and not as it comes."""
    x, dy = (data((4, 6, 8), dtype, 1.0, seed=s).transpose(0, 2, 1) for s in range(2))
    w = data((6,), F64 if dtype == F64 else F32, 1.0)
    mean, rstd = fn.batch_norm(x, training=True, channel_axis=2, return_stats=True)[1:]
    out = np.empty_like(x)
    calls: list[Callable[[], Any]] = [
        lambda: fn.batch_norm(x, None, None, w, training=True, channel_axis=2, return_stats=True),
        lambda: fn.instance_norm(x, weight=w, channel_axis=2),
        lambda: fn.group_norm(x, 3, w, channel_axis=-1),
        lambda: fn.group_norm(x, 3, w, channel_axis=-1, out=out).copy(),
        lambda: fn.batch_norm_backward(dy, x, mean, rstd, w, channel_axis=2),
    ]
    for f in calls:
        right = described(f)
        for _ in range(3):
            for own, other in zip(together(f()), right, strict=True):
                assert_same_bits(own, other)
                assert own.strides == other.strides
