"""The norms in PyTorch's operators: what is computed where the kernels cannot be.

That is a second derivative, the gradients of a norm that has no backward function, and any call
under a transform (`tensors.transformed`), of a subclass or on another device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnorm.arguments import (
    channel_axis_of,
    check_ndim,
    fits,
    groups_of,
    layer_axes,
    reduced_axes,
    whole_numbers,
)
from fastnorm.operations import OPERATIONS
from fastnorm.torch.operands import BY_CHANNEL, Named, check, floats, with_tensors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

# PyTorch's own call of each function, by its name; of layer norm also that over any one axis.
_OWN = {op.name: op.torch for op in reversed(OPERATIONS)}
_OF_AXIS = next(op.torch for op in OPERATIONS if op.label == "layer_norm (axis)")

# The norms that have statistics, and what of a call follows them.
NORMS = frozenset(op.name for op in OPERATIONS if op.stats)


def of_x(named: Named) -> bool:
    """Whether statistics come from x, and running ones move."""
    return bool(named.get("training", True) and named.get("use_input_stats", True))


def activated(y: Tensor, activation: Any) -> Tensor:
    """An activation by its name, of PyTorch's."""
    if activation is None:
        return y
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}, expected None or one of "
            f"{', '.join(map(repr, ACTIVATIONS))} where PyTorch computes, as it does for "
            "gradients; write activation=None and call your own function of the result"
        )
    return ACTIVATIONS[activation](y)


def by_pytorch(name: str, named: Named) -> Any:
    """A call by PyTorch's own operator where there is one, else by its formula."""
    named = with_tensors(named)
    of, x = next(iter(named.items()))
    named[of] = x = floats(x, of)
    check(name, named, x)
    out = named.get("out")
    if name in ("add_layer_norm", "add_rms_norm"):
        total = (x + named["residual"]).to(x.dtype)
        rest = {key: value for key, value in named.items() if key not in ("x", "residual")}
        return by_pytorch(name.removeprefix("add_"), {"x": total, "axis": None} | rest), total
    stats: list[Tensor] = []
    if name in NORMS and _is_pytorchs(name, named):
        given = {
            key: value
            for key, value in named.items()
            if key not in ("where", "residual", "activation", "out", "return_stats")
        }
        y = _followed(_of_pytorch(name, given), named)
    else:
        # in the dtype that the kernels compute in
        wide = widened(named, torch.float64 if x.dtype is torch.float64 else torch.float32)
        if name in NORMS:
            y, *stats = norm(name, wide, moves=True)
        else:
            y = own(name, wide)
    y = y.to(x.dtype)
    if out is not None:
        y = out.copy_(y)
    return (y, *stats) if named.get("return_stats") else y


def own(name: str, named: Named) -> Any:
    """PyTorch's call of a function that is none of the five norms."""
    rest = {key: value for key, value in named.items() if key != "out"}
    for key in ("weight", "bias"):
        if rest.get(key) is not None:
            rest[key] = placed(name, named, rest[key])
    if name in _OF_FORMULAS:
        return _OF_FORMULAS[name](**rest)
    return _OWN[name](rest.pop("x"), **rest)  # type: ignore[misc]


def _weight_norm(v: Tensor, g: Tensor, axis: Any) -> Tensor:
    """That of PyTorch has no forward derivative, takes one axis, and gives NaN for zeros."""
    slices = () if axis is None else layer_axes(v, None, axis, "weight_norm")
    others = [a for a in range(v.ndim) if a not in slices]
    kept = [n if a in slices else 1 for a, n in enumerate(v.shape)]
    squares = v.square()
    if others:  # a sum over none would be one over all
        squares = squares.sum(others, keepdim=True)
    return v * (g.reshape(kept) * inverse_root(squares))


def _standardize(x: Tensor, axis: Any, where: Any, ddof: float, eps: float) -> Tensor:
    """That of scipy.stats gives NaN where all elements are equal."""
    if not x.ndim:
        raise ValueError("standardize got one number, expected a tensor to compare it in")
    axes = reduced_axes(x, axis, "standardize")
    mask = None if where is None else where.broadcast_to(x.shape)
    return _scores(x, axes, mask, eps, ddof)


def _weight_standardize(w: Tensor, eps: float) -> Tensor:
    """Batch norm of PyTorch's has no backward where the variance is 0 or nothing is there."""
    check_ndim(w, 2, "weight_standardize", "(C_out, ...)")
    return _scores(w, tuple(range(1, w.ndim)), None, eps)


def _scores(
    x: Tensor, axes: tuple[int, ...], mask: Tensor | None, eps: float, ddof: float = 0
) -> Tensor:
    if not x.numel():
        return x.clone()
    if not axes:
        alone = None if mask is None else mask[..., None]
        return _scores(x[..., None], (x.ndim,), alone, eps, ddof)[..., 0]
    # from one of the elements: where all are equal nothing is left for any rounding to see
    seen = x.detach() if mask is None else torch.where(mask, x.detach(), -math.inf)
    centred = x - seen.amax(axes, keepdim=True)
    centred = centred - _mean(centred, axes, mask)
    variance = _mean(centred.square(), axes, mask)
    if ddof:
        chosen = x.new_ones(x.shape) if mask is None else mask.to(x.dtype)
        count = chosen.sum(axes, keepdim=True)
        variance = variance * torch.where(count > ddof, count / (count - ddof), math.nan)
    return centred * inverse_root(variance + eps)


def _global_response_norm(
    x: Tensor, weight: Any, bias: Any, eps: float, channel_axis: int
) -> Tensor:
    """As of ConvNeXt V2, and of zeros 0 with any eps."""
    channel = channel_axis_of(x, channel_axis, "global_response_norm")
    positions = tuple(a for a in range(1, x.ndim) if a != channel)
    squares = x.square().sum(positions, keepdim=True) if positions else x.square()
    size = squares * inverse_root(squares)
    total = size.mean(channel, keepdim=True) + eps
    nothing = total == 0
    response = torch.where(nothing, 0.0, size / torch.where(nothing, 1.0, total))
    y = x * response * weight + x
    return y if bias is None else y + bias


_OF_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "weight_norm": _weight_norm,
    "standardize": _standardize,
    "weight_standardize": _weight_standardize,
    "global_response_norm": _global_response_norm,
}


def _is_pytorchs(name: str, named: Named) -> bool:
    """Whether PyTorch has this norm with these options."""
    x, axis = named["x"], named.get("axis")
    if named.get("where") is not None or named.get("return_stats") or named.get("weight_offset"):
        return False
    params = ("weight", "bias", "running_mean", "running_var")
    kinds = {named[key].dtype for key in params if isinstance(named.get(key), Tensor)}
    half = x.dtype.itemsize == 2 and name != "rms_norm"
    if not (kinds <= {x.dtype} or (half and kinds == {torch.float32})):
        return False
    # x of half precision and a float32 bias: PyTorch then wants a weight, too
    without_weight = named.get("weight") is None and named.get("bias") is not None
    if name == "instance_norm" and without_weight and kinds != {x.dtype}:
        return False
    if name in BY_CHANNEL:
        own: tuple[int, ...] = (x.shape[named["channel_axis"]],)
    elif axis is None:
        own = _shape(named["normalized_shape"])
    elif name == "layer_norm" and isinstance(axis, int):
        own = (x.shape[axis],)
    else:
        return False
    return all(
        named.get(key) is None or (isinstance(named[key], Tensor) and named[key].shape == own)
        for key in ("weight", "bias")
    )


def _of_pytorch(name: str, given: Named) -> Any:
    given = {key: value for key, value in given.items() if key != "weight_offset"}
    x, axis = given.pop("x"), given.pop("axis", None)
    if axis is not None:
        del given["normalized_shape"]
        return _OF_AXIS(x, axis=axis, **given)  # type: ignore[misc]
    if "normalized_shape" in given:
        given["normalized_shape"] = _shape(given["normalized_shape"])
    return _OWN[name](x, **given)  # type: ignore[misc]


def _shape(value: Any) -> tuple[int, ...]:
    # what a compiler gives is no int to `whole_numbers`
    return tuple(value) if type(value) is tuple else whole_numbers(value, "normalized_shape")


def _followed(y: Tensor, named: Named) -> Tensor:
    """What follows the affine step."""
    if named.get("residual") is not None:
        y = y + named["residual"].to(y.dtype)
    return activated(y, named.get("activation"))


# --- The formula ----------------------------------------------------------------------------------


def placed(name: str, named: Named, parameter: Tensor) -> Tensor:
    """A weight or bias with its axes where they broadcast against x."""
    x = named["x"]
    if name not in NORMS and name != "global_response_norm":
        return _spread(name, x, parameter)
    if "channel_axis" in named:
        axis = channel_axis_of(x, named["channel_axis"], name, samples=name != "batch_norm")
        whole = (1 if axis == 0 else x.shape[0], x.shape[axis])
        if parameter.ndim > 2 or not fits(parameter.shape, whole):
            return _spread(name, x, parameter, least=min(3, x.ndim))
        samples = parameter.reshape((1,) * (2 - parameter.ndim) + tuple(parameter.shape))
        return samples.reshape(tuple(samples.shape) + (1,) * (x.ndim - 2)).movedim(1, axis)
    axes = layer_axes(x, named["normalized_shape"], named["axis"], name)
    if not fits(parameter.shape, tuple(x.shape[axis] for axis in axes)):
        return _spread(name, x, parameter)
    along = axes[len(axes) - parameter.ndim :]
    lengths = dict(zip(along, parameter.shape))
    order = sorted(range(parameter.ndim), key=along.__getitem__)
    return parameter.permute(order).reshape([lengths.get(axis, 1) for axis in range(x.ndim)])


def _spread(name: str, x: Tensor, parameter: Tensor, least: int = 0) -> Tensor:
    """A parameter that has axes of x; refuse one that does not broadcast to x."""
    if parameter.ndim < least or not fits(parameter.shape, x.shape):
        per = "each channel" if least else "the normalized axes"
        raise ValueError(
            f"{name} got a weight or bias of shape {tuple(parameter.shape)} for x of shape "
            f"{tuple(x.shape)}, expected one value for {per}, or a shape of as many dimensions as "
            "x that broadcasts against it; write weight.reshape(...)"
        )
    return parameter


class _View(NamedTuple):
    """How a norm sees x: the axes that share a statistic, and the shapes statistics come in."""

    seen: Tensor
    axes: tuple[int, ...]
    kept: tuple[int, ...]
    handed_out: tuple[int, ...]
    axis: int | None

    def back(self, y: Tensor, x: Tensor) -> Tensor:
        """What was computed of `seen`, along the axes of x."""
        if y.ndim == x.ndim:
            return y
        assert self.axis is not None
        return y.reshape(x.movedim(self.axis, 1).shape).movedim(1, self.axis)


def view_of(name: str, named: Named, x: Tensor) -> _View:
    """x as a norm sees it."""
    if name not in BY_CHANNEL:
        axes = layer_axes(x, named["normalized_shape"], named["axis"], name)
        kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return _View(x, axes, kept, kept, None)
    axis = channel_axis_of(x, named["channel_axis"], name, samples=name != "batch_norm")
    samples, channels = x.shape[0], x.shape[axis]
    if name == "group_norm":
        groups = groups_of(named["num_groups"], channels)
        moved = x.movedim(axis, 1)
        seen = moved.reshape(samples, groups, channels // groups, *moved.shape[2:])
        kept = (samples, groups, *[1] * (x.ndim - 1))
        return _View(seen, tuple(range(2, seen.ndim)), kept, kept[:2], axis)
    if name == "batch_norm":
        axes = tuple(a for a in range(x.ndim) if a != axis)
    else:
        axes = tuple(a for a in range(1, x.ndim) if a != axis)
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    handed_out = (channels,) if name == "batch_norm" else (samples, channels)
    return _View(x, axes, kept, handed_out, axis)


def norm(name: str, named: Named, given: Any = None, *, moves: bool = False) -> tuple[Tensor, ...]:
    """One of the five norms in the dtype of x, and its statistics.

    `given` are the statistics that take the place of those of x. With `moves`, running ones move.
    """
    x, eps = named["x"], named["eps"]
    view = view_of(name, named, x)
    seen, axes, kept, handed_out, axis = view
    if eps is None:
        eps = machine_epsilon(x)
    if given is None and not of_x(named):
        mean, var = (named[key].to(x.dtype) for key in ("running_mean", "running_var"))
        given = mean, inverse_root(var + eps)
    if given is not None:
        # for each channel, or as they are handed out
        places = [n if a == axis else 1 for a, n in enumerate(x.shape)]
        laid = [
            s.to(x.dtype).reshape(places if s.ndim == 1 and axis is not None else kept)
            for s in given
        ]
        centre, rstd = laid if name != "rms_norm" else (None, laid[-1])
        normalised = (seen if centre is None else seen - centre) * rstd
    else:
        mask = named.get("where")
        if mask is not None:
            mask = view_of(name, named, mask.broadcast_to(x.shape)).seen
        centre = None if name == "rms_norm" else _mean(seen, axes, mask)
        centred = seen if centre is None else seen - centre
        variance = _mean(centred.square(), axes, mask)
        rstd = inverse_root(variance + eps)
        normalised = centred * rstd
        if moves and named.get("running_mean") is not None:
            _move(named, view, mask, centre, variance)
    y = view.back(normalised, x)
    weight, bias = named.get("weight"), named.get("bias")
    if weight is not None:
        y = y * (placed(name, named, weight) + named.get("weight_offset", 0.0))
    if bias is not None:
        y = y + placed(name, named, bias)
    y = _followed(y, named)
    stats = [s.detach().double() for s in (centre, rstd) if s is not None]
    return y, *(s.expand(kept).reshape(handed_out) for s in stats)


def _mean(values: Tensor, axes: tuple[int, ...], mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(axes, keepdim=True)
    total = torch.where(mask, values, 0.0).sum(axes, keepdim=True)
    return total / mask.sum(axes, keepdim=True)


def widened(named: Named, dtype: torch.dtype) -> Named:
    """A call whose numbers are in this dtype; what is written to stays what it is."""
    return {
        key: value.to(dtype)
        if isinstance(value, Tensor) and key not in ("where", "out", "running_mean", "running_var")
        else value
        for key, value in named.items()
    }


def machine_epsilon(x: Tensor) -> float:
    """`arguments.machine_epsilon` of a tensor."""
    return torch.finfo(torch.float64 if x.dtype is torch.float64 else torch.float32).eps


def inverse_root(variance: Tensor) -> Tensor:
    """1 / sqrt(variance), and 0 where that is 1 / 0, with derivatives that are numbers."""
    constant = variance == 0
    return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).rsqrt())


def _move(named: Named, view: _View, mask: Tensor | None, mean: Any, variance: Tensor) -> None:
    """Running statistics move, as `execution.update_running` has it."""
    with torch.no_grad():
        shape = view.kept
        count = view.seen.numel() // max(math.prod(shape), 1)
        if mask is None and count < 2:
            return  # nothing is there
        counts = mean.new_full(shape, count)
        if mask is not None:
            counts = mask.sum(view.axes, keepdim=True).to(mean.dtype)
        seen = (counts > 1).reshape(view.handed_out)
        unbiased = variance * (counts / (counts - 1).clamp(min=1))
        for key, batch in (("running_mean", mean), ("running_var", unbiased)):
            new, some = batch.reshape(view.handed_out), seen
            if new.ndim == 2:  # the average of the samples that have values
                new = torch.where(seen, new, 0.0).sum(0) / seen.sum(0)
                some = seen.any(0)
            old, share = named[key], named["momentum"]
            moved = (1 - share) * old + share * new
            old.copy_(torch.where(some, moved, old.to(moved.dtype)))
