/* Where an operand of a pass lies, and how its numbers are kept. */
#ifndef FASTNORM_OPERAND_H
#define FASTNORM_OPERAND_H

#include "check.h"
#include "numbers.h"

typedef enum {
    F16,
    BF16,
    F32,
    F64,
    U8, /* integers that a float holds: read for moments, never written */
    I8,
    U16,
    I16,
} Storage;

/* Five dimensions, found for every operand by layout.py:
 *
 *     a, b   kept axes: each (a, b) has statistics of its own
 *     p, s   reduced axes: the elements (p, s) share a statistic
 *     c      columns: neighbours in memory with a statistic each, or, `neighbours` at a time, one
 *
 * The strides are in bytes; 0 where an operand is broadcast. */
typedef struct {
    char *data; /* NULL: not there */
    Storage storage;
    ptrdiff_t a, b, p, s, c;
    char *low, *high; /* the array's memory, known in a checking build alone */
} Operand;

/* Some of an operand's groups or columns: b, b + 1 ... or c, c + 1 ... */
typedef struct {
    ptrdiff_t a, b, c, width;
} Item;

/* Group b + k alone. */
FN_INLINE Item group_at(Item it, ptrdiff_t k) { return (Item){it.a, it.b + k, it.c, 1}; }

FN_INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
FN_INLINE ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
FN_INLINE ptrdiff_t bytes_of(Storage storage) {
    return storage > F64 ? (storage <= I8 ? 1 : 2) : storage <= BF16 ? 2 : storage == F32 ? 4 : 8;
}
FN_INLINE char *at(const Operand *o, ptrdiff_t a, ptrdiff_t b) {
    return o->data + a * o->a + b * o->b;
}
FN_INLINE double number(const char *p, Storage storage) {
    switch (storage) {
    case F64: return *(const double *)p;
    case F32: return *(const float *)p;
    case F16: return fn_from_f16(*(const uint16_t *)p);
    default: return fn_from_bf16(*(const uint16_t *)p);
    }
}

/* Let an operand be memory of our own. */
FN_INLINE void aim_at(Operand *o, char *data, ptrdiff_t size) {
    o->data = o->low = data;
    o->high = data + size;
}
/* In a checking build: whether n runs of `size` bytes, `step` apart, are an operand's, if it is
 * there. */
FN_INLINE void all_within(const Operand *o, const char *p, ptrdiff_t step, ptrdiff_t n,
                          ptrdiff_t size, const char *what) {
    if (!FN_CHECKED || !o->data || n <= 0 || size <= 0) return;
    const char *last = p + (n - 1) * step;
    if (p < o->low || p + size > o->high || last < o->low || last + size > o->high) fn_broken(what);
}
FN_INLINE void within(const Operand *o, const char *p, ptrdiff_t size, const char *what) {
    all_within(o, p, 0, 1, size, what);
}
/* In a checking build: whether a tile of `size` bytes holds what is to be written there. */
FN_INLINE void fits(ptrdiff_t needed, ptrdiff_t size, const char *what) {
    if (FN_CHECKED && needed > size) fn_broken(what);
}

#endif
