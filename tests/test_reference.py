"""The oracle itself, against PyTorch, numbers worked out by hand, and slower ways to the same."""

from __future__ import annotations

import decimal
import itertools
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from fastnorm import _reference as reference
from fastnorm.operations import OPERATIONS, SHARED, Operation

Array = np.ndarray[Any, Any]

U = 2.0**-53  # half a unit in the last place of float64
EXTENDED = np.finfo(np.longdouble).nmant > 52
needs_extended = pytest.mark.skipif(not EXTENDED, reason="long double is float64 here")


def label(op: Operation) -> str:
    return op.label


by_label = pytest.mark.parametrize("op", OPERATIONS, ids=label)


def run(op: Operation, x: Array, parameters: dict[str, Any], **options: Any) -> Any:
    """What the reference answers; running statistics in `parameters` are left as they are."""
    copies = {k: v.copy() if k.startswith("running") else v for k, v in parameters.items()}
    return getattr(reference, op.name)(x, **copies, **options)


def outputs(op: Operation, result: Any) -> tuple[Any, ...]:
    return result if op.outputs > 1 else (result,)


def sample_data(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Shuffled evenly spaced numbers in [-2, 2]: no group's spread is small by chance."""
    values = np.linspace(-2, 2, math.prod(shape))
    return np.random.default_rng(seed).permutation(values).reshape(shape)


def cases(feature: str | None = None) -> list[Any]:
    """(operation, shape, channel axis): every rank the operation takes, channels first and last."""
    found = []
    for op in OPERATIONS:
        for positions, channel_axis in itertools.product([(), (5,), (3, 4), (2, 3, 4)], (1, -1)):
            shape = (3, 16, *positions) if channel_axis == 1 else (3, *positions, 16)
            if len(shape) < op.min_ndim or (feature and feature not in op.features):
                continue
            if channel_axis != 1 and ("channel_axis" not in op.features or not positions):
                continue
            name = f"{op.label}-{'x'.join(map(str, shape))}-{channel_axis}"
            found.append(pytest.param(op, shape, channel_axis, id=name))
    return found


# --- Against PyTorch ------------------------------------------------------------------------------

# PyTorch adds up at most 384 numbers of size 2 in float64, at worst one after another: the mean is
# off by 384 U * 2. That is divided by a group's spread, at least 1/11, and multiplied by a weight,
# at most 2.
TORCH = 384 * U * 2 * 11 * 2
# dx divides by the spread once more and multiplies by dy <= 2; dweight and dbias add up 72 of that.
TORCH_DX = TORCH * 11 * 2
TORCH_DWEIGHT = TORCH_DX * 72


@pytest.mark.parametrize(("op", "shape", "channel_axis"), cases())
def test_forward_is_pytorch(op: Operation, shape: tuple[int, ...], channel_axis: int) -> None:
    torch = pytest.importorskip("torch")
    assert op.torch is not None
    x = sample_data(shape)
    p = op.parameters(shape, x.dtype, np.random.default_rng(1), channel_axis=channel_axis)
    theirs = p | op.to_torch(p)
    expected = outputs(op, op.torch(torch.from_numpy(x), **theirs))
    results = outputs(op, getattr(reference, op.name)(x, **p))
    for y, e in zip(results, expected, strict=True):
        np.testing.assert_allclose(y, e.numpy(), rtol=0, atol=TORCH)
    for name in ("running_mean", "running_var"):  # updated in place by both
        if name in p:
            np.testing.assert_allclose(p[name], theirs[name].numpy(), rtol=0, atol=TORCH)


@pytest.mark.parametrize(("op", "shape", "channel_axis"), cases("return_stats"))
def test_backward_is_pytorch(op: Operation, shape: tuple[int, ...], channel_axis: int) -> None:
    torch = pytest.importorskip("torch")
    assert op.torch is not None
    x, dy = sample_data(shape), sample_data(shape, seed=2)
    p = op.parameters(shape, x.dtype, np.random.default_rng(1), channel_axis=channel_axis)
    leaves = {"x": torch.from_numpy(x).requires_grad_()}
    theirs = op.to_torch(p)
    leaves |= {k: theirs[k].requires_grad_() for k in ("weight", "bias") if k in theirs}
    (op.torch(leaves["x"], **theirs | {k: v for k, v in leaves.items() if k != "x"})).backward(
        torch.from_numpy(dy)
    )
    _, *stats = run(op, x, p, return_stats=True)
    kwargs = {k: p[k] for k in op.backward_keywords if k in p}
    results = getattr(reference, str(op.backward))(dy, x, *stats, **kwargs)
    for gradient, leaf in zip(results, leaves.values(), strict=True):
        atol = TORCH_DX if leaf is leaves["x"] else TORCH_DWEIGHT
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 20])
def test_local_response_norm_windows(size: int) -> None:
    torch = pytest.importorskip("torch")
    x = sample_data((2, 8, 3))
    expected = torch.nn.functional.local_response_norm(torch.from_numpy(x), size, 0.5, 0.6, 2.0)
    y = reference.local_response_norm(x, size, 0.5, 0.6, 2.0)
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=TORCH)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_weight_norm_axes(axis: int | None) -> None:
    torch = pytest.importorskip("torch")
    v = sample_data((3, 4, 5))
    kept = [1 if a != axis else s for a, s in enumerate(v.shape)]
    g = sample_data(tuple(kept), seed=1)
    expected = torch._weight_norm(
        torch.from_numpy(v), torch.from_numpy(g), -1 if axis is None else axis
    )
    np.testing.assert_allclose(reference.weight_norm(v, g, axis=axis), expected, rtol=0, atol=TORCH)
    if axis is not None:
        np.testing.assert_array_equal(
            reference.weight_norm(v, g.ravel(), axis=axis), reference.weight_norm(v, g, axis=axis)
        )


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_are_pytorch(name: str) -> None:
    torch = pytest.importorskip("torch")
    y = np.append(np.linspace(-7, 7, 101), [0.0, np.inf, np.nan])
    functional = torch.nn.functional
    function, options = {
        "relu": (functional.relu, {}),
        "relu6": (functional.relu6, {}),
        "silu": (functional.silu, {}),
        "gelu": (functional.gelu, {}),
        "gelu_tanh": (functional.gelu, {"approximate": "tanh"}),
    }[name]
    expected = function(torch.from_numpy(y), **options).numpy()
    # 1 + erf and 1 + tanh, in PyTorch, are exact to U times their largest terms: 2 * |y| <= 14.
    np.testing.assert_allclose(reference.activate(y, name), expected, rtol=0, atol=4 * 14 * U)


# --- By hand --------------------------------------------------------------------------------------

# A handful of roundings to float64 of numbers up to 14.
HAND = 8 * 14 * U


def check(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=HAND)


def test_moments_by_hand() -> None:
    mean, var = reference.moments([[1, 2, 3, 4], [5, 5, 5, 9]], 1)
    check(mean, [[2.5], [6]])
    check(var, [[1.25], [3]])
    mean, var = reference.moments([[1, 2, 3, 4]], 1, where=[[True, False, True, False]])
    check(mean, [[2]])
    check(var, [[1]])
    check(reference.norm([[3, 4], [0, 0]], 1), [[5], [0]])


def test_batch_norm_by_hand() -> None:
    running_mean, running_var = np.zeros(1), np.ones(1)
    x = [[1.0], [3.0]]
    y, mean, rstd = reference.batch_norm(
        x, running_mean, running_var, [2.0], [1.0], True, eps=0, return_stats=True
    )
    check(y, [[-1], [3]])
    check(mean, [2])
    check(rstd, [1])
    check(running_mean, [0.2])
    check(running_var, [0.9 + 0.1 * 2])  # unbiased: (1 + 1) / (2 - 1)
    y, mean, rstd = reference.batch_norm(
        x, np.array([2.0]), np.array([3.0]), eps=1, return_stats=True
    )
    check(y, [[-0.5], [0.5]])
    check(mean, [2])
    check(rstd, [0.5])


def test_instance_norm_by_hand() -> None:
    running_mean, running_var = np.zeros(1), np.zeros(1)
    x = [[[1.0, 3.0]], [[5.0, 9.0]]]
    y = reference.instance_norm(x, running_mean, running_var, eps=0)
    check(y, [[[-1, 1]], [[-1, 1]]])
    check(running_mean, [0.1 * (2 + 7) / 2])
    check(running_var, [0.1 * (2 + 8) / 2])
    y, mean, rstd = reference.instance_norm(
        x, np.ones(1), np.ones(1), use_input_stats=False, eps=3, return_stats=True
    )
    check(y, [[[0, 1]], [[2, 4]]])
    check(mean, [[1], [1]])
    check(rstd, [[0.5], [0.5]])


def test_group_layer_and_rms_norm_by_hand() -> None:
    x = [[[1.0], [3.0], [7.0], [7.0]]]
    y, mean, rstd = reference.group_norm(x, 2, [1, 2, 3, 4], [5, 6, 7, 8], eps=0, return_stats=True)
    check(y, [[[4], [8], [7], [8]]])
    check(mean, [[2, 7]])
    check(rstd, [[1, 0]])
    y, mean, rstd = reference.layer_norm([[1, 3]], 2, [2, 3], [1, 1], 0, return_stats=True)
    check(y, [[-1, 4]])
    check(mean, [[2]])
    check(rstd, [[1]])
    y, rstd = reference.rms_norm([[1, 7]], 2, [1, 2], 0, weight_offset=1, return_stats=True)
    check(y, [[2 / 5, 21 / 5]])
    check(rstd, [[1 / 5]])


def test_the_others_by_hand() -> None:
    check(reference.l2_normalize([[3, 4], [0, 0]]), [[0.6, 0.8], [0, 0]])
    check(reference.l2_normalize([3, 4], eps=10), [0.3, 0.4])
    x = np.array([[[1.0], [2.0], [3.0]]])
    y = reference.local_response_norm(x, 3, alpha=3, beta=1)
    check(y, [[[1 / 6], [2 / 15], [3 / 14]]])
    y = reference.local_response_norm(x, 2, alpha=2, beta=1)  # one channel before, none after
    check(y, [[[1 / 2], [2 / 6], [3 / 14]]])
    check(reference.weight_norm([[3, 4], [0, 2]], [10, 3]), [[6, 8], [0, 3]])
    check(reference.weight_norm([[3, 0], [0, 4]], 10, axis=None), [[6, 0], [0, 8]])
    check(reference.weight_standardize([[1, 3], [4, 0]], eps=0), [[-1, 1], [1, -1]])
    y = reference.global_response_norm([[[3.0], [-1.0]]], [2.0, 2.0], [1.0, 0.0], eps=0)
    check(y, [[[2 * 4.5 + 1 + 3], [2 * -0.5 - 1]]])
    check(reference.dynamic_tanh([0, 2], 0.5, [5, 2], [3, 1]), [3, 2 * math.tanh(1) + 1])


def test_the_sum_of_add_norms_is_rounded_first() -> None:
    x, residual = np.array([[2048, 1], [1, 0]], np.float16)  # 2049 is no float16
    for name in ("add_layer_norm", "add_rms_norm"):
        y, total = getattr(reference, name)(x, residual, 2)
        assert total.dtype == np.float16
        np.testing.assert_array_equal(total, [2048, 1])
        np.testing.assert_array_equal(y, getattr(reference, name[4:])(total, 2))


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [("float16", 2**-23), ("float32", 2**-23), ("float64", 2**-52), ("int8", 2**-52)],
)
def test_default_eps_of_rms_norm(dtype: str, eps: float) -> None:
    _, rstd = reference.rms_norm(np.zeros((1, 4), dtype), 4, return_stats=True)
    check(rstd * math.sqrt(eps), [[1]])


def test_bfloat16() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    _, rstd = reference.rms_norm(np.zeros((1, 4), bfloat16), 4, return_stats=True)
    check(rstd * math.sqrt(2**-23), [[1]])
    for op in OPERATIONS:
        x = sample_data((2, 8, 3)).astype(bfloat16)
        p = op.parameters(x.shape, x.dtype, np.random.default_rng(0))
        wide = {k: v.astype(np.float64) if isinstance(v, np.ndarray) else v for k, v in p.items()}
        if op.name == "rms_norm":
            p["eps"] = wide["eps"] = 1e-3
        if op.name.startswith("add"):  # whose sum is rounded to bfloat16
            continue
        np.testing.assert_array_equal(run(op, x, p), run(op, x.astype(np.float64), wide))
    x = np.array([[256, 1]], bfloat16)
    _, total = reference.add_rms_norm(x, np.ones_like(x), 2)
    assert total.dtype == bfloat16
    np.testing.assert_array_equal(total.astype(float), [[256, 2]])  # 257 is no bfloat16


# --- Gradients against finite differences ---------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.backward], ids=label)
def test_backward_is_the_derivative(op: Operation, per_sample: bool, masked: bool) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 4, 5) if masked else (3, 4, 2)
    x, dy = sample_data(shape).astype(np.longdouble), rng.standard_normal(shape)
    p = op.parameters(shape, np.longdouble, rng, per_sample=per_sample, num_groups=2)
    if masked:  # every group keeps three elements or more
        p["where"] = np.ones(shape, bool)
        p["where"][0, 1, 1] = p["where"][2, 2, :2] = p["where"][1, 3, 3:] = False
    _, *stats = run(op, x, p, return_stats=True, dtype=np.longdouble)
    kwargs = {k: p[k] for k in (*op.backward_keywords, "where") if k in p}
    results = getattr(reference, str(op.backward))(dy, x, *stats, **kwargs, dtype=np.longdouble)
    leaves = {"x": x} | {k: p[k] for k in ("weight", "bias") if k in p}

    # The error of a central difference is h^2/6 times the third derivative, plus the rounding of
    # y over h: smallest near h = eps^(1/3), where both are of the order eps^(2/3). The third
    # derivative grows with rstd^3: spreads here are above 1/4, so 64 or so; ten such terms meet.
    eps = np.finfo(np.longdouble).eps
    h, atol = np.cbrt(eps), 64 * 10 * np.cbrt(eps) ** 2
    for (name, leaf), gradient in zip(leaves.items(), results, strict=True):
        assert gradient.shape == leaf.shape
        for index in np.ndindex(leaf.shape):
            loss = []
            for step in (h, -h):
                moved = leaf.copy()
                moved[index] += step
                at = {"x": x} | p | {name: moved}
                loss.append((dy * run(op, at.pop("x"), at, dtype=np.longdouble)).sum())
            difference = (loss[0] - loss[1]) / (2 * h)
            assert abs(gradient[index] - difference) < atol, (name, index)


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.backward], ids=label)
def test_default_weight_has_the_default_shape(op: Operation) -> None:
    x = sample_data((3, 4, 5))
    p = op.parameters(x.shape, x.dtype, np.random.default_rng(0))
    ones = np.ones_like(p["weight"])
    _, *stats = run(op, x, p, return_stats=True)
    kwargs = {k: p[k] for k in op.backward_keywords if k in p and k != "weight"}
    backward = getattr(reference, str(op.backward))
    expected = backward(x, x, *stats, **kwargs, weight=ones)
    for gradient, e in zip(backward(x, x, *stats, **kwargs), expected, strict=True):
        np.testing.assert_array_equal(gradient, e)


# --- Hard numbers ---------------------------------------------------------------------------------

PRECISIONS = [np.float64, np.longdouble]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 1000, 4099])
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e16 + 2, 1e200, 1.7e308, -1e-200, 5e-324])
def test_constant_groups(value: float, size: int, dtype: Any) -> None:
    x = np.full((2, size), value, dtype)
    mean, var = reference.moments(x, 1, dtype=dtype)
    np.testing.assert_array_equal(mean, x[:, :1])
    np.testing.assert_array_equal(var, [[0], [0]])
    bias = np.linspace(-1, 1, size)
    y, _, rstd = reference.layer_norm(x, size, bias + 3, bias, 0.0, return_stats=True, dtype=dtype)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    np.testing.assert_array_equal(rstd, [[0], [0]])


def test_constant_where_it_counts() -> None:
    x = sample_data((3, 40))
    x[:, ::3] = 0.1
    where = np.zeros(40, bool)
    where[::3] = True
    mean, var = reference.moments(x, 1, where=where)
    np.testing.assert_array_equal(mean, [[0.1]] * 3)
    np.testing.assert_array_equal(var, [[0]] * 3)
    y = reference.layer_norm(x, 40, eps=0, where=where)  # what is left out is 0 too: rstd is
    np.testing.assert_array_equal(y, np.zeros_like(x))


@pytest.mark.parametrize(
    ("exponent", "dtype"),
    [
        (664, np.float64),  # about 1e200
        (-664, np.float64),
        pytest.param(13288, np.longdouble, marks=needs_extended),  # about 1e4000
        pytest.param(-13288, np.longdouble, marks=needs_extended),
    ],
)
def test_far_from_one(exponent: int, dtype: Any) -> None:
    """A power of two in x changes y by nothing at all, and the statistics by just that power."""
    x = 1 + sample_data((4, 50)).astype(dtype)
    far = np.ldexp(x, exponent)
    y, mean, rstd = reference.layer_norm(x, 50, eps=0, return_stats=True, dtype=dtype)
    far_y, far_mean, far_rstd = reference.layer_norm(far, 50, eps=0, return_stats=True, dtype=dtype)
    np.testing.assert_array_equal(far_y, y)
    np.testing.assert_array_equal(far_mean, np.ldexp(mean, exponent))
    np.testing.assert_array_equal(far_rstd, np.ldexp(rstd, -exponent))
    unit = reference.l2_normalize(x, eps=0, dtype=dtype)
    np.testing.assert_array_equal(reference.l2_normalize(far, eps=0, dtype=dtype), unit)
    np.testing.assert_array_equal(
        reference.rms_norm(far, 50, eps=0, dtype=dtype),
        reference.rms_norm(x, 50, eps=0, dtype=dtype),
    )


def test_small_numbers_under_a_large_eps() -> None:
    x = np.array([[1e-200, 3e-200]])
    # Three roundings: of the difference, of the square root and of the quotient.
    np.testing.assert_allclose(
        reference.layer_norm(x, 2, eps=1e-4), [[-1e-198, 1e-198]], rtol=4 * 2 * U
    )


@needs_extended
@pytest.mark.parametrize("mean_over_std", [0.0, 1e2, 1e6, 1e10, 1e14])
def test_large_means_cost_no_digits(mean_over_std: float) -> None:
    rng = np.random.default_rng(0)
    x = mean_over_std + rng.standard_normal((8, 512))
    y = reference.layer_norm(x, 512, eps=0)
    exact = reference.layer_norm(x, 512, eps=0, dtype=np.longdouble)
    # x - hi is exact or rounded once; - lo, the division: U each; std: its sum of 512 is added in
    # 8 lanes and halves, fewer than 64 roundings one after another; the mean likewise, in units of
    # the spread, not of the mean.
    np.testing.assert_array_less(abs(y - exact), 128 * U * np.maximum(abs(exact), 1))


@needs_extended
def test_long_double_is_longer() -> None:
    x = 1 + np.array([[0, 2.0**-60]], np.longdouble)
    mean, var = reference.moments(x, 1, dtype=np.longdouble)
    assert mean[0, 0] == 1 + np.longdouble(2.0**-61)
    assert var[0, 0] == 2.0**-122


# --- Activations against decimal arithmetic -------------------------------------------------------

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def decimal_normal_cdf(x: Decimal) -> Decimal:
    """The power series of the error function; 100 digits leave 60 after its cancellation."""
    term, total, k = x, x, 0
    while abs(term) > Decimal("1e-90"):
        k += 1
        term *= -x * x / (2 * k)
        total += term / (2 * k + 1)
    return Decimal("0.5") + total / (2 * PI).sqrt()


def decimal_activation(name: str, x: Decimal) -> Decimal:
    if name == "gelu":
        return x * decimal_normal_cdf(x)
    u = x
    if name == "gelu_tanh":
        u = 2 * (2 / PI).sqrt() * (x + Decimal("0.044715") * x**3)
    return x / (1 + (-u).exp())


def test_decimal_normal_cdf() -> None:
    """Our own high-precision value, against the well-known one in the tables: Phi(-10)."""
    with decimal.localcontext(prec=100):
        assert (
            abs(decimal_normal_cdf(Decimal(-10)) / Decimal("7.619853024160526066e-24") - 1) < 1e-18
        )
        assert abs(decimal_normal_cdf(Decimal(0)) - Decimal("0.5")) < 1e-60


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_to_the_last_digits(name: str, dtype: Any) -> None:
    x = np.array([*np.linspace(-10, 10, 161), -2 - 1e-9, -2 + 1e-9, -0.1, 1e-30, -12.3], dtype)
    y = reference.activate(x, name)
    eps = float(np.finfo(dtype).eps)
    for x_, y_ in zip(x, y, strict=True):
        with decimal.localcontext(prec=100):
            exact = decimal_activation(name, Decimal(float(x_)))
            high = float(y_)  # a long double is two floats
            error = abs(float((Decimal(high) + Decimal(float(y_ - high)) - exact) / (exact or 1)))
        # exp(-u) turns u's relative error into |u| times it: u is x for silu, x^2/2 for float64's
        # erfc, 1.6 x + 0.07 x^3 for gelu_tanh. In long double gelu's exponent is exact, and what
        # is lost is to cancellation in 1/2 - 0.477 at |x| = 2: a factor of 22.
        size = abs(float(x_))
        lost = {
            "silu": size,
            "gelu": 22 if dtype is np.longdouble and EXTENDED else size**2 / 2,
            "gelu_tanh": 1.6 * size + 0.0714 * size**3,
        }[name]
        assert error < eps * (4 + 4 * lost), float(x_)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_of_nan_and_infinity(name: str, dtype: Any) -> None:
    y = reference.activate(np.array([np.nan, np.inf, 1e5, -1e5], dtype), name)
    most = 6 if name == "relu6" else np.inf
    np.testing.assert_array_equal(y, [np.nan, most, min(most, 1e5), 0])
    assert y.dtype == dtype


def test_a_function_as_activation() -> None:
    x = sample_data((2, 3, 4)).astype(np.longdouble)
    y = reference.layer_norm(x, 4, activation=lambda v: 2 * v, dtype=np.longdouble)
    assert y.dtype == np.longdouble
    np.testing.assert_allclose(y, 2 * reference.layer_norm(x, 4), rtol=4 * U, atol=4 * U)
    assert reference.activate(np.ones((0, 3)), math.exp).shape == (0, 3)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'tanh'"):
        reference.activate(np.ones(3), "tanh")


# --- The keyword features -------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "shape", "channel_axis"), cases("where"))
def test_where_against_loops(op: Operation, shape: tuple[int, ...], channel_axis: int) -> None:
    """Group by group, with sums that `math.fsum` rounds once."""
    x = sample_data(shape)
    rng = np.random.default_rng(1)
    where = rng.random(shape) < 0.6
    p = op.parameters(shape, x.dtype, rng, channel_axis=channel_axis)
    p = {k: v for k, v in p.items() if k not in ("weight", "bias")} | {"eps": 1e-5}
    y = run(op, np.where(where, x, x * 100), p, where=where)
    ids = op.group_ids(shape, channel_axis=channel_axis)
    for group in np.unique(ids):
        inside = ids == group
        counted = x[inside & where].tolist()
        if not counted:
            assert np.isnan(y[inside]).all()
            continue
        mean = 0.0 if op.name == "rms_norm" else math.fsum(counted) / len(counted)
        var = math.fsum((v - mean) ** 2 for v in counted) / len(counted)
        expected = [
            (v if c else 100 * v) - mean
            for v, c in zip(x[inside].tolist(), where[inside].tolist(), strict=True)
        ] / np.sqrt(var + 1e-5)
        # At most 72 numbers of size 2 added one after another, over a spread of at least sqrt(eps).
        np.testing.assert_allclose(
            y[inside], expected, rtol=72 * U, atol=72 * 2 * U / math.sqrt(1e-5)
        )


@pytest.mark.parametrize("op", [op for op in OPERATIONS if "where" in op.features], ids=label)
def test_where_of_everything_is_none(op: Operation) -> None:
    x = sample_data((2, 8, 3))
    p = op.parameters(x.shape, x.dtype, np.random.default_rng(0))
    options = {"return_stats": True} if op.stats else {}
    plain = run(op, x, p, **options)
    for y, expected in zip(run(op, x, p, where=True, **options), plain, strict=True):
        np.testing.assert_array_equal(y, expected)


def test_what_where_leaves_out_is_never_read() -> None:
    x = np.array([[1.0, 3.0, np.nan, np.inf, 1e300]])
    y = reference.layer_norm(x, 5, eps=0, where=[True, True, False, False, False])
    np.testing.assert_array_equal(y, [[-1, 1, np.nan, np.inf, 1e300]])
    # Three times 0.1 is not 0.3 unless it is put right, which a NaN outside must not prevent.
    mean, var = reference.moments([0.1, 0.1, 0.1, np.nan], 0, where=[True, True, True, False])
    np.testing.assert_array_equal(mean, [0.1])
    np.testing.assert_array_equal(var, [0])


def test_moments_of_infinity_are_those_of_numpy() -> None:
    mean, var = reference.moments([[1, np.inf], [-np.inf, np.inf], [1, np.nan]], 1)
    np.testing.assert_array_equal(mean, [[np.inf], [np.nan], [np.nan]])
    np.testing.assert_array_equal(var, [[np.nan]] * 3)


def test_running_statistics_of_what_counts() -> None:
    """Unbiased by the number counted; channels in which nothing counts keep what they had."""
    running_mean, running_var = np.array([5.0, 5.0]), np.array([7.0, 7.0])
    x = np.array([[[1.0, 3.0, 50.0], [1.0, 2.0, 3.0]]])
    where = np.array([[[True, True, False], [False] * 3]])
    reference.batch_norm(x, running_mean, running_var, training=True, momentum=1, where=where)
    np.testing.assert_array_equal(running_mean, [2, 5])
    np.testing.assert_array_equal(running_var, [2, 7])
    reference.batch_norm(x[:0], running_mean, running_var, training=True)
    np.testing.assert_array_equal(running_mean, [2, 5])
    x = np.array([[[2.0, 4.0]], [[5.0, 9.0]]])
    where = np.array([True, False]).reshape(2, 1, 1)  # the second sample counts for nothing
    reference.instance_norm(x, running_mean[:1], running_var[:1], momentum=1, where=where)
    np.testing.assert_array_equal(running_mean, [3, 5])


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.features >= SHARED], ids=label)
def test_residual_and_activation_come_last(op: Operation) -> None:
    x, residual = sample_data((2, 8, 3)), sample_data((2, 8, 3), seed=1)
    p = op.parameters(x.shape, x.dtype, np.random.default_rng(0))
    expected = np.maximum(run(op, x, p) + residual, 0)
    y = run(op, x, p, residual=residual, activation="relu")
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    "op", [op for op in OPERATIONS if "channel_axis" in op.features], ids=label
)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("axis", [0, 2, -1])
def test_channel_axis_is_moveaxis(op: Operation, per_sample: bool, axis: int) -> None:
    """And the meaning of (C,) and (N, C) does not depend on where the channels are."""
    x = sample_data((3, 8, 5, 4))
    per_sample = per_sample and "per_sample" in op.features
    p = op.parameters(x.shape, x.dtype, np.random.default_rng(0), per_sample=per_sample)
    moved = run(op, np.moveaxis(x, 1, axis), p | {"channel_axis": axis})
    np.testing.assert_array_equal(np.moveaxis(moved, axis, 1), run(op, x, p))


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_channel_weights_of_other_shapes(channel_axis: int) -> None:
    """(N, C), the same spelled out for broadcasting, and the full shape of x."""
    x = sample_data((3, 8, 5, 8))
    w = sample_data((3, 8), seed=1)
    spelled = w[:, :, None, None] if channel_axis == 1 else w[:, None, None, :]
    full = np.ascontiguousarray(np.broadcast_to(spelled, x.shape))
    positions = (2, 3) if channel_axis == 1 else (1, 2)
    results = []
    for weight in (w, spelled, full):
        y, mean, rstd = reference.group_norm(
            x, 4, weight, weight, channel_axis=channel_axis, return_stats=True
        )
        dx, *gradients = reference.group_norm_backward(
            x, x, mean, rstd, 4, weight, channel_axis=channel_axis
        )
        assert all(g.shape == weight.shape for g in gradients)
        if weight is full:
            gradients = [g.sum(axis=positions) for g in gradients]
        results.append((y, dx, *(g.reshape(w.shape) for g in gradients)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # The same products added in another order: 40 of them, dy * xhat <= 8.
            np.testing.assert_allclose(a, b, rtol=0, atol=40 * 40 * 8 * U)


def test_layer_weights_follow_the_axes_in_the_order_given() -> None:
    x, w = sample_data((2, 3, 4)), sample_data((4, 3), seed=1)
    y, mean, rstd = reference.layer_norm(x, axis=(2, 1), weight=w, bias=w, return_stats=True)
    np.testing.assert_array_equal(y, reference.layer_norm(x, (3, 4), w.T, w.T))
    assert mean.shape == rstd.shape == (2, 1, 1)
    grads = reference.layer_norm_backward(x, x, mean, rstd, weight=w, axis=(2, 1))
    expected = reference.layer_norm_backward(x, x, mean, rstd, (3, 4), w.T)
    for a, b in zip(grads, (expected[0], expected[1].T, expected[2].T), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("function", [reference.layer_norm, reference.rms_norm])
def test_exactly_one_of_shape_and_axis(function: Any) -> None:
    for both_or_neither in ({}, {"normalized_shape": 3, "axis": -1}):
        with pytest.raises(ValueError, match="exactly one"):
            function(np.ones((2, 3)), **both_or_neither)


# --- The table itself -----------------------------------------------------------------------------


def test_labels_are_unique() -> None:
    assert len({op.label for op in OPERATIONS}) == len(OPERATIONS)


@by_label
def test_every_feature_works(op: Operation) -> None:
    x = sample_data((2, 8, 3))
    p = op.parameters(x.shape, x.dtype, np.random.default_rng(0))
    shape = outputs(op, run(op, x, p))[0].shape
    assert shape == x.shape
    options = {"where": x > -1, "residual": x, "activation": "silu"}
    for name in SHARED - op.features - {"out"}:
        if op.label == "batch_norm (inference)":
            continue  # takes `where` and has no use for it
        with pytest.raises(TypeError):
            run(op, x, p, **{name: options.get(name, True)})
    if "return_stats" in op.features:
        stats = run(op, x, p, return_stats=True)[1:]
        assert len(stats) == len(op.stats)
        for s in stats:
            expected = {"batch_norm": (8,), "instance_norm": (2, 8), "group_norm": (2, 4)}
            rows = (2, 1, 3) if "axis" in p else (2, 8, 1)
            assert s.shape == expected.get(op.name, rows)
    if "per_sample" in op.features:
        q = op.parameters(x.shape, x.dtype, np.random.default_rng(0), per_sample=True)
        assert q["weight"].ndim > 1
        assert outputs(op, run(op, x, q))[0].shape == x.shape


@pytest.mark.parametrize(("op", "shape", "channel_axis"), cases())
def test_groups_are_what_nan_stays_within(
    op: Operation, shape: tuple[int, ...], channel_axis: int
) -> None:
    x = sample_data(shape)
    p = op.parameters(shape, x.dtype, np.random.default_rng(0), channel_axis=channel_axis)
    ids = op.group_ids(shape, channel_axis=channel_axis)
    assert ids.shape == shape
    for bad in (np.nan, np.inf, -np.inf):
        hurt = x.copy()
        index = (1,) * len(shape)
        hurt[index] = bad
        before, after = outputs(op, run(op, x, p))[0], outputs(op, run(op, hurt, p))[0]
        changed = ~(before == after)
        same_group = ids == ids[index]
        if op.name == "local_response_norm":  # reaches its window, not all of the channel axis
            assert not changed[~same_group].any()
            assert changed[index]
        else:
            np.testing.assert_array_equal(changed, same_group)


@by_label
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)])
def test_empty(op: Operation, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape)
    p = op.parameters(shape, x.dtype, np.random.default_rng(0))
    assert outputs(op, run(op, x, p))[0].shape == shape
    if op.backward:
        _, *stats = run(op, x, p, return_stats=True)
        kwargs = {k: p[k] for k in op.backward_keywords if k in p}
        gradients = getattr(reference, op.backward)(x, x, *stats, **kwargs)
        assert gradients[0].shape == shape
        assert gradients[1].shape == p["weight"].shape
