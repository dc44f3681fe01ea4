/* Numbers from how they are kept to REAL, in which they are computed, and back.
 *
 * Like every file that names REAL this one is compiled twice, by kernels.h: for float and for
 * double; T(name) is the name of a function for that type. */

FN_INLINE int T(native)(Storage storage) { return storage == (IS_FLOAT ? F32 : F64); }

FN_INLINE REAL T(fma)(REAL a, REAL b, REAL c) {
    return IS_FLOAT ? (REAL)fn_fma32((float)a, (float)b, (float)c) : (REAL)fn_fma64(a, b, c);
}

static inline void T(load)(const char *x, Storage storage, ptrdiff_t n, REAL *t) {
    switch (storage) {
    case F32:
        for (ptrdiff_t i = 0; i < n; i++) t[i] = ((const float *)x)[i];
        return;
    case F64:
        for (ptrdiff_t i = 0; i < n; i++) t[i] = (REAL)((const double *)x)[i];
        return;
    case F16:
        if (IS_FLOAT) fn_load_f16((const uint16_t *)x, n, (float *)t);
        else
            for (ptrdiff_t i = 0; i < n; i++) t[i] = fn_from_f16(((const uint16_t *)x)[i]);
        return;
    case BF16:
        for (ptrdiff_t i = 0; i < n; i++) t[i] = fn_from_bf16(((const uint16_t *)x)[i]);
        return;
    case U8:
        for (ptrdiff_t i = 0; i < n; i++) t[i] = ((const uint8_t *)x)[i];
        return;
    case I8:
        for (ptrdiff_t i = 0; i < n; i++) t[i] = ((const int8_t *)x)[i];
        return;
    case U16:
        for (ptrdiff_t i = 0; i < n; i++) t[i] = ((const uint16_t *)x)[i];
        return;
    case I16:
        for (ptrdiff_t i = 0; i < n; i++) t[i] = ((const int16_t *)x)[i];
        return;
    }
}
static inline void T(store)(const REAL *t, ptrdiff_t n, char *y, Storage storage) {
    if (T(native)(storage)) memcpy(y, t, (size_t)n * sizeof(REAL));
    else if (IS_FLOAT && storage == F16) fn_store_f16((const float *)t, n, (uint16_t *)y);
    else if (IS_FLOAT) fn_store_bf16((const float *)t, n, (uint16_t *)y);
}
/* `store`, or with non-temporal stores; `spare` has room for n of y. */
static inline void T(deliver)(const REAL *t, ptrdiff_t n, char *y, Storage storage,
                              int non_temporal, char *spare) {
    if (!non_temporal) {
        T(store)(t, n, y, storage);
    } else if (T(native)(storage)) {
        fn_stream(y, (const char *)t, (size_t)n * sizeof(REAL));
    } else {
        T(store)(t, n, spare, storage);
        fn_stream(y, spare, (size_t)(n * bytes_of(storage)));
    }
}
