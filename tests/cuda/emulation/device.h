// What a kernel calls: barriers, exchanges between the lanes of a warp, atomics.
#pragma once

#include "scheduler.h"

namespace megagnn::emulation {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// source(lane in its group) is the lane of the group that a lane reads.
template <class T, class Source>
T shuffle(const char* operation, unsigned mask, T value, int width, Site site, Source source) {
  if (width < 1 || width > warpSize || (width & (width - 1))) {
    fault_at(operation, site, "its width must be a power of 2 up to 32, got " + std::to_string(width));
  }
  const int lane = int(state.running->lane), in_group = lane & (width - 1);
  const int from = lane - in_group + source(in_group);
  const Lanes& lanes = warp_exchange(operation, mask, to_bits(value), site);
  if (!(lanes.mask >> from & 1)) {
    fault_at(operation, site, "it reads lane " + std::to_string(from) + ", which its mask does not name");
  }
  return from_bits<T>(lanes.value[from]);
}

// Calls that name no type for T but the pointer's.
template <class T>
using Same = std::common_type_t<T>;

// One thread runs at a time, so nothing can come between the read and the write; returns what was there.
template <class T, class Change>
T update(T* address, Change change) {
  const Unseen unseen;
  const T old = *address;
  *address = change(old);
  return old;
}

template <class T>
T add(T a, T b) {
  return a + b;
}
inline __nv_bfloat16 add(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(float(a) + float(b)); }
inline __nv_bfloat162 add(__nv_bfloat162 a, __nv_bfloat162 b) { return {add(a.x, b.x), add(a.y, b.y)}; }

}  // namespace megagnn::emulation

// NOLINTBEGIN: the names are CUDA's. The last argument says where the call stands and is never given.
#define MEGAGNN_SITE ::megagnn::emulation::Site site = ::megagnn::emulation::Site::here()

inline void __syncthreads(MEGAGNN_SITE) { megagnn::emulation::block_barrier("__syncthreads", false, site); }
inline int __syncthreads_count(int predicate, MEGAGNN_SITE) {
  return int(megagnn::emulation::block_barrier("__syncthreads_count", predicate != 0, site));
}
inline int __syncthreads_or(int predicate, MEGAGNN_SITE) {
  return megagnn::emulation::block_barrier("__syncthreads_or", predicate != 0, site) > 0;
}
inline int __syncthreads_and(int predicate, MEGAGNN_SITE) {
  return megagnn::emulation::block_barrier("__syncthreads_and", predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, MEGAGNN_SITE) {
  megagnn::emulation::warp_exchange("__syncwarp", mask, 0, site, false);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, MEGAGNN_SITE) {
  return megagnn::emulation::shuffle("__shfl_sync", mask, value, width, site,
                                     [=](int) { return lane & (width - 1); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, MEGAGNN_SITE) {
  return megagnn::emulation::shuffle("__shfl_up_sync", mask, value, width, site,
                                     [=](int me) { return unsigned(me) >= delta ? me - int(delta) : me; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, MEGAGNN_SITE) {
  return megagnn::emulation::shuffle("__shfl_down_sync", mask, value, width, site, [=](int me) {
    return unsigned(me) + delta < unsigned(width) ? me + int(delta) : me;
  });
}
// Of narrower groups a lane may read an earlier one, and of a later one gets its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, MEGAGNN_SITE) {
  const int lane = int(megagnn::emulation::state.running->lane), group = lane & ~(width - 1);
  return megagnn::emulation::shuffle("__shfl_xor_sync", mask, value, width, site, [=](int me) {
    const int from = (lane ^ bits) & (warpSize - 1);
    return from < group + width ? from - group : me;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MEGAGNN_SITE) {
  const auto& lanes = megagnn::emulation::warp_exchange("__ballot_sync", mask, predicate != 0, site);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < warpSize; ++lane) ballot |= unsigned(lanes.value[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, MEGAGNN_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MEGAGNN_SITE) {
  return __ballot_sync(mask, predicate == 0, site) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, MEGAGNN_SITE) {
  const uint64_t mine = megagnn::emulation::to_bits(value);
  const auto& lanes = megagnn::emulation::warp_exchange("__match_any_sync", mask, mine, site);
  unsigned same = 0;
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if (lanes.mask >> lane & 1) same |= unsigned(lanes.value[lane] == mine) << lane;
  }
  return same;
}
#undef MEGAGNN_SITE

// The lane that calls and no other: a device may return any set of lanes that has it.
inline unsigned __activemask() { return 1u << megagnn::emulation::state.running->lane; }

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { megagnn::emulation::fault("__trap"); }

template <class T>
T atomicAdd(T* address, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T old) { return megagnn::emulation::add(old, value); });
}
template <class T>
T atomicSub(T* address, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T old) { return T(old - value); });
}
template <class T>
T atomicMax(T* address, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicAnd(T* address, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T old) { return T(old & value); });
}
template <class T>
T atomicOr(T* address, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T old) { return T(old | value); });
}
template <class T>
T atomicExch(T* address, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, megagnn::emulation::Same<T> expected, megagnn::emulation::Same<T> value) {
  return megagnn::emulation::update(address, [=](T old) { return old == expected ? value : old; });
}
// NOLINTEND
