"""How many units in the last place every norm may lose: those that the documentation promises.

The oracle is long double. One set of rows, put into the groups of every operation of the table,
serves them all, so its exact result is computed once.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _reference as reference
from fastnorm.operations import OPERATIONS, Operation

from .helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SINGLE_AND_DOUBLE,
    Array,
    call,
    channels_last,
    data,
    expected,
    named,
    run_python,
    ulps,
    without,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="long double is float64 here"),
]

# What the issue allows, in units as `ulps` counts them.
PLAIN = {F32: 3.0, F64: 4.0}
AFFINE = 4.0
HALF, HALF_ONCE = 0.51, 1.0  # all but 1 in 1,000 elements, and every element

LAYOUTS = {"channels-first": np.ascontiguousarray, "channels-last": channels_last}

# Operations of which every group is one row, normalised by its own statistics.
NORMS = tuple(
    op
    for op in OPERATIONS
    if op.outputs == 1
    and op.linked(3, 1)
    and op.name not in ("local_response_norm", "global_response_norm")
)
CENTRED = tuple(op for op in NORMS if "norm" in op.name and "mean" in op.stats) + tuple(
    op for op in NORMS if op.name == "weight_standardize"
)
RATIOS = (0.0, 1.0, 1e2, 1e4, 1e6)

by_norm = pytest.mark.parametrize("op", NORMS, ids=named)
by_centred = pytest.mark.parametrize("op", CENTRED, ids=named)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


# --- Rows as groups -------------------------------------------------------------------------------


def put(op: Operation, rows: Array) -> Array:
    """An array of three axes whose groups under `op` are these rows."""
    linked = (2, 3) if op.grouped else op.linked(3, 1)
    kept = tuple(axis for axis in range(4 if op.grouped else 3) if axis not in linked)
    sizes: dict[int, int] = {}
    for axes, total in ((kept, rows.shape[0]), (linked, rows.shape[1])):
        last = next(k for k in (8, 4, 1) if total % k == 0) if len(axes) > 1 else 1
        sizes |= dict(zip(axes, (total // last, last) if len(axes) > 1 else (total,)))
    x = rows.reshape([sizes[axis] for axis in (*kept, *linked)])
    x = x.transpose(np.argsort((*kept, *linked)))
    return x.reshape(x.shape[0], -1, x.shape[3]) if op.grouped else x


def plain_parameters(op: Operation, x: Array, groups: int, eps: float = 0.0) -> dict[str, Any]:
    """Those without which nothing runs, and eps."""
    p = op.parameters(x.shape, x.dtype, np.random.default_rng(0), num_groups=groups)
    p = without(p, "weight", "bias", "running_mean", "running_var")
    if "g" in p:
        return {"g": np.ones_like(p["g"])}  # a length of 1, and there is no eps
    return p | {"eps": eps}


def prepared(op: Operation, rows: Array, layout: str, eps: float = 0.0) -> tuple[Array, Any]:
    x = LAYOUTS[layout](put(op, rows))
    # `put` makes 8, 4 or 1 groups of an operation's rows
    groups = next(k for k in (8, 4, 1) if rows.shape[0] % k == 0)
    return x, plain_parameters(op, x, groups, eps)


def kind(op: Operation) -> str:
    if op.name in ("l2_normalize", "weight_norm"):
        return "l2"
    return "rms" if op.name == "rms_norm" else "centred"


def exact_rows(rows: Array, kind: str, eps: float = 0.0) -> Array:
    scale = "l2" if kind == "l2" else "rstd"
    options = {"centred": kind == "centred", "scale": scale, "dtype": np.longdouble}
    return reference.normalize(rows, 1, eps=eps, **options)[0]


@functools.lru_cache(maxsize=8)
def sample(dtype: Any, ratio: float, shape: tuple[int, int]) -> Array:
    return data(shape, dtype, ratio)


@functools.lru_cache(maxsize=8)
def exact_sample(dtype: Any, ratio: float, shape: tuple[int, int], kind: str) -> Array:
    exact = exact_rows(sample(dtype, ratio, shape), kind)
    # `ulps` compares in float64 what is narrower than that
    return exact if dtype == F64 else exact.astype(np.float64)


def worst(op: Operation, rows: Array, layout: str, exact: Array | None = None) -> float:
    """The largest error of `op` on these rows, in ulps; at eps 0."""
    exact = exact_rows(rows, kind(op)) if exact is None else exact
    x, p = prepared(op, rows, layout)
    y = call(op, x, p)
    assert y.dtype == rows.dtype
    return float(ulps(y, put(op, exact), rows.dtype).max())


# --- Without weight and bias ----------------------------------------------------------------------

SIZES = (2, 3, 64, 1000, 4100, 65536)


@pytest.mark.each_cpu
@by_layout
@by_norm
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=named)
def test_units_in_the_last_place(
    dtype: Any, ratio: float, size: int, op: Operation, layout: str, backend: str
) -> None:
    # Rows do not depend on one another: 64 large ones need be seen once.
    few = size > 10000 and (dtype == F64 or backend == "numpy" or ratio != 1e4)
    shape = (8 if few else 64, size)
    exact = exact_sample(dtype, ratio, shape, kind(op))
    assert worst(op, sample(dtype, ratio, shape), layout, exact) <= PLAIN[dtype]


# --- With weight and bias, and in half precision --------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [4, 50, 300, 5000])
@pytest.mark.parametrize("ratio", [2.0**35, 2.0**42, 2.0**49])
def test_doubles_far_from_zero(ratio: float, size: int, layout: str, backend: str) -> None:
    """Where a mean in one double is off by a part of the deviation, or by all of it."""
    rng = np.random.default_rng(3)
    steps = rng.integers(-6, 7, (16, size)) * max(0.125, 2.0**-52 * ratio)
    steps[0, 2:] = steps[0, 0]  # nearly constant
    exact = exact_rows(steps, "centred")  # of numbers near 0, which long double holds
    for op in NORMS:
        if kind(op) == "centred":
            assert worst(op, steps - ratio, layout, exact) <= PLAIN[F64], op.label


@pytest.mark.each_cpu
@by_layout
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=named)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.stats and op.linked(4, 1)], ids=named)
def test_units_with_affine(op: Operation, dtype: Any, ratio: float, layout: str) -> None:
    x = LAYOUTS[layout](data((4, 64, 9, 8), dtype, ratio, seed=3))
    p = op.parameters(x.shape, dtype, np.random.default_rng(4)) | {"eps": 0.0}
    bare = without(p, "weight", "bias")
    # |weight| and |bias| where they lie: the output of a group without spread is all bias
    flat = x * 0
    w = expected(op, flat, bare | {"bias": abs(p["weight"])}) if "bias" in p else abs(p["weight"])
    b = expected(op, flat, bare | {"bias": abs(p["bias"])}) if "bias" in p else 0
    # as without weight and bias, outputs in float64 are counted at 1 at least
    xhat = np.maximum(abs(expected(op, x, bare)), 1 if dtype == F64 else 0)
    size = np.maximum(xhat * w, b)
    assert ulps(call(op, x, p), expected(op, x, p), dtype, size).max() <= AFFINE


@pytest.mark.each_cpu
@pytest.mark.parametrize("shape", [(3, 5, 2, 3), (9, 70, 4, 4), (2, 40, 7, 7)], ids=str)
@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=named)
def test_short_planes_with_weights_of_channels(dtype: Any, shape: tuple[int, ...]) -> None:
    """Of batch norm: a weight is that of all elements of its plane, wherever it is applied."""
    x = data(shape, dtype, 1.0, seed=6)
    rng = np.random.default_rng(7)
    own = (1, shape[1], 1, 1)
    mask, added = rng.random(shape) < 0.8, data(shape, dtype, 0.0, seed=8)
    ones, signs = np.ones(shape[1], dtype), np.where(np.arange(shape[1]) % 2, -1.0, 1.0)
    few = signs.astype(dtype).repeat(3)[::3]  # apart in memory
    weights = rng.uniform(0.5, 2, shape[1]).astype(dtype) * few
    far = weights.copy()
    far[2] = 1e-38  # which with rstd a float does not hold
    biases: list[Any] = [None, ones, weights[::-1], np.asarray(0.5, dtype)]
    every: list[Any] = [{}, {"where": mask}, {"residual": added}, {"activation": "relu"}]
    for w, b in itertools.product((None, few, weights, far), biases):
        for more in every:
            found = fn.batch_norm(x, None, None, w, b, True, eps=1e-3, **more)
            options = more | {"training": True, "eps": 1e-3, "dtype": np.longdouble}
            right = reference.batch_norm(x, None, None, w, b, **options)
            bare = without(options, "residual", "activation")
            xhat = reference.batch_norm(x, None, None, **bare)
            # as in `test_units_with_affine`
            size = np.maximum(abs(xhat), 1 if dtype == F64 else 0)
            size = size * (1 if w is None else abs(w).reshape(own))
            size += 0 if b is None else abs(b).reshape(own if b.ndim else ())
            size += abs(more.get("residual", 0))
            assert ulps(found, right, dtype, size).max() <= AFFINE


@pytest.mark.each_cpu
@by_layout
@by_norm
@pytest.mark.parametrize("dtype", [F16, BF16], ids=named)
def test_half_precision_is_rounded_once(op: Operation, dtype: Any, layout: str) -> None:
    rows = data((64, 1000), dtype, 1.0, seed=5)
    x, p = prepared(op, rows, layout)
    exact = put(op, exact_rows(rows, kind(op)))
    # the dtype's own spacing, subnormals included
    error = ulps(call(op, x, p), exact, dtype, floor=2.0**-14 if dtype == F16 else 2.0**-126)
    assert (error > HALF).mean() <= 1e-3
    assert error.max() <= HALF_ONCE


@pytest.mark.each_cpu
@pytest.mark.parametrize("plane", [7, 61, 257, 400, 1023])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=named)
def test_half_precision_in_planes(dtype: Any, plane: int) -> None:
    """Of several channels at once, as many as a tile has room for."""
    x, added = (data((4, 37, plane), dtype, 1.0, seed=i) for i in range(2))
    wide = x.astype(F64)
    for more in ({}, {"residual": added}):
        right = fn.batch_norm(wide, training=True, eps=1e-3, **more)
        found = fn.batch_norm(x, training=True, eps=1e-3, **more)
        # of a sum of two floats the larger one's spacing is counted
        assert (
            ulps(found, right, dtype, abs(right) + abs(more.get("residual", 0))).max() <= HALF_ONCE
        )


# --- The ends of the range ------------------------------------------------------------------------

EXTREMES = [
    (F32, 1e38),
    (F32, 3e37),
    (F32, 1e-42),
    (F32, 1e-38),
    (F64, 1e200),
    (F64, 1e300),
    (F64, 1e-200),
    (F64, 1e-300),
    (F16, 1e4),
    (F16, 1e-6),
    (BF16, 1e38),
    (BF16, 1e-38),
]


@pytest.mark.each_cpu
@pytest.mark.parametrize("scale", [1e-42, 1e-40, 1e-38, 1e-33])
def test_a_weight_brings_back_what_is_subnormal(scale: float) -> None:
    """Of numbers that eps divides, xhat is; a weight of each element comes after."""
    rng = np.random.default_rng(0)
    for n, weight in itertools.product((4, 96, 5000), (1.0, 100.0, 1e30)):
        x = (rng.uniform(0.1, 1, (5, n)) * rng.choice((-1, 1), (5, n)) * scale).astype(F32)
        w = (rng.uniform(0.1, 1, n) * weight).astype(F32)
        wide = x.astype(F64)
        shares = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + 1e-5)
        centred = wide - wide.mean(1, keepdims=True)
        centred /= np.sqrt(wide.var(1, keepdims=True) + 1e-5)
        for lying in (x, np.asfortranarray(x)):
            for found, exact in (
                (fn.rms_norm(lying, n, w, 1e-5), shares),
                (fn.layer_norm(lying, n, w), centred),
            ):
                assert ulps(found, exact * w, F32, floor=2.0**-126).max() <= AFFINE


@pytest.mark.each_cpu
@pytest.mark.parametrize("n", [40, 768, 5000])
@pytest.mark.parametrize(("size", "weight"), [(2e38, 1e-10), (1e-42, 1e30)])
def test_a_weight_brings_back_what_a_mask_left_out(size: float, weight: float, n: int) -> None:
    """Of rows: numbers that leave the range, or its digits, by the statistics of others."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((6, n)) * 1e-3
    chosen = rng.random(x.shape) < 0.6
    x[~chosen] *= size * 1e3 / 5
    x, w = x.astype(F32), (rng.uniform(0.1, 1, n) * weight).astype(F32)
    wide = x.astype(F64)
    for norm, mean in ((fn.layer_norm, True), (fn.rms_norm, False)):
        d = wide - wide.mean(1, keepdims=True, where=chosen) * mean
        var = (d * d).mean(1, keepdims=True, where=chosen)
        for _ in range(2):
            found = norm(x, n, w, eps=1e-12, where=chosen)
            right = ~chosen if size > 1 or not mean else chosen
            error = ulps(found, d / np.sqrt(var + 1e-12) * w, F32, floor=2.0**-126)
            assert error[right].max() <= AFFINE


@pytest.mark.each_cpu
@by_layout
@pytest.mark.parametrize(("scale", "eps", "weight"), [(1e-42, 1e-5, 1e30), (1e-38, 1e10, 1e37)])
@pytest.mark.parametrize(
    "of", [(1, 1, 2, 1), (3, 1, 1), (1, 1, 64), (3, 2, 64), (2, 3, 1, 1)], ids=str
)
def test_so_does_one_of_other_places(
    of: tuple[int, ...], scale: float, eps: float, weight: float, layout: str
) -> None:
    """Also by statistics that were given, and of numbers that a mask leaves out."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 1, (2, 3, 2, 64)) * rng.choice((-1, 1), (2, 3, 2, 64)) * scale
    x[..., :2, :3] = 0
    x = LAYOUTS[layout](x.astype(F32))
    w = (rng.uniform(0.1, 1, of) * weight).astype(F32)
    chosen = np.zeros(x.shape, bool)
    chosen[..., :2, :3] = True
    zero = np.zeros(3)

    def exact(axes: tuple[int, ...], mean: bool = True, var: bool = True) -> Any:
        wide = x.astype(F64)
        d = wide - wide.mean(axes, keepdims=True) * mean
        return d / np.sqrt((d * d).mean(axes, keepdims=True) * var + eps) * w

    for found, right in (
        (fn.instance_norm(x, weight=w, eps=eps), exact((2, 3))),
        (fn.group_norm(x, 1, w, eps=eps), exact((1, 2, 3))),
        (fn.batch_norm(x, None, None, w, training=True, eps=eps), exact((0, 2, 3))),
        (fn.batch_norm(x, zero, zero, w, eps=eps), exact((2, 3), mean=False, var=False)),
        (fn.instance_norm(x, weight=w, eps=eps, where=chosen), exact((2,), False, False)),
    ):
        assert ulps(found, right, F32, floor=2.0**-126).max() <= AFFINE


@pytest.mark.each_cpu
@by_layout
@by_norm
@pytest.mark.parametrize("sign", ["mixed", "positive"])
@pytest.mark.parametrize(("dtype", "scale"), EXTREMES, ids=str)
def test_nothing_overflows_or_vanishes(
    dtype: Any, scale: float, sign: str, op: Operation, layout: str
) -> None:
    rng = np.random.default_rng(6)
    values = rng.uniform(0.1, 1, (16, 96)) * (
        rng.choice((-1, 1), (16, 96)) if sign == "mixed" else 1
    )
    rows = (values * scale).astype(dtype)
    exact = exact_rows(rows, kind(op))
    x, p = prepared(op, rows, layout)
    error = ulps(call(op, x, p), put(op, exact), dtype)
    assert error.max() <= PLAIN.get(dtype, HALF_ONCE)


# --- Groups without spread ------------------------------------------------------------------------


@pytest.mark.each_cpu
@by_layout
@by_centred
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("size", [1, 3, 49, 4096, 4097, 70000])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_a_constant_group_is_exactly_its_bias(
    dtype: Any, size: int, eps: float, op: Operation, layout: str
) -> None:
    if size == 1 and op.refuses(put(op, np.zeros((8, 1))).shape, num_groups=8):
        size = 2
    values = np.array([0.1, 1 / 3, -7.7, 3e4, 1e-6, 0.0, 123.456, 1.0])
    rows = np.repeat(values[:, np.newaxis], size, axis=1).astype(dtype)
    x, p = prepared(op, rows, layout, eps)
    groups = p.get("num_groups")
    bias = op.parameters(x.shape, dtype, np.random.default_rng(7), num_groups=groups).get("bias")
    if bias is not None:
        p = p | {"bias": bias}
    y = call(op, x, p)
    exact = expected(op, x, p).astype(dtype)
    np.testing.assert_array_equal(y, exact)
    if bias is None:
        assert not y.any()


@by_layout
@by_norm
@pytest.mark.parametrize("length", [31, 4096, 50000])
@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=named)
def test_two_values_only(dtype: Any, length: int, op: Operation, layout: str) -> None:
    """Black and white pixels: all squares round alike, so errors add up instead of cancelling."""
    rows = np.random.default_rng(8).choice((0.1, 0.7), (4, length)).astype(dtype)
    assert worst(op, rows, layout) <= PLAIN[dtype]


# --- The statistics -------------------------------------------------------------------------------


@pytest.mark.each_cpu
@by_layout
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e6])
@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=named)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.stats and op.linked(4, 1)], ids=named)
def test_returned_statistics(op: Operation, dtype: Any, ratio: float, layout: str) -> None:
    x = LAYOUTS[layout](data((4, 8, 40, 41), dtype, ratio, seed=9))
    p = op.parameters(x.shape, dtype, np.random.default_rng(0))
    got = call(op, x, p, return_stats=True)[1:]
    exact = expected(op, x, p, return_stats=True)[1:]
    for name, value, right in zip(op.stats, got, exact, strict=True):
        assert value.dtype == np.float64
        assert value.shape == right.shape
        # Sums of float32's squares in float64 are plain, 128 in a row, and rstd loses half of what
        # the variance does. In float64 squares keep their roundings, deviations from the first
        # mean do not: a column adds 16 sums of four in a row.
        spread = 1 / exact[-1]
        size = abs(right) + (spread if name == "mean" else 0)
        roundings = 64 if dtype == F32 else 16
        assert (abs(value - right) <= roundings * 2.0**-53 * size).all()


# --- Every instruction set, every other backend ---------------------------------------------------

LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


USED = fn.show_config("dicts")["cpu"]["instruction set used"]
# None in the processes that these tests are themselves.
OLDER = LEVELS[: LEVELS.index(USED)] if USED in LEVELS and "FASTNORM_CPU" not in os.environ else ()
AGAIN = (
    "-m", "pytest", "tests/test_accuracy.py", "tests/test_determinism.py",
    "-k", "cython and not 65536", "-m", "each_cpu", "-q", "-p", "no:cacheprovider",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cython"], indirect=True)  # once for all
@pytest.mark.parametrize("level", OLDER)
def test_every_instruction_set(level: str) -> None:
    """The tests marked each_cpu again, in a process that may use no newer instructions."""
    run = run_python(*AGAIN, FASTNORM_CPU=level)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("scale", [2.0**e for e in (0, 60, 110, -60, -70, -110)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 3.0, 60.0])
def test_statistics_of_bfloat16_at_any_size(scale: float, ratio: float) -> None:
    """Four of its numbers are added up in float32, where that holds their squares."""
    rng = np.random.default_rng(0)
    near = rng.standard_normal((20, 768)) + ratio
    far = near * 10.0 ** rng.uniform(-6, 0, near.shape)
    for numbers in (near, far):
        x = (numbers * scale).astype(BF16)
        exact = x.astype(np.longdouble)
        mean, square = exact.mean(1), (exact**2).mean(1)
        deviation = exact.std(1)
        _, mean_found, rstd = fn.layer_norm(x, 768, eps=0.0, return_stats=True)
        # 2^-22 of the largest square of each four, which is 2^-20 of what the four deviate by
        assert abs(rstd.ravel() * deviation - 1).max() < 2.0**-20
        assert abs((mean_found.ravel() - mean) / deviation).max() < 2.0**-20
        _, rstd = fn.rms_norm(x, 768, eps=0.0, return_stats=True)
        assert abs(rstd.ravel() * square**0.5 - 1).max() < 2.0**-22
