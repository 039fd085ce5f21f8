#include "param_sums.cuh"
#include "row_norm.cuh"

ROW_LAYOUTS(ROW_TWO_PASS_KERNELS, f32, float)
ROW_LAYOUTS(ROW_LANE_KERNELS, f32, float)
ROW_LAYOUTS(ROW_GROUP_KERNELS, f32, float)
LAYOUTS(PARAM_SUMS_KERNELS, f32, float)
