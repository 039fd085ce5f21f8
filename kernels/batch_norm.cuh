// Batch norm of x: [n, c, s], forward and backward; the formulas stand in src/ops/batch_norm/mod.rs.
//
// Two ways through the tensor, of which src/ops/batch_norm/plan chooses; docs/kernels.md compares them.
// Two passes: a first kernel leaves two sums for each part of a tile, the second begins by adding
// up those of its tile and writes the output. Resident: one kernel keeps its part of x (and dy) in
// shared memory while the blocks of a tile exchange their sums, so that the tensor is read once.
//
// The values are computed in float for all dtypes but double, the sums in double, a chunk of
// values at a time.
#pragma once

#include "sums.cuh"

// How a channel is normalised: y = ((x - hi) - lo)·scale + shift. hi + lo is the mean as two
// numbers, so that x - mean is right to the last bit however far the mean is from zero. For the way
// back, dx = scale·(g - (mean_g + (x - mean)·slope)).
template <typename R> struct Channel {
  R hi, lo, scale, shift, mean_g, slope;

  __device__ R centre(R x) const { return (x - hi) - lo; }
  __device__ R normalise(R x) const { return multiply_add(centre(x), scale, shift); }
  // Without a slope x plays no part, be it infinite.
  __device__ R dx(R x, R g) const {
    return scale * (g - (slope == 0 ? mean_g : multiply_add(centre(x), slope, mean_g)));
  }
};

// What a thread needs of the channels of its values.
template <typename L, typename V> struct Mine {
  V of_sum[L::SUMS];

  __device__ const V &operator[](int e) const { return of_sum[L::ONE ? 0 : e]; }
  // `values` has one for each channel of the tile.
  __device__ void take(const Problem &p, const Walk<L> &walk, const V *values) {
#pragma unroll
    for (int e = 0; e < L::SUMS; ++e) {
      of_sum[e] = values[channel_of(p, walk, e)];
    }
  }
  // The channel within the tile, of the column that a thread without work has as well.
  __device__ static int channel_of(const Problem &p, const Walk<L> &walk, int e) {
    return L::ONE ? 0 : static_cast<int>((walk.column * L::V + e) / p.s);
  }
};

__device__ inline double rstd_of(const Problem &p, double var) { return 1.0 / sqrt(var + p.eps); }

template <typename R>
__device__ Channel<R> make_channel(const Problem &p, double mean, double rstd, const void *weight,
                                   const void *bias, int64_t channel) {
  const double w = weight ? load(weight, p.params_dtype, channel) : 1.0;
  const double b = bias ? load(bias, p.params_dtype, channel) : 0.0;
  const R hi = static_cast<R>(mean);
  return {hi, static_cast<R>(mean - hi), static_cast<R>(w * rstd), static_cast<R>(b), R(0), R(0)};
}

// Adds Σ(x - pivot) and Σ(x - pivot)² of a chunk. The squares are those around the mean of the
// chunk, and its mean's own square in double: so nothing is lost if the pivot lies far away.
template <typename L>
__device__ void add_moments(const Chunk<L> &chunk, const typename L::Vec (&x)[Chunk<L>::SIZE],
                            const Mine<L, typename L::R> &pivot, Pair (&sums)[L::SUMS]) {
  using R = typename L::R;
  constexpr int SIZE = Chunk<L>::SIZE, V = L::V;
#pragma unroll
  for (int s = 0; s < L::SUMS; ++s) {
    // The vectors' values of this sum: all, or one of each.
    constexpr int WIDTH = L::ONE ? V : 1;
    constexpr int MOST = SIZE * WIDTH;
    const auto has = [&](int i) { return chunk.has(i / WIDTH, L::ONE ? i % WIDTH : s); };
    R shifted[MOST], sum = 0, squares = 0;
    int count = MOST;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      shifted[i] = to_real(x[i / WIDTH].get(L::ONE ? i % WIDTH : s)) - pivot[s];
    }
    if (!chunk.is_full()) {
      count = 0;
#pragma unroll
      for (int i = 0; i < MOST; ++i) {
        count += has(i);
        shifted[i] = has(i) ? shifted[i] : R(0);
      }
    }
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      sum += shifted[i];
    }
    const R mean = count == MOST ? sum * R(1.0 / MOST) : count == 0 ? R(0) : sum / R(count);
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const R centred = chunk.is_full() || has(i) ? shifted[i] - mean : R(0);
      squares = multiply_add(centred, centred, squares);
    }
    const double about = mean;
    sums[s].a += sum;
    sums[s].b += squares + about * (2.0 * sum - count * about);
  }
}

// Replaces dy by g, which is dy behind the activation.
template <typename L>
__device__ void mask(const Problem &p, const Chunk<L> &chunk,
                     const typename L::Vec (&x)[Chunk<L>::SIZE],
                     typename L::Vec (&dy)[Chunk<L>::SIZE], const typename L::T *y,
                     const Mine<L, Channel<typename L::R>> &channel) {
  if (!p.relu) {
    return;
  }
  typename L::Vec out[Chunk<L>::SIZE];
  if (y) {
    chunk.load(y, out);
  }
#pragma unroll
  for (int i = 0; i < Chunk<L>::SIZE; ++i) {
    typename L::T g[L::V];
#pragma unroll
    for (int e = 0; e < L::V; ++e) {
      // Where there is no y it is computed again from x, in the same steps, down to the rounding to
      // its dtype. A NaN lets through, as in PyTorch.
      const typename L::T again = from_real<typename L::T>(channel[e].normalise(to_real(x[i].get(e))));
      const bool lets_through = !(to_real(y ? out[i].get(e) : again) <= 0);
      g[e] = lets_through ? dy[i].get(e) : from_real<typename L::T>(0);
    }
    dy[i] = L::Vec::of(g);
  }
}

// Adds Σg and Σg·(x - mean) of a chunk.
template <typename L>
__device__ void add_products(const Chunk<L> &chunk, const typename L::Vec (&x)[Chunk<L>::SIZE],
                             const typename L::Vec (&g)[Chunk<L>::SIZE],
                             const Mine<L, Channel<typename L::R>> &channel,
                             Pair (&sums)[L::SUMS]) {
  using R = typename L::R;
  R sum_g[L::SUMS] = {}, sum_gx[L::SUMS] = {};
#pragma unroll
  for (int i = 0; i < Chunk<L>::SIZE; ++i) {
#pragma unroll
    for (int e = 0; e < L::V; ++e) {
      const int s = L::ONE ? 0 : e;
      // g is zero where there is nothing, but x - mean may be infinite.
      const bool has = chunk.is_full() || chunk.has(i, e);
      const R value = to_real(g[i].get(e));
      const R centred = has ? channel[e].centre(to_real(x[i].get(e))) : R(0);
      sum_g[s] += value;
      sum_gx[s] = multiply_add(value, centred, sum_gx[s]);
    }
  }
#pragma unroll
  for (int s = 0; s < L::SUMS; ++s) {
    sums[s].a += sum_g[s];
    sums[s].b += sum_gx[s];
  }
}

// Mean and variance of a channel from its sums around `pivot`.
__device__ inline void statistics(const Problem &p, const Pair &sums, double pivot, double *mean,
                                  double *var) {
  const double shift = sums.a / p.m();
  const double m2 = sums.b - sums.a * shift; // a little below zero for a constant channel, at most
  *mean = pivot + shift;
  *var = m2 < 0 ? 0.0 : m2 / p.m(); // a NaN stays
  if (!p.remove_mean) {
    *var += *mean * *mean;
    *mean = 0;
  }
}

template <typename L> __device__ typename L::R pivot_of(const typename L::T *x, const Problem &p, int64_t channel) {
  return to_real(x[channel * p.s]);
}

// The pivot is the channel's first value: a constant channel has exactly its value as mean, and the
// offset of the data costs no accuracy. An outlier in its place costs little: it cannot be further
// from the mean than √m standard deviations, so that x - pivot rounds to 2⁻²⁵·√m of one at most.
template <typename L>
__device__ void take_pivots(const typename L::T *x, const Problem &p, const Tile<L> &tile,
                            const Walk<L> &walk, Mine<L, typename L::R> &pivots) {
#pragma unroll
  for (int e = 0; e < L::SUMS; ++e) {
    pivots.of_sum[e] = pivot_of<L>(x, p, tile.first + Mine<L, int>::channel_of(p, walk, e));
  }
}

// The channels of a tile, and saved[2][c] = mean and variance that were used.
template <typename L>
__device__ void finish_statistics(const typename L::T *x, const void *weight, const void *bias,
                                  const void *given_mean, const void *given_var, double *saved,
                                  const Problem &p, const Tile<L> &tile, bool is_first,
                                  const Pair *sums, Channel<typename L::R> *channels) {
  for (int i = threadIdx.x; i < tile.count; i += blockDim.x) {
    const int64_t channel = tile.first + i;
    double mean, var;
    if (given_mean) {
      mean = load(given_mean, p.given_dtype, channel);
      var = load(given_var, p.given_dtype, channel);
    } else {
      statistics(p, sums[i], pivot_of<L>(x, p, channel), &mean, &var);
    }
    channels[i] = make_channel<typename L::R>(p, mean, rstd_of(p, var), weight, bias, channel);
    if (is_first) {
      saved[channel] = mean;
      saved[p.c + channel] = var;
    }
  }
  __syncthreads();
}

// The channels of a tile as the way back needs them, before its sums are known.
template <typename L>
__device__ void begin_backward(const void *weight, const void *bias, const double *saved,
                               const Problem &p, const Tile<L> &tile,
                               Channel<typename L::R> *channels) {
  for (int i = threadIdx.x; i < tile.count; i += blockDim.x) {
    const int64_t channel = tile.first + i;
    channels[i] = make_channel<typename L::R>(p, saved[channel], rstd_of(p, saved[p.c + channel]),
                                              weight, bias, channel);
  }
  __syncthreads();
}

// The channels' sums, for dx and as dparams[2][c] of weight and bias. Without sums, dx goes only
// through the normalisation.
template <typename L>
__device__ void finish_sums(const double *saved, void *dparams, const Problem &p,
                            const Tile<L> &tile, bool is_first, const Pair *sums,
                            Channel<typename L::R> *channels) {
  for (int i = threadIdx.x; sums && i < tile.count; i += blockDim.x) {
    const int64_t channel = tile.first + i;
    const double rstd = rstd_of(p, saved[p.c + channel]);
    if (p.training) {
      channels[i].mean_g = static_cast<typename L::R>(p.remove_mean ? sums[i].a / p.m() : 0.0);
      channels[i].slope = static_cast<typename L::R>(rstd * rstd * sums[i].b / p.m());
    }
    if (dparams && is_first) {
      store(dparams, p.params_dtype, channel, rstd * sums[i].b);
      store(dparams, p.params_dtype, p.c + channel, sums[i].a);
    }
  }
  __syncthreads();
}

template <typename L>
__device__ void write_y(const Chunk<L> &chunk, const typename L::Vec (&x)[Chunk<L>::SIZE],
                        const typename L::T *residual, typename L::T *y, const Problem &p,
                        const Mine<L, Channel<typename L::R>> &channel) {
  using R = typename L::R;
  typename L::Vec added[Chunk<L>::SIZE];
  if (residual) {
    chunk.load(residual, added);
  }
#pragma unroll
  for (int i = 0; i < Chunk<L>::SIZE; ++i) {
    typename L::T out[L::V];
#pragma unroll
    for (int e = 0; e < L::V; ++e) {
      R v = channel[e].normalise(to_real(x[i].get(e)));
      if (residual) {
        v += to_real(added[i].get(e));
      }
      out[e] = from_real<typename L::T>(p.relu && v < 0 ? R(0) : v);
    }
    chunk.store(y, i, out);
  }
}

// dx and dresidual, as far as they are asked for; g is dy behind the activation.
template <typename L>
__device__ void write_dx(const Chunk<L> &chunk, const typename L::Vec (&x)[Chunk<L>::SIZE],
                         const typename L::Vec (&g)[Chunk<L>::SIZE], typename L::T *dx,
                         typename L::T *dresidual, const Mine<L, Channel<typename L::R>> &channel) {
#pragma unroll
  for (int i = 0; i < Chunk<L>::SIZE; ++i) {
    typename L::T out[L::V], masked_dy[L::V];
#pragma unroll
    for (int e = 0; e < L::V; ++e) {
      masked_dy[e] = g[i].get(e);
      const typename L::R v = channel[e].dx(to_real(x[i].get(e)), to_real(masked_dy[e]));
      out[e] = from_real<typename L::T>(v);
    }
    if (dx) {
      chunk.store(dx, i, out);
    }
    if (dresidual) {
      chunk.store(dresidual, i, masked_dy);
    }
  }
}
