"""What kernels are told and hold: where operands lie, and which part of them is a thread's.

A pass comes as `layout.describe` has it: kept (a, b), reduced (p, s), columns c, and the strides of
every operand. These numbers are in the GPU's memory (the plan). Records are named tuples of whole
numbers: Numba hands them to kernels, the simulator too, and compiles them to registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastnorm._numba.gpu.blocking import LANES, ROWS
from fastnorm._numba.gpu.elements import chunk_loader, read_word
from fastnorm._numba.gpu.package import cuda, device

Function = Callable[..., Any]

# What a plan holds: five dimensions, how many columns share a statistic, five strides per operand.
A, B, P, S, C, ADJACENT, STRIDES = range(7)
# The operands of a forward plan, and those of a backward one.
(X, Y, OTHER, TOTAL, MASK, WEIGHT, BIAS, STATS) = range(8)
(BX, BDY, BDX, BWEIGHT, BSTATS, BSUMS) = range(6)


# --- Records: the arguments of kernels ------------------------------------------------------------


class Walk(NamedTuple):
    """How a kernel walks over its operands."""

    plan: Any  # the address of the layout's numbers
    aligned: Any  # whether whole chunks of every operand may be loaded and stored at once
    groups: Any
    parts: Any  # of a group
    size: Any  # of a part: chunks, or rows


class Operands(NamedTuple):
    """Addresses of a forward pass; 0 for what is not there. `total` is where x + other goes."""

    x: Any
    y: Any
    other: Any
    total: Any
    mask: Any
    weight: Any
    bias: Any


class Statistics(NamedTuple):
    """Addresses of the statistics of groups, float64 that lie alike."""

    mean: Any
    var: Any
    rstd: Any


class Options(NamedTuple):
    """The scalars of a forward pass."""

    eps: Any
    centred: Any
    scaling: Any  # `problem.Scaling`


class BackwardOperands(NamedTuple):
    """Addresses of a backward pass; 0 for what is not there. Mean and rstd lie alike."""

    x: Any
    dy: Any
    dx: Any
    weight: Any
    mean: Any
    rstd: Any


class Sums(NamedTuple):
    """Addresses of the sums of g and of g xhat, g = weight dy: float64 that lie alike."""

    g: Any
    gx: Any


# --- Records: what a thread holds -----------------------------------------------------------------


class View(NamedTuple):
    """A group's, or a tile's, operand: its address (0: not there) and strides in elements."""

    address: Any
    p: Any
    s: Any
    c: Any


class Place(NamedTuple):
    """A chunk of an operand: its address, an index, and the stride from number to number."""

    address: Any
    index: Any
    stride: Any


class Share(NamedTuple):
    """A thread's share of runs of s numbers, `cols` chunks each: chunks first, ... < high."""

    s: Any
    cols: Any
    first: Any
    high: Any
    aligned: Any


class Tile(NamedTuple):
    """A thread's share of columns: n of them, rows first, first + ROWS, ... < high, as (p, s)."""

    s: Any
    first: Any
    high: Any
    n: Any
    aligned: Any


class Corner(NamedTuple):
    """Where a block of columns begins."""

    a: Any
    b: Any
    part: Any
    column: Any


# --- Where things lie -----------------------------------------------------------------------------


@device
def lesser(a: Any, b: Any) -> Any:
    """The lesser of two: `min` of two numbers fails to compile for Numba's own `cuda` (0.68)."""
    return a if a < b else b


@device
def greater(a: Any, b: Any) -> Any:
    """The greater of two."""
    return a if a > b else b


@device
def divided(n: Any, by: Any) -> Any:
    """Quotient and remainder, without a division where there is nothing to divide."""
    if n < by:
        return np.int64(0), np.int64(n)
    quotient = np.int64(n) // np.int64(by)
    return quotient, np.int64(n) - quotient * np.int64(by)


@device
def onward(row: Any, col: Any, cols: Any) -> Any:
    """(row, col) where col may have passed the end of a row by less than a row."""
    if col >= cols:
        return row + 1, col - cols
    return row, col


@device
def base(plan: Any, operand: Any, a: Any, b: Any) -> Any:
    """Elements from an operand's first to that of group (a, b)."""
    at = STRIDES + 5 * operand
    return a * read_word(plan, at + A) + b * read_word(plan, at + B)


@device
def stride(plan: Any, operand: Any, axis: Any) -> Any:
    """Elements from one index along an axis to the next."""
    return read_word(plan, STRIDES + 5 * operand + axis)


@device
def view_of(plan: Any, operand: Any, address: Any, size: Any, a: Any, b: Any, column: Any) -> Any:
    """An operand from column `column` of group (a, b) on; `size` is that of an element in bytes."""
    c = stride(plan, operand, C)
    offset = (base(plan, operand, a, b) + column * c) * size if address != 0 else np.int64(0)
    return View(
        np.int64(address + offset), stride(plan, operand, P), stride(plan, operand, S), c
    )  # fmt: skip


@device
def statistic(plan: Any, operand: Any, group: Any) -> Any:
    """Where what an operand has for a group, counted in the order (a, b, c), lies."""
    per_row = read_word(plan, C) // read_word(plan, ADJACENT)
    outer, c = divided(group, per_row)
    a, b = divided(outer, read_word(plan, B))
    return base(plan, operand, a, b) + c * stride(plan, operand, C)


# --- Runs -----------------------------------------------------------------------------------------


@device
def counted(chunks: Any, share: Any, width: Any) -> Any:
    """How many numbers the first so many chunks hold."""
    row, col = divided(chunks, share.cols)
    return row * share.s + lesser(col * width, share.s)


@cache
def run_fetcher(kind: str, real: Any, width: int, depth: int, team: int) -> Function:
    """A function that reads a thread's next `depth` chunks: of chunk i, at (row, col), on.

    All loads come before the first use, so that enough bytes are under way.
    """
    load_chunk = chunk_loader(kind, real, width)

    @device
    def fetch(view: Any, share: Any, i: Any, row: Any, col: Any, into: Any) -> None:
        rows, jump = divided(team, share.cols)
        for j in range(depth):
            if i < share.high:
                start = col * width
                n = lesser(np.int64(width), share.s - start)
                load_chunk(
                    view.address, row * view.p + start, n, share.aligned, into, j * width
                )  # fmt: skip
            i += team
            row, col = onward(row + rows, col + jump, share.cols)

    return fetch


# --- Columns --------------------------------------------------------------------------------------


@device
def corner_of(plan: Any, parts: Any, width: Any) -> Any:
    """The tile of this block: LANES chunks of columns, some of the rows."""
    tiles = (read_word(plan, C) + (LANES * width - 1)) // (LANES * width)
    rest, tile = divided(np.int64(cuda.blockIdx.x), tiles)
    outer, part = divided(rest, parts)
    a, b = divided(outer, read_word(plan, B))
    return Corner(a, b, part, tile * LANES * width)


@device
def tile_of(walk: Any, corner: Any, tid: Any, width: Any) -> Any:
    """What this thread takes of its block's tile; `n` is 0 beyond the last column."""
    n = read_word(walk.plan, C) - corner.column - tid % LANES * width
    low = corner.part * walk.size
    high = lesser(low + walk.size, read_word(walk.plan, P) * read_word(walk.plan, S))
    return Tile(
        read_word(walk.plan, S),
        np.int64(low + tid // LANES),
        np.int64(high),
        np.int64(greater(np.int64(0), lesser(np.int64(width), n))),
        np.int64(walk.aligned),
    )


@cache
def column_fetcher(kind: str, real: Any, width: int, depth: int) -> Function:
    """A function that reads a thread's next `depth` chunks of columns: rows i, i + ROWS, ..."""
    load_chunk = chunk_loader(kind, real, width)

    @device
    def fetch(view: Any, tile: Any, i: Any, into: Any) -> None:
        for j in range(depth):
            if i < tile.high:
                p, q = divided(i, tile.s)
                at = p * view.p + q * view.s
                load_chunk(view.address, at, tile.n, tile.aligned, into, j * width)
            i += ROWS

    return fetch
