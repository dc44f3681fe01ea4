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

cdef void lay_out(Pass* q, Scratch* h, Arena* m, real* kind) noexcept nogil:
    """The pieces of a thread's scratch memory; tiles only where something goes through them."""
    cdef Py_ssize_t width = q.width if q.columns else BUNDLE
    cdef Py_ssize_t row = width * sizeof(double)
    if q.columns:
        h.tile_size = q.width * q.block * 8
    else:
        h.tile_size = min(<Py_ssize_t>BLOCK, q.length) * 8 + LINE    # a line more: lined_up
    h.rows_size = 4 * BLOCK * sizeof(float) if not q.columns and q.x.storage < F32 else 0
    h.together_size = q.width * q.length * sizeof(double) if gathers(q, kind) else 0
    h.tile = take(m, h.tile_size)
    h.extra = take(m, h.tile_size)
    h.third = take(m, h.tile_size)
    h.rows = <float*>take(m, h.rows_size)
    h.together = take(m, h.together_size)
    h.lanes = <double*>take(m, 0 if q.columns else 2 * LANES * row)
    h.part = <double*>take(m, FIELDS * row)
    h.columns = <double*>take(m, FIELDS * row)
    h.piece = <double*>take(m, FIELDS * row)
    h.whole = <double*>take(m, FIELDS * row)
    h.sums = <double*>take(m, 3 * row)
    h.again = <uint8_t*>take(m, width)
    h.scale = take(m, SCALE_BYTES * width)
    h.ready = NULL

cdef bint open_scratch(Pass* q, Scratch* h, int threads, real* kind) noexcept nogil:
    """Scratch memory for each of the threads, all of it before any result is written."""
    cdef int i
    for i in range(threads):
        count_pieces(&h[i].arena)
        lay_out(q, &h[i], &h[i].arena, kind)
        if not open_arena(&h[i].arena):
            close_scratch(h, i)
            return False
        lay_out(q, &h[i], &h[i].arena, kind)
    return True

cdef void close_scratch(Scratch* h, int threads) noexcept nogil:
    cdef int i
    for i in range(threads):
        close_arena(&h[i].arena)

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

cdef void gathered_items(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    cdef Pass near = q[0]
    cdef Py_ssize_t i, k, p, run = q.s * sizeof(double), size = q.p * run
    cdef char* x
    cdef Item it
    near.x.a, near.x.b, near.x.p = 0, size, run
    # from half of the last cache on y would push out what is still to be read: 820 to 540 us for 16 MB
    near.past = q.a * q.b * size >= stream_above // 2
    for i in range(first, last):
        it = item_at(q, i)
        fits(it.width * size, h.together_size, "the tile of planes copied together")
        for p in range(q.p):
            for k in range(it.width):
                x = at(&q.x, it.a, it.b + k) + p * q.x.p
                within(&q.x, x, run, "x, of planes copied together")
                fn_fetch(x + q.x.p, run)
                memcpy(h.together + k * size + p * run, x, run)
        aim_at(&near.x, h.together, h.together_size)
        near.x.data -= it.b * size
        one_item(&near, i, h, kind)
    if near.raised:
        q.raised = True

cdef void whole_items(Pass* q, Py_ssize_t first, Py_ssize_t last, Scratch* h, real* kind) noexcept nogil:
    """Items [first, last), each from its moments to its output before the next."""
    cdef Py_ssize_t i
    if plain_rows(q):
        norm_rows(q, first, last, h, kind)
    elif gathers(q, kind):
        gathered_items(q, first, last, h, kind)
    elif real is float and flows(q):
        flow(q, first, last, h, kind)
    else:
        for i in range(first, last):
            one_item(q, i, h, kind)
    fn_stream_fence()

cdef void some_moments(Pass* q, Py_ssize_t first, Py_ssize_t last, double* parts, Scratch* h, real* kind) noexcept nogil:
    """Pieces [first, last) of all items' pieces: their moments into `parts`."""
    cdef Py_ssize_t i
    for i in range(first, last):
        piece_moments(q, item_at(q, i // q.pieces), i % q.pieces, parts + i * FIELDS * q.width, h, kind)

cdef void some_steps(Pass* q, Py_ssize_t first, Py_ssize_t last, Scale* scales, Scratch* h, real* kind) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(first, last):
        piece_step(q, item_at(q, i // q.pieces), i % q.pieces, &scales[i // q.pieces], h, kind)
    fn_stream_fence()

cdef int shared_items(Pass* q, Scratch* h, real* kind) noexcept nogil:
    """Few large groups: all threads take pieces of each; the merge is in the pieces' order."""
    cdef Py_ssize_t i, piece, groups, row = q.width * sizeof(double), total = q.items * q.pieces
    cdef Py_ssize_t turn, turns = min(total, 8 * q.threads)
    cdef Item it
    cdef Arena m
    cdef double* parts
    cdef double* whole
    cdef char* scale_memory
    cdef Scale* scales
    count_pieces(&m)
    take(&m, total * FIELDS * row)
    take(&m, q.items * SCALE_BYTES * q.width)
    take(&m, q.items * sizeof(Scale))
    if not open_arena(&m):
        return 1
    parts = <double*>take(&m, total * FIELDS * row)
    scale_memory = take(&m, q.items * SCALE_BYTES * q.width)
    scales = <Scale*>take(&m, q.items * sizeof(Scale))
    if not q.given:
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            some_moments(q, total * turn // turns, total * (turn + 1) // turns, parts, h + threadid(), kind)
    for i in range(q.items):
        it = item_at(q, i)
        whole = parts + i * q.pieces * FIELDS * q.width
        groups = groups_of(q, it)
        if not q.given:
            for piece in range(1, q.pieces):
                fn_merge(whole, whole + piece * FIELDS * q.width, groups, groups)
        scales[i] = scale_at(scale_memory + i * SCALE_BYTES * q.width, it.width)
        finish(q, it, whole, &scales[i], kind)
    if q.y.data != NULL:
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            # the last read are the first written: what is still in cache is read from there
            some_steps(q, total - total * (turn + 1) // turns, total - total * turn // turns, scales, h + threadid(), kind)
            fn_check_store_fence()
    close_arena(&m)
    return 0

cdef void tabulate(Pass* q, real* kind) noexcept nogil:
    """Scales that many planes share, once for all: one costs as much as normalising 50 numbers."""
    cdef Scale s = scale_at(q.table, q.b)
    cdef Item it
    it.a = it.b = it.c = 0
    it.width = q.b
    finish(q, it, NULL, &s, kind)
    s.wide[q.b], s.wide[q.b + 1] = s.any_wide, s.folded

cdef int run(Pass* q, real* kind) noexcept nogil:
    cdef int failed
    cdef Arena m
    count_pieces(&m)
    q.table = NULL
    q.real_size = sizeof(real)
    if q.given and not q.columns and q.a > 1 and q.mean.a == 0 and q.var.a == 0 and q.pieces == 1:
        take(&m, q.b * SCALE_BYTES + 8)
        if not open_arena(&m):
            return 1
        q.table = take(&m, q.b * SCALE_BYTES + 8)
        tabulate(q, kind)
    failed = run_items(q, kind)
    close_arena(&m)
    return failed

cdef int run_items(Pass* q, real* kind) noexcept nogil:
    cdef Scratch one
    cdef Scratch* h
    cdef char room[ON_STACK]
    cdef int failed
    if q.threads == 1:
        count_pieces(&one.arena)
        lay_out(q, &one, &one.arena, kind)
        if not open_on_stack(&one.arena, room):
            return 1
        lay_out(q, &one, &one.arena, kind)
        whole_items(q, 0, q.items, &one, kind)
        fn_check_store_fence()
        close_scratch(&one, 1)
        return 0
    h = <Scratch*>malloc(q.threads * sizeof(Scratch))
    if h == NULL:
        return 1
    failed = not open_scratch(q, h, q.threads, kind)
    if not failed:
        failed = share_out(q, h, kind)
        close_scratch(h, q.threads)
    free(h)
    return failed

cdef int share_out(Pass* q, Scratch* h, real* kind) noexcept nogil:
    """Items, or pieces of them, among threads with scratch memory of their own."""
    cdef Py_ssize_t turn, turns
    if q.pieces > 1 and q.items < 4 * q.threads and q.items % q.threads != 0:
        return shared_items(q, h, kind)
    if q.near:
        turns = min(q.items, q.threads)
        for turn in prange(turns, num_threads=q.threads, schedule="static"):
            whole_items(q, q.items * turn // turns, q.items * (turn + 1) // turns, h + threadid(), kind)
            fn_check_store_fence()
        return 0
    turns = min(q.items, 8 * q.threads)
    for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
        whole_items(q, q.items * turn // turns, q.items * (turn + 1) // turns, h + threadid(), kind)
        fn_check_store_fence()
    return 0

# ---- the door --------------------------------------------------------------------------------

cdef int bfloat16_number = -1   # of its type, once one has been seen: ml_dtypes gives it out

cdef bint is_bfloat16(cnp.ndarray array) except -1:
    """Whether an array is of ml_dtypes.bfloat16, and not of another type that NumPy does not know."""
    global bfloat16_number
    cdef int number = cnp.PyArray_TYPE(array)
    if number == bfloat16_number:
        return True
    if not cnp.PyTypeNum_ISUSERDEF(number):
        return False
    if array.dtype.type is not getattr(sys.modules.get("ml_dtypes"), "bfloat16", None):
        return False
    bfloat16_number = number
    return True

cdef Storage storage_of(cnp.ndarray array) except *:
    """How the numbers of an array are kept; a mask is never loaded."""
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return F32
    if number == cnp.NPY_FLOAT64:
        return F64
    if number == cnp.NPY_UINT8 or number == cnp.NPY_BOOL:
        return U8
    if number == cnp.NPY_INT8:
        return I8
    if number == cnp.NPY_UINT16:
        return U16
    if number == cnp.NPY_INT16:
        return I16
    if number == cnp.NPY_FLOAT16:
        return F16
    if is_bfloat16(array):
        return BF16
    raise TypeError(f"the kernels have no arithmetic for dtype {array.dtype}")

cdef int expect(bint right, name, array) except -1:
    """Refuse what would be read as numbers that it does not hold."""
    if not right:
        raise TypeError(f"the kernels cannot take {name} of dtype {array.dtype} here")
    return 0

cdef tuple statistics_of(tuple dims, Py_ssize_t neighbours):
    """The dimensions of an array of statistics: `neighbours` columns together have one."""
    return (*dims[:4], dims[4] // neighbours)

cdef int operand(Operand* o, object array, tuple strides, tuple dims) except -1:
    """Where an operand lies, and how far its elements are apart: `strides` in elements.

    Refuses a walk that would leave the array: whoever described it was wrong.
    """
    cdef Py_ssize_t size, n, step, before = 0, after
    cdef int i
    o.data = o.low = o.high = NULL
    o.a = o.b = o.p = o.s = o.c = 0
    o.storage = F64
    if array is None:
        return 0
    size = cnp.PyArray_ITEMSIZE(<cnp.ndarray>array)
    o.data = <char*>cnp.PyArray_DATA(<cnp.ndarray>array)
    o.storage = storage_of(<cnp.ndarray>array)
    o.a, o.b, o.p, o.s, o.c = strides
    after = size
    for n, step in zip(dims, strides):
        if step < 0:
            before += (n - 1) * step * size
        else:
            after += (n - 1) * step * size
    bounds_of(array, &o.low, &o.high)
    if o.data + before < o.low or o.data + after > o.high:
        raise SystemError(
            f"a pass of dimensions {dims} and strides {strides} leaves an array of shape "
            f"{array.shape} and strides {array.strides}; please report this with the call's arguments"
        )
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
    q.brief = (q.x.storage == q.y.storage == BF16 and not q.columns and q.activation == IDENTITY and q.user == NULL
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

def is_checked():
    """Whether these kernels check every bound (check.h)."""
    return bool(FN_CHECKED)

def multiply_add():
    """How a product is added to (numbers.h): "fused", by way of "extended" precision, or "plain"."""
    return "fused" if FN_HAS_FMA else "extended" if FN_HAS_EXTENDED else "plain"

def address_of(cnp.ndarray array):
    """Where the first element of an array lies: `array.ctypes.data` in a fiftieth of the time."""
    return <size_t>cnp.PyArray_DATA(array)

def run_pass(layout, x, y, mean, var, rstd, *, weight=None, bias=None, mask=None, residual=None,
              addend=None, total=None, bint centred=True, bint given=False, Scaling scaling=RSTD,
              double eps=0.0, Activation activation=IDENTITY, Py_ssize_t user=0, bint activation_first=False, int threads=1,
              Ticket ticket=None, tuple statistics=()):
    """One pass of `layout` over x into y (None: statistics alone).

    Fills mean, var and rstd, or reads the first two where `given`.  With a ticket, the pass is kept for
    cached calls; `statistics` is then the shape in which mean and rstd are returned.  Returns
    whether the user's activation raised.
    """
    cdef Pass q
    cdef int failed
    cdef dict strides = layout.strides
    cdef tuple dims = layout.dims, kept = statistics_of(dims, layout.neighbours)
    q.a, q.b, q.p, q.s, q.c = dims
    q.neighbours = layout.neighbours
    q.columns = layout.columns
    q.centred, q.given, q.scaling, q.eps, q.fields = centred, given, scaling, eps, 0
    q.activation, q.user, q.activation_first = activation, <Loop>user, activation_first
    q.raised = False
    operand(&q.x, x, strides["x"], dims)
    operand(&q.y, y, strides.get("y"), dims)
    operand(&q.mean, mean, strides["stats"], kept)
    operand(&q.var, var, strides["stats"], kept)
    operand(&q.rstd, rstd, strides["stats"], kept)
    operand(&q.weight, weight, strides.get("weight"), dims)
    operand(&q.bias, bias, strides.get("bias"), dims)
    operand(&q.mask, mask, strides.get("mask"), dims)
    operand(&q.residual, residual, strides.get("residual"), dims)
    operand(&q.addend, addend, strides.get("addend"), dims)
    operand(&q.total, total, strides.get("total"), dims)
    expect(q.x.storage <= F64, "x", x)
    expect(y is None or q.y.storage == q.x.storage, "y", y)
    expect(total is None or q.total.storage == q.x.storage, "total", total)
    expect(mask is None or q.mask.storage == U8, "mask", mask)
    for name, array, storage in (("residual", residual, q.residual.storage), ("addend", addend, q.addend.storage)):
        expect(array is None or storage <= F64, name, array)
    for name, array, storage in (("weight", weight, q.weight.storage), ("bias", bias, q.bias.storage)):
        expect(array is None or storage == (F64 if q.x.storage == F64 else F32), name, array)
    for name, array, storage in (("mean", mean, q.mean.storage), ("var", var, q.var.storage), ("rstd", rstd, q.rstd.storage)):
        expect(storage == F64, name, array)

    failed = carry_out(&q, threads)
    if failed:
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    if ticket is not None and not q.raised:
        keep_forward(&q, ticket, statistics)
    return q.raised
