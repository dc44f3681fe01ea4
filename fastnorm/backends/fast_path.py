"""Cached calls: what the compiled kernels answer before anything is described."""

from __future__ import annotations

from typing import Any

from fastnorm import _core

# What `quick_forward` and `quick_backward` are asked for.
BATCH, INFERENCE, INSTANCE, GROUP, LAYER, RMS, ADD_LAYER, ADD_RMS = range(8)
LENGTH, WEIGHT, STANDARD, RESPONSE, TANH, ACTIVATION = range(8, 14)  # those of related.py


class _Unplanned:
    """What is returned without compiled kernels."""

    key = None


def _no_plan(*call: Any) -> Any:
    return _Unplanned()


# What the backend answers without a description: the result, or `Unplanned`, after which the call
# is to be described in a `Pass` that carries its key.
#
#     quick_forward(norm, first, second, x, weight, bias, eps, return_stats, where, residual,
#                   activation, out, own_eps, running_mean, running_var, momentum)
#     quick_backward(norm, first, second, dy, x, mean, rstd, weight)
#
# `norm`, `first` and `second` (whole numbers, tuples of them, or None) say what is asked of these
# arrays; without `own_eps` the norm's own for this dtype is used.
Unplanned: Any = getattr(_core.kernels, "Unplanned", _Unplanned)
quick_forward: Any = getattr(_core.kernels, "quick_forward", _no_plan)
quick_backward: Any = getattr(_core.kernels, "quick_backward", _no_plan)
