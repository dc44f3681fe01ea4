# Groups that are lists of contiguous runs: their moments, their steps, and bundles of short ones.

cdef struct Run:                # elements [first, first + n) of a group that lie in one plane
    Py_ssize_t p, s, n

cdef inline Run run_at(Pass* q, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Run r
    r.p, r.s = 0, first
    if first >= q.s:
        r.p = first // q.s
        r.s = first - r.p * q.s
    r.n = min(last - first, q.s - r.s)
    return r

cdef const real* fetch(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, Scratch* h, Py_ssize_t* count, real* kind) noexcept nogil:
    """Elements [first, last) of a group side by side, as numbers: in place where they lie so."""
    cdef Py_ssize_t i, k = 0, f = first, size
    cdef Run r = run_at(q, first, last)
    cdef char* x = at(&q.x, it.a, it.b)
    cdef real* tile = <real*>h.tile
    cdef real* extra = <real*>h.extra
    cdef const uint8_t* mask
    cdef const real* source
    size = bytes_of(q.x.storage)
    if native(q.x.storage, kind) and q.mask.data == NULL and q.total.data == NULL:
        if r.n == last - first or q.x.p == q.s * size:
            count[0] = last - first
            within(&q.x, x + r.p * q.x.p + r.s * size, (last - first) * size, "x, of a block in place")
            return <const real*>(x + r.p * q.x.p + r.s * size)
    fits((last - first) * sizeof(real), h.tile_size, "the tile of a block")
    while f < last:
        r = run_at(q, f, last)
        fn_fetch(x + (r.p + 4) * q.x.p + r.s * size, r.n * size)  # planes may lie apart
        within(&q.x, x + r.p * q.x.p + r.s * size, r.n * size, "x, of a block")
        load(x + r.p * q.x.p + r.s * size, q.x.storage, r.n, tile + k)
        if q.total.data != NULL:
            # x + residual, rounded to the type of x: what the norm is of, and the second result
            within(&q.addend, at(&q.addend, it.a, it.b) + r.p * q.addend.p + r.s * bytes_of(q.addend.storage), r.n * bytes_of(q.addend.storage), "residual, of a sum")
            within(&q.total, at(&q.total, it.a, it.b) + r.p * q.total.p + r.s * size, r.n * size, "a sum")
            load(at(&q.addend, it.a, it.b) + r.p * q.addend.p + r.s * bytes_of(q.addend.storage), q.addend.storage, r.n, extra)
            for i in range(r.n):
                tile[k + i] += extra[i]
            store(tile + k, r.n, at(&q.total, it.a, it.b) + r.p * q.total.p + r.s * size, q.total.storage)
            load(at(&q.total, it.a, it.b) + r.p * q.total.p + r.s * size, q.total.storage, r.n, tile + k)
        if q.mask.data == NULL:
            k += r.n
        else:
            mask = <const uint8_t*>(at(&q.mask, it.a, it.b) + r.p * q.mask.p + r.s * q.mask.s)
            all_within(&q.mask, <const char*>mask, q.mask.s, r.n, 1, "where, of a block")
            source = tile + k
            for i in range(r.n):
                if mask[i * q.mask.s]:
                    tile[k] = source[i]
                    k += 1
        f += r.n
    count[0] = k
    return tile

cdef inline void bundle_sums(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double pivot, double* sums, double* lanes) noexcept nogil:
    """Sums of x - pivot and of its square, over elements [first, last) of each group of a bundle."""
    cdef Run r = run_at(q, first, last)
    cdef Py_ssize_t k, f = first, width = it.width, ahead
    cdef char* x = at(&q.x, it.a, it.b)
    cdef const float* source
    if r.n == last - first or q.x.p == q.s * q.x.s:
        x += r.p * q.x.p + r.s * q.x.s
        all_within(&q.x, x, q.x.b, width, (last - first) * q.x.s, "x, of a bundle's sums")
        for k in range(width):
            if q.brief and pivot == 0.0:
                fn_sums_bf16(<const uint16_t*>(x + k * q.x.b), last - first, AHEAD, &sums[k], &sums[width + k])
            elif q.brief:
                fn_sums_about_bf16(<const uint16_t*>(x + k * q.x.b), last - first, 0, pivot, &sums[k], &sums[width + k])
            elif pivot == 0.0:
                fn_sums(<const float*>(x + k * q.x.b), last - first, AHEAD, &sums[k], &sums[width + k])
            else:
                fn_sums_about(<const float*>(x + k * q.x.b), last - first, 0, pivot, &sums[k], &sums[width + k])
        return
    memset(lanes, 0, width * 2 * LANES * sizeof(double))
    ahead = q.x.p if width == 1 else AHEAD
    while f < last:
        r = run_at(q, f, last)
        for k in range(width):
            source = <const float*>(x + k * q.x.b + r.p * q.x.p + r.s * q.x.s)
            within(&q.x, <const char*>source, r.n * q.x.s, "x, of a plane's sums")
            if pivot == 0.0:
                fn_gather(source, r.n, ahead, lanes + k * 2 * LANES, lanes + k * 2 * LANES + LANES)
            else:
                fn_gather_about(source, r.n, 0, pivot, lanes + k * 2 * LANES, lanes + k * 2 * LANES + LANES)
        f += r.n
    for k in range(width):
        sums[k] = fn_fold(lanes + k * 2 * LANES)
        sums[width + k] = fn_fold(lanes + k * 2 * LANES + LANES)

cdef void runs_block(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, Scratch* h, real* kind) noexcept nogil:
    """Moments of elements [first, last) of each group of a bundle."""
    cdef Py_ssize_t k, count, width = it.width
    cdef double[2] two
    cdef double pivot
    cdef const real* x
    if real is float and (q.x.storage == F32 or q.brief) and q.mask.data == NULL and q.total.data == NULL and q.centred:
        for k in range(width):
            into[k] = last - first
        bundle_sums(q, it, first, last, 0.0, h.sums, h.lanes)
        if first_moments(q, width, h.sums, h.sums + width, into, h.again):
            for k in range(width):
                if h.again[k] and isfinite(into[width + k]):
                    pivot = pivot_of(into[width + k], into[3 * width + k] / into[k], q.fields != 0)
                    bundle_sums(q, group_at(it, k), first, last, pivot, two, h.lanes)
                    fn_moments_of_sums(1, &two[0], &two[1], pivot, into + k, width, h.again + k)
        return
    for k in range(width):
        x = fetch(q, group_at(it, k), first, last, h, &count, kind)
        moments_of(x, count, q.centred, into + k, width, two, q.fields != 0)

cdef void runs_moments(Pass* q, Item it, Py_ssize_t first, Py_ssize_t last, double* into, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t f = first + BLOCK
    runs_block(q, it, first, min(f, last), into, h, kind)
    while f < last:
        runs_block(q, it, f, min(f + BLOCK, last), h.part, h, kind)
        fn_merge(into, h.part, it.width, it.width)
        f += BLOCK

cdef inline bint fold_run(Scale* s, Py_ssize_t k, const char* weight, const char* bias, float* r, float* shift) noexcept nogil:
    """The affine step of a run taken into r and shift; False where a float can not hold the product."""
    cdef double w = (<const float*>weight)[0] if weight != NULL else 1.0
    cdef double rw = s.rstd[k] * w
    cdef double lo = (s.mean[k] - <double>(<float*>s.hi)[k]) + s.rest[k]
    if s.folded:
        r[0], shift[0] = (<float*>s.r)[k], (<float*>s.shift)[k]
        return True
    r[0] = <float>rw
    shift[0] = <float>((<double>(<const float*>bias)[0] if bias != NULL else 0.0) - lo * rw)
    return 7.9e-31 < fabs(rw) < 1.3e30 or rw == 0.0

cdef inline char* run_of(Operand* o, Item it, Py_ssize_t k, Run r) noexcept nogil:
    """Where a run of group k of a bundle begins in an operand that may not be there."""
    return NULL if o.data == NULL else at(o, it.a, it.b + k) + r.p * o.p + r.s * o.s

cdef inline bint brief_step(Pass* q, Scale* s, Py_ssize_t k, char* x, char* y, char* weight, char* bias, Py_ssize_t n) noexcept nogil:
    """A run of bfloat16, in one loop; False where a float cannot hold its scale."""
    cdef float r = (<float*>s.r)[k], shift = (<float*>s.shift)[k]
    if q.foldable and not fold_run(s, k, weight, bias, &r, &shift):
        return False
    if q.foldable:
        weight = bias = NULL
    fn_step_bf16(<const uint16_t*>x, <uint16_t*>y, n, (<float*>s.hi)[k], r, shift, <const float*>weight, <const float*>bias)
    return True

cdef inline void run_step(Pass* q, Item it, Scale* s, Py_ssize_t k, Run r, Scratch* h, real* kind) noexcept nogil:
    """One run of group k of a bundle."""
    cdef Operand* source = source_of(q)
    cdef char* x = at(source, it.a, it.b + k) + r.p * source.p + r.s * source.s
    cdef char* y = at(&q.y, it.a, it.b + k) + r.p * q.y.p + r.s * q.y.s
    cdef char* weight = run_of(&q.weight, it, k, r)
    cdef char* bias = run_of(&q.bias, it, k, r)
    cdef char* residual = run_of(&q.residual, it, k, r)
    cdef Scale folding
    cdef float rw, shift
    cdef Py_ssize_t ahead, over
    within(source, x, r.n * bytes_of(source.storage), "x, of a run")
    within(&q.y, y, r.n * bytes_of(q.y.storage), "y, of a run")
    within(&q.residual, residual, r.n * bytes_of(q.residual.storage), "residual, of a run")
    within(&q.weight, weight, (r.n if q.weight.s else 1) * bytes_of(q.weight.storage), "weight, of a run")
    within(&q.bias, bias, (r.n if q.bias.s else 1) * bytes_of(q.bias.storage), "bias, of a run")
    if real is float:
        if q.brief and not q.stream and not s.wide[k] and brief_step(q, s, k, x, y, weight, bias, r.n):
            return
        if q.past and not s.wide[k] and fold_run(s, k, weight, bias, &rw, &shift):
            ahead = AHEAD
            over = max(q.length * source.s - AWAITED, <Py_ssize_t>0)
            if not q.given and (r.p * q.s + r.s) * source.s >= over:
                ahead = source.b - over     # (the end of) this group lies in cache, the next one does not yet
            fn_step_past(<const float*>x, <float*>y, <const float*>residual, r.n, (<float*>s.hi)[k], rw, shift, ahead, q.activation)
            return
        if s.folded and not s.wide[k]:
            if q.straight:
                fn_step_folded(<const float*>x, <float*>y, r.n, <float*>s.hi + k, <float*>s.r + k, <float*>s.shift + k, <const float*>residual, False, q.activation)
                return
        elif q.foldable and not s.wide[k]:
            # the affine step goes into r and shift, where a float can hold the product
            if fold_run(s, k, weight, bias, &rw, &shift):
                if q.straight:
                    fn_step_folded(<const float*>x, <float*>y, r.n, <float*>s.hi + k, &rw, &shift, <const float*>residual, False, q.activation)
                    return
                folding.hi, folding.r, folding.shift = s.hi + k * sizeof(float), <char*>&rw, <char*>&shift
                folding.folded, folding.wide = True, s.wide + k
                step(q, &folding, 0, x, y, residual, NULL, NULL, r.n, h, kind)
                return
        elif q.straight and not s.wide[k] and not q.activation_first and not (q.given and weight != NULL):
            fn_step_float(<const float*>x, <float*>y, r.n, <float*>s.hi + k, <float*>s.r + k, <float*>s.shift + k,
                          <const float*>weight, <const float*>bias, <const float*>residual, False, q.weight.s != 0, q.bias.s != 0, q.activation)
            return
    step(q, s, k, x, y, residual, weight, bias, r.n, h, kind)

cdef inline Py_ssize_t stretch(Pass* q, Item it, Py_ssize_t k, Run r) noexcept nogil:
    """How much of a run is stepped at once: what is written past the caches then begins at a line."""
    cdef size_t y
    if not q.stream or q.past:
        return r.n if q.straight or q.past else min(r.n, <Py_ssize_t>BLOCK)
    y = <size_t>(at(&q.y, it.a, it.b + k) + r.p * q.y.p + r.s * q.y.s)
    return min(r.n, STREAMED + <Py_ssize_t>((0 - y) % 64) // bytes_of(q.y.storage))

cdef inline bint goes_past(Pass* q, Item it, Scale* s, Run r) noexcept nogil:
    """Whether a run of each group goes past the caches whole, however long it is."""
    cdef Py_ssize_t k
    cdef float rw, shift
    if not q.past or s.any_wide:
        return False
    for k in range(it.width):
        if not fold_run(s, k, run_of(&q.weight, it, k, r), run_of(&q.bias, it, k, r), &rw, &shift):
            return False
    return True

cdef inline void bundle_within(Pass* q, Operand* o, Item it, Run r) noexcept nogil:
    if o.data != NULL:
        all_within(o, run_of(o, it, 0, r), o.b, it.width, r.n * bytes_of(o.storage), "a run of each group of a bundle")

cdef void runs_step(Pass* q, Item it, Scale* s, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t f = first, k, size = sizeof(float), double_size = sizeof(double)
    cdef bint past, plain = q.straight and q.foldable and not s.any_wide and q.residual.data == NULL and q.activation == IDENTITY
    cdef Operand* source = source_of(q)
    cdef Run r
    while f < last:
        r = run_at(q, f, last)
        if FN_CHECKED:
            bundle_within(q, source, it, r)
            bundle_within(q, &q.y, it, r)
            bundle_within(q, &q.residual, it, r)
        if real is float and q.straight and s.folded and not s.any_wide:
            fn_step_planes(<const float*>(at(source, it.a, it.b) + r.p * source.p + r.s * source.s), source.b // size,
                           <float*>(at(&q.y, it.a, it.b) + r.p * q.y.p + r.s * q.y.s), q.y.b // size,
                           NULL if q.residual.data == NULL else <const float*>(at(&q.residual, it.a, it.b) + r.p * q.residual.p + r.s * q.residual.s),
                           q.residual.b // size, it.width, r.n, source.p if q.p > 1 and it.width > 1 else 0, <float*>s.hi, <float*>s.r, <float*>s.shift, q.activation)
            f += r.n
            continue
        if real is double and plain:
            fn_step_planes_double(<const double*>(at(source, it.a, it.b) + r.p * source.p + r.s * source.s), source.b // double_size,
                                  <double*>(at(&q.y, it.a, it.b) + r.p * q.y.p + r.s * q.y.s), q.y.b // double_size,
                                  it.width, r.n, source.p if q.p > 1 and it.width > 1 else 0, <double*>s.hi, <double*>s.r, <double*>s.shift,
                                  <const double*>run_of(&q.weight, it, 0, r), q.weight.b // double_size, <const double*>run_of(&q.bias, it, 0, r), q.bias.b // double_size, q.past)
            f += r.n
            continue
        past = real is float and goes_past(q, it, s, r)
        if real is double or s.any_wide or not (q.straight or past) or (q.given and not q.foldable):
            # by way of tiles, which hold a block
            r.n = min(stretch(q, it, 0, r), <Py_ssize_t>BLOCK)
        for k in range(it.width):
            if past:
                pass                # asks for what comes next on its own
            elif q.stream and q.given:
                fn_fetch(at(source, it.a, it.b + k) + r.p * source.p + r.s * source.s + AHEAD, r.n * source.s)
                if q.residual.data != NULL:
                    fn_fetch(at(&q.residual, it.a, it.b + k) + r.p * q.residual.p + r.s * q.residual.s + AHEAD, r.n * q.residual.s)
            elif not q.stream and q.p > 1 and it.width > 1:
                # planes that lie apart leave the prefetcher behind
                fn_fetch(at(source, it.a, it.b + k) + (r.p + 1) * source.p + r.s * source.s, r.n * source.s)
                fn_fetch(at(&q.y, it.a, it.b + k) + (r.p + 1) * q.y.p + r.s * q.y.s, r.n * q.y.s)
            elif q.stream and q.length * source.s <= AWAITED:
                # x lies in cache: the next group's is on its way while this one's result is written
                fn_fetch(at(source, it.a, it.b + k + 1) + r.p * source.p + r.s * source.s, r.n * source.s)
            run_step(q, it, s, k, r, h, kind)
        f += r.n

cdef inline bint flows(Pass* q) noexcept nogil:
    """Whether groups, not of doubles, are short, lie in one piece and are all taken."""
    return (not q.columns and not q.given and q.y.data != NULL and q.mask.data == NULL and q.length <= BLOCK
            and (q.x.storage == F32 or (q.x.storage < F32 and q.width * q.length <= 2 * BLOCK and q.total.data == NULL))
            and (q.total.data == NULL or (q.p == 1 and q.addend.storage == F32 and q.y.storage == F32))
            and (q.p == 1 or q.x.p == q.s * <Py_ssize_t>bytes_of(q.x.storage)))

cdef inline const float* flowing(Pass* q, Item it, Py_ssize_t k, float* rows) noexcept nogil:
    """Group k of a bundle: where it lies, or the floats that it was converted to."""
    if q.x.storage < F32:
        return rows + k * q.length
    return <const float*>at(source_of(q), it.a, it.b + k)

cdef inline void flow_in(Pass* q, Item it, Py_ssize_t k, Scratch* h, float* rows) noexcept nogil:
    """The sums of group k of a bundle, and x + residual where the norm is of that."""
    within(&q.x, at(&q.x, it.a, it.b + k), q.length * bytes_of(q.x.storage), "x, of a short group")
    if q.total.data != NULL:
        within(&q.addend, at(&q.addend, it.a, it.b + k), q.length * bytes_of(q.addend.storage), "residual, of a short group")
        within(&q.total, at(&q.total, it.a, it.b + k), q.length * bytes_of(q.total.storage), "the sum of a short group")
    elif q.x.storage < F32 and not q.brief:
        fits(((rows - h.rows) + (k + 1) * q.length) * sizeof(float), h.rows_size, "the tile of a bundle")
    if q.brief:
        if q.centred:
            fn_sums_bf16(<const uint16_t*>at(&q.x, it.a, it.b + k), q.length, AHEAD, &h.sums[k], &h.sums[BUNDLE + k])
        else:
            h.sums[BUNDLE + k] = fn_squares_bf16(<const uint16_t*>at(&q.x, it.a, it.b + k), q.length, AHEAD)
        return
    if q.x.storage < F32:
        load(at(&q.x, it.a, it.b + k), q.x.storage, q.length, rows + k * q.length)
    elif q.total.data != NULL:
        fn_add_float(<const float*>at(&q.x, it.a, it.b + k), <const float*>at(&q.addend, it.a, it.b + k),
                     <float*>at(&q.total, it.a, it.b + k), q.length)
    if q.centred:
        fn_sums(flowing(q, it, k, rows), q.length, AHEAD, &h.sums[k], &h.sums[BUNDLE + k])
    else:
        h.sums[BUNDLE + k] = fn_squares(flowing(q, it, k, rows), q.length, AHEAD)

cdef inline void bundle_moments(Pass* q, Item it, double* moments, Scratch* h, float* rows) noexcept nogil:
    """Moments of a bundle of short groups whose sums are in h.sums."""
    cdef Py_ssize_t k, width = it.width
    cdef double[2] two
    cdef double pivot
    for k in range(width):
        moments[k] = q.length
    if not q.centred:
        for k in range(width):
            moments[width + k] = moments[2 * width + k] = moments[4 * width + k] = 0.0
            moments[3 * width + k] = h.sums[BUNDLE + k]
    elif fn_moments_of_sums(width, h.sums, h.sums + BUNDLE, 0.0, moments, width, h.again):
        for k in range(width):
            if h.again[k] and isfinite(moments[width + k]):
                pivot = <float>moments[width + k]
                if q.brief:
                    fn_sums_about_bf16(<const uint16_t*>at(&q.x, it.a, it.b + k), q.length, 0, pivot, &two[0], &two[1])
                else:
                    fn_sums_about(flowing(q, it, k, rows), q.length, 0, pivot, &two[0], &two[1])
                fn_moments_of_sums(1, &two[0], &two[1], pivot, moments + k, width, h.again + k)

cdef void flow(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    """Bundles of short groups: the sums of one go on beside the steps of the one before.

    Memory is then read and written all the time, and square roots are taken for a bundle at once.
    """
    cdef Py_ssize_t i, k
    cdef Item now, then
    cdef Scale s = scale_at(h.scale, BUNDLE)
    cdef float* rows = h.rows
    cdef float* before = rows
    cdef Run r
    cdef Py_ssize_t rest
    then.width = now.width = 0
    for i in range(first, last + 1):
        if i < last:
            now = item_at(q, i)
        else:
            now.width = 0
        rows = h.rows + i % 2 * q.width * q.length
        for k in range(max(now.width, then.width)):
            if k < now.width:
                flow_in(q, now, k, h, rows)
            if k < then.width:
                for r.p in range(q.p):
                    r.s, r.n = 0, q.s
                    while r.n > 0:
                        rest = r.n
                        r.n = stretch(q, then, k, r)
                        if q.stream and now.width > 0:
                            # what is summed next is on its way while this is written
                            fn_fetch(at(&q.x, now.a, now.b + k + 1) + r.s * q.x.s, r.n * q.x.s)
                        if q.x.storage < F32 and not q.brief:
                            h.ready = before + k * q.length + r.p * q.s + r.s
                        run_step(q, then, &s, k, r, h, kind)
                        r.s += r.n
                        r.n = rest - r.n
        if now.width > 0:
            bundle_moments(q, now, h.whole, h, rows)
            finish(q, now, h.whole, &s, kind)
        then, before = now, rows
    h.ready = NULL

cdef inline bint plain_rows(Pass* q) noexcept nogil:
    """Whether groups are rows with nothing beside weights, not too short to take one by one."""
    if (q.columns or q.given or q.y.data == NULL or q.mask.data != NULL or q.p != 1 or q.length > BLOCK
            or (q.length < ALONE and q.a * q.b >= FEW_ROWS)
            or q.residual.data != NULL or q.activation != IDENTITY or q.user != NULL or q.activation_first):
        return False
    if not (q.foldable or (q.weight.s != 0 and q.weight.b == q.bias.b == 0 and (q.bias.data == NULL or q.bias.s != 0))):
        return False
    if q.total.data != NULL:
        return q.x.storage == q.y.storage == q.addend.storage == F32
    return q.x.storage == q.y.storage and (q.x.storage >= F32 or (q.brief and not q.stream)) and q.x.storage <= F64

cdef inline char* there(Operand* o, Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return NULL if o.data == NULL else at(o, a, b)

cdef inline const char* lined_up(const char* w, const char* y, Py_ssize_t size, char* memory) noexcept nogil:
    """A copy of w as far from the beginning of a cache line as y: a load that crosses one takes two."""
    cdef char* copy = memory + <size_t>y % 64
    if w == NULL:
        return NULL
    memcpy(copy, w, size)
    return copy

cdef inline void rows_within(Pass* q, Operand* o, Py_ssize_t a, Py_ssize_t b, Py_ssize_t n) noexcept nogil:
    if o.data != NULL:
        all_within(o, at(o, a, b), o.b, n, q.length * bytes_of(o.storage), "rows")

cdef void norm_rows(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    """Rows [first, last), each an item."""
    cdef fn_rows rows
    cdef Py_ssize_t i = first, a, b, n, size = q.length * sizeof(real)
    rows.x_step, rows.y_step, rows.e_step, rows.total_step = q.x.b, q.y.b, q.addend.b, q.total.b
    rows.w_step, rows.b_step, rows.stat_step = q.weight.b, q.bias.b, q.rstd.b
    rows.ahead, rows.eps, rows.norm, rows.stream, rows.tile = AHEAD, q.eps, q.scaling == NORM, q.stream, h.third
    while i < last:
        a = i // q.b
        b = i - a * q.b
        n = min(last - i, q.b - b)
        rows.x, rows.e, rows.y, rows.total = at(&q.x, a, b), there(&q.addend, a, b), at(&q.y, a, b), there(&q.total, a, b)
        rows.w, rows.b = there(&q.weight, a, b), there(&q.bias, a, b)
        rows.mean, rows.var, rows.rstd = <double*>there(&q.mean, a, b), <double*>there(&q.var, a, b), <double*>there(&q.rstd, a, b)
        if FN_CHECKED:
            rows_within(q, &q.x, a, b, n)
            rows_within(q, &q.y, a, b, n)
            rows_within(q, &q.addend, a, b, n)
            rows_within(q, &q.total, a, b, n)
            all_within(&q.weight, rows.w, q.weight.b, n, sizeof(real) if q.foldable else size, "weight, of rows")
            all_within(&q.bias, rows.b, q.bias.b, n, sizeof(real) if q.foldable else size, "bias, of rows")
            all_within(&q.rstd, <char*>rows.rstd, q.rstd.b, n, sizeof(double), "statistics of rows")
            fits(size + LINE, h.tile_size, "the tile of a row's weights")
            if q.total.data != NULL:
                fits(2 * size, h.tile_size, "the tile of two sums")
        if not q.foldable and n >= 8:
            rows.w = lined_up(rows.w, rows.y, size, h.tile)
            rows.b = lined_up(rows.b, rows.y, size, h.extra)
        if real is double:
            i += fn_norm_rows_double(&rows, n, q.length, not q.foldable, q.centred)
        elif q.brief:
            i += fn_norm_rows_bf16(&rows, n, q.length, not q.foldable, q.centred)
        else:
            i += fn_norm_rows_float(&rows, n, q.length, not q.foldable, q.centred)
        if i < last and i < (a + 1) * q.b:
            one_item(q, i, h, kind)     # what its type can not hold
            i += 1
