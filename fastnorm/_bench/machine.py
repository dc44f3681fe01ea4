"""What the figures depend on: the machine, and the versions of what runs on it."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastnorm as fn
from fastnorm import machine

LIBRARIES = ("numpy", "torch", "onnxruntime", "jax")


def facts() -> dict[str, Any]:
    """All of them, none of which says whose machine it is."""
    config = fn.show_config("dicts") or {}
    return {
        "processor": processor(),
        "cores": machine.here.cores,
        "threads": fn.get_num_threads(),
        "caches": machine.here.caches,
        "instruction set": config["cpu"]["instruction set used"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"fastnorm": fn.__version__} | {name: _version(name) for name in LIBRARIES},
        "date": date.today().isoformat(),
    }


def busy(seconds: float = 1.0) -> float | None:
    """The share of the processors that others use now, in percent: what spoils every figure.

    Two threads that wait for each other take 8 ms where one must share its processor.
    """
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.cpu_percent(interval=seconds))


@cache
def processor() -> str:
    """Its name, with what tells apart those of one name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _named_elsewhere()
    # the first processor's lines, each "name : value"
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    told = {name.strip(): value.strip() for name, _, value in pairs}
    name = told.get("model name") or platform.machine()
    words = (("family", "cpu family"), ("model", "model"))
    numbers = [f"{word} {told[key]}" for word, key in words if key in told]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _named_elsewhere() -> str:
    """What macOS or Windows calls it."""
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:
            told = ""
        if told.strip():
            return told.strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
