"""Mean and standard deviation of files: folders of images, NumPy, Zarr and HDF5 arrays.

What ``fastnorm stats`` does, without its arguments and its printing. Files are cut into parts,
parts go to workers in small tasks, and the moments that come back are merged in the order of the
files: the result does not depend on how many workers there were. `_files` finds and reads them.
"""

from __future__ import annotations

import itertools
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm._files.arrays import source_of
from fastnorm._files.histogram import Histogram
from fastnorm._files.names import CannotRead, CannotUse, reason_of
from fastnorm._files.parts import Block, Options, Part, Source, axes_of, check_statistics
from fastnorm._files.reading import blocks_of
from fastnorm._files.walk import Files
from fastnorm.arguments import as_numbers
from fastnorm.workers import interrupts_held, processes

# How many images make a task.
IMAGES = 16
# Tasks handed out for each other process: one to work on, and one that waits.
AHEAD = 2
# How long a Dask scheduler may take to answer.
PATIENCE = "10s"


# --- What a worker does ---------------------------------------------------------------------------


@dataclass
class Found:
    """What has been found in some parts."""

    moments: dict[str, fn.Moments] = field(default_factory=dict)  # of each group
    histogram: Histogram | None = None
    parts: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # paths, and why they cannot be read
    not_finite: str = ""  # the first path with an infinity or NaN

    @property
    def total(self) -> fn.Moments:
        """Of all groups."""
        return sum(self.moments.values(), fn.Moments())

    def take(self, other: Found) -> None:
        """Take in what has been found in other parts."""
        for group, moments in other.moments.items():
            if group in self.moments:
                self.moments[group].merge(moments)
            else:
                self.moments[group] = moments
        if other.histogram is not None:
            self.histogram = (self.histogram or Histogram()).merge(other.histogram)
        self.parts += other.parts
        self.bad += other.bad
        self.not_finite = self.not_finite or other.not_finite


def work(task: Sequence[Part], options: Options) -> Found:
    """Read parts, and return their moments."""
    found = Found()
    for part in task:
        # an image is too small to share out, and its decoder uses one thread anyway
        with fn.threads(1 if part.kind == "image" else fn.get_num_threads()):
            try:
                found.take(_found_in(part, options))
            except Exception as error:  # decoders of broken files raise all kinds
                found.parts += 1
                found.bad.append((part.path, reason_of(error)))
    return found


def _found_in(part: Part, options: Options) -> Found:
    found = Found(parts=1)
    for block in blocks_of(part, options):
        options = _alike(part, block, options)
        left_out = block.left_out(options)
        where = None if left_out is None else ~left_out
        array = as_numbers(block.numbers(), part.key or "this")
        moments = fn.Moments(_own_axis(part, options)).update(array, where)
        more = Found({part.group: moments})
        if options.histogram:
            more.histogram = Histogram.of(array, _axes(part, block, options), where)
        if not np.isfinite(np.asarray(moments.mean)[np.asarray(moments.count) > 0]).all():
            more.not_finite = part.path
        found.take(more)
    return found


def _own_axis(part: Part, options: Options) -> tuple[int, ...] | None:
    """The axes as `Moments` take them: the same for all parts that merge."""
    return (0, 1) if options.axis is None and part.kind == "image" else options.axis


def _axes(part: Part, block: Block, options: Options) -> tuple[int, ...]:
    axis = _own_axis(part, options)
    return axes_of(block.array.ndim, block.array.shape, replace(options, axis=axis), part.path)


def _alike(part: Part, block: Block, options: Options) -> Options:
    """Return options that hold all that follows to what the first block is.

    Refuse numbers that do not belong with those of that.
    """
    axes, image = _axes(part, block, options), part.kind == "image"
    kept = tuple(n for axis, n in enumerate(block.array.shape) if axis not in axes)
    check_statistics(kept)
    ours, theirs = block.number_kind, options.number_kind
    if not theirs:
        return replace(options, shape=kept, number_kind=ours, first=part.path)
    if (kept, ours) == (options.shape, theirs):
        return options
    first = options.first if options.first != part.path else "another page of it"
    can = options.mode is None and {ours.split()[0], theirs.split()[0]} == {"uint8"}
    advice = "write --mode RGB to convert them all" if image and can else "give them separately"
    if image and options.axis is None and kept != options.shape:
        assert options.shape is not None
        raise ValueError(
            f"it has {kept[0]} channels, and {first} has {options.shape[0]} ({ours} and {theirs}); "
            f"{advice}"
        )
    if ours != theirs:
        raise ValueError(
            f"it is {ours}, and {first} is {theirs}, which do not belong together; {advice}"
        )
    raise ValueError(f"its statistics have shape {kept}, and those of {first} {options.shape}")


# --- Workers --------------------------------------------------------------------------------------


def _ignore_interrupts() -> None:
    """In a worker: Ctrl-C is the parent's, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    fn.set_num_threads(1)


@contextmanager
def executor(workers: int, scheduler: str | None) -> Iterator[Executor | None]:
    """What runs tasks: a Dask cluster, processes, or (None) this process.

    Raise CannotUse if there is no scheduler at that address.
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
        with processes(workers - 1, _ignore_interrupts) as pool:  # and this one
            yield pool


def results(
    tasks: Iterable[Sequence[Part]],
    options: Options,
    pool: Executor | None,
    ahead: int,
    helps: bool,
) -> Iterator[Found]:
    """Return the results of tasks in their order, `ahead` of which other processes work on.

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
                with interrupts_held():
                    waiting.append(pool.submit(work, task, options))
            while waiting and (waiting[0].done() or (not helps and len(waiting) >= ahead)):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def tasks_of(parts: Iterable[Part]) -> Iterator[list[Part]]:
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


# --- All of it ------------------------------------------------------------------------------------


def files_of(
    paths: Sequence[str | Path], skip_bad: bool = False
) -> tuple[Files, list[tuple[str, str]]]:
    """Find the files; return them, and what is named like one and cannot be read, and why.

    Raise CannotUse for paths that are of no use (see `Files`); and unless `skip_bad` CannotRead for
    a folder that cannot be listed, a pipe or a device that is named like an image, and so on.
    """
    bad: list[tuple[str, str]] = []
    return Files(paths, _noting(bad, skip_bad)), bad


def _noting(bad: list[tuple[str, str]], skip_bad: bool) -> Callable[[str, str], None]:
    """Return what is told of a file that cannot be read, and notes it or raises."""

    def note(path: str, reason: str) -> None:
        if not skip_bad:
            raise CannotRead(path, reason)
        bad.append((path, reason))

    return note


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

    Raise CannotUse for options that do not fit what is there, or a cluster that does not answer;
    and unless `skip_bad` CannotRead for a file that cannot be read.
    """
    found, begun = Found(), False
    bad = _noting(found.bad, skip_bad)
    images = {kind == "image" for _, kind in files}
    if key and False not in images:
        raise CannotUse("--key names an array in a file of several, and these are images")
    if options.mode is not None and True not in images:
        raise CannotUse("--mode converts images, and there are none")
    try:
        with executor(workers, scheduler) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decoders, about files: they go on or raise
            sources = []
            for path, kind in files:
                group = str(path.parent) if by_folder else ""
                try:
                    sources.append(_source(str(path), kind, group, key, options))
                except (CannotUse, ImportError):
                    raise
                except Exception as error:
                    bad(str(path), reason_of(error))
            options = _with_first(sources, options)
            begin(sum(map(len, sources)), "block" if False in images else "image")
            begun = True
            helps = scheduler is None
            ahead = AHEAD * (workers - 1 if helps else max(workers, 8))
            parts = itertools.chain.from_iterable(source.parts() for source in sources)
            for more in results(tasks_of(parts), options, pool, ahead, helps):
                for path_and_reason in more.bad:
                    bad(*path_and_reason)
                more.bad = []
                found.take(more)
                advance(more.parts)
    except KeyboardInterrupt:
        if not begun:
            raise
        return found, False
    except BrokenExecutor:
        raise CannotUse(
            f"one of the {workers} processes ended, perhaps for want of memory; write a smaller "
            "--workers"
        ) from None
    return found, True


def _source(path: str, kind: str, group: str, key: str, options: Options) -> Source:
    if kind == "image":
        axes_of(3, (), options, path)
        return Source(path, kind, group)
    return source_of(path, kind, group, key, options)


def _with_first(sources: Sequence[Source], options: Options) -> Options:
    """Hold all to the first file that can be read."""
    for source in sources:
        for part in itertools.islice(source.parts(), 1):
            try:
                block = next(blocks_of(part, options))
                return _alike(part, block, options)
            except Exception:  # said when it is read as a whole
                continue
    return options
