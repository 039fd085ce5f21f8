// Atomics are relaxed, as on the GPU: only a fence before them orders other memory.
#pragma once

inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }
inline void __threadfence_system() { emulator::fence(); }
inline void __nanosleep(unsigned, EMULATOR_SITE) { emulator::yield({file, line, "__nanosleep"}); }

namespace emulator {

// Replaces *address by change(*address) and returns what was there.
template <typename T, typename Change> T update(T *address, Site site, Change change) {
  before_atomic(address, site);
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = change(old);
  } while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  after_atomic(address);
  return old;
}

// So that literals of other types are accepted for `value`.
template <typename T> using Same = typename std::common_type<T>::type;

} // namespace emulator

#define EMULATOR_ATOMIC(name, expression)                                                          \
  template <typename T> inline T name(T *address, emulator::Same<T> value, EMULATOR_SITE) {        \
    return emulator::update(address, {file, line, #name},                                          \
                            [value](T old) -> T { return expression; });                           \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicExch, ((void)old, value))
EMULATOR_ATOMIC(atomicMin, old < value ? old : value)
EMULATOR_ATOMIC(atomicMax, old > value ? old : value)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMULATOR_ATOMIC

template <typename T>
inline T atomicCAS(T *address, emulator::Same<T> expected, emulator::Same<T> value, EMULATOR_SITE) {
  return emulator::update(address, {file, line, "atomicCAS"},
                          [=](T old) { return old == expected ? value : old; });
}
