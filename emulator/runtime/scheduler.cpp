// Runs the blocks of a launch, one CUDA thread at a time, in the order of the schedule.

#include "machine.h"

#include <algorithm>
#include <stdlib.h>

namespace emulator {

__thread const Indices *indices = nullptr;
thread_local Launch *current = nullptr;

namespace {

// Clusters that run together under the schedules that mix blocks.
constexpr uint64_t kResident = 4;

thread_local Stacks all_stacks;

void fiber_main() {
  fiber_entered();
  Launch &launch = *current;
  Thread &thread = *launch.running;
  launch.kernel.call(launch.kernel.function, launch.args);
  {
    const InRuntime in_runtime;
    thread_exits(thread);
  }
  if (thread.block->alive == 0) {
    // The memory of an ended block is nobody's: to read it is a race.
    write_range(thread.block->arena->at(0), launch.layout.capacity());
  }
  switch_context(thread.context, launch.scheduler, true);
}

} // namespace

void Ready::start(ScheduleKind kind, uint64_t seed) {
  kind_ = kind;
  random_.seed(seed);
}

void Ready::push(Thread *thread) {
  thread->waits = false;
  (thread->starved ? starved_ : queue_).push_back(thread);
}

void Ready::push_all(Thread *const *threads, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    push(threads[kind_ == ScheduleKind::Reverse ? count - 1 - i : i]);
  }
}

Thread *Ready::pop() {
  std::deque<Thread *> &queue = queue_.empty() ? starved_ : queue_;
  if (kind_ == ScheduleKind::Random || kind_ == ScheduleKind::Starve) {
    std::swap(queue.front(), queue[random_() % queue.size()]);
  }
  Thread *thread = queue.front();
  queue.pop_front();
  return thread;
}

void Ready::relieve() {
  queue_.insert(queue_.end(), starved_.begin(), starved_.end());
  starved_.clear();
}

Launch::Launch(const Kernel &kernel, const Options &options, void **args)
    : kernel(kernel), options(options), args(args), layout(options.shared_bytes),
      stacks(all_stacks) {
  ready.start(options.schedule, options.seed);
}

void Launch::add_block(Cluster &cluster, uint3 index) {
  const dim3 dim = options.block;
  const unsigned count = dim.x * dim.y * dim.z;
  cluster.blocks.push_back(std::make_unique<Block>());
  Block &block = *cluster.blocks.back();
  block.index = index;
  block.cluster = &cluster;
  block.alive = count;
  block.threads.resize(count);
  block.warps.resize((count + 31) / 32);
  if (arenas.empty()) {
    block.arena = std::make_unique<Arena>();
  } else {
    block.arena = std::move(arenas.back());
    arenas.pop_back();
  }
  block.arena->start(layout);
  for (unsigned i = 0; i < count; ++i) {
    Thread &thread = block.threads[i];
    thread.indices = {{i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y}, index, dim, options.grid,
                      options.cluster};
    thread.lane = i % 32;
    thread.warp = &block.warps[i / 32];
    thread.warp->threads[thread.lane] = &thread;
    thread.warp->alive |= 1u << thread.lane;
    thread.block = &block;
    thread.stack = stacks.take();
    make_fiber(thread.context, thread.stack, fiber_main);
  }
  cluster.barrier.alive += count;
}

std::unique_ptr<Cluster> Launch::make_cluster(uint64_t index) {
  const dim3 in = options.cluster, grid = options.grid;
  const uint64_t nx = grid.x / in.x, ny = grid.y / in.y;
  const uint3 first = {static_cast<unsigned>(index % nx * in.x),
                       static_cast<unsigned>(index / nx % ny * in.y),
                       static_cast<unsigned>(index / nx / ny * in.z)};
  auto cluster = std::make_unique<Cluster>();
  for (unsigned z = 0; z < in.z; ++z) {
    for (unsigned y = 0; y < in.y; ++y) {
      for (unsigned x = 0; x < in.x; ++x) {
        add_block(*cluster, {first.x + x, first.y + y, first.z + z});
      }
    }
  }
  return cluster;
}

// One thread, warp or block of the resident ones, which runs only when no other can.
void Launch::choose_starved() {
  std::mt19937_64 &random = ready.random();
  Cluster &cluster = *clusters[random() % clusters.size()];
  Block &block = *cluster.blocks[random() % cluster.blocks.size()];
  const size_t thread = random() % block.threads.size(), kind = random() % 3;
  for (size_t i = 0; i < block.threads.size(); ++i) {
    block.threads[i].starved = kind == 0 || (kind == 1 && i / 32 == thread / 32) || i == thread;
  }
}

std::string Launch::run() {
  const dim3 in = options.cluster, grid = options.grid;
  const uint64_t count = uint64_t{grid.x / in.x} * (grid.y / in.y) * (grid.z / in.z);
  const bool mixed =
      options.schedule == ScheduleKind::Random || options.schedule == ScheduleKind::Starve;
  const uint64_t together = options.cooperative ? count : mixed ? kResident : 1;
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) {
    order[i] = options.schedule == ScheduleKind::Reverse ? count - 1 - i : i;
  }
  if (mixed) {
    std::shuffle(order.begin(), order.end(), ready.random());
  }
  const InRuntime in_runtime;
  adopt_thread(scheduler);
  current = this;
  for (uint64_t done = 0; done < count && error.empty(); done += together) {
    std::vector<Thread *> threads;
    for (uint64_t i = done; i < count && i < done + together; ++i) {
      clusters.push_back(make_cluster(order[i]));
    }
    if (options.cooperative && options.schedule == ScheduleKind::Reverse) {
      std::reverse(clusters.begin(), clusters.end()); // `push_all` turns all threads around
    }
    for (const auto &cluster : clusters) {
      for (const auto &block : cluster->blocks) {
        for (Thread &thread : block->threads) {
          threads.push_back(&thread);
        }
      }
    }
    barrier = {};
    barrier.alive = all_threads = threads.size();
    if (options.schedule == ScheduleKind::Starve) {
      choose_starved();
    }
    ready.push_all(threads.data(), threads.size());
    error = run_resident();
    retire_resident();
  }
  for (const auto &cluster : ended) {
    for (const auto &block : cluster->blocks) {
      for (Thread &thread : block->threads) {
        if (thread.exited) {
          forget_fiber(thread.context);
        } else { // given up after an error; what it did lies in the past all the same
          release_for(thread.context, scheduler, &exit_key);
        }
        stacks.give_back(thread.stack);
      }
    }
  }
  acquire(&exit_key);
  current = nullptr;
  return error;
}

std::string Launch::run_resident() {
  while (!ready.empty() && error.empty()) {
    running = ready.pop();
    indices = &running->indices;
    switch_context(scheduler, running->context, false);
  }
  if (!error.empty()) {
    return error;
  }
  for (const auto &cluster : clusters) {
    for (const auto &block : cluster->blocks) {
      if (block->alive > 0) {
        return "deadlock:\n" + describe_waiting(*this);
      }
    }
  }
  return "";
}

// Fibres, and under the thread sanitizer all memory, stay until the launch has ended: the sanitizer
// would take what is made at the same place for the same thing.
void Launch::retire_resident() {
  for (auto &cluster : clusters) {
    if (kTsan) {
      ended.push_back(std::move(cluster));
      continue;
    }
    for (const auto &block : cluster->blocks) {
      for (Thread &thread : block->threads) {
        stacks.give_back(thread.stack);
      }
      arenas.push_back(std::move(block->arena));
    }
  }
  clusters.clear();
}

void suspend(Thread &thread) {
  switch_context(thread.context, current->scheduler, false);
}

void fail(const std::string &message) {
  Launch &launch = *current;
  launch.error = describe(*launch.running) + ": " + message;
  suspend(*launch.running);
  abort(); // the scheduler does not come back
}

} // namespace emulator
