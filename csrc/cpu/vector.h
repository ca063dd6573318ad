// Scalar types, accumulators and vectors of the SIMD level that is being compiled. Included by sources that
// are compiled once per level, and by nothing else: everything is in the level's namespace, without linkage.
#pragma once

#include <cstdint>

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FullBits __attribute__((vector_size(kVectorBytes)));

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

template <class T>
inline typename VectorOf<T>::type load(const T* from) {
  typename VectorOf<T>::type v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
inline VectorOf<float>::type load(const BFloat16* from) {
  HalfBits half;
  __builtin_memcpy(&half, from, sizeof half);
  const FullBits bits = __builtin_convertvector(half, FullBits) << 16;
  VectorOf<float>::type v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

// Stores that go past the cache, for results too large to be found there later; `to` is aligned to the
// vector. They are ordered with other threads' reads only by end_stores_past_cache.
inline void store_past_cache(float* to, VectorOf<float>::type v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<VectorOf<float>::type*>(to));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(to, v);
#elif defined(__AVX2__)
  __builtin_ia32_movntps256(to, v);
#elif defined(__SSE2__)
  __builtin_ia32_movntps(to, v);
#else
  __builtin_memcpy(to, &v, sizeof v);
#endif
}
inline void end_stores_past_cache() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace
}  // namespace megagnn::cpu::MEGAGNN_SIMD
