"""Sums and extremes over the threads of a team, or over the rows of a block of columns.

Which thread adds what depends on the shape alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fastnorm._numba.gpu.blocking import LANES, ROWS, WARP
from fastnorm._numba.gpu.package import SIMULATED, arithmetic, cuda, device
from fastnorm._numba.gpu.views import greater, lesser

Function = Callable[..., Any]

two_sum = arithmetic.two_sum


@cache
def team_sums(team: int) -> Function:
    """Sums (first, second, rest of second, third) over a team; every thread gets them.

    By shuffles within a warp, then over warps in their order. `lane` counts a team's threads,
    `offset` is where its own `scratch` begins.
    """
    if SIMULATED:

        def total_in_turn(
            first: Any, second: Any, rest: Any, third: Any, scratch: Any, offset: int, lane: int
        ) -> Any:
            for row, value in enumerate((first, second, rest, third)):
                scratch[row, offset + lane] = value
            cuda.syncthreads()
            if lane == 0:
                mine = slice(offset, offset + team)
                scratch[0, offset], scratch[3, offset] = (scratch[r, mine].sum() for r in (0, 3))
                whole, lost = 0.0, scratch[2, mine].sum()
                for value in scratch[1, mine]:
                    whole, left = two_sum(whole, value)
                    lost += left
                scratch[1, offset], scratch[2, offset] = whole, lost
            cuda.syncthreads()
            result = tuple(scratch[row, offset] for row in range(4))
            cuda.syncthreads()
            return result

        return total_in_turn

    warps = team // WARP

    @device
    def total(
        first: Any, second: Any, rest: Any, third: Any, scratch: Any, offset: Any, lane: Any
    ) -> Any:
        distance = 16
        while distance > 0:
            first += cuda.shfl_xor_sync(0xFFFFFFFF, first, distance)
            third += cuda.shfl_xor_sync(0xFFFFFFFF, third, distance)
            rest += cuda.shfl_xor_sync(0xFFFFFFFF, rest, distance)
            second, lost = two_sum(second, cuda.shfl_xor_sync(0xFFFFFFFF, second, distance))
            rest += lost
            distance //= 2
        if warps > 1:
            if lane % WARP == 0:
                warp = lane // WARP
                scratch[0, warp] = first
                scratch[1, warp] = second
                scratch[2, warp] = rest
                scratch[3, warp] = third
            cuda.syncthreads()
            first = third = 0.0
            second = rest = 0.0
            for warp in range(warps):
                first += scratch[0, warp]
                third += scratch[3, warp]
                second, lost = two_sum(second, scratch[1, warp])
                rest += scratch[2, warp] + lost
            cuda.syncthreads()
        return first, second, rest, third

    return total


@cache
def team_extent(team: int) -> Function:
    """The least and the largest number over a team."""
    if SIMULATED:

        def extent_in_turn(low: Any, high: Any, scratch: Any, offset: int, lane: int) -> Any:
            scratch[0, offset + lane], scratch[1, offset + lane] = low, high
            cuda.syncthreads()
            low = scratch[0, offset : offset + team].min()
            high = scratch[1, offset : offset + team].max()
            cuda.syncthreads()
            return low, high

        return extent_in_turn

    warps = team // WARP

    @device
    def extent(low: Any, high: Any, scratch: Any, offset: Any, lane: Any) -> Any:
        distance = 16
        while distance > 0:
            low = lesser(low, cuda.shfl_xor_sync(0xFFFFFFFF, low, distance))
            high = greater(high, cuda.shfl_xor_sync(0xFFFFFFFF, high, distance))
            distance //= 2
        if warps > 1:
            if lane % WARP == 0:
                scratch[0, lane // WARP] = low
                scratch[1, lane // WARP] = high
            cuda.syncthreads()
            for warp in range(warps):
                low = lesser(low, scratch[0, warp])
                high = greater(high, scratch[1, warp])
            cuda.syncthreads()
        return low, high

    return extent


@cache
def column_totals(width: int) -> Function:
    """Sums over a block's rows of what each thread has for its `width` columns, in their order.

    Threads 0, 1, ... get those of the block's columns.
    """
    across = LANES * width

    @device
    def totals(values: Any, shared: Any, tid: Any) -> Any:
        for k in range(width):
            shared[tid * width + k] = values[k]
        cuda.syncthreads()
        whole = np.float64(0.0)
        if tid < across:
            for row in range(ROWS):
                whole += shared[row * across + tid]
        cuda.syncthreads()
        return whole

    return totals


@cache
def column_extents(width: int) -> Function:
    """The least and the largest of each of a block's columns, likewise."""
    across = LANES * width

    @device
    def extents(least: Any, most: Any, shared: Any, tid: Any) -> Any:
        low, high = math.inf, -math.inf
        for k in range(width):
            shared[tid * width + k] = least[k]
        cuda.syncthreads()
        if tid < across:
            for row in range(ROWS):
                low = lesser(low, shared[row * across + tid])
        cuda.syncthreads()
        for k in range(width):
            shared[tid * width + k] = most[k]
        cuda.syncthreads()
        if tid < across:
            for row in range(ROWS):
                high = greater(high, shared[row * across + tid])
        cuda.syncthreads()
        return low, high

    return extents


@cache
def column_spreader(width: int) -> Function:
    """A function that hands what threads have for a block's columns to those that add them."""
    across = LANES * width

    @device
    def spread(value: Any, shared: Any, tid: Any, into: Any) -> None:
        if tid < across:
            shared[tid] = value
        cuda.syncthreads()
        for k in range(width):
            into[k] = shared[tid % LANES * width + k]
        cuda.syncthreads()

    return spread
