// The kernels of the library that is being built, for one instruction set. Only its own kernels.h and kernels_of_isa.h
// differ from those of another library: they are found on the include path.
#include <kernels.h>

#if defined(KERNELS_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__GNUC__) && !defined(KERNELS_EMULATED)  // by scripts/avx512: no instruction may be chosen for it
#pragma GCC target("avx2,fma")
#endif
#define SIMD_AVX2
namespace avx2 {
#include <kernels_of_isa.h>
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
extern const Kernels avx2_kernels = avx2::kernels("avx2");
#endif
