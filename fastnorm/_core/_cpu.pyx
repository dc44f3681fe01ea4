# Which x86-64 level this processor has.  Built for the oldest, apart from the kernels: importing a
# module built for a newer processor than this one would already end the process.

cdef extern from *:
    """
    #if (defined(__x86_64__)) && (defined(__GNUC__) || defined(__clang__))
    static int fn_level(void) {
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"))) return 0;
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))) return 1;
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl"))) return 2;
        return 3;
    }
    #else
    static int fn_level(void) { return 0; }
    #endif
    """
    int fn_level() noexcept


def level() -> int:
    """0: not x86-64, or older than v2; else 1, 2, 3 for x86-64-v2, -v3, -v4."""
    return fn_level()
