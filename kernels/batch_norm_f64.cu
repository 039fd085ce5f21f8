#include "resident.cuh"
#include "two_pass.cuh"

LAYOUTS(TWO_PASS_KERNELS, f64, double)
LAYOUTS(GROUP_KERNELS, f64, double)
