// Batch norm in one pass: each block keeps its part of a tile in shared memory.
//
// `Blocks` says how the blocks of a tile exchange their sums: Group through global memory, Cluster
// through each other's shared memory.
#pragma once

#include "batch_norm.cuh"
#include "kernels.cuh"

// Blocks that wait for each other in global memory: all of the grid run at the same time. They take
// tile after tile. `counters[2·group]`: how many have arrived in all, and how many have left. Both
// are zero before and after a launch.
template <typename L> struct Group {
  const Problem &p;
  Pair *partials;
  unsigned *counters;
  unsigned expected;

  __device__ Group(const Problem &p, Pair *partials, unsigned *counters)
      : p(p), partials(partials), counters(counters + blockIdx.x / p.splits * 2), expected(0) {}

  __device__ int64_t stride() const { return gridDim.x / p.splits; }

  // Makes `totals` the sums over all blocks of the tile.
  __device__ const Pair *sum(const Tile<L> &tile, int64_t index, Pair *scratch, Pair *totals,
                             Pair *) {
    if (p.splits == 1) {
      __syncthreads();
      return totals;
    }
    const int split = blockIdx.x % p.splits;
    write_partials(tile, totals, partials + partial_at(p, index, split));
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counters, 1u);
      expected += p.splits;
      while (load_acquire(counters) < expected) {
        __nanosleep(20);
      }
      __threadfence();
    }
    __syncthreads();
    merge_partials(tile, p, partials + partial_at(p, index, 0), scratch, totals);
    __syncthreads();
    return totals;
  }

  // The last block to leave sets the counters back: nobody waits any more.
  __device__ void finish() {
    if (p.splits > 1 && threadIdx.x == 0 && atomicAdd(counters + 1, 1u) == p.splits - 1u) {
      atomicExch(counters, 0u);
      atomicExch(counters + 1, 0u);
    }
  }
};

// Where a thread keeps its vectors between the two ways through its part.
template <typename L> struct Slots {
  typename L::Vec *next;

  __device__ explicit Slots(typename L::Vec *shared) : next(shared + threadIdx.x) {}
  __device__ void put(const typename L::Vec (&from)[Chunk<L>::SIZE], int count) {
#pragma unroll
    for (int i = 0; i < Chunk<L>::SIZE; ++i) {
      if (i < count) {
        next[i * blockDim.x] = from[i];
      }
    }
    next += count * blockDim.x;
  }
  __device__ void get(typename L::Vec (&to)[Chunk<L>::SIZE], int count) {
#pragma unroll
    for (int i = 0; i < Chunk<L>::SIZE; ++i) {
      to[i] = {};
      if (i < count) {
        to[i] = next[i * blockDim.x];
      }
    }
    next += count * blockDim.x;
  }
};

template <typename L, typename Blocks>
__device__ void forward_resident(Blocks blocks, const typename L::T *x,
                                 const typename L::T *residual, const void *weight,
                                 const void *bias, typename L::T *y, double *saved,
                                 const Problem &p) {
  BN_DYN_SHARED(typename L::Vec, shared);
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [L::CHANNELS]);
  BN_SHARED(Pair, merged, [L::CHANNELS]);
  BN_SHARED(Channel<typename L::R>, channels, [L::CHANNELS]);
  const int split = blockIdx.x % p.splits;
  for (int64_t index = blockIdx.x / p.splits; index < p.tiles(); index += blocks.stride()) {
    const Tile<L> tile(p, index);
    const Walk<L> begin(p, tile, split);
    Pair sums[L::SUMS] = {};
    {
      Mine<L, typename L::R> pivots;
      take_pivots(x, p, tile, begin, pivots);
      Slots<L> slots(shared);
      for (Walk<L> walk = begin; walk.left > 0;) {
        const Chunk<L> chunk(walk);
        typename L::Vec values[Chunk<L>::SIZE];
        chunk.load(x, values);
        slots.put(values, chunk.count);
        add_moments(chunk, values, pivots, sums);
      }
    }
    sum_block(tile, p, sums, scratch, totals);
    const Pair *all = blocks.sum(tile, index, scratch, totals, merged);
    finish_statistics(x, weight, bias, nullptr, nullptr, saved, p, tile, split == 0, all, channels);
    Mine<L, Channel<typename L::R>> mine;
    mine.take(p, begin, channels);
    Slots<L> slots(shared);
    for (Walk<L> walk = begin; walk.left > 0;) {
      const Chunk<L> chunk(walk);
      typename L::Vec values[Chunk<L>::SIZE];
      slots.get(values, chunk.count);
      write_y(chunk, values, residual, y, p, mine);
    }
  }
  blocks.finish();
}

// Keeps x and g, which is dy behind the activation.
template <typename L, typename Blocks>
__device__ void backward_resident(Blocks blocks, const typename L::T *x, const typename L::T *dy,
                                  const typename L::T *y, const void *weight, const void *bias,
                                  const double *saved, typename L::T *dx, typename L::T *dresidual,
                                  void *dparams, const Problem &p) {
  BN_DYN_SHARED(typename L::Vec, shared);
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [L::CHANNELS]);
  BN_SHARED(Pair, merged, [L::CHANNELS]);
  BN_SHARED(Channel<typename L::R>, channels, [L::CHANNELS]);
  const int split = blockIdx.x % p.splits;
  for (int64_t index = blockIdx.x / p.splits; index < p.tiles(); index += blocks.stride()) {
    const Tile<L> tile(p, index);
    const Walk<L> begin(p, tile, split);
    begin_backward(weight, bias, saved, p, tile, channels);
    Mine<L, Channel<typename L::R>> mine;
    mine.take(p, begin, channels);
    Pair sums[L::SUMS] = {};
    {
      Slots<L> slots(shared);
      for (Walk<L> walk = begin; walk.left > 0;) {
        const Chunk<L> chunk(walk);
        typename L::Vec values[Chunk<L>::SIZE], g[Chunk<L>::SIZE];
        chunk.load(x, values);
        chunk.load(dy, g);
        mask(p, chunk, values, g, y, mine);
        slots.put(values, chunk.count);
        slots.put(g, chunk.count);
        add_products(chunk, values, g, mine, sums);
      }
    }
    sum_block(tile, p, sums, scratch, totals);
    const Pair *all = blocks.sum(tile, index, scratch, totals, merged);
    finish_sums(saved, dparams, p, tile, split == 0, all, channels);
    mine.take(p, begin, channels);
    __syncthreads(); // before the next tile's channels take their place
    Slots<L> slots(shared);
    for (Walk<L> walk = begin; walk.left > 0 && (dx || dresidual);) {
      const Chunk<L> chunk(walk);
      typename L::Vec values[Chunk<L>::SIZE], g[Chunk<L>::SIZE];
      slots.get(values, chunk.count);
      slots.get(g, chunk.count);
      write_dx(chunk, values, g, dx, dresidual, mine);
    }
  }
  blocks.finish();
}

// `how` is in the names; `BLOCKS` makes what the blocks exchange their sums by.
#define RESIDENT_KERNELS(how, BLOCKS, name, T, L)                                                  \
  KERNEL bn_forward_##how##_##name(const T *x, const T *residual, const void *weight,              \
                                   const void *bias, [[maybe_unused]] Pair *partials,              \
                                   [[maybe_unused]] unsigned *counters, T *y, double *saved,       \
                                   Problem p) {                                                    \
    forward_resident<L>(BLOCKS(L), x, residual, weight, bias, y, saved, p);                        \
  }                                                                                                \
  KERNEL bn_backward_##how##_##name(const T *x, const T *dy, const T *y, const void *weight,       \
                                    const void *bias, const double *saved,                         \
                                    [[maybe_unused]] Pair *partials,                               \
                                    [[maybe_unused]] unsigned *counters, T *dx, T *dresidual,      \
                                    void *dparams, Problem p) {                                    \
    backward_resident<L>(BLOCKS(L), x, dy, y, weight, bias, saved, dx, dresidual, dparams, p);     \
  }                                                                                                \
  BN_EXPORT(bn_forward_##how##_##name)                                                             \
  BN_EXPORT(bn_backward_##how##_##name)

#define GROUP_BLOCKS(L) Group<L>(p, partials, counters)
#define GROUP_KERNELS(name, T, L) RESIDENT_KERNELS(group, GROUP_BLOCKS, name, T, L)
