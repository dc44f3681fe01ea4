"""The forward pass, on the five dimensions that layout.py finds: a twin of the kernels in _core.

    a, b   kept axes: each (a, b) has statistics of its own
    p, s   reduced axes: the elements (p, s) share a statistic
    c      columns: neighbours in memory with a statistic each, or `neighbours` with one together

With one column the innermost axis is s and a group is a list of contiguous *runs*; with many it is
c. Both do the same three things, block by block: moments, merge, apply. Blocks and splits depend on
the shape alone and are merged in their order, so that results do not depend on the threads.

Everything a kernel needs to know is in one record, `PASS`; memory is known by its address, and so
is an activation: a compiled loop that is called for a tile in L1 (`activations`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc
from numba.extending import register_jitable

from fastnorm._numba.blocking import APPLY, FIELDS, FINALIZE, MOMENTS, PASS, SCALE, WHOLE
from fastnorm._numba.columns import apply_columns, columns_moments, spread
from fastnorm._numba.extents import part_at
from fastnorm._numba.memory import KERNEL, STRICT, fence, merged, record_at, take
from fastnorm._numba.moments import merge_into
from fastnorm._numba.rows import rows
from fastnorm._numba.runs import apply_runs, runs_moments
from fastnorm._numba.scales import finalize
from fastnorm.schedule import APPLY_ELEMENTS, BLOCK, LANES

# --- Runs -----------------------------------------------------------------------------------------


@register_jitable
def runs_parts(width, kept):
    """Numbers of each part of a thread's memory: three moments, scales, sums, tile, spare, kept."""
    moments = FIELDS * width
    return (
        moments, moments, moments, SCALE * width, 2 * width + 4 * LANES, BLOCK, APPLY_ELEMENTS, kept
    )  # fmt: skip


@merged
def runs(record, memory, turn, turns, task, kind, tiled):
    """What `task` asks for, of all items or splits of items; each turn is taken by one thread."""
    q = record_at(record, PASS)
    width = q.width
    kinds = kind, tiled
    total = q.items if task == WHOLE or task == FINALIZE else q.items * q.splits
    room = runs_parts(width, q.kept)
    whole, part, other = (
        part_at(memory, room, 0),
        part_at(memory, room, 1),
        part_at(memory, room, 2),
    )
    own, work, tile = part_at(memory, room, 3), part_at(memory, room, 4), part_at(memory, room, 5)
    spare, kept = part_at(memory, room, 6), part_at(memory, room, 7)
    while turn < turns:
        if q.alone:
            begin, end = total * turn // turns, total * (turn + 1) // turns
            own_room = whole, own, work + 16 * width, tile, spare, kept
            rows(q, begin, end, own_room, kinds)
            turn = take(record)
            continue
        for i in range(total * turn // turns, total * (turn + 1) // turns):
            item = i if task == WHOLE or task == FINALIZE else i // q.splits
            a = item // q.chunks
            b = (item - a * q.chunks) * width
            n = min(width, q.b - b)
            place = a, b, n
            scale = own
            if task == MOMENTS:
                into = q.parts + i * 8 * FIELDS * width
                runs_moments(q, place, i - item * q.splits, into, part, (work, tile), kinds)
                continue
            if q.scales != 0:
                scale = q.scales + item * 8 * SCALE * width
            if task == FINALIZE:
                merged = q.parts + item * q.splits * 8 * FIELDS * width
                if not q.given:
                    for split in range(1, q.splits):
                        merge_into(merged, merged + split * 8 * FIELDS * width, n, n)
                finalize(q, a, b, np.int64(0), n, merged, scale, kind)
            elif task == APPLY:
                apply_runs(q, place, i - item * q.splits, scale, (tile, spare), kinds)
            else:
                if q.given and q.scales != 0:
                    scale = q.scales + (item - a * q.chunks) * 8 * SCALE * width
                else:
                    if not q.given:
                        runs_moments(q, place, np.int64(0), whole, part, (work, tile), kinds)
                        for split in range(1, q.splits):
                            runs_moments(q, place, split, other, part, (work, tile), kinds)
                            merge_into(whole, other, n, n)
                    finalize(q, a, b, np.int64(0), n, whole, scale, kind)
                if q.y.data != 0:
                    for split in range(q.splits):
                        apply_runs(q, place, split, scale, (tile, spare), kinds)
        turn = take(record)
    if q.non_temporal:
        fence()


# --- Columns --------------------------------------------------------------------------------------


@register_jitable
def columns_parts(width):
    """Numbers of each part: four moments, scales, three sums, what goes along, tile, spare.

    Along with a row go four numbers for each column, and its weights and biases.
    """
    moments = FIELDS * width
    return (
        moments, moments, moments, moments, SCALE * width, 3 * width, 6 * width, width, width
    )  # fmt: skip


@merged
def columns(record, memory, turn, turns, task, kind, tiled):
    """What `task` asks for, of all items or splits of items; each turn is taken by one thread."""
    q = record_at(record, PASS)
    width = q.width
    kinds = kind, tiled
    total = q.items if task == WHOLE or task == FINALIZE else q.items * q.splits
    room = columns_parts(width)
    whole, part, other = (
        part_at(memory, room, 0),
        part_at(memory, room, 1),
        part_at(memory, room, 2),
    )
    every, own, work = part_at(memory, room, 3), part_at(memory, room, 4), part_at(memory, room, 5)
    along, tile = part_at(memory, room, 6), part_at(memory, room, 7)
    spare = part_at(memory, room, 8)
    while turn < turns:
        for i in range(total * turn // turns, total * (turn + 1) // turns):
            item = i if task == WHOLE or task == FINALIZE else i // q.splits
            outer = item // q.chunks
            c = (item - outer * q.chunks) * width
            a = outer // q.b
            b = outer - a * q.b
            n = min(width, q.c - c)
            groups = n // q.neighbours
            place = a, b, c, n
            sums_room = part, every, work
            scale = own
            if task == MOMENTS:
                into = q.parts + i * 8 * FIELDS * width
                columns_moments(q, place, i - item * q.splits, into, sums_room, kind)
                continue
            if q.scales != 0:
                scale = q.scales + item * 8 * SCALE * width
            if task == FINALIZE:
                merged = q.parts + item * q.splits * 8 * FIELDS * width
                if not q.given:
                    for split in range(1, q.splits):
                        merge_into(merged, merged + split * 8 * FIELDS * width, groups, groups)
                finalize(q, a, b, c, groups, merged, scale, kind)
                continue
            if task == WHOLE:
                if not q.given:
                    columns_moments(q, place, np.int64(0), whole, sums_room, kind)
                    for split in range(1, q.splits):
                        columns_moments(q, place, split, other, sums_room, kind)
                        merge_into(whole, other, groups, groups)
                finalize(q, a, b, c, groups, whole, scale, kind)
            if q.y.data != 0:
                any_out_of_range = spread(q, a, b, c, n, scale, along, kind)
                begin = 0 if task == WHOLE else i - item * q.splits
                end = q.splits if task == WHOLE else begin + 1
                for split in range(begin, end):
                    apply_columns(
                        q, place, split, scale, along, any_out_of_range, (tile, spare), kinds
                    )
        turn = take(record)
    if q.non_temporal:
        fence()


# --- The kernels ----------------------------------------------------------------------------------
# Closures over a kind: Numba keeps each on disk under its own key, and `SOURCES` makes that another
# when a file it was compiled from has changed.


def compile_runs(kind: type, computed: type, sources: int) -> Any:
    """The kernel of runs, for numbers of a kind."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_runs(record, memory, turn, turns, task):
        if sources != 0:
            runs(record, memory, turn, turns, task, kind, computed)

    return kernel_of_runs


def compile_columns(kind: type, computed: type, sources: int) -> Any:
    """The kernel of columns, for numbers of a kind."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_columns(record, memory, turn, turns, task):
        if sources != 0:
            columns(record, memory, turn, turns, task, kind, computed)

    return kernel_of_columns
