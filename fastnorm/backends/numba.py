"""The kernels that Numba compiles on their first call."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from fastnorm.arguments import computing_type, converted
from fastnorm.backends import compiled
from fastnorm.problem import Array, BackwardProblem, Problem


def available() -> bool:
    """Whether Numba is installed."""
    return find_spec("numba") is not None


def forward(p: Problem) -> None:
    """Carry out a pass over an array."""
    from fastnorm._numba import cpu, slopes

    if p.dy is None:
        return compiled.forward(p, cpu)
    compiled.forward(slopes.slope_of(p, converted(p.x, computing_type(p.x.dtype))), cpu)
    y: Any = p.y
    with np.errstate(all="ignore"):
        y *= p.dy
    return None


def backward(p: BackwardProblem) -> None:
    """Carry out a pass back."""
    from fastnorm._numba import cpu

    compiled.backward(p, cpu)


def moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, out: Array) -> None:
    """Fill `out` with the moments of x."""
    from fastnorm._numba import cpu

    # its sums of doubles are pairs, of which those of parts merge to the same however they were cut
    compiled.moments(converted(x, np.float64), reduced, mask, out, cpu)


def takes_whole(dtype: np.dtype[Any]) -> bool:
    """Only float64."""
    return dtype == np.float64
