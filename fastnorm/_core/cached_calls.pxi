# Cached calls: what describing a call has found, kept for the next with arrays of the same kind.
#
# A description in Python costs tens of microseconds, as much as normalising 20,000 numbers.  A call
# of plain arrays is looked up under a key of all that a description depends on; where it is found,
# only pointers are filled in.  The kernels get the same numbers either way: the same bits.

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.contextvars cimport get_value_no_default
from libc.stdint cimport uint64_t
from libc.string cimport memcmp

cdef enum:
    CALLS = 4096                # kept at a time
    RECENT = 256                # of which so many are found without a dictionary
    MOST_ARGUMENTS = 20         # of a public function

cdef class CachedCall:
    cdef Forward forward        # of a call backward: what goes through an activation
    cdef Backward backward
    cdef bint activated         # whether it does
    cdef bytes key
    cdef tuple statistics       # the shape of mean and rstd, or of dweight without a weight
    cdef Py_ssize_t count       # how many of each

cdef class Ticket:
    """What a call is kept under, and where its arrays lie."""

    cdef bytes key
    cdef char* lies[PART_RSTD + 1]   # by part; NULL: anywhere
    cdef bint activated         # a call backward through an activation,
    cdef CachedCall through     # of which this is kept first
    cdef bint half_running      # running statistics of half precision are read, but not moved

# --- The threads of a call, and who answers it ----------------------------------------------------

cdef bint answering = True
cdef int most_threads = 1
cdef object scope = None        # the context's own choice (runtime.py), once there has been one
cdef int thread_limit = 1       # whatever is chosen

def set_state(bint answers, int threads, int limit):
    """Whether calls are answered from the cache, and by how many threads: for the process."""
    global answering, most_threads, thread_limit
    answering, most_threads, thread_limit = answers, threads, limit

def set_scope(variable):
    """Where contexts have choices of their own: (answers or None, threads or 0, ...), or None."""
    global scope
    scope = variable

cdef int threads_here() except -1:
    """How many threads a call may use here; 0 where it is not answered from the cache."""
    cdef int n = most_threads, own
    cdef bint answers = answering
    if scope is not None:
        here = get_value_no_default(scope, None)
        if here is not None:
            if (<tuple>here)[0] is not None:
                answers = (<tuple>here)[0] is True
            own = (<tuple>here)[1]
            if own:
                n = own
    if not answers:
        return 0
    return max(1, min(n, thread_limit))

# --- The calls that are kept ----------------------------------------------------------------------

cdef bytes key_of(Key* k):
    return PyBytes_FromStringAndSize(<char*>k.f, k.n * sizeof(int64_t))

cdef dict calls = {}
cdef list recent = [None] * RECENT

def forget():
    """Keep no call: schedules are others now."""
    calls.clear()
    recent[:] = [None] * RECENT

cdef CachedCall find(Key* k):
    """The cached call of a key, or None."""
    cdef Py_ssize_t i, size = k.n * <Py_ssize_t>sizeof(int64_t)
    cdef uint64_t h = 0
    cdef CachedCall call
    for i in range(k.n):
        h = (h ^ <uint64_t>k.f[i]) * 0x9E3779B97F4A7C15u
    h = (h >> 32) % RECENT
    found = recent[<Py_ssize_t>h]
    if found is not None:
        call = <CachedCall>found
        if len(call.key) == size and memcmp(<char*>call.key, k.f, size) == 0:
            return call
    found = calls.get(key_of(k))
    if found is None:
        return None
    recent[<Py_ssize_t>h] = found
    return <CachedCall>found

cdef keep(CachedCall call, Ticket ticket, tuple statistics):
    call.key = ticket.key
    call.statistics = statistics
    call.count = 1
    for n in statistics:
        call.count *= n
    if len(calls) >= CALLS:
        calls.clear()
    calls[ticket.key] = call

# An array that was copied first, for whatever reason, has other strides than those of later calls:
# a pass is kept only if it worked on the caller's own memory.
cdef inline bint moved(Ticket ticket, int part, Operand* o) noexcept:
    return ticket.lies[part] != NULL and ticket.lies[part] != o.data

cdef keep_forward(Forward* q, Ticket ticket, tuple statistics):
    cdef CachedCall call
    cdef Operand* added = &q.residual if q.total.data == NULL else &q.addend
    if (moved(ticket, PART_X, &q.x) or moved(ticket, PART_OUT, &q.y)
            or moved(ticket, PART_WEIGHT, &q.weight) or moved(ticket, PART_BIAS, &q.bias)
            or moved(ticket, PART_RESIDUAL, added) or moved(ticket, PART_WHERE, &q.mask)):
        return
    if ticket.half_running and not q.given:
        return
    call = CachedCall()
    call.forward = q[0]
    keep(call, ticket, statistics)

cdef keep_through(Forward* q, Ticket ticket):
    """The pass through an activation, of a call backward that follows."""
    if (moved(ticket, PART_X, &q.x) or moved(ticket, PART_DY, &q.dy)
            or moved(ticket, PART_WEIGHT, &q.weight) or moved(ticket, PART_BIAS, &q.bias)
            or moved(ticket, PART_RESIDUAL, &q.residual)):
        return
    ticket.through = CachedCall()
    ticket.through.forward = q[0]
    ticket.lies[<int>PART_DY] = q.y.data

cdef keep_backward(Backward* q, Ticket ticket, tuple own):
    cdef CachedCall call
    if ticket.activated and ticket.through is None:
        return
    if (moved(ticket, PART_X, &q.x) or moved(ticket, PART_DY, &q.dy)
            or moved(ticket, PART_WEIGHT, &q.weight) or moved(ticket, PART_MEAN, &q.mean)
            or moved(ticket, PART_RSTD, &q.rstd)):
        return
    call = CachedCall() if ticket.through is None else ticket.through
    call.activated = ticket.activated
    call.backward = q[0]
    keep(call, ticket, own)

# --- Running statistics ---------------------------------------------------------------------------

cdef void update_running(object running, const double* batch, Py_ssize_t n, double factor,
                         double momentum) noexcept:
    """running = (1 - momentum) * running + momentum * factor * batch, rounded once."""
    cdef Py_ssize_t i
    cdef char* data = bytes_at(running)
    if data == NULL:
        return
    for i in range(n):
        if cnp.PyArray_TYPE(<cnp.ndarray>running) == cnp.NPY_FLOAT32:
            (<float*>data)[i] = <float>((1 - momentum) * (<float*>data)[i]
                                        + momentum * (batch[i] * factor))
        else:
            (<double*>data)[i] = ((1 - momentum) * (<double*>data)[i]
                                  + momentum * (batch[i] * factor))

cdef void read_given(double* into, object running, double otherwise, Py_ssize_t n) noexcept:
    """Statistics that were given, or a number in their place."""
    cdef Py_ssize_t i
    for i in range(n):
        if running is None:
            into[i] = otherwise
        elif cnp.PyArray_TYPE(<cnp.ndarray>running) == cnp.NPY_FLOAT32:
            into[i] = (<float*>bytes_at(running))[i]
        else:
            into[i] = (<double*>bytes_at(running))[i]

cdef void inverse_roots(double* rstd, const double* var, double eps, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        rstd[i] = 0.0 if var[i] + eps == 0.0 else 1.0 / sqrt(var[i] + eps)

# --- Answers --------------------------------------------------------------------------------------

cdef inline bint is_half(object v) noexcept:
    return v is not None and cnp.PyArray_ITEMSIZE(<cnp.ndarray>v) == 2

cdef object converted(object v, Operand* o):
    """A weight as the numbers that the description had: of half precision in float32."""
    return in_single(v) if o.storage == F32 else v

cdef object in_single(object v):
    """An array, of half precision in float32."""
    cdef Py_ssize_t n
    if not is_half(v):
        return v
    n = cnp.PyArray_SIZE(<cnp.ndarray>v)
    array = cnp.PyArray_SimpleNew(1, <cnp.npy_intp*>&n, cnp.NPY_FLOAT32)
    load_f32(bytes_at(v), storage_of(<cnp.ndarray>v), n, <float*>bytes_at(array))
    return array

cdef object forward_result(CachedCall call, Asked* a, int threads):
    cdef Forward q = call.forward
    cdef Py_ssize_t n = call.count
    cdef double count
    cdef double* var = NULL
    x, out, residual = <object>a.x, <object>a.out, <object>a.residual
    running_mean, running_var = <object>a.running_mean, <object>a.running_var
    cdef bint stats = <object>a.return_stats is True
    cdef bint updated = not q.given and (running_mean is not None or running_var is not None)
    if a.own_eps:
        q.eps = a.eps_value
    y = like(x) if out is None else out
    weight = converted(<object>a.weight, &q.weight)
    bias = converted(<object>a.bias, &q.bias)
    aim(&q.x, x)
    aim(&q.y, y)
    aim(&q.weight, weight)
    aim(&q.bias, bias)
    aim(&q.mask, <object>a.where)
    total = None
    if q.total.data != NULL:
        total = like(x)
        aim(&q.addend, residual)
        aim(&q.total, total)
    else:
        aim(&q.residual, residual)
    mean = rstd = None
    if stats or q.given or updated:
        mean, rstd = np.empty(call.statistics), np.empty(call.statistics)
        var = <double*>malloc(n * sizeof(double))  # nothing raises until it is freed
        if var == NULL:
            raise MemoryError("fastnorm could not get memory for the variances")
        aim(&q.mean, mean)
        aim(&q.rstd, rstd)
        aim_at(&q.var, <char*>var, n * sizeof(double))
        if q.given:
            read_given(<double*>q.mean.data, in_single(running_mean), 0.0, n)
            read_given(var, in_single(running_var), a.factor_value, n)
    else:
        q.mean.data = q.var.data = q.rstd.data = NULL
    failed = execute(&q, threads)
    if q.given and stats:
        inverse_roots(<double*>q.rstd.data, var, q.eps, n)
    if updated and not failed and not q.raised:
        count = <double>(cnp.PyArray_SIZE(<cnp.ndarray>x) // n)
        update_running(running_mean, <double*>q.mean.data, n, 1.0, a.momentum_value)
        update_running(running_var, var, n, count / (count - 1), a.momentum_value)
    free(var)
    if failed:
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    if q.raised:
        wide = computing_kind(x) == cnp.NPY_FLOAT64
        raise_again(<object>a.activation, np.float64 if wide else np.float32)
    if total is not None:
        return y, total
    if not stats:
        return y
    return (y, mean, rstd) if q.centred else (y, rstd)

cdef object through_activation(CachedCall call, Asked* a, int threads):
    """dy times the slope of the activation, in the type that is computed in."""
    cdef Forward q = call.forward
    x, mean, residual = <object>a.x, <object>a.mean, <object>a.residual
    dy = like(x) if q.y.storage == q.x.storage else np.empty_like(x, dtype=np.float32)
    if mean is None:
        mean = np.zeros((<cnp.ndarray>a.rstd).size)
    weight, bias = converted(<object>a.weight, &q.weight), converted(<object>a.bias, &q.bias)
    aim(&q.x, x)
    aim(&q.y, dy)
    aim(&q.dy, <object>a.dy)
    aim(&q.weight, weight)
    aim(&q.bias, bias)
    aim(&q.residual, residual)
    aim(&q.mean, mean)
    aim(&q.var, <object>a.rstd)
    aim(&q.rstd, <object>a.rstd)  # a pass by given statistics writes none
    if execute(&q, threads):
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    return dy

cdef object backward_result(CachedCall call, Asked* a, int threads):
    cdef Backward q = call.backward
    x, weight, dy, residual = <object>a.x, <object>a.weight, <object>a.dy, <object>a.residual
    if call.activated:
        dy = through_activation(call, a, threads)
    dx = like(x)
    if weight is not None:
        dweight = like(weight)
    else:
        dweight = np.empty(call.statistics, (<cnp.ndarray>x).dtype)
    dbias = like(dweight) if q.centred else None
    weight = converted(weight, &q.weight)
    aim(&q.x, x)
    aim(&q.dy, dy)
    aim(&q.dx, dx)
    aim(&q.mean, <object>a.mean)
    aim(&q.rstd, <object>a.rstd)
    aim(&q.weight, weight)
    aim(&q.dweight, dweight)
    aim(&q.dbias, dbias)
    if execute_backward(&q, threads):
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
    if residual is not None:
        dresidual, dtype = dy, (<cnp.ndarray>residual).dtype
        if dtype != dy.dtype:
            with np.errstate(all="ignore"):
                dresidual = dy.astype(dtype)
        return (dx, dweight, dbias, dresidual) if q.centred else (dx, dweight, dresidual)
    return (dx, dweight, dbias) if q.centred else (dx, dweight)

# --- What the wrapper of a public function asks (dispatch.py) -------------------------------------

cdef int64_t functions = 0      # how many have cached calls
cdef object unsaid = False      # of those that have no return_stats

cdef class CachedCalls:
    """The cached calls of one public function; its arguments come as a tuple, all of them."""

    cdef int64_t number
    cdef bint backward
    cdef Py_ssize_t n
    cdef int part[MOST_ARGUMENTS]

    def __cinit__(self, tuple names):
        """`names` say what each argument is: x, weight, eps, ...; any other word is a choice."""
        global functions
        functions += 1
        self.number, self.n, self.backward = functions, len(names), "dy" in names
        for i, name in enumerate(names):
            self.part[i] = parts.get(name, IS_CHOICE)

    cdef bint read(self, tuple given, Asked* q, Key* k) except -1:
        """Whether a call can be cached; its key, and what is to be filled in."""
        cdef Py_ssize_t i
        cdef int part
        for i in range(PART_COUNT):
            operands_of(q)[i] = <PyObject*>None
        q.return_stats = <PyObject*>unsaid
        k.n = 0
        push(k, self.number)
        for i in range(self.n):
            v, part = given[i], self.part[i]
            if part < PART_COUNT:
                if v is None and (part == PART_MOMENTUM or part == PART_FACTOR):
                    return False
                operands_of(q)[part] = <PyObject*>v
            elif part == IS_CHOICE:
                if not push_choice(k, v):
                    return False
            elif part == IS_FLAG:
                if v is not True and v is not False:
                    return False
                push(k, v is True)
            elif v is not None if part == IS_NONE else not (type(v) is float and v == 0.0):
                return False
        return read_options(k, q) and (push_backward(k, q) if self.backward else push_forward(k, q))

    def find(self, tuple given):
        """The result of a call, or None where none of its kind has been described before."""
        cdef Key k
        cdef Asked q
        cdef CachedCall call
        cdef int threads = threads_here()
        if not threads or not self.read(given, &q, &k):
            return None
        call = find(&k)
        if call is None:
            return None
        if self.backward:
            return backward_result(call, &q, threads)
        return forward_result(call, &q, threads)

    def ticket(self, tuple given):
        """What such a call may be kept under once it is described; None if it cannot be cached.

        With a ticket every array is plain and lies as the kernels read it, and every option that is
        not None is within its range.
        """
        cdef Key k
        cdef Asked q
        cdef Ticket ticket
        cdef int i
        if not threads_here() or not self.read(given, &q, &k):
            return None
        ticket = Ticket()
        ticket.key = key_of(&k)
        ticket.activated = self.backward and <object>q.activation is not None
        for i in range(PART_RSTD + 1):
            ticket.lies[i] = bytes_at(<object>operands_of(&q)[i])
        for i in range(PART_WEIGHT, PART_BIAS + 1):
            # of half precision it is converted by each call
            if is_half(<object>operands_of(&q)[i]):
                ticket.lies[i] = NULL
        ticket.half_running = is_half(<object>q.running_mean) or is_half(<object>q.running_var)
        return ticket
