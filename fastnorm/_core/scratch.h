/* Scratch memory: one block, from which pieces of known size are taken.
 *
 * The pieces are listed once, in a function that runs twice: to count, and to hand out. */
#ifndef FASTNORM_SCRATCH_H
#define FASTNORM_SCRATCH_H

#include "check.h"
#include "numbers.h"

static size_t fn_trim(void); /* blocks.h: gives back what is kept of results, and says how much */

enum {
    LINE = 64,          /* bytes of a cache line: where each piece begins */
    PIECES = 24,        /* of an arena, at most */
    ON_STACK = 1 << 14, /* bytes of a thread's scratch memory that its stack holds: no malloc */
};

typedef struct {
    char *memory; /* NULL: pieces are only counted */
    char *start;
    int borrowed;   /* not from malloc */
    ptrdiff_t size; /* bytes taken so far */
    int pieces;
    char *guards[PIECES]; /* where each piece ends */
} Arena;

static inline void count_pieces(Arena *m) {
    m->memory = m->start = NULL;
    m->borrowed = 0;
    m->size = 0;
    m->pieces = 0;
}
static inline void begin_pieces(Arena *m) {
    m->start = m->memory + (LINE - (uintptr_t)m->memory % LINE);
    m->size = 0;
    m->pieces = 0;
}
/* Get the memory of what was counted; 0 where there is none. */
static inline int open_arena(Arena *m) {
    const size_t size = (size_t)m->size + LINE;
    m->memory = malloc(size);
    /* what results were kept in is given back first */
    if (!m->memory && fn_trim() > 0) m->memory = malloc(size);
    if (m->memory) begin_pieces(m);
    return m->memory != NULL;
}
/* Take memory of ON_STACK bytes, if that is enough; a checking build leaves it to malloc. */
static inline int open_on_stack(Arena *m, char *room) {
    if (FN_CHECKED || m->size + LINE > ON_STACK) return open_arena(m);
    m->memory = room;
    m->borrowed = 1;
    begin_pieces(m);
    return 1;
}
/* The next piece, of `size` bytes from the beginning of a cache line on. */
static inline void *take(Arena *m, ptrdiff_t size) {
    char *piece = m->memory ? m->start + m->size : NULL;
    m->size += (size + LINE - 1) & -(ptrdiff_t)LINE;
    if (FN_CHECKED) {
        m->size += FN_GUARD;
        if (m->pieces == PIECES) fn_broken("more pieces than an arena has");
        if (piece) {
            m->guards[m->pieces] = piece + size;
            fn_fill_guard(piece + size);
        }
        m->pieces++;
    }
    return piece;
}
static inline void close_arena(Arena *m) {
    if (FN_CHECKED && m->memory)
        for (int i = 0; i < m->pieces; i++)
            if (!fn_guard_intact(m->guards[i]))
                fn_broken("a piece of scratch memory was written beyond its end");
    if (!m->borrowed) free(m->memory);
    m->memory = NULL;
}

#endif
