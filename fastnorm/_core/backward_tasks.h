/* The backward pass shared out: in tasks, which take some items of an owner at a time from sums to
 * dx, while they are in cache; or all of them, and then the threads share each of these two sweeps.
 */

/* ---- groups and rows that are walked whole ------------------------------------------------------
 */

/* The sums of a run; and what they take from dx. */
FN_INLINE void T(sum_run)(const Rows *q, T(Slope) v, double mean, double rstd, const REAL *w,
                          Storage storage, double *sums) {
    double lanes[2 * PAIR_LANES] = {0};
    T(add_run)(q, v, w, storage, lanes);
    sums[0] = 0.0 + fn_added_up(lanes);
    sums[1] = 0.0 + fn_added_up(lanes + PAIR_LANES);
    if (IS_FLOAT && !T(holds_terms)(sums[0], sums[1])) {
        const Rows again = *q; /* whose address may be kept, so that q's stays in registers */
        double in_double[2];
        T(sum_run_in_double)(&again, mean, rstd, w, storage, in_double);
        sums[0] = in_double[0];
        sums[1] = in_double[1];
    }
}
/* 0 where dx has to be computed in double. */
FN_INLINE int T(take_sums)(const Backward *q, T(Slope) *v, double rstd, const double *sums,
                           double count) {
    const double c1 = q->centred ? rstd * (sums[0] / count) : 0.0, c2 = rstd * (sums[1] / count);
    v->c1 = (REAL)c1;
    v->c2 = (REAL)c2;
    return T(holds_sums)(c1, c2, count);
}
/* dx of a group of planes with a weight each, from its sums. */
FN_APART void T(apply_planes_in_double)(const Backward *q, Item it, Rows rows,
                                        T(DoubleSlope) v, Storage storage) {
    const double count = (double)q->length;
    v.first = q->centred ? v.rstd * (v.first / count) : 0.0;
    v.second = v.rstd * (v.second / count);
    for (ptrdiff_t p = 0; p < q->p; p++, rows = further(rows, 1)) {
        const double weight = weight_of(q, it, p, 0, 0);
        for (ptrdiff_t i = 0; i < q->s; i++) {
            const REAL x = T(element)(rows.x, i, storage), dy = T(element)(rows.dy, i, storage);
            REAL dx;
            T(apply_in_double)(v, x, dy, weight, 1, &dx);
            T(put)(rows.dx, i, dx, storage);
        }
    }
}
/* A group of planes with a weight each, from its sums to dx. */
FN_INLINE void T(whole_group_of)(const Backward *q, Item it, Cells to, Storage storage) {
    const Stretch t = {it, 0, 0, q->s, 1};
    const Operand *w = &q->weight;
    const double mean = statistic(q, &q->mean, it, 0), rstd = statistic(q, &q->rstd, it, 0);
    const Rows all = {locate(q, &q->x, &t), locate(q, &q->dy, &t), locate(q, &q->dx, &t),
                      q->x.p, q->dy.p, q->dx.p, q->p, q->s, PREFETCH_BYTES};
    T(Slope) v = T(slope_of)(mean, rstd);
    double of_group[2] = {0, 0};
    Rows rows = all;
    for (ptrdiff_t p = 0; p < q->p; p++, rows = further(rows, 1)) {
        const double weight = w->data ? (double)*(const REAL *)place(w, it, p, 0) : 1.0;
        double sums[2];
        T(sum_run)(&rows, v, mean, rstd, NULL, storage, sums);
        to.weight[p * q->cell_p] += sums[1];
        to.bias[p * q->cell_p] += sums[0];
        of_group[0] += weight * sums[0];
        of_group[1] += weight * sums[1];
    }
    if (!T(take_sums)(q, &v, rstd, of_group, (double)q->length)) {
        const T(DoubleSlope) slope = {mean, rstd, of_group[0], of_group[1]};
        T(apply_planes_in_double)(q, it, all, slope, storage);
        return;
    }
    rows = all;
    rows.ahead = 0;
    for (ptrdiff_t p = 0; p < q->p; p++, rows = further(rows, 1)) {
        v.wr = (REAL)((w->data ? (double)*(const REAL *)place(w, it, p, 0) : 1.0) * rstd);
        T(apply_run)(&rows, v, storage);
    }
}
/* Neighbouring groups, likewise; 0, and nothing is done, where one is out of range. */
static int T(whole_groups)(const Backward *q, Item it, T(Range) weights, double *cells) {
    for (ptrdiff_t k = 0; k < it.width; k++) {
        const double rstd = statistic(q, &q->rstd, it, k);
        if (!T(holds)(statistic(q, &q->mean, it, k), rstd) ||
            !T(holds_weights)(weights.lowest, weights.greatest, rstd))
            return 0;
    }
    for (ptrdiff_t k = 0; k < it.width; k++) {
        const Cells to = {cells + k * q->cell_c, cells + q->cells + k * q->cell_c};
        if (IS_FLOAT && q->bf16_direct) T(whole_group_of)(q, group_at(it, k), to, BF16);
        else T(whole_group_of)(q, group_at(it, k), to, F64);
    }
    return 1;
}
/* Number i of rows at equal distances. */
FN_INLINE char *T(row)(const Backward *q, const Operand *o, ptrdiff_t i) {
    char *found = o->data + i * (q->b == 1 ? o->a : o->b);
    within(o, found, o->s ? q->s * bytes_of(o->storage) : bytes_of(o->storage), "a row, backward");
    return found;
}
/* Rows from `first` on that share the weights along them, four at a time, from their sums to dx and
 * to what they add to the gradients of the weights.  How many are done: all, but for the last one
 * to three, or those before four of which one is out of range. */
FN_INLINE ptrdiff_t T(whole_rows_of)(const Backward *q, Span f, T(Range) weights, Cells to,
                                     REAL *tiles, Storage storage) {
    const Item origin = {0, 0, 0, 1};
    const Stretch all = {origin, 0, 0, q->s, 1};
    const ptrdiff_t size = T(size_of)(storage);
    const REAL *w = T(weights_or_ones)(q, &all, tiles + 4 * BACKWARD_CHUNK);
    ptrdiff_t i = f.first;
    for (; i + 4 <= f.last; i += 4) {
        T(SharedRuns) runs; /* not as {.count = 4}: gcc would set all of it to 0 */
        runs.count = 4;
        for (int k = 0; k < 4; k++) {
            const double rstd = *(const double *)T(row)(q, &q->rstd, i + k);
            const double mean = q->mean.data ? *(const double *)T(row)(q, &q->mean, i + k) : 0.0;
            double sums[2];
            if (!T(holds)(mean, rstd) ||
                !T(holds_weights)(weights.lowest, weights.greatest, rstd))
                return i - f.first;
            runs.rows[k] = (Rows){T(row)(q, &q->x, i + k), T(row)(q, &q->dy, i + k),
                                  T(row)(q, &q->dx, i + k), 0, 0, 0, 1, q->s, PREFETCH_BYTES};
            runs.slope[k] = T(slope_of)(mean, rstd);
            T(sum_run)(&runs.rows[k], runs.slope[k], mean, rstd, w, storage, sums);
            if (!T(take_sums)(q, &runs.slope[k], rstd, sums, (double)q->s)) return i - f.first;
        }
        if (!q->non_temporal) {
            T(collect_of)(&runs, w, to, storage);
            continue;
        }
        char *dx[4];
        for (int k = 0; k < 4; k++) {
            dx[k] = runs.rows[k].dx;
            runs.rows[k].dx = (char *)(tiles + k * BACKWARD_CHUNK);
        }
        for (ptrdiff_t t = 0, n; t < q->s; t += n) {
            n = least(q->s - t, BACKWARD_CHUNK);
            for (int k = 0; k < 4; k++) runs.rows[k].n = n;
            T(collect_of)(&runs, w + t, (Cells){to.weight + t, to.bias + t}, storage);
            for (int k = 0; k < 4; k++) {
                fn_stream(dx[k] + t * size, runs.rows[k].dx, (size_t)(n * size));
                runs.rows[k].x += n * size;
                runs.rows[k].dy += n * size;
            }
        }
    }
    return i - f.first;
}
static ptrdiff_t T(whole_rows)(const Backward *q, Span f, T(Range) weights, Cells to,
                               REAL *tiles) {
    if (IS_FLOAT && q->bf16_direct) return T(whole_rows_of)(q, f, weights, to, tiles, BF16);
    return T(whole_rows_of)(q, f, weights, to, tiles, F64);
}

/* ---- the gradients of weight and bias, from their cells to their arrays --------------------- */

/* n numbers from the i-th on of an item's row or run, in place or in `room`. */
static const REAL *T(numbers_at)(const Backward *q, const Operand *o, Stretch t, ptrdiff_t i,
                                 ptrdiff_t n, REAL *room) {
    const char *from = place(o, t.item, t.p, t.s) + i * number_step(q, o);
    all_within(o, from, 0, 1, n * bytes_of(o->storage), "numbers that are added again");
    if (T(native)(o->storage)) return (const REAL *)from;
    T(load)(from, o->storage, n, room);
    return room;
}
/* Up to 64 cells, from the i-th on, of all numbers that add to them once more, in double. */
FN_APART void T(add_again)(const Backward *q, ptrdiff_t owner, Stretch t, ptrdiff_t i, ptrdiff_t n,
                           Cells cells) {
    enum { M = 64 };
    const ptrdiff_t p_end = q->cell_p ? t.p + 1 : q->p, p = t.p, s = t.s;
    const ptrdiff_t s_end = q->columns && !q->cell_s ? q->s : t.s + 1;
    const int each = !q->columns || q->cell_c; /* number of a row has a cell; else all have one */
    double weight[M] = {0}, bias[M] = {0}, mean[M], rstd[M];
    REAL room_x[M], room_dy[M];
    for (ptrdiff_t sharer = 0; sharer < q->sharers; sharer++) {
        t.item = item_of(q, owner, sharer);
        const ptrdiff_t end = each ? i + n : t.item.width;
        for (ptrdiff_t first = each ? i : 0, m; first < end; first += m) {
            m = least(end - first, M);
            for (ptrdiff_t j = 0; j < m; j++) {
                const ptrdiff_t column = q->columns ? first + j : 0;
                mean[j] = column || !j ? statistic(q, &q->mean, t.item, column) : mean[0];
                rstd[j] = column || !j ? statistic(q, &q->rstd, t.item, column) : rstd[0];
            }
            for (t.p = p; t.p < p_end; t.p++)
                for (t.s = s; t.s < s_end; t.s++) {
                    const REAL *x = T(numbers_at)(q, &q->x, t, first, m, room_x);
                    const REAL *dy = T(numbers_at)(q, &q->dy, t, first, m, room_dy);
                    for (ptrdiff_t j = 0; j < m; j++) {
                        const double g = dy[j];
                        weight[each ? j : 0] += g * (((double)x[j] - mean[j]) * rstd[j]);
                        bias[each ? j : 0] += g;
                    }
                }
        }
    }
    for (ptrdiff_t j = 0; j < n; j++) {
        double *w = cells.weight + i + j, *b = cells.bias + i + j;
        if (isfinite(*w) && isfinite(*b)) continue;
        *w = weight[j];
        *b = bias[j];
    }
}
/* Where the weight differs inside, its gradients are sums of products of floats: of those that are
 * not finite, one may have left a float's range. */
static void T(mend_cells)(const Backward *q, ptrdiff_t owner, Stretch t, Cells cells) {
    if (!IS_FLOAT || !q->inside) return;
    for (ptrdiff_t i = 0, n; i < t.n; i += n) {
        n = least(t.n - i, 64);
        if (any_infinite(cells.weight + i, n) || any_infinite(cells.bias + i, n))
            T(add_again)(q, owner, t, i, n, cells);
    }
}
static void T(put_owner)(const Backward *q, ptrdiff_t owner, double *cells) {
    const Item it = item_of(q, owner, 0);
    const ptrdiff_t planes = q->cell_p ? q->p : 1, rows = q->columns && q->cell_s ? q->s : 1;
    Stretch t = {it, 0, 0, q->cell_c ? it.width : 1, 1};
    if (q->cell_s && !q->columns) t.n = q->s;
    for (t.p = 0; t.p < planes; t.p++)
        for (t.s = 0; t.s < rows; t.s++) {
            double *first = cells + t.p * q->cell_p + t.s * q->cell_s;
            const Cells here = {first, first + q->cells};
            T(mend_cells)(q, owner, t, here);
            put_cells(q, t, here);
        }
}
/* The sums of an owner's parts, added up in their order. */
static void T(merge_parts)(const Backward *q, double *parts) {
    const ptrdiff_t size = 2 * q->cells;
    for (ptrdiff_t owner = 0; owner < q->owners; owner++, parts += q->parts * size) {
        for (ptrdiff_t part = 1; part < q->parts; part++)
            for (ptrdiff_t i = 0; i < size; i++) parts[i] += parts[part * size + i];
        T(put_owner)(q, owner, parts);
    }
}

/* ---- scratch memory -----------------------------------------------------------------------------
 */

typedef struct {
    Arena memory;
    REAL *tiles;
    double *chunk; /* cells that are put at once */
    /* of a thread that takes items */
    T(Slopes) *slopes;
    double *sums, *cells;
} T(Space);

static int T(open_space)(const Backward *q, T(Space) *h, int takes_items) {
    const ptrdiff_t n = takes_items ? q->together : 0, size = T(slopes_size)(q->width);
    const ptrdiff_t cells = takes_items && q->keep_cells && q->parts == 1 ? q->cells : 0;
    const ptrdiff_t pair = 2 * sizeof(double), chunk = most(BACKWARD_CHUNK, q->width);
    char *memory;
    count_pieces(&h->memory);
    for (int counted = 0; counted < 2; counted++) {
        h->tiles = take(&h->memory, BACKWARD_TILE_BYTES);
        h->chunk = take(&h->memory, q->keep_cells ? 0 : chunk * pair);
        h->slopes = take(&h->memory, n * (ptrdiff_t)sizeof(T(Slopes)));
        memory = take(&h->memory, n * size);
        h->sums = take(&h->memory, n * q->segments * q->width * pair);
        h->cells = take(&h->memory, cells * pair);
        if (!counted && !open_arena(&h->memory)) return 0;
    }
    for (ptrdiff_t i = 0; i < n; i++) h->slopes[i] = T(slopes_in)(memory + i * size, q->width, 0);
    return 1;
}

/* ---- items that are taken together
 * ---------------------------------------------------------------
 * Their sums first, then their dx: each shared out, where a thread does not take all of it. */

typedef struct {
    const Backward *q;
    ptrdiff_t total, turns;    /* what is shared out, in so many turns */
    int inner;                 /* threads that share the items taken together */
    T(Space) *threads, *items; /* of the threads that share, and of the one that takes the items */
    double *parts;             /* the cells of all tasks; NULL: each has its own */
    ptrdiff_t owner;
    T(Range) weights;          /* of the owner, where they differ inside, or groups are whole */
    Span sharers;              /* that are taken together */
    double *cells;             /* that they add to; NULL: put as soon as all is added */
} T(Work);

FN_INLINE Span T(share)(const T(Work) *w, ptrdiff_t turn) {
    return (Span){w->total * turn / w->turns, w->total * (turn + 1) / w->turns};
}
static void T(share_all)(T(Work) *w, ptrdiff_t total, int threads, int backwards, Turn run) {
    w->total = total;
    w->turns = threads == 1 ? 1 : least(total, TURNS_PER_THREAD * (ptrdiff_t)threads);
    share_out(w->turns, threads, (Sharing){backwards, w->q->small}, run, w);
}
/* The sums of some segments of the items. */
static void T(sums_turn)(void *work, ptrdiff_t turn, int thread) {
    const T(Work) *w = work;
    const ptrdiff_t n = w->q->segments;
    const Span f = T(share)(w, turn);
    for (ptrdiff_t i = f.first; i < f.last; i++)
        T(sum_segment)(w->q, &w->items->slopes[i / n], i % n, w->items->sums + i * 2 * w->q->width,
                       w->threads[thread].tiles);
}
/* Along a run, or over the rows of columns, the chunks of cells that are collected at a time. */
FN_INLINE ptrdiff_t T(chunks_along)(const Backward *q) {
    if (q->columns) return q->cell_s ? q->s : 1;
    return (q->s + BACKWARD_CHUNK - 1) / BACKWARD_CHUNK;
}
/* dx of all that shares a chunk's weights, and the gradients of these. */
static void T(collect_chunk)(const T(Work) *w, ptrdiff_t chunk, T(Space) *h) {
    const Backward *q = w->q;
    const ptrdiff_t along = T(chunks_along)(q), step = q->columns ? 1 : BACKWARD_CHUNK;
    const ptrdiff_t planes = q->cell_p ? 1 : q->p, rows = q->columns && !q->cell_s ? q->s : 1;
    const ptrdiff_t p = chunk / along, s = chunk % along * step;
    const ptrdiff_t cell = p * q->cell_p + (q->columns ? s * q->cell_s : s);
    const T(Slopes) *slopes = w->items->slopes;
    Stretch t = {slopes->item, p, s, least(q->s - s, step), 1};
    if (q->columns) t.n = q->cell_c ? t.item.width : 1;
    Cells to = {h->chunk, h->chunk + t.n};
    if (w->cells) to = (Cells){w->cells + cell, w->cells + cell + q->cells};
    else memset(h->chunk, 0, 2 * (size_t)t.n * sizeof(double));
    for (ptrdiff_t j = 0, left; (left = w->sharers.last - w->sharers.first - j) > 0;
         j += q->columns ? 1 : BACKWARD_SHARED_RUNS)
        for (t.p = p; t.p < p + planes; t.p++)
            for (t.s = s; t.s < s + rows; t.s++) {
                if (q->columns) T(collect_row)(q, slopes + j, t.p, t.s, to, h->tiles);
                else
                    T(collect_runs)(q, slopes + j, (int)least(BACKWARD_SHARED_RUNS, left), t, to,
                                    h->tiles);
            }
    t.p = p;
    t.s = s;
    t.item = slopes->item;
    if (w->cells) return;
    T(mend_cells)(q, w->owner, t, to);
    put_cells(q, t, to);
}
/* dx of segments, or where the weight differs inside of chunks. */
static void T(dx_turn)(void *work, ptrdiff_t turn, int thread) {
    const T(Work) *w = work;
    const ptrdiff_t n = w->q->segments;
    T(Space) *h = &w->threads[thread];
    const Span f = T(share)(w, turn);
    for (ptrdiff_t i = f.first; i < f.last; i++) {
        if (w->q->inside) T(collect_chunk)(w, i, h);
        else T(apply_span)(w->q, &w->items->slopes[i / n], segment(w->q, i % n), h->tiles);
    }
    fn_stream_fence();
    fn_check_store_fence();
}
static void T(take_items)(T(Work) *w) {
    const Backward *q = w->q;
    const T(Space) *h = w->items;
    const ptrdiff_t n = w->sharers.last - w->sharers.first, segments = n * q->segments;
    const int sums = q->training || !q->inside;
    for (ptrdiff_t i = 0; i < n; i++)
        T(read_statistics)(q, item_of(q, w->owner, w->sharers.first + i), w->weights,
                           &h->slopes[i], h->tiles);
    if (sums) T(share_all)(w, segments, w->inner, 0, T(sums_turn));
    for (ptrdiff_t i = 0; i < segments && sums; i++)
        T(add_segment)(q, &h->slopes[i / q->segments], i % q->segments, h->sums + i * 2 * q->width,
                       w->cells);
    for (ptrdiff_t i = 0; i < n; i++) T(finish_sums)(q, &h->slopes[i]);
    const ptrdiff_t chunks = (q->cell_p ? q->p : 1) * T(chunks_along)(q);
    /* the last read are the first written: what is still in cache is read from there */
    T(share_all)(w, q->inside ? chunks : segments, w->inner, 1, T(dx_turn));
}

/* ---- tasks --------------------------------------------------------------------------------------
 */

/* Each a part of an owner's sharers. */
static void T(task_turn)(void *work, ptrdiff_t turn, int thread) {
    T(Work) w = *(const T(Work) *)work;
    const Backward *q = w.q;
    const Span tasks = T(share)(&w, turn);
    w.threads += thread;
    w.items += thread;
    for (ptrdiff_t task = tasks.first; task < tasks.last; task++) {
        const ptrdiff_t part = task % q->parts;
        Span f = {q->sharers * part / q->parts, q->sharers * (part + 1) / q->parts};
        w.owner = task / q->parts;
        w.weights = T(range_of_weights)(q, item_of(q, w.owner, 0), w.items->tiles);
        w.cells = w.parts ? w.parts + task * 2 * q->cells : q->keep_cells ? w.items->cells : NULL;
        if (w.cells) memset(w.cells, 0, 2 * (size_t)q->cells * sizeof(double));
        while (f.first < f.last) {
            if (q->whole_groups &&
                T(whole_groups)(q, item_of(q, w.owner, f.first), w.weights, w.cells)) {
                f.first++;
                continue;
            }
            if (q->whole_rows)
                f.first +=
                    T(whole_rows)(q, f, w.weights, (Cells){w.cells, w.cells + q->cells},
                                  w.items->tiles);
            w.sharers = (Span){f.first, least(f.first + q->together, f.last)};
            f.first = w.sharers.last;
            if (w.sharers.first < w.sharers.last) T(take_items)(&w);
        }
        if (w.cells && !w.parts) T(put_owner)(q, w.owner, w.cells);
    }
    fn_stream_fence();
    fn_check_store_fence();
}
/* Weights that all rows share are converted once, not for each of them. */
static void T(convert_weight)(Backward *q, REAL *room) {
    const Stretch all = {{0, 0, 0, 1}, 0, 0, q->s, 1};
    T(weights_along)(q, &all, room);
    aim_at(&q->weight, (char *)room, q->s * (ptrdiff_t)sizeof(REAL));
    q->weight.storage = IS_FLOAT ? F32 : F64;
    q->weight.s = sizeof(REAL);
}
/* Not 0 where memory is short, and then nothing is written. */
static int T(run_backward)(Backward *q) {
    const ptrdiff_t tasks = q->owners * q->parts;
    const ptrdiff_t of_tasks = q->parts > 1 ? tasks * 2 * q->cells : 0;
    const int outer = q->share_items ? 1 : q->threads;
    const Operand weight = q->weight;
    T(Work) w = {.q = q, .inner = q->share_items ? q->threads : 1};
    REAL *room = NULL;
    char stack[ON_STACK];
    Arena m;
    int n = 0;
    count_pieces(&m);
    for (int counted = 0; counted < 2; counted++) {
        w.threads = w.items = take(&m, q->threads * (ptrdiff_t)sizeof(T(Space)));
        w.parts = take(&m, of_tasks * (ptrdiff_t)sizeof(double));
        room = take(&m, q->convert_weight ? q->s * (ptrdiff_t)sizeof(REAL) : 0);
        if (!counted && !open_on_stack(&m, stack)) return 1;
    }
    while (n < q->threads && T(open_space)(q, &w.threads[n], n < outer)) n++;
    const int failed = n < q->threads;
    if (!failed) {
        if (q->parts == 1) w.parts = NULL;
        if (q->convert_weight) T(convert_weight)(q, room);
        T(share_all)(&w, tasks, outer, 0, T(task_turn));
        if (w.parts) T(merge_parts)(q, w.parts);
        q->weight = weight;
    }
    while (n > 0) close_arena(&w.threads[--n].memory);
    close_arena(&m);
    return failed;
}
