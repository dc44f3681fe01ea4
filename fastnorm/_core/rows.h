/* Rows, from their sums to their step. */
#ifndef FASTNORM_ROWS_H
#define FASTNORM_ROWS_H

#include "steps.h"
#include "sums.h"

/* ---- rows ---------------------------------------------------------------------------------
 * Rows of n numbers, from their sums to their step, with nothing beside the weights: along the row, one
 * for each row, or none.  Short rows are stepped after the sums of the next, which hide how long a
 * quotient and a root take; of long ones the cache would have lost the beginning by then.  Where there
 * is `e`, the rows are those of x + e, which go to `total`, and by way of a tile past the caches.
 * Returns the number of rows done: the next one has a scale that its type can not hold.  The arithmetic
 * is that of bundles, finish and step. */
#define FN_SHORT_ROW 2048
typedef struct {
    const char *x, *e;
    char *y, *total, *tile;
    const char *w, *b;
    double *mean, *var, *rstd; /* where they go, or NULL */
    ptrdiff_t x_step, y_step, e_step, total_step, w_step, b_step, stat_step, ahead; /* in bytes */
    double eps;
    int norm;   /* scaled by the root of the sum of squares, not of their mean */
    int stream; /* y and total are written past the caches */
} fn_rows;
#define FN_AT(type, p, bytes) ((type *)((uintptr_t)(p) + (uintptr_t)(bytes)))

/* Several lines at a time where a fused multiply-add is several operations (numbers.h): gcc 12 unrolls
 * a loop of one line, packs its elements into vectors and loses the rounding between two of them. */
#define FN_STREAMED(real) ((FN_HAS_FMA ? 64 : 512) / (int)sizeof(real))
#define FN_STREAMED_STEP(real, fma)                                                               \
    FN_INLINE void fn_step_past_##real(const real *x, real *y, ptrdiff_t n, real hi, real r,      \
                                       real shift, const real *w, const real *b, int wv, int bv,  \
                                       ptrdiff_t ahead) {                                         \
        enum { LINE = 64 / sizeof(real), M = FN_STREAMED(real) };                                 \
        const real w0 = w ? w[0] : 1, b0 = b ? b[0] : 0;                                          \
        ptrdiff_t i = (ptrdiff_t)((0 - (uintptr_t)y) % 64 / sizeof(real));                        \
        if (i > n) i = n;                                                                         \
        fn_step_to_##real(x, y, i, &hi, &r, &shift, w, b, 0, w || b, wv, bv);                     \
        for (; i + M <= n; i += M) {                                                              \
            real t[M];                                                                            \
            for (int j = 0; j < M; j += LINE) FN_FETCH((const char *)(x + i + j) + ahead);        \
            for (int j = 0; j < M; j++) {                                                         \
                t[j] = fma(x[i + j] - hi, r, shift);                                              \
                if (w || b) t[j] = fma(t[j], wv ? w[i + j] : w0, bv ? b[i + j] : b0);             \
            }                                                                                     \
            for (int j = 0; j < M; j += LINE) fn_stream_line(y + i + j, t + j);                   \
        }                                                                                         \
        fn_step_to_##real(x + i, y + i, n - i, &hi, &r, &shift, w && wv ? w + i : w,              \
                          b && bv ? b + i : b, 0, w || b, wv, bv);                                \
    }
FN_STREAMED_STEP(float, fn_fma32)
FN_STREAMED_STEP(double, fn_fma64)

FN_INLINE double fn_norm_scale(double squares, double eps) {
    if (sqrt(squares) < eps) return 1.0 / eps;
    return squares != 0.0 ? fn_inverse_root(squares, 0.0) : 0.0;
}
FN_INLINE void fn_put_statistics(const fn_rows *q, ptrdiff_t i, double mean, double var,
                                 double rstd) {
    if (!q->mean) return;
    *FN_AT(double, q->mean, i * q->stat_step) = mean;
    *FN_AT(double, q->var, i * q->stat_step) = var;
    *FN_AT(double, q->rstd, i * q->stat_step) = rstd;
}
FN_INLINE void fn_step_row_float(const fn_rows *q, const float *x, ptrdiff_t i, ptrdiff_t n,
                                 float hi, float r, float shift, int along, int biased) {
    const float *w = along ? (const float *)q->w : NULL;
    const float *b = along && biased ? (const float *)q->b : NULL;
    float *y = FN_AT(float, q->y, i * q->y_step);
    /* a long row is stepped at once, and the next one then lies further off than `ahead` */
    if (q->stream)
        fn_step_past_float(x, y, n, hi, r, shift, w, b, along, along && biased,
                           n < FN_SHORT_ROW ? 0 : q->x_step);
    else fn_step_to_float(x, y, n, &hi, &r, &shift, w, b, 0, along, along, along && biased);
}
FN_INLINE void fn_step_row_bf16(const fn_rows *q, const uint16_t *x, ptrdiff_t i, ptrdiff_t n,
                                float hi, float r, float shift, int along, int biased) {
    fn_step_of_bf16(x, FN_AT(uint16_t, q->y, i * q->y_step), n, hi, r, shift, (const float *)q->w,
                    (const float *)q->b, along, along && biased);
}
FN_INLINE const float *fn_source_float(const fn_rows *q, ptrdiff_t i, ptrdiff_t n) {
    const float *x = FN_AT(const float, q->x, i * q->x_step);
    if (!q->e) return x;
    float *total = FN_AT(float, q->total, i * q->total_step);
    float *t = q->stream ? (float *)q->tile + (i & 1) * n : total;
    fn_add_float(x, FN_AT(const float, q->e, i * q->e_step), t, n);
    if (q->stream) fn_stream((char *)total, (const char *)t, (size_t)n * sizeof(float));
    return t;
}
FN_INLINE const uint16_t *fn_source_bf16(const fn_rows *q, ptrdiff_t i, ptrdiff_t n) {
    (void)n;
    return FN_AT(const uint16_t, q->x, i * q->x_step);
}
#define FN_SUMS_OF_float fn_sums
#define FN_SUMS_OF_bf16 fn_sums_bf16
#define FN_SUMS_ABOUT_OF_float fn_sums_about
#define FN_SUMS_ABOUT_OF_bf16 fn_sums_about_bf16
#define FN_SQUARES_OF_float fn_squares
#define FN_SQUARES_OF_bf16 fn_squares_bf16
#define FN_ROWS_OF(name, type)                                                                    \
    FN_INLINE ptrdiff_t fn_rows_of_##name(const fn_rows *q, ptrdiff_t rows, ptrdiff_t n,          \
                                          int along, int biased, int centred) {                   \
        const double count = (double)n;                                                           \
        const int late = n < FN_SHORT_ROW;                                                        \
        const type *before = NULL;                                                                \
        float hi = 0, r = 0, shift = 0;                                                           \
        uint8_t wide;                                                                             \
        ptrdiff_t i = 0;                                                                          \
        for (; i < rows; i++) {                                                                   \
            const type *x = fn_source_##name(q, i, n);                                            \
            double first = 0, second, m[5] = {count, 0, 0, 0, 0};                                 \
            if (centred) FN_SUMS_OF_##name(x, n, q->ahead, &first, &second);                      \
            else second = FN_SQUARES_OF_##name(x, n, q->ahead);                                   \
            if (late && i) fn_step_row_##name(q, before, i - 1, n, hi, r, shift, along, biased);  \
            if (!centred) {                                                                       \
                m[3] = second;                                                                    \
            } else if (fn_moments_of_sum(first, second, 0.0, m, 1) && isfinite(m[1])) {           \
                const double pivot = (float)m[1];                                                 \
                FN_SUMS_ABOUT_OF_##name(x, n, 0, pivot, &first, &second);                         \
                fn_moments_of_sum(first, second, pivot, m, 1);                                    \
            }                                                                                     \
            const double var = m[3] / count;                                                      \
            const double rstd = q->norm ? fn_norm_scale(m[3], q->eps) : fn_rstd(var, q->eps);     \
            fn_put_statistics(q, i, m[1], var, rstd);                                             \
            if (fn_spread_over(                                                                   \
                    1, m[1], m[2], rstd,                                                          \
                    along || !q->w ? NULL : FN_AT(const float, q->w, i * q->w_step), 0,           \
                    along || !q->b ? NULL : FN_AT(const float, q->b, i * q->b_step), 0, &hi, &r,  \
                    &shift, &wide))                                                               \
                return i;                                                                         \
            if (!late) fn_step_row_##name(q, x, i, n, hi, r, shift, along, biased);               \
            before = x;                                                                           \
        }                                                                                         \
        if (late && i) fn_step_row_##name(q, before, i - 1, n, hi, r, shift, along, biased);      \
        return i;                                                                                 \
    }                                                                                             \
    static ptrdiff_t fn_norm_rows_##name(const fn_rows *q, ptrdiff_t rows, ptrdiff_t n,           \
                                         int along, int centred) {                                \
        if (along && q->b)                                                                        \
            return centred ? fn_rows_of_##name(q, rows, n, 1, 1, 1)                               \
                           : fn_rows_of_##name(q, rows, n, 1, 1, 0);                              \
        if (along)                                                                                \
            return centred ? fn_rows_of_##name(q, rows, n, 1, 0, 1)                               \
                           : fn_rows_of_##name(q, rows, n, 1, 0, 0);                              \
        return centred ? fn_rows_of_##name(q, rows, n, 0, 0, 1)                                   \
                       : fn_rows_of_##name(q, rows, n, 0, 0, 0);                                  \
    }
FN_ROWS_OF(float, float)
FN_ROWS_OF(bf16, uint16_t)

/* Doubles: twice over the row, about its first number for a mean and about that for the squares. */
static ptrdiff_t fn_norm_rows_double(const fn_rows *q, ptrdiff_t rows, ptrdiff_t n, int along,
                                     int centred) {
    const double count = (double)n;
    for (ptrdiff_t i = 0; i < rows; i++) {
        const double *x = FN_AT(const double, q->x, i * q->x_step);
        const double *w = q->w ? FN_AT(const double, q->w, i * q->w_step) : NULL;
        const double *b = q->b ? FN_AT(const double, q->b, i * q->b_step) : NULL;
        double *y = FN_AT(double, q->y, i * q->y_step);
        double mean = 0, rest = 0, first, m2, m2_rest;
        if (centred) mean = x[0] + fn_deviations(x, n, 0, x[0]) / count;
        fn_about(x, n, q->stream ? 0 : q->ahead, mean, &first, &m2, &m2_rest);
        if (centred) {
            rest = first / count;
            m2_rest -= first * rest;
        }
        const double var = m2 / count, v = q->norm ? m2 : var + q->eps;
        if (!(v > 1e-270 && v < 1e270)) return i;
        const double var_rest = (fma(-var, count, m2) + m2_rest) / count + ((var - v) + q->eps);
        double rstd = q->norm ? fn_inverse_root(m2, m2_rest) : fn_inverse_root(v, var_rest);
        if (q->norm && sqrt(m2) < q->eps) rstd = 1.0 / q->eps;
        fn_put_statistics(q, i, mean, var, rstd);
        const double shift = -rest * rstd;
        if (q->stream && along && b)
            fn_step_past_double(x, y, n, mean, rstd, shift, w, b, 1, 1, q->x_step);
        else if (q->stream && along)
            fn_step_past_double(x, y, n, mean, rstd, shift, w, NULL, 1, 0, q->x_step);
        else if (q->stream)
            fn_step_past_double(x, y, n, mean, rstd, shift, w, b, 0, 0, q->x_step);
        else fn_step_plain_double(x, y, n, &mean, &rstd, &shift, w, b, 0, along, along && b);
    }
    return rows;
}

#endif
