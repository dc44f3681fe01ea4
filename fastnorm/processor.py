"""What this machine's processor is called."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_FIRST = 4096  # bytes, which the first processor's lines are within


def name() -> str:
    """Its name, with what tells apart those of one name."""
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_FIRST)
    except OSError:
        return _named_by_others()
    # the first processor's lines, each "name : value"
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    told = {name.strip(): value.strip() for name, _, value in pairs}
    found = told.get("model name") or platform.machine()
    words = (
        ("family", "cpu family"),
        ("model", "model"),
        ("implementer", "CPU implementer"),
        ("part", "CPU part"),
    )
    numbers = [f"{word} {told[key]}" for word, key in words if key in told]
    return f"{found} ({', '.join(numbers)})" if numbers else found


def _named_by_others() -> str:
    """What macOS or Windows calls it."""
    brand = _brand() if platform.system() == "Darwin" else ""
    return brand or platform.processor() or platform.machine()


def _brand() -> str:
    """What macOS says, without another process."""
    found, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    try:
        ask = ctypes.CDLL(None).sysctlbyname
        failed = ask(
            b"machdep.cpu.brand_string", found, ctypes.byref(size), None, ctypes.c_size_t(0)
        )
    except (OSError, AttributeError):
        return ""
    return "" if failed else found.value.decode("ascii", "replace").strip()
