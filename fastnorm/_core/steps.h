/* The step every norm ends in, through the caches or past them. */
#ifndef FASTNORM_STEPS_H
#define FASTNORM_STEPS_H

#include "activations.h"
#include "check.h"

/* ---- streaming stores --------------------------------------------------------------------
 * A result larger than the last cache is not read again soon.  Written past the caches, its lines
 * are not fetched first, which is a third of the traffic of a pass over memory.  A fence belongs
 * between the last of these and whoever reads the result in another thread. */
static inline void fn_stream(char *FN_RESTRICT to, const char *FN_RESTRICT from, size_t n) {
#if defined(__SSE2__)
    size_t head = (size_t)(-(uintptr_t)to % 64);
    if (n >= 256 + head) {
        FN_STORES_PENDING(1);
        memcpy(to, from, head);
        to += head, from += head, n -= head;
#if defined(__AVX__)
        for (; n >= 64; n -= 64, to += 64, from += 64) {
            _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
            _mm256_stream_si256((__m256i *)(to + 32), _mm256_loadu_si256((const __m256i *)(from + 32)));
        }
#else
        for (; n >= 16; n -= 16, to += 16, from += 16)
            _mm_stream_si128((__m128i *)to, _mm_loadu_si128((const __m128i *)from));
#endif
    }
#endif
    memcpy(to, from, n);
}
/* What is stepped goes past the caches a line at a time. */
FN_INLINE void fn_stream_line(void *to, const void *from) {
    FN_STORES_PENDING(1);
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
#elif defined(__SSE2__)
    for (int k = 0; k < 4; k++)
        _mm_stream_si128((__m128i *)to + k, _mm_loadu_si128((const __m128i *)from + k));
#else
    memcpy(to, from, 64);
#endif
}
static inline void fn_stream_fence(void) {
    FN_STORES_PENDING(0);
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* ---- the step every norm ends in ---------------------------------------------------------
 * y = ((x - mean) rstd) weight + bias.  The mean is a pair hi + lo; x - hi is exact where it
 * matters, and `shift` = -lo rstd restores the rest inside the fused multiply-add.  Folding the
 * mean into the bias instead would lose every digit at a large mean/std.
 * x and y may be the same array.  `col`: statistics lie along the run; `wv`, `bv`: so do weights. */
FN_INLINE float fn_activated(float t, int activation) {
    switch (activation) {
    case 1: return fn_relu32(t);
    case 2: return fn_silu32(t);
    case 3: return fn_gelu32(t);
    case 4: return fn_gelu_tanh32(t);
    case 5: return fn_tanh32(t);
    default: return t;
    }
}

/* What is written begins at a cache line, after a few elements before it: a vector of 64 bytes that
 * crosses a line takes two stores, and NumPy's memory begins anywhere (34 to 25 ns on a row of 768). */
#define FN_FROM_A_LINE(y, n, from, to)                                                            \
    const ptrdiff_t before =                                                                      \
        (n) < 256 ? 0 : (ptrdiff_t)((0 - (uintptr_t)(y)) % 64 / sizeof *(y));                     \
    for (ptrdiff_t from = 0, to = before ? before : (n); from < (n); from = to, to = (n))
#define FN_STEP(real, fma, AFTER)                                                                 \
    {                                                                                             \
        const real hi0 = hi[0], r0 = r[0], s0 = shift[0], w0 = w ? w[0] : 1, b0 = b ? b[0] : 0;   \
        FN_FROM_A_LINE(y, n, from, to)                                                            \
        FN_IVDEP for (ptrdiff_t i = from; i < to; i++) {                                          \
            real t = fma(x[i] - (col ? hi[i] : hi0), col ? r[i] : r0, col ? shift[i] : s0);       \
            if (affine) t = fma(t, wv ? w[i] : w0, bv ? b[i] : b0);                               \
            AFTER                                                                                 \
        }                                                                                         \
    }
FN_INLINE void fn_step_of_float(const float *x, float *y, ptrdiff_t n, const float *hi,
                                const float *r, const float *shift, const float *w,
                                const float *b, const float *e, int col, int affine, int wv, int bv,
                                int add, int activation)
    FN_STEP(float, fn_fma32, if (add) t += e[i]; y[i] = fn_activated(t, activation);)
FN_INLINE void fn_step_to_float(const float *x, float *y, ptrdiff_t n, const float *hi,
                                const float *r, const float *shift, const float *w,
                                const float *b, int col, int affine, int wv, int bv)
    FN_STEP(float, fn_fma32, y[i] = t;)
FN_INLINE void fn_step_to_double(const double *x, double *y, ptrdiff_t n, const double *hi,
                                 const double *r, const double *shift, const double *w,
                                 const double *b, int col, int affine, int wv, int bv)
    FN_STEP(double, fn_fma64, y[i] = t;)

/* The loops that are compiled: all combinations without anything after them, and for float the
 * usual ones with a residual `e` (or NULL) and an activation. */
#define FN_PLAIN_STEPS(real)                                                                 \
    if (!w && !b && col) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 1, 0, 0, 0);  \
    else if (!w && !b) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 0, 0, 0, 0);    \
    else if (col && wv && bv) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 1, 1, 1, 1);  \
    else if (col && wv) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 1, 1, 1, 0);   \
    else if (col && bv) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 1, 1, 0, 1);   \
    else if (col) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 1, 1, 0, 0);         \
    else if (wv && bv) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 0, 1, 1, 1);    \
    else if (wv) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 0, 1, 1, 0);          \
    else if (bv) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 0, 1, 0, 1);          \
    else fn_step_to_##real(x, y, n, hi, r, shift, w, b, 0, 1, 0, 0);
#define FN_PLAIN_STEP(real)                                                                       \
    static inline void fn_step_plain_##real(const real *x, real *y, ptrdiff_t n, const real *hi,  \
                                            const real *r, const real *shift, const real *w,      \
                                            const real *b, int col, int wv, int bv) {             \
        FN_PLAIN_STEPS(real)                                                                      \
    }
FN_PLAIN_STEP(float)
FN_PLAIN_STEP(double)

#define FN_ACTIVE(A, COL, AFFINE, WV, BV)                                                         \
    case A:                                                                                       \
        if (e)                                                                                    \
            fn_step_of_float(x, y, n, hi, r, shift, w, b, e, COL, AFFINE, WV, BV, 1, A);          \
        else                                                                                      \
            fn_step_of_float(x, y, n, hi, r, shift, w, b, e, COL, AFFINE, WV, BV, 0, A);          \
        return;
#define FN_ACTIVE_STEPS(...)                                                                      \
    switch (activation) {                                                                         \
        FN_ACTIVE(0, __VA_ARGS__) FN_ACTIVE(1, __VA_ARGS__) FN_ACTIVE(2, __VA_ARGS__)             \
        FN_ACTIVE(3, __VA_ARGS__) FN_ACTIVE(4, __VA_ARGS__) FN_ACTIVE(5, __VA_ARGS__)             \
    }
/* One run whose affine step is in r and shift already. */
static inline void fn_step_folded(const float *x, float *y, ptrdiff_t n, const float *hi,
                                  const float *r, const float *shift, const float *e, int col,
                                  int activation) {
    const float *w = NULL, *b = NULL;
    if (col) FN_ACTIVE_STEPS(1, 0, 0, 0)
    else FN_ACTIVE_STEPS(0, 0, 0, 0)
}
/* Rows of columns, `x_step` and `y_step` numbers apart, four at a time: what the columns have in
 * common is then read once. */
FN_INLINE void fn_step_rows_of(const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step,
                               const float *e, ptrdiff_t e_step, ptrdiff_t rows, ptrdiff_t n,
                               const float *hi, const float *r, const float *shift, int add,
                               int activation) {
#define FN_PUT(k)                                                                                 \
    {                                                                                             \
        float t = fn_fma32(x[(k) * x_step + i] - h, v, s);                                        \
        if (add) t += e[(k) * e_step + i];                                                        \
        y[(k) * y_step + i] = fn_activated(t, activation);                                        \
    }
    for (; rows >= 4; rows -= 4) {
        FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
            const float h = hi[i], v = r[i], s = shift[i];
            FN_PUT(0) FN_PUT(1) FN_PUT(2) FN_PUT(3)
        }
        x += 4 * x_step;
        y += 4 * y_step;
        e = add ? e + 4 * e_step : e;
    }
    for (; rows > 0; rows--) {
        FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
            const float h = hi[i], v = r[i], s = shift[i];
            FN_PUT(0)
        }
        x += x_step;
        y += y_step;
        e = add ? e + e_step : e;
    }
#undef FN_PUT
}
#define FN_ROWS(A)                                                                                \
    case A:                                                                                       \
        if (e)                                                                                    \
            fn_step_rows_of(x, x_step, y, y_step, e, e_step, rows, n, hi, r, shift, 1, A);        \
        else                                                                                      \
            fn_step_rows_of(x, x_step, y, y_step, e, e_step, rows, n, hi, r, shift, 0, A);        \
        return;
static inline void fn_step_rows(const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step,
                                const float *e, ptrdiff_t e_step, ptrdiff_t rows, ptrdiff_t n,
                                const float *hi, const float *r, const float *shift,
                                int activation) {
    switch (activation) { FN_ROWS(0) FN_ROWS(1) FN_ROWS(2) FN_ROWS(3) FN_ROWS(4) FN_ROWS(5) }
}
/* Planes of n numbers, each with numbers of its own; what lies `ahead` bytes further comes next. */
FN_INLINE void fn_step_planes_of(const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step,
                                 const float *e, ptrdiff_t e_step, ptrdiff_t planes, ptrdiff_t n,
                                 ptrdiff_t ahead, const float *hi, const float *r,
                                 const float *shift, int add, int activation) {
    for (ptrdiff_t k = 0; k < planes; k++, x += x_step, y += y_step, e = add ? e + e_step : e) {
        if (ahead) {
            fn_fetch((const char *)x + ahead, n * (ptrdiff_t)sizeof(float));
            fn_fetch((const char *)y + ahead, n * (ptrdiff_t)sizeof(float));
        }
        fn_step_of_float(x, y, n, hi + k, r + k, shift + k, NULL, NULL, e, 0, 0, 0, 0, add,
                         activation);
    }
}
#define FN_PLANES(A)                                                                              \
    case A:                                                                                       \
        if (e)                                                                                    \
            fn_step_planes_of(x, x_step, y, y_step, e, e_step, planes, n, ahead, hi, r, shift, 1, \
                              A);                                                                 \
        else                                                                                      \
            fn_step_planes_of(x, x_step, y, y_step, e, e_step, planes, n, ahead, hi, r, shift, 0, \
                              A);                                                                 \
        return;
static inline void fn_step_planes(const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step,
                                  const float *e, ptrdiff_t e_step, ptrdiff_t planes, ptrdiff_t n,
                                  ptrdiff_t ahead, const float *hi, const float *r,
                                  const float *shift, int activation) {
    switch (activation) {
        FN_PLANES(0) FN_PLANES(1) FN_PLANES(2) FN_PLANES(3) FN_PLANES(4) FN_PLANES(5)
    }
}
/* Of doubles, whose weights are applied after, one for each plane; `past` the caches, where y is whole
 * lines. */
static inline void fn_step_planes_double(const double *x, ptrdiff_t x_step, double *y,
                                         ptrdiff_t y_step, ptrdiff_t planes, ptrdiff_t n,
                                         ptrdiff_t ahead, const double *hi, const double *r,
                                         const double *shift, const double *w, ptrdiff_t w_step,
                                         const double *b, ptrdiff_t b_step, int past) {
    for (ptrdiff_t k = 0; k < planes; k++, x += x_step, y += y_step) {
        const double *wk = w ? w + k * w_step : NULL, *bk = b ? b + k * b_step : NULL;
        if (past && ((uintptr_t)y | (uintptr_t)n * sizeof *y) % 64 == 0) {
            for (ptrdiff_t i = 0, m; i < n; i += m) {
                double t[64];
                m = n - i < 64 ? n - i : 64;
                fn_step_to_double(x + i, t, m, hi + k, r + k, shift + k, wk, bk, 0, w || b, 0, 0);
                for (ptrdiff_t j = 0; j < m; j += 8) fn_stream_line(y + i + j, t + j);
            }
            continue;
        }
        if (ahead) {
            fn_fetch((const char *)x + ahead, n * (ptrdiff_t)sizeof(double));
            fn_fetch((const char *)y + ahead, n * (ptrdiff_t)sizeof(double));
        }
        if (w || b) fn_step_to_double(x, y, n, hi + k, r + k, shift + k, wk, bk, 0, 1, 0, 0);
        else fn_step_to_double(x, y, n, hi + k, r + k, shift + k, NULL, NULL, 0, 0, 0, 0);
    }
}
/* The same past the caches: a run, and rows of columns whose lines are whole ones of y.  x, and what is
 * added, are asked for `ahead` bytes in advance. */
#define FN_LINES 128 /* numbers at a time: in fewer, gcc takes them one by one */
#define FN_FETCH_LINES                                                                            \
    for (ptrdiff_t j = 0; j < m; j += 16) {                                                       \
        FN_FETCH((const char *)(x + i + j) + ahead);                                              \
        if (add) FN_FETCH((const char *)(e + i + j) + ahead);                                     \
    }
FN_INLINE void fn_step_past_of(const float *x, float *y, const float *e, ptrdiff_t n, float hi,
                               float r, float shift, ptrdiff_t ahead, int add, int activation) {
    ptrdiff_t i = (ptrdiff_t)((0 - (uintptr_t)y) % 64 / sizeof(float));
    if (i > n) i = n;
    fn_step_of_float(x, y, i, &hi, &r, &shift, NULL, NULL, e, 0, 0, 0, 0, add, activation);
    for (ptrdiff_t m; (m = (n - i < FN_LINES ? n - i : FN_LINES) / 16 * 16) > 0; i += m) {
        float t[FN_LINES];
        FN_FETCH_LINES
        FN_IVDEP for (ptrdiff_t j = 0; j < m; j++) {
            const float v = fn_fma32(x[i + j] - hi, r, shift);
            t[j] = fn_activated(add ? v + e[i + j] : v, activation);
        }
        for (ptrdiff_t j = 0; j < m; j += 16) fn_stream_line(y + i + j, t + j);
    }
    fn_step_of_float(x + i, y + i, n - i, &hi, &r, &shift, NULL, NULL, add ? e + i : e, 0, 0, 0, 0,
                     add, activation);
}
FN_INLINE void fn_step_rows_past_of(const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step,
                                    const float *e, ptrdiff_t e_step, ptrdiff_t rows, ptrdiff_t n,
                                    const float *hi, const float *r, const float *shift,
                                    ptrdiff_t ahead, int add, int activation) {
    for (; rows > 0; rows--, x += x_step, y += y_step, e = add ? e + e_step : e)
        for (ptrdiff_t i = 0, m; i < n; i += m) {
            float t[FN_LINES];
            m = n - i < FN_LINES ? n - i : FN_LINES;
            FN_FETCH_LINES
            FN_IVDEP for (ptrdiff_t j = 0; j < m; j++) {
                const float v = fn_fma32(x[i + j] - hi[i + j], r[i + j], shift[i + j]);
                t[j] = fn_activated(add ? v + e[i + j] : v, activation);
            }
            for (ptrdiff_t j = 0; j < m; j += 16) fn_stream_line(y + i + j, t + j);
        }
}
#define FN_PAST(A)                                                                                \
    case A:                                                                                       \
        if (e) fn_step_past_of(x, y, e, n, hi, r, shift, ahead, 1, A);                            \
        else fn_step_past_of(x, y, e, n, hi, r, shift, ahead, 0, A);                              \
        return;
static inline void fn_step_past(const float *x, float *y, const float *e, ptrdiff_t n, float hi,
                                float r, float shift, ptrdiff_t ahead, int activation) {
    switch (activation) { FN_PAST(0) FN_PAST(1) FN_PAST(2) FN_PAST(3) FN_PAST(4) FN_PAST(5) }
}
#define FN_ROWS_PAST(A)                                                                           \
    case A:                                                                                       \
        if (e)                                                                                    \
            fn_step_rows_past_of(x, x_step, y, y_step, e, e_step, rows, n, hi, r, shift, ahead, 1,\
                                 A);                                                              \
        else                                                                                      \
            fn_step_rows_past_of(x, x_step, y, y_step, e, e_step, rows, n, hi, r, shift, ahead, 0,\
                                 A);                                                              \
        return;
static inline void fn_step_rows_past(const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step,
                                     const float *e, ptrdiff_t e_step, ptrdiff_t rows, ptrdiff_t n,
                                     const float *hi, const float *r, const float *shift,
                                     ptrdiff_t ahead, int activation) {
    switch (activation) {
        FN_ROWS_PAST(0) FN_ROWS_PAST(1) FN_ROWS_PAST(2)
        FN_ROWS_PAST(3) FN_ROWS_PAST(4) FN_ROWS_PAST(5)
    }
}
static inline void fn_step_float(const float *x, float *y, ptrdiff_t n, const float *hi,
                                 const float *r, const float *shift, const float *w,
                                 const float *b, const float *e, int col, int wv, int bv,
                                 int activation) {
    static const float one = 1.0f, nothing = 0.0f, minus_nothing = -0.0f;
    float kept[256];
    if (!col && wv && bv) FN_ACTIVE_STEPS(0, 1, 1, 1)
    if (!col && wv) FN_ACTIVE_STEPS(0, 1, 1, 0)
    if (!e && !activation) {
        fn_step_plain_float(x, y, n, hi, r, shift, w, b, col, wv, bv);
        return;
    }
    /* in two loops: y may be the residual, whose numbers are kept */
    for (ptrdiff_t i = 0; i < n; i += 256) {
        const ptrdiff_t m = n - i < 256 ? n - i : 256, c = col ? i : 0;
        if (e) memcpy(kept, e + i, (size_t)m * sizeof(float));
        fn_step_plain_float(x + i, y + i, m, hi + c, r + c, shift + c, w && wv ? w + i : w,
                            b && bv ? b + i : b, col, wv, bv);
        /* (y - 0) 1 + -0 is y, to the sign of a zero */
        fn_step_folded(y + i, y + i, m, &nothing, &one, &minus_nothing, e ? kept : NULL, 0,
                       activation);
    }
}

FN_INLINE void fn_step_of_bf16(const uint16_t *x, uint16_t *y, ptrdiff_t n, float hi, float r,
                               float shift, const float *w, const float *b, int wv, int bv) {
    FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
        float t = fn_fma32(fn_from_bf16(x[i]) - hi, r, shift);
        if (wv) t = fn_fma32(t, w[i], bv ? b[i] : 0.0f);
        y[i] = fn_made_bf16(t);
    }
}
static inline void fn_step_bf16(const uint16_t *x, uint16_t *y, ptrdiff_t n, float hi, float r,
                                float shift, const float *w, const float *b) {
    if (w && b) fn_step_of_bf16(x, y, n, hi, r, shift, w, b, 1, 1);
    else if (w) fn_step_of_bf16(x, y, n, hi, r, shift, w, b, 1, 0);
    else fn_step_of_bf16(x, y, n, hi, r, shift, w, b, 0, 0);
}
#define FN_AFTER(real, fma)                                                                       \
    static inline void fn_affine_##real(real *y, ptrdiff_t n, const real *w, int wv,              \
                                        const real *b, int bv) {                                  \
        for (ptrdiff_t i = 0; i < n; i++) y[i] = fma(y[i], w[wv ? i : 0], b[bv ? i : 0]);         \
    }                                                                                             \
    static inline void fn_add_##real(const real *x, const real *e, real *y, ptrdiff_t n) {        \
        for (ptrdiff_t from = 0; from < n; from += 128) {                                         \
            const ptrdiff_t to = n - from < 128 ? n : from + 128;                                 \
            for (ptrdiff_t i = from; i < to; i += 64 / (ptrdiff_t)sizeof(real)) {                 \
                FN_FETCH((const char *)(x + i) + 4096);                                           \
                FN_FETCH((const char *)(e + i) + 4096);                                           \
            }                                                                                     \
            FN_IVDEP for (ptrdiff_t i = from; i < to; i++) y[i] = x[i] + e[i];                    \
        }                                                                                         \
    }
FN_AFTER(float, fn_fma32)
FN_AFTER(double, fn_fma64)

/* hi, r and shift of the columns of n groups, each of k neighbours; weights, one a column, are folded
 * into r and shift.  What leaves the range of a float, beyond 2^100 either way, or its precision, is
 * `wide`; returns whether any does. */
FN_INLINE int fn_spread_over(ptrdiff_t k, double mean, double rest, double rstd, const float *w,
                             ptrdiff_t w_step, const float *b, ptrdiff_t b_step, float *hi,
                             float *r, float *shift, uint8_t *wide) {
    const float h = (float)mean;
    const double lo = (mean - (double)h) + rest, size = fabs(rstd);
    const int fits = ((size > 7.9e-31) & (size < 1.3e30) & (fabs(mean) < 1.3e30)) | (size == 0);
    int any = 0;
    for (ptrdiff_t i = 0; i < k; i++) {
        const double weight = w ? (double)w[i * w_step] : 1.0, rw = rstd * weight;
        const int out = !(fits & (((fabs(rw) > 7.9e-31) & (fabs(rw) < 1.3e30)) | (weight == 0) |
                                  (size == 0)));
        hi[i] = h;
        r[i] = (float)rw;
        shift[i] = (float)((b ? (double)b[i * b_step] : 0.0) - lo * rw);
        wide[i] = (uint8_t)out;
        any |= out;
    }
    return any;
}
static inline int fn_spread(ptrdiff_t n, ptrdiff_t k, const double *FN_RESTRICT mean,
                            const double *FN_RESTRICT rest, const double *FN_RESTRICT rstd,
                            const float *w, ptrdiff_t w_step, const float *b, ptrdiff_t b_step,
                            float *FN_RESTRICT hi, float *FN_RESTRICT r, float *FN_RESTRICT shift,
                            uint8_t *FN_RESTRICT wide) {
    int any = 0;
    for (ptrdiff_t g = 0; g < n; g++)
        any |= fn_spread_over(k, mean[g], rest[g], rstd[g], w ? w + g * k * w_step : NULL, w_step,
                              b ? b + g * k * b_step : NULL, b_step, hi + g * k, r + g * k,
                              shift + g * k, wide + g * k);
    return any;
}

#endif
