#include "param_sums.cuh"
#include "row_norm.cuh"

ROW_LAYOUTS(ROW_TWO_PASS_KERNELS, bf16, __nv_bfloat16)
ROW_LAYOUTS(ROW_LANE_KERNELS, bf16, __nv_bfloat16)
ROW_LAYOUTS(ROW_GROUP_KERNELS, bf16, __nv_bfloat16)
LAYOUTS(PARAM_SUMS_KERNELS, bf16, __nv_bfloat16)
