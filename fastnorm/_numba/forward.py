"""The forward pass: moments, scale, step.

Splits of a group depend on the shape alone and are merged in their order, so that results do not
depend on the threads. Few large groups are carried out in two turns, each shared out among threads:
the moments of all splits, then the step of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from fastnorm._numba.apply import COLUMNS as OF_COLUMN
from fastnorm._numba.apply import apply_columns, apply_runs, spread
from fastnorm._numba.compiling import KERNEL, SOURCES, inner, load, part, real, store, within
from fastnorm._numba.moments import FIELDS, SUMS, columns_moments, merge_into, runs_moments
from fastnorm._numba.scales import finalize
from fastnorm._numba.walks import (
    ADDEND,
    BIAS,
    FIRST,
    MASK,
    MEAN_OF,
    PARTS,
    ROOM,
    RSTD_OF,
    TILES,
    VAR_OF,
    WEIGHT,
    X,
    at,
    walk_of,
)  # fmt: skip
from fastnorm.schedule import MIN_BLOCK_ROWS, NUMBA_TILE

WHOLE, MOMENTS, STEP = range(3)  # what a kernel is asked to do, of whole items or of their splits


@within
def merged(parts, item, into):
    """The moments of an item from those of its splits."""
    for field in range(FIELDS):
        for g in range(into.shape[1]):
            into[field, g] = parts[item, 0, field, g]
    for split in range(1, parts.shape[1]):
        merge_into(into, parts[item, split], into.shape[1])


@inner
def add_first(w, steps, x, added, place, split, tile):
    """x = first + addend over a split of a group: what the pass is then of."""
    one, other = added
    a, b = place
    f = split * w.split
    last = min(f + w.split, w.length)
    while f < last:
        p = f // w.s
        s = f - p * w.s
        n = min(last - f, w.s - s)
        i, j = at(steps, FIRST, a, b, p, s, 0), at(steps, ADDEND, a, b, p, s, 0)
        o = at(steps, X, a, b, p, s, 0)
        for m in range(np.uintp(n)):
            store(x, o + m, real(load(one, i + m), tile) + real(load(other, j + m), tile))
        f += n


@within
def rooms_of(room, start, w):
    """Sums, a scale and moments of splits, of one thread."""
    at_scale = start + SUMS * w.width
    at_own = at_scale + FIELDS * w.width
    return (
        part(room, start, (SUMS, w.width)),
        part(room, at_scale, (FIELDS, w.width)),
        part(room, at_own, (1, w.splits, FIELDS, w.width)),
    )


@within
def runs(task, begin, end, turn, numbers, eps, steps, arrays):
    """Items [begin, end), or splits of items, of which each group is a list of runs."""
    w = walk_of(numbers)
    x, mask, parts = arrays[X], arrays[MASK], arrays[PARTS]
    statistics = arrays[MEAN_OF], arrays[VAR_OF], arrays[RSTD_OF]
    tiles = arrays[TILES]
    tile = part(tiles, turn * w.tiles, (NUMBA_TILE,))
    spare = part(tiles, turn * w.tiles + NUMBA_TILE, (NUMBA_TILE,))
    total, scale, own = rooms_of(arrays[ROOM], turn * w.room, w)
    for i in range(begin, end):
        item, first = (i, 0) if task == WHOLE else (i // w.splits, i % w.splits)
        last = w.splits if task == WHOLE else first + 1
        place = item // w.b, item % w.b
        if task != STEP:
            for split in range(first, last):
                if w.added:
                    add_first(w, steps, x, (arrays[FIRST], arrays[ADDEND]), place, split, tile)
                if not w.given:
                    into = own[0, split] if task == WHOLE else parts[item, split]
                    runs_moments(w, steps, (x, mask), place, split, into, (total, tile))
        if task != MOMENTS:
            if not w.given:
                merged(own if task == WHOLE else parts, 0 if task == WHOLE else item, scale)
            own_place = place[0], place[1], 0
            finalize(w, eps, steps, (x, mask), own_place, (scale, 0), statistics, first == 0)
            if w.written:
                for split in range(first, last):
                    apply_runs(w, steps, arrays, place, split, scale, tile, spare)


@within
def columns(task, begin, end, turn, numbers, eps, steps, arrays):
    """Items [begin, end), or splits of items, of groups side by side."""
    w = walk_of(numbers)
    x, mask, parts = arrays[X], arrays[MASK], arrays[PARTS]
    statistics = arrays[MEAN_OF], arrays[VAR_OF], arrays[RSTD_OF]
    lanes, tiles = w.width * w.joined, arrays[TILES]
    start = turn * w.tiles
    tile, spare = part(tiles, start, (MIN_BLOCK_ROWS * w.width,)), part(tiles, start, (lanes,))
    start += max(MIN_BLOCK_ROWS * w.width, lanes)
    made, along = part(tiles, start, (lanes,)), part(tiles, start + lanes, (OF_COLUMN, lanes))
    total, scale, own = rooms_of(arrays[ROOM], turn * w.room, w)
    for i in range(begin, end):
        item, first = (i, 0) if task == WHOLE else (i // w.splits, i % w.splits)
        last = w.splits if task == WHOLE else first + 1
        outer, c = item // w.chunks, item % w.chunks * w.width
        a, b = outer // w.b, outer % w.b
        place = a, b, c, min(w.width, w.c - c)
        if task != STEP and not w.given:
            for split in range(first, last):
                into = own[0, split] if task == WHOLE else parts[item, split]
                columns_moments(w, steps, (x, mask), place, split, into, (total, tile))
        if task != MOMENTS:
            if not w.given:
                merged(own if task == WHOLE else parts, 0 if task == WHOLE else item, scale)
            for g in range(place[3] // w.neighbours):
                own_place = a, b, c + g * w.neighbours
                finalize(w, eps, steps, (x, mask), own_place, (scale, g), statistics, first == 0)
            if w.written:
                any_out = spread(
                    w, steps, (arrays[WEIGHT], arrays[BIAS]), place, scale, along, tile
                )
                for split in range(first, last):
                    known = along, any_out
                    apply_columns(w, steps, arrays, place, split, scale, known, (made, spare))


# --- The kernels ----------------------------------------------------------------------------------
# Closures over a number: Numba keeps them on disk under another key when a file has changed.


def compile_runs(sources: int) -> tuple[Any, Any]:
    """The kernel of runs for one thread, and for several."""

    @njit(**KERNEL)
    def alone(task, items, numbers, eps, steps, arrays):
        if sources != 0:
            runs(task, 0, items, 0, numbers, eps, steps, arrays)

    @njit(parallel=True, **KERNEL)
    def shared(task, items, numbers, eps, steps, arrays, turns):
        for i in prange(turns):
            if sources != 0:
                begin, end = items * i // turns, items * (i + 1) // turns
                runs(task, begin, end, i, numbers, eps, steps, arrays)

    return alone, shared


def compile_columns(sources: int) -> tuple[Any, Any]:
    """The kernel of columns for one thread, and for several."""

    @njit(**KERNEL)
    def alone(task, items, numbers, eps, steps, arrays):
        if sources != 0:
            columns(task, 0, items, 0, numbers, eps, steps, arrays)

    @njit(parallel=True, **KERNEL)
    def shared(task, items, numbers, eps, steps, arrays, turns):
        for i in prange(turns):
            if sources != 0:
                begin, end = items * i // turns, items * (i + 1) // turns
                columns(task, begin, end, i, numbers, eps, steps, arrays)

    return alone, shared


def compile_merge(sources: int) -> Any:
    """What merges the moments of all splits of each item into those of the first."""

    @njit(**KERNEL)
    def merge_all(parts):
        for item in range(parts.shape[0] if sources != 0 else 0):
            for split in range(1, parts.shape[1]):
                merge_into(parts[item, 0], parts[item, split], parts.shape[3])

    return merge_all


RUNS, COLUMNS, MERGE = compile_runs(SOURCES), compile_columns(SOURCES), compile_merge(SOURCES)
