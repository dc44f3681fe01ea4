"""fastnorm: batch, layer, instance, group and RMS normalization for NumPy, fast and right."""

from importlib import import_module
from typing import TYPE_CHECKING

from fastnorm import backward, elementwise, functional, related, threadpools
from fastnorm.backends import backend, get_backend, set_backend
from fastnorm.backward import *
from fastnorm.config import VERSION, explain, show_config
from fastnorm.elementwise import *
from fastnorm.functional import *
from fastnorm.moments import Moments, moments, standardize
from fastnorm.related import *
from fastnorm.runtime import get_num_threads, set_num_threads, threads, trim_memory

if TYPE_CHECKING:
    from types import ModuleType

    from fastnorm import nn

__version__ = VERSION

# The functions of a module are public that its own __all__ names: type checkers read it so, too.
__all__ = [
    "Moments",
    "backend",
    "explain",
    "get_backend",
    "get_num_threads",
    "moments",
    "nn",
    "set_backend",
    "set_num_threads",
    "show_config",
    "standardize",
    "threads",
    "trim_memory",
]
__all__ += backward.__all__
__all__ += elementwise.__all__
__all__ += functional.__all__
__all__ += related.__all__

threadpools.connect()


def __getattr__(name: str) -> "ModuleType":
    if name == "nn":  # imported by whoever uses it
        return import_module("fastnorm.nn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
