"""Mean and standard deviation of files: folders of images, NumPy, Zarr and HDF5 arrays.

What ``fastnorm stats`` does, without its arguments and its printing. Files are cut into parts of a
few megabytes at most, parts go to workers in small tasks, and the moments that come back are merged
in the order of the files: the result does not depend on how many workers there were.
"""

from __future__ import annotations

import io
import itertools
import math
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import fastnorm as fn
from fastnorm.arguments import as_numbers, reduced_axes

Array: TypeAlias = NDArray[Any]

# What is read at once of an array, in bytes, and how many images make a task.
BLOCK = 8 << 20
IMAGES = 16
# Tasks handed out for each other process: one to work on, and one that waits.
AHEAD = 2
# How long a Dask scheduler may take to answer.
PATIENCE = "10s"

COMMON = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
ARRAYS = (".npy", ".npz", ".zarr", ".h5", ".hdf5", ".hdf", ".he5")
# What each kind of file needs: (import, distribution).
NEEDS = {"image": ("PIL", "pillow"), "zarr": ("zarr", "zarr"), "hdf5": ("h5py", "h5py")}


class CannotUse(ValueError):
    """What was asked for cannot be done with these paths."""


# --- What there is to read ------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Something to read at once: an image, or a block of an array."""

    path: str
    kind: str  # "image", "npy", "npz", "zarr", "hdf5"
    group: str = ""
    key: str = ""  # of an array in a file of several
    index: tuple[slice, ...] = ()


@dataclass(frozen=True)
class Options:
    """How parts are read."""

    axis: tuple[int, ...] | None = None  # None: all but the channels of an image, all of an array
    mode: str | None = None  # what Pillow converts images to
    histogram: bool = False
    shape: tuple[int, ...] | None = None  # of the statistics; None before any are known
    first: str = ""  # the path that this shape is of


def kind_of(path: Path) -> str | None:
    """Return which kind of file this is, by its name; None for one that is not known."""
    suffix = path.suffix.lower()
    if path.is_dir():
        marks = ("zarr.json", ".zarray", ".zgroup")
        return "zarr" if suffix == ".zarr" or any((path / m).exists() for m in marks) else None
    if suffix in ARRAYS:
        return suffix[1:] if suffix in (".npy", ".npz", ".zarr") else "hdf5"
    return "image" if suffix in COMMON or suffix in _image_suffixes() else None


@cache
def _image_suffixes() -> set[str]:
    """All that Pillow opens. Asking it loads its readers of some fifty formats."""
    try:
        from PIL import Image
    except ImportError:
        return set()
    Image.init()
    return {s for s, name in Image.registered_extensions().items() if name in Image.OPEN}


def files_of(paths: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """Return every file to be read, and its kind: those in folders in the order of their names.

    Raises
    ------
    CannotUse
        For a path that does not exist, a file of an unknown kind, or a folder without any known.
    """
    found: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if not path.exists():
            raise CannotUse(f"there is no file or folder {str(path)!r}")
        kind = kind_of(path)
        if kind is None and not path.is_dir():
            raise CannotUse(
                f"{str(path)!r} is of no known kind, expected an image or one of "
                f"{', '.join(ARRAYS)}"
            )
        inside = [(path, kind)] if kind else list(_walk(path))
        if not inside:
            raise CannotUse(f"there are no images or arrays in {str(path)!r}")
        found += inside
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.iterdir()):
        kind = kind_of(path)
        if kind is not None:
            yield path, kind
        elif path.is_dir():
            yield from _walk(path)


def parts_of(path: Path, kind: str, group: str, key: str, options: Options) -> list[Part]:
    """Cut one file into parts. Errors are those of reading it."""
    name = str(path)
    if kind == "image":
        _axes_of(np.empty((0, 0, 0)), options, name)
        return [Part(name, kind, group)]
    with _opened(name, kind) as arrays:
        names = arrays.names()
        if key and key not in names:
            raise CannotUse(f"{name!r} has no array {key!r}, but {', '.join(map(repr, names))}")
        if not key and len(names) != 1:
            raise CannotUse(
                f"{name!r} has {len(names)} arrays; write --key with one of "
                f"{', '.join(map(repr, names))}"
            )
        key = key or names[0]
        array = arrays[key]
        if kind == "npz":  # a member is read whole: it may be compressed
            return [Part(name, kind, group, key)]
        axes = _axes_of(array, options, name)
        chunks = getattr(array, "chunks", None)
        return [Part(name, kind, group, key, i) for i in _blocks(array, axes, chunks)]


def _axes_of(array: Any, options: Options, path: str) -> tuple[int, ...]:
    try:
        return reduced_axes(array, options.axis, path)
    except ValueError as error:
        raise CannotUse(str(error)) from None


def _blocks(
    array: Any, axes: tuple[int, ...], chunks: tuple[int, ...] | None
) -> Iterator[tuple[slice, ...]]:
    """Slices of BLOCK bytes at most where that can be, cut along the axes that are reduced."""
    size = math.prod(array.shape) * array.dtype.itemsize
    cuts: list[list[slice]] = []
    for axis, n in enumerate(array.shape):
        step = n
        if axis in axes and size > BLOCK and n > 1:
            step = max(1, int(n * BLOCK // size))
            if chunks:  # whole chunks of the file, which are read whole anyway
                step = max(step - step % chunks[axis], min(chunks[axis], n))
            size = size * step // n
        cuts.append([slice(i, min(i + step, n)) for i in range(0, n, max(step, 1))])
    return itertools.product(*cuts)


class _Arrays:
    """The arrays of a file by name, read as they are indexed."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays

    def names(self) -> list[str]:
        return list(self._arrays)

    def __getitem__(self, key: str) -> Any:
        return self._arrays[key]


@contextmanager
def _opened(path: str, kind: str) -> Iterator[Any]:
    if kind == "npy":
        # never pickled objects: they could run any code
        yield _Arrays({"": np.load(path, mmap_mode="r", allow_pickle=False)})
    elif kind == "npz":
        with np.load(path, allow_pickle=False) as file:
            yield _Members(file)
    elif kind == "zarr":
        import zarr

        found = zarr.open(path, mode="r")
        if isinstance(found, zarr.Array):
            yield _Arrays({"": found})
        else:
            members = found.members(max_depth=None)
            yield _Arrays({n: a for n, a in members if isinstance(a, zarr.Array)})
    else:
        import h5py

        with h5py.File(path, "r") as file:
            datasets: dict[str, Any] = {}

            def note(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    datasets[name] = item

            file.visititems(note)
            yield _Arrays(datasets)


class _Members(_Arrays):
    """Those of an .npz file, each loaded when it is asked for."""

    def __init__(self, file: Any) -> None:
        super().__init__(dict.fromkeys(file.files))
        self._file = file

    def __getitem__(self, key: str) -> Any:
        return self._file[key]


def read(part: Part, options: Options) -> tuple[Array, tuple[int, ...]]:
    """Read a part: the numbers, and the axes that are reduced."""
    if part.kind != "image":
        with _opened(part.path, part.kind) as arrays:
            array = np.asarray(arrays[part.key][part.index] if part.index else arrays[part.key])
        return array, reduced_axes(array, options.axis, "--axis")
    from PIL import Image

    with Image.open(part.path) as image:
        mode = options.mode
        if mode is None and image.mode in ("P", "1"):  # numbers of colours, and bits
            mode = "L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB"
        array = np.asarray(image if mode in (None, image.mode) else image.convert(mode))
    array = array if array.ndim == 3 else array[..., np.newaxis]
    return array, (0, 1) if options.axis is None else reduced_axes(array, options.axis, "--axis")


# --- Histograms -----------------------------------------------------------------------------------


@dataclass
class Histogram:
    """How many numbers of each channel lie in each bin; bins are `width` wide, a power of two.

    Bin i holds the numbers from i * width on, so that histograms of parts merge exactly: the finer
    one's bins are added up in pairs.
    """

    MOST = 512  # bins

    exponent: int = 0
    start: int = 0
    counts: Array = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @property
    def edges(self) -> Array:
        """The edges of the bins, in the units of the numbers."""
        bins = self.start + np.arange(self.counts.shape[1] + 1, dtype=np.float64)
        return np.ldexp(bins, self.exponent)

    @classmethod
    def of(cls, x: Array, axes: tuple[int, ...]) -> Histogram:
        """Return that of an array, over these axes; what is not finite is left out."""
        rows = np.moveaxis(x, axes, range(-len(axes), 0) if axes else ())
        rows = rows.reshape(math.prod(rows.shape[: x.ndim - len(axes)]), -1)
        integers = rows.dtype.kind in "biu"
        wide = rows if integers else rows.astype(np.float64)
        finite = np.ones(rows.shape, bool) if integers else np.isfinite(wide)
        if not finite.any():
            return cls(counts=np.zeros((len(rows), 0), np.int64))
        low, high = float(wide[finite].min()), float(wide[finite].max())
        span = (high - low) or max(abs(low), 1e-300) / cls.MOST
        exponent = max(math.frexp(span / cls.MOST)[1], 0 if integers else -1000)
        bins = np.floor(
            np.ldexp(wide.astype(np.float64), -exponent), where=finite, out=np.zeros(wide.shape)
        )
        start = int(bins[finite].min())
        width = int(bins[finite].max()) - start + 1
        index = (bins - start).astype(np.int64) + width * np.arange(len(rows))[:, np.newaxis]
        counts = np.bincount(index[finite], minlength=width * len(rows))
        return cls(exponent, start, counts.reshape(len(rows), width))

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both."""
        if not self.counts.size or not other.counts.size:
            return other if not self.counts.size else self
        exponent = max(self.exponent, other.exponent)
        while True:
            a, b = self._coarser(exponent), other._coarser(exponent)
            start = min(a.start, b.start)
            end = max(h.start + h.counts.shape[1] for h in (a, b))
            if end - start <= 2 * self.MOST:
                break
            exponent += 1
        counts = np.zeros((len(a.counts), end - start), np.int64)
        for h in (a, b):
            counts[:, h.start - start : h.start - start + h.counts.shape[1]] += h.counts
        return Histogram(exponent, start, counts)

    def _coarser(self, exponent: int) -> Histogram:
        shift = exponent - self.exponent
        bins = (self.start + np.arange(self.counts.shape[1])) >> shift
        counts = np.zeros((len(self.counts), int(bins[-1] - bins[0]) + 1), np.int64)
        np.add.at(counts.T, bins - bins[0], self.counts.T)
        return Histogram(exponent, int(bins[0]), counts)


# --- The work -------------------------------------------------------------------------------------


@dataclass
class Found:
    """What has been found in some parts."""

    moments: dict[str, fn.Moments] = field(default_factory=dict)  # of each group
    histogram: Histogram | None = None
    parts: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # paths, and why they cannot be read

    @property
    def total(self) -> fn.Moments:
        """Of all groups."""
        return sum(self.moments.values(), fn.Moments())

    def take(self, other: Found) -> None:
        """Take in what has been found in other parts."""
        for group, moments in other.moments.items():
            self.moments.setdefault(group, fn.Moments()).merge(moments)
        if other.histogram is not None:
            self.histogram = (self.histogram or Histogram()).merge(other.histogram)
        self.parts += other.parts
        self.bad += other.bad


def work(task: Sequence[Part], options: Options) -> Found:
    """Read parts, and return their moments: what a worker does."""
    found = Found()
    for part in task:
        found.parts += 1
        try:
            array, axes = read(part, options)
            array = as_numbers(array, part.key or "this")
            kept = tuple(n for axis, n in enumerate(array.shape) if axis not in axes)
            if options.shape not in (None, kept):
                raise ValueError(_of_another_shape(part, kept, options))
            # an image is too small to share out, and its decoder uses one thread anyway
            with fn.threads(1 if part.kind == "image" else fn.get_num_threads()):
                moments = fn.Moments.from_array(array, axes)
        except Exception as error:  # decoders of broken files raise all kinds
            found.bad.append((part.path, _reason(error)))
            continue
        found.moments.setdefault(part.group, fn.Moments()).merge(moments)
        if options.histogram:
            found.histogram = (found.histogram or Histogram()).merge(Histogram.of(array, axes))
    return found


def _of_another_shape(part: Part, kept: tuple[int, ...], options: Options) -> str:
    if part.kind == "image" and options.axis is None:
        return (
            f"it has {kept[0]} channels, and {options.first} has {options.shape[0]}; "  # type: ignore[index]
            "write --mode RGB to convert them all"
        )
    return f"its statistics have shape {kept}, and those of {options.first} {options.shape}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _ignore_interrupts() -> None:
    """In a worker: Ctrl-C reaches the parent too, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fn.set_num_threads(1)


@contextmanager
def executor(workers: int, scheduler: str | None) -> Iterator[Executor | None]:
    """What runs tasks: a Dask cluster, processes, or (None) this process.

    Raises
    ------
    CannotUse
        If there is no scheduler at that address.
    """
    if scheduler is not None:
        from distributed import Client

        try:
            client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise CannotUse(f"no Dask scheduler answers at {scheduler!r}: {error}") from None
        with client:
            yield client.get_executor()
    elif workers == 1:
        yield None
    else:
        # not forked: a child of a process that has used threads could wait for one for ever
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers - 1, context, _ignore_interrupts)  # and this one
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def results(
    tasks: Iterable[Sequence[Part]],
    options: Options,
    pool: Executor | None,
    ahead: int,
    helps: bool,
) -> Iterator[Found]:
    """Return the results of tasks in their order, `ahead` of which are under way elsewhere.

    If this process `helps`, it takes a task instead of waiting: at once, while others still start.
    """
    if pool is None:
        yield from (work(task, options) for task in tasks)
        return
    waiting: deque[Any] = deque()
    try:
        for task in tasks:
            away = sum(not future.done() for future in waiting)
            if helps and away >= ahead:
                waiting.append(Future())
                with fn.threads(1):  # as the other processes have
                    waiting[-1].set_result(work(task, options))
            else:
                waiting.append(pool.submit(work, task, options))
            while waiting and (waiting[0].done() or (not helps and len(waiting) >= ahead)):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def tasks_of(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Images some at a time, blocks of arrays one by one: whatever the number of workers."""
    task: list[Part] = []
    for part in parts:
        if part.kind != "image":
            yield [part]
            continue
        task.append(part)
        if len(task) == IMAGES:
            yield task
            task = []
    if task:
        yield task


class CannotRead(Exception):
    """A file that cannot be read, and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read {path}: {reason}")


def collect(
    files: Sequence[tuple[Path, str]],
    options: Options,
    *,
    key: str = "",
    by_folder: bool = False,
    skip_bad: bool = False,
    workers: int = 1,
    scheduler: str | None = None,
    begin: Callable[[int, str], Any] = lambda parts, unit: None,
    advance: Callable[[int], Any] = lambda parts: None,
) -> tuple[Found, bool]:
    """Read these files; return what was found, and whether that was all or Ctrl-C came before.

    `begin` is told how many parts there are and what they are, `advance` how many are done more.

    Raises
    ------
    CannotUse
        For options that do not fit what is there, or a cluster that does not answer.
    CannotRead
        For a file that cannot be read, unless `skip_bad`.
    """
    found, parts = Found(), []

    def bad(path: str, reason: str) -> None:
        if not skip_bad:
            raise CannotRead(path, reason)
        found.bad.append((path, reason))

    for path, kind in files:
        group = str(path.parent) if by_folder else ""
        try:
            parts += parts_of(path, kind, group, key, options)
        except (CannotUse, ImportError):
            raise
        except Exception as error:
            bad(str(path), _reason(error))
    options = _with_shape(parts, options)
    images = all(part.kind == "image" for part in parts)
    begin(len(parts), "image" if images else "block")
    try:
        with executor(workers, scheduler) as pool:
            helps = scheduler is None
            ahead = AHEAD * (workers - 1 if helps else max(workers, 8))
            for more in results(tasks_of(parts), options, pool, ahead, helps):
                for path_and_reason in more.bad:
                    bad(*path_and_reason)
                more.bad = []
                found.take(more)
                advance(more.parts)
    except KeyboardInterrupt:
        return found, False
    except BrokenExecutor:
        raise CannotUse(
            f"one of the {workers} processes ended, perhaps for want of memory; write a smaller "
            "--workers"
        ) from None
    return found, True


def _with_shape(parts: Sequence[Part], options: Options) -> Options:
    """The shape of the statistics, from the first part that can be read."""
    for part in parts:
        alone = Options(options.axis, options.mode)
        first = work([part], alone).moments.get(part.group)
        if first is not None:
            shape = np.shape(first.count)
            return Options(options.axis, options.mode, options.histogram, shape, part.path)
    return options


# --- Results --------------------------------------------------------------------------------------


def summary(moments: fn.Moments, scale: float) -> dict[str, Any]:
    """Return count, mean, var and std of each channel, of numbers divided by `scale`."""
    return {
        "count": np.asarray(moments.count).tolist(),
        "mean": _plain(moments.mean / scale),
        "var": _plain(moments.var() / scale**2),
        "std": _plain(moments.std() / scale),
    }


def _plain(values: Any) -> Any:
    """Numbers and lists of them; None (null in JSON) for what is not a number."""
    array = np.asarray(values, object)
    array[~np.isfinite(values)] = None
    return array.tolist()


def normalize_line(moments: fn.Moments, scale: float) -> str:
    """Return ``Normalize(mean=[...], std=[...])``, as it is written in a training script."""

    def numbers(values: Any) -> str:
        return ", ".join(f"{v:.6g}" for v in np.ravel(values))

    return (
        f"Normalize(mean=[{numbers(moments.mean / scale)}], std=[{numbers(moments.std() / scale)}])"
    )


def table(found: Found, scale: float) -> str:
    """Return a row for each group and channel, and for all groups together where there are some."""
    named = dict(sorted(found.moments.items()))
    if len(named) > 1:
        named["all"] = found.total
    rows = []
    for name, moments in named.items():
        means, stds = np.asarray(moments.mean / scale), np.asarray(moments.std() / scale)
        counts = np.asarray(moments.count)
        for place in np.ndindex(means.shape):
            channel = ",".join(map(str, place))
            numbers = (f"{counts[place]:,}", f"{means[place]:.9g}", f"{stds[place]:.9g}")
            rows.append((name, channel, *numbers))
    head = ("folder", "channel", "count", "mean", "std")
    dropped = 0 if any(row[0] for row in rows) else 1
    lines = [row[dropped:] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = {0} if dropped == 0 else set()
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def plot(histogram: Histogram, moments: fn.Moments, scale: float, kind: str = "png") -> bytes:
    """Draw each channel's histogram, with its mean and standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    edges = histogram.edges / scale
    colours = ("tab:red", "tab:green", "tab:blue") if len(histogram.counts) == 3 else None
    means, stds = np.ravel(moments.mean / scale), np.ravel(moments.std() / scale)
    for channel, counts in enumerate(histogram.counts):
        colour = colours[channel] if colours else f"C{channel % 10}"
        label = f"{channel}: mean {means[channel]:.4g}, std {stds[channel]:.4g}"
        density = counts / max(counts.sum(), 1) / np.diff(edges)
        axes.stairs(density, edges, color=colour, label=label)
        axes.axvline(means[channel], color=colour, linestyle=":", linewidth=1)
    axes.set_xlabel("value" if scale == 1 else f"value / {scale:g}")
    axes.set_ylabel("density")
    if len(means) <= 16:
        axes.legend(title="channel")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=120)
    return picture.getvalue()
