# From moments to the scale of a group, and to what the step needs of it.

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

    False where there is nothing to rescue: constant (mean set, m2 0), or with an infinity or what is no
    number in it (mean set to the sum of those).
    """
    cdef Operand* source = source_of(q)
    cdef Py_ssize_t i, k, count = 0
    cdef double v, largest = 0.0, first = 0.0, odd = 0.0
    cdef bint constant = True
    cdef int exponent
    for k in range(q.neighbours):
        for i in range(q.length):
            if mask != NULL and not (mask + (i // q.s) * q.mask.p + (i % q.s) * q.mask.s + k * q.mask.c)[0]:
                continue
            v = element(q, source, x + k * source.c, i)
            if not isfinite(v):
                odd += v
                continue
            if count == 0:
                first = v
            constant = constant and v == first
            largest = max(largest, fabs(v))
            count += 1
    if odd != 0.0:
        if q.centred:
            mean[0] = odd
        return False
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
        step[0] = o.c // <Py_ssize_t>sizeof(double)
        return <double*>(at(o, it.a, it.b) + it.c // q.neighbours * o.c)
    step[0] = o.b // <Py_ssize_t>sizeof(double)
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
                var_rest = (fn_fma64(-var, count, m2) + m2_rest) / count + ((var - v) + q.eps * unit * unit)
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
