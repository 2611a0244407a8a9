// What the library exports.
#include <kernels.h>

EXPORT_LIBRARY
EXPORT_KERNEL(conv1d)
