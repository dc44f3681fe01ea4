/* Columns side by side, neighbours in memory with a statistic each or together: channels-last
 * memory. */

/* Rows [first, first + n) of an item as numbers, `step` apart: where they lie, or in a tile.
 *
 * What a mask leaves out is replaced by its column's `fill` (NULL: 0), which adds nothing to sums
 * about it.  Rows that are left out as a whole are passed over: x is NULL.  A mask cuts rows into
 * eights, as sums are taken, so that what it is broadcast along changes no bit. */
typedef struct {
    const REAL *x;
    ptrdiff_t step, n;
} T(Rows);

FN_INLINE void T(blend)(REAL *t, const REAL *x, const char *chosen, ptrdiff_t step, ptrdiff_t n,
                        const double *fill) {
    if (fill) {
        FN_IVDEP for (ptrdiff_t c = 0; c < n; c++) t[c] = chosen[c * step] ? x[c] : (REAL)fill[c];
    } else {
        FN_IVDEP for (ptrdiff_t c = 0; c < n; c++) t[c] = chosen[c * step] ? x[c] : 0;
    }
}
/* Rows as numbers side by side: where they lie, or in a tile. */
static const REAL *T(loaded_rows)(const Operand *o, const Item *it, Run r, char *tile,
                                  ptrdiff_t *step) {
    const ptrdiff_t width = it->width, size = bytes_of(o->storage);
    const char *from = rows_of(o, it, r);
    REAL *t = (REAL *)tile;
    *step = T(native)(o->storage) ? o->s / size : width;
    if (T(native)(o->storage)) return (const REAL *)from;
    if (o->s == width * size) T(load)(from, o->storage, r.n * width, t);
    else
        for (ptrdiff_t i = 0; i < r.n; i++)
            T(load)(from + i * o->s, o->storage, width, t + i * width);
    return t;
}
static T(Rows) T(rows_at)(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                          const double *fill, Scratch *h) {
    const ptrdiff_t width = it->width;
    const int native = T(native)(q->x.storage);
    int blended = q->mask.data != NULL;
    Run r = run_at(q, first, last);
    if (!native) r.n = least(r.n, blended ? q->block / 8 * 8 : q->block);
    const char *chosen = rows_of(&q->mask, it, r);
    if (blended && !q->mask.c) {
        const ptrdiff_t n = alike_rows(chosen, q->mask.s, r.n);
        if (n && !*chosen) return (T(Rows)){NULL, 0, n};
        r.n = n ? n : least(r.n, 8);
        blended = !n;
    } else if (blended) {
        r.n = least(r.n, most(BLOCK / width / 8 * 8, 8));
    }
    T(Rows) rows = {NULL, 0, r.n};
    if (!native || blended)
        fits(r.n * width * (ptrdiff_t)sizeof(REAL), h->tile_size, "the tile of rows");
    rows.x = T(loaded_rows)(&q->x, it, r, h->tile, &rows.step);
    if (!blended) return rows;
    REAL *tile = (REAL *)h->tile;
    for (ptrdiff_t i = 0; i < r.n; i++, chosen += q->mask.s, tile += width, rows.x += rows.step)
        if (q->mask.c == 1) T(blend)(tile, rows.x, chosen, 1, width, fill);
        else if (q->mask.c == 0) T(blend)(tile, rows.x, chosen, 0, width, fill);
        else T(blend)(tile, rows.x, chosen, q->mask.c, width, fill);
    return (T(Rows)){(REAL *)h->tile, width, r.n};
}
#if IS_FLOAT
/* Sums of x, or of x - pivot, and of its square over rows [first, last), for each column. */
static void sum_columns(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                        const double *pivot, double *sums, Scratch *h) {
    const ptrdiff_t width = it->width;
    memset(sums, 0, 2 * (size_t)width * sizeof(double));
    while (first < last && q->bf16_direct) { /* as many rows at a time as through a tile */
        Run r = run_at(q, first, last);
        r.n = least(r.n, q->block);
        const char *x = rows_of(&q->x, it, r);
        column_sums_bf16(x, q->x.s, r.n, width, pivot, sums, sums + width);
        first += r.n;
    }
    while (first < last) {
        const Rows_f32 rows = rows_at_f32(q, it, first, last, pivot, h);
        if (rows.x)
            column_sums(rows.x, rows.step, rows.n, width, pivot, sums, sums + width);
        first += rows.n;
    }
}
FN_INLINE void add_neighbours(ptrdiff_t groups, ptrdiff_t k, double *v) {
    for (ptrdiff_t g = 0; g < groups && k > 1; g++) {
        double total = v[g * k];
        for (ptrdiff_t j = 1; j < k; j++) total += v[g * k + j];
        v[g] = total;
    }
}
/* Moments over rows [first, last) of each group of columns of floats. */
static void column_moments(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                           double *into, Scratch *h) {
    const ptrdiff_t k = q->neighbours, n = groups_of(q, it);
    double *pivot = h->sums + 2 * it->width, *a = h->sums, *b = a + it->width;
    ptrdiff_t low = 0, high = n;
    sum_columns(q, it, first, last, NULL, h->sums, h);
    add_neighbours(n, k, a);
    add_neighbours(n, k, b);
    count_rows(q, it, first, last, into, h->recentre);
    add_neighbours(n, k, into);
    if (!q->centred) {
        moments_of_squares(n, b, into);
        return;
    }
    if (!moments_of_sums(n, a, b, into, h->recentre) && !q->fields) return;
    /* where moments are asked for, all: parts are to merge to the same however they were cut */
    if (q->fields) memset(h->recentre, 1, (size_t)n);
    /* about the means, for all columns from the first to the last that need it */
    while (!h->recentre[low]) low++;
    while (!h->recentre[high - 1]) high--;
    for (ptrdiff_t g = low; g < high; g++) {
        const double mean = into[MEAN * n + g], var = into[M2 * n + g] / into[g];
        double about = isfinite(mean) ? pivot_of(mean, var, q->fields != 0) : 0.0;
        if (q->mask.data && about != (float)about) about = (float)mean; /* what stands in a tile */
        for (ptrdiff_t j = 0; j < k; j++) pivot[(g - low) * k + j] = about;
    }
    const Item strip = {it->a, it->b, it->c + low * k, (high - low) * k};
    sum_columns(q, &strip, first, last, pivot, h->sums, h);
    b = a + strip.width;
    add_neighbours(high - low, k, a);
    add_neighbours(high - low, k, b);
    for (ptrdiff_t g = low; g < high; g++)
        if (h->recentre[g] && isfinite(into[MEAN * n + g]))
            moments_of_sum(a[g - low], b[g - low], pivot[(g - low) * k], into + g, n);
}
#else
/* The first number of each column that is chosen; 0 where none is. */
static void first_numbers(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                          double *pivot, uint8_t *found) {
    const ptrdiff_t width = it->width;
    ptrdiff_t missing = width;
    memset(found, 0, (size_t)width);
    memset(pivot, 0, (size_t)width * sizeof(double));
    for (ptrdiff_t i = first; i < last && missing; i++) {
        const Run r = run_at(q, i, i + 1);
        const double *x = (const double *)rows_of(&q->x, it, r);
        const char *chosen = rows_of(&q->mask, it, r);
        for (ptrdiff_t c = 0; c < width; c++) {
            if (found[c] || (chosen && !chosen[c * q->mask.c])) continue;
            pivot[c] = x[c];
            found[c] = 1;
            missing--;
        }
    }
}
/* Moments of rows [first, last) for each column of doubles. */
static void column_moments_f64(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                               double *into, Scratch *h) {
    const ptrdiff_t width = it->width;
    double *pivot = h->sums, *total = pivot + width, *mean = into + MEAN * width;
    Rows_f64 rows;
    memset(into, 0, FIELDS * (size_t)width * sizeof(double));
    memset(total, 0, (size_t)width * sizeof(double));
    count_rows(q, it, first, last, into, h->recentre);
    if (q->centred) {
        first_numbers(q, it, first, last, pivot, h->recentre);
        for (ptrdiff_t f = first; f < last; f += rows.n) {
            rows = rows_at_f64(q, it, f, last, pivot, h);
            if (rows.x) add_deviations(rows.x, rows.step, rows.n, width, pivot, total, NULL, NULL);
        }
        for (ptrdiff_t c = 0; c < width; c++) {
            mean[c] = into[c] > 0 ? pivot[c] + total[c] / into[c] : 0.0;
            total[c] = 0.0;
        }
    }
    for (ptrdiff_t f = first; f < last; f += rows.n) {
        rows = rows_at_f64(q, it, f, last, mean, h);
        if (rows.x)
            add_deviations(rows.x, rows.step, rows.n, width, mean, total, into + M2 * width,
                           into + M2_LOW * width);
    }
    for (ptrdiff_t c = 0; c < width && q->centred; c++) {
        if (into[c] == 0.0) continue;
        into[MEAN_LOW * width + c] = total[c] / into[c];
        into[M2_LOW * width + c] -= total[c] * into[MEAN_LOW * width + c];
    }
}
#endif
/* Moments over rows [first, last) of each group of an item's columns. */
static void T(strided_moments)(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                               double *into, Scratch *h) {
#if IS_FLOAT
    column_moments(q, it, first, last, into, h);
#else
    const ptrdiff_t k = q->neighbours, width = it->width, n = groups_of(q, it);
    double *all = k == 1 ? into : h->apart;
    for (ptrdiff_t f = first; f < last; f += q->block) {
        double *part = f == first ? all : h->part;
        column_moments_f64(q, it, f, least(f + q->block, last), part, h);
        if (f > first) merge(all, part, width, width);
    }
    for (ptrdiff_t g = 0; g < n && k > 1; g++) {
        for (ptrdiff_t j = 1; j < k; j++) merge(all + g * k, all + g * k + j, 1, width);
        for (int field = 0; field < FIELDS; field++)
            into[field * n + g] = all[field * width + g * k];
    }
#endif
}
/* Weights of an item's columns: those of row r where they lie, or, shared by neighbours, a row. */
static const REAL *T(weights_of)(const Forward *q, const Operand *o, const Item *it, Run r,
                                 char *memory) {
    if (!q->shared || !o->data) return (const REAL *)rows_of(o, it, r);
    const ptrdiff_t k = q->neighbours;
    REAL *row = (REAL *)memory;
    ptrdiff_t step;
    const REAL *own = weights_at(q, o, it, &step);
    for (ptrdiff_t g = 0; g < it->width / k; g++)
        for (ptrdiff_t i = 0; i < k; i++) row[g * k + i] = own[g * step];
    return row;
}
/* Rows [first, last) of an item, from x to y. */
static void T(strided_output)(Forward *q, const Item *it, const T(Scales) *s, ptrdiff_t first,
                              ptrdiff_t last, Scratch *h) {
    const Operand *source = source_of(q), *w = &q->weight, *b = &q->bias;
    const ptrdiff_t size = sizeof(REAL), row = it->width * size;
    const char *y = at(&q->y, it->a, it->b) + it->c * q->y.c;
    /* whether rows are taken several at once: floats have their weights in r and shift, doubles one
     * for each column */
    const int simple = IS_FLOAT ? s->folded && !q->user
                                : q->foldable && !q->user && !(h->guarded && w->data) &&
                                      (w->data ? w->c && (!b->data || b->c) : !b->data);
    const int at_once = simple && !s->any_out_of_range &&
                        !(q->activation_first && (w->data || b->data));
    /* non-temporal stores line by line */
    const int lines = IS_FLOAT && at_once && q->direct_non_temporal &&
                      ((uintptr_t)y | (uintptr_t)(q->y.p | q->y.s | row)) % 64 == 0;
    const int bf16 = at_once && q->bf16_direct && !q->non_temporal;
    const int in_place = at_once && (q->direct || lines || bf16);
    T(Loop) j = {.hi = s->hi, .r = s->r, .shift = s->shift, .n = it->width, .count = 1,
                  .columns = 1, .activation = q->activation, .ahead = PREFETCH_BYTES,
                  .w_along = w->c != 0, .b_along = b->c != 0};
    Run r = run_at(q, first, last);
    for (ptrdiff_t i = first; i < last; i += r.n) {
        r.n = at_once ? least(last - i, q->s - r.s) : 1;
        if (!in_place || q->dy.data) /* through tiles in L1 */
            r.n = least(r.n, most(BLOCK / it->width, 1));
        j.count = r.n;
        j.x = (const REAL *)rows_of(source, it, r), j.x_step = source->s / size;
        j.y = (REAL *)rows_of(&q->y, it, r), j.y_step = q->y.s / size;
        j.residual = (const REAL *)rows_of(&q->residual, it, r);
        j.residual_step = q->residual.s / size;
        if (!(IS_FLOAT && at_once) && (i == first || !q->shared)) {
            j.w = T(weights_of)(q, w, it, r, h->weights);
            j.b = T(weights_of)(q, b, it, r, h->biases);
        }
        if (!at_once) {
            T(Loop) one = j; /* its steps are taken apart there */
            T(normalize_by_tiles)(q, s, 0, IN_RANGE, &one, h);
#if IS_FLOAT
        } else if (lines) {
            normalize_non_temporal_rows(&j);
        } else if (bf16) {
            j.x_step = source->s / 2, j.y_step = q->y.s / 2;
            normalize_bf16_rows(&j);
#endif
        } else if (in_place) {
            T(normalize_rows)(&j);
        } else {
            char *to = (char *)j.y;
            fits(r.n * row, h->tile_size, "the tile of rows to write");
            j.x = T(loaded_rows)(source, it, r, h->extra, &j.x_step);
            if (j.residual)
                j.residual = T(loaded_rows)(&q->residual, it, r, h->third, &j.residual_step);
            j.y = (REAL *)h->tile, j.y_step = it->width;
            T(normalize_rows)(&j);
            const int follow = q->y.s == it->width * bytes_of(q->y.storage);
            const ptrdiff_t n = follow ? r.n * it->width : it->width;
            for (ptrdiff_t k = 0; k < r.n * it->width; k += n, to += q->y.s)
                T(deliver)(j.y + k, n, to, q->y.storage, q->non_temporal, h->extra);
        }
        for (ptrdiff_t k = 0; k < r.n && q->dy.data; k++) {
            const Run one = {r.p, r.s + k, 1};
            char *y_row = rows_of(&q->y, it, one);
            T(multiply_stretch)(q, y_row, rows_of(&q->dy, it, one), it->width, h);
        }
        r.s += r.n;
        if (r.s == q->s) r.p++, r.s = 0;
    }
}
