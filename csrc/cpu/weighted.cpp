// Compiled once for each SIMD level; see cpu/segment.cpp.
#include "cpu/weighted.h"

#include "cpu/row_sum.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

template <class T>
bool weighted_rows(const RowSumInput& in, void* out, int64_t row_begin, int64_t row_end) {
  return in.perm ? sum_rows<T, Weighted<T, true>>(in, out, row_begin, row_end)
                 : sum_rows<T, Weighted<T, false>>(in, out, row_begin, row_end);
}

template <class T>
bool weighted_part(const RowSumInput& in, void* part, int64_t begin, int64_t end) {
  return in.perm ? sum_part<T, Weighted<T, true>>(in, part, begin, end)
                 : sum_part<T, Weighted<T, false>>(in, part, begin, end);
}

// Columns are added up kSums apart and the sums then pairwise, at every SIMD level, so the bits are the same.
constexpr int64_t kSums = 32;

template <class T>
inline Accumulator<T> dot_product(const T* left, const T* right, int64_t width) {
  using Vector = typename VectorOf<Accumulator<T>>::type;
  constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(Accumulator<T>));
  constexpr int kVectors = int(kSums / kLanes);
  Vector sums[kVectors] = {};
  int64_t c = 0;
  for (; c + kSums <= width; c += kSums) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[v] += load(left + c + v * kLanes) * load(right + c + v * kLanes);
  }
  Accumulator<T> partial[kSums];
  __builtin_memcpy(partial, sums, sizeof partial);
  for (int64_t i = 0; c < width; ++c, ++i) partial[i] += widen(left[c]) * widen(right[c]);
#pragma GCC unroll 5
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}

template <class T>
bool dot(const DotInput& in, void* out_pointer, int64_t begin, int64_t end) {
  const T *left = static_cast<const T*>(in.left), *right = static_cast<const T*>(in.right);
  Accumulator<T>* out = static_cast<Accumulator<T>*>(out_pointer);
  for (int64_t e = begin; e < end; ++e) {
    const int64_t i = in.left_index[e], j = in.right_index[e];
    if (__builtin_expect(uint64_t(i) >= uint64_t(in.num_left) || uint64_t(j) >= uint64_t(in.num_right), 0))
      return false;
    if (e + kAhead < end) {
      prefetch_columns(left, in.left_index[e + kAhead], in.width, 0, in.width);
      prefetch_columns(right, in.right_index[e + kAhead], in.width, 0, in.width);
    }
    out[e] = dot_product(left + i * in.width, right + j * in.width, in.width);
  }
  return true;
}

template <class T>
constexpr WeightedKernels weighted_of() {
  return {{weighted_rows<T>, weighted_part<T>, sum_parts<T>}, dot<T>};
}

}  // namespace

extern const WeightedKernels weighted[kNumScalars];
const WeightedKernels weighted[kNumScalars] = {weighted_of<float>(), weighted_of<double>(),
                                               weighted_of<BFloat16>()};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
