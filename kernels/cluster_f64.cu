#include "cluster.cuh"

LAYOUTS(CLUSTER_KERNELS, f64, double)
