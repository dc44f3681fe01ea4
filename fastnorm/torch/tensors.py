"""Tensors and the arrays that share their memory, and what is in play besides a plain call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnorm.arguments import read

# A subclass has code of its own for every operator, which kernels would pass by.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

compiling = torch.compiler.is_dynamo_compiling
_transforms = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing

# One of many gradients at once, as torch.autograd.grad(..., is_grads_batched=True) makes them.
is_batched = torch._C._functorch.is_legacy_batchedtensor


def transformed() -> bool:
    """Whether PyTorch has to see each operator.

    That is so under torch.compile, a transform of torch.func, a dispatch mode (as of make_fx,
    torch.export and selective checkpoints) or torch.jit.trace.
    """
    return bool(compiling() or _transforms() is not None or _modes() or _tracing())


def watched() -> bool:
    """Whether more may be asked of a call than numbers: `transformed`, or dual numbers."""
    return transformed() or forward_ad._current_level >= 0


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are in the host's memory, and no other code watches them."""
    return (
        type(tensor) in PLAIN
        and tensor.is_cpu
        and not tensor.is_nested
        and (forward_ad._current_level < 0 or forward_ad.unpack_dual(tensor).tangent is None)
    )


def argument_names(function: Any) -> tuple[str, ...]:
    """The arguments of a public function, in their order."""
    code = function.__code__  # of the wrapper, whose signature is the function's
    names: tuple[str, ...] = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return names


def array_of(value: Any, name: str) -> Any:
    """A tensor as an array of the same memory, without its gradient; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu and value.dtype is not torch.bfloat16:
        try:
            return value.numpy(force=True)
        except TypeError:  # sparse, or of a dtype that NumPy does not have: `read` says so
            pass
    return read(value.detach(), name)


def tensor_of(array: Any) -> Any:
    """An array as a tensor of the same memory, and each in a tuple."""
    if type(array) is np.ndarray:
        if array.dtype.kind == "V":  # bfloat16: NumPy's own name of a dtype takes microseconds
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    if isinstance(array, tuple):
        return tuple([tensor_of(part) for part in array])
    return torch.tensor(array, dtype=torch.float64, device="cpu")  # a number


def written(*tensors: Any) -> None:
    """Tell autograd that the numbers of these have changed, of those that are tensors."""
    changed = [t for t in tensors if isinstance(t, Tensor) and not t.is_inference()]
    torch.autograd.graph.increment_version(changed)
