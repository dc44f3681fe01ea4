# Items shared out among threads, and the door through which a pass comes.

# ---- threads ---------------------------------------------------------------------------------

cdef inline void piece_of(Pass* q, Py_ssize_t piece, Py_ssize_t* first, Py_ssize_t* last) noexcept nogil:
    cdef Py_ssize_t span = q.block * PIECE
    if q.columns:
        span = max(q.block, PIECE_ROWS - PIECE_ROWS % q.block)
    first[0] = piece * span
    last[0] = min(first[0] + span, q.length)

cdef inline Py_ssize_t pieces_of(Pass* q) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, 0, &first, &last)
    return max(1, (q.length + last - 1) // max(last, 1))

cdef inline bint scratch_for(Pass* q, Scratch* h) noexcept nogil:
    cdef Py_ssize_t width = q.width if q.columns else BUNDLE
    cdef Py_ssize_t row = width * sizeof(double), tile = 0, lanes = 0, rows = 0
    # tiles only where something goes through them
    if q.columns:
        tile = q.width * q.block * 8
    else:
        tile = (min(<Py_ssize_t>BLOCK, q.length) + 15) // 8 * 64  # a line more: lined_up
        lanes = width * 2 * LANES * sizeof(double)
        if q.x.storage < F32:
            rows = 4 * BLOCK * sizeof(float)
    h.memory = <char*>malloc((4 * FIELDS + 4) * row + SCALE_BYTES * width + lanes + 3 * tile + rows + 64)
    if h.memory == NULL:
        return False
    h.tile = h.memory + (64 - <size_t>h.memory % 64)
    h.extra = h.tile + tile
    h.third = h.extra + tile
    h.rows = <float*>(h.third + tile)
    h.ready = NULL
    h.lanes = <double*>(<char*>h.rows + rows)
    h.part = <double*>(<char*>h.lanes + lanes)
    h.columns = h.part + FIELDS * width
    h.piece = h.columns + FIELDS * width
    h.whole = h.piece + FIELDS * width
    h.sums = h.whole + FIELDS * width
    h.again = <uint8_t*>(h.sums + 3 * width)
    h.scale = <char*>(h.sums + 4 * width)
    return True

cdef inline void piece_moments(Pass* q, Item it, Py_ssize_t piece, double* into, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, piece, &first, &last)
    if q.columns:
        columns_moments(q, it, first, last, into, h, kind)
    else:
        runs_moments(q, it, first, last, into, h, kind)

cdef inline void piece_step(Pass* q, Item it, Py_ssize_t piece, Scale* s, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t first, last
    piece_of(q, piece, &first, &last)
    if q.columns:
        columns_step(q, it, s, first, last, h, kind)
    else:
        runs_step(q, it, s, first, last, h, kind)

cdef inline Scale table_at(Pass* q, Py_ssize_t b) noexcept nogil:
    """The scales of groups b, b + 1 ... in the table of all."""
    cdef Scale s = scale_at(q.table, q.b)
    s.any_wide, s.folded = s.wide[q.b], s.wide[q.b + 1]
    s.mean += b
    s.rest += b
    s.rstd += b
    s.unit += b
    s.wide += b
    s.hi += b * q.real_size
    s.r += b * q.real_size
    s.shift += b * q.real_size
    return s

cdef void one_item(Pass* q, Py_ssize_t i, Scratch* h, real* kind) noexcept nogil:
    """From its moments to its output."""
    cdef Item it = item_at(q, i)
    cdef Scale s
    cdef Py_ssize_t piece, groups
    if q.table != NULL:
        s = table_at(q, it.b)
        piece_step(q, it, 0, &s, h, kind)
        return
    s = scale_at(h.scale, it.width)
    if not q.given:
        groups = groups_of(q, it)
        piece_moments(q, it, 0, h.whole, h, kind)
        for piece in range(1, q.pieces):
            piece_moments(q, it, piece, h.piece, h, kind)
            fn_merge(h.whole, h.piece, groups, groups)
    finish(q, it, h.whole, &s, kind)
    if q.y.data != NULL:
        for piece in range(q.pieces):
            piece_step(q, it, piece, &s, h, kind)

cdef inline bint gathers(Pass* q, real* kind) noexcept nogil:
    """Whether planes of doubles are so short that each group is copied together first.

    They are read three times, and where they lie a power of two apart they fall into a few sets of the
    caches, which lose them in between.
    """
    return (real is double and not q.given and not q.columns and q.p > 1 and q.pieces == 1 and q.y.data != NULL
            and q.x.storage == F64 and q.x.s == sizeof(double) and q.x.p != q.s * <Py_ssize_t>sizeof(double)
            and q.s * <Py_ssize_t>sizeof(double) < NEARBY and q.mask.data == NULL and q.total.data == NULL)

cdef int gathered_items(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    cdef Pass near = q[0]
    cdef Py_ssize_t i, k, p, run = q.s * sizeof(double), size = q.p * run
    cdef char* memory = <char*>malloc(q.width * size + 64)
    cdef char* together = memory + (64 - <size_t>memory % 64)
    cdef char* x
    cdef Item it
    if memory == NULL:
        return 1
    near.x.a, near.x.b, near.x.p = 0, size, run
    # from half of the last cache on y would push out what is still to be read: 820 to 540 us for 16 MB
    near.past = q.a * q.b * size >= stream_above // 2
    for i in range(first, last):
        it = item_at(q, i)
        for p in range(q.p):
            for k in range(it.width):
                x = at(&q.x, it.a, it.b + k) + p * q.x.p
                fn_fetch(x + q.x.p, run)
                memcpy(together + k * size + p * run, x, run)
        near.x.data = together - it.b * size
        one_item(&near, i, h, kind)
    free(memory)
    return 0

cdef int whole_items(Pass* q, Py_ssize_t first, Py_ssize_t last, real* kind) noexcept nogil:
    """Items [first, last), each from its moments to its output before the next."""
    cdef Scratch h
    cdef Py_ssize_t i
    cdef int failed = 0
    if not scratch_for(q, &h):
        return 1
    if plain_rows(q):
        norm_rows(q, first, last, &h, kind)
    elif gathers(q, kind):
        failed = gathered_items(q, first, last, &h, kind)
    elif real is float and flows(q):
        flow(q, first, last, &h, kind)
    else:
        for i in range(first, last):
            one_item(q, i, &h, kind)
    fn_stream_fence()
    free(h.memory)
    return failed

cdef int some_moments(Pass* q, Py_ssize_t first, Py_ssize_t last, double* parts, real* kind) noexcept nogil:
    """Pieces [first, last) of all items' pieces: their moments into `parts`."""
    cdef Scratch h
    cdef Py_ssize_t i
    if not scratch_for(q, &h):
        return 1
    for i in range(first, last):
        piece_moments(q, item_at(q, i // q.pieces), i % q.pieces, parts + i * FIELDS * q.width, &h, kind)
    free(h.memory)
    return 0

cdef int some_steps(Pass* q, Py_ssize_t first, Py_ssize_t last, Scale* scales, real* kind) noexcept nogil:
    cdef Scratch h
    cdef Py_ssize_t i
    if not scratch_for(q, &h):
        return 1
    for i in range(first, last):
        piece_step(q, item_at(q, i // q.pieces), i % q.pieces, &scales[i // q.pieces], &h, kind)
    fn_stream_fence()
    free(h.memory)
    return 0

cdef int shared_items(Pass* q, real* kind) noexcept nogil:
    """Few large groups: all threads take pieces of each; the merge is in the pieces' order."""
    cdef Py_ssize_t i, piece, groups, row = q.width * sizeof(double), total = q.items * q.pieces
    cdef Py_ssize_t turn, turns = min(total, 8 * q.threads)
    cdef int failed = 0
    cdef Item it
    cdef double* parts = <double*>malloc(total * FIELDS * row)
    cdef double* whole
    cdef char* scale_memory = <char*>malloc(q.items * SCALE_BYTES * q.width)
    cdef Scale* scales = <Scale*>malloc(q.items * sizeof(Scale))
    if parts == NULL or scale_memory == NULL or scales == NULL:
        free(parts)
        free(scale_memory)
        free(scales)
        return 1
    if not q.given:
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            failed |= some_moments(q, total * turn // turns, total * (turn + 1) // turns, parts, kind)
    if not failed:
        for i in range(q.items):
            it = item_at(q, i)
            whole = parts + i * q.pieces * FIELDS * q.width
            groups = groups_of(q, it)
            if not q.given:
                for piece in range(1, q.pieces):
                    fn_merge(whole, whole + piece * FIELDS * q.width, groups, groups)
            scales[i] = scale_at(scale_memory + i * SCALE_BYTES * q.width, it.width)
            finish(q, it, whole, &scales[i], kind)
    if not failed and q.y.data != NULL:
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            # the last read are the first written: what is still in cache is read from there
            failed |= some_steps(q, total - total * (turn + 1) // turns, total - total * turn // turns, scales, kind)
    free(parts)
    free(scale_memory)
    free(scales)
    return failed

cdef int tabulate(Pass* q, real* kind) noexcept nogil:
    """Scales that many planes share, once for all: one costs as much as normalising 50 numbers."""
    cdef Scale s
    cdef Item it
    q.real_size = sizeof(real)
    q.table = <char*>malloc(q.b * SCALE_BYTES + 8)
    if q.table == NULL:
        return 1
    s = scale_at(q.table, q.b)
    it.a = it.b = it.c = 0
    it.width = q.b
    finish(q, it, NULL, &s, kind)
    s.wide[q.b], s.wide[q.b + 1] = s.any_wide, s.folded
    return 0

cdef int run(Pass* q, real* kind) noexcept nogil:
    cdef int failed
    q.table = NULL
    if q.given and not q.columns and q.a > 1 and q.mean.a == 0 and q.var.a == 0 and q.pieces == 1:
        if tabulate(q, kind):
            return 1
    failed = run_items(q, kind)
    free(q.table)
    return failed

cdef int run_items(Pass* q, real* kind) noexcept nogil:
    cdef Py_ssize_t turn, turns
    cdef int failed = 0
    if q.threads == 1:
        return whole_items(q, 0, q.items, kind)
    if q.pieces > 1 and q.items < 4 * q.threads and q.items % q.threads != 0:
        return shared_items(q, kind)
    if q.near:
        turns = min(q.items, q.threads)
        for turn in prange(turns, num_threads=q.threads, schedule="static"):
            failed |= whole_items(q, q.items * turn // turns, q.items * (turn + 1) // turns, kind)
        return failed
    turns = min(q.items, 8 * q.threads)
    for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
        failed |= whole_items(q, q.items * turn // turns, q.items * (turn + 1) // turns, kind)
    return failed

# ---- the door --------------------------------------------------------------------------------

cdef inline Storage storage_of(int kind) noexcept:
    """Of what has one or two bytes; a mask is never loaded."""
    if kind == cnp.NPY_UINT8 or kind == cnp.NPY_BOOL:
        return U8
    if kind == cnp.NPY_INT8:
        return I8
    if kind == cnp.NPY_UINT16:
        return U16
    if kind == cnp.NPY_INT16:
        return I16
    return F16 if kind == cnp.NPY_FLOAT16 else BF16

cdef int operand(Operand* o, object array, tuple strides) except -1:
    cdef Py_ssize_t size
    o.data = NULL
    o.a = o.b = o.p = o.s = o.c = 0
    o.storage = F64
    if array is None:
        return 0
    o.data = <char*>cnp.PyArray_DATA(<cnp.ndarray>array)
    size = cnp.PyArray_ITEMSIZE(<cnp.ndarray>array)
    o.storage = F64 if size == 8 else F32 if size == 4 else storage_of(cnp.PyArray_TYPE(<cnp.ndarray>array))
    o.a, o.b, o.p, o.s, o.c = strides
    o.a *= size
    o.b *= size
    o.p *= size
    o.s *= size
    o.c *= size
    return 0

cdef int carry_out(Pass* q, int threads) noexcept:
    """Derive what follows from the dimensions, and run."""
    cdef float as_float = 0
    cdef double as_double = 0
    cdef int failed
    cdef Py_ssize_t groups, along, size = bytes_of(q.x.storage)
    cdef Py_ssize_t total = q.a * q.b * q.p * q.s * q.c * size
    q.length = q.p * q.s
    if q.columns:
        groups = q.c // q.neighbours
        q.chunks = 1 if q.c <= ABREAST else max(1, min(groups, (q.c + COLUMNS - 1) // COLUMNS))
        q.width = (groups + q.chunks - 1) // q.chunks * q.neighbours
        q.chunks = (q.c + q.width - 1) // q.width
        q.items = q.a * q.b * q.chunks
        q.block = min(max(SQUARE // q.width, 16), PIECE_ROWS)
        q.foldable = q.weight.p == q.weight.s == q.bias.p == q.bias.s == 0
    else:
        # one group after the other, or several that lie side by side
        q.width = BESIDE // max(q.length, 1)
        if q.width == 1 and q.length <= BLOCK:
            q.width = 2
        if q.p > 1 and q.s * size < NEARBY:
            q.width = max(q.width, PIECE * BLOCK // max(q.length, 1))
        q.width = max(1, min(q.width, q.b, <Py_ssize_t>BUNDLE))
        q.chunks = (q.b + q.width - 1) // q.width
        q.items = q.a * q.chunks
        q.block = BLOCK
        q.foldable = q.weight.s == q.bias.s == 0
    q.foldable = q.foldable and not q.activation_first
    q.pieces = pieces_of(q)
    q.threads = 1 if total < SERIAL or not FN_OPENMP else max(1, threads)
    q.near = total < q.threads * NEAR
    along = q.width if q.columns else q.s
    if q.columns and q.y.s == q.width * size:
        along *= q.s            # rows that follow one another
    # x and y go through the cache together.  From five eighths of it on y goes past it: rows of 25 MB
    # take 0.75 of the time, planes that lie apart 0.7, columns read in two sweeps 0.7.  Of a sum and its
    # norm four arrays go through the caches.
    q.stream = (total if q.total.data == NULL else 4 * total) > stream_above // 8 * 5 and pays_to_stream(along, size)
    # a weight along the run, or one for all of it, and a bias only beside a weight of its kind
    q.brief = (q.x.storage == q.y.storage == BF16 and not q.columns and not q.stream and q.activation == IDENTITY and q.user == NULL
               and q.residual.data == NULL and q.mask.data == NULL and q.total.data == NULL and q.y.data != NULL
               and (q.p == 1 or q.x.p == q.s * size)
               and (q.foldable or (q.weight.s != 0 and (q.bias.data == NULL or q.bias.s != 0))))
    q.past = (q.user == NULL and q.x.storage == q.y.storage and q.x.storage >= F32 and q.mask.data == NULL
              and (q.residual.data == NULL or q.residual.storage == q.x.storage)
              and (q.total.data == NULL or q.addend.storage == q.x.storage))
    q.straight = q.past and not q.stream
    q.past = q.past and q.stream and q.x.storage == F32 and q.foldable
    if plain_rows(q):
        q.width, q.chunks, q.items = 1, q.b, q.a * q.b
    if total < BRIEF:
        return run(q, &as_double) if q.x.storage == F64 else run(q, &as_float)
    with nogil:
        failed = run(q, &as_double) if q.x.storage == F64 else run(q, &as_float)
    return failed

def has_threads():
    """Whether these kernels were built with OpenMP."""
    return bool(FN_OPENMP)

def multiply_add():
    """How a product is added to (numbers.h): "fused", by way of "extended" precision, or "plain"."""
    return "fused" if FN_HAS_FMA else "extended" if FN_HAS_EXTENDED else "plain"

def address_of(cnp.ndarray array):
    """Where the first element of an array lies: `array.ctypes.data` in a fiftieth of the time."""
    return <size_t>cnp.PyArray_DATA(array)

def run_pass(layout, x, y, mean, var, rstd, *, weight=None, bias=None, mask=None, residual=None,
              addend=None, total=None, bint centred=True, bint given=False, Scaling scaling=RSTD,
              double eps=0.0, Activation activation=IDENTITY, Py_ssize_t user=0, bint activation_first=False, int threads=1,
              bytes key=None, tuple statistics=()):
    """One pass of `layout` over x into y (None: statistics alone).

    Fills mean, var and rstd, or reads the first two where `given`.  With a key, the pass is kept as a
    plan (plans.pxi); `statistics` is then the shape in which mean and rstd are returned.  Returns
    whether the user's activation raised.
    """
    cdef Pass q
    cdef Plan plan
    cdef int failed
    cdef dict strides = layout.strides
    q.a, q.b, q.p, q.s, q.c = layout.dims
    q.neighbours = layout.neighbours
    q.columns = layout.columns
    q.centred, q.given, q.scaling, q.eps, q.fields = centred, given, scaling, eps, 0
    q.activation, q.user, q.activation_first = activation, <Loop>user, activation_first
    q.raised = False
    operand(&q.x, x, strides["x"])
    operand(&q.y, y, strides.get("y"))
    operand(&q.mean, mean, strides["stats"])
    operand(&q.var, var, strides["stats"])
    operand(&q.rstd, rstd, strides["stats"])
    operand(&q.weight, weight, strides.get("weight"))
    operand(&q.bias, bias, strides.get("bias"))
    operand(&q.mask, mask, strides.get("mask"))
    operand(&q.residual, residual, strides.get("residual"))
    operand(&q.addend, addend, strides.get("addend"))
    operand(&q.total, total, strides.get("total"))

    failed = carry_out(&q, threads)
    if failed:
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    if key is not None and not q.raised:
        plan = Plan()
        plan.forward = q
        keep(plan, key, statistics)
    return q.raised
