"""The classes that take the place of a norm's, each a subclass of it with another forward."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastnorm.torch import formulas, functions
from fastnorm.torch.distributed import synchronised

# --- What may follow a norm in its own pass -------------------------------------------------------

_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}


def is_watched(module: Any) -> bool:
    """Whether somebody is told of a module's calls, or has changed what they do."""
    return "forward" in vars(module) or any(
        hooks for key, hooks in vars(module).items() if key.endswith("_hooks")
    )


def activation_of(module: Any) -> str | None:
    """What the activation that a module is is called here; None where it is none, or is watched."""
    if is_watched(module):
        return None
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _ACTIVATIONS.get(type(module))


# In the place of a residual: there is no sum. None would be one that fails.
_NO_SUM = object()


def _norm(function: Any, followed: dict[str, Any]) -> Any:
    """A norm, or a norm and what follows it, which takes what `_followed` does."""
    return partial(_followed, function) if followed else function


def _followed(
    function: Any,
    x: Tensor,
    *options: Any,
    residual: Any = _NO_SUM,
    in_place: bool = False,
    activation: Any = None,
) -> Tensor:
    """A norm, the sum with a residual, and an activation; in one pass where the sum is plain."""
    y: Tensor
    if residual is _NO_SUM:
        y = function(x, *options, activation=activation)
        return y
    plain = isinstance(residual, Tensor) and isinstance(x, Tensor)
    if plain and residual.shape == x.shape and residual.dtype is x.dtype:
        y = function(x, *options, residual=residual, activation=activation)
        return y
    y = function(x, *options)
    return formulas.activated(y.add_(residual) if in_place else y + residual, activation)


# --- What takes the place of a forward ------------------------------------------------------------


class Replaced:
    """Before a norm's class, `_replaces`, among the bases of the one that replaces it."""

    _replaces: Any
    joins = False  # whether its forward takes what `_followed` does

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made when it is asked for: pickles and copies have the one it replaces
        made: Any = super().__reduce_ex__(protocol)
        if isinstance(made, str):  # a name, under which it is found
            return made
        kind, replaces = type(self), self._replaces
        function, given = made[0], tuple([replaces if a is kind else a for a in made[1]])
        function = replaces if function is kind else function
        return _made_again, (replaces, function, given), *made[2:]


def _made_again(replaces: type, function: Any, given: tuple[Any, ...]) -> Any:
    """What this function makes, of the class that replaces this one, where it can be replaced."""
    module = function(*given)
    if type(module) is replaces and not isinstance(found := _replacement(replaces), str):
        object.__setattr__(module, "__class__", found)
    return module


def _momentum(module: Any) -> float:
    """How far running statistics move with this batch, which is counted."""
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # the average of all batches
            return 1.0 / float(module.num_batches_tracked)
    return 0.0 if module.momentum is None else module.momentum


class _BatchNorm(Replaced):
    joins = True

    def forward(self: Any, input: Tensor, **joined: Any) -> Tensor:
        self._check_input_dim(input)
        # statistics that are not tracked stay as they are in training
        moved = self.track_running_stats or not self.training
        y: Tensor = _norm(functions.batch_norm, joined)(
            input,
            self.running_mean if moved else None,
            self.running_var if moved else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            _momentum(self),
            self.eps,
            **joined,
        )
        return y


class _SyncBatchNorm(Replaced):
    def forward(self: Any, input: Tensor) -> Tensor:
        distributed = torch.distributed
        together = self.training and distributed.is_available() and distributed.is_initialized()
        if not together or distributed.get_world_size(self.process_group) < 2:
            return _BatchNorm.forward(self, input)
        if not input.is_cpu:
            return nn.SyncBatchNorm.forward(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return synchronised(input, self, _momentum(self))


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    r"""Batch normalization over the batches of all processes, which PyTorch has on GPUs alone.

    .. math:: y = (x - \mu) / \sqrt{\sigma^2 + \varepsilon} \cdot w + b

    with the mean and variance of a channel in the batches of all processes of a group together.
    Arguments and state are those of :class:`torch.nn.SyncBatchNorm`. It is not derived from that,
    which ``DistributedDataParallel`` refuses on the CPU. Without a group of several processes, and
    where it does not train, it is batch normalization; on another device it is PyTorch's own.

    Examples
    --------
    >>> import torch, fastnorm.torch as fnt
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8))
    >>> fnt.SyncBatchNorm.convert_sync_batchnorm(model)[1]
    SyncBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels
    forward = _SyncBatchNorm.forward

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Make every BatchNorm of a model one of these, of the same parameters and statistics."""
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for found in converted.modules():
            if isinstance(found, nn.SyncBatchNorm):
                object.__setattr__(found, "__class__", cls)
        return converted


class _InstanceNorm(Replaced):
    # what its forward calls, with or without an axis of samples
    def _apply_instance_norm(self: Any, input: Tensor) -> Tensor:
        return functions.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )


class _LayerNorm(Replaced):
    joins = True

    def forward(self: Any, input: Tensor, **joined: Any) -> Tensor:
        norm = _norm(functions.layer_norm, joined)
        y: Tensor = norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **joined)
        return y


class _GroupNorm(Replaced):
    joins = True

    def forward(self: Any, input: Tensor, **joined: Any) -> Tensor:
        norm = _norm(functions.group_norm, joined)
        y: Tensor = norm(input, self.num_groups, self.weight, self.bias, self.eps, **joined)
        return y


class _RMSNorm(Replaced):
    joins = True

    def forward(self: Any, x: Tensor, **joined: Any) -> Tensor:
        norm = _norm(functions.rms_norm, joined)
        y: Tensor = norm(x, self.normalized_shape, self.weight, self.eps, **joined)
        return y


class _OfInput(Replaced):
    """Those of transformers, of the last axis. Whatever the weight's dtype, y's is that of x."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return functions.rms_norm(x, x.shape[-1], self.weight, self.variance_epsilon)


class _Llama(_OfInput):
    """Likewise, of the dtype that weight and x have in common; of two, PyTorch's rules decide."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is not self.weight.dtype:
            return self._replaces.forward(self, hidden_states)
        return _OfInput.forward(self, hidden_states)


class _OfInputWithEps(Replaced):
    """Likewise, with another name for eps, and with a weight stored as its distance from this."""

    _offset = 0.0

    def forward(self: Any, x: Tensor) -> Tensor:
        last = x.shape[-1]
        return functions.rms_norm(x, last, self.weight, self.eps, weight_offset=self._offset)


class _Gemma(_OfInputWithEps):
    _offset = 1.0


class _OfTimm(Replaced):
    """Those of timm, which may have an activation of their own.

    What they were told to do in lower precision, or faster by another library, they do themselves.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight
        mixed = weight is not None and weight.dtype is not x.dtype
        if getattr(self, "_fast_norm", False) or mixed:
            return self._replaces.forward(self, x)
        if not hasattr(self, "act"):
            return self._normalized(x, None)
        alone = type(self.drop) is nn.Identity and not is_watched(self.drop)
        activation = activation_of(self.act) if alone else None
        y = self._normalized(x, activation)
        return y if activation else self.act(self.drop(y))


class _TimmLayerNorm(_OfTimm):
    def _normalized(self: Any, x: Tensor, activation: Any) -> Tensor:
        shape, weight, bias, eps = self.normalized_shape, self.weight, self.bias, self.eps
        return functions.layer_norm(x, shape, weight, bias, eps, activation=activation)


class _TimmLayerNorm2d(_OfTimm):
    def _normalized(self: Any, x: Tensor, activation: Any) -> Tensor:
        weight, bias, eps = self.weight, self.bias, self.eps
        return functions.layer_norm(x, None, weight, bias, eps, axis=1, activation=activation)


class _TimmGroupNorm(_OfTimm):
    def _normalized(self: Any, x: Tensor, activation: Any) -> Tensor:
        groups, weight, bias, eps = self.num_groups, self.weight, self.bias, self.eps
        return functions.group_norm(x, groups, weight, bias, eps, activation=activation)


class _TimmBatchNorm(_OfTimm):
    def _normalized(self: Any, x: Tensor, activation: Any) -> Tensor:
        return _BatchNorm.forward(self, x, activation=activation)


class _TimmRMSNorm(_OfTimm):
    def _normalized(self: Any, x: Tensor, activation: Any) -> Tensor:
        return functions.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, activation=activation
        )


class _TimmRMSNorm2d(_OfTimm):
    def _normalized(self: Any, x: Tensor, activation: Any) -> Tensor:
        return functions.rms_norm(x, None, self.weight, self.eps, axis=1, activation=activation)


# Those of PyTorch, from the most special on.
PYTORCHS: tuple[tuple[type, type[Replaced]], ...] = (
    (nn.SyncBatchNorm, _SyncBatchNorm),
    *((kind, _BatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    *((kind, _InstanceNorm) for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
    (nn.LayerNorm, _LayerNorm),
    (nn.GroupNorm, _GroupNorm),
    (nn.RMSNorm, _RMSNorm),
)

# Whose classes are known by the code of their forward (`_code_of`): of transformers, some hundred
# models have a class of their own with one of these.
_LIBRARIES = ("timm", "transformers")
_BY_CODE: dict[str, type[Replaced]] = {
    "9635bcd843f309a0": _Llama,  # and Mistral, Qwen 2 and 3, Phi 3, Mamba ...
    "3152525beceb0d02": _Llama,  # T5
    "eef4e978a32aa4a4": _OfInput,  # Olmo 2 ...
    "4ad8d3f59922a14a": _OfInputWithEps,  # Moshi ...
    "e5559c7750c32d00": _Gemma,  # and Gemma 2 and 3
    # Those of timm, the latter of each pair with an activation.
    "23d63967920a9766": _TimmLayerNorm,
    "8118ce537f8ed909": _TimmLayerNorm,
    "9c58bcbc9f92c797": _TimmLayerNorm2d,
    "32adb169b1fa2aca": _TimmLayerNorm2d,
    "7f5270765e35f6e7": _TimmGroupNorm,  # and GroupNorm1
    "6cbfa0e71705c914": _TimmGroupNorm,
    "aab01662c2e6c5ba": _TimmBatchNorm,
    "a1218df7e541df89": _TimmRMSNorm,
    "4c93a5f0b41afca7": _TimmRMSNorm,
    "c7879d78ed7749b2": _TimmRMSNorm2d,
    "33950743d0eaac46": _TimmRMSNorm2d,
}


# What was read of each function, as long as that lives.
_TEXTS: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def _code_of(kind: type) -> str:
    """A hash of what a class computes: its forward and `_norm`, without comments and types."""
    text = []
    for name in ("forward", "_norm"):
        function = getattr(kind, name, None)
        if function is None or hasattr(function, "__wrapped__"):
            continue
        if function not in _TEXTS:
            _TEXTS[function] = _text_of(function)
        if (found := _TEXTS[function]) is None:
            return ""
        text.append(found)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _text_of(function: Any) -> str | None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (made,) = tree.body
    if not isinstance(made, ast.FunctionDef) or made.decorator_list:
        return None
    made.returns = None
    for argument in made.args.args:
        argument.annotation = None
    if ast.get_docstring(made) is not None:
        del made.body[0]
    return ast.unparse(made)


# --- Which class takes whose place ----------------------------------------------------------------


# Those of the classes above when this was imported: what is put in their place later computes
# something else.
_FORWARDS = {
    (base, name): getattr(base, name, None)
    for base, _ in PYTORCHS
    for name in ("forward", "_apply_instance_norm")
}


def _replacement(kind: type) -> type | str:
    """The class that replaces this one, or why none does."""
    for base, mixin in PYTORCHS:
        if issubclass(kind, base):
            own = [
                name
                for name in ("forward", "_apply_instance_norm")
                if getattr(kind, name, None) is not _FORWARDS[base, name]
            ]
            if not own:
                return _subclass(mixin, kind)
            known = _known_forward(kind) if own == ["forward"] else None
            return f"{kind.__name__} has a {own[0]} of its own" if known is None else known
    if kind.__module__.partition(".")[0] not in _LIBRARIES:
        return f"{kind.__name__} is no class that is known"
    return _known_forward(kind) or f"the forward of {kind.__name__} is none that is known"


def _known_forward(kind: type) -> type | str | None:
    """The class that replaces that of another library, or why none does; None: it is unknown."""
    if kind.__module__.partition(".")[0] not in _LIBRARIES:
        return None
    try:
        mixin = _BY_CODE.get(_code_of(kind))
    except (OSError, SyntaxError, TypeError):  # there is no source
        return None
    return None if mixin is None else _subclass(mixin, kind)


def _subclass(mixin: type[Replaced], kind: type) -> type | str:
    found: list[Any] = type.__subclasses__(kind)
    for made in found:  # no table of them, which would keep every class alive
        if vars(made).get("_replaces") is kind and issubclass(made, mixin):
            return made
    # under the name that it has, for what looks at names: torch.fx, initialisers, repr
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    try:
        made = type(kind.__name__, (mixin, kind), own)
    except Exception as error:  # of the code that somebody has for subclasses
        return f"no class can be derived from {kind.__name__} ({type(error).__name__}: {error})"
    # last: a class that was refused halfway is among `found` as well
    type.__setattr__(made, "_replaces", kind)
    return made


def choice_of(module: nn.Module) -> type | str:
    """The class that replaces that of a module, or why none does."""
    if "forward" in vars(module):
        return "this module has a forward of its own"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its first call makes another class of it"
    kind: Any = type(module)
    return _replacement(kind)
