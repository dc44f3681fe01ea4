"""Calls like one before: their kernel once more, with nothing but other arrays.

What these answers are told apart by is in repeated.py. They ask themselves what no shape tells:
whether `out` may be written, and whether what is still to be read lies apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm._formulas import rstd_of
from fastnorm._numba.operands import address, flattener
from fastnorm._numba.walks import ARRAYS, FIRST, MEAN_OF, X, Y
from fastnorm.arguments import is_plain, writes_apart
from fastnorm.layout import Layout
from fastnorm.repeated import Answer, Repeat, is_like
from fastnorm.runtime import empty_like

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
    layout: Layout,
    arrays: Mapping[str, Array | None],
    carry: Callable[[list[Any], bool], Any],
    absent: list[Array | None],
    repeat: Repeat,
    eps: float | None,
    results: Sequence[Array],
) -> Answer | None:
    """How to answer calls like that of a pass with its plan alone; None: not so simply.

    `carry` carries it out for flat arrays in the order of `walks.ARRAYS`, where y may be another of
    them if so told. `absent` stands for those that are not there: None for what is never read. With
    `eps` its statistics were given.
    """
    out = repeat.out
    full = [name for name in ("y", "total") if arrays[name] is not None]
    made = _names_of(results, arrays)
    statistics = ("mean", "var", "rstd")
    read = {n: a for n, a in arrays.items() if n not in full and n not in statistics}
    places = repeat.places(read)
    running = [] if eps is None else repeat.named("running_mean", "running_var")
    rstd = arrays["rstd"]
    groups = 0 if rstd is None else rstd.size
    if made is None or places is None or running is None or made[: len(full)] != full:
        return None
    if any(repeat.call[i].size != groups for i in running):
        return None  # or statistics were given that are no arguments
    new = [r for r, name in zip(results, made) if name in full and (name == "total" or out is None)]
    if not all(is_like(result, repeat.call[places["x"]]) for result in new):
        return None
    moves, moved = repeat.moves, [0, 0]
    if moves is not None:
        moved = [repeat.names.index(name) for name in ("running_mean", "running_var")]
    flats = {
        name: flattener(array, layout.strides[name], layout.dims)
        for name, array in arrays.items()
        if array is not None and name not in statistics
    }
    of_x, given = places["x"], [(ARRAYS.index(n), places[n], flats[n]) for n in places]
    there = {at for at, _, _ in given} | {Y, MEAN_OF, MEAN_OF + 1, MEAN_OF + 2}
    there |= {FIRST} if "total" in flats else set()
    unread = [i for i, own in enumerate(absent) if own is None and i not in there]
    flat_y, flat_total = flats["y"], flats.get("total")
    others = [i for i, own in enumerate(repeat.call) if type(own) is np.ndarray and i != out]
    shapes = [(name, r.shape) for name, r in zip(made, results) if name not in full]

    kept = bool(shapes) or moves is not None

    def answer(call: tuple[Any, ...]) -> Any:
        x, targets = call[of_x], (call[moved[0]], call[moved[1]])
        if moves is not None and not all(t is None or can_move(t) for t in targets):
            return None
        told: list[Any] = absent.copy()
        for at, i, flat in given:
            told[at] = flat(call[i])
        y = empty_like(x) if out is None else call[out]
        if out is not None and not (
            y.flags.writeable and all(writes_apart(y, call[i]) for i in others)
        ):
            return None
        told[Y], made = flat_y(y), [y]
        if flat_total is not None:
            made.append(empty_like(x))
            told[FIRST], told[X] = told[X], flat_total(made[1])
        if eps is None:
            mean = np.empty(groups)
            # what nobody asks for may lie in one place
            var, rstd = (np.empty(groups), np.empty(groups)) if kept else (mean, mean)
        else:
            with np.errstate(all="ignore"):  # of a signaling NaN
                mean, var = (call[i].astype(np.float64, order="C").reshape(-1) for i in running)
            rstd = rstd_of(var, eps) if shapes else var
        told[MEAN_OF:] = mean, var, rstd
        for i in unread:
            told[i] = told[X]
        carry(told, out is not None)
        if moves is not None:
            moves(targets, mean, var)
        made += [(mean if name == "mean" else rstd).reshape(shape) for name, shape in shapes]
        return y if len(made) == 1 else tuple(made)

    return answer


def of_backward(
    layout: Layout,
    arrays: Mapping[str, Array | None],
    carry: Callable[[dict[str, Array]], tuple[Array, Array]],
    repeat: Repeat,
    results: Sequence[Array],
) -> Answer | None:
    """How to answer calls like that of a backward pass with its plan alone."""
    places = repeat.places({name: array for name, array in arrays.items() if name != "dx"})
    if places is None or not is_like(results[0], repeat.call[places["x"]]):
        return None
    if not all(gradient.flags.c_contiguous for gradient in results[1:]):
        return None
    flats = {
        name: flattener(array, layout.strides[_STEPS.get(name, name)], layout.dims)
        for name, array in arrays.items()
        if array is not None
    }
    of_x, given = places["x"], [(name, places[name], flats[name]) for name in places]
    gradients = [(gradient.shape, gradient.dtype) for gradient in results[1:]]

    def answer(call: tuple[Any, ...]) -> Any:
        dx = empty_like(call[of_x])
        told = {name: flat(call[i]) for name, i, flat in given}
        told["dx"] = flats["dx"](dx)
        with np.errstate(all="ignore"):
            both = carry(told)
            return dx, *[t.reshape(shape).astype(kind) for t, (shape, kind) in zip(both, gradients)]

    return answer


_STEPS = {"mean": "stats", "rstd": "stats"}
