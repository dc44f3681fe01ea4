"""From dy to dx of one element, and the weights of a chunk: what both walks backward share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fastnorm._numba.gpu.elements import computing
from fastnorm._numba.gpu.package import arithmetic, device

Function = Callable[..., Any]

fma, holds, apply_back = arithmetic.fma, arithmetic.holds, arithmetic.apply_back
LEAST, MOST = np.float32(arithmetic.LEAST), np.float32(arithmetic.MOST)


@device
def holds_group(rstd: Any, c1: Any, c2: Any, length: Any) -> Any:
    """Whether a float32 can hold rstd, c1 and xhat c2, no xhat being above the root of `length`.

    The digits of the latter, too; they are below 2^102, half a unit of the largest: where dy wr
    leaves its range, dx does.
    """
    size = c1 * c1 + c2 * c2 * length
    return holds(rstd) and ((size > 2.0**-204 and size < 2.0**204) or size == 0.0)


@device
def holds_weight(w: Any, wr: Any) -> Any:
    """Whether a float32 can hold wr, the weight times rstd: in float32, once for each element."""
    return w == 0 or (abs(wr) > LEAST and abs(wr) < MOST)


@device
def gradient(x: Any, dy: Any, hi: Any, r: Any, shift: Any, wr: Any, c1: Any, c2: Any) -> Any:
    """dx of one element. By given statistics c2 is 0: x, out of range or not, has no part in it."""
    v = apply_back(x, dy, hi, r, shift, wr, c1, c2)
    return v if c2 != 0 else fma(dy, wr, -c1)


@cache
def gradient_of(kind: str) -> Function:
    """A function (x, dy, weight, mean, rstd, c1, c2, length) -> dx of one element."""
    real = computing(kind)
    double = real is np.float64

    @device
    def slope(
        x: Any, dy: Any, w: Any, mean: Any, rstd: Any, c1: Any, c2: Any, length: Any
    ) -> Any:  # fmt: skip
        # what does not depend on the element is computed once, ahead of the loop
        hi = real(mean)
        shift = (mean - np.float64(hi)) * rstd
        r = real(rstd)
        if double or (holds_group(rstd, c1, c2, length) and holds_weight(w, real(w * r))):
            return gradient(x, dy, hi, r, real(-shift), real(w * r), real(c1), real(c2))
        wr = np.float64(w) * rstd
        return real(
            gradient(np.float64(x), np.float64(dy), np.float64(hi), rstd, -shift, wr, c1, c2)
        )

    return slope
