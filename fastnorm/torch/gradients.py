"""Calls of the kernels that autograd records.

Gradients come from fastnorm's backward functions. What has none, and derivatives of gradients, are
those of the formula in PyTorch's operators (formulas.py), in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastnorm.backward
import fastnorm.elementwise
from fastnorm.arguments import check_flag, same_shape
from fastnorm.operations import OPERATIONS
from fastnorm.torch import formulas, operands
from fastnorm.torch.tensors import (
    argument_names,
    array_of,
    is_batched,
    tensor_of,
    transformed,
    written,
)

Named = dict[str, Any]

_TABLE = {op.name: op for op in OPERATIONS}

# What moves, and what gradients do not depend on.
RUNNING = ("running_mean", "running_var")

# What is added to the result, and what gradients do not depend on either.
ADDED = ("bias", "residual")

# The gradients of activations that the result tells the slope of: the kernels' pass includes them,
# and nothing else is kept. Of others autograd keeps what the norm gives.
_CLIPPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "relu6": lambda dy, y: torch.ops.aten.hardtanh_backward(dy, y, 0, 6),
}

_BACKWARD = {
    name.removesuffix("_backward"): getattr(module, name)
    for module in (fastnorm.backward, fastnorm.elementwise)
    for name in module.__all__
    if name.endswith("_backward")
}
_TAKEN = {name: frozenset(argument_names(f)) for name, f in _BACKWARD.items()}


def arrays_of(named: Named) -> Named:
    """A call's tensors as arrays; one in an option's place stays, for the checks to refuse."""
    return {
        key: array_of(value, key) if key in operands.OPERANDS or key in RUNNING else value
        for key, value in named.items()
    }


def recorded(function: Callable[..., Any], named: Named) -> Any:
    """Answer a call with the kernels, differentiable by every tensor that requires a gradient."""
    name = function.__name__
    if named.get("out") is not None:
        raise ValueError(
            f"{name} got out= and a tensor that requires a gradient, expected one of the two; "
            "leave out= away, or write torch.no_grad() around the call"
        )
    named = operands.with_tensors(named)
    if name in ("add_layer_norm", "add_rms_norm"):
        # the norm is of the rounded sum, so this is the same
        same_shape(array_of(named["residual"], "residual"), "residual", array_of(named["x"], "x"))
        x = operands.floats(named["x"], "x")
        total = (x + named["residual"]).to(x.dtype)
        norm = getattr(fastnorm.functional, name.removeprefix("add_"))
        rest = {key: value for key, value in named.items() if key not in ("x", "residual")}
        return recorded(norm, {"x": total, "axis": None} | rest), total
    activation = named.get("activation")
    if activation is not None:
        formulas.activated(named["x"].new_empty(0), activation)  # is it one of PyTorch's?
        if activation in _CLIPPED:
            activation = None  # the kernels' own
        else:
            named["activation"] = None
    check_flag(named.get("return_stats", False), "return_stats")
    if name == "rms_norm" and named["eps"] is None:
        named["eps"] = formulas.machine_epsilon(named["x"])
    names = [k for k, v in named.items() if isinstance(v, Tensor) and k in operands.OPERANDS]
    options = {key: value for key, value in named.items() if key not in names}
    y, *stats = _Recorded.apply(function, options, names, *[named[key] for key in names])
    y = formulas.activated(y, activation)
    return (y, *stats) if named.get("return_stats") else y


class _Recorded(torch.autograd.Function):
    """(function, options, names of the tensors, tensors) -> y and its statistics, if there are."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Any],
        options: Named,
        names: Sequence[str],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        name = function.__name__
        named = options | dict(zip(names, tensors))
        arrays = arrays_of(named)
        if name in formulas.NORMS:
            arrays["return_stats"] = True
            y, *stats = tensor_of(function(**arrays))
        else:
            y, stats = tensor_of(function(**arrays)), []
        if formulas.of_x(named):
            written(*[named.get(key) for key in RUNNING])
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        kept = [t for key, t in zip(names, tensors) if key not in ADDED]
        ctx.clipped = options.get("activation")
        ctx.save_for_backward(*kept, *stats, *([y] if ctx.clipped else []))
        ctx.like = {key: (t.shape, t.dtype) for key, t in zip(names, tensors)}
        ctx.function, ctx.options, ctx.names = name, options, names
        return y, *stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * (3 + len(ctx.names))
        wanted = [key for key, w in zip(ctx.names, ctx.needs_input_grad[3:]) if w]
        kept = [key for key in ctx.names if key not in ADDED]
        saved = ctx.saved_tensors  # once: a checkpoint computes them when they are asked for
        named = ctx.options | dict(zip(kept, saved))
        named |= {key: None for key in ADDED if key in ctx.names}
        stats = saved[len(kept) :]
        if ctx.clipped:
            *stats, y = stats
            named["activation"], dy = None, _CLIPPED[ctx.clipped](dy, y)
        call = _Call(ctx.function, named, stats, ctx.like)
        found = call.gradients(dy, wanted, differentiable=torch.is_grad_enabled())
        return None, None, None, *[found.get(key) for key in ctx.names]


class _Call:
    """A call that was recorded, without what is added to y: no other gradient depends on that."""

    def __init__(self, name: str, named: Named, stats: Sequence[Tensor], like: Named) -> None:
        self.name, self.named, self.stats, self.like = name, named, stats, like

    def gradients(self, dy: Tensor, wanted: Sequence[str], *, differentiable: bool) -> Named:
        """By name, and perhaps of others; `differentiable` ones if they are to be recorded."""
        op, found = _TABLE[self.name], {}
        others = [key for key in wanted if key not in ADDED]
        hidden = transformed() or is_batched(dy)
        if others and (differentiable or hidden or not (op.stats or op.gradients)):
            found = self._of_formula(dy, others, differentiable)
        elif others:
            found = self._of_kernels(dy)
        if "residual" in wanted:
            found["residual"] = dy.to(self.like["residual"][1])
        if "bias" in wanted:
            # one of another shape than the weight shares its gradient otherwise
            bias = found.get("bias")
            if bias is None or (bias.shape, bias.dtype) != self.like["bias"]:
                found["bias"] = self._of_bias(dy, differentiable)
        return found

    def _of_kernels(self, dy: Tensor) -> Named:
        name, named, stats = self.name, self.named, self.stats
        if name == "instance_norm" and not named["use_input_stats"]:
            name, named = "batch_norm", named | {"training": False}
            # every sample has those; without samples nothing is computed of them
            stats = [s[0] if len(s) else s.new_zeros(s.shape[1]) for s in stats]
        op = _TABLE[name]
        function = _BACKWARD[name]
        takes = _TAKEN[name]
        arrays = {key: array_of(value, key) for key, value in named.items() if key in takes}
        arrays |= {key: array_of(value, key) for key, value in zip(op.stats, stats)}
        if 0 in dy.stride():  # as of a sum: every call would make a copy and be described anew
            dy = dy.clone(memory_format=torch.contiguous_format)
        found = tensor_of(function(dy=array_of(dy, "dy"), **arrays))
        names = op.gradients or ("dx", "dweight", "dbias")
        return {key.removeprefix("d"): value for key, value in zip(names, found)}

    def _of_formula(self, dy: Tensor, wanted: Sequence[str], differentiable: bool) -> Named:
        name, named = self.name, self.named
        with torch.enable_grad():
            # views: that operands share memory, or are one tensor, does not count here
            leaves = {
                key: named[key].view_as(named[key])
                if differentiable
                else named[key].detach().requires_grad_()
                for key in wanted
            }
            wide = formulas.widened(named | leaves, torch.float64)
            if name not in formulas.NORMS:
                y = formulas.own(name, wide)
            else:
                y, *_ = formulas.norm(name, wide, None if formulas.of_x(named) else self.stats)
            found = torch.autograd.grad(
                y, list(leaves.values()), dy.double(), create_graph=differentiable
            )
        return dict(zip(leaves, found))

    def _of_bias(self, dy: Tensor, differentiable: bool) -> Tensor:
        shape, dtype = self.like["bias"]
        x = self.named["x"]
        with torch.enable_grad():
            bias = torch.zeros(shape, dtype=torch.float64, device="cpu", requires_grad=True)
            along = formulas.placed(self.name, self.named, bias)
            (total,) = torch.autograd.grad(
                along.expand(x.shape), bias, dy.double(), create_graph=differentiable
            )
        return total.to(dtype)
