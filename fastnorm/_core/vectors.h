/* The few vector operations that compilers do not find in plain loops, for each instruction set. */
#ifndef FASTNORM_VECTORS_H
#define FASTNORM_VECTORS_H

#include "check.h"
#include "numbers.h"
#include "sizes.h"

/* FN_WIDE doubles from as many numbers that lie side by side.  Left to itself, gcc loads twice as
 * many, takes them apart and converts the halves: 2.8 cycles for the sums of 16 numbers instead of
 * 2.4 (AMD EPYC, Zen 5).  FN_WAYS of a sum's lanes are in registers at a time where two are taken.
 */
#if defined(__AVX512F__)
enum { FN_WIDE = 8, FN_WAYS = 32 };
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
FN_INLINE fn_wide fn_wide_mul(fn_wide a, fn_wide b) { return _mm512_mul_pd(a, b); }
#elif defined(__AVX2__) && defined(__FMA__)
enum { FN_WIDE = 4, FN_WAYS = 16 };
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
FN_INLINE fn_wide fn_wide_mul(fn_wide a, fn_wide b) { return _mm256_mul_pd(a, b); }
#elif defined(__aarch64__) && defined(__ARM_NEON)
enum { FN_WIDE = 2, FN_WAYS = 16 };
typedef float64x2_t fn_wide;
FN_INLINE fn_wide fn_wide_float(const float *x) { return vcvt_f64_f32(vld1_f32(x)); }
FN_INLINE fn_wide fn_wide_bf16(const uint16_t *x) {
    const float v[2] = {fn_from_bf16(x[0]), fn_from_bf16(x[1])};
    return vcvt_f64_f32(vld1_f32(v));
}
FN_INLINE fn_wide fn_wide_load(const double *x) { return vld1q_f64(x); }
FN_INLINE void fn_wide_store(double *x, fn_wide v) { vst1q_f64(x, v); }
FN_INLINE fn_wide fn_wide_all(double v) { return vdupq_n_f64(v); }
FN_INLINE fn_wide fn_wide_add(fn_wide a, fn_wide b) { return vaddq_f64(a, b); }
FN_INLINE fn_wide fn_wide_sub(fn_wide a, fn_wide b) { return vsubq_f64(a, b); }
FN_INLINE fn_wide fn_wide_mac(fn_wide a, fn_wide b, fn_wide c) { return vfmaq_f64(c, a, b); }
FN_INLINE fn_wide fn_wide_mul(fn_wide a, fn_wide b) { return vmulq_f64(a, b); }
#else
enum { FN_WIDE = 1, FN_WAYS = 8 };
typedef double fn_wide;
FN_INLINE fn_wide fn_wide_float(const float *x) { return *x; }
FN_INLINE fn_wide fn_wide_bf16(const uint16_t *x) { return fn_from_bf16(*x); }
FN_INLINE fn_wide fn_wide_load(const double *x) { return *x; }
FN_INLINE void fn_wide_store(double *x, fn_wide v) { *x = v; }
FN_INLINE fn_wide fn_wide_all(double v) { return v; }
FN_INLINE fn_wide fn_wide_add(fn_wide a, fn_wide b) { return a + b; }
FN_INLINE fn_wide fn_wide_sub(fn_wide a, fn_wide b) { return a - b; }
FN_INLINE fn_wide fn_wide_mac(fn_wide a, fn_wide b, fn_wide c) { return fn_mac64(a, b, c); }
FN_INLINE fn_wide fn_wide_mul(fn_wide a, fn_wide b) { return a * b; }
#endif

/* Memory that is read, or written, soon.  The processor asks for it on its own, but a loop that
 * reads a block, then writes one, then reads again keeps losing its stream: 1.2 times on rows of
 * 768 from the last cache (AMD EPYC, Zen 5). */
#if defined(__GNUC__)
#define FN_FETCH(p) __builtin_prefetch(p)
#define FN_FETCH_TO(p) __builtin_prefetch(p, 1)
#else
#define FN_FETCH(p) (void)(p)
#define FN_FETCH_TO(p) (void)(p)
#endif
FN_INLINE void fn_fetch(const char *p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 64) FN_FETCH(p + i);
}

/* The sum of 16 doubles: those 8 apart first, then 4, 2 and 1. */
FN_INLINE double fn_added_up(const double *v) {
#if defined(__AVX512F__)
    const __m512d w = _mm512_add_pd(_mm512_loadu_pd(v), _mm512_loadu_pd(v + 8));
    const __m256d h = _mm256_add_pd(_mm512_castpd512_pd256(w), _mm512_extractf64x4_pd(w, 1));
#elif defined(__AVX2__)
    const __m256d w = _mm256_add_pd(_mm256_loadu_pd(v), _mm256_loadu_pd(v + 8));
    const __m256d u = _mm256_add_pd(_mm256_loadu_pd(v + 4), _mm256_loadu_pd(v + 12));
    const __m256d h = _mm256_add_pd(w, u);
#else
    double t[8];
    for (int j = 0; j < 8; j++) t[j] = v[j] + v[j + 8];
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
#endif
#if defined(__AVX2__)
    const __m128d q = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
    return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
#endif
}

/* How many of n bytes, `step` apart, come before those that are not 0, if these are side by side;
 * else -1.  Their `count` is 0 where there are none. */
static inline ptrdiff_t side_by_side(const char *chosen, ptrdiff_t step, ptrdiff_t n,
                                     ptrdiff_t *count) {
    ptrdiff_t first = 0, last;
    *count = *chosen ? n : 0;
    if (step == 0) return 0;
    if (step != 1) return -1;
    while (first < n && !chosen[first]) first++;
    const char *end = first < n ? memchr(chosen + first, 0, (size_t)(n - first)) : NULL;
    last = end ? end - chosen : n;
    *count = last - first;
    for (uint64_t eight; last + 8 <= n; last += 8) {
        memcpy(&eight, chosen + last, sizeof eight);
        if (eight) return -1;
    }
    while (last < n && !chosen[last]) last++;
    return last == n ? first : -1;
}
/* Keep of n numbers those whose byte is not 0, in their order: returns how many.  `to` has room for
 * n, and may be `from`, or begin before it. */
static inline ptrdiff_t fn_keep_f32(float *to, const float *from, const char *chosen, ptrdiff_t n) {
    ptrdiff_t i = 0, kept = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    for (; i + 16 <= n; i += 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(chosen + i));
        const __mmask16 which = _mm_test_epi8_mask(bytes, bytes);
        const __m512 x = _mm512_loadu_ps(from + i);
        FN_FETCH((const char *)(from + i) + PREFETCH_BYTES);
        _mm512_storeu_ps(to + kept, _mm512_maskz_compress_ps(which, x));
        kept += _mm_popcnt_u32(which);
    }
#elif defined(__AVX2__) && defined(__BMI2__)
    for (; i + 8 <= n; i += 8) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(chosen + i));
        const __m128i none = _mm_cmpeq_epi8(bytes, _mm_setzero_si128());
        /* where each kept one comes from: a byte for each */
        const uint64_t which = ~(uint64_t)_mm_cvtsi128_si64(none);
        const __m128i places = _mm_cvtsi64_si128((int64_t)_pext_u64(0x0706050403020100, which));
        const __m256 x = _mm256_loadu_ps(from + i);
        _mm256_storeu_ps(to + kept, _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(places)));
        kept += _mm_popcnt_u64(which) / 8;
    }
#endif
    for (; i < n; i++) {
        to[kept] = from[i];
        kept += chosen[i] != 0;
    }
    return kept;
}
static inline ptrdiff_t fn_keep_f64(double *to, const double *from, const char *chosen,
                                    ptrdiff_t n) {
    ptrdiff_t i = 0, kept = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    for (; i + 8 <= n; i += 8) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(chosen + i));
        const __mmask8 which = (__mmask8)_mm_test_epi8_mask(bytes, bytes);
        const __m512d x = _mm512_loadu_pd(from + i);
        _mm512_storeu_pd(to + kept, _mm512_maskz_compress_pd(which, x));
        kept += _mm_popcnt_u32(which);
    }
#endif
    for (; i < n; i++) {
        to[kept] = from[i];
        kept += chosen[i] != 0;
    }
    return kept;
}

/* ---- non-temporal stores ----
 * A result larger than the last cache is not read again soon.  Stored without the caches, its lines
 * are not fetched first, which is a third of the traffic of a pass over memory.  A fence belongs
 * between the last of these and whoever reads the result in another thread. */

/* One cache line. */
FN_INLINE void fn_stream_line(void *to, const void *from) {
    FN_STORES_PENDING(1);
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
    for (int k = 0; k < 2; k++)
        _mm256_stream_si256((__m256i *)to + k, _mm256_loadu_si256((const __m256i *)from + k));
#elif defined(__SSE2__)
    for (int k = 0; k < 4; k++)
        _mm_stream_si128((__m128i *)to + k, _mm_loadu_si128((const __m128i *)from + k));
#else
    memcpy(to, from, 64);
#endif
}
/* n bytes: whole lines, and what lies before and behind them as usual.  A line of which only a part
 * is stored so takes several times as long. */
static inline void fn_stream(char *FN_RESTRICT to, const char *FN_RESTRICT from, size_t n) {
    const size_t head = (size_t)(-(uintptr_t)to % 64);
    if (n >= 256 + head) {
        memcpy(to, from, head);
        for (to += head, from += head, n -= head; n >= 64; to += 64, from += 64, n -= 64)
            fn_stream_line(to, from);
    }
    memcpy(to, from, n);
}
static inline void fn_stream_fence(void) {
    FN_STORES_PENDING(0);
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

#endif
