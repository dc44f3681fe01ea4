"""What a kernel is told of every call of a kind: numbers and steps, but no array."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastnorm._numba import backward
from fastnorm._numba.apply import COLUMNS as OF_COLUMN
from fastnorm._numba.column_gradients import OF_COLUMN as OF_COLUMN_BACK
from fastnorm._numba.gradients import TERMS
from fastnorm._numba.moments import FIELDS, SUMS
from fastnorm._numba.operands import steps_of
from fastnorm._numba.walks import OPERANDS, Walk
from fastnorm.layout import Layout
from fastnorm.schedule import (
    BACKWARD_CHUNK,
    BLOCK,
    MIN_BLOCK_ROWS,
    NUMBA_JOINED,
    NUMBA_TILE,
    SHORT_RUN_BYTES,
    SPLIT_BLOCKS,
    TILE_GROUPS,
    BackwardSchedule,
    ForwardSchedule,
)

Array = NDArray[Any]


class Asked(NamedTuple):
    """What is asked of a forward pass, without its arrays."""

    operands: tuple[str, ...]
    centred: bool = True
    given: bool = False
    scaling: int = 0
    activation: bool = False
    activation_first: bool = False


class Plan(NamedTuple):
    """What a kernel is told of every pass of a layout."""

    numbers: Array
    steps: Array
    items: int
    splits: int
    parts: tuple[int, ...]  # shape of the moments of all splits
    room: int  # numbers of float64 that a thread needs
    tiles: int  # and of what is computed in
    double: bool  # which is float64
    schedule: ForwardSchedule


@lru_cache(maxsize=4096)
def plan_of(layout: Layout, schedule: ForwardSchedule, size: int, asked: Asked) -> Plan:
    a, b, p, s, c = layout.dims
    blocking, steps, own = schedule.blocking, layout.strides, asked.operands
    masked, columns = "mask" in own, layout.columns
    weighted = "weight" in own or "bias" in own
    x = steps["x"]
    width = schedule.width if columns else 1
    joined = 1
    full = [steps[name][3] == c == width for name in ("x", "y", "residual") if name in own]
    alone = weighted and (asked.activation_first or not schedule.foldable)
    if columns and all(full) and not alone:
        joined = max(1, min(NUMBA_JOINED // c, s))
    chunks = schedule.chunks if columns else b
    folded = schedule.foldable and not asked.activation_first
    lanes = width * joined
    rows = max(MIN_BLOCK_ROWS * width, lanes)
    walk = Walk(
        a, b, p, s, c,
        neighbours=layout.neighbours,
        shared=layout.neighbours if layout.shared else 1,
        columns=columns,
        run=blocking.length if p == 1 or x[2] == s else s,
        length=blocking.length,
        width=width,
        chunks=chunks,
        split=blocking.split_length,
        splits=blocking.splits,
        joined=joined,
        folded=folded,
        plain=not ("residual" in own or asked.activation or asked.activation_first),
        direct=size > 2,
        written="y" in own,
        centred=asked.centred,
        given=asked.given,
        scaling=asked.scaling,
        masked=masked,
        weighted=weighted,
        residual="residual" in own,
        added="addend" in own,
        activation=asked.activation,
        activation_first=asked.activation_first,
        room=SUMS * width + FIELDS * width * (1 + blocking.splits),
        tiles=rows + (1 + OF_COLUMN) * lanes if columns else 2 * NUMBA_TILE,
    )  # fmt: skip
    own_steps = [steps_of(steps[name] if name in own else None, layout.dims) for name in OPERANDS]
    items = a * chunks * (b if columns else 1)
    return Plan(
        np.array(walk, np.int64),
        np.array([*own_steps, steps_of(steps["stats"], layout.dims)], np.int64),
        items,
        blocking.splits,
        (items, blocking.splits, FIELDS, width),
        walk.room,
        walk.tiles,
        size == 8,
        schedule,
    )


class BackPlan(NamedTuple):
    """What a kernel is told of every backward pass of a layout."""

    numbers: Array
    steps: Array
    kernel: Any
    items: int
    segments: int  # of an item, which threads share where items are few; of rows, of a group
    turns: int  # and what they share afterwards
    sums: tuple[int, ...]  # the shape of the sums
    axes: tuple[int, ...]  # along which they are added up
    collected: tuple[int, ...]  # of what is collected with dx, where weights differ inside
    owners: tuple[int, ...]
    room: int
    tiles: int
    schedule: BackwardSchedule


@lru_cache(maxsize=4096)
def back_plan_of(
    layout: Layout, schedule: BackwardSchedule, size: int, asked: tuple[bool, bool, bool]
) -> BackPlan:
    centred, training, weighted = asked
    numeric, steps = schedule.blocking, layout.strides
    a, b, p, s, c = layout.dims
    shared = steps["dweight"]
    inside, segments = numeric.inside, numeric.segments
    planes = sharers = parts = chunks = width = 1
    cells = 0
    owners: tuple[int, ...] = ()
    if layout.columns:
        width, chunks = numeric.width, numeric.chunks
        kernel, items, turns = backward.COLUMNS, a * b * chunks, a * b * chunks * segments
        sums: tuple[int, ...] = (a, b, segments, 2, c)
        room, tiles = (TERMS + 1) * width, (12 + OF_COLUMN_BACK) * width
    elif inside:
        owners = (a if shared[0] else 1, b if shared[1] else 1, p if shared[2] else 1)
        items = owners[0] * owners[1]
        sharers, cells, parts = a * b // items, owners[2] * s, numeric.parts
        kernel, turns = backward.ROWS, items * owners[2] * -(-s // BACKWARD_CHUNK)
        sums, room, tiles = (a, b, 1, segments, 2), TERMS, 3 * NUMBA_TILE
    else:
        if shared[2] and p > 1:
            planes, segments = p, segments // p
        if p > 1 and s * size < SHORT_RUN_BYTES:
            # short planes of several groups as they lie in memory
            width = max(1, min(SPLIT_BLOCKS * BLOCK // (p * s), b, TILE_GROUPS))
        chunks = -(-b // width)
        kernel, items = backward.PLANES, a * chunks
        turns = items * planes * segments
        sums, room, tiles = (a, b, planes, segments, 2), TERMS * width, 3 * NUMBA_TILE
    own = [axis for axis in range(5) if shared[axis] != 0]
    if layout.columns:
        axes = tuple(axis for axis in (0, 1) if axis not in own)
        axes += (2,) if shared[4] else (2, 4)
    else:
        axes = tuple(axis for axis in (0, 1, 2) if axis not in own) + (3,)
    walk = backward.BackWalk(
        a, b, p, s, c,
        neighbours=layout.neighbours,
        run=s,
        length=numeric.length,
        width=width,
        chunks=chunks,
        planes=planes,
        segments=segments,
        span=numeric.span,
        training=training,
        centred=centred,
        weighted=weighted,
        own_a=shared[0] != 0,
        own_b=shared[1] != 0,
        along_p=shared[2] != 0,
        sharers=sharers,
        parts=parts,
        cells=cells,
        chunk=BACKWARD_CHUNK,
        room=room,
        tiles=tiles,
    )  # fmt: skip
    names = ("x", "dy", "dx", "factor", "stats")
    rows = [steps_of(steps.get(name), layout.dims) for name in names]
    return BackPlan(
        np.array(walk, np.int64), np.array(rows, np.int64), kernel, items,
        a * b * segments if inside else turns, turns, sums, axes, (items, parts, 2, cells), owners,
        room, tiles, schedule,
    )  # fmt: skip
