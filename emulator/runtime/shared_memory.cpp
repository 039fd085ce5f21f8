#include "shared_memory.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "sanitizers.h"

namespace emulator {

namespace {

// Bytes that no kernel's number consists of by chance, to see later whether they are still there.
constexpr unsigned char kZone = 0xa5;
constexpr size_t kMostDeclarations = 64;
// The dynamic part is aligned to 16 bytes and no more: what a kernel may rely on.
constexpr size_t kDynamicOffset = kRedZone + 16;

size_t align_up(size_t value, size_t align) { return (value + align - 1) / align * align; }

} // namespace

SharedLayout::SharedLayout(size_t dynamic_bytes) {
  entries_.push_back({nullptr, "dynamic shared memory", kDynamicOffset, dynamic_bytes});
  end_ = kDynamicOffset + dynamic_bytes + kRedZone;
  capacity_ = align_up(end_ + kStaticLimit + kMostDeclarations * 4 * kRedZone, 4096);
}

const SharedLayout::Entry *SharedLayout::place(const void *key, size_t size, size_t align,
                                               const char *name) {
  for (size_t i = 1; i < entries_.size(); ++i) {
    if (entries_[i].key == key) {
      return &entries_[i];
    }
  }
  const size_t dynamic_bytes = entries_[0].size;
  static_bytes_ = align_up(static_bytes_, align) + size;
  if (static_bytes_ > kStaticLimit || static_bytes_ + dynamic_bytes > kTotalLimit ||
      entries_.size() > kMostDeclarations || align > kRedZone) {
    return nullptr;
  }
  // Eight bytes are what the address sanitizer tells apart.
  const size_t offset = align_up(end_, align < 8 ? 8 : align);
  end_ = offset + size + kRedZone;
  entries_.push_back({key, name, offset, size});
  return &entries_.back();
}

Arena::~Arena() {
  if (memory_) {
    unpoison(memory_, size_);
    munmap(memory_, size_);
  }
}

void Arena::start(const SharedLayout &layout) {
  if (size_ != layout.capacity()) {
    if (memory_) {
      unpoison(memory_, size_);
      munmap(memory_, size_);
    }
    size_ = layout.capacity();
    memory_ = static_cast<char *>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  unpoison(memory_, size_);
  memset(memory_, kZone, size_);
  poison(memory_, size_);
  prepared_ = 0;
  update(layout);
}

void Arena::update(const SharedLayout &layout) {
  for (; prepared_ < layout.entries().size(); ++prepared_) {
    const SharedLayout::Entry &entry = layout.entries()[prepared_];
    unpoison(at(entry.offset), entry.size);
    memset(at(entry.offset), 0xff, entry.size);
  }
}

void Arena::end() {
  unpoison(memory_, size_);
  memset(memory_, 0xff, size_);
  poison(memory_, size_);
}

bool Arena::contains(const void *address) const {
  return address >= memory_ && address < memory_ + size_;
}

size_t Arena::offset_of(const void *address) const {
  return static_cast<const char *>(address) - memory_;
}

std::string Arena::overwritten(const SharedLayout &layout) const {
  unpoison(memory_, size_);
  // All equal to the first, which is the constant.
  const auto is_untouched = [this](size_t begin, size_t end) {
    return begin == end || (static_cast<unsigned char>(memory_[begin]) == kZone &&
                            memcmp(memory_ + begin, memory_ + begin + 1, end - begin - 1) == 0);
  };
  size_t checked = 0;
  std::string before = "the block's shared memory";
  for (size_t i = 0; i < prepared_; ++i) {
    const SharedLayout::Entry &entry = layout.entries()[i];
    if (!is_untouched(checked, entry.offset)) {
      return before + " (or before " + entry.name + ")";
    }
    checked = entry.offset + entry.size;
    before = entry.name;
  }
  return is_untouched(checked, size_) ? "" : before;
}

} // namespace emulator
