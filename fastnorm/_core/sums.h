/* Sums of floats and doubles in a fixed order, and moments from them. */
#ifndef FASTNORM_SUMS_H
#define FASTNORM_SUMS_H

#include "numbers.h"

/* ---- sums -----------------------------------------------------------------------------
 * 32 partial sums side by side fix the order of a sum, whatever the vector's width, and hide the
 * latency of an addition.  FN_WAYS of them are in registers at a time; the others follow in a loop of
 * their own over the same cached block.  Loops of a fixed length stay in registers; what is left
 * over goes by eights and then one by one.  The first terms are assigned, not added to zeros:
 * clearing 32 numbers costs as much as adding 64. */
#define FN_LANES 32
#if defined(__AVX512F__)
#define FN_WAYS 32
#elif defined(__AVX__) || !defined(__SSE2__)
#define FN_WAYS 16
#else
#define FN_WAYS 8
#endif
/* What lies `ahead` bytes further is asked for in time.  The processor does so on its own, but a loop
 * that reads a block, then writes one, then reads again keeps losing its stream: 1.2 times on rows of
 * 768 from the last cache. */
#if defined(__GNUC__)
#define FN_FETCH(p) __builtin_prefetch(p)
#define FN_FETCH_TO(p) __builtin_prefetch(p, 1)
#else
#define FN_FETCH(p) (void)(p)
#define FN_FETCH_TO(p) (void)(p)
#endif
static inline void fn_fetch(const char *p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 64) FN_FETCH(p + i);
}
#define FN_FETCH_32(p, ahead) /* 32 numbers, in the first of the loops that read them */          \
    if (k == 0)                                                                                   \
        for (int j = 0; j < 32; j += 64 / (int)sizeof *(p))                                       \
            FN_FETCH((const char *)((p) + j) + (ahead));
#define FN_FOLD(v, half) for (int j = 0; j < (half); j++) v[j] += v[j + (half)];

/* FN_WIDE doubles from as many numbers that lie side by side.  Left to itself, gcc loads twice as many,
 * takes them apart and converts the halves: 2.8 cycles for the sums of 16 numbers instead of 2.4. */
#if defined(__AVX512F__)
#define FN_WIDE 8
typedef __m512d fn_wide;
FN_INLINE fn_wide fn_wide_float(const float *x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
FN_INLINE fn_wide fn_wide_bf16(const uint16_t *x) {
    const __m256i h = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(h, 16)));
}
FN_INLINE fn_wide fn_wide_load(const double *x) { return _mm512_loadu_pd(x); }
FN_INLINE void fn_wide_store(double *x, fn_wide v) { _mm512_storeu_pd(x, v); }
FN_INLINE fn_wide fn_wide_all(double v) { return _mm512_set1_pd(v); }
FN_INLINE fn_wide fn_wide_add(fn_wide a, fn_wide b) { return _mm512_add_pd(a, b); }
FN_INLINE fn_wide fn_wide_sub(fn_wide a, fn_wide b) { return _mm512_sub_pd(a, b); }
FN_INLINE fn_wide fn_wide_mac(fn_wide a, fn_wide b, fn_wide c) { return _mm512_fmadd_pd(a, b, c); }
FN_INLINE fn_wide fn_wide_square(fn_wide a) { return _mm512_mul_pd(a, a); }
#elif defined(__AVX2__) && defined(__FMA__)
#define FN_WIDE 4
typedef __m256d fn_wide;
FN_INLINE fn_wide fn_wide_float(const float *x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
FN_INLINE fn_wide fn_wide_bf16(const uint16_t *x) {
    const __m128i h = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)x));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(h, 16)));
}
FN_INLINE fn_wide fn_wide_load(const double *x) { return _mm256_loadu_pd(x); }
FN_INLINE void fn_wide_store(double *x, fn_wide v) { _mm256_storeu_pd(x, v); }
FN_INLINE fn_wide fn_wide_all(double v) { return _mm256_set1_pd(v); }
FN_INLINE fn_wide fn_wide_add(fn_wide a, fn_wide b) { return _mm256_add_pd(a, b); }
FN_INLINE fn_wide fn_wide_sub(fn_wide a, fn_wide b) { return _mm256_sub_pd(a, b); }
FN_INLINE fn_wide fn_wide_mac(fn_wide a, fn_wide b, fn_wide c) { return _mm256_fmadd_pd(a, b, c); }
FN_INLINE fn_wide fn_wide_square(fn_wide a) { return _mm256_mul_pd(a, a); }
#else
#define FN_WIDE 1
typedef double fn_wide;
FN_INLINE fn_wide fn_wide_float(const float *x) { return *x; }
FN_INLINE fn_wide fn_wide_bf16(const uint16_t *x) { return fn_from_bf16(*x); }
FN_INLINE fn_wide fn_wide_load(const double *x) { return *x; }
FN_INLINE void fn_wide_store(double *x, fn_wide v) { *x = v; }
FN_INLINE fn_wide fn_wide_all(double v) { return v; }
FN_INLINE fn_wide fn_wide_add(fn_wide a, fn_wide b) { return a + b; }
FN_INLINE fn_wide fn_wide_sub(fn_wide a, fn_wide b) { return a - b; }
FN_INLINE fn_wide fn_wide_mac(fn_wide a, fn_wide b, fn_wide c) { return fn_mac64(a, b, c); }
FN_INLINE fn_wide fn_wide_square(fn_wide a) { return a * a; }
#endif

/* The sum of TERM(d), d being D of one number or W of FN_WIDE of them. */
#define FN_SUM(D, W, TERM, ADD, TERMS, ADDS)                                                      \
    {                                                                                             \
        const int k = 0;                                                                          \
        double a[32], rest = 0;                                                                   \
        ptrdiff_t i = 0;                                                                          \
        if (n >= 32) {                                                                            \
            fn_wide p[32 / FN_WIDE];                                                              \
            for (int j = 0; j < 32 / FN_WIDE; j++) p[j] = TERMS(W(x + j * FN_WIDE));              \
            for (i = 32; i + 32 <= n; i += 32) {                                                  \
                FN_FETCH_32(x + i, ahead)                                                         \
                for (int j = 0; j < 32 / FN_WIDE; j++) {                                          \
                    const fn_wide d = W(x + i + j * FN_WIDE);                                     \
                    p[j] = ADDS(d, p[j]);                                                         \
                }                                                                                 \
            }                                                                                     \
            for (int j = 0; j < 32 / FN_WIDE; j++) fn_wide_store(a + j * FN_WIDE, p[j]);          \
            FN_FOLD(a, 16) FN_FOLD(a, 8)                                                          \
        } else if (n >= 8) {                                                                      \
            for (int j = 0; j < 8; j++) a[j] = TERM(D(x[j]));                                     \
            i = 8;                                                                                \
        } else {                                                                                  \
            for (int j = 0; j < 8; j++) a[j] = 0;                                                 \
        }                                                                                         \
        for (; i + 8 <= n; i += 8)                                                                \
            for (int j = 0; j < 8; j++) a[j] = ADD(D(x[i + j]), a[j]);                            \
        for (; i < n; i++) rest = ADD(D(x[i]), rest);                                             \
        FN_FOLD(a, 4) FN_FOLD(a, 2)                                                               \
        return a[0] + a[1] + rest;                                                                \
    }
#define FN_ITSELF(v) (double)(v)
#define FN_FROM_PIVOT(v) ((double)(v) - pivot)
#define FN_BF16(v) (double)fn_from_bf16(v)
#define FN_WIDE_FROM_PIVOT(p) fn_wide_sub(fn_wide_float(p), fn_wide_all(pivot))
#define FN_WIDE_DOUBLE_FROM_PIVOT(p) fn_wide_sub(fn_wide_load(p), fn_wide_all(pivot))
#define FN_SQUARE(d) ((d) * (d))
#define FN_ADD_SQUARE(d, t) fn_mac64(d, d, t)
#define FN_SQUARES(d) fn_wide_square(d)
#define FN_ADD_SQUARES(d, t) fn_wide_mac(d, d, t)
#define FN_SAME(d) (d)
#define FN_ADD(d, t) ((t) + (d))
static inline double fn_squares(const float *x, ptrdiff_t n, ptrdiff_t ahead)
    FN_SUM(FN_ITSELF, fn_wide_float, FN_SQUARE, FN_ADD_SQUARE, FN_SQUARES, FN_ADD_SQUARES)
static inline double fn_wide_squares_bf16(const uint16_t *x, ptrdiff_t n, ptrdiff_t ahead)
    FN_SUM(FN_BF16, fn_wide_bf16, FN_SQUARE, FN_ADD_SQUARE, FN_SQUARES, FN_ADD_SQUARES)
static inline double fn_deviations(const double *x, ptrdiff_t n, ptrdiff_t ahead, double pivot)
    FN_SUM(FN_FROM_PIVOT, FN_WIDE_DOUBLE_FROM_PIVOT, FN_SAME, FN_ADD, FN_SAME, fn_wide_add)

#define FN_REGISTERS (FN_WAYS / FN_WIDE)

/* From element `begin` on, FN_WAYS of every 32 go to the lanes p and q, and those to a and b. */
#define FN_ADD_WAYS(W, begin)                                                                     \
    for (ptrdiff_t m = begin; m < whole; m += 32) {                                               \
        FN_FETCH_32(x + m, ahead)                                                                 \
        for (int j = 0; j < FN_REGISTERS; j++) {                                                  \
            const fn_wide d = W(x + m + j * FN_WIDE);                                             \
            p[j] = fn_wide_add(p[j], d);                                                          \
            q[j] = fn_wide_mac(d, d, q[j]);                                                       \
        }                                                                                         \
    }                                                                                             \
    for (int j = 0; j < FN_REGISTERS; j++) {                                                      \
        fn_wide_store(a + k + j * FN_WIDE, p[j]);                                                 \
        fn_wide_store(b + k + j * FN_WIDE, q[j]);                                                 \
    }
/* The sums of d and of d*d for floats x, in one pass: d is x itself or x - pivot, exact in double
 * either way, or nearly. */
#define FN_SUMS(D, W)                                                                             \
    {                                                                                             \
        double a[32], b[32], rest_a = 0, rest_b = 0;                                              \
        const ptrdiff_t whole = n - n % 32;                                                       \
        ptrdiff_t i = whole;                                                                      \
        if (n >= 32) {                                                                            \
            for (int k = 0; k < 32; k += FN_WAYS) {                                               \
                fn_wide p[FN_REGISTERS], q[FN_REGISTERS];                                         \
                for (int j = 0; j < FN_REGISTERS; j++) {                                          \
                    p[j] = W(x + k + j * FN_WIDE);                                                \
                    q[j] = fn_wide_square(p[j]);                                                  \
                }                                                                                 \
                FN_ADD_WAYS(W, 32 + k)                                                            \
            }                                                                                     \
            FN_FOLD(a, 16) FN_FOLD(b, 16) FN_FOLD(a, 8) FN_FOLD(b, 8)                             \
            if (whole == n) {                                                                     \
                FN_FOLD(a, 4) FN_FOLD(b, 4) FN_FOLD(a, 2) FN_FOLD(b, 2)                           \
                *first = a[0] + a[1];                                                             \
                *second = b[0] + b[1];                                                            \
                return;                                                                           \
            }                                                                                     \
        } else if (n >= 8) {                                                                      \
            for (int j = 0; j < 8; j++) {                                                         \
                const double d = D(x[j]);                                                         \
                a[j] = d;                                                                         \
                b[j] = d * d;                                                                     \
            }                                                                                     \
            i = 8;                                                                                \
        } else {                                                                                  \
            for (int j = 0; j < 8; j++) a[j] = b[j] = 0;                                          \
        }                                                                                         \
        for (; i + 8 <= n; i += 8)                                                                \
            for (int j = 0; j < 8; j++) {                                                         \
                const double d = D(x[i + j]);                                                     \
                a[j] += d;                                                                        \
                b[j] = fn_mac64(d, d, b[j]);                                                      \
            }                                                                                     \
        for (; i < n; i++) {                                                                      \
            const double d = D(x[i]);                                                             \
            rest_a += d;                                                                          \
            rest_b = fn_mac64(d, d, rest_b);                                                      \
        }                                                                                         \
        FN_FOLD(a, 4) FN_FOLD(b, 4) FN_FOLD(a, 2) FN_FOLD(b, 2)                                   \
        *first = a[0] + a[1] + rest_a;                                                            \
        *second = b[0] + b[1] + rest_b;                                                           \
    }
/* The same added to 32 lanes that lie in memory: for a group of many short runs. */
#define FN_GATHER(D, W)                                                                           \
    {                                                                                             \
        const ptrdiff_t whole = n - n % 32;                                                       \
        for (int k = 0; k < 32 && whole; k += FN_WAYS) {                                          \
            fn_wide p[FN_REGISTERS], q[FN_REGISTERS];                                             \
            for (int j = 0; j < FN_REGISTERS; j++) {                                              \
                p[j] = fn_wide_load(a + k + j * FN_WIDE);                                         \
                q[j] = fn_wide_load(b + k + j * FN_WIDE);                                         \
            }                                                                                     \
            FN_ADD_WAYS(W, k)                                                                     \
        }                                                                                         \
        ptrdiff_t i = whole;                                                                      \
        for (; i + 8 <= n; i += 8)                                                                \
            for (int j = 0; j < 8; j++) {                                                         \
                const double d = D(x[i + j]);                                                     \
                a[i - whole + j] += d;                                                            \
                b[i - whole + j] = fn_mac64(d, d, b[i - whole + j]);                              \
            }                                                                                     \
        for (; i < n; i++) {                                                                      \
            const double d = D(x[i]);                                                             \
            a[i - whole] += d;                                                                    \
            b[i - whole] = fn_mac64(d, d, b[i - whole]);                                          \
        }                                                                                         \
    }
/* The same for each column of some rows, `step` numbers apart. */
#define FN_GATHER_ROWS(D, W)                                                                      \
    {                                                                                             \
        const ptrdiff_t whole = n - n % FN_WIDE;                                                  \
        for (; rows >= 8; rows -= 8, x += 8 * step) {                                             \
            for (ptrdiff_t c = 0; c < whole; c += FN_WIDE) {                                      \
                const fn_wide d0 = W(x + c), d1 = W(x + step + c);                                \
                const fn_wide d2 = W(x + 2 * step + c), d3 = W(x + 3 * step + c);                 \
                const fn_wide d4 = W(x + 4 * step + c), d5 = W(x + 5 * step + c);                 \
                const fn_wide d6 = W(x + 6 * step + c), d7 = W(x + 7 * step + c);                 \
                const fn_wide odd = fn_wide_mac(                                                  \
                    d7, d7, fn_wide_mac(d5, d5, fn_wide_mac(d3, d3, fn_wide_square(d1))));        \
                const fn_wide even = fn_wide_mac(                                                 \
                    d6, d6, fn_wide_mac(d4, d4, fn_wide_mac(d2, d2, fn_wide_square(d0))));        \
                const fn_wide sum =                                                               \
                    fn_wide_add(fn_wide_add(fn_wide_add(d0, d1), fn_wide_add(d2, d3)),            \
                                fn_wide_add(fn_wide_add(d4, d5), fn_wide_add(d6, d7)));           \
                fn_wide_store(a + c, fn_wide_add(fn_wide_load(a + c), sum));                      \
                fn_wide_store(b + c, fn_wide_add(fn_wide_load(b + c), fn_wide_add(even, odd)));   \
            }                                                                                     \
            for (ptrdiff_t c = whole; c < n; c++) {                                               \
                const double d0 = D(x[c]), d1 = D(x[step + c]);                                   \
                const double d2 = D(x[2 * step + c]), d3 = D(x[3 * step + c]);                    \
                const double d4 = D(x[4 * step + c]), d5 = D(x[5 * step + c]);                    \
                const double d6 = D(x[6 * step + c]), d7 = D(x[7 * step + c]);                    \
                const double odd = fn_mac64(d7, d7, fn_mac64(d5, d5, fn_mac64(d3, d3, d1 * d1))); \
                const double even = fn_mac64(d6, d6, fn_mac64(d4, d4, fn_mac64(d2, d2, d0 * d0)));\
                a[c] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7));                        \
                b[c] += even + odd;                                                               \
            }                                                                                     \
        }                                                                                         \
        for (; rows > 0; rows--, x += step)                                                       \
            for (ptrdiff_t c = 0; c < n; c++) {                                                   \
                const double d = D(x[c]);                                                         \
                a[c] += d;                                                                        \
                b[c] = fn_mac64(d, d, b[c]);                                                      \
            }                                                                                     \
    }
#define FN_WIDE_FROM_PIVOTS(p) fn_wide_sub(fn_wide_float(p), fn_wide_load(pivot + c))
#define FN_FROM_PIVOTS(v) ((double)(v) - pivot[c])
static inline void fn_sums(const float *x, ptrdiff_t n, ptrdiff_t ahead, double *first,
                           double *second)
    FN_SUMS(FN_ITSELF, fn_wide_float)
static inline void fn_sums_about(const float *x, ptrdiff_t n, ptrdiff_t ahead, double pivot,
                                 double *first, double *second) FN_SUMS(FN_FROM_PIVOT, FN_WIDE_FROM_PIVOT)
static inline void fn_gather(const float *x, ptrdiff_t n, ptrdiff_t ahead,
                             double *FN_RESTRICT a, double *FN_RESTRICT b) 
    FN_GATHER(FN_ITSELF, fn_wide_float)
static inline void fn_gather_about(const float *x, ptrdiff_t n, ptrdiff_t ahead, double pivot,
                                   double *FN_RESTRICT a, double *FN_RESTRICT b)
    FN_GATHER(FN_FROM_PIVOT, FN_WIDE_FROM_PIVOT)
static inline void fn_gather_rows(const float *FN_RESTRICT x, ptrdiff_t step, ptrdiff_t rows,
                                  ptrdiff_t n, double *FN_RESTRICT a, double *FN_RESTRICT b)
    FN_GATHER_ROWS(FN_ITSELF, fn_wide_float)
static inline void fn_gather_rows_about(const float *FN_RESTRICT x, ptrdiff_t step, ptrdiff_t rows,
                                        ptrdiff_t n, const double *FN_RESTRICT pivot,
                                        double *FN_RESTRICT a, double *FN_RESTRICT b)
    FN_GATHER_ROWS(FN_FROM_PIVOTS, FN_WIDE_FROM_PIVOTS)
/* Of floats that are added up four at a time: so many partial sums side by side. */
#define FN_PAIRS 16
/* Those 8 apart first, then 4, 2 and 1. */
FN_INLINE double fn_added_up(const double *v) {
#if defined(__AVX512F__)
    const __m512d w = _mm512_add_pd(_mm512_loadu_pd(v), _mm512_loadu_pd(v + 8));
    const __m256d h = _mm256_add_pd(_mm512_castpd512_pd256(w), _mm512_extractf64x4_pd(w, 1));
    const __m128d q = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
    return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
#elif defined(__AVX2__)
    const __m256d w = _mm256_add_pd(_mm256_loadu_pd(v), _mm256_loadu_pd(v + 8));
    const __m256d u = _mm256_add_pd(_mm256_loadu_pd(v + 4), _mm256_loadu_pd(v + 12));
    const __m256d h = _mm256_add_pd(w, u);
    const __m128d q = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
    return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
#else
    double t[8];
    for (int j = 0; j < 8; j++) t[j] = v[j] + v[j + 8];
    FN_FOLD(t, 4) FN_FOLD(t, 2)
    return t[0] + t[1];
#endif
}
/* bfloat16 is a float32 cut short: converted on the way, not in a pass of its own. */
#define FN_BF16_FROM_PIVOT(v) ((double)fn_from_bf16(v) - pivot)
#define FN_WIDE_BF16_FROM_PIVOT(p) fn_wide_sub(fn_wide_bf16(p), fn_wide_all(pivot))
static inline void fn_wide_sums_bf16(const uint16_t *x, ptrdiff_t n, ptrdiff_t ahead,
                                     double *first, double *second) FN_SUMS(FN_BF16, fn_wide_bf16)
static inline void fn_sums_about_bf16(const uint16_t *x, ptrdiff_t n, ptrdiff_t ahead, double pivot,
                                      double *first, double *second) 
    FN_SUMS(FN_BF16_FROM_PIVOT, FN_WIDE_BF16_FROM_PIVOT)
/* Four numbers, and their squares of 16 bits, are added up in float before they go into a double lane.
 * That is exact while the largest is at most 8 times the smallest.  Where it is more, the four are
 * spread over 7/8 of the largest, and what a float loses, 2^-22 of its square, is 2^-20 of what they add to
 * the squared deviations, or less: a bfloat16 has 2^-9.  Two numbers of 16 bits lie in one of 32, so
 * that half of the conversions fall away too.  Returns whether a float can hold the squares. */
FN_INLINE int fn_four_sums_bf16(const uint16_t *x, ptrdiff_t n, ptrdiff_t ahead, int centred,
                                double *first, double *second) {
    double a[FN_PAIRS] = {0}, b[FN_PAIRS] = {0};
    ptrdiff_t i = 0;
    for (; i + 64 <= n; i += 64) {
        uint32_t p[FN_PAIRS], q[FN_PAIRS];
        memcpy(p, x + i, sizeof p);
        memcpy(q, x + i + 32, sizeof q);
        FN_FETCH((const char *)(x + i) + ahead);
        FN_FETCH((const char *)(x + i + 32) + ahead);
        for (int j = 0; j < FN_PAIRS; j++) {
            const float p0 = fn_float(p[j] << 16), p1 = fn_float(p[j] & 0xffff0000u);
            const float q0 = fn_float(q[j] << 16), q1 = fn_float(q[j] & 0xffff0000u);
            if (centred) a[j] += (double)((p0 + p1) + (q0 + q1));
            b[j] += (double)(fn_fma32(p0, p0, p1 * p1) + fn_fma32(q0, q0, q1 * q1));
        }
    }
    for (; i < n; i += FN_PAIRS)
        for (int j = 0; j < FN_PAIRS && i + j < n; j++) {
            const double v = (double)fn_from_bf16(x[i + j]);
            if (centred) a[j] += v;
            b[j] = fn_mac64(v, v, b[j]);
        }
    if (centred) *first = fn_added_up(a);
    *second = fn_added_up(b);
    /* below, squares that vanished might be missed */
    return *second < 1e38 && *second > 1e-30 * (double)n;
}
static inline void fn_sums_bf16(const uint16_t *x, ptrdiff_t n, ptrdiff_t ahead, double *first,
                                double *second) {
    if (!fn_four_sums_bf16(x, n, ahead, 1, first, second))
        fn_wide_sums_bf16(x, n, ahead, first, second);
}
static inline double fn_squares_bf16(const uint16_t *x, ptrdiff_t n, ptrdiff_t ahead) {
    double second;
    return fn_four_sums_bf16(x, n, ahead, 0, NULL, &second) ? second : fn_wide_squares_bf16(x, n, ahead);
}
static inline double fn_fold(double *v) {
    FN_FOLD(v, 16) FN_FOLD(v, 8) FN_FOLD(v, 4) FN_FOLD(v, 2)
    return v[0] + v[1];
}

/* ---- moments and their merge --------------------------------------------------------------
 * Moments are five arrays, `step` apart: count, mean, the rest of the mean, the sum of squared
 * deviations, and its rest. */

/* From sums about a pivot.  Where squares cancel - the mean is 64 standard deviations or more from
 * the pivot - a mean would lose more than 2^-44 deviations, three units of an output of 2^-20: such
 * groups are flagged, to be summed again about their mean.  The cost is seen in few data, a sum
 * about zero costs a third less than one about a pivot. */
FN_INLINE int fn_moments_of_sum(double first, double second, double pivot, double *m,
                                ptrdiff_t step) {
    const double count = m[0], d = first / count;
    const double m2 = fn_fma64(-first, d, second); /* the product must not round */
    const double mean = pivot + d, back = mean - pivot;
    m[step] = count > 0 ? mean : 0.0;
    m[2 * step] = count > 0 ? (pivot - (mean - back)) + (d - back) : 0.0;
    m[2 * step] += count > 0 ? fn_fma64(-count, d, first) / count : 0.0;
    m[3 * step] = count > 0 ? (m2 > 0 || m2 != m2 ? m2 : 0.0) : 0.0;
    m[4 * step] = 0;
    return !(first * d <= 4096.0 * m2) & (count > 0);
}
static inline int fn_moments_of_sums(ptrdiff_t n, const double *FN_RESTRICT first,
                                     const double *FN_RESTRICT second, double pivot,
                                     double *FN_RESTRICT m, ptrdiff_t step,
                                     uint8_t *FN_RESTRICT again) {
    int any = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const int flag = fn_moments_of_sum(first[i], second[i], pivot, m + i, step);
        again[i] = (uint8_t)flag;
        any |= flag;
    }
    return any;
}

/* total + rest += v; `rest` takes what rounding loses (Knuth's two-sum). */
static inline void fn_add_two(double *total, double *rest, double v) {
    const double sum = *total + v, back = sum - *total;
    *rest += (*total - (sum - back)) + (v - back);
    *total = sum;
}

/* Of doubles: the sum of x - mean, and of (x - mean)^2 as two numbers.  A sum of doubles has no bits to
 * spare: 1,000 equal squares, as black and white pixels give, would all round the same way.  Lanes are
 * added up in short chains, and the chains exactly. */
#define FN_CHAIN 256
static inline void fn_about(const double *x, ptrdiff_t n, ptrdiff_t ahead, double mean,
                            double *first, double *second, double *second_rest) {
    const int k = 0;
    enum { M = FN_LANES / FN_WIDE };
    double lanes[FN_LANES], total[FN_LANES], rest[FN_LANES] = {0}, deviation[FN_LANES];
    fn_wide t[M], deviations[M];
    ptrdiff_t i = 0;
    for (int j = 0; j < M; j++) t[j] = deviations[j] = fn_wide_all(0);
    while (i < n) {
        const ptrdiff_t end = n - i < FN_CHAIN ? n : i + FN_CHAIN;
        fn_wide v[M];
        for (int j = 0; j < M; j++) v[j] = fn_wide_all(0);
        for (; i + FN_LANES <= end; i += FN_LANES) {
            FN_FETCH_32(x + i, ahead)
            for (int j = 0; j < M; j++) {
                const fn_wide d = fn_wide_sub(fn_wide_load(x + i + j * FN_WIDE), fn_wide_all(mean));
                v[j] = fn_wide_mac(d, d, v[j]);
                deviations[j] = fn_wide_add(deviations[j], d);
            }
        }
        if (i < end) { /* the last chain's last numbers */
            for (int j = 0; j < M; j++) {
                fn_wide_store(lanes + j * FN_WIDE, v[j]);
                fn_wide_store(deviation + j * FN_WIDE, deviations[j]);
            }
            for (int j = 0; i < end; i++, j++) {
                const double d = x[i] - mean;
                lanes[j] = fn_mac64(d, d, lanes[j]);
                deviation[j] += d;
            }
            for (int j = 0; j < M; j++) {
                v[j] = fn_wide_load(lanes + j * FN_WIDE);
                deviations[j] = fn_wide_load(deviation + j * FN_WIDE);
            }
        }
        for (int j = 0; j < M; j++) { /* fn_add_two */
            const fn_wide sum = fn_wide_add(t[j], v[j]), back = fn_wide_sub(sum, t[j]);
            const fn_wide lost = fn_wide_add(fn_wide_sub(t[j], fn_wide_sub(sum, back)),
                                             fn_wide_sub(v[j], back));
            fn_wide_store(rest + j * FN_WIDE,
                          fn_wide_add(fn_wide_load(rest + j * FN_WIDE), lost));
            t[j] = sum;
        }
    }
    for (int j = 0; j < M; j++) {
        fn_wide_store(total + j * FN_WIDE, t[j]);
        fn_wide_store(deviation + j * FN_WIDE, deviations[j]);
    }
    for (int half = FN_LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) {
            fn_add_two(&total[j], &rest[j], total[j + half]);
            rest[j] += rest[j + half];
            deviation[j] += deviation[j + half];
        }
    *first = deviation[0];
    *second = total[0];
    *second_rest = rest[0];
}

/* Doubles have no bits to spare, so columns of them go twice: about their first row for a mean, then
 * about that for the rest of it and for the squares, whose sum is kept as two numbers. */
static inline void fn_rows_about(const double *FN_RESTRICT x, ptrdiff_t step, ptrdiff_t rows,
                                 ptrdiff_t n, const double *FN_RESTRICT pivot,
                                 double *FN_RESTRICT total) {
    for (; rows >= 4; rows -= 4, x += 4 * step)
        for (ptrdiff_t c = 0; c < n; c++) {
            const double p = pivot[c];
            total[c] += ((x[c] - p) + (x[step + c] - p)) +
                        ((x[2 * step + c] - p) + (x[3 * step + c] - p));
        }
    for (; rows > 0; rows--, x += step)
        for (ptrdiff_t c = 0; c < n; c++) total[c] += x[c] - pivot[c];
}
static inline void fn_squares_about(const double *FN_RESTRICT x, ptrdiff_t step, ptrdiff_t rows,
                                    ptrdiff_t n, const double *FN_RESTRICT mean,
                                    double *FN_RESTRICT total, double *FN_RESTRICT m2,
                                    double *FN_RESTRICT m2_rest) {
    for (; rows >= 4; rows -= 4, x += 4 * step)
        for (ptrdiff_t c = 0; c < n; c++) {
            const double p = mean[c], d0 = x[c] - p, d1 = x[step + c] - p;
            const double d2 = x[2 * step + c] - p, d3 = x[3 * step + c] - p;
            fn_add_two(&m2[c], &m2_rest[c],
                       fn_mac64(d0, d0, d1 * d1) + fn_mac64(d2, d2, d3 * d3));
            total[c] += (d0 + d1) + (d2 + d3);
        }
    for (; rows > 0; rows--, x += step)
        for (ptrdiff_t c = 0; c < n; c++) {
            const double d = x[c] - mean[c];
            fn_add_two(&m2[c], &m2_rest[c], d * d);
            total[c] += d;
        }
}

/* Chan, Golub and LeVeque (1979), with each sum kept as two numbers.  Empty parts change nothing:
 * into an empty one the factor is 1, from an empty one it is 0. */
static inline void fn_merge(double *FN_RESTRICT into, const double *FN_RESTRICT other, ptrdiff_t n,
                            ptrdiff_t step) {
    FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
        double mean = into[step + i], rest = into[2 * step + i];
        double m2 = into[3 * step + i], m2_rest = into[4 * step + i];
        const double count = into[i] + other[i];
        const double f = count > 0 ? other[i] / count : 0.0;
        const double extra = other[2 * step + i] - rest;
        const double delta = other[step + i] - mean;
        const double whole = delta + extra;
        const double together = mean + other[step + i];
        fn_add_two(&mean, &rest, delta * f);
        /* beside an infinity there are no differences: it stays, or it is no number */
        mean = fabs(delta) < INFINITY ? mean : together;
        fn_add_two(&m2, &m2_rest, other[3 * step + i]);
        fn_add_two(&m2, &m2_rest, whole * whole * (into[i] * f));
        into[i] = count;
        into[step + i] = mean;
        into[2 * step + i] = rest + extra * f;
        into[3 * step + i] = m2;
        into[4 * step + i] = m2_rest + other[4 * step + i];
    }
}

/* 1 / sqrt(v + rest), to half a unit: sqrt and / round twice, one Newton step mends it. */
FN_INLINE double fn_inverse_root(double v, double rest) {
    const double r = 1.0 / sqrt(v), product = v * r;
    const double error = fn_fma64(-product, r, 1.0) - fn_fma64(v, r, -product) * r - rest * r * r;
    const double better = r + 0.5 * r * error;
    return v > 0.0 && v < INFINITY ? better : r;
}

/* rstd of float groups from their variances.  A constant group with eps = 0 is all bias: its scale
 * is 0, not infinity. */
FN_INLINE double fn_rstd(double var, double eps) {
    const double v = var + eps, r = fn_inverse_root(v, 0.0);
    return v != 0.0 ? r : 0.0;
}
static inline void fn_rstds(ptrdiff_t n, const double *FN_RESTRICT var, double eps,
                            double *FN_RESTRICT rstd) {
    for (ptrdiff_t i = 0; i < n; i++) rstd[i] = fn_rstd(var[i], eps);
}

#endif
