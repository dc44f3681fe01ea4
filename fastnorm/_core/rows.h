/* Short groups that lie in one piece: rows with weights at most, from their sums to their
 * output, and tiles of groups whose sums are taken while the tile before is applied. */

static void T(walk_item)(Forward *q, ptrdiff_t index, Scratch *h);

/* ---- rows ----
 * With weights along the row, one for each row, or none.  Short rows are written after the sums of
 * the next, which hide how long a quotient and a root take; of long ones the cache would have lost
 * the beginning by then.  The arithmetic is that of other groups. */

FN_INLINE void T(normalize_row)(const Forward *q, T(Loop) *j, const void *x, const Item *it,
                                int how) {
    const Run r = {0, 0, q->length};
    j->x = (const REAL *)x;
    j->y = (REAL *)run_of(&q->y, it, 0, r);
    if (q->non_temporal && !(how & OF_BF16)) T(normalize_run_of)(j, how, IDENTITY);
    else T(normalize_one)(j, how, IDENTITY);
}
/* y = x + e */
static inline void T(add_residual)(const REAL *x, const REAL *e, REAL *y, ptrdiff_t n) {
    for (ptrdiff_t from = 0; from < n; from += 128) {
        const ptrdiff_t to = least(n, from + 128);
        for (ptrdiff_t i = from; i < to; i += 64 / (ptrdiff_t)sizeof(REAL)) {
            FN_FETCH((const char *)(x + i) + PREFETCH_BYTES);
            FN_FETCH((const char *)(e + i) + PREFETCH_BYTES);
        }
        FN_IVDEP for (ptrdiff_t i = from; i < to; i++) y[i] = x[i] + e[i];
    }
}
#if IS_FLOAT
/* A row: x, or x + residual, which goes to `total`, through a tile if stores are non-temporal. */
FN_INLINE const void *row_of(const Forward *q, const Item *it, ptrdiff_t i, Scratch *h) {
    const Run r = {0, 0, q->length};
    const char *x = run_of(&q->x, it, 0, r);
    if (!q->total.data) return x;
    float *total = (float *)run_of(&q->total, it, 0, r), *t = total;
    if (q->non_temporal) {
        fits(2 * r.n * (ptrdiff_t)sizeof(float), h->tile_size, "the tile of two sums");
        t = (float *)h->tile + (i & 1) * r.n;
    }
    add_residual_f32((const float *)x, (const float *)run_of(&q->addend, it, 0, r), t, r.n);
    if (t != total) fn_stream((char *)total, (const char *)t, (size_t)r.n * sizeof(float));
    return t;
}
/* Up to `rows` rows from an item on; returns how many are done: the next one has a scale that a
 * float cannot hold, or no number that a mask has chosen.  `how` and `centred` are constants. */
FN_INLINE ptrdiff_t rows_f32_of(const Forward *q, const Item *first, ptrdiff_t rows, Scratch *h,
                                const Loop_f32 *weights, int how, int centred) {
    const ptrdiff_t n = q->length;
    const int late = n < SHORT_ROW, bf16 = how & OF_BF16;
    double mean, low, rstd, m[FIELDS];
    float hi, r, shift;
    uint8_t out;
    Loop_f32 j = *weights;
    const void *x, *of, *before = NULL; /* `of` these are the sums */
    ptrdiff_t count = n;
    Item it = *first, last = it;
    const Scales_f32 s = {&mean, &low, &rstd, NULL, &hi, &r, &shift, &out, 0, 0};
    j.n = n;
    /* a long row is written at once, and the next one then lies further off than what is asked for
     */
    j.ahead = late ? 0 : q->x.b;
    for (ptrdiff_t i = 0; i < rows; i++, last = it, it.b++, before = x) {
        double sums[2] = {0, 0};
        of = x = row_of(q, &it, i, h);
        if (how & MASKED) of = block_of_f32(q, &it, 0, 0, n, h, &count);
        if (!centred) sums[1] = bf16 ? squares_bf16(of, n) : squares_f32(of, count);
        else if (bf16) sums_bf16(of, n, &sums[0], &sums[1]);
        else sums_f32(of, count, &sums[0], &sums[1]);
        if (late && i) normalize_row_f32(q, &j, before, &last, how);
        if (how & MASKED && count == 0) return i;
        m[COUNT] = (double)count;
        if (!centred) {
            moments_of_squares(1, &sums[1], m);
        } else if (moments_of_sum(sums[0], sums[1], 0.0, m, 1) && isfinite(m[MEAN])) {
            const double pivot = (float)m[MEAN];
            if (bf16) sums_about_bf16(of, n, pivot, &sums[0], &sums[1]);
            else sums_about_f32(of, count, pivot, &sums[0], &sums[1]);
            moments_of_sum(sums[0], sums[1], pivot, m, 1);
        }
        const double var = m[M2] / (double)count;
        mean = m[MEAN], low = m[MEAN_LOW];
        rstd = q->scaling == NORM ? norm_scale(m[M2], q->eps) : rstd_of(var, q->eps);
        put_statistics(q, &it, mean, var, rstd);
        const int along = how & W_ALONG;
        const int lost = along && q->scaling == RSTD && loses_digits(var, rstd);
        if (spread(&s, 0, 1, lost,
                   along || !j.w ? NULL : (const float *)at(&q->weight, it.a, it.b), 0,
                   along || !j.b ? NULL : (const float *)at(&q->bias, it.a, it.b), 0))
            return i;
        j.x = (const float *)x, j.hi0 = hi, j.r0 = r, j.shift0 = shift;
        if (how & MASKED && along && count < n && leaves_range_f32(&j)) return i;
        if (!late) normalize_row_f32(q, &j, x, &it, how);
    }
    if (late && rows) normalize_row_f32(q, &j, before, &last, how);
    return rows;
}
FN_INLINE ptrdiff_t rows_f32_like(const Forward *q, const Item *first, ptrdiff_t rows, Scratch *h,
                                  const Loop_f32 *j, int how) {
    return q->centred ? rows_f32_of(q, first, rows, h, j, how, 1)
                      : rows_f32_of(q, first, rows, h, j, how, 0);
}
enum { WEIGHTED = AFFINE | W_ALONG, WITH_BIAS = WEIGHTED | B_ALONG };
/* With a mask: apart, as in a function that becomes too large gcc inlines no more callees. */
FN_APART ptrdiff_t masked_rows_f32(const Forward *q, const Item *first, ptrdiff_t rows, Scratch *h,
                                   const Loop_f32 *j) {
    if (!j->w || !j->w_along) return rows_f32_like(q, first, rows, h, j, MASKED);
    if (!j->b) return rows_f32_like(q, first, rows, h, j, MASKED | WEIGHTED);
    return rows_f32_like(q, first, rows, h, j, MASKED | WITH_BIAS);
}
static ptrdiff_t rows_f32(const Forward *q, const Item *first, ptrdiff_t rows, Scratch *h,
                          const Loop_f32 *j) {
    if (q->mask.data) return masked_rows_f32(q, first, rows, h, j);
    const int weights = !j->w || !j->w_along ? 0 : j->b ? WITH_BIAS : WEIGHTED;
    switch (weights | (q->bf16_direct ? OF_BF16 : 0)) {
    case 0: return rows_f32_like(q, first, rows, h, j, 0);
    case WEIGHTED: return rows_f32_like(q, first, rows, h, j, WEIGHTED);
    case WITH_BIAS: return rows_f32_like(q, first, rows, h, j, WITH_BIAS);
    case OF_BF16: return rows_f32_like(q, first, rows, h, j, OF_BF16);
    case OF_BF16 | WEIGHTED: return rows_f32_like(q, first, rows, h, j, OF_BF16 | WEIGHTED);
    default: return rows_f32_like(q, first, rows, h, j, OF_BF16 | WITH_BIAS);
    }
}
#else
/* Doubles: twice over the row, about its first number for a mean and about that for the squares. */
static ptrdiff_t rows_f64(const Forward *q, const Item *first_row, ptrdiff_t rows, Scratch *h,
                          const Loop_f64 *weights) {
    const ptrdiff_t n = q->length;
    const int along = weights->w && weights->w_along;
    Item it = *first_row;
    Loop_f64 j = *weights;
    double m[FIELDS], rstd;
    (void)h;
    j.n = n, j.ahead = q->x.b;
    for (ptrdiff_t i = 0; i < rows; i++, it.b++) {
        const double *x = (const double *)run_of(&q->x, &it, 0, (Run){0, 0, n}), count = (double)n;
        double first;
        m[MEAN] = m[MEAN_LOW] = 0;
        if (q->centred) m[MEAN] = x[0] + deviations(x, n, 0, x[0]) / count;
        sums_about_f64(x, n, q->non_temporal ? 0 : PREFETCH_BYTES, m[MEAN], &first, &m[M2],
                       &m[M2_LOW]);
        if (q->centred) {
            m[MEAN_LOW] = first / count;
            m[M2_LOW] -= first * m[MEAN_LOW];
        }
        const double var = (m[M2] + m[M2_LOW]) / count;
        const double v = q->scaling == NORM ? m[M2] : var + q->eps;
        if (!(v > 1e-270 && v < 1e270)) return i;
        const double low = (fma(-var, count, m[M2]) + m[M2_LOW]) / count + ((var - v) + q->eps);
        rstd = inverse_root(v, q->scaling == NORM ? m[M2_LOW] : low);
        if (q->scaling == NORM && sqrt(m[M2]) < q->eps) rstd = 1.0 / q->eps;
        put_statistics(q, &it, m[MEAN], var, rstd);
        j.hi0 = m[MEAN], j.r0 = rstd, j.shift0 = -m[MEAN_LOW] * rstd;
        if (!along && j.w) j.w = (const double *)at(&q->weight, it.a, it.b);
        if (!along && j.b) j.b = (const double *)at(&q->bias, it.a, it.b);
        if (!q->non_temporal) {
            j.x = x, j.y = (double *)run_of(&q->y, &it, 0, (Run){0, 0, n});
            normalize_f64(&j);
        } else if (along && j.b) {
            normalize_row_f64(q, &j, x, &it, AFFINE | W_ALONG | B_ALONG);
        } else if (along) {
            normalize_row_f64(q, &j, x, &it, AFFINE | W_ALONG);
        } else if (j.w || j.b) {
            normalize_row_f64(q, &j, x, &it, AFFINE);
        } else {
            normalize_row_f64(q, &j, x, &it, 0);
        }
    }
    return rows;
}
#endif
/* A copy of w as far from the beginning of a cache line as y: a load that crosses one takes two. */
FN_INLINE const REAL *T(lined_up)(const REAL *w, const char *y, ptrdiff_t n, char *memory) {
    if (!w) return NULL;
    return memcpy(memory + (uintptr_t)y % 64, w, (size_t)n * sizeof(REAL));
}
/* Rows [first, last), each an item. */
static void T(walk_rows)(Forward *q, ptrdiff_t first, ptrdiff_t last, Scratch *h) {
    const Run r = {0, 0, q->length};
    for (ptrdiff_t i = first; i < last;) {
        const ptrdiff_t a = i / q->b, b = i - a * q->b, n = least(last - i, q->b - b);
        const Item it = {a, b, 0, 1};
        T(Loop) j = {.w = (const REAL *)run_of(&q->weight, &it, 0, r), .count = 1,
                      .b = (const REAL *)run_of(&q->bias, &it, 0, r),
                      .w_along = q->weight.s != 0, .b_along = q->bias.s != 0};
        if (!q->foldable && n >= 8) {
            fits(r.n * (ptrdiff_t)sizeof(REAL) + LINE, h->tile_size, "the tile of a row's weights");
            j.w = T(lined_up)(j.w, at(&q->y, a, b), r.n, h->extra);
            j.b = T(lined_up)(j.b, at(&q->y, a, b), r.n, h->third);
        }
        i += T(rows)(q, &it, n, h, &j);
        /* what its type cannot hold */
        if (i < least(last, (a + 1) * q->b)) T(walk_item)(q, i++, h);
    }
}

#if IS_FLOAT
/* ---- tiles of short groups ----
 * Memory is read and written all the time, and square roots are taken for a tile at once. */

/* Group k of an item: where it lies, or the floats that it was converted to. */
FN_INLINE const float *short_group(const Forward *q, const Item *it, ptrdiff_t k, float *rows) {
    const Run r = {0, 0, q->length};
    return q->x.storage < F32 && !q->bf16_direct ? rows + k * q->length
                                                 : (const float *)run_of(source_of(q), it, k, r);
}
/* The sums of group k of an item, and x + residual where the norm is of that. */
FN_INLINE void sum_short_group(const Forward *q, const Item *it, ptrdiff_t k, Scratch *h,
                               float *rows) {
    const Run r = {0, 0, q->length};
    const char *x = run_of(&q->x, it, k, r);
    if (q->x.storage < F32 && !q->bf16_direct) {
        fits(((rows - h->converted) + (k + 1) * r.n) * (ptrdiff_t)sizeof(float), h->converted_size,
             "the tile of short groups");
        load_f32(x, q->x.storage, r.n, rows + k * r.n);
    } else if (q->total.data) {
        add_residual_f32((const float *)x, (const float *)run_of(&q->addend, it, k, r),
                         (float *)run_of(&q->total, it, k, r), r.n);
    }
    x = (const char *)short_group(q, it, k, rows);
    if (q->centred) sums_of(x, q->bf16_direct, r.n, 0.0, h->sums + k, TILE_GROUPS);
    else if (q->bf16_direct) h->sums[TILE_GROUPS + k] = squares_bf16((const uint16_t *)x, r.n);
    else h->sums[TILE_GROUPS + k] = squares_f32((const float *)x, r.n);
}
/* Moments of an item's groups from their sums. */
FN_INLINE void moments_of_tile(const Forward *q, const Item *it, Scratch *h, float *rows) {
    const ptrdiff_t width = it->width;
    double *m = h->whole, two[2];
    for (ptrdiff_t k = 0; k < width; k++) m[k] = (double)q->length;
    if (!q->centred) {
        moments_of_squares(width, h->sums + TILE_GROUPS, m);
    } else if (moments_of_sums(width, h->sums, h->sums + TILE_GROUPS, m, h->recentre)) {
        for (ptrdiff_t k = 0; k < width; k++, m++) {
            if (!h->recentre[k] || !isfinite(m[MEAN * width])) continue;
            const double pivot = (float)m[MEAN * width];
            sums_of(short_group(q, it, k, rows), q->bf16_direct, q->length, pivot, two, 1);
            moments_of_sum(two[0], two[1], pivot, m, width);
        }
    }
}
/* The output of group k of an item; `next` is read meanwhile. */
FN_INLINE void write_short_group(Forward *q, const Item *it, const Scales_f32 *s, ptrdiff_t k,
                                 Scratch *h, const float *rows, const Item *next) {
    const int converted = q->x.storage < F32 && !q->bf16_direct;
    const int fetch = q->non_temporal && next->width > 0;
    const ptrdiff_t planes = q->p, n = q->s;
    for (ptrdiff_t p = 0; p < planes; p++)
        for (Run r = {p, 0, 0}; r.s < n; r.s += r.n) {
            r.n = n - r.s;
            if (q->non_temporal) r.n = stretch_of(q, it, k, r);
            if (fetch)
                fn_fetch(at(&q->x, next->a, next->b + k + 1) + r.s * q->x.s, r.n * q->x.s);
            if (converted) h->ready = rows + k * q->length + p * n + r.s;
            normalize_run_f32(q, it, s, k, &r, h);
        }
}
static void walk_pipelined(Forward *q, ptrdiff_t first, ptrdiff_t last, Scratch *h) {
    Scales_f32 s = scales_at_f32(h->scales, TILE_GROUPS);
    Item now, then = {0, 0, 0, 0};
    float *rows, *before = h->converted;
    for (ptrdiff_t i = first; i <= last; i++, then = now, before = rows) {
        now = i < last ? item_at(q, i) : (Item){0, 0, 0, 0};
        rows = h->converted + i % 2 * q->width * q->length;
        for (ptrdiff_t k = 0; k < most(now.width, then.width); k++) {
            if (k < now.width) sum_short_group(q, &now, k, h, rows);
            if (k < then.width) write_short_group(q, &then, &s, k, h, before, &now);
        }
        if (now.width == 0) continue;
        moments_of_tile(q, &now, h, rows);
        finalize_f32(q, &now, h->whole, &s);
    }
    h->ready = NULL;
}
#endif
