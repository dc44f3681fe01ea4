# Columns side by side: their moments and their steps.

cdef inline const char* row_of(Pass* q, const char* base, Py_ssize_t i) noexcept nogil:
    return base + (i // q.s) * q.x.p + (i % q.s) * q.x.s

cdef void walk_columns(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, const double* pivot, double* a, double* b, Scratch* h) noexcept nogil:
    """Sums of x, or of x - pivot, and of its square over rows [first, last), for each column."""
    cdef const char* base = at(&q.x, it.a, it.b) + it.c * q.x.c
    cdef const float* x
    cdef float* tile = <float*>h.tile
    cdef Py_ssize_t f = first, i, n, width = it.width, apart
    memset(a, 0, width * sizeof(double))
    memset(b, 0, width * sizeof(double))
    while f < last:
        n = min(last - f, q.s - f % q.s)
        if q.x.storage == F32:
            x, apart = <const float*>row_of(q, base, f), q.x.s // <Py_ssize_t>sizeof(float)
            all_within(&q.x, <const char*>x, q.x.s, n, width * sizeof(float), "x, of rows in place")
        else:
            n = min(n, q.block)
            fits(n * width * sizeof(float), h.tile_size, "the tile of rows")
            all_within(&q.x, row_of(q, base, f), q.x.s, n, width * bytes_of(q.x.storage), "x, of rows")
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
    walk_columns(q, it, first, last, NULL, a, b, h)
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
    walk_columns(q, strip, first, last, pivot, a, b, h)
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
            all_within(&q.x, row_of(q, base, f), q.x.s, n, width * sizeof(double), "x, of rows of doubles")
            fn_rows_about(<const double*>row_of(q, base, f), apart, n, width, pivot, total)
            f += n
        for c in range(width):
            m.mean[c] = pivot[c] + total[c] / (last - first)
            total[c] = 0.0
        f = first
    while f < last:
        n = min(last - f, q.s - f % q.s)
        all_within(&q.x, row_of(q, base, f), q.x.s, n, width * sizeof(double), "x, of rows of doubles")
        fn_squares_about(<const double*>row_of(q, base, f), apart, n, width, m.mean, total, m.m2, m.m2_rest)
        f += n
    if q.centred:
        for c in range(width):
            m.mean_rest[c] = total[c] / (last - first)
            m.m2_rest[c] -= total[c] * m.mean_rest[c]

cdef void masked_columns(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, double* pivot, double* total, Scratch* h, real* kind) noexcept nogil:
    """Moments of the chosen of rows [first, last) for each column."""
    cdef Py_ssize_t i, c, turn, width = it.width
    cdef Moments m = moments_at(into, width)
    cdef char* base = at(&q.x, it.a, it.b) + it.c * q.x.c
    cdef char* mask = at(&q.mask, it.a, it.b) + it.c * q.mask.c
    cdef const uint8_t* chosen = NULL
    cdef real* tile = <real*>h.tile
    cdef const real* row
    cdef double d
    memset(into, 0, FIELDS * width * sizeof(double))
    memset(pivot, 0, width * sizeof(double))
    for turn in range(2):
        memset(total, 0, width * sizeof(double))
        for i in range(first, last):
            row = <const real*>row_of(q, base, i)
            within(&q.x, <const char*>row, width * bytes_of(q.x.storage), "x, of a masked row")
            if not native(q.x.storage, tile):
                fits(width * sizeof(real), h.tile_size, "the tile of a masked row")
                load(<const char*>row, q.x.storage, width, tile)
                row = tile
            chosen = <const uint8_t*>(mask + (i // q.s) * q.mask.p + (i % q.s) * q.mask.s)
            all_within(&q.mask, <const char*>chosen, q.mask.c, width, 1, "where, of a row")
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
            masked_columns(q, it, f, min(f + q.block, last), part, h.sums, h.sums + width, h, kind)
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
            if FN_CHECKED:
                all_within(source, x + p * source.p + t * source.s, source.s, n, it.width * sizeof(float), "x, of rows to step")
                all_within(&q.y, row, q.y.s, n, it.width * sizeof(float), "y, of rows to step")
                all_within(&q.residual, e + p * q.residual.p + t * q.residual.s, q.residual.s, n, it.width * sizeof(float), "residual, of rows to step")
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
                fits(n * it.width * sizeof(float), h.tile_size, "the tile of rows to step")
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
