#include "resident.cuh"
#include "two_pass.cuh"

LAYOUTS(TWO_PASS_KERNELS, f32, float)
LAYOUTS(GROUP_KERNELS, f32, float)
