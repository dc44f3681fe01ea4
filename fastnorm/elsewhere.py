"""Whose memory the numbers of an array are in: NumPy's, or another.

The front door checks arrays, views them and describes a pass; it reads no number of theirs. An
array in other memory is shown to it as an `Elsewhere`, and the few things that differ are here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastnorm.description import BackwardPass, Pass

Array = NDArray[Any]
Operand = TypeVar("Operand", Array, Array | None)


class Elsewhere(np.ndarray[Any, Any]):
    """A NumPy array in all but its numbers, which are in other memory and are never read here.

    A subclass knows that memory. This is no ABC: it would ask for the methods where a class is
    called, and NumPy makes views without that. A test asks instead.
    """

    __array_ufunc__: Any = None  # no arithmetic

    @abstractmethod
    def new(self, shape: Sequence[int], dtype: Any, strides: Sequence[int] | None = None) -> Array:
        """Memory beside this array's, dense: in C order, or in that of these strides."""

    @abstractmethod
    def placed(self, array: Array) -> Array:
        """A copy of an array beside this one, if it is not there already."""

    @abstractmethod
    def host(self) -> Array:
        """The numbers, in NumPy's memory."""

    @abstractmethod
    def fill_from(self, source: Array) -> None:
        """Fill this array with the numbers of another one there."""

    @abstractmethod
    def plus(self, offset: float) -> Array:
        """A copy in float64, with a number added."""

    @abstractmethod
    def average(self, parts: Array, counts: Array, momentum: float, unbiased: bool) -> None:
        """`passes.update` of this running statistic."""

    @abstractmethod
    def takes(self, activation: Any) -> bool:
        """Whether this activation, which NumPy's arrays may not have, can be compiled there."""

    @abstractmethod
    def compute(self, p: Pass) -> None:
        """Carry out a `Pass` over this array."""

    @abstractmethod
    def compute_backward(self, p: BackwardPass) -> None:
        """Carry out a `BackwardPass` over this array."""

    @abstractmethod
    def respond(self, y: Array, axis: int, size: int, alpha: float, beta: float, k: float) -> None:
        """Fill y with `local_response_norm` of this array."""


def host(value: Any) -> Any:
    """What came in, with its numbers in NumPy's memory."""
    return value.host() if isinstance(value, Elsewhere) else value


def beside(x: Array, operand: Operand) -> Operand:
    """An operand of a pass over x in the memory of x."""
    return x.placed(operand) if isinstance(x, Elsewhere) and operand is not None else operand


def plus(array: Array, offset: float) -> Array:
    """array + offset, in float64."""
    if isinstance(array, Elsewhere):
        return array.plus(offset)
    with np.errstate(all="ignore"):
        return array.astype(np.float64) + offset
