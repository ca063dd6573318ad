// Types and functions of CUDA that do not depend on which thread calls them: indices, short vectors,
// bfloat16, arithmetic, loads with cache hints.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// NOLINTBEGIN: the names are CUDA's.
#define MEGAGNN_EMULATION_VECTORS(T, name)                                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
using uint = unsigned;
MEGAGNN_EMULATION_VECTORS(float, float)
MEGAGNN_EMULATION_VECTORS(double, double)
MEGAGNN_EMULATION_VECTORS(int, int)
MEGAGNN_EMULATION_VECTORS(long long, longlong)
#undef MEGAGNN_EMULATION_VECTORS
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace megagnn::emulation {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace megagnn::emulation

// The bits of a bfloat16. No arithmetic: kernels compute in float, and what would compile here only is an
// error.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value);
  explicit operator float() const { return megagnn::emulation::bit_cast<float>(uint32_t(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// Rounds to nearest, ties to even, as the device does; NaN becomes the canonical one.
inline __nv_bfloat16::__nv_bfloat16(float value) {
  const auto word = megagnn::emulation::bit_cast<uint32_t>(value);
  bits = value != value ? uint16_t(0x7fff) : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline float __low2float(__nv_bfloat162 v) { return float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return float(v.y); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 value;
  value.bits = bits;
  return value;
}

inline int __float_as_int(float x) { return megagnn::emulation::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return megagnn::emulation::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return megagnn::emulation::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return megagnn::emulation::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return megagnn::emulation::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return megagnn::emulation::bit_cast<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Those of math.h are the processor's. The fast ones are exact here: their error shows on a GPU only.
using std::isfinite;
using std::isinf;
using std::isnan;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline void __sincosf(float x, float* sin, float* cos) { *sin = std::sin(x), *cos = std::cos(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }

// Of floating-point numbers the one that is no NaN, as fmax and fmin; otherwise in the common type.
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}

#define MEGAGNN_EMULATION_LOAD(name) \
  template <class T>                 \
  T name(const T* address) {         \
    return *address;                 \
  }
MEGAGNN_EMULATION_LOAD(__ldg)
MEGAGNN_EMULATION_LOAD(__ldca)
MEGAGNN_EMULATION_LOAD(__ldcg)
MEGAGNN_EMULATION_LOAD(__ldcs)
MEGAGNN_EMULATION_LOAD(__ldlu)
MEGAGNN_EMULATION_LOAD(__ldcv)
#undef MEGAGNN_EMULATION_LOAD
#define MEGAGNN_EMULATION_STORE(name)                  \
  template <class T>                                   \
  void name(T* address, std::common_type_t<T> value) { \
    *address = value;                                  \
  }
MEGAGNN_EMULATION_STORE(__stwb)
MEGAGNN_EMULATION_STORE(__stcg)
MEGAGNN_EMULATION_STORE(__stcs)
MEGAGNN_EMULATION_STORE(__stwt)
#undef MEGAGNN_EMULATION_STORE
// NOLINTEND
