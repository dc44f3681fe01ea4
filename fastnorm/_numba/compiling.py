"""How kernels are compiled: the kinds of functions, the key on disk, one thread at a time.

`inner` functions keep the order of every sum and product. `summing` ones are loops that add up a
contiguous slice: there LLVM may use as many lanes as the processor has, and the order of the sum
follows from the length alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llvmlite import binding
from numba import njit, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic, overload, register_jitable

from fastnorm import schedule
from fastnorm._numba import scalar

# With FASTNORM_CHECK every index is checked: one outside its array raises IndexError.
CHECKED = os.environ.get("FASTNORM_CHECK", "") not in ("", "0")

# Every function of `scalar` can be called from compiled code. Its sums are never reordered, whoever
# calls it: the centring would be lost.
STRICT = {"fastmath": False, "error_model": "numpy"}
KERNEL = {**STRICT, "nogil": True, "boundscheck": CHECKED}
# Called by kernels alone: no wrapper for Python or C is compiled.
_INNER = {**KERNEL, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner = njit(**_INNER)
# The same where there is one caller: LLVM goes over what is called once more for each of its
# callers, and theirs.
part = njit(**_INNER, inline="always")
summing = njit(**{**_INNER, "fastmath": {"reassoc", "nsz", "contract"}})
for _name, _function in list(vars(scalar).items()):
    if getattr(_function, "__module__", "") == scalar.__name__ and _name not in ("fma", "mac"):
        register_jitable(**STRICT)(_function)


def _sources() -> int:
    """A number that changes with what a kernel is compiled from: Numba itself looks at one file."""
    files = sorted(Path(__file__).parent.glob("*.py"))  # not those of the GPU
    files.append(Path(schedule.__file__))  # sizes are compiled into kernels
    times = tuple((s.st_mtime_ns, s.st_size) for s in (f.stat() for f in files))
    return abs(hash((*times, CHECKED))) // 4 * 2 + 2  # even, and not 0


SOURCES = _sources()

# --- Products and sums ----------------------------------------------------------------------------

_FUSED = binding.get_host_cpu_features().get("fma", True)  # not asked for elsewhere than on x86


@intrinsic
def _fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, b, c), codegen


@overload(scalar.fma, jit_options=STRICT, strict=False)
def _overload_fma(a: Any, b: Any, c: Any) -> Any:
    if not (isinstance(a, types.Float) and b == a and c == a):
        return None
    if _FUSED or a == types.float64:  # without the instruction the C library's function
        return lambda a, b, c: _fused(a, b, c)
    double = types.float64
    return lambda a, b, c: types.float32(double(a) * double(b) + double(c))


@overload(scalar.mac, inline="never", strict=False)
def _overload_mac(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: a * b + c


# --- One thread at a time -------------------------------------------------------------------------

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
