"""The norms of a model, replaced by fastnorm's where they stand, restored, and listed.

A module stays the object that it is, with its parameters, buffers, hooks and settings: what changes
is its class, to a subclass of its own whose forward calls fastnorm.torch.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastnorm.arguments import check_flag, shown
from fastnorm.torch import functions

# --- What takes the place of a forward ------------------------------------------------------------


class _Replaced:
    """Before a norm's class, `_replaces`, among the bases of the one that replaces it."""

    _replaces: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made when it is asked for: pickles and copies have the one it replaces
        made: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return _made_again, (type(self)._replaces,), *made[2:]


def _made_again(replaces: type) -> nn.Module:
    """An empty module of the class that replaces this one, where it still can be replaced."""
    found = _replacement(replaces)
    kind: Any = replaces if isinstance(found, str) else found
    return kind.__new__(kind)


class _BatchNorm(_Replaced):
    def forward(self: Any, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        tracked = self.training and self.track_running_stats
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        # statistics that are not tracked stay as they are in training
        moved = tracked or not self.training
        return functions.batch_norm(
            input,
            self.running_mean if moved else None,
            self.running_var if moved else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )


class _SyncBatchNorm(_BatchNorm):
    def forward(self: Any, input: Tensor) -> Tensor:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return self._replaces.forward(self, input)
        return _BatchNorm.forward(self, input)


class _InstanceNorm(_Replaced):
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


class _LayerNorm(_Replaced):
    def forward(self: Any, input: Tensor) -> Tensor:
        return functions.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _GroupNorm(_Replaced):
    def forward(self: Any, input: Tensor) -> Tensor:
        return functions.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _RMSNorm(_Replaced):
    def forward(self: Any, x: Tensor) -> Tensor:
        return functions.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class _OfInput(_Replaced):
    """Those of transformers, of the last axis. Whatever the weight's dtype, y's is that of x."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return functions.rms_norm(x, x.shape[-1], self.weight, self.variance_epsilon)


class _Llama(_OfInput):
    """Likewise, of the dtype that weight and x have in common; of two, PyTorch's rules decide."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is not self.weight.dtype:
            return self._replaces.forward(self, hidden_states)
        return _OfInput.forward(self, hidden_states)


class _OfInputWithEps(_Replaced):
    """Likewise, with another name for eps, and with a weight stored as its distance from this."""

    _offset = 0.0

    def forward(self: Any, x: Tensor) -> Tensor:
        last = x.shape[-1]
        return functions.rms_norm(x, last, self.weight, self.eps, weight_offset=self._offset)


class _Gemma(_OfInputWithEps):
    _offset = 1.0


# Those of PyTorch, from the most special on.
_PYTORCHS: tuple[tuple[type, type[_Replaced]], ...] = (
    (nn.SyncBatchNorm, _SyncBatchNorm),
    *((kind, _BatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    *((kind, _InstanceNorm) for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
    (nn.LayerNorm, _LayerNorm),
    (nn.GroupNorm, _GroupNorm),
    (nn.RMSNorm, _RMSNorm),
)

# Those of transformers, by the code of their forward (`_code_of`): some hundred models have a class
# of their own with one of these.
_BY_CODE: dict[str, type[_Replaced]] = {
    "9635bcd843f309a0": _Llama,  # and Mistral, Qwen 2 and 3, Phi 3, Mamba ...
    "3152525beceb0d02": _Llama,  # T5
    "eef4e978a32aa4a4": _OfInput,  # Olmo 2 ...
    "4ad8d3f59922a14a": _OfInputWithEps,  # Moshi ...
    "e5559c7750c32d00": _Gemma,  # and Gemma 2 and 3
}


def _code_of(kind: type) -> str:
    """A hash of what a class computes: its forward and `_norm`, without comments and types."""
    text = []
    for name in ("forward", "_norm"):
        function = getattr(kind, name, None)
        if function is None or hasattr(function, "__wrapped__"):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        (made,) = tree.body
        if not isinstance(made, ast.FunctionDef) or made.decorator_list:
            return ""
        made.returns = None
        for argument in made.args.args:
            argument.annotation = None
        if ast.get_docstring(made) is not None:
            del made.body[0]
        text.append(ast.unparse(made))
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


# --- Which class takes whose place ----------------------------------------------------------------


@cache
def _replacement(kind: type) -> type | str:
    """The class that replaces this one, or why none does."""
    for base, mixin in _PYTORCHS:
        if issubclass(kind, base):
            own = [
                name
                for name in ("forward", "_apply_instance_norm")
                if getattr(kind, name, None) is not getattr(base, name, None)
            ]
            if own:
                return f"{kind.__name__} has a {own[0]} of its own"
            return _subclass(mixin, kind)
    if kind.__module__.partition(".")[0] != "transformers":
        return f"{kind.__name__} is no class that is known"
    try:
        mixin_found = _BY_CODE.get(_code_of(kind))
    except (OSError, SyntaxError, TypeError):  # there is no source
        mixin_found = None
    if mixin_found is None:
        return f"the forward of {kind.__name__} is none that is known"
    return _subclass(mixin_found, kind)


def _subclass(mixin: type[_Replaced], kind: type) -> type:
    # under the name that it has, for what looks at names: torch.fx, initialisers, repr
    own = {"_replaces": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: type = type(kind.__name__, (mixin, kind), own)
    return made


def _choice(module: nn.Module) -> type | str:
    """The class that replaces that of a module, or why none does."""
    if "forward" in vars(module):
        return "this module has a forward of its own"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    kind: Any = type(module)
    return _replacement(kind)


# --- Models ---------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One norm of a model."""

    name: str
    """Where it is, as in ``model.named_modules()``."""
    kind: str
    """The name of its class."""
    replaced: bool
    reason: str
    """Why it is not replaced; empty if it is."""


class Report(list[Entry]):
    """The norms of a model; as a string, a table."""

    @property
    def replaced(self) -> list[Entry]:
        """Those that fastnorm computes."""
        return [entry for entry in self if entry.replaced]

    @property
    def left(self) -> list[Entry]:
        """Those that are as they were."""
        return [entry for entry in self if not entry.replaced]

    def __str__(self) -> str:
        rows = [
            (name or "(the model)", kind, "replaced" if done else f"left: {reason}")
            for name, kind, done, reason in self
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)


def replace(model: nn.Module, fuse: bool = False) -> nn.Module:
    r"""Have fastnorm compute the norms of a model, each where it stands.

    .. math:: y = \mathrm{norm}(x), \quad \text{of the same parameters, in another forward}

    Every module stays the same object: its parameters, buffers, hooks, name, mode and the keys of
    its state stay as they are. Its class becomes a subclass of its own.

    Parameters
    ----------
    model
        Any module: BatchNorm1d to 3d, SyncBatchNorm (of one process), LayerNorm, GroupNorm,
        InstanceNorm1d to 3d and RMSNorm of ``torch.nn`` are replaced, and the RMS norms of
        transformers whose forward is known (Llama, T5, Gemma and what computes the same). Others
        are left.
    fuse
        False. Norms are not joined with what follows them yet.

    Returns
    -------
    model
        The model itself.

    Raises
    ------
    TypeError
        For what is no module.
    ValueError
        With ``fuse=True``.

    Examples
    --------
    >>> import torch, fastnorm.torch as fnt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> fnt.replace(model) is model, isinstance(model[1], torch.nn.LayerNorm)
    (True, True)
    >>> print(fnt.report(model))
    1  LayerNorm  replaced
    """
    if check_flag(fuse, "fuse"):
        raise ValueError(
            "replace got fuse=True, which does not exist yet, expected False; write "
            "fastnorm.torch.group_norm(..., activation=...) in the model itself"
        )
    for _, module in _modules(model, "replace"):
        if not isinstance(module, _Replaced) and not isinstance(found := _choice(module), str):
            module.__class__ = found
    return model


def restore(model: nn.Module) -> nn.Module:
    r"""Undo :func:`replace`.

    .. math:: \mathrm{restore}(\mathrm{replace}(m)) = m

    Parameters
    ----------
    model
        Any module; those in it that were replaced get the class back that they had.

    Returns
    -------
    model
        The model itself.

    Raises
    ------
    TypeError
        For what is no module.
    ValueError
        If a norm was parametrized after it was replaced.

    Examples
    --------
    >>> import torch, fastnorm.torch as fnt
    >>> norm = fnt.replace(torch.nn.LayerNorm(8))
    >>> type(fnt.restore(norm)) is torch.nn.LayerNorm
    True
    """
    replaced = [(n, m) for n, m in _modules(model, "restore") if isinstance(m, _Replaced)]
    for name, module in replaced:
        if "_replaces" not in vars(type(module)):
            raise ValueError(
                f"restore got {name or 'a model'}, whose class {type(module).__name__} was made of "
                "that which replaces it, expected none; write "
                "torch.nn.utils.parametrize.remove_parametrizations(...) before"
            )
    for _, module in replaced:
        module.__class__ = module._replaces
    return model


def report(model: nn.Module) -> Report:
    r"""List the norms of a model: which are replaced, which are not, and why.

    .. math:: \text{name} \mapsto (\text{class}, \text{replaced or not}, \text{reason})

    Parameters
    ----------
    model
        Any module.

    Returns
    -------
    report
        A list of entries (name, kind, replaced, reason), with those in ``report.replaced`` and
        ``report.left``; printed, it is a table. Also those whose
        class is derived from a norm's, or has "norm" in its name and no other module in it.

    Raises
    ------
    TypeError
        For what is no module.

    Examples
    --------
    >>> import torch, fastnorm.torch as fnt
    >>> print(fnt.report(torch.nn.Sequential(torch.nn.LocalResponseNorm(3), torch.nn.LayerNorm(8))))
    0  LocalResponseNorm  left: LocalResponseNorm is no class that is known
    1  LayerNorm          left: it can be replaced
    """
    found = Report()
    for name, module in _modules(model, "report"):
        kind = type(module).__name__
        choice = "" if isinstance(module, _Replaced) else _choice(module)
        if not isinstance(choice, str):
            choice = "it can be replaced"
        elif choice and not _is_norm(module):
            continue
        found.append(Entry(name, kind, not choice, choice))
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether somebody may ask why this is not replaced."""
    if isinstance(module, tuple(base for base, _ in _PYTORCHS)):
        return True
    named = "norm" in type(module).__name__.lower()
    return named and not any(True for _ in module.children())


def _modules(model: Any, of: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{of} got {shown(model)}, expected a torch.nn.Module; write {of}(model) with the "
            "model itself"
        )
    return iter(list(model.named_modules()))
