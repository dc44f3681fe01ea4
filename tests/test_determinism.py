"""The same bits for any number of threads, any batch around a row, and any door to one kernel."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .helpers import F32, F64, assert_same_bits, call, channels_last, data, named
from .operations import OPERATIONS, Operation

LAYOUTS = {"channels-first": np.ascontiguousarray, "channels-last": channels_last}

# 1.2 MB and more each: above what runs serially. Many small groups, few large ones, one alone.
SHAPES = [(16, 64, 24, 24), (3, 4, 320, 321), (1, 4, 400, 401), (5000, 64)]

by_operation = pytest.mark.parametrize("op", OPERATIONS, ids=named)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


@by_layout
@by_operation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads(shape: tuple[int, ...], op: Operation, layout: str) -> None:
    if op.name == "instance_norm" and len(shape) == 2:
        shape = (*shape, 2)  # one position has no unbiased variance
    x = LAYOUTS[layout](data(shape, F32, 3.0))
    p = op.parameters(shape, F32, np.random.default_rng(0))
    with fn.threads(1):
        serial = first(call(op, x, p))
    for threads in (2, 3, 8):
        with fn.threads(threads):
            assert_same_bits(first(call(op, x, p)), serial)


@by_layout
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if 0 not in op.linked(4, 1)], ids=named)
def test_a_sample_alone_and_in_a_batch(op: Operation, dtype: Any, layout: str) -> None:
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


def test_a_huge_neighbour_changes_nothing() -> None:
    """Columns side by side: one beyond float32's range is redone in float64, the others are not."""
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
        # the weight of a layer norm runs along the row; on channels-last memory that is another
        # walk, whose sums are in another order
        full = (
            (np.broadcast_to(v[:, None, None], x.shape[1:]).copy() for v in (w, b))
            if affine
            else (None, None)
        )
        assert_same_bits(fn.group_norm(x, 1, w, b), fn.layer_norm(x, x.shape[1:], *full))


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
def test_a_forked_child_of_a_threaded_process() -> None:
    x = data((512, 1000), F32, 3.0)
    with fn.threads(2):
        right = fn.layer_norm(x, 1000)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x))
    child.start()
    try:
        threads, y = queue.get(timeout=60)
    finally:
        child.terminate()
        child.join()
    assert threads == 1
    assert_same_bits(y, right)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("size", [2, 3, 64, 768, 5000])
def test_the_lean_door_gives_the_same_bits(size: int, dtype: str) -> None:
    """Plain rows take a shorter way to the kernel; asking for statistics takes the long one."""
    x, w = data((300, size), dtype, 3.0), data((2, size), "f8" if dtype == "f8" else "f4")
    for weight, bias in ((None, None), (w[0], None), (None, w[1]), (w[0], w[1])):
        right = fn.layer_norm(x, size, weight, bias, return_stats=True)[0]
        assert_same_bits(fn.layer_norm(x, size, weight, bias), right)
        assert_same_bits(fn.layer_norm(x, (size,), weight, bias), right)
        right = fn.rms_norm(x, size, weight, 1e-6, return_stats=True)[0]
        assert_same_bits(fn.rms_norm(x, size, weight, 1e-6), right)
