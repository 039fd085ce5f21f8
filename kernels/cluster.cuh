// Blocks that exchange their sums through each other's shared memory: from compute capability 9.0 on.
#pragma once

#include <cooperative_groups.h>

#include "resident.cuh"

// The blocks of a tile are a cluster; each cluster has one tile.
template <typename L> struct Cluster {
  const Problem &p;

  __device__ explicit Cluster(const Problem &p) : p(p) {}

  __device__ int64_t stride() const { return gridDim.x / p.splits; }

  // Makes `merged` the sums over all blocks of the tile.
  __device__ const Pair *sum(const Tile<L> &tile, int64_t, Pair *, Pair *totals, Pair *merged) {
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int channel = threadIdx.x; channel < tile.count; channel += blockDim.x) {
      Pair sum = {0, 0};
      for (int rank = 0; rank < p.splits; ++rank) {
        sum = sum + cluster.map_shared_rank(totals, rank)[channel];
      }
      merged[channel] = sum;
    }
    // A block's shared memory is there as long as others read it.
    cluster.barrier_arrive();
    __syncthreads();
    return merged;
  }

  __device__ void finish() { cooperative_groups::this_cluster().barrier_wait(); }
};

#define CLUSTER_BLOCKS(L) Cluster<L>(p)
#define CLUSTER_KERNELS(name, T, L) RESIDENT_KERNELS(cluster, CLUSTER_BLOCKS, name, T, L)
