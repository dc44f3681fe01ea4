"""Tensors and the arrays that share their memory, and what is in play besides a plain call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnorm import _core
from fastnorm.arguments import read

# A subclass has code of its own for every operator, which kernels would pass by.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

compiling = torch.compiler.is_dynamo_compiling
# The innermost transform of torch.func, or None.
in_transform = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing

# One of many gradients at once, as torch.autograd.grad(..., is_grads_batched=True) makes them.
is_batched = torch._C._functorch.is_legacy_batchedtensor


_QUESTIONS = (in_transform, _modes, _tracing)


def transformed() -> bool:
    """Whether PyTorch has to see each operator.

    That is so under torch.compile, a transform of torch.func, a dispatch mode (as of make_fx,
    torch.export and selective checkpoints) or torch.jit.trace.
    """
    return bool(compiling() or any(question() for question in _QUESTIONS))


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
    found = None if _exchange is None else _exchange.array(value)
    if found is None:
        found = read(value.detach(), name)
        if _exchange is not None and value.dtype is torch.bfloat16:
            _exchange.know_bfloat16(found.dtype)
    return found


def tensor_of(array: Any) -> Any:
    """An array as a tensor of the same memory, and each in a tuple."""
    if isinstance(array, tuple):
        return tuple([tensor_of(part) for part in array])
    if type(array) is not np.ndarray:
        return torch.tensor(array, dtype=torch.float64, device="cpu")  # a number
    found = None if _exchange is None else _exchange.tensor(array)
    if found is not None:
        return found
    if array.dtype.kind == "V":  # bfloat16: NumPy's own name of a dtype takes microseconds
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def written(*tensors: Any) -> None:
    """Tell autograd that the numbers of these have changed, of those that are tensors."""
    changed = [t for t in tensors if isinstance(t, Tensor) and not t.is_inference()]
    torch.autograd.graph.increment_version(changed)


# --- Without Python -------------------------------------------------------------------------------


def _table(module: Any) -> Any:
    """PyTorch's tensors by its table of C functions; None where one of the two is not there."""
    if module is None:
        if "_exchange" in _core.failed:
            warnings.warn(
                "fastnorm.torch takes longer for small calls, as a part of it does not load "
                f"({_core.failed['_exchange']}); install fastnorm again",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    try:
        return module.Exchange(torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg)
    except (AttributeError, ImportError):  # PyTorch has no such table, or another
        return None


_module = _core.exchange()
_exchange = _table(_module)


def finder(
    function: Any,
    running: tuple[str, ...],
    record: Callable[[tuple[Any, ...]], Any] | None = None,
) -> Callable[[tuple[Any, ...]], Any]:
    """What answers calls of a function of arrays that have nothing but plain tensors, or None.

    `record` answers those of which one requires a gradient, if any.
    """
    names = argument_names(function)
    if _module is None or _exchange is None or function.find is None:
        return lambda call: None
    at = {name: n for n, name in enumerate(names)}
    found: Callable[[tuple[Any, ...]], Any] = _module.PlainCalls(
        _exchange,
        function.find,
        record,
        questions=_QUESTIONS,
        records=torch.is_grad_enabled,
        levels=forward_ad,
        size=torch.Size,
        written=written,
        out=at.get("out", -1),
        running=tuple(at[name] for name in running if name in at),
        moves=at.get("training", at.get("use_input_stats", -1)),
        arguments=len(names),
    ).find
    return found
