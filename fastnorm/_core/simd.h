/* What the Cython kernels need and Cython cannot say: fused multiply-adds, the half-width
 * formats, and activations that a compiler can vectorise.  Everything is a plain loop or a
 * branch-free expression, except float16, whose conversion instruction has no C operator. */
#ifndef FASTNORM_SIMD_H
#define FASTNORM_SIMD_H

#include "sums.h"
#include "rows.h"
#include "back.h"

#endif
