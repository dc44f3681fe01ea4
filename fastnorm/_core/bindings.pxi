# From Python's arrays to the structures of the kernels (forward.h, backward_layout.h), and back.

from libc.math cimport INFINITY, sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memset
cimport numpy as cnp

import sys

import numpy as np

cnp.import_array()

cdef extern from "kernels.h" nogil:
    int FN_HAS_FMA, FN_HAS_EXTENDED, FN_CHECKED
    ctypedef enum Storage:
        F16, BF16, F32, F64, U8, I8, U16, I16
    ctypedef enum Scaling:
        RSTD, NORM, FACTOR
    ctypedef enum Activation:
        IDENTITY, ACTIVATION_COUNT
    ctypedef Py_ssize_t (*UserLoop)(
        const void*, void*, Py_ssize_t, const void*, const void*, const void*) noexcept
    ctypedef struct Operand:
        char* data
        Storage storage
        Py_ssize_t a, b, p, s, c
        char* low
        char* high
    ctypedef enum Walk:
        WALK_ITEMS, WALK_PIPELINED, WALK_GATHERED, WALK_ROWS
    ctypedef struct Forward:
        Py_ssize_t a, b, p, s, c, neighbours, fields
        bint shared
        bint columns, centred, given, activation_first, raised
        Scaling scaling
        Activation activation, slope
        UserLoop user
        double eps
        Operand x, y, mask, weight, bias, residual, addend, total, mean, var, rstd, dy
        Py_ssize_t length, width, chunks, items, block, split_length, splits
        bint guarded, foldable, tabulated, releases_gil
        bint non_temporal, direct, direct_non_temporal, bf16_direct
        Walk walk
        int max_threads, small
    ctypedef struct Backward:
        Py_ssize_t a, b, p, s, c, neighbours
        bint columns, centred, training
        Operand x, dy, dx, weight, dweight, dbias, mean, rstd
        Py_ssize_t length, width, chunks, owners, sharers, span, segments, plane_segments
        Py_ssize_t cell_p, cell_s, cell_c, cells, parts, together
        bint own_a, own_b, own_c, inside, non_temporal, bf16_direct, convert_weight
        bint whole_rows, whole_groups, keep_cells, sweeps, few_owners
        int max_threads, small
    const char* SIZES
    void forward_threads(Forward*, int) noexcept
    int run_planned_forward "run_forward"(Forward*) noexcept
    void backward_threads(Backward*, int) noexcept
    bint lend_threads(Py_ssize_t, Py_ssize_t) noexcept
    int run_planned_backward "run_backward"(Backward*) noexcept
    void aim_at(Operand*, char*, Py_ssize_t) noexcept
    void load_f32(const char*, Storage, Py_ssize_t, float*) noexcept

# ---- operands ------------------------------------------------------------------------------------

cdef int bfloat16_number = -1   # of its type, once one has been seen: ml_dtypes gives it out

cdef bint is_bfloat16(cnp.ndarray array) except -1:
    """Whether an array is of ml_dtypes.bfloat16, not of another type that NumPy does not know."""
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

cdef dict storages = {
    cnp.NPY_FLOAT32: F32, cnp.NPY_FLOAT64: F64, cnp.NPY_FLOAT16: F16, cnp.NPY_BOOL: U8,
    cnp.NPY_UINT8: U8, cnp.NPY_INT8: I8, cnp.NPY_UINT16: U16, cnp.NPY_INT16: I16,
}

cdef Storage storage_of(cnp.ndarray array) except *:
    """How the numbers of an array are kept; a mask is never loaded."""
    found = storages.get(cnp.PyArray_TYPE(array))
    if found is not None:
        return <Storage><int>found
    if is_bfloat16(array):
        return BF16
    raise TypeError(f"the kernels have no arithmetic for dtype {array.dtype}")

cdef int expect(bint right, name, array) except -1:
    """Refuse what would be read as numbers that it does not hold."""
    if not right:
        raise TypeError(f"the kernels cannot take {name} of dtype {array.dtype} here")
    return 0

cdef void bounds_of(cnp.ndarray a, char** low, char** high) noexcept:
    """The memory between the first and behind the last byte of an array."""
    cdef Py_ssize_t step
    cdef int i
    low[0] = <char*>cnp.PyArray_DATA(a)
    high[0] = low[0] + cnp.PyArray_ITEMSIZE(a)
    for i in range(cnp.PyArray_NDIM(a)):
        step = (cnp.PyArray_DIM(a, i) - 1) * cnp.PyArray_STRIDE(a, i)
        if step < 0:
            low[0] += step
        else:
            high[0] += step

cdef inline void aim(Operand* o, object array) noexcept:
    """Let an operand be this array, or none."""
    o.data = NULL if array is None else <char*>cnp.PyArray_DATA(<cnp.ndarray>array)
    if FN_CHECKED and array is not None:
        bounds_of(<cnp.ndarray>array, &o.low, &o.high)

cdef tuple statistics_of(tuple dims, Py_ssize_t neighbours):
    """The dimensions of an array of statistics: `neighbours` columns together have one."""
    return (*dims[:4], dims[4] // neighbours)

cdef int operand(Operand* o, object array, tuple strides, tuple dims) except -1:
    """Where an operand lies, and how far its elements are apart: `strides` in elements.

    Refuses a walk that would leave the array: whoever described it was wrong.
    """
    cdef Py_ssize_t size, n, step, before = 0, after
    memset(o, 0, sizeof(Operand))
    o.storage = F64
    if array is None:
        return 0
    size = cnp.PyArray_ITEMSIZE(<cnp.ndarray>array)
    o.data = <char*>cnp.PyArray_DATA(<cnp.ndarray>array)
    o.storage = storage_of(<cnp.ndarray>array)
    o.a, o.b, o.p, o.s, o.c = [step * size for step in strides]
    after = size
    for n, step in zip(dims, strides):
        if step < 0:
            before += (n - 1) * step * size
        else:
            after += (n - 1) * step * size
    bounds_of(<cnp.ndarray>array, &o.low, &o.high)
    if o.data + before < o.low or o.data + after > o.high:
        raise SystemError(
            f"a pass of dimensions {dims} and strides {strides} leaves an array of shape "
            f"{array.shape} and strides {array.strides}; "
            "please report this with the call's arguments"
        )
    return 0

# ---- the forward pass ----------------------------------------------------------------------------

cdef int execute(Forward* q, int threads) noexcept:
    """Run a pass; the interpreter's lock is handed over where that costs less than it gains."""
    forward_threads(q, threads)
    if not q.releases_gil:
        return run_planned_forward(q)
    with nogil:
        return run_planned_forward(q)

cdef dict walks = {
    "items": WALK_ITEMS, "pipelined": WALK_PIPELINED, "gathered": WALK_GATHERED, "rows": WALK_ROWS,
}

cdef int suits(bint right) except -1:
    """Refuse a schedule that was made for another layout."""
    if not right:
        raise SystemError("a schedule does not suit its layout; please report this")
    return 0

cdef int follow(Forward* q, schedule) except -1:
    """Take over what a ForwardSchedule says."""
    blocking = schedule.blocking
    q.length, q.block, q.splits = blocking.length, blocking.block, blocking.splits
    q.split_length, q.bf16_direct = blocking.split_length, blocking.bf16_direct
    q.walk = <Walk><int>walks[schedule.path]
    q.width, q.chunks, q.items = schedule.width, schedule.chunks, schedule.items
    q.foldable, q.tabulated = schedule.foldable, schedule.tabulated
    q.guarded = q.mask.data != NULL or (q.given and not q.foldable)
    q.non_temporal, q.direct = schedule.non_temporal, schedule.direct
    q.direct_non_temporal = schedule.direct_non_temporal
    q.max_threads, q.small = schedule.max_threads, schedule.small
    q.releases_gil = schedule.releases_gil
    return suits(q.length == q.p * q.s and q.items == (q.a * q.b if q.columns else q.a) * q.chunks
                 and q.chunks * q.width >= (q.c if q.columns else q.b)
                 and q.splits * q.split_length >= q.length)

cdef int no_memory() except -1:
    raise MemoryError("fastnorm could not get the scratch memory of its kernels")

def run_pass(layout, schedule, x, y, mean, var, rstd, *, weight=None, bias=None, mask=None,
             residual=None, addend=None, total=None, bint centred=True, bint given=False,
             Scaling scaling=RSTD, double eps=0.0, Activation activation=IDENTITY,
             Py_ssize_t user=0, bint activation_first=False, int threads=1, Ticket ticket=None,
             tuple statistics=(), dy=None):
    """One pass of `layout` over x into y (None: statistics alone).

    Fills mean, var and rstd, or reads the first two where `given`. With dy, y is dy times the slope
    of the activation, or what the user's function gives.  With a ticket, the pass is kept for
    cached calls; `statistics` is then the shape in which mean and rstd are returned.  Returns
    whether the user's activation raised.
    """
    cdef Forward q
    cdef dict strides = layout.strides
    cdef tuple dims = layout.dims, kept = statistics_of(dims, layout.neighbours)
    cdef tuple weighted = kept if layout.shared else dims
    q.a, q.b, q.p, q.s, q.c = dims
    q.neighbours, q.columns, q.fields = layout.neighbours, layout.columns, 0
    q.shared = layout.shared
    q.centred, q.given, q.scaling, q.eps = centred, given, scaling, eps
    q.activation, q.user, q.raised = activation, <UserLoop>user, False
    q.activation_first, q.slope = activation_first, IDENTITY
    if dy is not None:
        q.activation, q.slope = IDENTITY, activation
    operand(&q.x, x, strides["x"], dims)
    operand(&q.y, y, strides.get("y"), dims)
    operand(&q.mean, mean, strides["stats"], kept)
    operand(&q.var, var, strides["stats"], kept)
    operand(&q.rstd, rstd, strides["stats"], kept)
    operand(&q.weight, weight, strides.get("weight"), weighted)
    operand(&q.bias, bias, strides.get("bias"), weighted)
    operand(&q.mask, mask, strides.get("mask"), dims)
    operand(&q.residual, residual, strides.get("residual"), dims)
    operand(&q.addend, addend, strides.get("addend"), dims)
    operand(&q.total, total, strides.get("total"), dims)
    operand(&q.dy, dy, strides.get("dy"), dims)
    cdef Storage computing = F64 if q.x.storage == F64 else F32
    expect(q.x.storage <= F64, "x", x)
    expect(y is None or q.y.storage == (q.x.storage if dy is None else computing), "y", y)
    expect(dy is None or q.dy.storage <= F64, "dy", dy)
    expect(total is None or q.total.storage == q.x.storage, "total", total)
    expect(mask is None or q.mask.storage == U8, "mask", mask)
    expect(residual is None or q.residual.storage <= F64, "residual", residual)
    expect(addend is None or q.addend.storage <= F64, "addend", addend)
    expect(weight is None or q.weight.storage == computing, "weight", weight)
    expect(bias is None or q.bias.storage == computing, "bias", bias)
    expect(q.mean.storage == F64, "mean", mean)
    expect(q.var.storage == F64, "var", var)
    expect(q.rstd.storage == F64, "rstd", rstd)
    follow(&q, schedule)
    if execute(&q, threads):
        no_memory()
    if ticket is not None and dy is not None:
        keep_through(&q, ticket)
    elif ticket is not None and not q.raised:
        keep_forward(&q, ticket, statistics)
    return q.raised

def run_moments(layout, schedule, x, fields, *, mask=None, int threads=1):
    """Moments of x into `fields`: count, mean, its rest, sum of squared deviations, its rest.

    The strides of the first field are the layout's "stats".  The blocks, the merge and the threads
    are those of a pass, which here ends before the moments become a scale.
    """
    cdef Forward q
    cdef dict strides = layout.strides
    cdef tuple dims = layout.dims
    memset(&q, 0, sizeof(Forward))  # no operand but those named below
    q.a, q.b, q.p, q.s, q.c = dims
    q.neighbours, q.columns, q.centred = layout.neighbours, layout.columns, True
    operand(&q.x, x, strides["x"], dims)
    operand(&q.mask, mask, strides.get("mask"), dims)
    operand(&q.mean, fields, strides["stats"], statistics_of(dims, layout.neighbours))
    expect(mask is None or q.mask.storage == U8, "mask", mask)
    expect(q.mean.storage == F64, "fields", fields)
    q.var = q.rstd = q.mean
    q.fields = cnp.PyArray_STRIDE(<cnp.ndarray>fields, 0)
    follow(&q, schedule)
    if execute(&q, threads):
        no_memory()

# ---- the backward pass ---------------------------------------------------------------------------

cdef int execute_backward(Backward* q, int threads) noexcept:
    backward_threads(q, threads)
    with nogil:
        return run_planned_backward(q)

cdef int follow_back(Backward* q, schedule) except -1:
    """Take over what a BackwardSchedule says."""
    blocking = schedule.blocking
    q.length, q.width, q.chunks = blocking.length, blocking.width, blocking.chunks
    q.own_a, q.own_b, q.own_c = blocking.own
    q.inside, q.owners, q.sharers = blocking.inside, blocking.owners, blocking.sharers
    q.span, q.segments = blocking.span, blocking.segments
    q.plane_segments = blocking.plane_segments
    q.cell_p, q.cell_s, q.cell_c = blocking.cell_p, blocking.cell_s, blocking.cell_c
    q.cells, q.parts, q.sweeps = blocking.cells, blocking.parts, blocking.sweeps
    q.together, q.few_owners = schedule.together, schedule.few_owners
    q.keep_cells = not (q.sweeps and q.inside)
    q.whole_rows, q.whole_groups = schedule.path == "rows", schedule.path == "groups"
    q.convert_weight = schedule.convert_weight
    q.non_temporal, q.bf16_direct = schedule.non_temporal, schedule.bf16_direct
    q.max_threads, q.small = schedule.max_threads, schedule.small
    return suits(q.length == q.p * q.s and q.chunks * q.width >= (q.c if q.columns else q.b)
                 and q.owners * q.sharers == (q.a * q.b if q.columns else q.a) * q.chunks)

def run_backward(layout, schedule, x, dy, dx, *, mean, rstd, weight, dweight, dbias,
                 bint centred=True, bint training=True, int threads=1, Ticket ticket=None,
                 tuple own=()):
    """One backward pass of `layout`: fills dx, dweight and, unless it is None, dbias.

    `weight` (None: 1 everywhere) may lie in any order; `dbias` lies as `dweight` does.  With a
    ticket, the pass is kept for cached calls; `own` is then the shape of dweight without a weight.
    True: there is a kernel for every layout.
    """
    cdef Backward q
    cdef dict strides = layout.strides
    cdef tuple dims = layout.dims, kept = statistics_of(dims, layout.neighbours)
    q.a, q.b, q.p, q.s, q.c = dims
    q.neighbours, q.columns = layout.neighbours, layout.columns
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
    expect(q.dy.storage <= F64, "dy", dy)
    expect(weight is None or q.weight.storage <= F64, "weight", weight)
    expect(q.dweight.storage <= F64, "dweight", dweight)
    expect(dbias is None or q.dbias.storage == q.dweight.storage, "dbias", dbias)
    expect(mean is None or q.mean.storage == F64, "mean", mean)
    expect(q.rstd.storage == F64, "rstd", rstd)
    follow_back(&q, schedule)
    if execute_backward(&q, threads):
        no_memory()
    if ticket is not None:
        keep_backward(&q, ticket, own)
    return True

def borrow_threads(Py_ssize_t run, Py_ssize_t count):
    """Run on another library's threads while they are awake, by its RunOnThreads and CountThreads.

    Whether that is possible here.
    """
    return lend_threads(run, count)

# ---- what these kernels are ----------------------------------------------------------------------

def is_checked():
    """Whether these kernels check every bound (check.h)."""
    return bool(FN_CHECKED)

def multiply_add():
    """How a product is added to (numbers.h): fused, through extended precision, or plain."""
    return "fused" if FN_HAS_FMA else "extended" if FN_HAS_EXTENDED else "plain"

def sizes():
    """The constants of schedule.py that these kernels were built with."""
    return SIZES.decode()

def address_of(cnp.ndarray array):
    """Where the first element of an array lies: `array.ctypes.data` in a fiftieth of the time."""
    return <size_t>cnp.PyArray_DATA(array)
