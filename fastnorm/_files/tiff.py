"""TIFF: all pages, numbers as they are stored, by strips and tiles.

tifffile reads the directories. What is stored as it is, or packed by deflate, is read here, so that
no strip can unpack to more than its size, and one that is cut short is seen. Other compressions are
tifffile's where imagecodecs is installed; else Pillow's, if that gives numbers of the stored dtype.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from fastnorm._files.images import check_pixels, frame_blocks, in_pieces, open_image, pieces
from fastnorm._files.parts import (
    BLOCK,
    MOST,
    Array,
    Block,
    Options,
    Part,
    check_giant,
    check_numeric,
    there,
)

Tile: TypeAlias = tuple[int, int, Array]  # from which row and column on, and the pixels

BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NONE, DEFLATE, PACKBITS = (1,), (8, 32946), 32773
GDAL_NODATA = 42113
WHITE_IS_ZERO, GREY, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
# What is read of a file at once, to be unpacked.
PIECE = 1 << 18


class _Complaints(logging.Handler):
    """What tifffile says is wrong with a file of this thread, and would then read half of."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        if threading.get_ident() == self._thread:
            self.said.append(record.getMessage())

    def check(self) -> None:
        """Raise if there is one."""
        if self.said:
            raise ValueError(self.said[0])


def tiff_blocks(part: Part, file: BinaryIO, options: Options) -> Iterator[Block]:
    """Read all pages but thumbnails, overviews and masks."""
    import tifffile

    complaints = _Complaints()
    logger = logging.getLogger("tifffile")
    logger.addHandler(complaints)
    try:
        with tifffile.TiffFile(file) as tiff:
            number = len(tiff.pages)
            complaints.check()
            full, size = [], 0
            for i in range(number):
                page = tiff.pages[i]
                size += _stacked(tiff, page) * _size(page)
                if not (page.is_reduced or page.is_mask):
                    full.append(i)
            complaints.check()
            check_giant(size, there(os.fstat(file.fileno())), "it")
            for i in full or range(number):
                yield from _page_blocks(part.path, file, tiff, i, options)
                complaints.check()
    finally:
        logger.removeHandler(complaints)


def _page_blocks(
    path: str, file: BinaryIO, tiff: Any, number: int, options: Options
) -> Iterator[Block]:
    page = tiff.pages[number]
    height, width = page.imagelength * page.imagedepth, page.imagewidth
    if not height or not width:
        raise ValueError("it has no pixels")
    check_pixels(height, width, options.max_pixels)
    if page.photometric == PALETTE:
        with Path(path).open("rb") as again:
            image = open_image(again, ("TIFF",), options.max_pixels, number)
            yield from frame_blocks(path, image, options)
        return
    if page.dtype is None:
        raise ValueError(f"it has numbers of {page.bitspersample} bits, which are not read")
    check_numeric(page.dtype, "it")
    tiles: Iterator[Tile]
    if _is_plain(page):
        shift = page.nbytes
        tiles = (t for i in range(_stacked(tiff, page)) for t in _tiles(file, page, i * shift))
    else:
        tiles = iter([(0, 0, _otherwise(path, page, number, options))])
    arrays = _gathered(tiles) if in_pieces(options) else _whole(tiles, page)
    colour, nodata = _colour(page), _nodata(page)
    for array in arrays:
        if array.dtype == np.bool_:  # bits are shown as 0 and 255, as those of a PNG are
            array = array.astype(np.uint8) * np.uint8(255)
        yield from pieces(path, array, colour, options, nodata=nodata)


def _size(page: Any) -> int:
    """How many bytes a page unpacks to, in whole tiles."""
    height, width = page.imagelength, page.imagewidth
    if page.is_tiled and page.tilelength and page.tilewidth:
        height += -height % page.tilelength
        width += -width % page.tilewidth
    bits = height * page.imagedepth * width * page.samplesperpixel * page.bitspersample
    return int(bits) // 8


def _extent(page: Any) -> tuple[tuple[int, int, int], int]:
    """Return the shape of a page's numbers, and how many bytes they have."""
    shape = (page.imagelength * page.imagedepth, page.imagewidth, page.samplesperpixel)
    return shape, math.prod(shape) * page.dtype.itemsize


def _is_plain(page: Any) -> bool:
    """Whether the page is read here, by strips and tiles."""
    return (
        page.compression in (*NONE, *DEFLATE)
        and page.predictor in (1, 2, 3)
        and page.fillorder == 1
        and page.imagedepth == 1
        and page.bitspersample == 8 * page.dtype.itemsize
        and not page.is_subsampled
    )


def _colour(page: Any) -> str:
    samples, extra = page.samplesperpixel, page.extrasamples
    if page.photometric == YCBCR and page.compression not in (*NONE, *DEFLATE):
        return "RGB"  # JPEG, which its decoder converts
    named = {
        (GREY, 1, ()): "grey",
        (WHITE_IS_ZERO, 1, ()): "grey, 0 for white",
        (RGB, 3, ()): "RGB",
        (CMYK, 4, ()): "CMYK",
        (YCBCR, 3, ()): "YCbCr",
        (GREY, 2, (1,)): "LA",
        (GREY, 2, (2,)): "LA",
        (RGB, 4, (1,)): "RGBA",
        (RGB, 4, (2,)): "RGBA",
    }
    return named.get((int(page.photometric), samples, tuple(map(int, extra))), f"{samples} bands")


def _nodata(page: Any) -> tuple[float, ...]:
    tag = page.tags.get(GDAL_NODATA)
    text = "" if tag is None else str(tag.value).strip("\0 \n")
    try:
        return (float(text),) if text else ()
    except ValueError:
        raise ValueError(f"its GDAL_NODATA is {text!r}, expected a number") from None


def _stacked(tiff: Any, page: Any) -> int:
    """How many images lie one behind the other at one page, as ImageJ writes them above 4 GB."""
    if tiff.is_stk:
        raise ValueError("it is a stack of MetaMorph's, whose images are not pages; convert it")
    if len(tiff.pages) > 1:
        return 1
    count = 1
    if tiff.is_imagej:
        count = int((tiff.imagej_metadata or {}).get("images", 1))
    elif tiff.is_shaped and (said := tiff.shaped_metadata) and said[0].get("truncated"):
        count = math.prod(said[0]["shape"]) // math.prod(page.shape)
    if count > 1 and not page.is_contiguous:
        raise ValueError(f"it says that {count} images lie in one piece, and they do not")
    return max(count, 1)


# --- Strips and tiles -----------------------------------------------------------------------------


def _tiles(file: BinaryIO, page: Any, shift: int) -> Iterator[Tile]:
    """Return rows of strips and tiles; `shift`: how far behind the first image this one lies."""
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    samples, itemsize = page.samplesperpixel // planes, page.dtype.itemsize
    length, full = page.imagelength, page.imagewidth
    height, width = min(page.rowsperstrip or length, length), full
    offsets, counts = page.dataoffsets, page.databytecounts
    if page.is_contiguous:  # one strip for each plane, however many there are in the file
        height, plane = length, length * full * samples * itemsize
        offsets = [offsets[0] + shift + i * plane for i in range(planes)]
        counts = [plane] * planes
    elif page.is_tiled:
        height, width = page.tilelength, page.tilewidth
    if not height or not width:
        raise ValueError("its strips or tiles have no size")
    down, across = -(-length // height), -(-full // width)
    each = down * across
    if len(offsets) != planes * each or len(counts) != planes * each:
        raise ValueError(f"it has {len(offsets)} strips or tiles, expected {planes * each}")
    row = width * samples * itemsize
    if row * planes > MOST // 16:
        raise ValueError(f"its rows have {row * planes:,} bytes, more than {MOST // 16:,}")
    for i in range(each):
        top, left = i // across * height, i % across * width
        packed = page.compression in DEFLATE
        places = [(offsets[p * each + i], counts[p * each + i]) for p in range(planes)]
        readers = [_reader(file, *place, packed) for place in places]
        rows, step = min(height, length - top), max(1, BLOCK // 4 // (row * planes))
        for first in range(0, rows, step):
            now = min(step, rows - first)
            parts = [
                _left_out(now, min(width, full - left), samples, page)
                if read is None
                else _unpacked(read, now, width, samples, page)[:, : full - left]
                for read in readers
            ]
            yield top + first, left, np.concatenate(parts, axis=2) if planes > 1 else parts[0]


def _reader(file: BinaryIO, offset: int, count: int, packed: bool) -> Callable[[int], bytes] | None:
    """Return what reads the next so many bytes of a strip; None for one that is left out."""
    if not offset or not count:
        return None
    place, left = offset, count
    unpack, waiting = (zlib.decompressobj() if packed else None), b""

    def stored(size: int) -> bytes:
        nonlocal place, left
        file.seek(place)
        data = file.read(min(size, left))
        place, left = place + len(data), left - len(data)
        return data

    def read(size: int) -> bytes:
        nonlocal waiting
        data = bytearray()
        while len(data) < size:
            if unpack is None:
                more = stored(size - len(data))
            else:
                waiting = waiting or stored(PIECE)
                if not waiting:
                    break
                more = unpack.decompress(waiting, size - len(data))
                waiting = unpack.unconsumed_tail
                if not more and not unpack.eof:
                    continue
            if not more:
                break
            data += more
        if len(data) < size:
            raise ValueError("it is cut short")
        return bytes(data)

    return read


def _left_out(rows: int, width: int, samples: int, page: Any) -> Array:
    """Return rows of a strip or tile that is not in the file."""
    return np.full((rows, width, samples), page.nodata, page.dtype.newbyteorder("="))


def _unpacked(
    read: Callable[[int], bytes], rows: int, width: int, samples: int, page: Any
) -> Array:
    """Return the next rows of a strip or tile, in the machine's byte order."""
    dtype = page.dtype.newbyteorder("=")
    shape = (rows, width, samples)
    data = read(math.prod(shape) * dtype.itemsize)
    if page.predictor == 3:
        # the differences of a row's bytes, and these by their significance
        row = np.frombuffer(data, np.uint8).reshape(rows, -1, samples)
        row = np.cumsum(row, axis=1, dtype=np.uint8).reshape(rows, dtype.itemsize, -1)
        numbers = np.ascontiguousarray(row.swapaxes(1, 2)).view(dtype.newbyteorder(">"))
        return numbers.astype(dtype).reshape(shape)
    array = np.frombuffer(data, page.dtype.newbyteorder(page.parent.byteorder)).reshape(shape)
    array = array.astype(dtype, copy=False)
    if page.predictor == 2:
        bits = array.view(f"u{dtype.itemsize}")
        array = np.cumsum(bits, axis=1, dtype=bits.dtype).view(dtype)
    return array


def _gathered(tiles: Iterator[Tile]) -> Iterator[Array]:
    """Put pixels together, in any order, so that not every small strip is summed for itself."""
    some: list[Array] = []
    size = 0
    for _, _, array in tiles:
        some.append(array.reshape(-1, 1, array.shape[2]))
        size += array.nbytes
        if size >= BLOCK // 4:
            yield np.concatenate(some)
            some, size = [], 0
    if some:
        yield np.concatenate(some)


def _whole(tiles: Iterator[Tile], page: Any) -> Iterator[Array]:
    """Put an image together: its rows or columns have statistics of their own."""
    shape, size = _extent(page)
    if size > MOST:
        raise ValueError(
            f"with this --axis it is held as a whole, {size:,} bytes, more than {MOST:,}"
        )
    whole = np.empty(shape, page.dtype.newbyteorder("="))
    filled = 0
    for top, left, array in tiles:
        whole[top : top + array.shape[0], left : left + array.shape[1]] = array
        filled += array.size
        if filled == whole.size:
            yield whole
            filled = 0


# --- What is packed otherwise ---------------------------------------------------------------------


def _otherwise(path: str, page: Any, number: int, options: Options) -> Array:
    end = page.parent.filehandle.size
    if any(o + n > end for o, n in zip(page.dataoffsets, page.databytecounts)):
        raise ValueError("it is cut short")
    shape, size = _extent(page)
    if size > 8 * options.max_pixels:
        raise ValueError(
            f"it has {size:,} bytes, packed so that they are "
            f"held as a whole, more than 8 for each of {options.max_pixels:,} pixels; --max-pixels"
        )
    if page.compression in (*NONE, PACKBITS) or find_spec("imagecodecs") is not None:
        # tifffile raises this for depths that it does not unpack; Pillow, below, reads some of them
        with suppress(NotImplementedError):
            array = page.asarray(squeeze=False, maxworkers=1)  # planes, depth, rows, columns, ...
            return np.moveaxis(array, 0, -2).reshape(shape)
    with Path(path).open("rb") as again, suppress(OSError, ValueError):
        array = np.asarray(open_image(again, ("TIFF",), options.max_pixels, number))
        array = array.reshape(array.shape[0], array.shape[1], -1)
        whole = page.bitspersample in (1, 8, 16, 32)
        if whole and array.dtype == page.dtype and array.shape == shape:
            # Pillow turns white around where it is zero
            turned = page.photometric == WHITE_IS_ZERO and array.dtype.itemsize == 1
            return ~array if turned else array
    packing = getattr(page.compression, "name", page.compression)
    raise ValueError(
        f"it is packed by {packing}, with {page.samplesperpixel} x {page.bitspersample} bits "
        "a pixel; to read this as it is stored, pip install imagecodecs"
    )
