# The backward pass, on the same five dimensions as the forward one (forward.pxi).
#
#     xhat = (x - mean) rstd            g = dy weight
#     dx = rstd (g - sum(g)/count - xhat sum(g xhat)/count)        sums over a group
#     dweight = sum(dy xhat)            dbias = sum(dy)            sums over what shares a weight
#
# A *cell* is what both kinds of sum have in common.  Where the weight is one number for a run, or
# for a column, its cells are whole planes or columns: their two sums give a group's sums, and the
# weight's, in the first sweep.  Where the weight differs `inside` a run, or from row to row, each
# element is a cell: the group's sums are taken first, and the weight's in the sweep that writes dx.
#
# Items whose weight is the same one (`sharers` of an `owner`) add into the same cells, in their
# order; a fixed number of `parts` of them, merged in order, can run in parallel.

cdef extern from "simd.h" nogil:
    void fn_pair_planes_float(const float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float*, const float*, const float*, const float*, double*) noexcept
    void fn_pair_planes_bf16(const uint16_t*, Py_ssize_t, const uint16_t*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float*, const float*, const float*, const float*, double*) noexcept
    void fn_add_lanes(const double*, Py_ssize_t, double*, double*) noexcept
    void fn_pair_rows(const float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float*, const float*, const float*, const float*, bint, double*, double*) noexcept
    void fn_sum_planes_float(const float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, const double*, const float*, double*) noexcept
    void fn_sum_planes_double(const double*, Py_ssize_t, const double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, const double*, const double*, double*) noexcept
    void fn_sum_rows_float(const float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, const double*, const float*, bint, double*, double*) noexcept
    void fn_sum_rows_double(const double*, Py_ssize_t, const double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, const double*, const double*, bint, double*, double*) noexcept
    void fn_back_planes_float(const float*, Py_ssize_t, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t, const float*, const float*, const float*, const float*, const float*, const float*) noexcept
    void fn_back_planes_bf16(const uint16_t*, Py_ssize_t, const uint16_t*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, uint16_t*, Py_ssize_t, const float*, const float*, const float*, const float*, const float*, const float*) noexcept
    void fn_back_planes_double(const double*, Py_ssize_t, const double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, double*, Py_ssize_t, const double*, const double*, const double*, const double*, const double*, const double*) noexcept
    void fn_back_rows_float(const float*, Py_ssize_t, const float*, Py_ssize_t, float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float*, const float*, const float*, const float*, const float*, const float*) noexcept
    void fn_back_rows_double(const double*, Py_ssize_t, const double*, Py_ssize_t, double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double*, const double*, const double*, const double*, const double*, const double*) noexcept
    void fn_back_row_collect_float(const float*, const float*, float*, Py_ssize_t, const float*, const float*, const float*, const float*, const float*, const float*, bint, double*, double*) noexcept
    void fn_back_row_collect_double(const double*, const double*, double*, Py_ssize_t, const double*, const double*, const double*, const double*, const double*, const double*, bint, double*, double*) noexcept
    void fn_back_collect_float(const float**, const float**, float**, const float*, Py_ssize_t, int, const float*, double*, double*) noexcept
    void fn_back_collect_bf16(const uint16_t**, const uint16_t**, uint16_t**, const float*, Py_ssize_t, int, const float*, double*, double*) noexcept
    ctypedef struct fn_back_rows:
        const char* x
        const char* dy
        const char* mean
        const char* rstd
        char* dx
        Py_ssize_t x_step, dy_step, mean_step, rstd_step, dx_step, n, ahead
        const void* w
        double* gw
        double* gb
        void* tile
        bint centred
    ctypedef struct fn_back_group:
        const char* x
        const char* dy
        const char* w
        char* dx
        Py_ssize_t x_step, dy_step, dx_step, w_step, planes, n, ahead, cell
        double mean, rstd
        double* gw
        double* gb
        bint centred
    bint fn_group_back_float(const fn_back_group*) noexcept
    bint fn_group_back_bf16(const fn_back_group*) noexcept
    bint fn_group_back_double(const fn_back_group*) noexcept
    Py_ssize_t fn_rows_back_float(const fn_back_rows*, Py_ssize_t) noexcept
    Py_ssize_t fn_rows_back_bf16(const fn_back_rows*, Py_ssize_t) noexcept
    Py_ssize_t fn_rows_back_double(const fn_back_rows*, Py_ssize_t) noexcept
    void fn_back_collect_double(const double**, const double**, double**, const double*, Py_ssize_t, int, const double*, double*, double*) noexcept

cdef enum:
    SPAN = 65536                # elements of a run summed at a time
    SPAN_ROWS = 512             # rows of columns, likewise: their sums cost at most 2 % of x
    PAIRS = 16                  # partial sums side by side: FN_PAIRS
    CHUNK = 1024                # elements of a run whose weights' gradients are collected at once
    TOGETHER = 4                # runs that share the trip to those gradients
    CACHED = 1 << 18            # bytes of x and dy that stay in L2 from one sweep to the next
    TILE = 12288                # numbers in a thread's tiles: three of BLOCK, or nine of CHUNK
    PARTS = 64                  # parallel parts, at most and where there is work for them
    PART = 16384                # elements that make a part worth its sums
    FEW = 8                     # tasks below which large groups are shared out instead
    OWN_CELLS = 8192            # cells that a task may keep to itself
    ALLOWED = 2 << 20           # bytes that the parts' sums may take, besides 1 % of x

cdef struct Back:
    Py_ssize_t a, b, p, s, c, neighbours
    bint columns, centred, training
    bint stream                 # dx is written past the caches
    bint brief                  # bfloat16 is converted on the way
    Operand x, dy, dx, weight, dweight, dbias, mean, rstd
    # derived
    Py_ssize_t length           # reduced elements of a group (runs) or rows (columns)
    Py_ssize_t width            # columns of an item; of runs, neighbouring groups
    Py_ssize_t chunks           # items side by side along c; of runs, along b
    bint own_a, own_b, own_c    # whether the weight differs along these axes of items
    bint inside                 # whether it differs within a run, or from row to row
    Py_ssize_t owners, sharers  # items = owners * sharers
    Py_ssize_t span, segments   # elements (rows) summed at a time; how many such an item has
    Py_ssize_t plane_segments   # segments of each plane where planes' weights differ, else 0
    Py_ssize_t cell_p, cell_s, cell_c, cells  # strides and number of an owner's cells
    Py_ssize_t parts
    int threads

# What the step needs to know of each column, or group of runs.
cdef struct Slopes:
    double* mean
    double* rstd
    double* first               # sum of g, then that times rstd / count
    double* second              # sum of g xhat, likewise
    char* hi
    char* r
    char* shift
    char* wr
    char* c1
    char* c2
    uint8_t* wide
    bint any_wide

cdef enum:
    SLOPES_BYTES = 10 * 8 + 8

cdef inline Slopes slopes_at(char* memory, Py_ssize_t width) noexcept nogil:
    cdef Slopes s
    s.mean = <double*>memory
    s.rstd, s.first, s.second = s.mean + width, s.mean + 2 * width, s.mean + 3 * width
    s.hi = memory + 32 * width
    s.r, s.shift, s.wr = s.hi + 8 * width, s.hi + 16 * width, s.hi + 24 * width
    s.c1, s.c2 = s.hi + 32 * width, s.hi + 40 * width
    s.wide = <uint8_t*>(s.hi + 48 * width)
    s.any_wide = False
    return s

cdef inline Py_ssize_t beside(Back* q, Operand* o) noexcept nogil:
    """Bytes from what belongs to one column of an item, or group of runs, to that of the next."""
    return o.c if q.columns else o.b

cdef inline Item item_of(Back* q, Py_ssize_t owner, Py_ssize_t sharer) noexcept nogil:
    cdef Item it
    cdef Py_ssize_t chunk = 0, along_b = q.b if q.columns else q.chunks
    if q.own_c:
        chunk = owner % q.chunks
        owner = owner // q.chunks
    elif q.columns:
        chunk = sharer % q.chunks
        sharer = sharer // q.chunks
    if q.own_b:
        it.b = owner % along_b
        owner = owner // along_b
    else:
        it.b = sharer % along_b
        sharer = sharer // along_b
    it.a = owner if q.own_a else sharer
    it.c = chunk * q.width
    if q.columns:
        it.width = min(q.width, q.c - it.c)
    else:
        it.b *= q.width
        it.width = min(q.width, q.b - it.b)
    return it

cdef inline char* place(Operand* o, Item it, Py_ssize_t p, Py_ssize_t s) noexcept nogil:
    return at(o, it.a, it.b) + p * o.p + s * o.s + it.c * o.c

cdef inline const real* ready(Operand* o, Item it, Py_ssize_t p, Py_ssize_t s, Py_ssize_t n, bint raw, real* tile, Py_ssize_t room) noexcept nogil:
    """n numbers of an operand, in place or, where a format is converted first, in a tile for `room`."""
    cdef char* source = place(o, it, p, s)
    within(o, source, n * bytes_of(o.storage), "x or dy, of a run or row backward")
    if raw or native(o.storage, tile):
        return <const real*>source
    fits(n, room, "a tile, backward")
    load(source, o.storage, n, tile)
    return tile

cdef inline double weight_of(Back* q, Item it, Py_ssize_t p, Py_ssize_t s, Py_ssize_t i) noexcept nogil:
    if q.weight.data == NULL:
        return 1.0
    within(&q.weight, place(&q.weight, it, p, s) + i * beside(q, &q.weight), bytes_of(q.weight.storage), "a weight")
    return number(place(&q.weight, it, p, s) + i * beside(q, &q.weight), q.weight.storage)

cdef inline bint weights_in_place(Back* q, real* kind) noexcept nogil:
    """Whether the weights along a run, or a row, lie there as the numbers that are computed in."""
    cdef Py_ssize_t step = q.weight.c if q.columns else q.weight.s
    return native(q.weight.storage, kind) and (step == 0 or step == sizeof(real))

cdef const real* weights_along(Back* q, Item it, Py_ssize_t p, Py_ssize_t s, Py_ssize_t n, real* room) noexcept nogil:
    """n weights along a run, or a row (the one weight of a row); NULL where they are 1."""
    cdef char* source = place(&q.weight, it, p, s)
    cdef Py_ssize_t i, step = q.weight.c if q.columns else q.weight.s
    if q.weight.data == NULL:
        return NULL
    all_within(&q.weight, source, step, n if step else 1, bytes_of(q.weight.storage), "weights along a run or row")
    if weights_in_place(q, room):
        return <const real*>source
    if step == bytes_of(q.weight.storage):
        load(source, q.weight.storage, n, room)
        return room
    for i in range(n if step else 1):
        room[i] = <real>number(source + i * step, q.weight.storage)
    return room

cdef struct Workspace:
    Arena arena
    double* sums                # of a segment: two for each column
    double* cells               # of an owner, or of a chunk: two for each
    char* slopes
    char* tiles

cdef inline void lay_out_back(Back* q, Workspace* h, Py_ssize_t cells) noexcept nogil:
    h.tiles = take(&h.arena, TILE * 8)
    h.sums = <double*>take(&h.arena, 2 * q.width * sizeof(double))
    h.cells = <double*>take(&h.arena, 2 * cells * sizeof(double))
    h.slopes = take(&h.arena, TOGETHER * slopes_size(q))

cdef inline Py_ssize_t slopes_size(Back* q) noexcept nogil:
    return (SLOPES_BYTES * q.width + 15) // 8 * 8

cdef inline bint open_workspace(Back* q, Workspace* h, Py_ssize_t cells) noexcept nogil:
    count_pieces(&h.arena)
    lay_out_back(q, h, cells)
    if not open_arena(&h.arena):
        return False
    lay_out_back(q, h, cells)
    return True

# ---- the sums --------------------------------------------------------------------------------

cdef inline void read_statistics(Back* q, Item it, Slopes* s, real* kind) noexcept nogil:
    cdef Py_ssize_t i
    cdef double mean, rstd
    s.any_wide = False
    for i in range(it.width):
        within(&q.rstd, at(&q.rstd, it.a, it.b) + (it.c + i) // q.neighbours * beside(q, &q.rstd), sizeof(double), "rstd, backward")
        within(&q.mean, at(&q.mean, it.a, it.b) + (it.c + i) // q.neighbours * beside(q, &q.mean), sizeof(double), "mean, backward")
        rstd = (<double*>(at(&q.rstd, it.a, it.b) + (it.c + i) // q.neighbours * beside(q, &q.rstd)))[0]
        mean = 0.0
        if q.mean.data != NULL:
            mean = (<double*>(at(&q.mean, it.a, it.b) + (it.c + i) // q.neighbours * beside(q, &q.mean)))[0]
        s.mean[i], s.rstd[i], s.first[i], s.second[i] = mean, rstd, 0.0, 0.0
        (<real*>s.hi)[i] = <real>mean
        (<real*>s.r)[i] = <real>rstd
        (<real*>s.shift)[i] = <real>(-(mean - <real>mean) * rstd)
        s.wide[i] = False
        if real is float:
            # as in the forward pass: beyond float's range, or its precision
            s.wide[i] = rstd != 0.0 and not (7.9e-31 < fabs(rstd) < 1.3e30 and fabs(mean) < 1.3e30)
            s.any_wide |= s.wide[i]

cdef inline void segment_at(Back* q, Py_ssize_t k, Py_ssize_t* first, Py_ssize_t* last) noexcept nogil:
    if q.plane_segments:
        first[0] = k // q.plane_segments * q.s + k % q.plane_segments * q.span
        last[0] = min(first[0] + q.span, (k // q.plane_segments + 1) * q.s)
    else:
        first[0] = k * q.span
        last[0] = min(first[0] + q.span, q.length)

cdef inline Py_ssize_t alike(Slopes* s, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """The end of the columns, or groups, from `first` on that are all wide, or all not."""
    cdef Py_ssize_t last = first + 1
    if not s.any_wide:
        return n
    while last < n and s.wide[last] == s.wide[first]:
        last += 1
    return last

cdef inline void planes_within(Operand* o, Item it, Py_ssize_t p, Py_ssize_t s, Py_ssize_t planes, Py_ssize_t n) noexcept nogil:
    all_within(o, place(o, it, p, s), o.b, planes, n * bytes_of(o.storage), "planes, backward")

cdef inline void rows_there(Operand* o, Item it, Py_ssize_t p, Py_ssize_t s, Py_ssize_t rows) noexcept nogil:
    all_within(o, place(o, it, p, s), o.s, rows, it.width * bytes_of(o.storage), "rows of columns, backward")

cdef void run_sums(Back* q, Item it, Slopes* s, Py_ssize_t f, Py_ssize_t last, double* sums, char* tiles, real* kind) noexcept nogil:
    """The same over elements [f, last) of each group of runs."""
    cdef double[2 * PAIRS * BUNDLE] lanes
    cdef Py_ssize_t p, t, n, i, j, limit = SPAN
    cdef Py_ssize_t ahead = q.x.p if it.width > 1 and q.p > 1 else AHEAD
    cdef bint raw = q.brief and not s.any_wide
    cdef bint convert = not raw and not (native(q.x.storage, kind) and native(q.dy.storage, kind))
    cdef real* tile = <real*>tiles
    cdef real* room = tile + 2 * BLOCK
    cdef Item one
    cdef const real* x
    cdef const real* dy
    cdef const real* w = NULL
    if convert or (q.inside and q.weight.data != NULL and not weights_in_place(q, kind)):
        limit = BLOCK
    memset(lanes, 0, it.width * 2 * PAIRS * sizeof(double))
    while f < last:
        p, t = f // q.s, f % q.s
        n = min(min(last - f, q.s - t), limit)
        i = 0
        while i < it.width:
            one = group_at(it, i)
            j = i + 1 if convert else alike(s, i, it.width)
            x = ready(&q.x, one, p, t, n, raw, tile, BLOCK)
            dy = ready(&q.dy, one, p, t, n, raw, tile + BLOCK, BLOCK)
            if q.inside:
                w = weights_along(q, one, p, t, n, room)
            planes_within(&q.x, one, p, t, j - i, n)
            planes_within(&q.dy, one, p, t, j - i, n)
            if real is double:
                fn_sum_planes_double(x, q.x.b, dy, q.dy.b, j - i, n, ahead, s.mean + i, s.rstd + i, w, lanes + 2 * PAIRS * i)
            elif s.wide[i]:
                fn_sum_planes_float(x, q.x.b, dy, q.dy.b, j - i, n, ahead, s.mean + i, s.rstd + i, w, lanes + 2 * PAIRS * i)
            elif raw:
                fn_pair_planes_bf16(<const uint16_t*>x, q.x.b, <const uint16_t*>dy, q.dy.b, j - i, n, ahead,
                                    <float*>s.hi + i, <float*>s.r + i, <float*>s.shift + i, w, lanes + 2 * PAIRS * i)
            else:
                fn_pair_planes_float(x, q.x.b, dy, q.dy.b, j - i, n, ahead,
                                     <float*>s.hi + i, <float*>s.r + i, <float*>s.shift + i, w, lanes + 2 * PAIRS * i)
            i = j
        f += n
    fn_add_lanes(lanes, it.width, sums, sums + it.width)

cdef void segment_sums(Back* q, Item it, Slopes* s, Py_ssize_t k, double* sums, char* tiles, real* kind) noexcept nogil:
    """Sums of dy and of dy xhat over a segment; of g and g xhat where the weight differs inside."""
    cdef Py_ssize_t f, last, n, limit, i, j
    cdef const real* along
    cdef Py_ssize_t x_step, dy_step, size = sizeof(real)
    cdef Py_ssize_t p, t
    cdef bint convert = not (native(q.x.storage, kind) and native(q.dy.storage, kind))
    cdef real* tile = <real*>tiles
    cdef real* other = tile + BLOCK
    cdef real* room = tile + 2 * BLOCK
    cdef const real* x
    cdef const real* dy
    cdef const real* w = NULL
    if q.inside and q.weight.data != NULL:
        convert = convert or not weights_in_place(q, kind)
    segment_at(q, k, &f, &last)
    memset(sums, 0, 2 * it.width * sizeof(double))
    if not q.columns:
        run_sums(q, it, s, f, last, sums, tiles, kind)
    else:
        limit = max(BLOCK // it.width, 1) if convert else SPAN_ROWS
        if q.inside and q.weight.data != NULL:
            limit = 1           # each row has another weight
        while f < last:
            p, t = f // q.s, f % q.s
            n = min(min(last - f, q.s - t), limit)
            x, dy = <const real*>place(&q.x, it, p, t), <const real*>place(&q.dy, it, p, t)
            x_step, dy_step = q.x.s // size, q.dy.s // size
            rows_there(&q.x, it, p, t, n)
            rows_there(&q.dy, it, p, t, n)
            if convert:
                fits(n * it.width, BLOCK, "a tile of rows, backward")
            if not native(q.x.storage, kind):
                for i in range(n):
                    load(place(&q.x, it, p, t + i), q.x.storage, it.width, tile + i * it.width)
                x, x_step = tile, it.width
            if not native(q.dy.storage, kind):
                for i in range(n):
                    load(place(&q.dy, it, p, t + i), q.dy.storage, it.width, other + i * it.width)
                dy, dy_step = other, it.width
            if q.inside:
                w = weights_along(q, it, p, t, it.width, room)
            if real is float:
                i = 0
                while i < it.width:
                    j = alike(s, i, it.width)
                    along = w + i if w != NULL and q.weight.c != 0 else w
                    if s.wide[i]:
                        fn_sum_rows_float(x + i, x_step, dy + i, dy_step, n, j - i, s.mean + i, s.rstd + i, along, q.weight.c != 0, sums + i, sums + it.width + i)
                    else:
                        fn_pair_rows(x + i, x_step, dy + i, dy_step, n, j - i, <float*>s.hi + i, <float*>s.r + i, <float*>s.shift + i, along, q.weight.c != 0, sums + i, sums + it.width + i)
                    i = j
            else:
                fn_sum_rows_double(x, x_step, dy, dy_step, n, it.width, s.mean, s.rstd, w, q.weight.c != 0, sums, sums + it.width)
            f += n
    if real is float and s.any_wide:
        for i in range(it.width):
            if s.wide[i]:
                sums[it.width + i] *= s.rstd[i]

cdef void add_segment(Back* q, Item it, Slopes* s, Py_ssize_t k, const double* sums, double* cells, real* kind) noexcept nogil:
    """A segment's sums into its group's, and into the cells where those are its own kind."""
    cdef Py_ssize_t i, n = it.width, cell
    cdef Py_ssize_t plane = k // q.plane_segments if q.plane_segments else 0
    cdef double v = 1.0
    for i in range(n):
        if not q.inside:
            cell = plane * q.cell_p + i * q.cell_c
            cells[cell] += sums[n + i]
            cells[q.cells + cell] += sums[i]
            v = weight_of(q, it, plane, 0, i)
        s.first[i] += v * sums[i]
        s.second[i] += v * sums[n + i]

cdef void finish_sums(Back* q, Item it, Slopes* s, real* kind) noexcept nogil:
    """From the group's sums to the two terms that the step subtracts."""
    cdef Py_ssize_t i, j, group, k = q.neighbours
    cdef double first, second, count = <double>q.length * k
    for group in range(it.width // k):
        i = group * k
        first = second = 0.0
        if q.training:
            for j in range(i, i + k):
                first += s.first[j]
                second += s.second[j]
        for j in range(i, i + k):
            s.first[j] = s.rstd[i] * (first / count) if q.centred else 0.0
            s.second[j] = s.rstd[i] * (second / count)
            (<real*>s.c1)[j] = <real>s.first[j]
            (<real*>s.c2)[j] = <real>s.second[j]
    if not q.inside:
        for i in range(it.width):
            (<real*>s.wr)[i] = <real>(weight_of(q, it, 0, 0, i) * s.rstd[i])

cdef void item_sums(Back* q, Item it, Slopes* s, double* sums, double* cells, char* tiles, real* kind) noexcept nogil:
    cdef Py_ssize_t k
    read_statistics(q, it, s, kind)
    if q.training or not q.inside:
        for k in range(q.segments):
            segment_sums(q, it, s, k, sums, tiles, kind)
            add_segment(q, it, s, k, sums, cells, kind)
    finish_sums(q, it, s, kind)

# ---- the step --------------------------------------------------------------------------------

cdef void wide_step(Back* q, Slopes* s, Py_ssize_t k, Py_ssize_t first, Py_ssize_t last, const real* x, const real* dy, const real* w, double weight, real* dx, double* gw, double* gb) noexcept nogil:
    """The step in double, where numbers leave float's range: elements [first, last) of a row, or of a
    run of group k.

    Without weights `w` there is one for all of them.  `gw` and `gb` (or NULL) take what they add to
    the gradients of weight and bias.
    """
    cdef Py_ssize_t i, j, g
    cdef double xhat
    cdef bint along = (q.dweight.c if q.columns else q.dweight.s) != 0
    for i in range(first, last):
        j = i if q.columns else k
        xhat = (<double>x[i] - s.mean[j]) * s.rstd[j]
        if w != NULL:
            weight = w[i if along else 0]
        dx[i] = <real>(s.rstd[j] * dy[i] * weight - s.first[j] - (xhat * s.second[j] if q.training else 0.0))
        if gw != NULL:
            g = i if along else 0
            gw[g] += dy[i] * xhat
            gb[g] += dy[i]

cdef inline void step_apart(const real* dy, Py_ssize_t n, const real* wr, Py_ssize_t along, real* dx) noexcept nogil:
    """dx of n elements by given statistics, in which x, out of range or not, has no part."""
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * wr[i * along]

cdef void step_runs(Back* q, Item it, Slopes* s, Py_ssize_t f, Py_ssize_t last, char* tiles, real* kind) noexcept nogil:
    """dx of elements [f, last) of each group of runs, where the weight does not differ inside."""
    cdef Py_ssize_t p, t, n, i, j, k, limit = SPAN
    cdef Py_ssize_t ahead = q.x.p if it.width > 1 and q.p > 1 else 0
    cdef bint raw = q.brief and q.training and not s.any_wide
    cdef bint straight = raw or (native(q.dx.storage, kind) and not q.stream)
    cdef bint together = straight and q.training and (raw or (native(q.x.storage, kind) and native(q.dy.storage, kind)))
    cdef real* tile = <real*>tiles
    # other threads step other planes of these groups: a plane's weights are not kept in `s`
    cdef real[BUNDLE] of_planes
    cdef real* wr = <real*>s.wr if q.weight.p == 0 else of_planes
    cdef Item one
    cdef real* dx
    cdef const real* x
    cdef const real* dy
    if not together:
        limit = BLOCK
    while f < last:
        p, t = f // q.s, f % q.s
        n = min(min(last - f, q.s - t), limit)
        i = 0
        while i < it.width:
            one = group_at(it, i)
            j = alike(s, i, it.width) if together and not s.wide[i] else i + 1
            x = ready(&q.x, one, p, t, n, raw, tile, BLOCK)
            dy = ready(&q.dy, one, p, t, n, raw, tile + BLOCK, BLOCK)
            dx = <real*>place(&q.dx, one, p, t) if straight else tile
            planes_within(&q.x, one, p, t, j - i, n)
            planes_within(&q.dy, one, p, t, j - i, n)
            planes_within(&q.dx, one, p, t, j - i, n)
            if not straight:
                fits(n, BLOCK, "the tile of dx")
            if q.weight.p != 0:
                for k in range(i, j):
                    wr[k] = <real>(weight_of(q, it, p, t, k) * s.rstd[k])
            if s.wide[i]:
                wide_step(q, s, i, 0, n, x, dy, NULL, weight_of(q, one, p, t, 0), dx, NULL, NULL)
            elif not q.training:
                step_apart(dy, n, wr + i, 0, dx)
            elif real is double:
                fn_back_planes_double(x, q.x.b, dy, q.dy.b, j - i, n, ahead, dx, q.dx.b,
                                      <double*>s.hi + i, <double*>s.r + i, <double*>s.shift + i, wr + i, <double*>s.c1 + i, <double*>s.c2 + i)
            elif raw:
                fn_back_planes_bf16(<const uint16_t*>x, q.x.b, <const uint16_t*>dy, q.dy.b, j - i, n, ahead, <uint16_t*>dx, q.dx.b,
                                    <float*>s.hi + i, <float*>s.r + i, <float*>s.shift + i, wr + i, <float*>s.c1 + i, <float*>s.c2 + i)
            else:
                fn_back_planes_float(x, q.x.b, dy, q.dy.b, j - i, n, ahead, dx, q.dx.b,
                                     <float*>s.hi + i, <float*>s.r + i, <float*>s.shift + i, wr + i, <float*>s.c1 + i, <float*>s.c2 + i)
            if not straight:
                deliver(dx, n, place(&q.dx, one, p, t), q.dx.storage, q.stream, <char*>(tile + BLOCK))
            i = j
        f += n

cdef void step_rows(Back* q, Item it, Slopes* s, Py_ssize_t f, Py_ssize_t last, char* tiles, real* kind) noexcept nogil:
    """dx of rows [f, last) of columns, likewise."""
    cdef Py_ssize_t p, t, i, j, c, n = it.width
    cdef real* tile = <real*>tiles
    cdef real* other = tile + BLOCK
    cdef real* dx
    cdef const real* x
    cdef const real* dy
    cdef bint straight = native(q.dx.storage, kind) and not q.stream
    cdef Py_ssize_t rows, dx_step, size = sizeof(real)
    # rows at once, where nothing is converted and what is streamed is one run
    cdef bint together = (native(q.x.storage, kind) and native(q.dy.storage, kind) and native(q.dx.storage, kind)
                          and (not q.stream or q.dx.s == it.width * size))
    while f < last:
        p, t = f // q.s, f % q.s
        rows = 1
        dx = <real*>place(&q.dx, it, p, t) if straight else tile
        x = ready(&q.x, it, p, t, n, False, tile, BLOCK)
        dy = ready(&q.dy, it, p, t, n, False, other, BLOCK)
        dx_step = q.dx.s // size
        if together and q.training and not s.any_wide:
            rows = min(last - f, q.s - t)
            if q.stream:
                # in short stretches between which reads go on: 1.25 times as fast
                rows, dx, dx_step = min(rows, max(STREAMED // n, 1)), tile, n
        rows_there(&q.x, it, p, t, rows)
        rows_there(&q.dy, it, p, t, rows)
        rows_there(&q.dx, it, p, t, rows)
        if not straight:
            fits(rows * n, BLOCK, "the tile of rows of dx")
        i = 0
        while i < n:
            j = alike(s, i, n)
            if s.wide[i]:
                for c in range(i, j):
                    wide_step(q, s, 0, c, c + 1, x, dy, NULL, weight_of(q, it, p, t, c), dx, NULL, NULL)
            elif not q.training:
                step_apart(dy + i, j - i, <real*>s.wr + i, 1, dx + i)
            elif real is float:
                fn_back_rows_float(x + i, q.x.s // size, dy + i, q.dy.s // size, dx + i, dx_step, rows, j - i,
                    <float*>s.hi + i, <float*>s.r + i, <float*>s.shift + i, <float*>s.wr + i, <float*>s.c1 + i, <float*>s.c2 + i)
            else:
                fn_back_rows_double(x + i, q.x.s // size, dy + i, q.dy.s // size, dx + i, dx_step, rows, j - i,
                    <double*>s.hi + i, <double*>s.r + i, <double*>s.shift + i, <double*>s.wr + i, <double*>s.c1 + i, <double*>s.c2 + i)
            i = j
        if not straight:
            deliver(dx, rows * n, place(&q.dx, it, p, t), q.dx.storage, q.stream, <char*>other)
        f += rows

cdef inline void step_back(Back* q, Item it, Slopes* s, Py_ssize_t f, Py_ssize_t last, char* tiles, real* kind) noexcept nogil:
    if q.columns:
        step_rows(q, it, s, f, last, tiles, kind)
    else:
        step_runs(q, it, s, f, last, tiles, kind)

cdef inline void collect(const real** x, const real** dy, real** dx, const real* terms, Py_ssize_t n, int count, bint raw, const real* w, double* gw, double* gb) noexcept nogil:
    if real is float and raw:
        fn_back_collect_bf16(<const uint16_t**>x, <const uint16_t**>dy, <uint16_t**>dx, terms, n, count, w, gw, gb)
    elif real is float:
        fn_back_collect_float(x, dy, dx, terms, n, count, w, gw, gb)
    else:
        fn_back_collect_double(x, dy, dx, terms, n, count, w, gw, gb)

cdef void collect_runs(Back* q, const Item* items, Slopes* s, int count, Py_ssize_t p, Py_ssize_t t, Py_ssize_t n, double* gw, double* gb, char* tiles, real* kind) noexcept nogil:
    """dx of n elements of up to TOGETHER runs that share their weights, and those' gradients."""
    cdef const real* x[TOGETHER]
    cdef const real* dy[TOGETHER]
    cdef real* dx[TOGETHER]
    cdef real[5 * TOGETHER] terms
    cdef real* room = <real*>tiles + 2 * TOGETHER * CHUNK
    cdef const real* w = weights_along(q, items[0], p, t, n, room)
    cdef bint raw, straight, any_wide = False
    cdef Py_ssize_t i
    cdef int k
    if w == NULL:
        for i in range(n):
            room[i] = 1
        w = room
    for k in range(count):
        any_wide |= s[k].any_wide
    raw = q.brief and q.training and not any_wide
    straight = raw or (native(q.dx.storage, kind) and not q.stream)
    fits(n, CHUNK, "a tile of runs that share their weights")
    for k in range(count):
        within(&q.dx, place(&q.dx, items[k], p, t), n * bytes_of(q.dx.storage), "dx, of a run")
        x[k] = ready(&q.x, items[k], p, t, n, raw, <real*>tiles + 2 * k * CHUNK, CHUNK)
        dy[k] = ready(&q.dy, items[k], p, t, n, raw, <real*>tiles + (2 * k + 1) * CHUNK, CHUNK)
        dx[k] = <real*>place(&q.dx, items[k], p, t) if straight else <real*>tiles + 2 * k * CHUNK
        terms[5 * k], terms[5 * k + 1], terms[5 * k + 2] = (<real*>s[k].hi)[0], (<real*>s[k].r)[0], (<real*>s[k].shift)[0]
        terms[5 * k + 3], terms[5 * k + 4] = (<real*>s[k].c1)[0], (<real*>s[k].c2)[0]
    if not any_wide:
        collect(x, dy, dx, terms, n, count, raw, w, gw, gb)
    else:
        for k in range(count):
            if s[k].any_wide:
                wide_step(q, &s[k], 0, 0, n, x[k], dy[k], w, 1.0, dx[k], gw, gb)
            else:
                collect(x + k, dy + k, dx + k, terms + 5 * k, n, 1, False, w, gw, gb)
    if not q.training:
        for k in range(count):
            if not s[k].any_wide:
                for i in range(n):
                    dx[k][i] = dy[k][i] * (w[i] * terms[5 * k + 1])  # x has no part in it
    if not straight:
        for k in range(count):
            deliver(dx[k], n, place(&q.dx, items[k], p, t), q.dx.storage, q.stream, tiles + (2 * k + 1) * CHUNK * sizeof(real))

cdef void collect_row(Back* q, Item it, Slopes* s, Py_ssize_t p, Py_ssize_t t, double* gw, double* gb, char* tiles, real* kind) noexcept nogil:
    """dx of a row of columns, and the gradients of its weight or weights."""
    cdef real* tile = <real*>tiles
    cdef bint straight = native(q.dx.storage, kind) and not q.stream
    cdef const real* x = ready(&q.x, it, p, t, it.width, False, tile, BLOCK)
    cdef const real* dy = ready(&q.dy, it, p, t, it.width, False, tile + BLOCK, BLOCK)
    cdef real* dx = <real*>place(&q.dx, it, p, t) if straight else tile
    cdef real* room = tile + 2 * BLOCK
    cdef const real* w = weights_along(q, it, p, t, it.width, room)
    cdef Py_ssize_t i, j, k, g, along = q.dweight.c != 0
    rows_there(&q.dx, it, p, t, 1)
    fits(it.width, BLOCK, "a tile of a row, backward")
    if w == NULL:
        for i in range(it.width):
            room[i] = 1
        w = room
    i = 0
    while i < it.width:
        j, g = alike(s, i, it.width), i * along
        if s.wide[i]:
            wide_step(q, s, 0, i, j, x, dy, w, 1.0, dx, gw, gb)
        elif real is float:
            fn_back_row_collect_float(x + i, dy + i, dx + i, j - i, <float*>s.hi + i, <float*>s.r + i, <float*>s.shift + i, <float*>s.c1 + i, <float*>s.c2 + i, w + g, along, gw + g, gb + g)
        else:
            fn_back_row_collect_double(x + i, dy + i, dx + i, j - i, <double*>s.hi + i, <double*>s.r + i, <double*>s.shift + i, <double*>s.c1 + i, <double*>s.c2 + i, w + g, along, gw + g, gb + g)
        if not q.training and not s.wide[i]:
            for k in range(i, j):
                dx[k] = dy[k] * (w[k * along] * (<real*>s.r)[k])  # x has no part in it
        i = j
    if not straight:
        deliver(dx, it.width, place(&q.dx, it, p, t), q.dx.storage, q.stream, <char*>(tile + BLOCK))

# ---- the gradients of weight and bias, written out -------------------------------------------

cdef void put(const double* v, Py_ssize_t n, char* y, Py_ssize_t step, Storage storage) noexcept nogil:
    cdef Py_ssize_t i
    cdef float f
    if y == NULL:
        return
    for i in range(n):
        if storage == F32:
            (<float*>(y + i * step))[0] = <float>v[i]
        elif storage == F64:
            (<double*>(y + i * step))[0] = v[i]
        else:
            f = <float>v[i]
            if storage == F16:
                fn_store_f16(&f, 1, <uint16_t*>(y + i * step))
            else:
                fn_store_bf16(&f, 1, <uint16_t*>(y + i * step))

cdef void put_cells(Back* q, Item it, Py_ssize_t p, Py_ssize_t t, const double* gw, const double* gb, Py_ssize_t n) noexcept nogil:
    """n neighbouring cells, the first at (p, t) of an item."""
    cdef Py_ssize_t step = q.dweight.s if q.inside and not q.columns else beside(q, &q.dweight)
    all_within(&q.dweight, place(&q.dweight, it, p, t), step, n, bytes_of(q.dweight.storage), "dweight")
    all_within(&q.dbias, place(&q.dbias, it, p, t), step, n, bytes_of(q.dbias.storage), "dbias")
    put(gw, n, place(&q.dweight, it, p, t), step, q.dweight.storage)
    if q.dbias.data != NULL:
        put(gb, n, place(&q.dbias, it, p, t), step, q.dbias.storage)

cdef void put_owner(Back* q, Py_ssize_t owner, const double* cells) noexcept nogil:
    cdef Item it = item_of(q, owner, 0)
    cdef Py_ssize_t p, t, cell
    cdef Py_ssize_t planes = q.p if q.cell_p else 1
    cdef Py_ssize_t rows = q.s if q.columns and q.cell_s else 1
    cdef Py_ssize_t n = q.s if q.cell_s and not q.columns else it.width if q.cell_c else 1
    for p in range(planes):
        for t in range(rows):
            cell = p * q.cell_p + t * q.cell_s
            put_cells(q, it, p, t, cells + cell, cells + q.cells + cell, n)

# ---- threads ---------------------------------------------------------------------------------

cdef inline bint plain_rows_back(Back* q, real* kind) noexcept nogil:
    """Whether items are rows at equal distances that share the weights along them, to be walked whole."""
    return (q.inside and not q.columns and q.training and q.width == q.p == 1 and q.owners == 1 and (q.a == 1 or q.b == 1)
            and q.length * TOGETHER * 2 * <Py_ssize_t>bytes_of(q.x.storage) <= CACHED
            and (q.weight.data == NULL or weights_in_place(q, kind))
            and (q.brief or (native(q.x.storage, kind) and native(q.dy.storage, kind) and native(q.dx.storage, kind))))

cdef Py_ssize_t rows_back(Back* q, Py_ssize_t first, Py_ssize_t last, double* cells, char* tiles, real* kind) noexcept nogil:
    """Rows from `first` on, up to `last` or to where they must go one by one: how many."""
    cdef fn_back_rows r
    cdef Item it = item_of(q, 0, first)
    cdef bint down = q.b == 1
    cdef Py_ssize_t i
    cdef real* ones = <real*>(tiles + TOGETHER * CHUNK * sizeof(real))
    r.x, r.dy, r.dx, r.rstd = at(&q.x, it.a, it.b), at(&q.dy, it.a, it.b), at(&q.dx, it.a, it.b), at(&q.rstd, it.a, it.b)
    r.x_step, r.dy_step, r.dx_step = (q.x.a, q.dy.a, q.dx.a) if down else (q.x.b, q.dy.b, q.dx.b)
    r.rstd_step, r.mean_step = (q.rstd.a, q.mean.a) if down else (q.rstd.b, q.mean.b)
    r.mean = NULL
    if q.mean.data != NULL:
        r.mean = at(&q.mean, it.a, it.b)
    r.w = q.weight.data
    if r.w == NULL:
        for i in range(q.s):
            ones[i] = 1
        r.w = ones
    r.n, r.ahead, r.centred = q.s, AHEAD, q.centred
    r.gw, r.gb = cells, cells + q.cells
    r.tile = tiles if q.stream else NULL
    if FN_CHECKED:
        i = last - first
        all_within(&q.x, r.x, r.x_step, i, q.s * bytes_of(q.x.storage), "x, of rows backward")
        all_within(&q.dy, r.dy, r.dy_step, i, q.s * bytes_of(q.dy.storage), "dy, of rows backward")
        all_within(&q.dx, r.dx, r.dx_step, i, q.s * bytes_of(q.dx.storage), "dx, of rows backward")
        all_within(&q.rstd, r.rstd, r.rstd_step, i, sizeof(double), "rstd, of rows backward")
        all_within(&q.mean, r.mean, r.mean_step, i, sizeof(double), "mean, of rows backward")
        within(&q.weight, q.weight.data, q.s * sizeof(real), "weight, of rows backward")
        fits(TOGETHER * CHUNK + q.s, TILE * 8 // <Py_ssize_t>sizeof(real), "the tile of rows backward")
    if real is double:
        return fn_rows_back_double(&r, last - first)
    if q.brief:
        return fn_rows_back_bf16(&r, last - first)
    return fn_rows_back_float(&r, last - first)

cdef inline bint plain_groups_back(Back* q, real* kind) noexcept nogil:
    """Whether items are groups of planes with a weight each, none longer than is summed at a time."""
    return (q.plane_segments == 1 and not q.columns and q.training and not q.stream
            and (q.weight.data == NULL or native(q.weight.storage, kind))
            and (q.brief or (native(q.x.storage, kind) and native(q.dy.storage, kind) and native(q.dx.storage, kind))))

cdef inline bint group_back(Back* q, Item it, double* gw, double* gb, real* kind) noexcept nogil:
    """A group from its sums to dx, if its type can hold it."""
    cdef fn_back_group g
    g.x, g.dy, g.dx = at(&q.x, it.a, it.b), at(&q.dy, it.a, it.b), at(&q.dx, it.a, it.b)
    g.x_step, g.dy_step, g.dx_step = q.x.p, q.dy.p, q.dx.p
    g.w, g.w_step = NULL, q.weight.p
    if q.weight.data != NULL:
        g.w = at(&q.weight, it.a, it.b)
    g.mean = 0.0
    if q.mean.data != NULL:
        g.mean = (<double*>at(&q.mean, it.a, it.b))[0]
    g.rstd = (<double*>at(&q.rstd, it.a, it.b))[0]
    g.planes, g.n, g.ahead, g.centred = q.p, q.s, AHEAD, q.centred
    g.gw, g.gb, g.cell = gw, gb, q.cell_p
    if FN_CHECKED:
        all_within(&q.x, g.x, q.x.p, q.p, q.s * bytes_of(q.x.storage), "x, of a group backward")
        all_within(&q.dy, g.dy, q.dy.p, q.p, q.s * bytes_of(q.dy.storage), "dy, of a group backward")
        all_within(&q.dx, g.dx, q.dx.p, q.p, q.s * bytes_of(q.dx.storage), "dx, of a group backward")
        all_within(&q.weight, g.w, q.weight.p, q.p, sizeof(real), "weight, of a group backward")
    if real is double:
        return fn_group_back_double(&g)
    if q.brief:
        return fn_group_back_bf16(&g)
    return fn_group_back_float(&g)

cdef int back_tasks(Back* q, Py_ssize_t first, Py_ssize_t last, double* parts, real* kind) noexcept nogil:
    """Tasks [first, last): each a part of an owner's sharers, from sums to dx while in cache."""
    cdef Workspace h
    cdef Slopes[TOGETHER] s
    cdef Item[TOGETHER] items
    cdef Py_ssize_t task, owner, part, i, end, p, t, n
    cdef double* cells
    cdef int k, count, together = 1
    cdef bint plain = plain_rows_back(q, kind), planes = plain_groups_back(q, kind)
    if q.inside and not q.columns and q.length * TOGETHER * 2 * <Py_ssize_t>bytes_of(q.x.storage) <= CACHED:
        together = TOGETHER
    if not open_workspace(q, &h, q.cells if parts == NULL else 0):
        return 1
    for k in range(TOGETHER):
        s[k] = slopes_at(h.slopes + k * slopes_size(q), q.width)
    for task in range(first, last):
        owner, part = task // q.parts, task % q.parts
        cells = h.cells if parts == NULL else parts + task * 2 * q.cells
        memset(cells, 0, 2 * q.cells * sizeof(double))
        i, end = q.sharers * part // q.parts, q.sharers * (part + 1) // q.parts
        while i < end:
            if planes:
                items[0] = item_of(q, owner, i)
                for k in range(items[0].width):
                    if not group_back(q, group_at(items[0], k), cells + k * q.cell_c, cells + q.cells + k * q.cell_c, kind):
                        break
                else:
                    i += 1
                    continue
            if plain:
                i += rows_back(q, i, end, cells, h.tiles, kind)
                if i == end:
                    break
            count = <int>min(<Py_ssize_t>together, end - i)
            for k in range(count):
                items[k] = item_of(q, owner, i + k)
                item_sums(q, items[k], &s[k], h.sums, cells, h.tiles, kind)
            if not q.inside:
                step_back(q, items[0], &s[0], 0, q.length, h.tiles, kind)
            elif q.columns:
                for p in range(q.p):
                    for t in range(q.s):
                        n = p * q.cell_p + t * q.cell_s
                        collect_row(q, items[0], &s[0], p, t, cells + n, cells + q.cells + n, h.tiles, kind)
            else:
                for p in range(q.p):
                    t = 0
                    while t < q.s:
                        n = p * q.cell_p + t
                        collect_runs(q, items, s, count, p, t, min(q.s - t, <Py_ssize_t>CHUNK), cells + n, cells + q.cells + n, h.tiles, kind)
                        t += CHUNK
            i += count
        if parts == NULL:
            put_owner(q, owner, cells)
    fn_stream_fence()
    close_arena(&h.arena)
    return 0

cdef int some_sums(Back* q, Py_ssize_t owner, Py_ssize_t first, Py_ssize_t last, Slopes* s, double* sums, real* kind) noexcept nogil:
    """Segments [first, last) of all of an owner's items."""
    cdef Workspace h
    cdef Py_ssize_t i
    if not open_workspace(q, &h, 0):
        return 1
    for i in range(first, last):
        segment_sums(q, item_of(q, owner, i // q.segments), &s[i // q.segments], i % q.segments, sums + i * 2 * q.width, h.tiles, kind)
    close_arena(&h.arena)
    return 0

cdef int some_back_steps(Back* q, Py_ssize_t owner, Py_ssize_t begin, Py_ssize_t end, Slopes* s, real* kind) noexcept nogil:
    """dx of segments [begin, end), or where the weight differs inside of its chunks [begin, end)."""
    cdef Workspace h
    cdef Item[TOGETHER] items
    cdef Py_ssize_t i, j, f, last, p, t, n, planes, rows
    cdef Py_ssize_t along = (q.s + CHUNK - 1) // CHUNK
    cdef int k, count
    if not open_workspace(q, &h, max(<Py_ssize_t>CHUNK, q.width)):
        return 1
    for i in range(begin, end):
        if not q.inside:
            segment_at(q, i % q.segments, &f, &last)
            step_back(q, item_of(q, owner, i // q.segments), &s[i // q.segments], f, last, h.tiles, kind)
        elif q.columns:
            # a chunk is a row; the rows that share its weights are taken with it
            p, t = i, 0
            if q.cell_s:
                p, t = i // q.s, i % q.s
            planes, rows = 1 if q.cell_p else q.p, 1 if q.cell_s else q.s
            n = q.width if q.cell_c else 1
            memset(h.cells, 0, 2 * n * sizeof(double))
            for j in range(q.sharers):
                items[0] = item_of(q, owner, j)
                for f in range(planes * rows):
                    collect_row(q, items[0], &s[j], p + f // rows, t + f % rows, h.cells, h.cells + n, h.tiles, kind)
            items[0] = item_of(q, owner, 0)
            put_cells(q, items[0], p, t, h.cells, h.cells + n, items[0].width if q.cell_c else 1)
        else:
            p, t = i // along, i % along * CHUNK
            n = min(q.s - t, <Py_ssize_t>CHUNK)
            planes = 1 if q.cell_p else q.p
            memset(h.cells, 0, 2 * CHUNK * sizeof(double))
            j = 0
            while j < q.sharers:
                count = <int>min(<Py_ssize_t>TOGETHER, q.sharers - j)
                for k in range(count):
                    items[k] = item_of(q, owner, j + k)
                for f in range(planes):
                    collect_runs(q, items, &s[j], count, p + f, t, n, h.cells, h.cells + CHUNK, h.tiles, kind)
                j += count
            put_cells(q, items[0], p, t, h.cells, h.cells + CHUNK, n)
    fn_stream_fence()
    close_arena(&h.arena)
    return 0

cdef int back_owner(Back* q, Py_ssize_t owner, int threads, real* kind) noexcept nogil:
    """All of an owner's items in two sweeps, each shared out among the threads."""
    cdef Py_ssize_t i, k, turn, total = q.sharers * q.segments, steps = total
    cdef Py_ssize_t turns = min(total, <Py_ssize_t>(8 * threads))
    cdef Py_ssize_t own = 0 if q.inside else 2 * q.cells
    cdef int failed = 0, turned
    cdef Arena m
    cdef Slopes* s
    cdef char* memory
    cdef double* sums
    cdef double* cells
    cdef Item it
    count_pieces(&m)
    for turned in range(2):     # counted, then handed out
        s = <Slopes*>take(&m, q.sharers * sizeof(Slopes))
        memory = take(&m, q.sharers * slopes_size(q))
        sums = <double*>take(&m, total * 2 * q.width * sizeof(double))
        cells = <double*>take(&m, own * sizeof(double))
        if turned == 0 and not open_arena(&m):
            failed = 1
            break
    if not failed:
        memset(cells, 0, own * sizeof(double))
        for i in range(q.sharers):
            s[i] = slopes_at(memory + i * slopes_size(q), q.width)
            read_statistics(q, item_of(q, owner, i), &s[i], kind)
        if q.training or not q.inside:
            if threads == 1:
                failed = some_sums(q, owner, 0, total, s, sums, kind)
            else:
                for turn in prange(turns, num_threads=threads, schedule="dynamic"):
                    failed |= some_sums(q, owner, total * turn // turns, total * (turn + 1) // turns, s, sums, kind)
        for i in range(q.sharers):
            it = item_of(q, owner, i)
            if q.training or not q.inside:
                for k in range(q.segments):
                    add_segment(q, it, &s[i], k, sums + (i * q.segments + k) * 2 * q.width, cells, kind)
            finish_sums(q, it, &s[i], kind)
        if not q.inside:
            put_owner(q, owner, cells)
        elif q.columns:
            steps = (q.p if q.cell_p else 1) * (q.s if q.cell_s else 1)
        else:
            steps = (q.p if q.cell_p else 1) * ((q.s + CHUNK - 1) // CHUNK)
        turns = min(steps, <Py_ssize_t>(8 * threads))
        if failed:
            pass
        elif threads == 1:
            failed = some_back_steps(q, owner, 0, steps, s, kind)
            fn_check_store_fence()
        else:
            for turn in prange(turns, num_threads=threads, schedule="dynamic"):
                # the last read are the first written: what is still in cache is read from there
                failed |= some_back_steps(q, owner, steps - steps * (turn + 1) // turns, steps - steps * turn // turns, s, kind)
                fn_check_store_fence()
    close_arena(&m)
    return failed

cdef int some_owners(Back* q, Py_ssize_t first, Py_ssize_t last, real* kind) noexcept nogil:
    cdef Py_ssize_t owner
    cdef int failed = 0
    for owner in range(first, last):
        failed |= back_owner(q, owner, 1, kind)
    return failed

cdef void merge_parts(Back* q, double* parts) noexcept nogil:
    cdef Py_ssize_t owner, part, i
    cdef double* into
    for owner in range(q.owners):
        into = parts + owner * q.parts * 2 * q.cells
        for part in range(1, q.parts):
            for i in range(2 * q.cells):
                into[i] += into[part * 2 * q.cells + i]
        put_owner(q, owner, into)

cdef int run_back(Back* q, real* kind) noexcept nogil:
    cdef Py_ssize_t turn, turns, tasks = q.owners * q.parts
    cdef Py_ssize_t size = q.owners * q.sharers * q.width * q.length
    cdef int failed = 0
    cdef double* parts = NULL
    cdef Arena m
    if (tasks < FEW and size >= 8 * PART) or (q.inside and q.parts == 1 and q.cells > OWN_CELLS):
        # few large groups, or sums too many to keep: the two sweeps apart
        if q.owners < FEW or q.threads == 1:
            for turn in range(q.owners):
                failed |= back_owner(q, turn, q.threads, kind)
            return failed
        turns = min(q.owners, <Py_ssize_t>(8 * q.threads))
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            failed |= some_owners(q, q.owners * turn // turns, q.owners * (turn + 1) // turns, kind)
        return failed
    if q.parts > 1:
        count_pieces(&m)
        take(&m, tasks * 2 * q.cells * sizeof(double))
        if not open_arena(&m):
            return 1
        parts = <double*>take(&m, tasks * 2 * q.cells * sizeof(double))
    if q.threads == 1:
        failed = back_tasks(q, 0, tasks, parts, kind)
        fn_check_store_fence()
    else:
        turns = min(tasks, <Py_ssize_t>(8 * q.threads))
        for turn in prange(turns, num_threads=q.threads, schedule="dynamic"):
            failed |= back_tasks(q, tasks * turn // turns, tasks * (turn + 1) // turns, parts, kind)
            fn_check_store_fence()
    if parts != NULL:
        if not failed:
            merge_parts(q, parts)
        close_arena(&m)
    return failed

cdef int run_converted(Back* q, real* kind) noexcept nogil:
    """`run_back`; weights that all rows share are converted once, not for each of them."""
    cdef Operand w = q.weight
    cdef Item it
    cdef real* room
    cdef int failed
    cdef Arena m
    if not q.inside or q.columns or w.data == NULL or w.a != 0 or w.b != 0 or w.p != 0 or weights_in_place(q, kind):
        return run_back(q, kind)
    count_pieces(&m)
    take(&m, q.s * sizeof(real))
    if not open_arena(&m):
        return 1
    room = <real*>take(&m, q.s * sizeof(real))
    it.a = it.b = it.c = 0
    it.width = 1
    weights_along(q, it, 0, 0, q.s, room)
    aim_at(&q.weight, <char*>room, q.s * sizeof(real))
    q.weight.storage = F32 if real is float else F64
    q.weight.s = sizeof(real)
    failed = run_back(q, kind)
    q.weight = w
    close_arena(&m)
    return failed

# ---- the door --------------------------------------------------------------------------------

cdef int carry_back(Back* q, int threads) noexcept:
    """Derive what follows from the dimensions, and run.  All of it depends on the shape alone."""
    cdef float as_float = 0
    cdef double as_double = 0
    cdef int failed
    cdef Py_ssize_t groups, items, size, x_bytes, cells, sum_bytes, along
    cdef Operand* w = &q.dweight
    q.length = q.p * q.s
    q.own_a, q.own_b = w.a != 0, w.b != 0
    q.own_c = q.columns and w.c != 0
    q.inside = w.s != 0 or (q.columns and w.p != 0)
    q.width = 1
    if q.columns:
        groups = q.c // q.neighbours
        q.chunks = 1 if q.c <= ABREAST else max(1, min(groups, (q.c + COLUMNS - 1) // COLUMNS))
        q.width = (groups + q.chunks - 1) // q.chunks * q.neighbours
        q.chunks = (q.c + q.width - 1) // q.width
        items = q.a * q.b * q.chunks
        q.owners = (q.a if q.own_a else 1) * (q.b if q.own_b else 1) * (q.chunks if q.own_c else 1)
    else:
        # groups of short runs side by side, as in the forward pass: as they lie in memory
        if q.own_b and not q.inside and q.s * <Py_ssize_t>bytes_of(q.x.storage) < NEARBY:
            q.width = max(1, min(min(q.b // FEW, <Py_ssize_t>BUNDLE), PIECE * BLOCK // max(q.length, 1)))
        q.chunks = (q.b + q.width - 1) // q.width
        items = q.a * q.chunks
        q.owners = (q.a if q.own_a else 1) * (q.chunks if q.own_b else 1)
    q.sharers = items // q.owners

    q.cell_c = w.c != 0 if q.columns else q.width > 1
    cells = q.width if q.cell_c else 1
    q.cell_s = cells if w.s != 0 else 0
    cells *= q.s if w.s != 0 else 1
    q.cell_p = cells if w.p != 0 else 0
    cells *= q.p if w.p != 0 else 1
    q.cells = cells

    q.span = SPAN_ROWS if q.columns else SPAN
    q.plane_segments = 0
    if w.p != 0 and q.p > 1 and not q.inside:
        q.plane_segments = (q.s + q.span - 1) // q.span
        q.segments = q.p * q.plane_segments
    else:
        q.segments = (q.length + q.span - 1) // q.span

    size = q.owners * q.sharers * q.width * q.length
    x_bytes = size * bytes_of(q.x.storage)
    sum_bytes = 2 * q.cells * q.owners * sizeof(double)
    q.parts = min(min(q.sharers, max(PARTS // q.owners, 1)), min(size // PART, (ALLOWED + x_bytes // 100) // sum_bytes))
    q.parts = max(q.parts, 1)
    # x, dy and dx go through the caches together: from three quarters of the last one on, dx goes past
    # it, and x and dy stay there (layer norm of 4096x768: 0.90 to 0.65 ms).  Columns are read in two
    # sweeps; for them it pays a little later.
    along = q.width if q.columns else q.s
    if q.columns and not q.inside and q.dx.s == q.width * <Py_ssize_t>bytes_of(q.dx.storage):
        along *= q.s            # rows that follow one another
    q.stream = x_bytes > (stream_above // 8 * 3 if q.columns else stream_above // 4) and pays_to_stream(along, bytes_of(q.dx.storage))
    q.brief = q.x.storage == q.dy.storage == q.dx.storage == BF16 and not q.columns and not q.stream
    q.threads = 1 if x_bytes < SERIAL // 2 or not FN_OPENMP else max(1, threads)
    with nogil:
        if q.x.storage == F64:
            failed = run_converted(q, &as_double)
        else:
            failed = run_converted(q, &as_float)
    return failed

def walks_back(layout):
    """Whether a kernel can walk a layout backward: any."""
    return True

def run_backward(layout, x, dy, dx, mean, rstd, weight, dweight, dbias, *, bint centred=True, bint training=True,
                 int threads=1, Ticket ticket=None, tuple own=()):
    """One backward pass of `layout`: fills dx, dweight and, unless it is None, dbias.

    `weight` (None: 1 everywhere) may lie in any order; `dbias` lies as `dweight` does.  With a ticket,
    the pass is kept for cached calls; `own` is then the shape of dweight without a weight.
    """
    cdef Back q
    cdef dict strides = layout.strides
    cdef tuple dims = layout.dims, kept = statistics_of(dims, layout.neighbours)
    q.a, q.b, q.p, q.s, q.c = dims
    q.neighbours = layout.neighbours
    q.columns = layout.columns
    q.centred, q.training = centred, training
    operand(&q.x, x, strides["x"], dims)
    operand(&q.dy, dy, strides["dy"], dims)
    operand(&q.dx, dx, strides["dx"], dims)
    operand(&q.mean, mean, strides["stats"], kept)
    operand(&q.rstd, rstd, strides["stats"], kept)
    operand(&q.weight, weight, strides.get("factor"), dims)
    operand(&q.dweight, dweight, strides["dweight"], dims)
    operand(&q.dbias, dbias, strides["dweight"], dims)
    expect(q.x.storage <= F64, "x", x)
    expect(q.dx.storage == q.x.storage, "dx", dx)
    for name, array, storage in (("dy", dy, q.dy.storage), ("weight", weight, q.weight.storage),
                                 ("dweight", dweight, q.dweight.storage), ("dbias", dbias, q.dbias.storage)):
        expect(array is None or storage <= F64, name, array)
    expect(dbias is None or q.dbias.storage == q.dweight.storage, "dbias", dbias)
    expect(mean is None or q.mean.storage == F64, "mean", mean)
    expect(q.rstd.storage == F64, "rstd", rstd)
    if carry_back(&q, threads):
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    if ticket is not None:
        keep_backward(&q, ticket, own)
