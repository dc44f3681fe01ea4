/* The backward pass of one item: its statistics, its sums, its dx. */

/* ---- numbers as they are computed with ----------------------------------------------------------
 */

/* A stretch of x and dy, in place or, where their format is converted first, in tiles for `room`
 * numbers. */
static inline const char *T(ready)(const Backward *q, const Operand *o, const Stretch *t,
                                   int direct,
                                   REAL *tile, ptrdiff_t room, ptrdiff_t *step) {
    const char *source = locate(q, o, t);
    *step = stretch_step(q, o);
    if (direct || T(native)(o->storage)) return source;
    fits(t->n * t->count, room, "a tile, backward");
    const ptrdiff_t whole = t->n * t->count;
    const ptrdiff_t n = *step == t->n * bytes_of(o->storage) ? whole : t->n; /* its rows are one */
    for (ptrdiff_t k = 0; k < whole; k += n, source += *step)
        T(load)(source, o->storage, n, tile + k);
    *step = t->n * (ptrdiff_t)sizeof(REAL);
    return (const char *)tile;
}
static inline Rows T(rows_of)(const Backward *q, const Stretch *t, int direct, REAL *tile,
                              ptrdiff_t room) {
    Rows rows = {.count = t->count, .n = t->n};
    rows.x = T(ready)(q, &q->x, t, direct, tile, room, &rows.x_step);
    rows.dy = T(ready)(q, &q->dy, t, direct, tile + room, room, &rows.dy_step);
    return rows;
}
/* Where dx of a stretch goes: in place, or to a tile for `room` numbers, from which `deliver_dx`
 * takes it. */
static inline void T(aim_dx)(const Backward *q, const Stretch *t, int in_place, REAL *tile,
                             ptrdiff_t room, Rows *rows) {
    rows->dx = locate(q, &q->dx, t);
    rows->dx_step = stretch_step(q, &q->dx);
    if (in_place) return;
    fits(t->n * t->count, room, "a tile of dx");
    rows->dx = (char *)tile;
    rows->dx_step = t->n * (ptrdiff_t)sizeof(REAL);
}
static void T(deliver_dx)(const Backward *q, const Stretch *t, const char *dx, REAL *spare) {
    char *to = locate(q, &q->dx, t);
    const ptrdiff_t step = stretch_step(q, &q->dx);
    const ptrdiff_t whole = t->n * t->count;
    const ptrdiff_t n = step == t->n * bytes_of(q->dx.storage) ? whole : t->n;
    for (ptrdiff_t k = 0; k < whole; k += n, to += step)
        T(deliver)((const REAL *)dx + k, n, to, q->dx.storage, q->non_temporal, (char *)spare);
}
/* The weights along a stretch (the one weight of a row of columns); NULL where they are 1. */
static const REAL *T(weights_along)(const Backward *q, const Stretch *t, REAL *room) {
    const Operand *w = &q->weight;
    if (!w->data) return NULL;
    const char *source = place(w, t->item, t->p, t->s);
    const ptrdiff_t step = number_step(q, w), n = step ? t->n : 1;
    all_within(w, source, step, n, bytes_of(w->storage), "weights along a run or row");
    if (weights_in_place(q)) return (const REAL *)source;
    for (ptrdiff_t i = 0; i < n; i++) room[i] = (REAL)number(source + i * step, w->storage);
    return room;
}
/* The same, and ones where there are none. */
static const REAL *T(weights_or_ones)(const Backward *q, const Stretch *t, REAL *room) {
    const REAL *w = T(weights_along)(q, t, room);
    for (ptrdiff_t i = 0; i < t->n && !w; i++) room[i] = 1;
    return w ? w : room;
}
/* Elements (rows) that are taken at once: no more than tiles have room for, if they are needed.
 * They are added 64 (4) at a time, which must not depend on the width: one sample's is another than
 * a batch's. */
static ptrdiff_t T(limit)(const Backward *q, ptrdiff_t width, int in_place) {
    if (in_place) return q->span;
    return q->columns ? most(BLOCK / width / 4 * 4, 1) : BLOCK / width / 64 * 64;
}

/* ---- statistics ---------------------------------------------------------------------------------
 */

FN_INLINE ptrdiff_t T(slopes_size)(ptrdiff_t room) {
    return (room * (4 * (ptrdiff_t)sizeof(double) + 6 * (ptrdiff_t)sizeof(REAL) + 1) + 7) / 8 * 8;
}
/* In memory for `room`, from number i on. */
static T(Slopes) T(slopes_in)(char *memory, ptrdiff_t room, ptrdiff_t i) {
    double *d = (double *)memory + i;
    REAL *r = (REAL *)((double *)memory + 4 * room) + i;
    return (T(Slopes)){
        .memory = memory, .room = room,
        .mean = d, .rstd = d + room, .first = d + 2 * room, .second = d + 3 * room,
        .hi = r, .r = r + room, .shift = r + 2 * room,
        .wr = r + 3 * room, .c1 = r + 4 * room, .c2 = r + 5 * room,
        .out_of_range = (uint8_t *)(r - i + 6 * room) + i,
    };
}
/* Those from number i to `end`: all out of range, or all not. */
static inline T(Slopes) T(some_of)(const Backward *q, const T(Slopes) *s, ptrdiff_t i,
                                   ptrdiff_t end, int out_of_range) {
    T(Slopes) part = T(slopes_in)(s->memory, s->room, i);
    part.any_out_of_range = out_of_range;
    part.item = s->item;
    part.item.width = end - i;
    *(q->columns ? &part.item.c : &part.item.b) += i;
    return part;
}
/* Those from number i on that are alike: s itself, or in `part`. */
static inline const T(Slopes) *T(alike)(const Backward *q, const T(Slopes) *s, ptrdiff_t i,
                                        T(Slopes) *part) {
    ptrdiff_t end = i + 1;
    if (!s->any_out_of_range) return s;
    while (end < s->item.width && s->out_of_range[end] == s->out_of_range[i]) end++;
    *part = T(some_of)(q, s, i, end, s->out_of_range[i]);
    return part;
}
/* Whether REAL can hold xhat, in its range and with its precision: as in the forward pass. */
FN_INLINE int T(holds)(double mean, double rstd) {
    return !IS_FLOAT || rstd == 0 ||
           (fabs(rstd) > 7.9e-31 && fabs(rstd) < 1.3e30 && fabs(mean) < 1.3e30);
}
/* Whether it can hold rstd times these magnitudes of weights, the least but for 0 and the greatest.
 */
FN_INLINE int T(holds_weights)(double lowest, double greatest, double rstd) {
    return !IS_FLOAT || rstd == 0 ||
           (lowest * fabs(rstd) > 7.9e-31 && greatest * fabs(rstd) < 1.3e30);
}
/* Whether it could hold the terms of a group's two sums: if not, a product, or a sum of four, has
 * left its range, or was so small that digits were lost, or all of it. */
FN_INLINE int T(holds_terms)(double first, double second) {
    const double a = fabs(first), b = fabs(second);
    return !IS_FLOAT || ((a > 0x1p-100) & (b > 0x1p-100) & (a + b < INFINITY));
}
/* Whether it can hold c1 and xhat c2, where no xhat is above the root of the count: their digits,
 * and below 2^102, half a unit of the largest float. Where dy wr leaves the range, dx does, too. */
FN_INLINE int T(holds_sums)(double c1, double c2, double count) {
    const double size = c1 * c1 + c2 * c2 * count;
    return !IS_FLOAT || (size > 0x1p-204 && size < 0x1p204) || size == 0;
}
FN_INLINE T(Slope) T(slope_of)(double mean, double rstd) {
    return (T(Slope)){(REAL)mean, (REAL)rstd, (REAL)(-(mean - (double)(REAL)mean) * rstd), 0, 0, 0};
}
/* The least magnitude of some weights that is not 0, and the greatest. */
typedef struct {
    REAL lowest, greatest;
} T(Range);

/* Magnitudes are compared as whole numbers, of which 0 less one is the largest. */
FN_INLINE void T(widen)(const REAL *w, ptrdiff_t n, REAL *FN_RESTRICT lowest,
                        REAL *FN_RESTRICT greatest) {
    for (ptrdiff_t i = 0; i < n && IS_FLOAT; i++) {
        const uint32_t m = fn_bits((float)w[i]) & 0x7fffffffu, before = m - 1;
        const uint32_t high = fn_bits((float)greatest[i]), low = fn_bits((float)lowest[i]) - 1;
        greatest[i] = fn_float(m > high ? m : high);
        lowest[i] = fn_float((before < low ? before : low) + 1);
    }
}
/* Of the weights of an item that differ inside: of each column where each has its own, else of all,
 * in PAIR_LANES parts. */
static void T(range_in_lanes)(const Backward *q, Item it, REAL *lowest, REAL *greatest,
                              REAL *tile) {
    const ptrdiff_t planes = q->weight.p ? q->p : 1, rows = q->columns && q->weight.s ? q->s : 1;
    const int along = number_step(q, &q->weight) != 0;
    const ptrdiff_t n = !along ? 1 : q->columns ? it.width : q->s;
    const ptrdiff_t lanes = along && q->columns ? it.width : PAIR_LANES;
    for (ptrdiff_t j = 0; j < lanes; j++) lowest[j] = (REAL)INFINITY, greatest[j] = 0;
    for (ptrdiff_t p = 0; p < planes; p++)
        for (ptrdiff_t s = 0; s < rows; s++)
            for (ptrdiff_t from = 0; from < n; from += BLOCK) {
                const Stretch t = {it, p, q->columns ? s : from, least(n - from, BLOCK), 1};
                const REAL *w = T(weights_along)(q, &t, tile);
                ptrdiff_t i = 0;
                for (; lanes == PAIR_LANES && i + PAIR_LANES <= t.n; i += PAIR_LANES)
                    T(widen)(w + i, PAIR_LANES, lowest, greatest);
                T(widen)(w + i, t.n - i, lowest, greatest);
            }
}
/* Of those of an owner that differ inside; or, before they are walked whole, of its groups. */
static T(Range) T(range_of_weights)(const Backward *q, Item it, REAL *tile) {
    REAL lowest[PAIR_LANES], greatest[PAIR_LANES];
    T(Range) all = {(REAL)INFINITY, 0};
    if (!IS_FLOAT || !q->weight.data || !(q->inside || q->whole_groups) ||
        (q->inside && q->columns && q->weight.c))
        return (T(Range)){1, 1};
    if (q->inside) {
        T(range_in_lanes)(q, it, lowest, greatest, tile);
        for (int j = 0; j < PAIR_LANES; j++) {
            all.lowest = lowest[j] < all.lowest ? lowest[j] : all.lowest;
            all.greatest = greatest[j] > all.greatest ? greatest[j] : all.greatest;
        }
        return all;
    }
    for (ptrdiff_t p = 0; p < q->p; p++)
        for (ptrdiff_t k = 0; k < it.width; k++) {
            const REAL weight = *(const REAL *)place(&q->weight, group_at(it, k), p, 0);
            T(widen)(&weight, 1, &all.lowest, &all.greatest);
        }
    return all;
}
static void T(read_statistics)(const Backward *q, Item it, T(Range) weights, T(Slopes) *s,
                               REAL *tile) {
    const int own = IS_FLOAT && q->inside && q->columns && q->weight.data && q->weight.c;
    /* of planes' weights `finish_sums` says so, of each group: their sums do not depend on it */
    if (!q->inside) weights = (T(Range)){1, 1};
    s->item = it;
    s->any_out_of_range = 0;
    if (own) T(range_in_lanes)(q, it, s->c1, s->c2, tile);
    for (ptrdiff_t i = 0; i < it.width; i += q->neighbours) {
        const double mean = statistic(q, &q->mean, it, i), rstd = statistic(q, &q->rstd, it, i);
        const T(Slope) v = T(slope_of)(mean, rstd);
        const int held = T(holds)(mean, rstd);
        for (ptrdiff_t j = i; j < i + q->neighbours; j++) {
            if (own) weights = (T(Range)){s->c1[j], s->c2[j]};
            s->mean[j] = mean;
            s->rstd[j] = rstd;
            s->first[j] = s->second[j] = 0.0;
            s->hi[j] = v.hi;
            s->r[j] = v.r;
            s->shift[j] = v.shift;
            s->out_of_range[j] =
                !held || !T(holds_weights)(weights.lowest, weights.greatest, rstd);
            s->any_out_of_range |= s->out_of_range[j];
        }
    }
}

/* ---- sums ---------------------------------------------------------------------------------------
 */

static void T(sum_span)(const Backward *q, const T(Slopes) *s, Span f, ptrdiff_t limit,
                        double *first, double *second, REAL *tiles) {
    double lanes[2 * PAIR_LANES * TILE_GROUPS];
    const ptrdiff_t width = s->item.width;
    const int direct = q->bf16_direct && !s->any_out_of_range;
    if (!q->columns) memset(lanes, 0, 2 * PAIR_LANES * (size_t)width * sizeof(double));
    while (f.first < f.last) {
        const Stretch t = beginning(q, s->item, f, limit);
        Rows rows = T(rows_of)(q, &t, direct, tiles, BLOCK);
        const REAL *w = q->inside ? T(weights_along)(q, &t, tiles + 2 * BLOCK) : NULL;
        rows.ahead = width > 1 && q->p > 1 ? q->x.p : PREFETCH_BYTES;
        const Storage storage = direct ? BF16 : F64;
        if (q->columns) T(add_rows)(&rows, s, w, q->weight.c != 0, storage, first, second);
        else T(add_planes)(&rows, s, w, storage, lanes);
        f.first += q->columns ? t.count : t.n;
    }
    for (ptrdiff_t i = 0; i < width; i++) {
        if (!q->columns) first[i] += fn_added_up(lanes + 2 * PAIR_LANES * i);
        if (!q->columns) second[i] += fn_added_up(lanes + 2 * PAIR_LANES * i + PAIR_LANES);
        if (IS_FLOAT && s->any_out_of_range) second[i] *= s->rstd[i];
    }
}
/* Sums of dy and of dy xhat over a segment; of g and g xhat where the weight differs inside. */
static void T(sum_segment)(const Backward *q, const T(Slopes) *s, ptrdiff_t k, double *sums,
                           REAL *tiles) {
    const ptrdiff_t width = s->item.width;
    const int in_place = (q->bf16_direct && !s->any_out_of_range) ||
                         (T(native)(q->x.storage) && T(native)(q->dy.storage));
    ptrdiff_t limit = T(limit)(q, width, in_place);
    if (q->inside && q->weight.data && q->columns) limit = 1; /* each row has another weight */
    else if (q->inside && q->weight.data && !weights_in_place(q)) limit = least(limit, BLOCK);
    memset(sums, 0, 2 * (size_t)width * sizeof(double));
    for (ptrdiff_t i = 0; i < width;) {
        T(Slopes) room;
        const T(Slopes) *part = T(alike)(q, s, i, &room);
        T(sum_span)(q, part, segment(q, k), limit, sums + i, sums + width + i, tiles);
        i += part->item.width;
    }
    limit = least(limit, T(limit)(q, width, 0));
    for (ptrdiff_t i = 0, end; i < width && IS_FLOAT; i = most(end, i + 1)) {
        for (end = i; end < width && !s->out_of_range[end] &&
                      !T(holds_terms)(sums[end], sums[width + end]);)
            end++;
        if (end == i) continue;
        const T(Slopes) part = T(some_of)(q, s, i, end, 1);
        memset(sums + i, 0, (size_t)(end - i) * sizeof(double));
        memset(sums + width + i, 0, (size_t)(end - i) * sizeof(double));
        T(sum_span)(q, &part, segment(q, k), limit, sums + i, sums + width + i, tiles);
    }
}
/* A segment's sums into its group's, and into the cells where those are its own kind. */
static void T(add_segment)(const Backward *q, T(Slopes) *s, ptrdiff_t k, const double *sums,
                           double *cells) {
    const ptrdiff_t plane = q->plane_segments ? k / q->plane_segments : 0, n = s->item.width;
    const int each = group_step(q, &q->weight) != 0; /* has a weight of its own */
    double v = 1.0;
    for (ptrdiff_t i = 0; i < n; i++) {
        if (!q->inside) {
            const ptrdiff_t cell = plane * q->cell_p + i * q->cell_c;
            cells[cell] += sums[n + i];
            cells[q->cells + cell] += sums[i];
            if (each || i == 0) v = weight_of(q, s->item, plane, 0, i);
        }
        s->first[i] += v * sums[i];
        s->second[i] += v * sums[n + i];
    }
}
/* From the group's sums to the two terms that dx takes from them. */
static void T(finish_sums)(const Backward *q, T(Slopes) *s) {
    const ptrdiff_t m = q->neighbours;
    const double count = (double)q->length * (double)m;
    for (ptrdiff_t i = 0; i < s->item.width; i += m) {
        double first = 0, second = 0;
        for (ptrdiff_t j = i; j < i + m && q->training; j++) {
            first += s->first[j];
            second += s->second[j];
        }
        first = q->centred ? s->rstd[i] * (first / count) : 0.0;
        second = s->rstd[i] * (second / count);
        const int held = T(holds_sums)(first, second, count);
        for (ptrdiff_t j = i; j < i + m; j++) {
            s->first[j] = first;
            s->second[j] = second;
            s->c1[j] = (REAL)first;
            s->c2[j] = (REAL)second;
            s->out_of_range[j] |= !held;
        }
    }
    const int each = group_step(q, &q->weight) != 0; /* has a weight of its own */
    for (ptrdiff_t p = q->weight.p ? q->p : 1; p-- > 0 && !q->inside;) {
        double weight = 1.0;
        for (ptrdiff_t i = 0; i < s->item.width; i++) {
            if (each || i == 0) weight = weight_of(q, s->item, p, 0, i);
            const double wr = weight * s->rstd[i], size = fabs(weight);
            s->wr[i] = (REAL)wr;
            if (!q->training) s->second[i] = wr; /* for `apply_scale` */
            s->out_of_range[i] |= size != 0 && !T(holds_weights)(size, size, s->rstd[i]);
        }
    }
    for (ptrdiff_t i = 0; i < s->item.width; i++) s->any_out_of_range |= s->out_of_range[i];
}

/* ---- dx where the weight does not differ inside -------------------------------------------------
 */

static void T(apply_out_of_range)(const Backward *q, const Stretch *t, const T(Slopes) *s,
                                  const Rows *rows) {
    for (ptrdiff_t k = 0; k < t->count; k++)
        for (ptrdiff_t i = 0; i < t->n; i++) {
            const ptrdiff_t j = q->columns ? i : k;
            const REAL *x = (const REAL *)(rows->x + k * rows->x_step);
            const REAL *dy = (const REAL *)(rows->dy + k * rows->dy_step);
            T(apply_in_double)(T(double_slope)(s, j), x[i], dy[i],
                               weight_of(q, t->item, t->p, t->s, j), 1,
                               (REAL *)(rows->dx + k * rows->dx_step) + i);
        }
}
/* By given statistics. */
static void T(apply_scale)(const Backward *q, const Stretch *t, const T(Slopes) *s,
                           const Rows *rows) {
    for (ptrdiff_t k = 0; k < t->count; k++) {
        const REAL *dy = (const REAL *)(rows->dy + k * rows->dy_step);
        REAL *dx = (REAL *)(rows->dx + k * rows->dx_step);
        if (!q->columns) {
            const double weight = weight_of(q, t->item, t->p, t->s, k), rstd = s->rstd[k];
            FN_IVDEP for (ptrdiff_t i = 0; i < t->n; i++) dx[i] = T(scaled)(dy[i], weight, rstd);
        } else if (q->weight.p) {
            for (ptrdiff_t i = 0; i < t->n; i++)
                dx[i] = T(scaled)(dy[i], weight_of(q, t->item, t->p, t->s, i), s->rstd[i]);
        } else {
            const double *wr = s->second; /* from `finish_sums` */
            FN_IVDEP for (ptrdiff_t i = 0; i < t->n; i++) dx[i] = T(scaled)(dy[i], wr[i], 1.0);
        }
    }
}
/* Rows whose dx has non-temporal stores: a few at a time, between which reads go on. */
static void T(apply_past_caches)(const Backward *q, Stretch t, const T(Slopes) *s, Rows rows,
                                 REAL *tile) {
    const ptrdiff_t m = most(NON_TEMPORAL_TILE / t.n, 1);
    rows.dx_step = t.n * (ptrdiff_t)sizeof(REAL);
    for (ptrdiff_t left = t.count; left > 0; left -= m, t.s += m, rows = further(rows, m)) {
        t.count = rows.count = least(left, m);
        rows.dx = (char *)tile;
        T(apply_rows)(&rows, s, F64);
        T(deliver_dx)(q, &t, rows.dx, NULL);
    }
}
/* Of columns, or groups, that are all out of range, or none. */
static void T(apply_alike)(const Backward *q, const T(Slopes) *s, Span f, REAL *tiles) {
    const int direct = q->bf16_direct && q->training && !s->any_out_of_range;
    const int native = T(native)(q->x.storage) && T(native)(q->dy.storage);
    const int in_place = direct || (T(native)(q->dx.storage) && !q->non_temporal);
    const int past =
        native && q->columns && q->non_temporal && q->training && !s->any_out_of_range;
    const ptrdiff_t width = s->item.width;
    const ptrdiff_t limit = T(limit)(q, width, direct || past || (native && in_place));
    /* other threads have other planes of these groups: a plane's weights are not kept in `s` */
    REAL of_planes[TILE_GROUPS];
    const REAL *wr = q->weight.p == 0 ? s->wr : of_planes;
    for (ptrdiff_t n; f.first < f.last; f.first += n) {
        const Stretch t = beginning(q, s->item, f, limit);
        Rows rows = T(rows_of)(q, &t, direct, tiles, BLOCK);
        n = q->columns ? t.count : t.n;
        if (past) {
            T(apply_past_caches)(q, t, s, rows, tiles);
            continue;
        }
        T(aim_dx)(q, &t, in_place, tiles, BLOCK, &rows);
        rows.ahead = width > 1 && q->p > 1 ? q->x.p : 0;
        for (ptrdiff_t k = 0; k < width && wr == of_planes; k++)
            of_planes[k] = (REAL)(weight_of(q, t.item, t.p, t.s, k) * s->rstd[k]);
        if (!q->training) T(apply_scale)(q, &t, s, &rows);
        else if (IS_FLOAT && s->any_out_of_range) T(apply_out_of_range)(q, &t, s, &rows);
        else if (q->columns) T(apply_rows)(&rows, s, direct ? BF16 : F64);
        else T(apply_planes)(&rows, s, wr, direct ? BF16 : F64);
        if (!in_place) T(deliver_dx)(q, &t, rows.dx, tiles + BLOCK);
    }
}
static void T(apply_span)(const Backward *q, const T(Slopes) *s, Span f, REAL *tiles) {
    for (ptrdiff_t i = 0; i < s->item.width;) {
        T(Slopes) room;
        const T(Slopes) *part = T(alike)(q, s, i, &room);
        T(apply_alike)(q, part, f, tiles);
        i += part->item.width;
    }
}

/* ---- dx where it does, and what its elements add to the gradients of their weights
 * --------------- */

/* Of a run, or a row of columns, what is not done as others: numbers out of range, in double; and
 * dx by given statistics, in which x has no part. */
static void T(collect_rest)(const Backward *q, const T(Slopes) *s, const Rows *rows, const REAL *w,
                            ptrdiff_t along, Cells to) {
    const REAL *x = (const REAL *)rows->x, *dy = (const REAL *)rows->dy;
    REAL *dx = (REAL *)rows->dx;
    for (ptrdiff_t i = 0; i < rows->n && s->any_out_of_range; i++) {
        const REAL g = dy[i], weight = w[i * along];
        const T(DoubleSlope) v = T(double_slope)(s, q->columns ? i : 0);
        to.weight[i * along] +=
            (double)g * T(apply_in_double)(v, x[i], g, (double)weight, q->training, dx + i);
        to.bias[i * along] += (double)g;
    }
    for (ptrdiff_t i = 0; i < rows->n && !q->training; i++)
        dx[i] = T(scaled)(dy[i], (double)w[i * along], s->rstd[q->columns ? i : 0]);
}
/* Of up to BACKWARD_SHARED_RUNS runs that share their weights. */
static void T(collect_runs)(const Backward *q, const T(Slopes) *s, int count, Stretch t, Cells to,
                            REAL *tiles) {
    T(SharedRuns) runs;
    int any = 0;
    runs.count = count;
    for (int k = 0; k < count; k++) any |= s[k].any_out_of_range;
    const int direct = q->bf16_direct && q->training && !any;
    const int in_place = direct || (T(native)(q->dx.storage) && !q->non_temporal);
    t.item = s[0].item;
    const REAL *w = T(weights_or_ones)(q, &t, tiles + 8 * BACKWARD_CHUNK);
    for (int k = 0; k < count; k++) {
        REAL *tile = tiles + 2 * k * BACKWARD_CHUNK;
        t.item = s[k].item;
        runs.rows[k] = T(rows_of)(q, &t, direct, tile, BACKWARD_CHUNK);
        T(aim_dx)(q, &t, in_place, tile, BACKWARD_CHUNK, &runs.rows[k]);
        runs.slope[k] = T(slope_at)(&s[k], 0);
    }
    if (!any) T(collect)(&runs, w, to, direct ? BF16 : F64);
    for (int k = 0; k < count; k++) {
        const T(SharedRuns) one = {{runs.rows[k]}, {runs.slope[k]}, 1};
        if (any && !s[k].any_out_of_range) T(collect)(&one, w, to, F64);
        T(collect_rest)(q, &s[k], &runs.rows[k], w, 1, to);
        t.item = s[k].item;
        if (!in_place)
            T(deliver_dx)(q, &t, runs.rows[k].dx, tiles + (2 * k + 1) * BACKWARD_CHUNK);
    }
}
/* Of a row of columns, with a weight of its own or one for each. */
static void T(collect_row)(const Backward *q, const T(Slopes) *all, ptrdiff_t p, ptrdiff_t s,
                           Cells to, REAL *tiles) {
    const int in_place = T(native)(q->dx.storage) && !q->non_temporal, along = q->dweight.c != 0;
    for (ptrdiff_t i = 0; i < all->item.width;) {
        T(Slopes) room;
        const T(Slopes) *part = T(alike)(q, all, i, &room);
        const Stretch t = {part->item, p, s, part->item.width, 1};
        const Cells here = {to.weight + i * along, to.bias + i * along};
        Rows rows = T(rows_of)(q, &t, 0, tiles, BLOCK);
        T(aim_dx)(q, &t, in_place, tiles, BLOCK, &rows);
        const REAL *w = T(weights_or_ones)(q, &t, tiles + 2 * BLOCK);
        if (!part->any_out_of_range) T(collect_columns)(&rows, part, w, along, here);
        T(collect_rest)(q, part, &rows, w, along, here);
        if (!in_place) T(deliver_dx)(q, &t, rows.dx, tiles + BLOCK);
        i += t.n;
    }
}
