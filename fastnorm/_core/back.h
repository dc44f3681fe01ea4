/* The backward pass. */
#ifndef FASTNORM_BACK_H
#define FASTNORM_BACK_H

#include "steps.h"
#include "sums.h"

/* ---- the backward pass --------------------------------------------------------------------
 * Two sums over dy and dy (x - mean), and the step that uses them,
 *     dx = r g - c1 - xhat c2,   g = dy weight,   xhat = (x - hi) r + shift,
 * with c1 and c2 the sums of g and g xhat over the group, times r over the count.
 * FN_PAIRS partial sums side by side fix the order of a sum, whatever the vector's width: two sums
 * of eight AVX2 registers in all, as many as two multiply-add units of four cycles keep busy. */

/* Of several neighbouring groups, steps of so many bytes apart, a plane or row of n numbers each: their
 * sums lie in `lanes`, first and second of a group side by side, from one plane to the next. */
#define FN_PLANES_OF(type)                                                                        \
    const type *x, ptrdiff_t x_step, const type *dy, ptrdiff_t dy_step, ptrdiff_t planes,         \
        ptrdiff_t n, ptrdiff_t ahead
#define FN_NEXT(type, x, bytes) x = (type *)((uintptr_t)x + (uintptr_t)(bytes))
#define FN_EACH_PLANE(type)                                                                       \
    for (ptrdiff_t k = 0; k < planes; k++, FN_NEXT(const type, x, x_step),                        \
                   FN_NEXT(const type, dy, dy_step), lanes += 2 * FN_PAIRS)
#define FN_FETCH_BOTH(m)                                                                          \
    for (int j = 0; j < (m); j += 64 / (int)sizeof *x) {                                          \
        FN_FETCH((const char *)(x + i + j) + ahead);                                              \
        FN_FETCH((const char *)(dy + i + j) + ahead);                                             \
    }
#define FN_SUM_PAIR(type, G, D)                                                                   \
    FN_EACH_PLANE(type) {                                                                         \
        const double mean = means[k], rstd = rstds[k];                                            \
        double *FN_RESTRICT first = lanes, *FN_RESTRICT second = lanes + FN_PAIRS;                \
        double a[FN_PAIRS], b[FN_PAIRS];                                                          \
        ptrdiff_t i = 0;                                                                          \
        (void)rstd;                                                                               \
        for (int j = 0; j < FN_PAIRS; j++) a[j] = first[j], b[j] = second[j];                     \
        for (; i + FN_PAIRS <= n; i += FN_PAIRS) {                                                \
            FN_FETCH_BOTH(FN_PAIRS)                                                               \
            for (int j = 0; j < FN_PAIRS; j++) {                                                  \
                const double g = G(i + j), d = D(i + j);                                          \
                a[j] += g;                                                                        \
                b[j] = fn_mac64(g, d, b[j]);                                                      \
            }                                                                                     \
        }                                                                                         \
        for (int j = 0; j < FN_PAIRS; j++) first[j] = a[j], second[j] = b[j];                     \
        for (int j = 0; i < n; i++, j++) {                                                        \
            const double g = G(i);                                                                \
            first[j] += g;                                                                        \
            second[j] = fn_mac64(g, D(i), second[j]);                                             \
        }                                                                                         \
    }
static inline void fn_add_lanes(const double *lanes, ptrdiff_t planes, double *first, double *second) {
    for (ptrdiff_t k = 0; k < planes; k++, lanes += 2 * FN_PAIRS) {
        first[k] += fn_added_up(lanes);
        second[k] += fn_added_up(lanes + FN_PAIRS);
    }
}

/* One row of columns, or four: a column's sums take four rows at a time. */
#define FN_SUM_ROWS(G, D)                                                                         \
    {                                                                                             \
        for (; rows >= 4; rows -= 4, x += 4 * x_step, dy += 4 * dy_step)                          \
            FN_IVDEP for (ptrdiff_t c = 0; c < n; c++) {                                          \
                const double g0 = G(0), g1 = G(1), g2 = G(2), g3 = G(3);                          \
                a[c] += (g0 + g1) + (g2 + g3);                                                    \
                b[c] += fn_mac64(g0, D(0), g1 * D(1)) + fn_mac64(g2, D(2), g3 * D(3));            \
            }                                                                                     \
        for (; rows > 0; rows--, x += x_step, dy += dy_step)                                      \
            FN_IVDEP for (ptrdiff_t c = 0; c < n; c++) {                                          \
                a[c] += G(0);                                                                     \
                b[c] = fn_mac64(G(0), D(0), b[c]);                                                \
            }                                                                                     \
    }

#define FN_XHAT(real, fma, X, HI, R, SHIFT) const real xhat = fma((X) - HI, R, SHIFT)

/* What each element adds to the gradients of a weight and a bias of its own. `rows` of equal
 * length share these; their float terms are added up first, which touches the sums less often. */
#define FN_COLLECT(name, type, real, fma, FROM, TO)                                               \
    static inline void fn_back_collect_##name(const type *const *x, const type *const *dy,        \
                                              type *const *dx, const real *s, ptrdiff_t n,        \
                                              int rows, const real *FN_RESTRICT w,                \
                                              double *FN_RESTRICT gw, double *FN_RESTRICT gb) {   \
        if (rows == 4) {                                                                          \
            /* the next four rows are asked for while these are written; of bfloat16 also         \
             * where they go, 1.5 to 1.25 ms for 4096x768 (floats of that size go past the caches) */\
            const ptrdiff_t ahead = 4 * ((const char *)x[1] - (const char *)x[0]);                \
            const ptrdiff_t ahead_to = 4 * ((char *)dx[1] - (char *)dx[0]);                       \
            const type *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];                            \
            const type *d0 = dy[0], *d1 = dy[1], *d2 = dy[2], *d3 = dy[3];                        \
            type *y0 = dx[0], *y1 = dx[1], *y2 = dx[2], *y3 = dx[3];                              \
            for (ptrdiff_t from = 0; from < n; from += 128) {                                     \
            const ptrdiff_t to = n - from < 128 ? n : from + 128;                                 \
            for (ptrdiff_t i = from; i < to; i += 64 / (ptrdiff_t)sizeof *x0)                     \
                for (int k = 0; k < 4; k++) {                                                     \
                    FN_FETCH((const char *)(x[k] + i) + ahead);                                   \
                    FN_FETCH((const char *)(dy[k] + i) + ahead);                                  \
                    if (sizeof(type) == 2) FN_FETCH_TO((char *)(dx[k] + i) + ahead_to);           \
                }                                                                                 \
            FN_IVDEP for (ptrdiff_t i = from; i < to; i++) {                                      \
                const real t0 = FROM(d0[i]), t1 = FROM(d1[i]), v = w[i];                          \
                const real t2 = FROM(d2[i]), t3 = FROM(d3[i]);                                    \
                const real h0 = fma(FROM(x0[i]) - s[0], s[1], s[2]);                              \
                const real h1 = fma(FROM(x1[i]) - s[5], s[6], s[7]);                              \
                const real h2 = fma(FROM(x2[i]) - s[10], s[11], s[12]);                           \
                const real h3 = fma(FROM(x3[i]) - s[15], s[16], s[17]);                           \
                y0[i] = TO(fma(-h0, s[4], fma(t0, v * s[1], -s[3])));                             \
                y1[i] = TO(fma(-h1, s[9], fma(t1, v * s[6], -s[8])));                             \
                y2[i] = TO(fma(-h2, s[14], fma(t2, v * s[11], -s[13])));                          \
                y3[i] = TO(fma(-h3, s[19], fma(t3, v * s[16], -s[18])));                          \
                gw[i] += (double)(fma(t0, h0, t1 * h1) + fma(t2, h2, t3 * h3));                   \
                gb[i] += (double)((t0 + t1) + (t2 + t3));                                         \
            }                                                                                     \
            }                                                                                     \
            return;                                                                               \
        }                                                                                         \
        for (int k = 0; k < rows; k++, s += 5) {                                                  \
            const type *xk = x[k], *dk = dy[k];                                                   \
            type *yk = dx[k];                                                                     \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {                                          \
                const real t = FROM(dk[i]), h = fma(FROM(xk[i]) - s[0], s[1], s[2]);              \
                yk[i] = TO(fma(-h, s[4], fma(t, w[i] * s[1], -s[3])));                            \
                gw[i] += (double)(t * h);                                                         \
                gb[i] += (double)t;                                                               \
            }                                                                                     \
        }                                                                                         \
    }

#define FN_AS_IT_IS(v) (v)
/* Planes of neighbouring groups, each with one statistic and one weight; wr = weight rstd. */
#define FN_BACK_PLANES(name, type, real, fma, FROM, TO)                                           \
    static inline void fn_back_planes_##name(FN_PLANES_OF(type), type *dx,                        \
                                             ptrdiff_t dx_step, const real *his, const real *rs,  \
                                             const real *shifts, const real *wrs,                 \
                                             const real *c1s, const real *c2s) {                  \
        for (ptrdiff_t k = 0; k < planes; k++, FN_NEXT(const type, x, x_step),                    \
                       FN_NEXT(const type, dy, dy_step), FN_NEXT(type, dx, dx_step)) {            \
            const real hi = his[k], r = rs[k], shift = shifts[k];                                 \
            const real wr = wrs[k], c1 = c1s[k], c2 = c2s[k];                                     \
            if (ahead)                                                                            \
                for (ptrdiff_t i = 0; i < n; i += 64 / (ptrdiff_t)sizeof *x) {                    \
                    FN_FETCH((const char *)(x + i) + ahead);                                      \
                    FN_FETCH((const char *)(dy + i) + ahead);                                     \
                    FN_FETCH((const char *)(dx + i) + ahead);                                     \
                }                                                                                 \
            FN_FROM_A_LINE(dx, n, from, to)                                                       \
            FN_IVDEP for (ptrdiff_t i = from; i < to; i++) {                                      \
                FN_XHAT(real, fma, FROM(x[i]), hi, r, shift);                                     \
                dx[i] = TO(fma(-xhat, c2, fma(FROM(dy[i]), wr, -c1)));                            \
            }                                                                                     \
        }                                                                                         \
    }
FN_BACK_PLANES(float, float, float, fn_fma32, FN_AS_IT_IS, FN_AS_IT_IS)
FN_BACK_PLANES(bf16, uint16_t, float, fn_fma32, fn_from_bf16, fn_made_bf16)
FN_BACK_PLANES(double, double, double, fn_fma64, FN_AS_IT_IS, FN_AS_IT_IS)

/* Four rows of columns, asked for in advance. */
#define FN_FETCH_ROWS                                                                             \
    for (int k = 0; k < 4; k++)                                                                   \
        for (ptrdiff_t c = 0; c < n; c += 64 / (ptrdiff_t)sizeof *x) {                            \
            FN_FETCH((const char *)(x + k * x_step + c) + 4096);                                  \
            FN_FETCH((const char *)(dy + k * dy_step + c) + 4096);                                \
        }
#define FN_BACK_ROW(fma, k)                                                                       \
    dx[(k) * dx_step + i] = fma(-fma(x[(k) * x_step + i] - h, v, d), e,                           \
                                fma(dy[(k) * dy_step + i], u, -c));
#define FN_BACK(real, fma)                                                                        \
    /* statistics for each column of some rows, four at a time */                                 \
    static inline void fn_back_rows_##real(                                                       \
        const real *x, ptrdiff_t x_step, const real *dy, ptrdiff_t dy_step, real *dx,             \
        ptrdiff_t dx_step, ptrdiff_t rows, ptrdiff_t n, const real *hi, const real *r,            \
        const real *shift, const real *wr, const real *c1, const real *c2) {                      \
        for (; rows >= 4; rows -= 4) {                                                            \
            FN_FETCH_ROWS                                                                         \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {                                          \
                const real h = hi[i], v = r[i], d = shift[i], u = wr[i], c = c1[i], e = c2[i];    \
                FN_BACK_ROW(fma, 0) FN_BACK_ROW(fma, 1) FN_BACK_ROW(fma, 2) FN_BACK_ROW(fma, 3)   \
            }                                                                                     \
            x += 4 * x_step;                                                                      \
            dy += 4 * dy_step;                                                                    \
            dx += 4 * dx_step;                                                                    \
        }                                                                                         \
        for (; rows > 0; rows--, x += x_step, dy += dy_step, dx += dx_step)                       \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {                                          \
                const real h = hi[i], v = r[i], d = shift[i], u = wr[i], c = c1[i], e = c2[i];    \
                FN_BACK_ROW(fma, 0)                                                               \
            }                                                                                     \
    }                                                                                             \
    /* the same where the weight is the row's (`wv` 0) or each element's own (1) */               \
    static inline void fn_back_row_collect_##real(                                                \
        const real *x, const real *dy, real *dx, ptrdiff_t n, const real *hi, const real *r,      \
        const real *shift, const real *c1, const real *c2, const real *w, int wv,                 \
        double *FN_RESTRICT gw, double *FN_RESTRICT gb) {                                         \
        if (wv) {                                                                                 \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {                                          \
                const real t = dy[i];                                                             \
                FN_XHAT(real, fma, x[i], hi[i], r[i], shift[i]);                                  \
                dx[i] = fma(-xhat, c2[i], fma(t, w[i] * r[i], -c1[i]));                           \
                gw[i] += (double)(t * xhat);                                                      \
                gb[i] += (double)t;                                                               \
            }                                                                                     \
            return;                                                                               \
        }                                                                                         \
        const real v = w[0];                                                                      \
        double a[FN_PAIRS] = {0}, b[FN_PAIRS] = {0}, rest_a = 0, rest_b = 0;                      \
        ptrdiff_t i = 0;                                                                          \
        for (; i + FN_PAIRS <= n; i += FN_PAIRS)                                                  \
            FN_IVDEP for (int j = 0; j < FN_PAIRS; j++) {                                         \
                const real t = dy[i + j];                                                         \
                FN_XHAT(real, fma, x[i + j], hi[i + j], r[i + j], shift[i + j]);                  \
                dx[i + j] = fma(-xhat, c2[i + j], fma(t, v * r[i + j], -c1[i + j]));              \
                a[j] += (double)t;                                                                \
                b[j] += (double)(t * xhat);                                                       \
            }                                                                                     \
        for (; i < n; i++) {                                                                      \
            const real t = dy[i];                                                                 \
            FN_XHAT(real, fma, x[i], hi[i], r[i], shift[i]);                                      \
            dx[i] = fma(-xhat, c2[i], fma(t, v * r[i], -c1[i]));                                  \
            rest_a += (double)t;                                                                  \
            rest_b += (double)(t * xhat);                                                         \
        }                                                                                         \
        gb[0] += fn_added_up(a) + rest_a;                                                         \
        gw[0] += fn_added_up(b) + rest_b;                                                         \
    }
FN_BACK(float, fn_fma32)
FN_BACK(double, fn_fma64)
FN_COLLECT(float, float, float, fn_fma32, FN_AS_IT_IS, FN_AS_IT_IS)
FN_COLLECT(bf16, uint16_t, float, fn_fma32, fn_from_bf16, fn_made_bf16)
FN_COLLECT(double, double, double, fn_fma64, FN_AS_IT_IS, FN_AS_IT_IS)

/* bfloat16 is converted 64 at a time: beside doubles, gcc would take half of the vector. */
#define FN_TAKE_FLOAT(t, from, m) const float *t = (from);
#define FN_TAKE_BF16(t, from, m)                                                                  \
    float t[m];                                                                                   \
    for (int j = 0; j < (m); j++) t[j] = fn_from_bf16((from)[j]);
/* The sums of g and g xhat for floats whose xhat a float can hold.  Four terms are added up in float
 * before they go into a double lane: each sum is then within 2^-24 of the size of its terms over the
 * square root of their number, and half of the conversions, which cost more than the arithmetic, are
 * three quarters fewer. */
#define FN_TERMS(k)                                                                               \
    const float t##k = td[j + 16 * k] * (wv ? w[i + j + 16 * k] : 1.0f);                          \
    const float h##k = fn_fma32(tx[j + 16 * k] - hi, r, shift);
#define FN_PAIR_PLANES(name, type, TAKE)                                                          \
    FN_INLINE void fn_pair_planes_of_##name(FN_PLANES_OF(type), const float *his,                 \
                                            const float *rs, const float *shifts, const float *w, \
                                            int wv, double *lanes) {                              \
        FN_EACH_PLANE(type) {                                                                     \
            const float hi = his[k], r = rs[k], shift = shifts[k];                                \
            double *FN_RESTRICT first = lanes, *FN_RESTRICT second = lanes + FN_PAIRS;            \
            double a[FN_PAIRS], b[FN_PAIRS];                                                      \
            ptrdiff_t i = 0;                                                                      \
            for (int j = 0; j < FN_PAIRS; j++) a[j] = first[j], b[j] = second[j];                 \
            for (; i + 64 <= n; i += 64) {                                                        \
                TAKE(tx, x + i, 64) TAKE(td, dy + i, 64)                                          \
                FN_FETCH_BOTH(64)                                                                 \
                for (int j = 0; j < FN_PAIRS; j++) {                                              \
                    FN_TERMS(0) FN_TERMS(1) FN_TERMS(2) FN_TERMS(3)                               \
                    a[j] += (double)((t0 + t1) + (t2 + t3));                                      \
                    b[j] += (double)(fn_fma32(t0, h0, t1 * h1) + fn_fma32(t2, h2, t3 * h3));      \
                }                                                                                 \
            }                                                                                     \
            for (; i + FN_PAIRS <= n; i += FN_PAIRS) {                                            \
                TAKE(tx, x + i, FN_PAIRS) TAKE(td, dy + i, FN_PAIRS)                              \
                for (int j = 0; j < FN_PAIRS; j++) {                                              \
                    FN_TERMS(0)                                                                   \
                    a[j] += (double)t0;                                                           \
                    b[j] += (double)(t0 * h0);                                                    \
                }                                                                                 \
            }                                                                                     \
            for (int j = 0; j < FN_PAIRS; j++) first[j] = a[j], second[j] = b[j];                 \
            for (ptrdiff_t c = 0; i < n; i++, c++) {                                              \
                const int j = 0;                                                                  \
                TAKE(tx, x + i, 1) TAKE(td, dy + i, 1)                                            \
                FN_TERMS(0)                                                                       \
                first[c] += (double)t0;                                                           \
                second[c] += (double)(t0 * h0);                                                   \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
    static inline void fn_pair_planes_##name(FN_PLANES_OF(type),                                  \
                                             const float *hi, const float *r, const float *shift, \
                                             const float *w, double *lanes) {                     \
        if (w)                                                                                    \
            fn_pair_planes_of_##name(x, x_step, dy, dy_step, planes, n, ahead, hi, r, shift, w, 1,\
                                     lanes);                                                      \
        else                                                                                      \
            fn_pair_planes_of_##name(x, x_step, dy, dy_step, planes, n, ahead, hi, r, shift, w, 0,\
                                     lanes);                                                      \
    }
FN_PAIR_PLANES(float, float, FN_TAKE_FLOAT)
FN_PAIR_PLANES(bf16, uint16_t, FN_TAKE_BF16)
#undef FN_TERMS
#define FN_TERMS(k)                                                                               \
    const float t##k = dy[k * dy_step + c] * (wv == 2 ? w[c] : wv ? w0 : 1.0f);                   \
    const float h##k = fn_fma32(x[k * x_step + c] - hi[c], r[c], shift[c]);
FN_INLINE void fn_pair_rows_of(const float *FN_RESTRICT x, ptrdiff_t x_step,
                               const float *FN_RESTRICT dy, ptrdiff_t dy_step, ptrdiff_t rows,
                               ptrdiff_t n, const float *FN_RESTRICT hi,
                               const float *FN_RESTRICT r, const float *FN_RESTRICT shift,
                               const float *FN_RESTRICT w, int wv, double *FN_RESTRICT a,
                               double *FN_RESTRICT b) {
    const float w0 = wv == 1 ? w[0] : 1.0f;
    for (; rows >= 4; rows -= 4, x += 4 * x_step, dy += 4 * dy_step) {
        FN_FETCH_ROWS
        for (ptrdiff_t c = 0; c < n; c++) {
            FN_TERMS(0) FN_TERMS(1) FN_TERMS(2) FN_TERMS(3)
            a[c] += (double)((t0 + t1) + (t2 + t3));
            b[c] += (double)(fn_fma32(t0, h0, t1 * h1) + fn_fma32(t2, h2, t3 * h3));
        }
    }
    for (; rows > 0; rows--, x += x_step, dy += dy_step)
        for (ptrdiff_t c = 0; c < n; c++) {
            FN_TERMS(0)
            a[c] += (double)t0;
            b[c] += (double)(t0 * h0);
        }
}
#undef FN_TERMS
static inline void fn_pair_rows(const float *x, ptrdiff_t x_step, const float *dy,
                                ptrdiff_t dy_step, ptrdiff_t rows, ptrdiff_t n, const float *hi,
                                const float *r, const float *shift, const float *w, int wv,
                                double *a, double *b) {
    if (!w) fn_pair_rows_of(x, x_step, dy, dy_step, rows, n, hi, r, shift, w, 0, a, b);
    else if (!wv) fn_pair_rows_of(x, x_step, dy, dy_step, rows, n, hi, r, shift, w, 1, a, b);
    else fn_pair_rows_of(x, x_step, dy, dy_step, rows, n, hi, r, shift, w, 2, a, b);
}

/* The sums.  Of floats: g and x - mean are exact in double, or nearly, and `rstd` waits until the
 * sum is there.  Of doubles: scaled at once, or the product could leave the range. */
#define FN_RUN_G(i) (double)dy[i]
#define FN_RUN_GW(i) ((double)dy[i] * (double)w[i])
#define FN_RUN_D(i) ((double)x[i] - mean)
#define FN_RUN_DR(i) ((x[i] - mean) * rstd)
#define FN_G(k) (double)dy[k * dy_step + c]
#define FN_GW(k) ((double)dy[k * dy_step + c] * (double)w[wv ? c : 0])
#define FN_D(k) ((double)x[k * x_step + c] - mean[c])
#define FN_DR(k) ((x[k * x_step + c] - mean[c]) * rstd[c])
static inline void fn_sum_planes_float(FN_PLANES_OF(float), const double *means,
                                       const double *rstds, const float *w, double *lanes) {
    if (w) FN_SUM_PAIR(float, FN_RUN_GW, FN_RUN_D)
    else FN_SUM_PAIR(float, FN_RUN_G, FN_RUN_D)
}
static inline void fn_sum_planes_double(FN_PLANES_OF(double), const double *means,
                                        const double *rstds, const double *w, double *lanes) {
    if (w) FN_SUM_PAIR(double, FN_RUN_GW, FN_RUN_DR)
    else FN_SUM_PAIR(double, FN_RUN_G, FN_RUN_DR)
}
static inline void fn_sum_rows_float(const float *x, ptrdiff_t x_step, const float *dy,
                                     ptrdiff_t dy_step, ptrdiff_t rows, ptrdiff_t n,
                                     const double *mean, const double *rstd, const float *w, int wv,
                                     double *FN_RESTRICT a, double *FN_RESTRICT b) {
    (void)rstd;
    if (w) FN_SUM_ROWS(FN_GW, FN_D)
    else FN_SUM_ROWS(FN_G, FN_D)
}
static inline void fn_sum_rows_double(const double *x, ptrdiff_t x_step, const double *dy,
                                      ptrdiff_t dy_step, ptrdiff_t rows, ptrdiff_t n,
                                      const double *mean, const double *rstd, const double *w,
                                      int wv, double *FN_RESTRICT a, double *FN_RESTRICT b) {
    if (w) FN_SUM_ROWS(FN_GW, FN_DR)
    else FN_SUM_ROWS(FN_G, FN_DR)
}

/* Rows of n numbers that share the weights along them, with statistics of their own: four at a time,
 * from the sums to dx and to what they add to the gradients of the weights. */
typedef struct {
    const char *x, *dy, *mean, *rstd; /* of the first row, and bytes from it to the next; no mean: 0 */
    char *dx;
    ptrdiff_t x_step, dy_step, mean_step, rstd_step, dx_step, n, ahead;
    const void *w;
    double *gw, *gb;
    void *tile; /* room for 4 FN_CHUNK numbers where dx goes past the caches, else NULL */
    int centred;
} fn_back_rows;
#define FN_CHUNK 1024 /* CHUNK in backward.pxi */

/* Whether floats can hold xhat: `read_statistics` in backward.pxi. */
FN_INLINE int fn_narrow(double mean, double rstd) {
    return rstd == 0 || (fabs(rstd) > 7.9e-31 && fabs(rstd) < 1.3e30 && fabs(mean) < 1.3e30);
}
/* The two sums of a run, with weights along it or without. */
#define FN_PAIR_FLOATS(name, w, wv)                                                               \
    fn_pair_planes_of_##name(x, 0, dy, 0, 1, n, q->ahead, s, s + 1, s + 2, w, wv, lanes);
#define FN_PAIR_DOUBLES(name, w, wv)                                                              \
    fn_sum_planes_double(x, 0, dy, 0, 1, n, q->ahead, &mean, &rstd, w, lanes);
#define FN_ROWS_BACK(name, type, real, PAIR)                                                      \
    /* How many rows are done: all, but for the last one to three, or those before four of which  \
     * one is beyond floats. */                                                                   \
    static ptrdiff_t fn_rows_back_##name(const fn_back_rows *q, ptrdiff_t rows) {                 \
        const ptrdiff_t n = q->n;                                                                 \
        const real *w = (const real *)q->w;                                                       \
        ptrdiff_t i = 0;                                                                          \
        for (; i + 4 <= rows; i += 4) {                                                           \
            real terms[20], *s = terms;                                                           \
            const type *xs[4], *ds[4];                                                            \
            type *ys[4];                                                                          \
            for (int k = 0; k < 4; k++, s += 5) {                                                 \
                const double rstd = *(const double *)(q->rstd + (i + k) * q->rstd_step);          \
                const double mean = q->mean ? *(const double *)(q->mean + (i + k) * q->mean_step) : 0;\
                double lanes[2 * FN_PAIRS] = {0}, first = 0, second = 0;                          \
                const type *x = (const type *)(q->x + (i + k) * q->x_step);                       \
                const type *dy = (const type *)(q->dy + (i + k) * q->dy_step);                    \
                if (sizeof(real) == 4 && !fn_narrow(mean, rstd)) return i;                        \
                s[0] = (real)mean;                                                                \
                s[1] = (real)rstd;                                                                \
                s[2] = (real)(-(mean - s[0]) * rstd);                                             \
                PAIR(name, w, 1)                                                                  \
                fn_add_lanes(lanes, 1, &first, &second);                                          \
                s[3] = q->centred ? (real)(rstd * (first / (double)n)) : 0;                       \
                s[4] = (real)(rstd * (second / (double)n));                                       \
                xs[k] = x;                                                                        \
                ds[k] = dy;                                                                       \
                ys[k] = (type *)(q->dx + (i + k) * q->dx_step);                                   \
            }                                                                                     \
            if (!q->tile) {                                                                       \
                fn_back_collect_##name(xs, ds, ys, terms, n, 4, w, q->gw, q->gb);                 \
                continue;                                                                         \
            }                                                                                     \
            for (ptrdiff_t t = 0; t < n; t += FN_CHUNK) {                                         \
                const ptrdiff_t m = n - t < FN_CHUNK ? n - t : FN_CHUNK;                          \
                type *into[4];                                                                    \
                for (int k = 0; k < 4; k++) into[k] = (type *)q->tile + k * FN_CHUNK;             \
                fn_back_collect_##name(xs, ds, into, terms, m, 4, w + t, q->gw + t, q->gb + t);   \
                for (int k = 0; k < 4; k++) {                                                     \
                    fn_stream((char *)(ys[k] + t), (const char *)into[k], (size_t)m * sizeof(type));\
                    xs[k] += m;                                                                   \
                    ds[k] += m;                                                                   \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        return i;                                                                                 \
    }
FN_ROWS_BACK(float, float, float, FN_PAIR_FLOATS)
FN_ROWS_BACK(bf16, uint16_t, float, FN_PAIR_FLOATS)
FN_ROWS_BACK(double, double, double, FN_PAIR_DOUBLES)

/* A group of planes with a weight each, from the sums to dx; what they add to the gradients of the
 * weights goes to gw and gb.  Returns 0, and has done nothing, where floats can not hold xhat. */
typedef struct {
    const char *x, *dy, *w; /* of the first plane, and bytes from it to the next; w may be NULL */
    char *dx;
    ptrdiff_t x_step, dy_step, dx_step, w_step, planes, n, ahead;
    double mean, rstd, *gw, *gb;
    ptrdiff_t cell; /* from a plane's sums to the next one's */
    int centred;
} fn_back_group;
#define FN_GROUP_BACK(name, type, real, PAIR)                                                     \
    static int fn_group_back_##name(const fn_back_group *q) {                                     \
        const ptrdiff_t n = q->n;                                                                 \
        const double mean = q->mean, rstd = q->rstd, count = (double)(q->planes * n);             \
        const real s[3] = {(real)mean, (real)rstd, (real)(-(mean - (real)mean) * rstd)};          \
        double sum_g = 0, sum_gh = 0;                                                             \
        if (sizeof(real) == 4 && !fn_narrow(mean, rstd)) return 0;                                \
        for (ptrdiff_t p = 0; p < q->planes; p++) {                                               \
            const type *x = (const type *)(q->x + p * q->x_step);                                 \
            const type *dy = (const type *)(q->dy + p * q->dy_step);                              \
            const double weight = q->w ? *(const real *)(q->w + p * q->w_step) : 1;               \
            double lanes[2 * FN_PAIRS] = {0}, first = 0, second = 0;                              \
            PAIR(name, NULL, 0)                                                                   \
            fn_add_lanes(lanes, 1, &first, &second);                                              \
            q->gw[p * q->cell] += second;                                                              \
            q->gb[p * q->cell] += first;                                                              \
            sum_g += weight * first;                                                              \
            sum_gh += weight * second;                                                            \
        }                                                                                         \
        const real c1 = q->centred ? (real)(rstd * (sum_g / count)) : 0;                          \
        const real c2 = (real)(rstd * (sum_gh / count));                                          \
        for (ptrdiff_t p = 0; p < q->planes; p++) {                                               \
            const double weight = q->w ? *(const real *)(q->w + p * q->w_step) : 1;               \
            const real wr = (real)(weight * rstd);                                                \
            fn_back_planes_##name((const type *)(q->x + p * q->x_step), 0,                        \
                                  (const type *)(q->dy + p * q->dy_step), 0, 1, n, 0,             \
                                  (type *)(q->dx + p * q->dx_step), 0, s, s + 1, s + 2, &wr, &c1, \
                                  &c2);                                                           \
        }                                                                                         \
        return 1;                                                                                 \
    }
FN_GROUP_BACK(float, float, float, FN_PAIR_FLOATS)
FN_GROUP_BACK(bf16, uint16_t, float, FN_PAIR_FLOATS)
FN_GROUP_BACK(double, double, double, FN_PAIR_DOUBLES)

#endif
