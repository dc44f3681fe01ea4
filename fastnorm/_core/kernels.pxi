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

from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, fabs, fma, frexp, isfinite, ldexp, rint, sqrt
from libc.stdint cimport int8_t, int16_t, uint8_t, uint16_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
cimport numpy as cnp

import numpy as np

cnp.import_array()

cdef extern from "simd.h" nogil:
    """
    #if defined(_OPENMP)
    #define FN_OPENMP 1
    #else
    #define FN_OPENMP 0
    #endif
    """
    int FN_OPENMP, FN_HAS_FMA
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
    double fn_mac64(double, double, double) noexcept
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
    AWAITED = 1 << 18           # bytes of a group, at most, beside which the next one fits in L2
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

# _numba/activations.py: y = f(y), or with a scale (hi, r, shift) f of the step of x, which lies apart
ctypedef void (*Loop)(const void* x, void* y, Py_ssize_t n, const void* scale, const void* weight, const void* bias) noexcept nogil

cdef struct Pass:
    Py_ssize_t a, b, p, s, c, neighbours
    bint columns, centred, given, activation_first
    bint stream                 # y is written past the caches
    char* table                 # scales of each b, where given statistics do not differ along a
    Py_ssize_t real_size        # bytes of the computing type, in the table
    Scaling scaling
    Activation activation
    Loop user                   # an activation of the user's own, of numbers side by side, or NULL
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
    bint brief                  # bfloat16 is converted on the way
    int threads

# ---- storage ---------------------------------------------------------------------------------

cdef inline Py_ssize_t bytes_of(Storage storage) noexcept nogil:
    if storage > F64:
        return 1 if storage <= I8 else 2
    return 2 if storage <= BF16 else 4 if storage == F32 else 8

cdef inline bint native(Storage storage, real* kind) noexcept nogil:
    if real is float:
        return storage == F32
    else:
        return storage == F64

cdef inline void load_integers(const char* x, Storage storage, Py_ssize_t n, real* t) noexcept nogil:
    cdef Py_ssize_t i
    if storage == U8:
        for i in range(n):
            t[i] = (<const uint8_t*>x)[i]
    elif storage == I8:
        for i in range(n):
            t[i] = (<const int8_t*>x)[i]
    elif storage == U16:
        for i in range(n):
            t[i] = (<const uint16_t*>x)[i]
    else:
        for i in range(n):
            t[i] = (<const int16_t*>x)[i]

cdef inline void load(const char* x, Storage storage, Py_ssize_t n, real* t) noexcept nogil:
    cdef Py_ssize_t i
    if storage == F32:
        for i in range(n):
            t[i] = (<const float*>x)[i]
    elif storage == F64:
        for i in range(n):
            t[i] = <real>(<const double*>x)[i]
    elif storage > F64:
        load_integers(x, storage, n, t)
    elif real is float:
        if storage == F16:
            fn_load_f16(<const uint16_t*>x, n, t)
        else:
            fn_load_bf16(<const uint16_t*>x, n, t)
    elif storage == F16:
        for i in range(n):
            t[i] = fn_from_f16((<const uint16_t*>x)[i])
    else:
        for i in range(n):
            t[i] = fn_from_bf16((<const uint16_t*>x)[i])

cdef inline void store(const real* t, Py_ssize_t n, char* y, Storage storage) noexcept nogil:
    cdef Py_ssize_t i
    if real is float:
        if storage == F32:
            for i in range(n):
                (<float*>y)[i] = t[i]
        elif storage == F16:
            fn_store_f16(t, n, <uint16_t*>y)
        else:
            fn_store_bf16(t, n, <uint16_t*>y)
    else:
        for i in range(n):
            (<double*>y)[i] = t[i]

cdef inline void deliver(const real* t, Py_ssize_t n, char* y, Storage storage, bint stream, char* spare) noexcept nogil:
    """`store`, or past the caches; `spare` has room for n of y."""
    if not stream:
        store(t, n, y, storage)
    elif native(storage, <real*>t):
        fn_stream(y, <const char*>t, n * sizeof(real))
    else:
        store(t, n, spare, storage)
        fn_stream(y, spare, n * bytes_of(storage))

# What an output must exceed to be written past the caches: the last of them.
cdef Py_ssize_t stream_above = 1 << 25

def set_stream_above(Py_ssize_t size):
    """Write outputs of more than `size` bytes past the caches."""
    global stream_above
    stream_above = size

cdef inline bint pays_to_stream(Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    """Whether n elements are long enough a run: lines of which one part is written past the caches
    and another is not cost more than all that is gained."""
    return n * size >= LONG or stream_above == 0

# ---- moments and their merge -----------------------------------------------------------------

# Moments of neighbouring groups or columns: count, mean, sum of squared deviations, the last two as
# unevaluated sums of two doubles.  A mean needs more than 53 bits: at mean/std = 2^20 they leave
# an error of 2^-33 std, 1,000 units of a float32 output of 2^-20.
cdef struct Moments:
    double* count
    double* mean
    double* mean_rest
    double* m2
    double* m2_rest

cdef enum:
    FIELDS = 5                  # as many arrays, side by side: what fn_merge works on

cdef inline Moments moments_at(double* memory, Py_ssize_t width) noexcept nogil:
    cdef Moments m
    m.count, m.mean, m.mean_rest = memory, memory + width, memory + 2 * width
    m.m2, m.m2_rest = memory + 3 * width, memory + 4 * width
    return m

cdef inline double pivot_of(double mean, double var, bint precise) noexcept nogil:
    """What deviations are taken from: the mean, in so few digits that they are exact.

    `precise` leaves it two binary digits below the deviation. Integers less that are quarters at the
    finest, and their squares add up exactly.
    """
    cdef int exponent
    cdef double pivot
    if precise and 1e-80 < var < 1e80:
        frexp(sqrt(var), &exponent)
        pivot = ldexp(rint(ldexp(mean, 2 - exponent)), exponent - 2)
        if isfinite(pivot):
            return pivot
    return <float>mean

cdef inline void moments_of(const real* x, Py_ssize_t n, bint centred, double* m, Py_ssize_t step, double* sums, bint precise) noexcept nogil:
    """Moments of one block into m[0], m[step] ...: one pass over floats unless `precise`, two over doubles."""
    cdef double first = 0.0, pivot
    cdef uint8_t again = 0
    m[0] = n
    m[step] = m[2 * step] = m[3 * step] = m[4 * step] = 0.0
    if n == 0:
        return
    if real is float:
        if not centred:
            m[3 * step] = fn_squares(x, n, AHEAD)
            return
        fn_sums(x, n, AHEAD, &sums[0], &sums[1])
        if (fn_moments_of_sums(1, &sums[0], &sums[1], 0.0, m, step, &again) or precise) and isfinite(m[step]):
            pivot = pivot_of(m[step], m[3 * step] / n, precise)
            fn_sums_about(x, n, 0, pivot, &sums[0], &sums[1])
            fn_moments_of_sums(1, &sums[0], &sums[1], pivot, m, step, &again)
    else:
        if centred:
            # about the first element, so that a constant block has exactly its mean
            m[step] = x[0] + fn_deviations(x, n, AHEAD, x[0]) / n
        fn_about(x, n, 0, m[step], &first, &m[3 * step], &m[4 * step])
        if centred:
            m[2 * step] = first / n
            m[4 * step] -= first * m[2 * step]

# ---- from moments to a scale -----------------------------------------------------------------

# What the step needs.  `mean`, `rest` and `rstd` are those of groups; hi, r and shift those of columns,
# or of groups of runs, and of the computing type: y = (x - hi) * r + shift, with the affine step
# in r and shift where `folded`.  What a float cannot hold (data at 1e38 or 1e-42) is `wide` and runs in
# double, on x times the power of two `unit`.
cdef struct Scale:
    double* mean
    double* rest
    double* rstd
    double* unit
    char* hi
    char* r
    char* shift
    uint8_t* wide
    bint any_wide
    bint folded

cdef enum:
    SCALE_BYTES = 7 * 8 + 8     # bytes of a Scale for each column

cdef inline Scale scale_at(char* memory, Py_ssize_t width) noexcept nogil:
    cdef Scale s
    s.mean = <double*>memory
    s.rest, s.rstd, s.unit = s.mean + width, s.mean + 2 * width, s.mean + 3 * width
    s.hi = <char*>(s.mean + 4 * width)
    s.r, s.shift = s.hi + 8 * width, s.hi + 16 * width
    s.wide = <uint8_t*>(s.hi + 24 * width)
    s.any_wide = s.folded = False
    return s

cdef inline double number(const char* at, Storage storage) noexcept nogil:
    if storage == F64:
        return (<const double*>at)[0]
    if storage == F32:
        return (<const float*>at)[0]
    if storage == F16:
        return fn_from_f16((<const uint16_t*>at)[0])
    return fn_from_bf16((<const uint16_t*>at)[0])

cdef inline double element(Pass* q, Operand* x, const char* base, Py_ssize_t i) noexcept nogil:
    return number(base + (i // q.s) * x.p + (i % q.s) * x.s, x.storage)

cdef bint rescue(Pass* q, const char* x, const char* mask, double* mean, double* rest, double* m2, double* unit) noexcept nogil:
    """Moments of one group whose squares leave float64's range: slow, rare, on x * unit.

    False where there is nothing to rescue: not a number, infinite, or constant (mean set, m2 0).
    """
    cdef Operand* source = source_of(q)
    cdef Py_ssize_t i, k, count = 0
    cdef double v, largest = 0.0, first = 0.0
    cdef bint constant = True
    cdef int exponent
    for k in range(q.neighbours):
        for i in range(q.length):
            if mask != NULL and not (mask + (i // q.s) * q.mask.p + (i % q.s) * q.mask.s + k * q.mask.c)[0]:
                continue
            v = element(q, source, x + k * source.c, i)
            if not isfinite(v):
                return False
            if count == 0:
                first = v
            constant = constant and v == first
            largest = max(largest, fabs(v))
            count += 1
    if count == 0:
        return False
    if largest == 0.0 or (constant and q.centred):
        mean[0] = first
        rest[0] = m2[0] = 0.0
        unit[0] = 1.0
        return False
    frexp(largest, &exponent)
    unit[0] = ldexp(1.0, min(-exponent, 1000))
    mean[0] = rest[0] = 0.0
    if q.centred:
        # twice, as in moments_of: about the first element, then about that mean
        mean[0] = first * unit[0]
        mean[0] += total_of(q, x, mask, source, unit[0], mean[0], 1) / count
        rest[0] = total_of(q, x, mask, source, unit[0], mean[0], 1) / count
    m2[0] = total_of(q, x, mask, source, unit[0], mean[0], 2) - count * rest[0] * rest[0]
    return True

cdef double total_of(Pass* q, const char* x, const char* mask, Operand* source, double unit, double pivot, int power) noexcept nogil:
    """Compensated sum of (x * unit - pivot)^power over a group."""
    cdef Py_ssize_t i, k
    cdef double total = 0.0, rest = 0.0, v
    for k in range(q.neighbours):
        for i in range(q.length):
            if mask != NULL and not (mask + (i // q.s) * q.mask.p + (i % q.s) * q.mask.s + k * q.mask.c)[0]:
                continue
            v = element(q, source, x + k * source.c, i) * unit - pivot
            fn_add_two(&total, &rest, v * v if power == 2 else v)
    return total + rest

cdef inline Operand* source_of(Pass* q) noexcept nogil:
    return &q.total if q.total.data != NULL else &q.x

cdef inline char* at(Operand* o, Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return o.data + a * o.a + b * o.b

cdef struct Item:               # groups b, b + 1 ... of runs, or neighbouring columns c, c + 1 ...
    Py_ssize_t a, b, c, width

cdef inline Item item_at(Pass* q, Py_ssize_t index) noexcept nogil:
    cdef Item it
    cdef Py_ssize_t outer = index, chunk = 0
    it.a = it.c = 0
    # a division costs as much as normalising a dozen numbers: only where there is something to divide
    if q.chunks > 1:
        outer = index // q.chunks
        chunk = index - outer * q.chunks
    if not q.columns:
        it.a, it.b = outer, chunk * q.width
        it.width = min(q.width, q.b - it.b)
        return it
    it.c = chunk * q.width
    it.width = min(q.width, q.c - it.c)
    it.b = outer
    if q.a > 1:
        it.a = outer // q.b
        it.b = outer - it.a * q.b
    return it

cdef inline Item group_at(Item it, Py_ssize_t k) noexcept nogil:
    """Of a bundle of groups of runs, one."""
    it.b += k
    it.width = 1
    return it

cdef inline Py_ssize_t groups_of(Pass* q, Item it) noexcept nogil:
    return it.width if q.neighbours == 1 else it.width // q.neighbours

cdef inline double* statistic_at(Pass* q, Operand* o, Item it, Py_ssize_t* step) noexcept nogil:
    """Where the first statistic of an item is kept, and how far it is to the next."""
    if q.columns:
        step[0] = o.c // sizeof(double)
        return <double*>(at(o, it.a, it.b) + it.c // q.neighbours * o.c)
    step[0] = o.b // sizeof(double)
    return <double*>at(o, it.a, it.b)

cdef inline const float* weights_of(Pass* q, Operand* o, Item it, Py_ssize_t* step) noexcept nogil:
    """The weights of an item's columns, or of the groups of a bundle, and how far apart they lie."""
    step[0] = (o.c if q.columns else o.b) // <Py_ssize_t>sizeof(float)
    return NULL if o.data == NULL else <const float*>(at(o, it.a, it.b) + it.c * o.c)

cdef void finish_float(Pass* q, Item it, double* moments, Scale* s) noexcept nogil:
    """From the moments of an item's groups to what the step needs; statistics written out."""
    cdef Py_ssize_t g, j, k = q.neighbours, n = groups_of(q, it), step, w_step = 0, b_step = 0
    cdef Moments m = moments_at(moments, n)
    cdef double* mean_out = statistic_at(q, &q.mean, it, &step)
    cdef double* var_out = statistic_at(q, &q.var, it, &step)
    cdef double* rstd_out = statistic_at(q, &q.rstd, it, &step)
    cdef double* var = s.unit
    cdef const float* w
    cdef const float* b
    if q.given:
        for g in range(n):
            s.mean[g], s.rest[g], var[g] = mean_out[g * step], 0.0, var_out[g * step]
    else:
        for g in range(n):
            # of no elements: not a number
            var[g] = m.m2[g] / m.count[g]
            s.mean[g] = m.mean[g] if m.count[g] > 0.0 else NAN
            s.rest[g] = m.mean_rest[g]
    if q.scaling == RSTD:
        fn_rstds(n, var, q.eps, s.rstd)
    elif q.scaling == FACTOR:
        for g in range(n):
            s.rstd[g] = var[g]
    else:
        for g in range(n):
            s.rstd[g] = fn_norm_scale(m.m2[g], q.eps)
    if q.mean.data != NULL and not q.given:
        for g in range(n):
            mean_out[g * step], var_out[g * step], rstd_out[g * step] = s.mean[g], var[g], s.rstd[g]
    if q.y.data == NULL:
        return
    # one weight for each column or group; a table holds for all of a
    s.folded = q.foldable and q.weight.p == q.bias.p == 0 and (q.table == NULL or q.weight.a == q.bias.a == 0)
    w = weights_of(q, &q.weight, it, &w_step) if s.folded else NULL
    b = weights_of(q, &q.bias, it, &b_step) if s.folded else NULL
    s.any_wide = fn_spread(n, k, s.mean, s.rest, s.rstd, w, w_step, b, b_step, <float*>s.hi, <float*>s.r, <float*>s.shift, s.wide)
    if s.any_wide:
        for j in range(n * k - 1, -1, -1):
            g = j // k
            s.mean[j], s.rest[j], s.rstd[j], s.unit[j] = s.mean[g], s.rest[g], s.rstd[g], 1.0

cdef void finish_double(Pass* q, Item it, double* moments, Scale* s) noexcept nogil:
    """The same, with variances to twice the precision, and groups beyond its range rescued."""
    cdef Py_ssize_t g, j, k = q.neighbours, n = groups_of(q, it), step
    cdef Moments m = moments_at(moments, n)
    cdef double* mean_out = statistic_at(q, &q.mean, it, &step)
    cdef double* var_out = statistic_at(q, &q.var, it, &step)
    cdef double* rstd_out = statistic_at(q, &q.rstd, it, &step)
    cdef double count, mean, rest, m2, m2_rest, var, var_rest, v, unit, rstd
    cdef Py_ssize_t b = 0 if q.columns else 1, c = k if q.columns else 0
    cdef char* x
    cdef char* mask
    cdef Operand* source = source_of(q)
    s.any_wide = s.folded = False
    for g in range(n - 1, -1, -1):
        unit = 1.0
        rest = 0.0
        if q.given:
            mean, var = mean_out[g * step], var_out[g * step]
            rstd = var if q.scaling == FACTOR else fn_inverse_root(var + q.eps, 0.0) if var + q.eps != 0.0 else 0.0
        else:
            count, mean, rest, m2, m2_rest = m.count[g], m.mean[g], m.mean_rest[g], m.m2[g], m.m2_rest[g]
            if count == 0.0:
                mean = m2 = NAN
            v = m2 / count + q.eps if q.scaling == RSTD else m2
            if not 1e-270 < v < 1e270:
                x = at(source, it.a, it.b + g * b) + (it.c + g * c) * source.c
                mask = NULL if q.mask.data == NULL else at(&q.mask, it.a, it.b + g * b) + (it.c + g * c) * q.mask.c
                if rescue(q, x, mask, &mean, &rest, &m2, &unit):
                    m2_rest = 0.0
            var = m2 / count
            if q.scaling == RSTD:
                v = var + q.eps * unit * unit
                var_rest = (fma(-var, count, m2) + m2_rest) / count + ((var - v) + q.eps * unit * unit)
                # a constant group with eps = 0 is all bias: its scale is 0, not infinity
                rstd = fn_inverse_root(v, var_rest) if v != 0.0 else 0.0
            else:
                rstd = fn_inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
                if sqrt(m2) < q.eps * unit:
                    rstd = 1.0 / (q.eps * unit)
            if q.mean.data != NULL:
                mean_out[g * step] = mean / unit
                var_out[g * step] = var / unit / unit
                rstd_out[g * step] = rstd * unit
        s.any_wide |= unit != 1.0
        for j in range(g * k, g * k + k):
            s.mean[j], s.rest[j], s.rstd[j], s.unit[j] = mean, rest, rstd, unit
            s.wide[j] = unit != 1.0
            (<double*>s.hi)[j], (<double*>s.r)[j], (<double*>s.shift)[j] = mean, rstd, -rest * rstd

cdef inline bint first_moments(Pass* q, Py_ssize_t n, const double* first, const double* second, double* m, uint8_t* again) noexcept nogil:
    """Moments from sums about zero, and whether any of them are to be taken again about their mean."""
    cdef Py_ssize_t i
    cdef bint found = fn_moments_of_sums(n, first, second, 0.0, m, n, again)
    if q.fields != 0:
        for i in range(n):
            again[i] = 1        # all of them: parts are to merge to the same however they were cut
    return found or q.fields != 0

cdef inline void finish(Pass* q, Item it, double* moments, Scale* s, real* kind) noexcept nogil:
    if q.fields != 0:
        deliver_moments(q, it, moments)
    elif real is float:
        finish_float(q, it, moments, s)
    else:
        finish_double(q, it, moments, s)

# ---- the step --------------------------------------------------------------------------------

cdef struct Scratch:
    char* memory
    double* part                # a block's moments
    double* columns             # moments of columns, before neighbours are merged
    double* piece               # a piece's moments
    double* whole               # an item's moments
    double* sums                # three rows
    double* lanes
    uint8_t* again
    char* scale
    char* tile
    char* extra
    char* third
    float* rows                 # two bundles of what was converted
    float* ready                # the run that is to be stepped, where it was converted before

cdef inline void activate(double* t, Py_ssize_t n, Activation activation) noexcept nogil:
    if activation == RELU:
        fn_relu_double(t, n)
    elif activation == SILU:
        fn_silu_double(t, n)
    elif activation == GELU:
        fn_gelu_double(t, n)
    elif activation == GELU_TANH:
        fn_gelu_tanh_double(t, n)
    elif activation == TANH:
        fn_tanh_double(t, n)

cdef inline void step_wide(Scale* s, Py_ssize_t k, bint columns, const real* x, real* y, const real* w, bint wv,
                           const real* b, bint bv, Py_ssize_t n) noexcept nogil:
    """What the computing type cannot hold, in double: rare."""
    cdef Py_ssize_t i, j
    cdef double v
    for i in range(n):
        j = i if columns else k
        if s.wide[j]:
            v = ((<double>x[i] * s.unit[j] - s.mean[j]) - s.rest[j]) * s.rstd[j]
            y[i] = <real>(v * (w[i if wv else 0] if w != NULL else 1.0) + (b[i if bv else 0] if b != NULL else 0.0))

cdef inline void step(Pass* q, Scale* s, Py_ssize_t k, const char* x, char* y, const char* residual,
                      const char* weight, const char* bias, Py_ssize_t n, Scratch* h, real* kind) noexcept nogil:
    """One run of group k, or one row of columns, of at most BLOCK elements, from x to y.

    Straight from memory to memory where it can be; through tiles in L1 where a format is converted
    or y written past the caches.
    """
    cdef Storage storage = source_of(q).storage
    cdef real* tile = <real*>h.tile
    cdef real* extra = <real*>h.extra
    cdef real* third = <real*>h.third
    cdef const real* source = <const real*>x
    cdef const real* e = <const real*>residual
    cdef const real* w = <const real*>weight
    cdef const real* b = <const real*>bias
    cdef bint wv = weight != NULL and (q.weight.c if q.columns else q.weight.s) != 0
    cdef bint bv = bias != NULL and (q.bias.c if q.columns else q.bias.s) != 0
    cdef bint wide = s.any_wide if q.columns else s.wide[k]
    cdef bint direct = native(q.y.storage, kind) and not q.stream and not wide
    cdef real* target = <real*>y if direct else tile
    cdef Py_ssize_t offset = 0 if q.columns else k
    cdef const real* hi = <const real*>s.hi + offset
    cdef const real* r = <const real*>s.r + offset
    cdef const real* shift = <const real*>s.shift + offset
    cdef int activation = q.activation
    cdef Loop user = q.user
    cdef real[3] scale
    if h.ready != NULL:
        source = <const real*>h.ready
    elif not native(storage, kind):
        load(x, storage, n, extra)
        source = extra
    if residual != NULL and not native(q.residual.storage, kind):
        load(residual, q.residual.storage, n, third)
        e = third
    if q.activation_first:
        w, b, wv, bv = NULL, NULL, False, False
    if real is float:
        if wide:
            if s.folded:
                fn_step_folded(source, target, n, hi, r, shift, NULL, q.columns, IDENTITY)
            else:
                fn_step_float(source, target, n, hi, r, shift, w, b, NULL, q.columns, wv, bv, IDENTITY)
            step_wide(s, k, q.columns, source, target, w, wv, b, bv, n)
            if e != NULL or activation != IDENTITY:
                fn_step_folded(target, target, n, &NOTHING, &ONE, &MINUS_NOTHING, e, False, activation)
        elif (user != NULL and FN_HAS_FMA and not q.columns and e == NULL and source != target
              and (s.folded or (wv and (bv or b == NULL)))):
            # in one loop: a division of the user's then goes on beside the next step
            scale[0], scale[1], scale[2] = hi[0], r[0], shift[0]
            user(source, target, n, scale, NULL if s.folded else w, NULL if s.folded else b)
            user = NULL
        elif s.folded:
            fn_step_folded(source, target, n, hi, r, shift, e, q.columns, activation)
        else:
            fn_step_float(source, target, n, hi, r, shift, w, b, e, q.columns, wv, bv, activation)
        if q.activation_first and (weight != NULL or bias != NULL):
            affine_after(q, target, n, weight, bias)
    else:
        # in several passes over a tile: x, y and the residual may be one array
        if e != NULL or activation != IDENTITY:
            target = tile
        fn_step_plain_double(source, target, n, hi, r, shift, w, b, q.columns, wv, bv)
        if wide:
            step_wide(s, k, q.columns, source, target, w, wv, b, bv, n)
        if e != NULL:
            fn_add_double(target, e, target, n)
        activate(target, n, q.activation)
        if q.activation_first and (weight != NULL or bias != NULL):
            affine_after(q, target, n, weight, bias)
    if user != NULL:
        user(NULL, target, n, NULL, NULL, NULL)
    if <char*>target != y:
        deliver(target, n, y, q.y.storage, q.stream, h.extra)

cdef float NOTHING = 0.0, ONE = 1.0, MINUS_NOTHING = -0.0

cdef void affine_after(Pass* q, real* t, Py_ssize_t n, const char* weight, const char* bias) noexcept nogil:
    """The affine step of a norm that squashes first."""
    cdef real one = 1.0, zero = 0.0
    cdef const real* w = <const real*>weight if weight != NULL else &one
    cdef const real* b = <const real*>bias if bias != NULL else &zero
    cdef bint wv = weight != NULL and (q.weight.c if q.columns else q.weight.s) != 0
    cdef bint bv = bias != NULL and (q.bias.c if q.columns else q.bias.s) != 0
    if real is float:
        fn_affine_float(t, n, w, wv, b, bv)
    else:
        fn_affine_double(t, n, w, wv, b, bv)

# ---- runs ------------------------------------------------------------------------------------

cdef struct Run:                # elements [first, first + n) of a group that lie in one plane
    Py_ssize_t p, s, n

cdef inline Run run_at(Pass* q, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Run r
    r.p, r.s = 0, first
    if first >= q.s:
        r.p = first // q.s
        r.s = first - r.p * q.s
    r.n = min(last - first, q.s - r.s)
    return r

cdef const real* fetch(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, Scratch* h, Py_ssize_t* count, real* kind) noexcept nogil:
    """Elements [first, last) of a group side by side, as numbers: in place where they lie so."""
    cdef Py_ssize_t i, k = 0, f = first, size
    cdef Run r = run_at(q, first, last)
    cdef char* x = at(&q.x, it.a, it.b)
    cdef real* tile = <real*>h.tile
    cdef real* extra = <real*>h.extra
    cdef const uint8_t* mask
    cdef const real* source
    size = bytes_of(q.x.storage)
    if native(q.x.storage, kind) and q.mask.data == NULL and q.total.data == NULL:
        if r.n == last - first or q.x.p == q.s * size:
            count[0] = last - first
            return <const real*>(x + r.p * q.x.p + r.s * size)
    while f < last:
        r = run_at(q, f, last)
        fn_fetch(x + (r.p + 4) * q.x.p + r.s * size, r.n * size)  # planes may lie apart
        load(x + r.p * q.x.p + r.s * size, q.x.storage, r.n, tile + k)
        if q.total.data != NULL:
            # x + residual, rounded to the type of x: what the norm is of, and the second result
            load(at(&q.addend, it.a, it.b) + r.p * q.addend.p + r.s * bytes_of(q.addend.storage), q.addend.storage, r.n, extra)
            for i in range(r.n):
                tile[k + i] += extra[i]
            store(tile + k, r.n, at(&q.total, it.a, it.b) + r.p * q.total.p + r.s * size, q.total.storage)
            load(at(&q.total, it.a, it.b) + r.p * q.total.p + r.s * size, q.total.storage, r.n, tile + k)
        if q.mask.data == NULL:
            k += r.n
        else:
            mask = <const uint8_t*>(at(&q.mask, it.a, it.b) + r.p * q.mask.p + r.s * q.mask.s)
            source = tile + k
            for i in range(r.n):
                if mask[i * q.mask.s]:
                    tile[k] = source[i]
                    k += 1
        f += r.n
    count[0] = k
    return tile

cdef inline void bundle_sums(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double pivot, double* sums, double* lanes) noexcept nogil:
    """Sums of x - pivot and of its square, over elements [first, last) of each group of a bundle."""
    cdef Run r = run_at(q, first, last)
    cdef Py_ssize_t k, f = first, width = it.width, ahead
    cdef char* x = at(&q.x, it.a, it.b)
    cdef const float* source
    if r.n == last - first or q.x.p == q.s * q.x.s:
        x += r.p * q.x.p + r.s * q.x.s
        for k in range(width):
            if q.brief and pivot == 0.0:
                fn_sums_bf16(<const uint16_t*>(x + k * q.x.b), last - first, AHEAD, &sums[k], &sums[width + k])
            elif q.brief:
                fn_sums_about_bf16(<const uint16_t*>(x + k * q.x.b), last - first, 0, pivot, &sums[k], &sums[width + k])
            elif pivot == 0.0:
                fn_sums(<const float*>(x + k * q.x.b), last - first, AHEAD, &sums[k], &sums[width + k])
            else:
                fn_sums_about(<const float*>(x + k * q.x.b), last - first, 0, pivot, &sums[k], &sums[width + k])
        return
    memset(lanes, 0, width * 2 * LANES * sizeof(double))
    ahead = q.x.p if width == 1 else AHEAD
    while f < last:
        r = run_at(q, f, last)
        for k in range(width):
            source = <const float*>(x + k * q.x.b + r.p * q.x.p + r.s * q.x.s)
            if pivot == 0.0:
                fn_gather(source, r.n, ahead, lanes + k * 2 * LANES, lanes + k * 2 * LANES + LANES)
            else:
                fn_gather_about(source, r.n, 0, pivot, lanes + k * 2 * LANES, lanes + k * 2 * LANES + LANES)
        f += r.n
    for k in range(width):
        sums[k] = fn_fold(lanes + k * 2 * LANES)
        sums[width + k] = fn_fold(lanes + k * 2 * LANES + LANES)

cdef void runs_block(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, Scratch* h, real* kind) noexcept nogil:
    """Moments of elements [first, last) of each group of a bundle."""
    cdef Py_ssize_t k, count, width = it.width
    cdef double[2] two
    cdef double pivot
    cdef const real* x
    if real is float and (q.x.storage == F32 or q.brief) and q.mask.data == NULL and q.total.data == NULL and q.centred:
        for k in range(width):
            into[k] = last - first
        bundle_sums(q, it, first, last, 0.0, h.sums, h.lanes)
        if first_moments(q, width, h.sums, h.sums + width, into, h.again):
            for k in range(width):
                if h.again[k] and isfinite(into[width + k]):
                    pivot = pivot_of(into[width + k], into[3 * width + k] / into[k], q.fields != 0)
                    bundle_sums(q, group_at(it, k), first, last, pivot, two, h.lanes)
                    fn_moments_of_sums(1, &two[0], &two[1], pivot, into + k, width, h.again + k)
        return
    for k in range(width):
        x = fetch(q, group_at(it, k), first, last, h, &count, kind)
        moments_of(x, count, q.centred, into + k, width, two, q.fields != 0)

cdef void runs_moments(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t f = first + BLOCK
    runs_block(q, it, first, min(f, last), into, h, kind)
    while f < last:
        runs_block(q, it, f, min(f + BLOCK, last), h.part, h, kind)
        fn_merge(into, h.part, it.width, it.width)
        f += BLOCK

cdef inline bint fold_run(Scale* s, Py_ssize_t k, const char* weight, const char* bias, float* r, float* shift) noexcept nogil:
    """The affine step of a run taken into r and shift; False where a float can not hold the product."""
    cdef double w = (<const float*>weight)[0] if weight != NULL else 1.0
    cdef double rw = s.rstd[k] * w
    cdef double lo = (s.mean[k] - <double>(<float*>s.hi)[k]) + s.rest[k]
    if s.folded:
        r[0], shift[0] = (<float*>s.r)[k], (<float*>s.shift)[k]
        return True
    r[0] = <float>rw
    shift[0] = <float>((<double>(<const float*>bias)[0] if bias != NULL else 0.0) - lo * rw)
    return 7.9e-31 < fabs(rw) < 1.3e30 or rw == 0.0

cdef inline char* run_of(Operand* o, Item it, Py_ssize_t k, Run r) noexcept nogil:
    """Where a run of group k of a bundle begins in an operand that may not be there."""
    return NULL if o.data == NULL else at(o, it.a, it.b + k) + r.p * o.p + r.s * o.s

cdef inline bint brief_step(Pass* q, Scale* s, Py_ssize_t k, char* x, char* y, char* weight, char* bias, Py_ssize_t n) noexcept nogil:
    """A run of bfloat16, in one loop; False where a float cannot hold its scale."""
    cdef float r = (<float*>s.r)[k], shift = (<float*>s.shift)[k]
    if q.foldable and not fold_run(s, k, weight, bias, &r, &shift):
        return False
    if q.foldable:
        weight = bias = NULL
    fn_step_bf16(<const uint16_t*>x, <uint16_t*>y, n, (<float*>s.hi)[k], r, shift, <const float*>weight, <const float*>bias)
    return True

cdef inline void run_step(Pass* q, Item it, Scale* s, Py_ssize_t k, Run r, Scratch* h, real* kind) noexcept nogil:
    """One run of group k of a bundle."""
    cdef Operand* source = source_of(q)
    cdef char* x = at(source, it.a, it.b + k) + r.p * source.p + r.s * source.s
    cdef char* y = at(&q.y, it.a, it.b + k) + r.p * q.y.p + r.s * q.y.s
    cdef char* weight = run_of(&q.weight, it, k, r)
    cdef char* bias = run_of(&q.bias, it, k, r)
    cdef char* residual = run_of(&q.residual, it, k, r)
    cdef Scale folding
    cdef float rw, shift
    cdef Py_ssize_t ahead, over
    if real is float:
        if q.brief and not s.wide[k] and brief_step(q, s, k, x, y, weight, bias, r.n):
            return
        if q.past and not s.wide[k] and fold_run(s, k, weight, bias, &rw, &shift):
            ahead = AHEAD
            over = max(q.length * source.s - AWAITED, <Py_ssize_t>0)
            if not q.given and (r.p * q.s + r.s) * source.s >= over:
                ahead = source.b - over     # (the end of) this group lies in cache, the next one does not yet
            fn_step_past(<const float*>x, <float*>y, <const float*>residual, r.n, (<float*>s.hi)[k], rw, shift, ahead, q.activation)
            return
        if s.folded and not s.wide[k]:
            if q.straight:
                fn_step_folded(<const float*>x, <float*>y, r.n, <float*>s.hi + k, <float*>s.r + k, <float*>s.shift + k, <const float*>residual, False, q.activation)
                return
        elif q.foldable and not s.wide[k]:
            # the affine step goes into r and shift, where a float can hold the product
            if fold_run(s, k, weight, bias, &rw, &shift):
                if q.straight:
                    fn_step_folded(<const float*>x, <float*>y, r.n, <float*>s.hi + k, &rw, &shift, <const float*>residual, False, q.activation)
                    return
                folding.hi, folding.r, folding.shift = s.hi + k * sizeof(float), <char*>&rw, <char*>&shift
                folding.folded, folding.wide = True, s.wide + k
                step(q, &folding, 0, x, y, residual, NULL, NULL, r.n, h, kind)
                return
        elif q.straight and not s.wide[k] and not q.activation_first:
            fn_step_float(<const float*>x, <float*>y, r.n, <float*>s.hi + k, <float*>s.r + k, <float*>s.shift + k,
                          <const float*>weight, <const float*>bias, <const float*>residual, False, q.weight.s != 0, q.bias.s != 0, q.activation)
            return
    step(q, s, k, x, y, residual, weight, bias, r.n, h, kind)

cdef inline Py_ssize_t stretch(Pass* q, Item it, Py_ssize_t k, Run r) noexcept nogil:
    """How much of a run is stepped at once: what is written past the caches then begins at a line."""
    cdef size_t y
    if not q.stream or q.past:
        return r.n if q.straight or q.past else min(r.n, <Py_ssize_t>BLOCK)
    y = <size_t>(at(&q.y, it.a, it.b + k) + r.p * q.y.p + r.s * q.y.s)
    return min(r.n, STREAMED + <Py_ssize_t>((0 - y) % 64) // bytes_of(q.y.storage))

cdef inline bint goes_past(Pass* q, Item it, Scale* s, Run r) noexcept nogil:
    """Whether a run of each group goes past the caches whole, however long it is."""
    cdef Py_ssize_t k
    cdef float rw, shift
    if not q.past or s.any_wide:
        return False
    for k in range(it.width):
        if not fold_run(s, k, run_of(&q.weight, it, k, r), run_of(&q.bias, it, k, r), &rw, &shift):
            return False
    return True

cdef void runs_step(Pass* q, Item it, Scale* s, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t f = first, k, size = sizeof(float), wide = sizeof(double)
    cdef bint past, plain = q.straight and q.foldable and not s.any_wide and q.residual.data == NULL and q.activation == IDENTITY
    cdef Operand* source = source_of(q)
    cdef Run r
    while f < last:
        r = run_at(q, f, last)
        if real is float and q.straight and s.folded and not s.any_wide:
            fn_step_planes(<const float*>(at(source, it.a, it.b) + r.p * source.p + r.s * source.s), source.b // size,
                           <float*>(at(&q.y, it.a, it.b) + r.p * q.y.p + r.s * q.y.s), q.y.b // size,
                           NULL if q.residual.data == NULL else <const float*>(at(&q.residual, it.a, it.b) + r.p * q.residual.p + r.s * q.residual.s),
                           q.residual.b // size, it.width, r.n, source.p if q.p > 1 and it.width > 1 else 0, <float*>s.hi, <float*>s.r, <float*>s.shift, q.activation)
            f += r.n
            continue
        if real is double and plain:
            fn_step_planes_double(<const double*>(at(source, it.a, it.b) + r.p * source.p + r.s * source.s), source.b // wide,
                                  <double*>(at(&q.y, it.a, it.b) + r.p * q.y.p + r.s * q.y.s), q.y.b // wide,
                                  it.width, r.n, source.p if q.p > 1 and it.width > 1 else 0, <double*>s.hi, <double*>s.r, <double*>s.shift,
                                  <const double*>run_of(&q.weight, it, 0, r), q.weight.b // wide, <const double*>run_of(&q.bias, it, 0, r), q.bias.b // wide, q.past)
            f += r.n
            continue
        past = real is float and goes_past(q, it, s, r)
        if real is double or not (q.straight or past):
            r.n = min(stretch(q, it, 0, r), <Py_ssize_t>BLOCK)
        for k in range(it.width):
            if past:
                pass                # asks for what comes next on its own
            elif q.stream and q.given:
                fn_fetch(at(source, it.a, it.b + k) + r.p * source.p + r.s * source.s + AHEAD, r.n * source.s)
                if q.residual.data != NULL:
                    fn_fetch(at(&q.residual, it.a, it.b + k) + r.p * q.residual.p + r.s * q.residual.s + AHEAD, r.n * q.residual.s)
            elif not q.stream and q.p > 1 and it.width > 1:
                # planes that lie apart leave the prefetcher behind
                fn_fetch(at(source, it.a, it.b + k) + (r.p + 1) * source.p + r.s * source.s, r.n * source.s)
                fn_fetch(at(&q.y, it.a, it.b + k) + (r.p + 1) * q.y.p + r.s * q.y.s, r.n * q.y.s)
            elif q.stream and q.length * source.s <= AWAITED:
                # x lies in cache: the next group's is on its way while this one's result is written
                fn_fetch(at(source, it.a, it.b + k + 1) + r.p * source.p + r.s * source.s, r.n * source.s)
            run_step(q, it, s, k, r, h, kind)
        f += r.n

cdef inline bint flows(Pass* q) noexcept nogil:
    """Whether groups, not of doubles, are short, lie in one piece and are all taken."""
    return (not q.columns and not q.given and q.y.data != NULL and q.mask.data == NULL and q.length <= BLOCK
            and (q.x.storage == F32 or (q.x.storage < F32 and q.width * q.length <= 2 * BLOCK and q.total.data == NULL))
            and (q.total.data == NULL or (q.p == 1 and q.addend.storage == F32 and q.y.storage == F32))
            and (q.p == 1 or q.x.p == q.s * <Py_ssize_t>bytes_of(q.x.storage)))

cdef inline const float* flowing(Pass* q, Item it, Py_ssize_t k, float* rows) noexcept nogil:
    """Group k of a bundle: where it lies, or the floats that it was converted to."""
    if q.x.storage < F32:
        return rows + k * q.length
    return <const float*>at(source_of(q), it.a, it.b + k)

cdef inline void flow_in(Pass* q, Item it, Py_ssize_t k, double* sums, float* rows) noexcept nogil:
    """The sums of group k of a bundle, and x + residual where the norm is of that."""
    if q.brief:
        if q.centred:
            fn_sums_bf16(<const uint16_t*>at(&q.x, it.a, it.b + k), q.length, AHEAD, &sums[k], &sums[BUNDLE + k])
        else:
            sums[BUNDLE + k] = fn_squares_bf16(<const uint16_t*>at(&q.x, it.a, it.b + k), q.length, AHEAD)
        return
    if q.x.storage < F32:
        load(at(&q.x, it.a, it.b + k), q.x.storage, q.length, rows + k * q.length)
    elif q.total.data != NULL:
        fn_add_float(<const float*>at(&q.x, it.a, it.b + k), <const float*>at(&q.addend, it.a, it.b + k),
                     <float*>at(&q.total, it.a, it.b + k), q.length)
    if q.centred:
        fn_sums(flowing(q, it, k, rows), q.length, AHEAD, &sums[k], &sums[BUNDLE + k])
    else:
        sums[BUNDLE + k] = fn_squares(flowing(q, it, k, rows), q.length, AHEAD)

cdef inline void bundle_moments(Pass* q, Item it, double* moments, Scratch* h, float* rows) noexcept nogil:
    """Moments of a bundle of short groups whose sums are in h.sums."""
    cdef Py_ssize_t k, width = it.width
    cdef double[2] two
    cdef double pivot
    for k in range(width):
        moments[k] = q.length
    if not q.centred:
        for k in range(width):
            moments[width + k] = moments[2 * width + k] = moments[4 * width + k] = 0.0
            moments[3 * width + k] = h.sums[BUNDLE + k]
    elif fn_moments_of_sums(width, h.sums, h.sums + BUNDLE, 0.0, moments, width, h.again):
        for k in range(width):
            if h.again[k] and isfinite(moments[width + k]):
                pivot = <float>moments[width + k]
                if q.brief:
                    fn_sums_about_bf16(<const uint16_t*>at(&q.x, it.a, it.b + k), q.length, 0, pivot, &two[0], &two[1])
                else:
                    fn_sums_about(flowing(q, it, k, rows), q.length, 0, pivot, &two[0], &two[1])
                fn_moments_of_sums(1, &two[0], &two[1], pivot, moments + k, width, h.again + k)

cdef void flow(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    """Bundles of short groups: the sums of one go on beside the steps of the one before.

    Memory is then read and written all the time, and square roots are taken for a bundle at once.
    """
    cdef Py_ssize_t i, k
    cdef Item now, then
    cdef Scale s = scale_at(h.scale, BUNDLE)
    cdef float* rows = h.rows
    cdef float* before = rows
    cdef Run r
    cdef Py_ssize_t rest
    then.width = now.width = 0
    for i in range(first, last + 1):
        if i < last:
            now = item_at(q, i)
        else:
            now.width = 0
        rows = h.rows + i % 2 * q.width * q.length
        for k in range(max(now.width, then.width)):
            if k < now.width:
                flow_in(q, now, k, h.sums, rows)
            if k < then.width:
                for r.p in range(q.p):
                    r.s, r.n = 0, q.s
                    while r.n > 0:
                        rest = r.n
                        r.n = stretch(q, then, k, r)
                        if q.stream and now.width > 0:
                            # what is summed next is on its way while this is written
                            fn_fetch(at(&q.x, now.a, now.b + k + 1) + r.s * q.x.s, r.n * q.x.s)
                        if q.x.storage < F32 and not q.brief:
                            h.ready = before + k * q.length + r.p * q.s + r.s
                        run_step(q, then, &s, k, r, h, kind)
                        r.s += r.n
                        r.n = rest - r.n
        if now.width > 0:
            bundle_moments(q, now, h.whole, h, rows)
            finish(q, now, h.whole, &s, kind)
        then, before = now, rows
    h.ready = NULL

cdef inline bint plain_rows(Pass* q) noexcept nogil:
    """Whether groups are rows with nothing beside weights, not too short to take one by one."""
    if (q.columns or q.given or q.y.data == NULL or q.mask.data != NULL or q.p != 1 or q.length > BLOCK
            or (q.length < ALONE and q.a * q.b >= FEW_ROWS)
            or q.residual.data != NULL or q.activation != IDENTITY or q.user != NULL or q.activation_first):
        return False
    if not (q.foldable or (q.weight.s != 0 and q.weight.b == q.bias.b == 0 and (q.bias.data == NULL or q.bias.s != 0))):
        return False
    if q.total.data != NULL:
        return q.x.storage == q.y.storage == q.addend.storage == F32
    return q.x.storage == q.y.storage and (q.x.storage >= F32 or q.brief) and q.x.storage <= F64

cdef inline char* there(Operand* o, Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return NULL if o.data == NULL else at(o, a, b)

cdef inline const char* lined_up(const char* w, const char* y, Py_ssize_t size, char* memory) noexcept nogil:
    """A copy of w as far from the beginning of a cache line as y: a load that crosses one takes two."""
    cdef char* copy = memory + <size_t>y % 64
    if w == NULL:
        return NULL
    memcpy(copy, w, size)
    return copy

cdef void norm_rows(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    """Rows [first, last), each an item."""
    cdef fn_rows rows
    cdef Py_ssize_t i = first, a, b, n, size = q.length * sizeof(real)
    rows.x_step, rows.y_step, rows.e_step, rows.total_step = q.x.b, q.y.b, q.addend.b, q.total.b
    rows.w_step, rows.b_step, rows.stat_step = q.weight.b, q.bias.b, q.rstd.b
    rows.ahead, rows.eps, rows.norm, rows.stream, rows.tile = AHEAD, q.eps, q.scaling == NORM, q.stream, h.third
    while i < last:
        a = i // q.b
        b = i - a * q.b
        n = min(last - i, q.b - b)
        rows.x, rows.e, rows.y, rows.total = at(&q.x, a, b), there(&q.addend, a, b), at(&q.y, a, b), there(&q.total, a, b)
        rows.w, rows.b = there(&q.weight, a, b), there(&q.bias, a, b)
        rows.mean, rows.var, rows.rstd = <double*>there(&q.mean, a, b), <double*>there(&q.var, a, b), <double*>there(&q.rstd, a, b)
        if not q.foldable and n >= 8:
            rows.w = lined_up(rows.w, rows.y, size, h.tile)
            rows.b = lined_up(rows.b, rows.y, size, h.extra)
        if real is double:
            i += fn_norm_rows_double(&rows, n, q.length, not q.foldable, q.centred)
        elif q.brief:
            i += fn_norm_rows_bf16(&rows, n, q.length, not q.foldable, q.centred)
        else:
            i += fn_norm_rows_float(&rows, n, q.length, not q.foldable, q.centred)
        if i < last and i < (a + 1) * q.b:
            one_item(q, i, h, kind)     # what its type can not hold
            i += 1

# ---- columns ---------------------------------------------------------------------------------

cdef inline const char* row_of(Pass* q, const char* base, Py_ssize_t i) noexcept nogil:
    return base + (i // q.s) * q.x.p + (i % q.s) * q.x.s

cdef void walk_columns(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, const double* pivot, double* a, double* b, float* tile) noexcept nogil:
    """Sums of x, or of x - pivot, and of its square over rows [first, last), for each column."""
    cdef const char* base = at(&q.x, it.a, it.b) + it.c * q.x.c
    cdef const float* x
    cdef Py_ssize_t f = first, i, n, width = it.width, apart
    memset(a, 0, width * sizeof(double))
    memset(b, 0, width * sizeof(double))
    while f < last:
        n = min(last - f, q.s - f % q.s)
        if q.x.storage == F32:
            x, apart = <const float*>row_of(q, base, f), q.x.s // <Py_ssize_t>sizeof(float)
        else:
            n = min(n, q.block)
            if q.x.s == width * bytes_of(q.x.storage):
                load(row_of(q, base, f), q.x.storage, n * width, tile)  # rows that follow one another
            else:
                for i in range(n):
                    load(row_of(q, base, f + i), q.x.storage, width, tile + i * width)
            x, apart = tile, width
        if pivot == NULL:
            fn_gather_rows(x, apart, n, width, a, b)
        else:
            fn_gather_rows_about(x, apart, n, width, pivot, a, b)
        f += n

cdef inline void add_neighbours(Py_ssize_t groups, Py_ssize_t k, double* v) noexcept nogil:
    cdef Py_ssize_t g, j
    cdef double total
    for g in range(groups):
        total = v[g * k]
        for j in range(1, k):
            total += v[g * k + j]
        v[g] = total

cdef void columns_sums(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, Scratch* h) noexcept nogil:
    """Moments over rows [first, last) of each group of floats."""
    cdef Py_ssize_t g, j, low = 0, high, k = q.neighbours, groups = groups_of(q, it)
    cdef double* a = h.sums
    cdef double* b = a + it.width
    cdef double* pivot = b + it.width
    cdef Item strip = it
    walk_columns(q, it, first, last, NULL, a, b, <float*>h.tile)
    if k > 1:
        add_neighbours(groups, k, a)
        add_neighbours(groups, k, b)
    for g in range(groups):
        into[g] = (last - first) * k
    if not q.centred:
        for g in range(groups):
            into[groups + g] = into[2 * groups + g] = into[4 * groups + g] = 0.0
            into[3 * groups + g] = b[g]
        return
    if not first_moments(q, groups, a, b, into, h.again):
        return
    # about the means, for all columns from the first to the last that need it
    high = groups
    while not h.again[low]:
        low += 1
    while not h.again[high - 1]:
        high -= 1
    for g in range(low, high):
        for j in range(k):
            pivot[(g - low) * k + j] = pivot_of(into[groups + g], into[3 * groups + g] / into[g], q.fields != 0) if isfinite(into[groups + g]) else 0.0
    strip.c += low * k
    strip.width = (high - low) * k
    walk_columns(q, strip, first, last, pivot, a, b, <float*>h.tile)
    if k > 1:
        add_neighbours(high - low, k, a)
        add_neighbours(high - low, k, b)
    for g in range(low, high):
        if h.again[g] and isfinite(into[groups + g]):
            fn_moments_of_sums(1, a + g - low, b + g - low, pivot[(g - low) * k], into + g, groups, h.again + g)

cdef void double_columns(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, double* pivot, double* total) noexcept nogil:
    """Moments of rows [first, last) for each column of doubles."""
    cdef Py_ssize_t c, f = first, n, width = it.width, apart = q.x.s // <Py_ssize_t>sizeof(double)
    cdef Moments m = moments_at(into, width)
    cdef char* base = at(&q.x, it.a, it.b) + it.c * q.x.c
    memset(into, 0, FIELDS * width * sizeof(double))
    memset(total, 0, width * sizeof(double))
    for c in range(width):
        m.count[c] = last - first
    if q.centred:
        memcpy(pivot, row_of(q, base, first), width * sizeof(double))
        while f < last:
            n = min(last - f, q.s - f % q.s)
            fn_rows_about(<const double*>row_of(q, base, f), apart, n, width, pivot, total)
            f += n
        for c in range(width):
            m.mean[c] = pivot[c] + total[c] / (last - first)
            total[c] = 0.0
        f = first
    while f < last:
        n = min(last - f, q.s - f % q.s)
        fn_squares_about(<const double*>row_of(q, base, f), apart, n, width, m.mean, total, m.m2, m.m2_rest)
        f += n
    if q.centred:
        for c in range(width):
            m.mean_rest[c] = total[c] / (last - first)
            m.m2_rest[c] -= total[c] * m.mean_rest[c]

cdef void masked_columns(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, double* pivot, double* total, real* tile) noexcept nogil:
    """Moments of the chosen of rows [first, last) for each column."""
    cdef Py_ssize_t i, c, turn, width = it.width
    cdef Moments m = moments_at(into, width)
    cdef char* base = at(&q.x, it.a, it.b) + it.c * q.x.c
    cdef char* mask = at(&q.mask, it.a, it.b) + it.c * q.mask.c
    cdef const uint8_t* chosen = NULL
    cdef const real* row
    cdef double d
    memset(into, 0, FIELDS * width * sizeof(double))
    memset(pivot, 0, width * sizeof(double))
    for turn in range(2):
        memset(total, 0, width * sizeof(double))
        for i in range(first, last):
            row = <const real*>row_of(q, base, i)
            if not native(q.x.storage, tile):
                load(<const char*>row, q.x.storage, width, tile)
                row = tile
            chosen = <const uint8_t*>(mask + (i // q.s) * q.mask.p + (i % q.s) * q.mask.s)
            for c in range(width):
                if not chosen[c * q.mask.c]:
                    continue
                if turn == 0:
                    if m.count[c] == 0.0:
                        pivot[c] = row[c]
                    m.count[c] += 1.0
                    total[c] += <double>row[c] - pivot[c]
                else:
                    d = <double>row[c] - m.mean[c]
                    fn_add_two(&m.m2[c], &m.m2_rest[c], d * d)
                    total[c] += d
        for c in range(width):
            if q.centred and m.count[c] > 0.0:
                if turn == 0:
                    m.mean[c] = pivot[c] + total[c] / m.count[c]
                else:
                    m.mean_rest[c] = total[c] / m.count[c]
                    m.m2_rest[c] -= total[c] * m.mean_rest[c]

cdef void columns_moments(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t g, j, field, f = first, k = q.neighbours, width = it.width, groups = groups_of(q, it)
    cdef double* all_columns = into if k == 1 else h.columns
    cdef double* part
    if real is float and q.mask.data == NULL:
        columns_sums(q, it, first, last, into, h)
        return
    while f < last:
        part = all_columns if f == first else h.part
        if q.mask.data != NULL:
            masked_columns(q, it, f, min(f + q.block, last), part, h.sums, h.sums + width, <real*>h.tile)
        else:
            double_columns(q, it, f, min(f + q.block, last), part, h.sums, h.sums + width)
        if f > first:
            fn_merge(all_columns, h.part, width, width)
        f += q.block
    if k > 1:
        for g in range(groups):
            for j in range(1, k):
                fn_merge(all_columns + g * k, all_columns + g * k + j, 1, width)
            for field in range(FIELDS):
                into[field * groups + g] = all_columns[field * width + g * k]

cdef void columns_step(Pass* q, Item it, Scale* s, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t i, n, p, t
    cdef Operand* source = source_of(q)
    cdef char* row
    # written past the caches in long runs, where rows follow one another, or line by line
    cdef bint streamed = q.past and q.y.s == it.width * <Py_ssize_t>sizeof(float)
    cdef bint lines = q.past and (<size_t>(at(&q.y, it.a, it.b) + it.c * q.y.c) | q.y.p | q.y.s | (it.width * sizeof(float))) % 64 == 0
    cdef char* x = at(source, it.a, it.b) + it.c * source.c
    cdef char* y = at(&q.y, it.a, it.b) + it.c * q.y.c
    cdef char* w = at(&q.weight, it.a, it.b) + it.c * q.weight.c
    cdef char* b = at(&q.bias, it.a, it.b) + it.c * q.bias.c
    cdef char* e = at(&q.residual, it.a, it.b) + it.c * q.residual.c
    p = first // q.s
    t = first - p * q.s
    if real is float and (q.straight or streamed or lines) and s.folded and not s.any_wide:
        i = first
        while i < last:
            n = min(last - i, q.s - t)
            row = y + p * q.y.p + t * q.y.s
            if lines:
                fn_step_rows_past(<const float*>(x + p * source.p + t * source.s), source.s // <Py_ssize_t>sizeof(float),
                                  <float*>row, q.y.s // <Py_ssize_t>sizeof(float),
                                  NULL if q.residual.data == NULL else <const float*>(e + p * q.residual.p + t * q.residual.s),
                                  q.residual.s // <Py_ssize_t>sizeof(float), n, it.width, <float*>s.hi, <float*>s.r, <float*>s.shift, AHEAD, q.activation)
                i += n
                p, t = p + 1, 0
                continue
            if streamed:
                n = min(n, max(BLOCK // it.width, 1))
            fn_step_rows(<const float*>(x + p * source.p + t * source.s), source.s // <Py_ssize_t>sizeof(float),
                         <float*>(h.tile if streamed else row), it.width if streamed else q.y.s // <Py_ssize_t>sizeof(float),
                         NULL if q.residual.data == NULL else <const float*>(e + p * q.residual.p + t * q.residual.s),
                         q.residual.s // <Py_ssize_t>sizeof(float), n, it.width, <float*>s.hi, <float*>s.r, <float*>s.shift, q.activation)
            if streamed:
                fn_stream(row, h.tile, n * it.width * sizeof(float))
            i += n
            t += n
            if t == q.s:
                p, t = p + 1, 0
        return
    for i in range(first, last):
        step(q, s, 0, x + p * source.p + t * source.s, y + p * q.y.p + t * q.y.s,
             NULL if q.residual.data == NULL else e + p * q.residual.p + t * q.residual.s,
             NULL if q.weight.data == NULL else w + p * q.weight.p + t * q.weight.s,
             NULL if q.bias.data == NULL else b + p * q.bias.p + t * q.bias.s,
             it.width, h, kind)
        t += 1
        if t == q.s:
            p, t = p + 1, 0

# ---- threads ---------------------------------------------------------------------------------

cdef inline void piece_of(Pass* q, Py_ssize_t piece, Py_ssize_t* first, Py_ssize_t* last) noexcept nogil:
    cdef Py_ssize_t span = q.block * PIECE
    if q.columns:
        span = max(q.block, PIECE_ROWS - PIECE_ROWS % q.block)
    first[0] = piece * span
    last[0] = min(first[0] + span, q.length)

cdef inline Py_ssize_t pieces_of(Pass* q) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, 0, &first, &last)
    return max(1, (q.length + last - 1) // max(last, 1))

cdef inline bint scratch_for(Pass* q, Scratch* h) noexcept nogil:
    cdef Py_ssize_t width = q.width if q.columns else BUNDLE
    cdef Py_ssize_t row = width * sizeof(double), tile = 0, lanes = 0, rows = 0
    # tiles only where something goes through them
    if q.columns:
        tile = q.width * q.block * 8
    else:
        tile = (min(<Py_ssize_t>BLOCK, q.length) + 15) // 8 * 64  # a line more: lined_up
        lanes = width * 2 * LANES * sizeof(double)
        if q.x.storage < F32:
            rows = 4 * BLOCK * sizeof(float)
    h.memory = <char*>malloc((4 * FIELDS + 4) * row + SCALE_BYTES * width + lanes + 3 * tile + rows + 64)
    if h.memory == NULL:
        return False
    h.tile = h.memory + (64 - <size_t>h.memory % 64)
    h.extra = h.tile + tile
    h.third = h.extra + tile
    h.rows = <float*>(h.third + tile)
    h.ready = NULL
    h.lanes = <double*>(<char*>h.rows + rows)
    h.part = <double*>(<char*>h.lanes + lanes)
    h.columns = h.part + FIELDS * width
    h.piece = h.columns + FIELDS * width
    h.whole = h.piece + FIELDS * width
    h.sums = h.whole + FIELDS * width
    h.again = <uint8_t*>(h.sums + 3 * width)
    h.scale = <char*>(h.sums + 4 * width)
    return True

cdef inline void piece_moments(Pass* q, Item it, Py_ssize_t piece, double* into, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, piece, &first, &last)
    if q.columns:
        columns_moments(q, it, first, last, into, h, kind)
    else:
        runs_moments(q, it, first, last, into, h, kind)

cdef inline void piece_step(Pass* q, Item it, Py_ssize_t piece, Scale* s, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, piece, &first, &last)
    if q.columns:
        columns_step(q, it, s, first, last, h, kind)
    else:
        runs_step(q, it, s, first, last, h, kind)

cdef inline Scale table_at(Pass* q, Py_ssize_t b) noexcept nogil:
    """The scales of groups b, b + 1 ... in the table of all."""
    cdef Scale s = scale_at(q.table, q.b)
    s.any_wide, s.folded = s.wide[q.b], s.wide[q.b + 1]
    s.mean += b
    s.rest += b
    s.rstd += b
    s.unit += b
    s.wide += b
    s.hi += b * q.real_size
    s.r += b * q.real_size
    s.shift += b * q.real_size
    return s

cdef void one_item(Pass* q, Py_ssize_t i, Scratch* h, real* kind) noexcept nogil:
    """From its moments to its output."""
    cdef Item it = item_at(q, i)
    cdef Scale s
    cdef Py_ssize_t piece, groups
    if q.table != NULL:
        s = table_at(q, it.b)
        piece_step(q, it, 0, &s, h, kind)
        return
    s = scale_at(h.scale, it.width)
    if not q.given:
        groups = groups_of(q, it)
        piece_moments(q, it, 0, h.whole, h, kind)
        for piece in range(1, q.pieces):
            piece_moments(q, it, piece, h.piece, h, kind)
            fn_merge(h.whole, h.piece, groups, groups)
    finish(q, it, h.whole, &s, kind)
    if q.y.data != NULL:
        for piece in range(q.pieces):
            piece_step(q, it, piece, &s, h, kind)

cdef inline bint gathers(Pass* q, real* kind) noexcept nogil:
    """Whether planes of doubles are so short that each group is copied together first.

    They are read three times, and where they lie a power of two apart they fall into a few sets of the
    caches, which lose them in between.
    """
    return (real is double and not q.given and not q.columns and q.p > 1 and q.pieces == 1 and q.y.data != NULL
            and q.x.storage == F64 and q.x.s == sizeof(double) and q.x.p != q.s * <Py_ssize_t>sizeof(double)
            and q.s * <Py_ssize_t>sizeof(double) < NEARBY and q.mask.data == NULL and q.total.data == NULL)

cdef int gathered_items(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    cdef Pass near = q[0]
    cdef Py_ssize_t i, k, p, run = q.s * sizeof(double), size = q.p * run
    cdef char* memory = <char*>malloc(q.width * size + 64)
    cdef char* together = memory + (64 - <size_t>memory % 64)
    cdef char* x
    cdef Item it
    if memory == NULL:
        return 1
    near.x.a, near.x.b, near.x.p = 0, size, run
    # from half of the last cache on y would push out what is still to be read: 820 to 540 us for 16 MB
    near.past = q.a * q.b * size >= stream_above // 2
    for i in range(first, last):
        it = item_at(q, i)
        for p in range(q.p):
            for k in range(it.width):
                x = at(&q.x, it.a, it.b + k) + p * q.x.p
                fn_fetch(x + q.x.p, run)
                memcpy(together + k * size + p * run, x, run)
        near.x.data = together - it.b * size
        one_item(&near, i, h, kind)
    free(memory)
    return 0

cdef int whole_items(Pass* q, Py_ssize_t first, Py_ssize_t last, real* kind) noexcept nogil:
    """Items [first, last), each from its moments to its output before the next."""
    cdef Scratch h
    cdef Py_ssize_t i
    cdef int failed = 0
    if not scratch_for(q, &h):
        return 1
    if plain_rows(q):
        norm_rows(q, first, last, &h, kind)
    elif gathers(q, kind):
        failed = gathered_items(q, first, last, &h, kind)
    elif real is float and flows(q):
        flow(q, first, last, &h, kind)
    else:
        for i in range(first, last):
            one_item(q, i, &h, kind)
    fn_stream_fence()
    free(h.memory)
    return failed

cdef int some_moments(Pass* q, Py_ssize_t first, Py_ssize_t last, double* parts, real* kind) noexcept nogil:
    """Pieces [first, last) of all items' pieces: their moments into `parts`."""
    cdef Scratch h
    cdef Py_ssize_t i
    if not scratch_for(q, &h):
        return 1
    for i in range(first, last):
        piece_moments(q, item_at(q, i // q.pieces), i % q.pieces, parts + i * FIELDS * q.width, &h, kind)
    free(h.memory)
    return 0

cdef int some_steps(Pass* q, Py_ssize_t first, Py_ssize_t last, Scale* scales, real* kind) noexcept nogil:
    cdef Scratch h
    cdef Py_ssize_t i
    if not scratch_for(q, &h):
        return 1
    for i in range(first, last):
        piece_step(q, item_at(q, i // q.pieces), i % q.pieces, &scales[i // q.pieces], &h, kind)
    fn_stream_fence()
    free(h.memory)
    return 0

cdef int shared_items(Pass* q, real* kind) noexcept nogil:
    """Few large groups: all threads take pieces of each; the merge is in the pieces' order."""
    cdef Py_ssize_t i, piece, groups, row = q.width * sizeof(double), total = q.items * q.pieces
    cdef Py_ssize_t turn, turns = min(total, 8 * q.threads)
    cdef int failed = 0
    cdef Item it
    cdef double* parts = <double*>malloc(total * FIELDS * row)
    cdef double* whole
    cdef char* scale_memory = <char*>malloc(q.items * SCALE_BYTES * q.width)
    cdef Scale* scales = <Scale*>malloc(q.items * sizeof(Scale))
    if parts == NULL or scale_memory == NULL or scales == NULL:
        free(parts)
        free(scale_memory)
        free(scales)
        return 1
    if not q.given:
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            failed |= some_moments(q, total * turn // turns, total * (turn + 1) // turns, parts, kind)
    if not failed:
        for i in range(q.items):
            it = item_at(q, i)
            whole = parts + i * q.pieces * FIELDS * q.width
            groups = groups_of(q, it)
            if not q.given:
                for piece in range(1, q.pieces):
                    fn_merge(whole, whole + piece * FIELDS * q.width, groups, groups)
            scales[i] = scale_at(scale_memory + i * SCALE_BYTES * q.width, it.width)
            finish(q, it, whole, &scales[i], kind)
    if not failed and q.y.data != NULL:
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            # the last read are the first written: what is still in cache is read from there
            failed |= some_steps(q, total - total * (turn + 1) // turns, total - total * turn // turns, scales, kind)
    free(parts)
    free(scale_memory)
    free(scales)
    return failed

cdef int tabulate(Pass* q, real* kind) noexcept nogil:
    """Scales that many planes share, once for all: one costs as much as normalising 50 numbers."""
    cdef Scale s
    cdef Item it
    q.real_size = sizeof(real)
    q.table = <char*>malloc(q.b * SCALE_BYTES + 8)
    if q.table == NULL:
        return 1
    s = scale_at(q.table, q.b)
    it.a = it.b = it.c = 0
    it.width = q.b
    finish(q, it, NULL, &s, kind)
    s.wide[q.b], s.wide[q.b + 1] = s.any_wide, s.folded
    return 0

cdef int run(Pass* q, real* kind) noexcept nogil:
    cdef int failed
    q.table = NULL
    if q.given and not q.columns and q.a > 1 and q.mean.a == 0 and q.var.a == 0 and q.pieces == 1:
        if tabulate(q, kind):
            return 1
    failed = run_items(q, kind)
    free(q.table)
    return failed

cdef int run_items(Pass* q, real* kind) noexcept nogil:
    cdef Py_ssize_t turn, turns
    cdef int failed = 0
    if q.threads == 1:
        return whole_items(q, 0, q.items, kind)
    if q.pieces > 1 and q.items < 4 * q.threads and q.items % q.threads != 0:
        return shared_items(q, kind)
    if q.near:
        turns = min(q.items, q.threads)
        for turn in prange(turns, num_threads=q.threads, schedule="static"):
            failed |= whole_items(q, q.items * turn // turns, q.items * (turn + 1) // turns, kind)
        return failed
    turns = min(q.items, 8 * q.threads)
    for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
        failed |= whole_items(q, q.items * turn // turns, q.items * (turn + 1) // turns, kind)
    return failed

# ---- the door --------------------------------------------------------------------------------

cdef inline Storage storage_of(int kind) noexcept:
    """Of what has one or two bytes; a mask is never loaded."""
    if kind == cnp.NPY_UINT8 or kind == cnp.NPY_BOOL:
        return U8
    if kind == cnp.NPY_INT8:
        return I8
    if kind == cnp.NPY_UINT16:
        return U16
    if kind == cnp.NPY_INT16:
        return I16
    return F16 if kind == cnp.NPY_FLOAT16 else BF16

cdef int operand(Operand* o, object array, tuple strides) except -1:
    cdef Py_ssize_t size
    o.data = NULL
    o.a = o.b = o.p = o.s = o.c = 0
    o.storage = F64
    if array is None:
        return 0
    o.data = <char*>cnp.PyArray_DATA(<cnp.ndarray>array)
    size = cnp.PyArray_ITEMSIZE(<cnp.ndarray>array)
    o.storage = F64 if size == 8 else F32 if size == 4 else storage_of(cnp.PyArray_TYPE(<cnp.ndarray>array))
    o.a, o.b, o.p, o.s, o.c = strides
    o.a *= size
    o.b *= size
    o.p *= size
    o.s *= size
    o.c *= size
    return 0

cdef int carry_out(Pass* q, int threads) noexcept:
    """Derive what follows from the dimensions, and run."""
    cdef float as_float = 0
    cdef double as_double = 0
    cdef int failed
    cdef Py_ssize_t groups, along, size = bytes_of(q.x.storage)
    cdef Py_ssize_t total = q.a * q.b * q.p * q.s * q.c * size
    q.length = q.p * q.s
    if q.columns:
        groups = q.c // q.neighbours
        q.chunks = 1 if q.c <= ABREAST else max(1, min(groups, (q.c + COLUMNS - 1) // COLUMNS))
        q.width = (groups + q.chunks - 1) // q.chunks * q.neighbours
        q.chunks = (q.c + q.width - 1) // q.width
        q.items = q.a * q.b * q.chunks
        q.block = min(max(SQUARE // q.width, 16), PIECE_ROWS)
        q.foldable = q.weight.p == q.weight.s == q.bias.p == q.bias.s == 0
    else:
        # one group after the other, or several that lie side by side
        q.width = BESIDE // max(q.length, 1)
        if q.width == 1 and q.length <= BLOCK:
            q.width = 2
        if q.p > 1 and q.s * size < NEARBY:
            q.width = max(q.width, PIECE * BLOCK // max(q.length, 1))
        q.width = max(1, min(q.width, q.b, <Py_ssize_t>BUNDLE))
        q.chunks = (q.b + q.width - 1) // q.width
        q.items = q.a * q.chunks
        q.block = BLOCK
        q.foldable = q.weight.s == q.bias.s == 0
    q.foldable = q.foldable and not q.activation_first
    q.pieces = pieces_of(q)
    q.threads = 1 if total < SERIAL or not FN_OPENMP else max(1, threads)
    q.near = total < q.threads * NEAR
    along = q.width if q.columns else q.s
    if q.columns and q.y.s == q.width * size:
        along *= q.s            # rows that follow one another
    # x and y go through the cache together.  From five eighths of it on y goes past it: rows of 25 MB
    # take 0.75 of the time, planes that lie apart 0.7, columns read in two sweeps 0.7.  Of a sum and its
    # norm four arrays go through the caches.
    q.stream = (total if q.total.data == NULL else 4 * total) > stream_above // 8 * 5 and pays_to_stream(along, size)
    # a weight along the run, or one for all of it, and a bias only beside a weight of its kind
    q.brief = (q.x.storage == q.y.storage == BF16 and not q.columns and not q.stream and q.activation == IDENTITY and q.user == NULL
               and q.residual.data == NULL and q.mask.data == NULL and q.total.data == NULL and q.y.data != NULL
               and (q.p == 1 or q.x.p == q.s * size)
               and (q.foldable or (q.weight.s != 0 and (q.bias.data == NULL or q.bias.s != 0))))
    q.past = (q.user == NULL and q.x.storage == q.y.storage and q.x.storage >= F32 and q.mask.data == NULL
              and (q.residual.data == NULL or q.residual.storage == q.x.storage)
              and (q.total.data == NULL or q.addend.storage == q.x.storage))
    q.straight = q.past and not q.stream
    q.past = q.past and q.stream and q.x.storage == F32 and q.foldable
    if plain_rows(q):
        q.width, q.chunks, q.items = 1, q.b, q.a * q.b
    if total < BRIEF:
        return run(q, &as_double) if q.x.storage == F64 else run(q, &as_float)
    with nogil:
        failed = run(q, &as_double) if q.x.storage == F64 else run(q, &as_float)
    return failed

def has_threads():
    """Whether these kernels were built with OpenMP."""
    return bool(FN_OPENMP)

def address_of(cnp.ndarray array):
    """Where the first element of an array lies: `array.ctypes.data` in a fiftieth of the time."""
    return <size_t>cnp.PyArray_DATA(array)

def run_pass(layout, x, y, mean, var, rstd, *, weight=None, bias=None, mask=None, residual=None,
              addend=None, total=None, bint centred=True, bint given=False, Scaling scaling=RSTD,
              double eps=0.0, Activation activation=IDENTITY, Py_ssize_t user=0, bint activation_first=False, int threads=1,
              bytes key=None, tuple statistics=()):
    """One pass of `layout` over x into y (None: statistics alone).

    Fills mean, var and rstd, or reads the first two where `given`.  With a key, the pass is kept as a
    plan (plans.pxi); `statistics` is then the shape in which mean and rstd are returned.
    """
    cdef Pass q
    cdef Plan plan
    cdef int failed
    cdef dict strides = layout.strides
    q.a, q.b, q.p, q.s, q.c = layout.dims
    q.neighbours = layout.neighbours
    q.columns = layout.columns
    q.centred, q.given, q.scaling, q.eps, q.fields = centred, given, scaling, eps, 0
    q.activation, q.user, q.activation_first = activation, <Loop>user, activation_first
    operand(&q.x, x, strides["x"])
    operand(&q.y, y, strides.get("y"))
    operand(&q.mean, mean, strides["stats"])
    operand(&q.var, var, strides["stats"])
    operand(&q.rstd, rstd, strides["stats"])
    operand(&q.weight, weight, strides.get("weight"))
    operand(&q.bias, bias, strides.get("bias"))
    operand(&q.mask, mask, strides.get("mask"))
    operand(&q.residual, residual, strides.get("residual"))
    operand(&q.addend, addend, strides.get("addend"))
    operand(&q.total, total, strides.get("total"))

    failed = carry_out(&q, threads)
    if failed:
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    if key is not None:
        plan = Plan()
        plan.forward = q
        keep(plan, key, statistics)

include "backward.pxi"
include "plans.pxi"
include "moments.pxi"
