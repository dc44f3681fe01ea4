/* dx from the sums, and what each element adds to the gradients of a weight and bias of its own. */

FN_INLINE void T(put)(char *y, ptrdiff_t i, REAL v, Storage storage) {
    if (storage == BF16) ((uint16_t *)y)[i] = fn_made_bf16((float)v);
    else ((REAL *)y)[i] = v;
}
FN_INLINE REAL T(gradient)(REAL xhat, REAL dy, REAL wr, T(Slope) v) {
    return T(fma)(-xhat, v.c2, T(fma)(dy, wr, -v.c1));
}
FN_INLINE void T(apply_at)(const char *x, const char *dy, char *dx, ptrdiff_t i, T(Slope) v,
                           Storage storage) {
    const REAL g = T(element)(dy, i, storage), xhat = T(xhat)(T(element)(x, i, storage), v);
    T(put)(dx, i, T(gradient)(xhat, g, v.wr, v), storage);
}
/* By given statistics x has no part in it.  In double, which holds any product of two floats: then
 * it is the same whatever weights others have. */
FN_INLINE REAL T(scaled)(REAL dy, double weight, double rstd) {
    return (REAL)((double)dy * (weight * rstd));
}
/* Numbers before what is written begins at a cache line: a vector of 64 bytes that crosses a line
 * takes two stores, and NumPy's memory begins anywhere. */
FN_INLINE ptrdiff_t T(before_line)(const char *y, ptrdiff_t n, ptrdiff_t size) {
    return n < 256 ? 0 : (ptrdiff_t)((0 - (uintptr_t)y) % 64) / size;
}
/* A run, or plane, with one weight. */
FN_INLINE void T(apply_run)(const Rows *q, T(Slope) v, Storage storage) {
    const char *x = q->x, *dy = q->dy;
    char *dx = q->dx;
    const ptrdiff_t n = q->n, size = T(size_of)(storage), before = T(before_line)(dx, n, size);
    for (ptrdiff_t i = 0, ahead = q->ahead; i < n * size && ahead; i += 64) {
        FN_FETCH(x + i + ahead);
        FN_FETCH(dy + i + ahead);
        FN_FETCH(dx + i + ahead);
    }
    for (ptrdiff_t from = 0, to = before ? before : n; from < n; from = to, to = n)
        FN_IVDEP for (ptrdiff_t i = from; i < to; i++)
            T(apply_at)(x, dy, dx, i, v, storage);
}
FN_INLINE void T(apply_planes_of)(Rows q, const T(Slopes) *s, const REAL *wr,
                                  Storage storage) {
    for (ptrdiff_t k = 0; q.count > 0; k++, q = further(q, 1)) {
        T(Slope) v = T(slope_at)(s, k);
        v.wr = wr[k];
        T(apply_run)(&q, v, storage);
    }
}
/* Planes of neighbouring groups. */
FN_APART void T(apply_planes)(const Rows *q, const T(Slopes) *s, const REAL *wr, Storage storage) {
    if (IS_FLOAT && storage == BF16) T(apply_planes_of)(*q, s, wr, BF16);
    else T(apply_planes_of)(*q, s, wr, F64);
}
/* Rows of columns: one, or four, for which what the columns have in common is read once. */
FN_INLINE void T(apply_rows_at)(const Rows *q, int four, const T(Slopes) *s, Storage storage) {
    const REAL *hi = s->hi, *r = s->r, *shift = s->shift, *wr = s->wr, *c1 = s->c1, *c2 = s->c2;
    const ptrdiff_t n = q->n, xs = q->x_step, dys = q->dy_step, dxs = q->dx_step;
    const char *x = q->x, *dy = q->dy;
    char *dx = q->dx;
    FN_IVDEP for (ptrdiff_t i = 0; i < n; i++) {
        const T(Slope) v = {hi[i], r[i], shift[i], wr[i], c1[i], c2[i]};
        T(apply_at)(x, dy, dx, i, v, storage);
        if (!four) continue;
        T(apply_at)(x + xs, dy + dys, dx + dxs, i, v, storage);
        T(apply_at)(x + 2 * xs, dy + 2 * dys, dx + 2 * dxs, i, v, storage);
        T(apply_at)(x + 3 * xs, dy + 3 * dys, dx + 3 * dxs, i, v, storage);
    }
}
FN_INLINE void T(apply_rows_of)(Rows q, const T(Slopes) *s, Storage storage) {
    for (; q.count >= 4; q = further(q, 4)) {
        T(fetch_rows)(&q, storage);
        T(apply_rows_at)(&q, 1, s, storage);
    }
    for (; q.count > 0; q = further(q, 1)) T(apply_rows_at)(&q, 0, s, storage);
}
FN_APART void T(apply_rows)(const Rows *q, const T(Slopes) *s, Storage storage) {
    if (IS_FLOAT && storage == BF16) T(apply_rows_of)(*q, s, BF16);
    else T(apply_rows_of)(*q, s, F64);
}

/* ---- weights of their own -----------------------------------------------------------------------
 */

/* Runs of n numbers that share the weights along them. */
typedef struct {
    Rows rows[BACKWARD_SHARED_RUNS];
    T(Slope) slope[BACKWARD_SHARED_RUNS];
    int count;
} T(SharedRuns);

/* Of an element: dy and xhat. */
typedef struct {
    REAL dy, xhat;
} T(Part);

FN_INLINE T(Part) T(part)(const char *x, const char *dy, ptrdiff_t i, T(Slope) v, Storage storage) {
    return (T(Part)){T(element)(dy, i, storage), T(xhat)(T(element)(x, i, storage), v)};
}
FN_INLINE void T(put_part)(char *dx, ptrdiff_t i, T(Part) t, REAL weight, T(Slope) v,
                           Storage storage) {
    T(put)(dx, i, T(gradient)(t.xhat, t.dy, weight * v.r, v), storage);
}
/* What all of four runs add is added up first, which touches the sums less often. */
FN_INLINE void T(collect_four)(const T(SharedRuns) *q, const REAL *FN_RESTRICT w,
                               double *FN_RESTRICT gw, double *FN_RESTRICT gb, Storage storage) {
    const Rows a = q->rows[0], b = q->rows[1], c = q->rows[2], d = q->rows[3];
    const T(Slope) va = q->slope[0], vb = q->slope[1], vc = q->slope[2], vd = q->slope[3];
    const ptrdiff_t n = a.n, size = T(size_of)(storage);
    const ptrdiff_t ahead = 4 * (b.x - a.x), ahead_dx = 4 * (b.dx - a.dx); /* the next four */
    for (ptrdiff_t from = 0; from < n; from += 128) {
        const ptrdiff_t to = least(from + 128, n);
        for (ptrdiff_t i = from * size; i < to * size; i += 64)
            for (int k = 0; k < 4; k++) {
                FN_FETCH(q->rows[k].x + i + ahead);
                FN_FETCH(q->rows[k].dy + i + ahead);
                if (storage == BF16) FN_FETCH_TO(q->rows[k].dx + i + ahead_dx);
            }
        FN_IVDEP for (ptrdiff_t i = from; i < to; i++) {
            const T(Part) ta = T(part)(a.x, a.dy, i, va, storage);
            const T(Part) tb = T(part)(b.x, b.dy, i, vb, storage);
            const T(Part) tc = T(part)(c.x, c.dy, i, vc, storage);
            const T(Part) td = T(part)(d.x, d.dy, i, vd, storage);
            T(put_part)(a.dx, i, ta, w[i], va, storage);
            T(put_part)(b.dx, i, tb, w[i], vb, storage);
            T(put_part)(c.dx, i, tc, w[i], vc, storage);
            T(put_part)(d.dx, i, td, w[i], vd, storage);
            gw[i] += (double)(T(fma)(ta.dy, ta.xhat, tb.dy * tb.xhat) +
                              T(fma)(tc.dy, tc.xhat, td.dy * td.xhat));
            gb[i] += (double)((ta.dy + tb.dy) + (tc.dy + td.dy));
        }
    }
}
FN_INLINE void T(collect_one)(Rows q, T(Slope) v, const REAL *FN_RESTRICT w,
                              double *FN_RESTRICT gw, double *FN_RESTRICT gb, Storage storage) {
    FN_IVDEP for (ptrdiff_t i = 0; i < q.n; i++) {
        const T(Part) t = T(part)(q.x, q.dy, i, v, storage);
        T(put_part)(q.dx, i, t, w[i], v, storage);
        gw[i] += (double)(t.dy * t.xhat);
        gb[i] += (double)t.dy;
    }
}
FN_INLINE void T(collect_of)(const T(SharedRuns) *q, const REAL *w, Cells to, Storage storage) {
    if (q->count == 4) T(collect_four)(q, w, to.weight, to.bias, storage);
    for (int k = 0; k < q->count && q->count < 4; k++)
        T(collect_one)(q->rows[k], q->slope[k], w, to.weight, to.bias, storage);
}
/* dx of runs that share their weights, and what they add to the gradients of those. */
FN_APART void T(collect)(const T(SharedRuns) *q, const REAL *w, Cells to, Storage storage) {
    if (IS_FLOAT && storage == BF16) T(collect_of)(q, w, to, BF16);
    else T(collect_of)(q, w, to, F64);
}
/* Column i of a row of columns. */
FN_INLINE T(Part) T(collect_column)(const Rows *q, const T(Slopes) *s, ptrdiff_t i, REAL weight) {
    const T(Slope) v = {s->hi[i], s->r[i], s->shift[i], 0, s->c1[i], s->c2[i]};
    const T(Part) t = T(part)(q->x, q->dy, i, v, F64);
    T(put_part)(q->dx, i, t, weight, v, F64);
    return t;
}
/* A row of columns; the weight is the row's, or (`along`) each column's. */
FN_APART void T(collect_columns)(const Rows *rows, const T(Slopes) *slopes, const REAL *w,
                                 int along,
                               Cells to) {
    double *FN_RESTRICT gw = to.weight, *FN_RESTRICT gb = to.bias;
    const Rows q = *rows;
    const T(Slopes) s = *slopes;
    const REAL w0 = w[0];
    double a[PAIR_LANES] = {0}, b[PAIR_LANES] = {0}, rest_a = 0, rest_b = 0;
    ptrdiff_t i = 0;
    if (along) {
        FN_IVDEP for (ptrdiff_t c = 0; c < q.n; c++) {
            const T(Part) t = T(collect_column)(&q, &s, c, w[c]);
            gw[c] += (double)(t.dy * t.xhat);
            gb[c] += (double)t.dy;
        }
        return;
    }
    for (; i + PAIR_LANES <= q.n; i += PAIR_LANES)
        FN_IVDEP for (ptrdiff_t j = 0; j < PAIR_LANES; j++) {
            const T(Part) t = T(collect_column)(&q, &s, i + j, w0);
            a[j] += (double)t.dy;
            b[j] += (double)(t.dy * t.xhat);
        }
    for (; i < q.n; i++) {
        const T(Part) t = T(collect_column)(&q, &s, i, w0);
        rest_a += (double)t.dy;
        rest_b += (double)(t.dy * t.xhat);
    }
    gb[0] += fn_added_up(a) + rest_a;
    gw[0] += fn_added_up(b) + rest_b;
}

/* ---- where numbers leave float's range: in double -----------------------------------------------
 */

typedef struct {
    double mean, rstd, first, second;
} T(DoubleSlope);

FN_INLINE T(DoubleSlope) T(double_slope)(const T(Slopes) *s, ptrdiff_t k) {
    return (T(DoubleSlope)){s->mean[k], s->rstd[k], s->first[k], s->second[k]};
}
/* An element; returns its xhat. */
static double T(apply_in_double)(T(DoubleSlope) v, REAL x, REAL dy, double weight, int training,
                                 REAL *dx) {
    const double xhat = ((double)x - v.mean) * v.rstd;
    const double from_xhat = training ? xhat * v.second : 0.0;
    *dx = (REAL)(v.rstd * ((double)dy * weight) - v.first - from_xhat);
    return xhat;
}
/* The sums of a run once more. */
FN_APART void T(sum_run_in_double)(const Rows *q, double mean, double rstd, const REAL *w,
                                   Storage storage, double *sums) {
    enum { M = 512 };
    double lanes[2 * PAIR_LANES] = {0};
    REAL x[M], dy[M];
    for (ptrdiff_t i = 0; i < q->n; i += M) {
        const int m = (int)least(q->n - i, M);
        Rows part = {.n = m};
        part.x = (const char *)T(elements)(q->x, i, m, storage, x);
        part.dy = (const char *)T(elements)(q->dy, i, m, storage, dy);
        T(add_run_in_double)(&part, mean, rstd, w ? w + i : NULL, lanes);
    }
    sums[0] = 0.0 + fn_added_up(lanes);
    sums[1] = (0.0 + fn_added_up(lanes + PAIR_LANES)) * rstd;
}
