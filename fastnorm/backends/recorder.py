"""No backend that computes: it writes down what kernels would be asked (`fastnorm.explain`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastnorm import runtime
from fastnorm.backends import compiled
from fastnorm.layout import Layout
from fastnorm.machine import Machine
from fastnorm.problem import OPERANDS, Array, BackwardProblem, Problem
from fastnorm.schedule import (
    BackwardSchedule,
    Dtypes,
    ForwardSchedule,
    backward_schedule,
    forward_schedule,
)

NAME = "recorder"


@dataclass(frozen=True, slots=True)
class Asked:
    """One pass that kernels were asked for."""

    layout: Layout
    dtypes: Dtypes
    backward: bool
    options: dict[str, Any] = field(default_factory=dict)

    def schedule(self, machine: Machine) -> ForwardSchedule | BackwardSchedule:
        """How it would be carried out."""
        if self.backward:
            return backward_schedule(self.layout, self.dtypes, machine, **self.options)
        return forward_schedule(self.layout, self.dtypes, machine, **self.options)


_asked: ContextVar[list[Asked]] = ContextVar("asked")


@contextmanager
def recording() -> Iterator[list[Asked]]:
    """Nothing is computed inside a ``with`` block; what would have been is in the list."""
    token = _asked.set([])
    try:
        with runtime.scope(runtime.Choice(backend=NAME)):
            yield _asked.get()
    finally:
        _asked.reset(token)


def _dtypes(arrays: dict[str, Any]) -> Dtypes:
    return tuple((name, a.dtype) for name, a in arrays.items() if isinstance(a, np.ndarray))


class _Kernels:
    """What the compiled kernels offer."""

    def run_pass(self, layout: Layout, _: Any, *, activation: Any = None, **given: Any) -> bool:
        arrays = {name: given.get(name) for name in OPERANDS}
        options = {name: given[name] for name in ("given", "activation_first")}
        options["activation"] = activation or None
        _asked.get().append(Asked(layout, _dtypes(arrays), False, options))
        return False

    def run_moments(self, layout: Layout, _: Any, x: Array, fields: Array, **more: Any) -> None:
        _asked.get().append(Asked(layout, _dtypes({"x": x, "mask": more.get("mask")}), False))

    def run_backward(
        self, layout: Layout, _: Any, x: Array, dy: Array, dx: Array, **more: Any
    ) -> bool:
        operands = {"x": x, "dy": dy, "dx": dx, "weight": more["weight"]}
        options = {"training": more["training"]}
        _asked.get().append(Asked(layout, _dtypes(operands), True, options))
        return True


_kernels = _Kernels()


def available() -> bool:
    """Always; it is chosen by `recording` alone."""
    return True


def forward(p: Problem) -> None:
    """Write down a pass over an array."""
    compiled.forward(p, _kernels)


def backward(p: BackwardProblem) -> None:
    """Write down a pass back."""
    compiled.backward(p, _kernels)


def moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, out: Array) -> None:
    """Write down that the moments of x were asked for."""
    compiled.moments(x, reduced, mask, out, _kernels)


takes_whole = compiled.takes_whole
