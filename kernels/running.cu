// Running statistics.

#include "tiles.cuh"
#include "kernels.cuh"

// running = keep·running + take·new
template <typename T>
__device__ void move_towards(T *running, const double *value, double keep, double take, int64_t c) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < c) {
    running[i] = static_cast<T>(keep * running[i] + take * value[i]);
  }
}

KERNEL bn_running_f32(float *running, const double *value, double keep, double take, int64_t c) {
  move_towards(running, value, keep, take, c);
}
KERNEL bn_running_f64(double *running, const double *value, double keep, double take, int64_t c) {
  move_towards(running, value, keep, take, c);
}
BN_EXPORT(bn_running_f32)
BN_EXPORT(bn_running_f64)
