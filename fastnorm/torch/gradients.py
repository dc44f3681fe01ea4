"""Calls of the kernels that autograd records.

Gradients come from fastnorm's backward functions. What has none, and derivatives of gradients, are
those of the formula in PyTorch's operators (formulas.py), in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature
from operator import itemgetter
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

# What may be a list, which the caller can change, or a torch.Size: the cache of calls knows tuples.
SHAPES = ("normalized_shape", "axis")

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
        # where in a call each argument is, the operands are, and what may be a list
        self.at = {key: n for n, key in enumerate(self.names)}
        self.operands = [key for key in self.names if key in operands.OPERANDS]
        self.places = [self.at[key] for key in self.operands]
        self.shapes = [self.at[key] for key in SHAPES if key in self.at]
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
        for n in self.shapes:
            if isinstance(call[n], torch.Size | list):
                call = (*call[:n], tuple(call[n]), *call[n + 1 :])
        if self.moves:
            check_moved(dict(zip(self.names, call)))
        if self.has_statistics and self._is_simple(call):
            return _apply(self, call, *[call[n] for n in self.places])
        return recorded(self, dict(zip(self.names, call)))

    def _is_simple(self, call: tuple[Any, ...]) -> bool:
        """Whether there is nothing to convert, refuse or do besides the norm itself."""
        activation = call[self.at["activation"]]
        return (
            (activation is None or (type(activation) is str and activation in ACTIVATIONS))
            and call[self.at["out"]] is None
            and type(call[-1]) is bool
            and {type(call[n]) for n in self.places} <= _TENSORS
        )

    @cached_property
    def backward(self) -> _Backward | None:
        """What computes its gradients."""
        kernels = KERNELS.get(f"{self.name}_backward")
        return None if kernels is None else _Backward(self, kernels)


class _Backward:
    """A backward function, and how its calls and results follow from those of the forward one."""

    def __init__(self, forward: Kernels, kernels: Kernels) -> None:
        op = _TABLE[forward.name]
        self.kernels = kernels
        # a call of the forward function, then what follows it in `gradients`
        at = {key: n for n, key in enumerate((*forward.names, "derivative", "dy", *op.stats))}
        self.pick = itemgetter(*[at[key] for key in kernels.names])
        names = op.gradients or ("dx", "dweight", "dbias")
        if forward.has_statistics:
            names = (*names[: len(op.stats) + 1], "dresidual")
        self.names = [key[1:] for key in names]

    def gradients(self, call: Sequence[Any], dy: Tensor, stats: Sequence[Tensor]) -> Named | None:
        """By name; None where PyTorch has to see each operator."""
        if 0 in dy.stride():  # as of a sum: every call would make a copy and be described anew
            dy = dy.clone(memory_format=torch.contiguous_format)
        of = self.pick((*call, None, dy, *stats))
        found = self.kernels.find(of)
        if found is None:
            if transformed():
                return None
            found = self.kernels(of)
        return dict(zip(self.names, found))


# All of them, by name.
KERNELS: dict[str, Kernels] = {}

_TENSORS = PLAIN | {type(None)}


def _read(value: Any, key: str) -> Any:
    """A tensor as an array; one in an option's place stays, for the checks to refuse."""
    return array_of(value, key) if key in _ARRAYS else value


def settled(named: Named) -> Named:
    """A call with shapes and axes as tuples."""
    for key in SHAPES:
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
    call = tuple([named[key] for key in kernels.names])
    return _Recorded.apply(kernels, call, *[call[n] for n in kernels.places])


class _Recorded(torch.autograd.Function):
    """(kernels, a call, its operands) -> y, and its statistics if they are asked for."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, call: tuple[Any, ...], *given: Any) -> Any:
        options = list(call)
        for n, value in zip(kernels.places, given):
            options[n] = value
        if kernels.has_statistics:
            y, *stats = kernels((*options[:-1], True))  # return_stats is the last
        else:
            y, stats = kernels(tuple(options)), []
        at = kernels.at.get("activation")
        activation = None if at is None else call[at]
        ctx.clipped = activation in _CLIPPED
        added_last = activation is None or ctx.clipped
        like, places, kept = {}, [], []
        for key, n, value in zip(kernels.operands, kernels.places, given):
            if isinstance(value, Tensor):
                options[n] = None
                if key in ADDED:
                    like[key] = (value.shape, value.dtype)
                    if added_last:
                        continue
                places.append(n)
                kept.append(value)
        if ctx.clipped:
            kept.append(y)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *stats)
        ctx.kernels, ctx.options, ctx.places, ctx.like = kernels, options, places, like
        if not (stats and call[-1]):
            return y
        ctx.mark_non_differentiable(*stats)
        return y, *stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        kernels, places = ctx.kernels, ctx.places
        if dy is None:
            return (None,) * (2 + len(kernels.operands))
        saved = ctx.saved_tensors  # once: a checkpoint computes them when they are asked for
        call = ctx.options.copy()
        for n, value in zip(places, saved):
            call[n] = value
        stats = saved[len(places) :]
        if ctx.clipped:
            y, *stats = stats
            at = kernels.at["activation"]
            dy, call[at] = _CLIPPED[call[at]](dy, y), None
        needs = ctx.needs_input_grad[2:]
        wanted = [key for key, needed in zip(kernels.operands, needs) if needed]
        found = _Call(kernels, call, stats, ctx.like).gradients(
            dy, wanted, differentiable=torch.is_grad_enabled()
        )
        return None, None, *[found[key] if w else None for key, w in zip(kernels.operands, needs)]


# Without what PyTorch's own does for tensors that outlived a transform: plain ones are none.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Recorded).apply


class _Call:
    """A call that was recorded; without what is added to y where no gradient depends on that."""

    def __init__(
        self, kernels: Kernels, call: Sequence[Any], stats: Sequence[Tensor], like: Named
    ) -> None:
        self.kernels, self.call, self.stats, self.like = kernels, call, stats, like
        self.name = kernels.name

    @cached_property
    def named(self) -> Named:
        return dict(zip(self.kernels.names, self.call))

    def gradients(self, dy: Tensor, wanted: Sequence[str], *, differentiable: bool) -> Named:
        """By name, and perhaps of others; `differentiable` ones if they are to be recorded."""
        at = self.kernels.at.get("activation")
        activated = at is not None and self.call[at] is not None
        others = wanted if activated else [key for key in wanted if key not in ADDED]
        found: Named | None = {}
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
        kernels, call, stats = self.kernels, self.call, self.stats
        if self.name == "instance_norm" and not self.named["use_input_stats"]:
            kernels = KERNELS["batch_norm"]
            named = kernels.defaults | self.named | {"training": False}
            call = [named[key] for key in kernels.names]
            # every sample has those; without samples nothing is computed of them
            stats = [s[0] if len(s) else s.new_zeros(s.shape[1]) for s in stats]
        backward = kernels.backward
        return None if backward is None else backward.gradients(call, dy, stats)

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
