// Products of int8 on machines with AVX2 and, as an addition to it, the instruction for products of bytes.
#include "kernels.h"

#if defined(HAS_AVX2_VNNI)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,avxvnni")
#endif
#define SIMD_AVX2
#define SIMD_VNNI
namespace avx2_vnni {
#include "simd.h"

#include "int8.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
extern const Int8Products avx2_vnni_products = avx2_vnni::int8_products_called("avx2_vnni");
#endif
