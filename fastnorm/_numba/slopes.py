"""Slopes of activations: functions of one number, which a pass applies as it does an activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numba
import numpy as np

from fastnorm.problem import Problem

_compiled = numba.njit(error_model="numpy")

# The step of central differences by the size of the number: the cube root of float64's epsilon,
# where what the difference rounds is as large as what it leaves out.
STEP = 6e-6


@_compiled
def _relu(v):
    return 0.0 if v <= 0 else 1.0  # also of not a number, as in PyTorch


@_compiled
def _relu6(v):
    return 0.0 if v <= 0 or v >= 6 else 1.0


@_compiled
def _silu(v):
    w = min(max(np.float64(v), -700.0), 700.0)  # beyond, all or nothing passes
    e = math.exp(-w)
    return (1.0 + w * (e / (1.0 + e))) / (1.0 + e) if v == v else np.float64(v)


@_compiled
def _gelu(v):
    w = np.float64(v)
    bounded = min(max(w, -40.0), 40.0)
    density = 0.3989422804014327 * math.exp(-0.5 * bounded * bounded)
    return 0.5 * math.erfc(-0.7071067811865476 * bounded) + bounded * density if v == v else w


@_compiled
def _gelu_tanh(v):
    w = min(max(np.float64(v), -30.0), 30.0)
    square = w * w
    inner = 1.5957691216057308 * w * (1.0 + 0.044715 * square)
    e = math.exp(-min(max(inner, -700.0), 700.0))
    steps = 1.5957691216057308 * w * (1.0 + 0.134145 * square)
    return (1.0 + steps * (e / (1.0 + e))) / (1.0 + e) if v == v else np.float64(v)


# Of all that a caller may name.
NAMED = {"relu": _relu, "relu6": _relu6, "silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


@cache
def central(f: Callable[[float], float]) -> Any:
    """The derivative of a function that Numba has compiled, by central differences in float64."""
    inner: Any = f if numba.extending.is_jitted(f) else numba.njit(f)
    name = getattr(f, "__name__", "activation")
    taken = {signature[0] for signature in inner.signatures if len(signature) == 1}
    if taken and not inner._can_compile and numba.float64 not in taken:
        raise TypeError(
            f"activation {name} is compiled for {', '.join(map(str, taken))}, expected one that "
            "takes float64, in which central differences are computed; write numba.njit(f) without "
            "a signature"
        )

    @_compiled
    def difference(v):
        w = np.float64(v)
        step = STEP * max(1.0, abs(w))
        high, low = w + step, w - step
        return (inner(high) - inner(low)) / (high - low)

    difference.__name__ = f"{name} (central differences)"
    return difference


def slope_of(p: Problem, x: Any) -> Problem:
    """A pass whose y is the slope alone, of x in the type that is computed in."""
    found = NAMED[p.activation] if isinstance(p.activation, str) else p.activation
    return replace(p, x=x, dy=None, activation=found)
