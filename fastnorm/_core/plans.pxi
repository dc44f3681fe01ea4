# Plans: what describing a pass has found, kept for the next call with arrays of the same kind.
#
# A description in Python costs tens of microseconds, as much as normalising 20,000 numbers.  A call
# that brings plain arrays is looked up under a key of all that a description depends on; where its
# plan is there, only pointers are filled in.  The kernels are called with the same numbers either
# way: the same bits.

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.contextvars cimport get_value_no_default
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, void*, int)
    object PyDataMem_SetHandler(object)

cdef extern from "blocks.h" nogil:
    int FN_BLOCKS
    void fn_keep_at_most(size_t)
    void fn_watch(size_t, const char*, const char*)

cdef extern from "blocks.h":
    object fn_block_capsule()

cdef extern from *:
    """
    /* The most threads that OpenMP has been told to use here, as threadpoolctl does. */
    #if defined(_OPENMP)
    #include <omp.h>
    static int fn_openmp_now(void) { return omp_get_max_threads(); }
    #else
    static int fn_openmp_now(void) { return 1; }
    #endif
    """
    int fn_openmp_now() noexcept nogil

cdef enum:
    KEY = 192                   # numbers in a key, at most: seven arrays of eight dimensions
    AXES = 8                    # dimensions of an array that has a key
    PLANS = 4096                # kept at a time
    BLOCKS_FROM = 1 << 24       # bytes of a result that comes from kept memory (blocks.h)
    ARRAYS = 5                  # arguments of a call whose plan fills in where they lie
    RECENT = 256                # of which so many are found without a dictionary: 70 ns less a call

cdef struct Key:
    Py_ssize_t n
    int64_t[KEY] f

cdef class Plan:
    cdef Pass forward
    cdef Back backward
    cdef bytes key
    cdef tuple statistics       # the shape of mean and rstd
    cdef Py_ssize_t count       # how many of each

cdef class Call:
    """What a plan is kept under, and where the arrays of the call that it is described for lie."""

    cdef bytes key
    cdef Py_ssize_t n
    cdef char* lies[ARRAYS]     # in the order of the arguments that are arrays; NULL: any will do

cdef class Unplanned:
    """What stands for the result of a call that is to be described; the plan is kept under `key`."""

    cdef readonly Call key

cdef Call call_of(Key* k, tuple arrays):
    cdef Call call = Call()
    call.key = key_of(k)
    call.n = 0
    for array in arrays:
        call.lies[call.n] = bytes_at(array)
        call.n += 1
    return call

cdef inline object in_place(object weight):
    """A weight if it is computed with where it lies: of half precision it is converted by each call."""
    return None if weight is None or cnp.PyArray_ITEMSIZE(<cnp.ndarray>weight) == 2 else weight

cdef Unplanned unplanned(Call call):
    cdef Unplanned answer = Unplanned()
    answer.key = call
    return answer

cdef dict plans = {}
cdef list recent = [None] * RECENT
cdef Unplanned no_plan = Unplanned()

# What the front doors would otherwise look up in Python, at every call.
cdef bint answering = True
cdef int most_threads = 1
cdef int allowed_threads = 1    # whoever asks for more
cdef object scope = None        # the context's own choice (runtime.py), once there has been one
cdef int openmp_begun = fn_openmp_now()

def set_state(bint answers, int threads, int allowed):
    """Whether calls are answered from plans, and by how many threads: for the process."""
    global answering, most_threads, allowed_threads
    answering, most_threads, allowed_threads = answers, threads, allowed

def set_scope(variable):
    """Where contexts have choices of their own: (answers or None, threads or 0, ...), or None."""
    global scope
    scope = variable

cdef inline int limit_here() noexcept:
    cdef int limit = fn_openmp_now()
    return 0 if limit == openmp_begun else limit

def openmp_limit():
    """How many threads OpenMP has been told to use here since it began; 0 where it has not."""
    return limit_here()

cdef int threads_here(bint* answers) except -1:
    """How many threads a call may use here, and whether it is answered from plans."""
    cdef int n = most_threads, own, limit
    answers[0] = answering
    if scope is not None:
        here = get_value_no_default(scope, None)
        if here is not None:
            if (<tuple>here)[0] is not None:
                answers[0] = (<tuple>here)[0] is True
            own = (<tuple>here)[1]
            if own:
                n = own
    n = min(n, allowed_threads)
    limit = limit_here() if n > 1 else 0
    return min(n, limit) if limit else n

cdef Plan find(Key* k):
    """The plan of a key, or None."""
    cdef Py_ssize_t i
    cdef uint64_t h = 0
    cdef Plan plan
    for i in range(k.n):
        h = (h ^ <uint64_t>k.f[i]) * 0x9E3779B97F4A7C15u
    h = (h >> 32) % RECENT
    found = recent[<Py_ssize_t>h]
    if found is not None:
        plan = <Plan>found
        if len(plan.key) == k.n * <Py_ssize_t>sizeof(int64_t) and memcmp(<char*>plan.key, k.f, k.n * sizeof(int64_t)) == 0:
            return plan
    found = plans.get(key_of(k))
    if found is None:
        return None
    recent[<Py_ssize_t>h] = found
    return <Plan>found

cdef int push(Key* k, int64_t v) noexcept:
    k.f[k.n] = v
    k.n += 1
    return 0

cdef bint push_number(Key* k, object v) except -1:
    cdef int overflow = 0
    if not PyLong_CheckExact(v):
        return False
    push(k, PyLong_AsLongLongAndOverflow(v, &overflow))
    return overflow == 0

cdef bint is_number(object v, double* number) except -1:
    """Whether an option is a plain float or whole number: anything else is described, and judged."""
    cdef int overflow = 0
    if PyFloat_Check(v):
        number[0] = PyFloat_AS_DOUBLE(v)
        return True
    if not PyLong_CheckExact(v):
        return False
    number[0] = <double>PyLong_AsLongLongAndOverflow(v, &overflow)
    return overflow == 0

cdef bint push_choice(Key* k, object v) except -1:
    """A whole number, a tuple of them, or None."""
    if v is None:
        push(k, -1)
    elif type(v) is tuple and len(<tuple>v) <= AXES:
        push(k, 1 + len(<tuple>v))
        for n in <tuple>v:
            if not push_number(k, n):
                return False
    else:
        push(k, 0)
        return push_number(k, v)
    return True

cdef bint push_array(Key* k, object v, int kind) noexcept:
    """Whether an array is taken as it is; of type number `kind`, or of any float type at -1."""
    cdef cnp.ndarray array
    cdef int i, number, ndim
    cdef Py_ssize_t n, step, size
    if v is None:
        push(k, 0)
        return True
    if not cnp.PyArray_CheckExact(v):
        return False
    array = <cnp.ndarray>v
    number, ndim, size = cnp.PyArray_TYPE(array), cnp.PyArray_NDIM(array), cnp.PyArray_ITEMSIZE(array)
    if ndim > AXES or not cnp.PyArray_ISBEHAVED_RO(array):
        return False
    if number != kind and (kind != -1 or not (number == cnp.NPY_FLOAT32 or number == cnp.NPY_FLOAT64 or number == cnp.NPY_FLOAT16 or is_bfloat16(array))):
        return False
    push(k, 1 + ndim + 16 * <int64_t>number)
    for i in range(ndim):
        n, step = cnp.PyArray_DIM(array, i), cnp.PyArray_STRIDE(array, i)
        # empty, reversed, broadcast or oddly spaced: described, and perhaps copied, each time
        if n == 0 or (n > 1 and (step <= 0 or step % size != 0)):
            return False
        push(k, n)
        push(k, step)
    return True

cdef inline int computing_kind(object x) noexcept:
    return cnp.NPY_FLOAT64 if cnp.PyArray_CheckExact(x) and cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32

cdef bint push_weight(Key* k, object v, object x) noexcept:
    """Likewise: of the type that is computed in, or of that of x, to be converted by each call."""
    if cnp.PyArray_CheckExact(v) and cnp.PyArray_TYPE(<cnp.ndarray>v) == cnp.PyArray_TYPE(<cnp.ndarray>x):
        return push_array(k, v, -1) and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>v)
    return push_array(k, v, computing_kind(x))

cdef object as_planned(object v, Operand* o):
    """A weight as the numbers that the plan's description had."""
    cdef Py_ssize_t n
    if v is None or cnp.PyArray_ITEMSIZE(<cnp.ndarray>v) != 2 or o.storage != F32:
        return v
    n = cnp.PyArray_SIZE(<cnp.ndarray>v)
    converted = cnp.PyArray_SimpleNew(1, <cnp.npy_intp*>&n, cnp.NPY_FLOAT32)
    load(bytes_at(v), storage_of(<cnp.ndarray>v), n, <float*>bytes_at(converted))
    return converted

cdef bytes key_of(Key* k):
    return PyBytes_FromStringAndSize(<char*>k.f, k.n * sizeof(int64_t))

cdef keep(Plan plan, Call call, char** data, tuple statistics):
    """Answer calls of this key from a plan, if its pass worked on the caller's own memory.

    An array that was copied first, for whatever reason, has other strides than those of later calls.
    `data` is where the operands lay, in the order of the call's arrays.
    """
    cdef Py_ssize_t i
    for i in range(call.n):
        if call.lies[i] != NULL and call.lies[i] != data[i]:
            return
    plan.key = call.key
    plan.statistics = statistics
    plan.count = 1
    for n in statistics:
        plan.count *= n
    if len(plans) >= PLANS:
        plans.clear()
    plans[call.key] = plan

cdef keep_forward(Plan plan, Call call, tuple statistics):
    cdef Pass* q = &plan.forward
    cdef char* added = q.residual.data if q.total.data == NULL else q.addend.data
    keep(plan, call, [q.x.data, q.y.data, q.weight.data, q.bias.data, added], statistics)

cdef keep_backward(Plan plan, Call call, tuple own):
    cdef Back* q = &plan.backward
    keep(plan, call, [q.x.data, q.dy.data, q.weight.data, q.mean.data, q.rstd.data], own)

cdef inline char* bytes_at(object array) noexcept:
    return NULL if array is None else <char*>cnp.PyArray_DATA(<cnp.ndarray>array)

cdef object blocks = fn_block_capsule()

def keep_at_most(size_t limit):
    """Bytes of freed results that are kept for the next ones."""
    fn_keep_at_most(limit)

def trim():
    """Give back the memory that is kept; how many bytes that was."""
    return fn_trim()

def watch_memory(size_t limit, bytes used, bytes stat):
    """Keep nothing near a limit: files that say how much is used, and how much of that by files."""
    fn_watch(limit, used, stat)

cdef object like(object array):
    """An array for the result: the shape, type and memory order of another."""
    if FN_BLOCKS and cnp.PyArray_NBYTES(<cnp.ndarray>array) >= BLOCKS_FROM:
        before = PyDataMem_SetHandler(blocks)
        try:
            return PyArray_NewLikeArray(<cnp.ndarray>array, cnp.NPY_KEEPORDER, NULL, 0)
        except MemoryError:
            pass                # not as a whole number of huge pages, that is
        finally:
            PyDataMem_SetHandler(before)
    try:
        return PyArray_NewLikeArray(<cnp.ndarray>array, cnp.NPY_KEEPORDER, NULL, 0)
    except MemoryError:
        if not fn_trim():
            raise
    return PyArray_NewLikeArray(<cnp.ndarray>array, cnp.NPY_KEEPORDER, NULL, 0)

def empty_like(array):
    """`np.empty_like` of a plain array, from where the results of known calls come."""
    return like(array)

cdef void update_running(object running, const double* batch, Py_ssize_t n, double factor, double momentum) noexcept:
    """running = (1 - momentum) * running + momentum * factor * batch, rounded once."""
    cdef Py_ssize_t i
    cdef char* data = bytes_at(running)
    if data == NULL:
        return
    for i in range(n):
        if cnp.PyArray_TYPE(<cnp.ndarray>running) == cnp.NPY_FLOAT32:
            (<float*>data)[i] = <float>((1 - momentum) * (<float*>data)[i] + momentum * (batch[i] * factor))
        else:
            (<double*>data)[i] = (1 - momentum) * (<double*>data)[i] + momentum * (batch[i] * factor)

cdef bint push_running(Key* k, object v, bint written) noexcept:
    cdef cnp.ndarray array
    if v is None:
        push(k, 0)
        return True
    if not push_array(k, v, -1):
        return False
    array = <cnp.ndarray>v
    if cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT32 and cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT64:
        return False
    return cnp.PyArray_IS_C_CONTIGUOUS(array) and (not written or cnp.PyArray_ISWRITEABLE(array))

cdef void read_running(double* into, object running, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        if cnp.PyArray_TYPE(<cnp.ndarray>running) == cnp.NPY_FLOAT32:
            into[i] = (<float*>bytes_at(running))[i]
        else:
            into[i] = (<double*>bytes_at(running))[i]

cdef bint apart(object out, object other) noexcept:
    """Whether writing `out` cannot change what is still to be read of another array."""
    cdef char* a = bytes_at(out)
    cdef char* b = bytes_at(other)
    cdef int i
    if other is None:
        return True
    if a == b:
        # in place is fine: each element is read before it is written
        if cnp.PyArray_TYPE(<cnp.ndarray>out) != cnp.PyArray_TYPE(<cnp.ndarray>other) or cnp.PyArray_NDIM(<cnp.ndarray>out) != cnp.PyArray_NDIM(<cnp.ndarray>other):
            return False
        for i in range(cnp.PyArray_NDIM(<cnp.ndarray>out)):
            if cnp.PyArray_DIM(<cnp.ndarray>out, i) != cnp.PyArray_DIM(<cnp.ndarray>other, i) or cnp.PyArray_STRIDE(<cnp.ndarray>out, i) != cnp.PyArray_STRIDE(<cnp.ndarray>other, i):
                return False
        return True
    return a + extent(out) <= b or b + extent(other) <= a

cdef Py_ssize_t extent(object array) noexcept:
    """Bytes from the first element to the end of the last; strides of keyed arrays are positive."""
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(<cnp.ndarray>array)
    cdef int i
    for i in range(cnp.PyArray_NDIM(<cnp.ndarray>array)):
        if cnp.PyArray_DIM(<cnp.ndarray>array, i) > 1:
            size += (cnp.PyArray_DIM(<cnp.ndarray>array, i) - 1) * cnp.PyArray_STRIDE(<cnp.ndarray>array, i)
    return size

cdef bint same_dims(object a, object b) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(<cnp.ndarray>a) != cnp.PyArray_NDIM(<cnp.ndarray>b):
        return False
    for i in range(cnp.PyArray_NDIM(<cnp.ndarray>a)):
        if cnp.PyArray_DIM(<cnp.ndarray>a, i) != cnp.PyArray_DIM(<cnp.ndarray>b, i):
            return False
    return True

cdef bint push_options(Key* k, object x, object weight, object bias, object residual, object activation, object out) except -1:
    """What few calls have: a residual, an activation, an array to write into."""
    if residual is not None and not (push_array(k, residual, -1) and same_dims(residual, x)):
        return False
    if activation is not None:
        if type(activation) is not str:
            # another type's hash could change arrays that are in the key
            if type(activation) is not user_type:
                return False
            code = user_loops.get((activation, computing_kind(x)))
            push(k, -9)
            # it may raise half way: what `out` holds is then as it was
            return out is None and code is not None and push_number(k, code)
        code = activation_codes.get(activation)
        if code is None:
            return False
        push(k, -2 - <int>code)
    return push_out(k, x, weight, bias, residual, out)

cdef bint push_out(Key* k, object x, object weight, object bias, object residual, object out) except -1:
    if out is not None:
        push(k, -1)
        if not (cnp.PyArray_CheckExact(out) and cnp.PyArray_TYPE(<cnp.ndarray>out) == cnp.PyArray_TYPE(<cnp.ndarray>x)
                and push_array(k, out, cnp.PyArray_TYPE(<cnp.ndarray>x)) and same_dims(out, x)
                and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)):
            return False
        return apart(out, x) and apart(out, residual) and apart(out, weight) and apart(out, bias)
    return True

cdef dict activation_codes = {"relu": RELU, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}
cdef dict user_loops = {}       # addresses, by function and type that is computed in
cdef object user_type = None    # of all these functions: Numba's

cdef object raise_again = None  # of a function and type: what it raised

def know(function, bint double_, Py_ssize_t address, again):
    """Tell the quick door the compiled loop of a user's activation, and who raises what it raised."""
    global raise_again, user_type
    raise_again, user_type = again, type(function)
    user_loops[function, cnp.NPY_FLOAT64 if double_ else cnp.NPY_FLOAT32] = address

def quick_forward(Py_ssize_t kind, first, second, x, weight, bias, eps, return_stats,
                  where=None, residual=None, activation=None, out=None,
                  bint own_eps=True, running_mean=None, running_var=None, momentum=0.0):
    """The result of a call whose plan is known, or else `Unplanned`.

    `kind`, `first` and `second` tell calls apart that the arrays do not.  Without `own_eps` the plan's
    is used.  Running statistics are read where the plan's pass is given its statistics, and else
    updated.  A plan with an addend is of x + residual, and returns that too.
    """
    cdef Key k
    cdef Pass q
    cdef Plan plan
    cdef Py_ssize_t n
    cdef double count, shift = 0.0, share = 0.0
    cdef double* scratch = NULL
    cdef bint updated, answers
    cdef int threads = threads_here(&answers)
    k.n = 0
    if where is not None or not answers:
        return no_plan
    # what no description would take is not answered, either
    if return_stats is not True and return_stats is not False:
        return no_plan
    if not (is_number(eps, &shift) and is_number(momentum, &share)):
        return no_plan
    if not (0.0 <= shift < INFINITY and 0.0 <= share <= 1.0):
        return no_plan
    push(&k, 2 * kind + own_eps)
    if not (push_choice(&k, first) and push_choice(&k, second) and push_array(&k, x, -1) and x is not None):
        return no_plan
    if not (push_weight(&k, weight, x) and push_weight(&k, bias, x)):
        return no_plan
    if not (push_running(&k, running_mean, True) and push_running(&k, running_var, True)):
        return no_plan
    if residual is not None or activation is not None or out is not None:
        if not push_options(&k, x, weight, bias, residual, activation, out):
            return no_plan
    plan = find(&k)
    if plan is None:
        return unplanned(call_of(&k, (x, out, in_place(weight), in_place(bias), residual)))
    q = plan.forward
    if own_eps:
        q.eps = shift
    n = plan.count
    y = like(x) if out is None else out
    weight, bias = as_planned(weight, &q.weight), as_planned(bias, &q.bias)
    aim(&q.x, x)
    aim(&q.y, y)
    aim(&q.weight, weight)
    aim(&q.bias, bias)
    total = None
    if q.total.data != NULL:
        total = like(x)
        aim(&q.addend, residual)
        aim(&q.total, total)
    else:
        aim(&q.residual, residual)
    updated = not q.given and (running_mean is not None or running_var is not None)
    mean = rstd = None
    if return_stats or q.given or updated:
        mean, rstd = np.empty(plan.statistics), np.empty(plan.statistics)
        scratch = <double*>malloc(n * sizeof(double))  # from here on nothing raises until it is freed
        if scratch == NULL:
            raise MemoryError("fastnorm could not get memory for the variances")
        aim(&q.mean, mean)
        aim(&q.rstd, rstd)
        aim_at(&q.var, <char*>scratch, n * sizeof(double))
        if q.given:
            read_running(<double*>q.mean.data, running_mean, n)
            read_running(scratch, running_var, n)
    else:
        q.mean.data = q.var.data = q.rstd.data = NULL
    failed = carry_out(&q, threads)
    if q.given:
        inverse_roots(<double*>q.rstd.data, scratch, q.eps, n)
    if updated and not failed and not q.raised:
        count = <double>(cnp.PyArray_SIZE(<cnp.ndarray>x) // n)
        update_running(running_mean, <double*>q.mean.data, n, 1.0, share)
        update_running(running_var, scratch, n, count / (count - 1), share)
    free(scratch)
    if failed:
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    if q.raised:
        raise_again(activation, np.float64 if computing_kind(x) == cnp.NPY_FLOAT64 else np.float32)
    if total is not None:
        return y, total
    if not return_stats:
        return y
    return (y, mean, rstd) if q.centred else (y, rstd)

cdef void inverse_roots(double* rstd, const double* var, double eps, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        rstd[i] = 0.0 if var[i] + eps == 0.0 else 1.0 / sqrt(var[i] + eps)

def quick_backward(Py_ssize_t kind, first, second, dy, x, mean, rstd, weight):
    """Likewise: dx, dweight and, of a centred norm, dbias."""
    cdef Key k
    cdef Back q
    cdef Plan plan
    cdef bint answers
    cdef int threads = threads_here(&answers)
    k.n = 0
    if not answers:
        return no_plan
    push(&k, -1 - kind)
    if not (push_choice(&k, first) and push_choice(&k, second) and push_array(&k, x, -1) and x is not None):
        return no_plan
    if not (push_array(&k, dy, -1) and dy is not None and push_weight(&k, weight, x)):
        return no_plan
    for statistic in (mean, rstd):
        if not push_array(&k, statistic, cnp.NPY_FLOAT64):
            return no_plan
        if statistic is not None and not cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>statistic):
            return no_plan
    plan = find(&k)
    if plan is None:
        return unplanned(call_of(&k, (x, dy, in_place(weight), mean, rstd)))
    q = plan.backward
    dx = like(x)
    if weight is not None:
        dweight = like(weight)
    else:
        dweight = np.empty(plan.statistics, (<cnp.ndarray>x).dtype)
    dbias = like(dweight) if q.centred else None
    weight = as_planned(weight, &q.weight)
    aim(&q.x, x)
    aim(&q.dy, dy)
    aim(&q.dx, dx)
    aim(&q.mean, mean)
    aim(&q.rstd, rstd)
    aim(&q.weight, weight)
    aim(&q.dweight, dweight)
    aim(&q.dbias, dbias)
    if carry_back(&q, threads):
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    return (dx, dweight, dbias) if q.centred else (dx, dweight)
