/* The threads of the kernels.
 *
 * The caller can finish alone: it takes turns until none is left, helpers take some if they are
 * awake in time, and the caller waits for turns that somebody has begun and for nothing else. So a
 * processor that is busy with another program costs no more than its help.
 *
 * Each thread begins with its own share of the turns, the same one in each call, which its cache
 * may still hold; then it takes from the shares of the others.
 *
 * One call has the helpers at a time. Another one, of another Python thread or from within a turn,
 * runs alone. A forked child begins without helpers, and starts its own.
 *
 * Another library may lend its threads. After each piece of work they look for the next one for
 * some milliseconds, and meanwhile they keep helpers off the processors: a job that comes then runs
 * on them. While they sleep it does not, as whoever runs something on them waits for each. */
#ifndef FASTNORM_POOL_H
#define FASTNORM_POOL_H

#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#if defined(__linux__) && !defined(FN_NO_FUTEX)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#define FN_FUTEX 1
#else
#define FN_FUTEX 0
#endif

#include "numbers.h"

enum {
    POOL_THREADS = 1024,  /* at most, the caller's own included */
    POOL_STACK = 1 << 20, /* bytes of a helper's stack */
    TURN_BITS = 16,       /* of a share's word: turns that nobody has begun */
    HELPER_SPINS = 50000, /* ns that a helper looks for work before it sleeps */
    CALLER_SPINS = 20000, /* ns that the caller looks for the last turns' end before it sleeps */
    LONG_WAIT = 500000,   /* ns after which a helper has lost its processor to another program */
    ALONE = 200000000,    /* ns for which small jobs then run alone */
};

/* The number of the job, and the turns of a share that nobody has begun: one word, so that a helper
 * that is late cannot take a turn of a job that it has not seen. */
typedef struct {
    _Alignas(64) _Atomic uint64_t word;
} Share;

/* Whether a helper sleeps; on a cache line of its own, too. */
typedef struct {
    _Alignas(64) _Atomic uint32_t asleep;
} Bed;

/* How another library runs `part` of all numbers from `begin` to `end` on its threads, in pieces of
 * `grain`; and how many threads it would take. Both give 0, or failed. */
typedef int32_t (*RunOnThreads)(int64_t begin, int64_t end, int64_t grain,
                                void (*part)(int64_t first, int64_t end, void *work), void *work);
typedef int32_t (*CountThreads)(uint32_t *count);

static struct {
    RunOnThreads run;   /* NULL: no threads are lent */
    CountThreads count; /* NULL: whatever a call asks for */
    int seen;           /* whether `clock` is the processor time of one of them */
    clockid_t clock;
} lent;

static struct {
    atomic_flag taken;     /* by the call that has the helpers */
    int helpers;           /* that have been started */
    int64_t ended;         /* when the last job did, in ns */
    int64_t alone_until;   /* small jobs: another program has a helper's processor */
    uint64_t jobs;         /* how many there were, and the number of the last one */
    _Atomic uint64_t job;  /* the number of the last one that helpers take part in */
    /* what the job is: as long as one of its turns has not ended, nobody changes it */
    Turn run;
    void *work;
    ptrdiff_t turns;
    int threads, backwards;
    fenv_t rounding;       /* and what becomes of subnormals: as in the caller */
    atomic_int processor;  /* that the caller was last seen on */
    _Alignas(64) _Atomic uint32_t done; /* turns that have ended */
    _Atomic uint32_t waiting;           /* whether the caller sleeps until all have */
    Share shares[POOL_THREADS];
    Bed beds[POOL_THREADS];
} pool = {.taken = ATOMIC_FLAG_INIT};

/* ---- sleep ---- */

#if FN_FUTEX
/* Sleep while *word is `value`, or less long. */
static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void renew_sleep(void) {}
static void wake(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
#else
static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t pool_changed = PTHREAD_COND_INITIALIZER;

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    pthread_mutex_lock(&pool_lock);
    while (atomic_load(word) == value) pthread_cond_wait(&pool_changed, &pool_lock);
    pthread_mutex_unlock(&pool_lock);
}
static void renew_sleep(void) { /* another thread may have held them at the fork */
    pool_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool_changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
static void wake(_Atomic uint32_t *word) {
    (void)word;
    pthread_mutex_lock(&pool_lock);
    pthread_cond_broadcast(&pool_changed);
    pthread_mutex_unlock(&pool_lock);
}
#endif

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
/* Leave the core's units to whoever shares it, for some tens of cycles. */
static inline void relax(void) {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");
#endif
}
/* The processor that this thread is on; -1 where the system does not tell. */
static inline int processor_here(void) {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}
static inline uint64_t job_of(uint64_t word) { return word >> TURN_BITS; }
static inline int takes_part(int thread, uint64_t job) {
    return thread < POOL_THREADS && job_of(atomic_load(&pool.shares[thread].word)) == job;
}

/* ---- a job ---- */

/* Take the turns of a share that nobody has begun; adds how many that were to `ran`. */
static uint32_t take_share(int share, int thread, uint64_t job, uint32_t ran) {
    _Atomic uint64_t *word = &pool.shares[share].word;
    uint64_t seen = atomic_load(word);
    while (job_of(seen) == job && seen % (1u << TURN_BITS) > 0) {
        if (!atomic_compare_exchange_weak(word, &seen, seen - 1)) continue;
        const ptrdiff_t left = (ptrdiff_t)(seen % (1u << TURN_BITS));
        const ptrdiff_t first = pool.turns * share / pool.threads;
        const ptrdiff_t last = pool.turns * (share + 1) / pool.threads;
        if (thread && !ran) fesetenv(&pool.rounding);
        pool.run(pool.work, pool.backwards ? first + left - 1 : last - left, thread);
        ran++;
        seen = atomic_load(word);
    }
    return ran;
}
/* Take turns, from the own share first and then from the others'; returns how many that were. */
static uint32_t take_turns(int thread, uint64_t job) {
    uint32_t ran = 0;
    for (int k = thread; takes_part(k, job); k++) ran = take_share(k, thread, job, ran);
    for (int k = 0; k < thread && takes_part(k, job); k++) ran = take_share(k, thread, job, ran);
    return ran;
}
/* Wake the two helpers that follow a thread in a tree, if they sleep. */
static void wake_followers(int thread, uint64_t job) {
    for (int k = 2 * thread + 1; k <= 2 * thread + 2 && takes_part(k, job); k++)
        if (atomic_load(&pool.beds[k].asleep) && atomic_exchange(&pool.beds[k].asleep, 0))
            wake(&pool.beds[k].asleep);
}
/* The number of a job after `seen`. */
static uint64_t next_job(int thread, uint64_t seen) {
    _Atomic uint32_t *asleep = &pool.beds[thread].asleep;
    uint64_t job;
    const int here = processor_here(), alone = here < 0 || here != atomic_load(&pool.processor);
    const int64_t end = now_ns() + (alone ? HELPER_SPINS : 0); /* the caller is not kept off */
    do {
        for (int i = 0; i < 16; i++) {
            if ((job = atomic_load_explicit(&pool.job, memory_order_acquire)) != seen) return job;
            relax();
        }
    } while (now_ns() < end);
    for (;;) {
        atomic_store(asleep, 1);
        if ((job = atomic_load(&pool.job)) != seen) break;
        sleep_while(asleep, 1);
    }
    atomic_store(asleep, 0);
    return job;
}
static void *help(void *number) {
    const int thread = (int)(intptr_t)number;
    uint64_t job = 0;
    for (;;) {
        job = next_job(thread, job);
        if (!takes_part(thread, job)) continue;
        wake_followers(thread, job);
        const uint32_t ran = take_turns(thread, job);
        if (!ran) continue;
        atomic_fetch_add(&pool.done, ran);
        if (atomic_load(&pool.waiting)) wake(&pool.done);
    }
    return NULL;
}

/* ---- threads that are lent ---- */

/* The turns of some of a job's threads, on one that is lent and keeps its own rounding. */
static void take_parts(int64_t first, int64_t end, void *job) {
    uint32_t ran = 0;
    fenv_t own;
    fegetenv(&own);
    for (int64_t k = first; k < end; k++) ran += take_turns((int)k, *(const uint64_t *)job);
    fesetenv(&own);
#if FN_FUTEX
    if (first == 1) lent.seen = !pthread_getcpuclockid(pthread_self(), &lent.clock);
#endif
    atomic_fetch_add(&pool.done, ran);
}
/* Whether they look for work, or do some: then the processor time of one goes on. The first job
 * runs on them to find out which they are. */
static int lent_are_awake(void) {
    struct timespec t, later;
    if (!lent.run) return 0;
    if (!lent.seen) return 1;
    if (clock_gettime(lent.clock, &t) || clock_gettime(lent.clock, &later)) {
        lent.seen = 0; /* it has ended */
        return 1;
    }
    return t.tv_nsec != later.tv_nsec;
}

/* ---- helpers ---- */

/* Have that many, or as many as the system allows; they take no signals. */
static void start_helpers(int count) {
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t helper;
    if (pool.helpers >= count || pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, POOL_STACK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.helpers < count) {
        void *number = (void *)(intptr_t)(pool.helpers + 1);
        if (pthread_create(&helper, &attributes, help, number)) break;
        pool.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}
/* A forked child has no helpers, its own or lent, and what its parent was at is none of its
 * business. */
static void forget_helpers(void) {
    pool.helpers = 0;
    lent.run = NULL;
    renew_sleep();
    for (int k = 0; k < POOL_THREADS; k++) {
        atomic_store(&pool.beds[k].asleep, 0);
        atomic_store(&pool.shares[k].word, 0); /* they may have been dealt for a job to come */
    }
    atomic_store(&pool.waiting, 0);
    atomic_flag_clear(&pool.taken);
}
/* When the library is loaded: a fork that has begun calls nobody who comes meanwhile. */
__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, forget_helpers);
}

/* Each turn once, by up to `threads` threads; 0, and nothing is done, where they are taken. */
static int run_shared(ptrdiff_t turns, int threads, Sharing how, Turn run, void *work) {
    if (turns >> TURN_BITS || atomic_flag_test_and_set(&pool.taken)) return 0;
    const int64_t began = now_ns();
    if (how.small && began < pool.alone_until) {
        atomic_flag_clear(&pool.taken);
        return 0;
    }
    uint32_t most = POOL_THREADS;
    if (lent.count && lent.count(&most)) most = 1;
    threads = (int)least(turns, least(threads, least(most, POOL_THREADS)));
    if (threads < 2) {
        atomic_flag_clear(&pool.taken);
        return 0;
    }
    const int borrows = lent_are_awake();
    if (!borrows) start_helpers(threads - 1);
    pool.run = run;
    pool.work = work;
    pool.turns = turns;
    pool.threads = threads;
    pool.backwards = how.backwards;
    fegetenv(&pool.rounding);
    atomic_store(&pool.processor, processor_here());
    atomic_store(&pool.done, 0);
    const uint64_t job = ++pool.jobs;
    for (int k = 0; k < threads; k++) {
        const ptrdiff_t n = turns * (k + 1) / threads - turns * k / threads;
        atomic_store(&pool.shares[k].word, job << TURN_BITS | (uint64_t)n);
    }
    if (borrows) {
        lent.run(0, threads, 1, take_parts, (void *)&job);
    } else {
        atomic_store(&pool.job, job);
        /* a sleeper comes too late for a small job, unless another one follows at once */
        if (!how.small || began - pool.ended < HELPER_SPINS) wake_followers(0, job);
    }
    const uint32_t ran = take_turns(0, job), all = (uint32_t)turns;
    uint32_t done = atomic_fetch_add(&pool.done, ran) + ran;
    if (done != all) {
        const int64_t waits = now_ns();
        while ((done = atomic_load(&pool.done)) != all && now_ns() - waits < CALLER_SPINS) relax();
        atomic_store(&pool.waiting, 1);
        while ((done = atomic_load(&pool.done)) != all) sleep_while(&pool.done, done);
        atomic_store(&pool.waiting, 0);
        pool.ended = now_ns();
        if (pool.ended - waits > LONG_WAIT) pool.alone_until = pool.ended + ALONE;
    } else {
        pool.ended = now_ns();
    }
    atomic_flag_clear(&pool.taken);
    return 1;
}

#endif
