/* Columns side by side, neighbours in memory with a statistic each or together: channels-last
 * memory. */

/* Rows [first, last) of an item that lie in one plane. */
FN_INLINE const char *T(row_at)(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                                ptrdiff_t *rows) {
    const Run r = run_at(q, first, last);
    *rows = r.n;
    return rows_of(&q->x, it, r);
}
#if IS_FLOAT
/* Sums of x, or of x - pivot, and of its square over rows [first, last), for each column. */
static void sum_columns(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                        const double *pivot, double *sums, Scratch *h) {
    const ptrdiff_t width = it->width, size = bytes_of(q->x.storage);
    float *tile = (float *)h->tile;
    memset(sums, 0, 2 * (size_t)width * sizeof(double));
    for (ptrdiff_t f = first, n; f < last; f += n) {
        const int in_place = q->x.storage == F32;
        const char *x = row_at_f32(q, it, f, in_place ? last : least(last, f + q->block), &n);
        if (in_place) {
            column_sums((const float *)x, q->x.s / size, n, width, pivot, sums, sums + width);
            continue;
        }
        fits(n * width * (ptrdiff_t)sizeof(float), h->tile_size, "the tile of rows");
        if (q->x.s == width * size) load_f32(x, q->x.storage, n * width, tile);
        else
            for (ptrdiff_t i = 0; i < n; i++)
                load_f32(x + i * q->x.s, q->x.storage, width, tile + i * width);
        column_sums(tile, width, n, width, pivot, sums, sums + width);
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
    for (ptrdiff_t g = 0; g < n; g++) into[g] = (double)((last - first) * k);
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
        const double about = isfinite(mean) ? pivot_of(mean, var, q->fields != 0) : 0.0;
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
/* Moments of rows [first, last) for each column of doubles. */
static void column_moments_f64(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                               double *into, Scratch *h) {
    const ptrdiff_t width = it->width, step = q->x.s / (ptrdiff_t)sizeof(double);
    const double count = (double)(last - first);
    double *pivot = h->sums, *total = pivot + width, *mean = into + MEAN * width;
    ptrdiff_t n;
    memset(into, 0, FIELDS * (size_t)width * sizeof(double));
    memset(total, 0, (size_t)width * sizeof(double));
    for (ptrdiff_t c = 0; c < width; c++) into[c] = count;
    if (q->centred) {
        memcpy(pivot, row_at_f64(q, it, first, last, &n), (size_t)width * sizeof(double));
        for (ptrdiff_t f = first; f < last; f += n) {
            const double *x = (const double *)row_at_f64(q, it, f, last, &n);
            add_deviations(x, step, n, width, pivot, total, NULL, NULL);
        }
        for (ptrdiff_t c = 0; c < width; c++) {
            mean[c] = pivot[c] + total[c] / count;
            total[c] = 0.0;
        }
    }
    for (ptrdiff_t f = first; f < last; f += n) {
        const double *x = (const double *)row_at_f64(q, it, f, last, &n);
        add_deviations(x, step, n, width, mean, total, into + M2 * width, into + M2_LOW * width);
    }
    for (ptrdiff_t c = 0; c < width && q->centred; c++) {
        into[MEAN_LOW * width + c] = total[c] / count;
        into[M2_LOW * width + c] -= total[c] * into[MEAN_LOW * width + c];
    }
}
#endif
/* Moments of the chosen of rows [first, last) for each column. */
static void T(masked_moments)(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                              double *m, Scratch *h) {
    const ptrdiff_t width = it->width, step = q->mask.c;
    double *pivot = h->sums, *total = pivot + width;
    double *mean = m + MEAN * width, *m2 = m + M2 * width, *m2_low = m + M2_LOW * width;
    memset(m, 0, FIELDS * (size_t)width * sizeof(double));
    memset(pivot, 0, (size_t)width * sizeof(double));
    for (int turn = 0; turn < 2; turn++) {
        memset(total, 0, (size_t)width * sizeof(double));
        for (ptrdiff_t i = first; i < last; i++) {
            const Run r = run_at(q, i, i + 1);
            const char *x = rows_of(&q->x, it, r), *chosen = rows_of(&q->mask, it, r);
            const REAL *row = (const REAL *)x;
            if (!T(native)(q->x.storage)) {
                fits(width * (ptrdiff_t)sizeof(REAL), h->tile_size, "the tile of a masked row");
                T(load)(x, q->x.storage, width, (REAL *)h->tile);
                row = (const REAL *)h->tile;
            }
            for (ptrdiff_t c = 0; c < width; c++) {
                if (!chosen[c * step]) continue;
                if (turn == 0) {
                    if (m[c] == 0.0) pivot[c] = row[c];
                    m[c] += 1.0;
                    total[c] += (double)row[c] - pivot[c];
                } else {
                    const double d = (double)row[c] - mean[c];
                    fn_add_two(&m2[c], &m2_low[c], d * d);
                    total[c] += d;
                }
            }
        }
        for (ptrdiff_t c = 0; c < width; c++) {
            if (!q->centred || m[c] == 0.0) continue;
            if (turn == 0) {
                mean[c] = pivot[c] + total[c] / m[c];
            } else {
                m[MEAN_LOW * width + c] = total[c] / m[c];
                m2_low[c] -= total[c] * m[MEAN_LOW * width + c];
            }
        }
    }
}
/* Moments over rows [first, last) of each group of an item's columns. */
static void T(strided_moments)(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                               double *into, Scratch *h) {
    const ptrdiff_t k = q->neighbours, width = it->width, n = groups_of(q, it);
    double *all = k == 1 ? into : h->apart;
#if IS_FLOAT
    if (!q->mask.data) {
        column_moments(q, it, first, last, into, h);
        return;
    }
#endif
    for (ptrdiff_t f = first; f < last; f += q->block) {
        double *part = f == first ? all : h->part;
        const ptrdiff_t end = least(f + q->block, last);
        if (q->mask.data) T(masked_moments)(q, it, f, end, part, h);
#if !IS_FLOAT
        else column_moments_f64(q, it, f, end, part, h);
#endif
        if (f > first) merge(all, part, width, width);
    }
    for (ptrdiff_t g = 0; g < n && k > 1; g++) {
        for (ptrdiff_t j = 1; j < k; j++) merge(all + g * k, all + g * k + j, 1, width);
        for (int field = 0; field < FIELDS; field++)
            into[field * n + g] = all[field * width + g * k];
    }
}
/* Rows [first, last) of an item, from x to y. */
static void T(strided_output)(Forward *q, const Item *it, const T(Scales) *s, ptrdiff_t first,
                              ptrdiff_t last, Scratch *h) {
    const Operand *source = source_of(q);
    const ptrdiff_t size = sizeof(REAL), row = it->width * size;
    const char *y = at(&q->y, it->a, it->b) + it->c * q->y.c;
    const int in_place = IS_FLOAT && s->folded && !s->any_out_of_range;
    /* non-temporal stores line by line, or, where rows follow one another, in long runs */
    const int lines = in_place && q->direct_non_temporal &&
                      ((uintptr_t)y | (uintptr_t)(q->y.p | q->y.s | row)) % 64 == 0;
    const int runs = in_place && q->direct_non_temporal && q->y.s == row && !lines;
    const int rows_at_once = in_place && (q->direct || runs || lines);
    T(Loop) j = {.hi = s->hi, .r = s->r, .shift = s->shift, .n = it->width, .count = 1,
                  .columns = 1, .activation = q->activation, .ahead = PREFETCH_BYTES,
                  .w_along = q->weight.c != 0, .b_along = q->bias.c != 0,
                  .x_step = source->s / size, .y_step = q->y.s / size,
                  .residual_step = q->residual.s / size};
    Run r = run_at(q, first, last);
    for (ptrdiff_t i = first; i < last; i += r.n) {
        r.n = rows_at_once ? least(last - i, q->s - r.s) : 1;
        if (runs) r.n = least(r.n, most(BLOCK / it->width, 1));
        j.count = r.n;
        j.x = (const REAL *)rows_of(source, it, r);
        j.y = (REAL *)rows_of(&q->y, it, r);
        j.residual = (const REAL *)rows_of(&q->residual, it, r);
        if (!rows_at_once) {
            T(Loop) one = j;
            one.w = (const REAL *)rows_of(&q->weight, it, r);
            one.b = (const REAL *)rows_of(&q->bias, it, r);
            T(normalize_by_tiles)(q, s, 0, &one, h);
#if IS_FLOAT
        } else if (lines) {
            normalize_non_temporal_rows(&j);
#endif
        } else if (runs) {
            fits(r.n * row, h->tile_size, "the tile of rows to write");
            char *to = (char *)j.y;
            j.y = (REAL *)h->tile, j.y_step = it->width;
            T(normalize_rows)(&j);
            fn_stream(to, h->tile, (size_t)(r.n * row));
        } else {
            T(normalize_rows)(&j);
        }
        r.s += r.n;
        if (r.s == q->s) r.p++, r.s = 0;
    }
}
