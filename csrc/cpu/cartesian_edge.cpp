// Compiled once for each SIMD level. A unit of work is some rows and as many channels as a vector has lanes:
// sums in registers, the weights of those channels in the first-level cache, the rows' neighbours in the
// second.
#include "cpu/cartesian_edge.h"

#include <algorithm>
#include <vector>

#include "cartesian_message.h"
#include "cpu/math.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

using namespace cartesian;

constexpr int64_t kChunkEdges = 512;  // whose neighbours stay in the cache from block to block of channels
constexpr int64_t kAhead = 2;         // edges whose features are fetched before their turn
constexpr int64_t kBatchEdges = 16;   // whose gradients are made together

template <class T, bool PAIR>
using Numbers = Number<Vec<T>, PAIR>;

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
inline Numbers<T, PAIR> broadcast_planes(const void* const planes[2], int64_t at) {
  const auto plane = [&](int k) { return broadcast(static_cast<const T*>(planes[k])[at]); };
  if constexpr (PAIR) {
    return {plane(0), plane(1)};
  } else {
    return plane(0);
  }
}
// The first row of weights that an edge reads.
inline int64_t first_of(const CartesianEdges& edges, int64_t e) { return edges.first ? edges.first[e] : 0; }

// The weights of some channels on an edge.
template <class T, bool PAIR, int COUNT>
inline void edge_weights(const Vec<T>* table, const CartesianEdges& edges, int64_t e, Numbers<T, PAIR>* w) {
  table += first_of(edges, e) * COUNT;
  const auto add = [&](auto... planes) {
    constexpr int kPlanes = sizeof...(planes);
    Vec<T> sum[kPlanes][COUNT] = {};
    for (int64_t n = 0; n < edges.num_radial; ++n) {
      const int64_t at = e * edges.num_radial + n;
      const Vec<T> b[kPlanes] = {broadcast(static_cast<const T*>(edges.basis[planes])[at])...};
#pragma GCC unroll 14
      for (int k = 0; k < COUNT; ++k)
        for (int p = 0; p < kPlanes; ++p) sum[p][k] += b[p] * table[n * COUNT + k];
    }
#pragma GCC unroll 14
    for (int k = 0; k < COUNT; ++k) {
      int p = 0;
      ((plane_of(w[k], planes) = sum[p++][k]), ...);
    }
  };
  if constexpr (PAIR && kVectorBytes == 64) {  // 32 registers: both from one load of the table
    add(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{});
  } else {
    for_planes<PAIR>(add);
  }
}

// The sums of the lanes of as many vectors as a vector has lanes, in their order: in each step lanes of two
// vectors, kStep apart, are added into one.
template <class T, int STEP, int... LANE>
inline Vec<T> add_two(Vec<T> a, Vec<T> b, std::integer_sequence<int, LANE...>) {
  constexpr auto from = [](int lane, int offset) {
    constexpr int kLanes = int(kLanesOf<T>);
    const int within = lane % (2 * STEP), base = lane - within;
    return base + offset + (within < STEP ? within : kLanes + within - STEP);
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from(LANE, 0)...) + __builtin_shufflevector(a, b, from(LANE, STEP)...);
#else
  return __builtin_shuffle(a, b, Bits<T>{from(LANE, 0)...}) +
         __builtin_shuffle(a, b, Bits<T>{from(LANE, STEP)...});
#endif
}
template <class T, int STEP = 1>
inline Vec<T> sum_lanes_of(const Vec<T>* x, int64_t count) {
  constexpr int kLanes = int(kLanesOf<T>);
  if constexpr (STEP == kLanes) {
    return x[0];
  } else {
    Vec<T> half[kLanes / STEP / 2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / STEP / 2; ++i) {
      if (2 * i * STEP < count)
        half[i] = add_two<T, STEP>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, kLanes>{});
    }
    return sum_lanes_of<T, 2 * STEP>(half, count);
  }
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

// Edges of a block of channels, with what their gradients are made of: products of each path, and derivatives
// by the direction.
template <class S, int COUNT>
struct Batch {
  int64_t filled = 0, block = 0, edges[kBatchEdges];
  S products[kBatchEdges][COUNT], directions[kBatchEdges][3];
};

// sums[n, path] += sum over a batch of edges of basis[n] products[path], for RADIAL numbers n and PATHS paths
// from `path` on.
template <class T, int PATHS, int RADIAL, class S, int COUNT, class Plane>
inline void add_tile(const Batch<S, COUNT>& batch, const T* const* basis, int path, Plane plane,
                     Vec<T>* sums) {
  Vec<T> total[PATHS][RADIAL];
  for (int k = 0; k < PATHS; ++k)
    for (int r = 0; r < RADIAL; ++r) total[k][r] = sums[r * COUNT + path + k];
  for (int64_t i = 0; i < batch.filled; ++i) {
    for (int k = 0; k < PATHS; ++k) {
      const Vec<T> x = plane_of(batch.products[i][path + k], plane);
      for (int r = 0; r < RADIAL; ++r) total[k][r] += x * broadcast(basis[i][r]);
    }
  }
  for (int k = 0; k < PATHS; ++k)
    for (int r = 0; r < RADIAL; ++r) sums[r * COUNT + path + k] = total[k][r];
}
// Of pairs of products whose value and tangent are exchanged, the tangent of the same.
template <class T, bool PAIR, int COUNT>
__attribute__((noinline)) void add_products(const CartesianEdges& edges,
                                            const Batch<Numbers<T, PAIR>, COUNT>& batch, Vec<T>* sums) {
  const int64_t radial = edges.num_radial;
  for_planes<PAIR>([&](auto plane) {
    constexpr auto of = exchanged<PAIR>(decltype(plane){});
    const T* basis[kBatchEdges];
    for (int64_t i = 0; i < batch.filled; ++i)
      basis[i] = static_cast<const T*>(edges.basis[plane]) + batch.edges[i] * radial;
    const auto add = [&](int64_t n, auto tile) {
      constexpr int kTile = decltype(tile)::value;
      int k = 0;
      for (; k + 2 <= COUNT; k += 2) add_tile<T, 2, kTile>(batch, basis, k, of, sums + n * COUNT);
      if (k < COUNT) add_tile<T, 1, kTile>(batch, basis, k, of, sums + n * COUNT);
      for (int64_t i = 0; i < batch.filled; ++i) basis[i] += kTile;
    };
    int64_t n = 0;
    for (; n + 4 <= radial; n += 4) add(n, std::integral_constant<int, 4>{});
    for (; n < radial; ++n) add(n, std::integral_constant<int, 1>{});
  });
}
// The same for edges that read different rows of weights: they are ordered by their first, so that those
// which read a row follow one another.
template <class T, bool PAIR, int COUNT>
__attribute__((noinline)) void add_products_to_rows(const CartesianEdges& edges,
                                                    const Batch<Numbers<T, PAIR>, COUNT>& batch,
                                                    std::vector<int>& ends, Vec<T>* sums) {
  using S = Numbers<T, PAIR>;
  const int64_t R = edges.num_radial, last = edges.num_rows - R;
  ends.assign(size_t(last + 2), 0);  // behind the edges with each first row
  for (int64_t i = 0; i < batch.filled; ++i) ++ends[size_t(edges.first[batch.edges[i]]) + 1];
  for (int64_t f = 0; f <= last; ++f) ends[size_t(f) + 1] += ends[size_t(f)];
  const S* products[kBatchEdges];
  int64_t basis[kBatchEdges];  // where the number for row 0 would be
  for (int64_t i = 0; i < batch.filled; ++i) {
    const int64_t e = batch.edges[i], first = edges.first[e], at = ends[size_t(first)]++;
    products[at] = batch.products[i], basis[at] = e * R - first;
  }
  for (int64_t row = 0; row < edges.num_rows; ++row, sums += COUNT) {
    const int begin = row < R ? 0 : ends[size_t(row - R)], end = ends[size_t(std::min(row, last))];
    if (begin == end) continue;
    Vec<T> total[COUNT];
#pragma GCC unroll 14
    for (int k = 0; k < COUNT; ++k) total[k] = sums[k];
    for (int i = begin; i < end; ++i) {
      const S b = broadcast_planes<T, PAIR>(edges.basis, basis[i] + row), *const x = products[i];
#pragma GCC unroll 14
      for (int k = 0; k < COUNT; ++k) {
        for_planes<PAIR>(
            [&](auto plane) { total[k] += plane_of(b, plane) * plane_of(x[k], exchanged<PAIR>(plane)); });
      }
    }
#pragma GCC unroll 14
    for (int k = 0; k < COUNT; ++k) sums[k] = total[k];
  }
}

// Derivatives of a batch of edges by their directions and functions of the distance, summed over the lanes;
// of pairs exchanged.
template <class T, bool PAIR, int COUNT>
__attribute__((noinline)) void add_geometry(const CartesianEdges& edges, const CartesianGradients& out,
                                            const Batch<Numbers<T, PAIR>, COUNT>& batch,
                                            const Vec<T>* table) {
  constexpr int64_t kLanes = kLanesOf<T>;
  const int64_t radial = edges.num_radial;
  for (int64_t i = 0; i < batch.filled; ++i) {
    for_planes<PAIR>([&](auto plane) {
      constexpr int to = exchanged<PAIR>(decltype(plane){});
      const int64_t e = batch.edges[i];
      const Vec<T>* const rows = table + first_of(edges, e) * COUNT;
      T* const unit = static_cast<T*>(out.unit[to]) + 3 * e;
      T* const basis = static_cast<T*>(out.basis[to]) + radial * e - 3;
      for (int64_t c = 0; c < 3 + radial; c += kLanes) {
        const int64_t some = std::min<int64_t>(3 + radial - c, kLanes);
        Vec<T> vectors[kLanes + 1];
        int64_t v = 0;
        for (; v < some && c + v < 3; ++v) vectors[v] = plane_of(batch.directions[i][c + v], plane);
        const auto sum = [&](auto tile) {
          constexpr int kTile = decltype(tile)::value;
          for (; v + kTile <= some; v += kTile) {
            Vec<T> total[kTile] = {};
            const Vec<T>* const row = rows + (c + v - 3) * COUNT;
#pragma GCC unroll 14
            for (int k = 0; k < COUNT; ++k) {
              const Vec<T> x = plane_of(batch.products[i][k], plane);
              for (int t = 0; t < kTile; ++t) total[t] += row[t * COUNT + k] * x;
            }
            for (int t = 0; t < kTile; ++t) vectors[v + t] = total[t];
          }
        };
        sum(std::integral_constant<int, 4>{});
        sum(std::integral_constant<int, 1>{});
        vectors[some] = Vec<T>{};
        T sums[kLanes];
        store(sums, sum_lanes_of<T>(vectors, some), All{});
        for (int64_t k = 0; k < some; ++k) {
          T* const here = (c + k < 3 ? unit : basis) + c + k;
          *here = batch.block ? *here + sums[k] : sums[k];
        }
      }
    });
  }
}

template <class T, bool PAIR, uint32_t PATHS>
struct Edges {
  using S = Numbers<T, PAIR>;
  static constexpr int kCount = Set<PATHS>::kCount, kSenders = Set<PATHS>::kSenders,
                       kReceivers = Set<PATHS>::kReceivers;
  static constexpr int kSent = Set<PATHS>::kSent, kReceived = Set<PATHS>::kReceived;

  static const Vec<T>* table_of(const CartesianInput& in, int64_t block) {
    return static_cast<const Vec<T>*>(in.weight) + block * in.edges.num_rows * kCount;
  }

  // body(e, features, unit) for the edges [begin, end) of a row.
  template <class Body>
  static inline bool each(const CartesianInput& in, int64_t blocks, int64_t block, int64_t begin, int64_t end,
                          const Body& body) {
    const CartesianEdges& edges = in.edges;
    const S* const others = static_cast<const S*>(in.others);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t e = edge_at(edges, k);
      if (e < 0) return false;
      if (k + kAhead < end) {
        const int64_t next = edge_at(edges, k + kAhead);
        const char* const from = reinterpret_cast<const char*>(
            others + (edges.index[next < 0 ? e : next] * blocks + block) * kSent);
        for (int64_t b = 0; b < int64_t(sizeof(S)) * kSent; b += 64) __builtin_prefetch(from + b);
      }
      S unit[3];
      for (int c = 0; c < 3; ++c) unit[c] = broadcast_planes<T, PAIR>(edges.unit, 3 * e + c);
      body(e, features_of<kSenders>(others + (edges.index[e] * blocks + block) * kSent, unit), unit);
    }
    return true;
  }

  static bool sum(const CartesianInput& in, const CartesianFields& out, int64_t row_begin, int64_t row_end) {
    const int64_t blocks = (out.width + kLanesOf<T> - 1) / kLanesOf<T>;
    return over_chunks(
        in.edges, blocks, row_begin, row_end, [&](int64_t block, int64_t row, int64_t begin, int64_t end) {
          const Vec<T>* const table = table_of(in, block);
          S total[kReceived] = {};
          const bool ok =
              each(in, blocks, block, begin, end, [&](int64_t e, const Features<S>& f, const S* unit) {
                S w[kCount];
                edge_weights<T, PAIR, kCount>(table, in.edges, e, w);
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
    const int64_t blocks = (width + kLanesOf<T> - 1) / kLanesOf<T>;
    const S* const rows = static_cast<const S*>(in.rows);
    Batch<S, kCount> batch;
    std::vector<int> ends;
    const auto add_batch = [&] {
      if (batch.filled == 0) return;
      Vec<T>* const sums = static_cast<Vec<T>*>(out.weight) + batch.block * in.edges.num_rows * kCount;
      if (out.unit[0]) add_geometry<T, PAIR, kCount>(in.edges, out, batch, table_of(in, batch.block));
      if (out.weight && !in.edges.first) add_products<T, PAIR, kCount>(in.edges, batch, sums);
      if (out.weight && in.edges.first) add_products_to_rows<T, PAIR, kCount>(in.edges, batch, ends, sums);
      batch.filled = 0;
    };
    const bool ok = over_chunks(
        in.edges, blocks, row_begin, row_end, [&](int64_t block, int64_t row, int64_t begin, int64_t end) {
          const S* const bars = rows + (row * blocks + block) * kReceived;
          const Vec<T>* const table = table_of(in, block);
          if (block != batch.block) add_batch(), batch.block = block;
          return each(in, blocks, block, begin, end, [&](int64_t e, const Features<S>& f, const S* unit) {
            const Features<S> b = features_of<kReceivers>(bars, unit);
            const int64_t at = batch.filled++;
            batch.edges[at] = e;
            weight_derivatives<PATHS>(f, b, batch.products[at]);
            if (out.unit[0]) {
              S w[kCount];
              edge_weights<T, PAIR, kCount>(table, in.edges, e, w);
              direction_derivative<PATHS>(f, b, w, batch.directions[at]);
            }
            if (batch.filled == kBatchEdges) add_batch();
          });
        });
    add_batch();
    return ok;
  }
};

template <class T, bool PAIR>
CartesianKernels::Set kernels_of(uint32_t set) {
  CartesianKernels::Set found{};
  for_sets([&](auto compiled) {
    using This = decltype(compiled);
    if (set != This::kSet) return;
    using Chosen = Edges<T, PAIR, This::kSet>;
    found = {Chosen::kSenders, Chosen::kReceivers, Chosen::sum, nullptr};
    if constexpr (This::kGradient) found.gradient = Chosen::gradient;
  });
  return found;
}

template <class T>
constexpr CartesianKernels cartesian_of() {
  return {kLanesOf<T>, pack<T>, [](uint32_t set, bool pair) {
            return pair ? kernels_of<T, true>(set) : kernels_of<T, false>(set);
          }};
}

}  // namespace

extern const CartesianKernels cartesian[kNumScalars];
const CartesianKernels cartesian[kNumScalars] = {cartesian_of<float>(), cartesian_of<double>(), {}};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
