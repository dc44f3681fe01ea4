"""Small C helpers, compiled on the spot: what is timed against them would hide in Python's time."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path


def compiler() -> list[str] | None:
    """The C compiler and its own arguments; None where there is none."""
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) else None


def version() -> str | None:
    """Of the compiler; the kernels were most likely built by the same."""
    command = compiler()
    if command is None:
        return None
    told = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return told.splitlines()[0] if told else command[0]


@cache
def load(name: str, march: str = "native") -> ctypes.CDLL | None:
    """benchmarks/<name>.c for these instructions; None where it can not be compiled or loaded."""
    command = compiler()
    if command is None:
        return None
    source = Path(__file__).with_name(f"{name}.c")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder, f"{name}.so")
        flags = ["-O3", "-fPIC", "-shared", "-o", str(library), str(source)]
        # a compiler may know only one of these
        for extra in (["-fopenmp", f"-march={march}"], ["-fopenmp"], [f"-march={march}"], []):
            built = subprocess.run([*command, *extra, *flags], capture_output=True)
            if built.returncode == 0:
                try:
                    return ctypes.CDLL(str(library))
                except OSError:
                    return None
    return None
