// Products of rows and a weight that are both int8: one table per set of instructions. Included once, by kernels.h.
//
//     q = round(row / scale) of int8,    out = (sum of q * weight) * (scale * scale of the column) + bias
//
// The sum is exact in int32, and so the same with all instructions; a row's scale is given, or the largest magnitude of
// the row divided by 127. A row that holds a NaN or an infinity has the scale NaN.
#pragma once

#include "arguments.h"

struct Int8Weight {
    const int8_t *data;   // (columns, depth)
    const float *scales;  // (columns,)
    int64_t columns, depth;
};

struct Int8Products {
    const char *name;
    int64_t group;  // bytes of four quantised numbers of a row

    // Pack some columns: words of four numbers of a column, summed axis outermost.
    void (*pack)(const Int8Weight &weight, int64_t panel, float *packed);
    // Quantise `depth` numbers. `step`: the row's scale; null to take it from the row. `to`: the scale, then the bytes.
    void (*quantize)(const float *row, int64_t depth, const float *step, float *to);
    // out (count, columns from `column` on) = the quantised rows times a packed panel, plus the bias if there is one.
    void (*multiply)(const float *packed, int64_t depth, const float *rows, int64_t step, int64_t count,
                     const float *bias, float *out, int64_t out_step, int64_t columns);

    int64_t row_floats(int64_t depth) const { return 1 + (depth + 3) / 4 * (group / 4); }
};

// Which instructions beyond those of a set of kernels a machine has for products of bytes.
#if defined(KERNELS_X86)
extern const Int8Products avx512_vnni_products;
inline bool has_avx512_vnni() { return __builtin_cpu_supports("avx512vnni"); }
#if !defined(KERNELS_EMULATED) && (defined(__clang__) ? __clang_major__ >= 13 : __GNUC__ >= 12)
#define HAS_AVX2_VNNI 1
extern const Int8Products avx2_vnni_products;
inline bool has_avx2_vnni() { return __builtin_cpu_supports("avxvnni"); }
#endif
#elif defined(KERNELS_NEON)
#if defined(__linux__)
#include <sys/auxv.h>
#endif
extern const Int8Products neon_dot_products;
inline bool has_neon_dot() {
#if defined(__APPLE__)
    return true;  // as every 64-bit ARM of theirs with macOS
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
#endif
