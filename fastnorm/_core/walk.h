/* Work items from their moments to their output, by one thread or by several. */

FN_INLINE void T(moments_of_split)(const Forward *q, const Item *it, ptrdiff_t k, double *into,
                                   Scratch *h) {
    ptrdiff_t first, last;
    split_at(q, k, &first, &last);
    if (q->columns) T(strided_moments)(q, it, first, last, into, h);
    else T(run_moments)(q, it, first, last, into, h);
}
FN_INLINE void T(output_of_split)(Forward *q, const Item *it, ptrdiff_t k, const T(Scales) *s,
                                  Scratch *h) {
    ptrdiff_t first, last;
    split_at(q, k, &first, &last);
    if (q->columns) T(strided_output)(q, it, s, first, last, h);
    else T(run_output)(q, it, s, first, last, h);
}
FN_INLINE void T(finalize_item)(const Forward *q, const Item *it, const double *m, T(Scales) *s) {
    if (q->fields) deliver_moments(q, it, m);
    else T(finalize)(q, it, m, s);
}
/* Whether a mask leaves out some number of an item's groups. */
FN_INLINE int T(leaves_out)(const Forward *q, const Item *it, const double *m) {
    int found = 0;
    for (ptrdiff_t g = 0; g < groups_of(q, it); g++)
        found |= m[g] < (double)(q->length * q->neighbours);
    return found;
}
static void T(walk_item)(Forward *q, ptrdiff_t index, Scratch *h) {
    const Item it = item_at(q, index);
    T(Scales) s;
    h->guarded = q->guarded;
    if (q->table) {
        s = T(table_at)(q->table, q->b, it.b);
        T(output_of_split)(q, &it, 0, &s, h);
        return;
    }
    s = T(scales_at)(h->scales, it.width);
    if (!q->given) {
        const ptrdiff_t n = groups_of(q, &it);
        T(moments_of_split)(q, &it, 0, h->whole, h);
        for (ptrdiff_t k = 1; k < q->splits; k++) {
            T(moments_of_split)(q, &it, k, h->split, h);
            merge(h->whole, h->split, n, n);
        }
        if (q->guarded) h->guarded = T(leaves_out)(q, &it, h->whole);
    }
    T(finalize_item)(q, &it, h->whole, &s);
    for (ptrdiff_t k = 0; k < q->splits && q->y.data; k++) T(output_of_split)(q, &it, k, &s, h);
}
#if !IS_FLOAT
/* Groups of short planes, which are copied together first. */
static void walk_gathered(Forward *q, ptrdiff_t first, ptrdiff_t last, Scratch *h) {
    const ptrdiff_t run = q->s * (ptrdiff_t)sizeof(double), size = q->p * run;
    Forward gathered = *q;
    gathered.x.a = 0, gathered.x.b = size, gathered.x.p = run;
    for (ptrdiff_t i = first; i < last; i++) {
        const Item it = item_at(q, i);
        fits(it.width * size, h->gathered_size, "the tile of planes copied together");
        for (ptrdiff_t p = 0; p < q->p; p++)
            for (ptrdiff_t k = 0; k < it.width; k++) {
                const char *x = run_of(&q->x, &it, k, (Run){p, 0, q->s});
                fn_fetch(x + q->x.p, run);
                memcpy(h->gathered + k * size + p * run, x, (size_t)run);
            }
        aim_at(&gathered.x, h->gathered, h->gathered_size);
        gathered.x.data -= it.b * size;
        walk_item_f64(&gathered, i, h);
    }
    if (gathered.raised) q->raised = 1;
}
#endif
static void T(walk)(Forward *q, ptrdiff_t first, ptrdiff_t last, Scratch *h) {
    if (q->walk == WALK_ROWS) T(walk_rows)(q, first, last, h);
#if IS_FLOAT
    else if (q->walk == WALK_PIPELINED) walk_pipelined(q, first, last, h);
#else
    else if (q->walk == WALK_GATHERED) walk_gathered(q, first, last, h);
#endif
    else
        for (ptrdiff_t i = first; i < last; i++) T(walk_item)(q, i, h);
    fn_stream_fence();
    fn_check_store_fence();
}

/* ---- threads ---- */

typedef struct {
    Forward *q;
    Scratch *h; /* of each thread */
    ptrdiff_t turns;
    double *parts;     /* the moments of each split of each item */
    T(Scales) *scales; /* of each item */
} T(Job);

/* Items of a turn. */
static void T(walk_turn)(void *work, ptrdiff_t turn, int thread) {
    T(Job) *w = work;
    const ptrdiff_t n = w->q->items;
    T(walk)(w->q, n * turn / w->turns, n * (turn + 1) / w->turns, w->h + thread);
}
/* Splits of a turn, of all items: their moments. */
static void T(moments_turn)(void *work, ptrdiff_t turn, int thread) {
    T(Job) *w = work;
    const ptrdiff_t splits = w->q->splits, n = w->q->items * splits;
    for (ptrdiff_t i = n * turn / w->turns; i < n * (turn + 1) / w->turns; i++) {
        const Item it = item_at(w->q, i / splits);
        T(moments_of_split)(w->q, &it, i % splits, w->parts + i * FIELDS * w->q->width,
                            w->h + thread);
    }
}
/* Their output.  The last read are the first written: what is still in cache is read from there. */
static void T(output_turn)(void *work, ptrdiff_t turn, int thread) {
    T(Job) *w = work;
    const ptrdiff_t splits = w->q->splits, n = w->q->items * splits;
    for (ptrdiff_t i = n * turn / w->turns; i < n * (turn + 1) / w->turns; i++) {
        const Item it = item_at(w->q, i / splits);
        T(output_of_split)(w->q, &it, i % splits, &w->scales[i / splits], w->h + thread);
    }
    fn_stream_fence();
    fn_check_store_fence();
}
/* Few large groups: all threads take splits of each; the merge is in the splits' order. */
static int T(share_splits)(T(Job) *w) {
    Forward *q = w->q;
    const ptrdiff_t total = q->items * q->splits, width = q->width;
    char *memory = NULL;
    Arena m;
    count_pieces(&m);
    for (int counted = 0; counted < 2; counted++) {
        w->parts = take(&m, total * FIELDS * width * (ptrdiff_t)sizeof(double));
        memory = take(&m, q->items * SCALE_BYTES * width);
        w->scales = take(&m, q->items * (ptrdiff_t)sizeof(T(Scales)));
        if (!counted && !open_arena(&m)) return 1;
    }
    w->turns = least(total, TURNS_PER_THREAD * q->threads);
    if (!q->given) share_out(w->turns, q->threads, (Sharing){0, q->small}, T(moments_turn), w);
    for (ptrdiff_t i = 0; i < q->items; i++) {
        const Item it = item_at(q, i);
        const ptrdiff_t n = groups_of(q, &it);
        double *whole = w->parts + i * q->splits * FIELDS * width;
        for (ptrdiff_t k = 1; k < q->splits && !q->given; k++)
            merge(whole, whole + k * FIELDS * width, n, n);
        w->scales[i] = T(scales_at)(memory + i * SCALE_BYTES * width, it.width);
        T(finalize_item)(q, &it, whole, &w->scales[i]);
    }
    if (q->y.data) share_out(w->turns, q->threads, (Sharing){1, q->small}, T(output_turn), w);
    close_arena(&m);
    return 0;
}
static int T(run_items)(Forward *q) {
    T(Job) w = {q, NULL, 0, NULL, NULL};
    int failed = 0;
    if (q->threads == 1) {
        char room[ON_STACK];
        Scratch one;
        count_pieces(&one.arena);
        lay_out(q, &one);
        if (!open_on_stack(&one.arena, room)) return 1;
        lay_out(q, &one);
        T(walk)(q, 0, q->items, &one);
        close_scratch(&one, 1);
        return 0;
    }
    w.h = malloc((size_t)q->threads * sizeof(Scratch));
    if (!w.h || !open_scratch(q, w.h, q->threads)) {
        free(w.h);
        return 1;
    }
    w.turns = least(q->items, TURNS_PER_THREAD * q->threads);
    if (q->split_items) failed = T(share_splits)(&w);
    else share_out(w.turns, q->threads, (Sharing){0, q->small}, T(walk_turn), &w);
    close_scratch(w.h, q->threads);
    free(w.h);
    return failed;
}
static int T(run_forward)(Forward *q) {
    const ptrdiff_t size = q->tabulated ? q->b * SCALE_BYTES + 8 : 0;
    Arena m;
    count_pieces(&m);
    q->table = NULL;
    if (!q->tabulated) return T(run_items)(q);
    take(&m, size);
    if (!open_arena(&m)) return 1;
    /* scales that many planes share, once for all: one costs as much as normalising 50 numbers */
    char *table = take(&m, size);
    T(Scales) s = T(scales_at)(table, q->b);
    const Item all = {0, 0, 0, q->b};
    T(finalize_item)(q, &all, NULL, &s);
    s.out_of_range[q->b] = (uint8_t)s.any_out_of_range;
    s.out_of_range[q->b + 1] = (uint8_t)s.folded;
    q->table = table;
    const int failed = T(run_items)(q);
    close_arena(&m);
    return failed;
}
