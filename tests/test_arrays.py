"""Views of a device's memory: NumPy's own views are what they must be."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from fastnorm.arguments import grouped
from fastnorm.arrays import ArrayView, broadcast_to, flip, may_share_memory, moveaxis

from .helpers import Array

DEVICE: Any = None  # nothing is asked of it here


def shown(array: Array) -> ArrayView:
    """A view of the same memory."""
    interface = array.__array_interface__
    return ArrayView(
        interface["data"][0], array.shape, array.strides, array.dtype, DEVICE, array
    )  # fmt: skip


def assert_same_place(view: ArrayView, array: Array) -> None:
    """The strides of axes of length 1 say nothing."""
    assert view.shape == array.shape
    assert (view.ndim, view.size, view.itemsize) == (array.ndim, array.size, array.itemsize)
    for n, ours, theirs in zip(array.shape, view.strides, array.strides, strict=True):
        assert n == 1 or ours == theirs
    if array.size:
        assert view.pointer == array.__array_interface__["data"][0]
        assert view.contiguous == array.flags.c_contiguous


def arrays() -> list[Array]:
    """Of 24 elements, in several orders and with gaps."""
    x = np.zeros((2, 3, 4), np.float32)
    wide = np.zeros((4, 3, 8), np.float64)
    return [
        x,
        x.transpose(2, 0, 1),
        x[:, ::-1],
        wide[::2, :, ::2],
        wide[::2, :, 1:5],
        np.zeros((24,)),
        np.zeros((1, 24, 1)),
        np.broadcast_to(np.zeros((2, 3, 1)), (2, 3, 4)),
    ]


SHAPES = [(24,), (4, 6), (2, 3, 2, 2), (2, 1, 3, 4), (2, 3, 4), (4, 2, 3), (1, 24), (2, 12), (8, 3)]


@pytest.mark.parametrize("array", arrays(), ids=lambda a: f"{a.shape}{a.strides}")
def test_views_lie_where_numpys_do(array: Array) -> None:
    view = shown(array)
    assert_same_place(view, array)
    order = tuple(reversed(range(array.ndim)))
    assert_same_place(view.transpose(order), array.transpose(order))
    assert_same_place(moveaxis(view, -1, 0), np.moveaxis(array, -1, 0))
    assert_same_place(flip(view, (0,)), np.flip(array, (0,)))
    whole = (5, *array.shape)
    assert_same_place(broadcast_to(view, whole), np.broadcast_to(array, whole))
    assert not broadcast_to(view, whole).writable


@pytest.mark.parametrize(("array", "shape"), list(product(arrays(), SHAPES)), ids=str)
def test_another_shape_is_a_view_or_refused(array: Array, shape: tuple[int, ...]) -> None:
    reshaped = array.reshape(shape)
    if np.shares_memory(reshaped, array):
        assert_same_place(shown(array).reshape(shape), reshaped)
        assert_same_place(shown(array).reshape(*shape), reshaped)
    else:
        with pytest.raises(ValueError, match="has no view of shape"):
            shown(array).reshape(shape)


def test_channels_in_groups() -> None:
    x = np.zeros((2, 8, 3, 4), np.float32)
    for array in (x, np.moveaxis(x.reshape(2, 3, 4, 8), -1, 1)):
        view: Any = shown(array)
        assert_same_place(grouped(view, 4), grouped(array, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0,), (3, 0, 4), (0, 12)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    array = np.zeros((3, 0, 4))
    assert shown(array).reshape(shape).shape == shape
    assert flip(shown(array), (0,)).shape == array.shape


def test_which_may_share_memory() -> None:
    x = np.zeros((4, 6))
    parts = [x, x[1:], x[:1], x[::-1], x[:, ::2], x[:0], np.zeros(3)]
    for one, other in product(parts, parts):
        assert may_share_memory(shown(one), shown(other)) == np.may_share_memory(one, other)


def test_what_does_not_fit() -> None:
    view = shown(np.zeros((2, 3)))
    for wrong in ((2, 4), (3,), (3, 2)):
        with pytest.raises(ValueError, match="does not broadcast"):
            view.broadcast_to(wrong)
    with pytest.raises(ValueError, match="cannot reshape"):
        view.reshape(4)


def test_no_number_is_read() -> None:
    view: Any = shown(np.zeros((2, 3)))
    with pytest.raises(TypeError, match="are not read"):
        np.asarray(view)
    with pytest.raises(TypeError):
        np.ones(3) + view
