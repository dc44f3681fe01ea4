"""PyTorch's own samples: of its functions (OpInfo) and modules (module_db), and what its tests say.

Results and gradients are compared in float64 with those of PyTorch's own call; samples that it
refuses must be refused. Exceptions are rows of docs/differences.rst.
"""

from __future__ import annotations

import inspect
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastnorm as fn
from fastnorm.arguments import ACTIVATIONS

torch = pytest.importorskip("torch")
functional = torch.nn.functional

REFUSED = (ValueError, TypeError)

# PyTorch adds up at most 2^14 numbers of a size up to 10 one after another (most samples have some
# dozens), rounding each time to half a unit of float64; what comes out is divided by a spread or
# root of at least 1/16, for gradients once more, and multiplied by numbers up to 10.
CLOSE = 2.0**14 * 2.0**-53 * 10 * 16 * 10
CLOSE_GRADIENTS = CLOSE * 16


# --- Where the samples are ------------------------------------------------------------------------


def internal(name: str) -> Any:
    """A module of torch.testing._internal. Its test cases derive from expecttest's, unused here."""
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    missing = sys.modules.setdefault("expecttest", stand_in) is stand_in
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(f"torch.testing._internal.{name}", fromlist=["_"])
    finally:
        if missing:
            del sys.modules["expecttest"]


@pytest.fixture(scope="module")
def operators() -> dict[str, Any]:
    found = internal("common_methods_invocations").op_db
    return {op.name: op for op in found if not op.variant_test_name}


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    return {info.name: info for info in internal("common_modules").module_db}


def assert_close(mine: Any, theirs: Any, allowed: float) -> None:
    """Within `allowed` of 1, or of the largest number there."""
    right = plain(theirs)
    assert mine.shape == right.shape
    size = max(1.0, np.abs(right[np.isfinite(right)]).max(initial=0.0))
    np.testing.assert_allclose(mine, right, rtol=0, atol=allowed * size)


# --- Functions ------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Tensors as NumPy's arrays, everything else as it is."""
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else value


def batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    given = running_mean, running_var, weight, bias, training, momentum, eps
    y, *stats = fn.batch_norm(x, *given, return_stats=True)
    return [y], lambda dy: fn.batch_norm_backward(dy, x, *stats, weight, training=training)


def native_batch_norm(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float, eps: float,
) -> Any:  # fmt: skip
    given = running_mean, running_var, weight, bias, training, momentum, eps
    y, *stats = fn.batch_norm(x, *given, return_stats=True)
    # in inference PyTorch has no statistics to return
    return [y, *(stats if training else [])], lambda dy: fn.batch_norm_backward(
        dy, x, *stats, weight, training=training
    )


def instance_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    given = running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    y, mean, rstd = fn.instance_norm(x, *given, return_stats=True)
    if use_input_stats:
        return [y], lambda dy: fn.instance_norm_backward(dy, x, mean, rstd, weight)
    return [y], lambda dy: fn.batch_norm_backward(dy, x, mean[0], rstd[0], weight, training=False)


def group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    y, *stats = fn.group_norm(x, num_groups, weight, bias, eps, return_stats=True)
    return [y, *stats], lambda dy: fn.group_norm_backward(dy, x, *stats, num_groups, weight)


def native_group_norm(
    x: Any, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float
) -> Any:
    return group_norm(x, groups, weight, bias, eps)


def layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    y, *stats = fn.layer_norm(x, shape, weight, bias, eps, return_stats=True)
    return [y, *stats], lambda dy: fn.layer_norm_backward(dy, x, *stats, shape, weight)


def rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    y, rstd = fn.rms_norm(x, shape, weight, eps, return_stats=True)
    return [y], lambda dy: fn.rms_norm_backward(dy, x, rstd, shape, weight)


def normalize(x: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Any:
    return [fn.l2_normalize(x, dim, eps=eps)], None


def local_response_norm(x: Any, size: int, **options: Any) -> Any:
    return [fn.local_response_norm(x, size, **options)], None


def var_mean(
    x: Any, dim: Any = None, *, correction: Any = None, unbiased: Any = None, keepdim: bool = False
) -> Any:
    chosen = correction if unbiased is None else int(unbiased)
    ddof = 1 if chosen is None else chosen
    axis = None if dim == () else dim
    mean, var = fn.moments(x, axis, ddof=ddof, keepdims=keepdim)
    return [var, mean], None


def cross_entropy(
    scores: Any, target: Any, *, reduction: str = "mean", ignore_index: int = -100, **other: Any
) -> Any:
    s = np.moveaxis(scores, 1, -1) if scores.ndim > 1 else scores
    loss, gradient = fn.nn.cross_entropy(s, target, ignore_index=ignore_index)
    back = np.moveaxis(gradient, -1, 1) if scores.ndim > 1 else gradient
    return [np.asarray(loss)], lambda dy: (back * dy,)


def softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    moved = np.moveaxis(np.atleast_1d(x), dim, -1)
    y = fn.nn.softmax(moved)

    def back(dy: Any) -> Any:
        dx = fn.nn.softmax_backward(np.moveaxis(np.atleast_1d(dy), dim, -1), y)
        return (np.moveaxis(dx, -1, dim).reshape(x.shape),)

    return [np.moveaxis(y, -1, dim)], back


def activation(name: str) -> Any:
    def activate(x: Any, inplace: bool = False, *, approximate: str = "none") -> Any:
        kind: Any = {"none": name, "tanh": "gelu_tanh"}.get(approximate, approximate)
        y = fn.nn.activate(np.atleast_1d(x), kind)

        def back(dy: Any) -> Any:
            dx = fn.nn.activation_backward(np.atleast_1d(dy), np.atleast_1d(x), y, kind)
            return (dx.reshape(x.shape),)

        return [y], back

    return activate


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return [fn.nn.linear(x, weight, bias)], None


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    mask = attn_mask
    if mask is not None and mask.dtype == bool:
        mask = np.where(mask, 0.0, -np.inf)
    y, weights = fn.nn.attention(query, key, value, mask, causal=is_causal, scale=scale)

    def back(dy: Any) -> Any:
        return fn.nn.attention_backward(dy, query, key, value, weights, scale=scale)

    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    return [y], back if alike else None  # there are no gradients of what is broadcast


CALLS = {
    "nn.functional.batch_norm": batch_norm,
    "native_batch_norm": native_batch_norm,
    "nn.functional.instance_norm": instance_norm,
    "nn.functional.group_norm": group_norm,
    "native_group_norm": native_group_norm,
    "nn.functional.layer_norm": layer_norm,
    "native_layer_norm": layer_norm,
    "nn.functional.rms_norm": rms_norm,
    "nn.functional.normalize": normalize,
    "nn.functional.local_response_norm": local_response_norm,
    "nn.functional.cross_entropy": cross_entropy,
    "softmax": softmax,
    "nn.functional.relu": activation("relu"),
    "nn.functional.relu6": activation("relu6"),
    "nn.functional.silu": activation("silu"),
    "nn.functional.gelu": activation("gelu"),
    "nn.functional.linear": linear,
    "nn.functional.scaled_dot_product_attention": attention,
    "var_mean": var_mean,
}


def different(name: str, given: dict[str, Any]) -> str | None:
    """The row of docs/differences.rst that a sample falls under."""
    if name == "nn.functional.normalize" and given.get("p", 2.0) != 2.0:
        return "Lengths other than Euclid's"
    if "norm" in name and (given.get("eps") or 0.0) < 0:
        return "Negative eps"
    if not 0 <= given.get("momentum", 0.0) <= 1:
        return "Momentum beyond 0 to 1"
    return "Empty input" if name == "nn.functional.batch_norm" and given["x"].ndim < 2 else None


def not_ours(name: str, given: dict[str, Any]) -> bool:
    """Whether a sample uses an option that the function here does not have."""
    if name == "nn.functional.scaled_dot_product_attention":
        # "Fewer queries than keys"
        shifted = given.get("is_causal") and given["query"].shape[-2] != given["key"].shape[-2]
        return bool(given.get("dropout_p", 0.0) or given.get("enable_gqa") or shifted)
    if name != "nn.functional.cross_entropy":
        return False
    plain = given.get("reduction", "mean") == "mean" and given["target"].dtype.kind == "i"
    return not plain or bool(given.get("other"))


# What PyTorch 2.10 has no samples of.
LATER = {"native_group_norm"}


def operator_of(name: str, operators: dict[str, Any]) -> Any:
    if name in LATER and name not in operators:
        pytest.skip(f"PyTorch {torch.__version__} has no samples of {name}")
    return operators[name]


@pytest.mark.parametrize("name", CALLS)
def test_samples_of_functions(name: str, operators: dict[str, Any]) -> None:
    op, function, compared = operator_of(name, operators), CALLS[name], 0
    signature = inspect.signature(function)
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        bound = signature.bind(sample.input, *sample.args, **sample.kwargs)
        tensors = bound.arguments
        given = {key: plain(value) for key, value in tensors.items()}
        mine = signature.bind(
            *map(plain, bound.args), **{k: plain(v) for k, v in bound.kwargs.items()}
        )
        if not_ours(name, given):
            continue
        if (row := different(name, given)) is not None:
            if row in ("Negative eps", "Empty input"):
                with pytest.raises(REFUSED):
                    function(*mine.args, **mine.kwargs)
            continue
        theirs = op.op(sample.input, *sample.args, **sample.kwargs)
        theirs = list(theirs) if isinstance(theirs, tuple) else [theirs]
        found, back = function(*mine.args, **mine.kwargs)
        for y, right in zip(found, theirs):
            assert_close(np.reshape(y, right.shape), right, CLOSE)
        for key in ("running_mean", "running_var"):
            if tensors.get(key) is not None:
                assert_close(mine.arguments[key], tensors[key], CLOSE)
        compared += 1
        if back is None or not theirs[0].requires_grad:
            continue
        seed = torch.Generator().manual_seed(1)
        dy = torch.randn(theirs[0].shape, dtype=torch.float64, generator=seed)
        first = next(iter(signature.parameters))
        names = ("query", "key", "value") if first == "query" else (first, "weight", "bias")
        wanted = [tensors.get(key) for key in names]
        there = [i for i, t in enumerate(wanted) if t is not None and t.requires_grad]
        gradients = torch.autograd.grad(theirs[0], [wanted[i] for i in there], dy)
        own = back(dy.numpy())
        for i, right in zip(there, gradients):
            assert_close(own[i], right, CLOSE_GRADIENTS)
    assert compared


@pytest.mark.parametrize("name", CALLS)
def test_samples_that_are_refused(name: str, operators: dict[str, Any]) -> None:
    op = operator_of(name, operators)
    if op.error_inputs_func is None:
        return
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            op.op(sample.input, *sample.args, **sample.kwargs)
        kwargs = {k: plain(v) for k, v in sample.kwargs.items()}
        with pytest.raises(REFUSED):
            CALLS[name](plain(sample.input), *(plain(a) for a in sample.args), **kwargs)


# --- Modules --------------------------------------------------------------------------------------

MODULES = [f"BatchNorm{d}d" for d in (1, 2, 3)] + [f"InstanceNorm{d}d" for d in (1, 2, 3)]
MODULES += ["GroupNorm", "LayerNorm", "RMSNorm"]


def module_samples(info: Any, training: bool) -> Iterator[tuple[Any, Any, Any]]:
    """Their module, ours, and what they are called with."""
    options = {"device": "cpu", "dtype": torch.float64}
    samples = info.module_inputs_func(info, **options, requires_grad=True, training=training)
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input
        theirs = info.module_cls(*made.args, **made.kwargs, **options).train(training)
        ours = getattr(fn.nn, info.module_cls.__name__)(*made.args, **made.kwargs, dtype="f8")
        yield theirs, ours.train(training), given.args[0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", MODULES)
def test_samples_of_modules(name: str, training: bool, modules: dict[str, Any]) -> None:
    samples = list(module_samples(modules[f"nn.{name}"], training))
    assert samples
    for theirs, ours, x in samples:
        with torch.no_grad():
            for i, tensor in enumerate(theirs.state_dict().values()):
                if tensor.is_floating_point():
                    tensor += torch.linspace(0, 0.5 + i / 8, tensor.numel()).reshape(tensor.shape)
        assert ours.load_state_dict(theirs.state_dict()) == ([], [])
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            assert (getattr(ours, key, None) is None) == (getattr(theirs, key, None) is None)
        for _ in range(2):
            tensor = x.detach().clone().requires_grad_()
            y = theirs(tensor)
            dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
            y.backward(dy)
            assert_close(ours(plain(x)), y, CLOSE)
            assert_close(ours.backward(dy.numpy()), tensor.grad, CLOSE_GRADIENTS)
        for key, parameter in theirs.named_parameters():
            assert_close(ours.grad[key], parameter.grad, CLOSE_GRADIENTS)
        state = theirs.state_dict()
        assert list(ours.state_dict()) == list(state)
        for key, value in state.items():
            assert_close(ours.state_dict()[key], value, CLOSE)


@pytest.mark.parametrize("name", MODULES)
def test_errors_of_modules(name: str, modules: dict[str, Any]) -> None:
    info = modules[f"nn.{name}"]
    if info.module_error_inputs_func is None:
        return
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": True}
    for sample in info.module_error_inputs_func(info, **options):
        inputs = sample.module_error_input
        made = inputs.constructor_input
        if "eps must be positive" in sample.error_regex and made.kwargs.get("eps", 0.0) == 0:
            continue  # the row "eps of 0"
        with pytest.raises(REFUSED):
            getattr(fn.nn, name)(*made.args, **made.kwargs)(plain(inputs.forward_input.args[0]))


# --- After its test_nn ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_eps_of_rms_norm(kind: str) -> None:
    """Of small numbers the default decides: it is that of the type computed in."""
    small = 2.0**-27 if kind == "float64" else 2.0**-12
    tensor = torch.full((1, 8), small, dtype=getattr(torch, kind))
    right = functional.rms_norm(tensor, (8,)).double().numpy()
    x = np.full((1, 8), small, np.dtype(getattr(ml_dtypes, kind, kind)))
    y = fn.rms_norm(x, 8).astype(np.float64)
    digits = {"float16": 11, "bfloat16": 8, "float32": 22, "float64": 51}[kind]
    np.testing.assert_allclose(y, right, rtol=2.0**-digits)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("size", [9, 11])
def test_sizes_that_are_not_those_of_the_channels(name: str, size: int) -> None:
    x = torch.rand(2, 10)
    given = {"running_mean": torch.rand(10), "running_var": torch.rand(10)} | {
        name: torch.rand(size)
    }
    with pytest.raises(RuntimeError):
        functional.batch_norm(x, **given)
    for training in (True, False):
        with pytest.raises(ValueError, match=name):
            fn.batch_norm(plain(x), **{k: plain(v) for k, v in given.items()}, training=training)


def test_one_value_is_enough_in_inference() -> None:
    for shape in ((1, 3), (1, 3, 1), (1, 3, 1, 1)):
        x = np.ones(shape, np.float32)
        for kind in ("BatchNorm", "InstanceNorm"):
            m = getattr(fn.nn, kind)(3, track_running_stats=True)
            with pytest.raises(ValueError, match="at least 2"):
                m(x)
            np.testing.assert_allclose(m.eval()(x), 1, atol=1e-5)
            assert m.backward(x).shape == shape
        with pytest.raises(ValueError, match="at least 2"):
            fn.nn.GroupNorm(3, 3)(x)


def test_large_numbers_of_half_precision() -> None:
    """Their sum and their squares are beyond float16."""
    x = torch.full((2, 3, 6, 6), 60000.0).half()
    x[:, :, ::2] = 50000.0
    y = fn.nn.BatchNorm2d(3)(plain(x))
    right = torch.nn.BatchNorm2d(3)(x.float()).detach().numpy()
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, right, rtol=2.0**-11)


def test_attention_and_activations() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 6, 8))
    mask = np.where(rng.random((6, 6)) < 0.3, -np.inf, rng.standard_normal((6, 6)))
    mask[:, 0] = 0
    for given, causal, scale in ((None, False, None), (mask, False, 0.3), (None, True, None)):
        tensors = [torch.from_numpy(a).requires_grad_() for a in (q, k, v)]
        added = None if given is None else torch.from_numpy(given)
        right = functional.scaled_dot_product_attention(
            *tensors, attn_mask=added, is_causal=causal, scale=scale
        )
        y, weights = fn.nn.attention(q, k, v, given, causal=causal, scale=scale)
        assert_close(y, right, CLOSE)
        dy = rng.standard_normal(y.shape)
        right.backward(torch.from_numpy(dy))
        own = fn.nn.attention_backward(dy, q, k, v, weights, scale=scale)
        for mine, tensor in zip(own, tensors):
            assert_close(mine, tensor.grad, CLOSE)
    x = np.concatenate([rng.standard_normal(50) * 5, [0.0, -0.0, 1e-30, -1e-30, 700, -700]])
    for name in ACTIVATIONS:
        tensor = torch.from_numpy(x).requires_grad_()
        options = {"approximate": "tanh"} if name == "gelu_tanh" else {}
        right = getattr(functional, name.removesuffix("_tanh"))(tensor, **options)
        right.sum().backward()
        y = fn.nn.activate(x, name)
        assert_close(y, right, CLOSE)
        assert_close(
            fn.nn.activation_backward(np.ones_like(x), x, y, name)[:50], tensor.grad[:50], CLOSE
        )
