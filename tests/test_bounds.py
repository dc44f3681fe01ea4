"""No kernel leaves an array or a tile, whatever the numbers are and wherever they lie.

The arrays of these tests end at a page that nobody may touch (`guarded`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import fastnorm as fn
from fastnorm import _core, machine
from fastnorm.layout import layout_of
from fastnorm.schedule import forward_schedule

from .helpers import BACKENDS, assert_fence, guarded, guarded_copy, non_temporal

# What leaves a float's range, or its precision, and takes a way of its own through the kernels.
BAD = (np.nan, np.inf, -np.inf, -3e38, 1e31, 1e-39)

# Runs below and beyond a block, a thread's pieces of one, and what is shared out.
LENGTHS = (4095, 4097, 27_700, 65_537)

NORMS: dict[str, Any] = {
    "instance": lambda x, **o: fn.instance_norm(x, **o),
    "batch": lambda x, **o: fn.batch_norm(x, training=True, **o),
    "inference": lambda x, **o: fn.batch_norm(x, np.zeros(3), np.ones(3), **o),
    "group": lambda x, **o: fn.group_norm(x, 3, np.ones(3), np.zeros(3), **o),
    "layer": lambda x, **o: fn.layer_norm(x, x.shape[-1], **o),
    "weights": lambda x, **o: fn.layer_norm(x, axis=-1, weight=np.ones(x.shape[-1]), **o),
    "rms": lambda x, **o: fn.rms_norm(x, x.shape[-1], **o),
    "tiny weight": lambda x, **o: fn.group_norm(x, 1, np.full(3, 1e-32), **o),
    "no eps": lambda x, **o: fn.instance_norm(x * np.float32(1e-33), eps=0.0, **o),
    "standardize": lambda x: fn.standardize(x, axis=-1),
    "l2": lambda x: fn.l2_normalize(x),
    "sum": lambda x: fn.add_layer_norm(x, x, x.shape[-1])[0],
    "weight norm": lambda x: fn.weight_norm(x, np.ones((2, 1, 1), np.float32)),
    "weight standardize": lambda x: fn.weight_standardize(x),
}
PLAIN = ("standardize", "l2", "sum", "weight norm", "weight standardize")


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NORMS)
def test_bad_numbers_in_long_runs(name: str, length: int, side: str) -> None:
    x = guarded((2, 3, length), np.float32, side)
    x[...] = np.random.default_rng(0).normal(size=x.shape)
    clean = x.copy()
    out = {} if name in PLAIN else {"out": guarded(x.shape, np.float32, side)}
    for bad in BAD:
        x[...] = clean
        x[0, 1, length // 2] = bad
        first = NORMS[name](x, **out).copy()
        assert np.array_equal(first, NORMS[name](x, **out), equal_nan=True), bad
        assert_fence(x)
        if out:
            assert_fence(out["out"])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_bad_number_stays_in_its_plane(length: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, length)).astype(np.float32)
    expected = fn.instance_norm(x)
    for bad in BAD:
        spoiled = x.copy()
        spoiled[1, 2, -1] = bad
        y = fn.instance_norm(spoiled)
        same = np.ones((2, 3), bool)
        same[1, 2] = False
        assert np.array_equal(y[same], expected[same])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_bad_numbers_backward(length: int, dtype: Any) -> None:
    x, dy = guarded((2, 3, length), dtype), guarded((2, 3, length), dtype)
    rng = np.random.default_rng(0)
    x[...], dy[...] = rng.normal(size=x.shape), rng.normal(size=x.shape)
    weights = {"group": (3,), "layer": (length,)}
    for bad in (*BAD, 65_504.0):
        with np.errstate(over="ignore"):
            x[0, 1, 5] = dy[1, 2, length - 1] = bad
        for kind, shape in weights.items():
            weight = guarded_copy(np.ones(shape, np.float32 if dtype != np.float64 else dtype))
            if kind == "group":
                _, mean, rstd = fn.group_norm(x, 3, weight, return_stats=True)
                call = lambda: fn.group_norm_backward(dy, x, mean, rstd, 3, weight)  # noqa: B023, E731
            else:
                _, mean, rstd = fn.layer_norm(x, length, weight, return_stats=True)
                call = lambda: fn.layer_norm_backward(dy, x, mean, rstd, length, weight)  # noqa: B023, E731
            for a, b in zip(call(), call()):
                assert np.array_equal(a, b, equal_nan=True)
        assert_fence(x)
        assert_fence(dy)


def odd(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A view of records whose first axis, of length 1, has a stride of no whole elements."""
    field = np.dtype([("image", dtype, shape[1:]), ("label", "u1")])
    records = np.zeros(3, field)
    records["image"] = np.random.default_rng(0).normal(size=(3, *shape[1:]))
    return records["image"][:1]


ODD: dict[str, Any] = {
    "x": lambda x: fn.layer_norm(x, x.shape[-1]),
    "rms": lambda x: fn.rms_norm(x, x.shape[-1]),
    "group": lambda x: fn.group_norm(x, 2),
    "instance": lambda x: fn.instance_norm(x),
    "l2": lambda x: fn.l2_normalize(x),
    "residual": lambda x: fn.layer_norm(x.copy(), x.shape[-1], residual=x),
    "sum": lambda x: fn.add_layer_norm(x.copy(), x, x.shape[-1])[0],
    "weight": lambda x: fn.layer_norm(x.copy(), axis=(1, 2), weight=x),
    "activation": lambda x: fn.group_norm(x, 2, activation="silu"),
    "dy": lambda x: fn.layer_norm_backward(
        x, x.copy(), np.zeros((1, x.shape[1], 1)), np.ones((1, x.shape[1], 1)), x.shape[-1]
    )[0],
    "x backward": lambda x: fn.rms_norm_backward(
        x.copy(), x, np.ones((1, x.shape[1], 1)), x.shape[-1]
    )[0],
}


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_stride_on_an_axis_of_length_1(name: str, step: int) -> None:
    x = odd((1, 4, 8))[:, ::step]
    assert x.strides[0] % 4
    plain = ODD[name](np.ascontiguousarray(x))
    for _ in range(3):
        assert np.array_equal(ODD[name](x), plain)


@pytest.mark.parametrize("step", [1, 2])
def test_an_odd_stride_of_out(step: int) -> None:
    out = odd((1, 4, 8))[:, ::step]
    records = out.base
    x = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    for _ in range(3):
        before = records.copy()
        fn.layer_norm(x, 8, out=out)
        assert np.array_equal(out, fn.layer_norm(x, 8))
        after = records.copy()
        after["image"][:1, ::step] = before["image"][:1, ::step]
        assert after.tobytes() == before.tobytes(), "written outside of out"


def test_other_types_of_two_bytes_are_not_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.ones((4, 8), np.float32)
    for name in ("float8_e5m2", "float8_e4m3fn", "float8_e4m3b11fnuz", "int4", "float4_e2m1fn"):
        for _ in range(3):
            with pytest.raises(TypeError):
                fn.layer_norm(x.astype(getattr(ml_dtypes, name)), 8)
    half = x.astype(ml_dtypes.bfloat16)
    assert np.array_equal(fn.layer_norm(half, 8), fn.layer_norm(half, 8))


@pytest.mark.skipif(_core.kernels is None, reason="no compiled kernels")
class TestKernelsRefuse:
    """A wrong description is an error of Python's, not an access."""

    shape = (4, 8)

    def run(self, described: tuple[int, ...], of: Any = None, **arrays: Any) -> None:
        x = np.ones(self.shape, np.float32)
        operands = {"x": x, "y": np.empty_like(x), "stats": np.empty((4, 1))} | arrays
        lie = operands | {"x": as_strided(x, strides=[4 * step for step in described])}
        layout = layout_of(lie, (False, True))
        stats = operands.pop("stats")
        dtypes = tuple((name, array.dtype) for name, array in operands.items())
        schedule = forward_schedule(of or layout, dtypes, machine.here)
        _core.kernels.run_pass(
            layout, schedule, operands.pop("x"), operands.pop("y"), stats, stats.copy(),
            stats.copy(), **operands,
        )  # fmt: skip

    def test_what_is_right_is_taken(self) -> None:
        self.run((8, 1))

    def test_a_walk_that_leaves_the_array(self) -> None:
        with pytest.raises(SystemError, match="leaves an array of shape"):
            self.run((9, 1))

    def test_a_schedule_of_another_layout(self) -> None:
        for shape in ((4, 16), (1, 8)):
            x = np.empty(shape)
            other = layout_of({"x": x, "y": x, "stats": x[:, :1]}, (False, True))
            with pytest.raises(SystemError, match="does not suit"):
                self.run((8, 1), of=other)

    def test_a_type_they_do_not_read(self) -> None:
        with pytest.raises(TypeError, match="dtype complex64"):
            self.run((8, 1), x=np.ones(self.shape, np.complex64))
        with pytest.raises(TypeError, match="y of dtype float64"):
            self.run((8, 1), y=np.ones(self.shape))
        with pytest.raises(TypeError, match="weight of dtype float64"):
            self.run((8, 1), weight=np.ones((1, 8)))
        with pytest.raises(TypeError, match="mean of dtype float32"):
            self.run((8, 1), stats=np.ones((4, 1), np.float32))


def padded(array: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """The same numbers in the order of `dense`, with gaps after each axis but the last."""
    order = sorted(range(array.ndim), key=lambda axis: -dense.strides[axis])
    inside = [array.shape[axis] for axis in order]
    memory = np.full([n + 2 for n in inside[:-1]] + inside[-1:], np.nan, array.dtype)
    view = memory[tuple(slice(0, n) for n in inside)].transpose(np.argsort(order))
    view[...] = array
    return view


ORDERS = {"channels-first": (0, 1, 2, 3), "channels-last": (0, 2, 3, 1)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("positions", [(5, 7), (40, 70)])
@pytest.mark.parametrize("past", [False, True], ids=["cached", "past"])
def test_every_operand_is_walked_by_its_own_strides(
    dtype: Any, order: str, positions: tuple[int, int], past: bool
) -> None:
    """x, residual, where, out and dy each lie in memory of their own kind, in every combination."""
    rng = np.random.default_rng(0)
    shape = (2, 6, *positions)

    def numbers() -> np.ndarray:
        memory = rng.normal(size=[shape[axis] for axis in ORDERS[order]]).astype(dtype)
        return memory.transpose(np.argsort(ORDERS[order]))

    x, residual, dy = numbers(), numbers(), numbers()
    where = numbers() > 0
    kind = np.float64 if dtype == np.float64 else np.float32
    weight, bias = rng.normal(size=(2, 6)).astype(kind)
    names = ("x", "residual", "out")
    # a sum is taken in another order where rows do not follow one another
    error = {np.float16: 2.0**-9, np.float32: 1e-5, np.float64: 1e-12}[dtype]

    def close(a: np.ndarray, b: np.ndarray) -> bool:
        largest = np.nanmax(np.abs(b).astype(np.float64))
        return np.allclose(a, b, rtol=error, atol=error * largest, equal_nan=True)

    norms: dict[str, Any] = {
        "batch": lambda x, **o: fn.batch_norm(x, weight=weight, bias=bias, training=True, **o),
        "inference": lambda x, **o: fn.batch_norm(x, bias, weight**2, weight, bias, **o),
        "group": lambda x, **o: fn.group_norm(x, 3, weight, bias, **o),
        "instance": lambda x, **o: fn.instance_norm(x, weight=weight, bias=bias, **o),
        "layer": lambda x, **o: fn.layer_norm(x, axis=1, weight=weight, bias=bias, **o),
    }
    with non_temporal(past):
        for name, norm in norms.items():
            for masked in (False, True):
                chosen = {"where": where} if masked else {}
                right = norm(x, residual=residual, **chosen)
                for chance in range(1, 8):
                    apart = {n for i, n in enumerate(names) if chance >> i & 1}
                    out = padded(np.empty_like(x), x) if "out" in apart else np.empty_like(x)
                    memory = out.base if out.base is not None else out
                    memory[...] = 7
                    e = padded(residual, x) if "residual" in apart else residual
                    if masked:
                        chosen["where"] = padded(where.astype(dtype), x) == 1
                    for _ in range(2):
                        norm(padded(x, x) if "x" in apart else x, residual=e, out=out, **chosen)
                        assert close(out, right), (name, apart, masked)
                        gaps = memory.astype(np.float64)
                        assert (gaps == 7).sum() >= memory.size - out.size, "outside out"
        for padded_x, padded_dy in ((True, False), (False, True), (True, True)):
            x1, dy1 = (padded(a, x) if p else a for a, p in ((x, padded_x), (dy, padded_dy)))
            _, mean, rstd = fn.group_norm(x, 3, weight, return_stats=True)
            right = fn.group_norm_backward(dy, x, mean, rstd, 3, weight)
            found = fn.group_norm_backward(dy1, x1, mean, rstd, 3, weight)
            for a, b in zip(found, right):
                assert close(a, b)


def test_an_activation_that_changes_x_when_it_is_looked_up() -> None:
    """What is kept of known calls is asked only with what Numba has compiled."""
    numba = pytest.importorskip("numba")
    square = numba.njit(lambda v: v * v)
    x = np.ones((512, 1024), np.float32)
    for _ in range(2):
        fn.layer_norm(x, 1024, activation=square)

    class Hostile:
        def __call__(self, v: float) -> float:
            return v

        def __hash__(self) -> int:
            x.resize((1, 1), refcheck=False)
            return hash(square)

        def __eq__(self, other: object) -> bool:
            return True

    with pytest.raises((ValueError, TypeError), match="activation"):
        fn.layer_norm(x, 1024, activation=Hostile())  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shared", ["weight", "x", "residual"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "numpy"])
def test_out_over_an_operand_beside_numbers_out_of_range(
    name: str, shared: str, layout: str
) -> None:
    """What a group's type cannot hold is stepped again: from what was there before."""
    rng = np.random.default_rng(0)
    shape = (3, 40)
    operands = {n: rng.normal(1.0, 0.3, shape) for n in ("x", "weight", "residual")}
    operands["x"][:, 7] = np.finfo(np.float64).max / 4
    operands["x"][1] *= 1e-300
    axis = 1 if layout == "rows" else 0
    with fn.backend(name):
        right = fn.rms_norm(
            operands["x"], axis=axis, weight=operands["weight"], residual=operands["residual"]
        )
        copies = {n: array.copy() for n, array in operands.items()}
        found = fn.rms_norm(
            copies["x"],
            axis=axis,
            weight=copies["weight"],
            residual=copies["residual"],
            out=copies[shared],
        )
    np.testing.assert_array_equal(found, right)
