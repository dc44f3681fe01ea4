# Moments as they are, for statistics that are merged with others: the blocks, the merge and the
# threads are those of a pass, which here ends before the moments become a scale.

cdef void deliver_moments(Pass* q, Item it, double* moments) noexcept nogil:
    """The five fields of an item's groups, written out side by side."""
    cdef Py_ssize_t g, field, step, n = groups_of(q, it)
    cdef char* out = <char*>statistic_at(q, &q.mean, it, &step)
    for field in range(FIELDS):
        for g in range(n):
            (<double*>out)[g * step] = moments[field * n + g]
        out += q.fields

def run_moments(layout, x, fields, *, mask=None, int threads=1):
    """Moments of x into `fields`: count, mean, its rest, sum of squared deviations, its rest.

    The strides of the first field are the layout's "stats".
    """
    cdef Pass q
    cdef dict strides = layout.strides
    cdef tuple dims = layout.dims
    memset(&q, 0, sizeof(Pass))     # no operand but those named below
    q.a, q.b, q.p, q.s, q.c = dims
    q.neighbours, q.columns, q.centred = layout.neighbours, layout.columns, True
    operand(&q.x, x, strides["x"], dims)
    operand(&q.mask, mask, strides.get("mask"), dims)
    operand(&q.mean, fields, strides["stats"], statistics_of(dims, layout.neighbours))
    expect(mask is None or q.mask.storage == U8, "mask", mask)
    expect(q.mean.storage == F64, "fields", fields)
    q.var = q.rstd = q.mean
    q.fields = cnp.PyArray_STRIDE(<cnp.ndarray>fields, 0)
    if carry_out(&q, threads):
        raise MemoryError("fastnorm could not get the scratch memory of its kernels")
