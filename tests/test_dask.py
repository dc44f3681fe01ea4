"""Dask arrays: lazy, right for any chunks, chunk by chunk where that can be, beyond memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm.operations import OPERATIONS, Operation

from .helpers import BF16, F16, F32, F64, Array, assert_close, call, data, expected, named

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

by_operation = pytest.mark.parametrize("op", OPERATIONS, ids=named)

SHAPE = (6, 8, 5, 7)
# Groups whole in a chunk, channels cut through groups, and everything in pieces.
CHUNKS = {
    "samples": (2, 8, 5, 7),
    "channels": (6, 3, 5, 7),
    "positions": (6, 8, 2, 3),
    "all": (4, 3, 2, 2),
}
by_chunks = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Chunks one after the other: what is compared are numbers."""

    with dask.config.set(scheduler="synchronous"):
        yield


def outputs(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def lazily(op: Operation, x: Array, p: dict[str, Any], chunks: Any, **options: Any) -> list[Array]:
    """What the operation answers for x in chunks; running statistics are in Dask arrays."""
    given = {
        k: da.from_array(v.copy()) if k.startswith("running") and p.get("training", True) else v
        for k, v in p.items()
    }
    found = outputs(getattr(fn, op.name)(da.from_array(x, chunks=chunks), **given, **options))
    assert all(isinstance(y, da.Array) for y in found)
    computed = [y.compute() for y in found]
    for lazy, real in zip(found, computed):
        assert lazy.shape == real.shape
        assert lazy.dtype == real.dtype
    return computed


def size_of(op: Operation, exact: Any) -> float:
    return float(max(1.0, abs(np.asarray(exact, np.float64)).max()))


@by_operation
@by_chunks
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
def test_same_as_numpy(op: Operation, chunks: Any, dtype: Any) -> None:
    x = data(SHAPE, dtype, 3.0)
    p = op.parameters(x.shape, dtype, np.random.default_rng(0))
    exact = outputs(expected(op, x, p))
    found = lazily(op, x, p, chunks)
    assert len(found) == len(exact)
    for y, right in zip(found, exact):
        # a handful of roundings, of numbers up to the largest of the result
        assert_close(y, right, size_of(op, right))


@by_operation
@by_chunks
def test_options(op: Operation, chunks: Any) -> None:
    rng = np.random.default_rng(1)
    x = data(SHAPE, F32, 1.0)
    p = op.parameters(x.shape, F32, rng, per_sample="per_sample" in op.features)
    options: dict[str, Any] = {}
    if "where" in op.features:
        options["where"] = rng.random(SHAPE) < 0.8
    if "residual" in op.features:
        options["residual"] = rng.standard_normal(SHAPE).astype(F32)
    if "activation" in op.features:
        options["activation"] = "silu"
    if op.stats:
        options["return_stats"] = True
    exact = outputs(expected(op, x, p, **options))
    lazy = options | {
        k: da.from_array(options[k], chunks=(3, 3, 3, 3))
        for k in ("where", "residual")
        if k in options
    }
    for found in (lazily(op, x, p, chunks, **options), lazily(op, x, p, chunks, **lazy)):
        assert len(found) == len(exact)
        for y, right in zip(found, exact):
            assert_close(y, right, size_of(op, right))


@pytest.mark.parametrize(
    "op", [op for op in OPERATIONS if "channel_axis" in op.features], ids=named
)
@by_chunks
def test_channels_last(op: Operation, chunks: Any) -> None:
    x = data((6, 5, 7, 8), F32, 1.0)
    p = op.parameters(x.shape, F32, np.random.default_rng(0), channel_axis=-1)
    n, c, h, w = chunks
    for y, right in zip(lazily(op, x, p, (n, h, w, c)), outputs(expected(op, x, p))):
        assert_close(y, right, size_of(op, right))


@pytest.mark.parametrize("dtype", [F16, BF16, np.dtype("u1"), np.dtype("i8")], ids=named)
def test_other_dtypes(dtype: Any) -> None:
    x = np.random.default_rng(0).integers(0, 100, (12, 6)).astype(dtype)
    for chunks in ((3, 6), (12, 2)):
        lazy = da.from_array(x, chunks=chunks)
        y = fn.layer_norm(lazy, 6)
        right = fn.layer_norm(x, 6)
        assert y.dtype == right.dtype == y.compute().dtype
        assert_close(y.compute(), right.astype(np.longdouble), 4.0)
        for found, same in zip(fn.moments(lazy, 0), fn.moments(x, 0)):
            np.testing.assert_allclose(found.compute(), same, rtol=1e-14)


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.backward], ids=named)
@pytest.mark.parametrize("weighted", [True, False])
@by_chunks
def test_gradients(op: Operation, weighted: bool, chunks: Any) -> None:
    rng = np.random.default_rng(2)
    x, dy = data(SHAPE, F64, 1.0), rng.standard_normal(SHAPE)
    p = op.parameters(x.shape, F64, rng)
    if not weighted:
        p.pop("weight")
    _, *stats = call(op, x, p, return_stats=True)
    keywords = {k: p[k] for k in op.backward_keywords if k in p}
    exact = getattr(fn, op.backward or "")(dy, x, *stats, **keywords)
    where = rng.random(SHAPE) < 0.7
    where[:, :, :2] = where[..., :2] = True  # of every group two
    _, *some = call(op, x, p | {"where": where}, return_stats=True)
    of_some = getattr(fn, op.backward or "")(dy, x, *some, **keywords, where=where)
    lazy, masks = da.from_array(x, chunks=chunks), da.from_array(where, chunks=3)
    hidden = da.from_array(np.ma.array(x, mask=~where), chunks=chunks)
    for slope, given, stats_of, options, right_ones in (
        (dy, lazy, stats, {}, exact),
        (da.from_array(dy, chunks=3), lazy, stats, {}, exact),
        (dy, lazy, some, {"where": masks}, of_some),
        (dy, hidden, some, {}, of_some),
    ):
        found = getattr(fn, op.backward or "")(slope, given, *stats_of, **keywords, **options)
        for y, right in zip(found, right_ones, strict=True):
            assert isinstance(y, da.Array)
            assert (y.shape, y.dtype) == (right.shape, right.dtype)
            # sums of up to 210 terms, in another order
            np.testing.assert_allclose(y.compute(), right, rtol=0, atol=1e-12 * x.size)


# --- Statistics -----------------------------------------------------------------------------------


@by_chunks
@pytest.mark.parametrize("axis", [None, 0, (0, 2, 3), (1,), -1], ids=str)
def test_moments(chunks: Any, axis: Any) -> None:
    x = data(SHAPE, F32, 1e3)
    where = np.random.default_rng(0).random(SHAPE) < 0.7
    lazy = da.from_array(x, chunks=chunks)
    for options in ({}, {"ddof": 1, "keepdims": True}, {"where": where}):
        exact = fn.moments(x, axis, **options)
        for found, right in zip(fn.moments(lazy, axis, **options), exact, strict=True):
            assert isinstance(found, da.Array)
            assert found.shape == right.shape == found.compute().shape
            np.testing.assert_allclose(found.compute(), right, rtol=1e-14)
    m = fn.Moments(axis).update(lazy, where)
    np.testing.assert_allclose(m.mean, fn.moments(x, axis, where=where)[0], rtol=1e-14)
    y = fn.standardize(lazy, axis, ddof=1, eps=0.1)
    assert_close(y.compute(), fn.standardize(x.astype(F64), axis, ddof=1, eps=0.1), 4.0)


def test_statistics_do_not_depend_on_the_chunks() -> None:
    x = data((300, 40), F32, 1e4)
    exact = x.astype(np.longdouble).var(0)
    for chunks in ((1, 40), (7, 3), (299, 40), (300, 40)):
        _, var = fn.moments(da.from_array(x, chunks=chunks), 0)
        assert (abs(var.compute() - exact) <= 1e-14 * exact).all()


def test_running_statistics_are_updated_lazily() -> None:
    x = data(SHAPE, F64, 2.0)
    for name, flag in (("batch_norm", {"training": True}), ("instance_norm", {})):
        right = [np.zeros(8), np.ones(8)]
        getattr(fn, name)(x, *right, momentum=0.3, **flag)
        running = [da.zeros(8), da.ones(8)]
        getattr(fn, name)(da.from_array(x, chunks=3), *running, momentum=0.3, **flag)
        for found, same in zip(running, right):
            np.testing.assert_allclose(found.compute(), same, rtol=1e-13)
        before = da.zeros(8)
        with pytest.raises(TypeError, match=r"write da\.from_array\(running_var\)"):
            getattr(fn, name)(da.from_array(x, chunks=3), before, np.ones(8), **flag)
        assert (before.compute() == 0).all()


def test_running_statistics_of_what_a_mask_leaves() -> None:
    """A channel, or a sample's, of which nothing is left moves nothing, as for NumPy."""
    x = data(SHAPE, F64, 2.0)
    where = np.ones(SHAPE, bool)
    where[:, 2], where[1, 3] = False, False
    for name, flag in (("batch_norm", {"training": True}), ("instance_norm", {})):
        right = [np.zeros(8), np.ones(8)]
        getattr(fn, name)(x, *right, where=where, **flag)
        running = [da.zeros(8), da.ones(8)]
        getattr(fn, name)(da.from_array(x, chunks=3), *running, where=where, **flag)
        for found, same in zip(running, right):
            np.testing.assert_allclose(found.compute(), same, rtol=1e-13)


def test_results_are_in_this_machines_byte_order() -> None:
    """As the metadata says, whatever the order of x."""
    for kind in (">f4", "<f4", ">f8"):
        x = data((6, 8), F64).astype(kind)
        for chunks in ((2, 8), (3, 3)):
            lazy = da.from_array(x, chunks=chunks)
            for y in (
                fn.layer_norm(lazy, 8),
                fn.standardize(lazy),
                fn.local_response_norm(lazy, 3),
            ):
                assert y.dtype.isnative
                assert y.compute().dtype == y.dtype
                assert y.compute().dtype.isnative


@pytest.mark.parametrize("chunks", [6, 2])
def test_masked_chunks(chunks: int) -> None:
    """The mask of an array of np.ma is a where, chunk by chunk."""
    x = np.array([1.0, 2, -9999, 4, 5, 6])
    masked = da.ma.masked_equal(da.from_array(x, chunks=chunks), -9999)
    where = x != -9999
    for found, right in zip(fn.moments(masked), fn.moments(x, where=where)):
        np.testing.assert_allclose(found.compute(), right, rtol=1e-15)
    assert fn.Moments().update(masked).mean == 3.6
    y = fn.standardize(masked, ddof=1).compute()
    np.testing.assert_allclose(y, fn.standardize(x, where=where, ddof=1), rtol=1e-15)


# --- Laziness, and what is read how often ---------------------------------------------------------


def counted(shape: tuple[int, ...], chunks: tuple[int, ...], reads: list[Any]) -> Any:
    """An array whose chunks are made when they are computed, and counted."""

    def make(block_info: Any = None) -> Array:
        place = block_info[None]["chunk-location"]
        reads.append(place)
        return data(block_info[None]["chunk-shape"], F32, 1.0, seed=hash(place) % 1000)

    return da.map_blocks(
        make,
        chunks=da.core.normalize_chunks(chunks, shape),
        dtype=F32,
        meta=np.empty((0,) * len(shape), F32),
    )


@by_operation
def test_nothing_is_read_before_it_is_asked_for(op: Operation) -> None:
    reads: list[Any] = []
    for chunks in CHUNKS.values():
        x = counted(SHAPE, chunks, reads)
        p = op.parameters(SHAPE, F32, np.random.default_rng(0))
        given = {k: da.from_array(v) if k.startswith("running") else v for k, v in p.items()}
        getattr(fn, op.name)(x, **given)
    assert reads == []


@pytest.mark.parametrize(
    ("chunks", "times"), [((20, 8, 5, 7), 2), ((10, 8, 5, 7), 1)], ids=["many", "few"]
)
def test_batch_norm_reads_each_chunk_at_most_twice(chunks: Any, times: int) -> None:
    samples = 20 * chunks[0] if times == 2 else 2 * chunks[0]
    reads: list[Any] = []
    y = fn.batch_norm(counted((samples, 8, 5, 7), chunks, reads), training=True)
    y.sum().compute()
    assert len(reads) == times * y.npartitions
    assert {reads.count(place) for place in reads} == {times}


def test_batch_norm_keeps_no_chunk() -> None:
    """With many chunks, the second reads begin when the statistics are complete."""
    reads: list[Any] = []
    y = fn.batch_norm(counted((300, 4), (10, 4), reads), training=True)
    y.sum(axis=1).compute()
    assert sorted(reads[:30]) == sorted(reads[30:])
    assert len(set(reads[:30])) == 30


@pytest.mark.parametrize("name", ["layer_norm", "instance_norm", "group_norm", "rms_norm"])
def test_whole_groups_stay_in_their_chunks(name: str) -> None:
    """One task for each chunk: no chunk depends on another."""
    x = da.ones((12, 8, 5, 7), chunks=(2, 8, 5, 7), dtype=F32)
    arguments = {"layer_norm": [(8, 5, 7)], "rms_norm": [(8, 5, 7)], "group_norm": [4]}
    y = getattr(fn, name)(x, *arguments.get(name, []))
    assert y.chunks == x.chunks
    graph = dict(y.__dask_graph__())
    assert len(graph) == 2 * 6
    one = dask.optimize(y[:2])[0]
    assert len(dict(one.__dask_graph__())) <= 3


# --- What cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATIONS, ids=named)
def test_masked_chunks_in_every_operation(op: Operation) -> None:
    """As NumPy's masked arrays, in chunks that hold their groups whole and in those that do not."""
    x = np.random.default_rng(0).standard_normal((6, 8, 5, 7))
    masked = np.ma.array(x, mask=np.random.default_rng(1).random(x.shape) < 0.2)
    p = op.parameters(x.shape, F64, np.random.default_rng(0))
    right = [np.asarray(part) for part in outputs(call(op, masked, p))]
    for chunks in ((6, 8, 5, 7), (2, 4, 5, 7), (2, 2, 2, 7)):
        found = lazily(op, masked, p, chunks)
        for y, own in zip(found, right, strict=True):
            assert not isinstance(y, np.ma.MaskedArray)
            np.testing.assert_allclose(y, own, rtol=1e-10, atol=1e-12)


def test_masked_operands_are_refused_or_hide() -> None:
    """What a mask hides in another operand than x is no data; a mask of `where` is False."""
    v, seen = np.random.default_rng(0).standard_normal((2, 4, 6, 5))
    x, where = da.from_array(v, chunks=(2, 6, 5)), np.ma.array(v > 0, mask=seen > 1)
    hides, five = np.ma.array(v, mask=seen > 1), np.ma.masked_equal([1.0, 2, 3, 4, 5], 4)
    _, mean, rstd = fn.layer_norm(v, 5, return_stats=True)
    hidden = np.ma.masked_greater(mean, 0)
    for own in (lambda a: a, lambda a: da.from_array(a, chunks=a.shape)):
        calls = (
            lambda own=own: fn.layer_norm(x, 5, own(five)),
            lambda own=own: fn.rms_norm(x, 5, own(five), weight_offset=1.0),
            lambda own=own: fn.layer_norm(x, 5, residual=own(hides)),
            lambda own=own: fn.add_layer_norm(x, own(hides), 5)[1],
            lambda own=own: fn.layer_norm_backward(own(hides), x, mean, rstd, 5)[0],
            lambda own=own: fn.layer_norm_backward(v, x, own(hidden), rstd, 5)[0],
            lambda own=own: fn.layer_norm_backward(v, x, mean, rstd, 5, own(five))[0],
        )
        for refused in calls:
            with pytest.raises(ValueError, match="masked array that hides"):
                refused().compute()
        for lazy, right in (
            (fn.layer_norm(x, 5, where=own(where)), fn.layer_norm(v, 5, where=where)),
            (fn.moments(x, where=own(where))[1], fn.moments(v, where=where)[1]),
        ):
            np.testing.assert_allclose(lazy.compute(), right, rtol=1e-12)


def test_unknown_chunks_are_refused_at_once() -> None:
    v = np.random.default_rng(0).standard_normal((4, 6, 5))
    lazy = da.from_array(v, chunks=(2, 3, 5))
    unknown = [
        da.map_blocks(lambda block: block, lazy, chunks=chunks, dtype=float)
        for chunks in (((np.nan, np.nan), (3, 3), (5,)), ((2, 2), (np.nan, np.nan), (5,)))
    ]
    w = np.ones(6)
    _, mean, rstd = fn.instance_norm(v, return_stats=True)
    for x in unknown:
        for call_ in (
            lambda x=x: fn.local_response_norm(x, 3),
            lambda x=x: fn.group_norm(x, 2),
            lambda x=x: fn.batch_norm(x, w, w),
            lambda x=x: fn.batch_norm(x, training=True),
            lambda x=x: fn.instance_norm(x),
            lambda x=x: fn.global_response_norm(x, w, w),
            lambda x=x: fn.layer_norm(x, 5),
            lambda x=x: fn.add_rms_norm(x, v, 5),
            lambda x=x: fn.instance_norm_backward(v, x, mean, rstd),
            lambda x=x: fn.rms_norm_backward(v, x, rstd[..., None], 5),
        ):
            with pytest.raises(ValueError, match="compute_chunk_sizes"):
                call_()


def test_a_response_of_more_channels_than_there_are() -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 3))
    y = fn.local_response_norm(da.from_array(x, chunks=(1, 2, 3)), 101).compute()
    np.testing.assert_array_equal(y, fn.local_response_norm(x, 101))


def test_errors_come_at_once() -> None:
    x = da.ones((4, 6, 5), chunks=2)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: fn.layer_norm(x, 6), ValueError, "normalized_shape=6"),
        (lambda: fn.group_norm(x, 4), ValueError, "does not divide"),
        (lambda: fn.batch_norm(x), ValueError, "without running_mean"),
        (
            lambda: fn.batch_norm(x, weight=np.ones(5), training=True),
            ValueError,
            "weight has shape",
        ),
        (lambda: fn.layer_norm(x, 5, out=np.empty(3)), TypeError, "lazy"),
        (lambda: fn.layer_norm(x, 5, eps=-1), ValueError, "eps"),
        (lambda: fn.layer_norm(x, 5, da.ones(5, dtype=complex)), TypeError, "weight has dtype"),
        (lambda: fn.layer_norm(x, 5, residual=x.astype(complex)), TypeError, "residual has dtype"),
        (lambda: fn.layer_norm(x, 5, activation="tahn"), ValueError, "activation"),
        (lambda: fn.layer_norm(x, 5, where=np.ones(4)), TypeError, "where has dtype"),
        (lambda: fn.instance_norm(x, residual=np.ones(3)), ValueError, "residual has shape"),
        (lambda: fn.layer_norm(x.astype(complex), 5), TypeError, "complex"),
        (lambda: fn.moments(x.astype(complex)), TypeError, "complex"),
        (lambda: fn.moments(x, 7), ValueError, "axis=7"),
        (lambda: fn.layer_norm(x[x[:, 0, 0] > 0], 5), ValueError, "unknown sizes"),
    ]
    for make, kind, message in wrong:
        with pytest.raises(kind, match=message):
            make()


def test_dask_is_not_imported_for_numpy() -> None:
    program = """
import sys, numpy as np, fastnorm as fn
fn.layer_norm(np.ones((2, 3)), 3); fn.moments(np.ones(3)); fn.Moments().update([1, 2])
print([name for name in sys.modules if name.split(".")[0] in ("dask", "mpi4py", "PIL")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- A cluster ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_dies_and_the_answer_is_right() -> None:
    """Two worker processes; one is killed while moments and batch_norm run."""
    distributed = pytest.importorskip("distributed")
    import os
    import signal
    import threading

    shape = (64 * 40, 32, 8, 8)

    def make(block_info: Any = None) -> Array:
        import time

        time.sleep(0.05)
        rng = np.random.default_rng(block_info[None]["chunk-location"][0])
        return rng.normal(100.0, 2.0, block_info[None]["chunk-shape"]).astype(np.float32)

    x = da.map_blocks(
        make,
        chunks=da.core.normalize_chunks((64, 32, 8, 8), shape),
        dtype=F32,
        meta=np.empty((0,) * 4, F32),
    )
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "512MiB"}
    with (
        dask.config.set(scheduler="distributed"),
        distributed.LocalCluster(dashboard_address=None, silence_logs=50, **options) as cluster,
        distributed.Client(cluster) as client,
    ):
        y = fn.batch_norm(x, training=True)
        mean, var = fn.moments(x, (0, 2, 3))
        futures = client.compute(
            [mean, var, abs(y.astype(F64).mean((0, 2, 3))).max(), (y.astype(F64) ** 2).mean()]
        )
        victim = next(iter(client.run(os.getpid).values()))
        kill = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one way to end a process
        threading.Timer(0.7, os.kill, (victim, kill)).start()
        mean, var, largest, square = client.gather(futures)
        assert victim not in client.run(os.getpid).values(), "it was to be killed"
    whole = x.compute(scheduler="threads").astype(F64)
    np.testing.assert_allclose(mean, whole.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(var, whole.var((0, 2, 3)), rtol=1e-12)
    # float32 results: half a unit each, of numbers up to 5, all in one direction at the worst
    assert largest < 5 * 2.0**-24
    assert abs(square - 1) < 1e-5
