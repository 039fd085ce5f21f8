// What the kernels share: dtypes, sums over a group of threads, and which values a thread has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Shared memory of a block, and kernels that are launched by their names: macros, which the emulator
// of kernels (emulator/README.md) has its own versions of.
#ifndef BN_SHARED
#define BN_SHARED(T, name, dims) __shared__ T name dims
#define BN_EXPORT(kernel)
#endif

constexpr int THREADS = 256; // of every block
constexpr int CHUNK = 8;     // values that a thread loads before it uses the first of them

// The type in which the values of a tensor are computed.
template <typename T> struct RealOf { using type = float; };
template <> struct RealOf<double> { using type = double; };
template <typename T> using real_of = typename RealOf<T>::type;

__device__ inline float to_real(float v) { return v; }
__device__ inline double to_real(double v) { return v; }
__device__ inline float to_real(__half v) { return __half2float(v); }
__device__ inline float to_real(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ inline T from_real(real_of<T> v) { return v; }
template <> __device__ inline __half from_real<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 from_real<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// One rounding, the same in every kernel, whatever the compiler contracts elsewhere.
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Tensors with one value per channel come in any dtype; they are read once per block.
enum DType : int32_t { F32 = 0, F64 = 1, F16 = 2, BF16 = 3 };

__device__ inline double load(const void *values, int32_t dtype, int64_t i) {
  switch (dtype) {
  case F32: return static_cast<const float *>(values)[i];
  case F64: return static_cast<const double *>(values)[i];
  case F16: return __half2float(static_cast<const __half *>(values)[i]);
  default: return __bfloat162float(static_cast<const __nv_bfloat16 *>(values)[i]);
  }
}

__device__ inline void store(void *values, int32_t dtype, int64_t i, double v) {
  switch (dtype) {
  case F32: static_cast<float *>(values)[i] = static_cast<float>(v); break;
  case F64: static_cast<double *>(values)[i] = v; break;
  case F16: static_cast<__half *>(values)[i] = __double2half(v); break;
  default: static_cast<__nv_bfloat16 *>(values)[i] = __double2bfloat16(v); break;
  }
}

// How a tensor x: [n, c, s] is divided among blocks. Mirrors `Problem` in src/ops/batch_norm/cuda/mod.rs.
//
// A block has `width` neighbouring channels: 1 where a channel's values lie together (s > 1), 32
// for a matrix [m, c], so that the threads of a warp read neighbouring columns. The threads of a
// block that share a channel are a group. The m = n·s values of a channel are cut into `splits`
// parts, a block each.
struct Problem {
  int64_t c, s, m;
  double eps;
  int32_t splits, width;
  int32_t params_dtype, given_dtype; // of weight and bias, and of a given mean and variance
  int32_t relu, remove_mean, training;
};
static_assert(sizeof(Problem) == 64, "the launches pass it by value");

// The values of one thread: every `size`-th of its group's part of a channel.
struct Values {
  int64_t channel;
  int64_t offset;  // of the next value in the tensor
  int64_t left;    // how many there are still
  int split;       // the part of the channel that the block has
  int rank, size;  // of this thread in its group, and the group's
  bool is_first;   // the first thread of its group, with a channel that exists

  __device__ explicit Values(const Problem &p) {
    const int64_t tile = blockIdx.x / p.splits;
    split = blockIdx.x % p.splits;
    channel = tile * p.width + threadIdx.x % p.width;
    rank = threadIdx.x / p.width;
    size = THREADS / p.width;
    is_first = rank == 0 && channel < p.c;
    const int64_t first = begin_of(p, split) + rank, end = begin_of(p, split + 1);
    left = channel < p.c && first < end ? (end - first + size - 1) / size : 0;
    in_plane = first % p.s;
    offset = (first / p.s * p.c + channel) * p.s + in_plane;
    plane = p.s;
    step_in_plane = size % p.s;
    step = size / p.s * p.c * p.s + step_in_plane;
    to_next_plane = (p.c - 1) * p.s;
  }

  // Moves on to the thread's next value, without a division.
  __device__ void next() {
    offset += step;
    in_plane += step_in_plane;
    if (in_plane >= plane) {
      in_plane -= plane;
      offset += to_next_plane;
    }
    --left;
  }

  // Where a part of a channel begins, counted in values of that channel.
  __device__ static int64_t begin_of(const Problem &p, int split) {
    const int64_t part = (p.m + p.splits - 1) / p.splits;
    const int64_t begin = part * split;
    return begin < p.m ? begin : p.m;
  }

private:
  int64_t in_plane, plane, step, step_in_plane, to_next_plane;
};

// Combines what the threads of a group have, always in the same order. Every thread of the block
// has to call it, with `shared` for THREADS values; each gets the result of its group.
template <typename V> __device__ V combine(V mine, V *shared, int width) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = THREADS / 2; half >= width; half /= 2) {
    if (threadIdx.x < half) {
      shared[threadIdx.x] = shared[threadIdx.x].with(shared[threadIdx.x + half]);
    }
    __syncthreads();
  }
  return shared[threadIdx.x % width];
}
