# Scratch memory, and the checks of a build with FASTNORM_CHECK=1 (check.h).
#
# All scratch memory comes from an arena: one block, from which pieces of known size are taken.  The
# pieces are listed once, in a function that runs twice: to count, and to hand out.

cdef extern from "check.h" nogil:
    int FN_CHECKED, FN_GUARD
    void fn_broken(const char*) noexcept
    void fn_fill_guard(char*) noexcept
    bint fn_guard_intact(const char*) noexcept
    void fn_check_store_fence() noexcept

cdef extern from "blocks.h" nogil:
    size_t fn_trim() noexcept

cdef enum:
    LINE = 64                   # bytes of a cache line: where each piece begins
    PIECES = 24                 # of an arena, at most
    ON_STACK = 1 << 14          # bytes of a thread's scratch memory that its stack holds: no malloc

cdef struct Arena:
    char* memory                # NULL: pieces are only counted
    char* start
    bint lent                   # not from malloc
    Py_ssize_t size             # bytes taken so far
    int pieces
    char* guards[PIECES]        # where each piece ends

cdef inline void count_pieces(Arena* m) noexcept nogil:
    """Let the next pieces be counted."""
    m.memory = m.start = NULL
    m.lent = False
    m.size = 0
    m.pieces = 0

cdef inline bint open_arena(Arena* m) noexcept nogil:
    """Get the memory of what was counted; False where there is none."""
    m.memory = <char*>malloc(m.size + LINE)
    if m.memory == NULL and fn_trim() > 0:
        m.memory = <char*>malloc(m.size + LINE)  # what results were kept in was given back
    if m.memory == NULL:
        return False
    begin(m)
    return True

cdef inline bint open_on_stack(Arena* m, char* room) noexcept nogil:
    """Take memory of ON_STACK bytes, if that is enough; a checking build leaves it to malloc."""
    if FN_CHECKED or m.size + LINE > ON_STACK:
        return open_arena(m)
    m.memory = room
    m.lent = True
    begin(m)
    return True

cdef inline void begin(Arena* m) noexcept nogil:
    m.start = m.memory + (LINE - <size_t>m.memory % LINE)
    m.size = 0
    m.pieces = 0

cdef inline char* take(Arena* m, Py_ssize_t size) noexcept nogil:
    """The next piece, of `size` bytes from the beginning of a cache line on."""
    cdef char* piece = NULL if m.memory == NULL else m.start + m.size
    m.size += (size + LINE - 1) & -LINE
    if FN_CHECKED:
        m.size += FN_GUARD
        if m.pieces == PIECES:
            fn_broken("more pieces than an arena has")
        if piece != NULL:
            m.guards[m.pieces] = piece + size
            fn_fill_guard(piece + size)
        m.pieces += 1
    return piece

cdef inline void close_arena(Arena* m) noexcept nogil:
    cdef int i
    if FN_CHECKED and m.memory != NULL:
        for i in range(m.pieces):
            if not fn_guard_intact(m.guards[i]):
                fn_broken("a piece of scratch memory was written beyond its end")
    if not m.lent:
        free(m.memory)
    m.memory = NULL

cdef inline void fits(Py_ssize_t needed, Py_ssize_t size, const char* what) noexcept nogil:
    """In a checking build: whether a tile of `size` bytes holds what is to be written there."""
    if FN_CHECKED and needed > size:
        fn_broken(what)

cdef void bounds_of(object array, char** low, char** high) noexcept:
    """The memory between the first and behind the last byte of an array."""
    cdef cnp.ndarray a = <cnp.ndarray>array
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
        bounds_of(array, &o.low, &o.high)

cdef inline void aim_at(Operand* o, char* data, Py_ssize_t size) noexcept nogil:
    """Let an operand be memory of our own."""
    o.data = o.low = data
    o.high = data + size

cdef inline void within(Operand* o, const char* p, Py_ssize_t size, const char* what) noexcept nogil:
    """In a checking build: whether `size` bytes from p on are an operand's, if it is there."""
    if FN_CHECKED and o.data != NULL and size > 0 and (p < o.low or p + size > o.high):
        fn_broken(what)

cdef inline void all_within(Operand* o, const char* p, Py_ssize_t step, Py_ssize_t n, Py_ssize_t size, const char* what) noexcept nogil:
    """The same for n runs of `size` bytes, `step` bytes apart."""
    if FN_CHECKED and n > 0:
        within(o, p, size, what)
        within(o, p + (n - 1) * step, size, what)
