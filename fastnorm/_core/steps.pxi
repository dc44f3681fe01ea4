# The step: one run, or one row of columns, from x to y.

cdef struct Scratch:
    Arena arena
    double* part                # a block's moments
    double* columns             # moments of columns, before neighbours are merged
    double* piece               # a piece's moments
    double* whole               # an item's moments
    double* sums                # three rows
    double* lanes
    uint8_t* again
    char* scale
    char* tile
    char* extra
    char* third
    Py_ssize_t tile_size        # bytes of each of the three
    float* rows                 # two bundles of what was converted
    Py_ssize_t rows_size        # bytes of both
    char* together              # a bundle of groups whose planes are copied together
    Py_ssize_t together_size
    float* ready                # the run that is to be stepped, where it was converted before

cdef inline void activate(double* t, Py_ssize_t n, Activation activation) noexcept nogil:
    if activation == RELU:
        fn_relu_double(t, n)
    elif activation == SILU:
        fn_silu_double(t, n)
    elif activation == GELU:
        fn_gelu_double(t, n)
    elif activation == GELU_TANH:
        fn_gelu_tanh_double(t, n)
    elif activation == TANH:
        fn_tanh_double(t, n)

cdef inline bint leaves_range(const real* x, Py_ssize_t n, const real* hi, const real* r, bint columns) noexcept nogil:
    """Whether (x - hi) r is beyond what its type holds, though the scale is not.

    Only of numbers that the statistics are not of: left out by a mask, or where those were given.
    A weight may bring the product back.
    """
    cdef Py_ssize_t i
    cdef double largest = FLT_MAX if real is float else DBL_MAX
    cdef bint found = False
    for i in range(n):
        found |= fabs((<double>x[i] - hi[i if columns else 0]) * r[i if columns else 0]) >= largest
    return found

cdef inline void step_wide(Pass* q, Scale* s, Py_ssize_t k, bint beyond, const real* x, real* y, const real* w,
                           bint wv, const real* b, bint bv, Py_ssize_t n) noexcept nogil:
    """What the computing type cannot hold, in double: rare."""
    cdef Py_ssize_t i, j
    cdef double v, weight, unit
    for i in range(n):
        j = i if q.columns else k
        if s.wide[j] or (beyond and not isfinite(y[i])):
            unit = 1.0
            if s.any_wide:
                unit = s.unit[j]        # else neither filled in, nor the others for each neighbour
            elif real is float and q.columns:
                j = i // q.neighbours
            weight = w[i if wv else 0] if w != NULL else 1.0
            v = (<double>x[i] * unit - s.mean[j]) - s.rest[j]
            if isfinite(v * s.rstd[j]):
                v = v * s.rstd[j] * weight
            else:
                v = v * (s.rstd[j] * weight)
            y[i] = <real>(v + (b[i if bv else 0] if b != NULL else 0.0))

cdef inline void step(Pass* q, Scale* s, Py_ssize_t k, const char* x, char* y, const char* residual,
                      const char* weight, const char* bias, Py_ssize_t n, Scratch* h, real* kind) noexcept nogil:
    """One run of group k, or one row of columns, of at most BLOCK elements, from x to y.

    Straight from memory to memory where it can be; through tiles in L1 where a format is converted
    or y written past the caches.
    """
    cdef Storage storage = source_of(q).storage
    cdef real* tile = <real*>h.tile
    cdef real* extra = <real*>h.extra
    cdef real* third = <real*>h.third
    cdef const real* source = <const real*>x
    cdef const real* e = <const real*>residual
    cdef const real* w = <const real*>weight
    cdef const real* b = <const real*>bias
    cdef bint wv = weight != NULL and (q.weight.c if q.columns else q.weight.s) != 0
    cdef bint bv = bias != NULL and (q.bias.c if q.columns else q.bias.s) != 0
    cdef bint wide = s.any_wide if q.columns else s.wide[k]
    cdef bint beyond = False
    cdef bint direct = native(q.y.storage, kind) and not q.stream and not wide
    cdef real* target = <real*>y if direct else tile
    cdef Py_ssize_t offset = 0 if q.columns else k
    cdef const real* hi = <const real*>s.hi + offset
    cdef const real* r = <const real*>s.r + offset
    cdef const real* shift = <const real*>s.shift + offset
    cdef int activation = q.activation
    cdef Loop user = q.user
    cdef real[3] scale
    if FN_CHECKED:
        if h.ready == NULL:
            within(source_of(q), x, n * bytes_of(storage), "x, in a step")
        within(&q.y, y, n * bytes_of(q.y.storage), "y, in a step")
        within(&q.residual, residual, n * bytes_of(q.residual.storage), "residual, in a step")
        if weight != NULL:
            within(&q.weight, weight, (n if wv else 1) * <Py_ssize_t>sizeof(real), "weight, in a step")
        if bias != NULL:
            within(&q.bias, bias, (n if bv else 1) * <Py_ssize_t>sizeof(real), "bias, in a step")
        if not direct or real is double or (h.ready == NULL and not native(storage, kind)) or (residual != NULL and not native(q.residual.storage, kind)):
            fits(n * sizeof(real), h.tile_size, "a tile, in a step")
    if h.ready != NULL:
        source = <const real*>h.ready
    elif not native(storage, kind):
        load(x, storage, n, extra)
        source = extra
    if residual != NULL and not native(q.residual.storage, kind):
        load(residual, q.residual.storage, n, third)
        e = third
    if q.activation_first:
        w, b, wv, bv = NULL, NULL, False, False
    if (q.mask.data != NULL or (q.given and not q.foldable)) and w != NULL and not s.folded and leaves_range(source, n, hi, r, q.columns):
        wide = beyond = True
        target = tile
        fits(n * sizeof(real), h.tile_size, "the tile of what leaves the range")
    if real is float:
        if wide:
            if s.folded:
                fn_step_folded(source, target, n, hi, r, shift, NULL, q.columns, IDENTITY)
            else:
                fn_step_float(source, target, n, hi, r, shift, w, b, NULL, q.columns, wv, bv, IDENTITY)
            step_wide(q, s, k, beyond, source, target, w, wv, b, bv, n)
            if e != NULL or activation != IDENTITY:
                fn_step_folded(target, target, n, &NOTHING, &ONE, &MINUS_NOTHING, e, False, activation)
        elif (user != NULL and FN_HAS_FMA and not q.columns and e == NULL and source != target
              and (s.folded or (wv and (bv or b == NULL)))):
            # in one loop: a division of the user's then goes on beside the next step
            scale[0], scale[1], scale[2] = hi[0], r[0], shift[0]
            if user(source, target, n, scale, NULL if s.folded else w, NULL if s.folded else b):
                q.raised = True
            user = NULL
        elif s.folded:
            fn_step_folded(source, target, n, hi, r, shift, e, q.columns, activation)
        else:
            fn_step_float(source, target, n, hi, r, shift, w, b, e, q.columns, wv, bv, activation)
        if q.activation_first and (weight != NULL or bias != NULL):
            affine_after(q, target, n, weight, bias)
    else:
        # in several passes over a tile: x, y and the residual may be one array
        if e != NULL or activation != IDENTITY:
            target = tile
        fn_step_plain_double(source, target, n, hi, r, shift, w, b, q.columns, wv, bv)
        if wide:
            step_wide(q, s, k, beyond, source, target, w, wv, b, bv, n)
        if e != NULL:
            fn_add_double(target, e, target, n)
        activate(target, n, q.activation)
        if q.activation_first and (weight != NULL or bias != NULL):
            affine_after(q, target, n, weight, bias)
    if user != NULL and user(NULL, target, n, NULL, NULL, NULL):
        q.raised = True
    if <char*>target != y:
        deliver(target, n, y, q.y.storage, q.stream, h.extra)

cdef float NOTHING = 0.0, ONE = 1.0, MINUS_NOTHING = -0.0

cdef void affine_after(Pass* q, real* t, Py_ssize_t n, const char* weight, const char* bias) noexcept nogil:
    """The affine step of a norm that squashes first."""
    cdef real one = 1.0, zero = 0.0
    cdef const real* w = <const real*>weight if weight != NULL else &one
    cdef const real* b = <const real*>bias if bias != NULL else &zero
    cdef bint wv = weight != NULL and (q.weight.c if q.columns else q.weight.s) != 0
    cdef bint bv = bias != NULL and (q.bias.c if q.columns else q.bias.s) != 0
    if real is float:
        fn_affine_float(t, n, w, wv, b, bv)
    else:
        fn_affine_double(t, n, w, wv, b, bv)
