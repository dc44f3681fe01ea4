"""What the backends of compiled kernels share: from a pass to the arguments of a kernel."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from fastnorm import machine
from fastnorm._formulas import IN_KERNELS
from fastnorm.arguments import computing_type, ordered, packed_as
from fastnorm.backends.base import sum_to
from fastnorm.layout import Layout, ascending, layout_of
from fastnorm.problem import OPERANDS, Array, BackwardProblem, Problem
from fastnorm.runtime import kernel_threads
from fastnorm.schedule import backward_schedule, forward_schedule

P = TypeVar("P", Problem, BackwardProblem)

# What the kernels call an activation: 0 is none.
_NUMBERS = {None: 0} | {name: n for n, name in enumerate(IN_KERNELS, 1)}


def forward(p: Problem, kernels: Any) -> None:
    """Lay the pass out in five dimensions and run it: in copies if it has none."""
    names = (*OPERANDS, "dy")
    given = {n: array for n in names if (array := getattr(p, n)) is not None}
    given |= {"mean": p.mean, "var": p.var, "stats": p.rstd}
    operands = ascending(given) if min(p.x.strides, default=0) < 0 else given
    layout = layout_of(operands, p.reduced)
    # how a result, a mask or a residual lies decides no bit: where the walk would be another with
    # all of them as x lies they are copied, first the result, in which nothing is read
    asked = not p.given and (layout is None or layout.columns)
    like = _in_order_of_x(operands) if asked else {}
    if p.y is not None and p.y.strides != p.x.strides:
        y = _lying_as(p.x, p.y.dtype)
        if y.strides != p.y.strides:
            turned = {"y": ascending({"x": p.x, "y": y})["y"]}
            own = layout_of(operands | _shown(like, p.x) | turned, p.reduced)
            if layout is None or not layout.sums_as(own):
                forward(replace(p, y=y, ticket=None), kernels)
                p.y[...] = y
                return None
    if like:
        shown = _shown(like, p.x)
        own = layout_of(operands | shown, p.reduced)
        if own is not None and not own.sums_as(layout):
            for packed, part in like.values():
                packed[...] = part
            operands, layout, p.ticket = operands | shown, own, None
    if layout is None and not (p.mask is None and p.residual is None and p.dy is None):
        operands, p.ticket = _read_like_x(operands), None
        layout = layout_of(operands, p.reduced)
    differ = any(a is not None and len(a) > 1 for a in (p.weight, p.bias))
    if differ and _walks_otherwise_alone(p, operands, layout):
        for i in range(len(p.x)):
            forward(_sample(p, i), kernels)
        return None
    if p.total is not None and p.addend is not None and (layout is None or layout.columns):
        # the kernels add on the way only along runs
        with np.errstate(all="ignore"):
            total = p.x.astype(computing_type(p.x.dtype)) + p.addend.astype(
                computing_type(p.x.dtype)
            )
            p.total[...] = total
        p.x, p.addend, p.total, p.ticket = _kept_among_others(p.x, p.total), None, None, None
        return forward(p, kernels)
    y_back = None
    if layout is None:
        # an order of axes that the kernels cannot walk: kept axes first, then reduced, in copies
        order = sorted(range(p.x.ndim), key=lambda axis: p.reduced[axis])
        y_back = p.y.transpose(order) if p.y is not None else None
        operands = {}
        for name, array in given.items():
            moved = array.transpose(order)
            if name == "y":
                moved = np.empty(moved.shape, moved.dtype)
            elif name not in ("mean", "var", "stats"):
                moved = np.ascontiguousarray(moved)
            operands[name] = moved
        reduced = tuple(sorted(p.reduced))
        for name in operands.keys() & {"weight", "bias"}:
            operands[name] = _for_each(operands[name], operands["x"].shape, reduced)
        layout = layout_of(operands, reduced, copied=True)
        assert layout is not None, "contiguous operands always have a layout"
    schedule = forward_schedule(
        layout,
        tuple([(name, operands[name].dtype) for name in names if name in operands]),
        machine.here,
        given=p.given,
        activation=p.activation,
        activation_first=p.activation_first,
    )
    raised = kernels.run_pass(
        layout,
        schedule,
        rstd=operands.pop("stats"),
        **{"y": None, **operands},
        centred=p.centred,
        given=p.given,
        scaling=p.scaling,
        eps=p.eps,
        **({} if p.activation is None else _activation(p, kernels)),
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


def _lying_as(x: Array, dtype: Any) -> Array:
    """An array that lies in memory as x does, backwards where that does, without gaps."""
    turn = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in x.strides)
    y: Array = np.empty_like(x[turn], dtype)[turn]
    return y


def _kept_among_others(x: Array, total: Array) -> Array:
    """`total`, or of one sample that lies between others a copy that lies so: it has their walk."""
    if len(x) != 1:
        return total
    one = packed_as(x, total.dtype)
    if one.strides == total.strides:
        return total
    one[...] = total
    return one


def _for_each(p: Array, shape: tuple[int, ...], reduced: tuple[bool, ...]) -> Array:
    """A parameter with a number for each group, or for each element where it differs within one.

    So it is taken into the scale where it is in a walk without copies, or applied apart.
    """
    within = any(n > 1 for n, r in zip(p.shape, reduced) if r)
    wanted = shape if within else tuple(1 if r else n for n, r in zip(shape, reduced))
    return np.ascontiguousarray(np.broadcast_to(p, wanted))


def _walks_otherwise_alone(
    p: Problem | BackwardProblem, operands: dict[str, Any], layout: Layout | None
) -> bool:
    """Whether a sample with parameters of its own alone has another walk, of other bits.

    Then each goes alone in a batch, too.
    """
    if len(p.x) == 1 or p.reduced[0]:
        return False
    one = layout_of({name: array[:1] for name, array in operands.items()}, p.reduced)
    if layout is None or one is None:
        return layout is not one
    return not layout.goes_through_groups_as(one)


def _sample(p: P, i: int) -> P:
    """The part of a problem that is its i-th sample's."""
    arrays: dict[str, Any] = {f.name: getattr(p, f.name) for f in fields(p)}
    parts: dict[str, Any] = {
        name: array[i : i + 1] if len(array) > 1 else array
        for name, array in arrays.items()
        if isinstance(array, np.ndarray)
    }
    return replace(p, **parts, ticket=None)


def _in_order_of_x(operands: dict[str, Any]) -> dict[str, tuple[Array, Array]]:
    """New arrays for a mask and a residual that do not lie in the order of x, without gaps.

    And what they are to be copies of: of a mask that is broadcast, what is repeated.
    """
    found = {}
    for name in ("mask", "residual"):
        array = operands.get(name)
        if array is None:
            continue
        part = array[tuple([slice(None if step else 1) for step in array.strides])]
        packed = ordered(part.shape, array.dtype, operands["x"].strides)
        if np.broadcast_to(packed, array.shape).strides != array.strides:
            found[name] = packed, part
    return found


def _shown(like: dict[str, tuple[Array, Array]], x: Array) -> dict[str, Array]:
    """These arrays in the shape of x."""
    return {name: np.broadcast_to(packed, x.shape) for name, (packed, _) in like.items()}


def _read_like_x(operands: dict[str, Any]) -> dict[str, Any]:
    """The same with a mask, a residual and dy that lie in memory as x does: copies, if need be."""
    x, found = operands["x"], dict(operands)
    for name in ("mask", "residual", "dy"):
        array = operands.get(name)
        if array is not None and array.strides != _strides_like(x, array):
            found[name] = ordered(x.shape, array.dtype, x.strides)
            found[name][...] = array
    return found


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


def backward(p: BackwardProblem, kernels: Any, copied: bool = False) -> None:
    """Lay a pass back out in five dimensions and run it: in copies if it has none."""
    operands = {"x": p.x, "dy": p.dy, "dx": p.dx, "stats": p.rstd, "dweight": p.dweight}
    optional = {"mean": p.mean, "factor": p.weight, "dbias": p.dbias}
    given = operands | {name: array for name, array in optional.items() if array is not None}
    operands = ascending(given)
    layout = layout_of(operands, p.reduced, copied=copied)
    if p.dy.strides != _strides_like(p.x, p.dy):
        # how dy lies decides no bit: where the walk would be another it is copied to lie as x does
        dy = _lying_as(p.x, p.dy.dtype)
        if dy.strides != p.dy.strides:  # or it would come here again
            own = layout_of(ascending(given | {"dy": dy}), p.reduced, copied=copied)
            if layout is None or not layout.sums_as(own):
                dy[...] = p.dy
                return backward(replace(p, dy=dy, ticket=None), kernels)
    if len(p.dweight) > 1 and _walks_otherwise_alone(p, operands, layout):
        for i in range(len(p.x)):
            backward(_sample(p, i), kernels)
        return None
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
        rstd=operands["stats"],
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
    """An order of axes that the kernels cannot walk: in copies, with weights as in `_for_each`."""
    order, reduced = sorted(range(p.x.ndim), key=lambda i: p.reduced[i]), tuple(sorted(p.reduced))
    x, dy = (np.ascontiguousarray(array.transpose(order)) for array in (p.x, p.dy))
    dx = np.empty_like(x)
    shape = _for_each(p.dweight.transpose(order), x.shape, reduced).shape
    dweight, dbias = np.empty(shape), np.empty(shape)
    backward(
        BackwardProblem(
            x,
            dy,
            dx,
            reduced,
            None if p.mean is None else p.mean.transpose(order),
            p.rstd.transpose(order),
            None if p.weight is None else _for_each(p.weight.transpose(order), x.shape, reduced),
            dweight,
            dbias,
            p.training,
        ),
        kernels,
        copied=True,
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
    given = {"x": x} if mask is None else {"x": x, "mask": mask}
    turn = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in x.strides)
    operands, into = {n: a[turn] for n, a in given.items()}, fields[(slice(None), *turn)]
    layout = layout_of(operands | {"stats": into[0]}, reduced)
    if layout is None and mask is not None:
        operands = _read_like_x(operands)
        layout = layout_of(operands | {"stats": into[0]}, reduced)
    if layout is None:
        # an order of axes that the kernels cannot walk: kept axes first, then reduced, in copies
        order = sorted(range(x.ndim), key=lambda axis: reduced[axis])
        operands = {n: np.ascontiguousarray(a.transpose(order)) for n, a in given.items()}
        into = fields.transpose(0, *(axis + 1 for axis in order))
        layout = layout_of(operands | {"stats": into[0]}, tuple(sorted(reduced)), copied=True)
        assert layout is not None, "contiguous operands always have a layout"
    dtypes = tuple((name, array.dtype) for name, array in operands.items())
    schedule = forward_schedule(layout, dtypes, machine.here)
    kernels.run_moments(layout, schedule, **operands, fields=into, threads=kernel_threads())


def takes_whole(dtype: np.dtype[Any]) -> bool:
    """All but integers of more than two bytes, which are converted."""
    return not (dtype.kind in "iu" and dtype.itemsize > 2)
