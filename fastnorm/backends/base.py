"""What a backend is: a module with the functions of `Backend`, named in `backends.MODULES`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from fastnorm.problem import Array, BackwardProblem, Problem


class Backend(Protocol):
    """One way to compute; `fastnorm.backends.numpy` is one without kernels."""

    def available(self) -> bool:
        """Whether this installation has what it needs; nothing optional is imported to tell."""

    def forward(self, p: Problem) -> None:
        """Carry out a pass over an array."""

    def backward(self, p: BackwardProblem) -> None:
        """Carry out a pass back."""

    def moments(self, x: Array, reduced: tuple[bool, ...], mask: Array | None, out: Array) -> None:
        """Fill `out` with the moments of x: what `backends.compute_moments` says."""

    def takes_whole(self, dtype: np.dtype[Any]) -> bool:
        """Whether `moments` reads an array of this type as it is, without a converted copy."""


def sum_to(gradient: Array, elements: Array) -> None:
    """Sum over the axes along which `gradient` has length 1."""
    axes = tuple(axis for axis, size in enumerate(gradient.shape) if size == 1)
    with np.errstate(all="ignore"):
        gradient[...] = elements.sum(axis=axes, keepdims=True)
