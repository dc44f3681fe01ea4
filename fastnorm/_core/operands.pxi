# What may be taken as it is: the one place that decides.  Python asks here too (arguments.py).

cdef enum:
    MOST_AXES = 62              # arguments.py

cdef inline char* bytes_at(object array) noexcept:
    return NULL if array is None else <char*>cnp.PyArray_DATA(<cnp.ndarray>array)

cdef inline bint is_float(cnp.ndarray a) noexcept:
    cdef int number = cnp.PyArray_TYPE(a)
    return (number == cnp.NPY_FLOAT32 or number == cnp.NPY_FLOAT64 or number == cnp.NPY_FLOAT16
            or is_bfloat16(a))

cdef bint lies_plainly(cnp.ndarray a) noexcept:
    """Whether the kernels read an array where it lies.

    It is native and aligned, and its elements are whole numbers of elements apart, none of them
    broadcast.  The stride of an axis of length 1 is never taken.
    """
    cdef Py_ssize_t step, size = cnp.PyArray_ITEMSIZE(a)
    cdef int i
    if not cnp.PyArray_ISBEHAVED_RO(a):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        step = cnp.PyArray_STRIDE(a, i)
        if cnp.PyArray_DIM(a, i) > 1 and (step == 0 or step % size != 0):
            return False
    return True

cdef bint same_dims(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True

cdef bint writes_apart(cnp.ndarray out, cnp.ndarray other) noexcept:
    """Whether writing `out` cannot change what is still to be read of another array.

    Exactly in place is fine: each element is read before it is written.
    """
    cdef char* low
    cdef char* high
    cdef char* other_low
    cdef char* other_high
    cdef int i
    bounds_of(out, &low, &high)
    bounds_of(other, &other_low, &other_high)
    if not cnp.PyArray_SIZE(out) or not cnp.PyArray_SIZE(other):
        return True
    if high <= other_low or other_high <= low:
        return True
    if (cnp.PyArray_DATA(out) != cnp.PyArray_DATA(other) or not same_dims(out, other)
            or cnp.PyArray_TYPE(out) != cnp.PyArray_TYPE(other)):
        return False
    for i in range(cnp.PyArray_NDIM(out)):
        if cnp.PyArray_STRIDE(out, i) != cnp.PyArray_STRIDE(other, i):
            return False
    return True

def array_lies_plainly(array):
    """Whether the kernels read an array where it lies; those of a device have no other way."""
    return not cnp.PyArray_Check(array) or lies_plainly(<cnp.ndarray>array)

def is_plain(value):
    """Whether this is a plain array of floats that the kernels read where it lies."""
    return (cnp.PyArray_CheckExact(value) and cnp.PyArray_NDIM(<cnp.ndarray>value) <= MOST_AXES
            and is_float(<cnp.ndarray>value) and lies_plainly(<cnp.ndarray>value))

def array_writes_apart(cnp.ndarray out not None, cnp.ndarray other not None):
    """Whether writing `out` cannot change what is still to be read of another array."""
    return writes_apart(out, other)
