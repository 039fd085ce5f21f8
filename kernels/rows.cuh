// Norms of rows: layer, group, instance and RMS norm, forward and backward; the formulas stand in
// src/ops/row_norm/mod.rs.
//
// A row is a tile with one channel of a batch norm (tiles.cuh), so that it is cut into parts and summed
// as there; only each value has a weight and a bias of its own. src/ops/row_norm/plan chooses how
// many threads share a row: some lanes of a warp, a block, or several blocks.
#pragma once

#include "resident.cuh"

// Mirrors `RowProblem` in src/ops/row_norm/plan/mod.rs.
//
// `tile` has the rows of one sample as channels, and these have `tile.n` lines of `tile.s` neighbouring
// values. With the channels first, a row is one line, and all rows count as one sample. With the channels
// last, each line has one value of each channel.
struct RowProblem {
  Problem tile;
  int64_t rows;     // of all samples
  int64_t groups;   // rows of a sample
  int64_t channels; // of a row
  int64_t s;        // neighbouring values of a line that have one channel
  int64_t width;    // threads of a block that share a row
};
static_assert(sizeof(RowProblem) == 112, "the launches pass it by value");

// Row `index`, as a tile.
template <typename L>
__device__ Tile<L> tile_of_row(const RowProblem &p, int64_t index, int thread, int threads) {
  Tile<L> tile(p.tile, index % p.tile.c, thread, threads);
  tile.begin += index / p.tile.c * (p.tile.n * p.tile.c * p.tile.s);
  return tile;
}

// How a row is normalised: y = ((x - hi) - lo)·rstd·weight + bias, and on the way back
// dx = rstd·(h - (mean_h + (x - mean)·slope)) with h = weight·g.
template <typename R> struct Row {
  R hi, lo, rstd, mean_h, slope;

  __device__ R centre(R x) const { return (x - hi) - lo; }
  __device__ R normalise(R x, R weight, R bias) const {
    return multiply_add(centre(x) * rstd, weight, bias);
  }
  __device__ R dx(R x, R h) const { return rstd * (h - multiply_add(centre(x), slope, mean_h)); }
};

template <typename R> __device__ Row<R> make_row(const Problem &p, double mean, double var) {
  const R hi = static_cast<R>(mean);
  return {hi, static_cast<R>(mean - hi), static_cast<R>(rstd_of(p, var)), R(0), R(0)};
}

template <typename R>
__device__ Row<R> saved_row(const RowProblem &p, const double *saved, int64_t index) {
  return make_row<R>(p.tile, saved[index], saved[p.rows + index]);
}

// With the sums of h and h·(x - mean) over the row.
template <typename R>
__device__ Row<R> finish_row(const RowProblem &p, const double *saved, int64_t index, const Pair &sums) {
  Row<R> row = saved_row<R>(p, saved, index);
  const double rstd = rstd_of(p.tile, saved[p.rows + index]);
  row.mean_h = static_cast<R>(p.tile.remove_mean ? sums.a / p.tile.m() : 0.0);
  row.slope = static_cast<R>(rstd * rstd * sums.b / p.tile.m());
  return row;
}

// The statistics of row `index`, whose sums are around `pivot`, and saved[2][rows] = mean and variance.
template <typename R>
__device__ Row<R> finish_statistics(const RowProblem &p, int64_t index, const Pair &sums, R pivot,
                                    double *saved, bool saves) {
  double mean, var;
  statistics(p.tile, sums, pivot, &mean, &var);
  if (saves) {
    saved[index] = mean;
    saved[p.rows + index] = var;
  }
  return make_row<R>(p.tile, mean, var);
}

// Weight or bias of a row's values. They have the dtype of x, or are floats beside halves.
template <typename L> struct Parameter {
  using T = typename L::T;
  using R = typename L::R;
  const void *values;
  R otherwise; // if there are none
  bool is_float;
  bool has_vectors; // one for each of x
  int64_t first, last; // channels of the row
  int64_t s;

  __device__ Parameter(const RowProblem &p, const void *values, R otherwise, int64_t row)
      : values(values), otherwise(otherwise), s(p.s) {
    is_float = sizeof(T) == 2 && p.tile.params_dtype == F32;
    has_vectors = s == 1 && !L::RAGGED && reinterpret_cast<uintptr_t>(values) % WIDE == 0;
    first = row % p.groups * p.channels;
    last = first + p.channels - 1;
  }

  // For each value of the chunk's vector i, which has to be there.
  __device__ void take(const Chunk<L> &chunk, int i, R (&to)[L::V]) const {
    if (!values) {
#pragma unroll
      for (int e = 0; e < L::V; ++e) {
        to[e] = otherwise;
      }
      return;
    }
    const int64_t place = chunk.place[i];
    if (has_vectors) {
      is_float ? take_vectors<float>(first + place, to) : take_vectors<T>(first + place, to);
      return;
    }
    // Before and behind the row there are other rows' values, for which any parameter of this one will do.
    int64_t channel = place > 0 ? place / s : 0;
    int64_t next = (channel + 1) * s - place; // value of the vector that has the next channel
    channel = smaller(first + channel, last);
    R value = one(channel);
#pragma unroll
    for (int e = 0; e < L::V; ++e) {
      if (e >= next && channel < last) {
        value = one(++channel);
        next += s;
      }
      to[e] = value;
    }
  }

private:
  __device__ R one(int64_t channel) const {
    return is_float ? static_cast<R>(static_cast<const float *>(values)[channel])
                    : to_real(static_cast<const T *>(values)[channel]);
  }

  template <typename P> __device__ void take_vectors(int64_t channel, R (&to)[L::V]) const {
    constexpr int MOST = WIDE / sizeof(P), V = L::V < MOST ? L::V : MOST;
#pragma unroll
    for (int from = 0; from < L::V; from += V) {
      const auto vector = Vector<P, V>::load(static_cast<const P *>(values) + channel + from);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        to[from + e] = to_real(vector.get(e));
      }
    }
  }
};

template <typename L> struct Parameters {
  Parameter<L> weight, bias;

  __device__ Parameters(const RowProblem &p, const void *weight, const void *bias, int64_t row)
      : weight(p, weight, 1, row), bias(p, bias, 0, row) {}
};

template <typename L> using Vectors = typename L::Vec[Chunk<L>::SIZE];

// In the place of Slots where nothing is kept.
template <typename L> struct Nowhere {
  __device__ void put(const Vectors<L> &, int) {}
};

template <typename L, typename Slots>
__device__ void add_moments_of_part(Walk<L> walk, const typename L::T *x, typename L::R pivot,
                                    Slots slots, Pair (&sums)[1]) {
  const Mine<L, typename L::R> pivots = {{pivot}};
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    Vectors<L> values;
    chunk.load(x, values);
    slots.put(values, chunk.count);
    add_moments(chunk, values, pivots, sums);
  }
}

// `get` brings the x of a chunk.
template <typename L, typename Get>
__device__ void write_part_of_y(Walk<L> walk, Get get, const Row<typename L::R> &row,
                                const Parameters<L> &params, typename L::T *y, const Problem &p) {
  using R = typename L::R;
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    Vectors<L> x;
    get(chunk, x);
#pragma unroll
    for (int i = 0; i < Chunk<L>::SIZE; ++i) {
      if (i < chunk.count) {
        R weight[L::V], bias[L::V];
        params.weight.take(chunk, i, weight);
        params.bias.take(chunk, i, bias);
        typename L::T out[L::V];
#pragma unroll
        for (int e = 0; e < L::V; ++e) {
          const R v = row.normalise(to_real(x[i].get(e)), weight[e], bias[e]);
          out[e] = from_real<typename L::T>(p.relu && v < 0 ? R(0) : v);
        }
        chunk.store(y, i, out);
      }
    }
  }
}

// g, which is dy behind the activation. The output is computed again in the same steps, down to the
// rounding to its dtype. A NaN lets through, as in PyTorch.
template <typename T, typename R>
__device__ T behind_relu(const Row<R> &row, T x, T dy, R weight, R bias) {
  const T y = from_real<T>(row.normalise(to_real(x), weight, bias));
  return to_real(y) <= 0 ? from_real<T>(0) : dy;
}

// Loads x and dy, and makes g of dy.
template <typename L>
__device__ void load_products(const Chunk<L> &chunk, const typename L::T *x_from,
                              const typename L::T *dy, const Row<typename L::R> &row,
                              const Parameters<L> &params, const Problem &p, Vectors<L> &x,
                              Vectors<L> &g) {
  chunk.load(x_from, x);
  chunk.load(dy, g);
  if (!p.relu) {
    return;
  }
#pragma unroll
  for (int i = 0; i < Chunk<L>::SIZE; ++i) {
    if (i < chunk.count) {
      typename L::R weight[L::V], bias[L::V];
      params.weight.take(chunk, i, weight);
      params.bias.take(chunk, i, bias);
      typename L::T masked[L::V];
#pragma unroll
      for (int e = 0; e < L::V; ++e) {
        masked[e] = behind_relu(row, x[i].get(e), g[i].get(e), weight[e], bias[e]);
      }
      g[i] = L::Vec::of(masked);
    }
  }
}

// Adds Σh and Σh·(x - mean) of a part.
template <typename L, typename Slots>
__device__ void add_products_of_part(Walk<L> walk, const typename L::T *x_from,
                                     const typename L::T *dy, Slots slots,
                                     const Row<typename L::R> &row, const Parameters<L> &params,
                                     const Problem &p, Pair (&sums)[1]) {
  using R = typename L::R;
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    Vectors<L> x, g;
    load_products(chunk, x_from, dy, row, params, p, x, g);
    slots.put(x, chunk.count);
    slots.put(g, chunk.count);
    R sum_h = 0, sum_hx = 0;
#pragma unroll
    for (int i = 0; i < Chunk<L>::SIZE; ++i) {
      if (i < chunk.count) {
        R weight[L::V];
        params.weight.take(chunk, i, weight);
#pragma unroll
        for (int e = 0; e < L::V; ++e) {
          // Elsewhere g is zero, but the parameter may be infinite.
          if (!L::RAGGED || chunk.has(i, e)) {
            const R h = weight[e] * to_real(g[i].get(e));
            sum_h += h;
            sum_hx = multiply_add(h, row.centre(to_real(x[i].get(e))), sum_hx);
          }
        }
      }
    }
    sums[0].a += sum_h;
    sums[0].b += sum_hx;
  }
}

// `get` brings the x and the g of a chunk.
template <typename L, typename Get>
__device__ void write_part_of_dx(Walk<L> walk, Get get, const Row<typename L::R> &row,
                                 const Parameters<L> &params, typename L::T *dx) {
  using R = typename L::R;
  while (walk.left > 0) {
    const Chunk<L> chunk(walk);
    Vectors<L> x, g;
    get(chunk, x, g);
#pragma unroll
    for (int i = 0; i < Chunk<L>::SIZE; ++i) {
      if (i < chunk.count) {
        R weight[L::V];
        params.weight.take(chunk, i, weight);
        typename L::T out[L::V];
#pragma unroll
        for (int e = 0; e < L::V; ++e) {
          const R h = weight[e] * to_real(g[i].get(e));
          out[e] = from_real<typename L::T>(row.dx(to_real(x[i].get(e)), h));
        }
        chunk.store(dx, i, out);
      }
    }
  }
}
