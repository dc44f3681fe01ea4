"""The norms of a model, replaced by fastnorm's where they stand, restored, and listed.

A module stays the object that it is, with its parameters, buffers, hooks and settings: what changes
is its class, to a subclass of its own whose forward calls fastnorm.torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from fastnorm.arguments import check_flag, shown
from fastnorm.torch.classes import PYTORCHS, Replaced, choice_of, is_watched
from fastnorm.torch.fusing import Joined, joined


class Entry(NamedTuple):
    """One norm of a model."""

    name: str
    """Where it is, as in ``model.named_modules()``."""
    kind: str
    """The name of its class."""
    replaced: bool
    reason: str
    """Why it is not replaced, or what hinders that it is restored; else empty."""


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
            (
                name or "(the model)",
                kind,
                ("replaced" if done else "left") + (f": {reason}" if reason else ""),
            )
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
        Any module: BatchNorm1d to 3d, SyncBatchNorm, LayerNorm, GroupNorm, InstanceNorm1d to 3d
        and RMSNorm of ``torch.nn`` are replaced, the RMS norms of transformers whose forward is
        known (Llama, T5, Gemma and what computes the same), and norms of timm, those with an
        activation, too. Others are left.
    fuse
        Whether to join norms with what follows them, too, in the forward of the modules that call
        them: an activation (ReLU, ReLU6, SiLU, GELU), the sum with a residual, or both, where
        torch.fx proves that nothing else is asked of the norm. They are one pass over memory, and
        what goes into the activation is not kept for the gradient. What is joined is called no
        more: add hooks before, or :func:`restore` first.

    Returns
    -------
    model
        The model itself.

    Raises
    ------
    TypeError
        For what is no module.

    Examples
    --------
    >>> import torch, fastnorm.torch as fnt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> fnt.replace(model) is model, isinstance(model[1], torch.nn.LayerNorm)
    (True, True)
    >>> print(fnt.report(model))
    1  LayerNorm  replaced
    """
    fuse = check_flag(fuse, "fuse")
    chosen = [
        (m, choice_of(m)) for _, m in _modules(model, "replace") if not isinstance(m, Replaced)
    ]
    _set_classes([(module, found) for module, found in chosen if not isinstance(found, str)])
    if fuse:
        found = [(m, joined(m)) for _, m in _modules(model, "replace") if not is_watched(m)]
        _set_classes([(module, kind) for module, kind in found if kind is not None])
    return model


def _set_classes(pairs: list[tuple[Any, type]]) -> None:
    """Give each module its class, or none of them."""
    before = [(module, type(module)) for module, _ in pairs]
    try:
        for module, kind in pairs:
            # what a module has of its own for this is for its attributes
            object.__setattr__(module, "__class__", kind)
    except BaseException:
        for module, kind in before:
            object.__setattr__(module, "__class__", kind)
        raise


def restore(model: nn.Module) -> nn.Module:
    r"""Undo :func:`replace`.

    .. math:: \mathrm{restore}(\mathrm{replace}(m)) = m

    Parameters
    ----------
    model
        Any module; those in it that were replaced, or joined, get the class back that they had.

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
    replaced = [(n, m) for n, m in _modules(model, "restore") if isinstance(m, Replaced | Joined)]
    for name, module in replaced:
        if _is_derived(module):
            raise ValueError(
                f"restore got {name or 'a model'}, whose class {type(module).__name__} was made of "
                "that which replaces it, expected none; write "
                "torch.nn.utils.parametrize.remove_parametrizations(...) before"
            )
    _set_classes([(module, module._replaces) for _, module in replaced])
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
        done = isinstance(module, Replaced)
        if done:
            choice: Any = "parametrized, and not to be restored before that is undone"
            choice = choice if _is_derived(module) else ""
        else:
            choice = choice_of(module)
        if not isinstance(choice, str):
            choice = "it can be replaced"
        elif not done and not _is_norm(module):
            continue
        found.append(Entry(name, kind, done, choice))
    return found


def _is_derived(module: Replaced | Joined) -> bool:
    """Whether parametrizing made another class of the one that replaces a norm's."""
    return "_replaces" not in vars(type(module))


def _is_norm(module: nn.Module) -> bool:
    """Whether somebody may ask why this is not replaced."""
    if isinstance(module, tuple(base for base, _ in PYTORCHS)):
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
