"""PyTorch's own samples of functions and modules through fastnorm.torch; its checks of gradients.

Exceptions are rows of docs/differences.rst, as in tests/test_peers_pytorch.py.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
fnt: Any = pytest.importorskip("fastnorm.torch")

from .test_peers_pytorch import (  # noqa: E402
    CLOSE,
    CLOSE_GRADIENTS,
    MODULES,
    internal,
)

# Its own code for transforms warns of what it uses.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
NAMES = (*NORMS, "normalize", "local_response_norm")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def operators() -> dict[str, Any]:
    found = internal("common_methods_invocations").op_db
    return {op.name.removeprefix("nn.functional."): op for op in found if not op.variant_test_name}


def call(name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Ours, called as PyTorch's is."""
    if name == "normalize":
        kwargs.pop("p", None)
        return fnt.l2_normalize(x, kwargs.pop("dim", 1), **kwargs)
    return getattr(fnt, name)(x, *args, **kwargs)


def is_other(name: str, x: Any, args: Any, kwargs: Any) -> bool:
    """Whether a sample falls under a row of docs/differences.rst."""
    if name == "normalize":
        return bool((args[0] if args else kwargs.get("p", 2.0)) != 2.0)
    momentum = kwargs.get("momentum", 0.1)
    return (
        not 0 <= momentum <= 1
        or (kwargs.get("eps") or 0.0) < 0
        or (name == "batch_norm" and x.ndim < 2)
    )


def own(value: Any, dtype: Any = None) -> Any:
    """A leaf of the same numbers, in another dtype where one is given."""
    if not isinstance(value, torch.Tensor):
        return value
    made = value.detach().clone()
    made = made.to(dtype) if dtype and made.is_floating_point() else made
    return made.requires_grad_(value.requires_grad)


def samples_of(op: Any, name: str, dtype: Any) -> Any:
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        if not is_other(name, sample.input, sample.args, sample.kwargs):
            yield sample


def leaves_of(*values: Any) -> list[Any]:
    return [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_functions(name: str, dtype: str, operators: dict[str, Any]) -> None:
    """Against PyTorch's own in float64: ours is rounded once, of sums that are exact enough."""
    op, kind, compared = operators[name], getattr(torch, dtype), 0
    # of results: two roundings, of y and of what a weight of this dtype makes
    allowed = CLOSE if dtype == "float64" else 4 * torch.finfo(kind).eps
    for sample in samples_of(op, name, kind):
        x, args = own(sample.input), [own(a) for a in sample.args]
        kwargs = {k: own(v) for k, v in sample.kwargs.items()}
        wide = own(sample.input, torch.float64), [own(a, torch.float64) for a in sample.args]
        wide_kwargs = {k: own(v, torch.float64) for k, v in sample.kwargs.items()}
        y = call(name, x, *args, **kwargs)
        right = op.op(wide[0], *wide[1], **wide_kwargs)
        assert (y.shape, y.dtype) == (right.shape, kind)
        size = max(1.0, float(right.detach().abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(
            y.detach().double(), right.detach(), rtol=0, atol=allowed * size, equal_nan=True
        )
        for a, b in zip([*args, *kwargs.values()], [*wide[1], *wide_kwargs.values()]):
            if isinstance(a, torch.Tensor):  # running statistics that moved
                torch.testing.assert_close(
                    a.detach().double(), b.detach(), rtol=0, atol=max(allowed, CLOSE) * 8
                )
        compared += 1
        if not y.requires_grad:
            continue
        dy = torch.randn(y.shape, dtype=kind, generator=torch.Generator().manual_seed(1))
        ours = torch.autograd.grad(y, leaves_of(x, *args, *kwargs.values()), dy)
        theirs = torch.autograd.grad(
            right, leaves_of(wide[0], *wide[1], *wide_kwargs.values()), dy.double()
        )
        # dx of a group of one number is the difference of two equal terms of this size
        lone = name == "layer_norm" and math.prod(sample.args[0]) == 1 and dy.numel() > 0
        terms = 1e-5**-0.5 * float(dy.abs().max()) * 10 if lone else 1.0
        for a, b in zip(ours, theirs, strict=True):
            size = max(terms, float(b.abs().max())) if b.numel() else 1.0
            # of gradients: eps may be 0.5 and less, and a spread 1/16
            within = CLOSE_GRADIENTS if dtype == "float64" else allowed * 16
            torch.testing.assert_close(a.double(), b, rtol=0, atol=within * size)
    assert compared


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_samples_as_pytorch_checks_them(name: str, operators: dict[str, Any]) -> None:
    """By finite differences: backward, forward mode, batched, and of second order."""
    checked = 0
    samples = samples_of(operators[name], name, torch.float64)
    for sample in itertools.islice((s for s in samples if s.input.numel()), 12):
        kwargs = dict(sample.kwargs)
        places = {k: v for k, v in enumerate(sample.args) if leaves_of(v)}
        named = {k: v for k, v in kwargs.items() if leaves_of(v)}
        for key in ("running_mean", "running_var"):  # these would move with each call
            if kwargs.get("training", kwargs.get("use_input_stats", False)):
                kwargs.pop(key, None)
        args = list(sample.args)
        if name == "batch_norm" and (kwargs.get("training") or len(args) > 2):
            args[:2] = [None if kwargs.get("training") else a for a in args[:2]]

        def function(
            x: Any, *others: Any, args: Any = args, kwargs: Any = kwargs, places: Any = places,
            named: Any = named,
        ) -> Any:  # fmt: skip
            given = list(args)
            for at, value in zip(places, others):
                given[at] = value
            return call(name, x, *given, **kwargs | dict(zip(named, others[len(places) :])))

        leaves = [
            v.detach().clone().requires_grad_()
            for v in (sample.input, *places.values(), *named.values())
        ]
        torch.autograd.gradcheck(function, leaves, fast_mode=True, check_batched_grad=True)
        torch.autograd.gradcheck(
            function, leaves, fast_mode=True, check_forward_ad=True, check_backward_ad=False
        )
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
        checked += 1
    assert checked


@pytest.mark.parametrize("name", NORMS)
def test_samples_that_are_refused(name: str, operators: dict[str, Any]) -> None:
    if operators[name].error_inputs_func is None:
        return
    for error in operators[name].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError)):
            call(name, sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", MODULES)
def test_samples_of_modules(name: str, dtype: str, training: bool) -> None:
    """Replaced, they give what they gave before, and move their statistics likewise."""
    infos = {info.name: info for info in internal("common_modules").module_db}
    info, compared = infos[f"nn.{name}"], 0
    options = {"device": "cpu", "dtype": getattr(torch, dtype)}
    close = CLOSE_GRADIENTS if dtype == "float64" else 16 * 4 * torch.finfo(torch.float32).eps
    for sample in info.module_inputs_func(info, **options, requires_grad=True, training=training):
        made, given = sample.constructor_input, sample.forward_input
        ours = info.module_cls(*made.args, **made.kwargs, **options).train(training)
        theirs = copy.deepcopy(ours).double()
        assert fnt.report(fnt.replace(ours))[0].replaced
        x, wide = own(given.args[0]), own(given.args[0], torch.float64)
        y, right = ours(x), theirs(wide)
        dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        y.backward(dy)
        right.backward(dy.double())
        pairs = [(y, right), (x.grad, wide.grad)]
        pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters())]
        pairs += list(zip(ours.buffers(), theirs.buffers()))
        for a, b in pairs:
            size = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
            torch.testing.assert_close(
                a.detach().double(), b.detach().double(), rtol=0, atol=close * size
            )
        compared += 1
    assert compared
