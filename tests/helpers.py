"""What test files share: calling operations, measuring errors, making and laying out data."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import fastnorm as fn
from fastnorm import _reference as reference
from fastnorm import machine
from fastnorm.operations import Operation
from fastnorm.runtime import on_machine

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parent.parent

# Optional libraries whose absence is an error: their names in an import, with spaces between them.
REQUIRED = os.environ.get("FASTNORM_REQUIRE", "").split()

BACKENDS: tuple[str, ...] = tuple(fn.show_config("dicts")["backends"]["at hand"])
COMPILED = "cython" in BACKENDS

F16, BF16, F32, F64 = (np.dtype(t) for t in ("f2", ml_dtypes.bfloat16, "f4", "f8"))
DTYPES = (F16, BF16, F32, F64)
SINGLE_AND_DOUBLE = (F32, F64)

# Bits after the leading one, and the exponent of the smallest number of all.
_DIGITS = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
_LEAST = {"float16": -24, "bfloat16": -133, "float32": -149, "float64": -1074}


def non_temporal(always: bool = True) -> AbstractContextManager[None]:
    """Results of any size take non-temporal stores, which as a rule only large ones do."""
    return on_machine(replace(machine.here, always_non_temporal=always))


# --- Operations -----------------------------------------------------------------------------------


def call(op: Operation, x: Any, parameters: dict[str, Any], **options: Any) -> Any:
    """What fastnorm answers; running statistics in `parameters` are left as they are."""
    copies = {k: v.copy() if k.startswith("running") else v for k, v in parameters.items()}
    return getattr(fn, op.name)(x, **copies, **options)


def expected(op: Operation, x: Any, parameters: dict[str, Any], **options: Any) -> Any:
    """What the reference answers in long double, likewise."""
    copies = {k: v.copy() if k.startswith("running") else v for k, v in parameters.items()}
    return getattr(reference, op.name)(x, **copies, dtype=np.longdouble, **options)


def without(parameters: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in names}


def named(value: Any) -> str:
    """An id for a test: that of an operation, or of a dtype."""
    return value.label if isinstance(value, Operation) else str(value)


def together(result: Any) -> tuple[Any, ...]:
    """The results of a call, of which there may be one."""
    return result if isinstance(result, tuple) else (result,)


# --- Errors ---------------------------------------------------------------------------------------


def epsilon(dtype: Any) -> float:
    """The spacing of a dtype at 1."""
    return 2.0 ** -_DIGITS[np.dtype(dtype).name]


def unit(size: Any, dtype: Any, floor: float = 0.0) -> Array:
    """The spacing of `dtype` at numbers of this size, those below `floor` counted at `floor`."""
    size = np.maximum(abs(np.asarray(size)), floor)
    exponent = np.frexp(size)[1] - 1 - _DIGITS[np.dtype(dtype).name]
    return np.ldexp(size.dtype.type(1), np.maximum(exponent, _LEAST[np.dtype(dtype).name]))


def ulps(y: Any, exact: Any, dtype: Any, scale: Any = None, floor: float | None = None) -> Array:
    """The error of each element in units in the last place of `dtype`, at |exact| or at `scale`.

    Outputs below 2^-20 are counted at 2^-20; in float64 those below 1 at 1, unless a scale is given
    (the largest term of an affine step) or another floor.
    """
    double = np.dtype(dtype).name == "float64"
    if floor is None:
        floor = 1.0 if double and scale is None else 2.0**-20
    # An exact value rounded to float64 is still 2^29 times finer than the units of the others.
    wide = np.longdouble if double else np.float64
    y, exact = np.asarray(y).astype(wide), np.asarray(exact).astype(wide)
    scale = abs(exact) if scale is None else np.asarray(scale).astype(wide)
    with np.errstate(all="ignore"):
        error = abs(y - exact) / unit(np.where(np.isfinite(scale), scale, 1), dtype, floor)
    same = (y == exact) | (np.isnan(y) & np.isnan(exact))
    return np.where(same, 0, np.where(np.isnan(error), np.inf, error))


def tolerance(exact: Any, dtype: Any, size: Any, roundings: int = 16) -> Array:
    """The error allowed an element: of storing it, and of what was computed on the way to it.

    Storing rounds to half a unit of `dtype`; every step before, in float32 or float64, to half a
    unit of a number of at most `size`. 16 halves are more than any function here has steps.
    """
    computing = F64 if np.dtype(dtype).itemsize == 8 else F32
    stored = 0.5 * unit(np.nan_to_num(exact), dtype)
    return stored + roundings / 2 * epsilon(computing) * np.asarray(size, np.longdouble)


def assert_close(y: Any, exact: Any, size: Any, roundings: int = 16) -> None:
    """Assert that y is `exact` but for `tolerance`, NaN and infinities in the same places."""
    assert y.shape == exact.shape
    wide = y.astype(np.longdouble)
    with np.errstate(all="ignore"):
        right = abs(wide - exact) <= tolerance(exact, y.dtype, size, roundings)
        right |= (wide == exact) | (np.isnan(wide) & np.isnan(exact))
    if not right.all():
        where = tuple(int(i) for i in np.argwhere(~right)[0])
        raise AssertionError(
            f"{(~right).sum()} of {right.size} elements are wrong, first {where}: "
            f"{wide[where]} instead of {exact[where]} (as {y.dtype}, next to numbers up to {size})"
        )


def assert_same_bits(a: Any, b: Any) -> None:
    """Assert equality bit for bit: the sign of zero counts, a NaN equals itself."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    a, b = (np.ascontiguousarray(v).view(f"u{v.itemsize}") for v in (a, b))
    np.testing.assert_array_equal(a, b)


# --- Data -----------------------------------------------------------------------------------------


def data(shape: tuple[int, ...], dtype: Any = F64, ratio: float = 0.0, seed: int = 0) -> Array:
    """Normal numbers whose mean is `ratio` times their spread, scaled differently in each row."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-3, 4, (*shape[:1], *[1] * (len(shape) - 1)))
    return (scale * (ratio + rng.standard_normal(shape))).astype(dtype)


def channels_last(x: Array) -> Array:
    """The same numbers with axis 1 innermost in memory; two dimensions in Fortran's order."""
    if x.ndim == 2:
        return np.asfortranarray(x)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def layouts(x: Array) -> Iterator[tuple[str, Array]]:
    """The same numbers, many times: a name, and an array that lies in memory in its own way."""
    yield "C", np.ascontiguousarray(x)
    yield "channels-last", channels_last(x)
    yield "Fortran", np.asfortranarray(x)
    swapped = np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1)
    yield "first and last axis swapped", swapped
    for axis in range(x.ndim):
        turn = tuple(slice(None, None, -1 if a == axis else 1) for a in range(x.ndim))
        yield f"reversed along {axis}", np.ascontiguousarray(x[turn])[turn]
        every = tuple(slice(None, None, 2 if a == axis else 1) for a in range(x.ndim))
        spaced = np.zeros([n * (1 + (a == axis)) for a, n in enumerate(x.shape)], x.dtype)
        spaced[every] = x
        yield f"every second along {axis}", spaced[every]
        first = np.take(x, [0], axis)
        if x.shape[axis] > 1 and np.array_equal(x, np.broadcast_to(first, x.shape)):
            yield f"broadcast along {axis}", np.broadcast_to(first, x.shape)
    turn = (slice(None, None, -1),) * x.ndim
    yield "reversed", np.ascontiguousarray(x[turn])[turn]
    misaligned = np.ndarray(x.shape, x.dtype, bytearray(x.nbytes + 1), offset=1)
    misaligned[...] = x
    yield "misaligned", misaligned
    record = np.zeros(x.shape, [("byte", "u1"), ("number", x.dtype)])["number"]
    record[...] = x
    yield "field of a record", record
    yield "other byte order", x.astype(x.dtype.newbyteorder("S"))
    locked = x.copy()
    locked.flags.writeable = False
    yield "read-only", locked


# --- Memory with a fence around it ----------------------------------------------------------------

PAGE = mmap.PAGESIZE
REMAINDER = 0xA5  # what the rest of an array's pages is filled with


def _forbid(address: int, size: int) -> None:
    """Let every access to these pages end the process."""
    if os.name == "nt":
        before = ctypes.c_ulong()
        protect = getattr(ctypes, "windll").kernel32.VirtualProtect  # noqa: B009
        done = protect(ctypes.c_void_p(address), ctypes.c_size_t(size), 1, ctypes.byref(before))
        assert done, "VirtualProtect failed"
        return
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(address, size, 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")


def guarded(shape: tuple[int, ...], dtype: Any, side: str = "after") -> Array:
    """Zeros in C order, whose last byte is before a page that may not be touched; or the first.

    On the other side such a page follows as well, behind fewer than a page of bytes of
    `REMAINDER`, which `assert_fence` looks at.
    """
    assert side in ("before", "after"), side
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    inside = max(-(-nbytes // PAGE), 1) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE)
    whole = np.frombuffer(memory, np.uint8)
    whole[PAGE : PAGE + inside] = REMAINDER
    start = PAGE if side == "before" else PAGE + inside - nbytes
    for guard in (whole[:PAGE], whole[PAGE + inside :]):
        _forbid(guard.ctypes.data, PAGE)
    array = np.ndarray(shape, dtype, memory, start)
    array[...] = np.zeros((), dtype)
    return array


def guarded_copy(array: Array, side: str = "after") -> Array:
    """The same numbers, with the same strides, in memory with a fence around it."""
    low, high = np.lib.array_utils.byte_bounds(array)
    nbytes = max(high - low, 0) if array.size else 0
    memory = guarded((nbytes,), np.uint8, side)
    copy = np.ndarray(
        array.shape, array.dtype, memory, array.ctypes.data - low if nbytes else 0, array.strides
    )
    if nbytes:
        copy[...] = array
    return copy


def assert_fence(array: Array) -> None:
    """Assert that the rest of the pages of a guarded array is as it was."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert isinstance(array.base, mmap.mmap), "not from `guarded`"
    whole = np.frombuffer(array.base, np.uint8)
    start = array.ctypes.data - whole.ctypes.data
    for rest in (whole[PAGE:start], whole[start + array.nbytes : -PAGE]):
        assert (rest == REMAINDER).all(), "bytes outside an array were overwritten"


# --- Other processes ------------------------------------------------------------------------------

# Seconds until another process counts as hanging. It may have a tenth of a processor to itself.
PATIENCE = 900


def run_python(
    *arguments: str, timeout: float = PATIENCE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Another Python on this tree. FASTNORM_* variables are those given here alone."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTNORM_", "OMP_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | environment,
        cwd=ROOT,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


@contextmanager
def operators_seen() -> Iterator[list[Any]]:
    """The operators of PyTorch's that a dispatch mode sees meanwhile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        yield seen
