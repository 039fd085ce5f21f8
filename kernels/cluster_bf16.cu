#include "cluster.cuh"

LAYOUTS(CLUSTER_KERNELS, bf16, __nv_bfloat16)
