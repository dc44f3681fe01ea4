"""Gradients through an activation: against long double, repeated, and of functions of the user's.

The oracle is the reference's forward pass in long double, a difference quotient of the reference's
activation there, and the reference's gradient.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _formulas
from fastnorm.operations import Parameters
from fastnorm.schedule import BLOCK, MAX_UNTILED_COLUMNS

from .helpers import (
    DTYPES,
    F16,
    F32,
    F64,
    Array,
    assert_same_bits,
    call,
    data,
    epsilon,
    guarded_copy,
    named,
    non_temporal,
    tolerance,
    without,
)
from .test_backward import (
    BACKWARD,
    LAYOUTS,
    along,
    by_layout,
    by_operation,
    exact_gradients,
    keywords,
    on_every_backend,
    parameters,
    sizes,
    spread_weight,
    statistics,
)

numba = pytest.importorskip("numba")

ACTIVATIONS = tuple(_formulas.ACTIVATIONS)
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=named)

# No slope's own slope is greater, on any number: 0.8, of gelu at 0.
BEND = 1.0


@numba.njit
def cube(v):
    return v * v * v


@numba.njit
def cube_slope(v):
    return 3 * v * v


def slope_of(activation: Any, z: Array) -> Array:
    """The derivative in long double: that of a kink's right side is not asked for here."""
    if activation == "relu":
        return (z > 0).astype(z.dtype)
    if activation == "relu6":
        return ((z > 0) & (z < 6)).astype(z.dtype)
    if activation is cube:
        return 3 * z * z
    f = _formulas.ACTIVATIONS[activation]
    z = np.clip(z, -300, 300)  # beyond, all or nothing passes
    # of the fourth order: 1e-3 to the fourth, and 1e-19 over the step
    h = np.longdouble(1e-3)
    with np.errstate(all="ignore"):
        return (8 * (f(z + h) - f(z - h)) - (f(z + 2 * h) - f(z - 2 * h))) / (12 * h)


def taken(op: Any, p: Parameters, residual: Any = None) -> Parameters:
    """What the backward function takes besides: bias and residual."""
    found = {} if residual is None else {"residual": residual}
    return found | ({"bias": p["bias"]} if op.name != "rms_norm" and "bias" in p else {})


class Found(NamedTuple):
    """What goes into the activation, and how far off dy times the slope may be."""

    z: Array
    loose: Array


def off_by(
    op: Any, dy: Any, x: Any, stats: Any, p: Parameters, added: Parameters, activation: Any
) -> Found:
    """By given statistics, in long double.

    What goes into the slope is off by 8 halves of the sizes of its terms; where a kink lies within
    that, either side is right. The slope is off by 8 more, and by 1e-11 the oracle's.
    """
    half = epsilon(F64 if x.dtype.itemsize == 8 else F32) / 2
    mean, rstd = (
        np.asarray(along(op, s, x, p), np.longdouble) for s in (0 * stats[-1], *stats)[-2:]
    )
    parts = [(np.asarray(x).astype(np.longdouble) - mean) * rstd * spread_weight(op, x, p)]
    if "bias" in added:
        parts.append(spread_weight(op, x, without(p, "weight_offset") | {"weight": added["bias"]}))
    if "residual" in added:
        parts.append(np.asarray(added["residual"]).astype(np.longdouble))
    z, terms = sum(parts), sum(abs(part) for part in parts)
    size = abs(np.asarray(dy).astype(np.float64))
    bend = BEND if activation is not cube else 6 * (1 + abs(z))
    off = 8 * half * terms
    loose = size * (bend * off + 16 * half * (1 + abs(slope_of(activation, z))) + 1e-11)
    if activation in ("relu", "relu6"):
        kink = (abs(z) <= off) | ((activation == "relu6") & (abs(z - 6) <= off))
        loose = loose + np.where(kink, size, 0)
    return Found(z, loose.astype(np.float64))


def check(
    op: Any, dy: Any, x: Any, p: Parameters, activation: Any, residual: Any = None, **more: Any
) -> tuple[Array, ...]:
    """Compare with the oracle, element by element; return what came."""
    stats = statistics(op, x, without(p, "activation"))
    back = getattr(fn, str(op.backward))
    options = keywords(op, p) | taken(op, p, residual) | {"activation": activation} | more
    got = back(dy, x, *stats, **options)
    computing = F64 if x.dtype.itemsize == 8 else F32
    z, loose = off_by(op, dy, x, stats, p, taken(op, p, residual), activation)
    g = dy.astype(np.longdouble) * slope_of(activation, z)
    exact = exact_gradients(op, g, x, stats, p)
    passed = sizes(op, loose, x, stats, p)
    halves = sizes(op, np.asarray(abs(g), np.float64), x, stats, p)
    for value, right, more_off, size in zip(got, exact, passed, halves):
        terms_added = x.size if computing == F64 else 0
        roundings = 16 + terms_added
        own = epsilon(F64 if value.dtype.itemsize == 8 else F32)
        roundings = int(np.ceil(roundings * max(1.0, epsilon(computing) / own)))
        allowed = tolerance(right, value.dtype, size, roundings) + more_off
        assert (abs(value.astype(np.longdouble) - right) <= allowed).all(), (op.name, activation)
    if residual is not None:
        assert got[-1].dtype == residual.dtype
        assert got[-1].shape == x.shape
        allowed = loose + epsilon(residual.dtype) * abs(g) + 1e-7 * (residual.dtype == F16)
        assert (abs(got[-1].astype(np.longdouble) - g) <= allowed).all()
    result: tuple[Array, ...] = got
    return result


@on_every_backend
@by_layout
@by_operation
@by_activation
def test_every_activation(activation: str, op: Any, layout: str) -> None:
    for dtype in DTYPES:
        x = LAYOUTS[layout](2 * data((3, 8, 5, 6), dtype, 0.5))
        dy = LAYOUTS[layout](data((3, 8, 5, 6), dtype, seed=1))
        for weights in ("none", "shared", "per sample", "full"):
            p = parameters(op, x, weights)
            check(op, dy, x, p, activation)


@on_every_backend
@by_layout
@by_operation
def test_with_a_residual(op: Any, layout: str) -> None:
    lie = LAYOUTS[layout]
    for dtype in DTYPES:
        x, dy = (lie(data((3, 8, 5, 6), dtype, seed=i)) for i in (0, 1))
        for kind in {dtype, F32, F16}:
            residual = lie(data((3, 8, 5, 6), kind, seed=2))
            for activation in ("silu", "relu"):
                got = check(op, dy, x, parameters(op, x), activation, residual)
                assert len(got) == 2 + len(op.stats)


# Beyond a block, a tile of columns, a group of tiles and their ends; planes and rows of one number.
SHAPES = [
    (3, 2 * BLOCK + 4), (1, 5 * BLOCK + 4), (500, 4), (2, 4, 2 * BLOCK + 3), (5, 8, 1),
    (2, 2400, 4, 4), (3, 2 * MAX_UNTILED_COLUMNS + 8, 7), (2, 12, 65, 3), (40, 8, 4, 4),
    (1, 4, 9, 9),
]  # fmt: skip


def takes(op: Any, shape: tuple[int, ...]) -> bool:
    """Whether a norm has more than one number for each statistic there."""
    numbers = {"batch_norm": shape[:1] + shape[2:], "instance_norm": shape[2:]}
    return len(shape) >= op.min_ndim and np.prod(numbers.get(op.name, shape)) > 1


@by_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_beyond_blocks_and_tiles(shape: tuple[int, ...], layout: str) -> None:
    lie = LAYOUTS[layout]
    for op in BACKWARD:
        if not takes(op, shape):
            continue
        for dtype, other in ((F32, F16), (F64, F32), (F16, F32)):  # dy is converted in tiles
            x, dy = lie(data(shape, dtype)), lie(data(shape, other, seed=1))
            for activation, residual in (
                ("silu", None),
                ("gelu_tanh", lie(data(shape, dtype, seed=2))),
            ):
                p = parameters(op, x)
                check(op, dy, x, p, activation, residual)


@on_every_backend
@by_operation
def test_arrays_that_lie_in_any_way(op: Any) -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((2, 6, 16, 10, 14)).astype(np.float32)
    x, dy = whole[0, :, ::2, ::-1, 1::2], whole[1, ::-1, ::2, :, ::2]
    p = parameters(op, x)
    check(op, dy, x, p, "silu")
    check(op, dy, x, p, "silu", whole[0, ::-1, 1::2, :, ::2])
    check(op, np.broadcast_to(np.float32(0.5), x.shape), x, p, "gelu_tanh")
    check(op, dy.astype(">f4"), x, p, "silu")
    turned = x.transpose(0, 1, 3, 2)
    check(op, dy.transpose(0, 1, 3, 2), turned, parameters(op, turned), "silu")


@on_every_backend
@by_layout
@by_operation
def test_how_dy_and_a_residual_lie_decides_no_bit(op: Any, layout: str) -> None:
    for shape in ((3, 8, 5, 6), (4, 16, 3, 3), (1, 8, 5, 6)):
        x, dy, residual = (LAYOUTS[layout](data(shape, F32, seed=i)) for i in range(3))
        p = parameters(op, x)
        stats = statistics(op, x, p)
        options = keywords(op, p) | taken(op, p) | {"activation": "gelu_tanh"}
        back = getattr(fn, str(op.backward))
        right = back(dy, x, *stats, residual=residual, **options)
        room = np.zeros((2, *shape[:-1], 2 * shape[-1]), np.float32)
        room[0, ..., ::2], room[1, ..., ::2] = dy, residual
        for turn in LAYOUTS.values():
            for d, r in ((turn(dy), residual), (dy, turn(residual)), room[..., ::2]):
                for a, b in zip(right, back(d, x, *stats, residual=r, **options)):
                    assert_same_bits(a, b)


@on_every_backend
@by_operation
def test_where_and_given_statistics(op: Any) -> None:
    x, dy = data((4, 8, 5, 6), F32), data((4, 8, 5, 6), F32, seed=1)
    p = parameters(op, x) | {"where": np.arange(x.size).reshape(x.shape) % 7 != 3}
    check(op, dy, x, p, "silu")


def test_inference_of_batch_norm() -> None:
    """Statistics that x did not move."""
    x, dy, w = data((4, 8, 5, 6), F64), data((4, 8, 5, 6), F64, seed=1), np.linspace(0.5, 2, 8)
    mean, rstd = np.linspace(-1, 1, 8), np.linspace(1, 2, 8)
    b = w - 1
    places = (1, 8, 1, 1)
    got = fn.batch_norm_backward(dy, x, mean, rstd, w, training=False, bias=b, activation="silu")
    xhat = (x - mean.reshape(places)) * rstd.reshape(places)
    z = xhat * w.reshape(places) + b.reshape(places)
    g = dy * np.asarray(slope_of("silu", z.astype(np.longdouble)), np.float64)
    right = g * (w * rstd).reshape(places), (g * xhat).sum((0, 2, 3)), g.sum((0, 2, 3))
    for value, exact in zip(got, right):
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-10 * abs(exact).max())


# --- Repeated, on threads, alone ------------------------------------------------------------------


@on_every_backend
@by_layout
@by_dtype
@by_operation
def test_repeated_calls_have_the_same_bits(op: Any, dtype: Any, layout: str) -> None:
    """The first is described, the next come from the cache: in turns with others of its kind."""
    lie = LAYOUTS[layout]
    cases = []
    for seed in (0, 3):
        x, dy, residual = (lie(data((3, 8, 5, 6), dtype, seed=seed + i)) for i in range(3))
        p = parameters(op, x)
        stats = statistics(op, x, p)
        for activation in ("relu", "silu", None):
            for more in ({}, {"residual": residual}):
                options = keywords(op, p) | taken(op, p) | more | {"activation": activation}
                cases.append((dy, x, stats, options))
    back = getattr(fn, str(op.backward))
    first = [back(dy, x, *stats, **options) for dy, x, stats, options in cases]
    for _ in range(2):
        again = [back(dy, x, *stats, **options) for dy, x, stats, options in cases]
        for one, other in zip(first, again):
            assert len(one) == len(other)
            for a, b in zip(one, other):
                assert a.strides == b.strides
                assert_same_bits(a, b)
    other = [copy_of(case) for case in cases]
    for one, (dy, x, stats, options) in zip(first, other):
        for a, b in zip(one, back(dy, x, *stats, **options)):
            assert_same_bits(a, b)


def test_windows_that_overlap() -> None:
    """Axes with the same step, which an array for the gradient may take in either order."""
    for dtype in DTYPES:
        x = np.lib.stride_tricks.sliding_window_view(data((40,), dtype), (6,)).copy()
        windows = np.lib.stride_tricks.sliding_window_view(data((40,), dtype), 6)
        dy, residual = data(windows.shape, dtype, seed=1), data(windows.shape, dtype, seed=2)
        _, mean, rstd = fn.layer_norm(windows, 6, return_stats=True)
        options = {"activation": "silu", "residual": residual}
        right = fn.layer_norm_backward(dy, x, mean, rstd, 6, **options)
        for _ in range(3):
            for a, b in zip(right, fn.layer_norm_backward(dy, windows, mean, rstd, 6, **options)):
                assert_same_bits(a, b)


def copy_of(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """A call whose arrays lie in other memory."""
    dy, x, stats, options = case
    moved = {k: v.copy("K") if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return dy.copy("K"), x.copy("K"), tuple(s.copy() for s in stats), moved


@on_every_backend
@by_layout
@by_operation
def test_threads_machines_and_samples(op: Any, layout: str) -> None:
    shape = (6, 16, 40, 37)
    for dtype in (F32, F16, F64):
        x, dy, residual = (LAYOUTS[layout](data(shape, dtype, seed=i)) for i in range(3))
        p = parameters(op, x)
        stats = statistics(op, x, p)
        options = keywords(op, p) | taken(op, p, residual) | {"activation": "silu"}
        back = getattr(fn, str(op.backward))
        with fn.threads(1):
            right = back(dy, x, *stats, **options)
        for n in (2, 5):
            with fn.threads(n):
                for a, b in zip(right, back(dy, x, *stats, **options)):
                    assert_same_bits(a, b)
        with non_temporal():
            for a, b in zip(right, back(dy, x, *stats, **options)):
                assert_same_bits(a, b)
        if op.name == "batch_norm":
            continue
        for i in (0, 5):
            own = options | {"residual": residual[i : i + 1]}
            one = back(dy[i : i + 1], x[i : i + 1], *[s[i : i + 1] for s in stats], **own)
            assert_same_bits(one[0], right[0][i : i + 1])
            assert_same_bits(one[-1], right[-1][i : i + 1])


@by_layout
@by_operation
def test_nothing_outside_the_arrays_is_touched(op: Any, layout: str) -> None:
    for shape in ((2, 8, 5, 7), (1, 4, 70, 61)):
        for dtype in (F32, F16, F64):
            arrays = [LAYOUTS[layout](data(shape, dtype, seed=i)) for i in range(3)]
            before = [a.copy() for a in arrays]
            for side in ("before", "after"):
                x, dy, residual = (guarded_copy(a, side) for a in arrays)
                p = parameters(op, x)
                p = {
                    k: guarded_copy(v, side) if k in ("weight", "bias") else v for k, v in p.items()
                }
                for _ in range(2):
                    check(op, dy, x, p, "silu", residual)
            for a, b in zip(arrays, before):
                assert_same_bits(a, b)


# --- Numbers that are not ordinary ----------------------------------------------------------------


@on_every_backend
@by_activation
@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=named)
def test_slopes_of_any_number(activation: str, dtype: Any) -> None:
    """By the bias: at every size of number, also those that leave the range on the way."""
    largest = float(np.finfo(np.float32 if dtype == F16 else dtype).max)
    parts = np.geomspace(1e-30, 1e30, 200)
    z = np.concatenate(
        [-parts[::-1], [0.0], parts, np.linspace(-60, 60, 4001), [largest, -largest]]
    )
    z = z.astype(np.float32 if dtype == F16 else dtype)
    x = np.zeros((1, len(z)), dtype)
    zero, one = np.zeros((1, 1)), np.ones((1, 1))
    got = fn.layer_norm_backward(
        np.ones_like(x, np.float32), x, zero, one, len(z), bias=z, activation=activation,
        residual=np.zeros_like(z)[None],
    )[-1][0]  # fmt: skip
    right = slope_of(activation, z.astype(np.longdouble))
    if activation.startswith("relu"):
        assert np.array_equal(got, right)
        return
    # 4 halves of 1, and of what the slope changes within half a unit of z
    half = epsilon(F64 if dtype == F64 else F32) / 2
    assert np.isfinite(got).all()
    assert (abs(got - right) <= 8 * half + 1e-11).all()


@on_every_backend
@by_operation
@by_activation
def test_not_a_number_stays_in_its_group(activation: str, op: Any) -> None:
    x, dy = data((3, 8, 4, 5), F32), data((3, 8, 4, 5), F32, seed=1)
    clean = run(op, dy, x, activation)
    for bad in (np.nan, np.inf, -np.inf):
        for spoiled in ("x", "dy", "residual"):
            arrays = {"x": x.copy(), "dy": dy.copy(), "residual": np.zeros_like(x)}
            arrays[spoiled][1, 5, 2, 3] = bad
            got = run(op, arrays["dy"], arrays["x"], activation, arrays["residual"])
            if op.name != "batch_norm":
                assert_same_bits(got[0][0], clean[0][0])
                assert_same_bits(got[0][2], clean[0][2])
            else:
                assert_same_bits(got[0][:, :5], clean[0][:, :5])
            # by given statistics x has no part but in the slope, and NaN passes ReLU, as in PyTorch
            by_given = op.label == "batch_norm (inference)" and activation.startswith("relu")
            if spoiled != "residual" and not np.isinf(bad) and not (by_given and spoiled == "x"):
                assert np.isnan(got[0][1, 5, 2, 3])


def run(op: Any, dy: Any, x: Any, activation: Any, residual: Any = None) -> tuple[Array, ...]:
    p = parameters(op, x)
    residual = np.zeros_like(x) if residual is None else residual
    options = keywords(op, p) | taken(op, p, residual) | {"activation": activation}
    with np.errstate(all="ignore"):
        stats = statistics(op, x, p)
    result: tuple[Array, ...] = getattr(fn, str(op.backward))(dy, x, *stats, **options)
    return result


def test_groups_out_of_range() -> None:
    """Rows of 1e-200 and 1e200: scaled where the forward pass scales them."""
    for factor in (1e-200, 1e200):
        x = data((4, 64), F64)
        dy = data((4, 64), F64, seed=1)
        _, mean, rstd = fn.layer_norm(x, 64, eps=0.0, return_stats=True)
        right = fn.layer_norm_backward(dy, x, mean, rstd, 64, activation="gelu")
        _, mean, rstd = fn.layer_norm(x * factor, 64, eps=0.0, return_stats=True)
        got = fn.layer_norm_backward(dy, x * factor, mean, rstd, 64, activation="gelu")
        np.testing.assert_allclose(got[0] * factor, right[0], rtol=0, atol=1e-13)
        np.testing.assert_allclose(got[1], right[1], rtol=0, atol=1e-12)


@on_every_backend
@by_operation
def test_of_nothing(op: Any) -> None:
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
        x = np.zeros(shape, np.float32)
        if op.name == "batch_norm" or (op.name == "instance_norm" and 0 in shape[2:]):
            continue
        p = parameters(op, x)
        got = run(op, x, x, "silu")
        assert got[0].shape == got[-1].shape == x.shape
        assert not got[1].any()
        assert p is not None


def test_relu_opens_where_the_result_is_positive() -> None:
    """z is computed again as the forward pass computes it."""
    for dtype in (F32, F64):
        for shape in ((64, 768), (8, 64, 33, 31)):
            x = data(shape, dtype)
            for op in filter(lambda op: takes(op, shape), BACKWARD):
                p = parameters(op, x)
                y = call(op, x, p, activation="relu")
                opened = run(op, np.ones_like(x), x, "relu")[-1]
                differs = (y > 0) != (opened > 0)
                z = call(op, x, p)
                assert (abs(z[differs]) <= 8 * epsilon(dtype)).all()
                assert differs.mean() < 1e-4


# --- Functions of the user's ----------------------------------------------------------------------


@on_every_backend
@by_layout
@by_operation
def test_a_function_and_its_derivative(op: Any, layout: str) -> None:
    for dtype in DTYPES:
        x, dy, residual = (LAYOUTS[layout](data((3, 8, 5, 6), dtype, seed=i)) for i in range(3))
        for r in (None, residual):
            got = check(op, dy, x, parameters(op, x), cube, r, derivative=cube_slope)
            again = check(op, dy, x, parameters(op, x), cube, r, derivative=cube_slope)
            for a, b in zip(got, again):
                assert_same_bits(a, b)
            if dtype != F64:
                check(op, dy, x, parameters(op, x), cube, r, derivative="central")


@on_every_backend
def test_central_differences() -> None:
    @numba.njit
    def mish(v):
        return v * np.tanh(np.log1p(np.exp(v)))

    x, dy = data((16, 64), F64), data((16, 64), F64, seed=1)
    _, mean, rstd = fn.layer_norm(x, 64, activation=mish, return_stats=True)
    got = fn.layer_norm_backward(
        dy, x, mean, rstd, 64, activation=mish, derivative="central", residual=0 * x
    )[-1]
    z = fn.layer_norm(x, 64).astype(np.longdouble)
    h = np.longdouble(1e-3)

    def f(v: Array) -> Array:
        return v * np.tanh(np.log1p(np.exp(v)))

    exact = (8 * (f(z + h) - f(z - h)) - (f(z + 2 * h) - f(z - 2 * h))) / (12 * h)
    assert abs(got - dy * exact).max() < 1e-8  # "about nine digits"


def test_differences_of_a_function_of_floats_are_refused() -> None:
    """Steps of 6e-6 are lost where it rounds to float32."""
    single = numba.njit("float32(float32)")(lambda v: v * v)
    x = data((2, 8), F32)
    _, mean, rstd = fn.layer_norm(x, 8, return_stats=True)
    with pytest.raises(TypeError, match=r"compiled for float32.*without a signature"):
        fn.layer_norm_backward(x, x, mean, rstd, 8, activation=single, derivative="central")
    double = numba.njit("float64(float64)")(lambda v: v * v)
    fn.layer_norm_backward(x, x, mean, rstd, 8, activation=double, derivative="central")


def test_what_a_derivative_raises_is_raised() -> None:
    @numba.njit
    def refuses(v):
        if v > 0:
            raise ValueError("no")
        return v

    x = data((2, 8), F32)
    _, mean, rstd = fn.layer_norm(x, 8, return_stats=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="refuses"):
            fn.layer_norm_backward(x, x, mean, rstd, 8, activation=cube, derivative=refuses)
        with pytest.raises(ValueError, match=r"derivative refuses \(central differences\) raised"):
            fn.layer_norm_backward(x, x, mean, rstd, 8, activation=refuses, derivative="central")


# --- Arrays of other libraries --------------------------------------------------------------------


@by_operation
@pytest.mark.parametrize("chunks", [(3, 8, 5, 6), (2, 4, 5, 6), (1, 3, 2, 4)], ids=str)
def test_dask(op: Any, chunks: tuple[int, ...]) -> None:
    da = pytest.importorskip("dask.array")
    x, dy, residual = (data((3, 8, 5, 6), F32, seed=i) for i in range(3))
    p = parameters(op, x)
    stats = statistics(op, x, p)
    back = getattr(fn, str(op.backward))
    for more in (
        {"activation": "silu"},
        {"activation": "relu6", "residual": residual},
        {"activation": cube, "derivative": cube_slope},
        {"residual": residual},
    ):
        options = keywords(op, p) | taken(op, p) | more
        right = back(dy, x, *stats, **options)
        lazy = options
        if "residual" in more:
            lazy = options | {"residual": da.from_array(residual, chunks=chunks)}
        found = back(
            da.from_array(dy, chunks=chunks), da.from_array(x, chunks=chunks), *stats, **lazy
        )
        assert len(found) == len(right)
        for value, exact in zip(found, right):
            got = value.compute()
            assert got.dtype == exact.dtype
            assert got.shape == exact.shape
            np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * abs(exact).max())


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"activation": "silo"}, ValueError, "did you mean 'silu'"),
        ({"activation": 3}, TypeError, "activation is 3"),
        ({"activation": max}, ValueError, "numba.njit"),
        ({"activation": cube}, ValueError, "central"),
        ({"activation": cube, "derivative": "exact"}, ValueError, "central"),
        ({"activation": cube, "derivative": 1}, TypeError, "derivative is 1"),
        ({"activation": cube, "derivative": abs}, TypeError, "compiled with Numba"),
        ({"activation": "silu", "derivative": cube_slope}, ValueError, "whose derivative is known"),
        ({"derivative": "central"}, ValueError, "write derivative=None"),
        ({"activation": "silu", "bias": np.ones(5)}, ValueError, r"bias has shape \(5,\)"),
        ({"activation": "silu", "bias": np.ones(8, complex)}, TypeError, "bias"),
        ({"activation": "silu", "residual": np.ones((1, 8))}, ValueError, "residual has shape"),
        ({"residual": np.ones((1, 8))}, ValueError, "residual has shape"),
        ({"bias": np.ones(5)}, ValueError, r"bias has shape \(5,\)"),
    ],
)
def test_bad_input(options: Any, error: Any, words: str) -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    _, mean, rstd = fn.layer_norm(x, 8, return_stats=True)
    for _ in range(2):
        with pytest.raises(error, match=words):
            fn.layer_norm_backward(x, x, mean, rstd, 8, **options)


@on_every_backend
def test_a_residual_of_another_half_type() -> None:
    x = data((4, 8), F32)
    _, mean, rstd = fn.layer_norm(x, 8, return_stats=True)
    for dy, residual in itertools.product(DTYPES, DTYPES):
        got = fn.layer_norm_backward(x.astype(dy), x, mean, rstd, 8, residual=x.astype(residual))
        assert_same_bits(got[-1], x.astype(dy).astype(residual))


def test_nothing_warns_where_a_residual_is_of_half_precision() -> None:
    x, dy = data((2, 8), F32), np.full((2, 8), 1e30, np.float32)
    _, mean, rstd = fn.layer_norm(x, 8, return_stats=True)
    for _ in range(3):  # from the cache, too
        got = fn.layer_norm_backward(
            dy, x, mean, rstd, 8, residual=x.astype("f2"), activation="silu"
        )
        assert np.isinf(got[-1]).any()


@on_every_backend
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_dy_passes_where_relu_gets_no_number(activation: str) -> None:
    """As in PyTorch."""
    x, dy, residual = data((2, 8), F32), np.ones((2, 8), np.float32), np.zeros((2, 8), np.float32)
    residual[1, 3] = np.nan
    _, mean, rstd = fn.layer_norm(x, 8, return_stats=True)
    options = {"activation": activation, "residual": residual}
    assert fn.layer_norm_backward(dy, x, mean, rstd, 8, **options)[-1][1, 3] == 1


def test_without_an_activation_only_the_residual_has_a_gradient_more() -> None:
    x, dy = data((4, 8), F32), data((4, 8), F32, seed=1)
    _, mean, rstd = fn.layer_norm(x, 8, return_stats=True)
    plain = fn.layer_norm_backward(dy, x, mean, rstd, 8)
    got = fn.layer_norm_backward(dy, x, mean, rstd, 8, bias=np.ones(8), residual=x.astype("f8"))
    for a, b in zip(plain, got):
        assert_same_bits(a, b)
    assert_same_bits(got[3], dy.astype("f8"))
    own = fn.layer_norm_backward(dy, x, mean, rstd, 8, residual=x)[3]
    assert not np.shares_memory(own, dy)
