# Memory for results: large ones come from what is kept of earlier ones (blocks.h).

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, void*, int)
    object PyDataMem_SetHandler(object)

cdef extern from "blocks.h" nogil:
    int FN_BLOCKS
    size_t FN_BLOCKS_FROM       # bytes of a result that comes from kept memory
    size_t fn_trim() noexcept
    void fn_keep_at_most(size_t)
    void fn_watch(size_t, const char*, const char*)

cdef extern from "blocks.h":
    object fn_block_capsule()

cdef object blocks = fn_block_capsule()

def keep_at_most(size_t limit):
    """Bytes of freed results that are kept for the next ones."""
    fn_keep_at_most(limit)

def trim():
    """Give back the memory that is kept; how many bytes that was."""
    return fn_trim()

def watch_memory(size_t limit, bytes used, bytes stat):
    """Keep nothing close to a limit; `used` and `stat` are files that say what is in use."""
    fn_watch(limit, used, stat)

cdef object like(object array):
    """An array for the result: the shape, type and memory order of another."""
    if FN_BLOCKS and cnp.PyArray_NBYTES(<cnp.ndarray>array) >= FN_BLOCKS_FROM:
        before = PyDataMem_SetHandler(blocks)
        try:
            return PyArray_NewLikeArray(<cnp.ndarray>array, cnp.NPY_KEEPORDER, NULL, 0)
        except MemoryError:
            pass                # not as whole pages, that is
        finally:
            PyDataMem_SetHandler(before)
    try:
        return PyArray_NewLikeArray(<cnp.ndarray>array, cnp.NPY_KEEPORDER, NULL, 0)
    except MemoryError:
        if not fn_trim():
            raise
    return PyArray_NewLikeArray(<cnp.ndarray>array, cnp.NPY_KEEPORDER, NULL, 0)

def empty_like(array):
    """`np.empty_like` of a plain array, from where the results of cached calls come."""
    return like(array)
