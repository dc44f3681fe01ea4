/* Scales applied: y = ((x - mean) rstd) weight + bias, a residual added, and activated.
 *
 * The mean is a pair hi + lo; x - hi is exact where it matters, and `shift` = -lo rstd restores the
 * rest inside the fused multiply-add.  Folding the mean into the bias instead would lose every
 * digit at a large mean/std.  x, y and the residual may be the same array. */

/* Some planes of n numbers with a scale each, or some rows of n columns with one for each column.
 */
typedef struct {
    const REAL *x;
    REAL *y;
    const REAL *residual;         /* or NULL */
    REAL hi0, r0, shift0;         /* of a run */
    const REAL *hi, *r, *shift;   /* of planes or columns */
    const REAL *w, *b;            /* NULL: 1 and 0, or in r and shift already */
    ptrdiff_t x_step, y_step, residual_step, w_step, b_step; /* to the next plane or row */
    ptrdiff_t count, n;
    ptrdiff_t ahead;                          /* bytes to what is asked for in advance, or 0 */
    int columns, w_along, b_along; /* whether each number of n has its own */
    Activation activation;
} T(Loop);

/* How a loop is compiled: constants. */
#if IS_FLOAT
enum { COLUMNS = 1, AFFINE = 2, W_ALONG = 4, B_ALONG = 8, RESIDUAL = 16, OF_BF16 = 32,
       NON_TEMPORAL = 64, MASKED = 128 };
enum { PLANES, RUN, ROWS, NON_TEMPORAL_RUN, NON_TEMPORAL_ROWS };
/* Bytes of non-temporal stores at a time: of fewer, gcc takes one by one. */
enum { CHUNK_BYTES = 512 };
#endif

/* Number i from x on, and where it goes to y. */
FN_INLINE REAL T(read_at)(const REAL *x, ptrdiff_t i, int how) {
    return how & OF_BF16 ? (REAL)fn_from_bf16(((const uint16_t *)x)[i]) : x[i];
}
FN_INLINE void T(write_at)(REAL *y, ptrdiff_t i, REAL t, int how) {
    if (how & OF_BF16) ((uint16_t *)y)[i] = fn_made_bf16((float)t);
    else y[i] = t;
}

/* n numbers, those `before` the first that begins a cache line in a loop of their own. */
FN_INLINE void T(normalize_span)(const T(Loop) *j, ptrdiff_t before, ptrdiff_t n, int how,
                                 Activation activation) {
    const REAL *x = j->x, *hi = j->hi, *r = j->r, *shift = j->shift, *w = j->w, *b = j->b;
    const REAL *e = j->residual, hi0 = j->hi0, r0 = j->r0, shift0 = j->shift0;
    const REAL w0 = how & AFFINE && w ? w[0] : 1, b0 = how & AFFINE && b ? b[0] : 0;
    const int col = how & COLUMNS;
    REAL *y = j->y;
    for (ptrdiff_t from = 0, to = before ? before : n;; from = to, to = n) {
        FN_IVDEP for (ptrdiff_t i = from; i < to; i++) {
            const REAL v = T(read_at)(x, i, how);
            REAL t = T(fma)(v - (col ? hi[i] : hi0), col ? r[i] : r0, col ? shift[i] : shift0);
            if (how & AFFINE) t = T(fma)(t, how & W_ALONG ? w[i] : w0, how & B_ALONG ? b[i] : b0);
            if (how & RESIDUAL) t += e[i];
            T(write_at)(y, i, T(activated)(t, activation), how);
        }
        if (to == n) return;
    }
}
FN_INLINE ptrdiff_t T(before_line_of)(const REAL *y) {
    return (ptrdiff_t)((0 - (uintptr_t)y) % 64 / sizeof(REAL));
}
/* What is written begins at a cache line, after a few elements before it: a vector of 64 bytes that
 * crosses a line takes two stores, and NumPy's memory begins anywhere (34 to 25 ns on a row of 768:
 * AMD EPYC, Zen 5). */
FN_INLINE void T(normalize_one)(const T(Loop) *j, int how, Activation activation) {
    const int whole = j->n < 256 || how & OF_BF16;
    T(normalize_span)(j, whole ? 0 : T(before_line_of)(j->y), j->n, how, activation);
}
FN_INLINE void T(advance)(T(Loop) *j, ptrdiff_t n, int how) {
    j->x += n, j->y += n;
    if (how & RESIDUAL) j->residual += n;
    if (how & W_ALONG) j->w += n;
    if (how & B_ALONG) j->b += n;
    if (how & COLUMNS) j->hi += n, j->r += n, j->shift += n;
}
FN_INLINE void T(next)(T(Loop) *j, int how) {
    const ptrdiff_t size = how & OF_BF16 ? 2 : sizeof(REAL);
    j->x = (const REAL *)((const char *)j->x + j->x_step * size);
    j->y = (REAL *)((char *)j->y + j->y_step * size);
    if (how & RESIDUAL) j->residual += j->residual_step;
}
FN_INLINE void T(normalize_at)(const T(Loop) *j, ptrdiff_t row, ptrdiff_t i, const REAL *scale,
                               int how, Activation activation) {
    REAL t = T(fma)(T(read_at)(j->x, row * j->x_step + i, how) - scale[0], scale[1], scale[2]);
    if (how & AFFINE) t = T(fma)(t, j->w[i], how & B_ALONG ? j->b[i] : 0);
    if (how & RESIDUAL) t += j->residual[row * j->residual_step + i];
    T(write_at)(j->y, row * j->y_step + i, T(activated)(t, activation), how);
}
/* Rows of columns, four at a time: what the columns have in common is then read once. */
FN_INLINE void T(normalize_rows_of)(const T(Loop) *all, int how, Activation activation) {
    T(Loop) j = *all;
    ptrdiff_t rows = all->count;
    for (; rows >= 4; rows -= 4) {
        FN_IVDEP for (ptrdiff_t i = 0; i < j.n; i++) {
            const REAL scale[3] = {j.hi[i], j.r[i], j.shift[i]};
            T(normalize_at)(&j, 0, i, scale, how, activation);
            T(normalize_at)(&j, 1, i, scale, how, activation);
            T(normalize_at)(&j, 2, i, scale, how, activation);
            T(normalize_at)(&j, 3, i, scale, how, activation);
        }
        for (int k = 0; k < 4; k++) T(next)(&j, how);
    }
    for (; rows > 0; rows--, T(next)(&j, how)) {
        FN_IVDEP for (ptrdiff_t i = 0; i < j.n; i++) {
            const REAL scale[3] = {j.hi[i], j.r[i], j.shift[i]};
            T(normalize_at)(&j, 0, i, scale, how, activation);
        }
    }
}
/* n numbers, in whole lines of y, with non-temporal stores. */
FN_INLINE void T(normalize_lines)(T(Loop) *j, ptrdiff_t n, int how, Activation activation) {
    enum { LINE_NUMBERS = 64 / sizeof(REAL), CHUNK = CHUNK_BYTES / sizeof(REAL) };
    for (ptrdiff_t i = 0, m; i < n; i += m) {
        REAL t[CHUNK];
        T(Loop) part = *j;
        m = least(n - i, CHUNK);
        for (ptrdiff_t k = 0; k < m; k += LINE_NUMBERS) {
            FN_FETCH((const char *)(j->x + k) + j->ahead);
            if (how & RESIDUAL) FN_FETCH((const char *)(j->residual + k) + j->ahead);
        }
        part.y = t;
        T(normalize_span)(&part, 0, m, how, activation);
        for (ptrdiff_t k = 0; k < m; k += LINE_NUMBERS) fn_stream_line(j->y + k, t + k);
        T(advance)(j, m, how);
    }
}
/* A run of any length, with non-temporal stores but for its ends. */
FN_INLINE void T(normalize_run_of)(const T(Loop) *all, int how, Activation activation) {
    enum { LINE_NUMBERS = 64 / sizeof(REAL) };
    T(Loop) j = *all;
    const ptrdiff_t head = least(T(before_line_of)(j.y), j.n);
    const ptrdiff_t lines = (j.n - head) / LINE_NUMBERS * LINE_NUMBERS;
    T(normalize_span)(&j, 0, head, how, activation);
    T(advance)(&j, head, how);
    T(normalize_lines)(&j, lines, how, activation);
    T(normalize_span)(&j, 0, j.n - head - lines, how, activation);
}
FN_INLINE void T(normalize_plane)(const T(Loop) *j, int how, Activation activation) {
    if (how & NON_TEMPORAL) T(normalize_run_of)(j, how, activation);
    else T(normalize_one)(j, how, activation);
}
/* Planes, one after the other.  Doubles, whose weights are applied apart, have one for each. */
FN_INLINE void T(normalize_planes_of)(const T(Loop) *all, int how, Activation activation) {
    T(Loop) j = *all;
    for (ptrdiff_t k = 0; k < all->count; k++, T(next)(&j, how)) {
        j.hi0 = j.hi[k], j.r0 = j.r[k], j.shift0 = j.shift[k];
        if (j.ahead) {
            fn_fetch((const char *)j.x + j.ahead, j.n * (ptrdiff_t)sizeof(REAL));
            fn_fetch((const char *)j.y + j.ahead, j.n * (ptrdiff_t)sizeof(REAL));
        }
        if (!IS_FLOAT && (j.w || j.b)) T(normalize_plane)(&j, how | AFFINE, activation);
        else T(normalize_plane)(&j, how, activation);
        if (!IS_FLOAT && j.w) j.w += j.w_step;
        if (!IS_FLOAT && j.b) j.b += j.b_step;
    }
}
FN_INLINE void T(normalize_lines_of_rows)(const T(Loop) *all, int how, Activation activation) {
    T(Loop) row = *all;
    for (ptrdiff_t k = 0; k < all->count; k++, T(next)(&row, how)) {
        T(Loop) j = row;
        T(normalize_lines)(&j, j.n, how | COLUMNS, activation);
    }
}

/* The loops that are compiled: for each shape one for each activation, with a residual or without.
 */
FN_INLINE void T(normalize_shape)(const T(Loop) *j, int shape, int how, Activation activation) {
    switch (shape) {
    case PLANES: T(normalize_planes_of)(j, how, activation); return;
    case RUN: T(normalize_one)(j, how, activation); return;
    case ROWS: T(normalize_rows_of)(j, how, activation); return;
    case NON_TEMPORAL_RUN: T(normalize_run_of)(j, how, activation); return;
    case NON_TEMPORAL_ROWS: T(normalize_lines_of_rows)(j, how, activation); return;
    }
}
FN_INLINE void T(normalize_activated)(const T(Loop) *j, int shape, int how) {
    switch (j->activation) {
#define FN_CASE(NAME) case NAME: T(normalize_shape)(j, shape, how, NAME); return;
    FN_ACTIVATIONS(FN_CASE)
#undef FN_CASE
    default: return;
    }
}
FN_INLINE void T(normalize_as)(const T(Loop) *j, int shape, int how) {
    if (j->residual) T(normalize_activated)(j, shape, how | RESIDUAL);
    else T(normalize_activated)(j, shape, how);
}
static void T(normalize_planes)(const T(Loop) *j) { T(normalize_as)(j, PLANES, 0); }
#if !IS_FLOAT
static void normalize_non_temporal_planes(const Loop_f64 *j) {
    normalize_planes_of_f64(j, NON_TEMPORAL, IDENTITY);
}
#endif
/* Rows of columns, whose weights are in r and shift, or those of doubles one for each column. */
static void T(normalize_rows)(const T(Loop) *j) {
    if (!IS_FLOAT && j->b) T(normalize_as)(j, ROWS, AFFINE | W_ALONG | B_ALONG);
    else if (!IS_FLOAT && j->w) T(normalize_as)(j, ROWS, AFFINE | W_ALONG);
    else T(normalize_as)(j, ROWS, 0);
}
/* One run without weights, or with those that are in r and shift. */
static void T(normalize_folded)(const T(Loop) *j) { T(normalize_as)(j, RUN, 0); }
#if IS_FLOAT
static void normalize_non_temporal_run(const Loop_f32 *j) {
    normalize_as_f32(j, NON_TEMPORAL_RUN, 0);
}
static void normalize_non_temporal_rows(const Loop_f32 *j) {
    normalize_as_f32(j, NON_TEMPORAL_ROWS, 0);
}
static void normalize_bf16_rows(const Loop_f32 *j) { /* their weights are in r and shift */
    normalize_rows_of_f32(j, OF_BF16, IDENTITY);
}
static void normalize_bf16(const Loop_f32 *j) {
    if (j->w && j->b) normalize_one_f32(j, OF_BF16 | AFFINE | W_ALONG | B_ALONG, IDENTITY);
    else if (j->w) normalize_one_f32(j, OF_BF16 | AFFINE | W_ALONG, IDENTITY);
    else normalize_one_f32(j, OF_BF16, IDENTITY);
}
#endif
/* One run or row, with weights of the less usual kinds and nothing after them. */
static void T(normalize_plain)(const T(Loop) *j, int how) {
    switch (how) {
#define FN_CASE(HOW) case HOW: T(normalize_one)(j, HOW, IDENTITY); return
    FN_CASE(AFFINE);
    FN_CASE(AFFINE | B_ALONG);
    FN_CASE(COLUMNS | AFFINE);
    FN_CASE(COLUMNS | AFFINE | W_ALONG);
    FN_CASE(COLUMNS | AFFINE | B_ALONG);
    FN_CASE(COLUMNS | AFFINE | W_ALONG | B_ALONG);
#undef FN_CASE
    }
}
/* What is applied to numbers that have been normalised: nothing yet, to the sign of a zero. */
FN_INLINE T(Loop) T(once_more)(REAL *t, ptrdiff_t n) {
    T(Loop) j = {.x = t, .y = t, .hi0 = 0, .r0 = 1, .shift0 = -(REAL)0.0, .count = 1, .n = n};
    return j;
}
FN_INLINE void T(times_slope)(REAL *FN_RESTRICT t, const REAL *FN_RESTRICT dy, ptrdiff_t n,
                              Activation activation) {
    for (ptrdiff_t i = 0; i < n; i++) t[i] = dy[i] * T(slope)(t[i], activation);
}
/* What goes into an activation becomes dy times its slope there. */
static void T(multiply_by_slope)(REAL *t, const REAL *dy, ptrdiff_t n, Activation activation) {
    switch (activation) {
#define FN_CASE(NAME) case NAME: T(times_slope)(t, dy, n, NAME); return;
    FN_NAMED_ACTIVATIONS(FN_CASE)
#undef FN_CASE
    default: return;
    }
}
/* In two loops, where no single one is compiled: y may be the residual, whose numbers are kept. */
static void T(normalize_twice)(const T(Loop) *j, int how) {
    T(Loop) part = *j;
    REAL kept[256];
    for (ptrdiff_t i = 0; i < j->n; i += part.n) {
        part.n = least(j->n - i, 256);
        T(Loop) after = T(once_more)(part.y, part.n);
        after.activation = j->activation;
        if (j->residual)
            after.residual = memcpy(kept, j->residual + i, (size_t)part.n * sizeof(REAL));
        T(normalize_plain)(&part, how);
        T(normalize_folded)(&after);
        T(advance)(&part, part.n, how);
    }
}
/* One run or row of any kind. */
static void T(normalize)(const T(Loop) *j) {
    const int affine = j->w || j->b;
    const int how = (j->columns ? COLUMNS : 0) | (affine ? AFFINE : 0) |
                    (j->w && j->w_along ? W_ALONG : 0) | (j->b && j->b_along ? B_ALONG : 0);
    switch (how) {
    case 0: T(normalize_folded)(j); return;
    case COLUMNS: T(normalize_rows)(j); return;
    case AFFINE | W_ALONG: T(normalize_as)(j, RUN, AFFINE | W_ALONG); return;
    case AFFINE | W_ALONG | B_ALONG: T(normalize_as)(j, RUN, AFFINE | W_ALONG | B_ALONG); return;
    }
    if (j->residual || j->activation != IDENTITY) T(normalize_twice)(j, how);
    else T(normalize_plain)(j, how);
}
