/* From moments to scales: what applying them to x needs of each group, or of each column. */

/* `mean`, `low` and `rstd` are those of groups; hi, r and shift those of columns, or of groups of
 * runs, and of the computing type: y = (x - hi) r + shift, with weight and bias in r and shift
 * where `folded`. What a float cannot hold (data at 1e38 or 1e-42) is out of range and runs in
 * double, on x times the power of two `scale`. */
typedef struct {
    double *mean, *low, *rstd, *scale;
    REAL *hi, *r, *shift;
    uint8_t *out_of_range;
    int any_out_of_range, folded;
} T(Scales);

FN_INLINE T(Scales) T(scales_at)(char *memory, ptrdiff_t width) {
    double *mean = (double *)memory;
    REAL *hi = (REAL *)(mean + 4 * width);
    return (T(Scales)){mean, mean + width, mean + 2 * width, mean + 3 * width,
                       hi,   hi + width,   hi + 2 * width,   (uint8_t *)(hi + 3 * width),
                       0,    0};
}
/* The scales of groups b, b + 1 ... in the table of all. */
FN_INLINE T(Scales) T(table_at)(char *table, ptrdiff_t width, ptrdiff_t b) {
    T(Scales) s = T(scales_at)(table, width);
    s.any_out_of_range = s.out_of_range[width], s.folded = s.out_of_range[width + 1];
    s.mean += b, s.low += b, s.rstd += b, s.scale += b;
    s.hi += b, s.r += b, s.shift += b, s.out_of_range += b;
    return s;
}

#if IS_FLOAT
/* Whether a float holds too few digits of xhat for a weight that is not folded: eps is so much more
 * than the variance. */
FN_INLINE int loses_digits(double var, double rstd) {
    return (var > 0) & (var * rstd * rstd < 0x1p-200);
}
/* Of a mean hi + lo, an rstd and a weight and bias: hi, r and shift; whether any of it leaves the
 * range of a float, beyond 2^100 either way, or its precision, or is `lost`.  Without branches:
 * many are computed at once. */
FN_INLINE int scale_of(double mean, double low, double rstd, int lost, double weight, double bias,
                       float *hi, float *r, float *shift) {
    const double size = fabs(rstd), rw = rstd * weight, at_most = fabs(rw);
    const double lo = (mean - (double)(float)mean) + low;
    /* of no elements, or with a NaN, all is not a number, in whatever type */
    const int nothing = (size == 0) | (size != size);
    const int fits =
        ((size > 7.9e-31) & (size < 1.3e30) & (fabs(mean) < 1.3e30) & !lost) | nothing;
    *hi = (float)mean;
    *r = (float)rw;
    *shift = (float)(bias - lo * rw);
    return !(fits & (((at_most > 7.9e-31) & (at_most < 1.3e30)) | (weight == 0) | nothing));
}
/* Those of k neighbouring columns, with a weight and bias each; returns whether any is out of
 * range. */
FN_INLINE int spread(const Scales_f32 *s, ptrdiff_t g, ptrdiff_t k, int lost, const float *w,
                     ptrdiff_t w_step, const float *b, ptrdiff_t b_step) {
    int any = 0;
    for (ptrdiff_t j = g * k; j < g * k + k; j++) {
        const int out = scale_of(s->mean[g], s->low[g], s->rstd[g], lost,
                                 w ? (double)w[j * w_step] : 1.0, b ? (double)b[j * b_step] : 0.0,
                                 &s->hi[j], &s->r[j], &s->shift[j]);
        s->out_of_range[j] = (uint8_t)out;
        any |= out;
    }
    return any;
}
/* Those of n groups, with a weight and bias each that follow one another, or none. */
FN_INLINE int spread_each(const Scales_f32 *s, ptrdiff_t n, const float *w, const float *b) {
    const double *FN_RESTRICT mean = s->mean, *FN_RESTRICT low = s->low;
    const double *FN_RESTRICT rstd = s->rstd;
    float *FN_RESTRICT hi = s->hi, *FN_RESTRICT r = s->r, *FN_RESTRICT shift = s->shift;
    uint8_t *FN_RESTRICT out_of_range = s->out_of_range;
    int any = 0;
    for (ptrdiff_t g = 0; g < n; g++) {
        const int out = scale_of(mean[g], low[g], rstd[g], 0, w ? (double)w[g] : 1.0,
                                 b ? (double)b[g] : 0.0, &hi[g], &r[g], &shift[g]);
        out_of_range[g] = (uint8_t)out;
        any |= out;
    }
    return any;
}
FN_APART int spread_groups(const Scales_f32 *s, ptrdiff_t n, const float *w, const float *b) {
    if (w && b) return spread_each(s, n, w, b);
    if (w) return spread_each(s, n, w, NULL);
    return b ? spread_each(s, n, NULL, b) : spread_each(s, n, NULL, NULL);
}
/* The scales of n groups, one for each of their k columns. */
FN_APART void widen(const Scales_f32 *s, ptrdiff_t n, ptrdiff_t k) {
    for (ptrdiff_t g = n - 1; g >= 0; g--) {
        const float hi = s->hi[g], r = s->r[g], shift = s->shift[g];
        float *FN_RESTRICT his = s->hi + g * k, *FN_RESTRICT rs = s->r + g * k;
        float *FN_RESTRICT shifts = s->shift + g * k;
        for (ptrdiff_t i = 0; i < k; i++) his[i] = hi, rs[i] = r, shifts[i] = shift;
        memset(s->out_of_range + g * k, s->out_of_range[g], (size_t)k);
    }
}
/* Loops of their own: several quotients, and roots, at once. */
FN_APART void moments_to_scale(ptrdiff_t n, const double *FN_RESTRICT m,
                                    double *FN_RESTRICT mean, double *FN_RESTRICT low,
                                    double *FN_RESTRICT var) {
    for (ptrdiff_t g = 0; g < n; g++) {
        var[g] = m[M2 * n + g] / m[g];
        mean[g] = m[g] > 0.0 ? m[MEAN * n + g] : var[g]; /* of no elements: not a number */
        low[g] = m[MEAN_LOW * n + g];
    }
}
FN_APART void rstds_of(ptrdiff_t n, const double *FN_RESTRICT var, double eps,
                            double *FN_RESTRICT rstd) {
    for (ptrdiff_t g = 0; g < n; g++) rstd[g] = rstd_of(var[g], eps);
}
/* From the moments of an item's groups to their scales; statistics are written out. */
static void finalize_f32(const Forward *q, const Item *it, const double *m, Scales_f32 *s) {
    const ptrdiff_t n = groups_of(q, it), k = q->neighbours;
    ptrdiff_t step, w_step = 0, b_step = 0;
    double *const mean = statistics_at(q, &q->mean, it, &step);
    double *const var = statistics_at(q, &q->var, it, &step);
    double *const rstd = statistics_at(q, &q->rstd, it, &step);
    double *const own_var = s->scale;
    const float *w = NULL, *b = NULL;
    if (q->given) {
        for (ptrdiff_t g = 0; g < n; g++)
            s->mean[g] = mean[g * step], s->low[g] = 0.0, own_var[g] = var[g * step];
    } else {
        moments_to_scale(n, m, s->mean, s->low, own_var);
    }
    if (q->scaling == RSTD) rstds_of(n, own_var, q->eps, s->rstd);
    else if (q->scaling == FACTOR) memcpy(s->rstd, own_var, (size_t)n * sizeof(double));
    else
        for (ptrdiff_t g = 0; g < n; g++) s->rstd[g] = norm_scale(m[M2 * n + g], q->eps);
    if (mean && !q->given)
        for (ptrdiff_t g = 0; g < n; g++) {
            mean[g * step] = s->mean[g], var[g * step] = own_var[g];
            rstd[g * step] = s->rstd[g];
        }
    if (!q->y.data) return;
    /* one weight for each column or group; what is tabulated holds for all of a */
    s->folded = q->foldable && !q->weight.p && !q->bias.p &&
                !(q->tabulated && (q->weight.a || q->bias.a));
    if (s->folded) {
        w = weights_at(q, &q->weight, it, &w_step);
        b = weights_at(q, &q->bias, it, &b_step);
    }
    const Scales_f32 into = *s; /* a copy: bytes written through it are none of its pointers */
    const int apart = q->weight.data && !q->foldable && !q->given && q->scaling == RSTD;
    /* neighbours with the same weights have one scale */
    const ptrdiff_t own = q->shared || (!w_step && !b_step) ? 1 : k;
    int any = 0;
    if (own == 1 && !apart && (!w || w_step == 1) && (!b || b_step == 1)) {
        any = spread_groups(&into, n, w, b);
    } else {
        for (ptrdiff_t g = 0; g < n; g++) {
            const int lost = apart && loses_digits(own_var[g], into.rstd[g]);
            any |= spread(&into, g, own, lost, w, w_step, b, b_step);
        }
    }
    if (own < k) widen(&into, n, k);
    s->any_out_of_range = any;
    if (s->any_out_of_range)
        for (ptrdiff_t j = n * k - 1; j >= 0; j--) {
            const ptrdiff_t g = j / k;
            s->mean[j] = s->mean[g], s->low[j] = s->low[g], s->rstd[j] = s->rstd[g];
            s->scale[j] = 1.0;
        }
}
/* Weight and bias of a run taken into r and shift; 0 where a float cannot hold the product. */
FN_INLINE int fold_run(const Scales_f32 *s, ptrdiff_t k, const float *weight, const float *bias,
                       float *r, float *shift) {
    const double rw = s->rstd[k] * (weight ? (double)*weight : 1.0);
    const double lo = (s->mean[k] - (double)s->hi[k]) + s->low[k];
    *r = (float)rw;
    *shift = (float)((bias ? (double)*bias : 0.0) - lo * rw);
    return (fabs(rw) > 7.9e-31 && fabs(rw) < 1.3e30) || rw == 0.0 || rw != rw;
}

#else
/* A chosen element (p, s) of neighbour k of a group; NULL where the mask leaves it out. */
FN_INLINE const double *chosen(const Forward *q, const char *x, const char *mask, ptrdiff_t i) {
    const Operand *source = source_of(q);
    const ptrdiff_t k = i / q->length, j = i % q->length, p = j / q->s, s = j % q->s;
    if (mask && !mask[p * q->mask.p + s * q->mask.s + k * q->mask.c]) return NULL;
    return (const double *)(x + p * source->p + s * source->s + k * source->c);
}
/* Compensated sum of (x * scale - pivot)^power over a group. */
static double sum_of_powers(const Forward *q, const char *x, const char *mask, double scale,
                            double pivot, int power) {
    double total = 0.0, low = 0.0;
    for (ptrdiff_t i = 0; i < q->neighbours * q->length; i++) {
        const double *e = chosen(q, x, mask, i);
        if (!e) continue;
        const double v = *e * scale - pivot;
        fn_add_two(&total, &low, power == 2 ? v * v : v);
    }
    return total + low;
}
/* Moments of one group whose squares leave float64's range: slow, rare, on x * scale.
 *
 * Returns 0 where there is nothing to rescale: constant (mean set, m2 0), or with an infinity or
 * what is no number in it (mean set to the sum of those). */
static int rescale(const Forward *q, const char *x, const char *mask, double *mean, double *low,
                   double *m2, double *scale) {
    double largest = 0.0, first = 0.0, not_finite = 0.0;
    ptrdiff_t count = 0;
    int constant = 1, exponent;
    for (ptrdiff_t i = 0; i < q->neighbours * q->length; i++) {
        const double *e = chosen(q, x, mask, i);
        if (!e) continue;
        if (!isfinite(*e)) {
            not_finite += *e;
            continue;
        }
        if (count++ == 0) first = *e;
        constant = constant && *e == first;
        if (fabs(*e) > largest) largest = fabs(*e);
    }
    if (not_finite != 0.0) {
        if (q->centred) *mean = not_finite;
        return 0;
    }
    if (count == 0) return 0;
    if (largest == 0.0 || (constant && q->centred)) {
        *mean = first;
        *low = *m2 = 0.0;
        return 0;
    }
    frexp(largest, &exponent);
    *scale = ldexp(1.0, -exponent < 1000 ? -exponent : 1000);
    *mean = *low = 0.0;
    if (q->centred) {
        /* twice, as in moments_of: about the first element, then about that mean */
        *mean = first * *scale;
        *mean += sum_of_powers(q, x, mask, *scale, *mean, 1) / (double)count;
        *low = sum_of_powers(q, x, mask, *scale, *mean, 1) / (double)count;
    }
    *m2 = sum_of_powers(q, x, mask, *scale, *mean, 2) - (double)count * *low * *low;
    return 1;
}
/* As for floats, with variances to twice the precision, and groups out of range rescaled. */
static void finalize_f64(const Forward *q, const Item *it, const double *m, Scales_f64 *s) {
    const ptrdiff_t n = groups_of(q, it), k = q->neighbours;
    const Operand *source = source_of(q);
    ptrdiff_t step;
    double *const mean_out = statistics_at(q, &q->mean, it, &step);
    double *const var_out = statistics_at(q, &q->var, it, &step);
    double *const rstd_out = statistics_at(q, &q->rstd, it, &step);
    s->any_out_of_range = s->folded = 0;
    for (ptrdiff_t g = n - 1; g >= 0; g--) {
        double scale = 1.0, mean, low = 0.0, var, rstd;
        if (q->given) {
            mean = mean_out[g * step], var = var_out[g * step];
            rstd = q->scaling == FACTOR ? var : rstd_of(var, q->eps);
        } else {
            const double count = m[g];
            double m2 = m[M2 * n + g], m2_low = m[M2_LOW * n + g];
            mean = m[MEAN * n + g], low = m[MEAN_LOW * n + g];
            if (count == 0.0) mean = m2 = (double)NAN;
            double v = q->scaling == RSTD ? m2 / count + q->eps : m2;
            if (!(v > 1e-270 && v < 1e270)) {
                const ptrdiff_t b = q->columns ? it->b : it->b + g;
                const ptrdiff_t c = q->columns ? it->c + g * k : it->c;
                const char *mask = q->mask.data ? at(&q->mask, it->a, b) + c * q->mask.c : NULL;
                const char *x = at(source, it->a, b) + c * source->c;
                if (rescale(q, x, mask, &mean, &low, &m2, &scale)) m2_low = 0.0;
            }
            /* where a rounded mean is far off, much is in m2_low; with an infinity it is NaN */
            var = (isfinite(m2_low) ? m2 + m2_low : m2) / count;
            if (q->scaling == RSTD) {
                const double eps = q->eps * scale * scale;
                v = var + eps;
                const double left = (fn_fma64(-var, count, m2) + m2_low) / count;
                rstd = inverse_root(v, left + ((var - v) + eps));
                /* a constant group with eps = 0 is all bias: its scale is 0, not infinity */
                if (v == 0.0) rstd = 0.0;
            } else {
                rstd = m2 != 0.0 ? inverse_root(m2, m2_low) : 0.0;
                if (sqrt(m2) < q->eps * scale) rstd = 1.0 / (q->eps * scale);
            }
            if (mean_out) {
                mean_out[g * step] = mean / scale;
                var_out[g * step] = var / scale / scale;
                rstd_out[g * step] = rstd * scale;
            }
        }
        s->any_out_of_range |= scale != 1.0;
        for (ptrdiff_t j = g * k; j < g * k + k; j++) {
            s->mean[j] = mean, s->low[j] = low, s->rstd[j] = rstd, s->scale[j] = scale;
            s->out_of_range[j] = scale != 1.0;
            s->hi[j] = mean, s->r[j] = rstd, s->shift[j] = -low * rstd;
        }
    }
}
#endif
