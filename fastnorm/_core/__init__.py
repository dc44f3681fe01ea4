"""The compiled kernels, for the widest instruction set that this processor has."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

from fastnorm import limits

LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


# Why a compiled module that is there could not be loaded, by its name.
failed: dict[str, str] = {}


def _import(name: str) -> ModuleType | None:
    """A compiled module; None where it was not built, or does not load (`failed` then says why)."""
    path = f"fastnorm._core.{name}"
    try:
        return import_module(path)
    except Exception as error:  # a NumPy or Cython that does not fit raises other than ImportError
        if not (isinstance(error, ModuleNotFoundError) and error.name == path):
            failed[name] = f"{type(error).__name__}: {error}"
    return None


def exchange() -> ModuleType | None:
    """The module that reads tensors of other libraries; imported by the first adapter that asks."""
    return _import("_exchange")


def _load() -> tuple[ModuleType | None, str, str]:
    """The kernels' module (None: there is none), the level it is for, the processor's level."""
    cpu = _import("_cpu")
    if cpu is None:
        return None, "", ""
    found: int = cpu.level()  # 0: not x86-64, or older than v2
    allowed = found
    cap = os.environ.get("FASTNORM_CPU", "")
    if cap:
        if cap not in LEVELS:
            raise ValueError(
                f"FASTNORM_CPU={cap!r} is no instruction set fastnorm knows; "
                f"set it to one of {', '.join(LEVELS)}, or unset it"
            )
        allowed = min(found, LEVELS.index(cap) + 1)
    level_found = LEVELS[found - 1] if found else "plain"
    for name in (*reversed(LEVELS[:allowed]), "plain"):
        kernels = _import(f"_kernels_{name.removeprefix('x86-64-')}")
        if kernels is not None:
            return kernels, name, level_found
    return None, "", ""


def _keep_at_most() -> int:
    """Bytes of freed results that stay at hand for the next ones."""
    value = os.environ.get("FASTNORM_KEEP_MB", "").strip() or "256"
    megabytes = limits.whole_number(value)
    if megabytes is None or megabytes >= 1 << 43:
        raise ValueError(
            f"FASTNORM_KEEP_MB={value!r} is no number of megabytes: set it to 0 or more, in plain "
            "digits, or unset it"
        )
    return megabytes << 20


kernels, level_used, level_found = _load()
if kernels is not None:
    kernels.keep_at_most(_keep_at_most())
    _limit = limits.memory_limit()
    if _limit is not None:
        kernels.watch_memory(_limit[0], os.fsencode(_limit[1]), os.fsencode(_limit[2]))
