// The kernels by name, and launches in the manner of cuLaunchKernel.

#include "machine.h"

#include <algorithm>
#include <map>
#include <string.h>

namespace emulator {

namespace {

// A function's variable, since kernels register before main, in no certain order.
std::map<std::string, Kernel> &kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

uint64_t volume(dim3 dim) { return uint64_t{dim.x} * dim.y * dim.z; }

std::string check_options(const Options &options) {
  const dim3 grid = options.grid, block = options.block, cluster = options.cluster;
  if (volume(grid) == 0 || volume(block) == 0 || volume(cluster) == 0) {
    return "a grid, a block and a cluster have at least one element in each dimension";
  }
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return "a grid has at most 2147483647 x 65535 x 65535 blocks";
  }
  if (volume(block) > 1024 || block.z > 64) {
    return "a block has at most 1024 threads, and 64 in the third dimension";
  }
  if (volume(cluster) > 8) {
    return "a cluster has at most 8 blocks";
  }
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    return "the grid is not a multiple of the cluster";
  }
  if (options.shared_bytes > kTotalLimit) {
    return "a block has at most 227 KiB of shared memory";
  }
  if (kTsan && volume(grid) * volume(block) > 8000) {
    return "the thread sanitizer knows at most 8000 threads";
  }
  if (options.cooperative && volume(grid) * volume(block) > 65536) {
    return "a cooperative launch has at most 65536 threads here";
  }
  return "";
}

std::string launch(const char *name, const Options &options, void **args, const size_t *sizes,
                   size_t count) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    std::string known;
    for (const auto &kernel : kernels()) {
      known += " " + kernel.first;
    }
    return "unknown kernel; there are" + known;
  }
  const Kernel &kernel = found->second;
  if (count != kernel.arg_count) {
    return "takes " + std::to_string(kernel.arg_count) + " arguments, got " + std::to_string(count);
  }
  for (size_t i = 0; i < count; ++i) {
    if (sizes[i] != kernel.arg_sizes[i]) {
      return "argument " + std::to_string(i) + " has " + std::to_string(kernel.arg_sizes[i]) +
             " bytes, got " + std::to_string(sizes[i]);
    }
  }
  const std::string error = check_options(options);
  if (!error.empty()) {
    return error;
  }
  // Not on the stack: its members serve the thread sanitizer as names of synchronisation.
  return std::make_unique<Launch>(kernel, options, args)->run();
}

} // namespace

void add_kernel(const Kernel &kernel) { kernels()[kernel.name] = kernel; }

} // namespace emulator

extern "C" {

// `Launch` in src/lib.rs.
struct EmulatorLaunch {
  unsigned grid[3], block[3], cluster[3];
  int cooperative;
  int schedule;
  uint64_t seed;
  size_t shared_bytes;
};

// Returns 0, or 1 with a message of at most `message_size` bytes, the final zero included.
int emulator_launch(const char *name, const EmulatorLaunch *launch, void **args,
                    const size_t *sizes, size_t count, char *message, size_t message_size) {
  const auto dim = [](const unsigned *values) { return dim3(values[0], values[1], values[2]); };
  const emulator::Options options = {dim(launch->grid),
                                     dim(launch->block),
                                     dim(launch->cluster),
                                     launch->shared_bytes,
                                     launch->cooperative != 0,
                                     static_cast<emulator::ScheduleKind>(launch->schedule),
                                     launch->seed};
  const std::string error = emulator::launch(name, options, args, sizes, count);
  const size_t length = std::min(error.size(), message_size - 1);
  memcpy(message, error.data(), length);
  message[length] = 0;
  return !error.empty();
}

#ifdef EMULATOR_ASAN
// Fibres that were given up after an error leave what they had.
const char *__asan_default_options() { return "detect_leaks=0"; }
#endif

#ifdef EMULATOR_TSAN
const char *__tsan_default_options() { return "exitcode=66"; }
// Rust's own code is not instrumented, which only its calls of the C library show. No kernel has
// Rust functions on its stack.
const char *__tsan_default_suppressions() {
  return "race:^_R\nrace:^_ZN\nrace:^std::\nrace:^core::\nrace:^alloc::\nrace:^test::\n";
}
#endif
}
