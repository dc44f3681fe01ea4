/* What the gate measures fastnorm's kernels with: rows normalised in the plainest way that a
   compiler turns into vector instructions. It does the same sort of work, so a machine that is
   slower at one is slower at the other; and it never changes. Changing it means a new gate.json. */

#include <math.h>
#include <stddef.h>

#define ROW 1024
#define LANES 32

static void row(float *y, const float *x) {
    float sums[LANES] = {0}, squares[LANES] = {0}, sum = 0, square = 0;
    for (int i = 0; i < ROW; i += LANES)
        for (int k = 0; k < LANES; k++) sums[k] += x[i + k];
    for (int k = 0; k < LANES; k++) sum += sums[k];
    float mean = sum / ROW;
    for (int i = 0; i < ROW; i += LANES)
        for (int k = 0; k < LANES; k++) squares[k] += (x[i + k] - mean) * (x[i + k] - mean);
    for (int k = 0; k < LANES; k++) square += squares[k];
    float rstd = 1 / sqrtf(square / ROW + 1e-5f);
    for (int i = 0; i < ROW; i++) y[i] = (x[i] - mean) * rstd;
}

void rows(float *y, const float *x, ptrdiff_t count, int threads) {
    if (threads < 2) {
        for (ptrdiff_t i = 0; i < count; i++) row(y + i * ROW, x + i * ROW);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t i = 0; i < count; i++) row(y + i * ROW, x + i * ROW);
}
