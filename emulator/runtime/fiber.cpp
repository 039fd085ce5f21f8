#include "fiber.h"

#include <algorithm>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "sanitizers.h"

namespace emulator {

#ifdef EMULATOR_ASAN
constexpr size_t kStackSize = 256 * 1024; // red zones make frames larger
#else
constexpr size_t kStackSize = 64 * 1024;
#endif
// Stacks of one mapping: a process may have some ten thousand mappings, and blocks more threads.
constexpr size_t kStacksOfMapping = 64;
constexpr size_t kMapping = kStackSize * kStacksOfMapping;
// At the low end of each stack, where an overflow writes first.
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba115;
constexpr size_t kCanaries = 32;

namespace {

void *map(void *address, size_t size, int flags) {
  void *memory = mmap(address, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
  if (memory == MAP_FAILED) {
    perror("kernel-emulator: no memory for stacks");
    abort();
  }
  return memory;
}

} // namespace

struct Stacks::Node {
  Node *next;
};

size_t Stacks::size() { return kStackSize; }

void *Stacks::take() {
  if (!free_) {
    char *memory = static_cast<char *>(map(nullptr, kMapping, 0));
    mappings_.push_back(memory);
    for (size_t i = 0; i < kStacksOfMapping; ++i) {
      add(memory + i * kStackSize);
    }
  }
  Node *node = free_;
  free_ = node->next;
  void *stack = reinterpret_cast<char *>(node + 1) - kStackSize;
  std::fill_n(static_cast<uint64_t *>(stack), kCanaries, kCanary);
  return stack;
}

void Stacks::give_back(void *stack) {
  unpoison(stack, kStackSize); // a fibre that was given up leaves its red zones
  const uint64_t *canaries = static_cast<const uint64_t *>(stack);
  if (std::count(canaries, canaries + kCanaries, kCanary) != kCanaries) {
    fprintf(stderr, "kernel-emulator: a thread needed more than its %zu bytes of stack\n",
            kStackSize);
    abort();
  }
  if (kTsan) { // a new mapping has no history of accesses
    map(stack, kStackSize, MAP_FIXED);
  }
  add(stack);
}

void Stacks::add(void *stack) {
  Node *node = reinterpret_cast<Node *>(static_cast<char *>(stack) + kStackSize) - 1;
  node->next = free_;
  free_ = node;
}

Stacks::~Stacks() {
  for (void *memory : mappings_) {
    munmap(memory, kMapping);
  }
}

#if EMULATOR_OWN_SWITCH
// Saves what a function call preserves on the stack that is left, and loads it from the other one.
// Much faster than swapcontext, which asks the kernel for the mask of signals at each switch.
extern "C" void emulator_switch(void **save_sp, void *load_sp);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");
#endif

void make_fiber(Context &context, void *stack, void (*entry)()) {
  context.stack = stack;
  context.stack_size = kStackSize;
  context.sanitizer_stack = nullptr;
#if EMULATOR_OWN_SWITCH
  // Six registers, the address to return to, and an end of the chain of calls; at `entry` the
  // stack is aligned as behind a call.
  uint64_t *top = reinterpret_cast<uint64_t *>(static_cast<char *>(stack) + kStackSize) - 4;
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) {
    *--top = 0;
  }
  context.sp = top;
#else
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackSize;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
#endif
#ifdef EMULATOR_TSAN
  context.sanitizer_thread = __tsan_create_fiber(0);
#endif
}

void adopt_thread([[maybe_unused]] Context &context) {
#ifdef EMULATOR_TSAN
  context.sanitizer_thread = __tsan_get_current_fiber();
#endif
}

#ifdef EMULATOR_ASAN
// The context that was left by the last switch, to learn its stack from the sanitizer.
static thread_local Context *left = nullptr;
static thread_local Context *entered = nullptr;
#endif

void fiber_entered() {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(entered->sanitizer_stack, &left->stack, &left->stack_size);
#endif
}

void switch_context(Context &from, Context &to, [[maybe_unused]] bool last) {
#ifdef EMULATOR_ASAN
  left = &from;
  entered = &to;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer_stack, to.stack, to.stack_size);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(to.sanitizer_thread, __tsan_switch_to_fiber_no_sync);
#endif
#if EMULATOR_OWN_SWITCH
  emulator_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
  fiber_entered();
}

void acquire_for([[maybe_unused]] Context &context, [[maybe_unused]] Context &current,
                 [[maybe_unused]] void *key) {
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(context.sanitizer_thread, __tsan_switch_to_fiber_no_sync);
  __tsan_acquire(key);
  __tsan_switch_to_fiber(current.sanitizer_thread, __tsan_switch_to_fiber_no_sync);
#endif
}

void release_for([[maybe_unused]] Context &context, [[maybe_unused]] Context &current,
                 [[maybe_unused]] void *key) {
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(context.sanitizer_thread, __tsan_switch_to_fiber_no_sync);
  __tsan_release(key);
  __tsan_switch_to_fiber(current.sanitizer_thread, __tsan_switch_to_fiber_no_sync);
#endif
}

void forget_fiber([[maybe_unused]] Context &context) {
#ifdef EMULATOR_TSAN
  __tsan_destroy_fiber(context.sanitizer_thread);
#endif
}

} // namespace emulator
