"""The functions of tensors, one for each of fastnorm's own, with its arguments."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnorm import backward, elementwise, functional, related
from fastnorm.arguments import read, shown
from fastnorm.dispatch import QUICK
from fastnorm.moments import fields_of_batch
from fastnorm.moments import moments as moments_of_arrays
from fastnorm.moments import standardize as standardize_arrays
from fastnorm.operations import OPERATIONS
from fastnorm.torch import formulas, gradients
from fastnorm.torch.tensors import (
    PLAIN,
    argument_names,
    compiling,
    is_plain,
    tensor_of,
    transformed,
)

# What has gradients; the others are of the numbers alone.
_DIFFERENTIABLE = frozenset(op.name for op in OPERATIONS)

# Plain tensors that need no gradient go to the cache of fastnorm's function at once.
_SOURCE = """\
def make(find, describe, kernels, compiling):
    def {name}({signature}):
        found = None if compiling() else find(({given},))
        return describe(kernels, dict({named})) if found is None else found
    return {name}
"""


def _describe(kernels: gradients.Kernels, named: dict[str, Any]) -> Any:
    """Answer any call: by the kernels, recorded or not, or by PyTorch."""
    name = kernels.name
    named = gradients.settled(named)
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    first = next(iter(named.values()))
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{name} of fastnorm.torch got {shown(first)}, expected a torch.Tensor; write "
            f"fastnorm.{name} for arrays, or torch.as_tensor(...)"
        )
    seen = transformed()
    plain = not seen and all(map(is_plain, tensors))
    gradients.check_moved(named, plain)
    if not plain:
        if first.is_cpu and not seen:
            for key, value in named.items():
                if isinstance(value, Tensor) and not value.is_cpu:
                    read(value.detach(), key)  # refuses it
        if name in _DIFFERENTIABLE:
            return formulas.by_pytorch(name, named)
        raise TypeError(
            f"{name} got a tensor of a transform, a subclass or another device, expected plain "
            "ones on the CPU: it computes numbers alone; call it outside, or write x.cpu()"
        )
    if name not in _DIFFERENTIABLE:
        arrays = {
            key: read(value, key) if isinstance(value, Tensor) else value
            for key, value in named.items()
        }
        return tensor_of(kernels.function(**arrays))
    if isinstance(named.get("out"), Tensor):
        gradients.check_written(named["out"], "out")
    recording = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if recording and any(tensor.requires_grad for tensor in tensors):
        return gradients.recorded(kernels, named)
    return kernels(tuple(named.values()))


def _of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, of the signature of fastnorm's."""
    names, name = argument_names(function), function.__name__
    positional = function.__code__.co_argcount
    signature = [*names[:positional], *["*"] * (positional < len(names)), *names[positional:]]
    source = _SOURCE.format(
        name=name,
        signature=", ".join(signature),
        given=", ".join(names),
        named=", ".join(f"{key}={key}" for key in names),
    )
    file = f"<{name} of tensors>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec"), made)
    kernels = gradients.Kernels(function)
    of_tensors: Callable[..., Any] = made["make"](kernels.find, _describe, kernels, compiling)
    for kind in PLAIN:
        QUICK.setdefault(kind, {})[name] = kernels.find  # of fastnorm.layer_norm(tensor), too
    for attribute in ("__defaults__", "__kwdefaults__"):
        setattr(of_tensors, attribute, getattr(function, attribute))
    of_tensors.__qualname__ = name
    of_tensors.__module__, of_tensors.__doc__ = "fastnorm.torch", _documented(function)
    return of_tensors


# Examples of arrays as those of tensors: what is written, and what is printed.
_WRITTEN = (
    ("np.array(", "torch.tensor("),
    ("np.", "torch."),
    ("fn.", "fnt."),
)


# Those that are printed otherwise, or as zeros of float64 alone.
_EXAMPLES = {
    "moments": """
    >>> fnt.moments(torch.tensor([1.0, 3.0]))
    (tensor(2., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """,
    "local_response_norm": """
    >>> fnt.local_response_norm(torch.tensor([[0.0, 1.0]]), 1, alpha=3.0, beta=0.5)
    tensor([[0.0000, 0.5000]])
    """,
    "global_response_norm": """
    >>> x = torch.tensor([[[1.0], [3.0]]])
    >>> fnt.global_response_norm(x, torch.ones(2), torch.zeros(2), eps=0.0).ravel()
    tensor([1.5000, 7.5000])
    """,
    "l2_normalize": """
    >>> fnt.l2_normalize(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """,
    "dynamic_tanh_backward": """
    >>> x, dy = torch.tensor([0.0, 200.0]), torch.tensor([1.0, 1.0])
    >>> fnt.dynamic_tanh_backward(dy, x, 0.5)[0]
    tensor([0.5000, 0.0000])
    """,
    "derf_backward": """
    >>> x, dy = torch.tensor([0.0, 100.0]), torch.tensor([1.0, 1.0])
    >>> fnt.derf_backward(dy, x, 0.5)[0]
    tensor([0.5642, 0.0000])
    """,
    "rms_norm_backward": """
    >>> x = torch.tensor([[3.0, -4.0]])
    >>> y, rstd = fnt.rms_norm(x, 2, eps=0.0, return_stats=True)
    >>> fnt.rms_norm_backward(x, x, rstd, 2)[1]  # of the weight that is not there
    tensor([2.5456, 4.5255])
    """,
} | {
    f"{name}_backward": f"""
    >>> x = torch.tensor([[[0.0], [1.0]], [[5.0], [7.0]]])
    >>> y, *stats = fnt.{name}({call}return_stats=True)
    >>> dx, dweight, dbias = fnt.{name}_backward(torch.ones_like(y), {of})
    >>> dbias  # {what}
    tensor({dbias})
    """
    for name, call, of, what, dbias in (
        ("batch_norm", "x, training=True, ", "x, *stats", "one per channel", "[2., 2.]"),
        ("layer_norm", "x.mT, 2, ", "x.mT, *stats, 2", "of two samples", "[2., 2.]"),
        ("instance_norm", "x.mT, ", "x.mT, *stats", "of two positions and two samples", "[4.]"),
        ("group_norm", "x, 1, ", "x, *stats, 1", "one per channel", "[2., 2.]"),
    )
}


def _documented(function: Callable[..., Any]) -> str | None:
    """The documentation of a function of arrays, its examples with tensors."""
    if not function.__doc__:  # absent under python -OO
        return None
    text, heading, examples = function.__doc__.partition("    Examples\n    --------\n")
    heading += "    >>> import torch, fastnorm.torch as fnt"
    if function.__name__ in _EXAMPLES:
        return text + heading + _EXAMPLES[function.__name__]
    lines, printed = [], False
    for line in examples.splitlines(keepends=True)[1:]:
        if line.lstrip().startswith((">>>", "...")):
            printed = False
            for old, new in _WRITTEN:
                line = line.replace(old, new)
        elif "array(" in line:
            printed = True
            line = line.replace("array(", "tensor(")
        elif printed and line.strip():
            line = " " + line  # numbers stay below one another
        lines.append(line)
    return text + heading + "\n" + "".join(lines)


# What `Moments.update` asks of an adapter; it reads a tensor as an array.
fields_of = fields_of_batch

# --- Differentiable -------------------------------------------------------------------------------

batch_norm = _of_tensors(functional.batch_norm)
layer_norm = _of_tensors(functional.layer_norm)
instance_norm = _of_tensors(functional.instance_norm)
group_norm = _of_tensors(functional.group_norm)
rms_norm = _of_tensors(functional.rms_norm)
add_layer_norm = _of_tensors(functional.add_layer_norm)
add_rms_norm = _of_tensors(functional.add_rms_norm)
l2_normalize = _of_tensors(related.l2_normalize)
local_response_norm = _of_tensors(related.local_response_norm)
global_response_norm = _of_tensors(related.global_response_norm)
weight_norm = _of_tensors(related.weight_norm)
weight_standardize = _of_tensors(related.weight_standardize)
dynamic_tanh = _of_tensors(elementwise.dynamic_tanh)
derf = _of_tensors(elementwise.derf)
standardize = _of_tensors(standardize_arrays)

# --- Of numbers alone -----------------------------------------------------------------------------

moments = _of_tensors(moments_of_arrays)
batch_norm_backward = _of_tensors(backward.batch_norm_backward)
layer_norm_backward = _of_tensors(backward.layer_norm_backward)
instance_norm_backward = _of_tensors(backward.instance_norm_backward)
group_norm_backward = _of_tensors(backward.group_norm_backward)
rms_norm_backward = _of_tensors(backward.rms_norm_backward)
dynamic_tanh_backward = _of_tensors(elementwise.dynamic_tanh_backward)
derf_backward = _of_tensors(elementwise.derf_backward)
