// Compiled once for each SIMD level, into the namespace MEGAGNN_SIMD (setup.py; the level is picked at run
// time). Only <cstdint> is included: an inline function of the standard library compiled here for AVX-512
// could otherwise be the copy that the linker keeps for everyone.
#include "cpu/segment.h"

#include "cpu/row_sum.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

template <class T>
bool sum_rows_of(const RowSumInput& in, void* out, int64_t row_begin, int64_t row_end) {
  return in.perm ? sum_rows<T, Permuted<T>>(in, out, row_begin, row_end)
                 : sum_rows<T, Sequential<T>>(in, out, row_begin, row_end);
}

template <class T>
bool sum_part_of(const RowSumInput& in, void* part, int64_t begin, int64_t end) {
  return in.perm ? sum_part<T, Permuted<T>>(in, part, begin, end)
                 : sum_part<T, Sequential<T>>(in, part, begin, end);
}

// WIDTH columns known when compiling (0: not known), so that narrow rows are copied without a loop or a call.
template <int WIDTH, class T>
bool gather_rows(const GatherInput& in, T* out, int64_t begin, int64_t end) {
  const T* values = static_cast<const T*>(in.values);
  const int64_t width = WIDTH ? WIDTH : in.width;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t row = in.index[e];
    if (__builtin_expect(uint64_t(row) >= uint64_t(in.num_values), 0)) return false;
    __builtin_memcpy(out + e * width, values + row * width, uint64_t(width) * sizeof(T));
  }
  return true;
}

// Rows of whole vectors, without a call for each.
template <class T>
bool gather_vectors(const GatherInput& in, T* out, int64_t begin, int64_t end) {
  const char* values = static_cast<const char*>(in.values);
  const int64_t bytes = in.width * int64_t(sizeof(T));
  char* to = reinterpret_cast<char*>(out) + begin * bytes;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t row = in.index[e];
    if (__builtin_expect(uint64_t(row) >= uint64_t(in.num_values), 0)) return false;
    const char* from = values + row * bytes;
    for (int64_t b = 0; b < bytes; b += kVectorBytes, to += kVectorBytes) {
      const auto v = load(reinterpret_cast<const float*>(from + b));
      __builtin_memcpy(to, &v, sizeof v);
    }
  }
  return true;
}

// Results larger than the cache, of rows of whole cache lines: written past it, which spares the read that an
// ordinary write begins with.
template <class T>
bool gather_past_cache(const GatherInput& in, T* out, int64_t begin, int64_t end) {
  const char* values = static_cast<const char*>(in.values);
  const int64_t bytes = in.width * int64_t(sizeof(T));
  char* to = reinterpret_cast<char*>(out) + begin * bytes;
  bool ok = true;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t row = in.index[e];
    if (__builtin_expect(uint64_t(row) >= uint64_t(in.num_values), 0)) {
      ok = false;
      break;
    }
    if (e + kAhead < end) prefetch_columns(values, in.index[e + kAhead], bytes, 0, bytes);
    const char* from = values + row * bytes;
    for (int64_t b = 0; b < bytes; b += kVectorBytes, to += kVectorBytes)
      store_past_cache(reinterpret_cast<float*>(to), load(reinterpret_cast<const float*>(from + b)));
  }
  end_stores_past_cache();
  return ok;
}

template <class T>
bool gather(const GatherInput& in, void* out_pointer, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(out_pointer);
  if (in.past_cache && in.width * int64_t(sizeof(T)) % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0)
    return gather_past_cache(in, out, begin, end);
  switch (in.width) {
    case 1:
      return gather_rows<1>(in, out, begin, end);
    case 3:
      return gather_rows<3>(in, out, begin, end);
    case 16:
      return gather_rows<16>(in, out, begin, end);
    default:
      if (in.width * int64_t(sizeof(T)) % kVectorBytes == 0) return gather_vectors(in, out, begin, end);
      return gather_rows<0>(in, out, begin, end);
  }
}

template <class T>
constexpr SegmentKernels segment_of() {
  return {{sum_rows_of<T>, sum_part_of<T>, sum_parts<T>}, gather<T>};
}

}  // namespace

extern const SegmentKernels segment[kNumScalars];
const SegmentKernels segment[kNumScalars] = {segment_of<float>(), segment_of<double>(),
                                             segment_of<BFloat16>()};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
