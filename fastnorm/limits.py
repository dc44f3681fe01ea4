"""What the system allows this process: processors and memory, and numbers in the environment.

A control group (cgroup) is how a container is held to its share. `root` is where the system's files
are looked for; tests have one of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def whole_number(text: str) -> int | None:
    """The number that is written in plain digits; None for anything else, and from 10^18 on."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _read(path: Path) -> str:
    """What a small file of the system says; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those around it, of both versions."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        # in a container the path may be the one outside, of which only the root is seen
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base in (mounts / names, mounts / controller) if names else (mounts,):
            for n in range(len(parts), -1, -1):
                folder = base.joinpath(*parts[:n])
                if folder.is_dir():
                    yield folder


def processors(root: Path = ROOT) -> int:
    """How many processors this process may use: of its affinity, or as its quota has it."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        # "max 100000" or "150000 100000": microseconds of each period
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        used, of = whole_number(quota), whole_number(period)  # no quota: "max" or "-1"
        if used and of:
            count = min(count, -(-used // of))
    return count


def memory_limit(root: Path = ROOT) -> tuple[int, Path, Path] | None:
    """The tightest limit of memory: bytes, the file that says what is used, the one that says how.

    None where there is none, or none below what the machine has.
    """
    found: list[tuple[int, Path, Path]] = []
    names = {
        "memory.max": "memory.current",
        "memory.high": "memory.current",
        "memory.limit_in_bytes": "memory.usage_in_bytes",
    }
    for folder in _groups(root, "memory"):
        for limit, used in names.items():
            size = whole_number(_read(folder / limit))  # not "max", nor what stands for it
            if size is not None:
                found.append((size, folder / used, folder / "memory.stat"))
    tightest = min(found, default=None)
    return tightest if tightest is not None and tightest[0] < _installed() else None


def memory() -> int:
    """Bytes of memory that this process can have: the machine's, or its control group's limit."""
    limit = memory_limit()
    return _installed() if limit is None else limit[0]


def _installed() -> int:
    """Bytes of memory that the machine has; more than any has where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
