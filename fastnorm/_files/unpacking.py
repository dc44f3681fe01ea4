"""What packed bytes unpack to: read off their headers or counted, before they are unpacked.

The libraries that unpack chunks of Zarr and HDF5 make room for whatever comes out. Here a few bytes
that would become gigabytes are refused first. Packings for which neither can be done are not read.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastnorm._files.parts import MOST

# What may come with a chunk besides its numbers: checksums, what a packing adds.
SLACK = 1 << 16
# What is counted at once.
PIECE = 1 << 20
# The most that a byte can become, where there is such a bound.
RATIOS = {"zlib": 1032, "gzip": 1032, "lzf": 88}


@dataclass
class Packing:
    """How the chunks of an array are packed: what is undone first."""

    unpacked: int  # bytes that a chunk unpacks to
    name: str = ""  # none: they are not packed
    behind: int = 0  # bytes of checksums behind a chunk

    @property
    def largest(self) -> int:
        """The most bytes that a chunk can be packed to by what finds nothing to leave out."""
        return self.unpacked + self.unpacked // 64 + SLACK

    def check_size(self, size: int) -> None:
        """Refuse a chunk that is packed to more bytes than it can be."""
        if size > self.largest:
            raise ValueError(f"a chunk of it is packed to {size:,} bytes, more than its numbers")

    def check(self, data: bytes) -> None:
        """Refuse a chunk that would unpack to more than its numbers."""
        self.check_size(len(data))
        if self.name:
            check_unpacks(data[: len(data) - self.behind], self.name, self.unpacked + SLACK)


def check_unpacks(data: bytes, packing: str, most: int) -> None:
    """Refuse bytes that would unpack to more than so many, or be broken."""
    if len(data) * RATIOS.get(packing, most + 1) <= most:
        return
    try:
        size = _SIZES[packing](data, most)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, struct.error, IndexError) as error:
        raise ValueError(f"a chunk of it cannot be unpacked by {packing}: {error}") from None
    if size > most:
        raise ValueError(
            f"a chunk of it is packed by {packing}, and unpacks to more than {most:,} bytes"
        )


def _counted(make: Callable[[], Any], several: bool) -> Callable[[bytes, int], int]:
    """Return what unpacks and counts, `several` streams where they may follow one another."""

    def count(data: bytes, most: int) -> int:
        size, step = 0, max(PIECE, most // 16)
        while data and size <= most:
            unpack = make()
            while size <= most and not unpack.eof:
                more = unpack.decompress(data, step)
                size += len(more)
                data = getattr(unpack, "unconsumed_tail", b"")
                if not more and not data and not unpack.eof:
                    raise EOFError("it is cut short")
            data = unpack.unused_data.lstrip(b"\0") if several and unpack.eof else b""
        return size

    return count


def _bounded_ratio(data: bytes, most: int) -> int:
    return most + 1  # as `check_unpacks` has seen


def _little_endian(start: int) -> Callable[[bytes, int], int]:
    return lambda data, _: int(struct.unpack_from("<I", data, start)[0])


def _zstd(data: bytes, most: int) -> int:
    """What the frame says, which is all that room is made for; else what its blocks can be."""
    if data[:4] != b"\x28\xb5\x2f\xfd":
        raise EOFError("it is no frame")
    said = data[4]
    single, width = said >> 5 & 1, (0, 2, 4, 8)[said >> 6]
    width = width or single
    at = 5 + (not single) + (0, 1, 2, 4)[said & 3]
    if width:
        return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    total, last = 0, 0
    while not last and total <= most:
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        total += 1 << 17 if kind == 2 else size
        at += 3 + (1 if kind == 1 else size)
        if at > len(data):
            raise EOFError("it is cut short")
    # nothing but a checksum may follow: another frame would be unpacked as well
    return total if len(data) - at in (0, 4) else most + 1


_SIZES: dict[str, Callable[[bytes, int], int]] = {
    "blosc": _little_endian(4),
    "bz2": _counted(bz2.BZ2Decompressor, True),
    "gzip": _counted(lambda: zlib.decompressobj(31), True),
    "lz4": _little_endian(0),
    "lzf": _bounded_ratio,
    "lzma": _counted(lambda: lzma.LZMADecompressor(memlimit=MOST), True),
    "szip": _little_endian(0),
    "zlib": _counted(zlib.decompressobj, False),
    "zstd": _zstd,
}
PACKINGS = frozenset(_SIZES)
