/* What follows from the dimensions of a forward pass: sizes, and the choice between ways.
 *
 * Everything else reads these fields and decides nothing by a threshold. */
#ifndef FASTNORM_PLAN_H
#define FASTNORM_PLAN_H

#include "forward.h"

/* Whether groups are rows with nothing beside weights, not too short to take one by one. */
static inline int plain_rows(const Forward *q) {
    if (q->columns || q->given || !q->y.data || q->mask.data || q->p != 1 || q->length > BLOCK ||
        (q->length < MIN_ROW && q->a * q->b >= FEW_ROWS) || q->residual.data ||
        q->activation != IDENTITY || q->user || q->activation_first)
        return 0;
    if (!q->foldable &&
        (!q->weight.s || q->weight.b || q->bias.b || (q->bias.data && !q->bias.s)))
        return 0;
    if (q->total.data)
        return q->x.storage == F32 && q->y.storage == F32 && q->addend.storage == F32;
    return q->x.storage == q->y.storage && q->x.storage <= F64 &&
           (q->x.storage >= F32 || (q->bf16_direct && !q->non_temporal));
}
/* Whether planes of doubles are so short that each group is copied together first.  They are read
 * three times, and where they lie a power of two apart they fall into a few sets of the caches,
 * which lose them in between. */
static inline int gathers(const Forward *q) {
    return q->x.storage == F64 && !q->given && !q->columns && q->p > 1 && q->splits == 1 &&
           q->y.data && q->x.s == 8 && q->x.p != q->s * 8 && q->s * 8 < SHORT_RUN_BYTES &&
           !q->mask.data && !q->total.data;
}
/* Whether groups, not of doubles, are short, lie in one piece and are all taken. */
static inline int flows(const Forward *q) {
    return !q->columns && !q->given && q->y.data && !q->mask.data && q->length <= BLOCK &&
           (q->x.storage == F32 || (q->x.storage < F32 && q->width * q->length <= 2 * BLOCK &&
                                    !q->total.data)) &&
           (!q->total.data ||
            (q->p == 1 && q->addend.storage == F32 && q->y.storage == F32)) &&
           (q->p == 1 || q->x.p == q->s * bytes_of(q->x.storage));
}

static inline void plan_forward(Forward *q, int threads) {
    const Storage x = q->x.storage;
    const ptrdiff_t size = bytes_of(x), total = q->a * q->b * q->p * q->s * q->c * size;
    ptrdiff_t along;
    q->length = q->p * q->s;
    if (q->columns) {
        const ptrdiff_t groups = q->c / q->neighbours;
        q->chunks = 1;
        if (q->c > MAX_UNTILED_COLUMNS)
            q->chunks = most(1, least(groups, (q->c + COLUMN_TILE - 1) / COLUMN_TILE));
        q->width = (groups + q->chunks - 1) / q->chunks * q->neighbours;
        q->chunks = (q->c + q->width - 1) / q->width;
        q->items = q->a * q->b * q->chunks;
        q->block = least(most(ROW_TILE_ELEMENTS / q->width, 16), SPLIT_ROWS);
        q->split_length = most(q->block, SPLIT_ROWS - SPLIT_ROWS % q->block);
        q->foldable = !(q->weight.p || q->weight.s || q->bias.p || q->bias.s);
    } else {
        /* one group after the other, or several that lie side by side */
        q->width = TILE_ELEMENTS / most(q->length, 1);
        if (q->width == 1 && q->length <= BLOCK) q->width = 2;
        if (q->p > 1 && q->s * size < SHORT_RUN_BYTES)
            q->width = most(q->width, SPLIT_BLOCKS * BLOCK / most(q->length, 1));
        q->width = most(1, least(least(q->width, q->b), TILE_GROUPS));
        q->chunks = (q->b + q->width - 1) / q->width;
        q->items = q->a * q->chunks;
        q->block = BLOCK;
        q->split_length = BLOCK * SPLIT_BLOCKS;
        q->foldable = !(q->weight.s || q->bias.s);
    }
    q->foldable = q->foldable && !q->activation_first;
    q->guarded = q->mask.data || (q->given && !q->foldable);
    q->splits = most(1, (q->length + q->split_length - 1) / q->split_length);
    q->threads = total < SERIAL_BYTES || !FN_OPENMP || threads < 1 ? 1 : threads;
    q->static_shares = total < q->threads * (ptrdiff_t)STATIC_BYTES_PER_THREAD;
    q->long_enough = total >= GIL_RELEASE_MIN_BYTES;
    along = q->columns ? q->width : q->s;
    if (q->columns && q->y.s == q->width * size) along *= q->s; /* rows that follow one another */
    /* x and y go through the cache together.  From five eighths of it on y goes past it: rows of 25
     * MB take 0.75 of the time, planes that lie apart 0.7, columns read in two sweeps 0.7 (32 MB of
     * L3). Of a sum and its norm four arrays go through the caches. */
    q->non_temporal = (q->total.data ? 4 * total : total) > stream_above / 8 * 5 &&
                      pays_to_stream(along, size);
    /* a weight along the run, or one for all of it, and a bias only beside a weight of its kind */
    q->bf16_direct = x == BF16 && q->y.storage == BF16 && !q->columns &&
                     q->activation == IDENTITY && !q->user && !q->residual.data && !q->mask.data &&
                     !q->total.data && q->y.data && (q->p == 1 || q->x.p == q->s * size) &&
                     (q->foldable || (q->weight.s && (!q->bias.data || q->bias.s)));
    const int in_place = !q->user && x == q->y.storage && x >= F32 && !q->mask.data &&
                         (!q->residual.data || q->residual.storage == x) &&
                         (!q->total.data || q->addend.storage == x);
    q->direct = in_place && !q->non_temporal;
    q->direct_non_temporal = in_place && q->non_temporal && x == F32 && q->foldable;
    /* from half of the last cache on y would push out what is still to be read: 820 to 540 us for
     * 16 MB (32 MB of L3) */
    q->gathered_non_temporal = total >= stream_above / 2;
    q->tabulated = q->given && !q->columns && q->a > 1 && !q->mean.a && !q->var.a && q->splits == 1;
    q->split_items = q->threads > 1 && q->splits > 1 && q->items < 4 * q->threads &&
                     q->items % q->threads != 0;
    q->walk = gathers(q) ? WALK_GATHERED : x != F64 && flows(q) ? WALK_PIPELINED : WALK_ITEMS;
    if (plain_rows(q)) {
        q->width = 1, q->chunks = q->b, q->items = q->a * q->b;
        q->walk = WALK_ROWS;
    }
}

#endif
