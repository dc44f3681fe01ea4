/* Memory of large results, kept for the next one.
 *
 * The C library returns to the system what is freed at the end of its heap, and what is larger than
 * 32 MB at once; it fetches that anew, page by page and cleared: on 128 MB that takes as long as
 * normalising them. A step that frees a result and its gradient pays it, too. Results of 256 kB and
 * more therefore come from here, through NumPy's interface for allocators (NEP 49), and blocks that
 * are freed are kept, 256 MB of them at most (FASTNORM_KEEP_MB). Telling the system that it may
 * have their pages back (MADV_FREE) would cost a third of what they save. Nothing is kept under a
 * limit of the address space or of data (ulimit), or close to that of the control group; and all is
 * given back when the system has no more. Linux only; on other systems, and below that size,
 * NumPy's allocator serves. */
#ifndef FASTNORM_BLOCKS_H
#define FASTNORM_BLOCKS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#endif

/* A sanitizer guards what it allocates itself. */
#ifdef __SANITIZE_ADDRESS__
#define FN_BLOCKS_FROM ((size_t)1 << 24)
#else
#define FN_BLOCKS_FROM ((size_t)1 << 18)
#endif

#if defined(__linux__) && defined(MADV_HUGEPAGE)
#define FN_BLOCKS 1

/* Numbers begin a quarter of a page from where large arrays of the C library and of PyTorch do: a
 * processor takes a load for one of what was just stored at the same place in another page (300 kB
 * 22 to 15 us, AMD EPYC, Zen 4). */
enum { FN_KEPT = 64, FN_HEADER = 1024 + 64, FN_PAGE = 1 << 16 };
#define FN_HUGE ((size_t)1 << 21) /* blocks begin at a huge page */
#define FN_MANY (8 * FN_HUGE)     /* those from here on are whole huge pages */

static struct {
    char *start;
    size_t size;
    uint64_t since;
} fn_kept[FN_KEPT];
static size_t fn_kept_bytes, fn_kept_limit = (size_t)256 << 20;
static uint64_t fn_kept_clock;
/* Only ever tried: whoever finds it taken goes to the system.  A child that was forked while
 * another thread held it would wait for good. */
static pthread_mutex_t fn_kept_lock = PTHREAD_MUTEX_INITIALIZER;

/* Under the lock: give back what was freed longest ago, until n bytes more and a place are there.
 */
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

/* Under the lock: give back all of it, and say how much that was. */
static size_t fn_give_back(void) {
    size_t given = fn_kept_bytes;
    for (int i = 0; i < FN_KEPT; i++) {
        if (fn_kept[i].start) munmap(fn_kept[i].start, fn_kept[i].size);
        fn_kept[i].start = NULL;
    }
    fn_kept_bytes = 0;
    return given;
}

/* Give back all that is kept, and say how many bytes that was.  For whoever gets no memory: then
 * try again. */
static size_t fn_trim(void) {
    for (int tries = 0; tries < 1000; tries++) {
        if (!pthread_mutex_trylock(&fn_kept_lock)) {
            size_t given = fn_give_back();
            pthread_mutex_unlock(&fn_kept_lock);
            return given;
        }
        sched_yield();
    }
    return 0;
}

/* The limit of the control group, and where it says how much is used: 0 for none. */
static size_t fn_group_limit;
static char fn_group_used[4096], fn_group_stat[4096];
static int64_t fn_group_asked;
static int fn_group_tight;

static void fn_watch(size_t limit, const char *used, const char *stat) {
    if (strlen(used) >= sizeof fn_group_used || strlen(stat) >= sizeof fn_group_stat) return;
    strcpy(fn_group_used, used);
    strcpy(fn_group_stat, stat);
    fn_group_asked = 0;
    fn_group_tight = 0;
    fn_group_limit = limit;
}

/* The number behind `name` in a file; 0 where there is none. */
static size_t fn_number_in(const char *path, const char *name) {
    char text[8192];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    ssize_t n = read(file, text, sizeof text - 1);
    close(file);
    if (n <= 0) return 0;
    text[n] = 0;
    char *at = strstr(text, name);
    return at ? (size_t)strtoull(at + strlen(name), NULL, 10) : 0;
}

/* Whether less than twice what may be kept is left of the control group's memory; asked ten times a
 * second at most.  Pages of files that nobody reads just now count as free. */
static int fn_is_tight(void) {
    struct timespec t;
    if (!fn_group_limit) return 0;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t now = (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
    if (fn_group_asked && now - fn_group_asked < 100) return fn_group_tight;
    fn_group_asked = now;
    size_t used = fn_number_in(fn_group_used, ""), wanted = 2 * fn_kept_limit;
    if (used + wanted > fn_group_limit) {
        size_t files = fn_number_in(fn_group_stat, "total_inactive_file ");
        if (!files) files = fn_number_in(fn_group_stat, "inactive_file ");
        used -= files < used ? files : used;
    }
    fn_group_tight = used + wanted > fn_group_limit;
    return fn_group_tight;
}

static int fn_may_keep(void) {
    struct rlimit all, data;
    if (!getrlimit(RLIMIT_AS, &all) && all.rlim_cur != RLIM_INFINITY) return 0;
    if (!getrlimit(RLIMIT_DATA, &data) && data.rlim_cur != RLIM_INFINITY) return 0;
    return !fn_is_tight();
}

static void *fn_block_new(void *context, size_t n) {
    char *start = NULL;
    (void)context;
    if (n > SIZE_MAX / 2) return NULL;
    const size_t whole = n < FN_MANY ? FN_PAGE : FN_HUGE;
    size_t size = (n + FN_HEADER + whole - 1) / whole * whole;
    if (!pthread_mutex_trylock(&fn_kept_lock)) {
        int best = -1;
        for (int i = 0; i < FN_KEPT; i++)
            if (fn_kept[i].start && fn_kept[i].size >= size && fn_kept[i].size <= size + size / 4)
                if (best < 0 || fn_kept[i].since > fn_kept[best].since) best = i;
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
        if (all == MAP_FAILED && fn_trim())
            all = mmap(NULL, size + FN_HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
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
        if (!fn_may_keep())
            fn_give_back();
        else if (size <= fn_kept_limit)
            place = fn_make_room(size);
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
static size_t fn_trim(void) { return 0; }
static void fn_watch(size_t limit, const char *used, const char *stat) {
    (void)limit, (void)used, (void)stat;
}
static PyObject *fn_block_capsule(void) { Py_RETURN_NONE; }
#endif

#endif
