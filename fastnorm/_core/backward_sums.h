/* The two sums of the backward pass, of g and of g xhat, in a fixed order.
 *
 * PAIR_LANES partial sums side by side fix the order, whatever the vector's width: two sums of
 * eight AVX2 registers in all, as many as two multiply-add units of four cycles keep busy.
 *
 * Like every file that names REAL this one is compiled twice, by kernels.h: for float and for
 * double.  Functions of a constant `storage`, `four` or `along`, or of weights that may be a
 * constant NULL, are inlined into one copy for each. */

/* What is known of an item: of each of its columns, or groups of runs. */
typedef struct {
    Item item;
    char *memory;
    ptrdiff_t room;         /* how many it has memory for */
    double *mean, *rstd;
    double *first, *second; /* sums of g and g xhat, then those times rstd / count */
    REAL *hi, *r, *shift;   /* xhat = (x - hi) r + shift */
    REAL *wr, *c1, *c2;     /* dx = dy wr - c1 - xhat c2;  wr = weight rstd */
    uint8_t *out_of_range;  /* a float can not hold xhat */
    int any_out_of_range;
} T(Slopes);

/* The same of one. */
typedef struct {
    REAL hi, r, shift, wr, c1, c2;
} T(Slope);

FN_INLINE T(Slope) T(slope_at)(const T(Slopes) *s, ptrdiff_t i) {
    return (T(Slope)){s->hi[i], s->r[i], s->shift[i], s->wr[i], s->c1[i], s->c2[i]};
}
FN_INLINE REAL T(xhat)(REAL x, T(Slope) v) { return T(fma)(x - v.hi, v.r, v.shift); }

FN_INLINE ptrdiff_t T(size_of)(Storage storage) {
    return storage == BF16 ? 2 : (ptrdiff_t)sizeof(REAL);
}
FN_INLINE REAL T(element)(const char *x, ptrdiff_t i, Storage storage) {
    return storage == BF16 ? (REAL)fn_from_bf16(((const uint16_t *)x)[i]) : ((const REAL *)x)[i];
}
/* m numbers from the i-th on, in place or in `room`. */
FN_INLINE const REAL *T(elements)(const char *x, ptrdiff_t i, int m, Storage storage, REAL *room) {
    if (storage != BF16) return (const REAL *)x + i;
    for (int j = 0; j < m; j++) room[j] = T(element)(x, i + j, storage);
    return room;
}
/* Four rows, asked for in advance. */
FN_INLINE void T(fetch_rows)(const Rows *q, Storage storage) {
    for (int k = 0; k < 4; k++)
        for (ptrdiff_t i = 0; i < q->n * T(size_of)(storage); i += 64) {
            FN_FETCH(q->x + k * q->x_step + i + PREFETCH_BYTES);
            FN_FETCH(q->dy + k * q->dy_step + i + PREFETCH_BYTES);
        }
}

/* ---- in double ----------------------------------------------------------------------------------
 * Of floats: g and x - mean are exact in double, or nearly, and `rstd` waits until the sum is
 * there. Of doubles: scaled at once, or the product could leave the range. */
typedef struct {
    double g, deviation;
} T(DoubleTerm);

FN_INLINE T(DoubleTerm) T(double_term)(const char *x, const char *dy, ptrdiff_t i, double weight,
                                       double mean, double rstd) {
    const double deviation = (double)((const REAL *)x)[i] - mean;
    const double g = (double)((const REAL *)dy)[i] * weight;
    return (T(DoubleTerm)){g, IS_FLOAT ? deviation : deviation * rstd};
}
FN_INLINE fn_wide T(wide)(const REAL *x) {
#if IS_FLOAT
    return fn_wide_float(x);
#else
    return fn_wide_load(x);
#endif
}
/* The sums of a run, added to its lanes: two of PAIR_LANES. */
FN_INLINE void T(add_run_in_double)(const Rows *q, double mean, double rstd, const REAL *w,
                                    double *FN_RESTRICT lanes) {
    enum { M = PAIR_LANES / FN_WIDE };
    const REAL *x = (const REAL *)q->x, *dy = (const REAL *)q->dy;
    const ptrdiff_t n = q->n, ahead = q->ahead, bytes = PAIR_LANES * sizeof(REAL);
    fn_wide a[M], b[M];
    ptrdiff_t i = 0;
    for (int j = 0; j < M; j++) a[j] = fn_wide_load(lanes + j * FN_WIDE);
    for (int j = 0; j < M; j++) b[j] = fn_wide_load(lanes + PAIR_LANES + j * FN_WIDE);
    for (; i + PAIR_LANES <= n; i += PAIR_LANES) {
        fn_fetch((const char *)(x + i) + ahead, bytes);
        fn_fetch((const char *)(dy + i) + ahead, bytes);
        for (int j = 0; j < M; j++) {
            const ptrdiff_t k = i + j * FN_WIDE;
            fn_wide d = fn_wide_sub(T(wide)(x + k), fn_wide_all(mean)), g = T(wide)(dy + k);
            if (!IS_FLOAT) d = fn_wide_mul(d, fn_wide_all(rstd));
            if (w) g = fn_wide_mul(g, T(wide)(w + k));
            a[j] = fn_wide_add(a[j], g);
            b[j] = fn_wide_mac(g, d, b[j]);
        }
    }
    for (int j = 0; j < M; j++) fn_wide_store(lanes + j * FN_WIDE, a[j]);
    for (int j = 0; j < M; j++) fn_wide_store(lanes + PAIR_LANES + j * FN_WIDE, b[j]);
    for (double *second = lanes + PAIR_LANES; i < n; i++, lanes++, second++) {
        const T(DoubleTerm) t = T(double_term)(q->x, q->dy, i, w ? (double)w[i] : 1.0, mean, rstd);
        *lanes += t.g;
        *second = fn_mac64(t.g, t.deviation, *second);
    }
}
/* The sums of each column of some rows: of four, or one; the weight is 1, each row's, or (`along`)
 * each column's. */
FN_INLINE void T(add_in_double)(const Rows *q, int four, const T(Slopes) *s,
                                const REAL *w, int along, double *FN_RESTRICT a,
                                double *FN_RESTRICT b) {
    const char *x = q->x, *dy = q->dy;
    const double *mean = s->mean, *rstd = s->rstd;
    const ptrdiff_t n = q->n, xs = q->x_step, ds = q->dy_step;
    FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
        const double v = w ? (double)w[along ? i : 0] : 1.0, m = mean[i], r = rstd[i];
        const T(DoubleTerm) t0 = T(double_term)(x, dy, i, v, m, r);
        if (!four) {
            a[i] += t0.g;
            b[i] = fn_mac64(t0.g, t0.deviation, b[i]);
            continue;
        }
        const T(DoubleTerm) t1 = T(double_term)(x + xs, dy + ds, i, v, m, r);
        const T(DoubleTerm) t2 = T(double_term)(x + 2 * xs, dy + 2 * ds, i, v, m, r);
        const T(DoubleTerm) t3 = T(double_term)(x + 3 * xs, dy + 3 * ds, i, v, m, r);
        a[i] += (t0.g + t1.g) + (t2.g + t3.g);
        b[i] += fn_mac64(t0.g, t0.deviation, t1.g * t1.deviation) +
                fn_mac64(t2.g, t2.deviation, t3.g * t3.deviation);
    }
}

/* ---- of floats whose xhat a float can hold ------------------------------------------------------
 * Four terms are added up in float before they go into a double lane: each sum is then within 2^-24
 * of the size of its terms over the square root of their number, and three quarters of the
 * conversions, which cost more than the arithmetic, fall away. */
#if IS_FLOAT
typedef struct {
    float g, xhat;
} Product;

FN_INLINE Product product_of(float x, float dy, float weight, Slope_f32 v) {
    return (Product){dy * weight, xhat_f32(x, v)};
}
FN_INLINE Product product_at(const char *x, const char *dy, ptrdiff_t i, float weight, Slope_f32 v,
                             Storage storage) {
    return product_of(element_f32(x, i, storage), element_f32(dy, i, storage), weight, v);
}
FN_INLINE void add_product(Product t, double *first, double *second) {
    *first += (double)t.g;
    *second += (double)(t.g * t.xhat);
}
FN_INLINE void add_products(Product t0, Product t1, Product t2, Product t3, double *first,
                            double *second) {
    *first += (double)((t0.g + t1.g) + (t2.g + t3.g));
    *second += (double)(fn_fma32(t0.g, t0.xhat, t1.g * t1.xhat) +
                        fn_fma32(t2.g, t2.xhat, t3.g * t3.xhat));
}
/* bfloat16 is converted 64 at a time: in a loop with doubles gcc would take half of the vector. */
FN_INLINE void add_run_f32(const Rows *q, Slope_f32 v, const float *w,
                           Storage storage, double *FN_RESTRICT lanes) {
    const char *x = q->x, *dy = q->dy;
    const ptrdiff_t n = q->n, ahead = q->ahead, size = size_of_f32(storage);
    double a[PAIR_LANES], b[PAIR_LANES];
    float room_x[64], room_dy[64];
    ptrdiff_t i = 0;
    for (int j = 0; j < PAIR_LANES; j++) a[j] = lanes[j], b[j] = lanes[PAIR_LANES + j];
    for (; i + 64 <= n; i += 64) {
        const float *tx = elements_f32(x, i, 64, storage, room_x);
        const float *td = elements_f32(dy, i, 64, storage, room_dy);
        fn_fetch(x + i * size + ahead, 64 * size);
        fn_fetch(dy + i * size + ahead, 64 * size);
        for (int j = 0; j < PAIR_LANES; j++)
            add_products(product_of(tx[j], td[j], w ? w[i + j] : 1.0f, v),
                      product_of(tx[j + 16], td[j + 16], w ? w[i + j + 16] : 1.0f, v),
                      product_of(tx[j + 32], td[j + 32], w ? w[i + j + 32] : 1.0f, v),
                      product_of(tx[j + 48], td[j + 48], w ? w[i + j + 48] : 1.0f, v),
                      &a[j], &b[j]);
    }
    for (; i + PAIR_LANES <= n; i += PAIR_LANES) {
        const float *tx = elements_f32(x, i, PAIR_LANES, storage, room_x);
        const float *td = elements_f32(dy, i, PAIR_LANES, storage, room_dy);
        for (int j = 0; j < PAIR_LANES; j++)
            add_product(product_of(tx[j], td[j], w ? w[i + j] : 1.0f, v), &a[j], &b[j]);
    }
    for (int j = 0; j < PAIR_LANES; j++) lanes[j] = a[j], lanes[PAIR_LANES + j] = b[j];
    for (double *second = lanes + PAIR_LANES; i < n; i++, lanes++, second++)
        add_product(product_of(element_f32(x, i, storage), element_f32(dy, i, storage),
                         w ? w[i] : 1.0f, v), lanes, second);
}
FN_INLINE void add_in_float(const Rows *q, int four, const Slopes_f32 *s,
                            const float *w, int along, Storage storage, double *FN_RESTRICT a,
                            double *FN_RESTRICT b) {
    const char *x = q->x, *dy = q->dy;
    const float *hi = s->hi, *r = s->r, *shift = s->shift, w0 = w ? w[0] : 1.0f;
    const ptrdiff_t n = q->n, xs = q->x_step, ds = q->dy_step;
    FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
        const Slope_f32 v = {hi[i], r[i], shift[i], 0, 0, 0};
        const float u = along ? w[i] : w0;
        if (four)
            add_products(product_at(x, dy, i, u, v, storage),
                         product_at(x + xs, dy + ds, i, u, v, storage),
                         product_at(x + 2 * xs, dy + 2 * ds, i, u, v, storage),
                         product_at(x + 3 * xs, dy + 3 * ds, i, u, v, storage), &a[i], &b[i]);
        else add_product(product_at(x, dy, i, u, v, storage), &a[i], &b[i]);
    }
}
#else
FN_INLINE void add_run_f64(const Rows *q, Slope_f64 v, const double *w,
                           Storage storage, double *FN_RESTRICT lanes) {
    (void)storage;
    add_run_in_double_f64(q, v.hi, v.r, w, lanes);
}
#endif

/* ---- one copy for each kind of number and weight ------------------------------------------------
 */

FN_INLINE void T(add_planes_of)(Rows q, const T(Slopes) *s, const REAL *w, int in_double,
                                Storage storage, double *lanes) {
    for (ptrdiff_t k = 0; q.count > 0; k++, q = further(q, 1), lanes += 2 * PAIR_LANES) {
        if (in_double) T(add_run_in_double)(&q, s->mean[k], s->rstd[k], w, lanes);
        else T(add_run)(&q, T(slope_at)(s, k), w, storage, lanes);
    }
}
/* The sums of a run of each of some groups, all out of range or none; w: along the runs, or NULL.
 */
FN_APART void T(add_planes)(const Rows *q, const T(Slopes) *s, const REAL *w, Storage storage,
                          double *lanes) {
    if (IS_FLOAT && s->any_out_of_range) {
        if (w) T(add_planes_of)(*q, s, w, 1, F64, lanes);
        else T(add_planes_of)(*q, s, NULL, 1, F64, lanes);
    } else if (IS_FLOAT && storage == BF16) {
        if (w) T(add_planes_of)(*q, s, w, 0, BF16, lanes);
        else T(add_planes_of)(*q, s, NULL, 0, BF16, lanes);
    } else {
        if (w) T(add_planes_of)(*q, s, w, 0, F64, lanes);
        else T(add_planes_of)(*q, s, NULL, 0, F64, lanes);
    }
}
FN_INLINE void T(add_rows_of)(Rows q, const T(Slopes) *s, const REAL *w, int along,
                              Storage storage, double *a, double *b) {
#if IS_FLOAT
    if (!s->any_out_of_range) {
        for (; q.count >= 4; q = further(q, 4)) {
            fetch_rows_f32(&q, storage);
            add_in_float(&q, 1, s, w, along, storage, a, b);
        }
        for (; q.count > 0; q = further(q, 1)) add_in_float(&q, 0, s, w, along, storage, a, b);
    }
#endif
    for (; q.count >= 4; q = further(q, 4)) T(add_in_double)(&q, 1, s, w, along, a, b);
    for (; q.count > 0; q = further(q, 1)) T(add_in_double)(&q, 0, s, w, along, a, b);
}
/* The sums of each column of some rows; where there are weights, bfloat16 is converted before. */
FN_APART void T(add_rows)(const Rows *q, const T(Slopes) *s, const REAL *w, int along,
                          Storage storage, double *a, double *b) {
    if (IS_FLOAT && storage == BF16) T(add_rows_of)(*q, s, NULL, 0, BF16, a, b);
    else if (!w) T(add_rows_of)(*q, s, NULL, 0, F64, a, b);
    else if (!along) T(add_rows_of)(*q, s, w, 0, F64, a, b);
    else T(add_rows_of)(*q, s, w, 1, F64, a, b);
}
