"""Copies on the device: from any strides to any, in another dtype."""

from __future__ import annotations

from fastnorm._numba.gpu.blocking import blocks_of
from fastnorm._numba.gpu.elementwise import convert
from fastnorm._numba.gpu.launch import address, device_of, launch, plan_of
from fastnorm.arrays import ArrayView


def fill(
    into: ArrayView,
    source: ArrayView,
    *,
    offset: float = 0.0,
    other: ArrayView | None = None,
    product: bool = False,
) -> None:
    """into = source + offset, source + other, or their product."""
    if not source.size:
        return
    operands = [into, source, *([] if other is None else [other])]
    numbers = [source.ndim, *source.shape]
    for array in operands:
        numbers += [step // array.itemsize for step in array.strides]
    added = source if other is None else other
    kernel = convert(into.dtype.name, source.dtype.name, added.dtype.name, product)
    with device_of(source):
        plan = plan_of(source, numbers + [0] * source.ndim)
        addresses = [address(array) for array in (into, source, other)]
        count = source.size
        launch(kernel, blocks_of(count), source, plan, count, *addresses, float(offset))
