"""Every argument of every public function, given what it cannot be."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm.execution import counted
from fastnorm.operations import OPERATIONS

from .helpers import F32, assert_same_bits, data

X = data((4, 8, 5, 6), F32)
C = np.arange(8, dtype=F32) / 4 + 0.5
_, M, R = fn.batch_norm(X, training=True, return_stats=True)
_, LM, LR = fn.layer_norm(X, 6, return_stats=True)
_, GM, GR = fn.group_norm(X, 2, return_stats=True)
_, IM, IR = fn.instance_norm(X, return_stats=True)

# A call of each that is right: what is put in the place of one argument is wrong.
RIGHT: dict[str, dict[str, Any]] = {
    "batch_norm": {"x": X, "running_mean": C, "running_var": C, "weight": C, "bias": C},
    "layer_norm": {"x": X, "normalized_shape": 6, "weight": X[0, 0, 0], "bias": X[0, 0, 0]},
    "instance_norm": {"x": X, "weight": C, "bias": C},
    "group_norm": {"x": X, "num_groups": 2, "weight": C, "bias": C},
    "rms_norm": {"x": X, "normalized_shape": 6, "weight": X[0, 0, 0]},
    "add_layer_norm": {"x": X, "residual": X, "normalized_shape": 6},
    "add_rms_norm": {"x": X, "residual": X, "normalized_shape": 6},
    "batch_norm_backward": {"dy": X, "x": X, "mean": M, "rstd": R, "weight": C},
    "layer_norm_backward": {"dy": X, "x": X, "mean": LM, "rstd": LR, "normalized_shape": 6},
    "instance_norm_backward": {"dy": X, "x": X, "mean": IM, "rstd": IR, "weight": C},
    "group_norm_backward": {"dy": X, "x": X, "mean": GM, "rstd": GR, "num_groups": 2},
    "rms_norm_backward": {"dy": X, "x": X, "rstd": LR, "normalized_shape": 6},
    "l2_normalize": {"x": X},
    "local_response_norm": {"x": X, "size": 3},
    "weight_norm": {"v": X, "g": C[:4]},
    "weight_standardize": {"w": X},
    "global_response_norm": {"x": X, "weight": C, "bias": C},
    "moments": {"x": X},
    "standardize": {"x": X},
}  # fmt: skip

# The functions that take each element by itself, and those of their gradients.
for op in OPERATIONS:
    if op.elementwise_backward:
        RIGHT[op.name] = {"x": X, "alpha": 0.5}
        RIGHT[op.elementwise_backward] = {"dy": X, "x": X, "alpha": 0.5}

ARRAYS = {"x", "v", "w", "dy", "residual", "mean", "rstd", "weight", "bias", "g", "alpha", "shift"}

NOT_ARRAYS = ["abc", [[1.0], [1.0, 2.0]], 1j, object(), {"a": 1}, np.ones(8, "M8[s]"), b"ab"]
NOT_INTEGERS = [1.0, 1.9, "1", "t", True, np.True_, 1j, [1.5], np.array(1.0), object(), b"1"]
NOT_NUMBERS = ["1e-5", 1j, [1e-5], True, np.True_, np.ones(2), object(), b"1", {}, np.str_("1")]
NOT_FINITE = [np.nan, np.inf, -np.inf, 10**400]

WRONG: dict[str, list[Any]] = {
    "running_mean": [*NOT_ARRAYS, C[:3], 1.0],
    "running_var": [*NOT_ARRAYS, C[:3], 1.0],
    "weight": [*NOT_ARRAYS, np.ones(7)],
    "bias": [*NOT_ARRAYS, np.ones(7)],
    "residual": [*NOT_ARRAYS, X[0, 0], 1.0],
    "dy": [*NOT_ARRAYS, X[0, 0], None],
    "mean": [*NOT_ARRAYS, X[0, 0], None],
    "rstd": [*NOT_ARRAYS, X[0, 0], None],
    "g": [*NOT_ARRAYS, np.ones(7), None],
    "x": [*NOT_ARRAYS, None],
    "v": [*NOT_ARRAYS, None],
    "w": [*NOT_ARRAYS, None],
    "alpha": [*NOT_ARRAYS, np.ones(7), None],
    "shift": [*NOT_ARRAYS, np.ones(7), None],
    "eps": [*NOT_NUMBERS, *NOT_FINITE, -1, -1e-9],
    "momentum": [*NOT_NUMBERS, *NOT_FINITE, None, -1, 5, 1.0001],
    "weight_offset": [*NOT_NUMBERS, *NOT_FINITE, None],
    "beta": [*NOT_NUMBERS, *NOT_FINITE, None],
    "k": [*NOT_NUMBERS, *NOT_FINITE, None],
    "ddof": [*NOT_NUMBERS, *NOT_FINITE, None],
    "training": ["yes", 2, None, np.ones(2), 0.5, [], object()],
    "use_input_stats": ["yes", 2, None, np.ones(2), 0.5, [], object()],
    "return_stats": ["yes", 2, None, np.ones(2), 0.5, [], object()],
    "keepdims": ["yes", 2, None, np.ones(2), 0.5, [], object()],
    "channel_axis": [*NOT_INTEGERS, None, (1,), 4, -5, 2**70],
    "axis": [*NOT_INTEGERS, 4, -5, (0, 1.9), (0, 0), (1, -3), "01", {0, 1}, X, 2**70],
    "normalized_shape": [*NOT_INTEGERS, 5, 0, -6, (), (6, 5), (1, 4, 8, 5, 6), X, "6", 2**70],
    "num_groups": [*NOT_INTEGERS, 3, 0, -2, (2,), None, X, 2**70],
    "size": [*NOT_INTEGERS, 0, -1, (2,), None, X],
    "where": ["abc", X, np.ones(6), [1, 0, 1, 0, 1, 1], 1, X[:3] > 0, object()],
    "activation": ["Relu", "swish", "", 1, np.tanh, ["relu"], abs, X, object(), b"relu"],
    "derivative": ["central", "exact", "", 1, np.tanh, ["relu"], abs, X, object(), b"central"],
    "out": [X.tolist(), np.empty(X.shape), X[:3].copy(), "abc", 1.0, (X,), X.astype(">f8")],
}


def signature(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(fn, name)).parameters)


def cases() -> Iterator[tuple[str, str, Any]]:
    for name in RIGHT:
        for argument in signature(name):
            for value in wrong(name, argument):
                yield name, argument, value


def wrong(name: str, argument: str) -> list[Any]:
    if argument == "alpha" and name == "local_response_norm":
        return WRONG["beta"]
    if argument == "axis" and name == "weight_norm":
        return [v for v in WRONG["axis"] if not isinstance(v, str | bytes) or v]
    return WRONG[argument]


CASES = list(cases())


def test_every_argument_of_every_function_is_here() -> None:
    functions = {
        name
        for name in fn.__all__
        if inspect.isfunction(getattr(fn, name)) and signature(name).keys() & {"x", "v", "w"}
    }
    assert functions == RIGHT.keys()
    for name in RIGHT:
        assert signature(name).keys() <= WRONG.keys(), name


def call(name: str, given: dict[str, Any]) -> Any:
    return getattr(fn, name)(**given)


def refusal(name: str, given: dict[str, Any]) -> tuple[type[Exception], str]:
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        try:
            call(name, given)
        except Exception as error:
            return type(error), str(error)
    return type(None), "nothing was refused"


@pytest.mark.parametrize("name", RIGHT)
def test_every_argument_is_refused_by_its_name(name: str) -> None:
    right = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in RIGHT[name].items()}
    for _ in range(2):
        call(name, right)  # a cached call of the right kind must not answer a wrong one
    faults = []
    for argument in signature(name):
        for value in wrong(name, argument):
            given = dict(right)
            if argument == "axis" and "normalized_shape" in given:
                del given["normalized_shape"]
            given[argument] = value
            first = refusal(name, given)
            if first[0] not in (ValueError, TypeError, np.exceptions.AxisError):
                faults.append((argument, value, first))
            if argument not in first[1] or len(first[1]) > 600:
                faults.append((argument, value, first))
            if not any(w in first[1] for w in ("expected", "use", "write")):
                faults.append((argument, value, first))
            if {refusal(name, given) for _ in range(2)} != {first}:
                faults.append((argument, value, "another error the second time"))
    assert not faults, faults[:5]
    for key, value in RIGHT[name].items():
        if isinstance(value, np.ndarray):
            assert_same_bits(right[key], value)


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: fn.layer_norm(X, 6, activation="Relu"), "relu"),
        (lambda: fn.layer_norm(X, 6, activation="gelu-tanh"), "gelu_tanh"),
        (lambda: fn.layer_norm(X, 6, activation=" SILU"), "silu"),
        (lambda: fn.set_backend("Cython"), "cython"),
        (lambda: fn.set_backend("nunpy"), "numpy"),
        (lambda: fn.show_config("dict"), "dicts"),
    ],
)
def test_near_misses_are_suggested(call: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        call()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: fn.group_norm(2, X), "num_groups"),
        (lambda: fn.layer_norm(6, X), "normalized_shape"),
        (lambda: fn.rms_norm(6, X), "normalized_shape"),
        (lambda: fn.l2_normalize(1, X), "axis"),
        (lambda: fn.moments(1, X), "axis"),
        (lambda: fn.standardize(1, X), "axis"),
        (lambda: fn.local_response_norm(3, X), "size"),
    ],
)
def test_swapped_arguments(call: Any, argument: str) -> None:
    with pytest.raises(TypeError, match=rf"{argument} is an array of shape .*x comes first"):
        call()


def test_docstrings_tell_of_axes() -> None:
    for name in RIGHT:
        told = "AxisError" in (getattr(fn, name).__doc__ or "")
        assert told == bool(signature(name).keys() & {"axis", "channel_axis"}), name


def test_an_axis_that_is_not_there() -> None:
    for call in (
        lambda: fn.moments(X, axis=4),
        lambda: fn.standardize(X, axis=(0, -5)),
        lambda: fn.layer_norm(X, axis=7),
        lambda: fn.l2_normalize(X, 4),
        lambda: fn.group_norm(X, 2, channel_axis=4),
        lambda: fn.Moments(4).update(X),
    ):
        with pytest.raises(np.exceptions.AxisError, match=r"axis=.*expected"):
            call()


def test_scalars_of_numpy_are_options() -> None:
    right = fn.group_norm(X, 2, C, eps=0.25, channel_axis=1)
    for number in (np.float64, np.float32, np.float16, np.array):
        y = fn.group_norm(
            X, np.int8(2), C, eps=number(0.25), channel_axis=np.array(1), return_stats=np.False_
        )
        assert_same_bits(y, right)
    assert_same_bits(fn.layer_norm(X, np.int64(6), eps=1), fn.layer_norm(X, (6,), eps=1.0))
    assert_same_bits(fn.layer_norm(X, axis=np.array([2, 3])), fn.layer_norm(X, axis=(2, 3)))
    assert_same_bits(fn.batch_norm(X, training=1), fn.batch_norm(X, training=np.True_))


# --- Weights that broadcast -----------------------------------------------------------------------


def broadcast_shapes(own: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes that NumPy broadcasts to this one."""
    ones = st.tuples(*[st.booleans()] * len(own))
    cut = st.integers(0, len(own))
    return st.builds(
        lambda flags, n: tuple(1 if f else m for f, m in zip(flags, own))[n:], ones, cut
    )


@pytest.mark.usefixtures("backend")
@settings(max_examples=12)
@given(st.data())
def test_any_weight_that_broadcasts(draw: st.DataObject) -> None:
    """As one of the whole shape would do; gradients are its sums, in the weight's own shape."""
    name = draw.draw(st.sampled_from(["layer_norm", "rms_norm", "group_norm", "batch_norm"]))
    x, dy = data((2, 4, 5, 3)), data((2, 4, 5, 3), seed=5)
    options: dict[str, Any] = {}
    if name in ("layer_norm", "rms_norm"):
        axes = draw.draw(st.sampled_from([(3,), (1, 2), (2, 1), (1, 3), (0, 2, 3)]))
        options["axis"] = axes
        own = tuple(x.shape[a] for a in axes)
        order = np.argsort(axes)
        full = [n if a in axes else 1 for a, n in enumerate(x.shape)]
        whole = lambda w: np.broadcast_to(w, own).transpose(order).reshape(full)  # noqa: E731
    else:
        own, options = (4,), ({"num_groups": 2} if name == "group_norm" else {})
        whole = lambda w: np.broadcast_to(w, own).reshape(1, 4, 1, 1)  # noqa: E731
    shape = draw.draw(broadcast_shapes(own))
    w = data(shape or (1,), seed=7).reshape(shape)
    forward, backward = getattr(fn, name), getattr(fn, f"{name}_backward")
    training = {"training": True} if name == "batch_norm" else {}
    stats: tuple[Any, ...] = ()
    for _ in range(2):
        y, *stats = forward(x, weight=w, return_stats=True, **options, **training)
        plain = forward(x, **options, **training)
        # a product, rounded once
        np.testing.assert_allclose(y, plain * whole(w), rtol=1e-13, atol=1e-13)
        dx, dweight, *rest = backward(dy, x, *stats, weight=w, **options)
        wide = np.ascontiguousarray(np.broadcast_to(w, own))
        right, dwide, *_ = backward(dy, x, *stats, weight=wide, **options)
        np.testing.assert_allclose(dx, right, rtol=1e-12, atol=1e-12)
        for gradient in (dweight, *rest):
            assert gradient.shape == shape
            assert gradient.dtype == w.dtype
        padded = (1,) * (len(own) - len(shape)) + shape
        axes = tuple(a for a, n in enumerate(padded) if n == 1)
        summed = dwide.sum(axes, keepdims=True).reshape(shape)
        # 120 products of numbers below 64
        np.testing.assert_allclose(dweight, summed, rtol=1e-12, atol=1e-11)


def test_the_weight_of_the_last_axis_where_others_are_normalised() -> None:
    x = data((2, 3, 3, 5))
    w = data((5,), seed=1)
    np.testing.assert_allclose(
        fn.layer_norm(x, axis=(1, 2), weight=w), fn.layer_norm(x, axis=(1, 2)) * w, rtol=1e-13
    )
    for w in (2.0, np.float32(2), [2.0], np.full((1, 1), 2.0)):
        assert_same_bits(fn.layer_norm(x, axis=(1, 2), weight=w), 2 * fn.layer_norm(x, axis=(1, 2)))


# --- Nothing warns --------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
def test_nothing_warns() -> None:
    x = data((4, 6), F32)
    huge = np.full(6, 1e300)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (
            lambda: fn.layer_norm(x, 6, huge, huge),
            lambda: fn.rms_norm(x, 6, huge, weight_offset=1e308),
            lambda: fn.batch_norm(x, huge, huge, eps=1e308),
            lambda: fn.group_norm(x, 2, huge),
            lambda: fn.global_response_norm(x, huge, huge),
            lambda: fn.weight_norm(x, np.full(4, 1e300)),
            lambda: fn.dynamic_tanh(x, 1e300, huge),
            lambda: fn.layer_norm_backward(x, x, np.ones((4, 1)), np.full((4, 1), 1e300), 6, huge),
            lambda: fn.layer_norm(x.astype(np.float16), 6, np.full(6, 6e4, np.float16)),
        ):
            for _ in range(2):
                call()


@given(st.data())
def test_a_mask_is_counted(draw: st.DataObject) -> None:
    shape = tuple(
        draw.draw(st.permutations([300, *draw.draw(st.lists(st.integers(1, 9), max_size=3))]))
    )
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    own = tuple(1 if draw.draw(st.booleans()) else n for n in shape)
    order = draw.draw(st.permutations(range(len(shape))))
    mask = (rng.random([own[a] for a in order]) < 0.6).transpose(np.argsort(order))
    mask = np.broadcast_to(mask, shape)[tuple(slice(None, None, -1) for _ in shape[1:])]
    axes = tuple(a for a in range(len(shape)) if draw.draw(st.booleans()))
    assert_same_bits(counted(mask, mask, axes), np.count_nonzero(mask, axis=axes))


@pytest.mark.parametrize("norm", [fn.batch_norm, fn.instance_norm])
def test_one_value_next_to_none(norm: Any) -> None:
    """A channel of which a mask leaves one value is refused, whatever it leaves of others."""
    x, mask = X.copy(), np.ones(X.shape, bool)
    mask[:, 1:3] = False
    mask[0, 1, 0, 0] = True
    mean, var = C.copy(), C.copy()
    named = {"training": True} if norm is fn.batch_norm else {}
    with pytest.raises(ValueError, match="expected at least 2"):
        norm(x, mean, var, where=mask, **named)
    assert_same_bits(mean, C)
    assert_same_bits(var, C)
