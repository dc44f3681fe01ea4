"""What the figures depend on: the machine, and the versions of what runs on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import fastnorm as fn
from fastnorm import machine
from fastnorm.processor import name as name_of_processor

LIBRARIES = ("numpy", "torch", "onnxruntime", "jax")


def facts() -> dict[str, Any]:
    """All of them, none of which says whose machine it is."""
    config = fn.show_config("dicts") or {}
    return {
        "processor": processor(),
        "cores": machine.here.cores,
        "threads": fn.get_num_threads(),
        "caches": machine.here.caches,
        "measured": machine.here.measured,
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


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of the environment, and set them back at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@cache
def processor() -> str:
    """Its name, with what tells apart those of one name."""
    return name_of_processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
