/* The choices of the backward pass: all but the number of threads depends on the shape alone. */
#ifndef FASTNORM_BACKWARD_PLAN_H
#define FASTNORM_BACKWARD_PLAN_H

#include "backward_layout.h"
#include "sizes.h"
#include "threads.h"

static void plan_items(Backward *q) {
    const Operand *w = &q->dweight;
    ptrdiff_t items;
    q->length = q->p * q->s;
    q->own_a = w->a != 0;
    q->own_b = w->b != 0;
    q->own_c = q->columns && w->c != 0;
    q->inside = w->s != 0 || (q->columns && w->p != 0);
    q->width = 1;
    if (q->columns) {
        const ptrdiff_t groups = q->c / q->neighbours;
        const ptrdiff_t tiles = (q->c + COLUMN_TILE - 1) / COLUMN_TILE;
        q->chunks = q->c <= MAX_UNTILED_COLUMNS ? 1 : most(1, least(groups, tiles));
        q->width = (groups + q->chunks - 1) / q->chunks * q->neighbours;
        q->chunks = (q->c + q->width - 1) / q->width;
        items = q->a * q->b * q->chunks;
        q->owners = (q->own_b ? q->b : 1) * (q->own_c ? q->chunks : 1);
    } else {
        /* groups of short runs side by side, as in the forward pass: as they lie in memory */
        if (q->own_b && !q->inside && q->s * bytes_of(q->x.storage) < SHORT_RUN_BYTES)
            q->width = most(1, least(least(q->b / BACKWARD_FEW_TASKS, TILE_GROUPS),
                                     SPLIT_BLOCKS * BLOCK / most(q->length, 1)));
        q->chunks = (q->b + q->width - 1) / q->width;
        items = q->a * q->chunks;
        q->owners = q->own_b ? q->chunks : 1;
    }
    q->owners *= q->own_a ? q->a : 1;
    q->sharers = items / q->owners;

    q->cell_c = q->columns ? w->c != 0 : q->width > 1;
    q->cells = q->cell_c ? q->width : 1;
    q->cell_s = w->s != 0 ? q->cells : 0;
    q->cells *= w->s != 0 ? q->s : 1;
    q->cell_p = w->p != 0 ? q->cells : 0;
    q->cells *= w->p != 0 ? q->p : 1;

    q->span = q->columns ? BACKWARD_SPAN_ROWS : BACKWARD_SPAN;
    q->plane_segments = 0;
    q->segments = (q->length + q->span - 1) / q->span;
    if (w->p != 0 && q->p > 1 && !q->inside) {
        q->plane_segments = (q->s + q->span - 1) / q->span;
        q->segments = q->p * q->plane_segments;
    }
}
static void plan_backward(Backward *q, int threads, ptrdiff_t non_temporal_above) {
    plan_items(q);
    const Operand *w = &q->weight;
    const ptrdiff_t bytes = bytes_of(q->x.storage);
    const ptrdiff_t size = q->owners * q->sharers * q->width * q->length, x_bytes = size * bytes;
    const ptrdiff_t sum_bytes = 2 * q->cells * q->owners * (ptrdiff_t)sizeof(double);
    const ptrdiff_t worth = least(size / BACKWARD_PART_ELEMENTS,
                                  (BACKWARD_SUM_BYTES + x_bytes / 100) / sum_bytes);
    q->parts = least(least(q->sharers, most(BACKWARD_PARTS / q->owners, 1)), worth);
    q->parts = most(q->parts, 1);
    const ptrdiff_t tasks = q->owners * q->parts;
    q->threads = x_bytes < SERIAL_BYTES / 2 || !FN_OPENMP || threads < 1 ? 1 : threads;

    /* x, dy and dx go through the caches together; columns are read in two sweeps. */
    ptrdiff_t along = q->columns ? q->width : q->s;
    if (q->columns && !q->inside && q->dx.s == q->width * bytes) along *= q->s; /* adjacent rows */
    q->non_temporal =
        x_bytes > (q->columns ? non_temporal_above / 8 * 3 : non_temporal_above / 4) &&
        (along * bytes >= NON_TEMPORAL_MIN_RUN || non_temporal_above == 0);
    q->bf16_direct = q->x.storage == BF16 && q->dy.storage == BF16 && !q->columns &&
                     !q->non_temporal;

    q->convert_weight = q->inside && !q->columns && w->data && w->a == 0 && w->b == 0 &&
                        w->p == 0 && !weights_in_place(q);
    const int in_place = q->bf16_direct || (computed_in(q, q->x.storage) &&
                                            computed_in(q, q->dy.storage));
    const int cached = q->length * BACKWARD_SHARED_RUNS * 2 * bytes <= BACKWARD_CACHED_BYTES;
    const int together = q->inside && !q->columns && cached;
    q->whole_rows = together && q->training && in_place && q->width == 1 &&
                    q->p == 1 && q->owners == 1 && (q->a == 1 || q->b == 1) &&
                    (!w->data || q->convert_weight || weights_in_place(q));
    q->whole_groups = q->plane_segments == 1 && !q->columns && q->training && in_place &&
                      !q->non_temporal && (!w->data || computed_in(q, w->storage));
    /* few large groups, or sums too many to keep: all of an owner's items together */
    const int all = (tasks < BACKWARD_FEW_TASKS && size >= 8 * BACKWARD_PART_ELEMENTS) ||
                    (q->inside && q->parts == 1 && q->cells > BACKWARD_OWN_CELLS);
    if (all) q->parts = 1, q->whole_rows = q->whole_groups = 0;
    q->keep_cells = !(all && q->inside);
    q->share_items = all && (q->threads == 1 || q->owners < BACKWARD_FEW_TASKS);
    q->together = all ? q->sharers : together ? BACKWARD_SHARED_RUNS : 1;
}

#endif
