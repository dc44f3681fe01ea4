"""Calls like one before: Numba's kernels answer them without a description.

A call is known by the shapes, strides and dtypes of its arrays and by the values of its options.
What was found for it, an answer to calls of its kind, takes the place of all that stands between a
public function and its kernel. Importing this imports no Numba.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastnorm import machine

Answer = Callable[[tuple[Any, ...]], Any]
Array = NDArray[Any]

_MOST = 4096
_answers: dict[tuple[Any, ...], Answer] = {}
_here = machine.here
_OPTIONS = (float, int, bool, str, tuple, type(None))


class Repeat:
    """A call that is being described; a kernel may leave how to answer others like it.

    `answer` is given the results of this one, new arrays, which those of others are like. It
    returns None where there is no such way. `out` is the place of the array that is to be written.
    `moves` moves running statistics: (running_mean, running_var) by a mean and a variance.
    """

    __slots__ = ("answer", "call", "key", "moves", "names", "out")

    def __init__(self, key: tuple[Any, ...], call: tuple[Any, ...], names: tuple[str, ...]) -> None:
        self.key, self.call, self.names = key, call, names
        out = names.index("out") if "out" in names else None
        self.out = None if out is None or call[out] is None else out
        self.moves: Callable[[tuple[Any, ...], Array, Array], None] | None = None
        self.answer: Callable[[Sequence[Array]], Answer | None] | None = None

    def places(self, arrays: Mapping[str, Array | None]) -> dict[str, int] | None:
        """Which arguments these are, or show whole; None where one is none, or several may be."""
        given = [(i, own) for i, own in enumerate(self.call) if self._is_read(i)]
        lie = {i: own.__array_interface__["data"][0] for i, own in given}
        found = {}
        for name, array in arrays.items():
            if array is None:
                continue
            at = array.__array_interface__["data"][0]
            seen = at, array.itemsize, array.size
            same = [i for i, own in given if (lie[i], own.itemsize, own.size) == seen]
            if len(same) != 1:
                return None
            found[name] = same[0]
        return found

    def _is_read(self, i: int) -> bool:
        return type(self.call[i]) is np.ndarray and i != self.out

    def named(self, *names: str) -> list[int] | None:
        """Where these arguments are; None where one of them is no array."""
        found = [self.names.index(name) for name in names if name in self.names]
        arrays = all(type(self.call[i]) is np.ndarray for i in found)
        return found if arrays and len(found) == len(names) else None

    def keep(self, result: Any) -> None:
        """Keep the answer for calls like this one, which gave new arrays alone, but for `out`."""
        results = result if type(result) is tuple else (result,)
        out = None if self.out is None else self.call[self.out]
        new = all(
            type(r) is np.ndarray and (r is out or not any(r is v for v in self.call))
            for r in results
        )
        # it holds the arrays of this call, and itself: they would wait for the garbage collector
        make, self.answer = self.answer, None
        answer = make(results) if make is not None and new else None
        if answer is not None:
            if len(_answers) >= _MOST:
                _answers.clear()
            _answers[self.key] = answer


def is_like(result: Any, x: Any) -> bool:
    """Whether a result is what `np.empty_like` of x makes."""
    made = np.empty_like(x)
    return bool((result.shape, result.strides, result.dtype) == (x.shape, made.strides, x.dtype))


def _taker(places: list[int]) -> Callable[[Any], Any]:
    """What takes these from a call, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


class _Kind:
    """Calls with arguments of the same types, by itself: it is compared by identity."""

    __slots__ = ("arrays", "options", "tuples")

    def __init__(self, types: tuple[type, ...]) -> None:
        self.arrays = _taker([i for i, kind in enumerate(types) if kind is np.ndarray])
        self.options = _taker([i for i, kind in enumerate(types) if kind is not np.ndarray])
        self.tuples = [i for i, kind in enumerate(types) if kind is tuple]


_kinds: dict[tuple[type, ...], _Kind | Literal[False]] = {}  # False: of what is no key
_lies = attrgetter("shape", "strides", "dtype", "flags.aligned")


def key_of(function: Any, call: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """By what a call is known; None: it is described each time."""
    types = tuple(map(type, call))
    kind = _kinds.get(types)
    if kind is None and len(_kinds) < _MOST:
        known = all(own is np.ndarray or own in _OPTIONS for own in types)
        kind = _kinds[types] = known and _Kind(types)
    if not kind:
        return None
    key = (function, kind, kind.options(call), *map(_lies, kind.arrays(call)))
    if kind.tuples:  # 1 and True are the same
        key += tuple([tuple(map(type, call[i])) for i in kind.tuples])
    return key


def find(function: Any, call: tuple[Any, ...]) -> tuple[Answer | None, Repeat | None]:
    """How to answer a call, or a note to leave that on."""
    global _here
    key = key_of(function, call)
    if key is None:
        return None, None
    if _here is not machine.here:  # schedules are others now
        _here = machine.here
        _answers.clear()
    try:
        answer = _answers.get(key)
    except TypeError:  # a tuple of what cannot be a key
        return None, None
    if answer is not None:
        return answer, None
    native = all(value.dtype.isnative for value in call if type(value) is np.ndarray)
    return None, Repeat(key, call, function.names) if native else None
