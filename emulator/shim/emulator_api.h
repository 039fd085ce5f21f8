// What compiled kernels ask of the runtime, and what the runtime knows of a kernel.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <vector_types.h>

namespace emulator {

// Where in a kernel something is called, and what.
struct Site {
  const char *file;
  int line;
  const char *what;
};

struct Indices {
  uint3 thread, block;
  dim3 block_dim, grid_dim, cluster_dim;
};

// Of the CUDA thread that runs at the moment. Not `thread_local`: that would add a call to each use.
extern __thread const Indices *indices;

enum class Vote { None, Count, And, Or };
int block_barrier(Vote vote, int predicate, Site site);

enum class Collective { Sync, Shuffle, Ballot };
unsigned lane();
// The value of `source` for a shuffle, the lanes with a value other than zero for a ballot.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source, Site site);

// Barriers that are arrived at and waited for in two steps.
enum class Scope { Cluster, Grid };
void arrive(Scope scope, Site site);
void wait(Scope scope, Site site);

// The place of a declaration in the block's shared memory; `key` tells declarations apart.
void *shared_memory(const void *key, size_t size, size_t align, const char *name);
void *dynamic_shared_memory();
void *map_shared_rank(void *mine, unsigned rank, Site site);

void fence();
// Before and after each atomic operation: lets other threads run, and orders memory behind a fence.
void before_atomic(const volatile void *address, Site site);
void after_atomic(const volatile void *address);
void yield(Site site);

struct Kernel {
  const char *name;
  const char *file;
  void (*function)();
  void (*call)(void (*function)(), void **args);
  size_t arg_count;
  const size_t *arg_sizes;
};

void add_kernel(const Kernel &kernel);

} // namespace emulator
