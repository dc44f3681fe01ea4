"""How much a kernel takes at a time, and what it is told of a forward pass.

Everything it needs to know is in one record, `PASS`; an operand of it is known by the address of
its first element and the bytes to the next along each of the five dimensions (`forward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from fastnorm._numba.memory import COUNTERS, inner, read

BLOCK = 4096  # elements of a run whose moments are taken at once: fits L1
PIECE = 16  # blocks that one thread takes when a group is shared out
CHAIN = 256  # doubles before the lanes are added up: short chains round less
CHUNK = 2048  # elements that are stepped at once where more than one loop goes over them
BUNDLE = 16  # groups of runs that are taken side by side, at most
BESIDE = 4096  # elements of them, at most
ALONE = 256  # elements of a row that is not worth taking with others
SHORT = 2048  # elements of a row whose step waits for the sums of the next
PAST = 256  # elements that go past the caches at a time where more than one loop goes over them
AWAITED = 1 << 18  # bytes of a group, at most, beside which the next one fits in L2
NEARBY = 4096  # bytes: runs shorter than this are walked in the order of memory
ABREAST = 512  # columns up to this number are taken as whole rows
COLUMNS = 256  # of more, so many are taken side by side, at most (or one group of neighbours)
SQUARE = 16384  # elements of a block of columns: fits L2
PIECE_ROWS = 1024  # rows that one thread takes
FIELDS = 5  # numbers of moments
SCALE = 8  # numbers of the scale of a group

RSTD, NORM, FACTOR = 0, 1, 2  # problem.Scaling
WHOLE, MOMENTS, FINISH, STEPS = range(4)  # what a kernel is asked to do

Field: TypeAlias = tuple[str, Any]
OPERAND = np.dtype([(name, np.int64) for name in ("data", "a", "b", "p", "s", "c")])
OPERANDS = (
    "x", "y", "mask", "weight", "bias", "residual", "addend", "total", "mean", "var", "rstd",
)  # fmt: skip
NUMBERS = (
    "a", "b", "p", "s", "c", "neighbours", "columns", "centred", "given", "scaling", "activation",
    "activation_first", "stream", "residual_real", "addend_real", "foldable", "folded_groups",
    "whole_sums", "whole_steps", "length", "width", "chunks", "items", "block", "pieces", "parts",
    "scales", "plain", "direct", "fields", "raised", "kept",
    "alone", "past", "relu",
)  # fmt: skip


def record_of(operands: Sequence[str], numbers: Sequence[str], *more: Field) -> np.dtype[Any]:
    """The dtype of a record: counters, then operands, whole numbers, and what else there is."""
    fields: list[Field] = [(name, np.int64) for name in COUNTERS]
    fields += [(name, OPERAND) for name in operands]
    return np.dtype([*fields, *((name, np.int64) for name in numbers), *more])


PASS = record_of(OPERANDS, NUMBERS, ("eps", np.float64))


@inner
def at(o, a, b):
    """Where an operand keeps what belongs to group (a, b)."""
    return o.data + a * o.a + b * o.b


@inner
def chosen(q, mask, p, s, c):
    """Whether an element enters the statistics of its group; `mask` is where its begins, or 0."""
    return mask == 0 or read(mask + p * q.mask.p + s * q.mask.s + c * q.mask.c, 0, np.uint8) != 0
