#include "param_sums.cuh"
#include "row_norm.cuh"

ROW_LAYOUTS(ROW_TWO_PASS_KERNELS, f64, double)
ROW_LAYOUTS(ROW_LANE_KERNELS, f64, double)
ROW_LAYOUTS(ROW_GROUP_KERNELS, f64, double)
LAYOUTS(PARAM_SUMS_KERNELS, f64, double)
