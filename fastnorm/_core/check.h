/* A build that checks every bound: FASTNORM_CHECK=1 when it is built (setup.py). */
#ifndef FASTNORM_CHECK_H
#define FASTNORM_CHECK_H

#ifndef FN_CHECKED
#define FN_CHECKED 0
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The process ends here, before memory that is not ours is touched. */
static void fn_broken(const char *what) {
    fprintf(stderr, "fastnorm: out of bounds: %s\n", what);
    abort();
}

/* Fences are written behind each piece of scratch memory, and read when it is given back. */
#define FN_FENCE 64
static inline void fn_set_fence(char *at) { memset(at, 0xA5, FN_FENCE); }
static inline int fn_fence_stands(const char *at) {
    for (int i = 0; i < FN_FENCE; i++)
        if (at[i] != (char)0xA5) return 0;
    return 1;
}

/* Whether this thread has written past the caches since its last fence. */
#if FN_CHECKED
static __thread int fn_unfenced;
#define FN_UNFENCED(v) (fn_unfenced = (v))
#else
#define FN_UNFENCED(v) ((void)0)
#endif
static inline void fn_check_fence(void) {
#if FN_CHECKED
    if (fn_unfenced) fn_broken("results past the caches that no fence follows");
#endif
}

#endif
