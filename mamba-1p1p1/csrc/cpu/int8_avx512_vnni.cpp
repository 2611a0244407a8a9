// Products of int8 on machines with AVX-512 and its instruction for products of bytes.
#include "kernels.h"

#if defined(KERNELS_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#elif defined(__GNUC__) && !defined(KERNELS_EMULATED)  // by scripts/avx512: no instruction may be chosen for it
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#endif
#define SIMD_AVX512
#define SIMD_VNNI
namespace avx512_vnni {
#include "simd.h"

#include "int8.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
extern const Int8Products avx512_vnni_products = avx512_vnni::int8_products_called("avx512_vnni");
#endif
