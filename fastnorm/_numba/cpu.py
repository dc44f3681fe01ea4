"""The backend: what the Cython kernels offer, carried out by those that Numba compiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm._numba import activations, backward, forward
from fastnorm._numba.again import of_backward, of_pass
from fastnorm._numba.compiling import CHECKED
from fastnorm._numba.operands import Strides, address, converted, flat, in_five
from fastnorm._numba.plans import Asked, BackPlan, Plan, back_plan_of, plan_of
from fastnorm._numba.threads import run, share, warm_for
from fastnorm._numba.walks import ARRAYS, OPERANDS, Walk, Y
from fastnorm.layout import Layout
from fastnorm.repeated import Repeat
from fastnorm.runtime import kernel_threads
from fastnorm.schedule import ITEMS_PER_THREAD, BackwardSchedule, ForwardSchedule

Array = NDArray[Any]
_NO_PARTS, _NO_MASK = np.zeros((1, 1, 1, 1)), np.zeros(1, np.bool_)
_STATISTICS = "mean", "var", "rstd"
_IS_DIRECT = np.array([name == "direct" for name in Walk._fields])
# What stands for weights and biases that are not there: + -0.0 changes no number.
_NEUTRAL: dict[Any, dict[str, Array]] = {
    kind: {"weight": np.ones(1, kind), "bias": np.full(1, -0.0, kind)}
    for kind in (np.float32, np.float64)
}


def _computing(x: Array) -> type:
    return np.float64 if x.dtype == np.float64 else np.float32


@lru_cache(maxsize=4096)
def _moved(
    layout: Layout, strides: tuple[tuple[str, Strides], ...], shared: bool = False
) -> Layout:
    """The same layout with other strides of some operands: one object for the same ones."""
    return replace(layout, strides={**layout.strides, **dict(strides)}, shared=shared)


def _prepared(
    layout: Layout, arrays: dict[str, Any], computing: type, along: bool, first: bool
) -> tuple[Layout, bool, dict[str, Array]]:
    """Put copies into `arrays` of what the kernels do not read as it lies: types, shared weights.

    `along`: weights and biases have a number for each element of a run, also those that are not
    there. `first`: the activation comes before them. Returns the layout, whether there
    are copies, and what stands for what is not there.
    """
    strides: dict[str, Strides] = {}
    neutral: dict[str, Array] = {}
    copied = False
    dims = layout.dims
    for name in ("residual", "addend", "weight", "bias"):
        own: Strides = layout.strides.get(name, (0,) * 5)
        array = arrays[name]
        parameter = name in ("weight", "bias")
        wanted = array is not None and array.dtype not in (arrays["x"].dtype, computing)
        if array is None and along and parameter:
            neutral[name], strides[name] = _neutral(name, dims[3], computing), (0, 0, 0, 1, 0)
        elif array is not None and (wanted or (along and parameter and own[3] != 1)):
            to = 3 if along and parameter else None
            arrays[name], strides[name] = converted(array, own, dims, computing, to)
            copied = True
        elif array is not None and layout.shared and parameter and first:
            k = layout.neighbours
            five, _ = converted(array, own, (*dims[:4], dims[4] // k), computing)
            five, own = np.repeat(five, k, 4), (*own[:4], 1)
            arrays[name], strides[name] = converted(five, own, dims, computing)
            copied = True
    if strides:
        layout = _moved(layout, tuple(strides.items()), layout.shared and not first)
    return layout, copied, neutral


@lru_cache(maxsize=64)
def _neutral(name: str, n: int, computing: type) -> Array:
    return np.repeat(_NEUTRAL[computing][name], n)


def _kernel(layout: Layout) -> Any:
    return forward.COLUMNS if layout.columns else forward.RUNS


def carry_out(
    plan: Plan,
    kernel: Any,
    warm: set[Any],
    eps: float,
    given: tuple[Any, ...],
    told: list[Array],
    in_place: bool,
) -> None:
    """A pass over flat arrays: of items on their own, or of splits where they are few and large.

    `given` is room for what the activation says, and the activation.
    """
    threads = 1 if plan.schedule.max_threads == 1 else kernel_threads()
    items, numbers = plan.items, plan.numbers
    if in_place and any(address(t) == address(told[Y]) for i, t in enumerate(told) if i != Y):
        numbers = np.where(_IS_DIRECT, 0, numbers)
    split = plan.splits > 1 and threads > 1
    split = split and items < ITEMS_PER_THREAD * threads and items % threads != 0
    if plan.double and numbers is not plan.numbers:
        split = False  # of doubles out of range all of x is read again, when one split is written
    kind = np.float64 if plan.double else np.float32
    raised, loop = given
    arrays = (
        *told, np.empty(plan.parts) if split else _NO_PARTS, raised,
        np.empty(threads * plan.room), np.empty(threads * plan.tiles, kind), loop,
    )  # fmt: skip
    if not split:
        share(kernel, warm, threads, forward.WHOLE, items, numbers, eps, plan.steps, arrays)
        return
    for task in (forward.MOMENTS, forward.STEP):
        share(kernel, warm, threads, task, items * plan.splits, numbers, eps, plan.steps, arrays)


def _flat(layout: Layout, arrays: Mapping[str, Array | None]) -> dict[str, Array]:
    steps = layout.strides
    return {
        name: flat(array, steps["stats" if name in _STATISTICS else name], layout.dims)
        for name, array in arrays.items()
        if array is not None
    }


def _absent(computing: type, neutral: Mapping[str, Array]) -> list[Array | None]:
    """What stands for operands that are not there; None for what is never read."""
    none = {"mask": _NO_MASK, **_NEUTRAL[computing], **neutral}
    return [none.get(name) for name in ARRAYS]


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
    named = {
        "x": x, "y": y, "residual": residual, "mask": mask, "weight": weight, "bias": bias,
        "addend": addend, "total": total, "mean": mean, "var": var, "rstd": rstd,
    }  # fmt: skip
    computing = _computing(x)
    lies, kept = layout, dict(named)
    along = not (layout.columns or schedule.foldable or activation_first)
    layout, copied, neutral = _prepared(layout, named, computing, along, activation_first)
    if total is not None:
        steps = layout.strides
        layout = _moved(layout, (("x", steps["total"]), ("first", steps["x"])))
    there = {name for name, array in named.items() if array is not None} | neutral.keys()
    operands = tuple(n for n in OPERANDS if n in there or (n == "first" and total is not None))
    asked = Asked(operands, centred, given, scaling, bool(activation), activation_first)
    plan = plan_of(layout, schedule, x.dtype.itemsize, asked)
    raised = np.zeros(1, np.bool_)
    loop = activations.loop_of(activation, computing) if activation else None
    kernel, absent = _kernel(layout), _absent(computing, neutral)
    flats = _flat(layout if copied else lies, named)
    if total is not None:
        flats["first"], flats["x"] = flats["x"], flats["total"]
    told = [flats.get(n, flats["x"] if own is None else own) for n, own in zip(ARRAYS, absent)]
    warm = warm_for(layout.columns, tuple([t.dtype.char for t in told]), loop is None)
    carry = partial(carry_out, plan, kernel, warm, eps, (raised, loop))
    carry(told, y is not None)
    if isinstance(ticket, Repeat) and not (copied or plan.splits > 1 or CHECKED):
        ticket.answer = partial(of_pass, lies, kept, carry, absent, ticket, eps if given else None)
    return bool(raised[0])


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
    flats = _flat(layout, {"x": x, "mask": mask})
    operands = tuple(name for name in OPERANDS if name in flats)
    plan = plan_of(layout, schedule, x.dtype.itemsize, Asked(operands))
    parts, threads = np.empty(plan.parts), plan.schedule.threads(threads)
    computing, nothing = _computing(x), np.zeros(1)
    told = zip(ARRAYS[: -len(_STATISTICS)], _absent(computing, {}))
    arrays = (
        *[flats.get(name, flats["x"] if own is None else own) for name, own in told],
        nothing, nothing, nothing, parts, np.zeros(1, np.bool_),
        np.empty(threads * plan.room), np.empty(threads * plan.tiles, computing), None,
    )  # fmt: skip
    items = plan.items * plan.splits
    pass_ = plan.numbers, 0.0, plan.steps, arrays
    warm = warm_for(layout.columns, x.dtype, mask is None)
    share(_kernel(layout), warm, threads, forward.MOMENTS, items, *pass_)
    run(forward.MERGE, warm, parts)
    a, b, _, _, c = layout.dims
    k = layout.neighbours
    own = parts[:, 0, :, : plan.parts[3] // k].transpose(1, 0, 2)
    if layout.columns:
        own, dims = own.reshape(5, a, b, 1, 1, -1)[..., : c // k], (a, b, 1, 1, c // k)
    else:
        own, dims = own.reshape(5, a, -1, 1, 1, 1)[:, :, :b], (a, b, 1, 1, 1)
    for field, numbers in zip(fields, own):
        in_five(field, layout.strides["stats"], dims)[...] = numbers


# --- Backward -------------------------------------------------------------------------------------


def carry_back(plan: BackPlan, columns: bool, flats: Mapping[str, Array]) -> tuple[Array, Array]:
    """A pass over flat arrays: of items on their own, or shared out where they are few and large.

    The gradients of the weight and the bias.
    """
    computing = _computing(flats["x"])
    neutral = _NEUTRAL[computing]["weight"]
    sums, collected = np.empty(plan.sums), np.empty(plan.collected)
    threads = 1 if plan.schedule.max_threads == 1 else kernel_threads()
    rstd = flats["rstd"]
    arrays: Any = (
        flats["x"], flats["dy"], flats["dx"], flats.get("factor", neutral),
        flats["mean"] if "mean" in flats else np.zeros(rstd.size), rstd,
        sums.reshape(-1), collected.reshape(-1), np.empty(threads * plan.room),
        np.empty(threads * plan.tiles, computing), neutral, np.empty(2 * plan.items),
    )  # fmt: skip
    items, told = plan.items * plan.collected[1], (plan.numbers, plan.steps, arrays)
    warm = warm_for("backward", flats["x"].dtype.char, flats["dy"].dtype.char)
    few = plan.items < ITEMS_PER_THREAD * threads
    apart = plan.collected[1] == 1 and few and (plan.owners or plan.items % threads != 0)
    if threads == 1 or not apart or (plan.segments == plan.items and not plan.owners):
        share(plan.kernel, warm, threads, backward.WHOLE, items, *told)
    else:
        share(plan.kernel, warm, threads, backward.ADD_UP, plan.segments, *told)
        share(plan.kernel, warm, threads, backward.STEP, plan.turns, *told)
    return _totals(plan, columns, sums, collected)


def _totals(plan: BackPlan, columns: bool, sums: Array, collected: Array) -> tuple[Array, Array]:
    """dweight and dbias, along the five dimensions."""
    if plan.owners:
        both = np.add.reduce(collected, axis=1)
        shape = *plan.owners, both.shape[-1] // plan.owners[2], 1
        return both[:, 0].reshape(shape), both[:, 1].reshape(shape)
    total = np.add.reduce(sums, axis=plan.axes, keepdims=True)
    if columns:
        return total[..., 1, np.newaxis, :], total[..., 0, np.newaxis, :]
    return total[..., 1, np.newaxis], total[..., 0, np.newaxis]


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
    own_weights, dims, computing = layout.strides["dweight"], layout.dims, _computing(x)
    if layout.columns and (own_weights[2] or own_weights[3]):
        return False
    inside = schedule.blocking.inside
    changed = {}
    if dy.dtype not in (x.dtype, computing):
        dy, changed["dy"] = converted(dy, layout.strides["dy"], dims, computing)
    factor = layout.strides.get("factor", (0,) * 5)
    weighted = weight is not None
    if (weight is not None and weight.dtype != computing) or (inside and factor[3] != 1):
        some = _NEUTRAL[computing]["weight"] if weight is None else weight
        weight, changed["factor"] = converted(some, factor, dims, computing, 3 if inside else None)
    if changed:
        layout = _moved(layout, tuple(changed.items()))
    plan = back_plan_of(layout, schedule, x.itemsize, (centred, training, weighted))
    named = {"x": x, "dy": dy, "dx": dx, "factor": weight, "mean": mean, "rstd": rstd}
    carry = partial(carry_back, plan, layout.columns)
    with np.errstate(all="ignore"):  # of infinities, and beyond half precision
        for gradient, total in zip((dweight, dbias), carry(_flat(layout, named))):
            if gradient is not None:
                in_five(gradient, own_weights, dims)[...] = total
    flat_gradients = _is_compact(own_weights, dims)
    if isinstance(ticket, Repeat) and not changed and flat_gradients and not CHECKED:
        ticket.answer = partial(of_backward, layout, named, carry, ticket)
    return True


def _is_compact(strides: Strides, dims: Strides) -> bool:
    """Whether elements follow one another along the dimensions that have strides."""
    n = 1
    for stride, size in zip(reversed(strides), reversed(dims)):
        if stride not in (0, n):
            return False
        n *= size if stride else 1
    return True
