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
from fastnorm._numba import compiling, cpu

assert compiling.CHECKED
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
    except IndexError:
        return
    raise SystemExit(f"{what} was not found")

plan_of, back_plan_of = cpu.plan_of, cpu.back_plan_of

def lie(of, row):
    def plan_with_a_lie(*given):
        plan = of(*given)
        steps = plan.steps.copy()
        # far off: twice as long might lie in another row of the same array
        steps[row] = np.where(steps[row] > 1, steps[row] << 24, steps[row])
        return plan._replace(steps=steps)
    return plan_with_a_lie

def short(of, field):
    def plan_without_a_number(*given):
        plan = of(*given)
        return plan._replace(**{field: getattr(plan, field) - 1})
    return plan_without_a_number

for threads in (2, 1):
    fn.set_num_threads(threads)
    for kernel, call in CALLS.items():
        call()
        back = "backward" in kernel
        for row in range(3 if back else 2):
            cpu.plan_of, cpu.back_plan_of = lie(plan_of, row), lie(back_plan_of, row)
            found(f"a wrong step of operand {row}, of {kernel}", call)
        for field in ("room", "tiles") if threads == 1 else ():
            cpu.plan_of, cpu.back_plan_of = short(plan_of, field), short(back_plan_of, field)
            found(f"{field} one number short, of {kernel}", call)
        cpu.plan_of, cpu.back_plan_of = plan_of, back_plan_of
for call in CALLS.values():
    call()
"""


@pytest.mark.slow
def test_a_checking_kernel_finds_what_leaves_its_memory() -> None:
    """Steps of another operand, and a thread's own memory that is one number short."""
    run = run_python("-c", CHECKING, FASTNORM_CHECK="1")
    assert run.returncode == 0, run.stderr
