# What tells calls apart: the key that a call is cached under.

from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.object cimport PyObject
from libc.stdint cimport int64_t

cdef enum:
    KEY = 192                   # numbers in a key, at most: eight arrays of eight dimensions
    AXES = 8                    # dimensions of an array that has a key

# What an argument is to a call: an operand or option of its own, or one of the kinds below those.
cdef enum Part:
    PART_X
    PART_DY
    PART_WEIGHT
    PART_BIAS
    PART_RESIDUAL
    PART_WHERE
    PART_OUT
    PART_MEAN
    PART_RSTD
    PART_RUNNING_MEAN
    PART_RUNNING_VAR
    PART_EPS
    PART_MOMENTUM
    PART_FACTOR
    PART_ACTIVATION
    PART_RETURN_STATS
    PART_COUNT
    IS_CHOICE                   # None, a whole number or a tuple of them: tells calls apart
    IS_FLAG                     # True or False, likewise
    IS_NONE                     # a call that has it is not cached
    IS_ZERO                     # nor one in which this is not 0.0

# Arguments by their names; any other is a CHOICE.
cdef dict parts = {
    "x": PART_X, "dy": PART_DY, "weight": PART_WEIGHT, "bias": PART_BIAS,
    "residual": PART_RESIDUAL, "out": PART_OUT, "mean": PART_MEAN, "rstd": PART_RSTD,
    "running_mean": PART_RUNNING_MEAN, "running_var": PART_RUNNING_VAR, "eps": PART_EPS,
    "momentum": PART_MOMENTUM, "alpha": PART_FACTOR, "activation": PART_ACTIVATION,
    "return_stats": PART_RETURN_STATS, "training": IS_FLAG, "use_input_stats": IS_FLAG,
    "weight_offset": IS_ZERO, "where": PART_WHERE, "uncached": IS_NONE,
}

cdef struct Key:
    Py_ssize_t n
    int64_t[KEY] f

# A call as it was made; its objects belong to the caller.
cdef struct Asked:
    # in the order of Part; None: not given
    PyObject* x
    PyObject* dy
    PyObject* weight
    PyObject* bias
    PyObject* residual
    PyObject* where
    PyObject* out
    PyObject* mean
    PyObject* rstd
    PyObject* running_mean
    PyObject* running_var
    PyObject* eps
    PyObject* momentum
    PyObject* factor
    PyObject* activation
    PyObject* return_stats
    bint own_eps                # eps was given; otherwise it is that of the description
    double eps_value, momentum_value, factor_value

cdef inline PyObject** operands_of(Asked* q) noexcept:
    return <PyObject**>q


# --- Activations ----------------------------------------------------------------------------------

cdef dict activation_codes = {}  # numbers in the kernels, by name
cdef dict user_loops = {}       # addresses, by function and type that is computed in
cdef object user_type = None    # of all these functions: Numba's
cdef object raise_again = None  # of a function and type: what it raised

def number_activations(names):
    """Give the kernels' activations their names, in order; the first is of number 1."""
    if len(names) + 1 != ACTIVATION_COUNT:
        raise SystemError(f"the kernels have {ACTIVATION_COUNT - 1} activations: {names}")
    activation_codes.update({name: n + 1 for n, name in enumerate(names)})

def register_activation(function, bint double_, Py_ssize_t address, again):
    """Let calls with a user's activation be cached: its compiled loop, and who raises again."""
    global raise_again, user_type
    raise_again, user_type = again, type(function)
    user_loops[function, cnp.NPY_FLOAT64 if double_ else cnp.NPY_FLOAT32] = address

# --- Keys -----------------------------------------------------------------------------------------

cdef inline void push(Key* k, int64_t v) noexcept:
    k.f[k.n] = v
    k.n += 1

cdef bint push_whole(Key* k, object v) except -1:
    cdef int overflow = 0
    if not PyLong_CheckExact(v):
        return False
    push(k, PyLong_AsLongLongAndOverflow(v, &overflow))
    return overflow == 0

cdef bint push_choice(Key* k, object v) except -1:
    """A whole number, a tuple of them, or None."""
    if v is None:
        push(k, -1)
    elif type(v) is tuple and len(<tuple>v) <= AXES:
        push(k, 1 + len(<tuple>v))
        for n in <tuple>v:
            if not push_whole(k, n):
                return False
    else:
        push(k, 0)
        return push_whole(k, v)
    return True

cdef bint push_array(Key* k, object v, int kind) noexcept:
    """Whether an array is taken as it is; of type number `kind`, or of any float type at -1."""
    cdef cnp.ndarray a
    cdef Py_ssize_t n, step
    cdef int i
    if v is None:
        push(k, 0)
        return True
    if not cnp.PyArray_CheckExact(v):
        return False
    a = <cnp.ndarray>v
    if cnp.PyArray_NDIM(a) > AXES or not lies_plainly(a):
        return False
    if cnp.PyArray_TYPE(a) != kind and (kind != -1 or not is_float(a)):
        return False
    push(k, 1 + cnp.PyArray_NDIM(a) + 16 * <int64_t>cnp.PyArray_TYPE(a))
    for i in range(cnp.PyArray_NDIM(a)):
        # empty or reversed: described, and perhaps copied, each time
        n, step = cnp.PyArray_DIM(a, i), cnp.PyArray_STRIDE(a, i)
        if n == 0 or (n > 1 and step < 0):
            return False
        push(k, n)
        push(k, step)
    return True

cdef inline int computing_kind(object x) noexcept:
    return (cnp.NPY_FLOAT64 if cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT64
            else cnp.NPY_FLOAT32)

cdef bint push_weight(Key* k, object v, object x) noexcept:
    """Likewise: of the type that is computed in, or of that of x, to be converted by each call."""
    if v is None:
        push(k, 0)
        return True
    if (cnp.PyArray_CheckExact(v)
            and cnp.PyArray_TYPE(<cnp.ndarray>v) == cnp.PyArray_TYPE(<cnp.ndarray>x)):
        return push_array(k, v, -1) and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>v)
    return push_array(k, v, computing_kind(x))

cdef bint push_running(Key* k, object v) noexcept:
    cdef cnp.ndarray a
    if v is None:
        push(k, 0)
        return True
    if not push_array(k, v, -1):
        return False
    a = <cnp.ndarray>v
    return cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_ISWRITEABLE(a)

cdef bint push_where(Key* k, Asked* q) noexcept:
    """A mask that is repeated along axes at most; running statistics ask how many it leaves."""
    cdef int i
    mask, x = <object>q.where, <cnp.ndarray>q.x
    push(k, -10)
    if not (<object>q.running_mean is None and <object>q.running_var is None
            and push_array(k, mask, cnp.NPY_BOOL)
            and cnp.PyArray_NDIM(<cnp.ndarray>mask) == cnp.PyArray_NDIM(<cnp.ndarray>x)):
        return False
    for i in range(cnp.PyArray_NDIM(<cnp.ndarray>x)):
        n = cnp.PyArray_DIM(<cnp.ndarray>mask, i)
        if n != 1 and n != cnp.PyArray_DIM(<cnp.ndarray>x, i):
            return False
    return True

cdef bint push_activation(Key* k, Asked* q) except -1:
    activation = <object>q.activation
    if type(activation) is str:
        code = activation_codes.get(activation)
        if code is None:
            return False
        push(k, -2 - <int>code)
        return True
    # another type's hash could change arrays that are in the key
    if type(activation) is not user_type:
        return False
    code = user_loops.get((activation, computing_kind(<object>q.x)))
    push(k, -9)
    # it may raise half way: what `out` holds is then as it was
    return <object>q.out is None and code is not None and push_whole(k, code)

cdef bint push_out(Key* k, Asked* q) noexcept:
    cdef int part, kind = cnp.PyArray_TYPE(<cnp.ndarray>q.x)
    out = <object>q.out
    push(k, -1)
    if not (push_array(k, out, kind) and same_dims(<cnp.ndarray>out, <cnp.ndarray>q.x)
            and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)):
        return False
    for part in range(PART_X, PART_OUT):
        other = <object>operands_of(q)[part]
        if other is not None and not writes_apart(<cnp.ndarray>out, <cnp.ndarray>other):
            return False
    return True

cdef bint push_forward(Key* k, Asked* q) except -1:
    x = <object>q.x
    if not (push_array(k, x, -1) and x is not None):
        return False
    if not (push_weight(k, <object>q.weight, x) and push_weight(k, <object>q.bias, x)):
        return False
    if not (push_running(k, <object>q.running_mean)
            and push_running(k, <object>q.running_var)):
        return False
    residual = <object>q.residual
    if residual is not None and not (
            push_array(k, residual, -1) and same_dims(<cnp.ndarray>residual, <cnp.ndarray>x)):
        return False
    if <object>q.where is not None and not push_where(k, q):
        return False
    if <object>q.activation is not None and not push_activation(k, q):
        return False
    return <object>q.out is None or push_out(k, q)

cdef bint push_through(Key* k, Asked* q) except -1:
    """What was added and activated: of an activation by its name."""
    x, activation, residual = <object>q.x, <object>q.activation, <object>q.residual
    if activation is None:
        return <object>q.bias is None and residual is None
    code = activation_codes.get(activation) if type(activation) is str else None
    if code is None:
        return False
    push(k, -2 - <int>code)
    if not (push_weight(k, <object>q.bias, x) and push_array(k, residual, -1)):
        return False
    return residual is None or same_dims(<cnp.ndarray>residual, <cnp.ndarray>x)

cdef bint push_backward(Key* k, Asked* q) except -1:
    cdef int part
    x, dy = <object>q.x, <object>q.dy
    if <object>q.where is not None or not (push_array(k, x, -1) and x is not None):
        return False
    if not (push_array(k, dy, -1) and dy is not None
            and push_weight(k, <object>q.weight, x)):
        return False
    for part in range(PART_MEAN, PART_RSTD + 1):
        statistic = <object>operands_of(q)[part]
        if not push_array(k, statistic, cnp.NPY_FLOAT64):
            return False
        if statistic is not None and not cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>statistic):
            return False
    return push_through(k, q)

cdef bint read_number(object v, double* number) except -1:
    """Whether an option is a plain float or whole number: others are described, and judged."""
    cdef int overflow = 0
    if PyFloat_Check(v):
        number[0] = PyFloat_AS_DOUBLE(v)
        return True
    if not PyLong_CheckExact(v):
        return False
    number[0] = <double>PyLong_AsLongLongAndOverflow(v, &overflow)
    return overflow == 0

cdef bint read_factor(object v, double* number) except -1:
    """A float, or an array that holds one."""
    if cnp.PyArray_CheckExact(v) and cnp.PyArray_SIZE(<cnp.ndarray>v) == 1:
        v = v.item()
    if type(v) is not float:
        return False
    number[0] = PyFloat_AS_DOUBLE(v)
    return True

cdef bint read_options(Key* k, Asked* q) except -1:
    """Numbers that a description does not depend on; those that it would refuse are not cached."""
    stats = <object>q.return_stats
    if stats is not True and stats is not False:
        return False
    q.eps_value, q.momentum_value, q.factor_value = 0.0, 0.0, 1.0
    q.own_eps = <object>q.eps is not None
    if q.own_eps and not (
            read_number(<object>q.eps, &q.eps_value) and 0.0 <= q.eps_value < INFINITY):
        return False
    if <object>q.momentum is not None and not (
            read_number(<object>q.momentum, &q.momentum_value) and 0.0 <= q.momentum_value <= 1.0):
        return False
    if <object>q.factor is not None and not read_factor(<object>q.factor, &q.factor_value):
        return False
    push(k, q.own_eps)
    return True
