"""Every kernel for the GPU, compiled without one: test_cuda.py runs this in another process.

    python -m tests.cuda_kernels           # prints a line for each
    python -m tests.cuda_kernels FOLDER    # also writes their PTX, where the CUDA toolkit is

Where libNVVM cannot be loaded Numba gets as far as LLVM's instructions: that checks the types.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numba.cuda.compiler
import numba.cuda.dispatcher
from numba import cuda, types
from numba.cuda.cudadrv import nvvm

from fastnorm._numba.gpu import contiguous, contiguous_backward, elementwise, scales, strided
from fastnorm._numba.gpu import strided_backward as strided_back
from fastnorm._numba.gpu.views import (
    BackwardOperands,
    Operands,
    Options,
    Statistics,
    Sums,
    Walk,
)

CAPABILITY = (9, 0)
WORD, REAL = types.int64, types.float64
DATA_LAYOUT = "e-p:64:64:64-i64:64:64-f32:32:32-f64:64:64-v64:64:64-v128:128:128-n16:32:64"


def record(kind: Any, *values: Any) -> Any:
    """The type of a record as it is handed to a kernel."""
    return numba.typeof(kind(*(values or range(len(kind._fields)))))


def kernels() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name, kernel, types of its arguments) of each kernel, in the variants that differ."""
    walk, operands, statistics = record(Walk), record(Operands), record(Statistics)
    options, sums = record(Options, 1.0, 1, 1), record(Sums)
    back = record(BackwardOperands)
    for kind in ("float32", "bfloat16", "float64"):
        for team in (32, 256):
            for mode in (contiguous.WHOLE, contiguous.SUMS, contiguous.APPLY):
                activation = None if mode == contiguous.SUMS else "silu"
                kernel = contiguous.runs(kind, kind, team, mode, activation, False)
                given = (walk, operands, options, WORD, WORD, statistics)
                yield f"runs-{kind}-{team}-{mode}", kernel, given
        kernel = strided.column_moments(kind)
        yield f"column_moments-{kind}", kernel, (walk, operands, options, WORD)
        kernel = strided.column_apply(kind, "float32", "gelu", True)
        yield f"column_apply-{kind}", kernel, (walk, operands, WORD)
        for mode in (contiguous.WHOLE, contiguous.SUMS, contiguous.APPLY):
            kernel = contiguous_backward.run_gradients(kind, "float32", kind, 256, mode)
            given = (walk, back, WORD, sums, REAL, WORD)
            yield f"run_gradients-{kind}-{mode}", kernel, given
        for same in (False, True):
            kernel = strided_back.column_gradients(kind, "float32", kind, same)
            yield f"column_gradients-{kind}-{same}", kernel, (walk, back, WORD)
        kernel = strided_back.column_slopes(kind, "float32", kind)
        yield f"column_slopes-{kind}", kernel, (walk, back, sums, REAL, WORD)
        kernel = elementwise.convert(kind, "int32", "float32")
        yield f"convert-{kind}", kernel, (*[WORD] * 5, REAL)
        kernel = elementwise.convert(kind, kind, "float32", product=True)
        yield f"product-{kind}", kernel, (*[WORD] * 5, REAL)
        kernel = elementwise.running_average(kind)
        average = record(elementwise.Average)
        yield f"running_average-{kind}", kernel, (average, WORD, WORD, WORD, REAL)
        kernel = elementwise.response(kind)
        window = record(elementwise.Window)
        yield f"response-{kind}", kernel, (WORD, window, WORD, WORD, REAL, REAL, REAL)
    half = contiguous.runs("float16", "float16", 256, contiguous.WHOLE, None, False)
    yield "runs-float16", half, (walk, operands, options, WORD, WORD, statistics)
    for lanes in (1, 32):
        for double in (False, True):
            kernel = scales.merge_parts(lanes, double)
            given = (walk, WORD, options, WORD, statistics)
            yield f"merge_parts-{lanes}-{double}", kernel, given
        yield f"merge_sums-{lanes}", scales.merge_sums(lanes), (walk, WORD, sums)
    yield "given_scale", scales.given_scale, (walk, options, WORD, statistics)


def has_nvvm() -> bool:
    """Whether libNVVM can be loaded."""
    try:
        nvvm.NVVM()
    except Exception:
        return False
    return True


def compiled(kernel: Any, given: tuple[Any, ...], whole: bool) -> str:
    """A kernel's PTX; without libNVVM what LLVM would be given."""
    if whole:
        return str(cuda.compile_ptx(kernel.py_func, given, cc=CAPABILITY)[0])
    result = numba.cuda.compiler.compile_cuda(kernel.py_func, types.void, given, cc=CAPABILITY)
    return str(result.library.get_llvm_str())


def main(folder: str = "") -> None:
    """Compile each of them."""
    # a device function is compiled for the device in use: for one that is not there
    device = SimpleNamespace(compute_capability=CAPABILITY)
    numba.cuda.dispatcher.get_current_device = lambda: device
    whole = has_nvvm()
    if not whole:
        instead = SimpleNamespace(data_layout=DATA_LAYOUT, get_ir_version=lambda: (2, 0, 3, 1))
        nvvm.NVVM = lambda: instead
    for name, kernel, given in kernels():
        text = compiled(kernel, given, whole)
        if folder:
            Path(folder, f"{name}.ptx").write_text(text, encoding="utf-8")
        print(name, text.count("\n"), flush=True)
    print("PTX" if whole else "LLVM")


if __name__ == "__main__":
    main(*sys.argv[1:])
