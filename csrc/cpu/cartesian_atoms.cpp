// Compiled once for each SIMD level. A unit of work is an atom and as many channels as a vector has lanes, of
// numbers or of pairs. Backwards are first derivatives taken of pairs: [Note: pairs] in cartesian_message.h.
#include "cpu/cartesian_atoms.h"

#include <cmath>

#include "cartesian_message.h"
#include "cpu/jet.h"

namespace megagnn::cartesian {
namespace {

template <class V>
inline Pair<V> operator-(const Pair<V>& a) {
  return {-a.value, -a.tangent};
}
template <class V>
inline Pair<V> operator-(const Pair<V>& a, const Pair<V>& b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class V, class C, class = std::enable_if_t<!kIsPair<C>>>
inline Pair<V> operator*(const Pair<V>& a, const C& constant) {
  return {a.value * constant, a.tangent * constant};
}

// Symmetric matrices xx, yy, zz, xy + yx, yz + zy, zx + xz, as from_matrix reads them: the symmetric part of
// a b^T, and of the product of two symmetric matrices xx, yy, zz, xy, yz, zx.
template <class S>
inline void outer(const S* a, const S* b, S* out) {
  for (int c = 0; c < 3; ++c) {
    const int d = (c + 1) % 3;
    out[c] = a[c] * b[c];
    out[3 + c] = a[c] * b[d] + a[d] * b[c];
  }
}
template <class S>
inline void product(const S* m, const S* n, S* out) {
  constexpr int kRows[3][3] = {{0, 3, 5}, {3, 1, 4}, {5, 4, 2}};
  const auto times = [&](const S* a, const S* b, int i, int j) {
    return a[kRows[i][0]] * b[kRows[j][0]] + a[kRows[i][1]] * b[kRows[j][1]] +
           a[kRows[i][2]] * b[kRows[j][2]];
  };
  for (int c = 0; c < 3; ++c) {
    const int d = (c + 1) % 3;
    out[c] = times(m, n, c, c);
    out[3 + c] = times(m, n, c, d) + times(n, m, c, d);
  }
}

}  // namespace
}  // namespace megagnn::cartesian

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

using namespace cartesian;

// A function of a vector or of a pair, and its derivative.
template <class S>
struct Curve {
  S value, first;
};
template <class T>
inline Curve<Vec<T>> curve(const Jet<T>& jet, const Vec<T>&) {
  return {jet.value, jet.first};
}
template <class T>
inline Curve<Pair<Vec<T>>> curve(const Jet<T>& jet, const Pair<Vec<T>>& x) {
  return {{jet.value, jet.first * x.tangent}, {jet.first, jet.second * x.tangent}};
}
template <class T, bool PAIR>
struct Atoms {
  using V = Vec<T>;
  using S = Number<V, PAIR>;
  using One = Number<T, PAIR>;  // of an atom

  // The gate of scalars, SiLU, or of others, the logistic function.
  template <int FIELD>
  static inline Curve<S> gate(const S& x) {
    const V value = plane_of(x, Constant<0>{});
    if constexpr (FIELD == 0) return curve<T>(activate<T, kSiLU>(value), x);
    const Logistic<T> s = logistic<T>(value);
    const V first = s.value * s.rest;
    return curve<T>(Jet<T>{s.value, first, first * (s.rest - s.value)}, x);
  }

  // COUNT components of a field, or of its cotangents or gradients, whose planes are exchanged.
  template <int COUNT, bool EXCHANGED = false, class Lanes>
  static inline void read(const AtomField& field, int64_t atom, int64_t column, Lanes lanes, S* x) {
    for_planes<PAIR>([&](auto plane) {
      const T* const from = static_cast<const T*>(field.data) + int(plane) * field.plane + atom * field.row;
      for (int c = 0; c < COUNT; ++c)
        plane_of(x[c], to<EXCHANGED>(plane)) = load(from + c * field.component + column, lanes);
    });
  }
  template <int COUNT, bool EXCHANGED = false, class Lanes>
  static inline void write(const AtomField& field, int64_t atom, int64_t column, Lanes lanes, const S* x) {
    for_planes<PAIR>([&](auto plane) {
      T* const here = static_cast<T*>(field.data) + int(plane) * field.plane + atom * field.row;
      for (int c = 0; c < COUNT; ++c)
        store(here + c * field.component + column, plane_of(x[c], to<EXCHANGED>(plane)), lanes);
    });
  }
  template <bool EXCHANGED, class Plane>
  static constexpr auto to(Plane plane) {
    if constexpr (EXCHANGED) {
      return exchanged<PAIR>(plane);
    } else {
      return plane;
    }
  }

  // One number per atom, (planes, atoms).
  template <bool EXCHANGED = false>
  static inline One read(const void* data, const AtomsCall& call, int64_t atom) {
    One x{};
    for_planes<PAIR>([&](auto plane) {
      plane_of(x, to<EXCHANGED>(plane)) = static_cast<const T*>(data)[int(plane) * call.num_atoms + atom];
    });
    return x;
  }
  template <bool EXCHANGED = false>
  static inline void write(void* data, const AtomsCall& call, int64_t atom, const One& x) {
    for_planes<PAIR>([&](auto plane) {
      static_cast<T*>(data)[int(plane) * call.num_atoms + atom] = plane_of(x, to<EXCHANGED>(plane));
    });
  }
  static inline S spread(const One& x) {
    S s;
    for_planes<PAIR>([&](auto plane) { plane_of(s, plane) = broadcast(plane_of(x, plane)); });
    return s;
  }
  static inline One sum(const S& x) {
    One s{};
    for_planes<PAIR>([&](auto plane) { plane_of(s, plane) = sum_lanes<T>(plane_of(x, plane)); });
    return s;
  }
  static inline One inverse_root(const One& x, double epsilon) {
    if constexpr (PAIR) {
      const T y = T(1) / std::sqrt(x.value + T(epsilon));
      return {y, T(-0.5) * y * y * y * x.tangent};
    } else {
      return T(1) / std::sqrt(x + T(epsilon));
    }
  }
  // Of y = x^(-1/2), from y and its cotangent.
  static inline One inverse_root_backward(const One& y, const One& bar) { return y * y * y * bar * T(-0.5); }

  // body(field, components as a constant) for the fields that are there.
  template <class Body>
  static inline void for_fields(const AtomField* fields, const Body& body) {
    if (fields[0].data) body(0, Constant<1>{});
    if (fields[1].data) body(1, Constant<3>{});
    if (fields[2].data) body(2, Constant<5>{});
  }

  static void squares(const AtomsCall& call, int64_t begin, int64_t end) {
    for (int64_t atom = begin; atom < end; ++atom) {
      One total{};
      for_fields(call.in, [&](int f, auto components) {
        constexpr int kCount = decltype(components)::value;
        S square = {};
        for_columns<T>(call.in[f].width, [&](int64_t column, auto lanes) {
          S x[kCount], y[kCount];
          read<kCount>(call.in[f], atom, column, lanes, x);
          if (call.other[f].data) {
            read<kCount>(call.other[f], atom, column, lanes, y);
            for (int c = 0; c < kCount; ++c) x[c] += y[c];
            write<kCount>(call.out[f], atom, column, lanes, x);
          }
          for (int c = 0; c < kCount; ++c) square += x[c] * x[c];
        });
        total = total + sum(square) * T(call.factors[f]);
      });
      write(call.squares_out, call, atom, total);
    }
  }

  static void squares_backward(const AtomsCall& call, int64_t begin, int64_t end) {
    for (int64_t atom = begin; atom < end; ++atom) {
      const One square_bar = read<true>(call.squares, call, atom);
      for_fields(call.in, [&](int f, auto components) {
        constexpr int kCount = decltype(components)::value;
        const S by = spread(square_bar * T(2 * call.factors[f]));
        for_columns<T>(call.in[f].width, [&](int64_t column, auto lanes) {
          S x[kCount], bar[kCount] = {};
          read<kCount>(call.in[f], atom, column, lanes, x);
          if (call.other[f].data) read<kCount, true>(call.other[f], atom, column, lanes, bar);
          for (int c = 0; c < kCount; ++c) bar[c] += x[c] * by;
          write<kCount, true>(call.out[f], atom, column, lanes, bar);
        });
      });
    }
  }

  static void scale(const AtomsCall& call, int64_t begin, int64_t end) {
    for (int64_t atom = begin; atom < end; ++atom) {
      const S inverse = spread(inverse_root(read(call.squares, call, atom), call.epsilon));
      for_fields(call.in, [&](int f, auto components) {
        constexpr int kCount = decltype(components)::value;
        const T* const gain = static_cast<const T*>(call.weights[f]);
        for_columns<T>(call.in[f].width, [&](int64_t column, auto lanes) {
          S x[kCount];
          read<kCount>(call.in[f], atom, column, lanes, x);
          const S by = inverse * load(gain + column, lanes);
          for (int c = 0; c < kCount; ++c) x[c] = x[c] * by;
          write<kCount>(call.out[f], atom, column, lanes, x);
        });
      });
    }
  }

  static void scale_backward(const AtomsCall& call, int64_t begin, int64_t end) {
    for (int64_t atom = begin; atom < end; ++atom) {
      const One inverse = inverse_root(read(call.squares, call, atom), call.epsilon);
      const S by = spread(inverse);
      S inverse_bar = {};
      for_fields(call.in, [&](int f, auto components) {
        constexpr int kCount = decltype(components)::value;
        const T* const gain = static_cast<const T*>(call.weights[f]);
        T* const gain_bar = static_cast<T*>(call.weight_bars[f]);
        for_columns<T>(call.in[f].width, [&](int64_t column, auto lanes) {
          S x[kCount], bar[kCount], along = {};
          read<kCount>(call.in[f], atom, column, lanes, x);
          read<kCount, true>(call.other[f], atom, column, lanes, bar);
          for (int c = 0; c < kCount; ++c) along += bar[c] * x[c];
          if (gain_bar) add(gain_bar + column, along * by, lanes);
          const V weight = load(gain + column, lanes);
          inverse_bar += along * weight;
          for (int c = 0; c < kCount; ++c) bar[c] = bar[c] * by * weight;
          write<kCount, true>(call.out[f], atom, column, lanes, bar);
        });
      });
      write<true>(call.squares_out, call, atom, inverse_root_backward(inverse, sum(inverse_bar)));
    }
  }
  // The gradient of a weight, of which there is no tangent: the second plane of an exchanged pair.
  template <class Lanes>
  static inline void add(T* sums, const S& x, Lanes lanes) {
    store(sums, V(load(sums, lanes) + plane_of(x, exchanged<PAIR>(Constant<0>{}))), lanes);
  }

  // An atom's features, with its tensor as a matrix.
  struct Features {
    S h, v[3], t[5], matrix[6];
  };
  template <class Lanes>
  static inline Features features(const AtomsCall& call, int64_t atom, int64_t column, Lanes lanes) {
    Features u;
    read<1>(call.in[0], atom, column, lanes, &u.h);
    read<3>(call.in[1], atom, column, lanes, u.v);
    if (call.in[2].data) {
      read<5>(call.in[2], atom, column, lanes, u.t);
      to_matrix<T>(u.t, u.matrix);
    }
    return u;
  }
  template <int FIELD, class Lanes>
  static inline Curve<S> gate_of(const AtomsCall& call, int64_t atom, int64_t column, Lanes lanes,
                                 const S& h) {
    S g;
    read<1>(call.gates, atom, FIELD * call.in[0].width + column, lanes, &g);
    return gate<FIELD>(g + h * load(static_cast<const T*>(call.weights[FIELD]) + column, lanes));
  }
  template <int COUNT>
  static inline void times(const S& by, S* x) {
    for (int c = 0; c < COUNT; ++c) x[c] = x[c] * by;
  }

  static void products(const AtomsCall& call, int64_t begin, int64_t end) {
    const int64_t width = call.in[0].width;
    const bool tensors = call.in[2].data;
    for (int64_t atom = begin; atom < end; ++atom) {
      const S share = spread(inverse_root(read(call.squares, call, atom), call.epsilon));
      for_columns<T>(width, [&](int64_t column, auto lanes) {
        const Features u = features(call, atom, column, lanes);
        S y[5], sum[6];
        const auto part = [&](auto components, int field, int k) {
          write<decltype(components)::value>(call.out[field], atom, k * width + column, lanes, y);
        };
        y[0] = gate_of<0>(call, atom, column, lanes, u.h).value * u.h;
        part(Constant<1>{}, 0, 0);
        y[0] = dot(u.v, u.v) * share;
        part(Constant<1>{}, 0, 1);
        if (tensors) {
          y[0] = contract(u.matrix, u.matrix) * share;
          part(Constant<1>{}, 0, 2);
        }
        if (call.out[1].data) {
          const S open = gate_of<1>(call, atom, column, lanes, u.h).value;
          for (int c = 0; c < 3; ++c) y[c] = u.v[c] * open;
          part(Constant<3>{}, 1, 0);
          if (tensors) {
            multiply(u.matrix, u.v, y);
            times<3>(share, y);
            part(Constant<3>{}, 1, 1);
          }
        }
        if (call.out[2].data) {
          const S open = gate_of<2>(call, atom, column, lanes, u.h).value;
          for (int c = 0; c < 5; ++c) y[c] = u.t[c] * open;
          part(Constant<5>{}, 2, 0);
          outer(u.v, u.v, sum);
          from_matrix<T>(sum, y);
          times<5>(share, y);
          part(Constant<5>{}, 2, 1);
          product(u.matrix, u.matrix, sum);
          from_matrix<T>(sum, y);
          times<5>(share, y);
          part(Constant<5>{}, 2, 2);
        }
      });
    }
  }

  // With b the cotangents of y: products are homogeneous of second degree in v and t, so that half of v and t
  // times their derivatives is the product with b, and with it the cotangent of the share.
  static void products_backward(const AtomsCall& call, int64_t begin, int64_t end) {
    const int64_t width = call.in[0].width;
    const bool tensors = call.in[2].data;
    for (int64_t atom = begin; atom < end; ++atom) {
      const One inverse = inverse_root(read(call.squares, call, atom), call.epsilon);
      const S share = spread(inverse);
      S share_bar = {};
      for_columns<T>(width, [&](int64_t column, auto lanes) {
        const Features u = features(call, atom, column, lanes);
        S b[5], matrix[6], some[3], v_bar[3], t_bar[5] = {}, v_open[3] = {}, t_open[5] = {}, h_bar = {};
        const auto part = [&](auto components, int field, int k) {
          read<decltype(components)::value, true>(call.other[field], atom, k * width + column, lanes, b);
        };
        // a field's gate: its cotangent is the derivative's product with `along`
        const auto gate_back = [&](auto field, const Curve<S>& gate, const S& along) {
          const S bar = gate.first * along;
          const int f = decltype(field)::value;
          const T* const slope = static_cast<const T*>(call.weights[f]);
          write<1, true>(call.gates_bar, atom, f * width + column, lanes, &bar);
          h_bar += bar * load(slope + column, lanes);
          if (call.weight_bars[f]) add(static_cast<T*>(call.weight_bars[f]) + column, bar * u.h, lanes);
        };
        part(Constant<1>{}, 0, 0);
        const Curve<S> open = gate_of<0>(call, atom, column, lanes, u.h);
        h_bar += open.value * b[0];
        gate_back(Constant<0>{}, open, u.h * b[0]);
        part(Constant<1>{}, 0, 1);
        for (int c = 0; c < 3; ++c) v_bar[c] = u.v[c] * (b[0] + b[0]);
        if (tensors) {
          part(Constant<1>{}, 0, 2);
          for (int c = 0; c < 5; ++c) t_bar[c] = u.t[c] * (b[0] + b[0]);
        }
        S sum[6] = {};  // of the tensor's derivatives that are made as matrices
        if (call.other[1].data) {
          part(Constant<3>{}, 1, 0);
          const Curve<S> gate = gate_of<1>(call, atom, column, lanes, u.h);
          gate_back(Constant<1>{}, gate, dot(u.v, b));
          for (int c = 0; c < 3; ++c) v_open[c] = b[c] * gate.value;
          if (tensors) {
            part(Constant<3>{}, 1, 1);
            multiply(u.matrix, b, some);
            for (int c = 0; c < 3; ++c) v_bar[c] += some[c];
            outer(b, u.v, sum);
          }
        }
        if (tensors && call.other[2].data) {
          part(Constant<5>{}, 2, 0);
          const Curve<S> gate = gate_of<2>(call, atom, column, lanes, u.h);
          S along = u.t[0] * b[0];
          for (int c = 1; c < 5; ++c) along += u.t[c] * b[c];
          gate_back(Constant<2>{}, gate, along);
          for (int c = 0; c < 5; ++c) t_open[c] = b[c] * gate.value;
          part(Constant<5>{}, 2, 1);
          to_matrix<T>(b, matrix);
          multiply(matrix, u.v, some);
          for (int c = 0; c < 3; ++c) v_bar[c] += some[c] + some[c];
          part(Constant<5>{}, 2, 2);
          to_matrix<T>(b, matrix);
          S twice[6];
          product(u.matrix, matrix, twice);
          for (int c = 0; c < 6; ++c) sum[c] += twice[c] + twice[c];
        }
        if (tensors) {
          from_matrix<T>(sum, b);
          for (int c = 0; c < 5; ++c) t_bar[c] += b[c];
          for (int c = 0; c < 5; ++c) share_bar += t_bar[c] * u.t[c];
          for (int c = 0; c < 5; ++c) t_bar[c] = t_bar[c] * share + t_open[c];
          write<5, true>(call.out[2], atom, column, lanes, t_bar);
        }
        share_bar += dot(v_bar, u.v);
        for (int c = 0; c < 3; ++c) v_bar[c] = v_bar[c] * share + v_open[c];
        write<3, true>(call.out[1], atom, column, lanes, v_bar);
        write<1, true>(call.out[0], atom, column, lanes, &h_bar);
      });
      write<true>(call.squares_out, call, atom, inverse_root_backward(inverse, sum(share_bar * T(0.5))));
    }
  }

  static constexpr AtomsKernels::Set set() {
    return {squares, squares_backward, scale, scale_backward, products, products_backward};
  }
};

template <class T>
constexpr AtomsKernels atoms_of() {
  return {Atoms<T, false>::set(), Atoms<T, true>::set()};
}

}  // namespace

extern const AtomsKernels cartesian_atoms[kNumScalars];
const AtomsKernels cartesian_atoms[kNumScalars] = {atoms_of<float>(), atoms_of<double>(), {}};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
