# The kernels, compiled once for each instruction set by the _kernels_*.pyx beside this file.
#
# A pass over memory has five dimensions, which layout.py has found for every operand:
#
#     a, b   kept axes: each (a, b) has statistics of its own
#     p, s   reduced axes: the elements (p, s) share a statistic
#     c      columns: neighbours in memory with a statistic each, or, `neighbours` at a time,
#            with one together
#
# With one column the innermost axis is s and a group is a list of contiguous *runs*: rows of
# layer norm, planes of batch, instance and group norm on channels-first memory.  With many
# columns the innermost axis is c: channels-last memory.  Both do the same three things, block by
# block: moments, merge, step.
#
# Blocks and pieces depend on the shape alone, and are merged in their order, so that results are
# bitwise the same for any number of threads.

from cython.parallel cimport prange, threadid
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY, NAN, fabs, frexp, isfinite, ldexp, rint, sqrt
from libc.stdint cimport int8_t, int16_t, uint8_t, uint16_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
cimport numpy as cnp

import sys

import numpy as np

cnp.import_array()

cdef extern from *:
    """
    /* Before Python 3.12 Cython asks this at every prange, to release the interpreter's lock once more:
     * once there has been a second interpreter the answer is yes, always, and that ends the process.
     * Here the lock is released before. */
    #if PY_VERSION_HEX < 0x030C0000
    #define PyGILState_Check() 0
    #endif
    """

cdef extern from "simd.h" nogil:
    """
    #if defined(_OPENMP)
    #define FN_OPENMP 1
    #else
    #define FN_OPENMP 0
    #endif
    """
    int FN_OPENMP, FN_HAS_FMA, FN_HAS_EXTENDED
    ctypedef struct fn_rows:
        const char* x
        const char* e
        char* y
        char* total
        char* tile
        const char* w
        const char* b
        double* mean
        double* var
        double* rstd
        Py_ssize_t x_step, y_step, e_step, total_step, w_step, b_step, stat_step, ahead
        double eps
        int norm, stream
    Py_ssize_t fn_norm_rows_float(const fn_rows*, Py_ssize_t, Py_ssize_t, bint, bint) noexcept
    Py_ssize_t fn_norm_rows_bf16(const fn_rows*, Py_ssize_t, Py_ssize_t, bint, bint) noexcept
    Py_ssize_t fn_norm_rows_double(const fn_rows*, Py_ssize_t, Py_ssize_t, bint, bint) noexcept
    double fn_fma64(double, double, double) noexcept
    double fn_squares(const float*, Py_ssize_t, Py_ssize_t) noexcept
    double fn_deviations(const double*, Py_ssize_t, Py_ssize_t, double) noexcept
    void fn_about(const double*, Py_ssize_t, Py_ssize_t, double, double*, double*, double*) noexcept
    void fn_sums(const float*, Py_ssize_t, Py_ssize_t, double*, double*) noexcept
    void fn_sums_about(const float*, Py_ssize_t, Py_ssize_t, double, double*, double*) noexcept
    void fn_gather(const float*, Py_ssize_t, Py_ssize_t, double*, double*) noexcept
    void fn_gather_about(const float*, Py_ssize_t, Py_ssize_t, double, double*, double*) noexcept
    void fn_gather_rows(const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, double*, double*) noexcept
    void fn_gather_rows_about(const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, double*, double*) noexcept
    double fn_fold(double*) noexcept
    void fn_fetch(const char*, Py_ssize_t) noexcept
    void fn_sums_bf16(const uint16_t*, Py_ssize_t, Py_ssize_t, double*, double*) noexcept
    void fn_sums_about_bf16(const uint16_t*, Py_ssize_t, Py_ssize_t, double, double*, double*) noexcept
    double fn_squares_bf16(const uint16_t*, Py_ssize_t, Py_ssize_t) noexcept
    void fn_step_bf16(const uint16_t*, uint16_t*, Py_ssize_t, float, float, float, const float*, const float*) noexcept
    bint fn_moments_of_sums(Py_ssize_t, const double*, const double*, double, double*, Py_ssize_t, uint8_t*) noexcept
    void fn_merge(double*, const double*, Py_ssize_t, Py_ssize_t) noexcept
    void fn_add_two(double*, double*, double) noexcept
    void fn_rows_about(const double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, double*) noexcept
    void fn_squares_about(const double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, double*, double*, double*) noexcept
    double fn_inverse_root(double, double) noexcept
    double fn_norm_scale(double, double) noexcept
    void fn_rstds(Py_ssize_t, const double*, double, double*) noexcept
    bint fn_spread(Py_ssize_t, Py_ssize_t, const double*, const double*, const double*, const float*, Py_ssize_t, const float*, Py_ssize_t, float*, float*, float*, uint8_t*) noexcept
    float fn_from_f16(uint16_t) noexcept
    float fn_from_bf16(uint16_t) noexcept
    void fn_load_f16(const uint16_t*, Py_ssize_t, float*) noexcept
    void fn_load_bf16(const uint16_t*, Py_ssize_t, float*) noexcept
    void fn_store_f16(const float*, Py_ssize_t, uint16_t*) noexcept
    void fn_store_bf16(const float*, Py_ssize_t, uint16_t*) noexcept
    void fn_stream(char*, const char*, size_t) noexcept
    void fn_stream_fence() noexcept
    void fn_step_folded(const float*, float*, Py_ssize_t, const float*, const float*, const float*, const float*, bint, int) noexcept
    void fn_step_float(const float*, float*, Py_ssize_t, const float*, const float*, const float*, const float*, const float*, const float*, bint, bint, bint, int) noexcept
    void fn_step_plain_double(const double*, double*, Py_ssize_t, const double*, const double*, const double*, const double*, const double*, bint, bint, bint) noexcept
    void fn_affine_float(float*, Py_ssize_t, const float*, bint, const float*, bint) noexcept
    void fn_add_float(const float*, const float*, float*, Py_ssize_t) noexcept
    void fn_add_double(const double*, const double*, double*, Py_ssize_t) noexcept
    void fn_step_planes_double(const double*, Py_ssize_t, double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, const double*, const double*, const double*, Py_ssize_t, const double*, Py_ssize_t, bint) noexcept
    void fn_step_planes(const float*, Py_ssize_t, float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float*, const float*, const float*, int) noexcept
    void fn_step_past(const float*, float*, const float*, Py_ssize_t, float, float, float, Py_ssize_t, int) noexcept
    void fn_step_rows_past(const float*, Py_ssize_t, float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float*, const float*, const float*, Py_ssize_t, int) noexcept
    void fn_step_rows(const float*, Py_ssize_t, float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float*, const float*, const float*, int) noexcept
    void fn_affine_double(double*, Py_ssize_t, const double*, bint, const double*, bint) noexcept
    void fn_relu_double(double*, Py_ssize_t) noexcept
    void fn_silu_double(double*, Py_ssize_t) noexcept
    void fn_gelu_double(double*, Py_ssize_t) noexcept
    void fn_gelu_tanh_double(double*, Py_ssize_t) noexcept
    void fn_tanh_double(double*, Py_ssize_t) noexcept

ctypedef fused real:            # what is computed in; float16 and bfloat16 compute in float
    float
    double

cdef enum:
    LANES = 32                  # partial sums side by side: FN_LANES
    BLOCK = 4096                # elements of a run whose moments are taken at once: fits L1
    PIECE = 16                  # blocks that one thread takes when a group is shared out
    AHEAD = 4096                # bytes that are asked for in advance
    BUNDLE = 16                 # groups of runs that are taken side by side, at most
    BESIDE = 4096               # elements of them, at most
    ALONE = 256                 # elements of a row that is not worth taking with others
    FEW_ROWS = 4                # shorter ones, too, where there are fewer
    NEARBY = 4096               # bytes: runs shorter than this are walked in the order of memory
    ABREAST = 512               # columns up to this number are taken as whole rows, which are fetched faster
    COLUMNS = 256               # of more, so many are taken side by side, at most (or one group of neighbours)
    SQUARE = 16384              # elements of a block of columns: fits L2
    PIECE_ROWS = 1024           # rows that one thread takes: partial sums cost at most 1 % of x
    LONG = 1024                 # bytes of a run, at least, that is written past the caches
    AWAITED = 1 << 18           # bytes at a group's end beside which as many of the next one fit in L2
    STREAMED = 256             # elements that go there at a time, by way of a tile in L1
    BRIEF = 1 << 15             # bytes of x below which handing over the interpreter's lock costs more
    NEAR = 1 << 20              # bytes of x for each thread up to which they share it out once and for all
    SERIAL = 1 << 17            # bytes of x below which waking a second thread costs more

cdef enum Storage:
    F16
    BF16
    F32
    F64
    U8                          # integers that a float holds: read for moments, never written
    I8
    U16
    I16

cdef enum Scaling:
    RSTD                        # 1 / sqrt(var + eps)
    NORM                        # 1 / max(sqrt(sum of squares), eps)
    FACTOR                      # what stands in var is the scale itself (given statistics only)

cdef enum Activation:
    IDENTITY
    RELU
    SILU
    GELU
    GELU_TANH
    TANH

cdef struct Operand:
    char* data                  # NULL: not there
    Storage storage
    Py_ssize_t a, b, p, s, c    # strides in bytes
    char* low                   # the array's memory, known in a checking build alone
    char* high

# _numba/activations.py: y = f(y), or with a scale (hi, r, shift) f of the step of x, which lies apart.
# Not 0 where f raised.
ctypedef Py_ssize_t (*Loop)(const void* x, void* y, Py_ssize_t n, const void* scale, const void* weight, const void* bias) noexcept nogil

cdef struct Pass:
    Py_ssize_t a, b, p, s, c, neighbours
    bint columns, centred, given, activation_first
    bint stream                 # y is written past the caches
    char* table                 # scales of each b, where given statistics do not differ along a
    Py_ssize_t real_size        # bytes of the computing type, in the table
    Scaling scaling
    Activation activation
    Loop user                   # an activation of the user's own, of numbers side by side, or NULL
    bint raised                 # whether it has
    double eps
    Py_ssize_t fields           # 0, or the bytes between the five fields of moments that are asked for
    Operand x, y, mask, weight, bias, residual, addend, total, mean, var, rstd
    # derived
    Py_ssize_t length           # reduced elements of a group (runs) or rows (columns)
    Py_ssize_t width            # columns of an item; of runs, neighbouring groups
    Py_ssize_t chunks           # items side by side along c; of runs, along b
    Py_ssize_t items
    Py_ssize_t block, pieces    # length of a block; pieces of an item
    bint foldable               # a weight is one number for a run or a column
    bint near                   # so small that each thread finds its part in a cache of its own
    bint straight               # x and y are read and written where they lie
    bint past                   # or read where they lie and written past the caches
    bint brief                  # bfloat16 is converted on the way: the order of its sums, whatever the stores
    int threads

include "scratch.pxi"
include "storage.pxi"
include "scales.pxi"
include "steps.pxi"
include "runs.pxi"
include "columns.pxi"
include "forward.pxi"
include "backward.pxi"
include "operands.pxi"
include "results.pxi"
include "call_keys.pxi"
include "cached_calls.pxi"
include "moments.pxi"
