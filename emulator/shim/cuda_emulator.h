// CUDA C++ for a host compiler: included before the first line of every .cu file.
//
// The types and conversions of half and bfloat16 are NVIDIA's own, whose headers host compilers
// take. They come first, because the names defined below as macros occur in them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <utility>
#include <vector_functions.h>
#include <vector_types.h>

#include "emulator_api.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ // the attribute of this name would break the standard library's headers
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static_assert(false, "shared memory is declared with BN_SHARED or BN_DYN_SHARED");

#define threadIdx (::emulator::indices->thread)
#define blockIdx (::emulator::indices->block)
#define blockDim (::emulator::indices->block_dim)
#define gridDim (::emulator::indices->grid_dim)
constexpr int warpSize = 32;

// BN_SHARED(float, sums, [32]) is `__shared__ float sums[32]`. A macro, since a host compiler
// neither gives each block its own copy of a static variable nor puts red zones around it. The
// address of the key tells declarations apart, also those of different instances of a template.
#define BN_SHARED(T, name, dims)                                                                   \
  static char name##_key;                                                                          \
  using name##_type = T dims;                                                                      \
  name##_type &name = *static_cast<name##_type *>(                                                 \
      ::emulator::shared_memory(&name##_key, sizeof(name##_type), alignof(name##_type), #name))
#define BN_DYN_SHARED(T, name) T *name = static_cast<T *>(::emulator::dynamic_shared_memory())

#define BN_EXPORT(kernel)                                                                          \
  namespace {                                                                                      \
  const ::emulator::Export kernel##_export(#kernel, __FILE__, kernel);                             \
  }

namespace emulator {

// Registers a kernel under its name; its arguments come as in cuLaunchKernel, by their addresses.
struct Export {
  template <typename... Args>
  Export(const char *name, const char *file, void (*function)(Args...)) {
    static const size_t sizes[] = {sizeof(Args)..., 0};
    add_kernel({name, file, reinterpret_cast<void (*)()>(function), call<Args...>, sizeof...(Args),
                sizes});
  }

private:
  template <typename... Args> static void call(void (*function)(), void **args) {
    call_with<Args...>(function, args, std::index_sequence_for<Args...>());
  }
  template <typename... Args, size_t... I>
  static void call_with(void (*function)(), void **args, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(Args...)>(function)(*static_cast<Args *>(args[I])...);
  }
};

} // namespace emulator

// The line of the call, for reports: a default argument is evaluated where the call stands.
#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#include "emulator_sync.h"
#include "emulator_atomics.h"

// In kernels/common.cuh an instruction of its own.
inline unsigned load_acquire(unsigned *counter, EMULATOR_SITE) {
  return atomicAdd(counter, 0u, file, line);
}

// Neither in the C library nor in those headers for a host compiler.
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <typename T> inline T __ldg(const T *address) { return *address; }
template <typename T> inline T __ldcg(const T *address) { return *address; }
template <typename T> inline T __ldcs(const T *address) { return *address; }
template <typename T> inline void __stcs(T *address, T value) { *address = value; }
