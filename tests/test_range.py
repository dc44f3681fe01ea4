"""Doubles from the smallest to the largest: nothing is lost where squares leave the range.

Data are whole numbers times a power of two, so that they are exact even where they are subnormal.
Such a power leaves a norm with eps = 0 as it is: what is right is computed without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm import _reference as reference

from .helpers import BACKENDS, BF16, F16, F32, F64, Array, assert_close, channels_last, named
from .test_mpi import Alone

# Exponents of the powers of two: numbers up to 999 as subnormal as can be, with squares that vanish
# or are subnormal, ordinary, with squares that overflow, and as large as can be.
POWERS = (-1074, -1040, -600, -520, 0, 505, 600, 1013)
SHAPE = (4, 6, 10)


@pytest.fixture(autouse=True)
def nothing_warns() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


def whole_numbers(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-999, 1000, shape).astype(F64)


def times(x: Array, power: int) -> Array:
    with np.errstate(all="ignore"):
        return np.ldexp(x, power)


def assert_near(found: Any, right: Any, relative: float, least: float = 0.0) -> None:
    """`found` within so much of `right`, relative to that; infinite where that is."""
    with np.errstate(all="ignore"):
        found, right = np.asarray(found), np.asarray(right)
        good = (found == right) | (abs(found - right) <= relative * abs(right) + least)
    assert good.all(), (found[~good], right[~good])


def lazily(x: Array, **given: Any) -> Any:
    """x in chunks that cut every group, and its other operands as they are."""
    da = pytest.importorskip("dask.array")
    return da.from_array(x, chunks=(2, 4, 3)[: x.ndim])


# --- The norms ------------------------------------------------------------------------------------

HALVES = np.linspace(0.5, 2.0, 6)
# What is asked of fastnorm and, by the same name, of the reference; each is of x without its power.
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": ("layer_norm", {"normalized_shape": 10, "eps": 0.0}),
    "layer, axis 1": ("layer_norm", {"axis": 1, "weight": HALVES, "eps": 0.0}),
    "rms": ("rms_norm", {"normalized_shape": (6, 10), "eps": 0.0}),
    "batch": ("batch_norm", {"training": True, "weight": HALVES, "bias": HALVES, "eps": 0.0}),
    "instance": ("instance_norm", {"weight": HALVES, "eps": 0.0}),
    "group": ("group_norm", {"num_groups": 2, "bias": HALVES, "eps": 0.0}),
    "l2": ("l2_normalize", {"axis": (0, 2), "eps": 0.0}),
    "weight_norm": ("weight_norm", {"g": np.arange(1.0, 5.0)}),
    "weight_standardize": ("weight_standardize", {"eps": 0.0}),
    "standardize": ("standardize", {"axis": (0, 2)}),
    "local response": ("local_response_norm", {"size": 3, "alpha": 0.7, "beta": 0.5, "k": 0.0}),
}
MASKED = ("layer", "layer, axis 1", "rms", "batch", "instance", "group", "standardize")


def check(name: str, power: int, lay: Callable[[Array], Any], **options: Any) -> None:
    function, given = NORMS[name]
    x = whole_numbers()
    exact = getattr(reference, function)(x, **given, **options, dtype=np.longdouble)
    y = getattr(fn, function)(lay(times(x, power)), **given, **options)
    y = y.compute(scheduler="synchronous") if lay is lazily else y
    assert_close(y, exact, float(abs(exact).max()))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, power: int) -> None:
    check(name, power, np.asarray)
    if name in MASKED:
        check(name, power, np.asarray, where=np.random.default_rng(1).random(SHAPE) < 0.8)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", NORMS)
def test_norms_in_chunks(name: str, power: int) -> None:
    check(name, power, lazily)
    if name in MASKED:
        check(name, power, lazily, where=np.random.default_rng(1).random(SHAPE) < 0.8)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("lay", [np.asarray, lazily], ids=["numpy", "dask"])
def test_statistics_that_are_returned(lay: Any, power: int) -> None:
    x = whole_numbers()
    _, mean, rstd = reference.layer_norm(x, 10, eps=0.0, return_stats=True, dtype=np.longdouble)
    _, *found = fn.layer_norm(lay(times(x, power)), 10, eps=0.0, return_stats=True)
    if lay is lazily:
        found = [f.compute(scheduler="synchronous") for f in found]
    with np.errstate(all="ignore"):  # rstd is infinite where std is subnormal
        right = np.ldexp(mean, power), np.ldexp(rstd, -power).astype(F64)
    # a few roundings of numbers up to 999, and of a subnormal mean to the next of these
    allowed = math.ldexp(8 * 2.0**-53 * 999, power) + 2.0**-1074
    assert (abs(found[0] - right[0]) <= allowed).all()
    assert_near(found[1], right[1], 1e-15)


@pytest.mark.parametrize("lay", [np.asarray, lazily], ids=["numpy", "dask"])
def test_eps_beside_numbers_that_are_nothing(lay: Any) -> None:
    x = whole_numbers()
    mean = x.mean(-1, keepdims=True)
    for power in (-600, -1074):
        y = fn.layer_norm(lay(times(x, power)), 10, eps=2.0**-10)
        y = y.compute(scheduler="synchronous") if lay is lazily else y
        right = times(x - mean, power + 5)
        assert_near(y, right, 1e-12, 2.0**-1074 * 64)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "power"), [(F64, -600), (F64, 600), (F32, 115), (F32, -130)])
@pytest.mark.parametrize("lie", [np.ascontiguousarray, channels_last])
def test_what_follows_a_norm(lie: Any, dtype: Any, power: int) -> None:
    x, residual = whole_numbers((3, 8, 5, 7)), whole_numbers((3, 8, 5, 7), 1) / 999
    right = fn.group_norm(x, 4, eps=0.0, residual=residual, activation="relu")
    assert (right[:, :, 1:] > 0).any()
    found = fn.group_norm(
        lie(times(x, power).astype(dtype)),
        4,
        eps=0.0,
        residual=lie(residual.astype(dtype)),
        activation="relu",
    )
    # of numbers up to 3, rounded half a dozen times
    assert_near(found, right, 0.0, 16 * np.finfo(dtype).eps)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("lay", [np.asarray, lazily], ids=["numpy", "dask"])
def test_global_response(lay: Any, power: int) -> None:
    x = whole_numbers() if power < 1013 else np.round(whole_numbers() / 64)
    x[1] = 0  # lengths that are all 0 are 0 over their mean
    zeros = np.zeros(6)
    exact = reference.global_response_norm(x, HALVES, zeros, eps=0.0, dtype=np.longdouble)
    y = fn.global_response_norm(lay(times(x, power)), HALVES, zeros, eps=0.0)
    y = y.compute(scheduler="synchronous") if lay is lazily else y
    # a dozen roundings, and of what is subnormal to the next such number
    with np.errstate(all="ignore"):
        right = np.ldexp(exact, power)
    assert (abs(y - right) <= 12 * 2.0**-53 * abs(right) + 2.0**-1074).all()


@pytest.mark.parametrize(
    ("beta", "power", "k"),
    [(0.75, 532, 1.0), (0.75, 1000, 1.0), (1 / 3, -1060, 0.0), (2.0, 600, 3.0), (0.25, -520, 0.0)],
)
def test_local_response(beta: float, power: int, k: float) -> None:
    """Where k is nothing to the squares, y goes as x^(1 - 2 beta)."""
    x = whole_numbers()
    given = {"size": 5, "alpha": 0.3, "beta": beta}
    right = reference.local_response_norm(x, **given, k=0.0, dtype=np.longdouble)
    y = fn.local_response_norm(times(x, power), **given, k=k)
    factor = np.longdouble(2.0) ** (power * (1 - 2 * np.longdouble(beta)))
    with np.errstate(all="ignore"):
        right = right * factor
        # (1 - 2 beta) itself is rounded, and its power of two with it
        error = 16 * 2.0**-53 * abs(right) * (1 + abs(power) * 2.0**-8) + 2.0**-1074
    assert (abs(y - right) <= error).all()
    # a sample out of range leaves its neighbours as they are
    both = np.stack([times(x[0], power), x[1]])
    assert (fn.local_response_norm(both, **given, k=k)[1] == fn.local_response_norm(
        x[1:2], **given, k=k)[0]).all()  # fmt: skip


# --- Inside compiled code -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("numba" not in BACKENDS, reason="needs Numba")
def test_norms_inside_compiled_code() -> None:
    import numba

    @numba.njit
    def several(x, weight):  # type: ignore[no-untyped-def]
        return (
            fn.layer_norm(x, 10, None, None, 0.0),
            fn.rms_norm(x, (6, 10), None, 0.0),
            fn.group_norm(x, 2, weight, None, 0.0),
            fn.instance_norm(x, eps=0.0),
            fn.moments(x),
        )

    x = whole_numbers()
    exact = (
        reference.layer_norm(x, 10, eps=0.0, dtype=np.longdouble),
        reference.rms_norm(x, (6, 10), eps=0.0, dtype=np.longdouble),
        reference.group_norm(x, 2, HALVES, eps=0.0, dtype=np.longdouble),
        reference.instance_norm(x, eps=0.0, dtype=np.longdouble),
    )
    for power in POWERS:
        *found, moments = several(times(x, power), HALVES)
        for y, right in zip(found, exact, strict=True):
            assert_close(y, right, float(abs(right).max()))
        for value, same in zip(moments, fn.moments(times(x, power)), strict=True):
            assert_near(value, same, 1e-15)
    for odd in ([np.inf], [-np.inf, -np.inf], [np.inf, -np.inf], [np.nan, np.inf]):
        for places in ((0, 9), (5, 3)):
            x = whole_numbers()
            for value, place in zip(odd, places):
                x[0, 0, place] = value
            mean, var = several(x, HALVES)[4]
            np.testing.assert_equal(mean, sum_of(odd))
            assert math.isnan(var)


# --- Moments --------------------------------------------------------------------------------------


def exactly(x: Array) -> tuple[Fraction, Fraction]:
    """Mean and variance of numbers."""
    values = [Fraction(float(v)) for v in x]
    mean = sum(values, Fraction(0)) / len(values)
    return mean, sum(((v - mean) ** 2 for v in values), Fraction(0)) / len(values)


def as_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def root(value: Fraction) -> float:
    """The square root, of numbers whose own range is larger than that of floats."""
    shift = 2 * ((value.numerator.bit_length() - value.denominator.bit_length()) // 2)
    shifted = value / Fraction(2) ** shift if value else value
    return math.ldexp(math.sqrt(shifted), shift // 2)


@st.composite
def parts_of_any_size(draw: Any) -> tuple[list[Array], list[int], int]:
    """Parts of numbers, each of its own size, an order to merge them in, and a place to begin."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    one = draw(st.integers(-1074, 1013))
    parts = []
    for n in draw(st.lists(st.integers(0, 12), min_size=1, max_size=5)):
        power = draw(st.sampled_from([one, one, -1074, -600, 0, 1013]))
        kind = draw(st.sampled_from(["any", "one value", "zeros"]))
        x = rng.integers(-999, 1000, n).astype(F64)
        x = np.full(n, x[0]) if n and kind == "one value" else x * (kind != "zeros")
        parts.append(times(x, power))
    return parts, draw(st.permutations(range(len(parts)))), draw(st.integers(0, len(parts)))


@settings(max_examples=200)
@given(parts_of_any_size())
def test_any_cut_of_any_numbers(case: tuple[list[Array], list[int], int]) -> None:
    parts, order, cut = case
    x = np.concatenate(parts)
    if not x.size:
        return
    pieces = [fn.Moments.from_array(part) for part in parts]
    tree = [sum([pieces[i] for i in some], fn.Moments()) for some in (order[:cut], order[cut:])]
    streamed = fn.Moments()
    for i in order:
        streamed.update(parts[i])
    mean, var = exactly(x)
    spread = root(var)
    for m in (fn.Moments.from_array(x), streamed, tree[0] + tree[1], tree[1].merge(tree[0])):
        assert m.count == x.size
        # as of ordinary numbers (test_moments.py), or to the next subnormal number
        error = Fraction(1e-14) * (abs(mean) + Fraction(spread)) + Fraction(2.0**-1074)
        assert abs(Fraction(float(m.mean)) - mean) <= error
        assert_near(m.var(), as_float(var), 1e-14, 2.0**-1074)
        assert_near(m.std(), spread, 1e-14, 2.0**-1074)
        again = fn.Moments.from_dict(m.to_dict())
        assert again == m
    assert fn.moments(x) == (fn.Moments.from_array(x).mean, fn.Moments.from_array(x).var())


def test_means_of_the_largest_and_smallest() -> None:
    assert fn.Moments().update([1.7e308]).update([-1.7e308]).mean == 0
    assert fn.Moments().update([1.7e308]).update([1.7e308]).mean == 1.7e308
    assert fn.moments([5e-324, 5e-324]) == (5e-324, 0.0)
    assert fn.moments([1e200, -1e200, 3e200]) == (1e200, np.inf)
    m = fn.Moments().update([1e200]).update([-1e200, 3e200])
    assert (m.mean, m.var()) == (1e200, np.inf)
    assert_near(m.std(), 1e200 * (8 / 3) ** 0.5, 4 * 2.0**-53)
    # what is of another size in another column stays what it is
    columns = np.array([[1e300, 1e-300, 1.0, 0.0], [-1e300, 3e-300, 3.0, 0.0]])
    by_column = fn.Moments(0).update(columns[:1]).update(columns[1:])
    assert_near(by_column.mean, [0.0, 2e-300, 2.0, 0.0], 2.0**-52)
    assert_near(by_column.std(), [1e300, 1e-300, 1.0, 0.0], 2.0**-52)


# --- Z-scores -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("ratio", [0, 100])
@pytest.mark.parametrize("ddof", [0, 1])
def test_z_scores(ddof: int, ratio: int, power: int) -> None:
    """As right with a mask and with ddof as without: the mean is more than one number."""
    n = 40
    x = np.random.default_rng(3).integers(0, 10, n) + 10.0 * ratio
    where = np.arange(n) % 4 != 0
    x[~where] = 3  # whatever
    mean, var = exactly(x[where])
    var *= Fraction(int(where.sum()), int(where.sum()) - ddof)
    right = [float(Fraction(float(v)) - mean) / math.sqrt(var) for v in x]
    big = times(x, power) if power < 1013 else times(x, 1010)
    # the deviation, rstd, their product and what is right: some five roundings
    allowed = 5 * 2.0**-53 * max(map(abs, right))
    for lay in (np.asarray, lazily):
        if lay is lazily and ratio:
            continue
        y = fn.standardize(lay(big), where=where, ddof=ddof)
        y = y.compute(scheduler="synchronous") if lay is lazily else y
        assert (abs(y - right) <= allowed).all(), abs(y - right).max()


# --- Infinities and what is no number -------------------------------------------------------------


def sum_of(odd: list[float]) -> float:
    with np.errstate(all="ignore"):
        return float(np.sum(odd))


def stats_of(x: Array, **options: Any) -> Any:
    return fn.layer_norm(x, axis=1, return_stats=True, **options)[1].ravel()


MEANS: dict[str, tuple[tuple[int, ...], Callable[[Array], Any]]] = {
    "row": ((3, 70), stats_of),
    "blocks": ((3, 9001), stats_of),
    "pieces": ((2, 70_001), stats_of),
    "columns": ((3, 5000), lambda x: stats_of(np.asfortranarray(x))),
    "masked": ((3, 9001), lambda x: stats_of(x, where=np.ones(x.shape, bool))),
    "groups": ((3, 9000), lambda x: fn.group_norm(
        x.reshape(3, 2, 4500), 1, return_stats=True)[1].ravel()),
    "moments": ((3, 9001), lambda x: fn.moments(x, 1)[0]),
}  # fmt: skip


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=named)
@pytest.mark.parametrize("path", MEANS)
def test_the_mean_beside_an_infinity(path: str, dtype: Any) -> None:
    """Infinite of one sign: that; of both, or with a NaN: NaN; wherever it stands."""
    shape, mean_of = MEANS[path]
    n = shape[1]
    ordinary = np.random.default_rng(0).integers(-9, 10, shape).astype(dtype)
    for odd in ([np.inf], [-np.inf], [np.inf, np.inf], [np.inf, -np.inf], [np.inf, np.nan]):
        for places in ((0, n - 1), (n - 1, 0), (n // 2, 3)):
            x = ordinary.copy()
            for value, place in zip(odd, places):
                x[1, place] = value
            mean = np.asarray(mean_of(x))
            np.testing.assert_equal(float(mean[1]), sum_of(odd))
            assert np.isfinite(mean[0])


def test_the_mean_of_merged_infinities() -> None:
    parts = [[1.0, 2.0], [np.inf], [1e300], [-1e-310]]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
        m = sum((fn.Moments().update(parts[i]) for i in order), fn.Moments())
        assert m.mean == np.inf
        assert math.isnan(m.var())
        assert math.isnan(m.update([-np.inf]).mean)
        assert fn.Moments.from_dict(m.to_dict()) == m
    da = pytest.importorskip("dask.array")
    x = np.ones((4, 6))
    x[1, 2], x[2, 0], x[2, 5] = np.inf, np.inf, -np.inf
    mean, var = (v.compute() for v in fn.moments(da.from_array(x, chunks=2), 1))
    np.testing.assert_array_equal(mean, [1.0, np.inf, np.nan, 1.0])
    np.testing.assert_array_equal(var, [0.0, np.nan, np.nan, 0.0])
    # with an infinity a root mean square is infinite, in chunks as in one piece
    y = fn.rms_norm(da.from_array(x, chunks=2), 6).compute()
    np.testing.assert_allclose(y, fn.rms_norm(x, 6), rtol=2.0**-52)


# --- Several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("power", [*POWERS, -510])
def test_batch_norm_of_several_processes(power: int) -> None:
    x = whole_numbers()
    exact = reference.batch_norm(x, None, None, HALVES, training=True, eps=0.0, dtype=np.longdouble)
    big = times(x, power)
    for axis in (1, -1):
        norm = fn.nn.BatchNorm(6, eps=0.0, dtype=F64, comm=Alone(), channel_axis=axis)
        plain = fn.nn.BatchNorm(6, eps=0.0, dtype=F64, channel_axis=axis)
        norm.weight = plain.weight = HALVES
        for module in (norm, plain):
            y = np.moveaxis(module(np.moveaxis(big, 1, axis)), axis, 1)
            assert_close(y, exact, float(abs(exact).max()))
        if abs(power) < 1000:  # gradients are as small or large as rstd
            dy = np.moveaxis(whole_numbers(seed=1), 1, axis)
            found, right = norm.backward(dy), plain.backward(dy)
            size = abs(right).max()
            assert (abs(found - right) <= 16 * 2.0**-53 * size).all()


# --- Results that a type cannot hold --------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=named)
def test_results_overflow_silently(dtype: Any) -> None:
    most = float(np.finfo(dtype).max) if dtype != BF16 else 3.3e38
    x = whole_numbers((4, 6)).astype(dtype)
    large = np.full(6, 3e38, F32)
    found = fn.layer_norm(x, 6, large, large)
    assert found.dtype == dtype
    huge = np.full((4, 6), most, dtype)
    _, total = fn.add_layer_norm(huge, huge, 6)
    assert np.isinf(total.astype(F64)).all()
    # sums of gradients, by every path: rows, and an order of axes that is copied first
    for shape, axis in (((64, 6), 1), ((4, 3, 4, 6), (1, 3))):
        x = whole_numbers(shape).astype(dtype)
        _, mean, rstd = fn.layer_norm(x, axis=axis, return_stats=True)
        dy = np.full(shape, most / 2, dtype)
        dx, _, dbias = fn.layer_norm_backward(dy, x, mean, rstd, axis=axis)
        assert dx.dtype == dbias.dtype == dtype
        assert np.isinf(dbias.astype(F64)).all()
    x = np.asfortranarray(whole_numbers((4, 3, 5, 6)).astype(dtype))
    _, mean, rstd = fn.group_norm(x, 1, return_stats=True)
    dy = np.full(x.shape, most / 2, dtype)
    weight = np.ones((1, 1, 5, 6), dtype)
    _, _, dbias = fn.group_norm_backward(dy, x, mean, rstd, 1, weight)
    assert np.isinf(dbias.astype(F64)).all()


# --- Beyond the others ----------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("weight", [0.0, 2.0**-30])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(4, 5), (3, 5000), (2, 6, 10)])
def test_what_a_mask_leaves_out(shape: tuple[int, ...], dtype: Any, weight: float) -> None:
    # far from the group that it is normalised by, but not with its weight
    size = math.prod(shape[1:])
    x = np.random.default_rng(0).normal(size=(shape[0], size)).astype(dtype)
    x[1, -1], x[-1, 1] = np.finfo(dtype).max, -np.finfo(dtype).max
    where = abs(x) < 100
    x, where = x.reshape(shape), where.reshape(shape)
    order = [(0, 1), (1, 0)] if x.ndim == 2 else [(0, 1, 2), (0, 2, 1), (2, 1, 0)]
    w = np.full(shape[1:], weight, dtype)
    b = np.linspace(-1, 1, w.size, dtype=dtype).reshape(w.shape)
    given = {"weight": w, "bias": b, "eps": 0.0, "where": where}
    exact = reference.layer_norm(x, shape[1:], **given, dtype=np.longdouble)
    for axes in order:
        laid = x.transpose(axes).copy().transpose(np.argsort(axes))
        with np.errstate(all="ignore"):
            y = fn.layer_norm(laid, shape[1:], **given)
        assert np.isfinite(y).all()
        assert_near(y, exact, 1e-6, 1e-6)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=named)
@pytest.mark.parametrize("shape", [(2, 127, 1), (3, 40, 2), (2, 9, 300)], ids=str)
def test_what_given_statistics_were_not_taken_of(shape: tuple[int, ...], dtype: Any) -> None:
    # x / std leaves the range, and comes back with the weight
    channels = shape[-1]
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x[1, 7, -1] = largest = np.finfo(F32).max if dtype == F32 else ml_dtypes.finfo(dtype).max
    w, b = np.full(channels, 0.5, dtype), np.full(channels, 0.25, dtype)
    given = {"weight": w, "bias": b, "channel_axis": -1, "training": False, "eps": 0.0}
    mean, var = np.full(channels, 0.5), np.full(channels, 0.5)
    right = float(largest) * 0.5 / math.sqrt(0.5)
    for wide in (1, 3):
        for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
            # where steps between the numbers of a result are none of the kernels', it is copied
            out = np.empty((*shape[:2], channels * wide), dtype)[..., ::wide]
            laid = x.transpose(order).copy().transpose(np.argsort(order))
            for y in (
                fn.batch_norm(laid, mean, var, out=out, **given),
                fn.batch_norm(laid, mean, var, **given),
                fn.batch_norm(laid, mean, var, **given | {"weight": np.tile(w, (shape[0], 1))}),
            ):
                assert np.isfinite(y.astype(F64)).all()
                assert float(y[1, 7, -1]) == pytest.approx(
                    right, rel=2 * float(ml_dtypes.finfo(dtype).eps)
                )
