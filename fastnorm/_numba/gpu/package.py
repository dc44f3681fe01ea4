"""The one file that knows which package provides `cuda`, and what its simulator needs.

numba-cuda takes the place of the `numba.cuda` that Numba comes with as soon as it is installed, so
one import serves both. With NUMBA_ENABLE_CUDASIM=1 either is a simulator in Python: it has no
shuffles, and what is an instruction below is a plain function then.

Memory is meant by its address, as in `memory`, the twin of this file for the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from numba import config, types

from fastnorm._numba import scalar

try:
    from numba import cuda
except ImportError as error:  # a Numba that no longer comes with it
    raise ImportError(
        "arrays on a GPU need numba-cuda, which is not installed: "
        "install with pip install 'fastnorm-kernels[cuda]'"
    ) from error

Function = Callable[..., Any]

__all__ = [
    "SIMULATED", "arithmetic", "configured", "cuda", "device", "double_of", "is_scalar_function",
    "kernel", "load_words", "reader", "scalar_function", "store_words", "words_of", "writer",
]  # fmt: skip

SIMULATED = bool(getattr(config, "ENABLE_CUDASIM", False))

if SIMULATED:
    from numba.cuda.simulator import kernel as simulator

    _package = cuda

    class _Simulated:
        """`cuda` in every file: the simulator gives a kernel's threads only to the kernel's own."""

        def __getattr__(self, name: str) -> Any:
            running = simulator._get_kernel_context()
            return getattr(_package if running is None else running, name)

    cuda = _Simulated()


def device(function: Function) -> Any:
    """Compile a function that kernels call. The simulator calls it as it is."""
    return function if SIMULATED else cuda.jit(device=True)(function)


def kernel(function: Function) -> Any:
    """Compile a kernel. Its sums are never reordered: there is no fast-math anywhere."""
    return cuda.jit(function)


def configured(function: Any, blocks: int, threads: int, stream: Any) -> Any:
    """What to call with the arguments of a kernel. A small grid is no mistake and no warning."""
    enough = 128  # below that Numba warns
    ready = function[max(blocks, enough) if not SIMULATED else blocks, threads, stream]
    if SIMULATED or blocks >= enough:
        return ready
    small = object.__new__(type(ready))  # a copy: Numba keeps the other one
    small.__dict__.update(ready.__dict__)
    small.griddim = (blocks, 1, 1)
    return small


# --- Instructions ---------------------------------------------------------------------------------

if SIMULATED:

    @cache
    def reader(number: Any) -> Function:
        """A function (address, index) that reads one number of this type."""
        ctype, size = np.ctypeslib.as_ctypes_type(number), np.dtype(number).itemsize
        return lambda address, index: number(ctype.from_address(int(address + index * size)).value)

    @cache
    def writer(number: Any) -> Function:
        """A function (address, index, value) that writes one number of this type."""
        ctype, size = np.ctypeslib.as_ctypes_type(number), np.dtype(number).itemsize

        def write(address: int, index: int, value: Any) -> None:
            ctype.from_address(int(address + index * size)).value = value

        return write

    def load_words(address: int) -> tuple[Any, ...]:
        """Read four words of 32 bits at once, at an address that is a multiple of 16."""
        assert address % 16 == 0, "a load of 16 bytes must be aligned"
        return tuple(np.uint32(word) for word in (ctypes.c_uint32 * 4).from_address(int(address)))

    def store_words(address: int, a: Any, b: Any, c: Any, d: Any) -> None:
        """Write four words of 32 bits at once, at an address that is a multiple of 16."""
        assert address % 16 == 0, "a store of 16 bytes must be aligned"
        (ctypes.c_uint32 * 4).from_address(int(address))[:] = [int(word) for word in (a, b, c, d)]

    def double_of(low: Any, high: Any) -> Any:
        """The float64 of two words of 32 bits."""
        return np.uint64(int(low) | int(high) << 32).view(np.float64)

    def words_of(value: Any) -> Any:
        """The two words of 32 bits of a float64."""
        bits = int(np.float64(value).view(np.uint64))
        return np.uint32(bits & 0xFFFFFFFF), np.uint32(bits >> 32)

else:
    from llvmlite import ir

    try:
        from numba.cuda.extending import intrinsic
    except ImportError:  # Numba's own; numba-cuda has one of its own
        from numba.extending import intrinsic

    GLOBAL = 1  # the address space: an access by its name needs no look at which it is

    def _at(builder: Any, address: Any, llvm_type: Any) -> Any:
        return builder.inttoptr(address, llvm_type.as_pointer(GLOBAL))

    @cache
    def reader(number: Any) -> Function:
        """A function (address, index) that reads one number of this type."""
        kind = getattr(types, np.dtype(number).name)

        @intrinsic
        def read(typingctx: Any, address: Any, index: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                base = _at(builder, arguments[0], context.get_value_type(kind))
                place = builder.gep(base, [arguments[1]])
                return builder.load(place, align=kind.bitwidth // 8)

            return kind(types.int64, types.int64), codegen

        return read

    @cache
    def writer(number: Any) -> Function:
        """A function (address, index, value) that writes one number of this type."""
        kind = getattr(types, np.dtype(number).name)

        @intrinsic
        def write(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                base = _at(builder, arguments[0], context.get_value_type(kind))
                place = builder.gep(base, [arguments[1]])
                builder.store(arguments[2], place, align=kind.bitwidth // 8)
                return context.get_dummy_value()

            return types.none(types.int64, types.int64, kind), codegen

        return write

    _WORD = ir.IntType(32)
    _FOUR = ir.VectorType(_WORD, 4)

    @intrinsic
    def load_words(typingctx: Any, address: Any) -> Any:
        """Read four words of 32 bits at once, at an address that is a multiple of 16."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            four = builder.load(_at(builder, arguments[0], _FOUR), align=16)
            words = [builder.extract_element(four, _WORD(i)) for i in range(4)]
            return context.make_tuple(builder, signature.return_type, words)

        return types.UniTuple(types.uint32, 4)(types.int64), codegen

    @intrinsic
    def store_words(typingctx: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        """Write four words of 32 bits at once, at an address that is a multiple of 16."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            four = ir.Constant(_FOUR, ir.Undefined)
            for i in range(4):
                four = builder.insert_element(four, arguments[1 + i], _WORD(i))
            builder.store(four, _at(builder, arguments[0], _FOUR), align=16)
            return context.get_dummy_value()

        return types.none(types.int64, *[types.uint32] * 4), codegen

    @intrinsic
    def double_of(typingctx: Any, low: Any, high: Any) -> Any:
        """The float64 of two words of 32 bits."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            low, high = (builder.zext(a, ir.IntType(64)) for a in arguments)
            bits = builder.or_(low, builder.shl(high, ir.IntType(64)(32)))
            return builder.bitcast(bits, ir.DoubleType())

        return types.float64(types.uint32, types.uint32), codegen

    @intrinsic
    def words_of(typingctx: Any, value: Any) -> Any:
        """The two words of 32 bits of a float64."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            bits = builder.bitcast(arguments[0], ir.IntType(64))
            high = builder.lshr(bits, ir.IntType(64)(32))
            words = [builder.trunc(part, _WORD) for part in (bits, high)]
            return context.make_tuple(builder, signature.return_type, words)

        return types.UniTuple(types.uint32, 2)(types.float64), codegen

    @intrinsic
    def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        if not (isinstance(a, types.Float) and b == a and c == a):
            return None

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.fma(*arguments)

        return a(a, a, a), codegen

    @intrinsic
    def _from_f16(typingctx: Any, bits: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

        return types.float32(types.uint16), codegen

    @intrinsic
    def _to_f16(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            half = builder.fptrunc(arguments[0], ir.HalfType())
            return builder.bitcast(half, ir.IntType(16))

        return types.uint16(types.float32), codegen


# --- The shared arithmetic ------------------------------------------------------------------------


def _compiled() -> SimpleNamespace:
    """Every function of `scalar`, compiled for the GPU.

    Copies with names of their own: a call from one to another finds the compiled one, and where the
    GPU has an instruction, that.
    """
    names = dict(vars(scalar))
    if not SIMULATED:
        for name, function in vars(scalar).items():
            if isinstance(function, FunctionType):
                names[name] = device(FunctionType(function.__code__, names, name))
        names |= {"fma": _fma, "from_f16": _from_f16, "to_f16": _to_f16}
    return SimpleNamespace(**names)


arithmetic = _compiled()


def is_scalar_function(function: Any) -> bool:
    """Whether this is a function that can be compiled: of Python, or by Numba from one."""
    return isinstance(function, FunctionType) or isinstance(
        getattr(function, "py_func", None), FunctionType
    )


def scalar_function(function: Function) -> Any:
    """Compile a user's function of one number: a plain one, or one compiled by numba before.

    A function compiled for the CPU is compiled again from its Python code; one by
    `cuda.jit(device=True)` is taken as it is.
    """
    if type(function).__module__.startswith("numba.cuda"):
        return function
    return device(getattr(function, "py_func", function))
