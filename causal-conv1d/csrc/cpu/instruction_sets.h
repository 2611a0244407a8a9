// The choice of instruction set, made once, when a library is loaded. Needs the struct `Kernels`.
#pragma once

#include "arguments.h"

#if defined(KERNELS_X86)
extern const Kernels avx512_kernels, avx2_kernels;
#elif defined(KERNELS_NEON)
extern const Kernels neon_kernels;
#endif
extern const Kernels generic_kernels;

inline const Kernels &kernels_for_this_machine() {
#if defined(KERNELS_X86) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return avx512_kernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels;
#elif defined(KERNELS_NEON)
    return neon_kernels;
#endif
    return generic_kernels;
}

// Exports a kernel of the chosen table under its name.
#define EXPORT_KERNEL(name)                                                  \
    KERNELS_EXPORT int name(const int64_t *values, int64_t count) {          \
        Arguments arguments(values, count);                                  \
        return chosen.name(arguments);                                       \
    }

// Exports what the loader asks of every library, and makes the choice.
#define EXPORT_LIBRARY                                                       \
    static const Kernels &chosen = kernels_for_this_machine();               \
    KERNELS_EXPORT int64_t native_abi() { return ABI; }                      \
    KERNELS_EXPORT const char *native_instruction_set() { return chosen.name; }
