"""Memory by its address, and the instructions that Numba has no name for, for kernels on the CPU.

A *kind* tells how numbers are stored: `np.float32`, `np.float64`, `np.int16` for the bits of a
float16, `np.uint16` for those of a bfloat16. `load` and `store` convert to and from the number that
is computed in, `real(kind)`.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic, overload, register_jitable

from fastnorm import _core, schedule
from fastnorm._numba import scalar
from fastnorm._numba.extents import CHECKED, checked, part_at, size_of_part

# Every function of `scalar` can be called from compiled code. Its sums are never reordered, whoever
# calls it: the centring would be lost.
STRICT = {"fastmath": False, "error_model": "numpy"}
# Called by kernels alone: no wrapper for Python or C is compiled. A constant is handed to them as
# np.int64(0): Numba takes a bare 0 for a type of its own, and compiles the function once more.
_INNER = {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "nogil": True,
    "error_model": "numpy",
}
inner = njit(fastmath=False, **_INNER)
# Part of its only caller: on its own it would be optimised once more. With checks it is too long.
merged = inner if CHECKED else njit(inline="always", fastmath=False, **_INNER)
# Sums alone may be reordered, into as many lanes as the processor has.
summing = njit(fastmath={"reassoc", "nsz", "contract"}, **_INNER)
for _name, _function in list(vars(scalar).items()):
    if getattr(_function, "__module__", "") == scalar.__name__ and _name not in ("fma", "mac"):
        register_jitable(**STRICT)(_function)


for _function in (size_of_part, part_at):
    register_jitable(**STRICT)(_function)


def _multiply_add() -> str:
    """How the Cython kernels add to a product; without them, how they would on this processor."""
    if _core.kernels is not None:
        return str(_core.kernels.multiply_add())
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "fused"
    return "fused" if binding.get_host_cpu_features().get("fma", False) else "extended"


MULTIPLY_ADD = _multiply_add()


def _sources() -> int:
    """A number that changes with what a kernel is compiled from: Numba itself looks at one file."""
    files = sorted(Path(__file__).parent.glob("*.py"))  # not those of the GPU
    # nor those that call the kernels
    files = [f for f in files if f.stem not in ("again", "cpu", "launch", "plans")]
    files.append(Path(schedule.__file__))  # sizes are compiled into kernels
    times = tuple((s.st_mtime_ns, s.st_size) for s in (f.stat() for f in files))
    return hash((*times, *MULTIPLY_ADD.encode(), CHECKED)) | 1


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


# --- Instructions ---------------------------------------------------------------------------------

ADDRESS, WORD = ir.IntType(64), ir.IntType(32)


class _Extended(ir.Type):
    """The 80 bits of x87, 64 of them digits, for which llvmlite has no name."""

    def _to_string(self) -> str:
        return "x86_fp80"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Extended)

    def __hash__(self) -> int:
        return hash(_Extended)


def build_multiply_add(builder: Any, a: Any, b: Any, c: Any, summed: bool = False) -> Any:
    """a * b + c of numbers, or of as many side by side, as _core/numbers.h has it (fma or mac)."""
    n = a.type.count if isinstance(a.type, ir.VectorType) else 0
    kind = a.type.element if n else a.type
    if MULTIPLY_ADD == "fused":
        name = f"llvm.fma.v{n}{kind.intrinsic_name}" if n else f"llvm.fma.{kind.intrinsic_name}"
        whole = ir.FunctionType(a.type, [a.type] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, whole, name), [a, b, c])
    if summed or (kind == ir.DoubleType() and MULTIPLY_ADD == "plain"):
        return builder.fadd(builder.fmul(a, b), c)
    wider: Any = _Extended() if kind == ir.DoubleType() else ir.DoubleType()
    wider = ir.VectorType(wider, n) if n else wider
    a, b, c = (builder.fpext(v, wider) for v in (a, b, c))
    wide = builder.fadd(builder.fmul(a, b), c)
    return builder.fptrunc(wide, ir.VectorType(kind, n) if n else kind)


def _in_numba(summed: bool) -> Any:
    @intrinsic
    def multiplied_and_added(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        if not (isinstance(a, types.Float) and b == a and c == a):
            return None

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b, c = arguments
            return build_multiply_add(builder, a, b, c, summed)

        return a(a, b, c), codegen

    return multiplied_and_added


_fma, _mac = _in_numba(False), _in_numba(True)


@overload(scalar.fma, jit_options=STRICT, strict=False)
def _overload_fma(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: _fma(a, b, c)


@overload(scalar.mac, jit_options=STRICT, strict=False)
def _overload_mac(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: _mac(a, b, c)


def _pointer(context: Any, builder: Any, kind: Any, address: Any, index: Any) -> Any:
    number = context.get_value_type(kind)
    if CHECKED:
        size = kind.bitwidth // 8
        address = builder.add(address, builder.mul(index, ADDRESS(size)))
        return builder.inttoptr(checked(builder, address, size), number.as_pointer())
    base = builder.inttoptr(address, number.as_pointer())
    return builder.gep(base, [index])


@intrinsic
def read(typingctx: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` of the array of `kind` that begins at `address`."""
    number = kind.instance_type

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, number, arguments[0], arguments[1])
        return builder.load(pointer, align=number.bitwidth // 8)

    return number(types.intp, types.intp, kind), codegen


@intrinsic
def write(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write element `index` of the array that begins at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, value, arguments[0], arguments[1])
        builder.store(arguments[2], pointer, align=value.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, value), codegen


@intrinsic
def store_line(typingctx: Any, to: Any, source: Any) -> Any:
    """Copy 64 bytes with a non-temporal store, to an address that is a multiple of 64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), 8)
        to, source = (
            builder.inttoptr(checked(builder, a, 64), line.as_pointer()) for a in arguments
        )
        stored = builder.store(builder.load(source, align=1), to, align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """What was written before is seen before what is written after."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen


def build_prefetch(builder: Any, address: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, WORD, WORD, WORD])
    )
    builder.call(function, [builder.inttoptr(address, byte), WORD(0), WORD(3), WORD(1)])


@intrinsic
def fetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address that will be read soon."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build_prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.none(types.intp), codegen


@intrinsic
def take(typingctx: Any, address: Any) -> Any:
    """The whole number at an address, one more afterwards: no two threads take the same."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", pointer, number(1), "seq_cst")

    return types.int64(types.intp), codegen


@intrinsic
def call(typingctx: Any, function: Any, address: Any, n: Any) -> Any:
    """Call the compiled loop of an activation, which begins at an address, in place."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 6)
        loop = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.call(loop, [word(0), *arguments[1:], word(0), word(0), word(0)])

    return types.int64(types.intp, types.intp, types.intp), codegen


@intrinsic
def record_at(typingctx: Any, address: Any, kind: Any) -> Any:
    """The record of a NumPy dtype that begins at an address."""
    record = kind.dtype

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(record))

    return record(types.intp, kind), codegen


# A kernel: (address of its record, of the thread's room, its first turn, turns, task). A record
# begins with a counter of the turns that are taken.
KERNEL = types.void(*[types.intp] * 5)
COUNTERS = ("turn",)


@intrinsic
def _call_kernel(
    typingctx: Any, f: Any, record: Any, memory: Any, turn: Any, turns: Any, task: Any
) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.none(*[types.intp] * 6), codegen


# On disk they have no key of their own to tell a checking one by.
@njit(nogil=True, cache=not CHECKED)
def alone(kernel, record, memory, task):
    """Call the kernel that begins at an address, for all there is to do."""
    write(record, 0, 1)
    _call_kernel(kernel, record, memory, 0, 1, task)


@njit(nogil=True, cache=not CHECKED, parallel=True)
def together(kernel, record, memory, room, turns, task, threads):
    """Call it in several threads, which take turns, their first in their own order."""
    write(record, 0, threads)
    for i in prange(threads):
        _call_kernel(kernel, record, memory + room * i, i, turns, task)


# --- Numbers --------------------------------------------------------------------------------------
# Intrinsics too: as functions they would be compiled a hundred times.


def stored_name(kind: Any) -> str:
    """The kind that a Numba type argument stands for."""
    return str(kind.instance_type)


def _computed(kind: Any) -> Any:
    """The Numba type that numbers of a kind are computed in."""
    return types.float64 if stored_name(kind) == "float64" else types.float32


def _bits(kind: Any) -> Any:
    """The Numba type of a kind in memory; of a float16 or bfloat16 its bits."""
    return kind.instance_type if isinstance(kind.instance_type, types.Float) else types.uint16


@intrinsic
def load(typingctx: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` at `address`, as a number that is computed in."""
    stored, computed = _bits(kind), _computed(kind)
    convert = {"uint16": scalar.from_bf16, "int16": scalar.from_f16}.get(stored_name(kind))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, stored, arguments[0], arguments[1])
        value = builder.load(pointer, align=stored.bitwidth // 8)
        if convert is not None:
            value = context.compile_internal(builder, convert, computed(stored), [value])
        return value

    return computed(types.intp, types.intp, kind), codegen


@intrinsic
def store(typingctx: Any, address: Any, index: Any, value: Any, kind: Any) -> Any:
    """Write element `index` at `address`, rounded to its kind."""
    stored, computed = _bits(kind), _computed(kind)
    convert = {"uint16": scalar.to_bf16, "int16": scalar.to_f16}.get(stored_name(kind))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[2]
        if convert is not None:
            value = context.compile_internal(builder, convert, stored(computed), [value])
        pointer = _pointer(context, builder, stored, arguments[0], arguments[1])
        builder.store(value, pointer, align=stored.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, computed, kind), codegen


@intrinsic
def read_real(typingctx: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` of the array of numbers that are computed in at `address`."""
    computed = _computed(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, computed, arguments[0], arguments[1])
        return builder.load(pointer, align=computed.bitwidth // 8)

    return computed(types.intp, types.intp, kind), codegen


@intrinsic
def real(typingctx: Any, value: Any, kind: Any) -> Any:
    """`value` as a number that is computed in: a float64 for float64, else a float32."""
    computed = _computed(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], value, computed)

    return computed(value, kind), codegen


@intrinsic
def is_double(typingctx: Any, kind: Any) -> Any:
    """Whether numbers of this kind are computed with in float64."""
    answer = stored_name(kind) == "float64"

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.boolean, answer)

    return types.boolean(kind), codegen


@intrinsic
def is_half(typingctx: Any, kind: Any) -> Any:
    """Whether numbers of this kind are float16."""
    answer = stored_name(kind) == "int16"

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.boolean, answer)

    return types.boolean(kind), codegen


@intrinsic
def size_of(typingctx: Any, kind: Any) -> Any:
    """Bytes of a stored number."""
    size = kind.instance_type.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.intp, size)

    return types.intp(kind), codegen
