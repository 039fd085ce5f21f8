// Which values of a tensor a block has, and in which order its threads go through them.
#pragma once

#include "common.cuh"

constexpr int MOST_THREADS = 512;   // of a block
constexpr int MOST_CHANNELS = 128;  // of a tile
constexpr int MOST_COLUMNS = 1024;  // of a tile with more than one channel

// One batch norm of x: [n, c, s], as it is divided among blocks. Mirrors `Problem` in
// src/ops/batch_norm/plan/problem.rs.
//
// The tensor is a matrix of n rows with c·s columns. A tile has `channels` neighbouring channels:
// so many times s columns of each row. `splits` blocks share a tile. With one channel its vectors,
// row after row, are cut into parts of `part` vectors; with several its rows into parts of `part`.
struct Problem {
  int64_t n, c, s;
  int64_t part;
  double eps;
  int32_t channels, splits;
  int32_t params_dtype, given_dtype; // of weight and bias, and of a given mean and variance
  int32_t relu, remove_mean, training;
  int32_t unused;

  __device__ double m() const { return static_cast<double>(n) * static_cast<double>(s); }
  __device__ int64_t tiles() const { return (c + channels - 1) / channels; }
};
static_assert(sizeof(Problem) == 72, "the launches pass it by value");

// How values of type T lie in vectors of V. `ONE`: a tile is one channel, and any thread may take
// any of its vectors. Else each thread keeps to its columns, so that it knows their channels.
// `RAGGED`: rows begin and end within vectors.
template <typename T_, int V_, bool ONE_, bool RAGGED_> struct Layout {
  using T = T_;
  using R = real_of<T_>;
  using Vec = Vector<T_, V_>;
  static constexpr int V = V_;
  static constexpr bool ONE = ONE_, RAGGED = RAGGED_;
  static constexpr int SUMS = ONE ? 1 : V;                // of a thread, each of one channel
  static constexpr int CHANNELS = ONE ? 1 : MOST_CHANNELS; // of a tile, at most
};
constexpr int WIDE = 16; // bytes of the widest vector
template <typename T> using Planes = Layout<T, WIDE / sizeof(T), true, false>;
template <typename T> using RaggedPlanes = Layout<T, WIDE / sizeof(T), true, true>;
// Not wider, for a thread has sums for each of its columns.
template <typename T> using Columns = Layout<T, sizeof(T) == 8 ? 2 : 4, false, false>;
template <typename T> using OddColumns = Layout<T, 1, false, false>;

// A tile, in numbers of which all of its threads but for `thread` have the same.
template <typename L> struct Tile {
  int64_t first;    // channel
  int64_t begin;    // offset of its first value
  int count;        // channels
  int64_t vectors;  // of a row
  int stride;       // vectors between two of a thread
  int thread;       // of those that share the tile

  __device__ Tile(const Problem &p, int64_t index)
      : Tile(p, index, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)) {}

  __device__ Tile(const Problem &p, int64_t index, int thread, int threads) : thread(thread) {
    first = index * p.channels;
    begin = first * p.s;
    count = L::ONE ? 1 : static_cast<int>(smaller<int64_t>(p.channels, p.c - first));
    // A ragged row that begins with the last value of a vector has one vector more.
    vectors = L::RAGGED ? (p.s + 2 * L::V - 2) / L::V : count * p.s / L::V;
    stride = L::ONE ? threads : threads / static_cast<int>(vectors) * static_cast<int>(vectors);
  }
  __device__ bool has_work() const { return thread < stride; }
};

// The vectors of one thread in one part of a tile.
template <typename L> struct Walk {
  int left;        // vectors that there are still
  int64_t line;    // row
  int64_t row;     // offset of the first value of the row in this tile
  int64_t column;  // vector in the row

  __device__ Walk(const Problem &p, const Tile<L> &tile, int split) {
    const int64_t part = L::ONE ? p.part : p.part * tile.vectors;
    const int64_t begin = part * split, end = smaller(p.n * tile.vectors, begin + part);
    const int64_t first = begin + tile.thread;
    left = 0;
    if (tile.has_work() && first < end) {
      left = static_cast<int>((end - first + tile.stride - 1) / tile.stride);
    }
    row_size = p.c * p.s;
    vectors = tile.vectors;
    line = first / vectors;
    row = line * row_size + tile.begin;
    column = first % vectors;
    step_lines = tile.stride / vectors;
    step_rows = step_lines * row_size;
    step_columns = tile.stride % vectors;
    s = p.s;
  }

  // Of the thread's next vector: where it begins.
  __device__ int64_t offset() const { return start() + column * L::V; }

  // How far it is from the first value of the row.
  __device__ int64_t place() const { return offset() - row; }

  // Which of its values are the tile's, a bit each.
  __device__ unsigned valid() const {
    constexpr unsigned ALL = (1u << L::V) - 1;
    if (!L::RAGGED) {
      return ALL;
    }
    const int64_t before = row - start() - column * L::V; // values that belong to another row
    const int64_t behind = before + s;                    // the first that does again
    unsigned mask = before > 0 ? ALL << before : ALL;
    if (behind < L::V) {
      mask &= behind > 0 ? (1u << behind) - 1 : 0;
    }
    return mask & ALL;
  }

  // Moves on, without a division.
  __device__ void next() {
    line += step_lines;
    row += step_rows;
    if (L::ONE) { // else the stride is whole rows, and the thread keeps to its columns
      column += step_columns;
      if (column >= vectors) {
        column -= vectors;
        ++line;
        row += row_size;
      }
    }
    --left;
  }

private:
  int64_t row_size, vectors, step_lines, step_rows, step_columns, s;

  __device__ int64_t start() const { return L::RAGGED ? row & ~static_cast<int64_t>(L::V - 1) : row; }
};

// The next few vectors of a thread: all are on their way before the first is used.
template <typename L> struct Chunk {
  static constexpr int SIZE = L::V == 1 ? 8 : 4;
  static constexpr unsigned ALL = (1u << L::V) - 1;
  static_assert(SIZE * L::V <= 32, "a bit for each value");
  int count;  // of vectors
  int64_t offset[SIZE];
  int64_t line[SIZE], place[SIZE]; // their rows, and how far they are from the first values of these
  unsigned valid; // which values are the tile's, a bit each

  __device__ explicit Chunk(Walk<L> &walk) {
    count = smaller(SIZE, walk.left);
    valid = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const bool there = i < count;
      offset[i] = walk.offset();
      line[i] = walk.line;
      place[i] = walk.place();
      if (there) {
        valid |= walk.valid() << i * L::V;
        walk.next();
      }
    }
  }

  __device__ bool is_full() const { return !L::RAGGED && count == SIZE; }

  // Values that are not the tile's are zero.
  __device__ void load(const typename L::T *from, typename L::Vec (&to)[SIZE]) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      to[i] = {};
      if (of_vector(i) == ALL) {
        to[i] = L::Vec::load(from + offset[i]);
      }
    }
    if (L::RAGGED) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        if (of_vector(i) != ALL && of_vector(i) != 0) {
          typename L::T values[L::V];
#pragma unroll
          for (int e = 0; e < L::V; ++e) {
            values[e] = has(i, e) ? from[offset[i] + e] : from_real<typename L::T>(0);
          }
          to[i] = L::Vec::of(values);
        }
      }
    }
  }

  __device__ void store(typename L::T *to, int i, const typename L::T (&values)[L::V]) const {
    if (of_vector(i) == ALL) {
      L::Vec::of(values).store_streaming(to + offset[i]);
    } else if (L::RAGGED) {
#pragma unroll
      for (int e = 0; e < L::V; ++e) {
        if (has(i, e)) {
          to[offset[i] + e] = values[e];
        }
      }
    }
  }

  __device__ bool has(int i, int e) const { return of_vector(i) >> e & 1; }

private:
  __device__ unsigned of_vector(int i) const { return valid >> i * L::V & ALL; }
};
