/* The backward pass, on the same five dimensions as the forward one (operand.h).
 *
 *     xhat = (x - mean) rstd            g = dy weight
 *     dx = rstd (g - sum(g)/count - xhat sum(g xhat)/count)        sums over a group
 *     dweight = sum(dy xhat)            dbias = sum(dy)            sums over what shares a weight
 *
 * A *cell* is what both kinds of sum have in common.  Where the weight is one number for a run, or
 * for a column, its cells are whole planes or columns: their two sums give a group's sums, and the
 * weight's, in the first sweep.  Where the weight differs `inside` a run, or from row to row, each
 * element is a cell: the group's sums are taken first, and the weight's in the sweep that writes
 * dx.
 *
 * Items whose weight is the same one (`sharers` of an `owner`) add into the same cells, in their
 * order; a fixed number of `parts` of them, merged in order, can run in parallel. */
#ifndef FASTNORM_BACKWARD_LAYOUT_H
#define FASTNORM_BACKWARD_LAYOUT_H

#include "operand.h"
#include "sizes.h"
#include "threads.h"

/* Of a thread: three tiles of BLOCK numbers, or nine of BACKWARD_CHUNK. */
enum { BACKWARD_TILE_BYTES = 3 * BLOCK * 8 };

typedef struct {
    ptrdiff_t a, b, p, s, c, neighbours;
    int columns, centred, training;
    Operand x, dy, dx, weight, dweight, dbias, mean, rstd;
    /* chosen by schedule.py */
    ptrdiff_t length;           /* reduced elements of a group (runs) or rows (columns) */
    ptrdiff_t width;            /* columns of an item; of runs, neighbouring groups */
    ptrdiff_t chunks;           /* items side by side along c; of runs, along b */
    int own_a, own_b, own_c;    /* whether the weight differs along these axes of items */
    int inside;                 /* whether it differs within a run, or from row to row */
    ptrdiff_t owners, sharers;  /* items = owners * sharers */
    ptrdiff_t span, segments;   /* elements (rows) summed at a time; how many such an item has */
    ptrdiff_t plane_segments;   /* segments of a plane where planes' weights differ, else 0 */
    ptrdiff_t cell_p, cell_s, cell_c, cells; /* strides and number of an owner's cells */
    ptrdiff_t parts;            /* of an owner's sharers, each with sums of its own */
    int non_temporal;           /* dx is written with non-temporal stores */
    int bf16_direct;            /* bfloat16 is converted on the way, not in a tile */
    int convert_weight;         /* to the computing type, once for all rows */
    int whole_rows;             /* rows at equal distances that share their weights */
    int whole_groups;           /* planes with a weight each: group_backward */
    int keep_cells;             /* until all of a task is added: else they are too many */
    int share_items;            /* the threads share the items taken together, not the tasks */
    ptrdiff_t together;         /* items of an owner that are taken together */
    int sweeps, few_owners;     /* all of an owner's items are; and there are few owners */
    int max_threads;            /* 1, or 0 where there is no such limit */
    int small;                  /* too little work to wake a thread that sleeps */
    int threads;
} Backward;

/* What follows from the number of threads. */
static inline void backward_threads(Backward *q, int threads) {
    q->threads = !FN_THREADS || q->max_threads == 1 || threads < 1 ? 1 : threads;
    q->share_items = q->sweeps && (q->few_owners || q->threads == 1);
}

/* Elements of a run, or rows of columns; or any other numbers in a row. */
typedef struct {
    ptrdiff_t first, last;
} Span;

/* Of each of `count` neighbouring groups n elements, from (p, s) on; or the n columns of `count`
 * rows. */
typedef struct {
    Item item;
    ptrdiff_t p, s, n, count;
} Stretch;

/* `count` rows of n numbers each: the first, and bytes to the next.  What lies `ahead` bytes
 * further is asked for in time. */
typedef struct {
    const char *x, *dy;
    char *dx;
    ptrdiff_t x_step, dy_step, dx_step, count, n, ahead;
} Rows;

/* Those from the k-th on. */
FN_INLINE Rows further(Rows q, ptrdiff_t k) {
    q.x += k * q.x_step;
    q.dy += k * q.dy_step;
    q.dx += k * q.dx_step;
    q.count -= k;
    return q;
}

/* The beginning of a span, at most `limit` elements (rows), and of one plane. */
static inline Stretch beginning(const Backward *q, Item it, Span f, ptrdiff_t limit) {
    const ptrdiff_t p = f.first / q->s, s = f.first % q->s;
    const ptrdiff_t m = least(least(f.last - f.first, q->s - s), limit);
    return q->columns ? (Stretch){it, p, s, it.width, m} : (Stretch){it, p, s, m, it.width};
}

/* Bytes from what belongs to one column of an item, or group of runs, to that of the next. */
FN_INLINE ptrdiff_t group_step(const Backward *q, const Operand *o) {
    return q->columns ? o->c : o->b;
}
/* Bytes from a number of a run, or row, to the next. */
FN_INLINE ptrdiff_t number_step(const Backward *q, const Operand *o) {
    return q->columns ? o->c : o->s;
}
FN_INLINE char *place(const Operand *o, Item it, ptrdiff_t p, ptrdiff_t s) {
    return at(o, it.a, it.b) + p * o->p + s * o->s + it.c * o->c;
}
FN_INLINE ptrdiff_t stretch_step(const Backward *q, const Operand *o) {
    return q->columns ? o->s : o->b;
}
/* Where a stretch begins; the next of its runs or rows is `stretch_step` further. */
FN_INLINE char *locate(const Backward *q, const Operand *o, const Stretch *t) {
    char *found = place(o, t->item, t->p, t->s);
    all_within(o, found, stretch_step(q, o), t->count, t->n * bytes_of(o->storage),
               "an operand, backward");
    return found;
}
FN_INLINE double statistic(const Backward *q, const Operand *o, Item it, ptrdiff_t i) {
    if (!o->data) return 0.0;
    const char *found = at(o, it.a, it.b) + (it.c + i) / q->neighbours * group_step(q, o);
    within(o, found, sizeof(double), "a statistic, backward");
    return *(const double *)found;
}
FN_INLINE double weight_of(const Backward *q, Item it, ptrdiff_t p, ptrdiff_t s, ptrdiff_t i) {
    if (!q->weight.data) return 1.0;
    const char *found = place(&q->weight, it, p, s) + i * group_step(q, &q->weight);
    within(&q->weight, found, bytes_of(q->weight.storage), "a weight");
    const double weight = number(found, q->weight.storage);
    return q->x.storage == F64 ? weight : (double)(float)weight; /* as along a run */
}

static inline Item item_of(const Backward *q, ptrdiff_t owner, ptrdiff_t sharer) {
    Item it;
    ptrdiff_t chunk = 0;
    const ptrdiff_t along_b = q->columns ? q->b : q->chunks;
    if (q->own_c) {
        chunk = owner % q->chunks;
        owner /= q->chunks;
    } else if (q->columns) {
        chunk = sharer % q->chunks;
        sharer /= q->chunks;
    }
    if (q->own_b) {
        it.b = owner % along_b;
        owner /= along_b;
    } else {
        it.b = sharer % along_b;
        sharer /= along_b;
    }
    it.a = q->own_a ? owner : sharer;
    it.c = chunk * q->width;
    if (q->columns) {
        it.width = least(q->width, q->c - it.c);
    } else {
        it.b *= q->width;
        it.width = least(q->width, q->b - it.b);
    }
    return it;
}
static inline Span segment(const Backward *q, ptrdiff_t k) {
    ptrdiff_t first = k * q->span, end = q->length;
    if (q->plane_segments) {
        first = k / q->plane_segments * q->s + k % q->plane_segments * q->span;
        end = (k / q->plane_segments + 1) * q->s;
    }
    return (Span){first, least(first + q->span, end)};
}

/* Which storage is computed with where it lies; else it is converted in a tile. */
static inline int computed_in(const Backward *q, Storage storage) {
    return storage == (q->x.storage == F64 ? F64 : F32);
}
static inline int weights_in_place(const Backward *q) {
    const ptrdiff_t step = number_step(q, &q->weight);
    return computed_in(q, q->weight.storage) &&
           (step == 0 || step == bytes_of(q->weight.storage));
}

/* ---- the gradients of weight and bias, written out ----------------------------------------------
 */

/* Sums that become gradients of weights and biases. */
typedef struct {
    double *weight, *bias;
} Cells;

static inline void put_numbers(const double *v, ptrdiff_t n, char *y, ptrdiff_t step,
                               Storage storage) {
    if (storage == F32 && step == sizeof(float)) {
        for (ptrdiff_t i = 0; i < n; i++) ((float *)y)[i] = (float)v[i];
        return;
    }
    for (ptrdiff_t i = 0; i < n; i++, y += step)
        switch (storage) {
        case F64: *(double *)y = v[i]; break;
        case F32: *(float *)y = (float)v[i]; break;
        case F16: *(uint16_t *)y = fn_to_f16((float)v[i]); break;
        default: *(uint16_t *)y = fn_to_bf16((float)v[i]); break;
        }
}
static void put_gradient(const Backward *q, const Operand *o, const Stretch *t, const double *v) {
    const ptrdiff_t step = q->inside ? number_step(q, o) : group_step(q, o);
    char *to = place(o, t->item, t->p, t->s);
    all_within(o, to, step, t->n, bytes_of(o->storage), "a gradient of weight or bias");
    if (o->data) put_numbers(v, t->n, to, step, o->storage);
}
/* Whether any is infinite, or not a number: one more in its exponent reaches the sign. */
FN_INLINE int any_infinite(const double *v, ptrdiff_t n) {
    uint64_t all = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, v + i, sizeof(bits));
        all |= (bits & 0x7ff0000000000000u) + 0x0010000000000000u;
    }
    return all >> 63;
}
/* t.n neighbouring cells. */
static void put_cells(const Backward *q, Stretch t, Cells cells) {
    put_gradient(q, &q->dweight, &t, cells.weight);
    put_gradient(q, &q->dbias, &t, cells.bias);
}

#endif
