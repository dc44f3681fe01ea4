"""fastnorm.torch.library: the norms as operators of PyTorch's, and what PyTorch does with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastnorm.operations import OPERATIONS, Operation

from .helpers import F32, named, run_python

torch = pytest.importorskip("torch")
fnt: Any = pytest.importorskip("fastnorm.torch")
library: Any = pytest.importorskip("fastnorm.torch.library")

operators = torch.ops.fastnorm
grad = torch.autograd.grad

# Its own code for transforms and traces warns of what it uses.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SHAPE = (3, 4, 5, 2)
NORMS = [op for op in OPERATIONS if op.stats]

by_norm = pytest.mark.parametrize("op", NORMS, ids=named)

Named = dict[str, Any]


def plain(x: Any) -> Any:
    return x


def channels_last(x: Any) -> Any:
    return x.to(memory_format=torch.channels_last)


def strided(x: Any) -> Any:
    """The same numbers with gaps in between, and other axes first."""
    memory = torch.zeros(5, 4, 3, 4, dtype=x.dtype)[..., ::2].transpose(0, 2)
    return memory.copy_(x)


def repeated(x: Any) -> Any:
    """The first channel in every channel's place: NumPy and PyTorch order copies differently."""
    return x[:, :1].expand(x.shape)


# Each dtype, each way to lie in memory; weights, those of each sample, none.
VARIANTS = {
    "float32": (torch.float32, plain, {}),
    "float64-channels_last": (torch.float64, channels_last, {"per_sample": True}),
    "bfloat16-strided": (torch.bfloat16, strided, None),
    "float64-repeated": (torch.float64, repeated, None),
}

by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def arguments_of(op: Operation, variant: Any, *, shape: Any = SHAPE) -> Named:
    """x and its options, by name; x and weights require gradients."""
    dtype, lie, weights = variant
    rng = np.random.default_rng(5)
    given = op.parameters(shape, F32, rng, **weights or {})
    if weights is None:
        given = {key: value for key, value in given.items() if key not in ("weight", "bias")}
    if given.get("training", op.name != "batch_norm"):  # what would move
        given.pop("running_mean", None), given.pop("running_var", None)
    x = torch.from_numpy(rng.standard_normal(shape).astype(F32)).to(dtype)
    found = {"x": lie(x) if len(shape) == 4 else x}
    for key, value in given.items():
        found[key] = torch.from_numpy(value).to(dtype) if isinstance(value, np.ndarray) else value
    for key in ("x", "weight", "bias"):
        if key in found:
            found[key] = found[key].detach().requires_grad_()
    return found


def backward_arguments_of(op: Operation, given: Named) -> Named:
    y, *stats = forward_of(op)(**given)
    # numbers that are neither those of x nor all the same
    dy = torch.empty_like(y).copy_(torch.linspace(-1, 2, y.numel()).reshape(y.shape))
    found = {"dy": dy.requires_grad_(), "x": given["x"]} | dict(zip(op.stats, stats))
    return found | {key: given[key] for key in op.backward_keywords if key in given}


def forward_of(op: Operation) -> Any:
    return getattr(operators, op.name)


def backward_of(op: Operation) -> Any:
    return getattr(operators, str(op.backward))


def leaves_of(given: Named) -> list[Any]:
    return [value for value in given.values() if getattr(value, "requires_grad", False)]


def equal(found: Any, wanted: Any) -> bool:
    """Whether all bits are the same, and dtypes and shapes."""
    found, wanted = list(found), list(wanted)
    return len(found) == len(wanted) and all(
        (a is None and b is None) or (a.dtype is b.dtype and torch.equal(a, b))
        for a, b in zip(found, wanted)
    )


def gradients_of(call: Callable[..., Any], given: Named) -> tuple[Any, ...]:
    y, *_ = call(**given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    found: tuple[Any, ...] = grad(y, leaves_of(given), weights)
    return found


# --- Numbers --------------------------------------------------------------------------------------


@by_variant
@by_norm
def test_an_operator_gives_the_bits_of_the_function(op: Operation, variant: Any) -> None:
    given = arguments_of(op, variant)
    function = getattr(fnt, op.name)

    def with_stats(**given: Any) -> Any:
        return function(**given, return_stats=True)

    found, wanted = forward_of(op)(**given), with_stats(**given)
    assert equal(found, wanted)
    assert not any(s.requires_grad for s in found[1:])
    assert equal(gradients_of(forward_of(op), given), gradients_of(with_stats, given))
    with torch.no_grad():
        taken = backward_arguments_of(op, given)
        wanted = getattr(fnt, str(op.backward))(**taken)
        assert equal(backward_of(op)(**taken), wanted)


@by_norm
def test_first_and_second_derivatives(op: Operation) -> None:
    """Those of the operator, and by themselves those of its backward operator."""
    for variant in (VARIANTS["float64-channels_last"], VARIANTS["float64-repeated"]):
        given = arguments_of(op, variant, shape=(2, 4, 3))
        leaves = {k: v for k, v in given.items() if getattr(v, "requires_grad", False)}

        def y(*values: Any, given: Named = given, leaves: Named = leaves) -> Any:
            return forward_of(op)(**given | dict(zip(leaves, values)))[0]

        values = tuple(leaves.values())
        assert torch.autograd.gradcheck(y, values)
        assert torch.autograd.gradgradcheck(y, values)


@by_norm
def test_third_derivatives(op: Operation) -> None:
    given = arguments_of(op, VARIANTS["float64-channels_last"], shape=(2, 4, 3))

    def dx(x: Any) -> Any:
        y, *_ = forward_of(op)(**given | {"x": x})
        return grad(y.pow(3).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(dx, given["x"])


@by_norm
def test_second_derivatives_are_those_of_the_function(op: Operation) -> None:
    """Where eps counts, and what is added to a weight; both are of float64 formulas, rounded."""
    for variant in (VARIANTS["float32"], VARIANTS["float32"][:2] + (None,)):
        given = arguments_of(op, variant)
        given["x"] = (given["x"].detach() * 1e-3).requires_grad_()
        if op.name == "rms_norm":
            given["weight_offset"] = 1.0
        second = []
        for call in (forward_of(op), lambda **given: (getattr(fnt, op.name)(**given),)):
            y, *_ = call(**given)
            dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
            (first,) = grad(y, given["x"], dy * y, create_graph=True)
            second.append(grad(first.square().sum(), leaves_of(given), allow_unused=True))
        for found, wanted in zip(*second):
            assert (found is None) == (wanted is None)
            if wanted is not None:
                size = wanted.abs().max().item()
                assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * size)


def test_a_bias_of_another_shape_than_the_weight() -> None:
    given = arguments_of(NORMS[2], VARIANTS["float32"])
    for key in ("weight", "bias"):
        given[key] = torch.full((5, 2), 0.5, requires_grad=True)
    given |= {"normalized_shape": (5, 2), "weight": given["weight"][:1].detach().requires_grad_()}
    for call in (operators.layer_norm, torch.compile(operators.layer_norm, backend="aot_eager")):
        found = gradients_of(call, given)
        wanted = gradients_of(lambda **given: (fnt.layer_norm(**given),), given)
        assert equal(found, wanted)


def test_integers_are_computed_in_float64() -> None:
    x, weight = torch.arange(12).reshape(3, 4), torch.ones(4, requires_grad=True)
    y, mean, _ = operators.layer_norm(x, [4], weight)
    assert y.dtype is torch.float64
    assert torch.equal(mean.ravel(), torch.tensor([1.5, 5.5, 9.5], dtype=torch.float64))
    (first,) = grad(y.square().sum(), weight, create_graph=True)
    (second,) = grad(first.sum(), weight)
    assert torch.allclose(second, first.detach(), atol=1e-5)  # y is linear in the weight


# --- What PyTorch checks --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS)[:3])
@by_norm
def test_opcheck(op: Operation, variant: str) -> None:
    given = arguments_of(op, VARIANTS[variant])
    torch.library.opcheck(forward_of(op), (), given)
    torch.library.opcheck(backward_of(op), (), backward_arguments_of(op, given))


def steps_of(tensor: Any) -> list[int]:
    """The strides that tell something."""
    there = tensor.numel() > 0
    return [step for n, step in zip(tensor.shape, tensor.stride()) if n > 1 and there]


@by_variant
@by_norm
def test_a_fake_has_every_stride(op: Operation, variant: Any) -> None:
    """Also beside axes of length 1, where nothing is there, and of weights in any order."""
    for shape in (SHAPE, (3, 4, 1, 2), (0, 4, 5, 2), (3, 4, 5, 0)):
        if 0 in shape and op.label == "batch_norm (training)":
            continue  # nothing to take statistics of
        given = arguments_of(op, (variant[0], channels_last, variant[2]), shape=shape)
        if shape == SHAPE:
            given = arguments_of(op, variant)
        elif variant[2]:
            given["weight"] = given["weight"].detach().mT.contiguous().mT.requires_grad_()
        for call, taken in (
            (forward_of(op), given),
            (backward_of(op), backward_arguments_of(op, given)),
        ):
            found = call(**taken)
            with torch._subclasses.FakeTensorMode() as mode:
                fakes = {
                    key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                    for key, value in taken.items()
                }
                fake = call(**fakes)
            assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in found]
            assert [steps_of(t) for t in fake] == [steps_of(t) for t in found]


# --- Graphs ---------------------------------------------------------------------------------------


@by_norm
def test_compiled_forward_and_backward_have_the_bits_of_eager(op: Operation) -> None:
    given = arguments_of(op, VARIANTS["float32"])

    def call(**given: Any) -> Any:
        y, *stats = forward_of(op)(**given)
        return torch.relu(y), *stats

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert equal(compiled(**given), call(**given))
    assert equal(gradients_of(compiled, given), gradients_of(call, given))


def test_one_compilation_serves_batches_of_every_size() -> None:
    compilations = []

    def backend(graph: Any, _: Any) -> Any:
        compilations.append([node.target for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(operators.group_norm, fullgraph=True, backend=backend, dynamic=True)
    for n in (2, 3, 7):
        x = torch.randn(n, 4, 5)
        assert equal(compiled(x, 2), operators.group_norm(x, 2))
    (graph,) = compilations
    assert operators.group_norm in graph  # the kernels are called: nobody sees through


class Block(torch.nn.Module):
    """A module as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: Any) -> Any:
        y, *_ = operators.layer_norm(x, [8], self.norm.weight, self.norm.bias, self.norm.eps)
        return torch.relu(y)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # of PyTorch's own code
def test_an_exported_graph_keeps_the_operator() -> None:
    module, x = Block(), torch.randn(3, 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    assert operators.layer_norm.default in [node.target for node in program.graph.nodes]
    for n in (3, 5):
        x = torch.randn(n, 8)
        assert torch.equal(program.module()(x), module(x))
    decomposed = program.run_decompositions().graph.nodes
    assert operators.layer_norm.default in [node.target for node in decomposed]


# --- Transforms and modes -------------------------------------------------------------------------


@by_norm
def test_a_batch_of_calls_has_the_bits_of_each(op: Operation) -> None:
    given = arguments_of(op, VARIANTS["float32"], shape=(3, 4, 5))
    many = torch.stack([given["x"].detach() * (i + 1) for i in range(3)], 1).requires_grad_()
    others = {key: value for key, value in given.items() if key != "x"}

    def call(x: Any) -> Any:
        return forward_of(op)(x=x, **others)

    for n in (3, 1, 0):
        found = torch.vmap(call, 1)(many[:, :n])
        calls = [call(many[:, i]) for i in range(max(n, 1))]
        wanted = [torch.stack(parts)[:n] for parts in zip(*calls)]
        assert equal(found, wanted)
    found, wanted = torch.vmap(call, 1)(many)[0], torch.stack([call(x)[0] for x in many.unbind(1)])
    dy = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
    assert equal(grad(found, many, dy), grad(wanted, many, dy))
    y, *_ = call(given["x"])  # many gradients of one call: the backward operator's own rule
    dys = torch.stack([torch.ones_like(y), y.detach(), -y.detach()])
    (found,) = grad(y, given["x"], dys, is_grads_batched=True, retain_graph=True)
    one_by_one = [grad(y, given["x"], dy, retain_graph=True)[0] for dy in dys]
    assert torch.equal(found, torch.stack(one_by_one))


def test_a_batch_of_weights() -> None:
    x, weights = torch.randn(3, 8), torch.randn(5, 8)
    found = torch.vmap(lambda w: operators.layer_norm(x, [8], w)[0])(weights)
    assert torch.equal(found, torch.stack([operators.layer_norm(x, [8], w)[0] for w in weights]))


def test_what_pytorch_cannot_differentiate_is_refused_and_never_zero() -> None:
    x = torch.randn(3, 8)

    def loss(x: Any) -> Any:
        return operators.layer_norm(x, [8])[0].pow(3).sum()

    with pytest.raises(NotImplementedError, match=r"forward mode.*fastnorm.torch.layer_norm"):
        torch.func.jvp(loss, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward mode"):
            loss(dual)
    leaf = x.clone().requires_grad_()
    try:
        found = torch.func.grad(loss)(x)
    except RuntimeError:  # so is PyTorch 2.13 with every operator that it records
        pass
    else:
        assert torch.equal(found, grad(loss(leaf), leaf)[0])


@by_norm
def test_autocast_changes_nothing(op: Operation) -> None:
    """As it changes nothing of PyTorch's norms on the CPU."""
    for variant in (VARIANTS["float32"], VARIANTS["bfloat16-strided"]):
        given = arguments_of(op, variant)
        wanted = forward_of(op)(**given), gradients_of(forward_of(op), given)
        with torch.autocast("cpu", torch.bfloat16):
            found = forward_of(op)(**given), gradients_of(forward_of(op), given)
            own = torch.nn.functional.layer_norm(given["x"], (2,))
        assert own.dtype is given["x"].dtype
        assert all(map(equal, found, wanted))


# --- Refused --------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Any, Any], Any]]] = {
    "shape": (ValueError, "trailing shape", lambda o, x: o.layer_norm(x, [3])),
    "neither": (ValueError, "neither", lambda o, x: o.rms_norm(x)),
    "axis": (ValueError, "axis", lambda o, x: o.layer_norm(x, axis=9)),
    "channel_axis": (ValueError, "channel_axis", lambda o, x: o.instance_norm(x, channel_axis=7)),
    "eps": (ValueError, "eps", lambda o, x: o.group_norm(x, 2, eps=-1.0)),
    "both": (
        ValueError,
        "training=True and running_var",
        lambda o, x: o.batch_norm(x, None, x[0, :, 0], training=True),
    ),
    "complex": (TypeError, "complex", lambda o, x: o.layer_norm(x.to(torch.complex64), [5])),
}
# What tensors without numbers pass.
AT_RUN_TIME: dict[str, tuple[type[Exception], str, Callable[[Any, Any], Any]]] = {
    "weight": (ValueError, "weight", lambda o, x: o.layer_norm(x, [5], x[0, :, 0])),
    "statistics": (ValueError, "running_mean", lambda o, x: o.batch_norm(x)),
    "gradient": (
        ValueError,
        "running_mean requires a gradient",
        lambda o, x: o.batch_norm(x, x[0, :, 0].detach().requires_grad_(), x[0, :, 0]),
    ),
}


@pytest.mark.parametrize("case", REFUSED | AT_RUN_TIME)
def test_wrong_arguments_are_refused(case: str) -> None:
    kind, match, call = (REFUSED | AT_RUN_TIME)[case]
    with pytest.raises(kind, match=match):
        call(operators, torch.ones(3, 4, 5))
    if case in REFUSED:
        with torch._subclasses.FakeTensorMode(), pytest.raises(kind, match=match):
            call(operators, torch.ones(3, 4, 5))


@pytest.mark.parametrize("training", [True, False])
def test_channels_in_place_of_samples(training: bool) -> None:
    """Batch norm with its channels on axis 0: whoever answers, statistics are those of channels."""
    x = torch.arange(20.0).reshape(4, 5).square()
    running = {} if training else {"running_mean": x[:, 0], "running_var": x[:, 4]}
    named = {"x": x, "training": training, "channel_axis": 0, "weight": x[:, 1], **running}
    torch.library.opcheck(operators.batch_norm.default, (), named)
    right = fnt.batch_norm(**named, return_stats=True)
    compiled = torch.compile(operators.batch_norm, backend="aot_eager")(**named)
    mapped = torch.vmap(lambda x: fnt.batch_norm(**named | {"x": x}, return_stats=True))(x[None])
    for expected, one, (many,) in zip(right, compiled, mapped, strict=True):
        assert torch.equal(one, expected)
        torch.testing.assert_close(many, expected)  # by the formula


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_groups_that_do_not_divide(device: str) -> None:
    x = torch.empty(2, 6, 3, device=device)
    for groups in (4, 0, -2, 2**31, -(2**63)):
        with pytest.raises(ValueError, match=f"num_groups={groups} does not divide the 6 channels"):
            operators.group_norm(x, groups)
        with pytest.raises(ValueError, match=f"num_groups={groups} does not divide the 6 channels"):
            operators.group_norm_backward(x, x, x.new_ones(2, 2), x.new_ones(2, 2), groups)


def test_operators_are_there_once_they_are_asked_for() -> None:
    """Registration takes longer than an import may."""
    run = run_python(
        "-c",
        "import torch, fastnorm.torch; print(hasattr(torch.ops.fastnorm, 'layer_norm'))\n"
        "import fastnorm.torch.library; print(hasattr(torch.ops.fastnorm, 'layer_norm'))",
    )
    assert run.stdout.split() == ["False", "True"], run.stderr
    assert set(library.OPERATORS) == {op.name for op in NORMS}
