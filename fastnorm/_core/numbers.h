/* What C leaves to each compiler: pragmas, fused multiply-adds, bits, and the half-width formats.
 */
#ifndef FASTNORM_NUMBERS_H
#define FASTNORM_NUMBERS_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(_MSC_VER)
#define FN_RESTRICT __restrict
#else
#define FN_RESTRICT __restrict__
#endif

/* The arrays of a loop are the same or do not overlap: each element is read before it is written.
 */
#if defined(__clang__)
#define FN_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FN_IVDEP _Pragma("GCC ivdep")
#else
#define FN_IVDEP __pragma(loop(ivdep))
#endif

/* FN_APART: a loop in a function of its own has all registers to itself. */
#if defined(_MSC_VER)
#define FN_INLINE static __forceinline
#define FN_APART static __declspec(noinline)
#elif defined(__GNUC__)
#define FN_INLINE static inline __attribute__((always_inline))
#define FN_APART static __attribute__((noinline))
#else
#define FN_INLINE static inline
#define FN_APART static
#endif

/* fma: one rounding, or as good as one.  Without the instruction a product of floats is exact in
 * double and the sum is rounded there first, which differs from a fused one once in 2^29; doubles
 * take the same road through x87's 64 bits, where there are any.  The library's fma(), emulated,
 * would be a hundred times slower.
 * mac: the same in sums, where a rounding more is nothing: never slower than * and +.
 * Contraction is off (-ffp-contract=off): no other operation is fused, whatever the compiler. */
#define FN_HAS_EXTENDED (LDBL_MANT_DIG > DBL_MANT_DIG)
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

/* The same of what arithmetic has made, whose not-a-numbers are quiet: they need only be cut short.
 */
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

#endif
