"""Backward passes of fastnorm beside PyTorch: `make bench`.

Each result is checked before it is timed. PyTorch runs with as many threads as fastnorm; what is
timed is its autograd's backward pass alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .cases import BACKWARD, Case

Array = np.ndarray[Any, Any]


def _fastnorm(case: Case, x: Array, dy: Array) -> Callable[[], Any]:
    op, p = case.operation, case.parameters()
    _, *stats = getattr(fn, op.name)(x, **p, return_stats=True)
    options = {k: p[k] for k in op.backward_keywords if k in p}
    backward = getattr(fn, str(op.backward))
    return lambda: backward(dy, x, *stats, **options)


def _torch(case: Case, x: Array, dy: Array) -> Callable[[], Any]:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(fn.get_num_threads())
    p = case.operation.to_torch(case.parameters())
    leaves = [torch.from_numpy(x).requires_grad_()]
    leaves += [p[name].requires_grad_() for name in ("weight", "bias") if name in p]
    y, slope = case.operation.torch(leaves[0], **p), torch.from_numpy(dy)
    return lambda: torch.autograd.grad(y, leaves, slope, retain_graph=True)


CONTENDERS = {"fastnorm": _fastnorm, "torch": _torch}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(case: Case, contender: str, benchmark: Any) -> None:
    if contender == "torch" and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    x = case.input()
    dy = np.empty_like(x)
    dy[...] = np.random.default_rng(2).standard_normal(x.shape)
    call = CONTENDERS[contender](case, x, dy)
    op, p = case.operation, case.parameters()
    _, *stats = getattr(fn._reference, op.name)(x, **p, return_stats=True)
    options = {k: p[k] for k in op.backward_keywords if k in p}
    right = getattr(fn._reference, str(op.backward))(dy, x, *stats, **options)
    # as tests/test_backward.py asks of fastnorm; the others' float32 sums lose more
    allowed = 1e-6 if contender == "fastnorm" else 1e-4
    for gradient, exact in zip(call(), right, strict=True):
        assert np.linalg.norm(np.asarray(gradient) - exact) <= allowed * np.linalg.norm(exact)
    benchmark.group = f"{case} backward"
    benchmark.pedantic(call, rounds=15, warmup_rounds=2, iterations=max(1, 2**18 // x.size))
