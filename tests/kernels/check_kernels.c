/* The kernels without Python: each family against plain loops in long double.
 *
 *     cc -std=c11 -O3 -ffp-contract=off -pthread -I fastnorm/_core \
 *         tests/kernels/check_kernels.c -lm
 *
 * Prints what is wrong, and ends with 1 if anything is.  test_kernels.py builds it for each
 * instruction set of the machine, and for AArch64 where there is a cross compiler and qemu.  With
 * an argument the largest passes are left out: an emulator takes a hundred times as long. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t fn_trim(void) { return 0; }
#include "kernels.h"

static int failures, checks;

static void check_close(const char *what, ptrdiff_t where, double found, long double right,
                 long double allowed) {
    checks++;
    if (found == right || (found != found && right != right)) return;
    if (fabsl(found - right) <= allowed) return;
    if (failures++ < 20)
        printf("%s at %ld: %.17g, not %.17Lg\n", what, (long)where, found, right);
}
static uint64_t state = 1;
/* Between -1 and 1. */
static double number_at_random(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(int64_t)state / 9223372036854775808.0;
}
static void fill(double *v, ptrdiff_t n, double mean, Storage storage) {
    for (ptrdiff_t i = 0; i < n; i++) {
        v[i] = mean + number_at_random();
        if (storage == F32) v[i] = (float)v[i];
        if (storage == BF16) v[i] = fn_from_bf16(fn_to_bf16((float)v[i]));
        if (storage == F16) v[i] = fn_from_f16(fn_to_f16((float)v[i]));
    }
}

/* ---- sums ---- */

static const ptrdiff_t LENGTHS[] = {1,  2,  7,  8,   9,   31,  32,  33,
                                    63, 64, 65, 100, 255, 256, 257, 1000};
enum { LENGTHS_OF = sizeof LENGTHS / sizeof *LENGTHS, MOST = 1000 };

static void check_sums(double mean, double pivot) {
    for (int k = 0; k < LENGTHS_OF; k++) {
        const ptrdiff_t n = LENGTHS[k];
        double v[MOST], a[LANES] = {0}, b[LANES] = {0}, first, second, low;
        float f[MOST + 3];
        uint16_t h[MOST + 3];
        long double one = 0, two = 0, one_about = 0, two_about = 0, size = 0;
        fill(v, n, mean, BF16);
        for (ptrdiff_t i = 0; i < n; i++) {
            const long double d = (long double)v[i] - pivot;
            f[i + 3] = (float)v[i], h[i + 3] = fn_to_bf16((float)v[i]);
            one += v[i], two += (long double)v[i] * v[i];
            one_about += d, two_about += d * d, size += fabsl(d) + v[i] * v[i] + d * d;
        }
        sums_f32(f + 3, n, &first, &second);
        check_close("sums_f32: first", n, first, one, 1e-14L * size);
        check_close("sums_f32: second", n, second, two, 1e-14L * size);
        check_close("squares_f32", n, squares_f32(f + 3, n), two, 1e-14L * size);
        sums_about_f32(f + 3, n, pivot, &first, &second);
        check_close("sums_about_f32: first", n, first, one_about, 1e-14L * size);
        check_close("sums_about_f32: second", n, second, two_about, 1e-14L * size);
        sums_about_bf16(h + 3, n, pivot, &first, &second);
        check_close("sums_about_bf16: first", n, first, one_about, 1e-14L * size);
        check_close("sums_about_bf16: second", n, second, two_about, 1e-14L * size);
        sums_bf16(h + 3, n, &first, &second);
        check_close("sums_bf16: first", n, first, one, 1e-6L * size);
        check_close("sums_bf16: second", n, second, two, 1e-6L * size);
        check_close("squares_bf16", n, squares_bf16(h + 3, n), two, 1e-6L * size);
        check_close("deviations", n, deviations(v, n, 0, pivot), one_about, 1e-14L * size);
        sums_about_f64(v, n, 0, pivot, &first, &second, &low);
        check_close("sums_about_f64: first", n, first, one_about, 1e-14L * size);
        check_close("sums_about_f64: second", n, second, two_about - low, 1e-14L * size);
        add_f32(f + 3, n / 3, 0, a, b);
        add_f32(f + 3 + n / 3, n - n / 3, 0, a, b);
        check_close("add_f32: first", n, fold_lanes(a), one, 1e-14L * size);
        check_close("add_f32: second", n, fold_lanes(b), two, 1e-14L * size);
    }
}
static void check_columns(ptrdiff_t rows, ptrdiff_t width, int about) {
    enum { ROWS_OF = 21, WIDTH_OF = 40, STEP = WIDTH_OF + 5 };
    double v[ROWS_OF * STEP], pivot[WIDTH_OF], a[WIDTH_OF] = {0}, b[WIDTH_OF] = {0};
    double total[WIDTH_OF] = {0}, m2[WIDTH_OF] = {0}, low[WIDTH_OF] = {0};
    float f[ROWS_OF * STEP];
    fill(v, ROWS_OF * STEP, 2.0, F32);
    fill(pivot, WIDTH_OF, 2.0, F32);
    for (int i = 0; i < ROWS_OF * STEP; i++) f[i] = (float)v[i];
    column_sums(f, STEP, rows, width, about ? pivot : NULL, a, b);
    add_deviations(v, STEP, rows, width, pivot, total, m2, low);
    for (ptrdiff_t c = 0; c < width; c++) {
        long double one = 0, two = 0, one_about = 0, two_about = 0;
        for (ptrdiff_t i = 0; i < rows; i++) {
            const long double x = v[i * STEP + c], d = x - pivot[c], e = about ? d : x;
            one += e, two += e * e, one_about += d, two_about += d * d;
        }
        check_close("column_sums: first", c, a[c], one, 1e-13L);
        check_close("column_sums: second", c, b[c], two, 1e-13L);
        check_close("add_deviations: total", c, total[c], one_about, 1e-13L);
        check_close("add_deviations: squares", c, m2[c], two_about - low[c], 1e-13L);
    }
}
/* Moments of two parts, merged, are those of the whole. */
static void check_merge(ptrdiff_t n, ptrdiff_t first) {
    double v[MOST], m[3][FIELDS];
    long double mean = 0, m2 = 0;
    Forward q = {.centred = 1};
    fill(v, n, 1000.0, F64);
    moments_of_f64(v, n, &q, m[0], 1);
    moments_of_f64(v, first, &q, m[1], 1);
    moments_of_f64(v + first, n - first, &q, m[2], 1);
    merge(m[1], m[2], 1, 1);
    for (ptrdiff_t i = 0; i < n; i++) mean += v[i];
    mean /= n;
    for (ptrdiff_t i = 0; i < n; i++) m2 += (v[i] - mean) * (v[i] - mean);
    for (int k = 0; k < 2; k++) {
        check_close("merge: count", n, m[k][COUNT], n, 0);
        check_close("merge: mean", n, m[k][MEAN], mean - m[k][MEAN_LOW], 1e-15L);
        check_close("merge: m2", n, m[k][M2], m2 - m[k][M2_LOW], 1e-13L);
    }
}
/* Every number of 16 bits there and back, and floats to the nearest. */
static void check_storage(void) {
    for (uint32_t i = 0; i < 65536; i++) {
        const uint16_t h = (uint16_t)i;
        uint16_t back;
        float t;
        load_f32((const char *)&h, F16, 1, &t);
        store_f32(&t, 1, (char *)&back, F16);
        if (t == t) check_close("float16", i, back, h, 0);
        load_f32((const char *)&h, BF16, 1, &t);
        store_f32(&t, 1, (char *)&back, BF16);
        if (t == t) check_close("bfloat16", i, back, h, 0);
        t = (float)(number_at_random() * 100);
        check_close("bfloat16 of a float", i, fn_from_bf16(fn_to_bf16(t)), t, fabsf(t) / 256);
        check_close("float16 of a float", i, fn_from_f16(fn_to_f16(t)), t, fabsf(t) / 2048 + 1e-7L);
    }
}

/* By the difference quotient of the fourth order; kinks lie between the numbers. */
static long double slope_at(double t, Activation activation) {
    const double h = 1.0 / 1024;
    double f[4];
    for (int k = 0; k < 4; k++) f[k] = activated_f64(t + (k < 2 ? k - 2 : k - 1) * h, activation);
    return (8.0L * (f[2] - f[1]) - (f[3] - f[0])) / (12 * h);
}
static void check_slopes(Activation activation, double most) {
    for (int k = 0; k < LENGTHS_OF; k++) {
        const ptrdiff_t n = LENGTHS[k];
        double v[MOST], dy[MOST], t[MOST];
        float f[MOST], g[MOST];
        fill(dy, n, 0.0, F32);
        for (ptrdiff_t i = 0; i < n; i++) {
            v[i] = t[i] = f[i] = (float)(ceil(64 * most * number_at_random()) + 0.5) / 64;
            g[i] = (float)dy[i];
        }
        multiply_by_slope_f32(f, g, n, activation);
        multiply_by_slope_f64(t, dy, n, activation);
        for (ptrdiff_t i = 0; i < n; i++) {
            const long double right = dy[i] * slope_at(v[i], activation);
            check_close("slope of floats", i, f[i], right, 3e-7L);
            check_close("slope of doubles", i, t[i], right, 1e-9L);
        }
    }
}

/* ---- passes: any layout, against loops that follow its strides ---- */

typedef struct {
    const char *name;
    ptrdiff_t a, b, p, s, c, neighbours;
    int columns;
    ptrdiff_t x[5], w[5]; /* strides, in elements: a, b, p, s, c */
} Layout;
typedef struct {
    Storage storage;
    int centred, weighted, biased, residual, threads;
    Scaling scaling;
    Activation activation;
} Options;
/* A pass forward and back, and the schedules of both (schedule.py). */
typedef struct {
    int layout;
    Options options;
    Forward forward;
    Backward backward;
} Case;
#include "cases.h" /* LAYOUTS and CASES, written by cases.py */

static ptrdiff_t place_of(const ptrdiff_t *step, const ptrdiff_t *i) {
    ptrdiff_t sum = 0;
    for (int k = 0; k < 5; k++) sum += i[k] * step[k];
    return sum;
}
static ptrdiff_t room_of(const Layout *l, const ptrdiff_t *step) {
    const ptrdiff_t last[5] = {l->a - 1, l->b - 1, l->p - 1, l->s - 1, l->c - 1};
    return place_of(step, last) + 1;
}
/* The next element of the group that i is in; 0 after the last. */
static int next_of_group(const Layout *l, ptrdiff_t *i) {
    if (++i[4] % l->neighbours) return 1;
    i[4] -= l->neighbours;
    if (++i[3] < l->s) return 1;
    i[3] = 0;
    if (++i[2] < l->p) return 1;
    i[2] = 0;
    return 0;
}
static int next_group(const Layout *l, ptrdiff_t *i) {
    if ((i[4] += l->neighbours) < l->c) return 1;
    i[4] = 0;
    if (++i[1] < l->b) return 1;
    i[1] = 0;
    return ++i[0] < l->a;
}
/* Memory of n numbers of a storage, and an operand that shows it. */
static Operand operand_of(const double *v, ptrdiff_t n, const ptrdiff_t *step, Storage storage) {
    const ptrdiff_t size = bytes_of(storage);
    Operand o = {.storage = storage};
    o.data = o.low = malloc((size_t)(n * size + 64));
    o.high = o.low + n * size + 64;
    for (ptrdiff_t i = 0; i < n; i++) {
        const float f = (float)v[i];
        if (storage == F64) ((double *)o.data)[i] = v[i];
        else store_f32(&f, 1, o.data + i * size, storage);
    }
    o.a = step[0] * size, o.b = step[1] * size, o.p = step[2] * size;
    o.s = step[3] * size, o.c = step[4] * size;
    return o;
}
static long double activated(long double t, Activation activation) {
    return activation == IDENTITY ? t : activated_f64((double)t, activation);
}
static void check_pass(const Case *c) {
    const Layout *l = &LAYOUTS[c->layout];
    const Options o = c->options;
    const ptrdiff_t n = room_of(l, l->x), weights = room_of(l, l->w), groups = l->c / l->neighbours;
    const ptrdiff_t stat[5] = {l->b * groups, groups, 0, 0, 1};
    const Storage computing = o.storage == F64 ? F64 : F32;
    const long double unit = o.storage == F64 ? 1e-13L : o.storage == F32 ? 2e-6L
                             : o.storage == F16 ? 2e-3L : 1.2e-2L;
    double *x = malloc((size_t)n * 8), *e = malloc((size_t)n * 8), *dy = e;
    double *w = malloc((size_t)weights * 8), *b = malloc((size_t)weights * 8);
    double *statistics = calloc((size_t)(l->a * l->b * groups), 8);
    double *dw = calloc((size_t)weights, 8), *db = calloc((size_t)weights, 8);
    fill(x, n, 3.0, o.storage), fill(e, n, 0.0, o.storage);
    fill(w, weights, 1.0, F32), fill(b, weights, 0.0, F32);
    Forward q = c->forward;
    q.a = l->a, q.b = l->b, q.p = l->p, q.s = l->s, q.c = l->c, q.columns = l->columns;
    q.neighbours = l->neighbours, q.centred = o.centred, q.scaling = o.scaling;
    q.eps = 1e-5, q.activation = o.activation;
    q.x = operand_of(x, n, l->x, o.storage), q.y = operand_of(x, n, l->x, o.storage);
    q.mean = operand_of(statistics, l->a * l->b * groups, stat, F64);
    q.var = operand_of(statistics, l->a * l->b * groups, stat, F64);
    q.rstd = operand_of(statistics, l->a * l->b * groups, stat, F64);
    if (o.weighted) q.weight = operand_of(w, weights, l->w, computing);
    if (o.biased) q.bias = operand_of(b, weights, l->w, computing);
    if (o.residual) q.residual = operand_of(e, n, l->x, o.storage);
    q.max_threads = q.small = 0; /* however small it is */
    forward_threads(&q, o.threads);
    if (run_forward(&q)) check_close("memory", 0, 1, 0, 0);
    Backward r = c->backward;
    r.a = l->a, r.b = l->b, r.p = l->p, r.s = l->s, r.c = l->c, r.columns = l->columns;
    r.neighbours = l->neighbours, r.centred = o.centred, r.training = 1;
    r.x = q.x, r.dx = operand_of(x, n, l->x, o.storage), r.dy = operand_of(dy, n, l->x, o.storage);
    r.mean = q.mean, r.rstd = q.rstd, r.weight = q.weight;
    if (!o.centred) r.mean = (Operand){.storage = F64};
    r.dweight = operand_of(dw, weights, l->w, F64), r.dbias = operand_of(db, weights, l->w, F64);
    r.max_threads = r.small = 0;
    backward_threads(&r, o.threads);
    if (run_backward(&r)) check_close("memory", 0, 1, 0, 0);

    ptrdiff_t i[5] = {0}, begin[5];
    do {
        long double count = 0, mean = 0, m2 = 0, sum_g = 0, sum_gh = 0;
        memcpy(begin, i, sizeof i);
        do mean += x[place_of(l->x, i)], count++;
        while (next_of_group(l, i));
        mean = o.centred ? mean / count : 0;
        do m2 += (x[place_of(l->x, i)] - mean) * (x[place_of(l->x, i)] - mean);
        while (next_of_group(l, i));
        const long double rstd = o.scaling == RSTD ? 1 / sqrtl(m2 / count + 1e-5L) : 1 / sqrtl(m2);
        do {
            const ptrdiff_t k = place_of(l->x, i), j = place_of(l->w, i);
            const long double g = dy[k] * (o.weighted ? w[j] : 1), xhat = (x[k] - mean) * rstd;
            long double y = xhat * (o.weighted ? w[j] : 1) + (o.biased ? b[j] : 0);
            y = activated(y + (o.residual ? e[k] : 0), o.activation);
            check_close(l->name, k, number(q.y.data + k * bytes_of(o.storage), o.storage), y,
                 unit * (1 + fabsl(y)));
            sum_g += g, sum_gh += g * xhat;
            dw[j] += (double)(dy[k] * xhat), db[j] += dy[k];
        } while (next_of_group(l, i));
        do {
            const ptrdiff_t k = place_of(l->x, i), j = place_of(l->w, i);
            const long double g = dy[k] * (o.weighted ? w[j] : 1), xhat = (x[k] - mean) * rstd;
            const long double dx =
                rstd * (g - (o.centred ? sum_g / count : 0) - xhat * sum_gh / count);
            if (o.scaling == RSTD)
                check_close("dx", k, number(r.dx.data + k * bytes_of(o.storage), o.storage), dx,
                     unit * (1 + fabsl(dx)) * 4);
        } while (next_of_group(l, i));
        memcpy(i, begin, sizeof i);
    } while (next_group(l, i));
    for (ptrdiff_t j = 0; j < weights; j++) {
        const long double allowed = o.storage == F64 ? 1e-9L : 1e-4L;
        check_close("dweight", j, ((double *)r.dweight.data)[j], dw[j],
                    allowed * (1 + fabs(dw[j])));
        check_close("dbias", j, ((double *)r.dbias.data)[j], db[j],
                    allowed * (1 + fabs(db[j])));
    }
    Operand *all[] = {&q.x, &q.y, &q.mean, &q.var, &q.rstd, &q.weight, &q.bias, &q.residual,
                      &r.dx, &r.dy, &r.dweight, &r.dbias};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]->data);
    free(x), free(e), free(w), free(b), free(statistics), free(dw), free(db);
}
int main(int arguments, char **argument) {
    (void)argument;
    check_sums(0.0, 0.25), check_sums(3.0, 3.0), check_sums(100.0, 99.5);
    for (ptrdiff_t rows = 1; rows < 21; rows += 4)
        for (ptrdiff_t width = 1; width <= 40; width += 3)
            check_columns(rows, width, 0), check_columns(rows, width, 1);
    for (ptrdiff_t n = 1; n < MOST; n += 37) check_merge(n, 0), check_merge(n, n / 3);
    check_storage();
    for (int activation = RELU; activation <= GELU_TANH; activation++)
        check_slopes(activation, 7.0), check_slopes(activation, 60.0);
    for (size_t k = 0; k < sizeof CASES / sizeof *CASES; k++) {
        const Layout *l = &LAYOUTS[CASES[k].layout];
        if (arguments == 1 || room_of(l, l->x) <= 5000) check_pass(&CASES[k]);
    }
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
