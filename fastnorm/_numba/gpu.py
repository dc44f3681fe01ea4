"""The door for arrays on a GPU: the public functions' own code on other memory, and its passes.

An array on a GPU is shown to that code as an `OnDevice`: a NumPy array in shape, strides, dtype and
address, whose numbers are never read. The code checks it, views it and describes a pass, as it does
for NumPy's arrays; what allocates, converts or computes is asked of the array (elsewhere.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fastnorm._numba import gpu_kernels as kernels
from fastnorm._numba.gpu_arrays import Library, dense_strides, handles, library_of
from fastnorm._numba.gpu_kernels import BLOCK, CHUNK
from fastnorm._numba.gpu_package import SIMULATED, cuda, is_scalar_function, launch
from fastnorm.description import BackwardPass, Pass
from fastnorm.elsewhere import Elsewhere
from fastnorm.layout import Layout, ascending, describe, steps_of

Array = np.ndarray[Any, Any]

# The public functions whose own code is carried out on arrays on a GPU.
OURS = (
    "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "add_layer_norm",
    "add_rms_norm", "l2_normalize", "local_response_norm", "weight_norm", "weight_standardize",
    "global_response_norm", "dynamic_tanh", "batch_norm_backward", "instance_norm_backward",
    "group_norm_backward", "layer_norm_backward", "rms_norm_backward",
)  # fmt: skip


@functools.cache
def _has_driver() -> bool:
    return SIMULATED or bool(cuda.is_available())


def carry_out(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call one of them with arguments of which some are on a GPU: x is."""
    placed = {name: on_device(v) if handles(v) else v for name, v in given.items()}
    if not _has_driver():
        raise RuntimeError(
            f"{function.__name__} got an array on a GPU, and CUDA's driver cannot be loaded here, "
            "expected one that can; install it, or write x.get() or x.cpu() for the host's memory"
        )
    _meet([v for v in placed.values() if isinstance(v, OnDevice)])
    return _delivered(function(**placed))


# --- Arrays on a device ---------------------------------------------------------------------------


class OnDevice(Elsewhere):
    """An array on a GPU. `owner` is the array of the library's that has the memory."""

    owner: Any = None

    def __array_finalize__(self, other: Any) -> None:
        self.owner = getattr(other, "owner", None)

    def astype(  # type: ignore[override]
        self, dtype: Any, order: Any = "K", copy: bool = True, **options: Any
    ) -> Any:
        """A copy on the device in another dtype, in C order or in its own."""
        dtype = np.dtype(dtype)
        right = dtype == self.dtype and (order != "C" or self.flags.c_contiguous)
        return self if right and not copy else _converted(self, dtype, order)

    def copy(self, order: Any = "C") -> Any:
        """A copy on the device."""
        return _converted(self, self.dtype, order="C")

    def new(self, shape: Sequence[int], dtype: Any, strides: Any = None) -> OnDevice:
        dtype, shape = np.dtype(dtype), tuple(int(n) for n in shape)
        dense = dense_strides(shape, strides or (0,) * len(shape), dtype.itemsize)
        return on_device(library_of(self.owner).empty(self.owner, shape, dtype, dense))

    def placed(self, array: Array) -> OnDevice:
        if isinstance(array, OnDevice):
            return array
        made = library_of(self.owner).from_host(self.owner, np.ascontiguousarray(array))
        return on_device(made).reshape(array.shape)

    def host(self) -> Array:
        library = library_of(self.owner)
        other = library.name == "Numba" and not hasattr(self.owner, "copy_to_host")
        # into memory that can be copied as a whole
        whole = self.copy() if other or not self.flags.c_contiguous else self
        return library_of(whole.owner).to_host(whole.owner).reshape(self.shape)

    def fill_from(self, source: Any) -> None:
        _converted(source, self.dtype, into=self)

    def plus(self, offset: float) -> OnDevice:
        return _converted(self, np.float64, offset=offset)

    def takes(self, activation: Any) -> bool:
        return is_scalar_function(activation)

    def average(self, parts: Array, counts: Array, momentum: float, unbiased: bool) -> None:
        kernel = kernels.running_average(self.dtype.name)
        n, channels = parts.shape
        with _device(self):
            _launch(
                kernel, _blocks(channels), self, channels, n, _address(self),
                self.strides[0] // self.itemsize, _address(parts), _address(counts), int(unbiased),
                float(momentum),
            )  # fmt: skip

    def compute(self, p: Pass) -> None:
        compute(p)

    def compute_backward(self, p: BackwardPass) -> None:
        compute_backward(p)

    def respond(self, y: Any, axis: int, size: int, alpha: float, beta: float, k: float) -> None:
        last = np.moveaxis(self, axis, -1)
        moved = last if last.flags.c_contiguous else np.moveaxis(self, axis, 1)
        source, target = moved, y
        if not moved.flags.c_contiguous:
            source = moved.copy()
            target = self.new(moved.shape, self.dtype)
        if self.size:
            channels = self.shape[axis]
            inner = 1 if moved is last else math.prod(moved.shape[2:])
            with _device(self):
                _launch(
                    kernels.response(self.dtype.name), _blocks(self.size), self, self.size,
                    channels, inner, _address(source), _address(target), size, float(alpha),
                    float(beta), float(k),
                )  # fmt: skip
        if target is not y:
            y.fill_from(np.moveaxis(target, 1, axis))


class _Placed:
    """What NumPy makes a view from."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def on_device(x: Any) -> OnDevice:
    """Show an array of any library as an `OnDevice`."""
    memory = library_of(x).memory(x)
    dtype = memory.dtype
    numpys = dtype.kind in "biufc" and dtype.type.__module__ == "numpy"
    if not numpys and dtype.name != "bfloat16":
        raise TypeError(
            f"an array on the GPU has dtype {dtype}, expected float16, bfloat16, float32, float64, "
            "or integers or booleans; convert it in its library first"
        )
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
            "data": (memory.address, memory.readonly),
        }
        shown = np.asarray(_Placed(interface, x))
        shown = shown if raw == dtype else shown.view(dtype)
    shown = shown.view(OnDevice)
    shown.owner = x
    return shown


def _address(array: Array | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]


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
        into = source.new(source.shape, dtype, source.strides if order == "K" else None)
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
    steps = {n: steps_of(array, shape) for n, array in operands.items() if n not in _ALIKE}
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
    operands = ascending(operands)
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
    scale = x.new((groups * kernels.SCALE,), np.float64)
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
        partial = x.new((groups * parts * kernels.PARTIAL,), np.float64)
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
        partial = x.new((a * b * parts * columns * kernels.PARTIAL,), np.float64)
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
    sums = (like.new(shape, np.float64, order), like.new(shape, np.float64, order))
    operands: dict[str, Any] = {"x": p.x, "dy": p.dy, "stats": sums[0], "seconds": sums[1]}
    rstd = "rstd" if same else "each"
    operands[rstd] = p.rstd
    if p.mean is not None:
        operands["mean"] = p.mean
    if weighted and p.weight is not None:
        operands["weight"] = p.weight
    # all of them, or none: the kernels walk rstd and mean by the strides of the sums
    statistics = ("stats", "seconds", "rstd", "mean")
    stays, written = (statistics, ()) if same else ((), statistics[:2])
    layout, operands, finish = _described(operands, reduced, stays, written)
    x: Any = operands["x"]
    plan, aligned, groups, parts, per, blocks, team = _geometry(operands, layout)
    a, b, *_, columns = layout.dims
    partial = x.new((a * b * parts * columns * 2,), np.float64)
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
