/* DLPack 1.3's table of C functions, by which a library hands out tensors and takes memory as one.

   The layout is that of the specification (dmlc.github.io/dlpack), of which this has what is used.
*/
#ifndef FASTNORM_EXCHANGE_H
#define FASTNORM_EXCHANGE_H

#include <stdint.h>

enum { TENSOR_ON_CPU = 1, TENSOR_OF_FLOATS = 2, TENSOR_OF_BFLOATS = 4, EXCHANGE_MAJOR = 1 };

typedef struct {
    uint32_t major, minor;
} TensorVersion;

typedef struct {
    void* data;
    int32_t device_type, device_number;
    int32_t ndim;
    uint8_t kind, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides; /* in elements; NULL: those of C's order */
    uint64_t byte_offset;
} TensorView;

typedef struct ManagedTensor {
    TensorVersion version;
    void* owner;
    void (*deleter)(struct ManagedTensor*);
    uint64_t flags;
    TensorView view;
} ManagedTensor;

typedef struct ExchangeTable {
    TensorVersion version;
    struct ExchangeTable* older;
    int (*allocate)(TensorView*, ManagedTensor**, void*,
                    void (*)(void*, const char*, const char*));
    int (*give_managed)(void*, ManagedTensor**);
    int (*take_managed)(ManagedTensor*, void**);
    int (*give_view)(void*, TensorView*); /* may be NULL */
    int (*stream)(int32_t, int32_t, void**);
} ExchangeTable;

#endif
