"""Arrays in files: NumPy's, Zarr's and HDF5's. Whether they are numbers is seen before any is read.

An array of objects is not opened at all: to decode one can run any code.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import os
import reprlib
import stat
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastnorm._files.names import CannotUse
from fastnorm._files.parts import (
    BLOCK,
    MOST,
    NODATA,
    Array,
    Block,
    Options,
    Part,
    Source,
    axes_of,
    check_giant,
    check_numeric,
    check_statistics,
    indices,
    there,
)
from fastnorm._files.unpacking import PACKINGS, check_unpacks

# What a Zarr array may be coded with, besides packings whose size can be seen before: nothing that
# makes objects, or more than it says.
_FILTERS = """
    adler32 astype bitround bytes crc32 crc32c delta fixedscaleoffset fletcher32 jenkins_lookup3
    packbits quantize shuffle transpose
"""
FILTERS = frozenset(_FILTERS.split())
# What a chunk takes, at least: to find it, and to say where it is.
CHUNK = 1 << 13
# How many chunks a shard may have.
CHUNKS = 1 << 20
# What may come with a chunk besides its numbers: checksums, what a packing adds.
SLACK = 1 << 16
# Filters of HDF5: those that pack, and those that do not.
PACKERS = {1: "zlib", 4: "szip", 32000: "lzf"}
SHUFFLE, FLETCHER32 = 2, 3
# What a chunk of HDF5 of so many bytes can be packed to unpacks to less than MOST.
PACKED = 900_000
# What is read of an .npy at once, for a part of it that does not lie in one piece.
STRETCH = 1 << 20
# Where the header of an .npy ends, at the latest.
HEADER = 1 << 16
# How many groups of an HDF5 file may lie one inside the other.
DEEP = 100


@dataclass
class Stored:
    """An array in a file: what is known of it before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None = None
    attributes: dict[str, Any] | None = None
    packing: Packing | None = None  # of a Zarr array

    def cost(self, block: Iterable[int]) -> int:
        """How many bytes a block of this shape takes, in whole chunks, the smallest ones too."""
        block = tuple(block)
        if self.chunks is None:
            return math.prod(block) * self.dtype.itemsize
        count = math.prod(-(-n // step) for n, step in zip(block, self.chunks))
        return count * max(math.prod(self.chunks) * self.dtype.itemsize, CHUNK)


@dataclass
class Packing:
    """How the chunks of a Zarr array are packed: what is undone first."""

    unpacked: int  # bytes that a chunk unpacks to
    name: str = ""  # none: they are not packed
    behind: int = 0  # bytes of checksums behind a chunk
    shard: Shard | None = None

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


def source_of(path: str, kind: str, group: str, key: str, options: Options) -> Source:
    """Cut a file into parts. Errors are those of reading it."""
    with _opened(path, kind) as file:
        names = file.names()
        if key and key not in names:
            some = f"but {', '.join(map(repr, names))}" if names else "nor any other"
            raise CannotUse(f"{path!r} has no array {key!r}, {some}{file.linked()}")
        if not key and (len(names) != 1 or file.linked()):
            which = f"; write --key with one of {', '.join(map(repr, names))}" if names else ""
            raise CannotUse(f"{path!r} has {len(names)} arrays{which}{file.linked()}")
        key = key or names[0]
        array = file.describe(key)
        check_numeric(array.dtype, "the array")
        check_giant(array.cost(array.shape), file.stored(key), "the array")
        axes = axes_of(len(array.shape), array.shape, options, path)
        check_statistics(tuple(n for axis, n in enumerate(array.shape) if axis not in axes))
        if array.chunks and math.prod(array.chunks) * array.dtype.itemsize > MOST:
            raise ValueError(f"its chunks have the shape {array.chunks}, more than {MOST:,} bytes")
        if kind == "npz":  # a member can only be read from its beginning on
            return Source(path, kind, group, key)
        cuts = _cuts(array, axes)
        held = array.cost(step for _, step in cuts)
        if held > MOST:
            raise ValueError(
                f"with this --axis and its chunks of {array.chunks}, {held:,} bytes of it are held "
                f"at once, more than {MOST:,}; cut it into other chunks"
            )
        return Source(path, kind, group, key, cuts)


def _cuts(array: Stored, axes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Steps to blocks of BLOCK bytes at most where that can be, along the axes that are reduced."""
    size = array.cost(array.shape)
    cuts = []
    for axis, n in enumerate(array.shape):
        step = n
        if axis in axes and size > BLOCK and n > 1:
            step = max(1, n * BLOCK // size)
            if array.chunks:  # whole chunks of the file, which are read whole anyway
                step = max(step - step % array.chunks[axis], min(array.chunks[axis], n))
            size = size * step // n
        cuts.append((n, max(step, 1)))
    return tuple(cuts)


def array_blocks(part: Part, options: Options) -> Iterator[Block]:
    """Read a part of an array."""
    with _opened(part.path, part.kind) as file:
        array = file.describe(part.key)
        check_numeric(array.dtype, "the array")
        axes = axes_of(len(array.shape), array.shape, options, part.path)
        own = _conventions(array.attributes or {})
        unsigned = own.pop("unsigned", False)
        for numbers in file.read(part.key, part.index, axes):
            if unsigned and numbers.dtype.kind == "i":
                numbers = numbers.view(numbers.dtype.str.replace("i", "u"))
            # a chunk can be large, and what is made of its numbers larger
            for piece in indices(_cuts(Stored(numbers.shape, numbers.dtype), axes)):
                yield Block(numbers[piece], _number_kind(numbers.dtype, own), **own)


def _number_kind(dtype: np.dtype[Any], own: dict[str, Any]) -> str:
    """Floats of all sizes go together; integers of different sizes have different ranges."""
    scaled = "scale" in own or "offset" in own
    return "floats" if dtype.kind == "f" or scaled else dtype.newbyteorder("=").name


def _conventions(attributes: dict[str, Any]) -> dict[str, Any]:
    """What netCDF's conventions say of the numbers: which stand for none, and their scale."""
    nodata: list[float] = []
    for name in ("_FillValue", "missing_value"):
        if name in attributes:
            nodata += _numbers(name, attributes[name])
    if len(nodata) > NODATA:
        raise ValueError(f"it says that {len(nodata):,} numbers are none, more than {NODATA}")
    own: dict[str, Any] = {"nodata": tuple(dict.fromkeys(nodata))} if nodata else {}
    for name, field in (("scale_factor", "scale"), ("add_offset", "offset")):
        if name in attributes:
            values = _numbers(name, attributes[name])
            if len(values) != 1 or not math.isfinite(values[0]):
                raise ValueError(f"its attribute {name} is {values}, expected one finite number")
            own[field] = values[0]
    if str(_plain(attributes.get("_Unsigned", ""))).lower() == "true":
        own["unsigned"] = True
    return own


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _numbers(name: str, value: Any) -> list[float]:
    value = _plain(value)
    try:
        if isinstance(value, str):
            try:
                return [float(value)]
            except ValueError:  # as xarray writes floats into Zarr's JSON
                return list(struct.unpack("<d", base64.b64decode(value, validate=True)))
        return [float(v) for v in np.ravel(np.asarray(value))]
    except (ValueError, TypeError, struct.error, binascii.Error):
        raise ValueError(
            f"its attribute {name} is {reprlib.repr(value)}, expected a number"
        ) from None


# --- Kinds of files -------------------------------------------------------------------------------


class _File(ABC):
    """A file of arrays."""

    @abstractmethod
    def names(self) -> list[str]:
        """What its arrays are called."""

    @abstractmethod
    def describe(self, key: str) -> Stored:
        """Shape, dtype and what else is to be known of an array before it is read."""

    @abstractmethod
    def stored(self, key: str) -> int:
        """How many bytes of the array there are."""

    @abstractmethod
    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        """Numbers of an array in pieces, of which none is large; `axes` are those reduced."""

    def linked(self) -> str:
        """What to say of arrays that are in other files; nothing where there can be none."""
        return ""


@contextmanager
def _opened(path: str, kind: str) -> Iterator[_File]:
    if kind == "npy":
        yield _Npy(path)
    elif kind == "npz":
        with zipfile.ZipFile(path) as archive:
            yield _Npz(archive)
    elif kind == "zarr":
        yield _Zarr(Path(path))
    else:
        import h5py

        with h5py.File(path, "r") as file:
            yield _Hdf5(file)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return what the header of an .npy says: shape, whether in Fortran's order, dtype."""
    # NumPy would read a header of four gigabytes before it finds it too long
    start = io.BytesIO(file.read(HEADER))
    version = np.lib.format.read_magic(start)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(start)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(start)
    else:
        raise ValueError(f"it has version {version} of NumPy's format, expected 1.0 or 2.0")
    check_numeric(dtype, "the array")
    if any(n < 0 for n in shape):
        raise ValueError(f"its header says that it has shape {shape}")
    file.seek(start.tell())
    return shape, fortran, dtype


class _Npy(_File):
    def __init__(self, path: str) -> None:
        self._path = path
        with Path(path).open("rb") as file:
            self._shape, self._fortran, self._dtype = _header(file)
            self._start = file.tell()
            found = os.fstat(file.fileno())
        size = self._start + math.prod(self._shape) * self._dtype.itemsize
        if size > found.st_size:
            raise ValueError(f"it is cut short: {found.st_size:,} bytes of {size:,}")
        self._there = there(found)

    def names(self) -> list[str]:
        return [""]

    def describe(self, key: str) -> Stored:
        return Stored(self._shape, self._dtype)

    def stored(self, key: str) -> int:
        return self._there

    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        if 0 in self._shape:
            yield np.empty(self._shape, self._dtype)[index]
            return
        shape, part = self._shape, index
        if self._fortran:
            shape, part = shape[::-1], part[::-1]
        with Path(self._path).open("rb") as file:
            array = _region(file, self._start, self._dtype, shape, part)
        yield array.T if self._fortran else array


def _region(
    file: BinaryIO,
    start: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    index: tuple[slice, ...],
) -> Array:
    """Part of an array in C's order, read: if a mapped file is cut meanwhile, the process dies."""
    found = np.empty([part.stop - part.start for part in index], dtype)
    steps = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    # stretches of this axis, with what lies between, one after the other
    axis = sum(step > STRETCH for step in steps)
    first = sum(part.start * step for part, step in zip(index, steps))
    most = max(1, STRETCH // steps[axis]) if shape else 1
    inner = sum((n - 1) * step for n, step in zip(found.shape[axis + 1 :], steps[axis + 1 :]))
    for at in np.ndindex(*found.shape[:axis] if found.size else (0,)):
        for i in range(0, found.shape[axis] if shape else 1, most):
            rows = found[(*at, slice(i, i + most))] if shape else found
            ahead = sum(k * step for k, step in zip((*at, i), steps))
            length = (len(rows) - 1) * steps[axis] + inner if shape else 0
            file.seek(start + first + ahead)
            data = file.read(length + dtype.itemsize)
            if len(data) != length + dtype.itemsize:
                raise ValueError("it is cut short")
            rows[...] = np.ndarray(rows.shape, dtype, data, 0, steps[axis:])
    return found


class _Npz(_File):
    """Members are read as a stream: what they unpack to need not fit into memory."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members = {
            info.filename.removesuffix(".npy"): info
            for info in archive.infolist()
            if info.filename.endswith(".npy")
        }

    def names(self) -> list[str]:
        return list(self._members)

    @contextmanager
    def _member(self, key: str) -> Iterator[tuple[Any, tuple[int, ...], bool, np.dtype[Any]]]:
        info = self._members[key]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{key!r} is packed by method {info.compress_type} of zip, expected none, or "
                "deflate as np.savez_compressed has it"
            )
        with self._archive.open(info) as file:
            shape, fortran, dtype = _header(file)  # type: ignore[arg-type]
            size = file.tell() + math.prod(shape) * dtype.itemsize
            if size != info.file_size:
                raise ValueError(
                    f"{key!r} is of {size:,} bytes by its header, and {info.file_size:,} by that "
                    "of the archive"
                )
            yield file, shape, fortran, dtype

    def describe(self, key: str) -> Stored:
        with self._member(key) as (_, shape, _, dtype):
            return Stored(shape, dtype)

    def stored(self, key: str) -> int:
        return self._members[key].compress_size

    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        with self._member(key) as (file, shape, fortran, dtype):
            if 0 in shape:
                yield np.empty(shape, dtype)
                return
            lying = shape[::-1] if fortran else shape  # slowest first
            slow = len(shape) - 1 if fortran else 0
            row = math.prod(lying[1:]) * dtype.itemsize
            if len(axes) == len(shape):  # all are reduced: any cut will do
                fortran, row = False, dtype.itemsize
                lying = (math.prod(shape), *(1 for _ in shape[1:]))
            elif slow not in axes:
                row *= lying[0]
                lying = (1, *lying)
            if row > MOST:
                raise ValueError(
                    f"with this --axis {row:,} bytes of it are held at once, more than {MOST:,}; "
                    "save it as .npy"
                )
            step = max(1, BLOCK // row)
            for first in range(0, lying[0], step):
                rows = min(step, lying[0] - first)
                data = file.read(rows * row)
                if len(data) != rows * row:
                    raise ValueError("it is cut short")
                array = np.frombuffer(data, dtype).reshape(rows, *lying[1:])
                array = array[0] if len(lying) > len(shape) else array
                yield array.T if fortran else array


class _Hdf5(_File):
    """Neither links to other files nor numbers that lie in other files or datasets are followed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def names(self) -> list[str]:
        return self._found[0]

    def linked(self) -> str:
        found = self._found[1]
        if not found:
            return ""
        names = ", ".join(map(repr, found))
        return f" (links to other files are not followed: {names}; give these files themselves)"

    @cached_property
    def _found(self) -> tuple[list[str], list[str]]:
        """The names of all arrays, each once and by hard links, and of links to other files.

        HDF5's own walk takes a hundred thousand groups one inside the other on the C stack.
        """
        import h5py

        arrays: list[str] = []
        links: list[str] = []
        seen, waiting = set[tuple[int, int]](), [("", self._file)]
        while waiting:
            base, group = waiting.pop()
            if base.count("/") > DEEP:
                raise ValueError(f"it has more than {DEEP} groups one inside the other")
            inside = []
            # a name with a slash in it would lead somewhere else
            for name in (n for n in group if "/" not in n and n != "."):
                link = group.get(name, getclass=True, getlink=True)
                if link is h5py.ExternalLink:
                    links.append(base + name)
                if link is not h5py.HardLink:
                    continue
                item = group[name]
                info = h5py.h5o.get_info(item.id)
                if (info.fileno, info.addr) in seen:
                    continue
                seen.add((info.fileno, info.addr))
                if isinstance(item, h5py.Dataset):
                    arrays.append(base + name)
                elif isinstance(item, h5py.Group):
                    inside.append((f"{base}{name}/", item))
            waiting += reversed(inside)
        return arrays, links

    def describe(self, key: str) -> Stored:
        dataset = self._file[key]
        if dataset.is_virtual:  # before its shape is asked for, which can open what it is made of
            raise ValueError(
                f"{key!r} is virtual: made up of other datasets, which are not followed; give "
                "these themselves"
            )
        if dataset.shape is None:
            raise ValueError(f"{key!r} is empty: it has no shape")
        if dataset.external:
            raise ValueError(
                f"the numbers of {key!r} are in another file, {dataset.external[0][0]!r}, which is "
                "not followed"
            )
        check_numeric(dataset.dtype, repr(key))
        self._packing(dataset)
        names = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")
        attributes = {name: dataset.attrs[name] for name in names if name in dataset.attrs}
        return Stored(dataset.shape, dataset.dtype, dataset.chunks, attributes)

    def stored(self, key: str) -> int:
        dataset, path = self._file[key], Path(self._file.filename)
        stored, (packing, _) = int(dataset.id.get_storage_size()), self._packing(dataset)
        if packing:
            packed = Packing(math.prod(dataset.chunks) * dataset.dtype.itemsize)
            dataset.id.chunk_iter(lambda chunk: packed.check_size(chunk.size))
            if stored > path.stat().st_size:
                raise ValueError(f"it says that {stored:,} bytes of it are stored, in less")
        return min(stored, there(path.stat()))

    def _packing(self, dataset: Any) -> tuple[str, int]:
        """Return what packs the chunks and the how manieth filter that is."""
        plist = dataset.id.get_create_plist()
        codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        places = [i for i, code in enumerate(codes) if code in PACKERS]
        for code in codes:
            if code not in (*PACKERS, SHUFFLE, FLETCHER32):
                raise ValueError(
                    f"it is packed by filter {code} of HDF5, expected gzip, szip or lzf; h5repack "
                    "changes that"
                )
        if not places:
            return "", 0
        if any(code != FLETCHER32 for code in codes[places[0] + 1 :]):
            raise ValueError("it is packed, and by another filter after that")
        return PACKERS[codes[places[0]]], places[0]

    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        dataset = self._file[key]
        packing, place = self._packing(dataset)
        large = packing and math.prod(dataset.chunks) * dataset.dtype.itemsize > PACKED
        if large or packing == "szip":
            for chunk in dataset.iter_chunks(index):
                start = (piece.start - piece.start % n for piece, n in zip(chunk, dataset.chunks))
                try:
                    left_out, data = dataset.id.read_direct_chunk(tuple(start))
                except RuntimeError:
                    continue  # it has not been written
                if not left_out >> place & 1:
                    check_unpacks(data, packing, MOST)
        yield np.asarray(dataset[index])


class _Zarr(_File):
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
        folder = self._root / key
        marks = [m for m in ("zarr.json", ".zarray") if (folder / m).exists()]
        said = _json(folder / marks[0])
        try:
            describe = _version_3 if marks[0] == "zarr.json" else _version_2
            stored = describe(said)
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
        return stored

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

        packing = self.describe(key).packing
        assert packing is not None
        array = zarr.open_array(_checked(self._root / key, packing), mode="r")
        yield np.asarray(array[index] if index else array[...])


def _checked(folder: Path, packing: Packing) -> Any:
    """Return a store of Zarr's that checks chunks before they are unpacked."""
    import zarr

    def check(key: str, part: Any) -> None:
        """Of a part of a file, or of all of it: its size, before it is read."""
        try:
            size = (folder / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return  # a chunk that is not there
        most, shard = packing.largest, packing.shard
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
            data, shard = found.to_bytes(), packing.shard
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


def _version_2(said: dict[str, Any]) -> Stored:
    if not isinstance(said["dtype"], str):
        raise TypeError(f"the array has dtype {said['dtype']}, expected real numbers")
    dtype = np.dtype(said["dtype"])
    check_numeric(dtype, "the array")
    chunks = _sizes(said["chunks"], 1)
    filters, compressor = said.get("filters") or [], said["compressor"]
    if compressor is not None and isinstance(filters, list):
        filters = [*filters, compressor]
    packing = _packing(filters, "id", math.prod(chunks) * dtype.itemsize)
    return Stored(_sizes(said["shape"], 0), dtype, chunks, packing=packing)


def _version_3(said: dict[str, Any]) -> Stored:
    if not isinstance(said["data_type"], str):
        raise TypeError(f"the array has data type {said['data_type']}, expected real numbers")
    dtype = np.dtype(said["data_type"])
    check_numeric(dtype, "the array")
    codecs, shard = said["codecs"], None
    chunks = _sizes(_codec(said["chunk_grid"], "name")[1]["chunk_shape"], 1)
    if isinstance(codecs, list) and len(codecs) == 1:
        codec, told = _codec(codecs[0], "name")
        if codec == "sharding_indexed":
            inner = _sizes(told["chunk_shape"], 1)
            shard = _shard(told, chunks, inner)
            codecs, chunks = told["codecs"], inner
    packing = _packing(codecs, "name", math.prod(chunks) * dtype.itemsize)
    packing.shard = shard
    attributes = said.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise ValueError(f"it has {reprlib.repr(attributes)} where attributes are expected")
    return Stored(_sizes(said["shape"], 0), dtype, chunks, attributes, packing)


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
