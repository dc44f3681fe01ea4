# Numbers as they lie in memory, and as they are computed with.

cdef inline Py_ssize_t bytes_of(Storage storage) noexcept nogil:
    if storage > F64:
        return 1 if storage <= I8 else 2
    return 2 if storage <= BF16 else 4 if storage == F32 else 8

cdef inline bint native(Storage storage, real* kind) noexcept nogil:
    if real is float:
        return storage == F32
    else:
        return storage == F64

cdef inline void load_integers(const char* x, Storage storage, Py_ssize_t n, real* t) noexcept nogil:
    cdef Py_ssize_t i
    if storage == U8:
        for i in range(n):
            t[i] = (<const uint8_t*>x)[i]
    elif storage == I8:
        for i in range(n):
            t[i] = (<const int8_t*>x)[i]
    elif storage == U16:
        for i in range(n):
            t[i] = (<const uint16_t*>x)[i]
    else:
        for i in range(n):
            t[i] = (<const int16_t*>x)[i]

cdef inline void load(const char* x, Storage storage, Py_ssize_t n, real* t) noexcept nogil:
    cdef Py_ssize_t i
    if storage == F32:
        for i in range(n):
            t[i] = (<const float*>x)[i]
    elif storage == F64:
        for i in range(n):
            t[i] = <real>(<const double*>x)[i]
    elif storage > F64:
        load_integers(x, storage, n, t)
    elif real is float:
        if storage == F16:
            fn_load_f16(<const uint16_t*>x, n, t)
        else:
            fn_load_bf16(<const uint16_t*>x, n, t)
    elif storage == F16:
        for i in range(n):
            t[i] = fn_from_f16((<const uint16_t*>x)[i])
    else:
        for i in range(n):
            t[i] = fn_from_bf16((<const uint16_t*>x)[i])

cdef inline void store(const real* t, Py_ssize_t n, char* y, Storage storage) noexcept nogil:
    cdef Py_ssize_t i
    if real is float:
        if storage == F32:
            for i in range(n):
                (<float*>y)[i] = t[i]
        elif storage == F16:
            fn_store_f16(t, n, <uint16_t*>y)
        else:
            fn_store_bf16(t, n, <uint16_t*>y)
    else:
        for i in range(n):
            (<double*>y)[i] = t[i]

cdef inline void deliver(const real* t, Py_ssize_t n, char* y, Storage storage, bint stream, char* spare) noexcept nogil:
    """`store`, or past the caches; `spare` has room for n of y."""
    if not stream:
        store(t, n, y, storage)
    elif native(storage, <real*>t):
        fn_stream(y, <const char*>t, n * sizeof(real))
    else:
        store(t, n, spare, storage)
        fn_stream(y, spare, n * bytes_of(storage))

# What an output must exceed to be written past the caches: the last of them.
cdef Py_ssize_t stream_above = 1 << 25

def set_stream_above(Py_ssize_t size):
    """Write outputs of more than `size` bytes past the caches."""
    global stream_above
    stream_above = size

cdef inline bint pays_to_stream(Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    """Whether n elements are long enough a run: lines of which one part is written past the caches
    and another is not cost more than all that is gained."""
    return n * size >= LONG or stream_above == 0
