"""Nothing outside an array is read or written by Numba's kernels, whatever lies in it and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .helpers import (
    F16,
    F32,
    F64,
    Array,
    assert_fence,
    assert_same_bits,
    data,
    guarded,
    guarded_copy,
    named,
    run_python,
)


@pytest.fixture(autouse=True)
def numba() -> Iterator[None]:
    with fn.backend("numba"):
        yield


# --- Strides --------------------------------------------------------------------------------------

# A group's planes follow one another in x and not in what is written, or the other way round.
WALKS: dict[str, Callable[[Array, Array | None], Any]] = {
    "instance": lambda x, out: fn.instance_norm(x, out=out),
    "group": lambda x, out: fn.group_norm(x, 2, out=out),
    "layer": lambda x, out: fn.layer_norm(x, axis=(1, 2, 3), out=out),
    "rms": lambda x, out: fn.rms_norm(x, axis=(2, 3), eps=1e-5, out=out),
    "inference": lambda x, out: fn.batch_norm(x, np.full(4, 0.5), np.full(4, 2.0), out=out),
}


def turned(x: Array) -> Iterator[tuple[str, Array]]:
    """Views of x that have its shape and lie in memory of their own, fenced."""
    for side in ("before", "after"):
        for axis in range(x.ndim):
            turn = tuple(slice(None, None, -1 if a == axis else 1) for a in range(x.ndim))
            yield f"axis {axis} reversed, {side}", guarded(x.shape, x.dtype, side)[turn]
            padded = guarded([n + 3 * (a == axis) for a, n in enumerate(x.shape)], x.dtype, side)
            cut = tuple(
                slice(1, n + 1) if a == axis else slice(None) for a, n in enumerate(x.shape)
            )
            yield f"axis {axis} padded, {side}", padded[cut]
        swapped = guarded((*x.shape[:2], x.shape[3], x.shape[2]), x.dtype, side)
        yield f"planes transposed, {side}", swapped.swapaxes(2, 3)
        last = guarded((x.shape[0], *x.shape[2:], x.shape[1]), x.dtype, side)
        yield f"channels last, {side}", np.moveaxis(last, -1, 1)


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
@pytest.mark.parametrize("name", WALKS)
def test_every_operand_by_its_own_strides(name: str, dtype: Any) -> None:
    norm = WALKS[name]
    x = data((2, 4, 6, 80), dtype, 2.0)
    right = norm(x, None)
    # rows are added up one by one where they lie apart: as many roundings as there are rows
    size = np.finfo(dtype).eps * (1 + abs(right).astype(F64))
    for label, view in turned(x):
        whole = view
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        view[...] = x
        kept = whole.copy()
        y = norm(view, None)
        assert (abs(y.astype(F64) - right) <= 2 * size).all(), f"x {label}"
        assert_same_bits(whole, kept)
        assert_fence(whole)
        whole[...] = 7
        assert norm(x, view) is view
        assert (abs(view.astype(F64) - right) <= 2 * size).all(), f"out {label}"
        view[...] = 7
        assert (whole == 7).all(), f"out {label}: what lies around it was overwritten"
        assert_fence(whole)
        view[...] = x
        norm(view, view)
        assert (abs(view.astype(F64) - right) <= 2 * size).all(), f"in place, {label}"


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
def test_a_sum_lies_as_it_does_and_not_as_x(dtype: Any) -> None:
    x, added = (data((3, 6, 80), dtype, 1.0, seed=s) for s in range(2))
    right = fn.add_layer_norm(x, added, (6, 80))
    back = slice(None, None, -1)
    for turn in ((slice(None), back), (slice(None), slice(None), back)):
        view = guarded(x.shape, dtype)[turn]
        view[...] = x
        for y, exact in zip(fn.add_layer_norm(view, added, (6, 80)), right, strict=True):
            size = np.finfo(dtype).eps * (1 + abs(exact).astype(F64))
            assert (abs(y.astype(F64) - exact) <= 2 * size).all()


# --- Bad numbers, beyond each block ---------------------------------------------------------------

BAD = (np.nan, np.inf, -3e38, 1e-42, 0.0)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
def test_bad_numbers_anywhere_in_a_long_run(dtype: Any, side: str) -> None:
    """In a group of several pieces: its neighbour is as without them, nothing else is written."""
    good = data((3, 70_001), dtype, 2.0)
    x, y = guarded(good.shape, dtype, side), guarded(good.shape, dtype, side)
    w = guarded_copy(np.linspace(1, 2, 70_001, dtype=F64 if dtype == F64 else F32), side)
    norms: list[Callable[[], Any]] = [
        lambda: fn.layer_norm(x, 70_001, w, w, out=y),
        lambda: fn.rms_norm(x, 70_001, w, eps=0.0, out=y),
        lambda: fn.instance_norm(x[np.newaxis], out=y[np.newaxis]),
        lambda: fn.batch_norm(x.T, None, None, training=True, out=y.T),
        lambda: y.__setitem__(..., fn.layer_norm_backward(x, x, mean, rstd, 70_001, w)[0]),
    ]
    x[...] = good
    mean, rstd = fn.layer_norm(x, 70_001, return_stats=True)[1:]
    right = []
    for norm in norms:
        norm()
        right.append(y.copy())
    with np.errstate(over="ignore"):
        for bad, place in zip(BAD, (0, 4096, 35_000, 65_536, 70_000), strict=True):
            x[...] = good
            x[1, place] = bad
            kept = x.copy()
            for norm, exact in zip(norms, right, strict=True):
                norm()
                if norm is not norms[3]:  # in which each column is a group
                    assert_same_bits(y[::2], exact[::2])
            assert_same_bits(x, kept)
            for array in (x, y, w):
                assert_fence(array)


# --- The checking kernels -------------------------------------------------------------------------

CHECKING = """
import numpy as np, fastnorm as fn
from dataclasses import replace
from fastnorm._numba import cpu, extents, launch

assert extents.CHECKED
fn.set_backend("numba")

def ones(*shape):
    return np.ones(shape, "f4")

x, long, rows, columns = ones(4, 5, 80), ones(2, 2, 70001), ones(9, 300), ones(600, 70)
wide = ones(5, 300)
wide[2, 7] = 3e38
scales = np.full(5, 1e-35)

def backward(x, wide=False, **options):
    # of batch norm, whose groups are planes or columns
    n = x.shape[1]
    rstd = np.full(n, 1e35 if wide else 1.0)
    return fn.batch_norm_backward(x, x, np.zeros(n), rstd, np.ones(n), **options)

def backward_rows(x, rstd=1.0):
    n = len(x)
    return fn.layer_norm_backward(x, x, np.zeros((n, 1)), np.full((n, 1), rstd), x.shape[1])

# How each kernel is reached: runs, rows one by one, columns; planes, rows and columns backward.
CALLS = {
    "runs": lambda: fn.instance_norm(x),
    "rows": lambda: fn.layer_norm(rows, 300),
    "columns": lambda: fn.batch_norm(columns, None, None, training=True),
    "planes backward": lambda: backward(x),
    "rows backward": lambda: backward_rows(rows),
    "columns backward": lambda: backward(columns),
}
for bad in (np.nan, 3e38, 1e-42):
    for array in (long, rows, columns):
        array.flat[0] = bad
    for array in (x, long, x[:, :, ::-1], x[:, ::-1]):
        fn.instance_norm(array, activation="gelu")
        fn.instance_norm(array, where=array > 0)
        backward(array)
    for array in (rows, rows[::-1], rows[:, :200], columns, columns[:, ::-1]):
        fn.layer_norm(array, array.shape[1], np.ones(array.shape[1]), np.ones(array.shape[1]))
        fn.batch_norm(array, None, None, training=True)
        fn.add_layer_norm(array, array, array.shape[1])
        fn.moments(array, 0)
        for norm in (backward, backward_rows):
            norm(array)
        backward(array, wide=True)
        backward(array, training=False)
        backward_rows(array, 1e35)

def found(what, call):
    try:
        call()
    except AssertionError as error:
        assert "touched address" in str(error), error
    else:
        raise SystemExit(f"{what} was not found")

run_pass, run_backward, spans = cpu.run_pass, cpu.run_backward, launch.spans_of

def lie(run, name):
    def run_with_a_lie(layout, *arrays, **options):
        steps = dict(layout.strides)
        # far off: twice as long might lead into another of the arrays, and what the call is told
        steps[name] = tuple(step << 24 if step > 1 else step for step in steps[name])
        return run(replace(layout, strides=steps), *arrays, **options)
    return run_with_a_lie

for threads in (2, 1):
    fn.set_num_threads(threads)
    for kernel, call in CALLS.items():
        call()
        for name in ("x", "dy", "dx") if "backward" in kernel else ("x", "y"):
            cpu.run_pass, cpu.run_backward = lie(run_pass, name), lie(run_backward, name)
            found(f"a wrong stride of {name}, of {kernel}", call)
            cpu.run_pass, cpu.run_backward = run_pass, run_backward

# Each part of scratch memory that a kernel fills, by what goes there: one number less.
PARTS = (
    (lambda: fn.instance_norm(long, where=long > 0), 8, {0: 8 * 5, 3: 8 * 8, 5: 4 * 4096}),
    (CALLS["columns"], 9, {0: 8 * 5 * 70, 4: 8 * 6 * 70, 5: 8 * 3 * 70, 6: 8 * 4 * 70}),
    (CALLS["planes backward"], 2, {1: 8 * 32 * 5}),
    (CALLS["rows backward"], 2, {1: 8 * 32}),
    (CALLS["columns backward"], 3, {0: (8 * 10 + 4) * 70}),
)
for call, parts, sizes in PARTS:
    for part, size in sizes.items():
        launch.spans_of = lambda *room: [
            (low, low + size - 4 if i % parts == part else high)
            for i, (low, high) in enumerate(spans(*room))
        ]
        found(f"part {part} of {parts}, one number short,", call)
launch.spans_of = spans
for call in CALLS.values():
    call()
"""


@pytest.mark.slow
def test_a_checking_kernel_finds_what_leaves_its_memory() -> None:
    """Strides of another operand, and parts of scratch memory that are one number short."""
    run = run_python("-c", CHECKING, FASTNORM_CHECK="1")
    assert run.returncode == 0, run.stderr
