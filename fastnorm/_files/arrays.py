"""Arrays in files: NumPy's, Zarr's and HDF5's. Whether they are numbers is seen before any is read.

An array of objects is not opened at all: to decode one can run any code.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import reprlib
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    ArrayFile,
    Block,
    Options,
    Part,
    Source,
    Stored,
    axes_of,
    check_giant,
    check_numeric,
    check_statistics,
    indices,
    there,
)
from fastnorm._files.unpacking import Packing, check_unpacks
from fastnorm._files.zarr_store import ZarrStore

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


@contextmanager
def _opened(path: str, kind: str) -> Iterator[ArrayFile]:
    if kind == "npy":
        yield _Npy(path)
    elif kind == "npz":
        with zipfile.ZipFile(path) as archive:
            yield _Npz(archive)
    elif kind == "zarr":
        yield ZarrStore(Path(path))
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


class _Npy(ArrayFile):
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


class _Npz(ArrayFile):
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


class _Hdf5(ArrayFile):
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
