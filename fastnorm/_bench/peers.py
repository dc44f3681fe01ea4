"""The peers, each as its users run it, on the arrays of one case.

================  ==================================================================================
fastnorm          the public function, on NumPy arrays
torch             PyTorch's own function (or the few a user writes where there is none), in
                  inference mode; backward: torch.autograd.grad. In-place ReLU after the residual,
                  as torchvision's ResNet has it
torch.compile     the same function, compiled for this shape
onnxruntime       a model of one node (a few where the norm is fused with something), through
                  session.run: NumPy arrays in, fresh NumPy arrays out, as fastnorm does it.
                  Forward only
jax               the formula below under jax.jit, x on the device, waiting for the result. Channels
                  last is NHWC, as flax has it. Backward: the jitted pullback of jax.vjp
numpy             the formula below: what anyone would write
================  ==================================================================================

PyTorch and ONNX Runtime run with fastnorm's number of threads. JAX takes what the process may use
when it starts; that can not be changed in a running process. NumPy's functions use one.

What a peer is not able to run raises `Absent`, which says why.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm import _reference
from fastnorm._bench.cases import Array, Case, Data, arguments, dtype_of, gradient_arguments, wide
from fastnorm._bench.timing import Contender

EPS = 1e-5
FIVE = ("batch_norm", "layer_norm", "instance_norm", "group_norm", "rms_norm")
# PyTorch's and ONNX's names for how gelu is computed
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def rms_eps(case: Case) -> float:
    """What rms_norm adds where nothing is said."""
    return float(np.finfo(np.float64 if case.dtype == "float64" else np.float32).eps)


class Absent(Exception):
    """Why a peer has no figure for a case."""


class Wrong(Absent):
    """Its answer is another one."""


class Off(AssertionError):
    """An answer that is not what it must be."""


@dataclass(frozen=True)
class Peer:
    """How one peer runs a case, and how its answer becomes NumPy arrays that lie like x."""

    call: Callable[[], Any]
    answer: Callable[[Any], list[Array]]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    difference: float = 0.0
    """The largest from what was expected, of any element, once that is `checked`."""

    def contender(self) -> Contender:
        return Contender(self.call, self.around)


def _need(*modules: str) -> Any:
    """The first of them, imported."""
    for module in modules:
        if find_spec(module) is None:
            raise Absent(f"{module} is not installed")
    return import_module(modules[0])


def _bound(
    function: Callable[..., Any], x: Any, parameters: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Its arguments, positional where they can be: the quickest way to call."""
    bound = inspect.signature(function).bind(x, **parameters)
    return bound.args, bound.kwargs


def _arrays(answer: Any) -> list[Array]:
    several = answer if isinstance(answer, tuple | list) else (answer,)
    return [np.asarray(array) for array in several]


# --- fastnorm -------------------------------------------------------------------------------------


def fastnorm(case: Case, data: Data) -> Peer:
    if not case.backward:
        function = getattr(fn, case.operation.name)
        given, options = _bound(function, data.x, arguments(case, data))
        return Peer(partial(function, *given, **options), _arrays)
    name, given, options = gradient_arguments(case, data)
    return Peer(partial(getattr(fn, name), *given, **options), _arrays)


# --- PyTorch --------------------------------------------------------------------------------------


def _tensor(array: Array) -> Any:
    """A tensor on the same memory."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _from_tensors(answer: Any) -> list[Array]:
    import torch

    several = answer if isinstance(answer, tuple | list) else (answer,)
    detached = (tensor.detach() for tensor in several)
    return [t.float().numpy() if t.dtype is torch.bfloat16 else t.numpy() for t in detached]


def _torch_functions(case: Case) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """PyTorch's own function, and what a user makes of it: (x, residual, *others) where fused.

    The wrappers in operations.py do the same as the five functions and cost a microsecond.
    """
    from torch.nn import functional

    op = case.operation
    name = op.name.removeprefix("add_")
    wrapped = name not in FIVE or case.label == "layer_norm (axis)"
    norm: Callable[..., Any] = op.torch if wrapped and op.torch else getattr(functional, name)

    def added(x: Any, residual: Any, *others: Any, **options: Any) -> Any:
        total = x + residual
        return norm(total, *others, **options), total

    def followed(x: Any, residual: Any, *others: Any, **options: Any) -> Any:
        y = norm(x, *others, **options)
        y = y if residual is None else y.add_(residual)
        return y if activation is None else activation(y)

    if case.kind != "fused":
        return norm, norm
    if op.outputs > 1:
        return norm, added
    activation: Callable[..., Any] | None = None
    if case.activation in GELU:
        activation = partial(functional.gelu, approximate=GELU[case.activation])
    elif case.activation is not None:
        activation = getattr(functional, case.activation)
        if case.residual:
            activation = partial(activation, inplace=True)
    return norm, followed


def _torch(case: Case, data: Data, compiled: bool) -> Peer:
    torch = _need("torch")
    set_torch_threads(fn.get_num_threads())
    norm, function = _torch_functions(case)
    if compiled:
        torch._dynamo.reset()  # or it remembers the cases before, and gives up on too many
        torch._functorch.config.donated_buffer = False  # retain_graph needs what it would reuse
        function = torch.compile(function, dynamic=False)
    parameters, x = case.operation.to_torch(data.parameters), _tensor(data.x)
    if case.backward and data.dy is not None:
        names = [name for name in ("weight", "bias") if name in parameters]
        leaves = [leaf.requires_grad_() for leaf in (x, *map(parameters.get, names))]
        y, slope = function(x, **parameters), _tensor(data.dy)
        return Peer(lambda: torch.autograd.grad(y, leaves, slope, retain_graph=True), _from_tensors)
    (x, *others), options = _bound(norm, x, parameters)
    if case.kind == "fused":
        others.insert(0, None if data.residual is None else _tensor(data.residual))
    return Peer(partial(function, x, *others, **options), _from_tensors, torch.inference_mode)


def torch(case: Case, data: Data) -> Peer:
    return _torch(case, data, compiled=False)


def torch_compile(case: Case, data: Data) -> Peer:
    return _torch(case, data, compiled=True)


# --- ONNX Runtime ---------------------------------------------------------------------------------

_OPSET = 23
_NODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "batch_norm": ("BatchNormalization", ("weight", "bias", "running_mean", "running_var")),
    "instance_norm": ("InstanceNormalization", ("weight", "bias")),
    "group_norm": ("GroupNormalization", ("weight", "bias")),
    "layer_norm": ("LayerNormalization", ("weight", "bias")),
    "rms_norm": ("RMSNormalization", ("weight",)),
    "l2_normalize": ("LpNormalization", ()),
    "local_response_norm": ("LRN", ()),
    "standardize": ("MeanVarianceNormalization", ()),
}


def _onnx_type(case: Case) -> int:
    from onnx.helper import np_dtype_to_tensor_dtype

    return int(np_dtype_to_tensor_dtype(dtype_of(case.dtype)))


# The operators of an activation; those of gelu are one. silu is y * sigmoid(y).
_STEPS = {"relu": ["Relu"], "relu6": ["Relu", "Min"], "silu": ["Sigmoid", "Mul"], None: []}


def _nodes(case: Case, data: Data) -> tuple[list[Any], list[str]]:
    """The model's nodes and outputs, for an input x and a residual."""
    from onnx.helper import make_node

    name = case.operation.name.removeprefix("add_")
    kind, inputs = _NODES[name]
    options: dict[str, Any] = {"epsilon": EPS} if name in FIVE else {}
    if name == "rms_norm":
        options["epsilon"] = rms_eps(case)
    if name in ("rms_norm", "layer_norm", "l2_normalize"):
        options["axis"] = -1
    if name == "standardize":
        options["axes"] = [0]
    if name == "local_response_norm":
        options |= {k: data.parameters[k] for k in ("size", "alpha")} | LRN
        options["bias"] = options.pop("k")
    if case.num_groups:
        options["num_groups"] = case.num_groups
        if case.dtype == "float64":  # else it is computed in float32
            options["stash_type"] = _onnx_type(case)
    outputs = ["y"]
    if data.parameters.get("training"):
        options["training_mode"] = 1
        outputs = ["y", "mean", "var"]
    if name != case.operation.name:
        add = make_node("Add", ["x", "residual"], ["total"])
        return [add, make_node(kind, ["total", *inputs], ["y"], **options)], ["y", "total"]
    steps = ["Add"] if case.residual else []
    steps += _STEPS.get(case.activation, ["Gelu"])
    if not steps:
        return [make_node(kind, ["x", *inputs], outputs, **options)], outputs
    nodes = [make_node(kind, ["x", *inputs], ["t", *outputs[1:]], **options)]
    before = seen = "t"
    for i, step in enumerate(steps):
        second = {"Add": ["residual"], "Mul": [before], "Min": ["six"]}.get(step, [])
        result = "y" if step == steps[-1] else f"t{i}"
        more = {"approximate": GELU[str(case.activation)]} if step == "Gelu" else {}
        nodes.append(make_node(step, [seen, *second], [result], **more))
        before, seen = seen, result
    return nodes, outputs


def onnxruntime(case: Case, data: Data) -> Peer:
    runtime = _need("onnxruntime", "onnx")
    from onnx import helper, numpy_helper

    if case.backward:
        raise Absent("ONNX Runtime has no backward pass")
    if case.operation.name.removeprefix("add_") not in _NODES:
        raise Absent(f"ONNX has no operator for {case.operation.name}")
    if case.label == "layer_norm (axis)":
        raise Absent("ONNX's LayerNormalization is over the last axes")
    if case.channels_last:
        raise Absent("ONNX has no channels-last normalization")
    if case.dtype == "bfloat16":
        raise Absent("NumPy arrays of bfloat16 can not be given to ONNX Runtime")
    nodes, outputs = _nodes(case, data)
    kind = _onnx_type(case)
    feeds = {"x": data.x} | ({} if data.residual is None else {"residual": data.residual})
    stored = {k: v for k, v in data.parameters.items() if isinstance(v, np.ndarray)}
    if case.activation == "relu6":
        stored["six"] = np.array(6, data.x.dtype)
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info(name, kind, case.shape) for name in feeds],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = fn.get_num_threads()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # it has a class of its own for each code
        raise Absent(f"ONNX Runtime: {str(error).splitlines()[0][:200]}") from None
    return Peer(partial(session.run, outputs, feeds), _arrays)


# --- The formula, for NumPy and JAX ---------------------------------------------------------------


class Formula:
    """What a user writes: mean, variance, affine step; and its gradients.

    `xp` is numpy or jax.numpy. Channels are on axis `channel`, 1 or -1.
    """

    def __init__(self, xp: Any, case: Case, data: Data, channel: int = 1) -> None:
        op, ndim = case.operation, len(case.shape)
        self.xp, self.case, self.groups = xp, case, case.num_groups
        self.centred = not op.name.endswith("rms_norm")
        self.eps = EPS if self.centred else rms_eps(case)
        self.momentum = 0.1
        self.rows = "normalized_shape" in data.parameters
        self.channel = ndim - 1 if self.rows else channel % ndim
        self.axes = op.linked(ndim, self.channel)
        if self.groups:
            after = tuple(a + (a > self.channel) for a in self.axes)
            self.axes = (*after, self.channel + 1)

    def grouped(self, x: Any) -> Any:
        if not self.groups:
            return x
        shape, c = x.shape, self.channel
        return x.reshape(*shape[:c], self.groups, shape[c] // self.groups, *shape[c + 1 :])

    def lie(self, parameter: Any) -> Any:
        """A parameter along its axis."""
        shape = [1] * len(self.case.shape)
        shape[self.channel] = -1
        return parameter.reshape(shape)

    def statistics(self, x: Any, p: dict[str, Any]) -> tuple[Any, Any]:
        if self.case.label == "batch_norm (inference)":
            return self.lie(p["running_mean"]), self.lie(p["running_var"])
        if not self.centred:
            return 0.0, self.xp.mean(x * x, self.axes, keepdims=True)
        return x.mean(self.axes, keepdims=True), x.var(self.axes, keepdims=True)

    def forward(self, x: Any, residual: Any, p: dict[str, Any]) -> Any:
        xp, dtype = self.xp, x.dtype
        operation = self.case.operation
        if (related := RELATED.get(operation.name, operation.formula)) is not None:
            return related(self, wide(x), p).astype(dtype)
        total = x + residual if self.case.operation.outputs == 2 else None
        seen = self.grouped(wide(x if total is None else total))
        mean, var = self.statistics(seen, p)
        y = (seen - mean if self.centred else seen) / xp.sqrt(var + self.eps)
        y = y.reshape(x.shape) * self.lie(p["weight"])
        y = y + self.lie(p["bias"]) if "bias" in p else y
        y = y + residual if self.case.residual else y
        y = self.activated(y).astype(dtype)
        if total is not None:
            return y, total
        if p.get("training") and not self.case.backward:
            return y, *self.moved(p, mean, var, x.size / mean.size)
        return y

    def activated(self, y: Any) -> Any:
        xp = self.xp
        if self.case.activation == "relu":
            return xp.maximum(y, 0)
        if self.case.activation == "relu6":
            return xp.clip(y, 0, 6)
        if self.case.activation == "silu":
            return y / (1 + xp.exp(-y))
        if self.case.activation == "gelu_tanh":
            return y / 2 * (1 + xp.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * (y * y * y))))
        if self.case.activation == "gelu":
            if xp is np:
                raise Absent("NumPy has no error function, which gelu is made of")
            return import_module("jax").nn.gelu(y, approximate=False)
        return y

    def erf(self, x: Any) -> Any:
        if self.xp is np:
            raise Absent("NumPy has no error function")
        return import_module("jax").scipy.special.erf(x)

    def length(self, x: Any, axes: Any) -> Any:
        return self.xp.sqrt((x * x).sum(axes, keepdims=True))

    def moved(self, p: dict[str, Any], mean: Any, var: Any, count: float) -> tuple[Any, Any]:
        """The new running statistics."""
        pairs = (("running_mean", mean), ("running_var", var * (count / (count - 1))))
        keep = 1 - self.momentum
        return tuple(keep * p[k] + self.momentum * new.reshape(-1) for k, new in pairs)

    def pullback(self, dy: Any, x: Any, p: dict[str, Any]) -> Callable[[], tuple[Any, ...]]:
        """From given statistics to dx, dweight, dbias. NumPy's alone: JAX derives its own."""
        x, dy, dtype = wide(x), wide(dy), x.dtype
        seen = self.grouped(x)
        mean, var = self.statistics(seen, p)
        rstd = 1 / np.sqrt(var + x.dtype.type(self.eps))

        def gradients() -> tuple[Any, ...]:
            hat = (seen - mean) * rstd
            slope = self.grouped(dy * self.lie(wide(p["weight"])))
            dx = slope
            if self.axes:  # else the statistics were given, and x did not move them
                dx = slope - hat * (slope * hat).mean(self.axes, keepdims=True)
            if self.axes and self.centred:
                dx -= slope.mean(self.axes, keepdims=True)
            hat = hat.reshape(x.shape)
            others = tuple(a for a in range(x.ndim) if a != self.channel)
            parameters = [(dy * hat).sum(others)] + ([dy.sum(others)] if "bias" in p else [])
            return tuple(g.astype(dtype) for g in ((dx * rstd).reshape(x.shape), *parameters))

        return gradients


LRN = {"beta": 0.75, "k": 1.0}  # PyTorch's, where nothing is said


def _local_response_norm(f: Formula, x: Any, p: dict[str, Any]) -> Any:
    size, channels, channel = p["size"], x.shape[f.channel], f.channel
    around = [(0, 0)] * x.ndim
    around[channel] = (size // 2, (size - 1) // 2)
    squares = f.xp.pad(x * x, around)
    before = (slice(None),) * channel
    total = sum(squares[(*before, slice(i, i + channels))] for i in range(size))
    return x / (LRN["k"] + p["alpha"] / size * total) ** LRN["beta"]


def _weight_standardize(f: Formula, x: Any, p: dict[str, Any]) -> Any:
    mean, var = (a(f.axes, keepdims=True) for a in (x.mean, x.var))
    return (x - mean) / f.xp.sqrt(var + EPS)


def _global_response_norm(f: Formula, x: Any, p: dict[str, Any]) -> Any:
    positions = tuple(a for a in range(1, x.ndim) if a != f.channel)
    size = f.length(x, positions)
    share = size / (size.mean(f.channel, keepdims=True) + 1e-6)
    return f.lie(p["weight"]) * (x * share) + f.lie(p["bias"]) + x


RELATED: dict[str, Callable[[Formula, Any, dict[str, Any]], Any]] = {
    "l2_normalize": lambda f, x, p: x / f.xp.maximum(f.length(x, -1), 1e-12),
    "standardize": lambda f, x, p: (x - x.mean(0)) / x.std(0),
    "local_response_norm": _local_response_norm,
    "weight_norm": lambda f, x, p: x * (p["g"] / f.length(x, f.axes)),
    "weight_standardize": _weight_standardize,
    "global_response_norm": _global_response_norm,
}


def numpy(case: Case, data: Data) -> Peer:
    formula = Formula(np, case, data)
    if case.backward:
        return Peer(formula.pullback(data.dy, data.x, data.parameters), _arrays)
    return Peer(partial(formula.forward, data.x, data.residual, data.parameters), _arrays)


# --- JAX ------------------------------------------------------------------------------------------


def _last(array: Array | None, case: Case) -> Array | None:
    """As JAX's users have it: channels-last memory is an array whose last axis are channels."""
    if array is None or not case.channels_last:
        return array
    return np.moveaxis(array, 1, -1)


def jax(case: Case, data: Data) -> Peer:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    library = _need("jax")
    library.config.update("jax_enable_x64", True)  # float64 exists only then; float32 stays
    formula = Formula(library.numpy, case, data, -1 if case.channels_last else 1)
    x, residual, dy = (
        None if a is None else library.device_put(_last(a, case))
        for a in (data.x, data.residual, data.dy)
    )
    arrays = {k: v for k, v in data.parameters.items() if isinstance(v, np.ndarray)}
    others = {k: v for k, v in data.parameters.items() if k not in arrays}
    given = library.device_put(arrays)

    def forward(x: Any, residual: Any, arrays: dict[str, Any]) -> Any:
        return formula.forward(x, residual, arrays | others)

    def answer(results: Any) -> list[Array]:
        first, *rest = _arrays(results)
        return [np.moveaxis(first, -1, 1) if case.channels_last else first, *rest]

    if not case.backward:
        compiled = library.jit(forward)
        return Peer(lambda: library.block_until_ready(compiled(x, residual, given)), answer)
    names = [name for name in ("weight", "bias") if name in given]

    def of_leaves(x: Any, *leaves: Any) -> Any:
        return forward(x, None, given | dict(zip(names, leaves)))

    _, pullback = library.vjp(library.jit(of_leaves), x, *(given[name] for name in names))
    # what the forward pass kept is an argument of the compiled function, not a constant in it
    pull = library.jit(lambda pullback, dy: pullback(dy))
    return Peer(lambda: library.block_until_ready(pull(pullback, dy)), answer)


PEERS: dict[str, Callable[[Case, Data], Peer]] = {
    "fastnorm": fastnorm,
    "torch": torch,
    "torch.compile": torch_compile,
    "onnxruntime": onnxruntime,
    "jax": jax,
    "numpy": numpy,
}


@contextmanager
def settings_kept() -> Iterator[None]:
    """Set back at the end what peers set for the whole process."""
    library: Any = sys.modules.get("torch")
    threads = None if library is None else library.get_num_threads()
    library = sys.modules.get("jax")
    double = False if library is None else library.config.jax_enable_x64
    try:
        yield
    finally:
        if threads is not None:
            set_torch_threads(threads)
        library = sys.modules.get("jax")
        if library is not None:
            library.config.update("jax_enable_x64", double)


def set_torch_threads(n: int) -> None:
    """For PyTorch's functions, where it is imported."""
    library: Any = sys.modules.get("torch")
    if library is not None:
        library.set_num_threads(n)


# --- Whether a peer is right ----------------------------------------------------------------------

# The error allowed, as a share of the result's norm, to fastnorm and to the others. fastnorm's is
# a few roundings of the result; the others sum in float32. In bfloat16 PyTorch's layer_norm is off
# by 5 % in the gradient of a weight that 4096 rows share.
ALLOWED = {
    "float32": (1e-6, 1e-4),
    "float64": (1e-14, 1e-12),
    "float16": (2**-11, 2**-6),
    "bfloat16": (2**-8, 2**-3),
}


def reference(case: Case, data: Data) -> list[Array]:
    """What every peer should answer."""
    if case.backward:
        name, positional, options = gradient_arguments(case, data, _reference)
        return _arrays(getattr(_reference, name)(*positional, **options))
    given = {k: v for k, v in arguments(case, data).items() if k != "out"}
    return _arrays(getattr(_reference, case.operation.name)(data.x, **given))


def check(name: str, case: Case, results: list[Array], exact: list[Array]) -> float:
    """Fail unless a peer's results are right; more results than asked for are left alone.

    Return the largest error of any element.
    """
    allowed = ALLOWED[case.dtype][name != "fastnorm"]
    if len(results) < len(exact):
        raise Off(f"{name} has {len(results)} results instead of {len(exact)}")
    largest = 0.0
    for result, right in zip(results, exact):
        if result.shape != right.shape:
            raise Off(f"{name}: {result.shape} instead of {right.shape}")
        error = (result.astype(right.dtype) - right).ravel()
        size = np.linalg.norm(right)
        if not (off := np.linalg.norm(error)) <= allowed * size:  # NaN is not
            raise Off(f"{name} is off by {off / size:.1e} of the result")
        largest = max(largest, float(abs(error).max(initial=0)))
    return largest


def checked(name: str, case: Case, data: Data, exact: list[Array]) -> Peer:
    """A peer whose answer was right. Only fastnorm fails; the others are then absent."""
    if case.out and name != "fastnorm":
        raise Absent("its result is a new array in each call")
    try:
        peer = PEERS[name](case, data)
        with peer.around():
            difference = check(name, case, peer.answer(peer.call()), exact)
    except Off as error:
        if name == "fastnorm":
            raise
        raise Wrong(str(error)) from error
    except Exception as error:
        if name == "fastnorm" or isinstance(error, Absent):
            raise
        told = str(error).strip() or "without a message"
        raise Absent(f"{type(error).__name__}: {told.splitlines()[0][:200]}") from error
    return replace(peer, difference=difference)
