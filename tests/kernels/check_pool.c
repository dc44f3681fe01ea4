/* The threads of the kernels (pool.h) without kernels: each turn once, whoever else is at it.
 *
 *     cc -std=c11 -O1 -g -pthread -fsanitize=thread -I fastnorm/_core \
 *         tests/kernels/check_pool.c -lm
 *
 * Ends with 1, and says what is wrong, if anything is. With an argument nothing is forked, which
 * ThreadSanitizer does not follow. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "threads.h"

enum { CALLERS = 4, TURNS = 300, THREADS = 9, JOBS = 3000, CHILDREN = 40, FORKS = 600 };

static atomic_int failures, helped;

static void wrong(const char *what) {
    if (atomic_fetch_add(&failures, 1) < 10) printf("%s\n", what);
}

typedef struct {
    int ran[TURNS]; /* how often: not atomic, as turns write what nobody else does */
    int seen[THREADS];
    atomic_int busy[THREADS];
    int nested, rounding;
    pid_t process;
} Work;

static void count(void *work, ptrdiff_t turn, int thread) {
    Work *w = work;
    if (thread) atomic_store(&helped, 1);
    if (w->process != getpid()) wrong("a forked child runs a turn of its parent's");
    if (atomic_exchange(&w->busy[thread], 1)) wrong("two threads have the same scratch memory");
    if (fegetround() != w->rounding) wrong("a helper rounds as its caller does not");
    w->ran[turn]++;
    w->seen[thread]++;
    for (volatile int i = 0; i < 300; i++) {
    }
    if (w->nested && turn % 7 == 0) {
        Work inner = {.rounding = w->rounding, .process = w->process};
        share_out(5, 3, (Sharing){0, 0}, count, &inner);
        for (int i = 0; i < 5; i++)
            if (inner.ran[i] != 1) wrong("a turn within a turn was not run once");
    }
    atomic_store(&w->busy[thread], 0);
}
/* Jobs of all kinds, at times with a pause in which helpers fall asleep. */
static void run_jobs(unsigned seed, int jobs) {
    Work *w = malloc(sizeof *w);
    for (int job = 0; job < jobs; job++) {
        const int turns = rand_r(&seed) % (TURNS + 1), threads = 1 + rand_r(&seed) % THREADS;
        const Sharing how = {rand_r(&seed) % 2, rand_r(&seed) % 2};
        int sum = 0;
        memset(w, 0, sizeof *w);
        w->process = getpid();
        w->nested = rand_r(&seed) % 4 == 0;
        w->rounding = rand_r(&seed) % 2 ? FE_TONEAREST : FE_UPWARD;
        fesetround(w->rounding);
        share_out(turns, threads, how, count, w);
        fesetround(FE_TONEAREST);
        for (int i = 0; i < TURNS; i++)
            if (w->ran[i] != (i < turns)) wrong("a turn was not run once");
        for (int i = 0; i < THREADS; i++) {
            sum += w->seen[i];
            if (i >= threads && w->seen[i]) wrong("more threads than were asked for");
        }
        if (sum != turns) wrong("turns are missing");
        if (rand_r(&seed) % 8 == 0) usleep(rand_r(&seed) % 300);
    }
    free(w);
}
static void *call(void *number) {
    run_jobs((unsigned)(intptr_t)number, JOBS);
    return NULL;
}
/* In a child that was forked while others were in the middle of something. */
static void be_a_child(unsigned seed) {
    alarm(100);
    failures = helped = 0;
    run_jobs(seed, 50);
    while (!helped) run_jobs(seed, 50); /* on a busy machine helpers come late */
    _exit(failures != 0);
}

/* Forks while shares are dealt, which takes longer the more there are. */
static void *deal(void *stop) {
    Work *w = calloc(1, sizeof *w);
    w->process = getpid(), w->rounding = FE_TONEAREST;
    while (!*(atomic_int *)stop) share_out(2 * THREADS, THREADS, (Sharing){0, 0}, count, w);
    free(w);
    return NULL;
}
static void fork_while_dealing(void) {
    atomic_int stop = 0;
    pthread_t dealer;
    pthread_create(&dealer, NULL, deal, &stop);
    for (int i = 0; i < FORKS; i++) {
        int status = 0;
        const pid_t child = fork();
        if (!child) {
            alarm(60);
            failures = 0;
            run_jobs(7000 + (unsigned)i, 3);
            _exit(failures != 0);
        }
        if (waitpid(child, &status, 0) != child || status) wrong("a child forked while dealing");
    }
    stop = 1;
    pthread_join(dealer, NULL);
}

int main(int given, char **unused) {
    pthread_t callers[CALLERS];
    (void)unused;
    run_jobs(99, 50);
    for (intptr_t i = 0; i < CALLERS; i++) pthread_create(&callers[i], NULL, call, (void *)(i + 1));
    for (int i = 0; given == 1 && i < CHILDREN; i++) {
        usleep(3000);
        const pid_t child = fork();
        int status = 0;
        if (!child) be_a_child(1000 + (unsigned)i);
        if (waitpid(child, &status, 0) != child || status) {
            wrong("a forked child did not do its work, or got no help");
        }
    }
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], NULL);
    if (given == 1) fork_while_dealing();
    while (!helped) run_jobs(7, 50);
    printf("%d jobs of %d callers, %d failed\n", CALLERS * JOBS, CALLERS, failures);
    return failures != 0;
}
