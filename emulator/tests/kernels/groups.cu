// Barriers of clusters and grids.

#include "planted.cuh"
#include <cooperative_groups.h>

namespace cg = cooperative_groups;

// Each block reads its neighbour's shared memory.
template <bool BEFORE, bool BEHIND> __device__ void neighbour(const float *x, float *y) {
  BN_SHARED(float, values, [64]);
  const cg::cluster_group cluster = cg::this_cluster();
  const unsigned i = blockIdx.x * 64 + threadIdx.x;
  values[threadIdx.x] = x[i];
  if (BEFORE) {
    cluster.sync();
  }
  const unsigned other = (cluster.block_rank() + 1) % cluster.num_blocks();
  y[i] = cluster.map_shared_rank(values, other)[63 - threadIdx.x];
  if (BEHIND) { // a block must not end while others read from it
    cluster.barrier_arrive();
    cluster.barrier_wait();
  }
}

template <bool BUG> __device__ void missing_cluster_sync(const float *x, float *y, unsigned *) {
  neighbour<!BUG, true>(x, y);
}
PLANTED(missing_cluster_sync)

template <bool BUG> __device__ void missing_last_cluster_sync(const float *x, float *y, unsigned *) {
  neighbour<true, !BUG>(x, y);
}
PLANTED(missing_last_cluster_sync)

template <bool BUG> __device__ void missing_grid_sync(const float *x, float *y, unsigned *) {
  const cg::grid_group grid = cg::this_grid();
  const unsigned i = grid.thread_rank();
  y[512 + i] = x[i];
  if (!BUG) {
    grid.sync();
  }
  y[i] = y[512 + grid.size() - 1 - i];
}
PLANTED(missing_grid_sync)
