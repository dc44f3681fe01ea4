"""Arrays that are not NumPy's, and the door that takes them.

A library is recognised through ``sys.modules``: nothing optional is imported to look at a type. A
door is a module that has functions of the same names and arguments as the public ones, or names
those whose own code it has carried out on its arrays; it is imported with the first that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from fastnorm._numba.gpu.libraries import handles

# What is asked of an x: (library that must have been imported, is x of its kind?, the door). A
# library that is just being imported may not have its types yet.
_DOORS: tuple[tuple[str, Callable[[Any, ModuleType], bool], str], ...] = (
    (
        "dask.array",
        lambda x, library: isinstance(x, getattr(library, "Array", ())),
        "fastnorm.dask",
    ),
)

# What NumPy makes arrays of is the most common and asked for first.
_OWN = (np.ndarray, list, tuple, float, int)


def door_of(x: Any) -> ModuleType | None:
    """Return the module that computes for arrays of this type; None for NumPy and array-likes."""
    if isinstance(x, _OWN):
        return None
    for name, is_its, door in _DOORS:
        library = sys.modules.get(name)
        if library is not None and is_its(x, library):
            return import_module(door)
    if handles(x):  # any library's
        return import_module("fastnorm._numba.gpu.adapter")
    return None


def function_of(door: ModuleType, name: str, of: str) -> Callable[..., Any]:
    """Return the door's function of this name; `of` is what was called."""
    function: Callable[..., Any] | None = getattr(door, name, None)
    if function is None:
        raise TypeError(
            f"{of} got an array for {door.__name__}, which does not have it, expected a NumPy "
            "array; bring it to the host's memory first, as with x.get() or x.cpu().numpy()"
        )
    return function


def send(door: ModuleType, function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Have a door carry out a public function; `given` are the locals of `function`."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    name, named = function.__name__, {name: given[name] for name in names}
    if name in getattr(door, "FUNCTIONS", ()):
        return door.execute(function, named)
    return function_of(door, name, name)(**named)
