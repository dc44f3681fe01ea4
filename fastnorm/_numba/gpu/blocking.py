"""How work is cut on the GPU. The cut fixes the order of sums, hence bits."""

from __future__ import annotations

from fastnorm._numba.gpu.package import SIMULATED

# threads of a warp and of a block; every one of the simulator's is a thread of Python's
WARP, BLOCK = (8, 16) if SIMULATED else (32, 256)
LANES = 2 if SIMULATED else 8  # adjacent chunks, 128 bytes of a row of columns
ROWS = BLOCK // LANES  # rows that a block of columns reads at once
CHUNK = 16  # bytes
WARP_CHUNKS = 256  # a group of at most so many chunks is summed by a warp alone
PART_CHUNKS = 4096  # chunks of a part of a larger group, at least
PART_ROWS = 256  # rows of a part of columns, at least
MAX_PARTS = 1024
MAX_ROW_PARTS = 256  # of columns


def depth_of(width: int) -> int:
    """How many chunks a thread asks for before it adds up the first: so that many bytes are due."""
    return min(4, 16 // width)


def blocks_of(count: int, each: int = BLOCK) -> int:
    """How many blocks of `each` cover `count`."""
    return max(1, -(-count // each))


def parts_of(length: int, least: int, most: int) -> tuple[int, int]:
    """How many parts of how many each: by a group's own length."""
    size = max(least, -(-length // most))
    return blocks_of(length, size), size


def lanes_of(parts: int) -> int:
    """How many threads merge the parts of a group."""
    return 1 if parts <= WARP else WARP
