"""One case: its arrays laid out, the call made three times, and every promise about it checked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np

import fastnorm as fn
from fastnorm import _reference as reference
from fastnorm.operations import OPERATIONS, Operation
from fastnorm.related import activate
from tests.helpers import BF16, F32, F64, epsilon, non_temporal, unit

from .arenas import Arena, Array, Layout, extent, place, strides_of
from .cases import AXES, BY_LABEL, INTEGERS, Case, dtype_of

Results = tuple[Array, ...]

MANY = 150_000  # elements of which long double would take seconds

STATISTICS = ("moments", "Moments.update")  # whose results are not of the shape of x
ELEMENTWISE = tuple(op.name for op in OPERATIONS if op.elementwise_backward)
NO_EPS = ("local_response_norm", "weight_norm", *ELEMENTWISE, "activate", *STATISTICS)
CENTRED = (
    "batch_norm", "instance_norm", "group_norm", "layer_norm", "standardize", "weight_standardize",
)  # fmt: skip


# --- What a case says -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def user_function() -> Any:
    import numba

    return numba.njit(lambda v: v if v > 0 else v * 0.25)


def axes_of(case: Case) -> tuple[int, ...]:
    """The axes that this operation was told, in the order given."""
    ndim = len(case["shape"])
    if "trailing" in case and "axis" not in case:
        return tuple(range(ndim - min(case["trailing"], ndim), ndim))
    return tuple(dict.fromkeys(a % ndim for a in case.get("axis", [ndim - 1])))


def of_some_axes(case: Case, name: str) -> tuple[int, ...]:
    """The shape of an array that is as long as x along some axes, and of length 1 along others."""
    shape = case["shape"]
    axes = {a % len(shape) for a in case[f"{name} axes"]}
    return tuple(n if a in axes else 1 for a, n in enumerate(shape))


def channel_of(case: Case) -> int:
    ndim = len(case["shape"])
    axis = int(case.get("channel_axis", 1))
    return axis if -ndim <= axis < ndim and axis % ndim else 1


def operation_of(case: Case) -> Operation:
    """The operation, which knows what its groups are."""
    op = BY_LABEL[case["op"]]
    if op.label in AXES or op.label.startswith(("layer_norm", "rms_norm", "add_")):
        axes = axes_of(case)
        return dataclasses.replace(op, linked=lambda ndim, channel: axes)
    return op


def groups_of(case: Case) -> int:
    channels = case["shape"][channel_of(case)]
    divisors = [n for n in range(1, channels + 1) if channels % n == 0] or [1]
    return divisors[case["groups"] % len(divisors)]


def numbers(case: Case, shape: tuple[int, ...], dtype: np.dtype[Any], rng: Any) -> Array:
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    z = rng.standard_normal(shape)
    if dtype.kind == "b":
        return z > 0
    info = ml_dtypes.finfo(dtype)
    largest, least = float(info.max), float(info.smallest_subnormal)
    kind = case["values"]
    if kind == "offset":
        z += case["ratio"]
    elif kind == "constant":
        z = np.full(shape, (0.1, 1 / 3, -7.7, 0.0)[case["seed"] % 4])
    elif kind == "two":
        z = np.where(z > 0, 0.1, 0.7)
    elif kind == "scales":
        most = 6 if info.bits == 16 and dtype != BF16 else 60
        axis = case["seed"] % len(shape)
        along = [n if a == axis else 1 for a, n in enumerate(shape)]
        z *= 2.0 ** rng.integers(-most, most, along)
    elif kind == "huge":
        z = rng.uniform(-1, 1, shape) * (largest / 2)
    elif kind == "tiny":
        z *= 8 * float(info.smallest_normal)
    elif kind == "subnormal":
        z *= 64 * least
    elif kind == "range":
        z = np.sign(z) * 2.0 ** rng.uniform(math.log2(least), math.log2(largest), shape)
    return z.astype(dtype)


def bad_number(name: str, dtype: np.dtype[Any]) -> Any:
    info = ml_dtypes.finfo(dtype)
    known = {"max": info.max, "-max": info.min, "least": info.smallest_subnormal}
    with np.errstate(all="ignore"):
        return np.float64(known.get(name, name)).astype(dtype)


# --- Building -------------------------------------------------------------------------------------


class Call:
    """The arrays of a case where they lie, and the same numbers side by side for the oracle."""

    def __init__(self, case: Case) -> None:
        self.case, self.op = case, operation_of(case)
        self.rng = np.random.default_rng(case["seed"])
        self.arenas: dict[str, Arena] = {}
        self.arrays: dict[str, Array] = {}
        self.plain: dict[str, Array] = {}
        self.options: dict[str, Any] = {}
        self.out: Array | None = None
        self.shape = tuple(case["shape"])
        self.dtype = dtype_of(case["dtype"])
        self.floats = F64 if case["dtype"] in INTEGERS else self.dtype
        self.computing = F64 if self.floats == F64 else F32
        self.stranger = case.get("stranger") or (None, None)
        self.spoilt: set[str] = set()  # arrays other than x with numbers that are none
        self._parameters()
        self._x_and_out()
        for name in self.arrays.keys() - {"x"}:
            self.spoil(name)
        for name, array in self.arrays.items():
            if name not in self.plain:
                self.plain[name] = self._plainly(array)
        for arena in self.arenas.values():
            arena.remember()

    @staticmethod
    def _plainly(array: Array) -> Array:
        return np.array(array.astype(array.dtype.newbyteorder("=")), order="C")

    def put(self, name: str, values: Array, layout: Layout | None = None) -> None:
        if self.stranger[0] == name:
            values = np.zeros(values.shape, dtype_of(self.stranger[1]))
            layout = {}
        self.arrays[name], self.arenas[name] = place(values, layout or {})

    def spoil(self, name: str) -> None:
        """Put the numbers into an array that a case wants there, unless it is x by another name."""
        array = self.arrays[name]
        if not array.size or array.dtype.kind in "iub" or self.stranger[0] == name:
            return
        dtype = array.dtype.newbyteorder("=")
        for operand, number, where in self.case.get("bad elsewhere") or []:
            if operand == name and array is not self.arrays.get("x"):
                writable, array.flags.writeable = array.flags.writeable, True
                array.flat[int(where * array.size)] = bad_number(number, dtype)
                array.flags.writeable = writable
                self.spoilt.add(name)

    def _parameters(self) -> None:
        case, op, shape = self.case, self.op, self.shape
        channel, axes = channel_of(case), axes_of(case)
        options = {"channel_axis": channel} if "channel_axis" in op.features else {}
        if op.grouped:
            options["num_groups"] = groups_of(case)
        p = op.parameters(shape, self.floats, self.rng, **options)
        own: tuple[int, ...] = ()
        each: tuple[int, ...] = ()
        if op.label == "instance_norm (given)":
            p = BY_LABEL["batch_norm (inference)"].parameters(
                shape, self.floats, self.rng, **options
            )
            p = {k: v for k, v in p.items() if k != "training"} | {"use_input_stats": False}
        if "channel_axis" in op.features:
            own, each = (shape[channel],), (shape[0], shape[channel])
        elif op.label.startswith(("layer_norm", "rms_norm", "add_")):
            if "trailing" in case and "axis" not in case:
                p.pop("axis", None)
                p["normalized_shape"] = tuple(shape[a] for a in axes)
            else:
                p["axis"] = axes
            own = tuple(shape[a] for a in axes)
            each = tuple(n if a in axes or a == 0 else 1 for a, n in enumerate(shape))
            if len(axes) == len(shape):
                each = own
        elif op.label in ("standardize", "l2_normalize", "moments", "Moments.update"):
            p["axis"] = axes
        elif op.name in (*ELEMENTWISE, "activate"):
            own = shape[-1:]
            each = (shape[0], *[1] * (len(shape) - 2), shape[-1])[: len(shape)]
            if len(shape) == 1:
                each = own
        if op.name == "local_response_norm":
            p["size"] = (1, 2, 3, 5)[case["seed"] % 4]
        if case.get("weight_offset") and op.name == "rms_norm":
            p["weight_offset"] = case["weight_offset"]
        if case.get("eps") is not None and op.name not in NO_EPS:
            p["eps"] = case["eps"]
        if case.get("ddof"):
            p["ddof"] = case["ddof"]
        if case.get("return_stats"):
            p["return_stats"] = True
        takes = [
            n for n in ("weight", "bias") if n in p or (n == "weight" and op.name == "rms_norm")
        ]
        if op.label == "activate":
            takes = ["bias"]
            axes = ()
        for name in takes:
            p.pop(name, None)
            kind = case.get(name)
            if kind is None and op.name == "global_response_norm":
                kind = "shared"
            if kind is None:
                continue
            full = len(axes) < len(shape) or "channel_axis" in op.features
            few = of_some_axes(case, name)
            if not full and len(few) == len(shape):
                few = own
            shapes = {"shared": own, "per sample": each, "some axes": few}
            place_ = (shapes | {"full": shape if full else own})[kind]
            dtype = dtype_of(case.get(f"{name} dtype") or self.floats.name)
            scale = case["weight scale"] if name == "weight" else 1.0
            values = (name == "weight") + self.rng.standard_normal(place_) / 4
            if scale != 1.0 and case.get("weight scale here and there"):
                scale = np.where(self.rng.random(place_) < 0.5, scale, 1.0)
            values = values * scale
            with np.errstate(all="ignore"):
                self.put(name, values.astype(dtype), case.get(f"{name} layout"))
        if "running_mean" in p:
            dtype = case.get("running")
            if dtype is None and given_statistics(op):
                dtype = "float64"
            for name in ("running_mean", "running_var"):
                values = p.pop(name)
                if dtype is not None:
                    self.put(name, values.astype(dtype_of(dtype)))
                    if "training" in op.label or op.label == "instance_norm":
                        self.arenas[name].written.append(self.arrays[name])
        for name in ("g", "residual"):
            if name in p:
                self.put(name, p.pop(name))
        kind = case.get("residual")
        if kind and kind != "x":
            values = self.rng.standard_normal(shape).astype(dtype_of(kind))
            self.put("residual", values, self._usable("residual"))
        for name in ("alpha", "shift"):
            if name in p:
                p[name] = float(p[name])
        kind = case.get("where")
        if kind:
            mask = self.rng.random(shape) < 0.7
            if kind == "last axis":
                mask = mask[(0,) * (len(shape) - 1)] if 0 not in shape else mask
            elif kind == "some axes":
                mask = self.rng.random(of_some_axes(case, "where")) < 0.7
            elif kind in ("nothing", "everything"):
                mask = np.full(shape, kind == "everything")
            self.put("where", mask, case["where layout"])
        activation = case.get("activation")
        if activation:
            slow = self.computing == F64 and math.prod(shape) > 4096
            p["activation"] = {"function": None, "gelu": "silu" if slow else "gelu"}.get(
                activation, activation
            ) or user_function()
        self.options |= p

    def _usable(self, name: str) -> Layout:
        """The layout of an array, which must be one to write into if `out` is that array."""
        layout = dict(self.case.get("layout" if name == "x" else f"{name} layout") or {})
        into_x = self.case.get("out") in ("x", "shifted", "reversed") and name == "x"
        if into_x or self.case.get("out") == name:
            for key in ("repeated", "windows", "locked"):
                layout.pop(key, None)
        return layout

    def _x_and_out(self) -> None:
        case, shape = self.case, self.shape
        target = case.get("out")
        if target is not None and target == self.stranger[0]:
            target = "own"
        if self.dtype != self.floats and target in ("x", "shifted", "reversed"):
            target = "own"
        layout = self._usable("x")
        values = numbers(case, shape, self.dtype, self.rng)
        step = self.dtype.itemsize
        if target == "shifted" and math.prod(shape) and not self.stranger[0]:
            layout.pop("misaligned", None)
            layout.pop("extra", None)
            strides = strides_of(shape, step, layout)
            size, shift = extent(shape, strides, step), case["shift"] * step
            arena = Arena(size + abs(shift), at_end=not layout.get("front"))
            x = arena.array(shape, self.dtype, strides, max(-shift, 0))
            self.out = arena.array(shape, self.dtype, strides, max(shift, 0))
            x[...] = values
            self.arrays["x"], self.arenas["x"] = x, arena
        else:
            self.put("x", values, layout)
        x, arena = self.arrays["x"], self.arenas["x"]
        if case.get("residual") == "x" and self.stranger[0] is None:
            self.arrays["residual"] = x
        # with and without the bad numbers
        self.clean = self._plainly(x)
        self.clean_bytes = arena.bytes.copy()
        if self.dtype.kind not in "iub" and x.size and self.stranger[0] != "x":
            writable, x.flags.writeable = x.flags.writeable, True
            for name, where in case["bad"]:
                x.flat[int(where * x.size)] = bad_number(name, self.dtype)
            x.flags.writeable = writable
        self.plain["x"] = self._plainly(x)
        if target is None or "out" not in self.op.features:
            self.out = None
            return
        if target == "x":
            self.out = x
        elif target == "reversed":
            self.out = x[::-1]
        elif target == "residual" and case.get("residual") == self.floats.name:
            self.out, arena = self.arrays["residual"], self.arenas["residual"]
        elif target in ("weight", "bias", "where") and self._fits(target, x.size):
            dtype, values = self.floats, self.arrays[target]
            arena = Arena(x.size * dtype.itemsize)
            self.out = arena.array(shape, dtype, strides_of(shape, dtype.itemsize, {}))
            own = values.dtype if target == "where" else dtype
            shared = arena.array(values.shape, own, strides_of(values.shape, own.itemsize, {}))
            with np.errstate(all="ignore"):
                shared[...] = values.astype(own)
            self.arrays[target], self.arenas[target] = shared, arena
        elif self.out is None:
            empty = np.zeros(shape, self.floats)
            self.out, arena = place(empty, self._usable_out())
            self.arenas["out"] = arena
        arena.written.append(self.out)

    def _fits(self, name: str, size: int) -> bool:
        """Whether there is such an array, which fits into the memory of a result."""
        return name in self.arrays and self.arrays[name].size <= size

    def _usable_out(self) -> Layout:
        return dict(self.case.get("out layout") or {})

    # --- Calling ---

    def arguments(self) -> dict[str, Any]:
        return {n: a for n, a in self.arrays.items() if n != "x"} | self.options

    def __call__(self, x: Array | None = None, **more: Any) -> Any:
        x = self.arrays["x"] if x is None else x
        given = self.arguments() | more
        if self.out is not None:
            given.setdefault("out", self.out)
        if self.op.label == "activate":
            return activate(x, given.pop("activation", None), **given)
        if self.op.label == "Moments.update":
            m = fn.Moments(given["axis"]).update(x, given.get("where"))
            return m.count, m.mean, m.var(given.get("ddof", 0))
        return getattr(fn, self.op.name)(x, **given)

    def restore(self) -> None:
        for arena in self.arenas.values():
            arena.restore()

    def check_memory(self) -> None:
        for name, arena in self.arenas.items():
            arena.check(name)

    def written(self) -> list[Array]:
        return [self._plainly(a) for arena in self.arenas.values() for a in arena.written]


def as_tuple(result: Any) -> Results:
    values = result if isinstance(result, tuple) else (result,)
    return tuple(np.asarray(v) for v in values)


def kept(result: Any) -> Results:
    """Copies, as what came may lie in memory that is about to be set back."""
    return tuple(np.array(v, order="K") for v in as_tuple(result))


def without_signs(results: Results) -> Results:
    """Every NaN is the same one."""
    copies = tuple(a.copy() for a in results)
    for a in copies:
        a[a != a] = np.nan if a.dtype.kind not in "iub" else 0
    return copies


def same(found: Results, other: Results, what: str) -> None:
    assert len(found) == len(other)
    for a, b in zip(found, other):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), what
        wrong = np.count_nonzero(_bits(a) != _bits(b))
        assert not wrong, f"{what}: {wrong} of {a.size} numbers have other bits"


def three_times(call: Callable[[], Any], case: Case, memory: Call) -> Results:
    """The result of three calls, by different threads and stores: the same bits, and no traces."""
    first: Results = ()
    turns = enumerate(case["threads"])
    for past, together in itertools.groupby(turns, lambda turn: turn[0] in case["past"]):
        # Other stores forget which calls are cached, so what needs none of them is not among them.
        with non_temporal() if past else nullcontext():
            for turn, threads in together:
                memory.restore()
                with fn.threads(threads):
                    result = call()
                memory.check_memory()
                found = kept(result) + tuple(memory.written())
                if turn == 0:
                    first = found
                what = f"call {turn + 1} of three, on {threads} threads"
                if past or 0 in case["past"]:
                    # which stores are used is told by the size, and by where in a cache line the
                    # result begins; the sign of a NaN is not promised
                    found, what = without_signs(found), f"{what}, with non-temporal stores or not"
                    same(found, without_signs(first), what)
                else:
                    same(found, first, what)
    return first


# --- The oracle -----------------------------------------------------------------------------------


def expected(call: Call, x: Array, wide: Any, *leave: str, **instead: Any) -> Any:
    p = call.options | {n: a for n, a in call.plain.items() if n not in ("x", "dy")}
    p = {n: a.copy() if n.startswith("running") else a for n, a in p.items()} | instead
    p = {n: a for n, a in p.items() if n not in (*leave, "activation", "ddof", "return_stats")}
    if call.op.label == "activate":
        return x.astype(wide) + (p["bias"].astype(wide) if "bias" in p else 0)
    return getattr(reference, call.op.name)(x, **p, dtype=wide)


def mean_over_spread(x: Array, ids: Array, mask: Any, eps: float) -> Array:
    """|mean| * rstd of its group, for every element; 0 where the group is constant."""
    flat, chosen = ids.ravel(), np.broadcast_to(mask, x.shape).ravel()
    values = np.nan_to_num(x.astype(np.float64).ravel())
    scale = max(abs(values).max(), 1e-300)
    values = np.where(chosen, values / scale, 0)
    count = np.maximum(np.bincount(flat, chosen), 1)
    mean = np.bincount(flat, values) / count
    rest = np.where(chosen, values - mean[flat], 0)
    spread = np.sqrt(np.bincount(flat, rest**2) / count)
    with np.errstate(all="ignore"):
        spread = np.hypot(spread, math.sqrt(eps) / scale)
        ratio = np.where(spread > 1e-15 * abs(mean), abs(mean) / spread, 0)
    return ratio[ids]


def allowed(call: Call, x: Array, wide: Any) -> tuple[Array, Array]:
    """(exact, how far off an element of the result may be before it is stored).

    In units of what is computed in: 4 of the largest term for each of float32's and float64's (what
    the documentation promises), twice that for an activation. float64 has no wider type for its
    sums: its mean is off by some units of the spread; the others' by what two floats do not hold of
    it. Of bfloat16's variance and mean 2^-20 may be lost.
    """
    op, case = call.op, call.case
    eps_of = epsilon(call.computing)
    affine = {n for n in ("weight", "bias", "residual") if n in call.arrays}
    if op.outputs > 1:
        affine.discard("residual")
    exact = expected(call, x, wide)
    exact = exact[0] if isinstance(exact, tuple) else exact
    plain = exact
    if op.name == "global_response_norm":
        plain = expected(call, x, wide, bias=np.zeros(call.plain["bias"].shape))
        size = abs(plain - x.astype(wide)) + abs(x.astype(wide)) + abs(exact - plain)
        return exact, 16 * eps_of * size
    if affine - {"weight"}:
        if op.label == "activate":
            plain = x.astype(wide)
        else:
            plain = expected(call, x, wide, *(affine - {"weight"}))
    residual = abs(call.plain["residual"].astype(wide)) if "residual" in affine else 0
    size = abs(plain) + abs(exact - plain) + 2 * residual
    w = abs(call.plain["weight"].astype(np.float64)).max() if "weight" in affine and x.size else 1.0
    w += abs(case.get("weight_offset") or 0)
    w = 1.0 if "weight" not in affine else w
    error = 4 * eps_of * size
    apart: Any = 0.0
    name = op.name
    if name in CENTRED:
        eps = {"standardize": 0.0}.get(name, 1e-5)
        eps = call.options.get("eps", eps)
        if given_statistics(op):
            mean, var = (call.plain[f"running_{n}"].astype(np.float64) for n in ("mean", "var"))
            ratio: Any = (abs(mean) / np.sqrt(var + eps)).max() if mean.size else 0.0
            apart = abs(x.astype(wide)) / np.sqrt(var.min() + eps) if var.size else 0.0
        else:
            ratio = mean_over_spread(x, group_ids(call), call.plain.get("where", True), eps)
        if call.computing == F64:
            error = error + w * 2.0**-52 * (8 + 2.0**-46 * ratio)
        else:
            error = error + w * 2.0**-44 * (1 + ratio)
    if call.computing == F64 and "where" in call.plain and name not in NO_EPS:
        apart = abs(expected(call, x, wide, *affine))  # where x was not selected
    if call.floats == BF16 and name not in ("activate", *ELEMENTWISE, "local_response_norm"):
        error = error + 2.0**-19 * (abs(plain) + w)
    if name in ("local_response_norm", *ELEMENTWISE):
        error = 4 * error
    if "shift" in call.options:
        # where alpha x and the shift cancel: the centre is kept to float64's digits, or two floats'
        terms = abs(x.astype(wide) * call.options["alpha"]) + abs(call.options["shift"])
        error = error + w * 2.0 ** (-50 if call.computing == F64 else -44) * terms
    # a sum on the way may leave the range, and so may x in units of a spread that is not its own
    error = np.where(np.maximum(size, apart) > np.finfo(call.computing).max / 4, np.inf, error)
    activation = call.options.get("activation")
    if activation is not None:
        error = 1.2 * error + 8 * eps_of * abs(exact)
        with np.errstate(all="ignore"):
            exact = reference.activate(exact, activation)
    return exact, error


def compare(got: Array, exact: Array, error: Array, computing: Any, judged: Any, what: str) -> None:
    """Fail unless `got` is `exact` but for `error` and the rounding of storing it."""
    dtype = got.dtype.newbyteorder("=")
    largest = float(ml_dtypes.finfo(dtype).max)
    wide = got.astype(np.longdouble)
    exact = np.asarray(exact, np.longdouble)
    with np.errstate(all="ignore"):
        # below the normal numbers of the type that is computed in, too
        error = error + 4 * unit(0.0, computing) + 0.5000001 * unit(np.nan_to_num(exact), dtype)
        if dtype.itemsize == 2:  # stored through a float
            error = error + 2.0**-24 * abs(exact)
        right = (abs(wide - exact) <= error) | (wide == exact) | (np.isnan(wide) & np.isnan(exact))
        # about as large as the dtype holds, or on the way there
        right |= (abs(exact) + error > largest / 4) & ~(abs(wide) < largest / 8)
        right |= ~np.isfinite(error)
    right |= ~np.broadcast_to(judged, right.shape)
    if not right.all():
        where = tuple(int(i) for i in np.argwhere(~right)[0])
        off = np.broadcast_to(error, right.shape)[where]
        raise AssertionError(
            f"{what}: {(~right).sum()} of {right.size} are wrong, the first at {where}: "
            f"{wide[where]} instead of {exact[where]} or at most {off} from it"
        )


# --- Judging --------------------------------------------------------------------------------------


def one_value(call: Call) -> bool:
    """Whether a statistic is of one value, which some norms refuse."""
    if call.op.name not in ("batch_norm", "instance_norm", "group_norm"):
        return False
    own = call.op.grouped or call.op.linked(len(call.shape), channel_of(call.case))
    if not own:
        return False
    if not math.prod(call.shape):
        return True  # none, times one
    ids = group_ids(call)
    mask = np.broadcast_to(call.plain.get("where", True), call.shape)
    one = np.bincount(ids.ravel(), mask.ravel()) == 1
    return bool(one.any()) or math.prod(call.shape) == int(ids.max()) + 1


def group_ids(call: Call) -> Array:
    return call.op.group_ids(
        call.shape, channel_axis=channel_of(call.case), num_groups=call.options.get("num_groups")
    )


def judge(case: Case) -> None:
    """Make the call that a case describes; AssertionError says which promise was broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call = Call(case)
        if case["known"] and call.stranger[0] is None:
            _make_known(call)
        used = call.stranger[0] in call.arrays
        try:
            results = three_times(call, case, call)
        except TypeError:
            call.check_memory()
            if not used:
                raise
            return
        except ValueError:
            call.check_memory()
            if not one_value(call) and not used:
                raise
            return
        assert not used or call.stranger[0] == "dy", f"{call.stranger} was taken"
        if call.out is None and 0 not in call.shape:
            _check_form(call, results)
        if not math.prod(call.shape):
            return
        bad = _check_neighbours(call, results)
        _check_alone(call, results)
        if call.out is not None:
            call.restore()
            own = kept(call(out=None))
            call.restore()
            native = results[0].astype(results[0].dtype.newbyteorder("="), order="K")
            same(
                without_signs((own[0].astype(native.dtype),)), without_signs((native,)), "with out"
            )
        if not call.spoilt:
            _check_numbers(call, results, bad)
        if case.get("backward"):
            (_check_backward if call.op.backward else _check_elementwise_backward)(call, bad)


def _make_known(call: Call) -> None:
    """The same call on plain arrays of the same shapes: it is cached afterwards."""
    plain = {n: a.copy() for n, a in call.plain.items() if n != "x"}
    if call.out is not None:
        plain["out"] = np.empty(call.shape, call.floats)
    try:
        call(call.clean.copy(), **plain)
    except ValueError:
        if not one_value(call):
            raise


def _check_form(call: Call, results: Results) -> None:
    """The result has the shape, the dtype and the order in memory of x."""
    if call.op.label in STATISTICS:
        return
    x, y = call.arrays["x"], results[0]
    assert y.shape == x.shape
    if x.dtype.kind not in "iub":
        assert y.dtype == x.dtype
        if not {"repeated", "windows"} & call.case["layout"].keys():
            long = [axis for axis, n in enumerate(x.shape) if n > 1]
            order = [[a.strides[axis] for axis in long] for a in (y, np.empty_like(x))]
            assert order[0] == order[1], "another order in memory than x has"


def _bits(a: Array) -> Array:
    return np.ascontiguousarray(a).view(f"u{a.itemsize}")


def _check_neighbours(call: Call, results: Results) -> Array:
    """Where x has numbers that are none, and what they reach; the others are what they were."""
    x = call.plain["x"]
    if x.dtype.kind in "iub":
        return np.zeros(x.shape, bool)
    changed = _bits(x) != _bits(call.clean)
    ids = group_ids(call)
    with np.errstate(all="ignore"):
        finite = np.isfinite(x.astype(np.float64))
    hit, none = (np.isin(ids, np.unique(ids[m])) if m.any() else m for m in (changed, ~finite))
    if changed.any() and "windows" not in call.case["layout"]:
        call.restore()
        if call.out is not None and np.may_share_memory(call.out, call.arrays["x"]):
            start = call.arenas["x"].before
            call.arenas["x"].before = call.clean_bytes
            call.restore()
            call.arenas["x"].before = start
        else:
            call.arenas["x"].bytes[:] = call.clean_bytes
        clean = kept(call())
        call.restore()
        if results[0].shape == x.shape:
            same((results[0][~hit],), (clean[0][~hit],), "groups without bad numbers")
    entering = ~finite & np.broadcast_to(call.plain.get("where", True), x.shape)
    nan = np.isnan(x.astype(np.float64)) & entering
    if nan.any() and call.op.name not in NO_EPS and call.options.get("activation") is None:
        reached = np.isin(ids, np.unique(ids[nan]))
        y = results[0].astype(np.float64)
        if call.op.name != "global_response_norm":
            assert np.isnan(y[reached]).all(), "a group with a NaN has numbers in its result"
    return none


def given_statistics(op: Operation) -> bool:
    return "inference" in op.label or "given" in op.label


def alone(call: Call) -> Callable[[Array], Array] | None:
    """What takes one sample's part of an array, where no other has a part in what comes of it.

    In double, and of what is converted first, where samples lie one after another: as neighbours in
    memory they are columns, of which another number may be cut otherwise, and a converted sample,
    or one that is repeated, has lost what lay around it (docs/determinism.rst).
    """
    x, n = call.arrays["x"], call.shape[0]
    if n < 2 or call.op.label in STATISTICS or call.op.name == "weight_norm":
        return None
    long = [abs(step) for step, size in zip(x.strides, x.shape) if size > 1]
    between = abs(x.strides[0]) < max(long)
    taken = x.dtype.isnative and x.flags.aligned and x.dtype.kind not in "iub" and 0 not in long
    if (between and (call.computing == F64 or not taken)) or long.count(abs(x.strides[0])) > 1:
        return None
    if not given_statistics(call.op):
        ids = group_ids(call).reshape(n, -1)
        own = np.unique(ids[0]).size
        if np.unique(ids).size != n * own or own == ids[0].size:  # of one value, which is refused
            return None
    i = call.case["seed"] % n
    pairs = "channel_axis" in call.op.features

    def part(array: Array) -> Array:
        whole = array.ndim == x.ndim or (pairs and array.ndim == 2)
        return array[i : i + 1] if whole and array.shape[0] == n else array

    return part


def _check_alone(call: Call, results: Results) -> None:
    part = alone(call)
    moves = "running_mean" in call.arrays and not given_statistics(call.op)
    if part is None or call.out is not None or moves:
        return
    given = {name: part(array) for name, array in call.arrays.items() if name != "x"}
    one = kept(call(part(call.arrays["x"]), **given))
    call.restore()
    whole = without_signs((part(results[0]),))
    same(without_signs(one[:1]), whole, "a sample alone and among others")


def _check_numbers(call: Call, results: Results, bad: Array) -> None:
    op, x, case = call.op, call.plain["x"], call.case
    if x.dtype.kind in "iub":
        x = x.astype(np.float64)  # what is computed with, of which a large one is no whole number
    extreme = case["bad"] or case["values"] in ("huge", "tiny", "subnormal", "range")
    longer = call.computing == F64 and (x.size <= MANY or extreme)
    wide = np.longdouble if longer else np.float64
    ordinary = case["values"] in ("normal", "offset") and not case["bad"]
    if op.name == "global_response_norm" and not ordinary:
        return
    if op.label in STATISTICS:
        _check_moments(call, x, results, bad)
        return
    if op.label == "standardize" and case.get("ddof"):
        return
    if op.outputs > 1:
        total = results[1].astype(results[1].dtype.newbyteorder("="))
        parts = [call.plain[n].astype(np.longdouble) for n in ("x", "residual")]
        with np.errstate(all="ignore"):
            error = 2 * epsilon(call.computing) * (abs(parts[0]) + abs(parts[1]))
            compare(total, parts[0] + parts[1], error, call.computing, ~bad, "x + residual")
        single = Call.__new__(Call)
        single.__dict__ |= call.__dict__
        single.op = dataclasses.replace(op, name=op.name[4:], outputs=1)
        single.arrays = {n: a for n, a in call.arrays.items() if n != "residual"}
        single.plain = {n: a for n, a in call.plain.items() if n != "residual"} | {"x": total}
        with np.errstate(all="ignore"):
            finite = np.isfinite(total.astype(np.float64))
        ids = group_ids(call)
        bad = bad | np.isin(ids, np.unique(ids[~finite]))
        call, x = single, total
    with np.errstate(all="ignore"):
        exact, error = allowed(call, x, wide)
    if call.computing == F64 and wide == np.float64:
        error = 2 * error  # the oracle's own
    compare(results[0], exact, error, call.computing, ~bad, op.label)


def _check_moments(call: Call, x: Array, results: Results, bad: Array) -> None:
    axes = call.options["axis"]
    mean, var = results[-2:]
    where = call.plain.get("where")
    with np.errstate(all="ignore"):
        exact_mean, exact_var = reference.moments(x, axes, where=where, dtype=np.longdouble)
        count = reference.count_of(x.shape, axes, where).reshape(mean.shape)
        exact_mean, exact_var = exact_mean.reshape(mean.shape), exact_var.reshape(mean.shape)
        ddof = call.options.get("ddof", 0)
        exact_var = np.where(count > ddof, exact_var * (count / (count - ddof)), np.nan)
        judged = ~bad.any(axis=axes) & (np.sqrt(exact_var * count) < 1e150) & (count > ddof)
        spread = np.sqrt(np.nan_to_num(exact_var))
        # what tests/test_moments.py derives, and bfloat16's squares added up by fours
        rtol = 5e-15
        compare(mean, exact_mean, rtol * (spread + abs(exact_mean)), F64, judged, "mean")
        tiny = 1e-300
        compare(var, exact_var, rtol * exact_var + tiny, F64, judged, "variance")
    if call.op.label == "Moments.update":
        assert (results[0] == count).all()


# --- The way back ---------------------------------------------------------------------------------


def _check_backward(call: Call, bad: Array) -> None:
    from tests import test_backward as back  # pytest and hypothesis with it
    from tests.test_through_activation import off_by, slope_of

    case, op = call.case, call.op
    added: tuple[str, ...] = ()
    if case["through"]:
        added = ("residual",) if op.name == "rms_norm" else ("bias", "residual")
    forward = {k: v for k, v in call.options.items() if k not in ("activation", "return_stats")}
    given = {n: a for n, a in call.arrays.items() if n not in ("x", "residual")}
    call.restore()
    call.out = None
    result = getattr(fn, op.name)(call.arrays["x"], **given, **forward, return_stats=True)
    call.restore()
    memory = Call.__new__(Call)
    memory.__dict__ |= call.__dict__
    memory.arenas = {n: a for n, a in call.arenas.items() if n in ("x", "weight", "where", *added)}
    memory.arrays = {}
    for arena in memory.arenas.values():
        arena.written = []
    stats = []
    for name, value in zip(op.stats, result[1:]):
        memory.put(name, value, case["statistics layout"])
        stats.append(memory.arrays[name])
    rng = np.random.default_rng(case["seed"] + 1)
    dtype = dtype_of(case["dy dtype"] or call.floats.name)
    memory.put("dy", rng.standard_normal(call.shape).astype(dtype), case["dy layout"])
    memory.spoil("dy")
    for arena in memory.arenas.values():
        arena.remember()
    p = call.options | {n: a for n, a in call.arrays.items() if n in ("weight", "where")}
    keywords = back.keywords(op, p) | {n: call.arrays[n] for n in added if n in call.arrays}
    activation = call.options.get("activation") if case["through"] else None
    if activation is not None:
        keywords |= {"activation": activation}
        keywords |= {} if isinstance(activation, str) else {"derivative": "central"}
    x, dy = call.arrays["x"], memory.arrays["dy"]

    def backward() -> Any:
        return getattr(fn, str(op.backward))(dy, x, *stats, **keywords)

    try:
        results = three_times(backward, case, memory)
    except TypeError:
        if call.stranger[0] != "dy":
            raise
        return
    assert call.stranger[0] != "dy", f"dy of {call.stranger[1]} was taken"
    part = alone(call)
    if part is not None:
        weight = {"weight": part(p["weight"])} if "weight" in p and "weight" in keywords else {}
        mask = {"where": part(p["where"])} if "where" in p else {}
        mask |= {n: part(keywords[n]) for n in added if n in keywords}
        one = getattr(fn, str(op.backward))(
            part(dy), part(x), *map(part, stats), **keywords | weight | mask
        )
        whole = without_signs((part(results[0]),))
        same(without_signs(kept(one[:1])), whole, "dx of a sample alone and among others")
    rstd = result[-1]
    moderate = bool(((rstd < 1e15) & (rstd > 1e-15)).all())
    if call.computing == F64 and x.size > MANY:
        return
    if bad.any() or not moderate or case["values"] not in ("normal", "offset", "two"):
        return
    if call.spoilt - {"dy", "weight", "bias", "residual"}:
        return
    if not all(_held(a, call.computing) for a in (dy, call.arrays.get("weight")) if a is not None):
        return
    plain = call.plain["x"]
    p = call.options | {n: a for n, a in call.plain.items() if n in ("weight", "where")}
    if op.name == "batch_norm":
        p["training"] = call.options["training"]
    slope = Call._plainly(dy)
    values = tuple(Call._plainly(s) for s in stats)
    wide = plain.astype(np.float64) if plain.dtype.kind in "iub" else plain
    loose: Any = 0.0
    if activation is not None:
        if not isinstance(activation, str):
            return
        others = {n: call.plain[n] for n in added if n in call.plain}
        found = off_by(op, slope, wide, values, p, others, activation)
        slope, loose = slope_of(activation, found.z) * slope.astype(np.longdouble), found.loose
    exact = back.exact_gradients(op, slope, wide, values, p)
    with np.errstate(all="ignore"):
        sizes = back.sizes(op, slope, wide, values, p)
        more: Any = (0.0,) * len(sizes)
        if activation is not None:
            more = back.sizes(op, loose, wide, values, p)
    judged: Any = True  # dweight
    if "inference" in op.label:
        # whether xhat is in range is not for its statistics to say
        mean, spread = (back.along(op, s, wide, p) for s in values)
        with np.errstate(all="ignore"):
            judged = abs((wide.astype(np.float64) - mean) * spread) < 1e30
    names = ("dx", "dweight", "dbias")
    least = unit(0.0, call.computing)
    for name, value, right, size, off in zip(names, results, exact, sizes, more):
        terms = wide.size // max(1, min(right.size, values[-1].size))
        added = terms if call.computing == F64 else 0
        error = (8 + added / 2) * epsilon(call.computing) * np.asarray(size, np.longdouble)
        # a product below the normal numbers is half of the least number off; of dx, times rstd
        error = error + off + least * (terms if name != "dx" else 4 * max(1.0, values[-1].max()))
        value = value.astype(value.dtype.newbyteorder("="))
        if name != "dweight" or np.all(judged):
            compare(value, right, error, call.computing, True, f"{op.backward}: {name}")


def _held(a: Array, computing: Any) -> bool:
    """Whether what is computed in can hold these numbers, as gradients or weights, with digits."""
    size = abs(a.astype(np.float64))[a != 0]
    info = np.finfo(computing)
    if computing == F64:  # there is no wider type for what products leave its range
        return bool(np.all((size > 1e-100) & (size < 1e100)))
    same = a.dtype.itemsize <= 4
    return bool(np.all((size > (0 if same else info.smallest_normal)) & (size <= float(info.max))))


def _check_elementwise_backward(call: Call, bad: Array) -> None:
    case, op = call.case, call.op
    call.restore()
    memory = Call.__new__(Call)
    memory.__dict__ |= call.__dict__
    memory.arenas = {n: a for n, a in call.arenas.items() if n in ("x", "weight")}
    memory.arrays = {}
    rng = np.random.default_rng(case["seed"] + 1)
    dtype = dtype_of(case["dy dtype"] or call.floats.name)
    memory.put("dy", rng.standard_normal(call.shape).astype(dtype), case["dy layout"])
    memory.spoil("dy")
    for arena in memory.arenas.values():
        arena.remember()
    p = call.options | {n: a for n, a in call.arrays.items() if n == "weight"}
    x, dy = call.arrays["x"], memory.arrays["dy"]

    def backward() -> Any:
        return getattr(fn, str(op.elementwise_backward))(dy, x, **p)

    try:
        results = three_times(backward, case, memory)
    except TypeError:
        if call.stranger[0] != "dy":
            raise
        return
    assert call.stranger[0] != "dy", f"dy of {call.stranger[1]} was taken"
    if call.spoilt or "dy" in memory.spoilt or case["weight scale"] != 1.0:
        return
    if bad.any() or case["values"] not in ("normal", "offset", "two") or x.size > MANY:
        return
    p = call.options | {n: a for n, a in call.plain.items() if n == "weight"}
    slope, plain = Call._plainly(dy), call.plain["x"]
    back = getattr(reference, str(op.elementwise_backward))
    exact = back(slope, plain, **p, dtype=np.longdouble)
    with np.errstate(all="ignore"):
        # float64 rounds each term, and of a slope the exponent, u or u^2
        wide, rise = abs(plain.astype(np.float64)), abs(slope.astype(np.float64))
        size_of = {n: abs(np.asarray(v).astype(np.float64)) for n, v in p.items()}
        reach = 1 + (size_of["alpha"] * wide).max(initial=0.0) + size_of.get("shift", 0.0)
        terms = rise * (1 + wide) * (1 + size_of["alpha"]) * size_of.get("weight", 1.0)
        total = terms.sum() + rise.sum()
        for name, value, right in zip(op.gradients, results, exact, strict=True):
            added = 0 if name == "dx" else plain.size  # one after the other, each sum rounded
            error = (2.0**-50 * reach**2 + added * 2.0**-53) * (terms if name == "dx" else total)
            value = value.astype(value.dtype.newbyteorder("="))
            compare(value, right, error, F64, True, f"{op.elementwise_backward}: {name}")
