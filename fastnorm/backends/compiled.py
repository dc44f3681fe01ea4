"""What the backends of compiled kernels share: from a pass to the arguments of a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm import machine
from fastnorm._reference import IN_KERNELS
from fastnorm.arguments import computing_type
from fastnorm.backends.base import sum_to
from fastnorm.layout import Layout, ascending, describe, steps_of
from fastnorm.problem import BackwardProblem, Problem
from fastnorm.runtime import kernel_threads
from fastnorm.schedule import backward_schedule, forward_schedule

Array = NDArray[Any]

# What the kernels call an activation: 0 is none.
_NUMBERS = {None: 0} | {name: n for n, name in enumerate(IN_KERNELS, 1)}

# operands in the order of the kernels' signature; all but the statistics may be absent
_OPERANDS = ("x", "y", "residual", "addend", "total", "mask", "weight", "bias")


def _layout_of(operands: dict[str, Array], reduced: tuple[bool, ...]) -> Layout | None:
    shape = operands["x"].shape
    steps = {
        "stats" if name == "rstd" else name: steps_of(array, shape)
        for name, array in operands.items()
        if name not in ("mean", "var")
    }
    return describe(shape, reduced, tuple(steps.items()))


def forward(p: Problem, kernels: Any) -> None:
    """Lay the pass out in five dimensions and run it: in copies if it has none."""
    given = {n: array for n in _OPERANDS if (array := getattr(p, n)) is not None}
    given |= {"mean": p.mean, "var": p.var, "rstd": p.rstd}
    operands = ascending(given) if min(p.x.strides, default=0) < 0 else given
    layout = _layout_of(operands, p.reduced)
    if p.total is not None and p.addend is not None and (layout is None or layout.columns):
        # the kernels add on the way only along runs
        with np.errstate(all="ignore"):
            total = p.x.astype(computing_type(p.x.dtype)) + p.addend.astype(
                computing_type(p.x.dtype)
            )
            p.total[...] = total
        p.x, p.addend, p.total, p.ticket = p.total, None, None, None
        return forward(p, kernels)
    y_back = None
    if layout is None:
        # an order of axes that the kernels cannot walk: kept axes first, then reduced, in copies
        order = sorted(range(p.x.ndim), key=lambda axis: p.reduced[axis])
        y_back = p.y.transpose(order) if p.y is not None else None
        for name, array in given.items():
            moved = array.transpose(order)
            if name in ("weight", "bias"):
                moved = np.broadcast_to(moved, tuple(p.x.shape[axis] for axis in order))
            if name in ("mean", "var", "rstd"):
                operands[name] = moved
            else:
                operands[name] = (
                    np.empty(moved.shape, moved.dtype)
                    if name == "y"
                    else (np.ascontiguousarray(moved))
                )
        layout = _layout_of(operands, tuple(sorted(p.reduced)))
        assert layout is not None, "contiguous operands always have a layout"
    activation: dict[str, Any] = {"activation": 0}
    if p.activation is not None:
        activation = _activation(p, kernels)
    schedule = forward_schedule(
        layout,
        tuple((name, operands[name].dtype) for name in _OPERANDS if name in operands),
        machine.here,
        given=p.given,
        activation=p.activation,
        activation_first=p.activation_first,
    )
    raised = kernels.run_pass(
        layout,
        schedule,
        operands["x"],
        operands.get("y"),
        operands["mean"],
        operands["var"],
        operands["rstd"],
        weight=operands.get("weight"),
        bias=operands.get("bias"),
        mask=operands.get("mask"),
        residual=operands.get("residual"),
        addend=operands.get("addend"),
        total=operands.get("total"),
        centred=p.centred,
        given=p.given,
        scaling=p.scaling,
        eps=p.eps,
        **activation,
        activation_first=p.activation_first,
        threads=kernel_threads(),
        ticket=p.ticket if y_back is None else None,
        statistics=p.statistics,
    )
    if raised:
        from fastnorm._numba import activations

        activations.raise_again(p.activation, computing_type(p.x.dtype))
    if y_back is not None:
        y_back[...] = operands["y"]
    return None


def _activation(p: Problem, kernels: Any) -> dict[str, Any]:
    """A number, or where Numba has compiled the function, that or the address of its loop."""
    if not callable(p.activation):
        return {"activation": _NUMBERS[p.activation]}
    if not hasattr(kernels, "register_activation"):
        return {"activation": p.activation}
    from fastnorm._numba import activations

    kind = computing_type(p.x.dtype)
    address = activations.address_of(p.activation, kind)
    double = kind is np.float64
    kernels.register_activation(p.activation, double, address, activations.raise_again)
    return {"user": address}


def backward(p: BackwardProblem, kernels: Any) -> None:
    """Lay a pass back out in five dimensions and run it: in copies if it has none."""
    operands = {"x": p.x, "dy": p.dy, "dx": p.dx, "rstd": p.rstd, "dweight": p.dweight}
    if p.mean is not None:
        operands["mean"] = p.mean
    beside = {"factor": p.weight, "dbias": p.dbias}
    operands |= {name: array for name, array in beside.items() if array is not None}
    operands = ascending(operands)
    described = {name: array for name, array in operands.items() if name != "dbias"}
    layout = _layout_of(described, p.reduced)
    if layout is None and p.dy.strides != _strides_like(p.x, p.dy):
        dy = np.empty_like(p.x, p.dy.dtype)
        if dy.strides != p.dy.strides:  # or it would come here again
            dy[...] = p.dy
            return backward(replace(p, dy=dy, ticket=None), kernels)
    if layout is None:
        return _spread_backward(p, kernels)
    full = {"x": p.x, "dy": p.dy, "dx": p.dx, "weight": p.weight}
    schedule = backward_schedule(
        layout, tuple((name, a.dtype) for name, a in full.items() if a is not None), machine.here,
        training=p.training,
    )  # fmt: skip
    walked = kernels.run_backward(
        layout,
        schedule,
        operands["x"],
        operands["dy"],
        operands["dx"],
        mean=operands.get("mean"),
        rstd=operands["rstd"],
        weight=operands.get("factor"),
        dweight=operands["dweight"],
        dbias=operands.get("dbias"),
        centred=p.mean is not None,
        training=p.training,
        threads=kernel_threads(),
        ticket=p.ticket,
        own=p.own,
    )
    if not walked:
        _spread_backward(p, kernels)
    return None


def _strides_like(array: Array, other: Array) -> tuple[int, ...]:
    """The strides of `array` if its elements were as large as those of `other`."""
    return tuple(stride // array.itemsize * other.itemsize for stride in array.strides)


def _spread_backward(p: BackwardProblem, kernels: Any) -> None:
    """An order of axes that the kernels cannot walk: in copies, a weight for each element."""
    order = sorted(range(p.x.ndim), key=lambda axis: p.reduced[axis])

    def copied(array: Array) -> Array:
        return np.ascontiguousarray(np.broadcast_to(array, p.x.shape).transpose(order))

    x, dy = copied(p.x), copied(p.dy)
    dx, dweight, dbias = np.empty_like(x), np.empty(x.shape), np.empty(x.shape)
    backward(
        BackwardProblem(
            x,
            dy,
            dx,
            tuple(sorted(p.reduced)),
            None if p.mean is None else p.mean.transpose(order),
            p.rstd.transpose(order),
            None if p.weight is None else copied(p.weight),
            dweight,
            dbias,
            p.training,
        ),
        kernels,
    )
    back = np.argsort(order)
    p.dx[...] = dx.transpose(back)
    for gradient, elements in ((p.dweight, dweight), (p.dbias, dbias)):
        if gradient is not None:
            sum_to(gradient, elements.transpose(back))


def moments(
    x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array, kernels: Any
) -> None:
    """Lay x out in five dimensions and take its moments: in copies if it has none."""
    given = {"x": x, "fields": fields} | ({} if mask is None else {"mask": mask})
    turn = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in x.strides)
    operands = {n: a[(slice(None), *turn)] if n == "fields" else a[turn] for n, a in given.items()}
    layout = _moments_layout(operands, reduced)
    if layout is None:
        # an order of axes that the kernels cannot walk: kept axes first, then reduced, in copies
        order = sorted(range(x.ndim), key=lambda axis: reduced[axis])
        operands = {
            n: np.ascontiguousarray(a.transpose(order)) for n, a in given.items() if a is not fields
        }
        operands["fields"] = fields.transpose(0, *(axis + 1 for axis in order))
        layout = _moments_layout(operands, tuple(sorted(reduced)))
        assert layout is not None, "contiguous operands always have a layout"
    dtypes = tuple((name, a.dtype) for name, a in operands.items() if name != "fields")
    schedule = forward_schedule(layout, dtypes, machine.here)
    kernels.run_moments(layout, schedule, **operands, threads=kernel_threads())


def _moments_layout(operands: dict[str, Array], reduced: tuple[bool, ...]) -> Layout | None:
    first = {"rstd": operands["fields"][0]}
    return _layout_of({n: a for n, a in operands.items() if n != "fields"} | first, reduced)
