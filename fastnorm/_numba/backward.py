"""The backward pass, on the same five dimensions as the forward one: a twin of _core's.

    xhat = (x - mean) rstd            g = dy weight
    dx = rstd (g - sum(g)/count - xhat sum(g xhat)/count)        sums over a group
    dweight = sum(dy xhat)            dbias = sum(dy)            sums over what shares a weight

Where a weight is one number for a run, or a column, its two sums are those of whole planes, or of
segments of columns: they are kept in `sums`, serve the group, and are added up for the weight when
all is done. Where the weight differs along a run (layer and RMS norm), each element is a *cell*:
the group's sums are taken first and the weight's are collected with dx, by `parts` of those that
share it, whose number depends on the shape alone.

What a float32 cannot hold is computed in float64: sums that leave its range on the way, and dx
of a group that is *out of range*: by its statistics, its sums or its weights.
"""

from __future__ import annotations

from typing import Any

from numba import cfunc

from fastnorm._numba.back_columns import columns
from fastnorm._numba.back_rows import planes, rows
from fastnorm._numba.memory import KERNEL, STRICT


def compile_planes(kind: type, stored: type, computed: type, sources: int) -> Any:
    """The kernel of runs with one weight each, for x of a kind and dy of its own."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_planes(record, memory, turn, turns, task):
        if sources != 0:
            planes(record, memory, turn, turns, task, kind, stored)

    return kernel_of_planes


def compile_rows(kind: type, stored: type, computed: type, sources: int) -> Any:
    """The kernel of runs along which the weight differs, for x of a kind and dy of its own."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_rows(record, memory, turn, turns, task):
        if sources != 0:
            rows(record, memory, turn, turns, task, kind, stored)

    return kernel_of_rows


def compile_columns(kind: type, stored: type, computed: type, sources: int) -> Any:
    """The kernel of columns, for x of a kind and dy of its own."""

    @cfunc(KERNEL, cache=True, **STRICT)
    def kernel_of_columns(record, memory, turn, turns, task):
        if sources != 0:
            columns(record, memory, turn, turns, task, kind, stored, computed)

    return kernel_of_columns
