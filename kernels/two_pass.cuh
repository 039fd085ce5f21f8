// Batch norm in two passes: kernels for tensors that fit nowhere, and for given statistics.
#pragma once

#include "batch_norm.cuh"
#include "kernels.cuh"

// partials[tile][split][channel of the tile] = Σ(x - pivot), Σ(x - pivot)² of a part of a tile.
template <typename L>
__device__ void stats(const typename L::T *x, Pair *partials, const Problem &p) {
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [L::CHANNELS]);
  const int64_t index = blockIdx.x / p.splits;
  const int split = blockIdx.x % p.splits;
  const Tile<L> tile(p, index);
  Walk<L> walk(p, tile, split);
  Mine<L, typename L::R> pivots;
  take_pivots(x, p, tile, walk, pivots);
  Pair sums[L::SUMS] = {};
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    typename L::Vec values[Chunk<L>::SIZE];
    chunk.load(x, values);
    add_moments(chunk, values, pivots, sums);
  }
  sum_block(tile, p, sums, scratch, totals);
  write_partials(tile, totals, partials + partial_at(p, index, split));
}

// y and `saved`, from the partials of `stats` or with given statistics. The blocks begin with what
// the first pass read last, which the cache may still have.
template <typename L>
__device__ void forward(const typename L::T *x, const typename L::T *residual, const void *weight,
                        const void *bias, const void *given_mean, const void *given_var,
                        const Pair *partials, typename L::T *y, double *saved, const Problem &p) {
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [L::CHANNELS]);
  BN_SHARED(Channel<typename L::R>, channels, [L::CHANNELS]);
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t index = block / p.splits;
  const int split = block % p.splits;
  const Tile<L> tile(p, index);
  Walk<L> walk(p, tile, split);
  if (!given_mean) {
    merge_partials(tile, p, partials + partial_at(p, index, 0), scratch, totals);
  }
  finish_statistics(x, weight, bias, given_mean, given_var, saved, p, tile, split == 0, totals,
                    channels);
  Mine<L, Channel<typename L::R>> mine;
  mine.take(p, walk, channels);
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    typename L::Vec values[Chunk<L>::SIZE];
    chunk.load(x, values);
    write_y(chunk, values, residual, y, p, mine);
  }
}

// partials[tile][split][channel of the tile] = Σg, Σg·(x - mean) of a part of a tile.
template <typename L>
__device__ void backward_sums(const typename L::T *x, const typename L::T *dy,
                              const typename L::T *y, const void *weight, const void *bias,
                              const double *saved, Pair *partials, const Problem &p) {
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [L::CHANNELS]);
  BN_SHARED(Channel<typename L::R>, channels, [L::CHANNELS]);
  const int64_t index = blockIdx.x / p.splits;
  const int split = blockIdx.x % p.splits;
  const Tile<L> tile(p, index);
  Walk<L> walk(p, tile, split);
  begin_backward(weight, bias, saved, p, tile, channels);
  Mine<L, Channel<typename L::R>> mine;
  mine.take(p, walk, channels);
  Pair sums[L::SUMS] = {};
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    typename L::Vec values[Chunk<L>::SIZE], g[Chunk<L>::SIZE];
    chunk.load(x, values);
    chunk.load(dy, g);
    mask(p, chunk, values, g, y, mine);
    add_products(chunk, values, g, mine, sums);
  }
  sum_block(tile, p, sums, scratch, totals);
  write_partials(tile, totals, partials + partial_at(p, index, split));
}

// dx, dresidual and dparams[2][c] (of weight and bias), as far as they are asked for. Without
// `partials` only what needs no sums: dx where the statistics were given, and dresidual.
template <typename L>
__device__ void backward(const typename L::T *x, const typename L::T *dy, const typename L::T *y,
                         const void *weight, const void *bias, const double *saved,
                         const Pair *partials, typename L::T *dx, typename L::T *dresidual,
                         void *dparams, const Problem &p) {
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [L::CHANNELS]);
  BN_SHARED(Channel<typename L::R>, channels, [L::CHANNELS]);
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t index = block / p.splits;
  const int split = block % p.splits;
  const Tile<L> tile(p, index);
  Walk<L> walk(p, tile, split);
  if (partials) {
    merge_partials(tile, p, partials + partial_at(p, index, 0), scratch, totals);
  }
  begin_backward(weight, bias, saved, p, tile, channels);
  finish_sums(saved, dparams, p, tile, split == 0, partials ? totals : nullptr, channels);
  Mine<L, Channel<typename L::R>> mine;
  mine.take(p, walk, channels);
  while (walk.left > 0 && (dx || dresidual)) {
    const Chunk<L> chunk(walk);
    typename L::Vec values[Chunk<L>::SIZE], g[Chunk<L>::SIZE];
    chunk.load(x, values);
    chunk.load(dy, g);
    mask(p, chunk, values, g, y, mine);
    write_dx(chunk, values, g, dx, dresidual, mine);
  }
}

#define TWO_PASS_KERNELS(name, T, L)                                                               \
  KERNEL bn_stats_##name(const T *x, Pair *partials, Problem p) { stats<L>(x, partials, p); }      \
  KERNEL bn_forward_##name(const T *x, const T *residual, const void *weight, const void *bias,    \
                           const void *given_mean, const void *given_var, const Pair *partials,    \
                           T *y, double *saved, Problem p) {                                       \
    forward<L>(x, residual, weight, bias, given_mean, given_var, partials, y, saved, p);           \
  }                                                                                                \
  KERNEL bn_backward_sums_##name(const T *x, const T *dy, const T *y, const void *weight,          \
                                 const void *bias, const double *saved, Pair *partials,            \
                                 Problem p) {                                                      \
    backward_sums<L>(x, dy, y, weight, bias, saved, partials, p);                                  \
  }                                                                                                \
  KERNEL bn_backward_##name(const T *x, const T *dy, const T *y, const void *weight,               \
                            const void *bias, const double *saved, const Pair *partials, T *dx,    \
                            T *dresidual, void *dparams, Problem p) {                              \
    backward<L>(x, dy, y, weight, bias, saved, partials, dx, dresidual, dparams, p);               \
  }                                                                                                \
  BN_EXPORT(bn_stats_##name)                                                                       \
  BN_EXPORT(bn_forward_##name)                                                                     \
  BN_EXPORT(bn_backward_sums_##name)                                                               \
  BN_EXPORT(bn_backward_##name)
