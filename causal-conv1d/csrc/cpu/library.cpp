// What the library exports.
#include <kernels.h>

EXPORT_LIBRARY
EXPORT_KERNEL(conv1d)
EXPORT_KERNEL(conv1d_backward)
EXPORT_KERNEL(conv1d_update)
