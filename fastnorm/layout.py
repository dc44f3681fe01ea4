"""Which axes share a statistic, and how they lie in memory.

Every norm is handed to the kernels as the same thing: an array whose axes are *kept* (each index
has statistics of its own) or *reduced* (they share them), and operands that broadcast against it.
`layout_of` sorts those axes by their place in memory, merges the ones that are one walk through
memory, and names what is left: a kept pair (a, b), a reduced pair (p, s) and columns c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from fastnorm.arrays import flip, one_of_a_batch
from fastnorm.schedule import (
    BACKWARD_MAX_PLANES,
    BACKWARD_MIN_RUN,
    BACKWARD_MIN_SAMPLE,
    BLOCK,
    MIN_RUN,
    SPLIT_BLOCKS,
)

# An operand's name, shape, strides in bytes, and bytes of an element.
Operand = tuple[str, tuple[int, ...], tuple[int, ...], int]

# Operands of the size of x. The kernels read and write them along the innermost axis.
FULL = ("x", "y", "residual", "addend", "total", "dy", "dx")
# Operands that along the innermost axis are one number, or as many numbers side by side.
PARAMETERS = ("weight", "bias", "dweight")
_ONE_FOR_ALL = {*PARAMETERS, "factor"}
# Those of which neighbours can share one, forward.
_SHARED = {"weight", "bias"}
# Operands that lie as another does: the statistics as "stats", dbias as dweight.
ALIKE = ("mean", "var", "rstd", "g", "gx", "dbias")


# `describe` keeps them: two are the same object, or differ
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Layout:
    """A pass over memory: five dimensions (a, b, p, s, c) and each operand's strides in elements.

    `columns` tells which axis is innermost: s (False: runs) or c (True). `neighbours` columns
    together have one statistic and, where `shared`, one weight and one bias, whose strides along c
    then go from one to the next.
    """

    columns: bool
    dims: tuple[int, int, int, int, int]
    neighbours: int
    strides: Mapping[str, tuple[int, ...]]
    shared: bool = False

    def sums_as(self, other: Layout | None) -> bool:
        """Whether both take the elements of a group in one order, in runs as long."""
        return other is not None and (self.columns, self.dims[2:], self.neighbours) == (
            other.columns, other.dims[2:], other.neighbours,
        )  # fmt: skip

    def goes_through_groups_as(self, other: Layout) -> bool:
        """Whether both take the elements of a group in one order, and their parameters too."""
        if self._elements() == 1:
            return True
        return (self.columns, self.dims[2:4], self.neighbours, self._along_rows()) == (
            other.columns, other.dims[2:4], other.neighbours, other._along_rows(),
        )  # fmt: skip

    def _elements(self) -> int:
        """Of a group."""
        return math.prod(self.dims[2:4]) * self.neighbours

    def _along_rows(self) -> list[bool]:
        """Along which rows parameters differ."""
        own = [name for name in self.strides if name in _ONE_FOR_ALL]
        return [step != 0 for name in own for step in self.strides[name][2:4]]


@dataclass(slots=True, eq=False, repr=False)
class _Axis:
    size: int
    reduced: bool
    strides: dict[str, int]


def ascending(operands: dict[str, Any]) -> dict[str, Any]:
    """The same walk with every stride of x positive."""
    negative = tuple(axis for axis, stride in enumerate(operands["x"].strides) if stride < 0)
    if not negative:
        return operands
    return {name: flip(array, negative) for name, array in operands.items()}


def layout_of(
    operands: Mapping[str, Any],
    reduced: tuple[bool, ...],
    *,
    copied: bool = False,
    sharing: bool = True,
) -> Layout | None:
    """The layout of a pass over these arrays, or None where no kernel can walk them as they lie.

    The first is "x", whose strides are positive. The others have as many axes, each of its length
    or 1. A batch of one is walked as it would be among others, unless all are `copied` in one
    order, in which any batch is one walk. `sharing`: whether neighbours may share a weight.
    """
    lie = [(n, a.shape, a.strides, a.itemsize) for n, a in operands.items() if n not in ALIKE]
    return describe(tuple(lie), reduced, copied, sharing)


@lru_cache(maxsize=4096)
def describe(
    operands: tuple[Operand, ...],
    reduced: tuple[bool, ...],
    copied: bool = False,
    sharing: bool = True,
) -> Layout | None:
    """What `layout_of` finds, by all that it reads of the arrays."""
    shape = operands[0][1]
    steps = {  # in elements; 0 where an array is broadcast
        name: [
            0 if n == 1 != whole else stride // size
            for n, stride, whole in zip(own, strides, shape, strict=True)
        ]
        for name, own, strides, size in operands
    }
    axes: list[_Axis] = []
    for i in sorted(range(len(shape)), key=lambda i: -steps["x"][i]):
        strides = {name: own[i] for name, own in steps.items()}
        if shape[i] == 1:
            if i or reduced[i] or copied or not one_of_a_batch(steps["x"], shape):
                continue
            # its weights are those of others, too
            strides |= dict.fromkeys(_ONE_FOR_ALL & strides.keys(), 0)
        elif steps["x"][i] <= 0:
            return None
        axis = _Axis(shape[i], reduced[i], strides)
        if (
            axes
            and axes[-1].reduced == axis.reduced
            # a step along the one is `size` steps along the other, for every operand
            and all(s == axis.strides[name] * axis.size for name, s in axes[-1].strides.items())
        ):
            axis.size *= axes.pop().size
        axes.append(axis)
    none = _Axis(1, True, dict.fromkeys(steps, 0))
    inner = axes.pop() if axes else none
    if inner is not none and (
        any(inner.strides.get(name, 1) != 1 for name in FULL)
        or any(inner.strides.get(name, 0) not in (0, 1) for name in PARAMETERS)
    ):
        return None

    columns, neighbours, shared = not inner.reduced, 1, False
    rows = [axis for axis in axes if axis.reduced]
    if inner.reduced and inner.size < MIN_RUN and rows:
        follow = _planes_follow(steps, shape, reduced)
        own = any(axis.strides[name] for axis in rows for name in _ONE_FOR_ALL & steps.keys())
        if follow and "dy" in steps and not own:
            return None  # gradients are summed plane by plane: dy must not make planes of a run
        columns = not follow and not ("dy" in steps and _planes_of_a_batch(steps, shape, reduced))
    if inner.reduced and columns:
        # channels-last: a group's channels are neighbours, its positions are rows
        neighbours, outer, theirs = inner.size, axes[-1], {"stats"}
        if sharing and _share_weights(outer, inner, rows):
            theirs |= _SHARED  # short planes: a channel's weight is that of its neighbours
        if not outer.reduced and _side_by_side(outer, inner, theirs):
            axes.pop()
            shared = theirs > {"stats"}
            steps_of_theirs = {n: step for n, step in outer.strides.items() if n in theirs}
            inner = _Axis(outer.size * inner.size, False, inner.strides | steps_of_theirs)

    kept = [axis for axis in axes if not axis.reduced]
    if columns:
        last = [none, none, *rows][-2:] + [inner]
    else:
        last = [none, *rows][-1:] + [inner, none]
    if len(kept) > 2 or len(rows) > (2 if columns else 1):
        return None
    five = [none, none, *kept][-2:] + last
    a, b, p, s, c = (axis.size for axis in five)
    return Layout(
        columns,
        (a, b, p, s, c),
        neighbours,
        {name: tuple(axis.strides[name] for axis in five) for name in steps},
        shared,
    )


def _planes_follow(
    steps: dict[str, list[int]], shape: tuple[int, ...], reduced: tuple[bool, ...]
) -> bool:
    """Whether a group is one run of x, whose parameters differ from plane to plane at most.

    Its planes are then walked along, however short. Of the other operands nothing is asked, nor of
    the axes that stay: where a result goes, how a residual or dy lies, and which samples there are
    must decide no bit. Where those take more axes than a run has, they are copied to lie as x does.
    """
    within = _within(steps, shape, reduced)
    return math.prod(shape[axis] for axis in within) <= SPLIT_BLOCKS * BLOCK and _are_one_run(
        steps, shape, within
    )


def _planes_of_a_batch(
    steps: dict[str, list[int]], shape: tuple[int, ...], reduced: tuple[bool, ...]
) -> bool:
    """Whether each sample has one plane of a group (batch norm), worth walking along backward.

    Of other operands nothing is asked here, either.
    """
    axes = _within(steps, shape, reduced)
    return (
        reduced[0]
        and axes[:1] == [0]
        and _are_one_run(steps, shape, axes[1:])
        and not any(steps[name][axis] for axis in axes for name in _ONE_FOR_ALL & steps.keys())
        and math.prod(shape[axis] for axis in axes[1:]) >= BACKWARD_MIN_RUN
        and steps["x"][0] >= BACKWARD_MIN_SAMPLE
        and shape[0] <= BACKWARD_MAX_PLANES
    )


def _within(
    steps: dict[str, list[int]], shape: tuple[int, ...], reduced: tuple[bool, ...]
) -> list[int]:
    """The axes of a group, in the order in which x has them in memory."""
    axes = [axis for axis, (n, r) in enumerate(zip(shape, reduced)) if r and n > 1]
    return sorted(axes, key=lambda axis: -steps["x"][axis])


def _are_one_run(steps: dict[str, list[int]], shape: tuple[int, ...], axes: list[int]) -> bool:
    """Whether these axes of x are one run, along whose planes no parameter differs."""
    return all(
        steps["x"][outer] == steps["x"][axis] * shape[axis]
        and not any(steps[name][axis] for name in _ONE_FOR_ALL & steps.keys())
        for outer, axis in pairwise(axes)
    )


def _share_weights(outer: _Axis, inner: _Axis, rows: list[_Axis]) -> bool:
    """Whether weights differ from group to group of neighbours, and within none."""
    names = _SHARED & outer.strides.keys()
    return any(outer.strides[name] for name in names) and not any(
        axis.strides[name] for axis in (inner, *rows) for name in names
    )


def _side_by_side(outer: _Axis, inner: _Axis, theirs: set[str]) -> bool:
    """Whether groups of neighbours follow one another in all but what is one for each group."""
    return all(
        outer.strides[name] == inner.strides[name] * inner.size
        for name in outer.strides.keys() - theirs
    )
