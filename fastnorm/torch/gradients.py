"""Calls of the kernels that autograd records.

Gradients come from fastnorm's backward functions. What has none, and derivatives of gradients, are
those of the formula in PyTorch's operators (formulas.py), in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fastnorm._formulas import ACTIVATIONS
from fastnorm.arguments import check_flag, same_shape
from fastnorm.operations import OPERATIONS
from fastnorm.torch import formulas, operands
from fastnorm.torch.tensors import (
    PLAIN,
    argument_names,
    array_of,
    finder,
    in_transform,
    is_batched,
    is_plain,
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

# What is an array to the kernels; anything else is an option.
_ARRAYS = operands.OPERANDS | {*RUNNING, "dy", "mean", "rstd"}

# The gradients of activations that the result tells the slope of. That of others is computed anew
# from what was normalised, by the kernels (`activation=` of a backward function): what went into
# the activation is not kept.
_CLIPPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "relu6": lambda dy, y: torch.ops.aten.hardtanh_backward(dy, y, 0, 6),
}


class Kernels:
    """A function of arrays, called with tensors: of plain ones its cache is asked at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.name = function, function.__name__
        self.names = argument_names(function)
        parameters = signature(function).parameters.values()
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.operands = [key for key in self.names if key in operands.OPERANDS]
        self.moves = [key for key in RUNNING if key in self.names]
        self.has_statistics = self.name in formulas.NORMS
        self.find = finder(function, RUNNING, self._record if self.name in _TABLE else None)
        KERNELS[self.name] = self

    def __call__(self, call: tuple[Any, ...]) -> Any:
        """The result, without gradients."""
        found = self.find(call)
        if found is not None:
            return found
        named = dict(zip(self.names, call))
        found = tensor_of(self.function(**{key: _read(v, key) for key, v in named.items()}))
        if self.moves and formulas.of_x(named):
            written(*[named[key] for key in self.moves])
        out = named.get("out")
        if out is None:
            return found
        written(out)
        return (out, *found[1:]) if isinstance(found, tuple) else out

    def _record(self, call: tuple[Any, ...]) -> Any:
        """The result of a call of plain tensors, one of which requires a gradient."""
        if torch.is_inference_mode_enabled():
            return None
        named = settled(dict(zip(self.names, call)))
        if self.moves:
            check_moved(named)
        if self.has_statistics and self._is_simple(named):
            return _apply(self, named, *[named[key] for key in self.operands])
        return recorded(self, named)

    def _is_simple(self, named: Named) -> bool:
        """Whether there is nothing to convert, refuse or do besides the norm itself."""
        activation = named["activation"]
        return (
            (activation is None or (type(activation) is str and activation in ACTIVATIONS))
            and named["out"] is None
            and type(named["return_stats"]) is bool
            and {type(named[key]) for key in self.operands} <= _TENSORS
        )


# All of them, by name.
KERNELS: dict[str, Kernels] = {}

_TENSORS = PLAIN | {type(None)}


def _read(value: Any, key: str) -> Any:
    """A tensor as an array; one in an option's place stays, for the checks to refuse."""
    return array_of(value, key) if key in _ARRAYS else value


def settled(named: Named) -> Named:
    """A call with shapes and axes as tuples: the cache of calls knows those, and a list changes."""
    for key in ("normalized_shape", "axis"):
        if isinstance(named.get(key), torch.Size | list):
            named[key] = tuple(named[key])
    return named


def check_moved(named: Named, plain: bool = True) -> None:
    """Refuse running statistics whose gradient would be lost, or that cannot be written to."""
    for key in RUNNING:
        value = named.get(key)
        if not isinstance(value, Tensor):
            continue
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{key} requires a gradient, expected one that does not: none is computed of it; "
                f"write {key}.detach()"
            )
        if plain and formulas.of_x(named):
            check_written(value, key)


def check_written(tensor: Tensor, name: str) -> None:
    """Refuse memory that cannot hold what would be written."""
    wrong = "negates" if tensor.is_neg() else ""
    if 0 in tensor.stride() and any(
        step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape)
    ):
        wrong = "repeats its elements"
    if wrong:
        raise ValueError(
            f"{name} is a view that {wrong}, expected plain memory to write to; write "
            f"{name}.clone(memory_format=torch.contiguous_format)"
        )


def recorded(kernels: Kernels, named: Named) -> Any:
    """Answer a call with the kernels, differentiable by every tensor that requires a gradient."""
    name = kernels.name
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
        norm = KERNELS[name.removeprefix("add_")]
        named = norm.defaults | named | {"x": total, "residual": None}
        return recorded(norm, {key: named[key] for key in norm.names}), total
    if named.get("activation") is not None:
        formulas.activated(torch.empty(0), named["activation"])  # refuses others
    check_flag(named.get("return_stats", False), "return_stats")
    return _Recorded.apply(kernels, named, *[named[key] for key in kernels.operands])


class _Recorded(torch.autograd.Function):
    """(kernels, a call, its operands) -> y, and its statistics if they are asked for."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, call: Named, *given: Any) -> Any:
        named = call | dict(zip(kernels.operands, given))
        if kernels.has_statistics:
            y, *stats = kernels((*list(named.values())[:-1], True))  # return_stats is the last
        else:
            y, stats = kernels(tuple(named.values())), []
        kept = {key: t for key, t in zip(kernels.operands, given) if isinstance(t, Tensor)}
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.options = kernels, named | dict.fromkeys(kept)
        ctx.like = {key: (kept[key].shape, kept[key].dtype) for key in ADDED if key in kept}
        activation = named.get("activation")
        ctx.clipped = activation in _CLIPPED
        if activation is None or ctx.clipped:
            for key in ctx.like:
                del kept[key]
        ctx.kept = list(kept)
        ctx.save_for_backward(*kept.values(), *stats, *([y] if ctx.clipped else []))
        if not (stats and named["return_stats"]):
            return y
        ctx.mark_non_differentiable(*stats)
        return y, *stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        names = ctx.kernels.operands
        if dy is None:
            return (None,) * (2 + len(names))
        wanted = [key for key, w in zip(names, ctx.needs_input_grad[2:]) if w]
        saved = ctx.saved_tensors  # once: a checkpoint computes them when they are asked for
        named = ctx.options | dict(zip(ctx.kept, saved))
        stats = saved[len(ctx.kept) :]
        if ctx.clipped:
            *stats, y = stats
            dy = _CLIPPED[named["activation"]](dy, y)
            named["activation"] = None
        call = _Call(ctx.kernels.name, named, stats, ctx.like)
        found = call.gradients(dy, wanted, differentiable=torch.is_grad_enabled())
        return None, None, *[found[key] if key in wanted else None for key in names]


# Without what PyTorch's own does for tensors that outlived a transform: plain ones are none.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Recorded).apply


class _Call:
    """A call that was recorded; without what is added to y where no gradient depends on that."""

    def __init__(self, name: str, named: Named, stats: Sequence[Tensor], like: Named) -> None:
        self.name, self.named, self.stats, self.like = name, named, stats, like

    def gradients(self, dy: Tensor, wanted: Sequence[str], *, differentiable: bool) -> Named:
        """By name, and perhaps of others; `differentiable` ones if they are to be recorded."""
        found: Named | None = {}
        activated = self.named.get("activation") is not None
        others = [key for key in wanted if activated or key not in ADDED]
        if others:
            hidden = differentiable or is_batched(dy) or not is_plain(dy)
            hidden = hidden or (activated and not self._bias_is_as_weight())
            found = None if hidden else self._of_kernels(dy)
        if found is None:
            found = self._of_formula(dy, others, differentiable)
        if activated:
            return found
        if "residual" in wanted:
            found["residual"] = dy.to(self.like["residual"][1])
        if "bias" in wanted:
            # one of another shape than the weight shares its gradient otherwise
            bias = found.get("bias")
            if bias is None or (bias.shape, bias.dtype) != self.like["bias"]:
                found["bias"] = self._of_bias(dy, differentiable)
        return found

    def _bias_is_as_weight(self) -> bool:
        """Whether their gradients are alike: the kernels know no other."""
        weight = self.named.get("weight")
        kind = None if weight is None else (weight.shape, weight.dtype)
        return "bias" not in self.like or self.like["bias"] == kind

    def _of_kernels(self, dy: Tensor) -> Named | None:
        """All of them; None without such a kernel, or where PyTorch has to see each operator."""
        name, named, stats = self.name, self.named, self.stats
        if name == "instance_norm" and not named["use_input_stats"]:
            name, named = "batch_norm", named | {"training": False}
            # every sample has those; without samples nothing is computed of them
            stats = [s[0] if len(s) else s.new_zeros(s.shape[1]) for s in stats]
        kernels = KERNELS.get(f"{name}_backward")
        if kernels is None:
            return None
        if 0 in dy.stride():  # as of a sum: every call would make a copy and be described anew
            dy = dy.clone(memory_format=torch.contiguous_format)
        op = _TABLE[name]
        named = named | dict(zip(op.stats, stats), dy=dy, derivative=None)
        call = tuple([named[key] for key in kernels.names])
        found = kernels.find(call)
        if found is None:
            if transformed():
                return None
            found = kernels(call)
        names = op.gradients or ("dx", "dweight", "dbias")
        if name in formulas.NORMS:
            names = (*names[: len(op.stats) + 1], "dresidual")
        return {key[1:]: value for key, value in zip(names, found)}

    def _of_formula(self, dy: Tensor, wanted: Sequence[str], differentiable: bool) -> Named:
        name, named = self.name, self.named
        if name == "rms_norm" and named["eps"] is None:
            named = named | {"eps": formulas.machine_epsilon(operands.floats(named["x"], "x"))}

        def normed(*leaves: Tensor) -> Tensor:
            wide = formulas.widened(named | dict(zip(wanted, leaves)), torch.float64)
            if name not in formulas.NORMS:
                y: Tensor = formulas.own(name, wide)
            else:
                y, *_ = formulas.norm(name, wide, None if formulas.of_x(named) else self.stats)
            return y

        return dict(
            zip(wanted, _pulled(normed, [named[key] for key in wanted], dy, differentiable))
        )

    def _of_bias(self, dy: Tensor, differentiable: bool) -> Tensor:
        shape, dtype = self.like["bias"]
        x = self.named["x"]
        zeros = torch.zeros(shape, dtype=torch.float64, device="cpu")
        (total,) = _pulled(
            lambda bias: formulas.placed(self.name, self.named, bias).expand(x.shape),
            [zeros],
            dy,
            differentiable,
        )
        return total.to(dtype)


def _pulled(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], dy: Tensor, differentiable: bool
) -> Sequence[Tensor]:
    """Gradients of a function in PyTorch's operators, by its arguments."""
    if in_transform() is not None:
        found: Sequence[Tensor] = torch.func.vjp(function, *leaves)[1](dy.double())
        return found
    with torch.enable_grad():
        # views: that operands share memory, or are one tensor, does not count here
        leaves = [
            leaf.view_as(leaf)
            if differentiable and leaf.requires_grad
            else leaf.detach().requires_grad_()
            for leaf in leaves
        ]
        return torch.autograd.grad(
            function(*leaves), leaves, dy.double(), create_graph=differentiable
        )
