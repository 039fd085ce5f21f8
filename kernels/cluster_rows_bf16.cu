#include "cluster.cuh"
#include "row_norm.cuh"

ROW_LAYOUTS(ROW_CLUSTER_KERNELS, bf16, __nv_bfloat16)
