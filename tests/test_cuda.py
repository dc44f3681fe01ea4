"""The kernels for the GPU: in Numba's simulator always, on a GPU where there is one.

Numba reads NUMBA_ENABLE_CUDASIM when it is imported: `cuda_cases.py` runs in other processes.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from .helpers import ROOT, run_python

CASES = ("-m", "pytest", "tests/cuda_cases.py", "-q", "--tb=short", "-p", "no:cacheprovider")


def check_cases(run: subprocess.CompletedProcess[str]) -> None:
    """If any of the cases failed, show what their process has printed."""
    if run.returncode != 0 or " passed" not in run.stdout:
        pytest.fail(f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}", pytrace=False)


@cache
def has_gpu() -> bool:
    """Whether Numba finds a GPU: asked in another process, as this one may be forked later."""
    script = "import sys; from numba import cuda; sys.exit(not cuda.is_available())"
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


@pytest.mark.slow
def test_in_the_simulator() -> None:
    check_cases(run_python(*CASES, NUMBA_ENABLE_CUDASIM="1"))


def test_on_a_gpu() -> None:
    if not has_gpu():
        pytest.skip("Numba finds no GPU here")
    check_cases(run_python(*CASES, NUMBA_ENABLE_CUDASIM="0"))


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """For real hardware, of which nothing is needed here: the simulator compiles nothing."""
    run = run_python("-m", "tests.cuda_kernels", NUMBA_ENABLE_CUDASIM="0")
    if run.returncode != 0:
        pytest.fail(f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}", pytrace=False)
    assert run.stdout.rpartition("given_scale")[2].split()[-1] in ("PTX", "LLVM")


def test_recognising_arrays_imports_nothing() -> None:
    script = (
        "import sys; from fastnorm._numba.gpu.libraries import handles; import numpy as np;"
        "handles(np.ones(3)); handles([1]);"
        "bad = {'numba', 'torch', 'cupy', 'ml_dtypes'} & set(sys.modules); assert not bad, bad"
    )
    run = run_python("-c", script)
    assert run.returncode == 0, run.stderr


def test_no_module_name_is_taken_for_numbas() -> None:
    """numba-cuda redirects every module with "numba.cuda" in its name; one of ours, for ever."""
    for path in (ROOT / "fastnorm").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert "numba.cuda" not in name, f"{name}: give it another name"


def test_one_file_knows_the_package() -> None:
    folder = Path(ROOT / "fastnorm")
    files = [
        p.name for p in folder.rglob("*.py") if "from numba import cuda" in p.read_text("utf-8")
    ]
    assert files == ["package.py"]
