// Barriers, and what the threads of a warp tell each other.
#pragma once

inline void __syncthreads(EMULATOR_SITE) {
  emulator::block_barrier(emulator::Vote::None, 0, {file, line, "__syncthreads"});
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(emulator::Vote::Count, predicate,
                                 {file, line, "__syncthreads_count"});
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(emulator::Vote::And, predicate, {file, line, "__syncthreads_and"});
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(emulator::Vote::Or, predicate, {file, line, "__syncthreads_or"});
}

inline void __syncwarp(unsigned mask = 0xffffffff, EMULATOR_SITE) {
  emulator::warp_collective(emulator::Collective::Sync, mask, 0, 0, {file, line, "__syncwarp"});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::warp_collective(emulator::Collective::Ballot, mask, predicate != 0, 0,
                                   {file, line, "__ballot_sync"});
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::warp_collective(emulator::Collective::Ballot, mask, predicate != 0, 0,
                                   {file, line, "__any_sync"}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::warp_collective(emulator::Collective::Ballot, mask, predicate == 0, 0,
                                   {file, line, "__all_sync"}) == 0;
}

namespace emulator {

template <typename T> T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "not a value for a shuffle");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(Collective::Shuffle, mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned first_of_segment(int width) { return lane() & ~(width - 1u); }
inline unsigned last_of_segment(int width) { return lane() | (width - 1u); }

} // namespace emulator

// A lane whose source lies outside of its segment keeps its own value.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
  const unsigned from = emulator::first_of_segment(width) | (source & (width - 1));
  return emulator::shuffle(mask, value, from, {file, line, "__shfl_sync"});
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane();
  const bool inside = lane >= emulator::first_of_segment(width) + delta;
  return emulator::shuffle(mask, value, inside ? lane - delta : lane,
                           {file, line, "__shfl_up_sync"});
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane();
  const bool inside = lane + delta <= emulator::last_of_segment(width);
  return emulator::shuffle(mask, value, inside ? lane + delta : lane,
                           {file, line, "__shfl_down_sync"});
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane(), from = lane ^ lane_mask;
  return emulator::shuffle(mask, value, from <= emulator::last_of_segment(width) ? from : lane,
                           {file, line, "__shfl_xor_sync"});
}
