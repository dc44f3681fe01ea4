"""What every norm can do besides normalising, against the reference, and in any memory layout."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm import _reference as reference
from fastnorm.arguments import ACTIVATIONS
from fastnorm.layout import layout_of
from fastnorm.operations import OPERATIONS, Operation

from .helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    assert_close,
    assert_same_bits,
    call,
    channels_last,
    data,
    epsilon,
    expected,
    layouts,
    named,
    without,
)

SHAPE = (3, 8, 5, 6)

pytestmark = pytest.mark.usefixtures("backend")
by_operation = pytest.mark.parametrize("op", OPERATIONS, ids=named)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=named)


def with_feature(feature: str) -> Any:
    chosen = [op for op in OPERATIONS if feature in op.features]
    return pytest.mark.parametrize("op", chosen, ids=named)


def parameters(op: Operation, x: Any, **options: Any) -> dict[str, Any]:
    return op.parameters(x.shape, x.dtype, np.random.default_rng(1), **options)


def check(op: Operation, x: Any, p: dict[str, Any], **options: Any) -> Any:
    """Compare with the reference; no number on the way is larger than 16, or than the result."""
    y, exact = call(op, x, p, **options), expected(op, x, p, **options)
    for got, right in zip(y, exact) if isinstance(y, tuple) else [(y, exact)]:
        assert_close(got, right, np.maximum(16, abs(right)))
    return y


@by_dtype
@by_operation
@pytest.mark.parametrize("ndim", range(2, 7))
def test_every_number_of_dimensions(ndim: int, op: Operation, dtype: Any) -> None:
    shape = ((4, 8) if ndim == 2 else (3, 8, 5, 2, 3, 2))[:ndim]
    x = data(shape, dtype, 1.0)
    p = parameters(op, x)
    before = x.copy()
    if op.refuses(shape):
        with pytest.raises(ValueError, match="one value per channel"):
            call(op, x, p)
        return
    check(op, x, p)
    assert_same_bits(x, before)


@by_dtype
def test_eps_of_rms_norm_is_that_of_the_type_computed_in(dtype: Any) -> None:
    """As in PyTorch since 2.13: float32's for half precision."""
    eps = 2.0**-52 if dtype == F64 else 2.0**-23
    x = np.array([[2.0, -2.0]], dtype) * 2.0 ** -np.array(26 if dtype == F64 else 12, dtype)
    right = (np.sign(x) / np.sqrt(1 + eps / (x.astype(F64) ** 2))).astype(F64)
    weight = np.ones(2, dtype)
    _, rstd = fn.rms_norm(x, 2, return_stats=True)
    for y in (
        fn.rms_norm(x, 2),
        fn.rms_norm(x, 2, weight_offset=1.0, weight=weight * 0),
        fn.add_rms_norm(x, 0 * x, 2)[0],
        fn.nn.RMSNorm(2)(x),
        (x * rstd).astype(dtype),
    ):
        assert_close(y, right, 1.0)


@by_dtype
@with_feature("channel_axis")
def test_channel_axis(op: Operation, dtype: Any) -> None:
    x = np.ascontiguousarray(np.moveaxis(data(SHAPE, dtype, 1.0), 1, -1))
    check(op, x, parameters(op, x, channel_axis=-1))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=named)
@with_feature("per_sample")
def test_weights_of_each_sample(op: Operation, dtype: Any) -> None:
    x = data(SHAPE, dtype, 1.0)
    check(op, x, parameters(op, x, per_sample=True))
    check(op, channels_last(x), parameters(op, x, per_sample=True))
    full = {k: np.random.default_rng(2).standard_normal(SHAPE).astype(dtype) for k in ("weight",)}
    check(op, x, parameters(op, x) | full)
    check(op, channels_last(x), parameters(op, x) | full)


@pytest.mark.parametrize("other", DTYPES, ids=named)
@with_feature("residual")
def test_parameters_of_another_dtype(op: Operation, other: Any) -> None:
    x = data(SHAPE, F32, 1.0)
    p = {k: v.astype(other) if k in ("weight", "bias") else v for k, v in parameters(op, x).items()}
    check(op, x, p)
    check(op, x, without(p, "weight"))
    check(op, x, without(p, "bias"))


@by_dtype
@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@with_feature("residual")
def test_residual_and_activation(
    op: Operation, activation: str | None, layout: Any, dtype: Any
) -> None:
    x, residual = layout(data(SHAPE, dtype, 1.0)), layout(data(SHAPE, dtype, seed=2))
    p = parameters(op, x)
    check(op, x, p, residual=residual, activation=activation)
    check(op, x, p, activation=activation)
    check(op, x, p, residual=np.ascontiguousarray(residual.astype(np.float64)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_alone(activation: str) -> None:
    """Relative precision also in the far tails, where 1 + erf(x) would have cancelled."""
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    one = np.float32([1.0])
    y = fn.batch_norm(x[:, None], one * 0, one, eps=0.0, activation=activation)[:, 0]
    exact = fn._reference.activate(x.astype(np.float64), activation)
    # e^-2u multiplies what 2u = 67 has lost by as much: four roundings, two of them constants'
    tail = 4 / 2 * 67 if activation == "gelu_tanh" else 0
    error = abs(y - exact) / np.maximum(abs(exact), 1e-30)
    assert error.max() <= (8 + tail) * epsilon(F32)
    assert error[abs(x) < 1].max() <= 8 * epsilon(F32)
    with np.errstate(all="ignore"):
        assert np.isnan(
            fn.batch_norm(one[:, None] * np.nan, one * 0, one, activation=activation)
        ).all()


@by_dtype
@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])
@with_feature("where")
def test_where(op: Operation, layout: Any, dtype: Any) -> None:
    x = layout(data(SHAPE, dtype, 1.0))
    rng = np.random.default_rng(3)
    p = parameters(op, x)
    for mask in (rng.random(SHAPE) < 0.7, (rng.random(SHAPE[2:]) < 0.7), np.True_):
        check(op, x, p, where=mask)
    # what is not selected must not reach the statistics
    hot, mask = x.copy(), np.ones(SHAPE, bool)
    hot[:, :, 0], mask[:, :, 0] = np.nan, False
    y = np.asarray(call(op, hot, p, where=mask))
    assert_close(y[:, :, 1:], expected(op, hot, p, where=mask)[:, :, 1:], 16)
    assert np.isnan(y[:, :, 0]).all()


@by_dtype
@with_feature("return_stats")
def test_return_stats(op: Operation, dtype: Any) -> None:
    x = data(SHAPE, dtype, 1.0)
    y, *stats = call(op, x, parameters(op, x), return_stats=True)
    _, *exact = expected(op, x, parameters(op, x), return_stats=True)
    assert y.dtype == dtype
    for value, right in zip(stats, exact, strict=True):
        assert value.dtype == np.float64
        assert value.shape == right.shape
        np.testing.assert_allclose(value, right.astype(np.float64), rtol=1e-13)


@by_dtype
@with_feature("out")
def test_out_and_overlap(op: Operation, dtype: Any) -> None:
    x = data(SHAPE, dtype, 1.0)
    residual = data(SHAPE, dtype, seed=2)
    p = parameters(op, x)
    shared = {"residual": residual} if "residual" in op.features else {}
    right = call(op, x, p, **shared)
    out = np.empty_like(x)
    assert call(op, x, p, out=out, **shared) is out
    assert_same_bits(out, right)
    # in place, over the residual, and over memory shifted against that of x
    inplace = x.copy()
    assert_same_bits(call(op, inplace, p, out=inplace, **shared), right)
    if shared:
        over = residual.copy()
        assert_same_bits(call(op, x, p, residual=over, out=over), right)
    memory = np.empty(x.size + 7, dtype)
    source, target = memory[:-7].reshape(SHAPE), memory[7:].reshape(SHAPE)
    source[...] = x
    assert_same_bits(call(op, source, p, out=target, **shared), right)
    turned = x.copy()
    result = call(op, turned, p, out=turned[:, :, ::-1], **shared)
    assert_same_bits(np.ascontiguousarray(result), right)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("running", [F16, F32, F64], ids=named)
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics(name: str, running: Any, momentum: float) -> None:
    x = data(SHAPE, F32, 1.0)
    kept = np.zeros((8, 2), running)
    kept[:, 1] = 1
    exact = kept.astype(np.longdouble)
    flag = {"training": True} if name == "batch_norm" else {"use_input_stats": True}
    getattr(fn, name)(x, kept[:, 0], kept[:, 1], momentum=momentum, **flag)
    getattr(fn._reference, name)(
        x, exact[:, 0], exact[:, 1], momentum=momentum, dtype=np.longdouble, **flag
    )
    # computed in float64, rounded once
    assert (abs(kept - exact) <= (0.5 * epsilon(running) + 1e-14) * abs(exact)).all()
    if momentum == 0:
        assert (kept[:, 0] == 0).all()
        assert (kept[:, 1] == 1).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.name == "group_norm"], ids=named)
def test_where_over_many_rows(op: Operation, dtype: Any) -> None:
    # more rows than a byte counts, and than a tile has
    x = channels_last(data((2, 24, 19, 41), dtype, 1.0))
    rng = np.random.default_rng(3)
    p = parameters(op, x)
    every = channels_last(rng.random(x.shape) < 0.7)
    every[0, 1], every[:, 5] = False, True  # a channel without and one with all of its numbers
    of_samples = np.arange(41) < np.array([17, 40]).reshape(2, 1, 1, 1)  # repeated along one axis
    for mask in (every, every[:, :1], of_samples):
        check(op, x, p, where=mask)
        chosen = np.broadcast_to(mask, x.shape)
        hot = x.copy(order="K")
        hot[~chosen] = np.nan
        y, blind = (np.asarray(call(op, v, p, where=mask)) for v in (x, hot))
        assert_same_bits(blind[chosen], y[chosen])


@pytest.mark.parametrize("n", [1, 5, 95, 96, 130, 768, 2047, 4096])  # more are merged by place
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_the_chosen_of_a_row_are_normalised_as_if_alone(rows: int, n: int) -> None:
    """To the bit, whatever is in the others; NumPy adds up in another order."""
    same = assert_same_bits if fn.get_backend() != "numpy" else partial(assert_close, size=16.0)
    rng = np.random.default_rng(n)
    x = rng.standard_normal((rows, n), F32) + 3
    chosen = rng.random((rows, n)) < rng.uniform(0, 1, (rows, 1))
    chosen[0] = True
    chosen[-1] = np.arange(n) < n // 2
    chosen[rows // 2] = rows == 1  # none
    w, b = rng.standard_normal((2, n), F32)
    x[~chosen & (rng.random(x.shape) < 0.01)] = np.nan
    x[~chosen & (rng.random(x.shape) < 0.01)] = 3e38
    x[~chosen & (rng.random(x.shape) < 0.01)] = -np.inf
    for mask in (chosen, np.asfortranarray(chosen), np.repeat(chosen, 2, axis=1)[:, ::2]):
        with np.errstate(all="ignore"):
            plain, *stats = fn.layer_norm(x, n, where=mask, return_stats=True)
            again = [fn.layer_norm(x, n, w, v, where=mask) for v in (None, b) for _ in range(3)]
            shares = fn.rms_norm(x, n, w, where=mask)
        for i in range(rows):
            some = x[i][chosen[i]][np.newaxis]
            if some.size == 0:
                assert np.isnan(plain[i]).all()
                continue
            alone, *own = fn.layer_norm(some, some.size, return_stats=True)
            same(plain[i][chosen[i]], alone[0])
            same(*(np.array([v[k, 0] for v in found]) for k, found in ((i, stats), (0, own))))
            of = w[chosen[i]], b[chosen[i]]
            for k, y in enumerate(again):
                right = fn.layer_norm(some, some.size, of[0], None if k < 3 else of[1])
                same(y[i][chosen[i]], right[0])
            right = fn.rms_norm(some, some.size, of[0])
            same(shares[i][chosen[i]], right[0])


@pytest.mark.parametrize("shape", [(6, 40), (6, 1), (1, 40), (1, 1)], ids=str)
def test_a_mask_that_changes_between_calls(shape: tuple[int, int]) -> None:
    """What a call before has found holds for its kind, not for its numbers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 40), F32)
    mask = np.empty(shape, bool)
    for _ in range(6):
        mask[...] = rng.random(shape) < 0.6
        mask[0, 0] = True
        with np.errstate(all="ignore"):
            y = fn.layer_norm(x, 40, where=mask)
            right = fn.layer_norm(x, 40, where=np.broadcast_to(mask, x.shape).copy())
        assert_same_bits(y, right)
        image = x.reshape(2, 3, 40)
        y = fn.instance_norm(image, where=mask.reshape(2, 3, -1) if shape[0] == 6 else mask)
        assert y.shape == image.shape


def test_a_mask_in_the_memory_of_the_result() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 40), F32)
    chosen = rng.random(x.shape) < 0.6
    right = fn.layer_norm(x, 40, where=chosen)
    for _ in range(3):
        out = np.zeros((6, 40), F32)
        mask = out.view(bool)[:, :40]
        mask[...] = chosen
        assert fn.layer_norm(x, 40, where=mask, out=out) is out
        assert_same_bits(out, right)


def test_a_mask_that_leaves_too_few_is_refused_each_time() -> None:
    x = np.arange(24, dtype=F32).reshape(4, 2, 3)
    for few in (False, True, False, True, True):
        mask = np.ones(x.shape, bool)
        mask[:, 1] = not few
        mask[0, 1, 0] = True
        if few:
            with pytest.raises(ValueError, match="expected at least 2"):
                fn.batch_norm(x, None, None, training=True, where=mask)
            with pytest.raises(ValueError, match="expected at least 2"):
                fn.instance_norm(x, np.zeros(2), np.ones(2), where=mask)
        else:
            fn.batch_norm(x, None, None, training=True, where=mask)
            fn.instance_norm(x, np.zeros(2), np.ones(2), where=mask)


@by_operation
@pytest.mark.parametrize("axis", range(4))
def test_empty_input(op: Operation, axis: int) -> None:
    if op.grouped and axis == 1:
        return  # no group count divides no channels
    shape = tuple(0 if a == axis else n for a, n in enumerate(SHAPE))
    x = np.empty(shape, F32)
    if op.name == "layer_norm" and op.label.endswith("(axis)") and shape[1] == 0:
        p: dict[str, Any] = {"axis": 1}
    else:
        p = parameters(op, x)
    result = call(op, x, p)
    for y in result if isinstance(result, tuple) else (result,):
        assert y.shape == shape
        assert y.dtype == F32


@pytest.mark.parametrize("dtype", ["u1", "i4", "i8", "?"])
@by_operation
def test_integers_and_lists(op: Operation, dtype: str) -> None:
    x = np.random.default_rng(4).integers(0, 2 if dtype == "?" else 100, SHAPE).astype(dtype)
    p = parameters(op, x)
    y, listed = call(op, x, p), call(op, x.tolist(), p)
    right = call(op, x.astype(np.float64), p)
    for a, b, c in zip(*(r if isinstance(r, tuple) else (r,) for r in (y, listed, right))):
        assert_same_bits(a, c)
        assert_same_bits(b, c)


@by_operation
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_stay_in_their_group(op: Operation, bad: float) -> None:
    for layout in (np.ascontiguousarray, channels_last):
        x = layout(data(SHAPE, F32, 1.0))
        p = parameters(op, x)
        clean = call(op, x, p)
        ids = op.group_ids(SHAPE, num_groups=p.get("num_groups"))
        hot = x.copy("K")  # in the same memory order: the same walk
        hot[1, 2, 3, 4] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dirty = call(op, hot, p)
        others = ids != ids[1, 2, 3, 4]
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (clean, dirty))):
            assert_same_bits(a[others], b[others])


def test_weight_offset_and_epsilon() -> None:
    x, w = data((5, 64), F32), data((64,), F32, seed=2)
    exact = fn._reference.rms_norm(x, 64, w + 1.0, dtype=np.longdouble)
    assert_close(fn.rms_norm(x, 64, w, weight_offset=1.0), exact, 16)
    for dtype, eps in ((F16, 2**-23), (BF16, 2**-23), (F32, 2**-23), (F64, 2**-52)):
        small = (data((5, 64)) / 64).astype(dtype)
        assert_same_bits(fn.rms_norm(small, 64), fn.rms_norm(small, 64, eps=eps))


def test_the_sum_is_rounded_first() -> None:
    x, r = data((5, 64), BF16), data((5, 64), BF16, seed=2)
    y, total = fn.add_layer_norm(x, r, 64)
    assert_same_bits(total, (x.astype("f4") + r.astype("f4")).astype(ml_dtypes.bfloat16))
    assert_same_bits(y, fn.layer_norm(total, 64))


@pytest.mark.parametrize("dtype", [F16, F32], ids=named)
def test_a_sum_out_of_range_does_not_warn(dtype: Any) -> None:
    """Also where x and the residual lie in different orders, and are added before the norm."""
    x = np.full((4, 7), 0.9 * float(np.finfo(dtype).max), dtype).T
    for residual in (x, np.ascontiguousarray(x)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, total = fn.add_rms_norm(x, residual, 4, eps=1.0)
        assert (total == np.inf).all()


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@by_operation
def test_any_layout(op: Operation, dtype: Any) -> None:
    x = data((3, 8, 5, 6), dtype, 1.0)
    p = parameters(op, x)
    exact = expected(op, x, p)
    exact = exact[0] if isinstance(exact, tuple) else exact
    for name, array in layouts(x):
        y = call(op, array, p)
        y = y[0] if isinstance(y, tuple) else y
        assert y.dtype == array.dtype, name
        assert y.strides == np.empty_like(array).strides, name
        assert_close(y.astype(dtype), exact, 16)


@by_operation
def test_broadcast_input(op: Operation) -> None:
    for axis in range(4):
        x = data(tuple(1 if a == axis else n for a, n in enumerate(SHAPE)), F32, 1.0)
        wide = np.broadcast_to(x, SHAPE)
        check(op, wide, parameters(op, wide))


@given(st.data())
def test_any_shape(draw: st.DataObject) -> None:
    op = draw.draw(st.sampled_from(OPERATIONS))
    ndim = draw.draw(st.integers(max(3, op.min_ndim), 6))
    shape = [draw.draw(st.integers(1, 6)) for _ in range(ndim)]
    shape[0], shape[1], shape[-1] = max(shape[0], 2), 4 * shape[1], max(shape[-1], 2)
    dtype = draw.draw(st.sampled_from(DTYPES))
    order = draw.draw(st.permutations(range(ndim)))
    steps = [draw.draw(st.sampled_from([1, 1, 2, -1, -2])) for _ in range(ndim)]
    x = data(tuple(shape), dtype, draw.draw(st.sampled_from([0.0, 1.0, 3.0])))
    memory = np.zeros([shape[a] * abs(steps[a]) for a in order], dtype).transpose(np.argsort(order))
    array = memory[tuple(slice(None, None, step) for step in steps)]
    array[...] = x
    p = parameters(op, array)
    exact, y = expected(op, x, p), call(op, array, p)
    for got, right in zip(y, exact) if isinstance(y, tuple) else [(y, exact)]:
        assert_close(got, right, 32)


def test_a_layout_names_the_walk() -> None:
    def walk(shape: tuple[int, ...], reduced: str, order: str) -> Any:
        x = np.empty([shape[int(a)] for a in order]).transpose(np.argsort([int(a) for a in order]))
        kept = np.empty([1 if r == "R" else n for n, r in zip(shape, reduced)])
        flags = tuple(r == "R" for r in reduced)
        return layout_of({"x": x, "y": x, "stats": kept}, flags)

    batch = walk((4, 8, 90), "RKR", "012")
    assert (batch.columns, batch.dims) == (False, (1, 8, 4, 90, 1))
    last = walk((4, 8, 90), "RKR", "021")
    assert (last.columns, last.dims, last.neighbours) == (True, (1, 1, 1, 360, 8), 1)
    group = walk((4, 2, 4, 90), "KKRR", "0123")
    assert (group.columns, group.dims) == (False, (1, 8, 1, 360, 1))
    grouped = walk((4, 2, 4, 90), "KKRR", "0312")
    assert (grouped.columns, grouped.dims, grouped.neighbours) == (True, (1, 4, 1, 90, 8), 4)
    layer2d = walk((4, 8, 90), "KRK", "012")
    assert (layer2d.columns, layer2d.dims) == (True, (1, 4, 1, 8, 90))
    # reduced, kept, reduced, kept, reduced, kept: more than the kernels count
    assert walk((3, 4, 3, 4, 3, 4, 3), "RKRKRKR", "0123456") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_weights_of_each_sample_along_rows(dtype: Any, backend: str) -> None:
    """Rows of one sample share them: of few rows and of many, short and long."""
    for shape, axes in (((2, 2, 64, 8), 2), ((3, 9, 5), 1), ((4, 11, 700), 1), ((2, 3, 4100), 1)):
        x = data(shape, dtype, 1.0)
        own = (*shape[:1], *[1] * (len(shape) - axes - 1), *shape[-axes:])
        w, b = (data(own, dtype, seed=seed) for seed in (1, 2))
        shared = data(shape[-axes:], dtype, seed=3)
        for weight, bias in ((w, b), (shared, b), (w, shared), (None, b), (w, None)):
            y = fn.layer_norm(x, shape[-axes:], weight, bias)
            exact = reference.layer_norm(x, shape[-axes:], weight, bias, dtype=np.longdouble)
            assert_close(y, exact, 16)
            y = fn.layer_norm(x[:1], shape[-axes:], *(
                p if p is None or p is shared else p[:1] for p in (weight, bias)
            ))  # fmt: skip
            assert_close(y, exact[:1], 16)
