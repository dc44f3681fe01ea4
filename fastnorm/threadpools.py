"""What ``threadpoolctl`` sees of the kernels' threads, and how it limits them.

``threadpoolctl`` knows libraries by a list, to which others may add themselves. That is done when
both have been imported, in whatever order.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fastnorm import runtime

NAME = "threadpoolctl"


def register(threadpoolctl: Any) -> None:
    """Add fastnorm to the libraries that a `threadpoolctl` of 3.2 or later knows."""
    if not hasattr(threadpoolctl, "register"):
        return

    class Controller(threadpoolctl.LibController):
        """The threads of the compiled kernels.

        They count as OpenMP's: who limits those means whatever computes, besides BLAS.
        """

        user_api = "openmp"
        internal_api = "fastnorm"
        filename_prefixes = ("_kernels_",)
        check_symbols = tuple(f"PyInit__kernels_{name}" for name in ("v2", "v3", "v4", "plain"))

        def get_num_threads(self) -> int:
            return runtime.process_threads()

        def set_num_threads(self, num_threads: int) -> None:
            runtime.limit_threads(num_threads)

        def get_version(self) -> None:
            return None

    threadpoolctl.register(Controller)


class _Awaited:
    """Finds `threadpoolctl` as Python does, and registers as soon as it has been imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        found = (finder.find_spec(name, path, target) for finder in _others())
        spec = next((spec for spec in found if spec is not None), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            load = loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register(module)
                with suppress(ValueError):  # another thread's import was faster
                    sys.meta_path.remove(cls)

            loader.exec_module = load_and_register
        return spec


def _others() -> list[Any]:
    return [f for f in sys.meta_path if getattr(f, "__qualname__", "") != _Awaited.__qualname__]


def connect() -> None:
    """Register now, or when `threadpoolctl` comes."""
    if NAME in sys.modules:
        register(sys.modules[NAME])
    elif len(_others()) == len(sys.meta_path):
        sys.meta_path.insert(0, _Awaited)
