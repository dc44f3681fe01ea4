"""The names of the numbers and strides that a forward kernel is told."""

from __future__ import annotations

# numbers: the layout's dimensions, and what is asked
(
    A, B, P, S, C, NEIGHBOURS, CENTRED, GIVEN, SCALING, ACTIVATION, ACTIVATION_FIRST, WIDTH,
    CHUNKS, BLOCK_ROWS, SPLIT, SPLITS, WITH_RESIDUAL, WITH_ADDEND, MASKED, DIRECT, STAGE, FAR,
    FIELDS, WHOLE_SUMS, WHOLE_OUTPUT, WITH_STATS, TABULATED, FOLDED, NUMBERS,
) = range(29)  # fmt: skip

# operands whose strides a kernel is told; SOURCE is what the norm is of: x, or x + addend. The
# statistics lie alike.
X, Y, RESIDUAL, ADDEND, SOURCE, MASK, WEIGHT, BIAS, STATS, OPERANDS = range(10)

# tasks: everything; moments of splits of groups; or, from those, the output of splits
WHOLE, MOMENTS, APPLY = range(3)
