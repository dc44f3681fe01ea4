"""Arrays in files: NumPy's, Zarr's and HDF5's. Whether they are numbers is seen before any is read.

An array of objects is not opened at all: to decode one can run any code.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import stat
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
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
    Array,
    Block,
    Options,
    Part,
    Source,
    axes_of,
    check_giant,
    check_numeric,
)

# What a Zarr array may be coded with: nothing that makes objects.
_CODECS = """
    adler32 astype bitround blosc bytes bz2 crc32 crc32c delta fixedscaleoffset fletcher32 gzip
    jenkins_lookup3 lz4 lzma packbits pcodec quantize sharding_indexed shuffle transpose zfpy zlib
    zstd
"""
CODECS = frozenset(_CODECS.split())
# How many groups of an HDF5 file may lie one inside the other.
DEEP = 100


@dataclass
class Stored:
    """An array in a file: what is known of it before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None = None
    attributes: dict[str, Any] | None = None


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
        size = math.prod(array.shape) * array.dtype.itemsize
        check_giant(size, file.stored(key), "the array")
        axes = axes_of(len(array.shape), array.shape, options, path)
        if array.chunks and math.prod(array.chunks) * array.dtype.itemsize > MOST:
            raise ValueError(f"its chunks have the shape {array.chunks}, more than {MOST:,} bytes")
        if kind == "npz":  # a member can only be read from its beginning on
            return Source(path, kind, group, key)
        return Source(path, kind, group, key, _cuts(array, axes))


def _cuts(array: Stored, axes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Steps to blocks of BLOCK bytes at most where that can be, along the axes that are reduced."""
    size = math.prod(array.shape) * array.dtype.itemsize
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
            yield Block(numbers, _sort(numbers.dtype, own), **own)


def _sort(dtype: np.dtype[Any], own: dict[str, Any]) -> str:
    """Floats of all sizes go together; integers of different sizes have different ranges."""
    scaled = "scale" in own or "offset" in own
    return "floats" if dtype.kind == "f" or scaled else dtype.newbyteorder("=").name


def _conventions(attributes: dict[str, Any]) -> dict[str, Any]:
    """What netCDF's conventions say of the numbers: which stand for none, and their scale."""
    nodata: list[float] = []
    for name in ("_FillValue", "missing_value"):
        if name in attributes:
            nodata += _numbers(name, attributes[name])
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
        raise ValueError(f"its attribute {name} is {value!r}, expected a number") from None


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
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"it has version {version} of NumPy's format, expected 1.0 or 2.0")
    check_numeric(dtype, "the array")
    if any(n < 0 for n in shape):
        raise ValueError(f"its header says that it has shape {shape}")
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
        # where it is known how much of a file is there
        self._there = getattr(found, "st_blocks", found.st_size // 512) * 512

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
        order = "F" if self._fortran else "C"
        array = np.memmap(self._path, self._dtype, "r", self._start, self._shape, order)  # type: ignore[call-overload]
        yield np.asarray(array)[index]


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
        names = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")
        attributes = {name: dataset.attrs[name] for name in names if name in dataset.attrs}
        return Stored(dataset.shape, dataset.dtype, dataset.chunks, attributes)

    def stored(self, key: str) -> int:
        return int(self._file[key].id.get_storage_size())

    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        yield np.asarray(self._file[key][index])


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
            total += sum(entry.stat(follow_symlinks=False).st_size for entry in files)
            waiting += map(Path, inside)
        return total

    def read(self, key: str, index: tuple[slice, ...], axes: tuple[int, ...]) -> Iterator[Array]:
        import zarr

        store = zarr.storage.LocalStore(self._root / key, read_only=True)
        array = zarr.open_array(store, mode="r")
        yield np.asarray(array[index] if index else array[...])


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Return the folders and the files in a folder of a Zarr store, which must hold nothing else.

    Zarr follows links, and so would read what is elsewhere; to open a pipe it would wait for ever.
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
    if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > 1 << 26:
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
        raise ValueError(f"its metadata have {values!r} where sizes are expected")
    return tuple(values)


def _check_codecs(names: Any) -> None:
    for name in names:
        if not isinstance(name, str) or name.removeprefix("numcodecs.") not in CODECS:
            raise ValueError(f"it is coded by {name!r}, which is not known to give numbers only")


def _version_2(said: dict[str, Any]) -> Stored:
    if not isinstance(said["dtype"], str):
        raise TypeError(f"the array has dtype {said['dtype']}, expected real numbers")
    dtype = np.dtype(said["dtype"])
    check_numeric(dtype, "the array")
    coded = [*(said.get("filters") or []), *([said["compressor"]] if said["compressor"] else [])]
    _check_codecs(c["id"] for c in coded)
    return Stored(_sizes(said["shape"], 0), dtype, _sizes(said["chunks"], 1))


def _version_3(said: dict[str, Any]) -> Stored:
    if not isinstance(said["data_type"], str):
        raise TypeError(f"the array has data type {said['data_type']}, expected real numbers")
    dtype = np.dtype(said["data_type"])
    check_numeric(dtype, "the array")
    codecs, chunks = said["codecs"], said["chunk_grid"]["configuration"]["chunk_shape"]
    _check_codecs(c["name"] for c in codecs)
    for codec in codecs:
        if codec["name"] == "sharding_indexed":
            inner = codec["configuration"]
            chunks = inner["chunk_shape"]
            _check_codecs(c["name"] for c in [*inner["codecs"], *inner.get("index_codecs", [])])
    return Stored(
        _sizes(said["shape"], 0), dtype, _sizes(chunks, 1), dict(said.get("attributes") or {})
    )
