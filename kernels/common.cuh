// What the kernels share: dtypes, and several neighbouring values at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

// Shared memory of a block, and kernels that are launched by their names: macros, which the emulator
// of kernels (emulator/README.md) has its own versions of.
#ifndef BN_SHARED
#define BN_SHARED(T, name, dims) __shared__ T name dims
// One symbol for all types, or the compiler finds it declared twice.
#define BN_DYN_SHARED(T, name)                                                                     \
  extern __shared__ __align__(16) unsigned char bn_dynamic_shared[];                               \
  T *name = reinterpret_cast<T *>(bn_dynamic_shared)
#define BN_EXPORT(kernel)

// What another block has added to a counter, and before that written for others.
__device__ inline unsigned load_acquire(const unsigned *counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
#endif

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

template <typename I> __device__ inline I smaller(I a, I b) { return a < b ? a : b; }

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

// The words in which so many bytes are loaded and stored at once.
template <int BYTES> struct WordOf;
template <> struct WordOf<16> { using type = uint4; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<4> { using type = unsigned; };
template <> struct WordOf<2> { using type = unsigned short; };

// V neighbouring values.
template <typename T, int V> struct Vector {
  using Word = typename WordOf<sizeof(T) * V>::type;
  Word word;

  __device__ T get(int i) const {
    T values[V];
    memcpy(values, &word, sizeof(word));
    return values[i];
  }
  __device__ static Vector of(const T (&values)[V]) {
    Vector vector;
    memcpy(&vector.word, values, sizeof(vector.word));
    return vector;
  }
  // `from` and `to` are multiples of the vector's size. What is written is not read again soon:
  // `streaming` lets it be the first to leave the cache.
  __device__ static Vector load(const T *from) { return {*reinterpret_cast<const Word *>(from)}; }
  __device__ void store_streaming(T *to) const { __stcs(reinterpret_cast<Word *>(to), word); }
};
