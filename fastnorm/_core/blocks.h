/* Memory of large results, kept for the next one.
 *
 * The C library returns blocks of more than 32 MB to the system at once and fetches them anew, page by
 * page and cleared: on 128 MB that takes as long as normalising them.  Results of 16 MB
 * and more therefore come from here, through NumPy's own door for allocators (NEP 49), and blocks
 * that are freed are kept, 256 MB of them at most (FASTNORM_KEEP_MB).  Telling the system that it may
 * have their pages back (MADV_FREE) would cost a third of what they save.
 * Linux only; elsewhere, and below that size, NumPy's allocator serves. */
#ifndef FASTNORM_BLOCKS_H
#define FASTNORM_BLOCKS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#if defined(__linux__) && defined(MADV_HUGEPAGE)
#define FN_BLOCKS 1

enum { FN_KEPT = 8, FN_HEADER = 64 };
#define FN_HUGE ((size_t)1 << 21) /* blocks are whole huge pages */

static struct {
    char *start;
    size_t size;
    uint64_t since;
} fn_kept[FN_KEPT];
static size_t fn_kept_bytes, fn_kept_limit = (size_t)256 << 20;
static uint64_t fn_kept_clock;
/* Only ever tried: whoever finds it taken goes to the system.  A child that was forked while another
 * thread held it would wait for good. */
static pthread_mutex_t fn_kept_lock = PTHREAD_MUTEX_INITIALIZER;

/* Under the lock: give back what was freed longest ago, until n bytes more and a place are there. */
static int fn_make_room(size_t n) {
    for (;;) {
        int place = -1, oldest = -1;
        for (int i = 0; i < FN_KEPT; i++) {
            if (!fn_kept[i].start) place = i;
            else if (oldest < 0 || fn_kept[i].since < fn_kept[oldest].since) oldest = i;
        }
        if (place >= 0 && fn_kept_bytes + n <= fn_kept_limit) return place;
        if (oldest < 0) return -1;
        munmap(fn_kept[oldest].start, fn_kept[oldest].size);
        fn_kept_bytes -= fn_kept[oldest].size;
        fn_kept[oldest].start = NULL;
    }
}

static void fn_keep_at_most(size_t limit) {
    fn_kept_limit = limit;
    if (!pthread_mutex_trylock(&fn_kept_lock)) {
        fn_make_room(0);
        pthread_mutex_unlock(&fn_kept_lock);
    }
}

static void *fn_block_new(void *context, size_t n) {
    char *start = NULL;
    (void)context;
    if (n > SIZE_MAX / 2) return NULL;
    size_t size = (n + FN_HEADER + FN_HUGE - 1) / FN_HUGE * FN_HUGE;
    if (!pthread_mutex_trylock(&fn_kept_lock)) {
        int best = -1;
        for (int i = 0; i < FN_KEPT; i++)
            if (fn_kept[i].start && fn_kept[i].size >= size && fn_kept[i].size <= size + size / 4)
                if (best < 0 || fn_kept[i].size < fn_kept[best].size) best = i;
        if (best >= 0) {
            start = fn_kept[best].start;
            size = fn_kept[best].size;
            fn_kept_bytes -= size;
            fn_kept[best].start = NULL;
        }
        pthread_mutex_unlock(&fn_kept_lock);
    }
    if (!start) {
        /* one huge page more, of which the ends are given back: the block begins at one */
        char *all = mmap(NULL, size + FN_HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                         -1, 0);
        if (all == MAP_FAILED) return NULL;
        start = (char *)(((uintptr_t)all + FN_HUGE - 1) / FN_HUGE * FN_HUGE);
        if (start > all) munmap(all, (size_t)(start - all));
        if (all + FN_HUGE > start) munmap(start + size, (size_t)(all + FN_HUGE - start));
        madvise(start, size, MADV_HUGEPAGE);
    }
    memcpy(start, &size, sizeof size);
    return start + FN_HEADER;
}

static void fn_block_free(void *context, void *data, size_t n) {
    char *start = (char *)data - FN_HEADER;
    size_t size;
    (void)context, (void)n;
    if (!data) return;
    memcpy(&size, start, sizeof size);
    int place = -1;
    if (!pthread_mutex_trylock(&fn_kept_lock)) {
        if (size <= fn_kept_limit) place = fn_make_room(size);
        if (place >= 0) {
            fn_kept[place].start = start;
            fn_kept[place].size = size;
            fn_kept[place].since = fn_kept_clock++;
            fn_kept_bytes += size;
        }
        pthread_mutex_unlock(&fn_kept_lock);
    }
    if (place < 0) munmap(start, size);
}

static void *fn_block_zeroed(void *context, size_t n, size_t each) {
    void *data = each && n > SIZE_MAX / each ? NULL : fn_block_new(context, n * each);
    if (data) memset(data, 0, n * each);
    return data;
}

static void *fn_block_moved(void *context, void *data, size_t n) {
    size_t size;
    void *other = fn_block_new(context, n);
    if (!other || !data) return other;
    memcpy(&size, (char *)data - FN_HEADER, sizeof size);
    memcpy(other, data, n < size - FN_HEADER ? n : size - FN_HEADER);
    fn_block_free(context, data, size);
    return other;
}

static PyDataMem_Handler fn_block_handler = {
    "fastnorm", 1, {NULL, fn_block_new, fn_block_zeroed, fn_block_moved, fn_block_free}};

static PyObject *fn_block_capsule(void) {
    return PyCapsule_New(&fn_block_handler, "mem_handler", NULL);
}

#else
#define FN_BLOCKS 0
static void fn_keep_at_most(size_t limit) { (void)limit; }
static PyObject *fn_block_capsule(void) { Py_RETURN_NONE; }
#endif

#endif
