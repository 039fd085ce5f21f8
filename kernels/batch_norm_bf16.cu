#include "resident.cuh"
#include "two_pass.cuh"

LAYOUTS(TWO_PASS_KERNELS, bf16, __nv_bfloat16)
LAYOUTS(GROUP_KERNELS, bf16, __nv_bfloat16)
