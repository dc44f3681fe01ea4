"""The backend: from a layout and its schedule to a call of a compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fastnorm._numba import activations, columns, plan, runs, threads
from fastnorm._numba.backward import run_backward
from fastnorm._numba.compiling import SOURCES, compiling
from fastnorm._numba.operands import (
    Array,
    array_type,
    computed,
    converted,
    flat,
    nothing,
    steps_of,
    stored,
)
from fastnorm._numba.repeated import Plan, Repeat, in_memory
from fastnorm.layout import Layout
from fastnorm.runtime import kernel_threads
from fastnorm.schedule import APPLY_ELEMENTS, Dtypes, ForwardSchedule

__all__ = ["run_backward", "run_moments", "run_pass"]

_NO_STRIDES = (0, 0, 0, 0, 0)
_COUNTS = np.dtype(np.int64)

# --- Kernels --------------------------------------------------------------------------------------

_kernels: dict[tuple[Any, ...], Any] = {}


def kernel(
    compiler: Callable[..., Any],
    dtype: np.dtype[Any],
    there: frozenset[str],
    act: Any,
    several: bool,
) -> Any:
    """A kernel for numbers of one type and for what is there, compiled with its first call."""
    key = compiler, dtype, there, act, several
    found = _kernels.get(key)
    if found is None:
        with compiling():
            found = _kernels.get(key)
            if found is None:
                signature = _signature(dtype, there)
                found = _kernels[key] = compiler(signature, act, several, SOURCES)
    return found


def _signature(dtype: np.dtype[Any], there: frozenset[str]) -> Any:
    real = array_type(computed(dtype))
    x, double = array_type(dtype), array_type(np.float64, writable=True)
    y = array_type(dtype, writable=True)
    counts = types.Array(types.int64, 2, "C", readonly=True)
    optional: dict[str, Any] = {"y": y, "residual": real, "mask": array_type(np.uint8)}
    optional["total"] = types.Tuple((x, real, y))
    optional["tiles"] = array_type(computed(dtype), writable=True)
    return types.void(
        types.intp, types.intp, types.intp, array_type(np.int64), counts, types.float64,
        x, real, real, double, double, double, double, double,
        *(kind if name in there else types.none for name, kind in optional.items()),
    )  # fmt: skip


# --- Forward --------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """What is asked of a forward pass, without its arrays."""

    centred: bool = True
    given: bool = False
    scaling: int = 0
    activation: Any = 0
    activation_first: bool = False
    fields: int = 0  # elements from one field of moments to the next
    in_place: bool = False


@dataclass(slots=True)
class _Plan:
    """What a kernel is told of every pass of a layout."""

    numbers: Array
    steps: Array
    kernel_of: Callable[[bool], Any]
    items: int
    parts: int  # numbers of moments of splits
    schedule: ForwardSchedule
    real: np.dtype[Any]  # that is computed in
    present: frozenset[str]  # what the kernel takes, whether it is there or not


def _dtypes(**arrays: Array | None) -> Dtypes:
    return tuple((name, array.dtype) for name, array in arrays.items() if array is not None)


@lru_cache(maxsize=4096)
def _plan(layout: Layout, schedule: ForwardSchedule, dtypes: Dtypes, asked: _Asked) -> _Plan:
    there = dict(dtypes)
    dtype = there["x"]
    double = dtype == np.float64
    steps = layout.strides
    a, b, p, s, c = layout.dims
    blocking = schedule.blocking
    source = "total" if "total" in there else "x"
    act = asked.activation
    if callable(act):
        activations.check(act, np.float64 if double else np.float32)
    else:
        act = activations.OURS if act else None
    names = ("x", "y", "residual", "addend", source, "mask", "weight", "bias", "stats")
    table = np.array([steps_of(steps.get(n, _NO_STRIDES), layout.dims) for n in names], np.int64)

    def follow(*operands: str) -> bool:
        """Whether the planes of a group are one run of each of these operands."""
        return p == 1 or all(steps[n][2] == s * steps[n][3] for n in operands if n in there)

    weights = [steps.get(n, _NO_STRIDES) for n in ("weight", "bias")]
    plain = not (asked.in_place or act or asked.activation_first or "residual" in there)
    copies = "mask" in there or not (layout.columns or follow(source))
    present = {"mask", "tiles"} if copies else set()
    if "y" in there:
        present.add("y")
        if "total" in there or not plain or (copies and layout.columns):
            present = {"y", "residual", "mask", "total", "tiles"}
    if layout.columns:
        compiler, width, items = columns.compile_columns, schedule.width, schedule.items
    else:
        compiler, width, items = runs.compile_runs, 1, a * b
    numbers = np.zeros(plan.NUMBERS, np.int64)
    told = {
        plan.A: a, plan.B: b, plan.P: p, plan.S: s, plan.C: c,
        plan.NEIGHBOURS: layout.neighbours, plan.CENTRED: asked.centred, plan.GIVEN: asked.given,
        plan.SCALING: asked.scaling, plan.ACTIVATION_FIRST: asked.activation_first,
        plan.WIDTH: width, plan.CHUNKS: schedule.chunks, plan.BLOCK_ROWS: blocking.block,
        plan.SPLIT: blocking.split_length, plan.SPLITS: blocking.splits,
        plan.MASKED: "mask" in there, plan.DIRECT: plain,
        plan.STAGE: APPLY_ELEMENTS if "tiles" in present else p * s,
        plan.FAR: "mask" in there or (asked.given and not schedule.foldable),
        plan.FIELDS: asked.fields,
        plan.WHOLE_SUMS: "mask" not in there and follow(source),
        plan.ACTIVATION: 0 if callable(asked.activation) else asked.activation,
        plan.WITH_RESIDUAL: "residual" in there, plan.WITH_ADDEND: "total" in there,
        plan.WHOLE_OUTPUT: follow(source, "y", "residual")
        and not any(w[2] or w[3] for w in weights),
        plan.TABULATED: schedule.tabulated,
        plan.WITH_STATS: not asked.given and not asked.fields,
        plan.FOLDED: schedule.foldable and not double,
    }  # fmt: skip
    for place, value in told.items():
        numbers[place] = value
    return _Plan(
        numbers,
        table,
        lru_cache(maxsize=2)(
            lambda parallel: kernel(compiler, dtype, frozenset(present), act, parallel)
        ),
        items,
        items * blocking.splits * 5 * width if blocking.splits > 1 else 1,
        schedule,
        computed(dtype),
        frozenset(present),
    )


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
    """One pass of `layout` over x into y (None: statistics alone).

    Fills mean, var and rstd, or reads the first two where `given`. `activation` is a number, or a
    function that Numba has compiled; what that raises is raised here.
    """
    real = computed(x.dtype)
    converted_to = []
    for name, array in (("residual", residual), ("addend", addend)):
        if array is not None and array.dtype != real:
            array, strides = converted(array, layout.strides[name], layout.dims, real)
            layout = replace(layout, strides={**layout.strides, name: strides})
        converted_to.append(array)
    residual, addend = converted_to
    in_place = y is not None and _start(x if total is None else total) == _start(y)
    asked = _Asked(centred, given, scaling, activation, activation_first, 0, in_place)
    dtypes = _dtypes(
        x=x, y=y, residual=residual, addend=addend, total=total, mask=mask, weight=weight, bias=bias
    )
    told = _plan(layout, schedule, dtypes, asked)
    steps, dims = layout.strides, layout.dims

    def lies(array: Array | None, name: str, absent: Any = None) -> Any:
        return absent if array is None else flat(array, steps[name], dims)

    def optional(array: Array | None, name: str, absent: Any) -> Any:
        return lies(array, name, absent) if name in told.present else None

    none = nothing(x.dtype)
    source = lies(x, "x") if total is None else lies(total, "total")
    status = np.zeros(3)
    added: Any = (source, nothing(real), none)
    if total is not None:
        added = lies(x, "x"), lies(addend, "addend"), source
    _execute(
        told, threads, eps, source,
        lies(weight, "weight", _ones(real)),
        lies(bias, "bias", nothing(real)),
        *(flat(array, steps["stats"], dims) for array in (mean, var, rstd)),
        status,
        lies(y, "y"),
        optional(residual, "residual", nothing(real)),
        optional(mask, "mask", nothing(np.bool_)),
        added if "total" in told.present else None,
    )  # fmt: skip
    if isinstance(ticket, Repeat) and total is None and mask is None and not given:
        ticket.plan = _plan_of_repeats(
            told, eps, ticket, layout, (x, weight, bias, residual), activation
        )
    if status[0]:
        activations.raise_for(activation, real.type(status[1]))
    return False


def _plan_of_repeats(
    told: _Plan, eps: float, repeat: Repeat, layout: Layout, operands: Any, activation: Any
) -> Plan | None:
    """What answers calls like one that has just been answered; None where arrays were copied."""
    places: list[int | None] = []
    for name, array in zip(("x", "weight", "bias", "residual"), operands):
        lies = None if array is None else flat(array, layout.strides[name], layout.dims)
        places.append(None if lies is None else repeat.place_of(lies))
        if array is not None and places[-1] is None:
            return None
    if callable(activation):
        return None
    x_at, w_at, b_at, r_at = places
    assert x_at is not None
    repeat.x = x_at
    dtype, real = operands[0].dtype, told.real
    kind = None if stored(dtype) is dtype else stored(dtype)
    contiguous = operands[0].flags.c_contiguous
    one, zero, room, status = _ones(real), nothing(real), np.empty(1), np.zeros(3)
    numbers = told.numbers.copy()
    numbers[plan.WITH_STATS] = 0  # nobody asks for them
    own = replace(told, numbers=numbers)
    no_added = (nothing(dtype), zero, nothing(dtype)) if "total" in told.present else None
    no_mask = nothing(np.bool_) if "mask" in told.present else None
    no_residual = zero if "residual" in told.present else None
    steps, items, serial = told.steps, told.items, told.kernel_of
    tiles = "tiles" in told.present

    def answer(call: tuple[Any, ...]) -> Any:
        x = call[x_at]
        y = np.empty_like(x)
        if contiguous:
            flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        else:
            flat_x, flat_y = x.ravel("K"), y.ravel("K")
        if kind is not None:
            flat_x, flat_y = flat_x.view(kind), flat_y.view(kind)
        weight = one if w_at is None else in_memory(call[w_at])
        bias = zero if b_at is None else in_memory(call[b_at])
        residual = no_residual if r_at is None else in_memory(call[r_at])
        count = own.schedule.threads(kernel_threads())
        if count == 1:
            serial(False)(
                1, items, plan.WHOLE, numbers, steps, eps, flat_x, weight, bias, room, room, room,
                room, status, flat_y, residual, no_mask, no_added,
                np.empty(runs.TILE, real) if tiles else None,
            )  # fmt: skip
        else:
            _execute(
                own, count, eps, flat_x, weight, bias, room, room, room, status, flat_y, residual,
                no_mask, no_added,
            )  # fmt: skip
        return y

    return answer


@lru_cache(maxsize=2)
def _ones(dtype: np.dtype[Any]) -> Array:
    return np.ones(1, dtype)


def _start(array: Array) -> int:
    return array.ctypes.data


def _execute(told: _Plan, count: int, eps: float, *arrays: Any) -> None:
    """Run a kernel over whole items, or splits of them where they are few and large."""
    count, sharing = told.schedule.threads(count), told.schedule.sharing(count)
    split = sharing == "split"
    parts = np.empty(told.parts if split else 1)
    tiles = np.empty(max(count, 1) * runs.TILE, told.real) if "tiles" in told.present else None
    (*operands, status, y, residual, mask, added) = arrays

    def run(task: int, items: int) -> None:
        threads.run(
            told.kernel_of, items, count, task, told.numbers, told.steps, eps, *operands, parts,
            status, y, residual, mask, added, tiles,
        )  # fmt: skip

    if not split:
        run(plan.WHOLE, told.items)
        return
    pieces = told.items * told.schedule.blocking.splits
    if told.numbers[plan.WITH_ADDEND] or not told.numbers[plan.GIVEN]:
        run(plan.MOMENTS, pieces)
    run(plan.APPLY, pieces)


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
    apart = fields.strides[0] // fields.itemsize
    told = _plan(layout, schedule, _dtypes(x=x, mask=mask), _Asked(fields=apart))
    real, steps, dims = computed(x.dtype), layout.strides, layout.dims
    reach = 1 + sum(step * (n - 1) for step, n in zip(steps["stats"], dims)) + 4 * apart
    into = flat(fields, (1, 0, 0, 0, 0), (reach, 1, 1, 1, 1))
    chosen = nothing(np.bool_) if mask is None else flat(mask, steps["mask"], dims)
    _execute(
        told, threads, 0.0, flat(x, steps["x"], dims), _ones(real), nothing(real),
        into, into, into, np.zeros(3), None, None, chosen if "mask" in told.present else None, None,
    )  # fmt: skip
