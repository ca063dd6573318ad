// Messages of the Cartesian family and their derivatives, of one edge and some channels, written once for a
// CPU's vectors of numbers, a GPU thread's number, and pairs (value and tangent) of either. The formulas are
// those of megagnn/models/cartesian/messages.py, with tensors as symmetric matrices.
//
// [Note: pairs] For outputs (y, y') = (f(x), f'(x) x') with cotangents b and b', those of x' are f'(x)^T b'
// and those of x the derivative of f'(x)^T b' along (x, b'; x', b). So the derivatives below, taken of pairs,
// give the gradients of a pair: with the cotangents as pairs (b', b), in which value and tangent are
// exchanged, they come out exchanged as well.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#define MEGAGNN_INLINE __host__ __device__ __forceinline__
#else
#define MEGAGNN_INLINE inline
#endif

namespace megagnn::cartesian {

constexpr int kFields = 3;  // scalars, vectors, tensors
constexpr int kNumPaths = 14;
constexpr int64_t kComponents[kFields] = {1, 3, 5};

// Without linkage: sources are compiled once per SIMD level.
namespace {

// An integer that is part of the type; std::integral_constant is not for device code.
template <int N>
struct Constant {
  static constexpr int value = N;
  MEGAGNN_INLINE constexpr operator int() const { return N; }
};

// What paths read of the sender: a scalar, a vector, the tensor, and with them the direction rh of the edge:
// alpha = v . rh, tau = T rh, beta = tau . rh.
enum Kind { kScalar, kVector, kTensor };
struct Path {
  Kind kind;
  int sender, receiver;  // fields
};
constexpr Path kPaths[kNumPaths] = {
    {kScalar, 0, 0}, {kScalar, 1, 0}, {kScalar, 2, 0}, {kScalar, 0, 1}, {kScalar, 1, 1},
    {kScalar, 2, 1}, {kVector, 1, 1}, {kVector, 2, 1}, {kScalar, 0, 2}, {kScalar, 1, 2},
    {kScalar, 2, 2}, {kVector, 1, 2}, {kVector, 2, 2}, {kTensor, 2, 2},
};

// A set of paths, bit p - 1 for path p.
constexpr int count(uint32_t paths) { return paths ? int(paths & 1) + count(paths >> 1) : 0; }
constexpr bool any(uint32_t paths, int Path::* end, int field, Kind kind) {
  for (int p = 0; p < kNumPaths; ++p)
    if (paths >> p & 1 && kPaths[p].*end == field && kPaths[p].kind == kind) return true;
  return false;
}
constexpr int senders(uint32_t paths) {
  int fields = 1;
  for (int p = 0; p < kNumPaths; ++p)
    if (paths >> p & 1) fields |= 1 << kPaths[p].sender;
  return fields;
}
constexpr int receivers(uint32_t paths) {
  int fields = 1;
  for (int p = 0; p < kNumPaths; ++p)
    if (paths >> p & 1) fields |= 1 << kPaths[p].receiver;
  return fields;
}
constexpr uint32_t set_of(std::initializer_list<int> list) {
  uint32_t set = 0;
  for (int path : list) set |= 1u << (path - 1);
  return set;
}
template <uint32_t PATHS, bool GRADIENT>
struct Compiled {
  static constexpr uint32_t kSet = PATHS;
  static constexpr bool kGradient = GRADIENT;
};
// body(Compiled) for each set that kernels are compiled for.
template <class Body>
inline void for_sets(const Body& body) {
  // Those of messages.py: of senders with all fields, and of those of the first layer, with scalars.
  body(Compiled<(1u << kNumPaths) - 1, true>{});
  body(Compiled<set_of({1, 4, 9}), true>{});
  body(Compiled<set_of({1, 4, 7, 9, 14}), true>{});
  body(Compiled<set_of({1, 4, 7}), true>{});
  body(Compiled<set_of({1, 4}), true>{});
  // The same from receivers to senders.
  body(Compiled<set_of({1, 2, 3}), false>{});
  body(Compiled<set_of({1, 2, 3, 7, 14}), false>{});
  body(Compiled<set_of({1, 2, 7}), false>{});
  body(Compiled<set_of({1, 2}), false>{});
}

// Of an atom: a tensor has the six of its matrix.
constexpr int numbers(int fields) { return 1 + (fields & 2 ? 3 : 0) + (fields & 4 ? 6 : 0); }

// What code for a device reads of a set: constants, not functions.
template <uint32_t PATHS>
struct Set {
  static constexpr int kCount = count(PATHS), kSenders = senders(PATHS), kReceivers = receivers(PATHS);
  static constexpr int kSent = numbers(kSenders), kReceived = numbers(kReceivers);
};
// Where a path's weight is among the set's.
template <uint32_t PATHS, int PATH>
constexpr int kPosition = count(PATHS & ((1u << PATH) - 1));
// Whether paths of a kind read a field of the sender, or add to one of the receiver.
template <uint32_t PATHS, int FIELD, Kind KIND>
constexpr bool kSends = any(PATHS, &Path::sender, FIELD, KIND);
template <uint32_t PATHS, int FIELD, Kind KIND>
constexpr bool kAdds = any(PATHS, &Path::receiver, FIELD, KIND);

template <uint32_t PATHS, class Body, int... P>
MEGAGNN_INLINE void for_each(const Body& body, std::integer_sequence<int, P...>) {
  const auto each = [&](auto path) {
    if constexpr ((PATHS >> decltype(path)::value & 1) != 0) body(path);
  };
  (each(Constant<P>{}), ...);
}
// body(path, weight), with its position among the set's weights, as constants.
template <uint32_t PATHS, class Body>
MEGAGNN_INLINE void for_paths(const Body& body) {
  for_each<PATHS>([&](auto path) { body(path, Constant<kPosition<PATHS, decltype(path)::value>>{}); },
                  std::make_integer_sequence<int, kNumPaths>{});
}

template <class V>
struct Pair {
  V value, tangent;
};
template <class V>
MEGAGNN_INLINE Pair<V> operator+(const Pair<V>& a, const Pair<V>& b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class V>
MEGAGNN_INLINE Pair<V> operator*(const Pair<V>& a, const Pair<V>& b) {
  return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
}
template <class V>
MEGAGNN_INLINE void operator+=(Pair<V>& a, const Pair<V>& b) {
  a = a + b;
}
template <class V, bool PAIR>
using Number = std::conditional_t<PAIR, Pair<V>, V>;

template <bool PAIR, class Body>
MEGAGNN_INLINE void for_planes(const Body& body) {
  body(Constant<0>{});
  if constexpr (PAIR) body(Constant<1>{});
}
template <class S>
constexpr bool kIsPair = false;
template <class V>
constexpr bool kIsPair<Pair<V>> = true;
template <class S, class Plane>
MEGAGNN_INLINE auto& plane_of(S& x, Plane) {
  if constexpr (!kIsPair<std::remove_const_t<S>>) {
    return x;
  } else if constexpr (Plane::value == 1) {
    return x.tangent;
  } else {
    return x.value;
  }
}
// Where a plane is in a result with value and tangent exchanged.
template <bool PAIR, class Plane>
MEGAGNN_INLINE constexpr auto exchanged(Plane) {
  return Constant<PAIR ? 1 - Plane::value : 0>{};
}

template <class T>
constexpr T kRoot2 = T(0.70710678118654752440);
template <class T>
constexpr T kRoot6 = T(0.40824829046386301637);
// Five components in the basis of messages.py, and the matrix xx, yy, zz, xy, yz, zx.
template <class T, class V>
MEGAGNN_INLINE void to_matrix(const V* t, V* m) {
  const V difference = t[3] * kRoot2<T>, rest = t[4] * kRoot6<T>;
  m[0] = difference - rest, m[1] = -difference - rest, m[2] = rest + rest;
  for (int c = 0; c < 3; ++c) m[3 + c] = t[c] * kRoot2<T>;
}
// Of what add_message sums.
template <class T, class V>
MEGAGNN_INLINE void from_matrix(const V* m, V* t) {
  for (int c = 0; c < 3; ++c) t[c] = m[3 + c] * kRoot2<T>;
  t[3] = (m[0] - m[1]) * kRoot2<T>;
  t[4] = (m[2] + m[2] - m[0] - m[1]) * kRoot6<T>;
}

template <class S>
MEGAGNN_INLINE S dot(const S* a, const S* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}
// Of a symmetric matrix xx, yy, zz, xy, yz, zx.
template <class S>
MEGAGNN_INLINE void multiply(const S* m, const S* x, S* y) {
  y[0] = m[0] * x[0] + m[3] * x[1] + m[5] * x[2];
  y[1] = m[3] * x[0] + m[1] * x[1] + m[4] * x[2];
  y[2] = m[5] * x[0] + m[4] * x[1] + m[2] * x[2];
}
template <class S>
MEGAGNN_INLINE S contract(const S* a, const S* b) {
  const S off = a[3] * b[3] + a[4] * b[4] + a[5] * b[5];
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + (off + off);
}

// An atom's numbers, and their products with the direction of an edge.
template <class S>
struct Features {
  S scalar[kFields];     // s, alpha, beta
  S vector[kFields][3];  // none, v, tau
  const S* tensor;
};

template <int FIELDS, class S>
MEGAGNN_INLINE Features<S> features_of(const S* a, const S* unit) {
  Features<S> f;
  f.scalar[0] = a[0];
  f.tensor = a + (FIELDS & 2 ? 4 : 1);
  if constexpr ((FIELDS & 2) != 0) {
    for (int k = 0; k < 3; ++k) f.vector[1][k] = a[1 + k];
    f.scalar[1] = dot(f.vector[1], unit);
  }
  if constexpr ((FIELDS & 4) != 0) {
    multiply(f.tensor, unit, f.vector[2]);
    f.scalar[2] = dot(f.vector[2], unit);
  }
  return f;
}

// Adds an edge's message to the sums of its receiver: scalar, vector, and of the tensor the sums of xx, yy,
// zz and of xy + yx, yz + zy, zx + xz, with a trace that is taken away at the end.
template <uint32_t PATHS, class S>
MEGAGNN_INLINE void add_message(const Features<S>& f, const S* unit, const S* w, S* sum) {
  S along[kFields] = {}, across[3] = {};
  S *const vector = sum + 1, *const tensor = sum + (Set<PATHS>::kReceivers & 2 ? 4 : 1);
  for_paths<PATHS>([&](auto p, auto k) {
    constexpr Path path = kPaths[decltype(p)::value];
    if constexpr (path.kind == kScalar) along[path.receiver] += w[k] * f.scalar[path.sender];
    if constexpr (path.kind == kVector) {
      S* const to = path.receiver == 1 ? vector : across;
      for (int c = 0; c < 3; ++c) to[c] += w[k] * f.vector[path.sender][c];
    }
    if constexpr (path.kind == kTensor) {
      const S twice = w[k] + w[k];
      for (int c = 0; c < 6; ++c) tensor[c] += (c < 3 ? w[k] : twice) * f.tensor[c];
    }
  });
  sum[0] += along[0];
  if constexpr (kAdds<PATHS, 1, kScalar>) {
    for (int c = 0; c < 3; ++c) vector[c] += unit[c] * along[1];
  }
  if constexpr (kAdds<PATHS, 2, kScalar>) {
    for (int c = 0; c < 3; ++c) across[c] += unit[c] * along[2];
  }
  if constexpr (kAdds<PATHS, 2, kScalar> || kAdds<PATHS, 2, kVector>) {
    for (int c = 0; c < 3; ++c) {
      const int d = (c + 1) % 3;
      tensor[c] += unit[c] * across[c];
      tensor[3 + c] += unit[c] * across[d] + unit[d] * across[c];
    }
  }
}

// Of the message's product with the cotangents b of the receiver's sums, the derivatives by the weights.
template <uint32_t PATHS, class S>
MEGAGNN_INLINE void weight_derivatives(const Features<S>& f, const Features<S>& b, S* x) {
  for_paths<PATHS>([&](auto p, auto k) {
    constexpr Path path = kPaths[decltype(p)::value];
    if constexpr (path.kind == kScalar) x[k] = b.scalar[path.receiver] * f.scalar[path.sender];
    if constexpr (path.kind == kVector) x[k] = dot(b.vector[path.receiver], f.vector[path.sender]);
    if constexpr (path.kind == kTensor) x[k] = contract(b.tensor, f.tensor);
  });
}

// The derivative of the same by the direction.
template <uint32_t PATHS, class S>
MEGAGNN_INLINE void direction_derivative(const Features<S>& f, const Features<S>& b, const S* w, S* out) {
  // weights of the two kinds of alpha and beta, and vectors that the two tensors are multiplied with
  S of_sender[kFields] = {}, of_receiver[kFields] = {}, to_sender[3] = {}, to_receiver[3] = {};
  for_paths<PATHS>([&](auto p, auto k) {
    constexpr Path path = kPaths[decltype(p)::value];
    if constexpr (path.kind == kScalar) {
      of_sender[path.sender] += w[k] * b.scalar[path.receiver];
      of_receiver[path.receiver] += w[k] * f.scalar[path.sender];
    }
    if constexpr (path.kind == kVector) {
      for (int c = 0; c < 3; ++c) {
        if constexpr (path.sender == 2) to_sender[c] += w[k] * b.vector[path.receiver][c];
        if constexpr (path.receiver == 2) to_receiver[c] += w[k] * f.vector[path.sender][c];
      }
    }
  });
  for (int c = 0; c < 3; ++c) out[c] = S{};
  const auto add = [&](const Features<S>& side, const S* along, const S* with, auto vector, auto tensor,
                       auto product) {
    S twice, times[3];
    if constexpr (decltype(tensor)::value) twice = along[2] + along[2];
    if constexpr (decltype(product)::value) multiply(side.tensor, with, times);
    for (int c = 0; c < 3; ++c) {
      if constexpr (decltype(vector)::value) out[c] += along[1] * side.vector[1][c];
      if constexpr (decltype(tensor)::value) out[c] += twice * side.vector[2][c];
      if constexpr (decltype(product)::value) out[c] += times[c];
    }
  };
  add(f, of_sender, to_sender, std::bool_constant<kSends<PATHS, 1, kScalar>>{},
      std::bool_constant<kSends<PATHS, 2, kScalar>>{}, std::bool_constant<kSends<PATHS, 2, kVector>>{});
  add(b, of_receiver, to_receiver, std::bool_constant<kAdds<PATHS, 1, kScalar>>{},
      std::bool_constant<kAdds<PATHS, 2, kScalar>>{}, std::bool_constant<kAdds<PATHS, 2, kVector>>{});
}

}  // namespace
}  // namespace megagnn::cartesian
