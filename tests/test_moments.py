"""moments, standardize and Moments: right, however the data is cut, typed and laid out."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import sys
import types
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm import backends, dispatch
from fastnorm.fields import fields_of, merge

from .helpers import (
    BACKENDS,
    BF16,
    COMPILED,
    DTYPES,
    F32,
    F64,
    Array,
    assert_close,
    assert_same_bits,
    channels_last,
    data,
    layouts,
    named,
)

INTEGERS = tuple(np.dtype(t) for t in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "?"))
# Results are of sums in pairs of doubles or in long double, rounded once or a few times at the end.
# Where long double is double, what is expected is no better than half of 1e-14.
FEW = 8 * 2.0**-53 if np.finfo(np.longdouble).eps < 2.0**-60 else 5e-15


def wide(x: Array) -> Array:
    return x.astype(np.longdouble)


def exact(x: Array, axis: Any, ddof: int = 0, where: Any = None) -> tuple[Array, Array]:
    """Mean and variance in long double."""
    chosen = True if where is None else where
    count = np.sum(np.ones(x.shape), axis, where=chosen)
    with np.errstate(all="ignore"):
        mean = wide(x).sum(axis, keepdims=True, where=chosen)
        mean = mean / count.reshape(mean.shape)
        d = wide(x) - mean
        rest = d.sum(axis, keepdims=True, where=chosen) / count.reshape(mean.shape)
        var = ((d - rest) ** 2).sum(axis, where=chosen) / (count - ddof)
        return (mean + rest).reshape(var.shape), np.where(count > ddof, var, np.nan)


def assert_right(found: tuple[Any, Any], right: tuple[Any, Any], rtol: float = FEW) -> None:
    """The mean within rtol of its size or the spread, the variance within rtol of its size."""
    spread = np.sqrt(np.nan_to_num(right[1]))
    for value, same, size in zip(found, right, (spread + abs(np.nan_to_num(right[0])), right[1])):
        value, same = np.asarray(value), np.asarray(same)
        assert value.dtype == np.float64
        assert value.shape == same.shape
        np.testing.assert_array_equal(np.isnan(value), np.isnan(same))
        good = (abs(value - same) <= rtol * size) | np.isnan(same)
        assert good.all(), (value[~good], same[~good])


# --- The functions --------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [*DTYPES, *INTEGERS], ids=named)
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2, 3), (1, -1), (0, 1, 2), (), (2, 0)], ids=str)
def test_any_dtype_and_axes(dtype: Any, axis: Any) -> None:
    x = (20 * np.random.default_rng(0).standard_normal((5, 6, 9, 34)) + 100).astype(dtype)
    where = np.random.default_rng(1).random((5, 1, 9, 34)) < 0.5
    assert_right(fn.moments(x, axis), exact(x, axis))
    if axis != ():
        kept = fn.moments(x, axis, ddof=1, keepdims=True, where=where)
        right = exact(x, axis, 1, np.broadcast_to(where, x.shape))
        shape = np.mean(x.astype(F64), axis, keepdims=True).shape
        assert_right(kept, tuple(r.reshape(shape) for r in right))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype("u1"), np.dtype("i8")], ids=named)
def test_any_layout(dtype: Any) -> None:
    x = (data((4, 3, 8, 10), F64, 3.0) * 20).astype(dtype)
    for axis in (None, 0, (0, 2, 3), (0, 1), 3):
        right = exact(x, axis)
        for name, same in layouts(x):
            assert_right(fn.moments(same, axis), right), name


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ratio", [0.0, 1.0, 60.0, 1e4, 1e6])
def test_any_mean(ratio: float) -> None:
    """Digits that are in the data are in its variance, wherever the mean is."""
    for dtype in (F32, F64):
        for shape, axis in (((20_000,), None), ((3000, 40), 0), ((40, 3000), 1)):
            x = (ratio + np.random.default_rng(0).standard_normal(shape)).astype(dtype)
            assert_right(fn.moments(x, axis), exact(x, axis))


def test_a_hundred_million() -> None:
    """A piece of it that is repeated: a mean of 1e8 elements is known exactly."""
    if fn.get_backend() != "cython":
        pytest.skip("NumPy's backend takes minutes")
    for dtype, rtol in (("u1", 1e-12), ("f4", 1e-12)):
        piece = np.random.default_rng(0).normal(100, 20, 1000).astype(dtype)
        whole = np.tile(piece, 10_000)  # benchmarks/statistics.py takes 1e8 different ones
        sums = [sum(Fraction(float(v)) ** k for v in piece) for k in (1, 2)]
        mean = sums[0] / 1000
        var = sums[1] / 1000 - mean**2
        found = fn.moments(whole)
        assert abs(Fraction(float(found[0])) / mean - 1) <= rtol
        assert abs(Fraction(float(found[1])) / var - 1) <= rtol


@pytest.mark.slow
def test_where_numpy_is_far_off() -> None:
    """numpy issue 11331: its float32 mean over many rows of few channels adds one by one."""
    x = np.random.default_rng(0).integers(0, 256, (1024, 256, 256, 3), np.uint8)
    right = x.mean((0, 1, 2))  # of integers, NumPy's is in float64
    numpys = x.mean((0, 1, 2), np.float32)
    assert (abs(numpys / right - 1) > 0.1).all(), "NumPy has become right: this test can go"
    floats = fn.Moments((0, 1, 2))
    for part in np.split(x, 16):
        floats.update(part.astype(np.float32))
    for mean in (fn.moments(x, (0, 1, 2))[0], floats.mean):
        assert (abs(mean / right - 1) <= 1e-14).all()


@pytest.mark.skipif(not COMPILED, reason="threads are the kernels'")
@pytest.mark.parametrize("dtype", [F32, F64, np.dtype("u1"), np.dtype("i4")], ids=named)
@pytest.mark.parametrize("axis", [0, 1, None, (0, 1)], ids=str)
def test_any_number_of_threads(dtype: Any, axis: Any) -> None:
    x = (data((700, 1000), F64, 2.0) * 10).astype(dtype)
    for values in (x, np.asfortranarray(x), x[:, :3], x[:1]):
        with fn.threads(1):
            serial = fn.moments(values, axis)
        for threads in (2, 3, 8):
            with fn.threads(threads):
                for found, same in zip(fn.moments(values, axis), serial):
                    assert_same_bits(np.asarray(found), np.asarray(same))


@pytest.mark.usefixtures("backend")
def test_odd_values() -> None:
    x = np.ones((4, 5000), F32)
    x[0, 4000], x[1, 10], x[1, 20], x[2, 7] = np.inf, np.inf, -np.inf, np.nan
    mean, var = fn.moments(x, 1)
    np.testing.assert_array_equal(mean, [np.inf, np.nan, np.nan, 1.0])
    np.testing.assert_array_equal(var, [np.nan, np.nan, np.nan, 0.0])
    assert fn.moments(np.float32(3.5)) == (3.5, 0.0)
    for shape, axis in (((0, 3), 0), ((3, 0), 1), ((0,), None)):
        mean, var = fn.moments(np.empty(shape), axis)
        assert np.isnan(mean).all()
        assert np.isnan(var).all()
        assert np.shape(mean) == np.empty(shape).sum(axis).shape
    assert fn.moments(np.empty((3, 0)), 0)[0].shape == (0,)
    mean, var = fn.moments([[1, 2], [3, 4]], ddof=4)
    assert mean == 2.5
    assert math.isnan(var)
    huge = np.array([1.0, -1.0, 1.0, -1.0]) * 1e300
    assert fn.moments(huge)[0] == 0.0


def test_integers_are_not_copied() -> None:
    """An image in uint8 takes less memory than a float64 copy of it would, by far."""
    import tracemalloc

    x = np.zeros((2000, 2000, 3), np.uint8)
    for values in (x, x.astype(np.int32)):
        tracemalloc.start()
        fn.moments(values, (0, 1))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # a block in long double, and what is computed from it
        assert peak < 8 * backends.BLOCK * 8 < 8 * x.size


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"x": np.ones((2, 3)), "axis": 2}, ValueError, "axis=2 for x of shape"),
        ({"x": np.ones((2, 3)), "axis": (0, -2)}, ValueError, "different axes"),
        ({"x": np.ones(3, complex)}, TypeError, "complex128"),
        ({"x": np.array(["a"])}, TypeError, "expected float16"),
        ({"x": np.ones(3), "where": [1, 0, 1]}, TypeError, "where has dtype"),
        ({"x": np.ones(3), "where": [True, False]}, ValueError, "where has shape"),
        ({"x": np.ones(3), "ddof": np.nan}, ValueError, "ddof is nan"),
    ],
)
def test_refused(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    for function in (fn.moments, fn.standardize):
        with pytest.raises(kind, match=message):
            function(**arguments)


# --- standardize ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype("u1")], ids=named)
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2)], ids=str)
@pytest.mark.parametrize("ddof", [0, 1])
def test_standardize(dtype: Any, axis: Any, ddof: int) -> None:
    x = (data((6, 9, 20), F64, 4.0) * 8).astype(dtype)
    where = np.random.default_rng(1).random(x.shape) < 0.7
    where[:3] = True  # groups of equal numbers are another test's
    for options in ({}, {"eps": 0.3}, {"where": where}, {"where": where, "eps": 0.3}):
        eps, chosen = options.get("eps", 0.0), options.get("where")
        mean, var = exact(x, axis, ddof, chosen)
        shape = np.mean(x.astype(F64), axis, keepdims=True).shape
        right = (wide(x) - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
        y = fn.standardize(x, axis, ddof=ddof, **options)
        assert y.dtype == (x.dtype if dtype.kind != "u" else F64)
        assert_close(y, right, float(abs(right).max()) + 32)  # the mean is some 32 deviations off
        out = np.empty_like(y)
        assert fn.standardize(x, axis, ddof=ddof, out=out, **options) is out
        assert_same_bits(out, y)


def test_standardize_is_like_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = data((50, 7), F64, 2.0)
    for options in ({}, {"ddof": 1}):
        np.testing.assert_allclose(
            fn.standardize(x, 0, **options), stats.zscore(x, 0, **options), rtol=0, atol=1e-13
        )
    np.testing.assert_array_equal(fn.standardize(np.full((3, 2), 7.0), 0), np.zeros((3, 2)))
    assert np.isnan(fn.standardize(np.ones((1, 3)), 0, ddof=1)).all()
    with pytest.raises(ValueError, match="one number"):
        fn.standardize(3.0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("masked", [True, False])
def test_standardize_of_a_group_alone(dtype: Any, masked: bool) -> None:
    """A group's bits are its own, whether its means need more digits or its numbers another unit.

    Each kind of group is alone, with one of each other kind and among all of them.
    """
    rng = np.random.default_rng(5)
    kinds = [
        rng.standard_normal(9) * scale + shift
        for scale, shift in ((1, 0), (1, -1000), (1, 1e6), (1e-3, 1e9), (1e31, 0), (1e-30, 0))
    ]
    kinds += [np.full(9, 0.1), kinds[1] * np.where(np.arange(9) == 4, np.inf, 1)]
    if dtype == F64:
        kinds += [kinds[0] * 1e200, kinds[0] * 1e-200]
    with np.errstate(over="ignore"):
        x = np.array(kinds).astype(dtype)
    where = rng.random(x.shape) < 0.7 if masked else None

    def of(rows: list[int]) -> Array:
        options = {} if where is None else {"where": where[rows]}
        y = fn.standardize(x[rows], 1, ddof=1, **options)
        y[np.isnan(y)] = np.nan  # which NaN it is, NumPy's own loops do not promise
        return y

    alone = np.concatenate([of([row]) for row in range(len(x))])
    assert_same_bits(of([*range(len(x))]), alone)
    for pair in itertools.permutations(range(len(x)), 2):
        assert_same_bits(of([*pair]), alone[[*pair]])


# --- The merge ------------------------------------------------------------------------------------


@st.composite
def cut_data(draw: Any) -> tuple[Array, list[Array], list[int]]:
    """Numbers, the same in parts, and an order to merge these in."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    n = draw(st.integers(1, 3000))
    ratio = draw(st.sampled_from([0.0, 0.5, 30.0, 1e3, 1e6]))
    dtype = draw(st.sampled_from(["f4", "f8", "u1", "i2", "i8", "f2"]))
    kind = draw(st.sampled_from(["normal", "two values", "outliers"]))
    x = rng.standard_normal((n, 2))
    if kind == "two values":
        x = np.sign(x)
    elif kind == "outliers":
        x = x**5
    scale = {"u1": 20, "i2": 20, "i8": 2**20, "f2": 4}.get(dtype, 1)
    x = (x + min(ratio, {"f2": 30, "u1": 5, "i2": 1000}.get(dtype, ratio))) * scale
    x = np.clip(x, 0, 255).astype(dtype) if dtype == "u1" else x.astype(dtype)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=8)))
    parts = np.split(x, cuts)
    return x, parts, draw(st.permutations(range(len(parts))))


@given(cut_data())
def test_any_cut_and_any_order(case: tuple[Array, list[Array], list[int]]) -> None:
    x, parts, order = case
    pieces = [fn.Moments.from_array(part, 0) for part in parts]
    chain = fn.Moments(0)
    for i in order:
        chain.merge(pieces[i])
    tree = [pieces[i] for i in order]
    while len(tree) > 1:
        tree = [sum(tree[i : i + 2], fn.Moments(0)) for i in range(0, len(tree), 2)]
    streamed = fn.Moments(0)
    for part in parts:
        streamed.update(part)
    right = exact(x, 0)
    for m in (chain, tree[0], streamed, fn.Moments.from_array(x, 0)):
        np.testing.assert_array_equal(m.count, len(x))
        assert_right((m.mean, m.var()), right, rtol=1e-14 / 2)


@pytest.mark.usefixtures("backend")
def test_one_by_one() -> None:
    """Ten thousand merges leave the last digits alone; so does data far from zero."""
    x = np.random.default_rng(0).normal(1e6, 1.0, 10_000)
    m = fn.Moments()
    for part in np.split(x, 2500):
        m.update(part)
    assert_right((m.mean, m.var()), exact(x, None))


def test_an_empty_one_changes_nothing() -> None:
    m = fn.Moments.from_array(data((7, 3), F64, 1e5), 0)
    before = m.to_dict()
    empty = fn.Moments.from_array(np.empty((0, 3)), 0)
    for none in (fn.Moments(0), empty, fn.Moments.from_array(np.ones((2, 3)), 0, where=False)):
        assert (m + none).to_dict() == before
        assert (none + m).to_dict()["mean_rest"] == before["mean_rest"]
        assert (none + m).to_dict()["m2_rest"] == before["m2_rest"]
        assert (none.count == 0).all()
        assert np.isnan(none.mean).all()
        assert np.isnan(none.var()).all()


def test_the_merge_of_infinities() -> None:
    parts = [np.array([[1.0]]), np.array([[np.inf]]), np.array([[2.0]]), np.array([[3.0]])]
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 0, 1)):
        fields = fields_of(np.empty((0, 1)), (0,))
        for i in order:
            fields = merge(fields, fields_of(parts[i], (0,)))
        m = fn.Moments(0)._take(fields[:, 0])
        assert m.mean == np.inf
        assert np.isnan(m.var())


# --- The accumulator ------------------------------------------------------------------------------


def test_what_it_holds() -> None:
    x = data((4, 3, 5, 6), F32, 2.0)
    m = fn.Moments(axis=(0, 2, 3))
    assert m.axis == (0, 2, 3)
    assert m.update(x) is m
    assert m.count.dtype == np.int64
    np.testing.assert_array_equal(m.count, [120] * 3)
    mean, var = fn.moments(x, (0, 2, 3), ddof=1)
    np.testing.assert_array_equal(m.mean, mean)
    np.testing.assert_array_equal(m.var(ddof=1), var)
    np.testing.assert_array_equal(m.std(1), np.sqrt(var))
    whole = fn.Moments().update([1, 2, 3, 6])
    assert (whole.count, whole.mean, whole.var()) == (4, 3.0, 3.5)
    assert isinstance(whole.mean, float)


def test_copies_go_their_own_way() -> None:
    x = data((6, 2), F64, 1.0)
    m = fn.Moments(0).update(x)
    for same in (
        copy.copy(m),
        copy.deepcopy(m),
        m.copy(),
        pickle.loads(pickle.dumps(m)),
        fn.Moments.from_dict(json.loads(json.dumps(m.to_dict()))),
        m + fn.Moments(0),
        sum([m]),
    ):
        assert same == m
        assert same is not m
        same.update(x)
        assert same != m
        np.testing.assert_array_equal(m.count, [6, 6])
    part = fn.Moments(0).merge(m)
    part.update(x)
    np.testing.assert_array_equal(m.count, [6, 6])
    empty = fn.Moments((1, 2))
    assert fn.Moments.from_dict(json.loads(json.dumps(empty.to_dict()))) == empty
    assert pickle.loads(pickle.dumps(empty)) == empty != fn.Moments((2, 1))
    assert m != "m"
    with pytest.raises(TypeError, match="unhashable"):
        hash(m)
    assert repr(empty) == "Moments(axis=(1, 2))"
    assert "shape (2,), 12 elements" in repr(m)


def test_what_does_not_fit_changes_nothing() -> None:
    m = fn.Moments(0).update(np.ones((4, 3)))
    before = m.copy()
    for wrong, kind, message in (
        (lambda: m.update(np.ones((4, 2))), ValueError, r"shape \(2,\), expected \(3,\)"),
        (lambda: m.update(np.ones((4, 3, 2))), ValueError, r"shape \(3, 2\)"),
        (lambda: m.update(np.ones((4, 3), complex)), TypeError, "complex"),
        (lambda: m.merge(fn.Moments(0).update(np.ones((4, 2)))), ValueError, "keep their sizes"),
        (lambda: m.merge(np.ones(3)), TypeError, r"m\.update\(x\)"),
        (lambda: m + 1, TypeError, "unsupported"),
        (lambda: 1 + m, TypeError, "unsupported"),
        (lambda: fn.Moments(5).update(np.ones(3)), ValueError, "axis="),
        (lambda: fn.Moments((0, 0)), ValueError, "different axes"),
        (lambda: fn.Moments(1.5), TypeError, "whole numbers|iterable"),
        (lambda: m.merge(fn.Moments(1).update(np.ones((3, 5)))), ValueError, "different|over axis"),
        (lambda: m + fn.Moments((0, 2)).update(np.ones((2, 3, 4))), ValueError, "over axis"),
        (lambda: fn.Moments(0).merge(fn.Moments(1).update(np.ones((3, 5)))), ValueError, "axis"),
    ):
        with pytest.raises(kind, match=message):
            wrong()
        assert m == before


def test_the_same_axes_by_other_names() -> None:
    x = data((4, 3, 5), F64)
    one = fn.Moments((0, 2)).update(x)
    assert (one + fn.Moments((-1, 0)).update(x)).count.tolist() == [40] * 3
    whole = fn.Moments().update(x)
    assert (whole + fn.Moments((0, 1, 2)).update(x)).count == 120
    # an accumulator that has seen nothing changes nothing, whatever its axes
    for empty in (fn.Moments(), fn.Moments(1)):
        assert one + empty == one
    assert fn.Moments() + one == one
    assert (fn.Moments() + one).axis == (0, 2)


def test_shapes_of_nothing_are_kept() -> None:
    for shape in ((3, 0, 4), (0,), (2, 0)):
        m = fn.Moments(0).update(np.ones((5, *shape)))
        for same in (fn.Moments.from_dict(json.loads(json.dumps(m.to_dict()))), copy.copy(m)):
            assert same == m
            assert same.mean.shape == shape
            assert same.update(np.ones((2, *shape))).count.shape == shape


def test_dictionaries_and_pickles_of_before() -> None:
    """Those without a shape and an exponent are read."""
    whole = fn.Moments().update([1.0, 2.0])
    for same in (pickle.loads(pickle.dumps(whole)), fn.Moments.from_dict(whole.to_dict())):
        assert same == whole
    m = fn.Moments(0).update(data((7, 3), F64, 2.0))
    old = {k: v for k, v in m.to_dict().items() if k not in ("shape", "exponent")}
    assert fn.Moments.from_dict(old) == m
    before = fn.Moments()
    axis, fields = m.__getstate__()
    before.__setstate__((axis, fields[:5]))
    assert before == m


ODD_FIELDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"count": [-1.0, 1.0]}, ValueError, "counts"),
    ({"count": [0.5, 1.0]}, ValueError, "counts"),
    ({"count": [math.nan, 1.0]}, ValueError, "counts"),
    ({"count": [math.inf, 1.0]}, ValueError, "counts"),
    ({"count": [1e300, 1.0]}, ValueError, "counts"),
    ({"count": [10**400, 1]}, TypeError, "count of these moments has dtype object"),
    ({"count": ["4", "4"]}, TypeError, "count of these moments has dtype"),
    ({"count": [True, True]}, TypeError, "dtype bool"),
    ({"m2": [-1.0, 1.0]}, ValueError, "m2"),
    ({"m2": [math.nan, 1.0]}, ValueError, "m2"),
    ({"m2": [math.inf, 1.0]}, ValueError, "m2"),
    ({"m2": [1.0]}, ValueError, "different shapes"),
    ({"m2": None}, TypeError, "m2 of these moments has dtype object"),
    ({"mean": [1j, 1.0]}, TypeError, "complex"),
    ({"mean": [[1.0], [1.0, 2.0]]}, ValueError, "different lengths"),
    ({"mean_rest": [math.nan, 0.0]}, ValueError, "rests"),
    ({"m2_rest": [math.inf, 0.0]}, ValueError, "rests"),
    ({"count": [0.0, 1.0]}, ValueError, "nothing was counted"),
    ({"exponent": [0.5, 0.0]}, ValueError, "exponents"),
    ({"exponent": [1e9, 0.0]}, ValueError, "exponents"),
    ({"axis": None}, ValueError, "over all axes"),
    ({"axis": "0"}, TypeError, "axis is '0'"),
    ({"axis": [0.5]}, TypeError, "whole numbers"),
    ({"shape": [3]}, ValueError, "shape"),
    ({"shape": [-2]}, ValueError, "shape"),
    ({"shape": ["2"]}, TypeError, "shape"),
    ({"Mean": [1.0, 1.0]}, ValueError, "does not know"),
]


@pytest.mark.parametrize(
    ("wrong", "kind", "message"), ODD_FIELDS, ids=[str(o[0]) for o in ODD_FIELDS]
)
def test_what_cannot_be_moments(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    m = fn.Moments(0).update(data((4, 2), F64))
    with pytest.raises(kind, match=message):
        fn.Moments.from_dict(m.to_dict() | wrong)
    # the same in a pickle changes nothing
    same = m.copy()
    axis, fields = m.__getstate__()
    names = ["count", "mean", "mean_rest", "m2", "m2_rest", "exponent"]
    for name, value in wrong.items():
        if name in names and np.asarray(value, object).shape == (2,):
            fields = fields.astype(object)
            fields[names.index(name)] = value
            with pytest.raises((TypeError, ValueError)):
                same.__setstate__((axis, fields))
    assert same == m


class _Raises:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise KeyError("x")


def test_an_entry_that_raises() -> None:
    entries = fn.Moments(0).update(data((4, 2), F64)).to_dict() | {"mean": _Raises()}
    with pytest.raises(TypeError, match="mean of these moments cannot be read as an array"):
        fn.Moments.from_dict(entries)


def test_what_is_no_state() -> None:
    m = fn.Moments(0).update(data((4, 2), F64))
    before = m.copy()
    for entries in ([], "count", 3):
        with pytest.raises(TypeError, match="expected what to_dict"):
            fn.Moments.from_dict(entries)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="misses"):
        fn.Moments.from_dict({"axis": None})
    states: tuple[Any, ...] = (
        None, (), (0,), (None, np.ones(6)), ("0", None), ((0,), [1.0] * 6), ((0,), np.ones((4, 2))),
        ((0,), np.array(1.0)), ((0,), -np.ones((6, 2))), (None, np.ones((6, 2))),
    )  # fmt: skip
    for state in states[:3] + states[4:]:
        with pytest.raises((TypeError, ValueError)):
            m.__setstate__(state)
        assert m == before


# --- Masked arrays --------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, F64, np.dtype("i4")], ids=named)
def test_a_mask_of_numpy_is_a_where(dtype: Any) -> None:
    x = (data((6, 9), F64, 2.0) * 10).astype(dtype)
    hidden = np.random.default_rng(0).random(x.shape) < 0.3
    where = np.random.default_rng(1).random(x.shape) < 0.8
    masked = np.ma.array(x, mask=hidden)
    for options, chosen in (({}, ~hidden), ({"where": where}, where & ~hidden)):
        for axis in (None, 0):
            found = fn.moments(masked, axis, **options)
            for value, same in zip(found, fn.moments(x, axis, where=chosen)):
                np.testing.assert_array_equal(value, same)
            m = fn.Moments(axis).update(masked, **options)
            np.testing.assert_array_equal(m.var(), found[1])
            for ddof in (0, 1):
                y = fn.standardize(masked, axis, ddof=ddof, **options)
                assert type(y) is np.ndarray
                assert_same_bits(y, fn.standardize(x, axis, ddof=ddof, where=chosen))
    bare = np.ma.array(x)
    np.testing.assert_array_equal(fn.moments(bare, 0), fn.moments(x, 0))
    assert fn.moments(np.ma.masked_equal([1.0, 2, -9999, 4, 5, 6], -9999))[0] == 3.6


def test_backends_agree() -> None:
    x = data((300, 7), F32, 50.0)
    found = []
    for name in BACKENDS:
        with fn.backend(name):
            found.append(fn.moments(x, 0))
    for other in found[1:]:
        assert_right(found[0], other)


# --- Adapters -------------------------------------------------------------------------------------


def test_arrays_and_array_likes_have_no_adapter() -> None:
    class Own(np.ndarray):
        pass

    for x in (np.ones(3), [1.0], (1,), 1.0, 3, None, np.float32(1), memoryview(b"ab"), Own(3)):
        assert dispatch.adapter_of(x) is None


def test_a_library_is_recognised_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new adapter takes: a line in the table, and functions of the same names."""

    class Tensor:
        shape = (2, 3)

        def __array__(self, *args: Any, **options: Any) -> Array:
            return np.ones(self.shape)

    library, adapter = types.ModuleType("a_library"), types.ModuleType("an_adapter")
    library.Tensor = Tensor  # type: ignore[attr-defined]
    adapter.layer_norm = lambda **given: given  # type: ignore[attr-defined]
    entry = ("a_library", lambda x, found: isinstance(x, found.Tensor), "an_adapter")
    monkeypatch.setattr(dispatch, "_ADAPTERS", (*dispatch._ADAPTERS, entry))
    monkeypatch.setitem(sys.modules, "an_adapter", adapter)
    x = Tensor()
    assert isinstance(fn.layer_norm(x, 3), np.ndarray), "not imported, so it cannot be its array"
    monkeypatch.setitem(sys.modules, "a_library", library)
    given = fn.layer_norm(x, 3, bias=4, eps=0.5, out=7)
    assert given.pop("x") is x
    assert given == {
        "normalized_shape": 3,
        "weight": None,
        "bias": 4,
        "eps": 0.5,
        "axis": None,
        "where": None,
        "residual": None,
        "activation": None,
        "out": 7,
        "return_stats": False,
    }


@pytest.mark.parametrize("scale", [1.0, 1e300], ids=str)
@pytest.mark.parametrize("ratio", [1.0, 1e12], ids=str)
def test_standardized_in_the_order_of_x(ratio: float, scale: float) -> None:
    x = channels_last(data((2, 3, 4, 5), F64, ratio) / ratio * scale)
    mask = np.ones(x.shape, bool)
    for axis in (None, 1, (0, 3), (1, 2, 3)):
        assert fn.standardize(x, axis, where=mask, ddof=1).strides == x.strides
