"""The walk over memory that a pass takes, for its kernels: in the order that they can walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastnorm._numba.gpu import blocking
from fastnorm._numba.gpu.blocking import BLOCK, CHUNK, LANES, WARP, blocks_of, parts_of
from fastnorm._numba.gpu.launch import address
from fastnorm._numba.gpu.views import Walk
from fastnorm.arrays import ArrayView, broadcast_to
from fastnorm.layout import Layout, ascending, layout_of


def numbers_of(layout: Layout, names: Sequence[str]) -> list[int]:
    """What a plan holds of these operands."""
    numbers = [*layout.dims, layout.neighbours]
    for name in names:
        numbers += layout.strides.get(name, (0,) * 5)
    return numbers


def is_aligned(layout: Layout, width: int, operands: dict[str, ArrayView]) -> bool:
    """Whether every chunk of every operand begins at a multiple of 16 bytes, or of its own size."""
    inner = 4 if layout.columns else 3
    for name, array in operands.items():
        strides = layout.strides[name]
        steps = [s for axis, s in enumerate(strides) if axis != inner and layout.dims[axis] > 1]
        chunk = min(CHUNK, width * array.itemsize)
        if strides[inner] == 0:
            continue  # one number for all
        if address(array) % chunk or any(step * array.itemsize % chunk for step in steps):
            return False
    return True


def walk_of(layout: Layout, plan: int, width: int, aligned: bool) -> tuple[Walk, int, int]:
    """How the kernels of a pass walk, how many blocks they take, and a team's threads."""
    a, b, rows, s, columns = layout.dims
    if layout.columns:
        groups = a * b * (columns // layout.neighbours)
        parts, size = parts_of(rows * s, blocking.PART_ROWS, blocking.MAX_ROW_PARTS)
        blocks = a * b * parts * blocks_of(columns, LANES * width)
        return Walk(plan, int(aligned), groups, parts, size), blocks, BLOCK
    chunks = rows * -(-s // width)
    team = WARP if chunks <= blocking.WARP_CHUNKS else BLOCK
    parts, size = parts_of(chunks, blocking.PART_CHUNKS, blocking.MAX_PARTS)
    blocks = blocks_of(a * b * parts, BLOCK // team)
    return Walk(plan, int(aligned), a * b, parts, size), blocks, team


def described(
    operands: dict[str, Any], reduced: tuple[bool, ...], kept: Sequence[str], written: Sequence[str]
) -> tuple[Layout, dict[str, Any], Callable[[], None]]:
    """The walk, the operands in its order, and what to call when those `written` are there.

    An order of axes that the kernels cannot walk is put into another, kept axes first, in copies of
    all operands but those `kept` as they are.
    """
    operands = ascending(operands)
    layout = layout_of(operands, reduced, sharing=False)
    if layout is not None:
        return layout, operands, lambda: None
    order = sorted(range(len(reduced)), key=lambda axis: reduced[axis])
    back = [order.index(axis) for axis in range(len(order))]
    shape = tuple(operands["x"].shape[axis] for axis in order)
    moved: dict[str, Any] = {}
    for name, array in operands.items():
        moved[name] = array.transpose(order)
        if name not in kept:
            if name not in written:  # a parameter of every element's own
                moved[name] = broadcast_to(moved[name], shape)
            moved[name] = moved[name].copy()
    layout = layout_of(moved, tuple(sorted(reduced)), sharing=False)
    assert layout is not None, "contiguous operands always have a layout"

    def write_back() -> None:
        for name in written:
            if name in moved:
                into = operands[name]
                into.device.convert(moved[name].transpose(back), into)

    return layout, moved, write_back
