#include "cluster.cuh"

LAYOUTS(CLUSTER_KERNELS, f32, float)
