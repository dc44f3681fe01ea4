"""Every operation that PyTorch has, against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm.operations import OPERATIONS, Operation

from .helpers import F32, F64, call, data, epsilon, expected, named

by_operation = pytest.mark.parametrize(
    "op", [op for op in OPERATIONS if op.torch is not None], ids=named
)


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


@by_operation
@pytest.mark.parametrize("dtype", [F32, F64], ids=named)
@pytest.mark.parametrize("shape", [(4, 8, 6, 10), (5, 8, 33), (6, 12)], ids=str)
def test_like_pytorch(op: Operation, shape: tuple[int, ...], dtype: Any, torch: Any) -> None:
    if len(shape) == 2 and op.name in (
        "instance_norm",
        "local_response_norm",
        "global_response_norm",
    ):
        shape = (*shape, 2)  # PyTorch has these only with positions
    x = data(shape, dtype, 1.0)
    p = op.parameters(shape, dtype, np.random.default_rng(0))
    assert op.torch is not None
    theirs = first(op.torch(torch.from_numpy(x), **op.to_torch(p))).numpy()
    ours = first(call(op, x, p))
    # PyTorch's sums of n numbers round n times at worst, about their size: 10 here
    n = x.size
    assert abs(ours - theirs).max() <= 10 * min(n, 64) * epsilon(dtype)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_like_pytorch(name: str, torch: Any) -> None:
    x = data((4, 8, 6, 10), F64, 1.0)
    ours = [np.zeros(8), np.ones(8)]
    theirs = [torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)]
    flag = {"training": True} if name == "batch_norm" else {"use_input_stats": True}
    for step in range(3):
        getattr(fn, name)(x + step, *ours, momentum=0.3, **flag)
        getattr(torch.nn.functional, name)(
            torch.from_numpy(x + step), *theirs, momentum=0.3, **flag
        )
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-12)


def test_large_means(torch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """At mean/std 1e4 PyTorch's float32 results have lost what ours keep."""
    x = data((8, 32, 24, 24), F32, 1e4)
    op = next(op for op in OPERATIONS if op.name == "group_norm")
    p = op.parameters(x.shape, F32, np.random.default_rng(0))
    p.pop("weight"), p.pop("bias")
    exact = expected(op, x, p)
    assert op.torch is not None
    theirs = op.torch(torch.from_numpy(x), **op.to_torch(p)).numpy()
    errors = {"fastnorm": abs(call(op, x, p) - exact).max(), "PyTorch": abs(theirs - exact).max()}
    with capsys.disabled():
        print(f"\n  largest error of group_norm at mean/std 1e4: {errors}")
    assert errors["fastnorm"] <= 3 * epsilon(F32) * abs(exact).max()
