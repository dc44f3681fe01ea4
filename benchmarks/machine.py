"""What the figures depend on: the machine, and the versions of what runs on it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastnorm as fn

from . import native

LIBRARIES = ("numpy", "torch", "onnxruntime", "jax")


def facts() -> dict[str, Any]:
    """All of them, none of which says whose machine it is."""
    config = fn.show_config("dicts") or {}
    return {
        "processor": processor(),
        "cores": cores(),
        "threads": fn.get_num_threads(),
        "caches": _caches(),
        "instruction set": config["cpu"]["instruction set used"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"fastnorm": fn.__version__} | {name: _version(name) for name in LIBRARIES},
        "compiler": compiler(),
        "date": date.today().isoformat(),
    }


def busy() -> float | None:
    """The share of the processors that others use now, in percent: what spoils every figure.

    Two threads that wait for each other take 8 ms where one must share its processor.
    """
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.cpu_percent(interval=1.0))


def cores() -> int:
    """Those this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """Its name, with what tells apart those of one name."""
    try:
        from cpuinfo import get_cpu_info  # pytest-benchmark brings it
    except ImportError:
        return platform.processor() or platform.machine()
    info = get_cpu_info()
    name = str(info.get("brand_raw", platform.machine()))
    numbers = [f"{word} {info[word]}" for word in ("family", "model") if word in info]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _caches() -> dict[str, int]:
    """Bytes of one cache of each level, where Linux tells."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / n).read_text().strip() for n in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1]) * 1024
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def compiler() -> str | None:
    """Of the helpers; the kernels were most likely built by the same."""
    command = native.compiler()
    if command is None:
        return None
    told = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return told.splitlines()[0] if told else command[0]
