// The kernels of the library that is being built, for one instruction set. Only its own kernels.h and kernels_of_isa.h
// differ from those of another library: they are found on the include path.
#include <kernels.h>

#if defined(KERNELS_NEON)
#define SIMD_NEON
namespace neon {
#include <kernels_of_isa.h>
}
extern const Kernels neon_kernels = neon::kernels("neon");
#endif
