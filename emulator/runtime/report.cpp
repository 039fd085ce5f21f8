// Words for errors.

#include "machine.h"

#include <string.h>

namespace emulator {

namespace {

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

bool is_same_place(const Thread &a, const Thread &b) {
  return a.waits == b.waits && a.exited == b.exited && a.mask == b.mask &&
         a.site.line == b.site.line && a.site.file == b.site.file && a.site.what == b.site.what;
}

} // namespace

std::string hex(unsigned mask) {
  char text[16];
  snprintf(text, sizeof(text), "%08x", mask);
  return text;
}

std::string describe(const Site &site) {
  const char *slash = strrchr(site.file, '/');
  return std::string(site.what) + " (" + (slash ? slash + 1 : site.file) + ":" +
         std::to_string(site.line) + ")";
}

std::string describe(const uint3 &index) { return triple(index.x, index.y, index.z); }

std::string describe(const Thread &thread) {
  return "block " + describe(thread.indices.block) + " thread " + describe(thread.indices.thread);
}

std::string describe_waiting(const Launch &launch) {
  std::string text;
  for (const auto &cluster : launch.clusters) {
    for (const auto &block : cluster->blocks) {
      for (size_t w = 0; w < block->warps.size(); ++w) {
        const Warp &warp = block->warps[w];
        unsigned seen = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
          const Thread *thread = warp.threads[lane];
          if (!thread || thread->exited || (seen >> lane & 1)) {
            continue;
          }
          unsigned lanes = 0;
          for (unsigned other = lane; other < 32; ++other) {
            if (warp.threads[other] && is_same_place(*thread, *warp.threads[other])) {
              lanes |= 1u << other;
            }
          }
          seen |= lanes;
          text += "  block " + describe(block->index) + " warp " + std::to_string(w) + " lanes " +
                  hex(lanes) + ": " +
                  (thread->waits ? "waits in " + describe(thread->site) : "can run");
          text += thread->waits && thread->mask ? " mask " + hex(thread->mask) + "\n" : "\n";
        }
      }
    }
  }
  return text;
}

} // namespace emulator
