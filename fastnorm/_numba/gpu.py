"""The front door for arrays on a GPU: functional.py's and backward.py's own code on other memory.

An array on a GPU is shown to that code as an `OnDevice`: a NumPy array in shape, strides, dtype and
address, whose numbers are never read. The code checks it, views it and describes a pass, as it does
for NumPy's arrays; what allocates, converts or computes is put in its place here.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from fastnorm import arguments, backward, functional
from fastnorm._numba import gpu_kernels as kernels
from fastnorm._numba.gpu_arrays import Library, dense_strides, handles, library_of
from fastnorm._numba.gpu_kernels import BLOCK, CHUNK
from fastnorm._numba.gpu_package import SIMULATED, cuda, is_scalar_function, launch
from fastnorm.backends import BackwardPass, Pass, _forward, _steps
from fastnorm.layout import Layout, describe

Array = np.ndarray[Any, Any]

__all__ = ["handles"]  # and the functions, at the end of this file


# --- Arrays on a device ---------------------------------------------------------------------------


class OnDevice(np.ndarray[Any, Any]):
    """A NumPy array in all but its numbers, which lie on a device and are not read here.

    `owner` is the array of the library's that has the memory.
    """

    __array_ufunc__: Any = None  # no arithmetic
    owner: Any = None

    def __array_finalize__(self, other: Any) -> None:
        self.owner = getattr(other, "owner", None)

    def astype(  # type: ignore[override]
        self, dtype: Any, order: Any = "K", copy: bool = True, **options: Any
    ) -> Any:
        """A copy on the device in another dtype."""
        dtype = np.dtype(dtype)
        return self if not copy and dtype == self.dtype else _converted(self, dtype)

    def copy(self, order: Any = "C") -> Any:
        """A copy on the device."""
        return _converted(self, self.dtype, order="C")


class _Placed:
    """What NumPy makes a view from."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def on_device(x: Any) -> OnDevice:
    """Show an array of any library as an `OnDevice`."""
    memory = library_of(x).memory(x)
    dtype = memory.dtype
    steps = (memory.address, *memory.strides)
    if any(step % dtype.alignment for step in steps) or not dtype.isnative:
        raise ValueError(
            f"an array on the GPU has dtype {dtype.str}, strides {memory.strides} and address "
            f"{memory.address:#x}, expected numbers in the GPU's byte order at multiples of their "
            "size; write x.copy() in its library first"
        )
    shown: Any
    if 0 in memory.shape:
        shown = np.empty(memory.shape, dtype)
    else:
        raw = np.dtype(f"u{dtype.itemsize}") if dtype.name == "bfloat16" else dtype
        interface = {
            "version": 3,
            "shape": memory.shape,
            "strides": memory.strides,
            "typestr": raw.str,
            "data": (memory.address, False),
        }
        shown = np.asarray(_Placed(interface, x))
        shown = shown if raw == dtype else shown.view(dtype)
    shown = shown.view(OnDevice)
    shown.owner = x
    return shown


def _address(array: Array | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]


def _empty(like: OnDevice, shape: Sequence[int], dtype: Any, strides: Any = None) -> OnDevice:
    """New memory beside `like`, contiguous, or in the order of these strides."""
    dtype, shape = np.dtype(dtype), tuple(int(n) for n in shape)
    strides = (0,) * len(shape) if strides is None else strides
    dense = dense_strides(shape, strides, dtype.itemsize)
    return on_device(library_of(like.owner).empty(like.owner, shape, dtype, dense))


def _uploaded(like: OnDevice, array: Array) -> OnDevice:
    """A copy of an array beside `like`, if it is not on a device already."""
    if isinstance(array, OnDevice):
        return array
    made = library_of(like.owner).from_host(like.owner, np.ascontiguousarray(array))
    return on_device(made).reshape(array.shape)


def _to_host(array: Any) -> Array:
    """The numbers of an array."""
    if not isinstance(array, OnDevice):
        return np.asarray(array)
    other = library_of(array.owner).name == "Numba" and not hasattr(array.owner, "copy_to_host")
    if other or not array.flags.c_contiguous:
        array = array.copy()  # into memory that can be copied as a whole
    return library_of(array.owner).to_host(array.owner).reshape(array.shape)


def _delivered(result: Any) -> Any:
    """An `OnDevice` as the array of the library's that it shows."""
    if isinstance(result, tuple):
        return tuple(_delivered(part) for part in result)
    if not isinstance(result, OnDevice):
        return result
    owner = result.owner
    return owner if tuple(owner.shape) == result.shape else owner.reshape(result.shape)


# --- Launching ------------------------------------------------------------------------------------


def _device(x: OnDevice) -> AbstractContextManager[Any]:
    number = library_of(x.owner).device(x.owner)
    if number is None or SIMULATED:
        return nullcontext()
    context: AbstractContextManager[Any] = cuda.gpus[number]
    return context


def _stream(x: OnDevice) -> Any:
    pointer = library_of(x.owner).stream(x.owner)
    return 0 if SIMULATED or not pointer else cuda.external_stream(pointer)


def _launch(kernel: Any, blocks: int, x: OnDevice, *given: Any) -> None:
    launch(kernel, blocks, BLOCK, _stream(x))(*given)


def _blocks(count: int, each: int = BLOCK) -> int:
    return max(1, -(-count // each))


@functools.lru_cache(maxsize=1024)
def _stored(numbers: tuple[int, ...], device: int | None) -> tuple[int, Any]:
    """Whole numbers on the device, once for all calls: their address, and what holds them."""
    array = cuda.to_device(np.array(numbers, np.int64))
    cuda.synchronize()  # a later call may be on another stream
    return Library().memory(array).address, array


def _plan(x: OnDevice, numbers: Sequence[int]) -> int:
    device = library_of(x.owner).device(x.owner)
    if device is None and not SIMULATED:
        device = cuda.get_current_device().id
    return _stored(tuple(numbers), device)[0]


def _meet(operands: Sequence[OnDevice]) -> None:
    """See that all operands are on one GPU, and ready on the first one's stream."""
    if not operands:
        return
    first = operands[0].owner
    library = library_of(first)
    device, stream = library.device(first), library.stream(first)
    for operand in operands[1:]:
        own = library_of(operand.owner)
        other = own.device(operand.owner)
        if None not in (device, other) and other != device:
            raise ValueError(
                f"x lies on GPU {device} and another operand on GPU {other}, expected both on one; "
                "use its library to move it there first"
            )
        pointer = own.stream(operand.owner)
        if pointer != stream and not SIMULATED:
            (cuda.external_stream(pointer) if pointer else cuda.default_stream()).synchronize()


def _converted(
    source: OnDevice, dtype: Any, order: str = "K", offset: float = 0.0, into: Any = None,
    other: OnDevice | None = None,
) -> OnDevice:  # fmt: skip
    """A copy of `source` (or source + other) in another dtype, plus `offset`."""
    if into is None:
        into = _empty(source, source.shape, dtype, source.strides if order == "K" else None)
    if source.size:
        operands = [into, source, *([] if other is None else [other])]
        numbers = [source.ndim, *source.shape]
        for array in operands:
            numbers += [step // array.itemsize for step in array.strides]
        kernel = kernels.convert(
            into.dtype.name, source.dtype.name, (other if other is not None else source).dtype.name
        )
        with _device(source):
            addresses = [_address(array) for array in (into, source, other)]
            plan = _plan(source, numbers + [0] * source.ndim)
            count = source.size
            _launch(kernel, _blocks(count), source, plan, count, *addresses, float(offset))
    return into


# --- The passes -----------------------------------------------------------------------------------


def _layout(operands: dict[str, Any], reduced: tuple[bool, ...]) -> Layout | None:
    """The walk, if there is one. Statistics lie alike: "stats" stands for all of them."""
    shape = operands["x"].shape
    steps = {n: _steps(array, shape) for n, array in operands.items() if n not in _ALIKE}
    return describe(shape, reduced, tuple(steps.items()))


def _numbers(layout: Layout, names: Sequence[str]) -> list[int]:
    """What a plan holds of these operands."""
    numbers = [*layout.dims, layout.neighbours]
    for name in names:
        numbers += layout.strides.get(name, (0,) * 5)
    return numbers


def _aligned(layout: Layout, width: int, operands: dict[str, Any]) -> bool:
    """Whether every chunk of every operand begins at a multiple of 16 bytes, or of its own size."""
    inner = 4 if layout.columns else 3
    for name, array in operands.items():
        strides = layout.strides[name]
        steps = [s for axis, s in enumerate(strides) if axis != inner and layout.dims[axis] > 1]
        chunk = min(CHUNK, width * array.itemsize)
        if strides[inner] == 0:
            continue  # one number for all
        if _address(array) % chunk or any(step * array.itemsize % chunk for step in steps):
            return False
    return True


def _parts(length: int, least: int, most: int) -> tuple[int, int]:
    """How many parts of how many each: by a group's own length."""
    per = max(least, -(-length // most))
    return _blocks(length, per), per


def _lanes(parts: int) -> int:
    """How many threads merge the parts of a group."""
    return 1 if parts <= kernels.WARP else kernels.WARP


def _described(
    operands: dict[str, Any], reduced: tuple[bool, ...], kept: Sequence[str], written: Sequence[str]
) -> tuple[Layout, dict[str, Any], Callable[[], None]]:
    """The walk, the operands in its order, and what to call when those `written` are there.

    An order of axes that the kernels cannot walk is put into another, kept axes first, in copies of
    all operands but those `kept` as they are.
    """
    operands = _forward(operands)
    layout = _layout(operands, reduced)
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
                moved[name] = np.broadcast_to(moved[name], shape, subok=True)
            moved[name] = _converted(moved[name], array.dtype, order="C")
    layout = _layout(moved, tuple(sorted(reduced)))
    assert layout is not None, "contiguous operands always have a layout"

    def finish() -> None:
        for name in written:
            if name in moved:
                _converted(moved[name].transpose(back), operands[name].dtype, into=operands[name])

    return layout, moved, finish


# Statistics that lie as "stats" do, and means that lie as their rstd.
_ALIKE = ("mean", "var", "rstd", "ones", "seconds")

_FORWARD = ("x", "y", "other", "total", "mask", "weight", "bias", "stats")
_OPERANDS = ("x", "y", "residual", "addend", "total", "mask", "weight", "bias")


def compute(p: Pass) -> None:
    """Carry out a pass on the device."""
    x: Any = p.x
    operands = {n: array for n in _OPERANDS if (array := getattr(p, n)) is not None}
    operands |= {"mean": p.mean, "var": p.var, "stats": p.rstd}
    with _device(x):
        layout, operands, finish = _described(
            operands, p.reduced, ("mean", "var", "stats"), ("y", "total")
        )
        (_columns if layout.columns else _runs)(p, layout, operands)
        finish()


def _others(p: Pass, layout: Layout, operands: dict[str, Any]) -> tuple[str, str, list[int]]:
    """The name of what is added, its dtype, and the plan's numbers."""
    name = "addend" if "addend" in operands else "residual"
    names = [name if n == "other" else n for n in _FORWARD]
    kind = operands[name].dtype.name if name in operands else p.x.dtype.name
    return name, kind, _numbers(layout, names)


def _read_and_written(operands: dict[str, Any]) -> dict[str, Any]:
    """Operands that are read or written in chunks."""
    return {n: o for n, o in operands.items() if n not in (*_ALIKE, "stats", "mask")}


def _scale_from_parts(
    p: Pass, layout: Layout, plan: int, groups: int, parts: int, partial: Any, statistics: Any
) -> OnDevice:
    """Merge the moments of parts, or take the statistics given; the scale of each group."""
    x: Any = p.x
    scale = _empty(x, (groups * kernels.SCALE,), np.float64)
    at = _address(scale)
    if p.given:
        _launch(
            kernels.given_scale, _blocks(groups), x, plan, groups, p.eps, int(p.scaling), at,
            *statistics,
        )  # fmt: skip
    else:
        lanes = _lanes(parts * layout.neighbours)
        merge = kernels.merge_parts(lanes, p.x.dtype.name == "float64")
        _launch(
            merge, _blocks(groups, BLOCK // lanes), x, plan, groups, parts, _address(partial),
            p.eps, int(p.scaling), at, *statistics,
        )  # fmt: skip
    return scale


def _runs(p: Pass, layout: Layout, operands: dict[str, Any]) -> None:
    x: Any = operands["x"]
    kind = p.x.dtype.name
    width = CHUNK // x.itemsize
    other, other_kind, numbers = _others(p, layout, operands)
    plan = _plan(x, numbers)
    aligned = _aligned(layout, width, _read_and_written(operands))
    a, b, rows, s, _ = layout.dims
    groups, chunks = a * b, rows * -(-s // width)
    team = kernels.WARP if chunks <= kernels.SHORT else BLOCK
    parts, per = _parts(chunks, kernels.PART, kernels.MOST_PARTS)
    statistics = [_address(operands[name]) for name in ("mean", "var", "stats")]
    given = [
        plan, int(aligned), groups, parts, per, _address(x), _address(operands.get("y")),
        *(_address(operands.get(n)) for n in (other, "total", "mask", "weight", "bias")),
        p.eps, int(p.centred), int(p.scaling),
    ]  # fmt: skip
    blocks = _blocks(groups * parts, BLOCK // team)
    activation = p.activation if operands.get("y") is not None else None
    choice = (kind, other_kind, team)
    final = (activation, p.activation_first)
    if parts == 1 and not p.given:
        kernel = kernels.runs(*choice, kernels.WHOLE, *final)
        return _launch(kernel, blocks, x, *given, 0, 0, *statistics)
    partial = None
    if not p.given:
        partial = _empty(x, (groups * parts * kernels.PARTIAL,), np.float64)
        kernel = kernels.runs(*choice, kernels.SUMS, None, False)
        _launch(kernel, blocks, x, *given, _address(partial), 0, *statistics)
    scale = _scale_from_parts(p, layout, plan, groups, parts, partial, statistics)
    if operands.get("y") is not None:
        kernel = kernels.runs(*choice, kernels.STEP, *final)
        _launch(kernel, blocks, x, *given, 0, _address(scale), *statistics)
    return None


def _columns(p: Pass, layout: Layout, operands: dict[str, Any]) -> None:
    if "addend" in operands:
        total = operands["total"]
        _converted(operands["x"], total.dtype, into=total, other=operands["addend"])
        strides = dict(layout.strides)
        strides["x"] = strides["total"]
        layout = Layout(layout.columns, layout.dims, layout.neighbours, strides)
        operands = {n: o for n, o in operands.items() if n not in ("addend", "total")}
        operands["x"] = total
    x: Any = operands["x"]
    kind = p.x.dtype.name
    width = CHUNK // x.itemsize
    other, other_kind, numbers = _others(p, layout, operands)
    plan = _plan(x, numbers)
    aligned = int(_aligned(layout, width, _read_and_written(operands)))
    a, b, rows, s, columns = layout.dims
    groups = a * b * (columns // layout.neighbours)
    parts, per = _parts(rows * s, kernels.PART_ROWS, kernels.MOST_ROW_PARTS)
    blocks = a * b * parts * _blocks(columns, kernels.LANES * width)
    statistics = [_address(operands[name]) for name in ("mean", "var", "stats")]
    partial = None
    if not p.given:
        partial = _empty(x, (a * b * parts * columns * kernels.PARTIAL,), np.float64)
        _launch(
            kernels.column_moments(kind), blocks, x, plan, aligned, parts, per, _address(x),
            _address(operands.get("mask")), int(p.centred), _address(partial),
        )  # fmt: skip
    scale = _scale_from_parts(p, layout, plan, groups, parts, partial, statistics)
    if operands.get("y") is not None:
        kernel = kernels.column_step(kind, other_kind, p.activation, p.activation_first)
        _launch(
            kernel, blocks, x, plan, aligned, parts, per, _address(x),
            *(_address(operands.get(n)) for n in ("y", other, "weight", "bias")), _address(scale),
        )  # fmt: skip


# --- The backward passes --------------------------------------------------------------------------

Sums = tuple[OnDevice, OnDevice]


def compute_backward(p: BackwardPass) -> None:
    """Carry out a backward pass on the device."""
    x: Any = p.x
    # What weight and bias get are sums of dy xhat and of dy over what shares them.
    own = tuple(n == 1 for n in p.dweight.shape)
    whole = zip(own, p.reduced, x.shape, strict=True)
    same = all(mine == theirs or n == 1 for mine, theirs, n in whole)
    with _device(x):
        sums = _gradient_sums(p, own, p.dweight.shape, same, weighted=False)
        for gradient, total in ((p.dbias, sums[0]), (p.dweight, sums[1])):
            if gradient is not None:
                _converted(total, gradient.dtype, into=gradient)
        _slopes(p, sums if same else None)


def _choice(operands: dict[str, Any]) -> tuple[str, str, str]:
    """The dtypes of x, of dy and of the weight."""
    kind = operands["x"].dtype.name
    factor = operands["weight"].dtype.name if "weight" in operands else kind
    return kind, operands["dy"].dtype.name, factor


def _geometry(operands: dict[str, Any], layout: Layout) -> Any:
    """The plan, whether chunks are aligned, groups, their parts, blocks, a team's threads."""
    x = operands["x"]
    width = CHUNK // x.itemsize
    each = "each" if "each" in operands else "stats"
    plan = _plan(x, _numbers(layout, ("x", "dy", "dx", "weight", each, "stats")))
    chunks_of = {n: o for n, o in operands.items() if n in ("x", "dy", "dx", "weight")}
    aligned = int(_aligned(layout, width, chunks_of))
    a, b, rows, s, columns = layout.dims
    if layout.columns:
        parts, per = _parts(rows * s, kernels.PART_ROWS, kernels.MOST_ROW_PARTS)
        blocks = a * b * parts * _blocks(columns, kernels.LANES * width)
        return plan, aligned, a * b * (columns // layout.neighbours), parts, per, blocks, BLOCK
    chunks = rows * -(-s // width)
    team = kernels.WARP if chunks <= kernels.SHORT else BLOCK
    parts, per = _parts(chunks, kernels.PART, kernels.MOST_PARTS)
    return plan, aligned, a * b, parts, per, _blocks(a * b * parts, BLOCK // team), team


def _gradient_sums(
    p: BackwardPass, reduced: tuple[bool, ...], shape: Any, same: bool, *, weighted: bool
) -> Sums:
    """Sums of g and of g xhat over the reduced axes, of this shape; g = dy, or weight dy.

    `same`: these axes are those of the statistics, and the sums lie as they do. Otherwise an
    element has a mean and rstd of its own, and the sums lie as x does.
    """
    like: Any = p.x
    order = None if same else like.strides
    sums = (_empty(like, shape, np.float64, order), _empty(like, shape, np.float64, order))
    operands: dict[str, Any] = {"x": p.x, "dy": p.dy, "stats": sums[0], "seconds": sums[1]}
    rstd = "rstd" if same else "each"
    operands[rstd] = p.rstd
    if p.mean is not None:
        operands["mean"] = p.mean
    if weighted and p.weight is not None:
        operands["weight"] = p.weight
    stays = ("rstd", "mean") if same else ()
    layout, operands, finish = _described(operands, reduced, stays, ("stats", "seconds"))
    x: Any = operands["x"]
    plan, aligned, groups, parts, per, blocks, team = _geometry(operands, layout)
    a, b, *_, columns = layout.dims
    partial = _empty(x, (a * b * parts * columns * 2,), np.float64)
    at = _address(partial)
    data = [_address(operands[n]) for n in ("x", "dy")]
    others = [_address(operands.get(n)) for n in ("weight", "mean", rstd)]
    totals = [_address(operands[n]) for n in ("stats", "seconds")]
    if layout.columns:
        kernel = kernels.column_gradients(*_choice(operands), same)
        _launch(kernel, blocks, x, plan, aligned, parts, per, *data, *others, at)
    else:
        kernel = kernels.run_gradients(*_choice(operands), team, kernels.SUMS)
        cut = (plan, aligned, groups, parts, per)
        _launch(kernel, blocks, x, *cut, *data, 0, *others, at, *totals, 1.0, 1)
    lanes = _lanes(parts * layout.neighbours)
    merge = kernels.merge_sums(lanes)
    _launch(merge, _blocks(groups, BLOCK // lanes), x, plan, groups, parts, at, *totals)
    finish()
    return sums


def _slopes(p: BackwardPass, sums: Sums | None) -> None:
    """dx; `sums` are those of dy alone, where the weight is one for each group."""
    weighted = sums is None
    operands: dict[str, Any] = {"x": p.x, "dy": p.dy, "dx": p.dx, "stats": p.rstd}
    beside = {"mean": p.mean, "weight": p.weight}
    operands |= {name: array for name, array in beside.items() if array is not None}
    stays = ("stats", "mean", "ones", "seconds")
    layout, walked, finish = _described(operands, p.reduced, stays, ("dx",))
    plan, aligned, groups, parts, per, blocks, team = _geometry(walked, layout)
    whole = p.training and sums is None and not layout.columns and parts == 1
    if p.training and not whole:
        if sums is None:
            kept = [1 if r else n for n, r in zip(p.x.shape, p.reduced, strict=True)]
            sums = _gradient_sums(p, p.reduced, kept, True, weighted=True)
        operands |= {"ones": sums[0], "seconds": sums[1]}
        layout, walked, finish = _described(operands, p.reduced, stays, ("dx",))
    totals = [_address(walked.get(n)) for n in ("ones", "seconds")]
    x: Any = walked["x"]
    length = float(math.prod(n for n, r in zip(p.x.shape, p.reduced, strict=True) if r))
    data = [_address(walked[n]) for n in ("x", "dy", "dx")]
    others = [_address(walked.get(n)) for n in ("weight", "mean", "stats")]
    last = (length, int(weighted))
    if layout.columns:
        kernel = kernels.column_slopes(*_choice(walked))
        _launch(kernel, blocks, x, plan, aligned, parts, per, *data, *others, *totals, *last)
    else:
        mode = kernels.WHOLE if whole else kernels.STEP
        kernel = kernels.run_gradients(*_choice(walked), team, mode)
        cut = (plan, aligned, groups, parts, per)
        _launch(kernel, blocks, x, *cut, *data, *others, 0, *totals, *last)
    finish()


# --- functional.py and backward.py on these passes ------------------------------------------------


def _as_array(value: Any, name: str) -> Array:
    """`arguments.as_array`, for arrays on a device too."""
    if not isinstance(value, OnDevice):
        return arguments.as_array(value, name)
    dtype = value.dtype
    if not arguments.is_float(dtype):
        arguments.as_array(np.empty(0, dtype), name)  # refuses what is no number
        return _converted(value, np.dtype(np.float64))
    if any(step == 0 and n > 1 for step, n in zip(value.strides, value.shape, strict=True)):
        return _converted(value, dtype)
    return value


def _offset_weight(weight: Any, offset: float, x: Any) -> Any:
    if weight is None or offset == 0.0:
        return weight
    return _converted(_uploaded(x, _as_array(weight, "weight")), np.float64, offset=offset)


def _counted(where: Any, array: Array, axes: tuple[int, ...]) -> Array:
    """How many elements enter each statistic. A mask is copied to the host for that."""
    host = None if where is None else _to_host(where)
    return _count(host, np.broadcast_to(np.float64(0), array.shape), axes)


def _update(
    running_mean: Any, running_var: Any, mean: Any, var: Any, counts: Array, momentum: float
) -> None:
    """`functional._update`, on the device for what lies there."""
    both = (running_mean, running_var)
    if any(r is not None and not isinstance(r, OnDevice) for r in both):
        ours = [None if isinstance(r, OnDevice) else r for r in both]
        _update_host(ours[0], ours[1], _to_host(mean), _to_host(var), counts, momentum)
    if not any(isinstance(r, OnDevice) for r in both):
        return
    parts, channels = mean.shape
    wide = _uploaded(mean, np.broadcast_to(counts, mean.shape).astype(np.float64))
    for running, numbers, unbiased in ((running_mean, mean, 0), (running_var, var, 1)):
        if isinstance(running, OnDevice):
            kernel = kernels.running_average(running.dtype.name)
            step = running.strides[0] // running.itemsize
            with _device(running):
                _launch(
                    kernel, _blocks(channels), mean, channels, parts, _address(running), step,
                    _address(numbers), _address(wide), unbiased, float(momentum),
                )  # fmt: skip


def _run(
    x: Any,
    array: Any,
    axes: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    *,
    view: Callable[[Any], Any] = lambda array: array,
    where: Any = None,
    residual: Any = None,
    activation: Any = None,
    out: Any = None,
    given: Any = None,
    squash: bool = False,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    """What `functional._run` does, with statistics that lie on the device."""
    if not is_scalar_function(activation):
        activation = arguments.check_activation(activation)
    mask = _functional["mask_of"](where, array)
    added = None if residual is None else _functional["same_shape"](residual, "residual", array)
    _check_out(out, array)
    weight, bias, added, mask = (
        None if a is None else _uploaded(array, a) for a in (weight, bias, added, mask)
    )
    options = {n: v for n, v in options.items() if n not in ("key", "statistics")}
    if options.get("addend") is not None:
        options["addend"] = _uploaded(array, options["addend"])
    seen = view(array)
    reduced = tuple(axis in axes for axis in range(seen.ndim))
    kept = [1 if r else n for n, r in zip(seen.shape, reduced, strict=True)]
    if not array.size:
        mean, var, rstd = (_uploaded(array, np.full(kept, np.nan)) for _ in range(3))
    elif given is None:
        mean, var, rstd = (_empty(array, kept, np.float64) for _ in range(3))
    else:
        mean, var = (_uploaded(array, part) for part in given)
        rstd = _empty(array, mean.shape, np.float64)
    y = _functional["_result"](array, out, array, added, mask, weight, bias)
    if array.size:
        compute(
            Pass(
                seen,
                view(y),
                reduced,
                mean,
                var,
                rstd,
                weight,
                bias,
                mask=None if mask is None else view(mask),
                residual=None if added is None else view(added),
                activation="tanh" if squash else activation,
                activation_first=squash,
                given=given is not None,
                **options,
            )
        )
    if out is not None and y is not out:
        y = _converted(y, out.dtype, into=out)
    return y, mean, var, rstd


def _check_out(out: Any, array: Any) -> None:
    if out is not None and not isinstance(out, OnDevice):
        raise TypeError(
            f"out is a {type(out).__name__}, expected an array on the GPU as x is; write "
            "an empty array like x of the library that made it"
        )
    arguments.check_out(out, array.shape, array.dtype)


def _run_backward(
    dy: Any,
    x: Any,
    array: Any,
    reduced: tuple[bool, ...],
    mean: Any,
    rstd: Any,
    weight: Any,
    own: tuple[int, ...],
    axes: tuple[int, ...],
    place: Callable[[Any], Any],
    *,
    view: Callable[[Any], Any] = lambda array: array,
    bias: bool = True,
    weight_offset: float = 0.0,
    training: bool = True,
    key: Any = None,
) -> tuple[Any, Any, Any]:
    """What `backward._run` does, on the device."""
    slope = _uploaded(array, _functional["same_shape"](dy, "dy", array))
    dx = _empty(array, array.shape, array.dtype, array.strides)
    placed, shape, dtype = None, own, array.dtype
    if weight is not None:
        given = _uploaded(array, _as_array(weight, "weight"))
        shape, dtype = given.shape, given.dtype
        real = np.dtype(kernels.computing(array.dtype.name))
        if dtype != real or weight_offset:
            given = _converted(given, real, offset=weight_offset)
        placed = place(given)
    gradients = [_empty(array, shape, dtype) for _ in range(2 if bias else 1)]
    into = [place(gradient) for gradient in gradients]
    mean, rstd = (None if a is None else _uploaded(array, a) for a in (mean, rstd))
    if array.size:
        compute_backward(
            BackwardPass(
                view(array),
                view(slope),
                view(dx),
                reduced,
                mean,
                rstd,
                placed,
                into[0],
                into[1] if bias else None,
                training,
            )
        )
    else:
        gradients = [_uploaded(array, np.zeros(shape, dtype)) for _ in gradients]
    return dx, gradients[0], gradients[-1]


def _compute(p: Pass) -> None:
    """A pass whose statistics are wanted in the host's memory."""
    hosts, x = (p.mean, p.var, p.rstd), p.x
    p.mean, p.var, p.rstd = (_uploaded(x, array) for array in hosts)  # type: ignore[arg-type]
    compute(p)
    for host, array in zip(hosts, (p.mean, p.var, p.rstd), strict=True):
        host[...] = _to_host(array)


# What these modules ask of NumPy that would read numbers, or make an array in the host's memory.


def _array(value: Any, dtype: Any = None, **options: Any) -> Any:
    if isinstance(value, OnDevice):
        return _converted(value, dtype, order="C")
    return np.array(value, dtype, **options)


def _ascontiguousarray(value: Any, dtype: Any = None) -> Any:
    if not isinstance(value, OnDevice):
        return np.ascontiguousarray(value, dtype)
    right = value.flags.c_contiguous and value.dtype == np.dtype(dtype)
    return value if right else _converted(value, dtype, order="C")


def _asarray(value: Any, *given: Any) -> Any:
    return value if isinstance(value, OnDevice) else np.asarray(value, *given)


def _empty_like(value: Any, dtype: Any = None, **options: Any) -> Any:
    if isinstance(value, OnDevice):
        return _empty(value, value.shape, dtype or value.dtype, value.strides)
    return np.empty_like(value, dtype, **options)


def _broadcast_to(value: Any, shape: Any) -> Any:
    return np.broadcast_to(value, shape, subok=True)


_NUMPY = SimpleNamespace(
    **vars(np)
    | {
        "array": _array,
        "asarray": _asarray,
        "ascontiguousarray": _ascontiguousarray,
        "empty_like": _empty_like,
        "broadcast_to": _broadcast_to,
    }
)


class _NoPlan:
    key = None


def _no_plan(*call: Any) -> Any:
    return _NoPlan()


def _rebased(module: ModuleType, shared: dict[str, Any], **own: Any) -> dict[str, Any]:
    """The functions of a module once more, with others beneath them.

    `own` names must be there: what was left to NumPy would read the device's memory as the host's.
    """
    missing = own.keys() - vars(module).keys()
    assert not missing, f"{module.__name__} has no {', '.join(missing)}"
    space = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            clone = FunctionType(value.__code__, space, name, value.__defaults__, value.__closure__)
            clone.__kwdefaults__ = value.__kwdefaults__
            space[name] = clone
    space.update({name: value for name, value in shared.items() if name in space}, **own)
    return space


_count, _update_host = functional._counted, functional._update
_PLAIN = {"Unplanned": _NoPlan, "delivered": lambda y, x, out=None: y}
_arguments = _rebased(arguments, {}, np=_NUMPY, as_array=_as_array)
_BENEATH = {n: f for n, f in _arguments.items() if isinstance(f, FunctionType)} | _PLAIN
_functional = _rebased(
    functional,
    _BENEATH,
    np=_NUMPY,
    empty_like=_empty_like,
    quick_forward=_no_plan,
    compute=_compute,
    _offset_weight=_offset_weight,
    _counted=_counted,
    _update=_update,
    _run=_run,
)
_backward = _rebased(backward, _BENEATH, np=_NUMPY, quick_backward=_no_plan, _run=_run_backward)


# --- The public functions -------------------------------------------------------------------------


# Small ones that enter a computation by NumPy.
_ON_HOST = {"global_response_norm": ("weight", "bias"), "dynamic_tanh": ("alpha",)}


def _door(name: str, space: dict[str, Any], module: ModuleType) -> Callable[..., Any]:
    """A function of functional.py or backward.py, for arrays on a device."""
    original, function = getattr(module, name), space[name]
    order = tuple(inspect.signature(original).parameters)
    on_host = _ON_HOST.get(name, ())
    whose = next(parameter for parameter in order if parameter in ("x", "v", "w"))

    def shown(parameter: str, value: Any) -> Any:
        if not handles(value):
            return value
        placed = on_device(value)
        return _to_host(placed) if parameter in on_host else placed

    @functools.wraps(original)
    def door(*given: Any, **named: Any) -> Any:
        # too many of them are refused by the function itself
        names = (*order, *[""] * len(given))
        placed = [shown(n, v) for n, v in zip(names, given, strict=False)]
        named = {n: shown(n, v) for n, v in named.items()}
        x = {**dict(zip(names, placed, strict=False)), **named}.get(whose)
        if x is not None and not isinstance(x, OnDevice):
            raise TypeError(
                f"{whose} is a {type(x).__name__}, expected an array on a GPU: one with "
                f"__cuda_array_interface__; for others write fastnorm.{name}"
            )
        _meet([v for v in (*placed, *named.values()) if isinstance(v, OnDevice)])
        return _delivered(function(*placed, **named))

    return door


FORWARD = (
    "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "add_layer_norm",
    "add_rms_norm", "l2_normalize", "weight_norm", "weight_standardize", "global_response_norm",
    "dynamic_tanh",
)  # fmt: skip
BACKWARD = (
    "batch_norm_backward", "instance_norm_backward", "group_norm_backward", "layer_norm_backward",
    "rms_norm_backward",
)  # fmt: skip
for _name in FORWARD:
    globals()[_name] = _door(_name, _functional, functional)
for _name in BACKWARD:
    globals()[_name] = _door(_name, _backward, backward)


@functools.wraps(functional.local_response_norm)
def local_response_norm(
    x: Any,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    channel_axis: int = 1,
) -> Any:
    of = "local_response_norm"
    array: Any = _as_array(on_device(x), "x")
    arguments.check_ndim(array, 2, of, "(N, C, ...)")
    axis = arguments.channel_axis_of(array, channel_axis, of)
    # refuses what is no size, by the same words
    functional.local_response_norm(np.empty((0, 1)), size)
    y = _empty(array, array.shape, array.dtype, array.strides)
    last = np.moveaxis(array, axis, -1)
    moved = last if last.flags.c_contiguous else np.moveaxis(array, axis, 1)
    source, target = moved, y
    if not moved.flags.c_contiguous:
        source = moved.copy()
        target = _empty(array, moved.shape, array.dtype)
    if array.size:
        channels = array.shape[axis]
        inner = 1 if moved is last else math.prod(moved.shape[2:])
        with _device(array):
            _launch(
                kernels.response(array.dtype.name), _blocks(array.size), array, array.size,
                channels, inner, _address(source), _address(target), int(size), float(alpha),
                float(beta), float(k),
            )  # fmt: skip
    if target is not y:
        _converted(np.moveaxis(target, 1, axis), y.dtype, into=y)
    return _delivered(y)
