// What the library exports.
#include <kernels.h>

EXPORT_LIBRARY
EXPORT_KERNEL(selective_scan)
EXPORT_KERNEL(selective_scan_backward)
EXPORT_KERNEL(selective_scan_2d)
EXPORT_KERNEL(selective_scan_2d_backward)
EXPORT_KERNEL(bidirectional_inner)
EXPORT_KERNEL(bidirectional_blocks)
EXPORT_KERNEL(int8_blocks)
EXPORT_KERNEL(int8_linear)
EXPORT_KERNEL(add_norm)
EXPORT_KERNEL(add_norm_backward)
