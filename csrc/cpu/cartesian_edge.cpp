// Compiled once for each SIMD level. A unit of work is some rows and as many channels as a vector has lanes:
// sums in registers, the weights of those channels in the first-level cache, the rows' neighbours in the
// second.
#include "cpu/cartesian_edge.h"

#include <initializer_list>

#include "cpu/cartesian_message.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

constexpr int64_t kChunkEdges = 512;  // whose neighbours stay in the cache from block to block of channels
constexpr int64_t kAhead = 2;         // edges whose features are fetched before their turn
constexpr int64_t kBatchEdges = 16;   // whose products with radial functions are added up together

template <class T>
constexpr T kRoot2 = T(0.70710678118654752440);
template <class T>
constexpr T kRoot6 = T(0.40824829046386301637);

// Five components in the basis of messages.py, and the matrix xx, yy, zz, xy, yz, zx.
template <class T>
inline void to_matrix(const Vec<T>* t, Vec<T>* m) {
  const Vec<T> difference = t[3] * kRoot2<T>, rest = t[4] * kRoot6<T>;
  m[0] = difference - rest, m[1] = -difference - rest, m[2] = rest + rest;
  for (int c = 0; c < 3; ++c) m[3 + c] = t[c] * kRoot2<T>;
}
// Of what add_message sums.
template <class T>
inline void from_matrix(const Vec<T>* m, Vec<T>* t) {
  for (int c = 0; c < 3; ++c) t[c] = m[3 + c] * kRoot2<T>;
  t[3] = (m[0] - m[1]) * kRoot2<T>;
  t[4] = (m[2] + m[2] - m[0] - m[1]) * kRoot6<T>;
}

template <class T>
void pack(const CartesianFields& fields, int mask, bool pair, void* packed, int64_t begin, int64_t end) {
  Vec<T>* to = static_cast<Vec<T>*>(packed);
  const int64_t planes = pair ? 2 : 1, count = numbers(mask), width = fields.width;
  const int64_t blocks = (width + kLanesOf<T> - 1) / kLanesOf<T>;
  to += begin * blocks * count * planes;
  for (int64_t row = begin; row < end; ++row) {
    for_columns<T>(width, [&](int64_t column, auto lanes) {
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t source = fields.exchanged ? planes - 1 - plane : plane;
        Vec<T> loaded[9], out[10];
        for (int f = 0, c = 0; f < kFields; ++f) {
          if (!(mask >> f & 1)) continue;
          const T* from = static_cast<const T*>(fields.data[f]) +
                          (source * fields.num_rows + row) * kComponents[f] * width + column;
          for (int64_t k = 0; k < kComponents[f]; ++k) loaded[c++] = load(from + k * width, lanes);
        }
        const int before = numbers(mask & 3);
        for (int c = 0; c < before; ++c) out[c] = loaded[c];
        if (mask & 4) to_matrix<T>(loaded + before, out + before);
        for (int64_t c = 0; c < count; ++c) to[c * planes + plane] = out[c];
      }
      to += count * planes;
    });
  }
}

template <class T, bool PAIR>
inline Number<T, PAIR> broadcast_planes(const void* const planes[2], int64_t at) {
  const auto plane = [&](int k) { return broadcast(static_cast<const T*>(planes[k])[at]); };
  if constexpr (PAIR) {
    return {plane(0), plane(1)};
  } else {
    return plane(0);
  }
}
template <bool PAIR, class Body>
inline void for_planes(const Body& body) {
  body(std::integral_constant<int, 0>{});
  if constexpr (PAIR) body(std::integral_constant<int, 1>{});
}
template <class V, class Plane>
inline V& plane_of(V& x, Plane) {
  return x;
}
template <class V, class Plane>
inline auto& plane_of(Pair<V>& x, Plane) {
  if constexpr (Plane::value == 1) {
    return x.tangent;
  } else {
    return x.value;
  }
}
// Where a plane is in a result with value and tangent exchanged.
template <bool PAIR, class Plane>
constexpr auto exchanged(Plane) {
  return std::integral_constant<int, PAIR ? 1 - Plane::value : 0>{};
}

// The weights of some channels on an edge.
template <class T, bool PAIR, int COUNT>
inline void edge_weights(const Vec<T>* table, const CartesianEdges& edges, int64_t e, Number<T, PAIR>* w) {
  for_planes<PAIR>([&](auto plane) {
    const T* const basis = static_cast<const T*>(edges.basis[plane]) + e * edges.num_radial;
    Vec<T> sum[COUNT] = {};
    for (int64_t n = 0; n < edges.num_radial; ++n) {
      const Vec<T> b = broadcast(basis[n]);
#pragma GCC unroll 14
      for (int k = 0; k < COUNT; ++k) sum[k] += b * table[n * COUNT + k];
    }
#pragma GCC unroll 14
    for (int k = 0; k < COUNT; ++k) plane_of(w[k], plane) = sum[k];
  });
}

// Walks rows [row_begin, row_end) in chunks of edges, each chunk block after block of channels:
// row(block, row, begin, end).
template <class Row>
inline bool over_chunks(const CartesianEdges& edges, int64_t blocks, int64_t row_begin, int64_t row_end,
                        const Row& row) {
  for (int64_t first = row_begin, last; first < row_end; first = last) {
    last = first + 1;
    while (last < row_end && edges.ptr[last + 1] - edges.ptr[first] <= kChunkEdges) ++last;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = first; i < last; ++i) {
        if (!row(block, i, edges.ptr[i], edges.ptr[i + 1])) return false;
      }
    }
  }
  return true;
}

// Edge k of the order of ptr, or -1 where it, or the atom at its other end, is out of range.
inline int64_t edge_at(const CartesianEdges& edges, int64_t k) {
  const int64_t e = edges.perm ? edges.perm[k] : k;
  if (__builtin_expect(uint64_t(e) >= uint64_t(edges.num_edges), 0)) return -1;
  return __builtin_expect(uint64_t(edges.index[e]) < uint64_t(edges.num_others), 1) ? e : -1;
}

template <class T, bool PAIR, uint32_t PATHS>
struct Edges {
  using S = Number<T, PAIR>;
  static constexpr int kCount = count(PATHS), kSenders = senders(PATHS), kReceivers = receivers(PATHS);
  static constexpr int kSent = numbers(kSenders), kReceived = numbers(kReceivers);

  // body(e, features, unit, weights) for the edges [begin, end) of a row.
  template <class Body>
  static inline bool each(const CartesianInput& in, int64_t blocks, int64_t block, int64_t begin, int64_t end,
                          const Body& body) {
    const CartesianEdges& edges = in.edges;
    const S* const others = static_cast<const S*>(in.others);
    const Vec<T>* const table = static_cast<const Vec<T>*>(in.weight) + block * edges.num_radial * kCount;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t e = edge_at(edges, k);
      if (e < 0) return false;
      if (k + kAhead < end) {
        const int64_t next = edge_at(edges, k + kAhead);
        const char* const from =
            reinterpret_cast<const char*>(others + (edges.index[next < 0 ? e : next] * blocks + block) * kSent);
        for (int64_t b = 0; b < int64_t(sizeof(S)) * kSent; b += 64) __builtin_prefetch(from + b);
      }
      S unit[3], w[kCount];
      for (int c = 0; c < 3; ++c) unit[c] = broadcast_planes<T, PAIR>(edges.unit, 3 * e + c);
      edge_weights<T, PAIR, kCount>(table, edges, e, w);
      body(e, features_of<kSenders>(others + (edges.index[e] * blocks + block) * kSent, unit), unit, w);
    }
    return true;
  }

  static bool sum(const CartesianInput& in, const CartesianFields& out, int64_t row_begin, int64_t row_end) {
    const int64_t blocks = (out.width + kLanesOf<T> - 1) / kLanesOf<T>;
    return over_chunks(in.edges, blocks, row_begin, row_end,
                       [&](int64_t block, int64_t row, int64_t begin, int64_t end) {
                         S total[kReceived] = {};
                         const bool ok = each(in, blocks, block, begin, end,
                                              [&](int64_t, const Features<S>& f, const S* unit, const S* w) {
                                                add_message<PATHS>(f, unit, w, total);
                                              });
                         write(out, row, block, total);
                         return ok;
                       });
  }

  static inline void write(const CartesianFields& out, int64_t row, int64_t block, S* total) {
    const int64_t column = block * kLanesOf<T>, rest = out.width - column;
    for_planes<PAIR>([&](auto plane) {
      Vec<T> sums[kReceived], five[5];
      for (int c = 0; c < kReceived; ++c) sums[c] = plane_of(total[c], plane);
      if constexpr ((kReceivers & 4) != 0) from_matrix<T>(sums + (kReceivers & 2 ? 4 : 1), five);
      const int to_plane = out.exchanged ? int(exchanged<PAIR>(plane)) : int(plane);
      for (int f = 0; f < kFields; ++f) {
        if (!(kReceivers >> f & 1)) continue;
        const Vec<T>* const from = f == 2 ? five : sums + f;
        T* const to = static_cast<T*>(out.data[f]) +
                      (to_plane * out.num_rows + row) * kComponents[f] * out.width + column;
        for (int64_t c = 0; c < kComponents[f]; ++c) {
          rest < kLanesOf<T> ? store(to + c * out.width, from[c], Some{rest})
                             : store(to + c * out.width, from[c], All{});
        }
      }
    });
  }

  static bool gradient(const CartesianInput& in, const CartesianGradients& out, int64_t width,
                       int64_t row_begin, int64_t row_end) {
    const int64_t blocks = (width + kLanesOf<T> - 1) / kLanesOf<T>, radial = in.edges.num_radial;
    const S* const rows = static_cast<const S*>(in.rows);
    S products[kBatchEdges * kCount];
    int64_t batch[kBatchEdges];
    return over_chunks(
        in.edges, blocks, row_begin, row_end, [&](int64_t block, int64_t row, int64_t begin, int64_t end) {
          const S* const bars = rows + (row * blocks + block) * kReceived;
          const Vec<T>* const table = static_cast<const Vec<T>*>(in.weight) + block * radial * kCount;
          Vec<T>* const sums = out.weight ? static_cast<Vec<T>*>(out.weight) + block * radial * kCount : nullptr;
          int64_t filled = 0;
          const bool ok = each(
              in, blocks, block, begin, end, [&](int64_t e, const Features<S>& f, const S* unit, const S* w) {
                const Features<S> b = features_of<kReceivers>(bars, unit);
                S* const x = products + filled * kCount;
                weight_derivatives<PATHS>(f, b, x);
                if (out.unit[0]) add_geometry(out, table, radial, e, block == 0, f, b, w, x);
                if (!sums) return;
                batch[filled++] = e;
                if (filled == kBatchEdges) add_products(in.edges, batch, filled, products, sums), filled = 0;
              });
          if (sums) add_products(in.edges, batch, filled, products, sums);
          return ok;
        });
  }

  // Sums over the lanes of the derivatives by radial functions and direction; of pairs exchanged.
  static inline void add_geometry(const CartesianGradients& out, const Vec<T>* table, int64_t radial,
                                  int64_t e, bool first, const Features<S>& f, const Features<S>& b,
                                  const S* w, S* x) {
    S direction[3];
    direction_derivative<PATHS>(f, b, w, direction);
    for_planes<PAIR>([&](auto plane) {
      constexpr int to = exchanged<PAIR>(decltype(plane){});
      T *const unit = static_cast<T*>(out.unit[to]) + 3 * e, *const basis = static_cast<T*>(out.basis[to]) + radial * e;
      for (int c = 0; c < 3; ++c) {
        const T total = sum_lanes<T>(plane_of(direction[c], plane));
        unit[c] = first ? total : unit[c] + total;
      }
      for (int64_t n = 0; n < radial; ++n) {
        Vec<T> sum = {};
#pragma GCC unroll 14
        for (int k = 0; k < kCount; ++k) sum += table[n * kCount + k] * plane_of(x[k], plane);
        const T total = sum_lanes<T>(sum);
        basis[n] = first ? total : basis[n] + total;
      }
    });
  }

  // sums[n, path] += sum over the batch of basis[n] products[path]; of exchanged pairs the tangent of that.
  static inline void add_products(const CartesianEdges& edges, const int64_t* batch, int64_t filled,
                                  S* products, Vec<T>* sums) {
    for_planes<PAIR>([&](auto plane) {
      const T* const basis = static_cast<const T*>(edges.basis[plane]);
      constexpr auto of = exchanged<PAIR>(decltype(plane){});
      int k = 0;
      for (; k + 2 <= kCount; k += 2) add_some<2>(edges.num_radial, batch, filled, basis, products + k, of, sums + k);
      if (k < kCount) add_some<1>(edges.num_radial, batch, filled, basis, products + k, of, sums + k);
    });
  }
  template <int PRODUCTS, class Plane>
  static inline void add_some(int64_t radial, const int64_t* batch, int64_t filled, const T* basis,
                              S* products, Plane plane, Vec<T>* sums) {
    int64_t n = 0;
    for (; n + 4 <= radial; n += 4) add_tile<PRODUCTS, 4>(radial, n, batch, filled, basis, products, plane, sums);
    for (; n < radial; ++n) add_tile<PRODUCTS, 1>(radial, n, batch, filled, basis, products, plane, sums);
  }
  template <int PRODUCTS, int RADIAL, class Plane>
  static inline void add_tile(int64_t radial, int64_t n, const int64_t* batch, int64_t filled, const T* basis,
                              S* products, Plane plane, Vec<T>* sums) {
    Vec<T> total[PRODUCTS][RADIAL];
    for (int k = 0; k < PRODUCTS; ++k)
      for (int r = 0; r < RADIAL; ++r) total[k][r] = sums[(n + r) * kCount + k];
    for (int64_t i = 0; i < filled; ++i) {
      const T* const b = basis + batch[i] * radial + n;
      for (int k = 0; k < PRODUCTS; ++k) {
        const Vec<T> x = plane_of(products[i * kCount + k], plane);
        for (int r = 0; r < RADIAL; ++r) total[k][r] += x * broadcast(b[r]);
      }
    }
    for (int k = 0; k < PRODUCTS; ++k)
      for (int r = 0; r < RADIAL; ++r) sums[(n + r) * kCount + k] = total[k][r];
  }
};

constexpr uint32_t paths(std::initializer_list<int> list) {
  uint32_t set = 0;
  for (int path : list) set |= 1u << (path - 1);
  return set;
}
// The sets of messages.py: of senders with all fields, and of those of the first layer, with scalars.
constexpr uint32_t kFull = (1u << kNumPaths) - 1, kFirst = paths({1, 4, 9});
constexpr uint32_t kLean = paths({1, 4, 7, 9, 14}), kPainn = paths({1, 4, 7}), kPainnFirst = paths({1, 4});
// The same from receivers to senders.
constexpr uint32_t kFirstBack = paths({1, 2, 3}), kLeanBack = paths({1, 2, 3, 7, 14});
constexpr uint32_t kPainnBack = paths({1, 2, 7}), kPainnFirstBack = paths({1, 2});

template <class T, bool PAIR>
CartesianKernels::Set set_of(uint32_t set) {
  CartesianKernels::Set found{};
  const auto offer = [&](auto one, auto both) {
    constexpr uint32_t kSet = decltype(one)::value;
    if (set != kSet) return;
    found.sum = Edges<T, PAIR, kSet>::sum;
    if constexpr (decltype(both)::value) found.gradient = Edges<T, PAIR, kSet>::gradient;
  };
  const std::true_type both;
  const std::false_type back;
  offer(std::integral_constant<uint32_t, kFull>{}, both);
  offer(std::integral_constant<uint32_t, kFirst>{}, both);
  offer(std::integral_constant<uint32_t, kLean>{}, both);
  offer(std::integral_constant<uint32_t, kPainn>{}, both);
  offer(std::integral_constant<uint32_t, kPainnFirst>{}, both);
  offer(std::integral_constant<uint32_t, kFirstBack>{}, back);
  offer(std::integral_constant<uint32_t, kLeanBack>{}, back);
  offer(std::integral_constant<uint32_t, kPainnBack>{}, back);
  offer(std::integral_constant<uint32_t, kPainnFirstBack>{}, back);
  return found;
}

template <class T>
constexpr CartesianKernels cartesian_of() {
  return {kLanesOf<T>, pack<T>,
          [](uint32_t set, bool pair) { return pair ? set_of<T, true>(set) : set_of<T, false>(set); }};
}

}  // namespace

extern const CartesianKernels cartesian[kNumScalars];
const CartesianKernels cartesian[kNumScalars] = {cartesian_of<float>(), cartesian_of<double>(), {}};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
