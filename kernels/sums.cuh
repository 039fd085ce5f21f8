// Two sums for each channel of a tile: over a block's threads, and over the blocks that share it.
//
// All of them in double and in an order that depends on the launch alone: the same input gives the
// same bits.
#pragma once

#include "tiles.cuh"

struct Pair {
  double a, b;

  __device__ Pair operator+(const Pair &other) const { return {a + other.a, b + other.b}; }
};

constexpr unsigned WARP = 0xffffffff;

// Over the lanes that differ in the bits from `from` to 16; each gets the sum.
__device__ inline Pair sum_lanes(Pair mine, int from = 1) {
  for (int distance = 16; distance >= from; distance /= 2) {
    mine = mine + Pair{__shfl_xor_sync(WARP, mine.a, distance),
                       __shfl_xor_sync(WARP, mine.b, distance)};
  }
  return mine;
}

// Room for the sums of a block.
template <typename L> constexpr int SCRATCH = L::ONE ? MOST_THREADS / 32 : MOST_COLUMNS;

// totals[channel of the tile] = the sums of the block's threads. Other threads see them behind the
// next barrier.
template <typename L>
__device__ void sum_block(const Tile<L> &tile, const Problem &p, Pair (&mine)[L::SUMS],
                          Pair *scratch, Pair *totals) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warps = blockDim.x / 32;
  if (L::ONE) {
    const Pair sum = sum_lanes(mine[0]);
    if (lane == 0) {
      scratch[warp] = sum;
    }
    __syncthreads();
    if (thread == 0) {
      Pair all = scratch[0];
      for (int i = 1; i < warps; ++i) {
        all = all + scratch[i];
      }
      totals[0] = all;
    }
    return;
  }
  // Over the rows: threads of the same columns are `vectors` apart.
  const int vectors = static_cast<int>(tile.vectors);
  const bool by_warps = vectors <= 32 && 32 % vectors == 0;
  const int groups = by_warps ? warps : tile.stride / vectors;
  const int place = by_warps ? warp * vectors + lane : thread;
  const bool writes = by_warps ? lane < vectors : tile.has_work();
#pragma unroll
  for (int e = 0; e < L::SUMS; ++e) {
    const Pair sum = by_warps ? sum_lanes(mine[e], vectors) : mine[e];
    if (writes) {
      scratch[place] = sum;
    }
    __syncthreads();
    if (thread < vectors) {
      mine[e] = scratch[thread];
      for (int group = 1; group < groups; ++group) {
        mine[e] = mine[e] + scratch[group * vectors + thread];
      }
    }
    __syncthreads();
  }
  // Over the columns of a channel.
  if (thread < vectors) {
#pragma unroll
    for (int e = 0; e < L::SUMS; ++e) {
      scratch[thread * L::V + e] = mine[e];
    }
  }
  __syncthreads();
  const int columns = static_cast<int>(p.s);
  if (columns == 1) {
    if (thread < tile.count) {
      totals[thread] = scratch[thread];
    }
    return;
  }
  for (int channel = warp; channel < tile.count; channel += warps) {
    Pair sum = {0, 0};
    for (int i = lane; i < columns; i += 32) {
      sum = sum + scratch[channel * columns + i];
    }
    sum = sum_lanes(sum);
    if (lane == 0) {
      totals[channel] = sum;
    }
  }
}

// Where in partials[tile][split][channel of the tile] a part's sums are.
__device__ inline int64_t partial_at(const Problem &p, int64_t tile, int split) {
  return (tile * p.splits + split) * p.channels;
}

// Leaves the block's totals to others.
template <typename L>
__device__ void write_partials(const Tile<L> &tile, const Pair *totals, Pair *partials) {
  __syncthreads();
  for (int channel = threadIdx.x; channel < tile.count; channel += blockDim.x) {
    partials[channel] = totals[channel];
  }
}

// What another block has left: past the cache of this multiprocessor, which may be older.
__device__ inline Pair load_partial(const Pair *partial) {
  const double2 pair = __ldcg(reinterpret_cast<const double2 *>(partial));
  return {pair.x, pair.y};
}

// Threads that share the partials of a channel.
constexpr int MERGERS = 32;

// totals[channel of the tile] = the sums over all parts of the tile, whose first is at `partials`.
template <typename L>
__device__ void merge_partials(const Tile<L> &tile, const Problem &p, const Pair *partials,
                               Pair *scratch, Pair *totals) {
  const int thread = threadIdx.x, channels = p.channels;
  if (L::ONE) {
    // All in the first warp.
    Pair sum = {0, 0};
    if (thread < 32) {
      for (int split = thread; split < p.splits; split += 32) {
        sum = sum + load_partial(partials + split);
      }
      sum = sum_lanes(sum);
    }
    if (thread == 0) {
      totals[0] = sum;
    }
    return;
  }
  const int mergers = smaller(MERGERS, static_cast<int>(blockDim.x) / channels);
  const int channel = thread % channels, merger = thread / channels;
  if (merger < mergers && channel < tile.count) {
    Pair sum = {0, 0};
    for (int split = merger; split < p.splits; split += mergers) {
      sum = sum + load_partial(partials + static_cast<int64_t>(split) * channels + channel);
    }
    scratch[merger * channels + channel] = sum;
  }
  __syncthreads();
  if (thread < tile.count) {
    Pair sum = scratch[thread];
    for (int i = 1; i < mergers; ++i) {
      sum = sum + scratch[i * channels + thread];
    }
    totals[thread] = sum;
  }
}
