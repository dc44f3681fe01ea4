"""How the CPU kernels are compiled, and the few functions that tell kinds of numbers apart.

An array in a kernel is flat: all the memory that an operand spans, with steps along five dimensions
(`walks`). float16 and bfloat16 come as int16 and uint16, and are computed in as float32. An index
is unsigned: Numba then leaves out what a negative one would mean, and LLVM vectorises the loop.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding
from numba import carray, config, njit, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic, overload, register_jitable

from fastnorm import schedule
from fastnorm._numba import scalar

CHECKED = os.environ.get("FASTNORM_CHECK", "") not in ("", "0")  # every index, at a price

STRICT = {"fastmath": False, "error_model": "numpy"}
_INNER: dict[str, Any] = {
    "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "nogil": True, "error_model": "numpy",
    "boundscheck": CHECKED,
}  # fmt: skip
# Of functions that make arrays. Nothing is reordered: the centring would be lost.
making = njit(fastmath=False, **_INNER)
# The others count no references: that takes longer than a short row does, and for threads that
# share an array far longer.
_INNER["_nrt"] = False
inner = njit(fastmath=False, **_INNER)
# Part of its caller: what it is told of a pass would take longer to hand over than a short run.
within = njit(fastmath=False, forceinline=True, **_INNER)
# Sums may be reordered, into as many lanes as the processor has.
summing = njit(fastmath={"reassoc", "nsz", "contract"}, **_INNER)
# What Python calls.
KERNEL: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "boundscheck": CHECKED, "cache": not CHECKED,
}  # fmt: skip


def _sources() -> int:
    """A number that changes with what a kernel is compiled from: Numba itself looks at one file."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(schedule.__file__)]
    return hash(tuple((s.st_mtime_ns, s.st_size) for s in (f.stat() for f in files)))


SOURCES = _sources()

# --- Compiling ------------------------------------------------------------------------------------

# A child that is forked while another thread compiles would wait for that thread for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

PATIENCE = 1.0  # seconds of compiling, after which whoever waits at a terminal is told why
_told = False


def _tell() -> None:
    global _told
    if not _told:
        _told = True
        print(
            "fastnorm: Numba compiles the kernels, for some seconds, once: they are kept on disk",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def compiling() -> Iterator[None]:
    """One thread at a time; a line on a terminal's standard error where it takes long."""
    with global_compiler_lock:
        if _told or sys.stderr is None or not sys.stderr.isatty():
            yield
            return
        timer = threading.Timer(PATIENCE, _tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


# --- Functions for compiled code ------------------------------------------------------------------


def when_compiled(typed: Any = None, **options: Any) -> Any:
    """A function for compiled code alone; `typed` makes it for arguments of some types."""
    if typed is None:
        return partial(when_compiled, **options)

    @wraps(typed)
    def stub(*_: Any) -> Any:
        raise TypeError("for compiled code")

    overload(stub, jit_options={**STRICT, **options}, strict=False)(typed)
    return stub


for _name, _function in list(vars(scalar).items()):
    if getattr(_function, "__module__", "") == scalar.__name__ and _name not in ("fma", "mac"):
        register_jitable(**STRICT)(_function)


@intrinsic
def _fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    if not (isinstance(a, types.Float) and b == a and c == a):
        return None
    return a(a, a, a), lambda context, builder, signature, numbers: builder.fma(*numbers)


def _in_one(a: Any, b: Any, c: Any) -> Any:
    if FUSES:
        return lambda a, b, c: _fused(a, b, c)
    return lambda a, b, c: a * b + c  # a function of the C library's would take the place of it


def _in_any_way(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: a * b + c


def _fuses() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if config.CPU_NAME:  # Numba is told of another processor than this
        return "+fma" in (config.CPU_FEATURES or "")
    return bool(binding.get_host_cpu_features().get("fma", False))


FUSES = _fuses()
overload(scalar.fma, jit_options=STRICT, strict=False)(_in_one)
overload(scalar.mac, jit_options={**STRICT, "fastmath": {"contract"}}, strict=False)(_in_any_way)

# --- Kinds of numbers -----------------------------------------------------------------------------


def _is_half(x: Any) -> bool:
    return x.dtype in (types.int16, types.uint16)


@when_compiled
def is_double(x: Any) -> Any:
    """Whether an array is of float64."""
    found = x.dtype == types.float64
    return lambda x: found


@when_compiled
def real(v: Any, x: Any) -> Any:
    """A number as one that elements of x are computed in."""
    if x.dtype == types.float64:
        return lambda v, x: np.float64(v)
    return lambda v, x: np.float32(v)


@intrinsic
def pointer(typingctx: Any, address: Any, kind: Any) -> Any:
    """A pointer to numbers of a kind at an address."""
    to = types.CPointer(kind.instance_type)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(to))

    return to(types.intp, kind), codegen


@when_compiled(_nrt=True)
def part(x: Any, start: Any, shape: Any) -> Any:
    """A part of an array, which is not counted as one: that costs more than a short run does.

    Whoever called the kernel keeps all arrays until it is done.
    """
    kind = np.bool_ if x.dtype == types.boolean else np.dtype(str(x.dtype)).type

    def cut(x, start, shape):
        if CHECKED:
            n = 1
            for size in shape:
                n *= size
            if start < 0 or start + n > x.size:
                raise IndexError("a kernel has too little memory of its own")
        return carray(pointer(x.ctypes.data + start * x.itemsize, kind), shape)

    return cut


@when_compiled
def load(x: Any, i: Any) -> Any:
    """An element as a number that is computed in."""
    if x.dtype == types.uint16:
        return lambda x, i: scalar.from_bf16(x[i])
    if x.dtype == types.int16:
        return lambda x, i: scalar.from_f16(x[i])
    return lambda x, i: x[i]


@when_compiled
def store(y: Any, i: Any, v: Any) -> Any:
    """Write an element, rounded to its kind."""
    if y.dtype == types.uint16:

        def put(y, i, v):
            y[i] = scalar.to_bf16(v)

    elif y.dtype == types.int16:

        def put(y, i, v):
            y[i] = scalar.to_f16(v)

    else:

        def put(y, i, v):
            y[i] = v

    return put


@when_compiled
def read(x: Any, at: Any, n: Any, tile: Any) -> Any:
    """Where n elements are as numbers that are computed in: in x itself, or converted in a tile."""
    if not _is_half(x):
        return lambda x, at, n, tile: (x, at)

    def converted(x, at, n, tile):
        for i in range(n):
            tile[i] = load(x, at + i)
        return tile, np.uintp(0)

    return converted


@when_compiled
def read_rows(x: Any, at: Any, step: Any, rows: Any, n: Any, tile: Any) -> Any:
    """The same of rows of n elements, `step` apart."""
    if not _is_half(x):
        return lambda x, at, step, rows, n, tile: (x, at, step)

    def converted(x, at, step, rows, n, tile):
        for r in range(np.uintp(rows)):
            for i in range(n):
                tile[r * n + i] = load(x, at + r * step + i)
        return tile, np.uintp(0), n

    return converted


@when_compiled
def target(y: Any, at: Any, tile: Any, direct: Any) -> Any:
    """Where numbers that are computed in go: to y itself, or to a tile."""
    if _is_half(y):
        return lambda y, at, tile, direct: (tile, np.uintp(0))
    return lambda y, at, tile, direct: (y, at) if direct else (tile, np.uintp(0))


@when_compiled
def deliver(y: Any, at: Any, tile: Any, n: Any, direct: Any) -> Any:
    """Write n numbers of a tile to y, unless they are there."""
    half = _is_half(y)

    def converted(y, at, tile, n, direct):
        if half or not direct:
            for i in range(n):
                store(y, at + i, tile[i])

    return converted
