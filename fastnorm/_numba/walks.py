"""How a kernel finds its way: five dimensions, and the steps of each operand along them.

    a, b   kept axes: each (a, b) has statistics of its own
    p, s   reduced axes: the elements (p, s) share a statistic
    c      columns: neighbours in memory with a statistic each, or `neighbours` with one together

With one column a group is a list of contiguous *runs*; with many, rows of columns (layout.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastnorm._numba.compiling import inner

# Arrays of a pass. The first of them have steps: a row along a, b, p, s and c, and where it begins.
OPERANDS = ("x", "y", "residual", "mask", "weight", "bias", "addend", "first")
ARRAYS = (*OPERANDS, "mean", "var", "rstd")
X, Y, RESIDUAL, MASK, WEIGHT, BIAS, ADDEND, FIRST, STATS = range(9)
MEAN_OF, VAR_OF, RSTD_OF = range(8, 11)  # they lie alike
PARTS, RAISED, ROOM, TILES, ACTIVATION = range(11, 16)

STEPS = 6


class Walk(NamedTuple):
    """What a kernel is told of a pass but for its arrays."""

    a: int
    b: int
    p: int
    s: int
    c: int
    neighbours: int
    shared: int  # columns that have one weight
    columns: int
    run: int  # elements of x that follow one another
    length: int  # elements of a group, or its rows
    width: int  # columns of an item
    chunks: int  # items side by side
    split: int  # elements or rows that are summed up at a time
    splits: int
    joined: int  # rows that follow one another and are applied as one
    folded: int  # a weight is one number for a run or a column
    plain: int  # there is nothing to do after the affine step
    direct: int  # y is written where it lies, not through a tile
    written: int  # there is a y
    centred: int
    given: int
    scaling: int
    masked: int
    weighted: int  # whether there is a weight or a bias
    residual: int
    added: int
    activation: int
    activation_first: int
    room: int  # numbers of float64 that a thread needs
    tiles: int  # and of what is computed in


@inner
def walk_of(n):
    """The same, of an array."""
    return Walk(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13],
        n[14], n[15], n[16], n[17], n[18], n[19], n[20], n[21], n[22], n[23], n[24], n[25], n[26],
        n[27], n[28], n[29],
    )  # fmt: skip


@inner
def at(steps, operand, a, b, p, s, c):
    """Where an operand keeps an element."""
    return np.uintp(
        steps[operand, 0] * a + steps[operand, 1] * b + steps[operand, 2] * p
        + steps[operand, 3] * s + steps[operand, 4] * c + steps[operand, 5]
    )  # fmt: skip
