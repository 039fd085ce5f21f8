// The kernels of row norms. Resident, where the threads of a row keep their values in shared memory, and
// in two passes; the gradients of weight and bias, which are sums over rows, have kernels of their own.
#pragma once

#include "rows.cuh"
#include "kernels.cuh"

// How the threads of a row exchange their sums. Lanes of one warp, which need nothing but shuffles:
template <typename L> struct Lanes {
  const RowProblem &p;
  int thread, threads; // of the row
  int64_t index;       // of the row

  __device__ explicit Lanes(const RowProblem &p)
      : p(p), thread(static_cast<int>(threadIdx.x % p.width)), threads(static_cast<int>(p.width)),
        index(static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.width) + threadIdx.x / p.width) {}

  // Lanes without a row stay: their warp's shuffles wait for them.
  __device__ bool goes_on(int64_t at) const { return at == index; }
  __device__ int64_t stride() const { return 1; }
  __device__ int split() const { return 0; }

  __device__ Pair sum(const Tile<L> &, int64_t, Pair (&mine)[1]) {
    Pair sum = mine[0];
    for (int distance = threads / 2; distance >= 1; distance /= 2) {
      sum = sum + Pair{__shfl_xor_sync(WARP, sum.a, distance), __shfl_xor_sync(WARP, sum.b, distance)};
    }
    return sum;
  }
  // What `make` gives, for all threads of the row.
  template <typename Make> __device__ auto share(Row<typename L::R> &, Make make) { return make(); }
  __device__ void finish() {}
};

// One block or several, by Group or Cluster:
template <typename L, typename Blocks> struct WholeBlocks {
  const RowProblem &p;
  Blocks blocks;
  Pair *scratch, *totals, *merged;
  int thread, threads;
  int64_t index;

  __device__ WholeBlocks(const RowProblem &p, const Blocks &blocks, Pair *scratch, Pair *totals,
                         Pair *merged)
      : p(p), blocks(blocks), scratch(scratch), totals(totals), merged(merged),
        thread(static_cast<int>(threadIdx.x)), threads(static_cast<int>(blockDim.x)),
        index(blockIdx.x / p.tile.splits) {}

  __device__ bool goes_on(int64_t at) const { return at < p.rows; }
  __device__ int64_t stride() const { return blocks.stride(); }
  __device__ int split() const { return blockIdx.x % p.tile.splits; }

  __device__ Pair sum(const Tile<L> &tile, int64_t at, Pair (&mine)[1]) {
    sum_block(tile, p.tile, mine, scratch, totals);
    return *blocks.sum(tile, at, scratch, totals, merged);
  }
  template <typename Make> __device__ auto share(Row<typename L::R> &shared, Make make) {
    if (threadIdx.x == 0) {
      shared = make();
    }
    __syncthreads();
    return shared;
  }
  __device__ void finish() { blocks.finish(); }
};

template <typename L, typename Threads>
__device__ void forward_rows(Threads threads, const typename L::T *x, const void *weight,
                             const void *bias, typename L::T *y, double *saved, const RowProblem &p) {
  using R = typename L::R;
  BN_DYN_SHARED(typename L::Vec, shared);
  BN_SHARED(Row<R>, shared_row, [1]);
  for (int64_t at = threads.index; threads.goes_on(at); at += threads.stride()) {
    const bool there = at < p.rows;
    const int64_t index = there ? at : 0;
    const Tile<L> tile = tile_of_row<L>(p, index, threads.thread, threads.threads);
    Walk<L> walk(p.tile, tile, threads.split());
    walk.left = there ? walk.left : 0;
    const R pivot = to_real(x[tile.begin]);
    Pair sums[1] = {};
    add_moments_of_part(walk, x, pivot, Slots<L>(shared), sums);
    const Pair all = threads.sum(tile, index, sums);
    const bool saves = there && threads.thread == 0 && threads.split() == 0;
    const Row<R> row = threads.share(shared_row[0], [&] {
      return finish_statistics(p, index, all, pivot, saved, saves);
    });
    Slots<L> slots(shared);
    const auto get = [&](const Chunk<L> &chunk, Vectors<L> &to) { slots.get(to, chunk.count); };
    write_part_of_y(walk, get, row, Parameters<L>(p, weight, bias, index), y, p.tile);
  }
  threads.finish();
}

template <typename L, typename Threads>
__device__ void backward_rows(Threads threads, const typename L::T *x, const typename L::T *dy,
                              const void *weight, const void *bias, const double *saved,
                              typename L::T *dx, const RowProblem &p) {
  using R = typename L::R;
  BN_DYN_SHARED(typename L::Vec, shared);
  BN_SHARED(Row<R>, shared_rows, [2]);
  for (int64_t at = threads.index; threads.goes_on(at); at += threads.stride()) {
    const bool there = at < p.rows;
    const int64_t index = there ? at : 0;
    const Tile<L> tile = tile_of_row<L>(p, index, threads.thread, threads.threads);
    Walk<L> walk(p.tile, tile, threads.split());
    walk.left = there ? walk.left : 0;
    const Parameters<L> params(p, weight, bias, index);
    Pair sums[1] = {};
    {
      const Row<R> row =
          threads.share(shared_rows[0], [&] { return saved_row<R>(p, saved, index); });
      add_products_of_part(walk, x, dy, Slots<L>(shared), row, params, p.tile, sums);
    }
    const Pair all = threads.sum(tile, index, sums);
    const Row<R> row =
        threads.share(shared_rows[1], [&] { return finish_row<R>(p, saved, index, all); });
    Slots<L> slots(shared);
    const auto get = [&](const Chunk<L> &chunk, Vectors<L> &to_x, Vectors<L> &to_g) {
      slots.get(to_x, chunk.count);
      slots.get(to_g, chunk.count);
    };
    write_part_of_dx(walk, get, row, params, dx);
  }
  threads.finish();
}

// In two passes, the blocks of a row each have a part, and leave its sums in partials[row][split].
template <typename L> struct Part {
  int64_t index;
  int split;
  Tile<L> tile;
  Walk<L> walk;

  __device__ Part(const RowProblem &p, unsigned block)
      : index(block / p.tile.splits), split(block % p.tile.splits),
        tile(tile_of_row<L>(p, index, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x))),
        walk(p.tile, tile, split) {}
};

template <typename L>
__device__ void row_stats(const typename L::T *x, Pair *partials, const RowProblem &p) {
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [1]);
  const Part<L> part(p, blockIdx.x);
  Pair sums[1] = {};
  add_moments_of_part(part.walk, x, to_real(x[part.tile.begin]), Nowhere<L>(), sums);
  sum_block(part.tile, p.tile, sums, scratch, totals);
  write_partials(part.tile, totals, partials + partial_at(p.tile, part.index, part.split));
}

// Begins with what the first pass read last, which the cache may still have.
template <typename L>
__device__ void row_forward(const typename L::T *x, const void *weight, const void *bias,
                            const Pair *partials, typename L::T *y, double *saved,
                            const RowProblem &p) {
  using R = typename L::R;
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [1]);
  BN_SHARED(Row<R>, shared_row, [1]);
  const Part<L> part(p, gridDim.x - 1 - blockIdx.x);
  merge_partials(part.tile, p.tile, partials + partial_at(p.tile, part.index, 0), scratch, totals);
  if (threadIdx.x == 0) {
    shared_row[0] = finish_statistics(p, part.index, totals[0], to_real(x[part.tile.begin]), saved,
                                      part.split == 0);
  }
  __syncthreads();
  const auto get = [&](const Chunk<L> &chunk, Vectors<L> &to) { chunk.load(x, to); };
  const Parameters<L> params(p, weight, bias, part.index);
  write_part_of_y(part.walk, get, shared_row[0], params, y, p.tile);
}

template <typename L>
__device__ void row_backward_sums(const typename L::T *x, const typename L::T *dy, const void *weight,
                                  const void *bias, const double *saved, Pair *partials,
                                  const RowProblem &p) {
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [1]);
  const Part<L> part(p, blockIdx.x);
  const Parameters<L> params(p, weight, bias, part.index);
  const auto row = saved_row<typename L::R>(p, saved, part.index);
  Pair sums[1] = {};
  add_products_of_part(part.walk, x, dy, Nowhere<L>(), row, params, p.tile, sums);
  sum_block(part.tile, p.tile, sums, scratch, totals);
  write_partials(part.tile, totals, partials + partial_at(p.tile, part.index, part.split));
}

template <typename L>
__device__ void row_backward(const typename L::T *x, const typename L::T *dy, const void *weight,
                             const void *bias, const double *saved, const Pair *partials,
                             typename L::T *dx, const RowProblem &p) {
  using R = typename L::R;
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [1]);
  BN_SHARED(Row<R>, shared_row, [1]);
  const Part<L> part(p, gridDim.x - 1 - blockIdx.x);
  merge_partials(part.tile, p.tile, partials + partial_at(p.tile, part.index, 0), scratch, totals);
  if (threadIdx.x == 0) {
    shared_row[0] = finish_row<R>(p, saved, part.index, totals[0]);
  }
  __syncthreads();
  const Row<R> row = shared_row[0];
  const Parameters<L> params(p, weight, bias, part.index);
  const auto get = [&](const Chunk<L> &chunk, Vectors<L> &to_x, Vectors<L> &to_g) {
    load_products(chunk, x, dy, row, params, p.tile, to_x, to_g);
  };
  write_part_of_dx(part.walk, get, row, params, dx);
}

#define ROW_TWO_PASS_KERNELS(name, T, L)                                                           \
  KERNEL rn_stats_##name(const T *x, Pair *partials, RowProblem p) {                               \
    row_stats<L>(x, partials, p);                                                                  \
  }                                                                                                \
  KERNEL rn_forward_##name(const T *x, const void *weight, const void *bias, const Pair *partials, \
                           T *y, double *saved, RowProblem p) {                                    \
    row_forward<L>(x, weight, bias, partials, y, saved, p);                                        \
  }                                                                                                \
  KERNEL rn_backward_sums_##name(const T *x, const T *dy, const void *weight, const void *bias,    \
                                 const double *saved, Pair *partials, RowProblem p) {              \
    row_backward_sums<L>(x, dy, weight, bias, saved, partials, p);                                 \
  }                                                                                                \
  KERNEL rn_backward_##name(const T *x, const T *dy, const void *weight, const void *bias,         \
                            const double *saved, const Pair *partials, T *dx, RowProblem p) {      \
    row_backward<L>(x, dy, weight, bias, saved, partials, dx, p);                                  \
  }                                                                                                \
  BN_EXPORT(rn_stats_##name)                                                                       \
  BN_EXPORT(rn_forward_##name)                                                                     \
  BN_EXPORT(rn_backward_sums_##name)                                                               \
  BN_EXPORT(rn_backward_##name)

// `how` is in the names; `THREADS` makes what the threads of a row exchange their sums by.
#define ROW_RESIDENT_KERNELS(how, THREADS, name, T, L)                                             \
  KERNEL rn_forward_##how##_##name(const T *x, const void *weight, const void *bias,               \
                                   [[maybe_unused]] Pair *partials,                                \
                                   [[maybe_unused]] unsigned *counters, T *y, double *saved,       \
                                   RowProblem p) {                                                 \
    THREADS(L)                                                                                     \
    forward_rows<L>(threads, x, weight, bias, y, saved, p);                                        \
  }                                                                                                \
  KERNEL rn_backward_##how##_##name(const T *x, const T *dy, const void *weight, const void *bias, \
                                    const double *saved, [[maybe_unused]] Pair *partials,          \
                                    [[maybe_unused]] unsigned *counters, T *dx, RowProblem p) {    \
    THREADS(L)                                                                                     \
    backward_rows<L>(threads, x, dy, weight, bias, saved, dx, p);                                  \
  }                                                                                                \
  BN_EXPORT(rn_forward_##how##_##name)                                                             \
  BN_EXPORT(rn_backward_##how##_##name)

#define LANE_THREADS(L) const Lanes<L> threads(p);
#define BLOCK_THREADS(L, blocks)                                                                   \
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);                                                          \
  BN_SHARED(Pair, totals, [1]);                                                                    \
  BN_SHARED(Pair, merged, [1]);                                                                    \
  const WholeBlocks<L, decltype(blocks)> threads(p, blocks, scratch, totals, merged);
#define ROW_GROUP_THREADS(L) BLOCK_THREADS(L, (Group<L>(p.tile, partials, counters)))
#define ROW_CLUSTER_THREADS(L) BLOCK_THREADS(L, (Cluster<L>(p.tile)))

#define ROW_LANE_KERNELS(name, T, L) ROW_RESIDENT_KERNELS(lanes, LANE_THREADS, name, T, L)
#define ROW_GROUP_KERNELS(name, T, L) ROW_RESIDENT_KERNELS(group, ROW_GROUP_THREADS, name, T, L)
#define ROW_CLUSTER_KERNELS(name, T, L) ROW_RESIDENT_KERNELS(cluster, ROW_CLUSTER_THREADS, name, T, L)
