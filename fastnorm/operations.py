"""The one table of fastnorm's operations: `fastnorm bench`, tests and documentation read it.

With ``p = op.parameters(x.shape, x.dtype, rng)``, these three are the same::

    getattr(fastnorm, op.name)(x, **p)
    getattr(fastnorm._reference, op.name)(x, **p, dtype=np.longdouble)
    op.torch(torch.from_numpy(x), **op.to_torch(p))

``p`` is good for one call: running statistics in it are updated in place (`to_torch` copies).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Parameters = dict[str, Any]

# The keyword-only features that the five main norms share.
SHARED = frozenset({"where", "residual", "activation", "out", "return_stats"})


@dataclass(frozen=True)
class Wanted:
    """What parameters are wanted for: the input, and how the parameters should lie."""

    shape: Shape
    dtype: np.dtype[Any]
    rng: np.random.Generator
    channel_axis: int
    per_sample: bool
    num_groups: int | None

    @property
    def channel(self) -> int:
        """The axis of the channels, 0 or more."""
        return self.channel_axis % len(self.shape)

    @property
    def channels(self) -> int:
        """How many channels."""
        return self.shape[self.channel]

    @property
    def sample(self) -> int:
        """The axis of the samples."""
        return 0 if self.channel else 1

    def normal(self, shape: Shape, around: float = 0.0) -> np.ndarray[Any, Any]:
        """Random numbers around another, in the dtype of the input."""
        return np.asarray(around + self.rng.standard_normal(shape) / 4).astype(self.dtype)

    def affine(self, shape: Shape) -> Parameters:
        """A weight around 1 and a bias around 0."""
        return {"weight": self.normal(shape, 1.0), "bias": self.normal(shape)}

    def channel_affine(self) -> Parameters:
        """(C,), or (N, C) per sample."""
        if self.per_sample:
            return self.affine((self.shape[self.sample], self.channels))
        return self.affine((self.channels,))

    def row_affine(self, axis: int = -1) -> Parameters:
        """(D,) of one axis, or per sample (N, 1, ..., D, ..., 1)."""
        axis %= len(self.shape)
        if not self.per_sample:
            return self.affine((self.shape[axis],))
        kept = (0, axis)
        return self.affine(tuple(s if a in kept else 1 for a, s in enumerate(self.shape)))

    def running(self) -> Parameters:
        """Running statistics of each channel."""
        return {
            "running_mean": self.normal((self.channels,)),
            "running_var": abs(self.normal((self.channels,), 1.0)),
        }

    def with_axis(self, parameters: Parameters) -> Parameters:
        """Say channel_axis only where it is not the default, as a user would."""
        if self.channel_axis == 1:
            return parameters
        return parameters | {"channel_axis": self.channel_axis}


@dataclass(frozen=True)
class Operation:
    """One way to call one public function."""

    label: str
    """Unique, for test ids and the documentation: "batch_norm (inference)"."""
    name: str
    """The function in fastnorm and in fastnorm._reference."""
    description: str
    """What is normalised over what, for the documentation."""
    build: Callable[[Wanted], Parameters]
    """The keyword arguments for an input. Call `parameters` instead."""
    linked: Callable[[int, int], tuple[int, ...]]
    """(ndim, channel axis, not negative) -> the axes along which elements reach one another."""
    torch: Callable[..., Any] | None = None
    """The same on tensors, with the same keyword arguments."""
    torch_name: str | None = None
    """What that is called in PyTorch; None if `torch` has to compose it."""
    features: frozenset[str] = frozenset()
    """Of SHARED, and "channel_axis" and "per_sample" (a weight of each sample's own)."""
    grouped: bool = False
    """Whether the channel axis is split into num_groups, which do not reach one another."""
    min_ndim: int = 1
    outputs: int = 1
    stats: tuple[str, ...] = ()
    """What return_stats=True returns after y, and what the backward function takes after x."""
    backward_keywords: tuple[str, ...] = ()
    """Which of the parameters the backward function takes too."""

    formula: Callable[..., Any] | None = None
    """Of a function that takes each element by itself: y of a Formula (peers.py), x and these."""
    gradients: tuple[str, ...] = ()
    """Of such a function: what its backward function returns, after (dy, x) and its parameters."""

    @property
    def backward(self) -> str | None:
        """The name of the backward function that takes statistics, if there is one."""
        return f"{self.name}_backward" if self.stats else None

    @property
    def elementwise_backward(self) -> str | None:
        """That of one that takes none: of a function of each element by itself."""
        return f"{self.name}_backward" if self.gradients else None

    def parameters(
        self,
        shape: Shape,
        dtype: Any,
        rng: np.random.Generator,
        *,
        channel_axis: int = 1,
        per_sample: bool = False,
        num_groups: int | None = None,
    ) -> Parameters:
        """Keyword arguments for an x of this shape and dtype; float64 for an integer dtype."""
        dtype = np.dtype(dtype)
        dtype = np.dtype(np.float64) if dtype.kind in "iub" else dtype
        if channel_axis != 1 and "channel_axis" not in self.features:
            raise ValueError(f"{self.label} has no channel_axis")
        if per_sample and "per_sample" not in self.features:
            raise ValueError(f"{self.label} has no weights per sample")
        return self.build(Wanted(shape, dtype, rng, channel_axis, per_sample, num_groups))

    def group_ids(
        self, shape: Shape, *, channel_axis: int = 1, num_groups: int | None = None
    ) -> np.ndarray[Any, Any]:
        """An array of x's shape; elements with different numbers never reach one another."""
        channel = channel_axis % len(shape) if len(shape) > 1 else 0
        linked = self.linked(len(shape), channel)
        index = list(np.indices(shape))
        if self.grouped:
            size = shape[channel] // _num_groups(shape[channel], num_groups)
            index[channel] = index[channel] // size
        separate = [i for axis, i in enumerate(index) if axis not in linked]
        if not separate:
            return np.zeros(shape, np.int64)
        sizes = [s for axis, s in enumerate(shape) if axis not in linked]
        ids: np.ndarray[Any, Any] = np.ravel_multi_index(separate, sizes)
        return ids

    def refuses(
        self, shape: Shape, *, channel_axis: int = 1, num_groups: int | None = None
    ) -> bool:
        """Whether that shape has one value per statistic, where PyTorch and we want two."""
        if self.name == "group_norm":  # of all samples together
            return math.prod(shape) == _num_groups(shape[channel_axis], num_groups)
        linked = self.linked(len(shape), channel_axis % len(shape))
        own = self.name == "instance_norm" or self.label == "batch_norm (training)"
        return own and math.prod(shape[a] for a in linked) == 1

    @staticmethod
    def to_torch(parameters: Parameters) -> Parameters:
        """Copies of the arrays as tensors, everything else as it is."""
        import torch

        def convert(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            if value.dtype.name == "bfloat16":
                return torch.from_numpy(value.astype(np.float32)).bfloat16()
            return torch.from_numpy(value.copy())

        return {key: convert(value) for key, value in parameters.items()}


def _num_groups(channels: int, num_groups: int | None) -> int:
    return max(1, min(4, channels)) if num_groups is None else num_groups


# --- Which axes are linked ------------------------------------------------------------------------


def _nothing(ndim: int, channel: int) -> tuple[int, ...]:
    return ()


def _last(ndim: int, channel: int) -> tuple[int, ...]:
    return (ndim - 1,)


def _channel(ndim: int, channel: int) -> tuple[int, ...]:
    return (channel,)


def _all_but_channel(ndim: int, channel: int) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a != channel)


def _all_but_sample(ndim: int, channel: int) -> tuple[int, ...]:
    sample = 0 if channel else 1
    return tuple(a for a in range(ndim) if a != sample)


def _positions(ndim: int, channel: int) -> tuple[int, ...]:
    sample = 0 if channel else 1
    return tuple(a for a in range(ndim) if a not in (sample, channel))


def _all_but_first(ndim: int, channel: int) -> tuple[int, ...]:
    return tuple(range(1, ndim))


# --- The same in PyTorch --------------------------------------------------------------------------
# torch.nn.functional knows channels at axis 1 only; movedim is a view, as a user would write it.


def _torch_batch_norm(x: Any, *, channel_axis: int = 1, **p: Any) -> Any:
    from torch.nn.functional import batch_norm

    return batch_norm(x.movedim(channel_axis, 1), **p).movedim(1, channel_axis)


def _torch_instance_norm(x: Any, *, channel_axis: int = 1, **p: Any) -> Any:
    from torch.nn.functional import instance_norm

    return instance_norm(x.movedim(channel_axis, 1), **p).movedim(1, channel_axis)


def _torch_group_norm(x: Any, *, channel_axis: int = 1, **p: Any) -> Any:
    from torch.nn.functional import group_norm

    return group_norm(x.movedim(channel_axis, 1), **p).movedim(1, channel_axis)


def _torch_layer_norm(x: Any, **p: Any) -> Any:
    from torch.nn.functional import layer_norm

    return layer_norm(x, **p)


def _torch_layer_norm_axis(x: Any, *, axis: int, **p: Any) -> Any:
    from torch.nn.functional import layer_norm

    moved = x.movedim(axis, -1)
    return layer_norm(moved, moved.shape[-1:], **p).movedim(-1, axis)


def _torch_rms_norm(x: Any, **p: Any) -> Any:
    from torch.nn.functional import rms_norm

    return rms_norm(x, **p)


def _torch_add_layer_norm(x: Any, *, residual: Any, **p: Any) -> Any:
    total = x + residual
    return _torch_layer_norm(total, **p), total


def _torch_add_rms_norm(x: Any, *, residual: Any, **p: Any) -> Any:
    total = x + residual
    return _torch_rms_norm(total, **p), total


def _torch_l2_normalize(x: Any, *, axis: int = -1, eps: float = 1e-12) -> Any:
    from torch.nn.functional import normalize

    return normalize(x, dim=axis, eps=eps)


def _torch_standardize(
    x: Any, *, axis: Any = None, where: Any = None, ddof: float = 0, eps: float = 0.0
) -> Any:
    axes = tuple(range(x.ndim)) if axis is None else axis
    chosen = x.new_ones((), dtype=bool) if where is None else where
    chosen = chosen.broadcast_to(x.shape)
    count = chosen.sum(axes, keepdim=True)
    mean = x.masked_fill(~chosen, 0.0).sum(axes, keepdim=True) / count
    squares = (x - mean).square().masked_fill(~chosen, 0.0).sum(axes, keepdim=True)
    return (x - mean) / (squares / (count - ddof) + eps).sqrt()


def _torch_local_response_norm(x: Any, *, channel_axis: int = 1, **p: Any) -> Any:
    from torch.nn.functional import local_response_norm

    if x.ndim == 2:  # PyTorch has it with positions alone
        return _torch_local_response_norm(x.unsqueeze(-1), **p).squeeze(-1)
    return local_response_norm(x.movedim(channel_axis, 1), **p).movedim(1, channel_axis)


def _torch_weight_norm(v: Any, *, g: Any, axis: int = 0) -> Any:
    import torch

    return torch._weight_norm(v, g, axis)


def _torch_weight_standardize(w: Any, *, eps: float = 1e-5) -> Any:
    """As timm's StdConv2d has it."""
    from torch.nn.functional import batch_norm

    rows = w.reshape(1, w.shape[0], -1)
    return batch_norm(rows, None, None, training=True, momentum=0.0, eps=eps).reshape(w.shape)


def _torch_global_response_norm(
    x: Any, *, weight: Any, bias: Any, eps: float = 1e-6, channel_axis: int = 1
) -> Any:
    """As ConvNeXt V2 has it, its weight and bias one per channel, or of the dimensions of x."""
    import torch

    channel = channel_axis % x.ndim
    shape = [-1 if a == channel else 1 for a in range(x.ndim)]
    size = torch.linalg.vector_norm(x, dim=_positions(x.ndim, channel), keepdim=True)
    response = size / (size.mean(dim=channel, keepdim=True) + eps)
    w, b = (p if p is None or p.ndim > 1 else p.reshape(shape) for p in (weight, bias))
    return _torch_affine(x * response, w, b) + x


def _torch_dynamic_tanh(x: Any, *, alpha: Any, weight: Any = None, bias: Any = None) -> Any:
    import torch

    return _torch_affine(torch.tanh(alpha * x), weight, bias)


def _torch_derf(
    x: Any, *, alpha: Any, shift: Any = 0.0, weight: Any = None, bias: Any = None
) -> Any:
    import torch

    return _torch_affine(torch.erf(alpha * x + shift), weight, bias)


def _torch_affine(y: Any, weight: Any, bias: Any) -> Any:
    y = y if weight is None else weight * y
    return y if bias is None else y + bias


# --- The table ------------------------------------------------------------------------------------


def _weight_norm_parameters(r: Wanted) -> Parameters:
    return {"g": r.normal(r.shape[:1] + (1,) * (len(r.shape) - 1), 1.0)}


def _without_bias(parameters: Parameters) -> Parameters:
    return {key: value for key, value in parameters.items() if key != "bias"}


def _last_axis(r: Wanted) -> Parameters:
    return {"normalized_shape": r.shape[-1:]}


CHANNEL_FEATURES = SHARED | {"channel_axis", "per_sample"}
ROW_FEATURES = SHARED | {"per_sample"}

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        label="batch_norm (training)",
        name="batch_norm",
        description="each channel over the batch's samples and positions",
        build=lambda r: r.with_axis(r.running() | r.channel_affine() | {"training": True}),
        linked=_all_but_channel,
        torch=_torch_batch_norm,
        torch_name="torch.nn.functional.batch_norm",
        features=CHANNEL_FEATURES,
        min_ndim=2,
        stats=("mean", "rstd"),
        backward_keywords=("weight", "training", "channel_axis"),
    ),
    Operation(
        label="batch_norm (inference)",
        name="batch_norm",
        description="each channel by its running mean and variance",
        build=lambda r: r.with_axis(r.running() | r.channel_affine() | {"training": False}),
        linked=_nothing,
        torch=_torch_batch_norm,
        torch_name="torch.nn.functional.batch_norm",
        features=CHANNEL_FEATURES - {"where"},
        min_ndim=2,
        stats=("mean", "rstd"),
        backward_keywords=("weight", "training", "channel_axis"),
    ),
    Operation(
        label="layer_norm (normalized_shape)",
        name="layer_norm",
        description="each row over the trailing axes",
        build=lambda r: _last_axis(r) | r.row_affine(),
        linked=_last,
        torch=_torch_layer_norm,
        torch_name="torch.nn.functional.layer_norm",
        features=ROW_FEATURES,
        stats=("mean", "rstd"),
        backward_keywords=("normalized_shape", "weight"),
    ),
    Operation(
        label="layer_norm (axis)",
        name="layer_norm",
        description="each position over the channels, or over any other axes",
        build=lambda r: {"axis": 1} | r.row_affine(1),
        linked=_channel,
        torch=_torch_layer_norm_axis,
        torch_name="torch.nn.functional.layer_norm",
        features=ROW_FEATURES,
        min_ndim=2,
        stats=("mean", "rstd"),
        backward_keywords=("axis", "weight"),
    ),
    Operation(
        label="instance_norm",
        name="instance_norm",
        description="each channel of each sample over its positions",
        build=lambda r: r.with_axis(r.running() | r.channel_affine()),
        linked=_positions,
        torch=_torch_instance_norm,
        torch_name="torch.nn.functional.instance_norm",
        features=CHANNEL_FEATURES,
        min_ndim=3,
        stats=("mean", "rstd"),
        backward_keywords=("weight", "channel_axis"),
    ),
    Operation(
        label="group_norm",
        name="group_norm",
        description="each sample's groups of channels over their channels and positions",
        build=lambda r: r.with_axis(
            {"num_groups": _num_groups(r.channels, r.num_groups)} | r.channel_affine()
        ),
        linked=_positions,
        torch=_torch_group_norm,
        torch_name="torch.nn.functional.group_norm",
        features=CHANNEL_FEATURES,
        grouped=True,
        min_ndim=2,
        stats=("mean", "rstd"),
        backward_keywords=("num_groups", "weight", "channel_axis"),
    ),
    Operation(
        label="rms_norm",
        name="rms_norm",
        description="each row by its root mean square, without centring",
        build=lambda r: _last_axis(r) | _without_bias(r.row_affine()),
        linked=_last,
        torch=_torch_rms_norm,
        torch_name="torch.nn.functional.rms_norm",
        features=ROW_FEATURES,
        stats=("rstd",),
        backward_keywords=("normalized_shape", "weight"),
    ),
    Operation(
        label="add_layer_norm",
        name="add_layer_norm",
        description="each row of x + residual, returned with that sum",
        build=lambda r: {"residual": r.normal(r.shape)} | _last_axis(r) | r.row_affine(),
        linked=_last,
        torch=_torch_add_layer_norm,
        outputs=2,
        features=frozenset({"per_sample"}),
    ),
    Operation(
        label="add_rms_norm",
        name="add_rms_norm",
        description="each row of x + residual by its root mean square, returned with that sum",
        build=lambda r: (
            {"residual": r.normal(r.shape)} | _last_axis(r) | _without_bias(r.row_affine())
        ),
        linked=_last,
        torch=_torch_add_rms_norm,
        outputs=2,
        features=frozenset({"per_sample"}),
    ),
    Operation(
        label="l2_normalize",
        name="l2_normalize",
        description="each vector along an axis to Euclidean length 1",
        build=lambda r: {},
        linked=_last,
        torch=_torch_l2_normalize,
        torch_name="torch.nn.functional.normalize",
        features=frozenset({"out"}),
    ),
    Operation(
        label="standardize",
        name="standardize",
        description="each column to mean 0 and variance 1, or over any other axes",
        build=lambda r: {"axis": 0},
        linked=lambda ndim, channel: (0,),
        torch=_torch_standardize,
        features=frozenset({"where", "out"}),
    ),
    Operation(
        label="local_response_norm",
        name="local_response_norm",
        description="each element by the channels around it",
        build=lambda r: r.with_axis({"size": 3, "alpha": 0.5}),
        linked=_channel,
        torch=_torch_local_response_norm,
        torch_name="torch.nn.functional.local_response_norm",
        features=frozenset({"channel_axis"}),
        min_ndim=3,
    ),
    Operation(
        label="weight_norm",
        name="weight_norm",
        description="each output channel of a weight to a given length",
        build=_weight_norm_parameters,
        linked=_all_but_first,
        torch=_torch_weight_norm,
        torch_name="torch.nn.utils.parametrizations.weight_norm",
        min_ndim=2,
    ),
    Operation(
        label="weight_standardize",
        name="weight_standardize",
        description="each output channel of a weight to mean 0 and variance 1",
        build=lambda r: {},
        linked=_all_but_first,
        torch=_torch_weight_standardize,
        min_ndim=2,
    ),
    Operation(
        label="global_response_norm",
        name="global_response_norm",
        description="each channel by its share of its sample's average channel norm",
        build=lambda r: r.with_axis(r.channel_affine()),
        linked=_all_but_sample,
        torch=_torch_global_response_norm,
        features=frozenset({"channel_axis", "per_sample"}),
        min_ndim=3,
    ),
    Operation(
        label="dynamic_tanh",
        name="dynamic_tanh",
        description="each element by itself, squashed: no statistics",
        build=lambda r: {"alpha": np.asarray(0.5).astype(r.dtype)} | r.row_affine(),
        linked=_nothing,
        torch=_torch_dynamic_tanh,
        features=frozenset({"per_sample"}),
        formula=lambda f, x, p: p["weight"] * f.xp.tanh(p["alpha"] * x) + p["bias"],
        gradients=("dx", "dalpha", "dweight", "dbias"),
    ),
    Operation(
        label="derf",
        name="derf",
        description="each element by itself, squashed by the error function: no statistics",
        build=lambda r: (
            {name: np.asarray(v).astype(r.dtype) for name, v in (("alpha", 0.5), ("shift", -0.25))}
            | r.row_affine()
        ),
        linked=_nothing,
        torch=_torch_derf,
        features=frozenset({"per_sample"}),
        formula=lambda f, x, p: p["weight"] * f.erf(p["alpha"] * x + p["shift"]) + p["bias"],
        gradients=("dx", "dalpha", "dshift", "dweight", "dbias"),
    ),
)
