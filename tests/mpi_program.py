"""What test_mpi.py runs in four processes: each checks its own part against the whole.

    mpiexec -n 4 python -m mpi4py -m tests.mpi_program

Run so, an error in one process ends them all.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import fastnorm as fn

COMM = MPI.COMM_WORLD
SAMPLES = (5, 0, 3, 8)  # of each process: one of them has nothing


def parts(x: Any) -> list[Any]:
    return np.split(x, np.cumsum(SAMPLES)[:-1])


def check_moments() -> None:
    x = np.random.default_rng(0).normal(1e4, 1.0, (16, 3, 4, 5)).astype(np.float32)
    mine = parts(x)[COMM.rank]
    own = fn.Moments((0, 2, 3)) if not len(mine) else fn.Moments.from_array(mine, (0, 2, 3))
    before = own.copy()
    total = own.allreduce(COMM)
    assert own == before
    exact = x.astype(np.longdouble)
    np.testing.assert_array_equal(total.count, 16 * 4 * 5)
    np.testing.assert_allclose(total.mean, exact.mean((0, 2, 3)).astype(float), rtol=1e-15)
    np.testing.assert_allclose(total.var(), exact.var((0, 2, 3)).astype(float), rtol=1e-14)
    assert len({str(d) for d in COMM.allgather(total.to_dict())}) == 1, "the same in each process"
    # and by mpi4py's own reduction, which adds objects
    np.testing.assert_allclose(COMM.allreduce(own).var(), total.var(), rtol=1e-14)


def check_batch_norm(dtype: Any, channel_axis: int, affine: bool, momentum: float | None) -> None:
    """Three steps of training, then inference: as one process with the whole batch."""
    rng = np.random.default_rng(1)
    options = {"channel_axis": channel_axis, "affine": affine, "momentum": momentum}
    whole = fn.nn.BatchNorm(6, dtype=np.float64, **options)
    mine = fn.nn.BatchNorm(6, dtype=np.float64, comm=COMM, **options)
    if affine:
        for norm in (whole, mine):
            norm.weight, norm.bias = np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6)
    # Half a unit for each step of the arithmetic and one for storing, of numbers up to 16: in the
    # computing type, which rounds a dozen times, and in that of the result.
    computing = np.float64 if dtype == np.float64 else np.float32
    store = float(ml_dtypes.finfo(dtype).eps) * 16 + 16 * 16 * float(np.finfo(computing).eps)
    for step in range(3):
        x = rng.normal(3.0 + step, 2.0, (16, 6, 4, 5))
        dy = rng.standard_normal(x.shape)
        if channel_axis == -1:
            x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
        x, dy = x.astype(dtype), dy.astype(dtype)
        y, dx = whole(x), whole.backward(dy)
        my_y = mine(parts(x)[COMM.rank])
        my_dx = mine.backward(parts(dy)[COMM.rank])
        assert my_y.dtype == my_dx.dtype == dtype
        for found, right in ((my_y, y), (my_dx, dx)):
            right = parts(right)[COMM.rank]
            assert found.shape == right.shape
            difference = abs(found.astype(np.float64) - right.astype(np.float64))
            assert (difference <= store).all(), (dtype, difference.max(), store)
    for name, value in whole.state_dict().items():
        # the statistics are float64 sums either way
        np.testing.assert_allclose(mine.state_dict()[name], value, rtol=1e-12, err_msg=name)
    for name, value in whole.grad.items():
        # sums of 960 products, added up in another order and rounded to float32 on the way
        np.testing.assert_allclose(mine.grad[name], value, rtol=0, atol=store * 960**0.5)
    # inference asks nobody: its processes need not meet
    if COMM.rank == 0:
        np.testing.assert_allclose(
            mine.eval()(x).astype(np.float64), whole.eval()(x).astype(np.float64), atol=store
        )


def check_masks() -> None:
    """What np.ma hides in each part: as in one process with the whole batch."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(3.0, 2.0, (16, 6, 4, 5)), rng.standard_normal((16, 6, 4, 5))
    hidden = rng.random(x.shape) < 0.3
    whole = fn.nn.BatchNorm(6, dtype=np.float64)
    mine = fn.nn.BatchNorm(6, dtype=np.float64, comm=COMM)
    y, dx = whole(np.ma.array(x, mask=hidden)), whole.backward(dy)
    my_y = mine(np.ma.array(parts(x)[COMM.rank], mask=parts(hidden)[COMM.rank]))
    my_dx = mine.backward(parts(dy)[COMM.rank])
    # as above, in float64
    for found, right in ((my_y, y), (my_dx, dx)):
        np.testing.assert_allclose(found, parts(right)[COMM.rank], rtol=0, atol=1e-13)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(mine.grad[name], whole.grad[name], rtol=1e-12, atol=1e-12)


def check_recalibration() -> None:
    x = np.random.default_rng(2).normal(50.0, 3.0, (16, 2, 4))
    norm = fn.nn.BatchNorm(2, comm=COMM, dtype=np.float64)
    fn.nn.recalibrate(norm, [parts(x)[COMM.rank]])
    np.testing.assert_allclose(norm.running_mean, x.mean((0, 2)), rtol=1e-14)
    np.testing.assert_allclose(norm.running_var, x.var((0, 2), ddof=1), rtol=1e-13)


def check_errors() -> None:
    norm = fn.nn.BatchNorm(2, comm=COMM)
    with pytest.raises(ValueError, match="one value per channel"):
        norm(np.ones((1 if COMM.rank == 0 else 0, 2), np.float32))


if __name__ == "__main__":
    assert COMM.size == len(SAMPLES)
    check_moments()
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        check_batch_norm(dtype, 1, True, 0.1)
        check_batch_norm(dtype, -1, False, None)
    check_masks()
    check_recalibration()
    check_errors()
    print(f"{COMM.rank} of {COMM.size} is done", flush=True)
