"""What a stranger may pass: objects that lie, numbers without end, arrays of nothing."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable
from itertools import count
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


# --- Numbers and objects of every kind ------------------------------------------------------------

HUGE = 10**5000  # has more digits than Python writes


class Refuses:
    """An object whose every attribute raises an error of its own."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Everything:
    """An object that has every attribute there is, each of which is another one."""

    def __getattr__(self, name: str) -> Any:
        return Everything()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return Everything()


def _state(parts: Any, shape: Any) -> dict[str, Any]:
    """What `Moments.to_dict` returns of moments over one axis."""
    fields = dict.fromkeys(("count", "mean", "mean_rest", "m2", "m2_rest"), parts)
    return fields | {"axis": [0], "shape": shape}


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "eps": lambda v: fn.layer_norm(X, 6, eps=v),
    "axis": lambda v: fn.layer_norm(X, axis=v),
    "axes": lambda v: fn.layer_norm(X, axis=(v,)),
    "axis of moments": lambda v: fn.moments(X, axis=v),
    "axis of Moments": lambda v: fn.Moments(axis=(v, v)),
    "normalized_shape": lambda v: fn.layer_norm(X, v),
    "num_groups": lambda v: fn.group_norm(X, v),
    "channel_axis": lambda v: fn.group_norm(X, 2, channel_axis=v),
    "ddof": lambda v: fn.moments(X, ddof=v),
    "momentum": lambda v: fn.batch_norm(X, training=True, momentum=v),
    "keepdims": lambda v: fn.moments(X, keepdims=v),
    "weight_offset": lambda v: fn.rms_norm(X, 6, weight_offset=v),
    "size": lambda v: fn.local_response_norm(X, v),
    "backend": lambda v: fn.set_backend(v),
    "num_features": lambda v: fn.nn.BatchNorm(v),
    "normalized_shape of LayerNorm": lambda v: fn.nn.LayerNorm((v, v)),
    "num_heads": lambda v: fn.nn.TransformerBlock(8, v),
    "d_model": lambda v: fn.nn.TransformerBlock(v, 1),
    "placement": lambda v: fn.nn.TransformerBlock(8, 2, placement=v),
    "rng": lambda v: fn.nn.TransformerBlock(8, 2, rng=v),
    "betas": lambda v: fn.nn.Adam({"p": np.ones(1)}, betas=(v, v)),
    "ignore_index": lambda v: fn.nn.cross_entropy(np.ones((1, 2)), [1], ignore_index=v),
    "shape": lambda v: fn.Moments.from_dict(_state([0], v)),
    "activation": lambda v: fn.layer_norm(X, 6, activation=v),
    "out": lambda v: fn.layer_norm(X, 6, out=v),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [-HUGE, HUGE, Refuses(), Everything()], ids=["-", "+", "R", "E"])
def test_options_of_every_kind_are_refused_in_our_words(name: str, value: Any) -> None:
    if name == "rng" and value is HUGE:
        return  # a seed
    with pytest.raises((ValueError, TypeError)) as caught:
        OPTIONS[name](value)
    message = str(caught.value)
    assert "expected" in message or "use one of" in message, message
    assert "Exceeds the limit" not in message, message


@pytest.mark.parametrize("value", [Refuses(), Everything()], ids=["R", "E"])
@pytest.mark.parametrize("place", ["x", "weight", "where", "residual", "axis"])
def test_objects_of_every_kind_are_refused_in_our_words(place: str, value: Any) -> None:
    given: dict[str, Any] = {"x": X, "axis": -1} | {place: value}
    with pytest.raises((ValueError, TypeError), match="expected"):
        fn.layer_norm(**given)


def test_axes_without_end_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a whole number or a tuple"):
        fn.layer_norm(X, axis=count())  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [[10**13], [10**30], [1] * 70, [0, 10**30], [HUGE]], ids=len)
def test_a_shape_of_moments_is_compared_before_memory_is_asked_for(shape: Any) -> None:
    parts: Any = [] if 0 in shape else [0]
    with pytest.raises((ValueError, TypeError), match="expected"):
        fn.Moments.from_dict(_state(parts, shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda: fn.nn.LayerNorm((10**10, 10**10)),
        lambda: fn.nn.LayerNorm([1] * 70),
        lambda: fn.nn.RMSNorm(None),  # type: ignore[arg-type]
        lambda: fn.nn.BatchNorm(10**30),
        lambda: fn.nn.GroupNorm(1, 10**20),
        lambda: fn.nn.TransformerBlock(10**12, 1),
    ],
)
def test_modules_that_no_memory_holds(make: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="expected"):
        make()


def test_an_out_of_strings() -> None:
    strings = getattr(np.dtypes, "StringDType", None)
    out: Any = np.empty(X.shape, "U1" if strings is None else strings())
    with pytest.raises(TypeError, match=r"out has dtype .*expected float32"):
        fn.layer_norm(X, 6, out=out)


@pytest.mark.parametrize(
    "interface",
    [5, {}, {"shape": 5}, {"shape": (2,), "typestr": 5, "data": (8, False)},
     {"shape": (2,), "typestr": "<f4", "data": 5}, {"shape": (2,), "typestr": "<f4"},
     {"shape": (2,), "typestr": "<f4", "data": (1 << 40, False), "strides": 5}],
)  # fmt: skip
def test_what_only_says_it_is_on_a_gpu(interface: Any) -> None:
    pytest.importorskip("numba")
    x: Any = type("Device", (), {"__cuda_array_interface__": interface})()
    with pytest.raises((ValueError, TypeError), match=r"an array on the GPU has .*, expected"):
        fn.layer_norm(x, 2)


def test_an_array_on_a_gpu_without_a_driver() -> None:
    cuda = pytest.importorskip("numba.cuda")
    if cuda.is_available():
        return
    interface = {"shape": (2, 2), "typestr": "<f4", "data": (1 << 40, False), "version": 3}
    x: Any = type("Device", (), {"__cuda_array_interface__": interface})()
    with pytest.raises(RuntimeError, match="driver cannot be loaded here, expected"):
        fn.layer_norm(x, 2)


# --- Arrays of nothing ----------------------------------------------------------------------------

EMPTY = """
import resource
import numpy as np, fastnorm as fn
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
n = 10**12
wide, long = np.empty((0, n), np.float32), np.empty((n, 0), np.float32)
for call in (
    lambda: fn.batch_norm(wide, training=True),
    lambda: fn.instance_norm(np.empty((0, n, 2), np.float32)),
    lambda: fn.group_norm(wide, n),
    lambda: fn.group_norm(wide, 2),
    lambda: fn.layer_norm(wide, axis=0),
    lambda: fn.layer_norm(long, 0),
    lambda: fn.rms_norm(long, 0),
    lambda: fn.add_layer_norm(long, long, 0)[0],
    lambda: fn.l2_normalize(long),
    lambda: fn.weight_standardize(long),
    lambda: fn.local_response_norm(long, 3),
    lambda: fn.local_response_norm(wide, 3),
    lambda: fn.standardize(long, 1),
    lambda: fn.standardize(long, 1, ddof=1, where=np.True_),
    lambda: fn.dynamic_tanh(long, 0.5),
    lambda: fn.nn.softmax(long),
    lambda: fn.nn.activate(long, "relu"),
):
    assert call().shape in ((0, n), (n, 0), (0, n, 2))
for bad in (lambda: fn.group_norm(wide, 7), lambda: fn.nn.GroupNorm(7, n)):
    try:
        bad()
    except ValueError as error:
        assert "num_groups=7 does not divide" in str(error)
    else:
        raise AssertionError
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by the system")
def test_arrays_of_nothing_take_neither_memory_nor_time() -> None:
    done = subprocess.run([sys.executable, "-c", EMPTY], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm", "layer_norm"])
def test_statistics_of_nothing_are_the_callers_to_write(name: str) -> None:
    options: dict[str, Any] = {"layer_norm": {"axis": 0}, "group_norm": {"num_groups": 1}}
    given = {"training": True} if name == "batch_norm" else options.get(name, {})
    for shape in ((0, 3, 2), (2, 3, 0)):
        _, *stats = getattr(fn, name)(np.empty(shape), return_stats=True, **given)
        for part in stats:
            assert np.isnan(part).all()
            part[...] = np.arange(part.size).reshape(part.shape)
            assert len(np.unique(part)) == part.size
