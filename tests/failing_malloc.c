/* An allocator that fails when it is told to: LD_PRELOAD this, and call fail_at(n) in a thread, after which
 * the n-th allocation of that thread returns NULL. allocations() then says how many there were. Those of
 * Numba's layers of threads, and of OpenMP, do not count: they end the process without memory. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

static __thread long remaining; /* 0: none is to fail */
static __thread long seen;

void fail_at(long n) {
    if (n) seen = 0; /* else it can still be asked for */
    remaining = n;
}
long allocations(void) { return seen; }

static const char *others[] = {"libgomp", "libstdc++", "/numba/"};

static int fails(void *caller) {
    Dl_info info;
    if (!remaining) return 0;
    if (dladdr(caller, &info) && info.dli_fname)
        for (size_t i = 0; i < sizeof others / sizeof *others; i++)
            if (strstr(info.dli_fname, others[i])) return 0;
    seen++;
    if (--remaining) return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t each) {
    return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, each);
}
void *realloc(void *p, size_t n) {
    return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(p, n);
}
void *mmap(void *at, size_t n, int protection, int flags, int file, off_t offset) {
    static void *(*next)(void *, size_t, int, int, int, off_t);
    if (!next) next = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    return fails(__builtin_return_address(0)) ? MAP_FAILED : next(at, n, protection, flags, file, offset);
}
