// What the sanitizers have to be told about fibres; nothing without a sanitizer.
//
// The runtime itself is never compiled with the thread sanitizer, only the kernels are. What the
// runtime does on behalf of a kernel's thread is none of that thread's accesses.
#pragma once

#include <stddef.h>

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
void __tsan_write_range(void *address, unsigned long size);
}
#endif

namespace emulator {

// Memory that nobody may touch, and its opposite.
inline void poison([[maybe_unused]] const void *address, [[maybe_unused]] size_t size) {
#ifdef EMULATOR_ASAN
  __asan_poison_memory_region(address, size);
#endif
}
inline void unpoison([[maybe_unused]] const void *address, [[maybe_unused]] size_t size) {
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(address, size);
#endif
}

#ifdef EMULATOR_TSAN
constexpr bool kTsan = true;
inline void release(void *key) { __tsan_release(key); }
inline void acquire(void *key) { __tsan_acquire(key); }
inline void write_range(void *address, size_t size) { __tsan_write_range(address, size); }

// While one of these is alive, accesses of the running thread are not recorded.
class InRuntime {
public:
  InRuntime() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~InRuntime() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
constexpr bool kTsan = false;
inline void release(void *) {}
inline void acquire(void *) {}
inline void write_range(void *, size_t) {}
struct InRuntime {
  InRuntime() {}
};
#endif

} // namespace emulator
