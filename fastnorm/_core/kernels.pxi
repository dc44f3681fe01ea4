# The kernels, in C (kernels.h), and Python's way to them; compiled once for each instruction set by
# the _kernels_*.pyx in this folder.

include "bindings.pxi"
include "operands.pxi"
include "results.pxi"
include "call_keys.pxi"
include "cached_calls.pxi"
