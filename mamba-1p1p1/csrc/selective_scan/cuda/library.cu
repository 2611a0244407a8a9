// What the library says of itself; its kernels are in the other files.
#include "platform.cuh"

DESCRIBE_LIBRARY
