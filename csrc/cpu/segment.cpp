// Compiled once for each SIMD level, into the namespace MEGAGNN_SIMD (setup.py; the level is picked at run
// time). Only <cstdint> is included: an inline function of the standard library compiled here for AVX-512
// could otherwise be the copy that the linker keeps for everyone.
#include "cpu/segment.h"

#include "cpu/vector.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

constexpr int kMaxVectors = 8;  // accumulators held in registers, half of the 16 there are before AVX-512
constexpr int64_t kStreamWidth =
    256;  // from here on entries are read whole, into an accumulator in the L1 cache
constexpr int64_t kStreamBlock = 2048;
constexpr int64_t kAhead = 8;  // entries of perm's random reads that are fetched before their turn

// Where entry k of ptr's order lies in values; sets ok to false and stays in bounds where perm does not.
inline int64_t entry(const SegmentInput& in, int64_t k, bool& ok) {
  if (!in.perm) return k;
  const int64_t e = in.perm[k];
  if (__builtin_expect(uint64_t(e) >= uint64_t(in.num_entries), 0)) {
    ok = false;
    return 0;
  }
  return e;
}

// Asks for `bytes` of the entry that comes kAhead later, of this row or the next, where perm makes reads
// random. An address out of range does no harm: it is never read.
template <class T>
inline void prefetch(const SegmentInput& in, const T* values, int64_t k, int64_t bytes) {
  if (!in.perm || k + kAhead >= in.num_entries) return;
  const auto from =
      reinterpret_cast<uintptr_t>(values) + uintptr_t(in.perm[k + kAhead] * in.width) * sizeof(T);
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(from + uintptr_t(b)));
}

// Columns [column, column + VECTORS * lanes) of the sum over entries [begin, end), held in registers
// throughout.
template <int VECTORS, class T>
inline void sum_vectors(const SegmentInput& in, int64_t begin, int64_t end, int64_t column,
                        Accumulator<T>* sum, bool& ok) {
  using Vector = typename VectorOf<Accumulator<T>>::type;
  constexpr int kLanes = int(sizeof(Vector) / sizeof(Accumulator<T>));
  const T* values = static_cast<const T*>(in.values) + column;
  Vector acc[VECTORS] = {};
  for (int64_t k = begin; k < end; ++k) {
    const T* from = values + entry(in, k, ok) * in.width;
    prefetch(in, values, k, VECTORS * kLanes * int64_t(sizeof(T)));
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[v] += load(from + v * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(sum + column + v * kLanes, &acc[v], sizeof(Vector));
}

template <int COLUMNS, class T>
inline void sum_scalars(const SegmentInput& in, int64_t begin, int64_t end, int64_t column,
                        Accumulator<T>* sum, bool& ok) {
  const T* values = static_cast<const T*>(in.values) + column;
  Accumulator<T> acc[COLUMNS] = {};
  for (int64_t k = begin; k < end; ++k) {
    const T* from = values + entry(in, k, ok) * in.width;
    prefetch(in, values, k, 1);
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) acc[c] += widen(from[c]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < COLUMNS; ++c) sum[column + c] = acc[c];
}

// Narrow rows: tiles of columns in registers, widest first; every tile reads the entries again, from the
// cache.
template <class T>
inline void sum_tiles(const SegmentInput& in, int64_t begin, int64_t end, int64_t column, Accumulator<T>* sum,
                      bool& ok) {
  constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(Accumulator<T>));
  const int64_t width = in.width;
  for (; column + 8 * kLanes <= width; column += 8 * kLanes)
    sum_vectors<8, T>(in, begin, end, column, sum, ok);
  if (column + 4 * kLanes <= width) sum_vectors<4, T>(in, begin, end, column, sum, ok), column += 4 * kLanes;
  if (column + 2 * kLanes <= width) sum_vectors<2, T>(in, begin, end, column, sum, ok), column += 2 * kLanes;
  if (column + kLanes <= width) sum_vectors<1, T>(in, begin, end, column, sum, ok), column += kLanes;
  for (; column + 4 <= width; column += 4) sum_scalars<4, T>(in, begin, end, column, sum, ok);
  if (column + 3 == width) return sum_scalars<3, T>(in, begin, end, column, sum, ok);
  if (column + 2 == width) return sum_scalars<2, T>(in, begin, end, column, sum, ok);
  if (column + 1 == width) return sum_scalars<1, T>(in, begin, end, column, sum, ok);
}

// Wide rows: each entry is read once, in sequence; the accumulator stays in the L1 cache.
template <class T>
inline void sum_stream(const SegmentInput& in, int64_t begin, int64_t end, int64_t column, int64_t columns,
                       Accumulator<T>* __restrict sum, bool& ok) {
  const T* values = static_cast<const T*>(in.values) + column;
  for (int64_t c = 0; c < columns; ++c) sum[c] = 0;
  for (int64_t k = begin; k < end; ++k) {
    const T* __restrict from = values + entry(in, k, ok) * in.width;
    prefetch(in, values, k, columns * int64_t(sizeof(T)) < 1024 ? columns * int64_t(sizeof(T)) : 1024);
    for (int64_t c = 0; c < columns; ++c) sum[c] += widen(from[c]);
  }
}

// Columns [column, column + columns) of the sum over entries [begin, end); columns <= kStreamBlock.
template <class T>
inline void sum_block(const SegmentInput& in, int64_t begin, int64_t end, int64_t column, int64_t columns,
                      Accumulator<T>* sum, bool& ok) {
  if (in.width < kStreamWidth) {
    sum_tiles<T>(in, begin, end, 0, sum, ok);
  } else {
    sum_stream<T>(in, begin, end, column, columns, sum, ok);
  }
}

inline int64_t block_columns(int64_t width, int64_t column) {
  return width - column < kStreamBlock ? width - column : kStreamBlock;
}

template <class T>
bool sum_rows(const SegmentInput& in, void* out_pointer, int64_t row_begin, int64_t row_end) {
  T* out = static_cast<T*>(out_pointer);
  bool ok = true;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t begin = in.ptr[row], end = in.ptr[row + 1];
    if (end - begin > kPartEntries) continue;
    for (int64_t column = 0; column < in.width; column += kStreamBlock) {
      const int64_t columns = block_columns(in.width, column);
      T* to = out + row * in.width + column;
      if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
        sum_block<T>(in, begin, end, column, columns, to, ok);
      } else {
        alignas(64) Accumulator<T> sum[kStreamBlock];
        sum_block<T>(in, begin, end, column, columns, sum, ok);
        for (int64_t c = 0; c < columns; ++c) narrow(sum[c], to + c);
      }
    }
  }
  return ok;
}

template <class T>
bool sum_part(const SegmentInput& in, void* part, int64_t begin, int64_t end) {
  bool ok = true;
  for (int64_t column = 0; column < in.width; column += kStreamBlock) {
    Accumulator<T>* sum = static_cast<Accumulator<T>*>(part) + column;
    sum_block<T>(in, begin, end, column, block_columns(in.width, column), sum, ok);
  }
  return ok;
}

template <class T>
void sum_parts(const void* parts_pointer, int64_t num_parts, void* out, int64_t width) {
  const Accumulator<T>* parts = static_cast<const Accumulator<T>*>(parts_pointer);
  for (int64_t c = 0; c < width; ++c) {
    Accumulator<T> sum = parts[c];
    for (int64_t p = 1; p < num_parts; ++p) sum += parts[p * width + c];
    narrow(sum, static_cast<T*>(out) + c);
  }
}

// WIDTH columns known when compiling (0: not known), so that narrow rows are copied without a loop or a call.
template <int WIDTH, class T>
bool gather_rows(const T* values, const int64_t* index, T* out, int64_t begin, int64_t end, int64_t num_rows,
                 int64_t any_width) {
  const int64_t width = WIDTH ? WIDTH : any_width;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t row = index[e];
    if (__builtin_expect(uint64_t(row) >= uint64_t(num_rows), 0)) return false;
    __builtin_memcpy(out + e * width, values + row * width, uint64_t(width) * sizeof(T));
  }
  return true;
}

template <class T>
bool gather(const void* values_pointer, const int64_t* index, void* out_pointer, int64_t begin, int64_t end,
            int64_t num_rows, int64_t width) {
  const T* values = static_cast<const T*>(values_pointer);
  T* out = static_cast<T*>(out_pointer);
  switch (width) {
    case 1:
      return gather_rows<1>(values, index, out, begin, end, num_rows, width);
    case 3:
      return gather_rows<3>(values, index, out, begin, end, num_rows, width);
    case 16:
      return gather_rows<16>(values, index, out, begin, end, num_rows, width);
    case 32:
      return gather_rows<32>(values, index, out, begin, end, num_rows, width);
    case 64:
      return gather_rows<64>(values, index, out, begin, end, num_rows, width);
    default:
      return gather_rows<0>(values, index, out, begin, end, num_rows, width);
  }
}

}  // namespace

extern const SegmentKernels segment[kNumScalars];
const SegmentKernels segment[kNumScalars] = {
    {sum_rows<float>, sum_part<float>, sum_parts<float>, gather<float>},
    {sum_rows<double>, sum_part<double>, sum_parts<double>, gather<double>},
    {sum_rows<BFloat16>, sum_part<BFloat16>, sum_parts<BFloat16>, gather<BFloat16>},
};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
