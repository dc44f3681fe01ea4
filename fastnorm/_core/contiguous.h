/* Groups that are lists of contiguous runs: rows of layer norm, planes of batch, instance and group
 * norm on channels-first memory.  Their moments, and their output. */

/* ---- moments ---- */

/* Elements [first, last) of group k side by side, as numbers: in place where they lie so. */
static const REAL *T(block_of)(const Forward *q, const Item *it, ptrdiff_t k, ptrdiff_t first,
                               ptrdiff_t last, Scratch *h, ptrdiff_t *count) {
    const ptrdiff_t size = bytes_of(q->x.storage);
    REAL *tile = (REAL *)h->tile, *extra = (REAL *)h->extra;
    Run r = run_at(q, first, last);
    ptrdiff_t n = 0;
    if (T(native)(q->x.storage) && !q->mask.data && !q->total.data &&
        (r.n == last - first || q->x.p == q->s * size)) {
        r.n = *count = last - first;
        return (const REAL *)run_of(&q->x, it, k, r);
    }
    if (T(native)(q->x.storage) && q->mask.data && !q->total.data && r.n == last - first) {
        const ptrdiff_t skipped = side_by_side(run_of(&q->mask, it, k, r), q->mask.s, r.n, count);
        if (skipped >= 0) return (const REAL *)run_of(&q->x, it, k, r) + skipped;
    }
    fits((last - first) * (ptrdiff_t)sizeof(REAL), h->tile_size, "the tile of a block");
    for (ptrdiff_t f = first; f < last; f += r.n) {
        REAL *t = tile + n;
        r = run_at(q, f, last);
        const char *x = run_of(&q->x, it, k, r);
        fn_fetch(x + 4 * q->x.p, r.n * size); /* planes may lie apart */
        const REAL *from = t;
        if (T(native)(q->x.storage) && !q->total.data) from = (const REAL *)x;
        else T(load)(x, q->x.storage, r.n, t);
        if (q->total.data) {
            /* x + residual, rounded to the type of x: what the norm is of, and the second result */
            char *total = run_of(&q->total, it, k, r);
            T(load)(run_of(&q->addend, it, k, r), q->addend.storage, r.n, extra);
            for (ptrdiff_t i = 0; i < r.n; i++) t[i] += extra[i];
            T(store)(t, r.n, total, q->total.storage);
            T(load)(total, q->total.storage, r.n, t);
        }
        const char *mask = q->mask.data ? run_of(&q->mask, it, k, r) : NULL;
        if (mask && q->mask.s == 1) {
            n += T(fn_keep)(t, from, mask, r.n);
        } else if (mask && q->mask.s) {
            for (ptrdiff_t i = 0; i < r.n; i++) {
                tile[n] = from[i];
                n += mask[i * q->mask.s] != 0;
            }
        } else if (!mask || *mask) {
            if (from != t) memcpy(t, from, (size_t)r.n * sizeof(REAL));
            n += r.n;
        }
    }
    *count = n;
    return tile;
}
/* Moments of n numbers into m[0], m[step] ... : one pass over floats unless `precise`, two over
 * doubles. */
static void T(moments_of)(const REAL *x, ptrdiff_t n, const Forward *q, double *m,
                          ptrdiff_t step) {
    const int precise = q->fields != 0;
    m[0] = (double)n;
    m[step] = m[2 * step] = m[3 * step] = m[4 * step] = 0.0;
    if (n == 0) return;
#if IS_FLOAT
    double first, second;
    if (!q->centred) {
        m[M2 * step] = squares_f32(x, n);
        return;
    }
    sums_f32(x, n, &first, &second);
    if ((moments_of_sum(first, second, 0.0, m, step) || precise) && isfinite(m[step])) {
        const double pivot = pivot_of(m[step], m[M2 * step] / (double)n, precise);
        sums_about_f32(x, n, pivot, &first, &second);
        moments_of_sum(first, second, pivot, m, step);
    }
#else
    double first = 0;
    (void)precise;
    /* about the first element, so that a constant block has exactly its mean */
    if (q->centred) m[step] = x[0] + deviations(x, n, PREFETCH_BYTES, x[0]) / (double)n;
    sums_about_f64(x, n, 0, m[step], &first, &m[M2 * step], &m[M2_LOW * step]);
    if (q->centred) {
        m[MEAN_LOW * step] = first / (double)n;
        m[M2_LOW * step] -= first * m[MEAN_LOW * step];
    }
#endif
}
#if IS_FLOAT
/* Sums of x - pivot and of its square, over elements [first, last) of `width` groups from k on. */
static void group_sums(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                       double pivot, double *sums, double *lanes) {
    const ptrdiff_t width = it->width, ahead = width == 1 ? q->x.p : PREFETCH_BYTES;
    Run r = run_at(q, first, last);
    if (r.n == last - first || q->x.p == q->s * q->x.s) {
        r.n = last - first;
        for (ptrdiff_t k = 0; k < width; k++)
            sums_of(run_of(&q->x, it, k, r), q->bf16_direct, r.n, pivot, sums + k, width);
        return;
    }
    memset(lanes, 0, (size_t)width * 2 * LANES * sizeof(double));
    for (ptrdiff_t f = first; f < last; f += r.n) {
        double *a = lanes;
        r = run_at(q, f, last);
        for (ptrdiff_t k = 0; k < width; k++, a += 2 * LANES) {
            const float *x = (const float *)run_of(&q->x, it, k, r);
            if (pivot == 0) add_f32(x, r.n, ahead, a, a + LANES);
            else add_about_f32(x, r.n, pivot, a, a + LANES);
        }
    }
    for (ptrdiff_t k = 0; k < width; k++, lanes += 2 * LANES) {
        sums[k] = fold_lanes(lanes);
        sums[width + k] = fold_lanes(lanes + LANES);
    }
}
#endif
/* Moments of elements [first, last), at most a block, of each group of an item. */
static void T(block_moments)(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                             double *into, Scratch *h) {
    const ptrdiff_t width = it->width;
#if IS_FLOAT
    if (q->bf16_direct ||
        (q->x.storage == F32 && !q->mask.data && !q->total.data && q->centred)) {
        for (ptrdiff_t k = 0; k < width; k++) into[k] = (double)(last - first);
        group_sums(q, it, first, last, 0.0, h->sums, h->lanes);
        if (!q->centred) {
            moments_of_squares(width, h->sums + width, into);
            return;
        }
        if (!moments_of_sums(width, h->sums, h->sums + width, into, h->recentre) && !q->fields)
            return;
        for (ptrdiff_t k = 0; k < width; k++) {
            double *m = into + k, two[2];
            /* where moments are asked for, all: parts are to merge to the same however they were
             * cut */
            if (!(h->recentre[k] || q->fields) || !isfinite(m[MEAN * width])) continue;
            const double pivot = pivot_of(m[MEAN * width], m[M2 * width] / m[0], q->fields != 0);
            const Item group = group_at(*it, k);
            group_sums(q, &group, first, last, pivot, two, h->lanes);
            moments_of_sum(two[0], two[1], pivot, m, width);
        }
        return;
    }
#endif
    for (ptrdiff_t k = 0; k < width; k++) {
        ptrdiff_t count;
        const REAL *x = T(block_of)(q, it, k, first, last, h, &count);
        T(moments_of)(x, count, q, into + k, width);
    }
}
static void T(run_moments)(const Forward *q, const Item *it, ptrdiff_t first, ptrdiff_t last,
                           double *into, Scratch *h) {
    T(block_moments)(q, it, first, least(first + BLOCK, last), into, h);
    for (ptrdiff_t f = first + BLOCK; f < last; f += BLOCK) {
        T(block_moments)(q, it, f, least(f + BLOCK, last), h->part, h);
        merge(into, h->part, it->width, it->width);
    }
}

/* ---- output ---- */

/* The bits of a number but for its sign: they order numbers as their sizes do. */
#if IS_FLOAT
typedef int32_t Bits_f32;
FN_INLINE int32_t size_bits_f32(float v) { return (int32_t)(fn_bits(v) & 0x7fffffffu); }
#else
typedef int64_t Bits_f64;
FN_INLINE int64_t size_bits_f64(double v) {
    int64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits & INT64_MAX;
}
#endif
/* (x - hi) r of number i, rounded as the type of x is; `d` is x - hi. */
FN_INLINE REAL T(product_of)(const T(Loop) *j, int columns, ptrdiff_t i, REAL *d) {
    *d = j->x[i] - (columns ? j->hi[i] : j->hi0);
    return *d * (columns ? j->r[i] : j->r0);
}
/* Whether so small a product, below 2^-100, may have lost digits: doubles have no more to give. */
FN_INLINE int T(is_tiny)(REAL d, REAL product) {
    return IS_FLOAT && (T(size_bits)(product) < T(size_bits)((REAL)7.9e-31)) & (d != 0);
}
/* Whether (x - hi) r is beyond what its type holds, or loses digits of it, though the scale is not:
 * of numbers that the statistics are not of.  A weight may bring the product back. */
FN_INLINE int T(any_leaves_range)(const T(Loop) *j, int columns) {
    const double largest = IS_FLOAT ? FLT_MAX : DBL_MAX;
    T(Bits) most = 0;
    int found = 0;
    /* in the type of x first, where rounding may be off by less than the factor of 2; as integers,
     * of which the largest is found in vectors */
    for (ptrdiff_t i = 0; i < j->n; i++) {
        REAL d;
        const REAL v = T(product_of)(j, columns, i, &d);
        const T(Bits) size = T(size_bits)(v);
        most = size > most ? size : most;
        found |= T(is_tiny)(d, v);
    }
    if (found || most < T(size_bits)((REAL)(largest / 2))) return found;
    for (ptrdiff_t i = 0; i < j->n; i++) {
        const REAL hi = columns ? j->hi[i] : j->hi0, r = columns ? j->r[i] : j->r0;
        found |= fabs(((double)j->x[i] - hi) * r) >= largest;
    }
    return found;
}
FN_INLINE int T(leaves_range)(const T(Loop) *j) {
    return j->columns ? T(any_leaves_range)(j, 1) : T(any_leaves_range)(j, 0);
}
/* What the computing type cannot hold, in double: rare.  WHERE_IT_LEAVES: numbers that leave the
 * range, in the same loop as others that do not. */
#if IS_FLOAT
enum { IN_RANGE, WHERE_IT_LEAVES, ALL };
#endif
static void T(normalize_out_of_range)(const Forward *q, const T(Scales) *s, ptrdiff_t group,
                                      int which, const T(Loop) *j, const REAL *w,
                                      const REAL *b) {
    for (ptrdiff_t i = 0; i < j->n; i++) {
        const ptrdiff_t k = j->columns ? i : group;
        REAL d;
        const REAL product = T(product_of)(j, j->columns, i, &d);
        const int leaves = !isfinite(j->y[i]) || T(is_tiny)(d, product);
        if (!s->out_of_range[k] && which != ALL && !(which == WHERE_IT_LEAVES && leaves)) continue;
        /* statistics stand once for each column where any is out of range, else once for a group */
        const ptrdiff_t g = IS_FLOAT && j->columns && !s->any_out_of_range ? k / q->neighbours : k;
        const double scale = s->any_out_of_range ? s->scale[g] : 1.0;
        const double x = ((double)j->x[i] * scale - s->mean[g]) - s->low[g];
        const double weight = w ? w[j->w_along ? i : 0] : 1.0, rstd = s->rstd[g];
        const double v = isfinite(x * rstd) ? x * rstd * weight : x * (rstd * weight);
        j->y[i] = (REAL)(v + (b ? b[j->b_along ? i : 0] : 0.0));
    }
}
/* One run of group k, or one row of columns, of at most a tile's numbers, from x to y: from memory
 * to memory where it can be, through tiles in L1 where a format is converted or y takes
 * non-temporal stores.  `which` of them are out of range though their scale is not. */
static void T(normalize_by_tiles)(Forward *q, const T(Scales) *s, ptrdiff_t k, int which,
                                  T(Loop) *j, Scratch *h) {
    const Storage x_storage = source_of(q)->storage, e_storage = q->residual.storage;
    int out = which || (q->columns ? s->any_out_of_range : s->out_of_range[k]);
    const int direct = T(native)(q->y.storage) && !q->non_temporal && !out;
    const int loads = !h->ready && !T(native)(x_storage), last = q->activation_first;
    const int residual_loads = j->residual && !T(native)(e_storage);
    const REAL *const w = j->w, *const b = j->b;
    char *const y = (char *)j->y;
    UserLoop user = q->user;
    if (!direct || loads || residual_loads)
        fits(j->n * (ptrdiff_t)sizeof(REAL), h->tile_size, "a tile, of a run or row");
    if (loads) T(load)((const char *)j->x, x_storage, j->n, (REAL *)h->extra);
    if (residual_loads) T(load)((const char *)j->residual, e_storage, j->n, (REAL *)h->third);
    if (h->ready) j->x = (const REAL *)h->ready;
    if (loads) j->x = (const REAL *)h->extra;
    if (residual_loads) j->residual = (const REAL *)h->third;
    if (!direct) j->y = (REAL *)h->tile;
    if (s->folded || last) j->w = j->b = NULL;
    if (!which && h->guarded && j->w && T(leaves_range)(j)) {
        fits(j->n * (ptrdiff_t)sizeof(REAL), h->tile_size, "the tile of what leaves the range");
        j->y = (REAL *)h->tile;
        out = which = WHERE_IT_LEAVES;
    }
    if (out) {
        T(Loop) after = T(once_more)(j->y, j->n);
        after.residual = j->residual, after.activation = j->activation;
        j->residual = NULL, j->activation = IDENTITY;
        T(normalize)(j);
        T(normalize_out_of_range)(q, s, k, which, j, last ? NULL : w, last ? NULL : b);
        if (after.residual || after.activation != IDENTITY) T(normalize)(&after);
    } else if (IS_FLOAT && user && FN_HAS_FMA && !j->columns && !j->residual && j->x != j->y &&
               ((!j->w && !j->b) || (j->w && j->w_along && (!j->b || j->b_along)))) {
        /* in one loop: a division of the user's then goes on during the next number */
        const REAL scale[3] = {j->hi0, j->r0, j->shift0};
        if (user(j->x, j->y, j->n, scale, j->w, j->b)) q->raised = 1;
        user = NULL;
    } else {
        T(normalize)(j);
    }
    if (last && (w || b)) {
        T(Loop) affine = T(once_more)(j->y, j->n);
        affine.w = w, affine.w_along = j->w_along, affine.b = b, affine.b_along = j->b_along;
        T(normalize)(&affine);
    }
    if (user && user(NULL, j->y, j->n, NULL, NULL, NULL)) q->raised = 1;
    if ((char *)j->y != y)
        T(deliver)(j->y, j->n, y, q->y.storage, q->non_temporal, h->extra);
}
/* The loop over a run of group k; its weights, and steps to other runs, are set where there are
 * some. */
FN_INLINE T(Loop) T(loop_of)(const Forward *q, const Item *it, const T(Scales) *s, ptrdiff_t k,
                             Run r) {
    T(Loop) j;
    j.x = (const REAL *)run_of(source_of(q), it, k, r);
    j.y = (REAL *)run_of(&q->y, it, k, r);
    j.residual = (const REAL *)run_of(&q->residual, it, k, r);
    j.hi0 = s->hi[k], j.r0 = s->r[k], j.shift0 = s->shift[k];
    j.n = r.n, j.activation = q->activation;
    return j;
}
/* One run of group k, by its address: gcc copies structures in vectors that wait for their
 * parts. */
static void T(normalize_run)(Forward *q, const Item *it, const T(Scales) *s, ptrdiff_t k,
                             const Run *run, Scratch *h) {
    const Run r = *run;
    const REAL *w = (const REAL *)run_of(&q->weight, it, k, r);
    const REAL *b = (const REAL *)run_of(&q->bias, it, k, r);
    T(Loop) j = T(loop_of)(q, it, s, k, r);
    const int in_range = !s->out_of_range[k];
    int which = IN_RANGE;
#if IS_FLOAT
    float scale, shift;
    if (in_range && s->folded) {
        w = b = NULL;
    } else if (in_range && q->foldable && fold_run(s, k, w, b, &scale, &shift)) {
        j.r0 = scale, j.shift0 = shift;
        w = b = NULL;
    } else if (in_range && q->foldable) {
        which = ALL;
    }
    if (which == ALL && r.n > BLOCK) { /* as many as a tile has room for */
        for (Run part = r; part.s < r.s + r.n; part.s += part.n) {
            part.n = least(r.s + r.n - part.s, BLOCK);
            normalize_run_f32(q, it, s, k, &part, h);
        }
        return;
    }
#endif
    if (in_range && q->direct && !w && !b) {
        T(normalize_folded)(&j);
        return;
    }
    j.w = w, j.b = b, j.w_along = q->weight.s != 0, j.b_along = q->bias.s != 0, j.columns = 0;
    const int one_step = in_range && which == IN_RANGE && !(h->guarded && w);
#if IS_FLOAT
    if (one_step && q->bf16_direct && !q->non_temporal && !(q->foldable && (w || b))) {
        normalize_bf16(&j);
        return;
    }
    if (in_range && q->direct_non_temporal && !w && !b) {
        const ptrdiff_t size = sizeof(float);
        const ptrdiff_t over = most(q->length * size - PREFETCH_WINDOW, 0);
        j.ahead = PREFETCH_BYTES;
        /* the end of this group lies in cache, the next one does not yet */
        if (!q->given && (r.p * q->s + r.s) * size >= over) j.ahead = source_of(q)->b - over;
        normalize_non_temporal_run(&j);
        return;
    }
#endif
    if (one_step && q->direct && !q->activation_first) T(normalize)(&j);
    else T(normalize_by_tiles)(q, s, k, which, &j, h);
}
/* Whether a run of each group takes non-temporal stores whole, however long it is. */
FN_INLINE int T(all_non_temporal)(const Forward *q, const Item *it, const T(Scales) *s, Run r) {
#if IS_FLOAT
    if (!q->direct_non_temporal || s->any_out_of_range) return 0;
    float scale, shift;
    for (ptrdiff_t k = 0; k < it->width; k++)
        if (!fold_run(s, k, (const float *)run_of(&q->weight, it, k, r),
                      (const float *)run_of(&q->bias, it, k, r), &scale, &shift))
            return 0;
    return 1;
#else
    (void)q, (void)it, (void)s, (void)r;
    return 0;
#endif
}
/* A plane's run of each group of an item, one after the other. */
FN_INLINE void T(normalize_runs)(const Forward *q, const Item *it, const T(Scales) *s, Run r) {
    const Operand *source = source_of(q);
    const ptrdiff_t size = sizeof(REAL);
    T(Loop) j = T(loop_of)(q, it, s, 0, r);
    j.hi = s->hi, j.r = s->r, j.shift = s->shift;
    for (ptrdiff_t k = 1; FN_CHECKED && k < it->width; k++) T(loop_of)(q, it, s, k, r);
    j.w = (const REAL *)run_of(&q->weight, it, 0, r);
    j.b = (const REAL *)run_of(&q->bias, it, 0, r);
    j.count = it->width;
    j.ahead = q->p > 1 && it->width > 1 ? source->p : 0;
    j.x_step = source->b / size, j.y_step = q->y.b / size, j.residual_step = q->residual.b / size;
    j.w_step = q->weight.b / size, j.b_step = q->bias.b / size;
#if !IS_FLOAT
    if (q->direct_non_temporal && !j.residual && j.activation == IDENTITY) {
        j.ahead = 0;
        normalize_non_temporal_planes(&j);
        return;
    }
#endif
    T(normalize_planes)(&j);
}
/* Whether the runs of neighbouring groups follow one another in all that is read and written: short
 * ones, several of which a tile has room for. */
FN_INLINE int T(runs_follow)(const Forward *q, Run r) {
    const Operand *all[3] = {source_of(q), &q->y, &q->residual};
    /* bfloat16 of longer ones is converted on the way */
    int follow = q->width > 1 && r.n <= (q->bf16_direct ? SHORT_ROW : BLOCK / 2);
    for (int i = 0; i < 3; i++)
        if (all[i]->data) follow &= all[i]->b == r.n * bytes_of(all[i]->storage);
    return follow;
}
/* The same of runs that follow one another and whose format is converted: of several at once. */
FN_INLINE void T(convert_runs)(const Forward *q, const Item *it, const T(Scales) *s, Run r,
                               Scratch *h) {
    const Operand *source = source_of(q), *e = &q->residual;
    for (ptrdiff_t k = 0, m; k < it->width; k += m) {
        m = least(it->width - k, BLOCK / r.n);
        const Item groups = {it->a, it->b + k, it->c, m};
        const ptrdiff_t n = m * r.n;
        T(Loop) j = T(loop_of)(q, &groups, s, 0, r);
        char *y = (char *)j.y;
        const int tiled = !T(native)(q->y.storage);
        for (ptrdiff_t i = 1; FN_CHECKED && i < m; i++) T(loop_of)(q, &groups, s, i, r);
        fits(n * (ptrdiff_t)sizeof(REAL), h->tile_size, "a tile of runs");
        if (!T(native)(source->storage)) {
            T(load)((const char *)j.x, source->storage, n, (REAL *)h->extra);
            j.x = (const REAL *)h->extra;
        }
        if (e->data && !T(native)(e->storage)) {
            T(load)((const char *)j.residual, e->storage, n, (REAL *)h->third);
            j.residual = (const REAL *)h->third;
        }
        if (tiled) j.y = (REAL *)h->tile;
        j.hi = s->hi + k, j.r = s->r + k, j.shift = s->shift + k;
        j.w = j.b = NULL;
        j.count = m, j.ahead = 0;
        j.x_step = j.y_step = j.residual_step = r.n;
        T(normalize_planes)(&j);
        if (tiled) T(store)((const REAL *)h->tile, n, y, q->y.storage);
    }
}
/* What is read, and written, after this run of group k. */
FN_INLINE void T(fetch_ahead)(const Forward *q, const Item *it, ptrdiff_t k, Run r) {
    const Operand *source = source_of(q), *e = &q->residual;
    const char *x = at(source, it->a, it->b + k) + r.p * source->p + r.s * source->s;
    if (q->non_temporal && q->given) {
        fn_fetch(x + PREFETCH_BYTES, r.n * source->s);
        const char *from = at(e, it->a, it->b + k) + r.p * e->p + r.s * e->s;
        if (e->data) fn_fetch(from + PREFETCH_BYTES, r.n * e->s);
    } else if (!q->non_temporal && q->p > 1 && it->width > 1) {
        /* planes that lie apart leave the prefetcher behind */
        fn_fetch(x + source->p, r.n * source->s);
        fn_fetch(at(&q->y, it->a, it->b + k) + (r.p + 1) * q->y.p + r.s * q->y.s, r.n * q->y.s);
    } else if (q->non_temporal && q->length * source->s <= PREFETCH_WINDOW) {
        /* x lies in cache: the next group's is on its way while this one's result is written */
        fn_fetch(x + source->b, r.n * source->s);
    }
}
/* Elements [first, last) of each group of an item, from x to y. */
static void T(write_runs)(Forward *q, const Item *it, const T(Scales) *s, ptrdiff_t first,
                          ptrdiff_t last, Scratch *h) {
    const int guarded = h->guarded && q->weight.data;
    const int whole = q->direct && !guarded && !s->any_out_of_range;
    /* weights that are in the scales need no guard */
    const int alike = !s->any_out_of_range && (IS_FLOAT ? s->folded : whole && q->foldable);
    const int converts = IS_FLOAT && !q->direct && !q->non_temporal && !h->ready && !q->user &&
                         !q->activation_first;
    Run r;
    for (ptrdiff_t f = first; f < last; f += r.n) {
        r = run_at(q, f, last);
        if (alike && q->direct) {
            T(normalize_runs)(q, it, s, r);
            continue;
        }
        if (alike && converts && T(runs_follow)(q, r)) {
            T(convert_runs)(q, it, s, r, h);
            continue;
        }
        const int past = T(all_non_temporal)(q, it, s, r); /* asks for what comes next on its own */
        if (!whole && !past) r.n = least(stretch_of(q, it, 0, r), BLOCK);
        for (ptrdiff_t k = 0; k < it->width; k++) {
            if (!past) T(fetch_ahead)(q, it, k, r);
            T(normalize_run)(q, it, s, k, &r, h);
        }
    }
}
/* y, which is what went into the activation, becomes dy times its slope there. */
static void T(multiply_stretch)(const Forward *q, char *y, const char *dy, ptrdiff_t n,
                                Scratch *h) {
    const ptrdiff_t room = h->tile_size / (ptrdiff_t)sizeof(REAL), size = bytes_of(q->dy.storage);
    REAL *t = (REAL *)y;
    if (T(native)(q->dy.storage)) {
        T(multiply_by_slope)(t, (const REAL *)dy, n, q->slope);
        return;
    }
    for (ptrdiff_t i = 0, m; i < n; i += m) {
        m = least(n - i, room);
        T(load)(dy + i * size, q->dy.storage, m, (REAL *)h->third);
        T(multiply_by_slope)(t + i, (const REAL *)h->third, m, q->slope);
    }
}
/* Elements [first, last) of each group of an item, from x to y, or on to the gradient. */
static void T(run_output)(Forward *q, const Item *it, const T(Scales) *s, ptrdiff_t first,
                          ptrdiff_t last, Scratch *h) {
    const Operand *y = &q->y, *dy = &q->dy;
    if (!dy->data) {
        T(write_runs)(q, it, s, first, last, h);
        return;
    }
    const int follow = y->p == q->s * y->s && dy->p == q->s * dy->s;
    for (ptrdiff_t f = first, end; f < last; f = end) {
        end = it->width > 1 ? last : least(f + BLOCK, last); /* in L1, or short */
        T(write_runs)(q, it, s, f, end, h);
        Run r;
        for (ptrdiff_t i = f; i < end; i += r.n) {
            r = run_at(q, i, end);
            if (follow) r.n = end - i;
            for (ptrdiff_t k = 0; k < it->width; k++)
                T(multiply_stretch)(q, run_of(y, it, k, r), run_of(dy, it, k, r), r.n, h);
        }
    }
}
