// What every kernel file needs before it chooses an instruction set. Standard headers are included here, and only here,
// so that none of their inline functions is compiled for instructions that the running machine may lack.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#define KERNELS_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#define KERNELS_NEON 1
#include <arm_neon.h>
#endif

#if defined(_WIN32)
#define KERNELS_EXPORT extern "C" __declspec(dllexport)
#else
#define KERNELS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE __attribute__((always_inline))
#else
#define ALWAYS_INLINE
#endif

// The binding is plain C: a kernel takes one array of integers (pointers, sizes, strides in elements, flags; numbers
// with a fraction as the bits of a double) and returns 0, or one of these.
enum Status { OK = 0, WRONG_ARGUMENTS = 1, OUT_OF_MEMORY = 2 };

// Raised whenever an argument list changes; the loader refuses a library of another number.
constexpr int64_t ABI = 5;

enum Element { FLOAT32 = 0, BFLOAT16 = 1 };

struct bfloat16 {
    uint16_t bits;
};
