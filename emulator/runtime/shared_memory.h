// Shared memory of the blocks of a launch.
#pragma once

#include <stddef.h>
#include <string>
#include <vector>

namespace emulator {

constexpr size_t kStaticLimit = 48 * 1024;
constexpr size_t kTotalLimit = 227 * 1024;
constexpr size_t kRedZone = 64;

// Where the declarations of a kernel lie: the same for every block of a launch, so that an address
// in one block has a counterpart in the others.
class SharedLayout {
public:
  struct Entry {
    const void *key;
    const char *name;
    size_t offset, size;
  };

  explicit SharedLayout(size_t dynamic_bytes);
  // The place of the declaration `key`, a new one at its first use; no entry beyond the limits.
  const Entry *place(const void *key, size_t size, size_t align, const char *name);
  size_t capacity() const { return capacity_; }
  const std::vector<Entry> &entries() const { return entries_; } // the first is the dynamic part

private:
  std::vector<Entry> entries_;
  size_t static_bytes_ = 0, end_, capacity_;
};

// The memory of one block. Everything is 0xff at first, which is NaN as a number, and again when
// the block has ended. Red zones lie between the declarations.
class Arena {
public:
  ~Arena();
  void start(const SharedLayout &layout);
  // Prepares the declarations that were added since; there are more of them as the kernel runs.
  void update(const SharedLayout &layout);
  void end();
  char *at(size_t offset) { return memory_ + offset; }
  bool contains(const void *address) const;
  size_t offset_of(const void *address) const;
  // The name of a declaration next to which something was written, or an empty string.
  std::string overwritten(const SharedLayout &layout) const;

private:
  char *memory_ = nullptr;
  size_t size_ = 0;
  size_t prepared_ = 0; // declarations
};

} // namespace emulator
