// Compiled once for each SIMD level; see cpu/segment.cpp.
#include "cpu/maximum.h"

#include "cpu/row_sum.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

constexpr int64_t kColumns = 64;  // held in the L1 cache with their positions

template <class T>
struct Position {
  using type = int32_t;  // as wide as what is compared, so that the loop over columns becomes vectors
};
template <>
struct Position<double> {
  using type = int64_t;
};

// value takes the place of best. Not for equal values: the first stays. A NaN does, and then stays.
template <class A>
inline bool replaces(A value, A best) {
  return !(value <= best) & (best == best);
}

template <class T, class Entries>
bool max_part_of(const RowSumInput& in, void* out_pointer, int64_t* arg, int64_t begin, int64_t end) {
  const Entries entries(in);
  T* out = static_cast<T*>(out_pointer);
  bool ok = true;
  for (int64_t column = 0; column < in.width; column += kColumns) {
    const int64_t columns = in.width - column < kColumns ? in.width - column : kColumns;
    Accumulator<T> best[kColumns];
    typename Position<T>::type at[kColumns] = {};  // from begin; a part has at most kPartEntries
    const T* first = entries.from(begin, ok) + column;
    for (int64_t c = 0; c < columns; ++c) best[c] = widen(first[c]);
    for (int64_t k = begin + 1; k < end; ++k) {
      const T* from = entries.from(k, ok) + column;
      entries.prefetch(k, column, columns);
      const auto position = typename Position<T>::type(k - begin);
      for (int64_t c = 0; c < columns; ++c) {
        const Accumulator<T> value = widen(from[c]);
        const bool better = replaces(value, best[c]);
        best[c] = better ? value : best[c];
        at[c] = better ? position : at[c];
      }
    }
    for (int64_t c = 0; c < columns; ++c) {
      narrow(best[c], out + column + c);
      arg[column + c] = in.perm ? in.perm[begin + at[c]] : begin + at[c];
    }
  }
  return ok;
}

template <class T>
bool max_part(const RowSumInput& in, void* out, int64_t* arg, int64_t begin, int64_t end) {
  return in.perm ? max_part_of<T, Permuted<T>>(in, out, arg, begin, end)
                 : max_part_of<T, Sequential<T>>(in, out, arg, begin, end);
}

template <class T>
bool max_rows(const RowSumInput& in, void* out_pointer, int64_t* arg, int64_t row_begin, int64_t row_end) {
  T* out = static_cast<T*>(out_pointer);
  bool ok = true;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t begin = in.ptr[row], end = in.ptr[row + 1];
    if (end - begin > kPartEntries) continue;
    if (end > begin) {
      ok &= max_part<T>(in, out + row * in.width, arg + row * in.width, begin, end);
      continue;
    }
    for (int64_t c = row * in.width; c < (row + 1) * in.width; ++c) {
      narrow(Accumulator<T>(0), out + c);
      arg[c] = -1;
    }
  }
  return ok;
}

template <class T>
void max_parts(const void* parts_pointer, const int64_t* part_args, int64_t num_parts, int64_t width,
               void* out_pointer, int64_t* arg) {
  const T* parts = static_cast<const T*>(parts_pointer);
  T* out = static_cast<T*>(out_pointer);
  for (int64_t c = 0; c < width; ++c) {
    int64_t best = c;
    for (int64_t i = c + width; i < num_parts * width; i += width) {
      if (replaces(widen(parts[i]), widen(parts[best]))) best = i;
    }
    out[c] = parts[best];
    arg[c] = part_args[best];
  }
}

template <class T>
constexpr MaximumKernels maximum_of() {
  return {max_rows<T>, max_part<T>, max_parts<T>};
}

}  // namespace

extern const MaximumKernels maximum[kNumScalars];
const MaximumKernels maximum[kNumScalars] = {maximum_of<float>(), maximum_of<double>(),
                                             maximum_of<BFloat16>()};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
