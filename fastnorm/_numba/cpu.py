"""The backend: what the Cython kernels offer, carried out by those that Numba compiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastnorm._numba import back_sums
from fastnorm._numba.again import of_backward, of_pass
from fastnorm._numba.blocking import ADDRESSES
from fastnorm._numba.extents import CHECKED, watched
from fastnorm._numba.launch import address, carry_back, carry_out, tabulated, totals
from fastnorm._numba.plans import (
    AT,
    BACK_DATA,
    BACK_OWN,
    DATA,
    Asked,
    AskedBack,
    Strides,
    back_plan_of,
    dtypes_of,
    plan_of,
    tell_in_place,
)
from fastnorm.layout import Layout
from fastnorm.problem import OPERANDS
from fastnorm.repeated import Repeat
from fastnorm.schedule import BackwardSchedule, ForwardSchedule

Array = NDArray[Any]


def _in_five(array: Array, strides: Strides, dims: Strides) -> Array:
    """An array along the five dimensions, 1 long where it is broadcast."""
    shape = tuple(n if stride else 1 for n, stride in zip(dims, strides))
    return as_strided(array, shape, tuple(stride * array.itemsize for stride in strides))


def _converted(
    array: Array, strides: Strides, dims: Strides, computing: Any
) -> tuple[Array, Strides]:
    """A copy in the type that is computed in, and its strides."""
    with np.errstate(all="ignore"):  # a weight of doubles may become infinite
        five = _in_five(array, strides, dims).astype(computing, order="C")
    return five, tuple(
        0 if n == 1 else stride // five.itemsize for n, stride in zip(five.shape, five.strides)
    )


# --- Forward --------------------------------------------------------------------------------------


def _addresses(arrays: Mapping[str, Array | None]) -> dict[str, int]:
    """Where the arrays of a forward pass are, in the order of a record; 0: there is none."""
    given = {name: arrays.get(name) for name in ADDRESSES}
    return {name: 0 if array is None else address(array) for name, array in given.items()}


def run_pass(
    layout: Layout,
    schedule: ForwardSchedule,
    x: Array,
    y: Array | None,
    mean: Array,
    var: Array,
    rstd: Array,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    residual: Array | None = None,
    addend: Array | None = None,
    total: Array | None = None,
    centred: bool = True,
    given: bool = False,
    scaling: int = 0,
    eps: float = 0.0,
    activation: Any = 0,
    activation_first: bool = False,
    threads: int = 1,
    ticket: Any = None,
    statistics: tuple[int, ...] = (),
) -> bool:
    """One pass of `layout` over x into y (None: statistics alone); whether the activation raised.

    Fills mean, var and rstd, or reads the first two where `given`. `activation` is a number, or a
    function that Numba has compiled (`activations`).
    """
    computing = np.float64 if x.dtype == np.float64 else np.float32
    added = []
    for name, array in (("residual", residual), ("addend", addend)):
        if array is not None and array.dtype != x.dtype and array.dtype != computing:
            array, strides = _converted(array, layout.strides[name], layout.dims, computing)
            layout = replace(layout, strides={**layout.strides, name: strides})
        added.append(array)
    residual, addend = added
    arrays = {
        "x": x, "y": y, "residual": residual, "addend": addend, "total": total, "mask": mask,
        "weight": weight, "bias": bias, "mean": mean, "var": var, "rstd": rstd,
    }  # fmt: skip
    dtypes = dtypes_of(**{name: arrays[name] for name in OPERANDS})
    asked = Asked(centred, given, scaling, eps, activation, activation_first)
    plan = plan_of(layout, schedule, dtypes, asked)
    record = plan.template.copy()
    at = _addresses(arrays)
    record[DATA] = list(at.values())
    tell_in_place(record, at["x"], at["residual"], at["y"])
    with watched(record, *arrays.values()):
        table = tabulated(plan, record) if plan.schedule.tabulated else None
    with watched(record, table, *arrays.values()):
        carry_out(plan, record, threads, given=given, written=y is not None)
    if isinstance(ticket, Repeat) and not CHECKED:
        ticket.answer = partial(of_pass, plan, arrays, ticket, eps if given else None)
    return bool(record[AT["raised"]])


def run_moments(
    layout: Layout,
    schedule: ForwardSchedule,
    x: Array,
    fields: Array,
    *,
    mask: Array | None = None,
    threads: int = 1,
) -> None:
    """Moments of x into `fields`: count, mean, its rest, sum of squared deviations, its rest.

    The strides of the first field are the layout's "stats".
    """
    plan = plan_of(layout, schedule, dtypes_of(x=x, mask=mask), Asked())
    record = plan.template.copy()
    first = fields[0]
    at = _addresses({"x": x, "mask": mask, "mean": first, "var": first, "rstd": first})
    record[DATA] = list(at.values())
    record[AT["fields"]] = fields.strides[0]
    with watched(record, x, mask, fields):
        carry_out(plan, record, threads)


# --- Backward -------------------------------------------------------------------------------------


def run_backward(
    layout: Layout,
    schedule: BackwardSchedule,
    x: Array,
    dy: Array,
    dx: Array,
    *,
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    dweight: Array,
    dbias: Array | None,
    centred: bool = True,
    training: bool = True,
    threads: int = 1,
    ticket: Any = None,
    own: tuple[int, ...] = (),
) -> bool:
    """One backward pass of `layout`: fills dx, dweight and, unless it is None, dbias.

    `weight` (None: 1 everywhere) may lie in any order; `dbias` lies as `dweight` does.
    False where there is no kernel: where, among columns, the weight differs from row to row.
    """
    own_weights = layout.strides["dweight"]
    if layout.columns and (own_weights[2] or own_weights[3]):
        return False
    computing = np.float64 if x.dtype == np.float64 else np.float32
    dims, of_dy, weights = layout.dims, layout.strides["dy"], layout.strides.get("factor")
    if dy.dtype != x.dtype and dy.dtype != computing:
        dy, of_dy = _converted(dy, of_dy, dims, computing)
    in_place = weights is not None and weights[3] in (0, 1)
    if weight is not None and weights is not None and not (in_place and weight.dtype == computing):
        weight, weights = _converted(weight, weights, dims, computing)
    dtypes = dtypes_of(x=x, dy=dy, dx=dx, weight=weight)
    asked = AskedBack(centred, training, mean is not None, of_dy, weights)
    plan = back_plan_of(layout, schedule, dtypes, asked)
    sums, terms = np.empty(plan.sums), np.empty(plan.terms)
    collected = np.empty((plan.items, plan.parts, 2, plan.cells))
    record = plan.template.copy()
    operands = (x, dy, dx, weight, mean, rstd)
    record[BACK_DATA] = [0 if array is None else address(array) for array in operands]
    record[-len(BACK_OWN) :] = address(sums), address(terms), address(collected)
    with watched(record, *operands, sums, terms, collected):
        carry_back(plan, record, threads, dims[0] * dims[1], training)
    with np.errstate(all="ignore"):  # of infinities, and beyond half precision
        found = totals(plan, layout, collected if plan.inside else sums)
        for gradient, total in zip((dweight, dbias), found):
            if gradient is None:
                continue
            if plan.flat and gradient.flags.c_contiguous:
                gradient[...] = total.reshape(gradient.shape)
            else:
                five = (*plan.owners, dims[3], 1) if plan.inside else total.shape
                if not plan.inside:
                    five = (*five[:3], 1, five[3]) if layout.columns else (*five, 1)
                _in_five(gradient, own_weights, dims)[...] = total.reshape(five)
    if isinstance(ticket, Repeat) and plan.flat and not CHECKED:
        given = dict(zip(back_sums.OPERANDS, operands))
        ticket.answer = partial(of_backward, plan, layout, given, training, ticket)
    return True
