"""Who computes. Everything above describes passes and knows no backend.

To add one: write a module in this folder with the functions of `base.Backend`, and name it in
`MODULES`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from fastnorm import _core, runtime
from fastnorm.arguments import converted, did_you_mean, shown
from fastnorm.arrays import ArrayView, assign, to_device_of, to_host
from fastnorm.backends import cython, numba, numpy
from fastnorm.backends.base import Backend
from fastnorm.problem import Array, BackwardProblem
from fastnorm.runtime import chosen_backend

# All there are, the fastest first.
MODULES: dict[str, Backend] = {"cython": cython, "numba": numba, "numpy": numpy}


class _AtHand(dict[str, Backend]):
    """Backends by name; what is none of them only writes down what is asked (`fn.explain`)."""

    def __missing__(self, name: str) -> Backend:
        from fastnorm.backends import recorder

        return recorder


# Those that this installation has; `at_hand[chosen_backend()]` computes.
at_hand = _AtHand((name, module) for name, module in MODULES.items() if module.available())


def compute_backward(p: BackwardProblem) -> None:
    """Carry out a backward pass on the backend in use, or where x is; with a mask in NumPy."""
    if p.mask is not None:
        _masked_backward(p)
    elif isinstance(p.x, ArrayView):
        p.x.device.backward(p)
    else:
        at_hand[chosen_backend()].backward(p)


def _masked_backward(p: BackwardProblem) -> None:
    """In NumPy's memory and by its formulas: the kernels know of no masks here."""
    if not isinstance(p.x, ArrayView):
        return numpy.backward(p)
    names = ("x", "dy", "mean", "rstd", "weight", "mask")
    operands: dict[str, Any] = {name: to_host(getattr(p, name)) for name in names}
    results = {n: a for n in ("dx", "dweight", "dbias") if (a := getattr(p, n)) is not None}
    here: dict[str, Any] = {n: np.empty(a.shape, a.dtype) for n, a in results.items()}
    numpy.backward(replace(p, **operands, **here))
    for name, array in results.items():
        assign(array, to_device_of(p.x, here[name]))
    return None


# Elements that moments are taken of at once where they are converted first: a few megabytes.
BLOCK = 1 << 18


def moments_at_once(dtype: np.dtype[Any]) -> int | None:
    """How many elements `compute_moments` takes in one call; None for any number."""
    return None if at_hand[chosen_backend()].takes_whole(dtype) else BLOCK


def compute_moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array) -> None:
    """Fill `fields`, (5, ...) with the reduced axes as 1, with the moments of x.

    They are count, mean, rest of the mean, sum of squared deviations from it, and its rest: each of
    the two is an unevaluated sum of two doubles. `x` may be of integers or booleans.
    """
    if x.dtype.kind in "iu" and x.dtype.itemsize > 2:
        x = converted(x, np.float64)
    at_hand[chosen_backend()].moments(x, reduced, mask, fields)


# --- The choice -----------------------------------------------------------------------------------


def failures() -> str:
    """The compiled modules that are there and did not load, with the reasons."""
    return "; ".join(f"{name}: {reason}" for name, reason in _core.failed.items())


def _known(name: str) -> str:
    """The backend that a name stands for, if there is one."""
    names = ("auto", *MODULES)
    if not isinstance(name, str) or name not in names:
        raise ValueError(
            f"no backend is called {shown(name)}: use one of {', '.join(map(repr, names))}"
            + did_you_mean(name, names)
        )
    if name != "auto" and name not in at_hand:
        raise ValueError(
            f"this installation has no {name!r} backend, expected one of "
            f"{', '.join(map(repr, at_hand))}; use one of those, or 'auto'"
            + (f" ({failures()})" if name == "cython" and _core.failed else "")
        )
    return next(iter(at_hand)) if name == "auto" else name


def set_backend(name: str) -> None:
    """Choose who computes, for the whole process.

    Inside ``with fn.backend(...)`` that block's own choice stays.

    Parameters
    ----------
    name
        ``"cython"``, ``"numba"`` (kernels compiled on first use, which takes seconds once),
        ``"numpy"``, or ``"auto"``: the fastest at hand. Also read at import from the environment
        variable ``FASTNORM_BACKEND``.

    Raises
    ------
    ValueError
        If there is no such backend, or this installation does not have it.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.set_backend("numpy")
    >>> fn.get_backend()
    'numpy'
    >>> fn.set_backend("auto")
    """
    runtime.set_process_backend(_known(name))


def get_backend() -> str:
    """Return the name of the backend that computes.

    Returns
    -------
    str
        Never ``"auto"``, but what it stands for.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.get_backend() in ("cython", "numba", "numpy")
    True
    """
    return chosen_backend()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use another backend inside a ``with`` block.

    The choice is this context's: other threads and asyncio tasks keep theirs, tasks that are made
    inside the block take it over, threads do not.

    Parameters
    ----------
    name
        As for :func:`set_backend`.

    Raises
    ------
    ValueError
        If there is no such backend, or this installation does not have it.

    Examples
    --------
    >>> import fastnorm as fn
    >>> with fn.backend("numpy"):
    ...     print(fn.get_backend())
    numpy
    """
    with runtime.scope(runtime.Choice(backend=_known(name))):
        yield


set_backend(os.environ.get("FASTNORM_BACKEND", "") or "auto")
if _core.failed:
    _used = f"the kernels for {_core.level_used} are" if _core.kernels else f"{get_backend()} is"
    warnings.warn(
        f"fastnorm could not load all of its compiled kernels, {_used} used instead "
        f"({failures()}); installing fastnorm-kernels again, from source where that does not "
        "help, builds them for this Python and NumPy",
        RuntimeWarning,
        stacklevel=2,
    )
