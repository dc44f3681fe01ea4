"""fastnorm.torch: values, gradients of every kind, layouts, what surrounds a call, models."""

from __future__ import annotations

import copy
import doctest
import gc
import inspect
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm.operations import OPERATIONS, Operation

from .helpers import (
    BF16,
    F16,
    F32,
    F64,
    data,
    epsilon,
    expected,
    named,
    operators_seen,
    run_python,
)

torch = pytest.importorskip("torch")
fnt: Any = pytest.importorskip("fastnorm.torch")
nn, F = torch.nn, torch.nn.functional

# Its own code for transforms and traces warns of what it uses.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SHAPE = (3, 4, 5)
NORMS = {op.name: op for op in reversed(OPERATIONS) if op.stats}

by_operation = pytest.mark.parametrize("op", OPERATIONS, ids=named)
by_norm = pytest.mark.parametrize("op", [op for op in OPERATIONS if op.stats], ids=named)

Parameters = dict[str, Any]


def tensor(array: Any, dtype: Any = None) -> Any:
    """A copy, of bfloat16 too, with the same order of axes in memory."""
    if array.dtype == BF16:
        return torch.from_numpy(array.copy("K").view(np.int16)).view(torch.bfloat16)
    made = torch.from_numpy(array.copy("K"))
    return made if dtype is None else made.to(dtype)


def array(value: Any) -> Any:
    value = value.detach()
    if value.dtype is torch.bfloat16:
        return value.view(torch.int16).numpy().view(BF16)
    return value.numpy()


def tensors(parameters: Parameters) -> Parameters:
    return {k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in parameters.items()}


def parameters_of(
    op: Operation, shape: Any = SHAPE, dtype: Any = F64, **options: Any
) -> Parameters:
    return op.parameters(shape, dtype, np.random.default_rng(3), **options)


def features_of(op: Operation, dtype: Any = F64) -> Iterator[Parameters]:
    """The options of a norm that change its gradients."""
    rng = np.random.default_rng(4)
    residual = rng.standard_normal(SHAPE).astype(dtype)
    yield {"residual": residual, "activation": "gelu"}
    yield {"residual": residual, "activation": "relu"}
    yield {"residual": 3 * residual, "activation": "relu6"}
    if "where" in op.features:
        chosen = rng.random(SHAPE) < 0.7
        chosen[:, :2] = chosen[:, :, :2] = True  # every statistic has two
        yield {"where": chosen, "activation": "silu"}
    if op.name == "rms_norm":
        yield {"weight_offset": 1.0, "activation": "gelu_tanh"}


def leaves_of(op: Operation, given: Parameters) -> tuple[list[str], list[Any], Callable[..., Any]]:
    """What a call is differentiated by: names, tensors, and the call as a function of these."""
    x = tensor(data(SHAPE, F64, 1.0)).requires_grad_()
    p = tensors(given)
    names = [k for k, v in p.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    names = [k for k in names if not k.startswith("running")]

    def call(x: Any, *rest: Any) -> Any:
        # running statistics move with every call, and are not asked for here
        fixed = {k: v.clone() if k.startswith("running") else v for k, v in p.items()}
        return getattr(fnt, op.name)(x, **fixed | dict(zip(names, rest)))

    return ["x", *names], [x, *[p[k].requires_grad_() for k in names]], call


# --- Values ---------------------------------------------------------------------------------------


@by_operation
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=named)
def test_values_are_those_of_arrays(op: Operation, dtype: Any) -> None:
    """The same bits, with a gradient recorded or not; a tensor of the same dtype and layout."""
    x = data(SHAPE, dtype, 1.0)
    p = parameters_of(op, dtype=dtype)
    right = getattr(fn, op.name)(x, **copy.deepcopy(p))
    right = right if isinstance(right, tuple) else (right,)
    for needs in (False, True):
        given = tensor(x).requires_grad_(needs)
        for function in (getattr(fnt, op.name), getattr(fn, op.name)):
            found = function(given, **tensors(p))
            found = found if isinstance(found, tuple) else (found,)
            for a, b in zip(found, right, strict=True):
                assert type(a) is torch.Tensor
                assert a.dtype is given.dtype
                assert a.requires_grad is needs
                np.testing.assert_array_equal(array(a), b)


@by_norm
def test_values_with_everything(op: Operation) -> None:
    """With and without a gradient: within roundings of float64."""
    x = data(SHAPE, F32, 1.0)
    p = parameters_of(op, dtype=F32, per_sample=True)
    for extra in features_of(op, F32):
        exact = expected(op, x.astype(F64), p | extra)
        for needs in (False, True):
            given = tensors(p | extra)
            found = array(getattr(fnt, op.name)(tensor(x).requires_grad_(needs), **given))
            size = 4.0 + abs(exact)
            assert (abs(found - exact) <= 8 * epsilon(F32) * size).all(), extra


@by_norm
def test_statistics(op: Operation) -> None:
    x, p = data(SHAPE, F32, 1.0), parameters_of(op, dtype=F32)
    right = getattr(fn, op.name)(x, **copy.deepcopy(p), return_stats=True)
    for needs in (False, True):
        given = tensor(x).requires_grad_(needs)
        y, *stats = getattr(fnt, op.name)(given, **tensors(p), return_stats=True)
        assert y.requires_grad is needs
        for a, b in zip(stats, right[1:], strict=True):
            assert a.dtype is torch.float64
            assert not a.requires_grad
            np.testing.assert_array_equal(array(a), b)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("needs", [False, True])
def test_running_statistics_move_as_in_pytorch(name: str, needs: bool) -> None:
    x = tensor(data((4, 3, 5, 6), F32, 1.0))
    flag = {"training": True} if name == "batch_norm" else {"use_input_stats": True}
    ours = [torch.zeros(3), torch.ones(3)]
    theirs = [t.clone() for t in ours]
    for step in range(3):
        getattr(fnt, name)((x + step).requires_grad_(needs), *ours, momentum=0.3, **flag)
        getattr(F, name)(x + step, *theirs, momentum=0.3, **flag)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert a._version >= 3  # autograd sees that they were written


@pytest.mark.parametrize("needs", [False, True])
def test_layouts_are_kept(needs: bool) -> None:
    """No copy on the way in, and the order of memory of x on the way out."""
    x = tensor(data((2, 6, 5, 4), F32))
    weight = torch.randn(6)
    for given in (
        x.to(memory_format=torch.channels_last),
        x.transpose(1, 3).contiguous().transpose(1, 3),
        x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    ):
        given = given.detach().requires_grad_(needs)
        y = fnt.group_norm(given, 2, weight)
        assert y.stride() == given.stride()
        torch.testing.assert_close(y, F.group_norm(given, 2, weight), rtol=1e-5, atol=1e-5)
        if needs:
            y.sin().sum().backward()
            assert given.grad.stride() == given.stride()
    for given in (x[:, ::2], x[..., 1:], x.expand(3, *x.shape)[1], x[:1].expand(4, 6, 5, 4)):
        given = given.requires_grad_(needs) if given.is_leaf else given
        y = fnt.layer_norm(given, given.shape[1:])
        torch.testing.assert_close(y, F.layer_norm(given, given.shape[1:]), rtol=1e-5, atol=1e-5)


def test_out_and_in_place() -> None:
    x, weight = tensor(data(SHAPE, F32)), torch.randn(5)
    right = fnt.layer_norm(x, 5, weight)
    for out in (torch.empty_like(x), x.clone()):
        before = out._version
        assert fnt.layer_norm(out if out.equal(x) else x, 5, weight, out=out) is out
        assert out.equal(right)
        assert out._version > before
    y, mean, rstd = fnt.layer_norm(x, 5, weight, out=x, return_stats=True)
    assert y is x
    assert mean.shape == rstd.shape == (3, 4, 1)


def test_nothing_of_the_callers_changes() -> None:
    for op in OPERATIONS:
        names, leaves, call = leaves_of(op, parameters_of(op))
        before = [leaf.detach().clone() for leaf in leaves]
        dy = torch.randn(SHAPE, dtype=torch.float64)
        kept = dy.clone()
        y = call(*leaves)
        (y[0] if isinstance(y, tuple) else y).backward(dy)
        for name, leaf, was in zip(names, leaves, before, strict=True):
            assert leaf.detach().equal(was), (op.label, name)
            assert leaf._version == 0, (op.label, name)
        assert dy.equal(kept)


# --- Gradients ------------------------------------------------------------------------------------


def check(call: Callable[..., Any], leaves: list[Any]) -> None:
    torch.autograd.gradcheck(call, leaves, check_batched_grad=True, fast_mode=True)
    torch.autograd.gradcheck(
        call, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )
    torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@by_operation
def test_gradients(op: Operation) -> None:
    _, leaves, call = leaves_of(op, parameters_of(op))
    check(call, leaves)


@by_norm
def test_gradients_with_everything(op: Operation) -> None:
    for extra in features_of(op):
        _, leaves, call = leaves_of(op, parameters_of(op, per_sample=True) | extra)
        check(call, leaves)


@pytest.mark.parametrize("axis", [-1, 2])
def test_gradients_along_other_axes(axis: int) -> None:
    for op in OPERATIONS:
        if "channel_axis" in op.features:
            _, leaves, call = leaves_of(op, parameters_of(op, channel_axis=axis, num_groups=5))
            check(call, leaves)
    _, leaves, _ = leaves_of(NORMS["layer_norm"], {"weight": np.ones((5, 3)), "bias": np.ones(5)})
    leaves[2] = leaves[2].detach()[:, None].requires_grad_()
    check(lambda x, w, b: fnt.layer_norm(x, axis=(2, 0), weight=w, bias=b), leaves)


@pytest.mark.parametrize("bias", [(4,), (3, 4), (1,), (3, 4, 5)], ids=str)
def test_a_bias_without_a_weight_or_of_another_shape(bias: tuple[int, ...]) -> None:
    for weight in (None, (4,), (3, 4)):
        shapes = {"bias": bias} | ({"weight": weight} if weight else {})
        given = {k: np.random.default_rng(0).standard_normal(s) for k, s in shapes.items()}
        for op in ("batch_norm", "group_norm"):
            own = {"num_groups": 2} if op == "group_norm" else {"training": True}
            for after in ({}, {"activation": "silu"}):
                _, leaves, call = leaves_of(NORMS[op], given | own | after)
                torch.autograd.gradcheck(call, leaves, fast_mode=True)
                torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_norm
def test_an_activation_is_part_of_a_recorded_pass(op: Operation, dtype: Any) -> None:
    """The bits are those without a gradient, and what goes into it is not kept."""
    x, dy = (tensor(data((4, 8, 5), F32, seed=i)).to(dtype) for i in (0, 1))
    p = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v
         for k, v in tensors(parameters_of(op, (4, 8, 5), F32)).items()}  # fmt: skip
    residual = tensor(data((4, 8, 5), F32, seed=2)).to(dtype)
    function = getattr(fnt, op.name)
    for activation in ("relu", "relu6", "silu", "gelu", "gelu_tanh"):
        for more in ({}, {"residual": residual}):
            own = p | more | {"activation": activation}
            plain = function(x, **copy.deepcopy(own))
            kept: list[Any] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.append(t) or t, lambda t: t
            ):
                y = function(x.clone().requires_grad_(), **copy.deepcopy(own))
            np.testing.assert_array_equal(array(y.detach()), array(plain))
            # x and a residual, or x and the result
            assert sum(t.shape == x.shape for t in kept) <= 2
            y.backward(dy)


def test_integers_recorded_through_an_activation() -> None:
    x, w = torch.arange(36).reshape(3, 4, 3), torch.ones(4, requires_grad=True)
    for activation in ("relu", "silu", "gelu"):
        y = fnt.group_norm(x, 2, w, activation=activation)
        right = fnt.group_norm(x.double(), 2, w, activation=activation)
        np.testing.assert_array_equal(array(y.detach()), array(right.detach()))
        (ours,), (other,) = (torch.autograd.grad(v.sum(), w) for v in (y, right))
        np.testing.assert_array_equal(array(ours), array(other))


def test_by_running_statistics() -> None:
    op = NORMS["instance_norm"]
    _, leaves, call = leaves_of(op, parameters_of(op) | {"use_input_stats": False})
    check(call, leaves)


@by_norm
def test_gradients_far_from_zero(op: Operation) -> None:
    """At mean/std 1e4, float32: those of float64, to 1e-6 of the largest."""
    x, dy = data((4, 8, 40), F32, 1e4), data((4, 8, 40), F32, seed=1)
    p = parameters_of(op, x.shape, F32)
    if "inference" in op.label:
        p["running_mean"] += 1e4
    found: list[list[Any]] = []
    for dtype, function in ((torch.float32, getattr(fnt, op.name)), (torch.float64, op.torch)):
        leaf = tensor(x, dtype).requires_grad_()
        given = {k: tensor(v, dtype) if isinstance(v, np.ndarray) else v for k, v in p.items()}
        leaves = [leaf] + [given[k].requires_grad_() for k in ("weight", "bias") if k in given]
        function(leaf, **given).backward(tensor(dy, dtype))
        found.append([leaf.grad for leaf in leaves])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_half_precision_is_rounded_once() -> None:
    """Gradients in float16 and bfloat16 are those of float32, rounded; parameters keep a dtype."""
    x, dy = data((6, 32), F32, 1.0), data((6, 32), F32, seed=1)
    for half in (torch.float16, torch.bfloat16):
        for kind in (half, torch.float32):
            leaf = tensor(x).to(half).requires_grad_()
            weight = torch.ones(32, dtype=kind, requires_grad=True)
            y = fnt.layer_norm(leaf, 32, weight)
            y.backward(tensor(dy).to(half))
            assert (y.dtype, leaf.grad.dtype, weight.grad.dtype) == (half, half, kind)
            wide = leaf.detach().double().requires_grad_()
            unit = torch.ones(32, dtype=torch.float64, requires_grad=True)
            F.layer_norm(wide, (32,), unit).backward(tensor(dy).to(half).double())
            for a, b in ((leaf.grad, wide.grad), (weight.grad, unit.grad)):
                allowed = torch.finfo(a.dtype).eps * b.abs().max()
                assert (a.double() - b).abs().max() <= allowed


def test_running_statistics_that_are_no_tensors() -> None:
    mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
    x = torch.randn(SHAPE)
    for needs in (False, True):
        fnt.batch_norm(x.requires_grad_(needs), mean, var, training=True)
    assert (mean != 0).all()


def test_weights_that_are_no_tensors() -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    weight = np.linspace(1.0, 2.0, 5)
    check(lambda x: fnt.layer_norm(x, 5, weight, 0.1), [x])
    ones = fnt.layer_norm(x, 5, torch.from_numpy(weight), torch.full((), 0.1, dtype=x.dtype))
    assert fnt.layer_norm(x.detach(), 5, weight, 0.1).equal(ones)


@pytest.mark.parametrize(
    "weight",
    [
        np.linspace(1.0, 2.0, 5)[::-1],
        np.linspace(1.0, 2.0, 5).astype(">f4"),
        np.broadcast_to(np.float32(2.0), (5,)),  # read-only
        [1.0, 2.0, 3.0, 4.0, 5.0],
        np.arange(5),
    ],
    ids=["reversed", "big-endian", "read-only", "list", "integers"],
)
def test_weights_of_every_form(weight: Any) -> None:
    """With a gradient and under a transform as without; never where the default device is."""
    x = torch.randn(SHAPE)
    right = fnt.layer_norm(x, 5, weight, 0.1)
    with torch.device("meta"):
        assert fnt.layer_norm(x.clone().requires_grad_(), 5, weight, 0.1).equal(right)
        assert fnt.moments(x)[0].is_cpu
    call = torch.func.vmap(lambda x: fnt.layer_norm(x, 5, weight, 0.1))
    torch.testing.assert_close(call(x[None])[0], right, rtol=1e-5, atol=1e-5)


def test_weights_that_change_after_the_call() -> None:
    x, weight = torch.randn(SHAPE, requires_grad=True), np.ones(5, np.float32)
    fnt.layer_norm(x, 5, weight).square().sum().backward()
    right, x.grad = x.grad, None
    y = fnt.layer_norm(x, 5, weight)
    weight[:] = 100.0
    y.square().sum().backward()
    assert x.grad.equal(right)


def test_only_what_is_wanted_has_a_gradient() -> None:
    x = tensor(data(SHAPE, F32))
    weight, bias = torch.ones(5, requires_grad=True), torch.ones(5)
    y = fnt.layer_norm(x, 5, weight, bias)
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None
    total = fnt.add_rms_norm(x.requires_grad_(), x.detach(), 5)[1]
    total.sum().backward()  # of the sum alone
    assert x.grad.equal(torch.ones_like(x))
    leaf = torch.randn(SHAPE, requires_grad=True)
    assert not fnt.l2_normalize(leaf.detach()).requires_grad
    (g,) = torch.autograd.grad(fnt.layer_norm(leaf, 5, residual=leaf).sum(), leaf)
    assert (g - 1).abs().max() < 1e-6  # used twice


def test_without_gradients() -> None:
    x, weight = torch.randn(4, 6), nn.Parameter(torch.ones(6))
    right = fnt.layer_norm(x, 6, weight)
    assert right.requires_grad
    for scope in (torch.no_grad(), torch.inference_mode()):
        with scope:
            y = fnt.layer_norm(x, 6, weight)
            out = fnt.layer_norm(x, 6, weight, out=torch.empty(4, 6))
        assert not y.requires_grad
        assert y.equal(right)
        assert out.equal(right)


def test_batch_norm_gradients_survive_later_steps() -> None:
    """In inference the running statistics that were used count, not those of later."""
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = fnt.batch_norm(x, mean, var)
    before = mean._version
    fnt.batch_norm(x.detach() * 9, mean, var, training=True)
    assert mean._version > before
    for again in (True, False):
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=again, retain_graph=True)
        assert (g - 1 / np.sqrt(1 + 1e-5)).abs().max() < 1e-12


def test_gradients_to_be_differentiated_have_the_epsilon_of_x() -> None:
    """That of float32 where eps is None, though they are computed in float64."""
    x, dy = torch.full((2, 8), 1e-4).requires_grad_(), torch.arange(16.0).reshape(2, 8)
    rstd = np.full((2, 1), (1e-8 + np.finfo(F32).eps) ** -0.5)
    exact = fn.rms_norm_backward(array(dy).astype(F64), array(x).astype(F64), rstd, 8)[0]
    for again in (False, True):
        (dx,) = torch.autograd.grad(fnt.rms_norm(x, 8), x, dy, create_graph=again)
        np.testing.assert_allclose(array(dx), exact, rtol=1e-5)


def test_a_mode_sees_the_operators_of_a_gradient() -> None:
    """One entered before backward only: the kernels would pass it by."""
    for norm in (lambda x: fnt.layer_norm(x, 8), lambda x: fnt.batch_norm(x, training=True)):
        x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
        right = torch.autograd.grad(norm(x), x, dy)[0]
        y = norm(x)
        with operators_seen() as seen:
            (dx,) = torch.autograd.grad(y, x, dy)
        assert len(seen) > 5
        torch.testing.assert_close(dx, right)


class Logged(torch.Tensor):
    """A subclass, whose own code sees every operator."""


@pytest.mark.parametrize("name", ["weight", "bias", "residual", "running_mean"])
def test_a_subclass_beside_what_requires_a_gradient_is_seen(name: str) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    own = torch.ones(4, 8) if name == "residual" else torch.ones(8)
    given = {name: own.as_subclass(Logged)}
    if name == "running_mean":
        y = fnt.batch_norm(x, given[name], torch.ones(8))
    else:
        y = fnt.layer_norm(x, 8, **given)
    assert type(y) is Logged
    assert y.requires_grad


def test_shapes_of_a_recorded_call() -> None:
    """A torch.Size is known to the cache as a tuple is; a list may change before the gradient."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    shape = [3, 8]
    found = []
    for given in (shape, torch.Size([3, 8]), (3, 8)):
        y = fnt.layer_norm(x, given)
        shape[:] = [8]
        found.append(torch.autograd.grad(y, x, torch.ones_like(y) * x.detach())[0])
        assert type(y.grad_fn.options[1]) is tuple
    assert found[0].equal(found[2])
    assert found[1].equal(found[2])


def test_integers_have_one_epsilon() -> None:
    x = torch.zeros(2, 4, dtype=torch.int64)
    x[1] = 1
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    y, dy = fnt.rms_norm(x, 4, w), torch.ones(2, 4, dtype=torch.float64)
    for again in (False, True):
        (dw,) = torch.autograd.grad(y, w, dy, retain_graph=True, create_graph=again)
        close(dw.detach(), torch.ones(4, dtype=torch.float64))


def test_a_gradient_of_another_kind() -> None:
    """Dual numbers and those of a transform go through PyTorch's operators."""

    def pull(y: Any, leaf: Any, dy: Any) -> Any:
        return torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 4, 8, dtype=torch.float64)
    for norm in (lambda x: fnt.layer_norm(x, 8), lambda x: F.layer_norm(x, (8,))):
        y = norm(x)
        duals = []
        with torch.autograd.forward_ad.dual_level():
            dy = torch.autograd.forward_ad.make_dual(v[0], v[1])
            (dx,) = torch.autograd.grad(norm(x), x, dy)
            duals.append(torch.autograd.forward_ad.unpack_dual(dx).tangent)
        close(duals[0], pull(y, x, v[1]))
        each = torch.func.vmap(partial(pull, y, x))(v)
        assert not each.requires_grad
        for one, dy in zip(each, v, strict=True):
            close(one, pull(y, x, dy))
    y = fnt.layer_norm(x, 8, None, bias)
    of_bias = torch.func.vmap(partial(pull, y, bias))(v)
    assert of_bias.equal(v)


def test_nothing_is_recorded_of_inference() -> None:
    """Under `inference_mode`, whatever is enabled inside."""
    x = torch.randn(4, 8, requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        for given in (x, torch.nn.Parameter(torch.ones(4, 8))):
            for y in (fnt.layer_norm(given, 8), fnt.layer_norm(given, 8, activation="relu")):
                assert not y.requires_grad
                assert y.is_inference()


# --- What surrounds a call ------------------------------------------------------------------------


def calls_of_everything() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """(ours, PyTorch's) of x (4, 6, 5) and w (5,)."""
    return [
        (lambda x, w: fnt.layer_norm(x, 5, w), lambda x, w: F.layer_norm(x, (5,), w)),
        (lambda x, w: fnt.rms_norm(x, 5, w), lambda x, w: F.rms_norm(x, (5,), w)),
        (
            lambda x, w: fnt.group_norm(x, 2, activation="silu") * w,
            lambda x, w: F.silu(F.group_norm(x, 2)) * w,
        ),
        (
            lambda x, w: fnt.batch_norm(x, training=True, residual=x) * w,
            lambda x, w: (F.batch_norm(x, None, None, training=True) + x) * w,
        ),
        (lambda x, w: fnt.l2_normalize(x) * w, lambda x, w: F.normalize(x, dim=-1) * w),
        (
            lambda x, w: fnt.add_layer_norm(x, x, 5, w)[0],
            lambda x, w: F.layer_norm(x + x, (5,), w),
        ),
    ]


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_bias_without_a_weight_in_a_transform(dtype: Any) -> None:
    """Where x is half: PyTorch's own instance norm refuses it."""
    x, b = torch.randn(2, 3, 15).to(dtype), torch.rand(3)
    stats = torch.zeros(3), torch.ones(3)
    for name, flag in (("batch_norm", "training"), ("instance_norm", "use_input_stats")):
        for of_x in (False, True):
            norm = partial(getattr(fnt, name), weight=None, bias=b, **{flag: of_x})

            def total(x: Any, norm: Any = norm) -> Any:
                y = norm(x, *(s.clone() for s in stats))
                assert y.dtype == x.dtype
                return (y.float() * torch.arange(15.0)).sum()

            found = torch.func.grad(total)(x)
            right = torch.func.grad(total)(x.double())
            # of sums of 30 terms up to 15, rounded once
            allowed = 32 * torch.finfo(dtype).eps
            torch.testing.assert_close(found.double(), right, rtol=0.0, atol=allowed)


def test_torch_func() -> None:
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    w = torch.randn(5, dtype=torch.float64)
    func = torch.func
    for ours, theirs in calls_of_everything():
        for transform in (
            lambda f: func.grad(lambda x, w: f(x, w).sin().sum(), (0, 1))(x, w),
            lambda f: func.vmap(f, (0, None))(torch.stack([x, 2 * x]), w),
            lambda f: func.jacrev(f)(x[:2, :, :2].repeat(1, 1, 1)[..., [0, 1, 0, 1, 1]], w),
            lambda f: func.jvp(f, (x, w), (x.cos(), w)),
            lambda f: func.vmap(func.grad(lambda x: f(x, w).sin().sum()))(torch.stack([x, 2 * x])),
        ):
            close(transform(ours), transform(theirs))


def test_compile_export_and_traces() -> None:
    """PyTorch sees its own operators there, in one graph."""
    x, w = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for ours, theirs in calls_of_everything():
        torch._dynamo.reset()
        close(torch.compile(ours, backend="eager", fullgraph=True)(x, w), theirs(x, w))
    ours, theirs = calls_of_everything()[0]
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(ours)(x, w)
    close(graph(2 * x, w), theirs(2 * x, w))
    model = fnt.replace(nn.Sequential(nn.LayerNorm(5), nn.GroupNorm(2, 6))).double()
    exported = torch.export.export(model, (x,))
    close(exported.module()(3 * x), model(3 * x))


# --- Formulas under transforms --------------------------------------------------------------------


def compiled(call: Callable[..., Any], *given: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(call, backend="eager", fullgraph=True)(*given)


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda x: fnt.standardize(x, 0), (3, 8)),
        (lambda x: fnt.standardize(x, (0, 1), where=x.detach() > -1.0, ddof=1), (3, 8)),
        (lambda x: fnt.standardize(x, ()), (3, 8)),
        (lambda x: fnt.weight_standardize(x), (4, 1)),
        (lambda x: fnt.weight_standardize(x, eps=0.0), (3, 4)),
        (lambda x: fnt.weight_standardize(x), (0, 4)),
        (lambda x: fnt.global_response_norm(x, torch.ones(8), torch.ones(8), eps=0.0), (3, 8, 2)),
    ],
)
def test_constants_have_gradients(call: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """Zero is no NaN, neither as a value nor as a gradient, recorded or under a transform."""
    for columns, constant in ((1, 3.0), (None, 0.1), (None, 0.0)):
        x = tensor(data(shape, F64))
        x[..., :columns] = constant
        leaf = x.clone().requires_grad_()
        call(leaf).sum().backward()
        assert leaf.grad.isfinite().all()
        close(torch.func.grad(lambda x: call(x).sum())(x), leaf.grad)
        close(torch.func.vmap(call)(x[None])[0], call(x))


def test_standardized_under_a_compiler() -> None:
    x = tensor(data((3, 8), F32))
    x[:, 0] = 0.1
    options = ({}, {"ddof": 1}, {"ddof": 3}, {"ddof": 2, "eps": 0.1, "where": x > -0.5})

    def call(x: Any) -> Any:
        return [fnt.standardize(x, 0, **given) for given in options]

    for a, b in zip(compiled(call, x), call(x), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_dtypes_under_transforms() -> None:
    """The dtype of x, and parameters of any other, as the kernels have it."""
    w, d = torch.randn(8), torch.randn(8, dtype=torch.float64)
    calls: list[Callable[..., Any]] = [
        lambda x: fnt.layer_norm(x, 8, d, w),
        lambda x: fnt.layer_norm(x, (np.int64(8),), w, return_stats=True)[0],
        lambda x: fnt.rms_norm(x, np.int64(8), d),
        lambda x: fnt.group_norm(x, 2, w, w),
        lambda x: fnt.instance_norm(x[..., None].expand(3, 8, 2), weight=w, bias=d),
        lambda x: fnt.batch_norm(x, d, d.square(), w),
        lambda x: fnt.add_layer_norm(x, x, 8, d)[0],
        lambda x: fnt.dynamic_tanh(x, torch.tensor(0.5, dtype=torch.float64), w),
        lambda x: fnt.derf(x, 0.5, 0.1, w, d),
        lambda x: fnt.global_response_norm(x[..., None], w, d),
        lambda x: fnt.weight_norm(x, d[:3, None]),
        lambda x: fnt.weight_norm(x, d.expand(3, 8), axis=(0, 1)),
        lambda x: fnt.l2_normalize(x),
        lambda x: fnt.layer_norm(x, 8, np.linspace(1.0, 2.0, 8)),
    ]
    x = tensor(data((3, 8), F32, 1.0))
    for kind in (torch.float16, torch.float32, torch.float64, torch.int32, torch.bool):
        given = x.to(kind)
        for call in calls:
            right = call(given)
            found = torch.func.vmap(call)(given[None])[0]
            if kind.is_floating_point:
                assert right.dtype is kind
                assert torch.func.vjp(call, given)[0].dtype is kind
            allowed = 4 * torch.finfo(right.dtype if kind.itemsize == 2 else torch.float32).eps
            torch.testing.assert_close(found, right, rtol=4 * allowed, atol=4 * allowed)


def test_tuples_of_axes_and_other_dtypes_compile() -> None:
    x, d = torch.randn(3, 8), torch.ones(8, dtype=torch.float64)

    def call(x: Any) -> Any:
        return (
            fnt.layer_norm(x, axis=(0, 1)),
            fnt.rms_norm(x, axis=(-1,), weight=d),
            fnt.weight_norm(x, torch.ones(3, 8), axis=(0, 1)),
        )

    torch.testing.assert_close(compiled(call, x), call(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_of_channels_without_values(name: str) -> None:
    """They stay as they are under a compiler, too."""
    x, where = torch.randn(2, 8, 5), torch.ones(2, 8, 5, dtype=torch.bool)
    where[:, 2] = where[0, 3] = False
    flag = {"training": True} if name == "batch_norm" else {}
    ours, theirs = ([torch.full((8,), 0.5), torch.full((8,), 2.0)] for _ in range(2))

    def call(x: Any, *running: Any) -> Any:
        return getattr(fnt, name)(x, *running, where=where, **flag)

    call(x, *ours)
    compiled(call, x, *theirs)
    torch.testing.assert_close(ours, theirs)


def test_nested_tensors() -> None:
    rows = [torch.randn(2, 8), torch.randn(3, 8)]
    with warnings.catch_warnings(action="ignore"):  # a prototype, it says
        nested = torch.nested.nested_tensor(rows)
    model = fnt.replace(nn.LayerNorm(8))
    for needs in (True, False):
        found = model.requires_grad_(needs)(nested).unbind()
        for a, b in zip(found, rows, strict=True):
            torch.testing.assert_close(a, F.layer_norm(b, (8,)))


# --- What else surrounds a call -------------------------------------------------------------------


def test_autocast_checkpoint_hooks() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(4, 6, 5)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            leaf = x.to(dtype, copy=True).requires_grad_()
            y = fnt.layer_norm(leaf, 5)
            assert y.dtype is F.layer_norm(leaf, (5,)).dtype
        y.float().sin().sum().backward()
        assert leaf.grad.dtype is dtype
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(fnt.group_norm(leaf, 3).sin().sum(), leaf)[0]
    for reentrant in (False, True):
        y = checkpoint(fnt.group_norm, leaf, 3, use_reentrant=reentrant)
        leaf.grad = None
        y.sin().sum().backward()
        assert leaf.grad.equal(plain)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = fnt.group_norm(leaf, 3)
    assert torch.autograd.grad(y.sin().sum(), leaf)[0].equal(plain)


def test_subclasses_and_other_devices_are_pytorchs() -> None:
    class Sub(torch.Tensor):
        seen: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(4, 6).as_subclass(Sub)
    y = fnt.layer_norm(x, 6)
    assert type(y) is Sub
    assert "layer_norm" in Sub.seen
    for needs in (False, True):
        meta = torch.randn(4, 6, 5, device="meta", requires_grad=needs)
        for name, given in (("group_norm", (2,)), ("layer_norm", (5,)), ("l2_normalize", ())):
            y = getattr(fnt, name)(meta, *given, **({"activation": "silu"} if given else {}))
            assert (y.device.type, y.shape, y.requires_grad) == ("meta", meta.shape, needs)
    with pytest.raises(TypeError, match=r"weight is a tensor on the device meta.*weight\.cpu"):
        fnt.layer_norm(torch.randn(4, 5), 5, torch.ones(5, device="meta"))
    y, *stats = fnt.layer_norm(meta, 5, where=meta > 0, return_stats=True)
    assert [tuple(s.shape) for s in stats] == [(4, 6, 1)] * 2


def test_formulas_are_the_kernels() -> None:
    """What PyTorch computes for a subclass is what the kernels compute."""

    class Sub(torch.Tensor):
        pass

    for op in OPERATIONS:
        x, p = tensor(data(SHAPE, F64, 1.0)), parameters_of(op)
        more: list[Parameters] = [{}]
        if op.stats:
            more = [{"return_stats": True}, *features_of(op)]
        for extra in more:
            given = tensors(p | extra), tensors(p | extra)
            right = getattr(fnt, op.name)(x, **given[0])
            found = getattr(fnt, op.name)(x.as_subclass(Sub), **given[1])
            pairs = [*zip(found, right)] if isinstance(right, tuple) else [(found, right)]
            pairs += [(given[1][k], given[0][k]) for k in p if k.startswith("running")]
            for a, b in pairs:
                torch.testing.assert_close(a.as_subclass(torch.Tensor), b, rtol=1e-9, atol=1e-9)


def test_a_lazy_norm_is_replaced_once_it_is_made() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    (entry,) = fnt.report(fnt.replace(model))
    assert not entry.replaced
    assert "first call" in entry.reason
    model(torch.randn(4, 3))
    assert fnt.report(fnt.replace(model))[0].replaced


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda x: fnt.layer_norm(x.numpy(), 5),
            TypeError,
            "expected a torch.Tensor.*fastnorm.lay",
        ),
        (lambda x: fnt.layer_norm(x, 4), ValueError, "normalized_shape=4"),
        (lambda x: fnt.layer_norm(x.requires_grad_(), 4), ValueError, "normalized_shape=4"),
        (lambda x: fnt.add_rms_norm(x, x[:1], 5), ValueError, "residual has shape"),
        (
            lambda x: fnt.add_rms_norm(x.requires_grad_(), x[:1], 5),
            ValueError,
            "residual has shape",
        ),
        (lambda x: fnt.group_norm(x, 3), ValueError, "num_groups=3"),
        (lambda x: fnt.layer_norm(x, 5, eps=-1.0), ValueError, "eps"),
        (lambda x: fnt.layer_norm(x, 5, activation="tanh"), ValueError, "activation is 'tanh'"),
        (lambda x: fnt.layer_norm(x.to_sparse(), 5), TypeError, r"of layout .*x\.to_dense"),
        (lambda x: fnt.layer_norm(x.to(torch.complex64), 5), TypeError, "complex64"),
        (
            lambda x: fnt.layer_norm(x.requires_grad_(), 5, out=torch.empty_like(x)),
            ValueError,
            r"out= and a tensor that requires a gradient.*torch\.no_grad",
        ),
        (
            lambda x: fnt.layer_norm(x.requires_grad_(), 5, activation=abs),
            ValueError,
            "where PyTorch computes",
        ),
        (lambda x: fnt.moments(x.requires_grad_()), TypeError, r"write x\.detach"),
        (lambda x: torch.func.vmap(fnt.moments)(x), TypeError, "numbers alone"),
        *[
            (
                lambda x, form=form, needs=needs, running=running: fnt.batch_norm(
                    x.requires_grad_(needs), **running(form), training=True
                ),
                ValueError,
                words,
            )
            for form, words in (
                (lambda: torch._neg_view(torch.zeros(4)), "a view that negates"),
                (lambda: torch.zeros(1).expand(4), "a view that repeats"),
                (lambda: torch.zeros(4, requires_grad=True), r"_(mean|var) requires a gradient"),
            )
            for needs in (False, True)
            for running in (
                lambda form: {"running_mean": form(), "running_var": torch.ones(4)},
                lambda form: {"running_mean": torch.ones(4), "running_var": form()},
            )
        ],
        (
            lambda x: fnt.batch_norm(x, torch.zeros(4, requires_grad=True), torch.ones(4)),
            ValueError,
            "requires a gradient",
        ),
        (
            lambda x: fnt.layer_norm(x, 5, out=torch.zeros(1, 4, 5).expand(3, 4, 5)),
            ValueError,
            r"out is a view that repeats.*out\.clone",
        ),
        *[
            (
                lambda x, name=name, options=options, around=around: around(
                    lambda x: getattr(fnt, name)(x, 5, **options)
                )(x),
                TypeError,
                next(iter(options)),
            )
            for name, options in (
                ("layer_norm", {"eps": torch.tensor(0.01, requires_grad=True)}),
                ("layer_norm", {"eps": None}),
                ("layer_norm", {"return_stats": torch.tensor(True)}),
                ("rms_norm", {"weight_offset": torch.tensor(1.0)}),
            )
            for around in (
                lambda f: f,
                lambda f: lambda x: f(x.requires_grad_()),
                lambda f: lambda x: torch.func.vmap(f)(x[None]),
            )
        ],
        *[
            (lambda x, call=call: torch.func.vmap(call)(x[None]), error, words)
            for call, error, words in (
                (lambda x: fnt.layer_norm(x, 5, residual=x[:1]), ValueError, "residual has shape"),
                (lambda x: fnt.add_rms_norm(x, x[:1], 5), ValueError, "residual has shape"),
                (lambda x: fnt.layer_norm(x, 5, eps=-1e-6), ValueError, "eps is -1e-06"),
                (
                    lambda x: fnt.batch_norm(x, training=True, momentum=2),
                    ValueError,
                    "momentum is 2",
                ),
                (lambda x: fnt.layer_norm(x.to(torch.complex64), 5), TypeError, "complex64"),
                (lambda x: fnt.layer_norm(x, 4), ValueError, "normalized_shape=4"),
                (lambda x: fnt.group_norm(x, 2, channel_axis=0), ValueError, "channel_axis=0"),
                (lambda x: fnt.group_norm(x, 2, torch.ones(5)), ValueError, r"of shape \(5,\)"),
                (lambda x: fnt.layer_norm(x, 5, torch.ones(2, 1, 1, 1)), ValueError, "of shape"),
                (lambda x: fnt.derf(x, 0.5, 0, torch.ones(2, 1, 1, 1)), ValueError, "of shape"),
                (lambda x: fnt.rms_norm(x, 5, out=x.double()), TypeError, "out has dtype"),
                (lambda x: fnt.rms_norm(x, 5, out=x[:1]), ValueError, "out has shape"),
            )
        ],
        (lambda x: fnt.replace([x]), TypeError, r"expected a torch\.nn\.Module"),
        (lambda x: fnt.replace(nn.LayerNorm(3), "yes"), TypeError, "fuse"),
    ],
)
def test_errors(call: Callable[[Any], Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.randn(SHAPE))


def test_signatures_and_examples() -> None:
    """Those of fastnorm's functions; every example of the documentation runs."""
    runner = doctest.DocTestRunner()
    for name in fnt.__all__:
        public = getattr(fnt, name)
        if hasattr(fn, name):
            mine, theirs = (inspect.signature(f).parameters for f in (public, getattr(fn, name)))
            assert [(p.name, p.kind, p.default) for p in mine.values()] == [
                (p.name, p.kind, p.default) for p in theirs.values()
            ]
            assert pickle.loads(pickle.dumps(public)) is public
        if inspect.isfunction(public):
            assert public.__doc__
            runner.run(doctest.DocTestParser().get_doctest(public.__doc__, {}, name, None, 0))
    assert runner.tries > 60
    assert not runner.failures
    assert {op.name for op in OPERATIONS} <= set(fnt.__all__)


IMPORTS = """
import sys, time
import fastnorm
assert "torch" not in sys.modules
import torch
start = time.process_time()
import fastnorm.torch
print(time.process_time() - start)
"""


def test_imports() -> None:
    run = run_python("-c", IMPORTS)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.15  # 0.03 on a machine that does nothing else


# --- Models ---------------------------------------------------------------------------------------


def models() -> list[tuple[Any, Any]]:
    """Every kind that is replaced, and an input."""
    torch.manual_seed(0)
    images, rows = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 8)
    volumes = torch.randn(2, 6, 3, 4, 5)
    frozen = nn.BatchNorm2d(6)
    frozen.track_running_stats = False  # its statistics stay, and are those of inference
    return [
        (frozen, images), (nn.BatchNorm1d(6), rows), (nn.BatchNorm1d(6), rows[..., 0]),
        (nn.BatchNorm2d(6), images),
        (nn.BatchNorm2d(6, momentum=None), images), (nn.BatchNorm3d(6, affine=False), volumes),
        (nn.BatchNorm2d(6, track_running_stats=False), images), (nn.SyncBatchNorm(6), images),
        (nn.LayerNorm(8), rows), (nn.LayerNorm((6, 8), bias=False), rows),
        (nn.LayerNorm(8, elementwise_affine=False), rows), (nn.GroupNorm(3, 6), images),
        (nn.InstanceNorm1d(6), rows), (nn.InstanceNorm1d(6, affine=True), rows[0]),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), images),
        (nn.InstanceNorm3d(6), volumes), (nn.RMSNorm(8), rows), (nn.RMSNorm(8, eps=1e-3), rows),
    ]  # fmt: skip


def shaken(model: Any) -> Any:
    """Parameters and statistics that are none of the usual ones."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for b in model.buffers():
            if b.is_floating_point():
                b.add_(0.1 * torch.rand_like(b))
    return model


@pytest.mark.parametrize("index", range(len(models())))
def test_replaced_is_like_the_original(index: int) -> None:
    """Results, gradients and what moves, in training and in inference."""
    original, x = models()[index]
    shaken(original)
    replaced = fnt.replace(copy.deepcopy(original))
    assert type(replaced) is not type(original)
    assert isinstance(replaced, type(original))
    assert repr(replaced) == repr(original)
    for training in (True, True, False):
        results = []
        for model in (original, replaced):
            model.train(training).zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            y.sin().sum().backward()
            with torch.no_grad():
                again = model.eval()(x)
            results.append([y, leaf.grad, again, *[p.grad for p in model.parameters()],
                            *model.buffers()])  # fmt: skip
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_a_module_stays_the_object_that_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6))
    model[3].weight.requires_grad_(False)
    model[1].eval()
    seen: list[Any] = []
    model[1].register_forward_hook(lambda *_: seen.append("forward"))
    model[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    objects = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    modules = {n: id(m) for n, m in model.named_modules()}
    dictionaries = [dict(vars(m)) for m in model.modules()]
    keys = list(model.state_dict())
    for change in (fnt.replace, fnt.replace, fnt.restore, fnt.restore):
        assert change(model) is model
        assert objects == {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        assert modules == {n: id(m) for n, m in model.named_modules()}
        assert dictionaries == [vars(m) for m in model.modules()]
        assert keys == list(model.state_dict())
        assert [m.training for m in model] == [True, False, True, True]
        assert not model[3].weight.requires_grad
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert seen == ["forward", "backward"] * 4
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.GroupNorm]


def test_copies_and_pickles_stay_replaced() -> None:
    model = fnt.replace(shaken(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.BatchNorm1d(6))))
    x = torch.randn(5, 4)
    right = model.eval()(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert len(fnt.report(other).replaced) == 2
        assert other(x).equal(right)
        assert {n for n, _ in other.named_parameters()} == {n for n, _ in model.named_parameters()}
        assert other[1].weight is not model[1].weight
        assert type(fnt.restore(other)[1]) is nn.LayerNorm
    fresh = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.BatchNorm1d(6))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(x), right)
    model.load_state_dict(fresh.state_dict())


class Doubled(nn.LayerNorm):
    """A subclass that computes something else."""

    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Named(nn.LayerNorm):
    """One that computes the same."""


class Keyed(nn.LayerNorm):
    """One that subclasses need more for."""

    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()


class Guarded(nn.LayerNorm):
    """One that watches its attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError(name)
        super().__setattr__(name, value)


class Reduced(nn.LayerNorm):
    """One with a way of its own to be copied, which names its class."""

    def __reduce__(self) -> Any:
        return type(self), (self.normalized_shape, 0.5), self.__getstate__()


class Rebuilt(nn.LayerNorm):
    """Likewise, with a function."""

    def __reduce__(self) -> Any:
        return rebuilt, (self.normalized_shape,), vars(self)


class Newed(nn.LayerNorm):
    """One whose memory wants an argument."""

    def __new__(cls, size: int, *rest: Any) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> Any:
        return self.normalized_shape


def rebuilt(shape: Any) -> Any:
    return Rebuilt(shape)


@pytest.mark.parametrize("kind", [Guarded, Reduced, Rebuilt, Newed])
def test_classes_with_ways_of_their_own(kind: Any) -> None:
    model = fnt.replace(shaken(kind(8)))
    x = torch.randn(3, 8)
    copies = [copy.deepcopy(model), copy.copy(model)]
    copies += [pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)]
    for other in copies:
        assert type(other) is type(model)
        assert other(x).equal(model(x))
        assert type(fnt.restore(other)) is kind


def test_a_class_that_cannot_be_derived_from_is_left() -> None:
    model = fnt.replace(nn.Sequential(nn.LayerNorm(4), Keyed(4), nn.GroupNorm(2, 4)))
    assert [entry.name for entry in fnt.report(model).left] == ["1"]
    assert "can be derived from Keyed (TypeError" in fnt.report(model)[1].reason
    torch.testing.assert_close(model(torch.ones(2, 4)), torch.zeros(2, 4))


def test_all_of_a_model_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnorm.torch import modules

    class Slotted(nn.Module):
        __slots__ = ("more",)

    found = modules.choice_of
    monkeypatch.setattr(
        modules, "choice_of", lambda m: Slotted if isinstance(m, nn.GroupNorm) else found(m)
    )
    model = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4))
    with pytest.raises(TypeError, match="layout"):
        fnt.replace(model)
    assert [type(m) for m in model] == [nn.LayerNorm, nn.GroupNorm]


def test_forwards_that_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a class that was replaced before, and of PyTorch's own; no class is kept alive."""

    class Local(nn.LayerNorm):
        pass

    model = fnt.replace(Local(4))
    assert type(fnt.replace(Local(4))) is type(model)
    Local.forward = lambda self, x: 2 * x
    assert type(fnt.replace(Local(4))) is Local
    gone = weakref.ref(Local)
    del Local, model
    gc.collect()
    assert gone() is None
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: 2 * x)
    model = fnt.replace(nn.LayerNorm(4))
    assert "forward of its own" in fnt.report(model)[0].reason
    assert model(torch.ones(4)).equal(2 * torch.ones(4))


class MyNorm(nn.Module):
    """One that nothing is known of."""


def test_what_is_left_is_reported() -> None:
    model = nn.ModuleDict(
        {
            "own": Doubled(4), "same": Named(4), "mine": MyNorm(), "lrn": nn.LocalResponseNorm(3),
            "patched": nn.LayerNorm(4), "parametrized": nn.LayerNorm(4), "linear": nn.Linear(4, 4),
            "scripted": torch.jit.trace(nn.LayerNorm(4), torch.randn(2, 4)),
        }
    )  # fmt: skip
    model["patched"].forward = lambda x: x
    nn.utils.parametrize.register_parametrization(model["parametrized"], "weight", nn.Identity())
    before = [(n, kind, "it can be replaced" in why) for n, kind, _, why in fnt.report(model)]
    assert ("same", "Named", True) in before
    fnt.replace(model)
    found = fnt.report(model)
    assert [entry.name for entry in found.replaced] == ["same"]
    reasons = {entry.name: entry.reason for entry in found.left}
    assert "forward of its own" in reasons["own"]
    assert "no class that is known" in reasons["mine"]
    assert "no class that is known" in reasons["lrn"]
    assert "forward of its own" in reasons["patched"]
    assert "parametrized" in reasons["parametrized"]
    assert "linear" not in reasons
    assert str(found).count("\n") == len(found) - 1
    x = torch.randn(3, 4)
    torch.testing.assert_close(model["own"](x), 2 * F.layer_norm(x, (4,)))
    nn.utils.parametrize.register_parametrization(model["same"], "weight", nn.Identity())
    with pytest.raises(ValueError, match="remove_parametrizations"):
        fnt.restore(model)
    (same,) = fnt.report(model).replaced
    assert same.name == "same"
    assert "parametrized" in same.reason
    assert f"replaced: {same.reason}" in str(fnt.report(model))


TRANSFORMERS = {
    "llama.modeling_llama": "LlamaRMSNorm", "t5.modeling_t5": "T5LayerNorm",
    "qwen2.modeling_qwen2": "Qwen2RMSNorm", "gemma.modeling_gemma": "GemmaRMSNorm",
    "olmo2.modeling_olmo2": "Olmo2RMSNorm", "moshi.modeling_moshi": "MoshiRMSNorm",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of what transformers imports
@pytest.mark.parametrize("module", TRANSFORMERS)
def test_norms_of_transformers(module: str) -> None:
    pytest.importorskip("transformers")
    found = pytest.importorskip(f"transformers.models.{module}")
    original = shaken(getattr(found, TRANSFORMERS[module])(8))
    replaced = fnt.replace(copy.deepcopy(original))
    assert len(fnt.report(replaced).replaced) == 1
    replaced = pickle.loads(pickle.dumps(replaced))
    for of_x, of_weight in (("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")):
        x = torch.randn(3, 5, 8).to(getattr(torch, of_x))
        a, b = (model.to(getattr(torch, of_weight))(x) for model in (replaced, original))
        assert a.dtype is b.dtype
        allowed = 2 * max(torch.finfo(a.dtype).eps, torch.finfo(x.dtype).eps)
        torch.testing.assert_close(a, b, rtol=allowed, atol=allowed)
    assert type(fnt.restore(replaced)) is type(original)


class Net(nn.Module):
    """A small convolutional network with three kinds of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3),
            nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(128, 16), nn.LayerNorm(16),
            nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return self.body(x)


class Block(nn.Module):
    """A residual block: two convolutions, a batch norm after each and on the way past them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.past = nn.Conv2d(inside, outside, 1, stride, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(outside) for _ in range(3))

    def forward(self, x: Any) -> Any:
        y = F.silu(self.norm1(self.conv1(x)))  # whose slope no rounding changes at a kink
        return F.silu(self.norm2(self.conv2(y)) + self.norm3(self.past(x)))


def resnet() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), Block(8, 8, 1),
        Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


STEPS = 200


def losses(made: Callable[[], Any], dtype: Any, replaced: bool, seed: int) -> Any:
    """Of a training on random images, of which each is learned by heart."""
    torch.manual_seed(seed)
    model = made()
    if replaced:
        kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
        norms = sum(isinstance(module, kinds) for module in model.modules())
        assert len(fnt.report(fnt.replace(model)).replaced) == norms
    model.to(dtype)
    x, target = torch.randn(16, 3, 8, 8).to(dtype), torch.arange(16) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return np.array(found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("made", [Net, resnet])
def test_two_hundred_training_steps(made: Callable[[], Any], seed: int) -> None:
    """Losses as near to those of float64 as PyTorch's, up to roundings that no one chose."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other at each of so small steps
    try:
        exact = losses(made, torch.float64, False, seed)
        ours, theirs = (losses(made, torch.float32, r, seed) for r in (True, False))
    finally:
        torch.set_num_threads(threads)
    assert exact[-1] < 0.3 * exact[0]
    # a step rounds each weight once, and no such rounding grows into more than one of the loss
    rounding = STEPS * epsilon(F32) * exact[0]
    assert abs(ours - exact).max() < rounding
    assert abs(ours - theirs).max() < rounding + abs(theirs - exact).max()
    np.testing.assert_allclose(losses(made, torch.float64, True, seed), exact, rtol=1e-9)
