"""The same bits for any number of threads, any batch around a row, and any way to one kernel."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core, execution, runtime
from fastnorm.arguments import ACTIVATIONS
from fastnorm.backends import compiled
from fastnorm.operations import OPERATIONS, Operation
from fastnorm.schedule import (
    MIN_RUN,
    MIN_SAMPLES,
    SHORT_PLANE,
    SHORT_PLANE_OF_HALF,
    TILE_GROUPS,
)

from .helpers import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    PATIENCE,
    assert_same_bits,
    call,
    channels_last,
    data,
    named,
    non_temporal,
)

LAYOUTS = {"channels-first": np.ascontiguousarray, "channels-last": channels_last}

# 1.2 MB and more each: above what runs serially. Many small groups, few large ones, one alone.
SHAPES = [(16, 64, 24, 24), (3, 4, 320, 321), (1, 4, 400, 401), (5000, 64)]

by_operation = pytest.mark.parametrize("op", OPERATIONS, ids=named)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


# NumPy's backend has one way to add up, and no threads.
on_kernels = pytest.mark.parametrize("name", [name for name in BACKENDS if name != "numpy"])


@pytest.fixture(autouse=True)
def _the_backend_stays() -> Iterator[None]:
    before = fn.get_backend()
    yield
    fn.set_backend(before)


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


@by_layout
@by_operation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_kernels
def test_any_number_of_threads(
    name: str, shape: tuple[int, ...], op: Operation, layout: str
) -> None:
    if op.refuses(shape):
        shape = (*shape, 2)
    x = LAYOUTS[layout](data(shape, F32, 3.0))
    p = op.parameters(shape, F32, np.random.default_rng(0))
    with fn.backend(name), fn.threads(1):
        serial = first(call(op, x, p))
    for threads in (2, 3, 8):
        with fn.backend(name), fn.threads(threads):
            assert_same_bits(first(call(op, x, p)), serial)


@by_layout
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if 0 not in op.linked(4, 1)], ids=named)
@on_kernels
def test_a_sample_alone_and_in_a_batch(name: str, op: Operation, dtype: Any, layout: str) -> None:
    fn.set_backend(name)
    x = LAYOUTS[layout](data((6, 64, 20, 20), dtype, 3.0))
    p = op.parameters(x.shape, dtype, np.random.default_rng(0))
    whole = first(call(op, x, p))
    for i in (0, 5):
        own = {
            k: v[i : i + 1] if k in ("residual", "g") and np.ndim(v) == x.ndim else v
            for k, v in p.items()
        }
        if "g" in own and np.shape(own["g"]) == (6,):
            own["g"] = own["g"][i : i + 1]
        assert_same_bits(first(call(op, x[i : i + 1], own)), whole[i : i + 1])


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
@pytest.mark.parametrize("axis", [2, 3, (2, 4)], ids=str)
@on_kernels
def test_a_sample_where_an_axis_between_is_reduced(name: str, axis: Any, dtype: Any) -> None:
    """Kept axes that are no one walk through memory, of which a sample alone has one less."""
    fn.set_backend(name)
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2, 5, 60, 3, 8)) * 3 + 50).astype(dtype).transpose(0, 4, 1, 2, 3)
    for mask in (None, rng.random((2, 1, 5, 60, 1)) < 0.6, rng.random((2, 8, 1, 60, 1)) < 0.6):
        y, mean, rstd = fn.layer_norm(x, axis=axis, where=mask, return_stats=True)
        dx, *_ = fn.layer_norm_backward(x, x, mean, rstd, axis=axis, where=mask)
        for i in (0, 1):
            own, chosen = x[i : i + 1], None if mask is None else mask[i : i + 1]
            one = fn.layer_norm(own, axis=axis, where=chosen, return_stats=True)
            for found, right in zip(one, (y, mean, rstd)):
                assert_same_bits(found, right[i : i + 1])
            back, *_ = fn.layer_norm_backward(own, own, *one[1:], axis=axis, where=chosen)
            assert_same_bits(back, dx[i : i + 1])


@pytest.mark.parametrize("order", list(itertools.permutations(range(5))), ids=str)
def test_a_sample_in_every_order_of_axes(order: tuple[int, ...]) -> None:
    """Whether it can be walked as it lies, or is copied, is so for the batch and for one of it."""
    shape = (3, 2, 4, 1, 3)
    rng = np.random.default_rng(sum(order[:3]))
    lying = (2, *(shape[axis] for axis in order))
    dtype = F32 if order[0] else F64  # in which samples must not be neighbours
    x, dy = rng.standard_normal(lying).astype(dtype).transpose(0, *1 + np.argsort(order))
    for axis in itertools.chain(*(itertools.combinations((1, 2, 3, 4), n) for n in (1, 2, 3))):
        own = tuple(shape[a] for a in axis)
        if set(own) == {1}:
            continue
        w = rng.standard_normal(own).astype(F32)
        for p in ({"axis": axis}, {"axis": axis, "weight": w}):
            y, mean, rstd = fn.layer_norm(x, **p, return_stats=True)
            # statistics whose step along an axis of length 1 is none
            steps = [0 if n == 1 else s for n, s in zip(rstd.shape, rstd.strides)]
            odd = np.lib.stride_tricks.as_strided(rstd, rstd.shape, steps)
            for stats in ((mean, rstd), (mean, odd)):
                dx, *_ = fn.layer_norm_backward(dy, x, *stats, **p)
                for i in (0, 2):
                    s = slice(i, i + 1)
                    assert_same_bits(fn.layer_norm(x[s], **p), y[s])
                    alone, *_ = fn.layer_norm_backward(dy[s], x[s], *(v[s] for v in stats), **p)
                    assert_same_bits(alone, dx[s])


def lying(rng: Any, shape: tuple[int, ...], order: Sequence[int], gap: int = -1) -> Any:
    """float32 numbers with the axes in this order in memory, one axis with a gap behind it."""
    whole = rng.standard_normal([shape[axis] + (axis == gap) for axis in order]).astype(F32)
    return whole.transpose(np.argsort(order))[tuple(slice(0, n) for n in shape)]


C = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("shape", "order", "gap", "own", "axis"),
    [
        ((3, 4, 2, 4, 3), (4, 0, 2, 1, 3), -1, (3, 1, 2, 4, 1), (1, 3)),
        ((3, 4, 3, 4, 4), C, 2, (3, 4, 1, 1, 4), (2, 4)),
        ((3, 3, 4, 4, 2), C, 3, (3, 3, 1, 4, 1), (2, 4)),
        ((2, 3, 3, 2, 2), (4, 2, 3, 0, 1), -1, (2, 3, 3, 1, 2), (1, 3)),
        ((2, 3, 4, 2, 4), C, 2, (2, 3, 4, 1, 1), (3, 4)),
    ],
    ids=str,
)
@on_kernels
def test_a_sample_with_parameters_of_its_own(
    name: str, shape: Any, order: Any, gap: int, own: Any, axis: Any
) -> None:
    """Alone its walk goes by its own strides, in the batch by those of all parameters."""
    rng = np.random.default_rng(3)
    x, dy = (lying(rng, shape, order, gap) for _ in range(2))
    residual = lying(rng, shape, order[::-1])
    w, b = (1 + rng.standard_normal((2, *own)) / 4).astype(F32)
    stats: dict[str, Any] = {"axis": axis, "return_stats": True}

    def at(s: slice) -> dict[str, Any]:
        return {"axis": axis, "weight": w[s]}

    calls: list[Callable[[slice], Any]] = [
        lambda s: fn.layer_norm(x[s], weight=w[s], bias=b[s], **stats),
        lambda s: fn.rms_norm(x[s], weight=w[s], activation="relu", **stats),
    ]
    if axis == (3, 4):
        calls.append(lambda s: fn.add_layer_norm(x[s], residual[s], shape[3:], w[s], b[s]))
    with fn.backend(name):
        layer, rms = (of(slice(None))[1:] for of in calls[:2])
        calls += [
            lambda s: fn.layer_norm_backward(dy[s], x[s], *(v[s] for v in layer), **at(s)),
            lambda s: fn.rms_norm_backward(dy[s], x[s], *(v[s] for v in rms), **at(s)),
        ]
        for of in calls:
            whole = first(of(slice(None)))
            for i in range(len(x)):
                assert_same_bits(first(of(slice(i, i + 1))), whole[i : i + 1])


@pytest.mark.parametrize("size", [1.0, 1e30, 1e37])
@on_kernels
def test_a_sample_by_given_statistics_with_large_weights(name: str, size: float) -> None:
    """In Fortran's order channels are runs in a batch, and columns alone."""
    rng = np.random.default_rng(6)
    x = np.asfortranarray(rng.standard_normal((2, 64)).astype(F32))
    w = ((1 + rng.standard_normal(64) / 4) * size).astype(F32)
    mean, var = rng.standard_normal(64), rng.random(64) + 0.5
    with fn.backend(name):
        whole = fn.batch_norm(x, mean, var, w)
        for i in (0, 1):
            assert_same_bits(fn.batch_norm(x[i : i + 1], mean, var, w), whole[i : i + 1])


@pytest.mark.parametrize("own", [(65,), (5, 65), (5, 1)], ids=str)
@pytest.mark.parametrize("batch", [(56,), (7, 8), (300,)], ids=str)
@on_kernels
def test_gradients_of_weights_that_rows_share(name: str, batch: Any, own: Any) -> None:
    """Of float64, in which a sum in another order is seen."""
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, *batch, 5, 65))
    w = rng.standard_normal(own)
    with fn.backend(name):
        _, mean, rstd = fn.layer_norm(x, (5, 65), w, return_stats=True)
        found = []
        for threads in (1, 2, 8):
            with fn.threads(threads):
                found.append(fn.layer_norm_backward(dy, x, mean, rstd, (5, 65), w))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("shape", [(4096, 1), (64, 32), (4, 8, 6, 5), (9, 5, 24)], ids=str)
@on_kernels
def test_ordinary_batches_go_in_one_pass(name: str, shape: Any, monkeypatch: Any) -> None:
    """With parameters of each sample, too: one after the other they would take far longer."""
    monkeypatch.setattr(compiled, "_sample", None)
    x = np.random.default_rng(0).standard_normal(shape).astype(F32)
    w = np.ones((shape[0], *[1] * (len(shape) - 2), shape[-1]), F32)
    with fn.backend(name):
        for own in (w, w[..., :1], np.ones(shape, F32)):
            y, *stats = fn.layer_norm(x, shape[-1], own, own, return_stats=True)
            fn.layer_norm_backward(y, x, *stats, shape[-1], own)


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (3, 5, 4), (4, 2, 3, 3), (2, 1, 40)], ids=str)
@on_kernels
def test_a_sample_by_given_statistics_and_weights_of_positions(name: str, shape: Any) -> None:
    """Short rows are columns in a batch, and a run alone: there weights are applied apart."""
    rng = np.random.default_rng(4)
    ndim = len(shape)
    with fn.backend(name):
        for order in itertools.permutations(range(ndim)):
            x = lying(rng, shape, order)
            for axis in range(1, ndim):
                mean, var = rng.standard_normal(shape[axis]), rng.random(shape[axis]) + 0.5
                for along in itertools.product((False, True), repeat=ndim - 1):
                    own = (1, *(n if varies else 1 for n, varies in zip(shape[1:], along)))
                    w = (1 + rng.standard_normal(own) / 4).astype(F32)
                    whole = fn.batch_norm(x, mean, var, w, w, channel_axis=axis)
                    for i in (0, len(x) - 1):
                        one = fn.batch_norm(x[i : i + 1], mean, var, w, w, channel_axis=axis)
                        assert_same_bits(one, whole[i : i + 1])


# Weights of float64, of each sample, and in either order; so large or small that a group of theirs
# is computed in double.
WEIGHTS = {
    "float64": lambda n, c: 1 / np.arange(3.0, 3 + c),
    "of samples": lambda n, c: np.linspace(0.5, 2, n * c, dtype=F32).reshape(n, c),
    "of samples, in Fortran's order": lambda n, c: np.linspace(0.5, 2, n * c).reshape(c, n).T,
    "one is large": lambda n, c: np.where(np.arange(c) == 1, 1e35, 1.0).astype(F32),
    "one is small": lambda n, c: np.where(np.arange(c) == 1, 1e-35, 1.0).astype(F32),
    "one sample's are large": lambda n, c: (
        np.where(np.arange(n) == 1, 1e35, 1.0)[:, None] * np.ones(c, F32)
    ),
}


@by_layout
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(5, 12, 65), (9, 64, 200), (3, 4, 2, 9)], ids=str)
@on_kernels
def test_a_sample_with_weights(
    name: str, shape: tuple[int, ...], weights: str, layout: str
) -> None:
    fn.set_backend(name)
    x, dy = (LAYOUTS[layout](data(shape, F32, 1.0, seed=seed)) for seed in (0, 1))
    w = WEIGHTS[weights](*shape[:2])
    for groups in (4, shape[1]):
        y, mean, rstd = fn.group_norm(x, groups, w, return_stats=True)
        for past in (False, True):
            with non_temporal(past):
                dx = fn.group_norm_backward(dy, x, mean, rstd, groups, w)[0]
            for i in range(3):
                one = slice(i, i + 1)
                own = w[one] if w.ndim == 2 else w
                assert_same_bits(fn.group_norm(x[one], groups, own), y[one])
                stats = mean[one], rstd[one]
                found = fn.group_norm_backward(dy[one], x[one], *stats, groups, own)[0]
                assert_same_bits(found, dx[one])


@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
@on_kernels
def test_a_sample_with_operands_of_another_order(name: str, dtype: Any) -> None:
    """Weights, residual and dy whose samples lie between one another, or are one, or in a row."""
    fn.set_backend(name)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 8, 6)).astype(dtype)
    last, one = channels_last(x), slice(0, 1)
    own, rows = (rng.standard_normal(s).astype(dtype) for s in ((3, 4), (3, 1, 8, 1)))
    for w in (np.asfortranarray(own), own.repeat(2, 1)[:, ::2]):
        y = fn.instance_norm(last, weight=w)
        assert_same_bits(fn.instance_norm(last[one], weight=w[one]), y[one])
        assert_same_bits(fn.instance_norm(last[one], weight=w[one].copy()), y[one])
    for array in (x, last):
        y, mean, rstd = fn.layer_norm(array, 6, rows, return_stats=True)
        assert_same_bits(fn.layer_norm(array[one], 6, rows[one]), y[one])
        whole = fn.layer_norm_backward(x, array, mean, rstd, 6, rows)
        alone = fn.layer_norm_backward(x[one], array[one], mean[one], rstd[one], 6, rows[one])
        for a, b in zip(alone, whole, strict=True):
            assert_same_bits(a, b[one])
    for r in (np.broadcast_to(x[0], x.shape), np.asfortranarray(x).astype(x.dtype.newbyteorder())):
        y = fn.group_norm(last, 2, residual=r)
        assert_same_bits(fn.group_norm(last[one], 2, residual=r[one]), y[one])
        _, mean, rstd = fn.group_norm(last, 2, return_stats=True)
        dx = fn.group_norm_backward(r, last, mean, rstd, 2)[0]
        assert_same_bits(
            fn.group_norm_backward(r[one], last[one], mean[one], rstd[one], 2)[0], dx[one]
        )


# Elements of planes, below which those of several samples are rows and above which they are not.
PLANES = [SHORT_PLANE, SHORT_PLANE + 1, SHORT_PLANE_OF_HALF, SHORT_PLANE_OF_HALF + 1]

ORDERS = [(2, 1, 0), (1, 2, 0), (1, 0, 2), (2, 0, 1)]  # of axes, from the outermost on


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=named)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@on_kernels
def test_a_sample_between_others(name: str, order: tuple[int, ...], dtype: Any) -> None:
    """As in Fortran's order: samples are columns, and one alone is one column."""
    n, c, m = shape = (6, 5, 70)
    back = np.argsort(order)
    rng = np.random.default_rng(0)

    def lying(a: Any) -> Any:
        return np.ascontiguousarray(a.transpose(order)).transpose(back)

    x, r, each = (lying((rng.standard_normal(shape) * 3 + 1).astype(dtype)) for _ in range(3))
    w, b = rng.standard_normal((2, c)).astype(F32)
    full = rng.standard_normal((2, c, m)).astype(F32)
    of_sample = rng.standard_normal((n, 1, 1)).astype(F32)
    of_channel = rng.standard_normal((n, c, 1)).astype(F32)
    apart = np.ascontiguousarray(r)
    stats: dict[str, Any] = {"return_stats": True}
    forward: list[Callable[[slice], Any]] = [
        lambda s: fn.group_norm(x[s], c, w, b, **stats),
        lambda s: fn.group_norm(x[s], 1, w, b, activation="silu"),
        lambda s: fn.instance_norm(x[s], weight=w, bias=b, residual=r[s]),
        lambda s: fn.layer_norm(x[s], (c, m), *full, **stats),
        lambda s: fn.layer_norm(x[s], (c, m), of_sample[s], of_sample[s], **stats),
        lambda s: fn.layer_norm(x[s], (c, m), each[s], residual=r[s]),
        lambda s: fn.rms_norm(x[s], m, full[0, 0], **stats),
        lambda s: fn.batch_norm(x[s], w, b * b, b, w),
        # which is added first, into an array without the other samples
        lambda s: fn.add_rms_norm(x[s], apart[s], (c, m), of_channel[s]),
        lambda s: fn.add_layer_norm(x[s], apart[s], (c, m), of_channel[s], of_sample[s]),
    ]
    with fn.backend(name):
        found = [first(of(slice(None))) for of in forward]
        group, layer, own, rms = (forward[i](slice(None))[1:] for i in (0, 3, 4, 6))
        backward: list[Callable[[slice], Any]] = [
            lambda s: fn.group_norm_backward(r[s], x[s], *(v[s] for v in group), c, w),
            lambda s: fn.layer_norm_backward(r[s], x[s], *(v[s] for v in layer), (c, m), full[0]),
            lambda s: fn.layer_norm_backward(
                r[s], x[s], *(v[s] for v in own), (c, m), of_sample[s]
            ),
            lambda s: fn.rms_norm_backward(r[s], x[s], rms[0][s], m, full[0, 0]),
            lambda s: fn.batch_norm_backward(
                r[s], x[s], w.astype(F64), b * b + 1.0, w, training=False
            ),
        ]
        found += [first(of(slice(None))) for of in backward]
        for whole, of in zip(found, forward + backward, strict=True):
            for one in (slice(0, 1), slice(3, 4), slice(4, 6)):
                assert_same_bits(first(of(one)), whole[one])


@pytest.mark.skipif(_core.kernels is None, reason="no compiled kernels")
@pytest.mark.parametrize("of", [F16, BF16, F32, F64], ids=named)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=named)
def test_a_sample_between_others_is_converted(dtype: Any, of: Any) -> None:
    """In tiles, whose rows depend on how many columns there are: dy of another dtype, or x."""
    rng = np.random.default_rng(0)
    for n, c, m in ((9, 300, 32), (16, 1000, 3), (40, 70, 65)):
        x, dy = (rng.standard_normal((m, n, c)).transpose(1, 2, 0) for _ in range(2))
        x, dy = x.astype(dtype), dy.astype(of)
        _, *stats = fn.layer_norm(x, axis=2, return_stats=True)
        dx = fn.layer_norm_backward(dy, x, *stats, axis=2)[0]
        for i in (0, n - 1):
            one = slice(i, i + 1)
            own = [s[one] for s in stats]
            found = fn.layer_norm_backward(dy[one], x[one], *own, axis=2)[0]
            assert_same_bits(found, dx[one])


@pytest.mark.parametrize("plane", [1, 9, *PLANES, MIN_RUN])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=named)
@on_kernels
def test_a_short_plane_by_given_statistics(name: str, dtype: Any, plane: int) -> None:
    """Planes of some samples are rows, those of fewer are runs: the bits are the same."""
    rng = np.random.default_rng(plane)
    n, c = MIN_SAMPLES + 1, 2 * TILE_GROUPS + 5
    x, r = (rng.standard_normal((n, c, plane)) * 3 + 1 for _ in range(2))
    x, r = x.astype(dtype), r.astype(dtype)
    w, b, mean = rng.standard_normal((3, c)).astype(F32)
    var = abs(rng.standard_normal(c)).astype(F32) + np.float32(0.1)
    apart = np.ascontiguousarray(r.transpose(2, 1, 0)).transpose(2, 1, 0)
    between = np.repeat(r, 2, axis=1)[:, ::2]  # other planes lie between
    norms: list[Callable[[slice], Any]] = [
        lambda s: fn.batch_norm(x[s], mean, var, w, b),
        lambda s: fn.batch_norm(x[s], mean, var, activation="silu"),
        lambda s: fn.batch_norm(x[s], mean, var, w, residual=r[s]),
        lambda s: fn.batch_norm(x[s], mean, var, None, b, residual=apart[s], activation="relu"),
        lambda s: fn.instance_norm(x[s], mean, var, w, b, use_input_stats=False),
        lambda s: fn.batch_norm(x[s, ::2], mean[::2], var[::2], w[::2], b[::2]),
        lambda s: fn.batch_norm(x[s], mean, var, w, b, residual=between[s]),
        lambda s: fn.batch_norm(x[s], mean, var, w, b, out=np.repeat(x[s], 2, axis=1)[:, ::2]),
    ]
    with fn.backend(name):
        for numbers in ("ordinary", "out of range", "not numbers"):
            if numbers == "out of range":
                var[3], mean[c - 2], w[7] = 1e-38, 2e38, 3e38
            elif numbers == "not numbers":
                x[2, 5], x[4, 6], x[n - 1, c - 1] = np.nan, np.inf, -np.inf
            with np.errstate(all="ignore"):
                assert_same_bits(
                    norms[-2](slice(None)), fn.batch_norm(x, mean, var, w, b, residual=r)
                )
                for of in norms:
                    whole = of(slice(None))
                    for one in (slice(0, 1), slice(2, 5), slice(n - 1, n), slice(0, MIN_SAMPLES)):
                        assert_same_bits(of(one), whole[one])


@on_kernels
def test_a_sample_of_one_channel_last_by_given_statistics(name: str) -> None:
    """The stride of an axis of length 1 decides nothing."""
    rng = np.random.default_rng(0)
    w, mean, var = rng.standard_normal((1, 1, 17, 1)).astype(F32), np.array([0.3]), np.array([1.7])
    norms: list[Callable[[Any], Any]] = [
        lambda x: fn.batch_norm(x, mean, var, w),
        lambda x: fn.instance_norm(x, mean, var, w, w, use_input_stats=False),
    ]
    with fn.backend(name):
        for width in (3, 64, 256):
            x = rng.standard_normal((2, 17, width, 1)).astype(F32)
            for lying in (np.moveaxis(x, 3, 1), x.reshape(2, 1, 17, width)):
                for norm in norms:
                    assert_same_bits(norm(lying[:1]), norm(lying)[:1])


@on_kernels
def test_a_sample_of_one_element_out_of_range(name: str) -> None:
    """One alone is a run, among others it is a column."""
    x, dy = np.float32([[0.125730217], [-0.132104859]]), np.float32([[1.336284e35], [2.1888102e34]])
    one = slice(0, 1)
    with fn.backend(name):
        for w in (np.float32([0.36159506]), np.float32([[0.36159506], [3.0]]), None):
            _, *stats = fn.layer_norm(x, 1, return_stats=True)
            dx = fn.layer_norm_backward(dy, x, *stats, 1, w)[0]
            own = w if w is None or w.ndim == 1 else w[one]
            found = fn.layer_norm_backward(dy[one], x[one], *(s[one] for s in stats), 1, own)[0]
            assert_same_bits(found, dx[one])
            assert not dx.any()
            _, rstd = fn.rms_norm(x, 1, return_stats=True)
            dx = fn.rms_norm_backward(dy, x, rstd, 1, w)[0]
            assert_same_bits(fn.rms_norm_backward(dy[one], x[one], rstd[one], 1, own)[0], dx[one])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sample_with_weights_in_double(name: str) -> None:
    """Which are as many as a sample has numbers, or few beside those of a batch."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((16, 8, 40)).astype(F32), rng.standard_normal(8)
    between, each = (
        rng.standard_normal((3, 5, 100, 9, 8)).astype(F32),
        rng.standard_normal((3, 5, 9)),
    )
    with fn.backend(name):
        _, mean, rstd = fn.group_norm(x, 1, w, return_stats=True)
        dx = fn.group_norm_backward(x, x, mean, rstd, 1, w)[0]
        one = fn.group_norm_backward(x[:1], x[:1], mean[:1], rstd[:1], 1, w)[0]
        assert_same_bits(one, dx[:1])
        x, axes = np.moveaxis(between, 4, 0), (1, 2, 4)
        _, mean, rstd = fn.layer_norm(x, axis=axes, return_stats=True)
        for weight in (each, each[::-1], each[:, ::-1], np.repeat(each, 2, 2)[..., ::2]):
            dx = fn.layer_norm_backward(x, x, mean, rstd, weight=weight, axis=axes)[0]
            one = fn.layer_norm_backward(
                x[:1], x[:1], mean[:1], rstd[:1], weight=weight, axis=axes
            )[0]
            assert_same_bits(one, dx[:1])


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=named)
@pytest.mark.parametrize("order", ["C", "F", "last"])
@on_kernels
def test_weights_in_another_order_in_every_call(name: str, order: str, dtype: Any) -> None:
    """Also in a call that is answered from the cache, which copies what it converts."""
    fn.set_backend(name)
    shape = (3, 4, 5, 2)
    rng = np.random.default_rng(0)
    x, full, own = (rng.standard_normal(s) for s in (shape, shape, shape[1:]))
    lie = {"C": np.ascontiguousarray, "F": np.asfortranarray, "last": channels_last}[order]
    x = lie(x.astype(dtype))
    for weights in (full.astype(dtype), own.astype(dtype), np.asfortranarray(full.astype(dtype))):
        for call_it in (
            lambda w: fn.layer_norm(x, shape[1:], w),
            lambda w: fn.instance_norm(x, weight=w if w.ndim == 4 else w[None]),
        ):
            first_call = call_it(weights)
            for _ in range(2):
                assert_same_bits(call_it(weights), first_call)


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4"])
@pytest.mark.parametrize("samples", [2, 40])
def test_gradients_by_weights_with_gaps(kind: str, samples: int) -> None:
    """Of each sample, with gaps between rows: those of their copy, of all and of one sample."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, samples, 9, 8)).astype("f4")
    weight = rng.standard_normal((samples, 18, 8)).astype(kind)[:, ::2]
    rstd = fn.rms_norm(x, (9, 8), return_stats=True)[1]

    def gradients(of: slice, w: Any) -> Any:
        return fn.rms_norm_backward(dy[of], x[of], rstd[of], (9, 8), w)

    whole = gradients(slice(None), weight)
    for found, right in zip(gradients(slice(None), weight.copy()), whole, strict=True):
        assert_same_bits(found, right)
    for i in range(samples):
        one = slice(i, i + 1)
        for w in (weight[one], weight[one].copy()):
            for found, right in zip(gradients(one, w), whole, strict=True):
                assert_same_bits(found, right[one])


@by_layout
@on_kernels
def test_a_sample_by_given_statistics(name: str, layout: str) -> None:
    """Where statistics are given, samples are apart in batch norm, too."""
    fn.set_backend(name)
    x, dy = (LAYOUTS[layout](data((4, 8, 7, 3), F32, 1.0, seed=seed)) for seed in (0, 1))
    mean, rstd = data((8,), F64, seed=2), np.linspace(0.3, 3, 8)
    for weights in ("float64", "of samples", "one is large", "one sample's are large"):
        w = WEIGHTS[weights](4, 8)
        dx = fn.batch_norm_backward(dy, x, mean, rstd, w, training=False)[0]
        y = fn.batch_norm(x, mean, rstd, w, w)
        for i in range(4):
            one = slice(i, i + 1)
            own = w[one] if w.ndim == 2 else w
            assert_same_bits(fn.batch_norm(x[one], mean, rstd, own, own), y[one])
            found = fn.batch_norm_backward(dy[one], x[one], mean, rstd, own, training=False)[0]
            assert_same_bits(found, dx[one])


@on_kernels
def test_in_place_backwards(name: str) -> None:
    """An x that lies backwards, and an `out` that does, or is x."""
    rng = np.random.default_rng(0)
    with fn.backend(name):
        for dtype in (F32, F64):
            a = rng.standard_normal((5, 7, 70)).astype(dtype)
            for x in (a[..., ::-1], a[::-1], a[:, ::-1].transpose(0, 2, 1)):
                for of in (
                    lambda x, out: fn.layer_norm(x, None, np.float32(1.37), axis=2, out=out),
                    lambda x, out: fn.instance_norm(x, weight=np.arange(x.shape[1]), out=out),
                ):
                    y = of(x, None)
                    assert_same_bits(of(x, np.empty_like(x)[:, ::-1]), y)
                    assert_same_bits(of(into := x.copy(), into), of(x.copy(), None))
                    turned = np.empty_like(a)[..., ::-1] if x.shape == a.shape else None
                    assert_same_bits(of(x, turned), y)


@on_kernels
def test_a_sample_where_the_batch_is_copied_or_it_is(name: str) -> None:
    """By one formula: a weight that is one number for a group is taken into its scale."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(F32)

    x, each, shared = random(5, 8, 7, 6), random(5, 8, 1, 1), random(1, 8, 1, 1)
    second = random(6, 5, 8, 7).transpose(1, 2, 0, 3)
    volume = random(2, 1, 4, 5, 4).transpose(0, 4, 1, 2, 3)
    last, c = np.moveaxis(random(4, 6, 7), -1, 1), random(7)
    var = c * c + np.float32(0.5)
    place = random(1, 7, 6)
    with fn.backend(name):
        _, m, r = fn.layer_norm(x, axis=3, return_stats=True)
        dy = random(*x.shape)
        for of in (
            lambda s: fn.layer_norm(x[s], None, each[s], axis=3),
            lambda s: fn.rms_norm(x[s], None, each[s], axis=3),
            lambda s: fn.layer_norm_backward(dy[s], x[s], m[s], r[s], None, each[s], axis=3)[0],
            lambda s: fn.layer_norm(second[s], None, shared, axis=3),
            lambda s: fn.layer_norm(volume[s], None, np.float32(1.37), axis=3),
            lambda s: fn.batch_norm(last[s], c, var, None, place),
            lambda s: fn.instance_norm(
                last[s], c, c * c + np.float32(0.5), place, use_input_stats=False
            ),
        ):
            whole = of(slice(None))
            for i in (0, 1):
                assert_same_bits(of(slice(i, i + 1)), whole[i : i + 1])


@by_layout
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if "out" in op.features], ids=named)
@on_kernels
def test_where_the_result_goes(name: str, op: Operation, dtype: Any, layout: str) -> None:
    """Into an array that lies as x does, in other orders, with gaps, and backwards."""
    x = LAYOUTS[layout](data((4, 16, 6, 7), dtype, 3.0))
    p = op.parameters(x.shape, dtype, np.random.default_rng(0))
    with fn.backend(name):
        y = first(call(op, x, p))
        for out in (
            np.empty_like(x),
            channels_last(np.empty(x.shape, dtype)),
            np.empty(x.shape, dtype, order="F"),
            np.empty(x.shape, dtype)[..., ::-1],
            np.empty((*x.shape, 2), dtype)[..., 0],
            np.empty((4, 16, 12, 7), dtype)[:, :, ::2],
        ):
            first(call(op, x, p | {"out": out}))
            assert_same_bits(out, y)


@pytest.mark.parametrize("order", [None, "C", "F"])
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
@on_kernels
def test_a_sample_by_given_statistics_in_copies(name: str, dtype: Any, order: Any) -> None:
    """Orders that kernels cannot walk: gaps, an `out` in another order, weights that are turned."""
    rng = np.random.default_rng(0)
    mean, var, w = rng.normal(size=6), rng.uniform(0.1, 3, size=6), rng.normal(size=6).astype(F32)
    wide = rng.normal(size=(5, 8, 9, 6)).astype(dtype)
    arrays = (
        wide.transpose(0, 3, 1, 2)[:, :, ::2, ::3],
        np.ascontiguousarray(wide.transpose(0, 3, 1, 2))[:, :, ::2, ::3],
        wide[:, 0, 0],
        np.asfortranarray(wide[:, 0, 0]),
        np.asfortranarray(wide[..., :1]).transpose(0, 3, 1, 2),
    )
    with fn.backend(name):
        for x in arrays:
            m, v, c = mean[: x.shape[1]], var[: x.shape[1]], x.shape[1]
            for weight in (w, w[::-1], w.repeat(3)[::3], np.outer(np.arange(1, 6, dtype=F32), w)):
                p = weight[..., :c], weight[..., :c]
                out, other = (order and np.empty(x.shape, dtype, order=order) for _ in range(2))
                y = fn.batch_norm(x, m, v, *p, out=out)
                for i in range(5):
                    one = slice(i, i + 1)
                    own = [a[one] if a.ndim == 2 else a for a in p]
                    into = other if other is None else other[one]
                    assert_same_bits(fn.batch_norm(x[one], m, v, *own, out=into), y[one])


@on_kernels
def test_a_huge_neighbour_changes_nothing(name: str) -> None:
    """Columns side by side: one beyond float32's range is redone in float64, the others are not."""
    fn.set_backend(name)
    x = data((4, 32, 33), F32, 3.0)
    for layout in LAYOUTS.values():
        before = fn.instance_norm(layout(x))
        hot = x.copy()
        hot[2, 5] = np.resize(np.float32([3e38, -3e38, 1e38]), 33)
        hot[1, 7, 3] = np.nan
        after = fn.instance_norm(layout(hot))
        same = np.ones((4, 32), bool)
        same[2, 5] = same[1, 7] = False
        assert_same_bits(after[same], before[same])
        assert np.isfinite(after[2, 5]).all()
        assert np.isnan(after[1, 7]).all()


@by_layout
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_is_instance_and_layer_norm(affine: bool, layout: str) -> None:
    x = LAYOUTS[layout](data((4, 32, 25, 24), F32, 3.0))
    rng = np.random.default_rng(1)
    w, b = rng.standard_normal((2, 32)).astype(np.float32) if affine else (None, None)
    assert_same_bits(fn.group_norm(x, 32, w, b), fn.instance_norm(x, weight=w, bias=b))
    if layout == "channels-first":
        # on channels-last memory a layer norm is another walk, whose sums are in another order
        ours, other = fn.group_norm(x, 1, w, b), fn.layer_norm(x, x.shape[1:])
        if not affine:
            assert_same_bits(ours, other)
        else:
            # weights along the row are applied one by one; one a plane is multiplied with rstd
            # first: a rounding more or less of each factor and of the sum
            full = [np.broadcast_to(v[:, None, None], x.shape[1:]).copy() for v in (w, b)]
            other = fn.layer_norm(x, x.shape[1:], *full)
            size = np.maximum(abs(ours), abs(full[1]))
            assert (abs(ours - other) <= 4 * np.finfo(F32).eps * size).all()


def test_calls_from_several_python_threads() -> None:
    xs = [data((64, 1000), F32, 3.0, seed=i) for i in range(8)]
    alone = [fn.layer_norm(x, 1000) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for y, right in zip(pool.map(lambda x: fn.layer_norm(x, 1000), xs), alone):
                assert_same_bits(y, right)


def _in_child(queue: Any, x: Any) -> None:
    queue.put((fn.get_num_threads(), fn.layer_norm(x, x.shape[1])))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
# JAX, where a test before has imported it, warns of every fork from within a handler
@pytest.mark.filterwarnings("ignore:.*_at_fork.*:pytest.PytestUnraisableExceptionWarning")
def test_a_forked_child_of_a_threaded_process() -> None:
    x = data((512, 1000), F32, 3.0)
    with fn.threads(2):
        right = fn.layer_norm(x, 1000)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x))
    child.start()
    try:
        threads, y = queue.get(timeout=PATIENCE)
    finally:
        child.terminate()
        child.join()
    assert threads == fn.get_num_threads()
    assert_same_bits(y, right)


def everything(op: Operation, x: Any, p: dict[str, Any], **options: Any) -> list[Any]:
    """Results, statistics, gradients and running statistics of one call forward and one back."""
    p = {k: v.copy() if k.startswith("running") else v for k, v in p.items()}
    function, back = getattr(fn, op.name), getattr(fn, str(op.backward))
    y = function(x, **p, **options)
    z, *stats = function(x, **p, **options, return_stats=True)
    gradients = back(x[...], x, *stats, **{k: p[k] for k in op.backward_keywords if k in p})
    running = [v for k, v in p.items() if k.startswith("running")]
    return [y, z, *stats, *gradients, *running]


def kinds_of_call(op: Operation) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Calls that differ from one another in one thing each."""
    rng = np.random.default_rng(2)
    for shape in [(6, 12, 4, 5), (6, 12, 5, 4), (12, 6, 4, 5), (6, 12, 20), (70, 12)]:
        if len(shape) < op.min_ndim:
            continue
        # of half precision with weights of their own type, or of float32
        for dtype, kind in ((F32, F32), (F64, F64), (F16, F32), (F16, F16), (BF16, BF16)):
            for layout in LAYOUTS.values():
                x = layout(data(shape, dtype, 3.0))
                for per_sample in (False, True):
                    p = op.parameters(shape, kind, rng, per_sample=per_sample, num_groups=3)
                    for left_out in ((), ("weight",), ("bias",), ("weight", "bias")):
                        yield x, {k: v for k, v in p.items() if k not in left_out}
                yield x, p | {"eps": 0.1}
                if "num_groups" in p:
                    yield x, p | {"num_groups": 6 if shape[1] % 6 == 0 else 1}


@contextmanager
def nothing_cached() -> Iterator[None]:
    """No call is answered from the cache."""
    if _core.kernels is not None:
        _core.kernels.set_state(False, runtime.kernel_threads(), runtime.MOST_THREADS)
    try:
        yield
    finally:
        runtime._tell_kernels()


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.backward], ids=named)
def test_a_cached_call_gives_the_same_bits(op: Operation) -> None:
    """The second call of a kind takes a shorter way to the kernels: the numbers are the same."""
    calls = list(kinds_of_call(op))
    first_time = [everything(op, x, p) for x, p in calls]
    second_time = [everything(op, x, p) for x, p in calls]
    with nothing_cached():
        third_time = [everything(op, x, p) for x, p in calls]
    for described, *others in zip(third_time, first_time, second_time, strict=True):
        for other in others:
            for a, b in zip(described, other, strict=True):
                assert_same_bits(a, b)
                assert a.strides == b.strides


@pytest.mark.parametrize("dtype", [F16, BF16], ids=named)
def test_half_precision_weights_are_cached(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls in the model's own type are not described each time, which takes 20 us."""
    x = data((6, 12, 8), dtype)
    w = np.ones(12, dtype)

    def calls() -> None:
        _, mean, rstd = fn.group_norm(x, 3, w, w, return_stats=True)
        fn.group_norm_backward(x, x, mean, rstd, 3, w)

    calls()
    for name in ("Problem", "BackwardProblem"):
        monkeypatch.setattr(execution, name, None)
    calls()
    with pytest.raises(TypeError):
        fn.group_norm(x, 3, w[::-1])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=named)
def test_half_precision_statistics_are_cached(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model in half precision has them; in training, where they move, each is described."""
    rng = np.random.default_rng(0)
    x = data((9, 12, 3, 3), dtype)
    mean, var = rng.standard_normal(12).astype(dtype), (rng.random(12) + 0.5).astype(dtype)

    def calls() -> list[Any]:
        return [
            fn.batch_norm(x, mean, var),
            fn.batch_norm(x, mean.astype(F32), var, eps=0.1),
            fn.batch_norm(x, mean, var.astype(F64)),
            *fn.batch_norm(x, mean, var, return_stats=True),
        ]

    for kind in range(2):
        mean[:] += dtype.type(kind) / 4  # numbers are read by each call
        with nothing_cached():
            described = calls()
        for _ in range(2):
            for found, right in zip(calls(), described, strict=True):
                assert_same_bits(found, right)
    moved = []
    for _ in range(3):
        own = mean.copy(), var.copy()
        fn.batch_norm(x, *own, training=True)
        moved.append(own)
    assert not np.array_equal(moved[0][0], mean)
    for others in moved[1:]:
        for found, right in zip(others, moved[0], strict=True):
            assert_same_bits(found, right)
    monkeypatch.setattr(execution, "Problem", None)
    calls()
    with pytest.raises(TypeError):
        fn.batch_norm(x, mean.copy(), var.copy(), training=True)


def test_further_norms_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = data((4, 6, 8), F32, 1.0), np.ones(8, F32)

    def calls() -> None:
        fn.l2_normalize(x, 1)
        fn.weight_norm(x, w[:4].reshape(4, 1, 1))
        fn.weight_standardize(x)
        fn.dynamic_tanh(x, 0.5, w, w)
        fn.dynamic_tanh(x, np.ones(1, F32), w)
        fn.nn.activate(x, "gelu", w)

    calls()
    monkeypatch.setattr(execution, "Problem", None)
    calls()
    with pytest.raises(TypeError):
        fn.l2_normalize(x, 2)


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
@pytest.mark.parametrize("op", OPERATIONS, ids=named)
def test_options_of_a_cached_call_give_the_same_bits(op: Operation, dtype: Any) -> None:
    """Likewise with a residual, an activation and an array to write into, alone and together."""
    x, residual = (data((3, 12, 5, 6), dtype, 1.0, seed=i) for i in range(2))
    p = op.parameters(x.shape, F64 if dtype == F64 else F32, np.random.default_rng(3))
    options: list[dict[str, Any]] = [{}]
    if "residual" in op.features:
        options += [{"residual": residual}, {"residual": residual.astype(F64)}]
    for activation in ACTIVATIONS if "activation" in op.features else ():
        options += [o | {"activation": activation} for o in options[:3]]

    def calls() -> Iterator[Any]:
        for chosen in options:
            yield call(op, x, p, **chosen)
            if "out" in op.features:
                out = np.empty_like(x)
                assert call(op, x, p, out=out, **chosen) is out
                yield out
                inplace = x.copy()
                call(op, inplace, p, out=inplace, **chosen)
                yield inplace

    results = [list(calls()) for _ in range(2)]
    with nothing_cached():
        results.insert(0, list(calls()))
    for described, *others in zip(*results, strict=True):
        for other in others:
            pairs = zip(described, other) if op.outputs > 1 else [(described, other)]
            for a, b in pairs:
                assert_same_bits(a, b)


def test_a_cached_call_refuses_what_a_description_refuses() -> None:
    """Whatever was called before: a wrong `out`, residual or activation stays an error."""
    x = data((6, 8, 4, 5), F32, 3.0)
    for _ in range(2):
        fn.group_norm(x, 2, residual=x, activation="relu", out=np.empty_like(x))
    fixed = np.empty_like(x)
    fixed.flags.writeable = False
    for wrong in (fixed, np.empty((6, 8, 5, 4), F32), np.empty_like(x, F64)):
        with pytest.raises((ValueError, TypeError), match="out"):
            fn.group_norm(x, 2, residual=x, activation="relu", out=wrong)
    with pytest.raises((ValueError, TypeError), match="residual"):
        fn.group_norm(x, 2, residual=x[:3], activation="relu")
    for unknown in ("selu", 1, b"relu"):
        with pytest.raises((ValueError, TypeError), match="activation"):
            fn.group_norm(x, 2, activation=unknown)  # type: ignore[arg-type]


def test_a_cached_call_minds_overlapping_memory() -> None:
    """The kind of call is known, and yet `out` lies across what is read."""
    memory = data((7, 768), F32, 3.0)
    for _ in range(2):
        fn.layer_norm(memory[1:].copy(), 768, out=np.empty((6, 768), F32))
        fn.layer_norm(
            memory[1:].copy(), 768, residual=memory[1:].copy(), out=np.empty((6, 768), F32)
        )
    for shift in (0, 1):
        work = memory.copy()
        x, out = work[shift : shift + 6], work[1 - shift : 7 - shift]
        right = fn.layer_norm(x.copy(), 768)
        assert_same_bits(fn.layer_norm(x, 768, out=out), right)
        work = memory.copy()
        residual, out = work[shift : shift + 6], work[1 - shift : 7 - shift]
        right = fn.layer_norm(memory[:6], 768, residual=residual.copy())
        assert_same_bits(fn.layer_norm(memory[:6], 768, residual=residual, out=out), right)


def test_only_calls_of_plain_arrays_are_cached() -> None:
    """What a cached call does not foresee is described again, whatever was called before."""
    x = data((6, 8, 4, 5), F32, 3.0)
    w = np.ones(8, np.float32)
    for _ in range(2):
        right = fn.group_norm(x, 2, w)
    assert_same_bits(fn.group_norm(x.astype(">f4"), 2, w).astype("f4"), right)
    assert_same_bits(fn.group_norm(x, 2, w.astype(np.float64)), right)
    assert_same_bits(fn.group_norm(x, np.int64(2), list(w)), right)
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="eps"):
            fn.group_norm(x, 2, w, eps=wrong)
    for groups in (3, 0, 2.0, True, 10**30):
        with pytest.raises((ValueError, TypeError), match="num_groups"):
            fn.group_norm(x, groups, w)
    running = np.zeros(8, np.float32)
    fn.batch_norm(x, running, running.copy(), training=True)
    running.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        fn.batch_norm(x, running, running.copy(), training=True)


@by_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.backward], ids=named)
@on_kernels
def test_results_written_past_the_caches_have_the_same_bits(
    name: str, op: Operation, dtype: Any, layout: str
) -> None:
    """Results larger than the last cache are; here it is told that it holds nothing."""
    fn.set_backend(name)
    shape = (6, 12, 33, 35) if "axis" not in op.label else (3, 70, 33, 35)
    x = LAYOUTS[layout](data(shape, dtype, 3.0))
    kind = F64 if dtype == F64 else F32
    for per_sample in (False, True):
        p = op.parameters(shape, kind, np.random.default_rng(2), per_sample=per_sample)
        usual = everything(op, x, p)
        with non_temporal():
            streamed = everything(op, x, p)
        for a, b in zip(usual, streamed, strict=True):
            assert_same_bits(a, b)


@pytest.mark.each_cpu
@pytest.mark.parametrize("layout", ["along", "each", "none"])
@on_kernels
def test_short_rows_written_past_the_caches_have_the_same_bits(name: str, layout: str) -> None:
    """Where a row begins in its cache line tells which of its numbers are written line by line."""
    fn.set_backend(name)
    rng = np.random.default_rng(5)
    for n in [*range(1, 40), 64, 65, 128, 129, 300]:
        x, residual = rng.normal(0.5, 1.0, (2, 64, n)).astype(np.float32)
        weight, bias = rng.normal(0.5, 1.0, (2, n)).astype(np.float32)
        if layout == "each":
            weight, bias = weight[:1], bias[:1]
        p = () if layout == "none" else (weight, bias)
        whole = np.empty(64 * n + 16, np.float32)
        for begin in (0, 3, 12):
            out = whole[begin : begin + 64 * n].reshape(64, n)
            usual = [
                fn.layer_norm(x, n, *p, out=out).copy(),
                *fn.add_layer_norm(x, residual, n, *p),
                *fn.add_rms_norm(x, residual, n, *p[:1]),
            ]
            with non_temporal():
                past = [
                    fn.layer_norm(x, n, *p, out=out),
                    *fn.add_layer_norm(x, residual, n, *p),
                    *fn.add_rms_norm(x, residual, n, *p[:1]),
                ]
            for a, b in zip(usual, past, strict=True):
                assert_same_bits(a, b)


def test_planes_of_one_group_on_several_threads_have_their_own_weights() -> None:
    """A group's planes are stepped side by side, each with a weight of its own."""
    x, dy = np.random.default_rng(0).normal(size=(2, 1, 2048, 128)).astype(np.float32)
    weight = np.arange(1, 2049, dtype=np.float32)
    _, mean, rstd = fn.group_norm(x, 1, weight, return_stats=True)
    with fn.threads(1):
        expected = fn.group_norm_backward(dy, x, mean, rstd, 1, weight)
    with fn.threads(8):
        for _ in range(1000):
            found = fn.group_norm_backward(dy, x, mean, rstd, 1, weight)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected))


@pytest.mark.skipif(_core.kernels is None, reason="no compiled kernels")
def test_statistics_of_bfloat16_do_not_depend_on_the_stores() -> None:
    """A batch beyond the last cache is written past it; its sums are those of a row alone."""
    for n in (3, 128, 513, 4096, 4097):
        x = data((8, n), BF16, 1.0)
        # weights of 1e37 leave float32's range in the scale
        for norm, weight in itertools.product((fn.layer_norm, fn.rms_norm), (None, 1.0, 1e37)):
            usual = norm(x, n, weight, return_stats=True)
            with non_temporal():
                past = norm(x, n, weight, return_stats=True)
            for a, b in zip(usual, past):
                assert_same_bits(a, b)


@pytest.mark.parametrize("bad", [np.inf, np.finfo(np.float64).max, 1e-300])
def test_a_response_does_not_depend_on_a_sample_out_of_range(bad: float) -> None:
    """Which is rescaled first, in memory of another order."""
    memory = np.random.default_rng(0).normal(size=(17, 5, 14))
    x = memory.T[::2]
    assert x.shape == (7, 5, 17)
    weight, bias = np.linspace(0.5, 1.5, 5), np.zeros(5)
    usual = fn.global_response_norm(x, weight, bias)
    x[3] = np.copysign(bad, x[3])
    found = fn.global_response_norm(x, weight, bias)
    others = [0, 1, 2, 4, 5, 6]
    assert_same_bits(found[others], usual[others])


@pytest.mark.parametrize("places", [(3,), (0, 7), (1, 2, 1024)], ids=str)
@on_kernels
def test_gradients_of_weights_beside_groups_out_of_range(
    name: str, places: tuple[int, ...]
) -> None:
    """Four groups are added up at a time, which one out of range must not shift."""
    x, dy = np.random.default_rng(0).normal(size=(2, 1025, 17)).astype(np.float32)
    for place in places:
        x[place, 5] = np.finfo(np.float32).max
    found = []
    with fn.backend(name):
        _, rstd = fn.rms_norm(x, 17, return_stats=True)
        for threads in (1, 2, 8):
            with fn.threads(threads):
                found.append(fn.rms_norm_backward(dy, x, rstd, 17))
    for gradients in found[1:]:
        for a, b in zip(gradients, found[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(2, 64, 3, 3), (2, 64, 7, 7), (8, 960, 4, 4), (2, 64, 8, 8)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
def test_short_planes_between_which_samples_lie(dtype: Any, shape: tuple[int, ...]) -> None:
    """A group's planes apart: whatever else lies in another order, the sums are taken in one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(dtype).swapaxes(0, 1).copy().swapaxes(0, 1)
    bias = rng.standard_normal(shape[:2]).astype(dtype)
    out = np.empty(shape, dtype)
    assert_same_bits(fn.group_norm(x, 32, bias=bias, out=out), fn.group_norm(x, 32, bias=bias))
    one = rng.standard_normal((1, *shape[1:])).astype(dtype)
    every = np.broadcast_to(one, shape)
    y = fn.group_norm(x, 32, residual=every)
    assert_same_bits(y[:1], fn.group_norm(x[:1], 32, residual=one))
    _, *stats = fn.group_norm(x, 32, return_stats=True)
    dx = fn.group_norm_backward(every, x, *stats, 32)[0]
    alone = fn.group_norm_backward(one, x[:1], *[s[:1] for s in stats], 32)[0]
    assert_same_bits(dx[:1], alone)


def stored(a: Any, order: Sequence[int]) -> Any:
    """A copy whose axes lie in memory in this order."""
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


def with_gaps(a: Any, axis: int) -> Any:
    """A copy whose axes lie in memory as those of `a`, with a gap behind one of them."""
    order = np.argsort([-stride for stride in a.strides])
    sizes = [a.shape[i] + (i == axis) for i in order]
    whole = np.empty(sizes, a.dtype).transpose(np.argsort(order))
    part = whole[tuple(slice(0, n) for n in a.shape)]
    part[...] = a
    return part


def parts_of(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("shape", [(4, 24, 3, 3), (3, 48, 7, 7), (5, 16, 2, 1), (2, 320, 4, 4)])
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
@on_kernels
def test_short_planes_that_follow_one_another(
    name: str, dtype: Any, shape: tuple[int, ...]
) -> None:
    """They are walked along, whatever else lies in another order, and for any samples."""
    rng = np.random.default_rng(0)
    x, added, dy = rng.standard_normal((3, *shape)).astype(dtype)
    wide = F64 if dtype == F64 else F32
    w, b = (1 + rng.standard_normal((2, shape[1])) / 4).astype(wide)
    own = (1 + rng.standard_normal(shape[:2]) / 4).astype(wide)
    mask = rng.random(shape) < 0.7
    mask[:, :, 0] = True

    def forward(s: slice = slice(None), x: Any = x, weight: Any = w, **more: Any) -> Any:
        return fn.group_norm(x[s], 8, weight, b, return_stats=True, **more)

    def same(found: Any, right: Any, s: slice = slice(None)) -> None:
        for one, other in zip(parts_of(found), parts_of(right), strict=True):
            assert_same_bits(one, other[s])

    with fn.backend(name):
        plain, summed, masked = forward(), forward(residual=added), forward(where=mask)
        mean, rstd = plain[1:]

        def backward(dy: Any, s: slice = slice(None), x: Any = x, weight: Any = w) -> Any:
            return fn.group_norm_backward(dy, x[s], mean[s], rstd[s], 8, weight)

        gradients, of_own = backward(dy), backward(dy, weight=own)
        for order in [(1, 0, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (0, 1, 3, 2)]:
            out = stored(np.empty(shape, dtype), order)
            same(forward(out=out), plain)
            same(forward(residual=stored(added, order)), summed)
            same(forward(where=stored(mask, order)), masked)
            same(backward(stored(dy, order)), gradients)
            same(fn.add_layer_norm(x, stored(added, order), shape[1:], w[:, None, None]),
                 fn.add_layer_norm(x, added, shape[1:], w[:, None, None]))  # fmt: skip
        for axis in range(4):
            part = np.broadcast_to(dy.take([0], axis), shape)
            same(backward(part), backward(part.copy()))
            same(forward(residual=part), forward(residual=part.copy()))
        for i in range(len(x)):
            s = slice(i, i + 1)
            for alone in (x, x.copy()):
                same(forward(s, alone), plain, s)
                same(forward(s, alone, residual=added[s]), summed, s)
                same(forward(s, alone, weight=own[s]), forward(weight=own), s)
                assert_same_bits(backward(dy[s], s, alone)[0], gradients[0][s])
                assert_same_bits(backward(dy[s], s, alone, own[s])[0], of_own[0][s])


SHORT_PLANES = [(6, 128, 4, 4), (3, 64, 7, 7), (9, 8, 2, 3), (2, 40, 9, 7), (130, 24, 3, 4)]


@pytest.mark.parametrize("shape", SHORT_PLANES)
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
@on_kernels
def test_short_planes_of_a_batch(name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    """Batch norm: whether they are walked along follows from x, however all else lies."""
    rng = np.random.default_rng(0)
    x, added, dy = rng.standard_normal((3, *shape)).astype(dtype)
    w = (1 + rng.standard_normal(shape[1]) / 4).astype(F64 if dtype == F64 else F32)
    mask = dy.astype(F64) < 1

    def forward(weight: Any = w, x: Any = x, **more: Any) -> Any:
        return fn.batch_norm(x, None, None, weight, w, True, return_stats=True, **more)

    def same(found: Any, right: Any) -> None:
        for one, other in zip(found, right, strict=True):
            assert_same_bits(one, other)

    with fn.backend(name):
        plain, summed, masked = forward(), forward(residual=added), forward(where=mask)
        same(forward(w.repeat(2)[::2]), plain)
        same(forward(x=(there := x.copy()), out=there), plain)

        def backward(dy: Any) -> Any:
            return fn.batch_norm_backward(dy, x, *plain[1:], w)

        gradients = backward(dy)
        for order in [(1, 0, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (0, 1, 3, 2)]:
            same(forward(out=stored(np.empty(shape, dtype), order)), plain)
            same(forward(residual=stored(added, order)), summed)
            same(forward(where=stored(mask, order)), masked)
            same(backward(stored(dy, order)), gradients)
        gaps = np.zeros((shape[0], 2 * shape[1], shape[2] + 1, shape[3]), dtype)[:, ::2, 1:]
        gaps[...] = dy
        same(backward(gaps), gradients)
        for axis in range(4):
            part = np.broadcast_to(dy.take([0], axis), shape)
            same(backward(part), backward(part.copy()))
            same(forward(residual=with_gaps(added, axis)), summed)
            same(forward(where=with_gaps(mask, axis)), masked)
        with fn.threads(2):
            same((*forward(), *backward(dy)), (*plain, *gradients))
            same(forward(residual=added), summed)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
@on_kernels
def test_how_a_mask_or_a_residual_lies(name: str, dtype: Any, order: tuple[int, ...]) -> None:
    """Gaps in them, in whatever order x lies, decide no bit."""
    rng = np.random.default_rng(0)
    x, added = (stored(rng.standard_normal((9, 24, 5, 7)).astype(dtype) + 1, order) for _ in "xr")
    mask = stored(rng.random(x.shape) < 0.9, order)
    norms: list[Callable[..., Any]] = [
        lambda **more: fn.batch_norm(x, training=True, return_stats=True, **more),
        lambda **more: fn.group_norm(x, 4, return_stats=True, **more),
        lambda **more: fn.instance_norm(x, return_stats=True, **more),
        lambda **more: fn.layer_norm(x, (24, 5, 7), return_stats=True, **more),
    ]
    with fn.backend(name):
        for norm, axis in itertools.product(norms, range(4)):
            for what, array in (("residual", added), ("where", mask)):
                own = norm(**{what: array})
                out = with_gaps(np.empty_like(x), axis)
                for gaps in ({}, {"out": out}, {"out": stored(out, (1, 2, 0, 3))}):
                    found = norm(**{what: with_gaps(array, axis)}, **gaps)
                    for one, right in zip(found, own, strict=True):
                        assert_same_bits(one, right)


@on_kernels
def test_a_broadcast_mask_and_a_result_with_gaps(name: str) -> None:
    """Neither alone decides a bit, nor do both: planes of seven, of which masks leave some out."""
    x = np.random.default_rng(0).standard_normal((3, 64, 7, 7))
    masks = [np.arange(7).reshape(1, 1, 7, 1) % 3 > 0, np.arange(3).reshape(3, 1, 1, 1) < 2]
    with fn.backend(name):
        for mask in masks:
            right = fn.batch_norm(x, training=True, where=mask, return_stats=True)
            for axis in range(4):
                out = with_gaps(np.empty_like(x), axis)
                found = fn.batch_norm(x, training=True, where=mask, out=out, return_stats=True)
                for one, other in zip(found, right, strict=True):
                    assert_same_bits(one, other)


@pytest.mark.parametrize("kind", [F16, F32, F64], ids=named)
@on_kernels
def test_dy_in_another_order_than_an_x_with_gaps(name: str, kind: Any) -> None:
    """Both can be walked together, but in another order than if dy lay as x does."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 3, 6, 16)).astype(kind)[:, :, :5].swapaxes(0, 1)
    dy = rng.standard_normal(x.shape).astype(kind)
    with fn.backend(name):
        _, *stats = fn.batch_norm(x, training=True, return_stats=True)
        right = fn.batch_norm_backward(dy, x, *stats)
        for order in itertools.permutations(range(4)):
            found = fn.batch_norm_backward(stored(dy, order), x, *stats)
            for one, other in zip(found, right, strict=True):
                assert_same_bits(one, other)


@on_kernels
def test_dy_makes_no_planes_of_a_run(name: str) -> None:
    """Gradients are summed plane by plane where weights differ, not where dy has gaps."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 9, 7))
    dy = rng.standard_normal((3, 5, 18, 7))[:, :, ::2]
    with fn.backend(name):
        _, *stats = fn.instance_norm(x, return_stats=True)
        found, right = (fn.instance_norm_backward(d, x, *stats) for d in (dy, dy.copy()))
    for one, other in zip(found, right, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("kind", ["i4", ">f4", ">f8"])
@pytest.mark.parametrize("order", [(1, 0, 2, 3), (1, 2, 0, 3)], ids=str)
@on_kernels
def test_a_sample_between_others_is_copied(name: str, order: Sequence[int], kind: str) -> None:
    """Of integers and foreign bytes: its copy, too, is walked as the batch is."""
    rng = np.random.default_rng(0)
    x = stored((rng.standard_normal((5, 96, 5, 7)) * 100).astype(kind), order)
    w = rng.standard_normal(96)
    mask = rng.random(x.shape) < 0.7
    with fn.backend(name):
        for weight in (w, None):
            y = fn.group_norm(x, 8, weight, return_stats=True)
            for i in (0, 2):
                s = slice(i, i + 1)
                for one, whole in zip(fn.group_norm(x[s], 8, weight, return_stats=True), y):
                    assert_same_bits(one, whole[s])
        for where in (None, mask):
            moments = fn.moments(x.astype(x.dtype.newbyteorder("=")), (2, 3), where=where)
            for i in (0, 2):
                s = slice(i, i + 1)
                one = x.astype(x.dtype.newbyteorder("="))[s]
                own = fn.moments(one, (2, 3), where=None if where is None else where[s])
                for found, whole in zip(own, moments):
                    assert_same_bits(found, whole[s])


@on_kernels
def test_one_sample_is_added_to_as_it_lies(name: str) -> None:
    """Its axis of length 1 has a place between others, but not the step of a batch."""
    rng = np.random.default_rng(0)
    x, added = rng.standard_normal((2, 1, 20, 3, 21))
    x, w = stored(x, (1, 3, 0, 2)), rng.standard_normal((20, 1, 1))
    with fn.backend(name):
        right = fn.add_layer_norm(x, stored(added, (1, 3, 0, 2)), x.shape[1:], w)
        for found, other in zip(fn.add_layer_norm(x, added, x.shape[1:], w), right, strict=True):
            assert_same_bits(found, other)
