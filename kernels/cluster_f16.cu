#include "cluster.cuh"

LAYOUTS(CLUSTER_KERNELS, f16, __half)
