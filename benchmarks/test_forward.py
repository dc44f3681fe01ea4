"""Forward passes of fastnorm beside NumPy and PyTorch: `make bench`.

Each result is checked before it is timed. PyTorch runs with as many threads as fastnorm.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .cases import FORWARD, Case

Array = np.ndarray[Any, Any]


def _fastnorm(case: Case, x: Array) -> Callable[[], Any]:
    p = case.parameters()
    function = getattr(fn, case.operation.name)
    return lambda: function(x, **p)


def _torch(case: Case, x: Array) -> Callable[[], Any]:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(fn.get_num_threads())
    p, tensor = case.operation.to_torch(case.parameters()), torch.from_numpy(x)

    def call() -> Any:
        with torch.inference_mode():
            return case.operation.torch(tensor, **p)

    return call


def _numpy(case: Case, x: Array) -> Callable[[], Any]:
    """The float32 expression that anyone would write."""
    p, op = case.parameters(), case.operation
    groups, eps = case.num_groups or 1, 1e-5
    grouped = (len(x), groups, -1, *x.shape[2:]) if op.grouped else x.shape
    axes = (2, 3, 4) if op.grouped else op.linked(x.ndim, 1)
    place = [1] * x.ndim
    place[1 if x.ndim > 2 else -1] = -1
    weight = p["weight"].reshape(place) if "weight" in p else np.float32(1)
    bias = p["bias"].reshape(place) if "bias" in p else np.float32(0)
    given = [p[k].reshape(place) for k in ("running_mean", "running_var")] if not axes else None

    def call() -> Array:
        seen = x.reshape(grouped)
        mean = given[0] if given else seen.mean(axes, keepdims=True)
        if op.name == "rms_norm":
            y = seen / np.sqrt((seen**2).mean(axes, keepdims=True) + np.finfo(np.float32).eps)
        else:
            var = given[1] if given else seen.var(axes, keepdims=True)
            y = (seen - mean) / np.sqrt(var + eps)
        return y.reshape(x.shape) * weight + bias

    return call


CONTENDERS = {"fastnorm": _fastnorm, "numpy": _numpy, "torch": _torch}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case: Case, contender: str, benchmark: Any) -> None:
    if contender == "torch" and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    x = case.input()
    call = CONTENDERS[contender](case, x)
    y = call()
    right = getattr(fn._reference, case.operation.name)(x, **case.parameters())
    # the others' float32 sums lose up to sqrt(n) roundings; that is what fastnorm is for
    assert abs(np.asarray(y) - right).max() <= (1e-5 if contender == "fastnorm" else 1e-3)
    benchmark.group = str(case)
    benchmark.pedantic(call, rounds=15, warmup_rounds=2, iterations=max(1, 2**18 // x.size))
