/* Sums of numbers in a fixed order, whatever the vector's width.
 *
 * LANES partial sums side by side fix the order of a sum and hide the latency of an addition.
 * Loops of a fixed length stay in registers; what is left over goes by eights and then one by one.
 * The first terms are assigned, not added to zeros: clearing 32 numbers costs as much as adding 64.
 */
#ifndef FASTNORM_SUMS_H
#define FASTNORM_SUMS_H

#include "operand.h"
#include "sizes.h"
#include "vectors.h"

/* Numbers whose sum is taken, as doubles.  `storage` and `about` are constants wherever a loop is
 * compiled: each such call is a loop of its own. */
typedef struct {
    const void *x;
    Storage storage; /* F32, BF16 or F64 */
    int about;       /* whether `pivot` is subtracted: of floats exact, or nearly */
    double pivot;
    ptrdiff_t ahead; /* bytes to what is asked for in advance */
} Terms;
enum { FIRST = 1, SECOND = 2, BOTH = 3 }; /* which sums: of the terms, of their squares */

FN_INLINE fn_wide wide_term(const Terms *t, ptrdiff_t i) {
    const fn_wide v = t->storage == F32    ? fn_wide_float((const float *)t->x + i)
                      : t->storage == BF16 ? fn_wide_bf16((const uint16_t *)t->x + i)
                                           : fn_wide_load((const double *)t->x + i);
    return t->about ? fn_wide_sub(v, fn_wide_all(t->pivot)) : v;
}
FN_INLINE double term(const Terms *t, ptrdiff_t i) {
    const double v = t->storage == F32    ? ((const float *)t->x)[i]
                     : t->storage == BF16 ? fn_from_bf16(((const uint16_t *)t->x)[i])
                                          : ((const double *)t->x)[i];
    return t->about ? v - t->pivot : v;
}
FN_INLINE void fetch_lanes(const Terms *t, ptrdiff_t i) {
    const int size = t->storage == F32 ? 4 : t->storage == BF16 ? 2 : 8;
    for (int j = 0; j < LANES; j += 64 / size)
        FN_FETCH((const char *)t->x + (i + j) * size + t->ahead);
}
FN_INLINE void fold(double *v, int half) {
    for (int j = 0; j < half; j++) v[j] += v[j + half];
}
/* From element `begin` on, `ways` of every LANES are added to p, and their squares to q. */
FN_INLINE void add_ways(const Terms *t, ptrdiff_t begin, ptrdiff_t end, int ways, int which,
                        fn_wide *p, fn_wide *q) {
    for (ptrdiff_t m = begin; m < end; m += LANES) {
        if (begin % LANES == 0) fetch_lanes(t, m); /* in the first of the loops that read them */
        for (int j = 0; j < ways / FN_WIDE; j++) {
            const fn_wide d = wide_term(t, m + j * FN_WIDE);
            if (which & FIRST) p[j] = fn_wide_add(p[j], d);
            if (which & SECOND) q[j] = fn_wide_mac(d, d, q[j]);
        }
    }
}
FN_INLINE void sum_terms(const Terms *t, ptrdiff_t n, int which, double *first, double *second) {
    const int ways = which == BOTH ? FN_WAYS : LANES;
    const ptrdiff_t whole = n - n % LANES;
    double a[LANES], b[LANES], rest_a = 0, rest_b = 0;
    ptrdiff_t i = whole;
    if (n >= LANES) {
        for (int k = 0; k < LANES; k += ways) {
            fn_wide p[LANES / FN_WIDE], q[LANES / FN_WIDE];
            for (int j = 0; j < ways / FN_WIDE; j++) {
                p[j] = wide_term(t, k + j * FN_WIDE);
                q[j] = fn_wide_mul(p[j], p[j]);
            }
            add_ways(t, LANES + k, whole, ways, which, p, q);
            for (int j = 0; j < ways / FN_WIDE; j++) {
                fn_wide_store(a + k + j * FN_WIDE, p[j]);
                fn_wide_store(b + k + j * FN_WIDE, q[j]);
            }
        }
        fold(a, 16), fold(b, 16), fold(a, 8), fold(b, 8);
        if (whole == n) {
            fold(a, 4), fold(b, 4), fold(a, 2), fold(b, 2);
            if (which & FIRST) *first = a[0] + a[1];
            if (which & SECOND) *second = b[0] + b[1];
            return;
        }
    } else if (n >= 8) {
        for (int j = 0; j < 8; j++) {
            a[j] = term(t, j);
            b[j] = a[j] * a[j];
        }
        i = 8;
    } else {
        for (int j = 0; j < 8; j++) a[j] = b[j] = 0;
    }
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) {
            const double d = term(t, i + j);
            a[j] += d;
            b[j] = fn_mac64(d, d, b[j]);
        }
    for (; i < n; i++) {
        const double d = term(t, i);
        rest_a += d;
        rest_b = fn_mac64(d, d, rest_b);
    }
    fold(a, 4), fold(b, 4), fold(a, 2), fold(b, 2);
    if (which & FIRST) *first = a[0] + a[1] + rest_a;
    if (which & SECOND) *second = b[0] + b[1] + rest_b;
}
/* The same added to LANES of each sum that lie in memory: for a group of many short runs. */
FN_INLINE void add_to_lanes(const Terms *t, ptrdiff_t n, double *FN_RESTRICT a,
                         double *FN_RESTRICT b) {
    const ptrdiff_t whole = n - n % LANES;
    for (int k = 0; k < LANES && whole; k += FN_WAYS) {
        fn_wide p[FN_WAYS / FN_WIDE], q[FN_WAYS / FN_WIDE];
        for (int j = 0; j < FN_WAYS / FN_WIDE; j++) {
            p[j] = fn_wide_load(a + k + j * FN_WIDE);
            q[j] = fn_wide_load(b + k + j * FN_WIDE);
        }
        add_ways(t, k, whole, FN_WAYS, BOTH, p, q);
        for (int j = 0; j < FN_WAYS / FN_WIDE; j++) {
            fn_wide_store(a + k + j * FN_WIDE, p[j]);
            fn_wide_store(b + k + j * FN_WIDE, q[j]);
        }
    }
    ptrdiff_t i = whole;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) {
            const double d = term(t, i + j);
            a[i - whole + j] += d;
            b[i - whole + j] = fn_mac64(d, d, b[i - whole + j]);
        }
    for (; i < n; i++) {
        const double d = term(t, i);
        a[i - whole] += d;
        b[i - whole] = fn_mac64(d, d, b[i - whole]);
    }
}
static inline double fold_lanes(double *v) {
    fold(v, 16), fold(v, 8), fold(v, 4), fold(v, 2);
    return v[0] + v[1];
}

/* Of bfloat16, four numbers, and their squares of 16 bits, are added up in float before they go
 * into a lane.  That is exact while the largest is at most 8 times the smallest.  Where it is more,
 * the four are spread over 7/8 of the largest, and what a float loses, 2^-22 of its square, is
 * 2^-20 of what they add to the squared deviations, or less: a bfloat16 has 2^-9.  Two numbers of
 * 16 bits lie in one of 32, so that half of the conversions fall away too.  Returns whether a float
 * can hold the squares. */
FN_INLINE int sum_fours(const uint16_t *x, ptrdiff_t n, ptrdiff_t ahead, int which, double *first,
                        double *second) {
    double a[PAIR_LANES] = {0}, b[PAIR_LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + 64 <= n; i += 64) {
        uint32_t p[PAIR_LANES], q[PAIR_LANES];
        memcpy(p, x + i, sizeof p);
        memcpy(q, x + i + 32, sizeof q);
        FN_FETCH((const char *)(x + i) + ahead);
        FN_FETCH((const char *)(x + i + 32) + ahead);
        for (int j = 0; j < PAIR_LANES; j++) {
            const float p0 = fn_float(p[j] << 16), p1 = fn_float(p[j] & 0xffff0000u);
            const float q0 = fn_float(q[j] << 16), q1 = fn_float(q[j] & 0xffff0000u);
            if (which & FIRST) a[j] += (double)((p0 + p1) + (q0 + q1));
            b[j] += (double)(fn_fma32(p0, p0, p1 * p1) + fn_fma32(q0, q0, q1 * q1));
        }
    }
    for (; i < n; i += PAIR_LANES)
        for (int j = 0; j < PAIR_LANES && i + j < n; j++) {
            const double v = (double)fn_from_bf16(x[i + j]);
            if (which & FIRST) a[j] += v;
            b[j] = fn_mac64(v, v, b[j]);
        }
    if (which & FIRST) *first = fn_added_up(a);
    *second = fn_added_up(b);
    /* below, squares that vanished might be missed */
    return *second < 1e38 && *second > 1e-30 * (double)n;
}

/* The loops that are compiled: of floats (or bfloat16) n numbers, about zero ... */
static inline void sums_f32(const float *x, ptrdiff_t n, double *first, double *second) {
    const Terms t = {x, F32, 0, 0, PREFETCH_BYTES};
    sum_terms(&t, n, BOTH, first, second);
}
static inline void sums_bf16(const uint16_t *x, ptrdiff_t n, double *first, double *second) {
    const Terms t = {x, BF16, 0, 0, PREFETCH_BYTES};
    if (!sum_fours(x, n, PREFETCH_BYTES, BOTH, first, second))
        sum_terms(&t, n, BOTH, first, second);
}
/* ... about a pivot, when they have been read once ... */
static inline void sums_about_f32(const float *x, ptrdiff_t n, double pivot, double *first,
                                  double *second) {
    const Terms t = {x, F32, 1, pivot, 0};
    sum_terms(&t, n, BOTH, first, second);
}
static inline void sums_about_bf16(const uint16_t *x, ptrdiff_t n, double pivot, double *first,
                                   double *second) {
    const Terms t = {x, BF16, 1, pivot, 0};
    sum_terms(&t, n, BOTH, first, second);
}
/* ... of their squares alone, and of doubles about a pivot. */
static inline double squares_f32(const float *x, ptrdiff_t n) {
    const Terms t = {x, F32, 0, 0, PREFETCH_BYTES};
    double second;
    sum_terms(&t, n, SECOND, NULL, &second);
    return second;
}
static inline double squares_bf16(const uint16_t *x, ptrdiff_t n) {
    const Terms t = {x, BF16, 0, 0, PREFETCH_BYTES};
    double second;
    if (!sum_fours(x, n, PREFETCH_BYTES, SECOND, NULL, &second))
        sum_terms(&t, n, SECOND, NULL, &second);
    return second;
}
static inline double deviations(const double *x, ptrdiff_t n, ptrdiff_t ahead, double pivot) {
    const Terms t = {x, F64, 1, pivot, ahead};
    double first;
    sum_terms(&t, n, FIRST, &first, NULL);
    return first;
}
static inline void add_f32(const float *x, ptrdiff_t n, ptrdiff_t ahead, double *a, double *b) {
    const Terms t = {x, F32, 0, 0, ahead};
    add_to_lanes(&t, n, a, b);
}
static inline void add_about_f32(const float *x, ptrdiff_t n, double pivot, double *a, double *b) {
    const Terms t = {x, F32, 1, pivot, 0};
    add_to_lanes(&t, n, a, b);
}
/* Two sums of a run of floats, or of bfloat16, about a pivot unless that is 0. */
FN_INLINE void sums_of(const void *x, int bf16, ptrdiff_t n, double pivot, double *sums,
                       ptrdiff_t step) {
    if (bf16 && pivot == 0) sums_bf16((const uint16_t *)x, n, sums, sums + step);
    else if (bf16) sums_about_bf16((const uint16_t *)x, n, pivot, sums, sums + step);
    else if (pivot == 0) sums_f32((const float *)x, n, sums, sums + step);
    else sums_about_f32((const float *)x, n, pivot, sums, sums + step);
}

/* ---- columns ----
 * Rows of n floats, or of bfloat16, `step` bytes apart: for each column the sum of x, or of x less
 * its pivot, and of the square, eight rows at a time. */
FN_INLINE fn_wide wide_column(const char *x, int bf16, const double *pivot, ptrdiff_t c) {
    const fn_wide v = bf16 ? fn_wide_bf16((const uint16_t *)x + c)
                           : fn_wide_float((const float *)x + c);
    return pivot ? fn_wide_sub(v, fn_wide_load(pivot + c)) : v;
}
FN_INLINE double column(const char *x, int bf16, const double *pivot, ptrdiff_t c) {
    const double v = bf16 ? fn_from_bf16(((const uint16_t *)x)[c]) : ((const float *)x)[c];
    return pivot ? v - pivot[c] : v;
}
FN_INLINE void add_columns(const char *FN_RESTRICT x, int bf16, ptrdiff_t step, ptrdiff_t rows,
                           ptrdiff_t n, const double *FN_RESTRICT pivot, double *FN_RESTRICT a,
                           double *FN_RESTRICT b) {
    const ptrdiff_t whole = n - n % FN_WIDE;
    for (; rows >= 8; rows -= 8, x += 8 * step) {
        for (ptrdiff_t c = 0; c < whole; c += FN_WIDE) {
            fn_wide d[8], sum, even, odd;
            for (int k = 0; k < 8; k++) d[k] = wide_column(x + k * step, bf16, pivot, c);
            even = fn_wide_mul(d[0], d[0]), odd = fn_wide_mul(d[1], d[1]);
            for (int k = 2; k < 8; k += 2) {
                even = fn_wide_mac(d[k], d[k], even);
                odd = fn_wide_mac(d[k + 1], d[k + 1], odd);
            }
            for (int k = 0; k < 8; k += 2) d[k] = fn_wide_add(d[k], d[k + 1]);
            sum = fn_wide_add(fn_wide_add(d[0], d[2]), fn_wide_add(d[4], d[6]));
            fn_wide_store(a + c, fn_wide_add(fn_wide_load(a + c), sum));
            fn_wide_store(b + c, fn_wide_add(fn_wide_load(b + c), fn_wide_add(even, odd)));
        }
        for (ptrdiff_t c = whole; c < n; c++) {
            double d[8], even, odd;
            for (int k = 0; k < 8; k++) d[k] = column(x + k * step, bf16, pivot, c);
            even = d[0] * d[0], odd = d[1] * d[1];
            for (int k = 2; k < 8; k += 2) {
                even = fn_mac64(d[k], d[k], even);
                odd = fn_mac64(d[k + 1], d[k + 1], odd);
            }
            a[c] += ((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7]));
            b[c] += even + odd;
        }
    }
    for (; rows > 0; rows--, x += step)
        for (ptrdiff_t c = 0; c < n; c++) {
            const double d = column(x, bf16, pivot, c);
            a[c] += d;
            b[c] = fn_mac64(d, d, b[c]);
        }
}
static inline void column_sums(const float *x, ptrdiff_t step, ptrdiff_t rows, ptrdiff_t n,
                               const double *pivot, double *a, double *b) {
    const ptrdiff_t bytes = step * (ptrdiff_t)sizeof(float);
    if (pivot) add_columns((const char *)x, 0, bytes, rows, n, pivot, a, b);
    else add_columns((const char *)x, 0, bytes, rows, n, NULL, a, b);
}
static inline void column_sums_bf16(const char *x, ptrdiff_t step, ptrdiff_t rows, ptrdiff_t n,
                                    const double *pivot, double *a, double *b) {
    if (pivot) add_columns(x, 1, step, rows, n, pivot, a, b);
    else add_columns(x, 1, step, rows, n, NULL, a, b);
}

#endif
