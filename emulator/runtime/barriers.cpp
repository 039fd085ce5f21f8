// Barriers of blocks, clusters and grids, and the end of a thread.

#include "machine.h"

namespace emulator {

namespace {

bool is_same_call(const Site &a, const Site &b) {
  return a.file == b.file && a.line == b.line && a.what == b.what;
}

void wait_at(Thread &thread, Site site) {
  thread.waits = true;
  thread.site = site;
  thread.mask = 0;
  suspend(thread);
}

void complete_block_barrier(Block &block) {
  Launch &launch = *current;
  std::vector<Thread *> threads;
  int result = 0;
  switch (block.vote) {
  case Vote::None: break;
  case Vote::Count: result = block.votes; break;
  case Vote::And: result = block.votes == block.arrived; break;
  case Vote::Or: result = block.votes != 0; break;
  }
  for (Thread &thread : block.threads) {
    thread.result = result;
    acquire_for(thread.context, launch.running->context, &block.key);
    threads.push_back(&thread);
  }
  block.arrived = block.votes = 0;
  launch.yields = 0;
  launch.ready.push_all(threads.data(), threads.size());
}

} // namespace

// Stricter than the hardware, which counts exited threads as arrived: the guide asks all threads to
// come to the same barrier.
int block_barrier(Vote vote, int predicate, Site site) {
  const InRuntime in_runtime;
  Thread &thread = *current->running;
  Block &block = *thread.block;
  if (block.alive < block.threads.size()) {
    fail(describe(site) + ", but another thread of the block has already ended");
  }
  if (block.arrived > 0 && !is_same_call(block.site, site)) {
    fail("two different barriers in one block: " + describe(site) + ", while others wait in " +
         describe(block.site));
  }
  block.site = site;
  block.vote = vote;
  block.votes += predicate != 0;
  ++block.arrived;
  release(&block.key);
  if (block.arrived == block.threads.size()) {
    complete_block_barrier(block);
    suspend(thread);
  } else {
    wait_at(thread, site);
  }
  return static_cast<int>(thread.result);
}

SplitBarrier &barrier_of(Thread &thread, Scope scope) {
  return scope == Scope::Grid ? current->barrier : thread.block->cluster->barrier;
}

void complete_if_all_arrived(SplitBarrier &barrier) {
  Launch &launch = *current;
  if (barrier.arrived == 0 || barrier.arrived < barrier.alive) {
    return;
  }
  ++barrier.phase;
  barrier.arrived = 0;
  launch.yields = 0;
  std::vector<Thread *> threads;
  for (const auto &cluster : launch.clusters) {
    for (const auto &block : cluster->blocks) {
      for (Thread &thread : block->threads) {
        if (thread.waits && thread.waits_for == &barrier) {
          thread.waits_for = nullptr;
          threads.push_back(&thread);
        }
      }
    }
  }
  launch.ready.push_all(threads.data(), threads.size());
}

void arrive(Scope scope, Site site) {
  const InRuntime in_runtime;
  Thread &thread = *current->running;
  const int i = static_cast<int>(scope);
  SplitBarrier &barrier = barrier_of(thread, scope);
  if (scope == Scope::Grid && !current->options.cooperative) {
    fail(describe(site) + " in a launch that is not cooperative");
  }
  if (scope == Scope::Grid && barrier.alive < current->all_threads) {
    fail(describe(site) + ", but another thread of the grid has already ended");
  }
  if (thread.arrived[i]) {
    fail(describe(site) + ": arrives again without having waited");
  }
  thread.arrived[i] = true;
  thread.arrived_phase[i] = barrier.phase;
  release(&barrier.keys[barrier.phase % 2]);
  ++barrier.arrived;
  complete_if_all_arrived(barrier);
}

void wait(Scope scope, Site site) {
  const InRuntime in_runtime;
  Thread &thread = *current->running;
  const int i = static_cast<int>(scope);
  SplitBarrier &barrier = barrier_of(thread, scope);
  if (!thread.arrived[i]) {
    fail(describe(site) + ": waits without having arrived");
  }
  const uint64_t phase = thread.arrived_phase[i];
  thread.arrived[i] = false;
  if (barrier.phase == phase) {
    thread.waits_for = &barrier;
    wait_at(thread, site);
  }
  acquire(&barrier.keys[phase % 2]);
}

void thread_exits(Thread &thread) {
  Launch &launch = *current;
  Block &block = *thread.block;
  if (block.arrived > 0) {
    fail("ends, while others of its block wait in " + describe(block.site));
  }
  if (launch.barrier.arrived > 0) {
    fail("ends, while others of the grid wait in grid_group::sync");
  }
  thread.exited = true;
  --block.alive;
  --block.cluster->barrier.alive;
  --launch.barrier.alive;
  launch.yields = 0;
  release(&launch.exit_key);
  release(&block.exit_key);
  complete_if_all_arrived(block.cluster->barrier);
  warp_lane_exits(thread);
  if (block.alive > 0) {
    return;
  }
  acquire(&block.exit_key);
  const std::string overwritten = block.arena->overwritten(launch.layout);
  if (!overwritten.empty()) {
    fail("the block has written shared memory out of range, behind " + overwritten);
  }
  block.arena->end();
}

} // namespace emulator
