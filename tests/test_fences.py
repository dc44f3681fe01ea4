"""Of the arrays with fences around them (helpers): that these are where they are said to be."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from .helpers import assert_fence, guarded, guarded_copy, run_python

POKE = """
import ctypes, sys
from tests.helpers import PAGE, guarded
a = guarded((3, 5), "f4", sys.argv[1])
ctypes.memset(a.ctypes.data + int(sys.argv[2]), 1, 1)
"""


@pytest.mark.parametrize(("side", "place"), [("before", -1), ("after", 60)])
def test_a_touch_of_the_fence_ends_the_process(side: str, place: int) -> None:
    assert run_python("-c", POKE, side, str(place)).returncode != 0
    assert run_python("-c", POKE, side, str(59 if place > 0 else 0)).returncode == 0


@pytest.mark.parametrize(("side", "place"), [("before", 60), ("after", -1)])
def test_a_write_beside_the_array_is_found(side: str, place: int) -> None:
    a = guarded((3, 5), "f4", side)
    assert_fence(a[1:])
    assert not a.any()
    ctypes.memset(a.ctypes.data + place, 1, 1)
    with pytest.raises(AssertionError, match="outside an array"):
        assert_fence(a)


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_copy_lies_as_the_array_does(side: str) -> None:
    for x in (np.arange(24.0).reshape(4, 6)[:, ::-2], np.zeros((3, 0)), np.zeros(())):
        copy = guarded_copy(x, side)
        assert copy.strides == x.strides
        np.testing.assert_array_equal(copy, x)
        assert_fence(copy)
