"""PyTorch's threads, which it lends to whoever has work for them."""

from __future__ import annotations

import ctypes

import torch

from fastnorm import _core


def borrow() -> bool:
    """Let the compiled kernels run on PyTorch's threads while these are awake; whether they may.

    After an operator they look for work of the next one for some milliseconds, and threads of our
    own would have to wait for the processors that they are on. `torch.set_num_threads` is a limit
    to the kernels, too.
    """
    if _core.kernels is None:
        return False
    library = ctypes.CDLL(torch._C.__file__)  # and all that it is linked with
    try:
        run, count = library.torch_parallel_for, library.torch_get_num_threads
    except AttributeError:  # a system where names are not looked up in what is linked
        return False
    lent = [ctypes.cast(function, ctypes.c_void_p).value for function in (run, count)]
    borrowed: bool = _core.kernels.borrow_threads(*lent)
    return borrowed
