// The kernels of this library: one table per instruction set.
#pragma once

#include "int8_products.h"

struct Kernels {
    const char *name;
    int (*selective_scan)(Arguments &);
    int (*selective_scan_backward)(Arguments &);
    int (*selective_scan_2d)(Arguments &);
    int (*selective_scan_2d_backward)(Arguments &);
    int (*bidirectional_inner)(Arguments &);
    int (*bidirectional_blocks)(Arguments &);
    int (*int8_blocks)(Arguments &);
    int (*int8_linear)(Arguments &);
    int (*add_norm)(Arguments &);
    int (*add_norm_backward)(Arguments &);
};

#include "instruction_sets.h"
