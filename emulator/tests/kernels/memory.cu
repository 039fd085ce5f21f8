// Memory out of range, unwritten or written by several threads at a time.

#include "planted.cuh"

// x has 1024 values.
template <bool BUG> __device__ void global_out_of_range(const float *x, float *y, unsigned *) {
  y[threadIdx.x] = x[1024 - 64 + threadIdx.x + (BUG ? 1 : 0)];
}
PLANTED(global_out_of_range)

template <bool BUG> __device__ void shared_out_of_range(const float *x, float *y, unsigned *) {
  BN_SHARED(float, values, [64]);
  values[threadIdx.x + (BUG ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}
PLANTED(shared_out_of_range)

// The launch gives it 64 values.
template <bool BUG> __device__ void dynamic_out_of_range(const float *x, float *y, unsigned *) {
  BN_DYN_SHARED(float, values);
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[63 - threadIdx.x + (BUG ? 1 : 0)];
}
PLANTED(dynamic_out_of_range)

template <bool BUG> __device__ void unwritten_shared(const float *x, float *y, unsigned *) {
  BN_SHARED(float, values, [64]);
  if (!BUG || threadIdx.x != 5) {
    values[threadIdx.x] = x[threadIdx.x];
  }
  __syncthreads();
  y[threadIdx.x] = values[63 - threadIdx.x];
}
PLANTED(unwritten_shared)

// More than 48 KiB.
template <bool BUG> __device__ void too_much_shared(const float *x, float *y, unsigned *) {
  BN_SHARED(float, values, [BUG ? 12289 : 12288]);
  values[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = values[threadIdx.x];
}
PLANTED(too_much_shared)

template <bool BUG> __device__ void sum_without_atomic(const float *x, float *y, unsigned *) {
  if (BUG) {
    y[0] += x[0];
  } else {
    atomicAdd(&y[0], x[0]);
  }
}
PLANTED(sum_without_atomic)

template <bool BUG> __device__ void index_overflow(const float *x, float *y, unsigned *) {
  int i = threadIdx.x + 1;
  for (int round = 0; round < 20; ++round) {
    i *= BUG ? 4 : 1;
  }
  y[threadIdx.x] = x[i & 1023];
}
PLANTED(index_overflow)

// The last block to finish adds up what the others have written: without a fence it may see the
// counter before the values.
template <bool BUG> __device__ void missing_fence(const float *x, float *y, unsigned *counter) {
  BN_SHARED(bool, is_last, [1]);
  if (threadIdx.x == 0) {
    y[1 + blockIdx.x] = x[blockIdx.x];
    if (!BUG) {
      __threadfence();
    }
    *is_last = atomicAdd(counter, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (*is_last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      sum += y[1 + i];
    }
    y[0] = sum;
  }
}
PLANTED(missing_fence)
