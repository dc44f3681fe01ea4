"""The kernels that were compiled with the package."""

from __future__ import annotations

from functools import partial

from fastnorm import _core
from fastnorm._formulas import IN_KERNELS
from fastnorm.backends import compiled
from fastnorm.problem import Array


def available() -> bool:
    """Whether there are any, and one of them loads."""
    return _core.kernels is not None


if _core.kernels is not None:
    _core.kernels.number_activations(IN_KERNELS)

forward = partial(compiled.forward, kernels=_core.kernels)
backward = partial(compiled.backward, kernels=_core.kernels)


def moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, out: Array) -> None:
    """Fill `out` with the moments of x."""
    compiled.moments(x, reduced, mask, out, _core.kernels)


takes_whole = compiled.takes_whole
