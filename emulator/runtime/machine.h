// The state of a launch: its blocks, warps and threads, and who waits for what.
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <stdint.h>
#include <stdio.h>
#include <string>
#include <vector>

#include "../shim/emulator_api.h"
#include "fiber.h"
#include "sanitizers.h"
#include "shared_memory.h"

namespace emulator {

struct Block;
struct Cluster;
struct Launch;
struct Warp;

enum class ScheduleKind : int { Forward, Reverse, Random, Starve };

struct Options {
  dim3 grid, block, cluster;
  size_t shared_bytes;
  bool cooperative;
  ScheduleKind schedule;
  uint64_t seed;
};

// A barrier in two steps. A thread that has arrived at one phase may reach the next one before
// others have waited for this one, but not the one behind that: hence two keys.
struct SplitBarrier {
  uint64_t phase = 0;
  size_t arrived = 0, alive = 0;
  uint64_t keys[2] = {0, 0};
};

struct Thread {
  Indices indices;
  unsigned lane = 0;
  Warp *warp = nullptr;
  Block *block = nullptr;
  Context context;
  void *stack = nullptr;
  bool exited = false, starved = false, fenced = false;
  // Where it waits, if `waits`; the mask is for warps.
  bool waits = false;
  Site site = {};
  unsigned mask = 0;
  SplitBarrier *waits_for = nullptr;
  // What it gives to and takes from a collective operation.
  uint64_t value = 0, result = 0;
  unsigned source = 0;
  // For each Scope: whether it has arrived and in which phase.
  bool arrived[2] = {false, false};
  uint64_t arrived_phase[2] = {0, 0};
};

// A collective operation that some lanes have reached.
struct Pending {
  Collective kind;
  unsigned mask, arrived;
  Site site;
};

struct Warp {
  Thread *threads[32] = {};
  unsigned alive = 0; // lanes that exist and have not exited
  std::vector<Pending> pending;
  uint64_t keys[32] = {}; // by the lowest lane of the mask: it takes part in all that share a key
};

struct Block {
  uint3 index;
  Cluster *cluster = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<Arena> arena;
  unsigned alive = 0;
  // The barrier of the block.
  unsigned arrived = 0, votes = 0;
  Vote vote = Vote::None;
  Site site = {};
  uint64_t key = 0, exit_key = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  SplitBarrier barrier;
};

// Threads that can go on, in the order of the schedule.
class Ready {
public:
  void start(ScheduleKind kind, uint64_t seed);
  void push(Thread *thread);
  // Pushes `count` threads that became ready together.
  void push_all(Thread *const *threads, size_t count);
  Thread *pop();
  // Lets the starved threads run like others, until they wait again.
  void relieve();
  bool empty() const { return queue_.empty() && starved_.empty(); }
  std::mt19937_64 &random() { return random_; }

private:
  ScheduleKind kind_ = ScheduleKind::Forward;
  std::deque<Thread *> queue_, starved_;
  std::mt19937_64 random_;
};

struct Launch {
  Launch(const Kernel &kernel, const Options &options, void **args);
  // Runs all blocks; an error message or nothing.
  std::string run();

  const Kernel &kernel;
  const Options options;
  void **args;
  SharedLayout layout;
  Ready ready;
  std::vector<std::unique_ptr<Cluster>> clusters; // the resident ones
  std::vector<std::unique_ptr<Cluster>> ended;    // kept for the thread sanitizer
  std::vector<std::unique_ptr<Arena>> arenas;     // to be used again
  SplitBarrier barrier; // of the grid
  size_t all_threads = 0;
  Context scheduler;
  Stacks &stacks;
  Thread *running = nullptr;
  uint64_t yields = 0; // since something else happened
  uint64_t exit_key = 0;
  std::string error;

private:
  std::unique_ptr<Cluster> make_cluster(uint64_t index);
  void add_block(Cluster &cluster, uint3 index);
  void choose_starved();
  std::string run_resident();
  void retire_resident();
};

// The launch that this thread of the operating system executes.
extern thread_local Launch *current;

// Gives the processor back until the thread is made ready again.
void suspend(Thread &thread);
// Ends the launch with a message; does not return.
[[noreturn]] void fail(const std::string &message);
void thread_exits(Thread &thread);
void warp_lane_exits(Thread &thread);
// The waiters of `barrier` go on if all have arrived.
void complete_if_all_arrived(SplitBarrier &barrier);
SplitBarrier &barrier_of(Thread &thread, Scope scope);

std::string hex(unsigned mask);
std::string describe(const Site &site);
std::string describe(const uint3 &index);
std::string describe(const Thread &thread);
// Which threads wait where.
std::string describe_waiting(const Launch &launch);

} // namespace emulator
