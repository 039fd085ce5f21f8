// Barriers that are missing, and barriers that not all threads reach.

#include "planted.cuh"

// Read after write: a thread reads what another one has to write first.
template <bool BUG> __device__ void missing_barrier_raw(const float *x, float *y, unsigned *) {
  BN_SHARED(float, values, [64]);
  values[threadIdx.x] = x[threadIdx.x];
  if (!BUG) {
    __syncthreads();
  }
  y[threadIdx.x] = values[63 - threadIdx.x];
}
PLANTED(missing_barrier_raw)

// Write after read: the memory is used again before all have read it.
template <bool BUG> __device__ void missing_barrier_war(const float *x, float *y, unsigned *) {
  BN_SHARED(float, total, [1]);
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 63) {
      *total = x[round];
    }
    __syncthreads();
    y[round * 64 + threadIdx.x] = *total;
    if (!BUG) {
      __syncthreads();
    }
  }
}
PLANTED(missing_barrier_war)

template <bool BUG> __device__ void missing_syncwarp(const float *x, float *y, unsigned *) {
  BN_SHARED(float, values, [64]);
  values[threadIdx.x] = x[threadIdx.x];
  if (!BUG) {
    __syncwarp();
  }
  y[threadIdx.x] = values[threadIdx.x ^ 1];
}
PLANTED(missing_syncwarp)

template <bool BUG> __device__ void barrier_in_branch(const float *x, float *y, unsigned *) {
  if (!BUG || threadIdx.x < 32) {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}
PLANTED(barrier_in_branch)

template <bool BUG> __device__ void two_barriers(const float *x, float *y, unsigned *) {
  if (BUG && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}
PLANTED(two_barriers)

template <bool BUG> __device__ void shuffle_in_branch(const float *x, float *y, unsigned *) {
  float v = x[threadIdx.x];
  if (BUG && threadIdx.x % 2) {
    v += __shfl_xor_sync(0xffffffff, v, 2);
  } else {
    v += __shfl_xor_sync(0xffffffff, v, 2);
  }
  y[threadIdx.x] = v;
}
PLANTED(shuffle_in_branch)

template <bool BUG> __device__ void deadlock(const float *x, float *y, unsigned *) {
  if (!BUG || threadIdx.x % 32 < 16) {
    __syncwarp();
  }
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
PLANTED(deadlock)

// Nobody writes what the threads wait for.
template <bool BUG> __device__ void endless_wait(const float *x, float *y, unsigned *counter) {
  if (!BUG && threadIdx.x == 63) {
    atomicExch(counter, 1);
  }
  while (atomicAdd(counter, 0) == 0) {
  }
  y[threadIdx.x] = x[threadIdx.x];
}
PLANTED(endless_wait)
