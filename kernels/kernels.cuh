// The kernels of one dtype, with names of the planners: bn_<kernel>_<layout>_<dtype>, and rn_… of row norms.
#pragma once

#define KERNEL extern "C" __global__ void __launch_bounds__(MOST_THREADS)

// For each layout of a dtype.
#define LAYOUTS(KERNELS, dtype, T)                                                                 \
  KERNELS(planes_##dtype, T, Planes<T>)                                                            \
  KERNELS(ragged_##dtype, T, RaggedPlanes<T>)                                                      \
  KERNELS(columns_##dtype, T, Columns<T>)                                                          \
  KERNELS(odd_##dtype, T, OddColumns<T>)
// Rows are tiles with one channel.
#define ROW_LAYOUTS(KERNELS, dtype, T)                                                             \
  KERNELS(planes_##dtype, T, Planes<T>)                                                            \
  KERNELS(ragged_##dtype, T, RaggedPlanes<T>)
