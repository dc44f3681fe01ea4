"""The functions inside a user's own `@njit` functions, against the same calls from Python."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _reference as reference
from fastnorm.arguments import ACTIVATIONS

from .helpers import (
    F16,
    F32,
    F64,
    Array,
    channels_last,
    data,
    named,
    run_python,
    ulps,
)

numba = pytest.importorskip("numba")

# --- Inside a user's function ---------------------------------------------------------------------


@numba.njit
def inside_layer(x: Any, shape: Any, w: Any, b: Any) -> Any:
    return fn.layer_norm(x, shape, w, b)


@numba.njit
def inside_rms(x: Any, shape: Any, w: Any) -> Any:
    return fn.rms_norm(x, shape, w)


@numba.njit
def inside_group(x: Any, w: Any, b: Any) -> Any:
    return fn.group_norm(x, 3, w, b, eps=1e-3)


@numba.njit
def inside_instance(x: Any) -> Any:
    return fn.instance_norm(x)


@numba.njit
def inside_batch(x: Any, mean: Any, var: Any, w: Any) -> Any:
    return fn.batch_norm(x, mean, var, w)


@numba.njit
def inside_moments(x: Any) -> Any:
    return fn.moments(x, ddof=1)


@numba.njit(parallel=True)
def in_a_loop(x: Any, w: Any, b: Any) -> Any:
    y = np.empty_like(x)
    for i in numba.prange(len(x)):
        y[i] = fn.layer_norm(x[i], x.shape[1], w, b)
    return y


def _same(ours: Array, right: Array) -> None:
    """Alike but for whether rstd and weight are multiplied first.

    A rounding more of each factor and of the sum: four units of the larger of result and bias; the
    largest bias here is below 8.
    """
    assert ours.dtype == right.dtype
    assert ours.shape == right.shape
    scale = np.maximum(abs(right.astype(F64)), 4.0)
    assert ulps(ours, right, right.dtype, scale=scale).max(initial=0) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.0, 1e6])
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
def test_inside_compiled_code(dtype: Any, ratio: float) -> None:
    rng = np.random.default_rng(0)
    x = data((40, 5000), dtype, ratio)
    w, b = rng.standard_normal((2, 5000)).astype(dtype)
    right = fn.layer_norm(x, 5000, w, b)
    _same(inside_layer(x, 5000, w, b), right)
    _same(inside_layer(np.asfortranarray(x), (5000,), w, b), right)
    _same(inside_layer(x, 5000, w, None), fn.layer_norm(x, 5000, w))
    _same(in_a_loop(x, w, b), right)
    for of in (x, x[::2, ::3]):
        # 128 squares are added up in a row; of a mean near 0 the deviations' rounding is left
        found, right_moments = inside_moments(of), fn.moments(of, ddof=1)
        atol = 2.0**-53 * float(of.std())
        np.testing.assert_allclose(found, right_moments, rtol=128 * 2**-53, atol=atol)
    _same(inside_rms(x, 5000, w), fn.rms_norm(x, 5000, w))
    x = data((4, 6, 5, 7), dtype, ratio)
    w, b = rng.standard_normal((2, 6)).astype(dtype)
    _same(inside_layer(x, x.shape[1:], None, None), fn.layer_norm(x, x.shape[1:]))
    for y in (x, channels_last(x), x[:, :, 0, 0]):
        _same(inside_group(y, w, b), fn.group_norm(y, 3, w, b, eps=1e-3))
        mean, var = y.mean(0).reshape(6, -1)[:, 0], np.full(6, 2.0, dtype)
        _same(inside_batch(y, mean, var, w), fn.batch_norm(y, mean, var, w))
    _same(inside_instance(x), fn.instance_norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e38, 1e200, 1e-200])
def test_inside_compiled_code_at_the_ends_of_the_range(size: float) -> None:
    dtype = F32 if 1e-45 < size < 1e39 and size != 1e-200 else F64
    x = (size * np.arange(-3.0, 4.0)).astype(dtype).reshape(1, 7)
    _same(inside_instance(x.reshape(1, 1, 7)).reshape(1, 7), fn.layer_norm(x, 7))


@pytest.mark.slow
def test_inside_compiled_code_refused() -> None:
    x = data((4, 6), F32)
    with pytest.raises(ValueError, match="trailing shape"):
        inside_layer(x, 5, None, None)
    with pytest.raises(ValueError, match="weight or bias"):
        inside_layer(x, 6, x[0, :5], None)
    with pytest.raises(ValueError, match="num_groups"):
        inside_group(data((4, 8), F32), None, None)
    with pytest.raises(numba.TypingError, match="float32 or float64"):
        inside_layer(np.arange(6) * 1j, 6, None, None)
    assert inside_layer(x[:0], 6, None, None).shape == (0, 6)
    for shape in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        assert inside_instance(np.ones(shape, F32)).shape == shape


@numba.njit
def every_option(x: Any, shape: Any, w: Any, eps: Any, mean: Any, momentum: Any, ddof: Any) -> Any:
    fn.layer_norm(x, shape, w, None, eps)
    fn.batch_norm(x, mean, mean, None, None, False, momentum, eps)
    return fn.moments(x, None, ddof=ddof)


@pytest.mark.slow
def test_options_inside_compiled_code_are_those_outside() -> None:
    """What the checks refuse is refused: shapes and numbers when it runs, types before."""
    x, nan, inf = data((2, 3, 4), F32), np.nan, np.inf
    right: dict[str, Any] = {"shape": (3, 4), "w": x[0], "eps": 0.0, "mean": np.ones(3, F32)}
    right |= {"momentum": 1.0, "ddof": 0.0}
    every_option(x, *right.values())
    wrong: list[tuple[str, Any, type[Exception]]] = [
        *(("eps", eps, ValueError) for eps in (-1.0, nan, inf)),
        *(("momentum", momentum, ValueError) for momentum in (7.0, -0.1, nan)),
        *(("ddof", ddof, ValueError) for ddof in (nan, inf, -inf)),
        ("w", x[0].T.copy(), ValueError),  # (4, 3): as many numbers
        ("mean", np.ones(4, F32), ValueError),
        *((name, True, numba.TypingError) for name in ("eps", "momentum", "ddof", "shape")),
        ("w", x[0].ravel(), numba.TypingError),
        ("w", x[0] * 1j, numba.TypingError),
        ("mean", np.ones((3, 1), F32), numba.TypingError),
        ("mean", np.ones(3, np.int64), numba.TypingError),
    ]
    for name, value, error in wrong:
        with pytest.raises(error):
            every_option(x, *(right | {name: value}).values())
    with pytest.raises(numba.TypingError, match="weight or bias"):
        inside_group(x, np.ones((3, 1), F32), None)


# --- Activations ----------------------------------------------------------------------------------


@numba.njit
def leaky(v: Any) -> Any:
    return v if v > 0 else v / 8


@numba.njit
def picky(v: Any) -> Any:
    if v > 1.5:
        raise KeyError("too large")
    return v


@numba.njit
def activated(x: Any, w: Any, activation: Any) -> Any:
    return fn.layer_norm(x, x.shape[-1], w, activation=activation)


@numba.njit
def all_activated(x: Any, w: Any, mean: Any, var: Any) -> Any:
    return (
        fn.layer_norm(x, x.shape[2:], activation="gelu"),
        fn.rms_norm(x, x.shape[-1], activation="silu"),
        fn.group_norm(x, 3, w, w, activation="relu6"),
        fn.instance_norm(x, weight=w, activation=leaky),
        fn.batch_norm(x, mean, var, w, activation="gelu_tanh"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS, leaky])
def test_activations_inside(activation: Any) -> None:
    """A row longer than a tile; a name may come in as an argument."""
    for dtype in (F32, F64) if activation in (None, "gelu", leaky) else (F32,):
        x, w = data((3, 4099), dtype, 2.0), data((4099,), dtype, seed=1)
        for _ in range(2):
            y = activated(x, w, activation)
            right = fn.layer_norm(x, 4099, w, activation=activation)
            assert y.dtype == dtype
            # doubles are summed up in another order: a unit of rstd, of which a weight makes more
            most = 1 if dtype == F32 else 4
            assert ulps(y, right, dtype, scale=np.maximum(abs(right.astype(F64)), 1)).max() <= most


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, np.dtype(np.int16)], ids=named)
def test_activations_of_every_norm(dtype: Any) -> None:
    """Integers are computed as doubles are."""
    kind = F64 if dtype == np.int16 else dtype
    for shape in ((2, 6, 3, 700), (2, 6, 1, 2), (0, 6, 3, 2)):
        x = (8 * data(shape, F64, 1.0)).astype(dtype)
        w = np.array([1, -2, 0.5, 3, 0, 1], kind)
        mean, var = np.arange(6).astype(kind), np.full(6, 2.0, kind)
        right = (
            fn.layer_norm(x, shape[2:], activation="gelu"),
            fn.rms_norm(x, shape[-1], activation="silu"),
            fn.group_norm(x, 3, w, w, activation="relu6"),
            fn.instance_norm(x, weight=w, activation=leaky),
            fn.batch_norm(x, mean, var, w, activation="gelu_tanh"),
        )
        for of in (x, channels_last(x)):
            for found, y in zip(all_activated(of, w, mean, var), right, strict=True):
                _same(found, y)


@pytest.mark.slow
def test_what_an_activation_raises() -> None:
    x = np.arange(8.0, dtype=F32)[np.newaxis]
    assert (activated(x[:, :3], None, picky) == fn.layer_norm(x[:, :3], 3)).all()
    with pytest.raises(KeyError, match="too large"):
        activated(x, None, picky)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (3, "a function of one number"),
        (numba.njit(lambda v: (v, v)), "one number on every path"),
        (numba.njit(lambda v, w: v), "activation"),
    ],
)
def test_activations_that_are_refused(wrong: Any, match: str) -> None:
    with pytest.raises(numba.TypingError, match=match):
        activated(np.ones((2, 3), F32), None, wrong)


@pytest.mark.slow
def test_names_that_are_none() -> None:
    """As Python refuses them, when it runs."""
    with pytest.raises(ValueError, match="did you mean 'silu'"):
        activated(np.ones((2, 3), F32), None, "sillu")


# --- Any axes -------------------------------------------------------------------------------------


@numba.njit
def inside_standardize(x: Any, axis: Any, where: Any, ddof: Any, eps: Any) -> Any:
    return fn.standardize(x, axis, where=where, ddof=ddof, eps=eps)


@numba.njit
def moments_along(x: Any, axis: Any, where: Any, ddof: Any) -> Any:
    return (
        fn.moments(x, axis, where=where, ddof=ddof),
        fn.moments(x, axis, where=where, ddof=ddof, keepdims=True),
    )


def _same_moments(found: Any, right: Any, x: Array) -> None:
    """Alike but for what squares of float32 may cancel, 2^12 of float64's roundings."""
    assert np.shape(found[0]) == np.shape(found[1]) == np.shape(right[0])
    size = float(np.nanmax(abs(np.where(np.isfinite(x), x, 0)), initial=0))
    np.testing.assert_allclose(found[0], right[0], rtol=2.0**-50, atol=2.0**-50 * size)
    np.testing.assert_allclose(found[1], right[1], rtol=2.0**-41, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "axes"),
    [
        (F32, (None,)),
        (F32, (0, 1, -1, -3)),
        (F32, ((0, 2), (-1, 1), (2, 0))),
        (F32, ((),)),
        (F64, (0, 1, 2)),
        (np.dtype(np.uint8), (0, 1, 2)),
        (np.dtype(bool), (None,)),
    ],
    ids=str,
)
def test_axes(dtype: Any, axes: Any) -> None:
    floats = dtype in (F32, F64)
    ratios = (0.0, 1e6) if floats else (0.0,)
    shapes = (3, 5, 7), (2, 3, 4099), (35, 60, 2), (1, 1, 1), (0, 3, 2), (2, 0, 3)
    for axis, ratio, shape in itertools.product(axes, ratios, shapes):
        x = data(shape, F64, ratio)
        x = x.astype(dtype) if floats else (abs(x) > 0.5).astype(dtype)
        for z in (x, x[::-1, :, ::2]) if floats else (x,):
            for ddof, eps in ((0, 0.0), (1, 1e-3)):
                right = fn.standardize(z, axis, ddof=ddof, eps=eps)
                y = inside_standardize(z, axis, None, ddof, eps)
                assert y.dtype == right.dtype
                assert y.shape == right.shape
                assert ulps(y, right, y.dtype).max(initial=0) <= (0.5 if y.dtype == F32 else 4)
                for keepdims, found in enumerate(moments_along(z, axis, None, ddof)):
                    right = fn.moments(z, axis, ddof=ddof, keepdims=bool(keepdims))
                    _same_moments(found, right, z)


@pytest.mark.slow
def test_axes_that_are_written_out() -> None:
    @numba.njit
    def f(x):  # type: ignore[no-untyped-def]
        pair = fn.moments(x, (0, -1), keepdims=True)
        return fn.standardize(x, (-1, 0)), pair, fn.moments(x, (0, 1, 2)), fn.moments(x, axis=1)

    x = data((3, 4, 5), F32, 1.0)
    y, pair, whole, one = f(x)
    assert (y == fn.standardize(x, (-1, 0))).all()
    _same_moments(pair, fn.moments(x, (0, -1), keepdims=True), x)
    _same_moments(whole, fn.moments(x), x)
    _same_moments(one, fn.moments(x, axis=1), x)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
def test_standardize_is_near_the_exact_result(ratio: float) -> None:
    for dtype, axis in itertools.product((F32, F64), (0, 1)):
        x = data((40, 4100), dtype, ratio)
        exact = reference.standardize(x, axis, dtype=np.longdouble)
        y = inside_standardize(x, axis, None, 0, 0.0)
        assert ulps(y, exact, dtype).max() <= 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
def test_masks(dtype: Any) -> None:
    """Of the shape of x, broadcast to it, and one that leaves nothing of some groups."""
    x = data((6, 5, 40), dtype, 3.0)
    every, none = x > x.mean(), np.ones((6, 5, 1), bool)
    none[2] = False
    masks = every, none, every[0, 0], every.transpose(2, 1, 0).copy().transpose(2, 1, 0)
    for where, axis, ddof in itertools.product(masks, (0, 1, -1), (0, 1)):
        right = fn.standardize(x, axis, where=where, ddof=ddof)
        y = inside_standardize(x, axis, where, ddof, 0.0)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(right))
        scale = np.maximum(abs(np.nan_to_num(right.astype(F64))), 1)
        assert ulps(y, right, dtype, scale=scale).max() <= 3
        for found in moments_along(x, axis, where, ddof)[:1]:
            _same_moments(found, fn.moments(x, axis, where=where, ddof=ddof), x)
    assert np.isnan(inside_standardize(x, 1, np.zeros(40, bool), 0, 0.0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
def test_what_is_no_number(dtype: Any) -> None:
    inf, nan = np.inf, np.nan
    x = data((6, 5), dtype)
    x[0, 1], x[1, 2], x[2, :2], x[3, 0] = inf, -inf, (inf, -inf), nan
    x[4] = 7
    for axis in (0, 1):
        with np.errstate(all="ignore"):
            right = fn.standardize(x, axis)
            same = fn.moments(x, axis)
        np.testing.assert_allclose(
            inside_standardize(x, axis, None, 0, 0.0), right, rtol=4 * np.finfo(dtype).eps
        )
        for found, other in zip(moments_along(x, axis, None, 0)[0], same, strict=True):
            np.testing.assert_allclose(found, other, rtol=1e-13)
    assert (inside_standardize(x, 1, None, 0, 0.0)[4] == 0).all()
    with np.errstate(all="ignore"):
        y, right = activated(x, None, "relu"), fn.layer_norm(x, 5, activation="relu")
    np.testing.assert_array_equal(np.isnan(y), np.isnan(right))
    assert np.nanmax(ulps(y, right, dtype)) <= (0 if dtype == F32 else 1)


@pytest.mark.slow
def test_axes_and_masks_that_are_refused() -> None:
    x = data((4, 6), F32)
    for axis in (2, -3, (0, 2)):
        with pytest.raises(np.exceptions.AxisError, match="no such axis"):
            inside_standardize(x, axis, None, 0, 0.0)
    with pytest.raises(ValueError, match="twice"):
        inside_standardize(x, (1, -1), None, 0, 0.0)
    for where in (np.ones(5, bool), np.ones((3, 6), bool), np.ones((4, 0), bool)):
        with pytest.raises(ValueError, match="broadcasts"):
            inside_standardize(x, 0, where, 0, 0.0)
        with pytest.raises(ValueError, match="broadcasts"):
            moments_along(x, 0, where, 0)
    for eps in (-1.0, np.nan):
        with pytest.raises(ValueError, match="eps"):
            inside_standardize(x, 0, None, 0, eps)
    with pytest.raises(ValueError, match="ddof"):
        moments_along(x, 0, None, np.inf)
    wrong: list[tuple[Any, str]] = [
        ((x, True, None, 0, 0.0), "axis is a bool"),
        ((x, (0.5, 1), None, 0, 0.0), "axis is a"),
        ((x, (0, 1, 0), None, 0, 0.0), "x has 2 dimensions"),
        ((x, 0, np.ones(6), 0, 0.0), "array of bool"),
        ((x, 0, np.ones((1, 4, 6), bool), 0, 0.0), "broadcasts"),
        ((x * 1j, 0, None, 0, 0.0), "float32 or float64"),
        ((3.0, 0, None, 0, 0.0), "float32 or float64"),
        ((x.astype(F16), 0, None, 0, 0.0), "no float16"),
    ]
    for arguments, match in wrong:
        with pytest.raises(numba.TypingError, match=match):
            inside_standardize(*arguments)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: fn.layer_norm(x, 3, residual=x), "takes no residual=.*write|add it"),
        (lambda x: fn.layer_norm(x, axis=1), "takes no axis="),
        (lambda x: fn.layer_norm(x), "normalized_shape"),
        (lambda x: fn.layer_norm(x, 3, None, None, 1e-5, None), "too many positional"),
        (lambda x: fn.layer_norm(x, 3, epsilon=1.0), "epsilon"),
        (lambda x: fn.rms_norm(x, 3, weight_offset=1.0), "weight . weight_offset"),
        (lambda x: fn.group_norm(x, 3, where=x > 0), "takes no where="),
        (lambda x: fn.batch_norm(x, training=True), "needs running_mean"),
        (lambda x: fn.instance_norm(x, channel_axis=-1), "channels are on axis 1"),
        (lambda x: fn.standardize(x, out=x), "write out"),
        (lambda x: fn.moments(x, 0, None), "too many positional"),
        (lambda x: fn.moments(x, 0, keepdims=x.size > 0), "how many dimensions"),
    ],
)
def test_options_that_are_refused(call: Any, match: str) -> None:
    with pytest.raises(numba.TypingError, match=match):
        numba.njit(call)(np.ones((3, 3), F32))


# --- In a user's program --------------------------------------------------------------------------


@pytest.mark.slow
def test_in_threads_and_kept_on_disk(tmp_path: Path) -> None:
    """A second process loads what the first one has compiled; arrays may be read-only."""
    program = tmp_path / "program.py"
    program.write_text("""
import numba, numpy as np, fastnorm as fn
ROW = np.arange(6, dtype=np.float32)
@numba.njit
def half(v):
    return v / 2
@numba.njit(parallel=True, cache=True)
def f(x):
    y = np.empty_like(x)
    for i in numba.prange(len(x)):
        z = fn.standardize(x[i], 0, ddof=1) + fn.moments(x[i], axis=1)[1][0]
        y[i] = fn.layer_norm(z, 6, ROW, activation="relu") + fn.rms_norm(z, 6, activation=half)
    return y
x = np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float32)
right = np.empty_like(x)
for i in range(8):
    z = (fn.standardize(x[i], 0, ddof=1) + fn.moments(x[i], axis=1)[1][0]).astype(np.float32)
    right[i] = fn.layer_norm(z, 6, ROW, activation="relu") + fn.rms_norm(z, 6, activation=half)
assert np.allclose(f(x), right, atol=1e-5), abs(f(x) - right).max()
print(sum(f.stats.cache_hits.values()))
""")
    for hits in "01":
        run = run_python(str(program), NUMBA_CACHE_DIR=str(tmp_path / "kept"))
        assert run.stdout.strip() == hits, run.stderr


@pytest.mark.slow
def test_norms_are_known_without_an_import() -> None:
    """Numba itself finds them, by an entry point of the installed package."""
    code = """
import numba, numpy as np, fastnorm as fn
@numba.njit
def f(x):
    return fn.layer_norm(x, 3)
print(f(np.array([[1.0, 2.0, 3.0]])).round(3).tolist())
"""
    run = run_python("-c", code)
    assert run.stdout.strip() == "[[-1.225, 0.0, 1.225]]", run.stderr
