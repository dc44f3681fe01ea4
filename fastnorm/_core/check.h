/* A build that checks every bound: FASTNORM_CHECK=1 when it is built (setup.py). */
#ifndef FASTNORM_CHECK_H
#define FASTNORM_CHECK_H

#ifndef FN_CHECKED
#define FN_CHECKED 0
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The process ends here: before a kernel leaves what it was given, or where one has left its
 * scratch. */
static void fn_broken(const char *what) {
    fprintf(stderr, "fastnorm check failed: %s\n", what);
    abort();
}

/* Guard bytes are written behind each piece of scratch memory, and read when it is given back. */
#define FN_GUARD 64
static inline void fn_fill_guard(char *at) { memset(at, 0xA5, FN_GUARD); }
static inline int fn_guard_intact(const char *at) {
    for (int i = 0; i < FN_GUARD; i++)
        if (at[i] != (char)0xA5) return 0;
    return 1;
}

/* Whether this thread has non-temporal stores that no store fence has followed yet. */
#if FN_CHECKED
static __thread int fn_stores_pending;
#define FN_STORES_PENDING(v) (fn_stores_pending = (v))
#else
#define FN_STORES_PENDING(v) ((void)0)
#endif
static inline void fn_check_store_fence(void) {
#if FN_CHECKED
    if (fn_stores_pending) fn_broken("non-temporal stores that no store fence follows");
#endif
}

#endif
