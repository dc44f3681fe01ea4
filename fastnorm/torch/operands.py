"""What comes into a call that PyTorch computes or records: operands as tensors, options checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnorm.arguments import as_numbers, channel_axis_of, is_masked, layer_axes
from fastnorm.dispatch import CHECKS
from fastnorm.torch.tensors import compiling, tensor_of

Named = dict[str, Any]

# Norms of channels.
BY_CHANNEL = frozenset({"batch_norm", "instance_norm", "group_norm"})

# What is read as an array; anything else of a call is an option.
OPERANDS = frozenset(
    {"x", "v", "w", "weight", "bias", "residual", "where", "g", "alpha", "shift", "out"}
)


def with_tensors(named: Named) -> Named:
    """A call whose weights and other operands are tensors, where they came as numbers or arrays."""
    others = {
        key: _tensor(value, key)
        for key, value in named.items()
        if value is not None and key in OPERANDS and not isinstance(value, Tensor)
        # a number is none in a formula, and an `out` that is no tensor is refused
        if key != "out" and not (key in ("alpha", "shift") and isinstance(value, int | float))
    }
    return named | others if others else named


def _tensor(value: Any, key: str) -> Tensor:
    """A copy: what the caller does to the array later is not of this call."""
    if compiling() or isinstance(value, bool | int | float):
        kind = torch.float64 if isinstance(value, float) else None
        return torch.as_tensor(value, dtype=kind, device="cpu")
    if key == "where" and is_masked(value):
        value = value.filled(False)
    array = as_numbers(value, key)
    found: Tensor = tensor_of(np.array(array, array.dtype.newbyteorder("="), order="K"))
    return found


def floats(x: Tensor, name: str) -> Tensor:
    """x, or its integers or booleans in float64; refuse what the kernels do not have."""
    if x.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return x
    if x.is_complex() or x.is_floating_point():
        raise TypeError(
            f"{name} has dtype {x.dtype}, expected float16, bfloat16, float32, float64, or "
            f"integers or booleans (computed in float64); write {name}.double() first"
        )
    return x.double()


def check(name: str, named: Named, x: Tensor) -> None:
    """Refuse options, a residual and an `out` that the kernels refuse."""
    for key in ("residual", "out"):
        value = named.get(key)
        if value is not None and not x.is_nested and value.shape != x.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, expected that of x, {tuple(x.shape)}; "
                f"write {'residual.expand_as(x)' if key == 'residual' else 'torch.empty_like(x)'}"
            )
    out = named.get("out")
    if out is not None and out.dtype is not x.dtype:
        raise TypeError(
            f"out has dtype {out.dtype}, expected {x.dtype} as x has; write torch.empty_like(x)"
        )
    if compiling():  # a compiler does not see through these
        return
    if "normalized_shape" in named and not x.is_nested:
        layer_axes(x, named["normalized_shape"], named.get("axis"), name)
    if name in BY_CHANNEL:
        channel_axis_of(x, named["channel_axis"], name, samples=name != "batch_norm")
    for key, value in named.items():
        if key in CHECKS and not (value is None and key == "eps" and name.endswith("rms_norm")):
            CHECKS[key](value, key)
