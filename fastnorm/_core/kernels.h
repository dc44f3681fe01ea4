/* The kernels, compiled once for each instruction set by the _kernels_*.pyx in this folder.
 *
 * Files that name REAL are compiled twice, for float and for double: templates that a debugger can
 * step through. */
#ifndef FASTNORM_KERNELS_H
#define FASTNORM_KERNELS_H

#include "backward_layout.h"
#include "forward.h"

#define REAL float
#define T(name) name##_f32
#define IS_FLOAT 1
#include "templates.h"
#undef REAL
#undef T
#undef IS_FLOAT

#define REAL double
#define T(name) name##_f64
#define IS_FLOAT 0
#include "templates.h"
#undef REAL
#undef T
#undef IS_FLOAT

/* Not 0 where memory is short, and then nothing is written. */
static int run_backward(Backward *q) {
    return q->x.storage == F64 ? run_backward_f64(q) : run_backward_f32(q);
}
/* A planned pass; not 0 where there is no scratch memory. */
static int run_forward(Forward *q) {
    return q->x.storage == F64 ? run_forward_f64(q) : run_forward_f32(q);
}

#endif
