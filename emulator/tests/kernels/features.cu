// What CUDA C++ has and the emulator should do as well; the expected values are in tests/features.rs.

#include "planted.cuh"
#include <cooperative_groups.h>

namespace cg = cooperative_groups;

// One row of 64 values for each kind of exchange within a warp.
extern "C" __global__ void warp_exchanges(int *y) {
  const int i = threadIdx.x;
  const unsigned all = 0xffffffff;
  int row = 0;
  const auto put = [&](int v) { y[64 * row++ + i] = v; };
  put(__shfl_sync(all, i, 5));
  put(__shfl_sync(all, i, 5, 8));
  put(__shfl_up_sync(all, i, 3));
  put(__shfl_down_sync(all, i, 3, 16));
  put(__shfl_xor_sync(all, i, 7));
  put(__popc(__ballot_sync(all, i % 32 < 11)));
  put(__any_sync(all, i == 40));
  put(__all_sync(all, i != 40));
  if (i % 32 < 8) {
    put(__shfl_xor_sync(0xff, i, 1));
  } else {
    put(-1);
  }
  const auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  int sum = i;
  for (int lanes = tile.size() / 2; lanes > 0; lanes /= 2) {
    sum += tile.shfl_down(sum, lanes);
  }
  put(tile.shfl(sum, 0));
  put(tile.ballot(tile.thread_rank() == 2));
  const double third = __shfl_sync(all, i / 3.0, 1);
  put(static_cast<int>(third * 3000));
}
BN_EXPORT(warp_exchanges)

extern "C" __global__ void block_votes(int *y) {
  const int i = threadIdx.x;
  y[i] = __syncthreads_count(i % 3 == 0);
  y[100 + i] = __syncthreads_and(i >= 0) + 2 * __syncthreads_and(i > 0);
  y[200 + i] = __syncthreads_or(i == 99) + 2 * __syncthreads_or(i == 100);
}
BN_EXPORT(block_votes)

extern "C" __global__ void atomics(int *ints, float *floats, unsigned long long *longs) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&ints[0], 1);
  atomicMax(&ints[1], i);
  atomicMin(&ints[2], -i);
  atomicOr(&ints[3], 1 << (i % 31));
  atomicCAS(&ints[4], 0, 7);
  atomicSub(&ints[5], 2);
  atomicAdd(&floats[0], 0.5f);
  atomicExch(&floats[1], 3);
  atomicAdd(longs, 1ull << 33);
}
BN_EXPORT(atomics)

// Indices of three dimensions, and the place of dynamic shared memory in all of its blocks.
extern "C" __global__ void indices(int *y) {
  BN_DYN_SHARED(int, scratch);
  const cg::thread_block block = cg::this_thread_block();
  const int rank = block.thread_rank();
  scratch[rank] = threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z;
  block.sync();
  const int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  y[b * block.size() + rank] = scratch[block.size() - 1 - rank];
}
BN_EXPORT(indices)

// The threads of half a warp that is no more than half there.
extern "C" __global__ void partial_warp(float *y) {
  y[threadIdx.x] = __shfl_sync(0xffffffff, 1.0f, threadIdx.x + 8);
}
BN_EXPORT(partial_warp)
