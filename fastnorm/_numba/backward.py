"""The backward pass, on the same five dimensions as the forward one.

    xhat = (x - mean) rstd            g = dy weight
    dx = rstd (g - sum(g)/count - xhat sum(g xhat)/count)        sums over a group
    dweight = sum(dy xhat)            dbias = sum(dy)            sums over what shares a weight

Where a weight is one number for a run, or a column, its two sums are those of whole planes, or of
segments of columns: they are kept in `sums`, serve the group, and are added up for the weight when
all is done. Where the weight differs along a run (layer and RMS norm) each element is a *cell*: the
group's sums are taken first, and the weight's are collected with dx, in the order of those that
share it, by `parts` of them.

What a float32 cannot hold is computed in float64: sums that leave its range on the way, and dx of a
group that is out of range by its statistics, its sums or its weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit, prange

from fastnorm._numba.column_gradients import (
    OF_COLUMN,
    column_terms,
    columns_apply,
    columns_sums,
)
from fastnorm._numba.compiling import KERNEL, SOURCES, inner, part, within
from fastnorm._numba.gradients import (
    COLLECTED,
    RANGES,
    ROOM,
    TERMS,
    TILES,
    WEIGHT,
    apply_cells,
    apply_run,
    group_terms,
    range_of_weights,
    run_sums,
)
from fastnorm.schedule import NUMBA_TILE

WHOLE, ADD_UP, STEP = range(3)  # what a kernel is asked to do, of whole items or of their segments


class BackWalk(NamedTuple):
    """What a kernel is told of a pass back but for its arrays."""

    a: int
    b: int
    p: int
    s: int
    c: int
    neighbours: int
    run: int  # elements of x and dy that follow one another
    length: int  # elements of a group, or its rows
    width: int  # columns of an item; along runs, groups side by side
    chunks: int  # items side by side
    planes: int  # of a group, that have weights of their own
    segments: int  # of a plane
    span: int  # elements or rows of a segment
    training: int
    centred: int
    weighted: int
    own_a: int  # whether weights differ along a and b
    own_b: int
    along_p: int  # and, where they differ along a run, from plane to plane
    sharers: int  # of an owner of cells
    parts: int
    cells: int
    chunk: int  # cells that are a task of their own where owners are few
    room: int
    tiles: int


@inner
def back_walk_of(n):
    """The same, of an array."""
    return BackWalk(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13],
        n[14], n[15], n[16], n[17], n[18], n[19], n[20], n[21], n[22], n[23], n[24],
    )  # fmt: skip


@within
def tiles_of(tiles, turn, w, n):
    """Three tiles of a thread: for x, dy and dx."""
    start = turn * w.tiles
    return part(tiles, start, (n,)), part(tiles, start + n, (n,)), part(tiles, start + 2 * n, (n,))


# --- Runs with one weight each --------------------------------------------------------------------


@within
def planes(task, begin, end, turn, numbers, steps, arrays):
    """Items [begin, end), or segments of items."""
    w = back_walk_of(numbers)
    tiles, each = tiles_of(arrays[TILES], turn, w, NUMBA_TILE), w.planes * w.segments
    terms = part(arrays[ROOM], turn * w.room, (TERMS, w.width))
    for i in range(begin, end):
        item, first = (i, 0) if task == WHOLE else (i // each, i % each)
        last = each if task == WHOLE else first + 1
        a, b = item // w.chunks, item % w.chunks * w.width
        width = min(w.width, w.b - b)
        if task != STEP:
            for segment in range(first, last):
                run_sums(w, steps, arrays, (a, b, width), segment, False, tiles)
        if task != ADD_UP:
            for k in range(width):
                group_terms(w, steps, arrays, (a, b + k), (0.0, 0.0), False, terms, k)
            for segment in range(first, last):
                apply_run(w, steps, arrays, (a, b, width), segment, terms, tiles)


# --- Runs along which the weight differs ----------------------------------------------------------


@inner
def group_of(w, owner, sharer):
    """(a, b) of one of those that share the weights of an owner."""
    if w.own_a and w.own_b:
        return owner // w.b, owner % w.b
    if w.own_a:
        return owner, sharer
    if w.own_b:
        return sharer, owner
    return sharer // w.b, sharer % w.b


@inner
def owner_of(w, a, b):
    """Whose weights those of group (a, b) are."""
    if w.own_a and w.own_b:
        return a * w.b + b
    if w.own_a:
        return a
    return b if w.own_b else 0


@within
def rows(task, begin, end, turn, numbers, steps, arrays):
    """Parts [begin, end) of owners; or segments of groups, then chunks of owners' cells."""
    w = back_walk_of(numbers)
    tiles = tiles_of(arrays[TILES], turn, w, NUMBA_TILE)
    terms = part(arrays[ROOM], turn * w.room, (TERMS, 1))
    chunks = (w.s + w.chunk - 1) // w.chunk
    for i in range(begin, end):
        if task == ADD_UP:
            a, b = i // w.segments // w.b, i // w.segments % w.b
            run_sums(w, steps, arrays, (a, b, 1), i % w.segments, True, tiles)
            owner = owner_of(w, a, b)
            if i % w.segments == 0 and group_of(w, owner, 0) == (a, b):
                least, most = range_of_weights(w, steps, arrays[WEIGHT], a, b)
                arrays[RANGES][2 * owner], arrays[RANGES][2 * owner + 1] = least, most
            continue
        first, last = 0, w.sharers
        low, high = 0, w.s
        plane, planes = 0, w.p
        if task == WHOLE:
            owner = i // w.parts
            k = i % w.parts
            first, last = w.sharers * k // w.parts, w.sharers * (k + 1) // w.parts
            cells = i
        else:
            of_owner = (w.p if w.along_p else 1) * chunks
            owner = cells = i // of_owner
            low = i % chunks * w.chunk
            high = min(low + w.chunk, w.s)
            if w.along_p:
                plane = i % of_owner // chunks
                planes = plane + 1
        collected = part(arrays[COLLECTED], 2 * w.cells * cells, (2, w.cells))
        for p in range(plane, planes if w.along_p else plane + 1):
            for j in range(p * w.s + low, p * w.s + high):
                collected[0, j] = collected[1, j] = 0.0
        if task == WHOLE:
            a, b = group_of(w, owner, 0)
            weights = range_of_weights(w, steps, arrays[WEIGHT], a, b)
        else:
            weights = arrays[RANGES][2 * owner], arrays[RANGES][2 * owner + 1]
        for sharer in range(first, last):
            a, b = group_of(w, owner, sharer)
            if task == WHOLE and w.training:
                for segment in range(w.segments):
                    run_sums(w, steps, arrays, (a, b, 1), segment, True, tiles)
            group_terms(w, steps, arrays, (a, b), weights, True, terms, 0)
            for p in range(plane, planes):
                apply_cells(w, steps, arrays, (a, b, p), (low, high), terms, collected, tiles)


# --- Columns --------------------------------------------------------------------------------------


@within
def columns(task, begin, end, turn, numbers, steps, arrays):
    """Items [begin, end), or segments of items, of groups side by side."""
    w = back_walk_of(numbers)
    tiles = tiles_of(arrays[TILES], turn, w, 4 * w.width)
    own = part(arrays[TILES], turn * w.tiles + 12 * w.width, (OF_COLUMN, w.width))
    terms = part(arrays[ROOM], turn * w.room, (TERMS + 1, w.width))
    for i in range(begin, end):
        item, first = (i, 0) if task == WHOLE else (i // w.segments, i % w.segments)
        last = w.segments if task == WHOLE else first + 1
        outer, c = item // w.chunks, item % w.chunks * w.width
        place = outer // w.b, outer % w.b, c, min(w.width, w.c - c)
        column_terms(w, steps, arrays, place, False, terms, own)
        if task != STEP:
            for segment in range(first, last):
                columns_sums(w, steps, arrays, place, segment, terms, own, tiles)
        if task != ADD_UP:
            column_terms(w, steps, arrays, place, True, terms, own)
            for segment in range(first, last):
                columns_apply(w, steps, arrays, place, segment, terms, own, tiles)


# --- The kernels ----------------------------------------------------------------------------------
# Closures over a number: Numba keeps them on disk under another key when a file has changed.


def compile_planes(sources: int) -> tuple[Any, Any]:
    """The kernel of runs with one weight each, for one thread and for several."""

    @njit(**KERNEL)
    def alone(task, items, numbers, steps, arrays):
        if sources != 0:
            planes(task, 0, items, 0, numbers, steps, arrays)

    @njit(parallel=True, **KERNEL)
    def shared(task, items, numbers, steps, arrays, turns):
        for i in prange(turns):
            if sources != 0:
                begin, end = items * i // turns, items * (i + 1) // turns
                planes(task, begin, end, i, numbers, steps, arrays)

    return alone, shared


def compile_rows(sources: int) -> tuple[Any, Any]:
    """The kernel of runs along which the weight differs."""

    @njit(**KERNEL)
    def alone(task, items, numbers, steps, arrays):
        if sources != 0:
            rows(task, 0, items, 0, numbers, steps, arrays)

    @njit(parallel=True, **KERNEL)
    def shared(task, items, numbers, steps, arrays, turns):
        for i in prange(turns):
            if sources != 0:
                begin, end = items * i // turns, items * (i + 1) // turns
                rows(task, begin, end, i, numbers, steps, arrays)

    return alone, shared


def compile_columns(sources: int) -> tuple[Any, Any]:
    """The kernel of columns."""

    @njit(**KERNEL)
    def alone(task, items, numbers, steps, arrays):
        if sources != 0:
            columns(task, 0, items, 0, numbers, steps, arrays)

    @njit(parallel=True, **KERNEL)
    def shared(task, items, numbers, steps, arrays, turns):
        for i in prange(turns):
            if sources != 0:
                begin, end = items * i // turns, items * (i + 1) // turns
                columns(task, begin, end, i, numbers, steps, arrays)

    return alone, shared


PLANES, ROWS, COLUMNS = (
    compiler(SOURCES) for compiler in (compile_planes, compile_rows, compile_columns)
)
