// The gradients of a row norm's weight and bias: sums over rows, by the tiles of a batch norm over the
// same channels.
#pragma once

#include "rows.cuh"
#include "kernels.cuh"

// A row's numbers where many threads need them: from here on nothing is computed in double.
template <typename R> struct alignas(WIDE) RowOf {
  R hi, lo, rstd, unused;
};

template <typename R>
__device__ void make_rows(const double *saved, RowOf<R> *table, double eps, int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < rows) {
    Problem p = {};
    p.eps = eps;
    const Row<R> row = make_row<R>(p, saved[i], saved[rows + i]);
    table[i] = {row.hi, row.lo, row.rstd, R(0)};
  }
}

// partials[tile][split][channel of the tile] = Σg, Σg·x̂ of a part of a tile. `groups` and `channels` are
// the rows of a sample and the channels of a row; a sample has `lines` of the matrix that the tiles cut.
template <typename L>
__device__ void param_sums(const typename L::T *x, const typename L::T *dy, const void *weight,
                           const void *bias, const RowOf<typename L::R> *rows, Pair *partials,
                           const Problem &p, int64_t groups, int64_t channels, int64_t lines) {
  using R = typename L::R;
  BN_SHARED(Pair, scratch, [SCRATCH<L>]);
  BN_SHARED(Pair, totals, [L::CHANNELS]);
  const int64_t index = blockIdx.x / p.splits;
  const int split = blockIdx.x % p.splits;
  const Tile<L> tile(p, index);
  Walk<L> walk(p, tile, split);
  R weights[L::SUMS], biases[L::SUMS];
  int64_t group[L::SUMS];
#pragma unroll
  for (int e = 0; e < L::SUMS; ++e) {
    const int64_t channel = tile.first + Mine<L, R>::channel_of(p, walk, e);
    weights[e] = weight ? static_cast<R>(load(weight, p.params_dtype, channel)) : R(1);
    biases[e] = bias ? static_cast<R>(load(bias, p.params_dtype, channel)) : R(0);
    group[e] = channel / channels;
  }
  Pair sums[L::SUMS] = {};
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    Vectors<L> values, dys;
    chunk.load(x, values);
    chunk.load(dy, dys);
    R sum_g[L::SUMS] = {}, sum_gx[L::SUMS] = {};
#pragma unroll
    for (int i = 0; i < Chunk<L>::SIZE; ++i) {
      if (i < chunk.count) {
        const RowOf<R> *of_sample = rows + chunk.line[i] / lines * groups;
        Row<R> row = {};
#pragma unroll
        for (int e = 0; e < L::V; ++e) {
          const int s = L::ONE ? 0 : e;
          if (e == 0 || group[s] != group[s > 0 ? s - 1 : 0]) {
            const RowOf<R> found = of_sample[group[s]];
            row = {found.hi, found.lo, found.rstd, R(0), R(0)};
          }
          if (!L::RAGGED || chunk.has(i, e)) {
            const typename L::T value = values[i].get(e);
            typename L::T g = dys[i].get(e);
            if (p.relu) {
              g = behind_relu(row, value, g, weights[s], biases[s]);
            }
            sum_g[s] += to_real(g);
            sum_gx[s] = multiply_add(to_real(g), row.centre(to_real(value)) * row.rstd, sum_gx[s]);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < L::SUMS; ++s) {
      sums[s].a += sum_g[s];
      sums[s].b += sum_gx[s];
    }
  }
  sum_block(tile, p, sums, scratch, totals);
  write_partials(tile, totals, partials + partial_at(p, index, split));
}

#define PARAM_SUMS_KERNELS(name, T, L)                                                             \
  KERNEL rn_param_sums_##name(const T *x, const T *dy, const void *weight, const void *bias,       \
                              const RowOf<real_of<T>> *rows, Pair *partials, Problem p,            \
                              int64_t groups, int64_t channels, int64_t lines) {                   \
    param_sums<L>(x, dy, weight, bias, rows, partials, p, groups, channels, lines);                \
  }                                                                                                \
  BN_EXPORT(rn_param_sums_##name)
