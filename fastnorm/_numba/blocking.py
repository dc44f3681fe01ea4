"""What a kernel is told of a forward pass.

Everything it needs to know is in one record, `PASS`; an operand of it is known by the address of
its first element and the bytes to the next along each of the five dimensions (`forward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from fastnorm._numba.memory import COUNTERS, inner, read
from fastnorm.problem import OPERANDS

FIELDS = 5  # numbers of moments
SCALE = 8  # numbers of the scale of a group

RSTD, NORM, FACTOR = 0, 1, 2  # problem.Scaling
WHOLE, MOMENTS, FINALIZE, APPLY = range(4)  # what a kernel is asked to do

Field: TypeAlias = tuple[str, Any]
OPERAND = np.dtype([(name, np.int64) for name in ("data", "a", "b", "p", "s", "c")])
ADDRESSES = (*OPERANDS, "mean", "var", "rstd")
NUMBERS = (
    "a", "b", "p", "s", "c", "neighbours", "columns", "centred", "given", "scaling", "activation",
    "activation_first", "non_temporal", "residual_real", "addend_real", "foldable", "folded_groups",
    "whole_sums", "whole_output", "length", "width", "chunks", "items", "block", "splits", "parts",
    "scales", "plain", "direct", "fields", "raised", "kept",
    "alone", "direct_non_temporal", "relu", "shared",
)  # fmt: skip


def record_of(operands: Sequence[str], numbers: Sequence[str], *more: Field) -> np.dtype[Any]:
    """The dtype of a record: counters, then operands, whole numbers, and what else there is."""
    fields: list[Field] = [(name, np.int64) for name in COUNTERS]
    fields += [(name, OPERAND) for name in operands]
    return np.dtype([*fields, *((name, np.int64) for name in numbers), *more])


PASS = record_of(ADDRESSES, NUMBERS, ("eps", np.float64))


@inner
def at(o, a, b):
    """Where an operand keeps what belongs to group (a, b)."""
    return o.data + a * o.a + b * o.b


@inner
def chosen(q, mask, p, s, c):
    """Whether an element enters the statistics of its group; `mask` is where its begins, or 0."""
    return mask == 0 or read(mask + p * q.mask.p + s * q.mask.s + c * q.mask.c, 0, np.uint8) != 0
