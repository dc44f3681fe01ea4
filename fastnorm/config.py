"""What is at hand, and what is made of it: versions, instruction sets, threads, schedules."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastnorm import _core, backends, processor
from fastnorm import machine as machines
from fastnorm.arguments import did_you_mean, shown
from fastnorm.runtime import get_num_threads
from fastnorm.runtime import threads as _threads

VERSION = "0.1.0"


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show versions, instruction sets, caches, threads and backends.

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
    ['backends', 'cpu', 'cuda', 'machine', 'threads', 'versions']
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
    here = machines.here
    config: dict[str, Any] = {
        "versions": versions,
        "cpu": {
            "name": processor.name(),
            "machine": platform.machine(),
            "instruction set found": _core.level_found or "unknown",
            "instruction set used": _core.level_used or "none: no compiled kernels",
            "failed to load": backends.failures() or "none",
        },
        "machine": {
            "caches": [f"{level} {size >> 10} kB" for level, size in here.caches.items()],
            "cores that share the last": here.l3_cores,
            "cores": here.cores,
            "taken from": machines.source.text,
            "passed over": machines.source.passed_over or "nothing",
            "measured": [f"{name} {n}" for name, n in here.measured.items()] or "nothing",
        },
        "threads": {
            "at most": get_num_threads(),
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


def explain(
    call: str | Callable[..., Any],
    *args: Any,
    threads: int | None = None,
    machine: str = "",
    mode: str = "stdout",
    **kwargs: Any,
) -> list[dict[str, Any]] | None:
    """Show how a call would be carried out by the compiled kernels; nothing is computed.

    For each pass over memory: its path, tiles, threads, kind of stores, the bytes that it moves,
    and what share of the speed of a copy these allow, with the reasons.

    Parameters
    ----------
    call
        A text as for ``fastnorm bench``, ``"group_norm 8x256x32x32 channels-last bfloat16"``. Or a
        function such as ``fn.group_norm``, followed by the arguments of a call.
    *args, **kwargs
        Of a function: arrays of NumPy's, whose numbers are not read, and what else it takes.
    threads
        How many threads; as many as there are where it is not given.
    machine
        Another machine: the name of a model, ``"zen5"``, facts, ``"l2=2M,l3=16M"``, or both, as in
        :envvar:`FASTNORM_MACHINE`.
    mode
        ``"stdout"`` prints, ``"dicts"`` returns a dictionary for each pass.

    Returns
    -------
    list of dict, or None
        With ``"dicts"``; otherwise None.

    Raises
    ------
    ValueError
        If a text says no call, or `machine` no machine.

    Examples
    --------
    >>> import fastnorm as fn
    >>> (found,) = fn.explain("layer_norm 4096x768", threads=2, machine="zen5", mode="dicts")
    >>> found["path"], found["stores"], found["threads"]
    ('rows', 'usual', 2)
    """
    modes = ("stdout", "dicts")
    if mode not in modes:
        raise ValueError(
            f"mode is {shown(mode)}: use 'stdout' to print, 'dicts' to get dictionaries"
            + did_you_mean(mode, modes)
        )
    here = machines.of_text(machine, machines.here)
    n = get_num_threads()
    if threads is not None:
        with _threads(threads):  # refuses what is no number of threads
            n = get_num_threads()
    explanation = import_module("fastnorm.explanation")  # as a rule nobody asks
    passes = explanation.explain(call, args, kwargs, here, n)
    if mode == "dicts":
        return [each.facts for each in passes]
    print(explanation.to_text(passes, here))
    return None
