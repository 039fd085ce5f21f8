#include "resident.cuh"
#include "two_pass.cuh"

LAYOUTS(TWO_PASS_KERNELS, f16, __half)
LAYOUTS(GROUP_KERNELS, f16, __half)
