// Kernels with and without one mistake: `name_bug` and `name_ok`, from one template.
#pragma once

#include "common.cuh"

#define PLANTED(name)                                                                              \
  extern "C" __global__ void name##_bug(const float *x, float *y, unsigned *counter) {             \
    name<true>(x, y, counter);                                                                     \
  }                                                                                                \
  extern "C" __global__ void name##_ok(const float *x, float *y, unsigned *counter) {              \
    name<false>(x, y, counter);                                                                    \
  }                                                                                                \
  BN_EXPORT(name##_bug)                                                                            \
  BN_EXPORT(name##_ok)
