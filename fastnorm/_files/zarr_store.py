"""Arrays of Zarr: their metadata read first, for Zarr would make what they ask for, objects too."""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fastnorm._files.parts import MOST, Array, ArrayFile, Stored, check_numeric, there
from fastnorm._files.unpacking import PACKINGS, Packing

# What a Zarr array may be coded with, besides packings whose size can be seen before: nothing that
# makes objects, or more than it says.
_FILTERS = """
    adler32 astype bitround bytes crc32 crc32c delta fixedscaleoffset fletcher32 jenkins_lookup3
    packbits quantize shuffle transpose
"""
FILTERS = frozenset(_FILTERS.split())
# How many chunks a shard may have.
CHUNKS = 1 << 20


@dataclass
class Shard:
    """Where the chunks of a Zarr array lie in a file of many."""

    chunks: int
    behind: int  # bytes of a checksum behind the index
    dtype: str  # of the index
    first: bool  # whether the index comes first

    @property
    def index(self) -> int:
        """How many bytes the index has."""
        return 16 * self.chunks + self.behind

    def places(self, index: bytes, size: int) -> list[tuple[int, int]]:
        """Return from where to where in a file of this size each chunk lies."""
        if len(index) != self.index:
            raise ValueError("a shard of it is cut short")
        pairs = np.frombuffer(index, self.dtype, 2 * self.chunks).reshape(-1, 2)
        places = [(a, a + n) for a, n in pairs.tolist() if a != 2**64 - 1 or n != 2**64 - 1]
        least = self.index if self.first else 0
        if any(a < least or b > size for a, b in places):
            raise ValueError("a shard of it says that chunks lie where none can be")
        return places


# An array, how its chunks are packed, and where they lie if not each in a file of its own.
Described: TypeAlias = tuple[Stored, Packing, Shard | None]


class ZarrStore(ArrayFile):
    """Metadata are read here first: Zarr would make what they ask for, objects as well."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ValueError("it is a file, expected a folder as Zarr writes it")
        self._root = path

    def names(self) -> list[str]:
        found, waiting = [], [self._root]
        while waiting:
            folder = waiting.pop()
            inside, files = _entries(folder)
            marks = {entry.name for entry in files}
            array = ".zarray" in marks
            if "zarr.json" in marks:
                array = _json(folder / "zarr.json").get("node_type") == "array"
            if array:
                name = folder.relative_to(self._root).as_posix()
                found.append("" if name == "." else name)
            else:  # what is in an array are only chunks
                waiting += (Path(entry) for entry in reversed(inside))
        return found

    def describe(self, key: str) -> Stored:
        return self._described(key)[0]

    def _described(self, key: str) -> Described:
        folder = self._root / key
        marks = [m for m in ("zarr.json", ".zarray") if (folder / m).exists()]
        said = _json(folder / marks[0])
        try:
            describe = _version_3 if marks[0] == "zarr.json" else _version_2
            stored, packing, shard = describe(said)
        except (KeyError, AttributeError, IndexError):
            raise ValueError(f"{marks[0]} is not that of an array") from None
        if stored.chunks is None or len(stored.chunks) != len(stored.shape):
            raise ValueError(f"it has shape {stored.shape} and chunks of {stored.chunks}")
        if stored.attributes is None:
            side = folder / ".zattrs"
            stored.attributes = _json(side) if side.exists() else {}
            if "_ARRAY_DIMENSIONS" in stored.attributes and said.get("fill_value") is not None:
                # xarray's way, in this version of the format
                stored.attributes.setdefault("_FillValue", said["fill_value"])
        return stored, packing, shard

    def stored(self, key: str) -> int:
        """The size of all chunks."""
        total, waiting = 0, [self._root / key]
        while waiting:
            inside, files = _entries(waiting.pop())
            total += sum(there(entry.stat(follow_symlinks=False)) for entry in files)
            waiting += map(Path, inside)
        return total

    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        import zarr

        _, packing, shard = self._described(key)
        array = zarr.open_array(_checked(self._root / key, packing, shard), mode="r")
        yield np.asarray(array[index] if index else array[...])


def _checked(folder: Path, packing: Packing, shard: Shard | None) -> Any:
    """Return a store of Zarr's that checks chunks before they are unpacked."""
    import zarr

    def check(key: str, part: Any) -> None:
        """Of a part of a file, or of all of it: its size, before it is read."""
        try:
            size = (folder / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return  # a chunk that is not there
        most = packing.largest
        if isinstance(part, zarr.abc.store.RangeByteRequest):
            size = part.end - part.start
        elif part is None and shard is not None:
            most = most * shard.chunks + shard.index
        elif part is not None:
            return  # the index behind the chunks
        if not 0 <= size <= most:
            raise ValueError(f"{key!r} in it has {size:,} bytes, more than its numbers can have")

    class Checked(zarr.storage.WrapperStore):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            if key.rpartition("/")[2] in ("zarr.json", ".zarray", ".zattrs", ".zgroup"):
                return await super().get(key, prototype, byte_range)
            check(key, byte_range)
            found = await super().get(key, prototype, byte_range)
            if found is None:
                return None
            data = found.to_bytes()
            if shard is None:
                packing.check(data)
            elif byte_range is None:
                index = data[: shard.index] if shard.first else data[-shard.index :]
                for start, end in shard.places(index, len(data)):
                    packing.check(data[start:end])
            elif isinstance(byte_range, zarr.abc.store.SuffixByteRequest) or (
                shard.first and byte_range.start == 0
            ):
                shard.places(data, (folder / key).stat().st_size)
            else:
                packing.check(data)
            return found

    return Checked(zarr.storage.LocalStore(folder, read_only=True))


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Return the folders and the files in a folder of a Zarr store, which must hold nothing else.

    Zarr follows links, and so would read other files; to open a pipe it would wait for ever.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_symlink():
            raise ValueError(f"{entry.name!r} in it is a link, which is not followed; copy it")
        if not (entry.is_dir() or entry.is_file()):
            raise ValueError(f"{entry.name!r} in it is no file")
    inside = [entry for entry in found if entry.is_dir()]
    return inside, [entry for entry in found if not entry.is_dir()]


def _json(path: Path) -> dict[str, Any]:
    if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > 1 << 24:
        raise ValueError(f"{path.name} is no file of metadata")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is not JSON") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path.name} is not that of an array")
    return said


def _sizes(values: Any, least: int) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(n) is int and n >= least for n in values):
        raise ValueError(f"its metadata have {reprlib.repr(values)} where sizes are expected")
    return tuple(values)


def _codec(said: Any, name: str) -> tuple[str, dict[str, Any]]:
    """Return a codec's name and what it is told, from metadata that have its name under `name`."""
    if isinstance(said, dict) and isinstance(said.get(name), str):
        told = said if name == "id" else said.get("configuration") or {}
        if isinstance(told, dict):
            return said[name].removeprefix("numcodecs."), told
    raise ValueError(f"it has {reprlib.repr(said)} where a codec is expected")


def _packing(coded: Any, name: str, size: int) -> Packing:
    """Return what is undone first of a chunk of so many bytes, coded one codec after the other."""
    if not isinstance(coded, list):
        raise ValueError(f"it has {reprlib.repr(coded)} where codecs are expected")
    packing = Packing(size)
    for codec, told in (_codec(said, name) for said in coded):
        if packing.name:
            if codec not in ("crc32c", "fletcher32") or told.get("location", "end") != "end":
                raise ValueError(f"it is packed by {packing.name}, and by {codec!r} after that")
            packing.behind += 4
        elif codec in PACKINGS:
            packing.name = codec
        elif codec in FILTERS:
            # of whatever sizes the numbers are that a filter gets and gives
            packing.unpacked = math.ceil(packing.unpacked * _growth(codec, told))
            if not size // 8 <= packing.unpacked <= MOST:
                raise ValueError(f"its filters make {packing.unpacked:,} bytes of {size:,}")
        elif codec == "sharding_indexed":
            raise ValueError("it has shards in shards, or shards that are coded as a whole")
        else:
            raise ValueError(f"it is coded by {codec!r}, which is not known to give numbers only")
    return packing


def _growth(codec: str, told: dict[str, Any]) -> float:
    """How much larger a filter makes what it codes; each dtype that it is told must be numbers."""
    sizes = {}
    for key in ("dtype", "astype", "encode_dtype", "decode_dtype"):
        if key in told:
            if not isinstance(told[key], str):
                raise ValueError(f"{codec!r} has {key} {reprlib.repr(told[key])}")
            dtype = np.dtype(told[key])
            check_numeric(dtype, f"what {codec!r} gives")
            sizes[key] = dtype.itemsize
    if "encode_dtype" in sizes and "decode_dtype" in sizes:
        return sizes["encode_dtype"] / sizes["decode_dtype"]
    if "astype" in sizes and "dtype" in sizes:
        return sizes["astype"] / sizes["dtype"]
    return 1 / 8 if codec == "packbits" else 1


def _numeric(said: Any, name: str) -> np.dtype[Any]:
    if not isinstance(said, str):
        raise TypeError(f"the array has {name} {said}, expected real numbers")
    dtype = np.dtype(said)
    check_numeric(dtype, "the array")
    return dtype


def _version_2(said: dict[str, Any]) -> Described:
    dtype = _numeric(said["dtype"], "dtype")
    chunks = _sizes(said["chunks"], 1)
    filters, compressor = said.get("filters") or [], said["compressor"]
    if compressor is not None and isinstance(filters, list):
        filters = [*filters, compressor]
    packing = _packing(filters, "id", math.prod(chunks) * dtype.itemsize)
    return Stored(_sizes(said["shape"], 0), dtype, chunks), packing, None


def _version_3(said: dict[str, Any]) -> Described:
    dtype = _numeric(said["data_type"], "data type")
    codecs, shard = said["codecs"], None
    chunks = _sizes(_codec(said["chunk_grid"], "name")[1]["chunk_shape"], 1)
    if isinstance(codecs, list) and len(codecs) == 1:
        codec, told = _codec(codecs[0], "name")
        if codec == "sharding_indexed":
            inner = _sizes(told["chunk_shape"], 1)
            shard = _shard(told, chunks, inner)
            codecs, chunks = told["codecs"], inner
    packing = _packing(codecs, "name", math.prod(chunks) * dtype.itemsize)
    attributes = said.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise ValueError(f"it has {reprlib.repr(attributes)} where attributes are expected")
    return Stored(_sizes(said["shape"], 0), dtype, chunks, attributes), packing, shard


def _shard(told: dict[str, Any], outer: tuple[int, ...], inner: tuple[int, ...]) -> Shard:
    """Read what a sharding codec is told of the index; shards in shards are not read."""
    if len(inner) != len(outer) or any(n % m for n, m in zip(outer, inner)):
        raise ValueError(f"it has shards of {outer} and chunks of {inner}")
    count = math.prod(outer) // math.prod(inner)
    if count > CHUNKS:
        raise ValueError(f"its shards have {count:,} chunks, more than {CHUNKS:,}")
    coded = [_codec(said, "name") for said in told["index_codecs"]]
    if [name for name, _ in coded] not in (["bytes"], ["bytes", "crc32c"]):
        raise ValueError("its shards have an index that is not of bytes, and crc32c at most")
    order = ">" if coded[0][1].get("endian") == "big" else "<"
    first = told.get("index_location", "end") == "start"
    return Shard(count, 4 * (len(coded) - 1), f"{order}u8", first)
