// The kernels of this library: one table per instruction set.
#pragma once

#include "arguments.h"

struct Kernels {
    const char *name;
    int (*conv1d)(Arguments &);
    int (*conv1d_backward)(Arguments &);
    int (*conv1d_update)(Arguments &);
};

#include "instruction_sets.h"
