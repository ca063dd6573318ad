// CUDA kernels of the Cartesian family's edge operation (megagnn/models/cartesian/edge.py). A lane is a
// channel: features are read side by side, and what belongs to an edge alone from one address. No atomics:
// each sum is made in an order that depends on the edges alone.
#pragma once

#include "cartesian_message.h"
#include "cuda/cartesian_edge.h"
#include "cuda/vector.cuh"

namespace megagnn::cuda {

// Radial functions whose gradients a thread has in registers: of weights, and of the functions.
template <class T>
constexpr int kWeightTile = 16 / sizeof(T);
template <class T>
constexpr int kBasisTile = 32 / sizeof(T);

// Where a component of a field, which has 1, 3 or 5, is in (atoms, components, width).
__device__ __forceinline__ int64_t number_at(int64_t atom, int field, int component, int64_t width,
                                             int64_t c) {
  return (atom * (2 * field + 1) + component) * width + c;
}

// The numbers of an atom in a channel, tensors as matrices.
template <int FIELDS, class T, bool PAIR>
__device__ __forceinline__ void load_atom(const void* const* fields, int64_t num_rows, int64_t row,
                                          int64_t width, int64_t c, bool exchange,
                                          cartesian::Number<T, PAIR>* out) {
  cartesian::for_planes<PAIR>([&](auto plane) {
    const int64_t at = (PAIR && exchange ? 1 - plane : int(plane)) * num_rows + row;
    const auto load = [&](int field, int component) {
      return static_cast<const T*>(fields[field])[number_at(at, field, component, width, c)];
    };
    cartesian::plane_of(out[0], plane) = load(0, 0);
    if constexpr ((FIELDS & 2) != 0) {
#pragma unroll
      for (int k = 0; k < 3; ++k) cartesian::plane_of(out[1 + k], plane) = load(1, k);
    }
    if constexpr ((FIELDS & 4) != 0) {
      T five[5], matrix[6];
#pragma unroll
      for (int k = 0; k < 5; ++k) five[k] = load(2, k);
      cartesian::to_matrix<T>(five, matrix);
#pragma unroll
      for (int k = 0; k < 6; ++k) {
        cartesian::plane_of(out[(FIELDS & 2 ? 4 : 1) + k], plane) = matrix[k];
      }
    }
  });
}

template <class T, bool PAIR>
__device__ __forceinline__ void load_unit(const CartesianProblem& in, int64_t e,
                                          cartesian::Number<T, PAIR>* unit) {
  cartesian::for_planes<PAIR>([&](auto plane) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      cartesian::plane_of(unit[k], plane) =
          static_cast<const T*>(in.unit)[(plane * in.num_edges + e) * 3 + k];
    }
  });
}

__device__ __forceinline__ int64_t first_weight(const CartesianProblem& in, int64_t e) {
  return in.first ? in.first[e] : 0;
}

// The weights of an edge in a channel.
template <class T, bool PAIR, int COUNT>
__device__ __forceinline__ void edge_weights(const CartesianProblem& in, int64_t e, int64_t c,
                                             cartesian::Number<T, PAIR>* w) {
  const T* table = static_cast<const T*>(in.table) + first_weight(in, e) * COUNT * in.width + c;
  const T* const basis = static_cast<const T*>(in.basis) + e * in.num_radial;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) w[k] = {};
#pragma unroll 1
  for (int64_t n = 0; n < in.num_radial; ++n, table += COUNT * in.width) {
    cartesian::Number<T, PAIR> b;
    cartesian::for_planes<PAIR>(
        [&](auto plane) { cartesian::plane_of(b, plane) = basis[plane * in.num_edges * in.num_radial + n]; });
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const T weight = table[k * in.width];
      cartesian::for_planes<PAIR>(
          [&](auto plane) { cartesian::plane_of(w[k], plane) += cartesian::plane_of(b, plane) * weight; });
    }
  }
}

// One warp per row of receivers and 32 channels; it walks over the row's edges with its sums in registers.
template <class T, bool PAIR, uint32_t PATHS>
__global__ void __launch_bounds__(kBlockThreads) cartesian_sum(const __grid_constant__ CartesianProblem in) {
  using namespace cartesian;
  using S = Number<T, PAIR>;
  using This = Set<PATHS>;
  constexpr int kReceivers = This::kReceivers;
  const int64_t row = warp_number(), c = channel();
  if (row >= in.num_rows || c >= in.width) return;
  S total[This::kReceived] = {};
#pragma unroll 1
  for (int64_t k = in.ptr[row]; k < in.ptr[row + 1]; ++k) {
    const int64_t e = in.perm ? in.perm[k] : k;
    S w[This::kCount], unit[3], sender[This::kSent];
    edge_weights<T, PAIR, This::kCount>(in, e, c, w);
    load_unit<T, PAIR>(in, e, unit);
    load_atom<This::kSenders, T, PAIR>(in.features, in.num_others, in.other[e], in.width, c, in.exchanged,
                                       sender);
    add_message<PATHS>(features_of<This::kSenders>(sender, unit), unit, w, total);
  }
  for_planes<PAIR>([&](auto plane) {
    const int64_t at = (PAIR && in.exchanged ? 1 - plane : int(plane)) * in.num_rows + row;
    const auto store = [&](int field, int component, T x) {
      static_cast<T*>(in.sums[field])[number_at(at, field, component, in.width, c)] = x;
    };
    store(0, 0, plane_of(total[0], plane));
    if constexpr ((kReceivers & 2) != 0) {
#pragma unroll
      for (int k = 0; k < 3; ++k) store(1, k, plane_of(total[1 + k], plane));
    }
    if constexpr ((kReceivers & 4) != 0) {
      T matrix[6], five[5];
#pragma unroll
      for (int k = 0; k < 6; ++k) matrix[k] = plane_of(total[(kReceivers & 2 ? 4 : 1) + k], plane);
      from_matrix<T>(matrix, five);
#pragma unroll
      for (int k = 0; k < 5; ++k) store(2, k, five[k]);
    }
  });
}

// The features of an edge's sender, and the cotangents of its receiver's sums.
template <class T, bool PAIR, uint32_t PATHS>
struct BothEnds {
  using S = cartesian::Number<T, PAIR>;
  using Paths = cartesian::Set<PATHS>;
  static constexpr int kSenders = Paths::kSenders, kReceivers = Paths::kReceivers;
  S unit[3], sender[Paths::kSent], bar[Paths::kReceived];

  __device__ __forceinline__ BothEnds(const CartesianProblem& in, int64_t e, int64_t c) {
    load_unit<T, PAIR>(in, e, unit);
    load_atom<kSenders, T, PAIR>(in.features, in.num_others, in.other[e], in.width, c, false, sender);
    load_atom<kReceivers, T, PAIR>(in.bars, in.num_rows, in.index[e], in.width, c, true, bar);
  }
  __device__ __forceinline__ void products(S* x) const {
    cartesian::weight_derivatives<PATHS>(cartesian::features_of<kSenders>(sender, unit),
                                         cartesian::features_of<kReceivers>(bar, unit), x);
  }
  __device__ __forceinline__ void direction(const S* w, S* out) const {
    cartesian::direction_derivative<PATHS>(cartesian::features_of<kSenders>(sender, unit),
                                           cartesian::features_of<kReceivers>(bar, unit), w, out);
  }
};

// out[plane, at] = the sums of x over a warp, whose planes come exchanged.
template <class T, bool PAIR>
__device__ __forceinline__ void store_sum(const cartesian::Number<T, PAIR>& x, void* out, int64_t size,
                                          int64_t at) {
  cartesian::for_planes<PAIR>([&](auto plane) {
    const T sum = warp_sum(cartesian::plane_of(x, plane));
    constexpr int kTo = PAIR ? 1 - decltype(plane)::value : 0;
    if (threadIdx.x % kWarp == 0) static_cast<T*>(out)[kTo * size + at] = sum;
  });
}

// One warp per edge, lanes over channels, whose sums meet by shuffles: gradients of the direction, then of
// some radial functions at a time, for which the edge's features are read once more, from the cache.
template <class T, bool PAIR, uint32_t PATHS>
__global__ void __launch_bounds__(kBlockThreads)
    cartesian_geometry(const __grid_constant__ CartesianProblem in) {
  using namespace cartesian;
  using S = Number<T, PAIR>;
  constexpr int kCount = Set<PATHS>::kCount, kTile = kBasisTile<T>;
  const int64_t e = warp_number(), lane = threadIdx.x % kWarp;
  if (e >= in.num_edges) return;
  S direction[3] = {};
#pragma unroll 1
  for (int64_t c = lane; c < in.width; c += kWarp) {
    S w[kCount], here[3];
    edge_weights<T, PAIR, kCount>(in, e, c, w);
    BothEnds<T, PAIR, PATHS>(in, e, c).direction(w, here);
#pragma unroll
    for (int k = 0; k < 3; ++k) direction[k] += here[k];
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) store_sum<T, PAIR>(direction[k], in.unit_bar, in.num_edges * 3, e * 3 + k);
#pragma unroll 1
  for (int64_t n = 0; n < in.num_radial; n += kTile) {
    S sums[kTile] = {};
#pragma unroll 1
    for (int64_t c = lane; c < in.width; c += kWarp) {
      S x[kCount];
      BothEnds<T, PAIR, PATHS>(in, e, c).products(x);
      const T* table = static_cast<const T*>(in.table) + (first_weight(in, e) + n) * kCount * in.width + c;
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (n + i >= in.num_radial) break;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const T weight = table[(i * kCount + k) * in.width];
          for_planes<PAIR>([&](auto plane) { plane_of(sums[i], plane) += weight * plane_of(x[k], plane); });
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (n + i < in.num_radial)
        store_sum<T, PAIR>(sums[i], in.basis_bar, in.num_edges * in.num_radial, e * in.num_radial + n + i);
    }
  }
}

// One warp per run of edges, 32 channels and some rows of the table, whose gradients it sums in registers.
// Edges with no radial function among those rows are passed over, 32 at a time.
template <class T, bool PAIR, uint32_t PATHS>
__global__ void __launch_bounds__(kBlockThreads)
    cartesian_weight_parts(const __grid_constant__ CartesianProblem in) {
  using namespace cartesian;
  constexpr int kCount = Set<PATHS>::kCount, kTile = kWeightTile<T>;
  const int64_t part = warp_number(), c = channel(), row = int64_t(blockIdx.z) * kTile;
  if (part >= in.num_parts) return;
  const int64_t end = in.num_edges * (part + 1) / in.num_parts;
  T sums[kTile][kCount] = {};
#pragma unroll 1
  for (int64_t begin = in.num_edges * part / in.num_parts; begin < end; begin += kWarp) {
    const int64_t mine = begin + threadIdx.x % kWarp, offset = mine < end ? row - first_weight(in, mine) : 0;
    unsigned some = __ballot_sync(kAllLanes, mine < end && offset < in.num_radial && offset + kTile > 0);
#pragma unroll 1
    for (; some && c < in.width; some &= some - 1) {
      const int64_t e = begin + __ffs(int(some)) - 1, n = row - first_weight(in, e);
      Number<T, PAIR> x[kCount];
      BothEnds<T, PAIR, PATHS>(in, e, c).products(x);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (n + i < 0 || n + i >= in.num_radial) continue;
        for_planes<PAIR>([&](auto plane) {
          const T b = static_cast<const T*>(in.basis)[(plane * in.num_edges + e) * in.num_radial + n + i];
          constexpr auto of = exchanged<PAIR>(decltype(plane){});
#pragma unroll
          for (int k = 0; k < kCount; ++k) sums[i][k] += b * plane_of(x[k], of);
        });
      }
    }
  }
  T* const out = static_cast<T*>(in.parts) + (part * in.num_weights + row) * kCount * in.width + c;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (c >= in.width || row + i >= in.num_weights) break;
#pragma unroll
    for (int k = 0; k < kCount; ++k) out[(i * kCount + k) * in.width] = sums[i][k];
  }
}

// Where number i of the table (num_weights, paths, width) is among the weights (paths, width, num_weights).
__device__ __forceinline__ int64_t weight_at(const CartesianProblem& in, int num_paths, int64_t i) {
  const int64_t c = i % in.width, path = i / in.width % num_paths, n = i / (in.width * num_paths);
  return (in.order[path] * in.width + c) * in.num_weights + n;
}

// One thread per weight: the table, in which lanes read channels side by side.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    cartesian_table(const __grid_constant__ CartesianProblem in, int num_paths, int64_t size) {
  const int64_t i = thread_number();
  if (i < size) static_cast<T*>(in.table)[i] = static_cast<const T*>(in.weight)[weight_at(in, num_paths, i)];
}

// One thread per weight: its gradients of all parts, added up in their order.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    cartesian_add_parts(const __grid_constant__ CartesianProblem in, int num_paths, int64_t size) {
  const int64_t i = thread_number();
  if (i >= size) return;
  T sum = 0;
  for (int64_t part = 0; part < in.num_parts; ++part) sum += static_cast<const T*>(in.parts)[part * size + i];
  static_cast<T*>(in.weight_bar)[weight_at(in, num_paths, i)] = sum;
}

}  // namespace megagnn::cuda
