/* Work shared out among threads. */
#ifndef FASTNORM_THREADS_H
#define FASTNORM_THREADS_H

#include "numbers.h"
#if defined(_OPENMP)
#include <omp.h>
#define FN_OPENMP 1
#else
#define FN_OPENMP 0
#endif

/* One turn of a pass's work; `thread` tells whose scratch memory is to be used. */
typedef void (*Turn)(void *work, ptrdiff_t turn, int thread);

/* Each turn once, by up to `threads` threads: a fixed share for each, or whoever is free. */
static inline void share_out(ptrdiff_t turns, int threads, int fixed, Turn run, void *work) {
#if FN_OPENMP
    if (threads > 1 && fixed) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (ptrdiff_t turn = 0; turn < turns; turn++) run(work, turn, omp_get_thread_num());
        return;
    }
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (ptrdiff_t turn = 0; turn < turns; turn++) run(work, turn, omp_get_thread_num());
        return;
    }
#endif
    for (ptrdiff_t turn = 0; turn < turns; turn++) run(work, turn, 0);
}

#endif
