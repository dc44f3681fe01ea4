"""Several processes under MPI: merged moments, and batch norm over all their batches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .helpers import PATIENCE, REQUIRED, ROOT


def mpiexec() -> str | None:
    """The launcher that came with a PyPI package, next to this Python, or else the system's."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def test_four_processes_compute_as_one() -> None:
    pytest.importorskip("mpi4py")
    launcher = mpiexec()
    if launcher is None:
        (pytest.fail if "mpi4py" in REQUIRED else pytest.skip)("no mpiexec: pip install mpich")
    done = subprocess.run(
        [
            launcher,
            "-n",
            "4",
            sys.executable,
            "-W",
            "error",
            "-m",
            "mpi4py",
            "-m",
            "tests.mpi_program",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        timeout=PATIENCE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for i in range(4):
        assert f"{i} of 4 is done" in done.stdout


# --- Without MPI ----------------------------------------------------------------------------------


class Alone:
    """A communicator of one process, as far as fastnorm asks."""

    def allgather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_one_process_alone(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(5.0, 2.0, (8, 3, 6, 6)).astype(dtype) for _ in range(2))
    plain, synchronised = fn.nn.BatchNorm(3), fn.nn.BatchNorm(3, comm=Alone())
    # a dozen roundings of numbers up to 8
    allowed = 12 * 8 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(synchronised(x), plain(x), rtol=0, atol=allowed)
    np.testing.assert_allclose(synchronised.backward(dy), plain.backward(dy), rtol=0, atol=allowed)
    np.testing.assert_allclose(synchronised.running_var, plain.running_var, rtol=1e-6)


def test_a_constant_channel() -> None:
    x = np.full((4, 2, 3), 7.0)
    norm = fn.nn.BatchNorm(2, eps=0.0, comm=Alone())
    norm.bias = np.array([1.0, 2.0])
    np.testing.assert_array_equal(norm(x), np.broadcast_to([[[1.0], [2.0]]], x.shape))
    assert np.isfinite(norm.backward(np.ones_like(x))).all()


# --- Recalibration --------------------------------------------------------------------------------


class Layers:
    """A model as a user would write it."""

    def __init__(self, *layers: Any) -> None:
        self.layers = list(layers)
        self.more = {"same": layers[0], "none": None}

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def test_recalibration_is_exact_for_one_norm() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (101, 4, 5))
    norm = fn.nn.BatchNorm(4, dtype=np.float64)
    for batch in np.array_split(x, 7):
        norm(batch)
    tracked = int(norm.num_batches_tracked)
    for cuts in ([1, 2, 50], [100], []):  # a batch of one sample is fine
        assert fn.nn.recalibrate(norm, np.split(x, cuts)) == 1
        np.testing.assert_allclose(norm.running_mean, x.mean((0, 2)), rtol=1e-14)
        np.testing.assert_allclose(norm.running_var, x.var((0, 2), ddof=1), rtol=1e-14)
    assert norm.num_batches_tracked == tracked
    assert norm.training


def test_recalibration_of_a_model() -> None:
    rng = np.random.default_rng(1)
    batches = [rng.normal(3.0, 1.0 + i, (16, 4)) for i in range(5)]
    first, second = (fn.nn.BatchNorm(4, dtype=np.float64) for _ in range(2))
    untracked = fn.nn.BatchNorm(4, track_running_stats=False)
    model = Layers(first, lambda x: x * x, second, untracked)
    first.eval()
    assert fn.nn.recalibrate(model, iter(batches)) == 2
    whole = np.concatenate(batches)
    np.testing.assert_allclose(first.running_mean, whole.mean(0), rtol=1e-14)
    np.testing.assert_allclose(first.running_var, whole.var(0, ddof=1), rtol=1e-14)
    # what the second gets depends on the first, which normalises each batch by itself
    seen = np.concatenate([fn.batch_norm(b, training=True) ** 2 for b in batches])
    np.testing.assert_allclose(second.running_mean, seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(second.running_var, seen.var(0, ddof=1), rtol=1e-12)
    assert not first.training
    assert int(first.num_batches_tracked) == 0
    np.testing.assert_allclose(first(whole).mean(0), 0, atol=1e-12)


def test_recalibration_refuses() -> None:
    norm = fn.nn.BatchNorm(4)
    before = norm.state_dict()
    for model, batches, message in (
        (fn.nn.LayerNorm(4), [np.ones((2, 4))], "found no BatchNorm"),
        (fn.nn.BatchNorm(4, track_running_stats=False), [np.ones((2, 4))], "found no BatchNorm"),
        (norm, [], "expected at least 2"),
        (norm, [np.ones((1, 4))], "expected at least 2"),
        (norm, [np.ones((2, 4)), np.ones((2, 5))], "with 5 channels"),
        (Layers(norm, np.linalg.inv), [np.ones((4, 4))], "Singular"),
    ):
        with pytest.raises((ValueError, np.linalg.LinAlgError), match=message):
            fn.nn.recalibrate(model, batches)
        for name, value in norm.state_dict().items():
            np.testing.assert_array_equal(value, before[name])
        assert norm._recorded is None
