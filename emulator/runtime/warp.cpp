// Collective operations of a warp's lanes.

#include "machine.h"

namespace emulator {

namespace {

// The value that a lane gets from one that takes no part: undefined on the GPU, NaN here.
constexpr uint64_t kNothing = ~uint64_t{0};

unsigned lowest_lane(unsigned mask) { return __builtin_ctz(mask); }

void complete(Warp &warp, const Pending &pending) {
  Launch &launch = *current;
  unsigned ballot = 0;
  Thread *threads[32];
  size_t count = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (pending.arrived >> lane & 1) {
      threads[count++] = warp.threads[lane];
      ballot |= static_cast<unsigned>(warp.threads[lane]->value != 0) << lane;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    Thread &thread = *threads[i];
    switch (pending.kind) {
    case Collective::Ballot: thread.result = ballot; break;
    case Collective::Shuffle:
      thread.result = thread.source < 32 && (pending.arrived >> thread.source & 1)
                          ? warp.threads[thread.source]->value
                          : kNothing;
      break;
    case Collective::Sync: // the only one that orders memory
      acquire_for(thread.context, launch.running->context,
                  &warp.keys[lowest_lane(pending.mask)]);
      break;
    }
  }
  launch.yields = 0;
  launch.ready.push_all(threads, count);
}

// Completes the operations for which no lane is missing any more.
void complete_all(Warp &warp) {
  for (size_t i = 0; i < warp.pending.size();) {
    const Pending pending = warp.pending[i];
    if (pending.arrived == (pending.mask & warp.alive)) {
      warp.pending.erase(warp.pending.begin() + i);
      complete(warp, pending);
    } else {
      ++i;
    }
  }
}

} // namespace

unsigned lane() { return current->running->lane; }

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source,
                         Site site) {
  const InRuntime in_runtime;
  Thread &thread = *current->running;
  Warp &warp = *thread.warp;
  const unsigned bit = 1u << thread.lane;
  if (!(mask & bit)) {
    fail(describe(site) + ": its mask " + hex(mask) + " lacks the thread's own lane");
  }
  thread.value = value;
  thread.source = source;
  Pending *mine = nullptr;
  for (Pending &pending : warp.pending) {
    if (pending.mask == mask && pending.site.line == site.line &&
        pending.site.file == site.file && pending.site.what == site.what) {
      mine = &pending;
    } else if ((pending.arrived & mask) && (pending.mask & bit)) {
      // Each waits for the other one. (Lanes that are only named may still come: a part of the
      // warp may be ahead of another one.)
      fail("divergence in a warp: " + describe(site) + " with mask " + hex(mask) +
           ", while lanes " + hex(pending.arrived) + " wait in " + describe(pending.site) +
           " with mask " + hex(pending.mask));
    }
  }
  if (!mine) {
    warp.pending.push_back({kind, mask, 0, site});
    mine = &warp.pending.back();
  }
  mine->arrived |= bit;
  if (kind == Collective::Sync) {
    release(&warp.keys[lowest_lane(mask)]);
  }
  thread.waits = true;
  thread.site = site;
  thread.mask = mask;
  complete_all(warp);
  suspend(thread);
  return thread.result;
}

// Lanes that have exited are not waited for, as on the GPU.
void warp_lane_exits(Thread &thread) {
  thread.warp->alive &= ~(1u << thread.lane);
  complete_all(*thread.warp);
}

} // namespace emulator
