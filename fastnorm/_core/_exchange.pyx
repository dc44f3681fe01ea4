# Tensors of another library as arrays of the same memory, and arrays as its tensors, by DLPack's
# C exchange table (exchange.h): nothing of that library is compiled in, and no Python runs between.

from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_RawFree, PyMem_RawMalloc
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t
cimport numpy as cnp

cnp.import_array()

cdef extern from "Python.h":
    int Py_IsInitialized() noexcept nogil
    Py_ssize_t Py_REFCNT(PyObject*) noexcept

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(
        type, cnp.dtype, int, cnp.npy_intp*, cnp.npy_intp*, void*, int, object)
    ctypedef struct ArrayObject "PyArrayObject":
        pass
    void PyArray_UpdateFlags(ArrayObject*, int) noexcept
    ctypedef struct ArrayFields "PyArrayObject_fields":
        char* data
        int nd
        cnp.npy_intp* dimensions
        cnp.npy_intp* strides
        void* descr

cdef extern from "exchange.h":
    enum:
        TENSOR_ON_CPU, TENSOR_OF_FLOATS, TENSOR_OF_BFLOATS, EXCHANGE_MAJOR
    ctypedef struct TensorVersion:
        int major, minor
    ctypedef struct TensorView:
        void* data
        int32_t device_type, device_number, ndim
        uint8_t kind, bits
        uint16_t lanes
        int64_t* shape
        int64_t* strides
        uint64_t byte_offset
    ctypedef struct ManagedTensor:
        TensorVersion version
        void* owner
        void (*deleter)(ManagedTensor*) noexcept
        uint64_t flags
        TensorView view
    ctypedef struct ExchangeTable:
        TensorVersion version
        int (*take_managed)(ManagedTensor*, void**) except -1
        int (*give_view)(void*, TensorView*) except -1

cdef enum:
    AXES = 8                    # as of arrays whose calls are cached (call_keys.pxi)
    LARGEST_FLOAT = 8           # bytes

cdef void release(ManagedTensor* managed) noexcept with gil:
    Py_DECREF(<object>managed.owner)
    PyMem_RawFree(managed)

cdef void release_if_there(ManagedTensor* managed) noexcept nogil:
    # once Python has ended nobody can, and nobody misses it
    if Py_IsInitialized():
        release(managed)

cdef bint has_elements(const TensorView* v) noexcept:
    cdef int i
    for i in range(v.ndim):
        if v.shape[i] == 0:
            return False
    return True

cdef object array_of_view(cnp.dtype dtype, const TensorView* v):
    """An array of this memory, which it does not own."""
    cdef cnp.npy_intp strides[AXES]
    cdef int i
    for i in range(v.ndim):
        strides[i] = v.strides[i] * (v.bits // 8)
    Py_INCREF(dtype)
    return PyArray_NewFromDescr(
        cnp.ndarray, dtype, v.ndim, <cnp.npy_intp*>v.shape, strides, v.data,
        cnp.NPY_ARRAY_WRITEABLE, None)

cdef bint moved_to(PyObject* array, cnp.dtype dtype, const TensorView* v) noexcept:
    """Have an array that nobody else holds be of this memory; whether it could be."""
    cdef ArrayFields* fields = <ArrayFields*>array
    cdef bint other = False
    cdef int i
    if Py_REFCNT(array) != 1 or fields.nd != v.ndim or fields.descr != <void*>dtype:
        return False
    for i in range(v.ndim):
        stride = v.strides[i] * (v.bits // 8)
        other |= fields.dimensions[i] != v.shape[i] or fields.strides[i] != stride
        fields.dimensions[i], fields.strides[i] = v.shape[i], stride
    # flags tell of order and alignment
    other |= ((<size_t>fields.data ^ <size_t>v.data) & (LARGEST_FLOAT - 1)) != 0
    fields.data = <char*>v.data
    if other:
        PyArray_UpdateFlags(<ArrayObject*>array, cnp.NPY_ARRAY_UPDATE_ALL)
    return True

cdef class Exchange:
    """Plain tensors of a library: those of exactly these types, that need nothing but arithmetic.

    `is_changed` tells of a tensor whose memory holds other numbers than it has, as of a lazy
    negative.
    """

    cdef const ExchangeTable* table
    cdef object kind, parameter, is_changed
    cdef object half, single, double_, bfloat16     # dtypes; the last is None until it is known
    cdef int bfloat16_number

    def __cinit__(self, kind, parameter, is_changed):
        """`kind` is the class that has the table."""
        self.table = <const ExchangeTable*>PyCapsule_GetPointer(
            kind.__dlpack_c_exchange_api__, "dlpack_exchange_api")
        if self.table.version.major != EXCHANGE_MAJOR or self.table.give_view == NULL:
            raise ImportError(
                f"{kind.__module__} has version {self.table.version.major} of DLPack's exchange "
                f"table, expected {EXCHANGE_MAJOR}, with views")
        self.kind, self.parameter, self.is_changed = kind, parameter, is_changed
        self.half, self.single, self.double_ = cnp.dtype("f2"), cnp.dtype("f4"), cnp.dtype("f8")
        self.bfloat16, self.bfloat16_number = None, -1

    def know_bfloat16(self, cnp.dtype dtype not None):
        """Take tensors of bfloat16, too, whose arrays are of this dtype."""
        self.bfloat16, self.bfloat16_number = dtype, dtype.type_num

    cdef object dtype_of(self, const TensorView* v):
        """The dtype of a tensor's numbers, or None."""
        if v.kind == TENSOR_OF_BFLOATS and v.bits == 16:
            return self.bfloat16
        if v.kind != TENSOR_OF_FLOATS:
            return None
        return (self.single if v.bits == 32 else self.double_ if v.bits == 64
                else self.half if v.bits == 16 else None)

    cdef bint has_number(self, int number) noexcept:
        """Whether arrays of this type number have tensors."""
        return (number == cnp.NPY_FLOAT32 or number == cnp.NPY_FLOAT64
                or number == cnp.NPY_FLOAT16 or number == self.bfloat16_number)

    cdef bint is_its(self, object value) noexcept:
        """Whether this is a tensor without code of its own for what is done to it."""
        return type(value) is self.kind or type(value) is self.parameter

    cdef cnp.dtype seen(self, object tensor, TensorView* v):
        """Where a plain tensor's floats lie on the host, and their dtype; or None."""
        if not self.is_its(tensor):
            return None
        try:
            self.table.give_view(<void*>tensor, v)
        except RuntimeError:    # it has no strides, or no memory
            return None
        if v.device_type != TENSOR_ON_CPU or v.ndim > AXES or v.lanes != 1 or v.byte_offset:
            return None
        if v.ndim and (v.strides == NULL or v.shape == NULL):
            return None
        dtype = self.dtype_of(v)
        if dtype is None or self.is_changed(tensor):
            return None
        if v.data == NULL and has_elements(v):
            return None
        return <cnp.dtype>dtype

    def array(self, tensor):
        """The array of a plain tensor's floats on the host, or None."""
        cdef TensorView v
        dtype = self.seen(tensor, &v)
        if dtype is None:
            return None
        array = array_of_view(dtype, &v)
        Py_INCREF(tensor)
        cnp.PyArray_SetBaseObject(<cnp.ndarray>array, tensor)
        return array

    cdef object lent(self, object tensor, PyObject** kept):
        """Likewise, in the array of the call before where that is free, as making one takes longer.

        It does not hold the tensor: it is for a call that is over before the tensor goes.
        """
        cdef TensorView v
        dtype = self.seen(tensor, &v)
        if dtype is None:
            return None
        if v.data == NULL:      # such an array owns memory
            return array_of_view(dtype, &v)
        if kept[0] == NULL or not moved_to(kept[0], dtype, &v):
            array = array_of_view(dtype, &v)
            Py_XDECREF(kept[0])
            Py_INCREF(array)
            kept[0] = <PyObject*>array
        return <object>kept[0]

    def tensor(self, array):
        """A tensor of the memory of a new array of floats; None where it has none of those."""
        cdef ManagedTensor* managed
        cdef cnp.ndarray a
        cdef void* tensor
        cdef int64_t* extents
        cdef int i, axes, number, size
        if not cnp.PyArray_CheckExact(array):
            return None
        a = <cnp.ndarray>array
        axes, number, size = cnp.PyArray_NDIM(a), cnp.PyArray_TYPE(a), <int>cnp.PyArray_ITEMSIZE(a)
        if not self.has_number(number):
            return None
        managed = <ManagedTensor*>PyMem_RawMalloc(
            sizeof(ManagedTensor) + 2 * axes * sizeof(int64_t))
        if managed == NULL:
            raise MemoryError("fastnorm could not get memory for a tensor")
        extents = <int64_t*>(managed + 1)
        for i in range(axes):
            extents[i] = cnp.PyArray_DIM(a, i)
            extents[axes + i] = cnp.PyArray_STRIDE(a, i) // size
        managed.version.major, managed.version.minor = EXCHANGE_MAJOR, 0
        managed.owner, managed.deleter, managed.flags = <void*>array, release_if_there, 0
        managed.view.data = cnp.PyArray_DATA(a)
        managed.view.device_type, managed.view.device_number = TENSOR_ON_CPU, 0
        managed.view.ndim, managed.view.lanes, managed.view.byte_offset = axes, 1, 0
        managed.view.bits = 8 * size
        managed.view.kind = (
            TENSOR_OF_BFLOATS if number == self.bfloat16_number else TENSOR_OF_FLOATS)
        managed.view.shape, managed.view.strides = extents, extents + axes
        Py_INCREF(array)
        self.table.take_managed(managed, &tensor)
        found = <object>tensor
        Py_DECREF(found)        # the reference that came is the caller's
        return found

cdef class PlainCalls:
    """The calls of one function whose tensors are plain, of a kind that was described before."""

    cdef Exchange exchange
    cdef object find_arrays, record, records, levels, size, tell_written
    cdef tuple questions, running   # the latter as places
    cdef Py_ssize_t out, moves, arguments
    cdef PyObject** kept            # of each argument, the array of the last call

    def __cinit__(self, Exchange exchange not None, find, record, *, tuple questions, records,
                 levels, size, written, Py_ssize_t out, tuple running, Py_ssize_t moves,
                 Py_ssize_t arguments):
        """`find` answers calls of arrays, or gives None.

        Where one of `questions` is answered with yes, or `levels` are of dual numbers, no call is.
        While it `records`, `record`, if any, answers one of a tensor that requires a gradient. A
        tuple of type `size` is taken as a tuple. `written` is told of tensors that were: those at
        `out` and, where what is at `moves` is true, at `running`; -1 is nowhere. Calls have so many
        `arguments`.
        """
        cdef Py_ssize_t i
        self.kept = <PyObject**>PyMem_Malloc(arguments * sizeof(PyObject*))
        if self.kept == NULL:
            raise MemoryError("fastnorm could not get memory for the arrays of a call")
        for i in range(arguments):
            self.kept[i] = NULL
        self.arguments = arguments
        self.exchange, self.tell_written = exchange, written
        self.find_arrays, self.record = find, record
        self.questions, self.records, self.levels, self.size = questions, records, levels, size
        self.out, self.running, self.moves = out, running, moves

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.arguments):
            Py_XDECREF(self.kept[i])
        PyMem_Free(self.kept)

    def find(self, tuple given):
        """The result of a call, all its arguments in their order; None where it has to be seen."""
        cdef Py_ssize_t i, n = self.arguments
        cdef bint recording, recorded
        if len(given) != n:
            raise TypeError(f"find got {len(given)} arguments, expected {n}")
        if not self.exchange.is_its(given[0]):
            return None
        for question in self.questions:
            if question():
                return None
        if self.levels._current_level >= 0:
            return None
        recording, recorded = bool(self.records()), False
        call = PyTuple_New(n)
        for i in range(n):
            value = given[i]
            if self.exchange.is_its(value):
                recorded = recorded or (recording and value.requires_grad)
                value = self.exchange.lent(value, &self.kept[i])
                if value is None:
                    return None
            elif type(value) is self.size:
                value = tuple(value)
            Py_INCREF(value)
            PyTuple_SET_ITEM(call, i, value)
        if recorded:
            call = None     # its arrays are free for the calls behind this one
            for value in given:
                if not self.exchange.is_its(value) and isinstance(value, self.exchange.kind):
                    return None
            return None if self.record is None else self.record(given)
        found = self.find_arrays(call)
        if found is None:
            return None
        if self.moves >= 0 and given[self.moves]:
            for i in self.running:
                if given[i] is not None:
                    self.tell_written(given[i])
        if self.out < 0 or given[self.out] is None:
            if type(found) is tuple:
                return tuple([self.exchange.tensor(part) for part in found])
            return self.exchange.tensor(found)
        self.tell_written(given[self.out])
        if type(found) is tuple:
            return (given[self.out], *[self.exchange.tensor(part) for part in found[1:]])
        return given[self.out]
