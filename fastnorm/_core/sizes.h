/* Sizes that the kernels are compiled with; schedule.py is where they are chosen and explained. */
#ifndef FASTNORM_SIZES_H
#define FASTNORM_SIZES_H

enum {
    /* numeric blocking: these decide the order of sums, hence bits */
    LANES = 32,
    PAIR_LANES = 16,
    CHAIN = 256,
    BLOCK = 4096,
    SPLIT_BLOCKS = 16,
    SPLIT_ROWS = 1024,
    TILE_GROUPS = 16,
    TILE_ELEMENTS = 4096,
    MAX_UNTILED_COLUMNS = 512,
    COLUMN_TILE = 256,
    ROW_TILE_ELEMENTS = 16384,
    SHORT_RUN_BYTES = 4096,
    BACKWARD_SPAN = 65536,
    BACKWARD_SPAN_ROWS = 512,
    BACKWARD_CHUNK = 1024,
    BACKWARD_SHARED_RUNS = 4,
    BACKWARD_PARTS = 64,
    BACKWARD_PART_ELEMENTS = 16384,
    BACKWARD_FEW_TASKS = 8,
    BACKWARD_OWN_CELLS = 8192,
    BACKWARD_SUM_BYTES = 2 << 20,
    BACKWARD_CACHED_BYTES = 1 << 18,
    /* tuning: these decide no bit */
    MIN_ROW = 256,
    FEW_ROWS = 4,
    SHORT_ROW = 2048,
    PREFETCH_BYTES = 4096,
    PREFETCH_WINDOW = 1 << 18,
    NON_TEMPORAL_MIN_RUN = 1024,
    NON_TEMPORAL_TILE = 256,
    GIL_RELEASE_MIN_BYTES = 1 << 15,
    STATIC_BYTES_PER_THREAD = 1 << 20,
    SERIAL_BYTES = 1 << 17,
};

#endif
