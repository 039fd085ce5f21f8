// Cooperative groups, as far as kernels here may use them. Stands before NVIDIA's header of this
// name on the include path, which declares nothing for a host compiler.
#pragma once

#include "cuda_emulator.h"

namespace cooperative_groups {

class thread_block {
public:
  static void sync(EMULATOR_SITE) {
    emulator::block_barrier(emulator::Vote::None, 0, {file, line, "thread_block::sync"});
  }
  static unsigned thread_rank() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  }
  static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned num_threads() { return size(); }
  static dim3 group_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
  static dim3 thread_index() { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
};
inline thread_block this_thread_block() { return {}; }

// A part of a warp with neighbouring lanes.
template <unsigned N> class thread_block_tile {
  static_assert(N >= 1 && N <= 32 && (N & (N - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 threads");

public:
  static unsigned thread_rank() { return emulator::lane() % N; }
  static constexpr unsigned size() { return N; }
  static constexpr unsigned num_threads() { return N; }
  static unsigned meta_group_rank() { return thread_block::thread_rank() / N; }
  static unsigned meta_group_size() { return (thread_block::size() + N - 1) / N; }
  static void sync(EMULATOR_SITE) { __syncwarp(mask(), file, line); }
  template <typename T> static T shfl(T value, int source, EMULATOR_SITE) {
    return __shfl_sync(mask(), value, source, N, file, line);
  }
  template <typename T> static T shfl_up(T value, unsigned delta, EMULATOR_SITE) {
    return __shfl_up_sync(mask(), value, delta, N, file, line);
  }
  template <typename T> static T shfl_down(T value, unsigned delta, EMULATOR_SITE) {
    return __shfl_down_sync(mask(), value, delta, N, file, line);
  }
  template <typename T> static T shfl_xor(T value, int lane_mask, EMULATOR_SITE) {
    return __shfl_xor_sync(mask(), value, lane_mask, N, file, line);
  }
  static int any(int predicate, EMULATOR_SITE) {
    return __any_sync(mask(), predicate, file, line);
  }
  static int all(int predicate, EMULATOR_SITE) {
    return __all_sync(mask(), predicate, file, line);
  }
  static unsigned ballot(int predicate, EMULATOR_SITE) {
    return __ballot_sync(mask(), predicate, file, line) >> emulator::first_of_segment(N);
  }

private:
  static unsigned mask() {
    const unsigned lanes = N == 32 ? 0xffffffffu : (1u << (N % 32)) - 1;
    return lanes << emulator::first_of_segment(N);
  }
};
template <unsigned N, typename Parent> thread_block_tile<N> tiled_partition(const Parent &) {
  return {};
}

class grid_group {
public:
  static void sync(EMULATOR_SITE) {
    emulator::arrive(emulator::Scope::Grid, {file, line, "grid_group::sync"});
    emulator::wait(emulator::Scope::Grid, {file, line, "grid_group::sync"});
  }
  static bool is_valid() { return true; }
  static unsigned long long size() {
    return 1ull * gridDim.x * gridDim.y * gridDim.z * thread_block::size();
  }
  static unsigned long long thread_rank() {
    return block() * thread_block::size() + thread_block::thread_rank();
  }

private:
  static unsigned long long block() {
    return blockIdx.x + 1ull * gridDim.x * (blockIdx.y + 1ull * gridDim.y * blockIdx.z);
  }
};
inline grid_group this_grid() { return {}; }

class cluster_group {
public:
  static void sync(EMULATOR_SITE) {
    emulator::arrive(emulator::Scope::Cluster, {file, line, "cluster_group::sync"});
    emulator::wait(emulator::Scope::Cluster, {file, line, "cluster_group::sync"});
  }
  struct arrival_token {};
  static arrival_token barrier_arrive(EMULATOR_SITE) {
    emulator::arrive(emulator::Scope::Cluster, {file, line, "cluster_group::barrier_arrive"});
    return {};
  }
  static void barrier_wait(arrival_token, EMULATOR_SITE) { barrier_wait(file, line); }
  static void barrier_wait(EMULATOR_SITE) {
    emulator::wait(emulator::Scope::Cluster, {file, line, "cluster_group::barrier_wait"});
  }
  static dim3 dim_blocks() { return emulator::indices->cluster_dim; }
  static unsigned num_blocks() { return dim_blocks().x * dim_blocks().y * dim_blocks().z; }
  static dim3 block_index() {
    const dim3 dim = dim_blocks();
    return {blockIdx.x % dim.x, blockIdx.y % dim.y, blockIdx.z % dim.z};
  }
  static unsigned block_rank() {
    const dim3 dim = dim_blocks(), index = block_index();
    return index.x + dim.x * (index.y + dim.y * index.z);
  }
  static unsigned thread_rank() {
    return block_rank() * thread_block::size() + thread_block::thread_rank();
  }
  static unsigned num_threads() { return num_blocks() * thread_block::size(); }
  static unsigned size() { return num_threads(); }
  template <typename T> static T *map_shared_rank(T *mine, unsigned rank, EMULATOR_SITE) {
    void *address = const_cast<void *>(static_cast<const void *>(mine));
    return static_cast<T *>(emulator::map_shared_rank(address, rank,
                                                      {file, line, "map_shared_rank"}));
  }
};
inline cluster_group this_cluster() { return {}; }

template <typename Group> void sync(const Group &group, EMULATOR_SITE) { group.sync(file, line); }

} // namespace cooperative_groups
