"""What takes the place of a norm: its activation to the last digits, any parameter, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _reference as reference
from fastnorm.execution import scaled
from fastnorm.operations import OPERATIONS, Operation

from .helpers import BF16, F16, F32, F64, data, epsilon, named, unit

ELEMENTWISE = [op for op in OPERATIONS if op.elementwise_backward]

by_operation = pytest.mark.parametrize("op", ELEMENTWISE, ids=named)


# --- The activations, which are odd and 1 far out -------------------------------------------------


def squashed(x: Any, name: str) -> Any:
    return scaled(x, x, 1.0, squash=name).answer()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
@pytest.mark.parametrize("name", reference.SQUASHES)
def test_squashes_to_the_last_digits(name: str, dtype: Any) -> None:
    """At most 3 units in the last place; odd; NaN and infinity are kept."""
    rng = np.random.default_rng(0)
    # each power of two from the subnormal numbers to beyond where the result is 1, and near 1
    powers = np.ldexp(rng.uniform(1, 2, (160, 60)), np.arange(-150, 10)[:, None]).ravel()
    x = np.concatenate([powers, rng.uniform(0.5, 6.5, 20_000), [0.0, np.inf]]).astype(dtype)
    y, minus = squashed(x, name), squashed(-x, name)
    exact = reference.SQUASHES[name](x.astype(np.longdouble))
    assert (abs(y - exact) / unit(exact, dtype)).max() <= 3
    np.testing.assert_array_equal(minus, -y)
    assert y[-1] == 1
    assert np.isnan(squashed(np.array([np.nan, 1.0], dtype), name)[0])


# --- Any parameter --------------------------------------------------------------------------------


def parameters(op: Operation, x: Any, kind: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    p = op.parameters(x.shape, x.dtype, rng, per_sample=kind == "per sample")
    if kind == "full":
        p |= {"weight": data(x.shape, x.dtype, 1.0), "bias": data(x.shape, x.dtype)}
    return {k: v for k, v in p.items() if kind != "none" or k not in ("weight", "bias")}


@by_operation
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=named)
def test_any_alpha_and_shift(op: Operation, dtype: Any) -> None:
    """An alpha of 0 leaves the shift, and nothing leaves the range on the way."""
    x = np.concatenate([data((4, 6), dtype, 0.5), np.full((1, 6), np.finfo(dtype).max, dtype)])
    p = {k: v for k, v in parameters(op, x, "shared").items() if k in ("weight", "bias")}
    shifts: list[dict[str, float]] = [{}]
    if "dshift" in op.gradients:
        shifts += [{"shift": s} for s in (0.75, -1e-3, 0.0, 1e-300, -1e300)]
    size = abs(p["weight"].astype(F64)).max() + abs(p["bias"].astype(F64)).max()
    for alpha in (0.0, -0.5, 1e-3, 1e-30, 1e-38, 1e-45, 1e-299, 1e-305, 5e-309, 5e-324, 1e30):
        for more in shifts:
            found = getattr(fn, op.name)(x, alpha, **more, **p)
            exact = getattr(reference, op.name)(x, alpha, **more, **p, dtype=np.longdouble)
            error = 8 * epsilon(F64 if dtype == F64 else F32) * size + unit(exact, dtype)
            assert (abs(found - exact) <= error).all(), (alpha, more)


# --- Gradients ------------------------------------------------------------------------------------


def gradients(op: Operation, dy: Any, x: Any, p: dict[str, Any], module: Any, **more: Any) -> Any:
    given = {key: value for key, value in p.items() if key != "bias"}
    return getattr(module, str(op.elementwise_backward))(dy, x, **given, **more)


@by_operation
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=named)
@pytest.mark.parametrize("kind", ["shared", "per sample", "full", "none"])
@pytest.mark.parametrize("shape", [(7,), (5, 12), (2, 3000, 3, 5), (3, 1, 4), (0, 4), (3, 0, 4)])
def test_gradients_are_those_of_the_reference(
    op: Operation, dtype: Any, kind: str, shape: tuple[int, ...]
) -> None:
    x, dy = data(shape, dtype, 0.5), data(shape, dtype, seed=1)
    p = parameters(op, x, kind)
    found = gradients(op, dy, x, p, fn)
    exact = gradients(op, dy, x, p, reference, dtype=np.longdouble)
    assert len(found) == len(op.gradients)
    assert (found[0].dtype, found[0].shape) == (dtype, shape)
    # each term is at most a few times this; float64 rounds it and, of a slope, the exponent, u or
    # u^2, a few times, and adds up all of them
    w = np.broadcast_to(p.get("weight", np.ones(1)), shape).astype(F64)
    terms = abs(dy.astype(F64)) * (1 + abs(x.astype(F64))) * (1 + abs(w))
    for name, got, right in zip(op.gradients, found, exact, strict=True):
        assert got.shape == right.shape, name
        given = x if name == "dx" else p.get(name[1:], x)
        assert got.dtype == given.dtype, name
        size = terms if name == "dx" else terms.sum()
        error = 2.0**-47 * size + 0.5000001 * unit(right, got.dtype)
        if got.itemsize == 2:  # rounded to a float first
            error += 2.0**-24 * abs(right)
        assert (abs(got.astype(np.longdouble) - right) <= error).all(), name


@by_operation
def test_gradients_are_differences(op: Operation) -> None:
    """Of the function itself, in long double: central ones, each parameter moved by itself."""
    x, dy = data((3, 4), F64, 0.5), data((3, 4), F64, seed=1)
    p = parameters(op, x, "shared")
    step = 2.0**-20

    def loss(given: Any, **moved: Any) -> Any:
        y = getattr(reference, op.name)(given, **p | moved, dtype=np.longdouble)
        return (y * dy).sum()

    for name, found in zip(op.gradients, gradients(op, dy, x, p, reference), strict=True):
        value = np.asarray(x if name == "dx" else p[name[1:]])
        slopes = np.zeros(value.shape, np.longdouble)
        for place in np.ndindex(value.shape):
            move = np.zeros(value.shape, np.longdouble)
            move[place] = step
            ends = [value + move, value - move]
            high, low = (loss(v) if name == "dx" else loss(x, **{name[1:]: v}) for v in ends)
            slopes[place] = (high - low) / (2 * step)
        # of the third derivatives, which are below 8, a sixth times step^2
        np.testing.assert_allclose(found, slopes, rtol=0, atol=2 * step**2 * abs(dy).sum() * 4)


@by_operation
def test_gradients_are_those_of_pytorch(op: Operation) -> None:
    pytest.importorskip("torch")
    import torch

    x, dy = data((4, 6, 5), F64, 0.5), data((4, 6, 5), F64, seed=1)
    p = parameters(op, x, "shared")
    tensors = {"x": torch.from_numpy(x.copy())} | op.to_torch(p)
    leaves = [torch.as_tensor(tensors[name[1:]]).requires_grad_() for name in op.gradients]
    tensors |= {name[1:]: leaf for name, leaf in zip(op.gradients, leaves, strict=True)}
    assert op.torch is not None
    op.torch(tensors.pop("x"), **tensors).backward(torch.from_numpy(dy))
    for got, leaf in zip(gradients(op, dy, x, p, reference), leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-12, atol=1e-13)


@by_operation
def test_gradients_whatever_the_threads(op: Operation) -> None:
    """Threads change no bit; what does not fit is refused by its name."""
    x, dy = data((500, 70), F32, 0.5), data((500, 70), F32, seed=1)
    p = parameters(op, x, "shared")
    with fn.threads(1):
        one = gradients(op, dy, x, p, fn)
    with fn.threads(2):
        two = gradients(op, dy, x, p, fn)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="dy has shape"):
        gradients(op, dy[1:], x, p, fn)
    with pytest.raises(ValueError, match="weight has shape"):
        gradients(op, dy, x, p | {"weight": np.ones(3)}, fn)
