#include "cluster.cuh"
#include "row_norm.cuh"

ROW_LAYOUTS(ROW_CLUSTER_KERNELS, f16, __half)
