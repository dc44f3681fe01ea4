"""What is asked of a backend: one problem over an array, forward or backward."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


# Operands of a pass but for its statistics, by the names of their fields in Problem.
OPERANDS = ("x", "y", "residual", "addend", "total", "mask", "weight", "bias")


class Scaling(IntEnum):
    """How a group's statistics become its scale: `enum Scaling` in _core/forward.h."""

    RSTD = 0  # 1 / sqrt(var + eps)
    NORM = 1  # 1 / max(sqrt(sum of squares), eps)
    FACTOR = 2  # given: var holds the scale itself


@dataclass(slots=True, eq=False, repr=False)  # arrays; each method takes 0.1 ms to make
class Problem:
    """One pass over x: statistics over its reduced axes, then the step, into y.

    Every array is native and aligned and has as many axes as x. `y`, `residual`, `mask`, `addend`
    and `total` have its shape, the others broadcast against it. `mean`, `var` and `rstd` are
    float64; they are filled, or where `given` the first two are read. With `total`, x + addend is
    written there and is what the pass is of. `y` may be None (statistics alone). With `dy`, y is of
    the type that is computed in and becomes dy times the slope of the activation, or times what
    that gives where it is a function.
    """

    x: Array
    y: Array | None
    reduced: tuple[bool, ...]
    mean: Array
    var: Array
    rstd: Array
    weight: Array | None = None
    bias: Array | None = None
    mask: Array | None = None
    residual: Array | None = None
    addend: Array | None = None
    total: Array | None = None
    dy: Array | None = None
    eps: float = 0.0
    centred: bool = True
    given: bool = False
    scaling: Scaling = Scaling.RSTD
    activation: Any = None  # a name, or a function that Numba has compiled
    activation_first: bool = False  # activation before the affine step instead of after it
    ticket: Any = None  # what a backend may cache the call under (dispatch.py)
    statistics: tuple[int, ...] = ()  # with a ticket: the shape in which mean and rstd are returned


@dataclass(slots=True, eq=False, repr=False)
class BackwardProblem:
    """From dy to dx, dweight and dbias; the reduced axes are those of the forward pass.

    Every array is native and aligned and has as many axes as x. `dx`, `dweight` and `dbias` are
    filled; the axes along which `dweight` has length 1 are those its sums run over, and `weight`
    (None: 1 everywhere) and `dbias` have its shape. `mean` (None: 0) and `rstd` are float64 and lie
    alike, and so do `dweight` and `dbias`.
    """

    x: Array
    dy: Array
    dx: Array
    reduced: tuple[bool, ...]
    mean: Array | None
    rstd: Array
    weight: Array | None
    dweight: Array
    dbias: Array | None
    training: bool = True  # False: the statistics were given, and x did not move them
    mask: Array | None = None  # of the shape of x: the elements that the statistics are of
    ticket: Any = None  # what a backend may cache the call under (dispatch.py)
    own: tuple[int, ...] = ()  # with a ticket: the shape of dweight without a weight
