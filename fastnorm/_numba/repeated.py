"""Calls like one before: Numba's kernels answer them without a description.

A call is known by the shapes, strides and dtypes of its arrays and by the values of its options.
What was found for it, a `Plan`, takes the place of all that stands between a public function and
its kernel. Importing this imports no Numba.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np

from fastnorm import machine

Plan = Callable[[tuple[Any, ...]], Any]

_MOST = 4096
_plans: dict[tuple[Any, ...], Plan] = {}
_OPTIONS = (float, int, bool, str, tuple, type(None))


class Repeat:
    """A call that is being described, and its plan, if a kernel leaves one."""

    __slots__ = ("call", "key", "plan", "x")

    def __init__(self, key: tuple[Any, ...], call: tuple[Any, ...]) -> None:
        self.key, self.call = key, call
        self.plan: Plan | None = None
        self.x = 0  # the place of x

    def place_of(self, flat: Any) -> int | None:
        """Which argument has these elements, in the order of memory; None if several may."""
        start = flat.__array_interface__["data"][0]
        there = [i for i, array in enumerate(self.call) if type(array) is np.ndarray]
        found = [i for i in there if self.call[i].__array_interface__["data"][0] == start]
        array = self.call[found[0]] if found else None
        if array is None or array.size != flat.size:
            return None
        # two arguments may be the same array: the key tells, of neighbours
        same = all(self.call[i] is array for i in found)
        same = same and found == [i for i in there if found[0] <= i <= found[-1]]
        return found[0] if same and np.shares_memory(in_memory(array), flat) else None

    def is_like_x(self, y: Any) -> bool:
        """Whether y lies in memory as `np.empty_like` of the plan's x makes it."""
        x = self.call[self.x]
        own = not any(y is value for value in self.call)
        return own and (y.shape, y.strides, y.dtype) == (x.shape, x.strides, x.dtype)

    def keep(self, answer: Any) -> None:
        """Keep the plan for calls like this one, whose answer is a new array alone."""
        if self.plan is not None and type(answer) is np.ndarray and self.is_like_x(answer):
            if len(_plans) >= _MOST:
                _plans.clear()
            _plans[self.key] = self.plan


def in_memory(array: Any) -> Any:
    """The elements of an array in the order of memory."""
    return array.reshape(-1) if array.flags.c_contiguous else array.ravel("K")


# By the types of a call's arguments: which are arrays, and a function that returns the others.
_kinds: dict[tuple[type, ...], tuple[tuple[int, ...], Callable[[Any], Any]] | None] = {}


def _kind_of(types: tuple[type, ...]) -> tuple[tuple[int, ...], Callable[[Any], Any]] | None:
    arrays = tuple(i for i, kind in enumerate(types) if kind is np.ndarray)
    others = [i for i, kind in enumerate(types) if kind is not np.ndarray]
    known = all(types[i] in _OPTIONS for i in others) and len(others) > 0
    found = (arrays, itemgetter(*others)) if known else None
    if len(_kinds) < _MOST:
        _kinds[types] = found
    return found


def key_of(function: Any, call: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """By what a call is known; None: it is described each time."""
    types = tuple(map(type, call))
    kind = _kinds[types] if types in _kinds else _kind_of(types)
    if kind is None:
        return None
    arrays, others = kind
    key = [function, types, others(call), id(machine.here)]
    if tuple in types:
        key += [tuple(map(type, value)) for value in call if type(value) is tuple]
    before = None
    for i in arrays:
        array = call[i]
        # two neighbours may be the same array
        key += array.shape, array.strides, array.dtype, array.flags.aligned, array is before
        before = array
    return tuple(key)


def find(function: Any, call: tuple[Any, ...]) -> tuple[Plan | None, Repeat | None]:
    """The plan of a call, or a note to leave one on."""
    key = key_of(function, call)
    if key is None:
        return None, None
    try:
        plan = _plans.get(key)
    except TypeError:  # a tuple of what cannot be a key
        return None, None
    if plan is not None:
        return plan, None
    native = all(value.dtype.isnative for value in call if type(value) is np.ndarray)
    return None, Repeat(key, call) if native else None
