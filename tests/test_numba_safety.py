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
    named,
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
        assert (whole == 7).all(), f"out {label}: what lies beside it was overwritten"
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
