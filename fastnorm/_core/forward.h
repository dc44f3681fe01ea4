/* A forward pass: what is asked, what was chosen for it, its work items and a thread's scratch
 * memory.
 *
 * Blocks and splits depend on the shape alone, and are merged in their order, so that results are
 * bitwise the same for any number of threads. */
#ifndef FASTNORM_FORWARD_H
#define FASTNORM_FORWARD_H

#include "activations.h"
#include "moments.h"
#include "scratch.h"
#include "threads.h"

typedef enum {
    RSTD,   /* 1 / sqrt(var + eps) */
    NORM,   /* 1 / max(sqrt(sum of squares), eps) */
    FACTOR, /* what stands in var is the scale itself (given statistics only) */
} Scaling;

/* An activation of the user's own, compiled by Numba: y = f(y), or with a scale (hi, r, shift) f of
 * what x, which lies apart, is normalised to.  Not 0 where f raised. */
typedef ptrdiff_t (*UserLoop)(const void *x, void *y, ptrdiff_t n, const void *scale,
                              const void *weight, const void *bias);

typedef enum {
    WALK_ITEMS,     /* each from its moments to its output before the next */
    WALK_PIPELINED, /* tiles of short groups: the sums of one while the one before is applied */
    WALK_GATHERED,  /* groups of short planes of doubles, each copied together first */
    WALK_ROWS,      /* rows with weights at most */
} Walk;

typedef struct {
    ptrdiff_t a, b, p, s, c; /* dimensions: operand.h */
    ptrdiff_t neighbours;    /* columns that share a statistic */
    int shared;              /* and a weight, and a bias: theirs lie as statistics do */
    int columns;             /* columns (strided.h), or contiguous runs (contiguous.h) */
    int centred, given, activation_first;
    Scaling scaling;
    Activation activation, slope; /* of a gradient (dy): what its slope is taken of */
    UserLoop user; /* or NULL */
    int raised;    /* whether it has */
    double eps;
    ptrdiff_t fields; /* 0, or the bytes between the five fields of moments that are asked for */
    Operand x, y, mask, weight, bias, residual, addend, total, mean, var, rstd;
    Operand dy; /* if there is one y is dy times the slope of the activation */
    /* chosen by schedule.py */
    ptrdiff_t length; /* reduced elements of a group, or rows of columns */
    ptrdiff_t width;  /* columns of an item; of runs, neighbouring groups */
    ptrdiff_t chunks; /* items side by side along c; of runs, along b */
    ptrdiff_t items;
    ptrdiff_t block;        /* elements, or rows, whose moments are taken at once */
    ptrdiff_t split_length; /* elements, or rows, that a thread takes of a group that is shared */
    ptrdiff_t splits;       /* of an item */
    int guarded;            /* statistics may not be of all numbers, which may leave the range */
    int foldable;           /* a weight is one number for a run or a column */
    int non_temporal;        /* how y is written */
    int direct;              /* x and y are read and written where they lie */
    int direct_non_temporal; /* or so, and written with non-temporal stores */
    int bf16_direct;         /* bfloat16 is converted on the way: decides the order of its sums */
    int tabulated; /* given statistics do not differ along a: their scales stand in `table` */
    char *table;
    Walk walk;
    int threads;
    int split_items;   /* threads share each item, not the items */
    int max_threads;   /* 1, or 0 where there is no such limit */
    int small;         /* too little work to wake a thread that sleeps */
    int releases_gil;  /* it takes long enough for the interpreter's lock to be given up */
} Forward;

/* What follows from the number of threads. */
static inline void forward_threads(Forward *q, int threads) {
    q->threads = !FN_THREADS || q->max_threads == 1 || threads < 1 ? 1 : threads;
    q->split_items = q->threads > 1 && q->splits > 1 && q->items % q->threads != 0 &&
                     q->items < ITEMS_PER_THREAD * q->threads;
}

/* Groups b, b + 1 ... of runs, or neighbouring columns c, c + 1 ... */
FN_INLINE Item item_at(const Forward *q, ptrdiff_t index) {
    ptrdiff_t outer = index, chunk = 0;
    /* a division costs as much as normalising a dozen numbers: only where there is something to
     * divide */
    if (q->chunks > 1) {
        outer = index / q->chunks;
        chunk = index - outer * q->chunks;
    }
    Item it = {0, outer, chunk * q->width, q->width};
    if (!q->columns) {
        it.a = outer, it.b = chunk * q->width, it.c = 0;
        if (it.width > q->b - it.b) it.width = q->b - it.b;
        return it;
    }
    if (it.width > q->c - it.c) it.width = q->c - it.c;
    if (q->a > 1) {
        it.a = outer / q->b;
        it.b = outer - it.a * q->b;
    }
    return it;
}
FN_INLINE ptrdiff_t groups_of(const Forward *q, const Item *it) {
    return q->neighbours == 1 ? it->width : it->width / q->neighbours;
}
/* Where an operand's number for the first group or column of an item lies, and how far it is to the
 * next. */
FN_INLINE char *first_of(const Forward *q, const Operand *o, const Item *it, ptrdiff_t c,
                         ptrdiff_t n, ptrdiff_t *step) {
    *step = q->columns ? o->c : o->b;
    if (!o->data) return NULL;
    char *p = at(o, it->a, it->b) + c * o->c;
    all_within(o, p, *step, n, bytes_of(o->storage), "statistics, or weights, of an item");
    *step /= bytes_of(o->storage);
    return p;
}
FN_INLINE double *statistics_at(const Forward *q, const Operand *o, const Item *it,
                                ptrdiff_t *step) {
    const ptrdiff_t c = q->columns ? it->c / q->neighbours : 0;
    return (double *)first_of(q, o, it, c, groups_of(q, it), step);
}
/* The same of weights, one for each column or, where they are shared, for each group. */
FN_INLINE const void *weights_at(const Forward *q, const Operand *o, const Item *it,
                                 ptrdiff_t *step) {
    if (!q->shared) return first_of(q, o, it, it->c, it->width, step);
    return first_of(q, o, it, it->c / q->neighbours, groups_of(q, it), step);
}
FN_INLINE void put_statistics(const Forward *q, const Item *it, double mean, double var,
                                 double rstd) {
    if (!q->mean.data) return;
    *(double *)at(&q->mean, it->a, it->b) = mean;
    *(double *)at(&q->var, it->a, it->b) = var;
    *(double *)at(&q->rstd, it->a, it->b) = rstd;
}
/* What is normalised: x, or x + addend. */
FN_INLINE const Operand *source_of(const Forward *q) { return q->total.data ? &q->total : &q->x; }

/* The elements [first, first + n) of a group that lie in one plane. */
typedef struct {
    ptrdiff_t p, s, n;
} Run;
FN_INLINE Run run_at(const Forward *q, ptrdiff_t first, ptrdiff_t last) {
    Run r = {0, first, last - first};
    if (first >= q->s) {
        r.p = first / q->s;
        r.s = first - r.p * q->s;
    }
    if (r.n > q->s - r.s) r.n = q->s - r.s;
    return r;
}
/* Where a run of group k of an item begins; NULL in an operand that is not there. */
FN_INLINE char *run_of(const Operand *o, const Item *it, ptrdiff_t k, Run r) {
    if (!o->data) return NULL;
    char *p = at(o, it->a, it->b + k) + r.p * o->p + r.s * o->s;
    all_within(o, p, o->s, r.n, bytes_of(o->storage), "a run");
    return p;
}
/* How much of a run is applied at once through a tile: non-temporal stores then begin at a line. */
FN_INLINE ptrdiff_t stretch_of(const Forward *q, const Item *it, ptrdiff_t k, Run r) {
    if (!q->non_temporal || q->direct_non_temporal) return least(r.n, BLOCK);
    const uintptr_t y = (uintptr_t)run_of(&q->y, it, k, r);
    return least(r.n, NON_TEMPORAL_TILE + (ptrdiff_t)((0 - y) % 64) / bytes_of(q->y.storage));
}
/* The same of `rows` rows of an item's columns. */
FN_INLINE char *rows_of(const Operand *o, const Item *it, Run r) {
    if (!o->data) return NULL;
    char *p = at(o, it->a, it->b) + it->c * o->c + r.p * o->p + r.s * o->s;
    all_within(o, p, o->s, r.n, (it->width - 1) * o->c + bytes_of(o->storage), "rows of columns");
    return p;
}

/* How many of n rows, in whole eights or all, are chosen, or left out, as the first one is. */
static inline ptrdiff_t alike_rows(const char *chosen, ptrdiff_t step, ptrdiff_t n) {
    ptrdiff_t k = 1;
    while (k < n && !chosen[k * step] == !*chosen) k++;
    return k == n ? n : k / 8 * 8;
}
/* How many of rows [first, last) count in each column; `some` has room for a byte of each. */
static void count_rows(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                       double *FN_RESTRICT count, uint8_t *FN_RESTRICT some) {
    const ptrdiff_t width = it->width, step = q->mask.c;
    ptrdiff_t whole = q->mask.data ? 0 : last - first;
    for (Run r; step == 0 && q->mask.data && first < last; first += r.n) {
        r = run_at(q, first, last);
        const char *chosen = rows_of(&q->mask, it, r);
        for (ptrdiff_t i = 0; i < r.n; i++) whole += chosen[i * q->mask.s] != 0;
    }
    for (ptrdiff_t c = 0; c < width; c++) count[c] = (double)whole;
    for (Run r; step != 0 && first < last; first += r.n) {
        r = run_at(q, first, least(last, first + UINT8_MAX));
        const char *chosen = rows_of(&q->mask, it, r);
        memset(some, 0, (size_t)width);
        for (ptrdiff_t i = 0; i < r.n; i++, chosen += q->mask.s)
            if (step == 1)
                for (ptrdiff_t c = 0; c < width; c++) some[c] += chosen[c] != 0;
            else
                for (ptrdiff_t c = 0; c < width; c++) some[c] += chosen[c * step] != 0;
        for (ptrdiff_t c = 0; c < width; c++) count[c] += some[c];
    }
}

/* The five fields of an item's groups, written out. */
static inline void deliver_moments(const Forward *q, const Item *it, const double *moments) {
    const ptrdiff_t n = groups_of(q, it);
    ptrdiff_t step;
    char *out = (char *)statistics_at(q, &q->mean, it, &step);
    for (int field = 0; field < FIELDS; field++, out += q->fields)
        for (ptrdiff_t g = 0; g < n; g++) ((double *)out)[g * step] = moments[field * n + g];
}

typedef struct {
    Arena arena;
    double *part;    /* a block's moments */
    double *apart;   /* moments of columns, before neighbours are merged */
    double *split;   /* a split's moments */
    double *whole;   /* an item's moments */
    double *sums;    /* three rows */
    double *lanes;
    uint8_t *recentre;
    char *scales;
    char *weights, *biases; /* a row of each, where neighbours share one */
    char *tile, *extra, *third;
    ptrdiff_t tile_size;   /* bytes of each of the three */
    float *converted;      /* two tiles of short groups */
    ptrdiff_t converted_size;
    char *gathered; /* groups whose planes are copied together */
    ptrdiff_t gathered_size;
    const float *ready; /* the run that is written next, where it was converted before */
    int guarded; /* numbers that this item's statistics are not of may leave the range */
} Scratch;

enum { SCALE_BYTES = 7 * 8 + 8 }; /* of the scales of a column or group */

/* The pieces of a thread's scratch memory; tiles only where something goes through them. */
static inline void lay_out(const Forward *q, Scratch *h) {
    Arena *m = &h->arena;
    const ptrdiff_t width = q->columns ? q->width : TILE_GROUPS, row = width * 8;
    const ptrdiff_t elements = q->columns ? q->width * q->block
                                          : least(q->width * q->length, BLOCK) +
                                                LINE / 8; /* lined_up */
    h->tile_size = elements * 8;
    h->converted_size = q->columns || q->x.storage >= F32 ? 0 : 4 * BLOCK * 4;
    h->gathered_size = q->walk == WALK_GATHERED ? q->width * q->length * 8 : 0;
    h->tile = take(m, h->tile_size);
    h->extra = take(m, h->tile_size);
    h->third = take(m, h->tile_size);
    h->converted = take(m, h->converted_size);
    h->gathered = take(m, h->gathered_size);
    h->lanes = take(m, q->columns ? 0 : 2 * LANES * row);
    h->part = take(m, FIELDS * row);
    h->apart = take(m, FIELDS * row);
    h->split = take(m, FIELDS * row);
    h->whole = take(m, FIELDS * row);
    h->sums = take(m, 3 * row);
    h->recentre = take(m, width);
    h->scales = take(m, SCALE_BYTES * width);
    h->weights = take(m, q->shared ? row : 0);
    h->biases = take(m, q->shared ? row : 0);
    h->ready = NULL;
    h->guarded = q->guarded;
}
static inline void close_scratch(Scratch *h, int threads) {
    for (int i = 0; i < threads; i++) close_arena(&h[i].arena);
}
/* Scratch memory for each of the threads, all of it before any result is written. */
static inline int open_scratch(const Forward *q, Scratch *h, int threads) {
    for (int i = 0; i < threads; i++) {
        count_pieces(&h[i].arena);
        lay_out(q, &h[i]);
        if (!open_arena(&h[i].arena)) {
            close_scratch(h, i);
            return 0;
        }
        lay_out(q, &h[i]);
    }
    return 1;
}
/* Elements, or rows, [first, last) of an item that are its split k. */
FN_INLINE void split_at(const Forward *q, ptrdiff_t k, ptrdiff_t *first, ptrdiff_t *last) {
    *first = k * q->split_length;
    *last = q->length - *first < q->split_length ? q->length : *first + q->split_length;
}

#endif
