"""Calls like one before: their kernel once more, with nothing but other addresses.

What these answers are told apart by is in repeated.py. They ask themselves what no shape tells:
whether `out` may be written, and whether what is still to be read lies apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm._formulas import rstd_of
from fastnorm._numba.blocking import FINALIZE, SCALE, WHOLE
from fastnorm._numba.extents import size_of_room
from fastnorm._numba.launch import address, carry_back, scratch, share, totals
from fastnorm._numba.memory import alone
from fastnorm._numba.plans import AT, BACK_DATA_OF, BACK_OWN, DATA_OF, BackPlan, Plan, tell_in_place
from fastnorm.arguments import is_plain, writes_apart
from fastnorm.layout import Layout
from fastnorm.problem import OPERANDS
from fastnorm.repeated import Answer, Repeat, is_like
from fastnorm.runtime import empty_like, kernel_threads

Array = NDArray[Any]

_MADE = ("y", "total", "mean", "rstd")


def _names_of(results: Sequence[Array], arrays: Mapping[str, Array | None]) -> list[str] | None:
    """Which arrays of a pass these results are, or show whole."""
    found = []
    for result in results:
        names = [
            name
            for name in _MADE
            if (array := arrays[name]) is not None
            and (array.dtype, array.size) == (result.dtype, result.size)
            and address(array) == address(result)
        ]
        if len(names) != 1 or not (names[0] in ("y", "total") or result.flags.c_contiguous):
            return None
        found += names
    return found


def can_move(running: Array) -> bool:
    """Whether running statistics are written where they are."""
    return is_plain(running) and running.flags.writeable


def of_pass(
    plan: Plan,
    arrays: Mapping[str, Array | None],
    repeat: Repeat,
    eps: float | None,
    results: Sequence[Array],
) -> Answer | None:
    """How to answer calls like that of a pass with nothing but its plan; None: not so simply.

    With `eps` its statistics were given.
    """
    schedule, out = plan.schedule, repeat.out
    full = [name for name in ("y", "total") if arrays[name] is not None]
    made = _names_of(results, arrays)
    places = repeat.places({name: arrays[name] for name in OPERANDS if name not in full})
    running = [] if eps is None else repeat.named("running_mean", "running_var")
    groups = 0 if (rstd := arrays["rstd"]) is None else rstd.size
    if made is None or places is None or running is None or schedule.blocking.splits > 1:
        return None
    if made[: len(full)] != full or any(repeat.call[i].size != groups for i in running):
        return None  # or statistics were given that are no arguments
    new = [r for r, name in zip(results, made) if name in full and (name == "total" or out is None)]
    if not all(is_like(result, repeat.call[places["x"]]) for result in new):
        return None
    moves, moved = repeat.moves, [0, 0]
    if moves is not None:
        moved = [repeat.names.index(name) for name in ("running_mean", "running_var")]
    template, kernel, items, room = plan.template, plan.kernel, plan.items, plan.room
    of_x, given = places["x"], [(DATA_OF[name], place) for name, place in places.items()]
    at_x, at_y, at_residual, at_mean, at_var = (
        DATA_OF[name] for name in ("x", "y", "residual", "mean", "var")
    )
    into = [DATA_OF[name] for name in full if name != "y"]
    others = [i for i, own in enumerate(repeat.call) if type(own) is np.ndarray and i != out]
    shapes = [(DATA_OF[name], r.shape) for name, r in zip(made, results) if name not in full]
    unread = [DATA_OF[name] for name in ("mean", "var", "rstd") if eps is None and name not in made]
    size, serial = size_of_room(room), schedule.threads(2) == 1
    # behind the room, statistics that nobody asks for or scales that all samples share
    more = 8 * (groups + int(template[AT["chunks"]]) * SCALE * plan.width * schedule.tabulated)

    def answer(call: tuple[Any, ...]) -> Any:
        x, record = call[of_x], template.copy()
        targets = call[moved[0]], call[moved[1]]
        if moves is not None and not all(t is None or can_move(t) for t in targets):
            return None
        _memory, start = scratch(size + more)
        for place, i in given:
            record[place] = address(call[i])
        if out is None:
            y = empty_like(x)
            record[at_y] = address(y)
        else:
            y = call[out]
            if not (y.flags.writeable and all(writes_apart(y, call[i]) for i in others)):
                return None
            record[at_y] = address(y)
            tell_in_place(record, record[at_x], record[at_residual], record[at_y])
        results = [y]
        for place in into:
            results.append(empty_like(x))
            record[place] = address(results[-1])
        if eps is None:
            for place, shape in shapes:
                results.append(np.empty(shape))
                record[place] = address(results[-1])
            for place in unread:
                record[place] = start + size
            if moves is not None:
                mean, var = np.empty((2, groups))
                record[at_var] = address(var)
                if len(results) > 1:
                    mean = results[1]
                record[at_mean] = address(mean)
        else:
            with np.errstate(all="ignore"):  # of a signaling NaN
                mean = call[running[0]].astype(np.float64, order="C")
                var = call[running[1]].astype(np.float64, order="C")
            record[at_mean], record[at_var] = address(mean), address(var)
            for place, shape in shapes:
                statistic = mean if place == at_mean else rstd_of(var, eps)
                results.append(statistic.reshape(shape))
            if schedule.tabulated:  # as launch.tabulated
                record[AT["scales"]], record[AT["items"]] = start + size, record[AT["chunks"]]
                alone(kernel, address(record), start, FINALIZE)
                record[AT["items"]] = items
        threads = 1 if serial else schedule.threads(kernel_threads())
        if threads == 1:
            alone(kernel, address(record), start, WHOLE)
        else:
            static = schedule.sharing(threads) == "static"
            share(kernel, address(record), items, threads, WHOLE, room, static)
        if moves is not None:
            moves(targets, mean, var)
        return y if len(results) == 1 else tuple(results)

    return answer


def of_backward(
    plan: BackPlan,
    layout: Layout,
    arrays: Mapping[str, Array | None],
    training: bool,
    repeat: Repeat,
    results: Sequence[Array],
) -> Answer | None:
    """How to answer calls like that of a backward pass with nothing but its plan."""
    places = repeat.places({name: array for name, array in arrays.items() if name != "dx"})
    if places is None or not is_like(results[0], repeat.call[places["x"]]):
        return None
    if not all(gradient.flags.c_contiguous for gradient in results[1:]):
        return None
    of_x, given = places["x"], [(BACK_DATA_OF[name], place) for name, place in places.items()]
    at_dx, (at_sums, at_terms, at_collected) = BACK_DATA_OF["dx"], BACK_OWN
    at_kept, at_rest = (at_collected, at_sums) if plan.inside else (at_sums, at_collected)
    gradients = [(gradient.shape, gradient.dtype) for gradient in results[1:]]
    groups = layout.dims[0] * layout.dims[1]
    size, schedule = size_of_room(plan.room), plan.schedule
    serial = schedule.threads(2) == 1
    held = (plan.items, plan.parts, 2, plan.cells) if plan.inside else plan.sums
    # behind the room, terms and what nothing is added up from
    more = 8 * (plan.terms + (prod(plan.sums) if plan.inside else 0))

    def answer(call: tuple[Any, ...]) -> Any:
        dx, record = empty_like(call[of_x]), plan.template.copy()
        _memory, start = scratch(size + more)
        kept = np.empty(held)
        for place, i in given:
            record[place] = address(call[i])
        record[at_dx] = address(dx)
        record[at_kept], record[at_terms] = address(kept), start + size
        record[at_rest] = start + size + 8 * plan.terms
        threads = 1 if serial else schedule.threads(kernel_threads())
        if threads == 1:
            alone(plan.kernel, address(record), start, WHOLE)
        else:
            carry_back(plan, record, threads, groups, training)
        with np.errstate(all="ignore"):
            both = totals(plan, layout, kept)
            return dx, *[t.reshape(shape).astype(kind) for t, (shape, kind) in zip(both, gradients)]

    return answer
