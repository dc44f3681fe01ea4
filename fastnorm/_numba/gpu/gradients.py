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


@device
def gradient(x: Any, dy: Any, hi: Any, r: Any, shift: Any, wr: Any, c1: Any, c2: Any) -> Any:
    """dx of one element. By given statistics c2 is 0: x, out of range or not, has no part in it."""
    v = apply_back(x, dy, hi, r, shift, wr, c1, c2)
    return v if c2 != 0 else fma(dy, wr, -c1)


@cache
def gradient_of(kind: str) -> Function:
    """A function (x, dy, weight, mean, rstd, c1, c2) -> dx of one element."""
    real = computing(kind)
    double = real is np.float64

    @device
    def slope(x: Any, dy: Any, w: Any, mean: Any, rstd: Any, c1: Any, c2: Any) -> Any:
        # what does not depend on the element is computed once, ahead of the loop
        hi = real(mean)
        shift = (mean - np.float64(hi)) * rstd
        if double or holds(rstd):
            r = real(rstd)
            return gradient(x, dy, hi, r, real(-shift), real(w * r), real(c1), real(c2))
        wr = np.float64(w) * rstd
        return real(
            gradient(np.float64(x), np.float64(dy), np.float64(hi), rstd, -shift, wr, c1, c2)
        )

    return slope
