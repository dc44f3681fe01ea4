"""The norms as operators of PyTorch's: `torch.ops.fastnorm.layer_norm` and so on.

A compiler does not see through them, so the kernels stay in a compiled or exported graph. What an
operator takes is what the function takes, less what is written to (`out`, running statistics that
move) and what a compiler joins by itself (`residual`, `activation`). It returns y and its
statistics, new memory each. Nothing is registered for autocast: as PyTorch's norms on the CPU,
these keep the dtype of x under it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastnorm.backward
from fastnorm import functional
from fastnorm.operations import OPERATIONS, Operation
from fastnorm.torch import formulas, operands
from fastnorm.torch.gradients import RUNNING, Named
from fastnorm.torch.tensors import array_of, tensor_of

_TABLE = {op.name: op for op in reversed(OPERATIONS) if op.stats}

# The arguments that operators take, and their types in a schema.
_TYPES = {
    "dy": "Tensor", "x": "Tensor", "mean": "Tensor", "rstd": "Tensor",
    "running_mean": "Tensor", "running_var": "Tensor", "weight": "Tensor", "bias": "Tensor",
    "normalized_shape": "SymInt[]", "num_groups": "int", "axis": "int[1]", "channel_axis": "int",
    "training": "bool", "eps": "float", "weight_offset": "float",
}  # fmt: skip

# By running statistics instance norm is batch norm in inference, which has them.
_WITHOUT = {"instance_norm": RUNNING}


def _schema(op: Operation, function: Callable[..., Any], *added: inspect.Parameter) -> str:
    """What an operator takes, which is what the function takes, and returns."""
    found: list[str] = []
    taken = inspect.signature(function).parameters
    # a gradient through an activation, which nothing else asks a bias for
    joined = {"bias"} if "activation" in taken and "dy" in taken else set()
    for parameter in [*taken.values(), *added]:
        key, default = parameter.name, parameter.default
        if key not in _TYPES or key in _WITHOUT.get(op.name, ()) or key in joined:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        if default is parameter.empty:
            found.append(f"{_TYPES[key]} {key}")
        else:
            found.append(f"{_TYPES[key]}{'?' * (default is None)} {key}={default!r}")
    returns = ["Tensor"] * (1 + len(op.stats))
    return f"({', '.join(found)}) -> ({', '.join(returns)})"


class _Operator:
    """One operator: how it reads its arguments, and its rule for a batch (torch.func.vmap)."""

    # The kernels; tensors without numbers, which are otherwise what `compute` returns; gradients.
    compute: Callable[..., tuple[Tensor, ...]]
    fake: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., tuple[Any, ...]]

    def __init__(self, op: Operation, name: str, schema: str) -> None:
        self.op, self.norm, self.name = op, op.name, f"fastnorm::{name}"
        torch.library.define(self.name, schema, lib=_LIBRARY, tags=torch.Tag.pt2_compliant_tag)
        self.call = getattr(torch.ops.fastnorm, name).default
        taken = self.call._schema.arguments
        self.names = [argument.name for argument in taken]
        self.positional = [argument.name for argument in taken if not argument.kwarg_only]
        self.defaults = {a.name: a.default_value for a in taken if a.has_default_value()}
        torch.library.impl(self.name, "CPU", self.compute, lib=_LIBRARY)
        torch.library.register_fake(self.name, self.fake, lib=_LIBRARY)
        torch.library.register_vmap(self.name, self.batched, lib=_LIBRARY)
        keep, gradients = self.keep, self.gradients
        torch.library.register_autograd(self.name, gradients, setup_context=keep, lib=_LIBRARY)

    def named(self, args: tuple[Any, ...], others: Named) -> Named:
        """The arguments by name, those too that PyTorch leaves out as they are defaults."""
        if forward_ad._current_level >= 0:  # PyTorch would take the operator for a constant
            raise NotImplementedError(
                f"{self.name} has no derivative in forward mode; write fastnorm.torch.{self.norm}"
            )
        named = self.defaults | dict(zip(self.names, args)) | others
        # a list is none to the cache of calls
        named = {k: tuple(value) if type(value) is list else value for k, value in named.items()}
        named["x"] = operands.floats(named["x"], "x")
        given = [key for key in RUNNING if named.get(key) is not None]
        if given and named.get("training"):
            raise ValueError(
                f"batch_norm got training=True and {given[0]}, expected one of the two: "
                "operators write to no argument; write running_mean=None, running_var=None, and "
                "move yours by what is returned"
            )
        return named

    def keep(self, ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Named) -> None:
        """What `gradients` needs of a call."""
        named = dict(zip(self.positional, inputs)) | keyword_only_inputs
        if self.norm == "rms_norm" and named["eps"] is None:
            named["eps"] = formulas.machine_epsilon(named["x"])
        ctx.bias = named.pop("bias", None)
        if ctx.bias is not None:
            ctx.bias = ctx.bias.shape, ctx.bias.dtype
        for key in RUNNING:
            value = named.pop(key, None)
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{key} requires a gradient, expected one that does not: none is computed of "
                    f"it; write {key}.detach()"
                )
        ctx.tensors = [key for key, value in named.items() if isinstance(value, Tensor)]
        ctx.options = {key: value for key, value in named.items() if key not in ctx.tensors}
        ctx.save_for_backward(*[named[key] for key in ctx.tensors])

    def ordered(self, ctx: Any, found: Named) -> tuple[Any, ...]:
        """Gradients in the order of the positional arguments, of those that want one."""
        wanted = zip(self.positional, ctx.needs_input_grad)
        return tuple(found.get(key) if needed else None for key, needed in wanted)

    def batched(self, info: Any, in_dims: Any, *args: Any, **others: Any) -> Any:
        """One call after another, for each has its own weights' gradients: each its own bits."""

        def part(value: Any, dim: Any, i: int) -> Any:
            if not isinstance(value, Tensor) or dim is None:
                return value
            # of no calls at all, one tells the shapes
            return value.select(dim, i) if info.batch_size else value.sum(dim)

        calls = [
            self.call(*[part(value, dim, i) for value, dim in zip(args, in_dims)], **others)
            for i in range(max(info.batch_size, 1))
        ]
        found = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*calls))
        return found, (0,) * len(found)


class _Forward(_Operator):
    """(x, its options) -> y, its statistics."""

    def __init__(self, op: Operation) -> None:
        self.function = getattr(functional, op.name)
        super().__init__(op, op.name, _schema(op, self.function))
        self.backward = _Backward(op)

    def compute(self, *args: Any, **others: Any) -> tuple[Tensor, ...]:
        named = self.named(args, others)
        y = torch.empty_like(named["x"])  # its strides are those of the fake to the last one
        arrays = {key: array_of(value, key) for key, value in (named | {"out": y}).items()}
        _, *stats = tensor_of(self.function(**arrays, return_stats=True))
        return y, *stats

    def fake(self, *args: Any, **others: Any) -> tuple[Tensor, ...]:
        named = self.named(args, others)
        operands.check(self.norm, named, named["x"])
        x = named["x"]
        shape = formulas.view_of(self.norm, named, x).handed_out
        stats = [x.new_empty(shape, dtype=torch.float64) for _ in self.op.stats]
        return torch.empty_like(x), *stats

    def keep(self, ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Named) -> None:
        _, *stats = output
        ctx.mark_non_differentiable(*stats)
        super().keep(ctx, inputs, output, keyword_only_inputs | dict(zip(self.op.stats, stats)))

    def gradients(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dy, *_ = grads
        named = ctx.options | dict(zip(ctx.tensors, ctx.saved_tensors))
        dx, dweight, *dbias = self.backward.call(dy=dy, **named)
        found = {"x": dx, "weight": dweight, "bias": dbias[0] if dbias else None}
        if ctx.bias is not None and ctx.bias != (found["bias"].shape, found["bias"].dtype):
            # one of another shape than the weight shares its gradient otherwise
            shape, dtype = ctx.bias
            _, pull = torch.func.vjp(
                lambda bias: formulas.placed(self.norm, named, bias).expand(dy.shape),
                dy.new_zeros(shape, dtype=torch.float64),
            )
            found["bias"] = pull(dy.double())[0].to(dtype)
        return self.ordered(ctx, found)


class _Backward(_Operator):
    """(dy, x, its statistics, its options) -> dx and the gradients of weight and bias.

    eps is for derivatives of these: those of the formula, as in gradients.py.
    """

    def __init__(self, op: Operation) -> None:
        assert op.backward is not None
        self.function = getattr(fastnorm.backward, op.backward)
        self.taken = frozenset(inspect.signature(self.function).parameters)
        eps = inspect.signature(getattr(functional, op.name)).parameters["eps"]
        last = eps.replace(kind=eps.KEYWORD_ONLY)
        super().__init__(op, op.backward, _schema(op, self.function, last))

    def compute(self, *args: Any, **others: Any) -> tuple[Tensor, ...]:
        named = self.named(args, others)
        if 0 in named["dy"].stride():  # as of a sum: every call would be described anew
            named["dy"] = named["dy"].clone(memory_format=torch.contiguous_format)
        arrays = {key: array_of(value, key) for key, value in named.items() if key in self.taken}
        dx, *params = tensor_of(self.function(**arrays))
        like = torch.empty_like(named["x"], device="meta")
        if dx.stride() != like.stride():  # NumPy may sort the axes of an x with gaps otherwise
            dx = torch.empty_like(named["x"]).copy_(dx)
        return dx, *params

    def fake(self, *args: Any, **others: Any) -> tuple[Tensor, ...]:
        named = self.named(args, others)
        operands.check(self.norm, named, named["x"])
        x, weight = named["x"], named["weight"]
        params = [self.weight_like(named) if weight is None else weight for _ in self.op.stats]
        return torch.empty_like(x), *[p.new_empty(p.shape) for p in params]

    def weight_like(self, named: Named) -> Tensor:
        """What the gradients are of where there is no weight."""
        x = named["x"]
        view = formulas.view_of(self.norm, named, x)
        axes = view.axes if view.axis is None else (view.axis,)
        return x.new_ones([x.shape[axis] for axis in axes])

    def gradients(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        named = ctx.options | dict(zip(ctx.tensors, ctx.saved_tensors))
        named["x"] = x = operands.floats(named["x"], "x")
        weight = named.get("weight")
        if weight is None:
            weight = self.weight_like(named)
            named["weight_offset"] = 0.0
        stats = None if formulas.of_x(named) else [named[key] for key in self.op.stats]

        def y(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
            call = named | dict(zip(("x", "weight", "bias"), (x, weight, *bias)))
            return formulas.norm(self.norm, call, stats)[0]

        def gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            params = [weight.double()]
            if "mean" in self.op.stats:
                params.append(torch.zeros_like(params[0]))
            return torch.func.vjp(y, x.double(), *params)[1](dy.double())

        _, pull = torch.func.vjp(gradients, named["dy"], x, weight)
        found = pull(tuple(grad.double() for grad in grads))
        return self.ordered(ctx, dict(zip(("dy", "x", "weight"), found)))


# Operators last as long as this does.
_LIBRARY = torch.library.Library("fastnorm", "FRAGMENT")

OPERATORS = {name: _Forward(op) for name, op in _TABLE.items()}
