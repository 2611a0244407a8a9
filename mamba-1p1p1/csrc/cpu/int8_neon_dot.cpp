// Products of int8 on 64-bit ARM with the instruction for products of bytes (ARMv8.2, such as a Raspberry Pi 5).
#include "kernels.h"

#if defined(KERNELS_NEON)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define SIMD_NEON
#define SIMD_DOT
namespace neon_dot {
#include "simd.h"

#include "int8.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
extern const Int8Products neon_dot_products = neon_dot::int8_products_called("neon_dot");
#endif
