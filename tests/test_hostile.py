"""What a stranger may pass: objects that lie, numbers without end, arrays of nothing."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .helpers import data

X = data((4, 8, 6), np.float32)


class Liar(np.ndarray[Any, Any]):
    """An array that says it can be written, is of another shape, and not of its dtype."""

    flags = np.empty(1).flags  # type: ignore[assignment]
    shape = X.shape  # type: ignore[assignment]
    dtype = X.dtype  # type: ignore[assignment]
    strides = X.strides  # type: ignore[assignment]


def locked(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Memory that nobody can write: a page of the system's, mapped read-only."""
    size = int(np.prod(shape)) * 4
    memory = mmap.mmap(-1, size, prot=mmap.PROT_READ)
    return np.frombuffer(memory, np.float32, size // 4).reshape(shape)


INTO: dict[str, Callable[[Any], Any]] = {
    "layer_norm": lambda out: fn.layer_norm(X, 6, out=out),
    "rms_norm": lambda out: fn.rms_norm(X, 6, out=out),
    "group_norm": lambda out: fn.group_norm(X, 2, out=out),
    "instance_norm": lambda out: fn.instance_norm(X, out=out),
    "batch_norm": lambda out: fn.batch_norm(X, training=True, out=out),
    "l2_normalize": lambda out: fn.l2_normalize(X, out=out),
    "standardize": lambda out: fn.standardize(X, 0, out=out),
    "activate": lambda out: fn.nn.activate(X, "relu", out=out),
    "softmax": lambda out: fn.nn.softmax(X, out=out),
}


@pytest.mark.parametrize("name", INTO)
@pytest.mark.parametrize("wrong", ["read-only", "shape", "dtype"])
def test_an_array_that_lies_of_itself_is_not_written(name: str, wrong: str) -> None:
    own = {
        "read-only": locked(X.shape),
        "shape": np.zeros((4, 8, 5), np.float32),
        "dtype": np.zeros(X.shape, np.float16),
    }[wrong]
    out = own.view(Liar)
    if name == "softmax" and wrong == "dtype":  # rounded, as NumPy does
        out = np.zeros(X.shape, np.int8).view(Liar)
    with pytest.raises((ValueError, TypeError)):
        INTO[name](out)
    assert not own.any()


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_that_lie_are_not_written(name: str) -> None:
    mean, var = np.zeros(8, np.float32), locked((8,)).view(Liar)
    options = {"training": True} if name == "batch_norm" else {}
    with pytest.raises(ValueError, match="running_var is read-only"):
        getattr(fn, name)(X, mean, var, **options)
    assert not mean.any()


def test_what_only_says_it_is_an_array_is_no_out() -> None:
    class Says:
        __class__ = np.ndarray  # type: ignore[assignment]

        def __array__(self, *_: Any, **__: Any) -> Any:
            return np.empty_like(X)

    with pytest.raises(TypeError, match="expected a NumPy array"):
        fn.layer_norm(X, 6, out=Says())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a NumPy array"):
        fn.batch_norm(X, Says(), None, training=True)


@pytest.mark.parametrize("backward", [False, True])
def test_an_argument_may_not_change_another(backward: bool) -> None:
    """Code of one argument that gives x, out or a running statistic another shape."""
    x, out, running = X.copy(), np.empty_like(X), np.zeros(8, np.float32)

    class Changes:
        def __array__(self, *_: Any, **__: Any) -> Any:
            for array, shape in ((x, (1, -1)), (out, (-1,)), (running, (2, 4))):
                array.shape = shape
            return np.ones(8, np.float32)

    y, mean, rstd = fn.batch_norm(X, training=True, return_stats=True)
    if backward:
        found = fn.batch_norm_backward(X, x, mean, rstd, Changes())  # type: ignore[arg-type]
        np.testing.assert_array_equal(found[0], fn.batch_norm_backward(X, X, mean, rstd)[0])
        return
    # `out` is looked at last, and has changed by then
    with pytest.raises(ValueError, match="out has shape"):
        fn.batch_norm(x, running, None, Changes(), training=True, out=out)  # type: ignore[arg-type]
    assert not running.any()
    x, out, running = X.copy(), np.empty_like(X), np.zeros(8, np.float32)
    y_too = fn.batch_norm(x, running, None, Changes(), training=True)  # type: ignore[arg-type]
    np.testing.assert_array_equal(y_too, y)
    np.testing.assert_allclose(running.ravel(), 0.1 * mean, rtol=1e-6)
