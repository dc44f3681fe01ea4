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
from libc.math cimport INFINITY, NAN, fabs, fma, frexp, isfinite, ldexp, sqrt
from libc.stdint cimport uint8_t, uint16_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
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
    int FN_OPENMP
    double fn_mac64(double, double, double) noexcept
    double fn_sum_float(const float*, Py_ssize_t) noexcept
    double fn_squares_float(const float*, Py_ssize_t, double) noexcept
    double fn_deviations_double(const double*, Py_ssize_t, double) noexcept
    float fn_from_f16(uint16_t) noexcept
    float fn_from_bf16(uint16_t) noexcept
    void fn_load_f16(const uint16_t*, Py_ssize_t, float*) noexcept
    void fn_load_bf16(const uint16_t*, Py_ssize_t, float*) noexcept
    void fn_store_f16(const float*, Py_ssize_t, uint16_t*) noexcept
    void fn_store_bf16(const float*, Py_ssize_t, uint16_t*) noexcept
    void fn_stream(char*, const char*, size_t) noexcept
    void fn_stream_fence() noexcept
    void fn_step_run_float(const float*, float*, Py_ssize_t, float, float, float, const float*, bint, const float*, bint) noexcept
    void fn_step_run_double(const double*, double*, Py_ssize_t, double, double, double, const double*, bint, const double*, bint) noexcept
    void fn_step_row_float(const float*, float*, Py_ssize_t, const float*, const float*, const float*, const float*, bint, const float*, bint) noexcept
    void fn_step_row_double(const double*, double*, Py_ssize_t, const double*, const double*, const double*, const double*, bint, const double*, bint) noexcept
    void fn_affine_float(float*, Py_ssize_t, const float*, bint, const float*, bint) noexcept
    void fn_affine_double(double*, Py_ssize_t, const double*, bint, const double*, bint) noexcept
    void fn_add_float(float*, const float*, Py_ssize_t) noexcept
    void fn_add_double(double*, const double*, Py_ssize_t) noexcept
    void fn_relu_float(float*, Py_ssize_t) noexcept
    void fn_silu_float(float*, Py_ssize_t) noexcept
    void fn_gelu_float(float*, Py_ssize_t) noexcept
    void fn_gelu_tanh_float(float*, Py_ssize_t) noexcept
    void fn_tanh_float(float*, Py_ssize_t) noexcept
    void fn_relu_double(double*, Py_ssize_t) noexcept
    void fn_silu_double(double*, Py_ssize_t) noexcept
    void fn_gelu_double(double*, Py_ssize_t) noexcept
    void fn_gelu_tanh_double(double*, Py_ssize_t) noexcept
    void fn_tanh_double(double*, Py_ssize_t) noexcept

ctypedef fused real:            # what is computed in; float16 and bfloat16 compute in float
    float
    double

cdef enum:
    LANES = 32                  # partial sums side by side: eight AVX2 registers of doubles
    CHAIN = 256                 # doubles before the lanes are added up: short chains round less
    BLOCK = 4096                # elements of a run whose moments are taken at once: fits L1
    PIECE = 16                  # blocks that one thread takes when a group is shared out
    ABREAST = 512               # columns up to this number are taken as whole rows, which are fetched faster
    COLUMNS = 256               # of more, so many are taken side by side, at most (or one group of neighbours)
    SQUARE = 16384              # elements of a block of columns: fits L2
    PIECE_ROWS = 1024           # rows that one thread takes: partial sums cost at most 1 % of x
    SERIAL = 1 << 17            # bytes of x below which waking a second thread costs more

cdef enum Storage:
    F16
    BF16
    F32
    F64

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

cdef struct Pass:
    Py_ssize_t a, b, p, s, c, neighbours
    bint columns, centred, given, activation_first
    bint stream                 # y is written past the caches
    char* table                 # scales of each b, where given statistics do not differ along a
    Scaling scaling
    Activation activation
    double eps
    Operand x, y, mask, weight, bias, residual, addend, total, mean, var, rstd
    # derived
    Py_ssize_t length           # reduced elements of a group (runs) or rows (columns)
    Py_ssize_t width            # columns of an item, 1 for runs
    Py_ssize_t chunks           # items side by side along c
    Py_ssize_t items            # a * b * chunks
    Py_ssize_t block, pieces    # length of a block; pieces of an item
    int threads

# ---- storage ---------------------------------------------------------------------------------

cdef inline Py_ssize_t bytes_of(Storage storage) noexcept nogil:
    return 2 if storage <= BF16 else 4 if storage == F32 else 8

cdef inline bint native(Storage storage, real* kind) noexcept nogil:
    if real is float:
        return storage == F32
    else:
        return storage == F64

cdef inline void load(const char* x, Storage storage, Py_ssize_t n, real* t) noexcept nogil:
    cdef Py_ssize_t i
    if storage == F32:
        for i in range(n):
            t[i] = (<const float*>x)[i]
    elif storage == F64:
        for i in range(n):
            t[i] = <real>(<const double*>x)[i]
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

# ---- moments and their merge -----------------------------------------------------------------

# Moments of `width` neighbouring columns: count, mean, sum of squared deviations, the last two as
# unevaluated sums of two doubles.  A mean needs more than 53 bits: at mean/std = 2^20 they leave
# an error of 2^-33 std, 1,000 units of a float32 output of 2^-20.
cdef struct Moments:
    double* count
    double* mean
    double* mean_rest
    double* m2
    double* m2_rest

cdef enum:
    FIELDS = 5

cdef inline Moments moments_at(double* memory, Py_ssize_t width) noexcept nogil:
    cdef Moments m
    m.count, m.mean, m.mean_rest = memory, memory + width, memory + 2 * width
    m.m2, m.m2_rest = memory + 3 * width, memory + 4 * width
    return m

cdef inline Moments moments_from(Moments m, Py_ssize_t i) noexcept nogil:
    m.count += i
    m.mean += i
    m.mean_rest += i
    m.m2 += i
    m.m2_rest += i
    return m

cdef inline void add_two(double* total, double* rest, double v) noexcept nogil:
    """total + rest += v; `rest` takes what rounding loses (Knuth's two-sum)."""
    cdef double next_total = total[0] + v
    cdef double back = next_total - total[0]
    rest[0] += (total[0] - (next_total - back)) + (v - back)
    total[0] = next_total

cdef inline void merge(Moments into, Moments other, Py_ssize_t width) noexcept nogil:
    """Chan, Golub and LeVeque (1979), with each sum kept as two numbers.

    Empty parts change nothing: into an empty one the factor is 1, from an empty one it is 0.
    """
    cdef Py_ssize_t i
    cdef double n, f, delta, extra
    for i in range(width):
        n = into.count[i] + other.count[i]
        f = other.count[i] / n if n > 0 else 0.0
        delta = other.mean[i] - into.mean[i]
        extra = other.mean_rest[i] - into.mean_rest[i]
        add_two(&into.mean[i], &into.mean_rest[i], delta * f)
        into.mean_rest[i] += extra * f
        delta += extra
        add_two(&into.m2[i], &into.m2_rest[i], other.m2[i])
        add_two(&into.m2[i], &into.m2_rest[i], delta * delta * (into.count[i] * f))
        into.m2_rest[i] += other.m2_rest[i]
        into.count[i] = n

cdef inline double add_lanes(double* lanes) noexcept nogil:
    cdef Py_ssize_t i, half = LANES // 2
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half = half // 2
    return lanes[0]

cdef inline void deviations_about(const double* x, Py_ssize_t n, double mean, double* first, double* second, double* second_rest) noexcept nogil:
    """Sum of x - mean, and sum of (x - mean)^2 as two numbers.

    A sum of doubles has no bits to spare: 1,000 equal squares, as black and white pixels give,
    would all round the same way. Lanes are added up in short chains, and the chains exactly.
    """
    cdef double[LANES] lanes, total, rest, deviation
    cdef Py_ssize_t i = 0, j, end, half = LANES // 2
    cdef double d
    memset(total, 0, sizeof(total))
    memset(rest, 0, sizeof(rest))
    memset(deviation, 0, sizeof(deviation))
    while i < n:
        end = min(i + CHAIN, n)
        memset(lanes, 0, sizeof(lanes))
        while i + LANES <= end:
            for j in range(LANES):
                d = x[i + j] - mean
                lanes[j] = fn_mac64(d, d, lanes[j])
                deviation[j] += d
            i += LANES
        for j in range(end - i):
            d = x[i + j] - mean
            lanes[j] = fn_mac64(d, d, lanes[j])
            deviation[j] += d
        i = end
        for j in range(LANES):
            add_two(&total[j], &rest[j], lanes[j])
    while half > 0:
        for j in range(half):
            add_two(&total[j], &rest[j], total[j + half])
            rest[j] += rest[j + half]
        half = half // 2
    first[0] = add_lanes(deviation)
    second[0] = total[0]
    second_rest[0] = rest[0]

cdef inline void moments_of(const real* x, Py_ssize_t n, bint centred, Moments m) noexcept nogil:
    """Moments of one block, in two passes over data that the first brought into L1."""
    cdef double total, first = 0.0
    m.count[0] = n
    m.mean[0] = m.mean_rest[0] = m.m2[0] = m.m2_rest[0] = 0.0
    if n == 0:
        return
    if real is float:
        if centred:
            # a sum of floats is exact in double, or nearly: fma gives what the quotient lost
            total = fn_sum_float(x, n)
            m.mean[0] = total / n
            m.mean_rest[0] = fma(-<double>n, m.mean[0], total) / n
        # squares of floats are exact in double, their sum has 29 bits to spare
        m.m2[0] = fn_squares_float(x, n, m.mean[0])
    else:
        if centred:
            # about the first element, so that a constant block has exactly its mean
            m.mean[0] = x[0] + fn_deviations_double(x, n, x[0]) / n
        deviations_about(x, n, m.mean[0], &first, m.m2, m.m2_rest)
        if centred:
            m.mean_rest[0] = first / n
            m.m2_rest[0] -= first * m.mean_rest[0]

# ---- from moments to a scale -----------------------------------------------------------------

# What the step needs, for each column.  `hi`, `r`, `shift` are of the computing type: y = (x -
# hi) * r + shift.  Where float cannot hold them (data at 1e38 or 1e-42) the column is `wide` and
# runs in double, on x times the power of two `unit`.
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

cdef enum:
    SCALE_BYTES = 7 * 8 + 8     # bytes of a Scale for each column

cdef inline Scale scale_at(char* memory, Py_ssize_t width) noexcept nogil:
    cdef Scale s
    s.mean = <double*>memory
    s.rest, s.rstd, s.unit = s.mean + width, s.mean + 2 * width, s.mean + 3 * width
    s.hi = <char*>(s.mean + 4 * width)
    s.r, s.shift = s.hi + 8 * width, s.hi + 16 * width
    s.wide = <uint8_t*>(s.hi + 24 * width)
    s.any_wide = False
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
            add_two(&total, &rest, v * v if power == 2 else v)
    return total + rest

cdef inline Operand* source_of(Pass* q) noexcept nogil:
    return &q.total if q.total.data != NULL else &q.x

cdef inline char* at(Operand* o, Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return o.data + a * o.a + b * o.b

cdef struct Item:               # one group, or the groups of up to COLUMNS neighbouring columns
    Py_ssize_t a, b, c, width

cdef inline Item item_at(Pass* q, Py_ssize_t index) noexcept nogil:
    cdef Item it
    cdef Py_ssize_t outer = index
    it.a = it.c = 0
    # a division costs as much as normalising a dozen numbers: only where there is something to divide
    if q.chunks > 1:
        outer = index // q.chunks
        it.c = (index - outer * q.chunks) * q.width
    it.b = outer
    if q.a > 1:
        it.a = outer // q.b
        it.b = outer - it.a * q.b
    it.width = min(q.width, q.c - it.c)
    return it

cdef inline double inverse_root(double v, double rest) noexcept nogil:
    """1 / sqrt(v + rest), to half a unit: sqrt and / round twice, one Newton step mends it."""
    cdef double r, product, error
    if not 0.0 < v < INFINITY:
        return 1.0 / sqrt(v)
    r = 1.0 / sqrt(v)
    product = v * r
    error = fma(-product, r, 1.0) - fma(v, r, -product) * r - rest * r * r
    return r + 0.5 * r * error

cdef void finish(Pass* q, Item it, Moments m, Scale* s, real* kind) noexcept nogil:
    """From the moments of an item's columns to what the step needs; statistics written out."""
    cdef Py_ssize_t g, j, k = q.neighbours, groups = it.width // k
    cdef double count, mean, rest, m2, m2_rest, var, var_rest, v, unit, rstd, lo
    cdef double* mean_out
    cdef double* var_out
    cdef double* rstd_out
    cdef char* mask
    cdef Operand* source = source_of(q)
    cdef bint wide
    s.any_wide = False
    for g in range(groups):
        mean_out = <double*>(at(&q.mean, it.a, it.b) + (it.c // k + g) * q.mean.c)
        var_out = <double*>(at(&q.var, it.a, it.b) + (it.c // k + g) * q.var.c)
        rstd_out = <double*>(at(&q.rstd, it.a, it.b) + (it.c // k + g) * q.rstd.c)
        unit = 1.0
        rest = 0.0
        if q.given:
            mean, var = mean_out[0], var_out[0]
            rstd = var if q.scaling == FACTOR else inverse_root(var + q.eps, 0.0)
        else:
            for j in range(1, k):
                merge(moments_from(m, g * k), moments_from(m, g * k + j), 1)
            count = m.count[g * k]
            mean, rest = m.mean[g * k], m.mean_rest[g * k]
            m2, m2_rest = m.m2[g * k], m.m2_rest[g * k]
            if count == 0.0:
                mean = m2 = NAN
            if real is double:
                v = m2 / count + q.eps if q.scaling == RSTD else m2
                if not 1e-270 < v < 1e270:
                    mask = NULL if q.mask.data == NULL else at(&q.mask, it.a, it.b) + (it.c + g * k) * q.mask.c
                    if rescue(q, at(source, it.a, it.b) + (it.c + g * k) * source.c, mask, &mean, &rest, &m2, &unit):
                        m2_rest = 0.0
            var = m2 / count
            if q.scaling == RSTD:
                v = var + q.eps * unit * unit
                var_rest = 0.0
                if real is double:
                    var_rest = (fma(-var, count, m2) + m2_rest) / count + ((var - v) + q.eps * unit * unit)
                # a constant group with eps = 0 is all bias: its scale is 0, not infinity
                rstd = inverse_root(v, var_rest) if v != 0.0 else 0.0
            else:
                rstd = inverse_root(m2, m2_rest) if m2 != 0.0 else 0.0
                if sqrt(m2) < q.eps * unit:
                    rstd = 1.0 / (q.eps * unit)
            if q.mean.data != NULL:
                mean_out[0] = mean / unit
                var_out[0] = var / unit / unit
                rstd_out[0] = rstd * unit
        if real is float:
            # beyond 2^100 either way, x - hi or r could leave float's range or its precision
            wide = rstd != 0.0 and not (7.9e-31 < fabs(rstd) < 1.3e30 and fabs(mean) < 1.3e30)
        else:
            wide = unit != 1.0
        s.any_wide |= wide
        lo = (mean - <real>mean) + rest
        for j in range(g * k, g * k + k):
            s.mean[j], s.rest[j], s.rstd[j], s.unit[j] = mean, rest, rstd, unit
            s.wide[j] = wide
            (<real*>s.hi)[j] = <real>mean
            (<real*>s.r)[j] = <real>rstd
            (<real*>s.shift)[j] = <real>(-lo * rstd)

# ---- the step --------------------------------------------------------------------------------

cdef inline void activate(real* t, Py_ssize_t n, Activation activation) noexcept nogil:
    if real is float:
        if activation == RELU:
            fn_relu_float(t, n)
        elif activation == SILU:
            fn_silu_float(t, n)
        elif activation == GELU:
            fn_gelu_float(t, n)
        elif activation == GELU_TANH:
            fn_gelu_tanh_float(t, n)
        elif activation == TANH:
            fn_tanh_float(t, n)
    else:
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

cdef inline void step(Pass* q, Scale* s, const char* x, char* y, const char* residual,
                      const char* weight, const char* bias, Py_ssize_t n, real* tile, real* extra) noexcept nogil:
    """One run, or one row of columns, of at most BLOCK elements, from x to y.

    Straight from memory to memory where nothing but the step is asked for; through a tile in L1
    where a format is converted, a residual added or an activation applied.
    """
    cdef real one = 1.0, zero = 0.0
    cdef Storage storage = source_of(q).storage
    cdef bint plain = q.activation == IDENTITY and residual == NULL and not s.any_wide and not q.stream
    cdef const real* source = <const real*>x
    cdef real* target = <real*>y if plain and native(q.y.storage, tile) else tile
    cdef const real* w = <const real*>weight if weight != NULL else &one
    cdef const real* b = <const real*>bias if bias != NULL else &zero
    cdef bint wv = weight != NULL and (q.weight.c if q.columns else q.weight.s) != 0
    cdef bint bv = bias != NULL and (q.bias.c if q.columns else q.bias.s) != 0
    cdef const real* w_step = &one if q.activation_first else w
    cdef const real* b_step = &zero if q.activation_first else b
    cdef bint wv_step = wv and not q.activation_first, bv_step = bv and not q.activation_first
    cdef Py_ssize_t i, j
    cdef double v
    if not native(storage, tile):
        load(x, storage, n, extra)
        source = extra
    if q.columns:
        if real is float:
            fn_step_row_float(source, target, n, <float*>s.hi, <float*>s.r, <float*>s.shift, w_step, wv_step, b_step, bv_step)
        else:
            fn_step_row_double(source, target, n, <double*>s.hi, <double*>s.r, <double*>s.shift, w_step, wv_step, b_step, bv_step)
    elif not s.any_wide:
        if real is float:
            fn_step_run_float(source, target, n, (<float*>s.hi)[0], (<float*>s.r)[0], (<float*>s.shift)[0], w_step, wv_step, b_step, bv_step)
        else:
            fn_step_run_double(source, target, n, (<double*>s.hi)[0], (<double*>s.r)[0], (<double*>s.shift)[0], w_step, wv_step, b_step, bv_step)
    if s.any_wide:
        for i in range(n):
            j = i if q.columns else 0
            if s.wide[j]:
                v = ((<double>source[i] * s.unit[j] - s.mean[j]) - s.rest[j]) * s.rstd[j]
                target[i] = <real>(v * w_step[i if wv_step else 0] + b_step[i if bv_step else 0])
    if target == <real*>y:
        return
    if residual != NULL:
        if native(q.residual.storage, tile):
            if real is float:
                fn_add_float(tile, <const float*>residual, n)
            else:
                fn_add_double(tile, <const double*>residual, n)
        else:
            load(residual, q.residual.storage, n, extra)
            if real is float:
                fn_add_float(tile, extra, n)
            else:
                fn_add_double(tile, extra, n)
    activate(tile, n, q.activation)
    if q.activation_first:
        if real is float:
            fn_affine_float(tile, n, w, wv, b, bv)
        else:
            fn_affine_double(tile, n, w, wv, b, bv)
    deliver(tile, n, y, q.y.storage, q.stream, <char*>extra)

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

cdef const real* fetch(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, real* tile, real* extra, Py_ssize_t* count) noexcept nogil:
    """Elements [first, last) of a group side by side, as numbers: in place where they lie so."""
    cdef Py_ssize_t i, k = 0, f = first, size
    cdef Run r = run_at(q, first, last)
    cdef char* x = at(&q.x, it.a, it.b)
    cdef const uint8_t* mask
    cdef const real* source
    size = bytes_of(q.x.storage)
    if native(q.x.storage, tile) and q.mask.data == NULL and q.total.data == NULL:
        if r.n == last - first or q.x.p == q.s * size:
            count[0] = last - first
            return <const real*>(x + r.p * q.x.p + r.s * size)
    while f < last:
        r = run_at(q, f, last)
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

cdef void runs_moments(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, Moments into, real* tile, real* extra) noexcept nogil:
    cdef Py_ssize_t f = first, count = 0
    cdef double[FIELDS] memory
    cdef Moments part = moments_at(memory, 1)
    cdef const real* x = fetch(q, it, f, min(f + BLOCK, last), tile, extra, &count)
    moments_of(x, count, q.centred, into)
    f += BLOCK
    while f < last:
        x = fetch(q, it, f, min(f + BLOCK, last), tile, extra, &count)
        moments_of(x, count, q.centred, part)
        merge(into, part, 1)
        f += BLOCK

cdef void runs_step(Pass* q, Item it, Scale* s, Py_ssize_t first, Py_ssize_t last, real* tile, real* extra) noexcept nogil:
    cdef Py_ssize_t f = first, n
    cdef Operand* source = source_of(q)
    cdef char* x = at(source, it.a, it.b)
    cdef char* y = at(&q.y, it.a, it.b)
    cdef char* w = at(&q.weight, it.a, it.b)
    cdef char* b = at(&q.bias, it.a, it.b)
    cdef char* e = at(&q.residual, it.a, it.b)
    cdef Run r
    while f < last:
        r = run_at(q, f, last)
        n = min(r.n, BLOCK)
        step(q, s, x + r.p * source.p + r.s * source.s, y + r.p * q.y.p + r.s * q.y.s,
             NULL if q.residual.data == NULL else e + r.p * q.residual.p + r.s * q.residual.s,
             NULL if q.weight.data == NULL else w + r.p * q.weight.p + r.s * q.weight.s,
             NULL if q.bias.data == NULL else b + r.p * q.bias.p + r.s * q.bias.s,
             n, tile, extra)
        f += n

# ---- columns ---------------------------------------------------------------------------------

cdef void columns_block(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, Moments m, double* pivot, double* total, real* tile) noexcept nogil:
    """Moments of rows [first, last) for each column.  `pivot` and `total` are scratch."""
    cdef Py_ssize_t i, c, n = last - first, width = it.width
    cdef Operand* x = &q.x
    cdef char* base = at(x, it.a, it.b) + it.c * x.c
    cdef char* mask = at(&q.mask, it.a, it.b) + it.c * q.mask.c
    cdef const uint8_t* chosen = NULL
    cdef const real* row
    cdef const real* row1
    cdef const real* row2
    cdef const real* row3
    cdef bint ready = native(x.storage, tile)
    cdef Py_ssize_t i4 = n - n % 4
    cdef double d, d1, d2, d3
    if not ready:
        for i in range(n):
            load(base + ((first + i) // q.s) * x.p + ((first + i) % q.s) * x.s, x.storage, width, tile + i * width)

    memset(m.count, 0, FIELDS * width * sizeof(double))
    memset(total, 0, width * sizeof(double))
    memset(pivot, 0, width * sizeof(double))
    if q.mask.data != NULL:
        for i in range(n):
            row = row_at(q, base, first, i, width, tile, ready)
            chosen = <const uint8_t*>(mask + ((first + i) // q.s) * q.mask.p + ((first + i) % q.s) * q.mask.s)
            for c in range(width):
                if chosen[c * q.mask.c]:
                    if m.count[c] == 0.0 and real is double:
                        pivot[c] = row[c]
                    m.count[c] += 1.0
                    total[c] += row[c] - pivot[c]
    else:
        for c in range(width):
            m.count[c] = n
        if q.centred:
            if real is double:
                row = row_at(q, base, first, 0, width, tile, ready)
                for c in range(width):
                    pivot[c] = row[c]
            for i in range(0, i4, 4):
                row = row_at(q, base, first, i, width, tile, ready)
                row1 = row_at(q, base, first, i + 1, width, tile, ready)
                row2 = row_at(q, base, first, i + 2, width, tile, ready)
                row3 = row_at(q, base, first, i + 3, width, tile, ready)
                for c in range(width):
                    if real is float:
                        total[c] += (<double>row[c] + <double>row1[c]) + (<double>row2[c] + <double>row3[c])
                    else:
                        total[c] += ((row[c] - pivot[c]) + (row1[c] - pivot[c])) + ((row2[c] - pivot[c]) + (row3[c] - pivot[c]))
            for i in range(i4, n):
                row = row_at(q, base, first, i, width, tile, ready)
                for c in range(width):
                    total[c] += row[c] - pivot[c]

    if q.centred:
        for c in range(width):
            if m.count[c] > 0.0:
                m.mean[c] = pivot[c] + total[c] / m.count[c]
                if real is float:
                    m.mean_rest[c] = fma(-m.count[c], m.mean[c], total[c]) / m.count[c]
    if real is double:
        memset(total, 0, width * sizeof(double))

    if q.mask.data != NULL:
        for i in range(n):
            row = row_at(q, base, first, i, width, tile, ready)
            chosen = <const uint8_t*>(mask + ((first + i) // q.s) * q.mask.p + ((first + i) % q.s) * q.mask.s)
            for c in range(width):
                if chosen[c * q.mask.c]:
                    d = <double>row[c] - m.mean[c]
                    m.m2[c] += d * d
                    if real is double:
                        total[c] += d
    else:
        for i in range(0, i4, 4):
            row = row_at(q, base, first, i, width, tile, ready)
            row1 = row_at(q, base, first, i + 1, width, tile, ready)
            row2 = row_at(q, base, first, i + 2, width, tile, ready)
            row3 = row_at(q, base, first, i + 3, width, tile, ready)
            for c in range(width):
                d = <double>row[c] - m.mean[c]
                d1 = <double>row1[c] - m.mean[c]
                d2 = <double>row2[c] - m.mean[c]
                d3 = <double>row3[c] - m.mean[c]
                if real is float:
                    m.m2[c] += fn_mac64(d, d, d1 * d1) + fn_mac64(d2, d2, d3 * d3)
                else:
                    add_two(&m.m2[c], &m.m2_rest[c], fn_mac64(d, d, d1 * d1) + fn_mac64(d2, d2, d3 * d3))
                    total[c] += (d + d1) + (d2 + d3)
        for i in range(i4, n):
            row = row_at(q, base, first, i, width, tile, ready)
            for c in range(width):
                d = <double>row[c] - m.mean[c]
                m.m2[c] += d * d
                if real is double:
                    total[c] += d
    if real is double:
        if q.centred:
            for c in range(width):
                if m.count[c] > 0.0:
                    m.mean_rest[c] = total[c] / m.count[c]
                    m.m2_rest[c] -= total[c] * m.mean_rest[c]

cdef inline const real* row_at(Pass* q, const char* base, Py_ssize_t first, Py_ssize_t i, Py_ssize_t width, real* tile, bint ready) noexcept nogil:
    if ready:
        return <const real*>(base + ((first + i) // q.s) * q.x.p + ((first + i) % q.s) * q.x.s)
    return tile + i * width

cdef void columns_moments(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, Moments into, double* scratch, real* tile) noexcept nogil:
    cdef Py_ssize_t f = first
    cdef Moments part = moments_at(scratch, it.width)
    columns_block(q, it, f, min(f + q.block, last), into, scratch + FIELDS * it.width, scratch + (FIELDS + 1) * it.width, tile)
    f += q.block
    while f < last:
        columns_block(q, it, f, min(f + q.block, last), part, scratch + FIELDS * it.width, scratch + (FIELDS + 1) * it.width, tile)
        merge(into, part, it.width)
        f += q.block

cdef void columns_step(Pass* q, Item it, Scale* s, Py_ssize_t first, Py_ssize_t last, real* tile, real* extra) noexcept nogil:
    cdef Py_ssize_t i, p, t
    cdef Operand* source = source_of(q)
    cdef char* x = at(source, it.a, it.b) + it.c * source.c
    cdef char* y = at(&q.y, it.a, it.b) + it.c * q.y.c
    cdef char* w = at(&q.weight, it.a, it.b) + it.c * q.weight.c
    cdef char* b = at(&q.bias, it.a, it.b) + it.c * q.bias.c
    cdef char* e = at(&q.residual, it.a, it.b) + it.c * q.residual.c
    for i in range(first, last):
        p, t = i // q.s, i % q.s
        step(q, s, x + p * source.p + t * source.s, y + p * q.y.p + t * q.y.s,
             NULL if q.residual.data == NULL else e + p * q.residual.p + t * q.residual.s,
             NULL if q.weight.data == NULL else w + p * q.weight.p + t * q.weight.s,
             NULL if q.bias.data == NULL else b + p * q.bias.p + t * q.bias.s,
             it.width, tile, extra)

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

cdef struct Scratch:
    char* memory
    double* part                # a block's moments, and two rows of sums
    double* piece               # a piece's moments
    double* whole               # an item's moments
    char* scale
    char* tile
    char* extra

cdef inline bint scratch_for(Pass* q, Scratch* h) noexcept nogil:
    cdef Py_ssize_t row = q.width * sizeof(double)
    cdef Py_ssize_t tile = BLOCK * 8
    if q.columns:
        tile = q.width * q.block * 8
    h.memory = <char*>malloc((3 * FIELDS + 2) * row + SCALE_BYTES * q.width + 2 * tile + 64)
    if h.memory == NULL:
        return False
    h.tile = h.memory + (64 - <size_t>h.memory % 64)
    h.extra = h.tile + tile
    h.part = <double*>(h.extra + tile)
    h.piece = h.part + (FIELDS + 2) * q.width
    h.whole = h.piece + FIELDS * q.width
    h.scale = <char*>(h.whole + FIELDS * q.width)
    return True

cdef inline void piece_moments(Pass* q, Item it, Py_ssize_t piece, double* into, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, piece, &first, &last)
    if q.columns:
        columns_moments(q, it, first, last, moments_at(into, it.width), h.part, <real*>h.tile)
    else:
        runs_moments(q, it, first, last, moments_at(into, 1), <real*>h.tile, <real*>h.extra)

cdef inline void piece_step(Pass* q, Item it, Py_ssize_t piece, Scale* s, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, piece, &first, &last)
    if q.columns:
        columns_step(q, it, s, first, last, <real*>h.tile, <real*>h.extra)
    else:
        runs_step(q, it, s, first, last, <real*>h.tile, <real*>h.extra)

cdef int whole_items(Pass* q, Py_ssize_t first, Py_ssize_t last, real* kind) noexcept nogil:
    """Items [first, last), each from its moments to its output before the next."""
    cdef Scratch h
    cdef Scale s
    cdef Item it
    cdef Py_ssize_t i, piece
    if not scratch_for(q, &h):
        return 1
    for i in range(first, last):
        it = item_at(q, i)
        if q.table != NULL:
            s = scale_at(q.table + it.b * SCALE_BYTES, 1)
            s.any_wide = s.wide[0]
            piece_step(q, it, 0, &s, &h, kind)
            continue
        s = scale_at(h.scale, it.width)
        if not q.given:
            piece_moments(q, it, 0, h.whole, &h, kind)
            for piece in range(1, q.pieces):
                piece_moments(q, it, piece, h.piece, &h, kind)
                merge(moments_at(h.whole, it.width), moments_at(h.piece, it.width), it.width)
        finish(q, it, moments_at(h.whole, it.width), &s, kind)
        if q.y.data != NULL:
            for piece in range(q.pieces):
                piece_step(q, it, piece, &s, &h, kind)
    fn_stream_fence()
    free(h.memory)
    return 0

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
    cdef Py_ssize_t i, piece, row = q.width * sizeof(double), total = q.items * q.pieces
    cdef Py_ssize_t turn, turns = min(total, 8 * q.threads)
    cdef int failed = 0
    cdef Item it
    cdef double* parts = <double*>malloc(total * FIELDS * row)
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
            if not q.given:
                for piece in range(1, q.pieces):
                    merge(moments_at(parts + i * q.pieces * FIELDS * q.width, it.width),
                          moments_at(parts + (i * q.pieces + piece) * FIELDS * q.width, it.width), it.width)
            scales[i] = scale_at(scale_memory + i * SCALE_BYTES * q.width, it.width)
            finish(q, it, moments_at(parts + i * q.pieces * FIELDS * q.width, it.width), &scales[i], kind)
    if not failed and q.y.data != NULL:
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            failed |= some_steps(q, total * turn // turns, total * (turn + 1) // turns, scales, kind)
    free(parts)
    free(scale_memory)
    free(scales)
    return failed

cdef int tabulate(Pass* q, real* kind) noexcept nogil:
    """Scales that many planes share, once for all: one costs as much as normalising 50 numbers."""
    cdef Scale s
    cdef Py_ssize_t b
    q.table = <char*>malloc(q.b * SCALE_BYTES)
    if q.table == NULL:
        return 1
    for b in range(q.b):
        s = scale_at(q.table + b * SCALE_BYTES, 1)
        finish(q, item_at(q, b), moments_at(NULL, 1), &s, kind)
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
    turns = min(q.items, 8 * q.threads)
    for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
        failed |= whole_items(q, q.items * turn // turns, q.items * (turn + 1) // turns, kind)
    return failed

# ---- the door --------------------------------------------------------------------------------

cdef int operand(Operand* o, object array, tuple strides) except -1:
    cdef Py_ssize_t size
    o.data = NULL
    o.a = o.b = o.p = o.s = o.c = 0
    o.storage = F64
    if array is None:
        return 0
    o.data = <char*>cnp.PyArray_DATA(<cnp.ndarray>array)
    size = cnp.PyArray_ITEMSIZE(<cnp.ndarray>array)
    o.storage = F64 if size == 8 else F32 if size == 4 else F16 if cnp.PyArray_TYPE(<cnp.ndarray>array) == cnp.NPY_FLOAT16 else BF16
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
    cdef Py_ssize_t groups, size = bytes_of(q.x.storage)
    q.length = q.p * q.s
    q.width = q.chunks = 1
    q.block = BLOCK
    if q.columns:
        groups = q.c // q.neighbours
        q.chunks = 1 if q.c <= ABREAST else max(1, min(groups, (q.c + COLUMNS - 1) // COLUMNS))
        q.width = (groups + q.chunks - 1) // q.chunks * q.neighbours
        q.chunks = (q.c + q.width - 1) // q.width
        q.block = min(max(SQUARE // q.width, 16), PIECE_ROWS)
    q.items = q.a * q.b * q.chunks
    q.pieces = pieces_of(q)
    q.threads = 1 if q.items * q.width * q.length * size < SERIAL or not FN_OPENMP else max(1, threads)
    q.stream = q.items * q.width * q.length * size > stream_above
    with nogil:
        if q.x.storage == F64:
            failed = run(q, &as_double)
        else:
            failed = run(q, &as_float)
    return failed

def has_threads():
    """Whether these kernels were built with OpenMP."""
    return bool(FN_OPENMP)

def run_pass(layout, x, y, mean, var, rstd, *, weight=None, bias=None, mask=None, residual=None,
              addend=None, total=None, bint centred=True, bint given=False, Scaling scaling=RSTD,
              double eps=0.0, Activation activation=IDENTITY, bint activation_first=False, int threads=1,
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
    q.centred, q.given, q.scaling, q.eps = centred, given, scaling, eps
    q.activation, q.activation_first = activation, activation_first
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
