// Elementary functions on vectors of the SIMD level that is being compiled, and loops over the columns of a
// row. Included like cpu/vector.h. sin, cos and exp of double follow the polynomials of the Cephes library
// (Moshier 1989); all errors are below 2 units in the last place over the ranges that occur.
#pragma once

#include "cpu/vector.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int64_t kLanesOf = kVectorBytes / int64_t(sizeof(T));

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef int32_t scalar;
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct BitsOf<double> {
  typedef int64_t scalar;
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Bits = typename BitsOf<T>::type;

// Adding it rounds to an integer, which then stands in the low bits of the sum.
template <class T>
constexpr T kRounder = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);
// The same with the bias of the exponent added, so that those bits, shifted into place, are two to that
// power.
template <class T>
constexpr T kPower = kRounder<T> + (sizeof(T) == 4 ? T(127) : T(1023));

template <class T>
inline Bits<T> bits_of(Vec<T> x) {
  Bits<T> bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class T>
inline Vec<T> from_bits(Bits<T> bits) {
  Vec<T> x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
// By halves: lane after lane each addition would wait for the one before it.
template <class T>
inline T sum_lanes(Vec<T> x) {
  T lanes[kLanesOf<T>];
  __builtin_memcpy(lanes, &x, sizeof x);
  for (int64_t half = kLanesOf<T> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The lanes that are there: all, or the first `count` at the end of a row; the others read as zero.
struct All {};
struct Some {
  int64_t count;
};
template <class T>
inline Vec<T> load(const T* from, All) {
  return load(from);
}
template <class T>
inline Vec<T> load(const T* from, Some some) {
  Vec<T> x = {};
  for (int64_t lane = 0; lane < some.count; ++lane) x[lane] = from[lane];
  return x;
}
template <class T>
inline void store(T* to, Vec<T> x, All) {
  __builtin_memcpy(to, &x, sizeof x);
}
template <class T>
inline void store(T* to, Vec<T> x, Some some) {
  for (int64_t lane = 0; lane < some.count; ++lane) to[lane] = x[lane];
}

// body(column, lanes) over a row, a vector at a time.
template <class T, class Body>
inline __attribute__((always_inline)) void for_columns(int64_t width, const Body& body) {
  int64_t column = 0;
  for (; column + kLanesOf<T> <= width; column += kLanesOf<T>) body(column, All{});
  if (column < width) body(column, Some{width - column});
}

// The larger of low and x, the smaller of high and x; NaN stays NaN. Spelled for gcc, which makes two
// instructions of the comparison where there is one.
template <class T>
inline Vec<T> at_least(T low, Vec<T> x) {
  return broadcast(low) > x ? broadcast(low) : x;
}
template <class T>
inline Vec<T> at_most(T high, Vec<T> x) {
  return broadcast(high) < x ? broadcast(high) : x;
}
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
template <>
inline Vec<float> at_least(float low, Vec<float> x) {
  return __builtin_ia32_maxps512_mask(broadcast(low), x, x, -1, 4);
}
template <>
inline Vec<float> at_most(float high, Vec<float> x) {
  return __builtin_ia32_minps512_mask(broadcast(high), x, x, -1, 4);
}
#elif defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__)
template <>
inline Vec<float> at_least(float low, Vec<float> x) {
  return __builtin_ia32_maxps256(broadcast(low), x);
}
template <>
inline Vec<float> at_most(float high, Vec<float> x) {
  return __builtin_ia32_minps256(broadcast(high), x);
}
#endif

// e^x for x clamped to where neither the result nor its reciprocal overflows; NaN stays NaN. The polynomial
// is the one of degree 6 that begins with 1 + r and has the least largest relative error, 3e-9, for
// |r| <= ln(2) / 2, its coefficients rounded to float.
inline Vec<float> exponential(Vec<float> x) {
  x = at_most(87.0f, at_least(-87.0f, x));
  const Vec<float> shifted = x * 1.44269504088896341f + kPower<float>;
  const Vec<float> n = shifted - kPower<float>;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> y = r * 1.3814540580e-3f + 8.3687454462e-3f;
  y = y * r + 4.1668388993e-2f;
  y = y * r + 1.6666521132e-1f;
  y = y * r + 4.9999994040e-1f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * from_bits<float>(bits_of<float>(shifted) << 23);
}

inline Vec<double> exponential(Vec<double> x) {
  x = x > 700.0 ? broadcast(700.0) : x;
  x = x < -700.0 ? broadcast(-700.0) : x;
  const Vec<double> shifted = x * 1.4426950408889634073599 + kPower<double>;
  const Vec<double> n = shifted - kPower<double>;
  const Vec<double> r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const Vec<double> rr = r * r;
  const Vec<double> p =
      r * ((rr * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1);
  const Vec<double> q =
      ((rr * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr +
      2.0;
  const Vec<double> y = 1.0 + 2.0 * (p / (q - p));
  return y * from_bits<double>(bits_of<double>(shifted) << 52);
}

// 1 / x for x in [1, 2^126]. On AVX2 the approximate reciprocal and a Newton step, which leaves it a unit in
// the last place off and takes half the time of a division.
inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const Vec<float> y = __builtin_ia32_rcpps256(x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// s = 1 / (1 + e^-x) and 1 - s, which is made without a difference.
template <class T>
struct Logistic {
  Vec<T> value, rest;
};

template <class T>
inline Logistic<T> logistic(Vec<T> x) {
  const Vec<T> e = exponential(-x), s = reciprocal(T(1) + e);
  return {s, e * s};
}

// sin and cos of x >= 0, |x| up to some thousands.
template <class T>
struct SinCos {
  Vec<T> sin, cos;
};

template <class T>
inline SinCos<T> sin_cos(Vec<T> x) {
  const Vec<T> shifted = x * T(0.636619772367581343076) + kRounder<T>;
  const Vec<T> n = shifted - kRounder<T>;
  const Bits<T> quadrant = bits_of<T>(shifted);
  Vec<T> r, s, c;
  if constexpr (sizeof(T) == 4) {
    r = ((x - n * T(1.5703125)) - n * T(4.837512969970703125e-4)) - n * T(7.54978995489188216e-8);
    const Vec<T> rr = r * r;
    s = ((rr * T(-1.9515295891e-4) + T(8.3321608736e-3)) * rr - T(1.6666654611e-1)) * rr * r + r;
    c = ((rr * T(2.443315711809948e-5) - T(1.388731625493765e-3)) * rr + T(4.166664568298827e-2)) * rr * rr -
        rr * T(0.5) + T(1);
  } else {
    r = ((x - n * T(1.57079625129699707031)) - n * T(7.54978941586159635336e-8)) -
        n * T(5.39030285815811905290e-15);
    const Vec<T> rr = r * r;
    s = rr * T(1.58962301576546568060e-10) - T(2.50507477628578072866e-8);
    s = s * rr + T(2.75573136213857245213e-6);
    s = s * rr - T(1.98412698295895385996e-4);
    s = s * rr + T(8.33333333332211858878e-3);
    s = s * rr - T(1.66666666666666307295e-1);
    s = s * rr * r + r;
    c = rr * T(-1.13585365213876817300e-11) + T(2.08757008419747316778e-9);
    c = c * rr - T(2.75573141792967388112e-7);
    c = c * rr + T(2.48015872888517045348e-5);
    c = c * rr - T(1.38888888888730564116e-3);
    c = c * rr + T(4.16666666666665929218e-2);
    c = c * rr * rr - rr * T(0.5) + T(1);
  }
  const Bits<T> odd = -(quadrant & 1);  // all ones where sine and cosine change places
  const Bits<T> swapped_s = (bits_of<T>(c) & odd) | (bits_of<T>(s) & ~odd);
  const Bits<T> swapped_c = (bits_of<T>(s) & odd) | (bits_of<T>(c) & ~odd);
  constexpr int kSign = int(sizeof(T)) * 8 - 1;
  const Bits<T> sign_s = (quadrant & 2) << (kSign - 1), sign_c = ((quadrant + 1) & 2) << (kSign - 1);
  return {from_bits<T>(swapped_s ^ sign_s), from_bits<T>(swapped_c ^ sign_c)};
}

}  // namespace
}  // namespace megagnn::cpu::MEGAGNN_SIMD
