"""A part of a file as blocks of numbers: who reads what, and what that needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from fastnorm._files.arrays import array_blocks
from fastnorm._files.images import pillow_blocks
from fastnorm._files.parts import MOST, SHARE, Block, Options, Part, there
from fastnorm._files.tiff import BEGINNINGS, tiff_blocks
from fastnorm._files.walk import TIFF

# What each kind of array needs to be imported.
_NEEDS = {"zarr": "zarr", "hdf5": "h5py"}


def needs_of(files: Iterable[tuple[Path, str]]) -> set[str]:
    """Return the modules that reading these files imports."""
    needed = set()
    for path, kind in files:
        if kind == "image":
            needed.add("tifffile" if path.suffix.lower() in TIFF else "PIL")
        elif kind in _NEEDS:
            needed.add(_NEEDS[kind])
    return needed


def blocks_of(part: Part, options: Options) -> Iterator[Block]:
    """Return the numbers of a part, some megabytes at a time where that can be."""
    if part.kind != "image":
        yield from array_blocks(part, options)
        return
    with Path(part.path).open("rb") as file:
        found = os.fstat(file.fileno())
        stored = there(found)
        if found.st_size > MOST and stored * SHARE < found.st_size:
            raise ValueError(f"of its {found.st_size:,} bytes only {stored:,} are stored")
        beginning = file.read(4)
        file.seek(0)
        tiff = beginning in BEGINNINGS
        if find_spec("tifffile" if tiff else "PIL") is None:
            raise ValueError(
                "it is TIFF by its content, which needs tifffile: pip install "
                "'fastnorm-kernels[stats]'"
                if tiff
                else "it needs pillow: pip install 'fastnorm-kernels[stats]'"
            )
        yield from (tiff_blocks if tiff else pillow_blocks)(part, file, options)
