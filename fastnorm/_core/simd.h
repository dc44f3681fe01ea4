/* What the Cython kernels need and Cython cannot say: fused multiply-adds, the half-width
 * formats, and activations that a compiler can vectorise.  Everything is a plain loop or a
 * branch-free expression, except float16, whose conversion instruction has no C operator. */
#ifndef FASTNORM_SIMD_H
#define FASTNORM_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(_MSC_VER)
#define FN_RESTRICT __restrict
#else
#define FN_RESTRICT __restrict__
#endif

/* fma: one rounding, or as good as one.  Without the instruction a product of floats is exact in
 * double and the sum is rounded there first, which differs from a fused one once in 2^29; doubles
 * take the same road through x87's 64 bits, where there are any.  The library's fma(), emulated,
 * would be a hundred times slower.
 * mac: the same in sums, where a rounding more is nothing: never slower than * and +.
 * Contraction is off (-ffp-contract=off): no other operation is fused, whatever the compiler. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
static inline float fn_fma32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double fn_fma64(double a, double b, double c) { return __builtin_fma(a, b, c); }
static inline double fn_mac64(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
static inline float fn_fma32(float a, float b, float c) { return (float)((double)a * b + c); }
static inline double fn_fma64(double a, double b, double c) {
    return (double)((long double)a * b + c);
}
static inline double fn_mac64(double a, double b, double c) { return a * b + c; }
#endif

static inline uint32_t fn_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float fn_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* ---- bfloat16 and float16 -------------------------------------------------------------- */

static inline float fn_from_bf16(uint16_t h) { return fn_float((uint32_t)h << 16); }

static inline uint16_t fn_to_bf16(float x) {
    uint32_t u = fn_bits(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16; /* to nearest, ties to even */
    uint32_t nan = (u >> 16) | 0x40u;                          /* quiet, sign kept */
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
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

static inline void fn_load_f32(const float *x, ptrdiff_t n, float *t) { memcpy(t, x, (size_t)n * 4); }
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

/* ---- the step every norm ends in ---------------------------------------------------------
 * y = ((x - mean) rstd) weight + bias.  The mean is a pair hi + lo; x - hi is exact where it
 * matters, and `shift` = -lo rstd restores the rest inside the fused multiply-add.  Folding the
 * mean into the bias instead would lose every digit at a large mean/std.
 * x and y may be the same array: each element is read before it is written, hence FN_IVDEP.
 * A weight or bias either follows the run (`wv`, `bv`) or is one number for all of it. */
#if defined(__clang__)
#define FN_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FN_IVDEP _Pragma("GCC ivdep")
#else
#define FN_IVDEP __pragma(loop(ivdep))
#endif

#define FN_STEP(real, fma, HI, R, SHIFT)                                                          \
    {                                                                                             \
        const real w0 = w[0], b0 = b[0];                                                          \
        if (wv && bv) {                                                                           \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++)                                            \
                y[i] = fma(fma(x[i] - HI, R, SHIFT), w[i], b[i]);                                 \
        } else if (wv) {                                                                          \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++)                                            \
                y[i] = fma(fma(x[i] - HI, R, SHIFT), w[i], b0);                                   \
        } else if (bv) {                                                                          \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++)                                            \
                y[i] = fma(fma(x[i] - HI, R, SHIFT), w0, b[i]);                                   \
        } else {                                                                                  \
            FN_IVDEP for (ptrdiff_t i = 0; i < n; i++)                                            \
                y[i] = fma(fma(x[i] - HI, R, SHIFT), w0, b0);                                     \
        }                                                                                         \
    }

#define FN_STEPS(real, fma)                                                                       \
    /* one statistic for the run */                                                               \
    static inline void fn_step_run_##real(const real *x, real *y, ptrdiff_t n, real hi, real r,   \
                                          real shift, const real *w, int wv, const real *b,       \
                                          int bv) FN_STEP(real, fma, hi, r, shift)                \
    /* a statistic for each column of the row */                                                  \
    static inline void fn_step_row_##real(const real *x, real *y, ptrdiff_t n, const real *hi,    \
                                          const real *r, const real *shift, const real *w,        \
                                          int wv, const real *b, int bv)                          \
        FN_STEP(real, fma, hi[i], r[i], shift[i])                                                 \
    static inline void fn_affine_##real(real *y, ptrdiff_t n, const real *w, int wv,              \
                                        const real *b, int bv) {                                  \
        for (ptrdiff_t i = 0; i < n; i++) y[i] = fma(y[i], w[wv ? i : 0], b[bv ? i : 0]);         \
    }                                                                                             \
    static inline void fn_add_##real(real *y, const real *FN_RESTRICT t, ptrdiff_t n) {           \
        for (ptrdiff_t i = 0; i < n; i++) y[i] += t[i];                                           \
    }
FN_STEPS(float, fn_fma32)
FN_STEPS(double, fn_fma64)

/* ---- activations ------------------------------------------------------------------------
 * float: branch-free, so that loops over them vectorise.  The polynomials are Chebyshev
 * interpolants; the comment beside each gives its largest relative error.
 * double: the C library's functions, correct to about one unit in the last place. */

/* e^x = 2^n e^r, |r| <= ln(2)/2; 0.19 * 2^-24.  2^n is applied in two halves, so that results
 * below 2^-126 come out subnormal instead of vanishing and those above 2^128 infinite. */
static inline float fn_exp32(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
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

static inline float fn_silu32(float x) { return x / (1.0f + fn_exp32(-x)); }

/* x Phi(x), Phi(x) = erfc(-x/sqrt(2))/2.  erfc(t) = e^(-t^2) g(q)/(1 + 2t) with
 * q = (t - 2)/(t + 2); 0.34 * 2^-24 up to t = 10.6, where e^(-t^2) leaves float32.  The tail keeps
 * its relative precision: 1 + erf(x/sqrt(2)) would cancel there. */
static inline float fn_gelu32(float x) {
    float a = x < 0.0f ? -x : x;
    a = a > 15.0f ? 15.0f : a;
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
    float y = x * (x < 0.0f ? tail : 1.0f - tail);
    return x != x ? x : y;
}

/* x (1 + tanh(u))/2 = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3) */
static inline float fn_gelu_tanh32(float x) {
    float u2 = x * fn_fma32(x * x, 0.0713548163f, 1.59576912f);
    return x / (1.0f + fn_exp32(-u2));
}

/* Below 0.625 an odd polynomial, 0.012 * 2^-24; above, (1 - e)/(1 + e) with e = e^(-2|x|). */
static inline float fn_tanh32(float x) {
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
    return a < 0.625f ? small : large;
}

static inline float fn_relu32(float x) { return x < 0.0f ? 0.0f : x; } /* keeps NaN */

static inline double fn_relu64(double x) { return x < 0.0 ? 0.0 : x; }
static inline double fn_silu64(double x) { return x / (1.0 + exp(-x)); }
static inline double fn_gelu64(double x) { return x * 0.5 * erfc(x * -0.70710678118654752440); }
static inline double fn_gelu_tanh64(double x) {
    return x / (1.0 + exp(-1.5957691216057307 * fma(0.044715 * x, x * x, x)));
}
static inline double fn_tanh64(double x) { return tanh(x); }

#define FN_ACTIVATION(name, type, bits)                                       \
    static inline void fn_##name##_##type(type *t, ptrdiff_t n) {            \
        for (ptrdiff_t i = 0; i < n; i++) t[i] = fn_##name##bits(t[i]);      \
    }
FN_ACTIVATION(relu, float, 32)
FN_ACTIVATION(silu, float, 32)
FN_ACTIVATION(gelu, float, 32)
FN_ACTIVATION(gelu_tanh, float, 32)
FN_ACTIVATION(tanh, float, 32)
FN_ACTIVATION(relu, double, 64)
FN_ACTIVATION(silu, double, 64)
FN_ACTIVATION(gelu, double, 64)
FN_ACTIVATION(gelu_tanh, double, 64)
FN_ACTIVATION(tanh, double, 64)

#endif
