/* Work shared out among threads. */
#ifndef FASTNORM_THREADS_H
#define FASTNORM_THREADS_H

#include "operand.h"

/* One turn of a pass's work; `thread` tells whose scratch memory is to be used. */
typedef void (*Turn)(void *work, ptrdiff_t turn, int thread);

typedef struct {
    int backwards; /* each thread's share of the turns from its end */
    int small;     /* too little work to wake a thread that sleeps */
} Sharing;

#if !defined(_WIN32)
#include "pool.h"
#define FN_THREADS 1
#elif defined(_OPENMP)
#include <omp.h>
#define FN_THREADS 1
#else
#define FN_THREADS 0
#endif

/* From now on another library lends threads, by the addresses of its RunOnThreads and CountThreads
 * (pool.h). 0 where the processor time of a thread does not tell whether it is awake. */
static inline int lend_threads(ptrdiff_t run, ptrdiff_t count) {
#if !defined(_WIN32) && FN_FUTEX
    lent.count = (CountThreads)count;
    lent.run = (RunOnThreads)run;
    return 1;
#else
    (void)run, (void)count;
    return 0;
#endif
}

/* Each turn once, by up to `threads` threads. */
static inline void share_out(ptrdiff_t turns, int threads, Sharing how, Turn run, void *work) {
#if !defined(_WIN32)
    if (threads > 1 && turns > 1 && run_shared(turns, threads, how, run, work)) return;
#elif defined(_OPENMP)
    if (threads > 1) {
        ptrdiff_t i;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (i = 0; i < turns; i++)
            run(work, how.backwards ? turns - 1 - i : i, omp_get_thread_num());
        return;
    }
#endif
    for (ptrdiff_t i = 0; i < turns; i++) run(work, how.backwards ? turns - 1 - i : i, 0);
}

#endif
