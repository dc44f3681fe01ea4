/* Moments: count, mean and sum of squared deviations, the last two as unevaluated sums of two
 * doubles.
 *
 * A mean needs more than 53 bits: at mean/std = 2^20 they leave an error of 2^-33 std, 1,000 units
 * of a float32 output of 2^-20.  Moments of neighbouring groups or columns are five arrays
 * (FIELDS), `step` numbers apart: count, mean, its low part, m2, its low part. */
#ifndef FASTNORM_MOMENTS_H
#define FASTNORM_MOMENTS_H

#include "sums.h"

enum { FIELDS = 5, COUNT = 0, MEAN = 1, MEAN_LOW = 2, M2 = 3, M2_LOW = 4 };

/* total + low += v; `low` takes what rounding loses (Knuth's two-sum). */
static inline void fn_add_two(double *total, double *low, double v) {
    const double sum = *total + v, back = sum - *total;
    *low += (*total - (sum - back)) + (v - back);
    *total = sum;
}

/* From sums about a pivot; the count is there.  Where squares cancel - the mean is 64 standard
 * deviations or more from the pivot - a mean would lose more than 2^-44 deviations, three units of
 * an output of 2^-20: whether that is so, and the sums are to be taken again about the mean.  The
 * cost is seen in few data, a sum about zero costs a third less than one about a pivot. */
FN_INLINE int moments_of_sum(double first, double second, double pivot, double *m,
                             ptrdiff_t step) {
    const double count = m[COUNT], d = first / count;
    const double m2 = fn_fma64(-first, d, second); /* the product must not round */
    const double mean = pivot + d, back = mean - pivot;
    m[MEAN * step] = count > 0 ? mean : 0.0;
    m[MEAN_LOW * step] = count > 0 ? (pivot - (mean - back)) + (d - back) : 0.0;
    m[MEAN_LOW * step] += count > 0 ? fn_fma64(-count, d, first) / count : 0.0;
    m[M2 * step] = count > 0 ? (m2 > 0 || m2 != m2 ? m2 : 0.0) : 0.0;
    m[M2_LOW * step] = 0;
    return !(first * d <= 4096.0 * m2) & (count > 0);
}
/* n of them about zero, n apart; returns whether any is to be taken again. */
FN_APART int moments_of_sums(ptrdiff_t n, const double *FN_RESTRICT first,
                                  const double *FN_RESTRICT second, double *FN_RESTRICT m,
                                  uint8_t *FN_RESTRICT recentre) {
    int any = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const int flag = moments_of_sum(first[i], second[i], 0.0, m + i, n);
        recentre[i] = (uint8_t)flag;
        any |= flag;
    }
    return any;
}
/* What is not centred has no mean: only its squares count. */
FN_INLINE void moments_of_squares(ptrdiff_t n, const double *squares, double *m) {
    for (ptrdiff_t i = 0; i < n; i++) {
        m[MEAN * n + i] = m[MEAN_LOW * n + i] = m[M2_LOW * n + i] = 0.0;
        m[M2 * n + i] = squares[i];
    }
}

/* What deviations are taken from: the mean, in so few digits that they are exact.
 *
 * `precise` leaves it two binary digits below the deviation.  Integers less that are quarters at
 * the finest, and their squares add up exactly. */
static inline double pivot_of(double mean, double var, int precise) {
    if (precise && var > 1e-80 && var < 1e80) {
        int exponent;
        frexp(sqrt(var), &exponent);
        const double pivot = ldexp(rint(ldexp(mean, 2 - exponent)), exponent - 2);
        if (isfinite(pivot)) return pivot;
    }
    return (float)mean;
}

/* Chan, Golub and LeVeque (1979), with each sum kept as two numbers.  Empty parts change nothing:
 * into an empty one the factor is 1, from an empty one it is 0. */
static inline void merge(double *FN_RESTRICT into, const double *FN_RESTRICT other, ptrdiff_t n,
                         ptrdiff_t step) {
    FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
        double mean = into[step + i], low = into[2 * step + i];
        double m2 = into[3 * step + i], m2_low = into[4 * step + i];
        const double count = into[i] + other[i];
        const double f = count > 0 ? other[i] / count : 0.0;
        const double extra = other[2 * step + i] - low;
        const double delta = other[step + i] - mean;
        const double whole = delta + extra;
        const double together = mean + other[step + i];
        fn_add_two(&mean, &low, delta * f);
        /* to an infinity there are no differences: it stays, or it is no number */
        mean = fabs(delta) < INFINITY ? mean : together;
        fn_add_two(&m2, &m2_low, other[3 * step + i]);
        fn_add_two(&m2, &m2_low, whole * whole * (into[i] * f));
        into[i] = count;
        into[step + i] = mean;
        into[2 * step + i] = low + extra * f;
        into[3 * step + i] = m2;
        into[4 * step + i] = m2_low + other[4 * step + i];
    }
}

/* 1 / sqrt(v + low), to half a unit: sqrt and / round twice, one Newton step mends it. */
FN_INLINE double inverse_root(double v, double low) {
    const double r = 1.0 / sqrt(v), product = v * r;
    const double error = fn_fma64(-product, r, 1.0) - fn_fma64(v, r, -product) * r - low * r * r;
    const double better = r + 0.5 * r * error;
    return v > 0.0 && v < INFINITY ? better : r;
}
/* A constant group with eps = 0 is all bias: its scale is 0, not infinity. */
FN_INLINE double rstd_of(double var, double eps) {
    const double v = var + eps, r = inverse_root(v, 0.0);
    return v != 0.0 ? r : 0.0;
}
/* 1 / max(sqrt(squares), eps) */
FN_INLINE double norm_scale(double squares, double eps) {
    if (sqrt(squares) < eps) return 1.0 / eps;
    return squares != 0.0 ? inverse_root(squares, 0.0) : 0.0;
}

/* ---- doubles ----
 * They have no bits to spare, so they are read twice: about one of them for a mean, then about that
 * for the rest of it and for the squares, whose sum is kept as two numbers.  1,000 equal squares,
 * as black and white pixels give, would all round the same way: lanes are added up in short chains,
 * and the chains exactly. */
static inline void sums_about_f64(const double *x, ptrdiff_t n, ptrdiff_t ahead, double mean,
                                  double *first, double *m2, double *m2_low) {
    enum { M = LANES / FN_WIDE };
    const Terms terms = {x, F64, 1, mean, ahead};
    double lanes[LANES], total[LANES], low[LANES] = {0}, deviation[LANES];
    fn_wide t[M], d[M];
    ptrdiff_t i = 0;
    for (int j = 0; j < M; j++) t[j] = d[j] = fn_wide_all(0);
    while (i < n) {
        const ptrdiff_t end = n - i < CHAIN ? n : i + CHAIN, whole = end - (end - i) % LANES;
        fn_wide v[M];
        for (int j = 0; j < M; j++) v[j] = fn_wide_all(0);
        for (; i < whole; i += LANES) {
            fetch_lanes(&terms, i);
            for (int j = 0; j < M; j++) {
                const fn_wide w = wide_term(&terms, i + j * FN_WIDE);
                v[j] = fn_wide_mac(w, w, v[j]);
                d[j] = fn_wide_add(d[j], w);
            }
        }
        if (i < end) { /* the last chain's last numbers */
            for (int j = 0; j < M; j++) {
                fn_wide_store(lanes + j * FN_WIDE, v[j]);
                fn_wide_store(deviation + j * FN_WIDE, d[j]);
            }
            for (int j = 0; i < end; i++, j++) {
                const double w = x[i] - mean;
                lanes[j] = fn_mac64(w, w, lanes[j]);
                deviation[j] += w;
            }
            for (int j = 0; j < M; j++) {
                v[j] = fn_wide_load(lanes + j * FN_WIDE);
                d[j] = fn_wide_load(deviation + j * FN_WIDE);
            }
        }
        for (int j = 0; j < M; j++) { /* fn_add_two */
            const fn_wide sum = fn_wide_add(t[j], v[j]), back = fn_wide_sub(sum, t[j]);
            const fn_wide lost = fn_wide_add(fn_wide_sub(t[j], fn_wide_sub(sum, back)),
                                             fn_wide_sub(v[j], back));
            fn_wide_store(low + j * FN_WIDE, fn_wide_add(fn_wide_load(low + j * FN_WIDE), lost));
            t[j] = sum;
        }
    }
    for (int j = 0; j < M; j++) {
        fn_wide_store(total + j * FN_WIDE, t[j]);
        fn_wide_store(deviation + j * FN_WIDE, d[j]);
    }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) {
            fn_add_two(&total[j], &low[j], total[j + half]);
            low[j] += low[j + half];
            deviation[j] += deviation[j + half];
        }
    *first = deviation[0];
    *m2 = total[0];
    *m2_low = low[0];
}
/* Rows of columns, `step` numbers apart: deviations into `total` and, unless `m2` is NULL, their
 * squares. */
FN_INLINE void add_deviations(const double *FN_RESTRICT x, ptrdiff_t step, ptrdiff_t rows,
                              ptrdiff_t n, const double *FN_RESTRICT pivot,
                              double *FN_RESTRICT total, double *FN_RESTRICT m2,
                              double *FN_RESTRICT m2_low) {
    for (; rows >= 4; rows -= 4, x += 4 * step)
        FN_IVDEP for (ptrdiff_t c = 0; c < n; c++) {
            const double p = pivot[c], d0 = x[c] - p, d1 = x[step + c] - p;
            const double d2 = x[2 * step + c] - p, d3 = x[3 * step + c] - p;
            if (m2)
                fn_add_two(&m2[c], &m2_low[c],
                           fn_mac64(d0, d0, d1 * d1) + fn_mac64(d2, d2, d3 * d3));
            total[c] += (d0 + d1) + (d2 + d3);
        }
    for (; rows > 0; rows--, x += step)
        FN_IVDEP for (ptrdiff_t c = 0; c < n; c++) {
            const double d = x[c] - pivot[c];
            if (m2) fn_add_two(&m2[c], &m2_low[c], d * d);
            total[c] += d;
        }
}

#endif
