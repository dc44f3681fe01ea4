"""Which files there are to read: every real file and folder once."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastnorm._files.names import CannotUse, reason_of

# By their names alone; what is in them decides who reads them.
_IMAGES = """
    .apng .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .pbm .pfm .pgm .png
    .pnm .ppm .webp
"""
# Numbers all the same: a folder of them is not passed over without a word.
_UNREAD = """
    .avif .cr2 .csv .dcm .dds .dng .emf .eps .exr .fit .fits .hdr .heic .heif .icns .ico .jls .jxl
    .mat .mpo .nef .nii .parquet .pcx .pdf .ps .psd .pt .pth .safetensors .sgi .svg .tga .wmf .xbm
    .xpm
"""
IMAGES, UNREAD = frozenset(_IMAGES.split()), frozenset(_UNREAD.split())
TIFF = frozenset((".btf", ".tf8", ".tif", ".tiff"))
ARRAYS = (".npy", ".npz", ".zarr", ".h5", ".hdf5", ".hdf", ".he5", ".nc", ".nc4")
ZARR_MARKS = ("zarr.json", ".zarray", ".zgroup")

Bad = Callable[[str, str], None]


def kind_of(path: Path, is_folder: bool) -> str | None:
    """Return which kind of file this is, by its name; None for one that is not known."""
    suffix = path.suffix.lower()
    if is_folder:
        marked = any((path / mark).is_file() for mark in ZARR_MARKS)
        return "zarr" if suffix == ".zarr" or marked else None
    if suffix in ARRAYS:
        return suffix[1:] if suffix in (".npy", ".npz", ".zarr") else "hdf5"
    return "image" if suffix in IMAGES or suffix in TIFF else None


class Files:
    """Every file to be read and its kind, and what was passed over, in these files and folders.

    `bad` is called with what is named like a file to be read and cannot be, and why. Raise
    CannotUse for a path that is empty, does not exist or is neither file nor folder, a file of an
    unknown kind, or a folder without any known.
    """

    def __init__(self, paths: Sequence[str | Path], bad: Bad) -> None:
        self.found: list[tuple[Path, str]] = []
        self.passed: Counter[str] = Counter()  # suffixes of images and tables that are not read
        self._bad = bad
        self._seen: set[str] = set()  # real paths
        self._real: dict[Path, str] = {}  # and whose they are
        self._met = 0  # what could be read or is bad, though it may have been seen before
        for path in paths:
            self._take(path)

    def _take(self, given: str | Path) -> None:
        if not str(given):
            raise CannotUse("a path is empty; write . for the current folder")
        path = Path(given)
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise CannotUse(f"there is no file or folder {str(path)!r}") from None
        except OSError as error:
            raise CannotUse(f"cannot open {str(path)!r}: {reason_of(error)}") from None
        folder = stat.S_ISDIR(mode)
        if not folder and not stat.S_ISREG(mode):
            raise CannotUse(f"{str(path)!r} is {_file_kind(mode)}, expected a file or a folder")
        kind = kind_of(path, folder)
        if kind is None and not folder:
            raise CannotUse(
                f"{str(path)!r} is of no known kind, expected an image "
                f"({', '.join(sorted(IMAGES | TIFF))}) or one of {', '.join(ARRAYS)}"
            )
        before = self._met
        if kind is None:
            self._folder(path)
        else:
            self._add(path, kind)
        if self._met == before:
            raise CannotUse(f"there are no images or arrays in {str(path)!r}")

    def _complain(self, path: Path, reason: str) -> None:
        self._met += 1
        self._bad(str(path), reason)

    def _new(self, path: Path) -> bool:
        # `realpath` asks for every folder of a path: for those a thousand deep it takes a minute
        inside = self._real.get(path.parent) if path.name not in ("", "..") else None
        if inside is None or path.is_symlink():
            real = os.path.realpath(path)
        else:
            real = str(Path(inside) / path.name)
        if real in self._seen:
            return False
        self._seen.add(real)
        self._real[path] = real
        return True

    def _add(self, path: Path, kind: str) -> None:
        self._met += 1
        if self._new(path):
            self.found.append((path, kind))

    def _folder(self, folder: Path) -> None:
        """Take what is in a folder, by names; through links only what is not there by itself."""
        start = len(self.found)
        waiting, links = [folder], list[Path]()
        while waiting:
            path = waiting.pop()
            if self._new(path):
                for entry in self._entries(path):
                    if entry.is_symlink():
                        links.append(Path(entry))
                    else:
                        self._entry(Path(entry), waiting)
            elif path == folder:
                self._met += 1
            while links and not waiting:
                self._entry(links.pop(0), waiting)
        self.found[start:] = sorted(self.found[start:], key=lambda item: item[0].parts)

    def _entries(self, path: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._complain(path, f"this folder cannot be listed: {reason_of(error)}")
            return
        yield from (entry for entry in inside if not entry.name.startswith("."))

    def _entry(self, path: Path, waiting: list[Path]) -> None:
        suffix = path.suffix.lower()
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if kind_of(path, False) is not None:
                self._complain(path, f"it is a link to nowhere: {reason_of(error)}")
            return
        folder = stat.S_ISDIR(mode)
        kind = kind_of(path, folder)
        if kind is None and folder:
            waiting.append(path)
        elif kind is not None and not folder and not stat.S_ISREG(mode):
            self._complain(path, f"it is {_file_kind(mode)}, no file")
        elif kind is not None:
            self._add(path, kind)
        elif suffix in UNREAD:
            self.passed[suffix] += 1


def _file_kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"
