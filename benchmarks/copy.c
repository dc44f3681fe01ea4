/* The least that any norm must do with memory: read what it reads, write what it writes. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512i vector;
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define STORE(p, v) _mm512_storeu_si512((void *)(p), v)
#define STREAM(p, v) _mm512_stream_si512((void *)(p), v)
#define XOR(a, b) _mm512_xor_si512(a, b)
#define FENCE() _mm_sfence()
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256i vector;
#define LOAD(p) _mm256_loadu_si256((const vector *)(p))
#define STORE(p, v) _mm256_storeu_si256((vector *)(p), v)
#define STREAM(p, v) _mm256_stream_si256((vector *)(p), v)
#define XOR(a, b) _mm256_xor_si256(a, b)
#define FENCE() _mm_sfence()
#elif defined(__SSE2__)
#include <emmintrin.h>
typedef __m128i vector;
#define LOAD(p) _mm_loadu_si128((const vector *)(p))
#define STORE(p, v) _mm_storeu_si128((vector *)(p), v)
#define STREAM(p, v) _mm_stream_si128((vector *)(p), v)
#define XOR(a, b) _mm_xor_si128(a, b)
#define FENCE() _mm_sfence()
#else /* plain C has no non-temporal stores */
typedef uint64_t vector;
#define LOAD(p) (*(const vector *)(p))
#define STORE(p, v) (*(vector *)(p) = (v))
#define STREAM(p, v) STORE(p, v)
#define XOR(a, b) ((a) ^ (b))
#define FENCE()
#endif

#define W sizeof(vector)

static void bytes(char *y, const char *a, const char *b, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = b ? a[i] ^ b[i] : a[i];
}

/* y = a, or a xor b: two arrays read for one that is written. */
static void part(char *y, const char *a, const char *b, size_t n, int past) {
    if (!past && !b) {
        memcpy(y, a, n);
        return;
    }
    size_t head = (W - (uintptr_t)y % W) % W; /* streaming stores need aligned addresses */
    if (head > n) head = n;
    bytes(y, a, b, head);
    size_t i = head;
    for (; i + 4 * W <= n; i += 4 * W) {
        vector v[4];
        for (int k = 0; k < 4; k++) v[k] = LOAD(a + i + k * W);
        if (b)
            for (int k = 0; k < 4; k++) v[k] = XOR(v[k], LOAD(b + i + k * W));
        if (past)
            for (int k = 0; k < 4; k++) STREAM(y + i + k * W, v[k]);
        else
            for (int k = 0; k < 4; k++) STORE(y + i + k * W, v[k]);
    }
    bytes(y + i, a + i, b ? b + i : NULL, n - i);
    FENCE();
}

void move(char *y, const char *a, const char *b, size_t n, int threads, int past) {
    if (threads < 2) { /* a team of one would still be called together */
        part(y, a, b, n, past);
        return;
    }
    size_t step = (n / threads + 4095) / 4096 * 4096;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        size_t first = step * t, last = first + step;
        if (first > n) first = n;
        if (last > n || t == threads - 1) last = n;
        part(y + first, a + first, b ? b + first : NULL, last - first, past);
    }
}
