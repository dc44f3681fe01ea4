/* Activations that a compiler can vectorise. */
#ifndef FASTNORM_ACTIVATIONS_H
#define FASTNORM_ACTIVATIONS_H

#include "numbers.h"

/* ---- activations ------------------------------------------------------------------------
 * float: branch-free, so that loops over them vectorise.  The polynomials are Chebyshev
 * interpolants; the comment at each gives its largest relative error.
 * double: the C library's functions, correct to about one unit in the last place. */

/* x, or the number of its sign whose bits are `largest`, where that is nearer to zero; not a number
 * becomes one.  In integers: of two comparisons of floats gcc makes masks, which take as long as
 * all the rest of an exponential. */
FN_INLINE float fn_within32(float x, int32_t largest) {
    const uint32_t sign = fn_bits(x) & 0x80000000u;
    int32_t size = (int32_t)(fn_bits(x) & 0x7fffffffu);
    size = size > largest ? largest : size;
    return fn_float(sign | (uint32_t)size);
}

/* e^x = 2^n e^r, |r| <= ln(2)/2: e^r, to 0.19 * 2^-24, and a float whose bits end in those of n. */
FN_INLINE float fn_exp_parts32(float x, uint32_t *n_bits) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float shifted = fn_fma32(x, 1.44269504f, magic);
    float n = shifted - magic;
    float r = fn_fma32(n, -0.693359375f, x);   /* ln 2 in two parts: the first has 9 bits */
    r = fn_fma32(n, 2.12194440e-4f, r);
    float p = 1.3934545e-3f;
    p = fn_fma32(p, r, 8.3637768e-3f);
    p = fn_fma32(p, r, 4.1666456e-2f);
    p = fn_fma32(p, r, 1.6666573e-1f);
    p = fn_fma32(p, r, 0.5f);
    *n_bits = fn_bits(shifted);
    return fn_fma32(p * r, r, r) + 1.0f;
}
#define FN_MAGIC_BITS 0x4b400000u /* of 1.5 * 2^23 */

/* e^x.  2^n is applied in two halves, so that results below 2^-126 come out subnormal instead of
 * vanishing and those above 2^128 infinite. */
FN_INLINE float fn_exp32(float x) {
    uint32_t bits;
    const float p = fn_exp_parts32(fn_within32(x, 0x42d00000), &bits); /* 104 */
    const int32_t k = (int32_t)(bits - FN_MAGIC_BITS), half = k >> 1;
    return p * fn_float((uint32_t)(half + 127) << 23) * fn_float((uint32_t)(k - half + 127) << 23);
}

/* 1 + e^x, to half a unit of 1 at least: 2^n in one piece, infinite from n = 128 on. */
FN_INLINE float fn_one_and_exp32(float x) {
    uint32_t bits;
    const float p = fn_exp_parts32(fn_within32(x, 0x42b20000), &bits); /* 89 */
    const int32_t least = (int32_t)FN_MAGIC_BITS - 126;
    int32_t k = (int32_t)bits;
    k = k < least ? least : k;
    return fn_fma32(p, fn_float(((uint32_t)k << 23) + 0x3f800000u), 1.0f);
}

FN_INLINE float fn_silu_32(float x) { return x / fn_one_and_exp32(-x); }

/* g of erfc(t) = e^(-t^2) g/(1 + 2t), a polynomial of (t - 2)/(t + 2); 0.34 * 2^-24 up to t = 10.6,
 * where e^(-t^2) leaves float32. */
FN_INLINE float fn_erfc_factor32(float t) {
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
    return fn_fma32(g, q, 1.27697837f);
}

/* x Phi(x), Phi(x) = erfc(-x/sqrt(2))/2.  The tail keeps its relative precision: 1 + erf(x/sqrt(2))
 * would cancel there. */
FN_INLINE float fn_gelu_32(float x) {
    float a = fn_within32(fn_float(fn_bits(x) & 0x7fffffffu), 0x41700000); /* 15 */
    float t = a * 0.70710678f;
    float g = fn_erfc_factor32(t);
    float s = a * a;
    float rest = fn_fma32(a, a, -s); /* what a*a lost, restored below */
    float e = fn_exp32(-0.5f * s);
    float tail = 0.5f * g * e * (1.0f - 0.5f * rest) / (1.0f + 2.0f * t);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

/* x (1 + tanh(u))/2 = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3) */
FN_INLINE float fn_gelu_tanh_32(float x) {
    float u2 = x * fn_fma32(x * x, 0.0713548163f, 1.59576912f);
    return x / fn_one_and_exp32(-u2);
}

/* Below 0.625 an odd polynomial, 0.012 * 2^-24; above, (1 - e)/(1 + e) with e = e^(-2|x|). */
FN_INLINE float fn_tanh_32(float x) {
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

/* Below 0.875 an odd polynomial, 0.15 * 2^-24; above, 1 - erfc(|x|), which is 1 from 4 on. */
FN_INLINE float fn_erf_32(float x) {
    float a = x < 0.0f ? -x : x;
    float z = x * x;
    float p = 8.67543131e-5f;
    p = fn_fma32(p, z, -8.21111375e-4f);
    p = fn_fma32(p, z, 5.20674838e-3f);
    p = fn_fma32(p, z, -2.68615857e-2f);
    p = fn_fma32(p, z, 1.1283733e-1f);
    p = fn_fma32(p, z, -3.76126349e-1f);
    p = fn_fma32(p, z, 1.28379166e-1f);
    float small = fn_fma32(x, p, x);
    float t = fn_within32(a, 0x40800000); /* 4 */
    float large = 1.0f - fn_erfc_factor32(t) * fn_exp32(-t * t) / (1.0f + 2.0f * t);
    large = x < 0.0f ? -large : large;
    return a >= 0.875f ? large : small; /* not a number stays so */
}

/* both keep NaN */
FN_INLINE float fn_relu_32(float x) { return x < 0.0f ? 0.0f : x; }
FN_INLINE float fn_relu6_32(float x) { return x > 6.0f ? 6.0f : fn_relu_32(x); }

/* All of them, in the order of IN_KERNELS in _formulas.py: X of each; and those that a caller may
 * name, which have a slope. */
#define FN_NAMED_ACTIVATIONS(X) X(IDENTITY) X(RELU) X(RELU6) X(SILU) X(GELU) X(GELU_TANH)
#define FN_ACTIVATIONS(X) FN_NAMED_ACTIVATIONS(X) X(TANH) X(ERF)

#define FN_NAME(NAME) NAME,
typedef enum { FN_ACTIVATIONS(FN_NAME) ACTIVATION_COUNT } Activation;
#undef FN_NAME

FN_INLINE float activated_f32(float t, Activation activation) {
    switch (activation) {
    case RELU: return fn_relu_32(t);
    case RELU6: return fn_relu6_32(t);
    case SILU: return fn_silu_32(t);
    case GELU: return fn_gelu_32(t);
    case GELU_TANH: return fn_gelu_tanh_32(t);
    case TANH: return fn_tanh_32(t);
    case ERF: return fn_erf_32(t);
    default: return t;
    }
}
FN_INLINE double activated_f64(double t, Activation activation) {
    switch (activation) {
    case RELU: return t < 0.0 ? 0.0 : t;
    case RELU6: return t < 0.0 ? 0.0 : t > 6.0 ? 6.0 : t;
    case SILU: return t / (1.0 + exp(-t));
    case GELU: return t * 0.5 * erfc(t * -0.70710678118654752440);
    case GELU_TANH: return t / (1.0 + exp(-1.5957691216057307 * fma(0.044715 * t, t * t, t)));
    case TANH: return tanh(t);
    case ERF: return erf(t);
    default: return t;
    }
}

/* ---- their slopes -----------------------------------------------------------------------
 * f' of what goes into f.  Not a number stays so, but for RELU and RELU6, where dy passes as in
 * PyTorch.  Of IDENTITY: t is the slope, which a function of the user's gave. */

/* Of x s, s = 1 / (1 + e^-u), where du is the slope of u: s + x du s (1 - s).  By e = e^-|u|, of
 * which neither s nor 1 - s loses a digit. */
FN_INLINE float fn_gated_slope32(float x, float u, float du) {
    uint32_t n;
    const float size = fn_float(fn_bits(fn_within32(u, 0x42ae0000)) & 0x7fffffffu); /* 87 */
    const float p = fn_exp_parts32(-size, &n);
    const float e = p * fn_float((n - FN_MAGIC_BITS + 127) << 23); /* 2^n is normal */
    const float other = 1.0f / (1.0f + e), s = u < 0.0f ? e * other : other;
    return fn_fma32(x * du, e * other * other, s);
}
FN_INLINE float fn_silu_slope_32(float x) {
    const float bounded = fn_within32(x, 0x42d00000); /* 104 */
    return fn_gated_slope32(bounded, bounded, 1.0f);
}
FN_INLINE float fn_gelu_tanh_slope_32(float x) {
    const float bounded = fn_within32(x, 0x41400000), square = bounded * bounded; /* 12 */
    return fn_gated_slope32(bounded, bounded * fn_fma32(square, 0.0713548163f, 1.59576912f),
                            fn_fma32(square, 0.214064449f, 1.59576912f));
}
/* Phi(x) + x phi(x) */
FN_INLINE float fn_gelu_slope_32(float x) {
    const float bounded = fn_within32(x, 0x41700000); /* 15 */
    const float a = fn_float(fn_bits(bounded) & 0x7fffffffu), t = a * 0.70710678f, s = a * a;
    const float rest = fn_fma32(a, a, -s);
    const float e = fn_exp32(-0.5f * s) * (1.0f - 0.5f * rest);
    const float tail = 0.5f * fn_erfc_factor32(t) * e / (1.0f + 2.0f * t);
    return fn_fma32(bounded * e, 0.398942280f, x < 0.0f ? tail : 1.0f - tail);
}
FN_INLINE float slope_f32(float t, Activation activation) {
    float slope;
    switch (activation) {
    case RELU: return t <= 0.0f ? 0.0f : 1.0f;
    case RELU6: return t <= 0.0f || t >= 6.0f ? 0.0f : 1.0f;
    case SILU: slope = fn_silu_slope_32(t); break;
    case GELU: slope = fn_gelu_slope_32(t); break;
    case GELU_TANH: slope = fn_gelu_tanh_slope_32(t); break;
    default: return t;
    }
    /* in integers: of a comparison of floats gcc makes a branch here */
    const uint32_t not_a_number = (fn_bits(t) & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : 0;
    return fn_float(fn_bits(slope) | not_a_number);
}
FN_INLINE double fn_gated_slope64(double x, double u, double du) {
    const double e = exp(u < -700.0 ? 700.0 : -u), s = 1.0 / (1.0 + e);
    return s * (1.0 + x * du * (e * s));
}
FN_INLINE double slope_f64(double t, Activation activation) {
    const double bounded = t > 800.0 ? 800.0 : t < -800.0 ? -800.0 : t, square = bounded * bounded;
    switch (activation) {
    case RELU: return t <= 0.0 ? 0.0 : 1.0;
    case RELU6: return t <= 0.0 || t >= 6.0 ? 0.0 : 1.0;
    case SILU: return fn_gated_slope64(bounded, bounded, 1.0);
    case GELU:
        return 0.5 * erfc(bounded * -0.70710678118654752440) +
               bounded * exp(-0.5 * square) * 0.39894228040143267794;
    case GELU_TANH:
        return fn_gated_slope64(bounded,
                                1.5957691216057307 * fma(0.044715 * bounded, square, bounded),
                                1.5957691216057307 * fma(3.0 * 0.044715, square, 1.0));
    default: return t;
    }
}

#endif
