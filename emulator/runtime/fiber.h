// Stacks of their own within one thread of the operating system, and switches between them.
#pragma once

#include <stddef.h>
#include <vector>

// EMULATOR_UCONTEXT chooses the portable switch where there is a faster one.
#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_OWN_SWITCH 1
#else
#define EMULATOR_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace emulator {

// Memory for stacks. That one was too small shows when it is given back.
class Stacks {
public:
  ~Stacks();
  void *take();
  void give_back(void *stack);
  static size_t size();

private:
  struct Node;
  Node *free_ = nullptr;
  std::vector<void *> mappings_;

  void add(void *stack);
};

// A place where execution stopped and can go on: a fibre, or the thread that runs the fibres.
struct Context {
  void *sp = nullptr;
  const void *stack = nullptr; // lowest address, and size
  size_t stack_size = 0;
  void *sanitizer_stack = nullptr;   // where the address sanitizer keeps its own
  void *sanitizer_thread = nullptr;  // what the thread sanitizer takes it for
#if !EMULATOR_OWN_SWITCH
  ucontext_t context;
#endif
};

// Prepares `context` so that a switch to it calls `entry`, which must not return.
void make_fiber(Context &context, void *stack, void (*entry)());
// The context of the running thread of the operating system.
void adopt_thread(Context &context);
// Stops here and goes on there. With `last`, `from` never goes on.
void switch_context(Context &from, Context &to, bool last);
// The first thing that `entry` has to call.
void fiber_entered();
// For the thread sanitizer: lets `context` know all that was released under `key`, from `current`.
void acquire_for(Context &context, Context &current, void *key);
// The other way round: releases under `key` what `context` has done.
void release_for(Context &context, Context &current, void *key);
void forget_fiber(Context &context);

} // namespace emulator
