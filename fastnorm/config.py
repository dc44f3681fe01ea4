"""What is at hand: versions, instruction sets, threads, backends."""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np

from fastnorm import _core, backends
from fastnorm.arguments import did_you_mean, shown
from fastnorm.runtime import get_num_threads

VERSION = "0.1.0"


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show versions, instruction sets, threads and backends.

    Parameters
    ----------
    mode
        ``"stdout"`` prints, ``"dicts"`` returns the same as a dictionary.

    Returns
    -------
    dict or None
        With ``"dicts"``; otherwise None.

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import fastnorm as fn
    >>> sorted(fn.show_config("dicts"))
    ['backends', 'cpu', 'cuda', 'threads', 'versions']
    """
    modes = ("stdout", "dicts")
    if not isinstance(mode, str) or mode not in modes:
        raise ValueError(
            f"mode is {shown(mode)}: use 'stdout' to print, 'dicts' to get a dictionary"
            + did_you_mean(mode, modes)
        )
    from importlib.metadata import PackageNotFoundError, version

    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fastnorm": VERSION,
    }
    try:
        versions["numba"] = version("numba")
    except PackageNotFoundError:
        versions["numba"] = "not installed"
    config: dict[str, Any] = {
        "versions": versions,
        "cpu": {
            "machine": platform.machine(),
            "instruction set found": _core.level_found or "unknown",
            "instruction set used": _core.level_used or "none: no compiled kernels",
            "failed to load": backends.failures() or "none",
        },
        "threads": {
            "at most": get_num_threads(),
            "openmp": _core.kernels is not None and _core.kernels.has_threads(),
        },
        "backends": {"in use": backends.get_backend(), "at hand": list(backends.at_hand)},
        "cuda": {"numba.cuda imported": "numba.cuda" in sys.modules},
    }
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(section)
        for name, value in entries.items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"  {name}: {text}")
    return None
