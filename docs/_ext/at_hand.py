"""What optional libraries are here: blocks of code that need others are not run."""

from importlib.util import find_spec


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
