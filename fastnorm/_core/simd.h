/* What the Cython kernels need and Cython cannot say: fused multiply-adds, the half-width
 * formats, and activations that a compiler can vectorise.  Everything is a plain loop or a
 * branch-free expression, except float16, whose conversion instruction has no C operator. */
#ifndef FASTNORM_SIMD_H
#define FASTNORM_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(_MSC_VER)
#define FN_RESTRICT __restrict
#else
#define FN_RESTRICT __restrict__
#endif

/* The arrays of a loop are the same or do not overlap: each element is read before it is written. */
#if defined(__clang__)
#define FN_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FN_IVDEP _Pragma("GCC ivdep")
#else
#define FN_IVDEP __pragma(loop(ivdep))
#endif

#if defined(_MSC_VER)
#define FN_INLINE static __forceinline
#elif defined(__GNUC__)
#define FN_INLINE static inline __attribute__((always_inline))
#else
#define FN_INLINE static inline
#endif

/* fma: one rounding, or as good as one.  Without the instruction a product of floats is exact in
 * double and the sum is rounded there first, which differs from a fused one once in 2^29; doubles
 * take the same road through x87's 64 bits, where there are any.  The library's fma(), emulated,
 * would be a hundred times slower.
 * mac: the same in sums, where a rounding more is nothing: never slower than * and +.
 * Contraction is off (-ffp-contract=off): no other operation is fused, whatever the compiler. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
#define FN_HAS_FMA 1
FN_INLINE float fn_fma32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FN_INLINE double fn_fma64(double a, double b, double c) { return __builtin_fma(a, b, c); }
FN_INLINE double fn_mac64(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
#define FN_HAS_FMA 0
FN_INLINE float fn_fma32(float a, float b, float c) { return (float)((double)a * b + c); }
FN_INLINE double fn_fma64(double a, double b, double c) {
    return (double)((long double)a * b + c);
}
FN_INLINE double fn_mac64(double a, double b, double c) { return a * b + c; }
#endif

static inline uint32_t fn_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float fn_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* ---- bfloat16 and float16 -------------------------------------------------------------- */

static inline float fn_from_bf16(uint16_t h) { return fn_float((uint32_t)h << 16); }

static inline uint16_t fn_to_bf16(float x) {
    uint32_t u = fn_bits(x);
    uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u); /* to nearest, ties to even */
    uint32_t nan = u | 0x400000u;                      /* quiet, sign kept */
    return (uint16_t)((x == x ? rounded : nan) >> 16);
}

/* The same of what arithmetic has made, whose not-a-numbers are quiet: they need only be cut short. */
FN_INLINE uint16_t fn_made_bf16(float x) {
    const uint32_t u = fn_bits(x);
    return (uint16_t)((u + (x == x ? 0x7fffu + ((u >> 16) & 1u) : 0u)) >> 16);
}

/* Exponents are rebased by integer addition; subnormals by a float subtraction, which
 * normalises them. */
static inline float fn_from_f16(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t exponent = magnitude & 0x0f800000u;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = normal + (112u << 23);
    uint32_t subnormal = fn_bits(fn_float(magnitude + (113u << 23)) - fn_float(113u << 23));
    uint32_t u = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
    return fn_float(u | ((uint32_t)(h & 0x8000u) << 16));
}

static inline uint16_t fn_to_f16(float x) {
    uint32_t u = fn_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    /* below 2^-14: adding 0.5 shifts the bits to their place and rounds them */
    uint32_t subnormal = fn_bits(fn_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t h = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
    return (uint16_t)(h | sign);
}

static inline void fn_load_bf16(const uint16_t *FN_RESTRICT x, ptrdiff_t n, float *FN_RESTRICT t) {
    for (ptrdiff_t i = 0; i < n; i++) t[i] = fn_from_bf16(x[i]);
}
static inline void fn_store_bf16(const float *FN_RESTRICT t, ptrdiff_t n, uint16_t *FN_RESTRICT y) {
    for (ptrdiff_t i = 0; i < n; i++) y[i] = fn_to_bf16(t[i]);
}
static inline void fn_load_f16(const uint16_t *FN_RESTRICT x, ptrdiff_t n, float *FN_RESTRICT t) {
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(t + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
#endif
    for (; i < n; i++) t[i] = fn_from_f16(x[i]);
}
static inline void fn_store_f16(const float *FN_RESTRICT t, ptrdiff_t n, uint16_t *FN_RESTRICT y) {
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(y + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(t + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) y[i] = fn_to_f16(t[i]);
}

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
        fn_add_two(&mean, &rest, delta * f);
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

/* ---- streaming stores --------------------------------------------------------------------
 * A result larger than the last cache is not read again soon.  Written past the caches, its lines
 * are not fetched first, which is a third of the traffic of a pass over memory.  A fence belongs
 * between the last of these and whoever reads the result in another thread. */
static inline void fn_stream(char *FN_RESTRICT to, const char *FN_RESTRICT from, size_t n) {
#if defined(__SSE2__)
    size_t head = (size_t)(-(uintptr_t)to % 64);
    if (n >= 256 + head) {
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
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* ---- activations ------------------------------------------------------------------------
 * float: branch-free, so that loops over them vectorise.  The polynomials are Chebyshev
 * interpolants; the comment beside each gives its largest relative error.
 * double: the C library's functions, correct to about one unit in the last place. */

/* x, or the number of its sign whose bits are `largest`, where that is nearer to zero; not a number
 * becomes one.  In integers: of two comparisons of floats gcc makes masks, which take as long as all the
 * rest of an exponential. */
FN_INLINE float fn_within32(float x, int32_t largest) {
    const uint32_t sign = fn_bits(x) & 0x80000000u;
    int32_t size = (int32_t)(fn_bits(x) & 0x7fffffffu);
    size = size > largest ? largest : size;
    return fn_float(sign | (uint32_t)size);
}

/* e^x = 2^n e^r, |r| <= ln(2)/2; 0.19 * 2^-24.  2^n is applied in two halves, so that results
 * below 2^-126 come out subnormal instead of vanishing and those above 2^128 infinite. */
FN_INLINE float fn_exp32(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = fn_within32(x, 0x42d00000);  /* 104 */
    float shifted = fn_fma32(x, 1.44269504f, magic);
    float n = shifted - magic;
    float r = fn_fma32(n, -0.693359375f, x);   /* ln 2 in two parts: the first has 9 bits */
    r = fn_fma32(n, 2.12194440e-4f, r);
    float p = 1.3934545e-3f;
    p = fn_fma32(p, r, 8.3637768e-3f);
    p = fn_fma32(p, r, 4.1666456e-2f);
    p = fn_fma32(p, r, 1.6666573e-1f);
    p = fn_fma32(p, r, 0.5f);
    p = fn_fma32(p * r, r, r) + 1.0f;
    int32_t k = (int32_t)(fn_bits(shifted) - fn_bits(magic));
    int32_t half = k >> 1;
    return p * fn_float((uint32_t)(half + 127) << 23) * fn_float((uint32_t)(k - half + 127) << 23);
}

/* 1 + e^x, to half a unit of 1 at least: 2^n in one piece, infinite from n = 128 on. */
FN_INLINE float fn_one_and_exp32(float x) {
    const float magic = 12582912.0f;
    x = fn_within32(x, 0x42b20000); /* 89 */
    float shifted = fn_fma32(x, 1.44269504f, magic);
    float n = shifted - magic;
    float r = fn_fma32(n, -0.693359375f, x);
    r = fn_fma32(n, 2.12194440e-4f, r);
    float p = 1.3934545e-3f;
    p = fn_fma32(p, r, 8.3637768e-3f);
    p = fn_fma32(p, r, 4.1666456e-2f);
    p = fn_fma32(p, r, 1.6666573e-1f);
    p = fn_fma32(p, r, 0.5f);
    p = fn_fma32(p * r, r, r) + 1.0f;
    int32_t k = (int32_t)fn_bits(shifted), least = (int32_t)fn_bits(magic) - 126;
    k = k < least ? least : k;
    return fn_fma32(p, fn_float(((uint32_t)k << 23) + 0x3f800000u), 1.0f);
}

FN_INLINE float fn_silu32(float x) { return x / fn_one_and_exp32(-x); }

/* x Phi(x), Phi(x) = erfc(-x/sqrt(2))/2.  erfc(t) = e^(-t^2) g(q)/(1 + 2t) with
 * q = (t - 2)/(t + 2); 0.34 * 2^-24 up to t = 10.6, where e^(-t^2) leaves float32.  The tail keeps
 * its relative precision: 1 + erf(x/sqrt(2)) would cancel there. */
FN_INLINE float fn_gelu32(float x) {
    float a = fn_within32(fn_float(fn_bits(x) & 0x7fffffffu), 0x41700000); /* 15 */
    float t = a * 0.70710678f;
    float q = (t - 2.0f) / (t + 2.0f);
    float g = -0.000404705759f;
    g = fn_fma32(g, q, -0.00123237038f);
    g = fn_fma32(g, q, 0.00132110389f);
    g = fn_fma32(g, q, 0.00863596704f);
    g = fn_fma32(g, q, -0.00806384347f);
    g = fn_fma32(g, q, -0.0542061627f);
    g = fn_fma32(g, q, 0.164056093f);
    g = fn_fma32(g, q, -0.166031197f);
    g = fn_fma32(g, q, -0.09276402f);
    g = fn_fma32(g, q, 1.27697837f);
    float s = a * a;
    float rest = fn_fma32(a, a, -s); /* what a*a lost, restored below */
    float e = fn_exp32(-0.5f * s);
    float tail = 0.5f * g * e * (1.0f - 0.5f * rest) / (1.0f + 2.0f * t);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

/* x (1 + tanh(u))/2 = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3) */
FN_INLINE float fn_gelu_tanh32(float x) {
    float u2 = x * fn_fma32(x * x, 0.0713548163f, 1.59576912f);
    return x / fn_one_and_exp32(-u2);
}

/* Below 0.625 an odd polynomial, 0.012 * 2^-24; above, (1 - e)/(1 + e) with e = e^(-2|x|). */
FN_INLINE float fn_tanh32(float x) {
    float a = x < 0.0f ? -x : x;
    float z = x * x;
    float p = 2.27260613e-3f;
    p = fn_fma32(p, z, -8.3262939e-3f);
    p = fn_fma32(p, z, 2.17635911e-2f);
    p = fn_fma32(p, z, -5.39586172e-2f);
    p = fn_fma32(p, z, 1.33333012e-1f);
    p = fn_fma32(p, z, -3.33333343e-1f);
    float small = fn_fma32(x * z, p, x);
    float e = fn_exp32(-2.0f * a);
    float large = (1.0f - e) / (1.0f + e);
    large = x < 0.0f ? -large : large;
    return a >= 0.625f ? large : small; /* not a number stays so */
}

FN_INLINE float fn_relu32(float x) { return x < 0.0f ? 0.0f : x; } /* keeps NaN */

static inline double fn_relu64(double x) { return x < 0.0 ? 0.0 : x; }
static inline double fn_silu64(double x) { return x / (1.0 + exp(-x)); }
static inline double fn_gelu64(double x) { return x * 0.5 * erfc(x * -0.70710678118654752440); }
static inline double fn_gelu_tanh64(double x) {
    return x / (1.0 + exp(-1.5957691216057307 * fma(0.044715 * x, x * x, x)));
}
static inline double fn_tanh64(double x) { return tanh(x); }

#define FN_ACTIVATION(name)                                                   \
    static inline void fn_##name##_double(double *t, ptrdiff_t n) {          \
        for (ptrdiff_t i = 0; i < n; i++) t[i] = fn_##name##64(t[i]);        \
    }
FN_ACTIVATION(relu)
FN_ACTIVATION(silu)
FN_ACTIVATION(gelu)
FN_ACTIVATION(gelu_tanh)
FN_ACTIVATION(tanh)


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
    if (col && wv && bv) fn_step_to_##real(x, y, n, hi, r, shift, w, b, 1, 1, 1, 1);  \
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

#define FN_STREAMED_STEP(real, fma)                                                               \
    FN_INLINE void fn_step_past_##real(const real *x, real *y, ptrdiff_t n, real hi, real r,      \
                                       real shift, const real *w, const real *b, int wv, int bv,  \
                                       ptrdiff_t ahead) {                                         \
        enum { M = 64 / sizeof(real) };                                                           \
        const real w0 = w ? w[0] : 1, b0 = b ? b[0] : 0;                                          \
        ptrdiff_t i = (ptrdiff_t)((0 - (uintptr_t)y) % 64 / sizeof(real));                        \
        if (i > n) i = n;                                                                         \
        fn_step_to_##real(x, y, i, &hi, &r, &shift, w, b, 0, w || b, wv, bv);                     \
        for (; i + M <= n; i += M) {                                                              \
            real t[M];                                                                            \
            FN_FETCH((const char *)(x + i) + ahead);                                              \
            for (int j = 0; j < M; j++) {                                                         \
                t[j] = fma(x[i + j] - hi, r, shift);                                              \
                if (w || b) t[j] = fma(t[j], wv ? w[i + j] : w0, bv ? b[i + j] : b0);             \
            }                                                                                     \
            fn_stream_line(y + i, t);                                                             \
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

/* ---- the backward pass --------------------------------------------------------------------
 * Two sums over dy and dy (x - mean), and the step that uses them,
 *     dx = r g - c1 - xhat c2,   g = dy weight,   xhat = (x - hi) r + shift,
 * with c1 and c2 the sums of g and g xhat over the group, times r over the count.
 * FN_LANES partial sums side by side fix the order of a sum, whatever the vector's width: two sums
 * of eight AVX2 registers in all, as many as two multiply-add units of four cycles keep busy. */

#define FN_FOLDED(v) (v[0] + v[1])
/* Loops of a fixed length, and a rest that adds up beside the lanes: these stay in registers. */
#define FN_ADD_UP(v) FN_FOLD(v, 8) FN_FOLD(v, 4) FN_FOLD(v, 2)

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
        FN_ADD_UP(a) FN_ADD_UP(b)                                                                 \
        gb[0] += FN_FOLDED(a) + rest_a;                                                           \
        gw[0] += FN_FOLDED(b) + rest_b;                                                           \
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
#define FN_CHUNK 1024

/* Whether floats can hold xhat: `read_statistics` in backward.pxi. */
FN_INLINE int fn_narrow(double mean, double rstd) {
    return rstd == 0 || (fabs(rstd) > 7.9e-31 && fabs(rstd) < 1.3e30 && fabs(mean) < 1.3e30);
}
#define FN_PAIR_FLOATS(name)                                                                      \
    fn_pair_planes_of_##name(x, 0, dy, 0, 1, n, q->ahead, s, s + 1, s + 2, w, 1, lanes);
#define FN_PAIR_DOUBLES(name) fn_sum_planes_double(x, 0, dy, 0, 1, n, q->ahead, &mean, &rstd, w, lanes);
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
                PAIR(name)                                                                        \
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
            PAIR(name)                                                                            \
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
#undef FN_PAIR_FLOATS
#undef FN_PAIR_DOUBLES
#define FN_PAIR_FLOATS(name)                                                                      \
    fn_pair_planes_of_##name(x, 0, dy, 0, 1, n, q->ahead, s, s + 1, s + 2, NULL, 0, lanes);
#define FN_PAIR_DOUBLES(name)                                                                     \
    fn_sum_planes_double(x, 0, dy, 0, 1, n, q->ahead, &mean, &rstd, NULL, lanes);
FN_GROUP_BACK(float, float, float, FN_PAIR_FLOATS)
FN_GROUP_BACK(bf16, uint16_t, float, FN_PAIR_FLOATS)
FN_GROUP_BACK(double, double, double, FN_PAIR_DOUBLES)

#endif
