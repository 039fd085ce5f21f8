// Shared memory and the order of memory around atomics, as kernels ask for them.

#include "machine.h"

namespace emulator {

namespace {

// A kernel that waits for memory to change takes turns this often before it counts as stuck, and
// this often before threads that are starved may run, since what it waits for may be up to them.
constexpr uint64_t kMostYields = 10'000'000, kPatience = 1000;

} // namespace

void *shared_memory(const void *key, size_t size, size_t align, const char *name) {
  const InRuntime in_runtime;
  Launch &launch = *current;
  const SharedLayout::Entry *entry = launch.layout.place(key, size, align, name);
  if (!entry) {
    fail(std::string("no room for ") + name + " in shared memory: 48 KiB of it can be declared, " +
         "227 KiB with the dynamic part");
  }
  Arena &arena = *launch.running->block->arena;
  arena.update(launch.layout);
  return arena.at(entry->offset);
}

void *dynamic_shared_memory() {
  const InRuntime in_runtime;
  Launch &launch = *current;
  return launch.running->block->arena->at(launch.layout.entries()[0].offset);
}

void *map_shared_rank(void *mine, unsigned rank, Site site) {
  const InRuntime in_runtime;
  Launch &launch = *current;
  Block &block = *launch.running->block;
  if (!block.arena->contains(mine)) {
    fail(describe(site) + ": not an address in the block's shared memory");
  }
  if (rank >= block.cluster->blocks.size()) {
    fail(describe(site) + ": the cluster has no block " + std::to_string(rank));
  }
  Block &other = *block.cluster->blocks[rank];
  if (other.alive == 0) {
    fail(describe(site) + ": block " + describe(other.index) + " has already ended");
  }
  other.arena->update(launch.layout);
  return other.arena->at(block.arena->offset_of(mine));
}

void yield(Site site) {
  const InRuntime in_runtime;
  Launch &launch = *current;
  if (++launch.yields > kMostYields) {
    fail("no progress: waits for memory to change in " + describe(site) + "\n" +
         describe_waiting(launch));
  }
  if (launch.yields % kPatience == 0) {
    launch.ready.relieve();
  }
  launch.ready.push(launch.running);
  suspend(*launch.running);
}

void fence() { current->running->fenced = true; }

// An atomic operation behind a fence makes known what came before. (To be exact, what came before
// the fence: writes between the two are taken as ordered, too.)
void before_atomic(const volatile void *address, Site site) {
  yield(site);
  Thread &thread = *current->running;
  if (thread.fenced) {
    release(const_cast<void *>(address));
    thread.fenced = false;
  }
}

// The reader needs no fence of its own here: many kernels leave it to the barrier that follows.
void after_atomic(const volatile void *address) { acquire(const_cast<void *>(address)); }

} // namespace emulator
