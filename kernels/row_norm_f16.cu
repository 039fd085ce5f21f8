#include "param_sums.cuh"
#include "row_norm.cuh"

ROW_LAYOUTS(ROW_TWO_PASS_KERNELS, f16, __half)
ROW_LAYOUTS(ROW_LANE_KERNELS, f16, __half)
ROW_LAYOUTS(ROW_GROUP_KERNELS, f16, __half)
LAYOUTS(PARAM_SUMS_KERNELS, f16, __half)
