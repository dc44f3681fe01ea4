"""What optional libraries are here: blocks of code that need others are not run."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which


def has(*names):
    """Whether all of these can be imported."""
    return all(find_spec(name) is not None for name in names)


def has_mpi():
    """Whether there is an MPI for mpi4py."""
    try:
        from mpi4py import MPI  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def has_gpu():
    """Whether PyTorch sees one, for CUDA."""
    if not has("torch", "numba_cuda"):
        return False
    import torch

    return torch.cuda.is_available()


def absent_examples():
    """The examples of the gallery that cannot run here."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    mpi = has_mpi() and which("mpiexec", path=beside) is not None
    here = {"pytorch": has("torch"), "mpi": mpi}
    here |= {"own_njit": has("numba"), "own_activation": has("numba"), "dask": has("dask")}
    return [name for name, found in here.items() if not found]
