// Sums over CSR rows: what the kernels of the segment sum (cpu/segment.cpp) and of the weighted sum
// (cpu/weighted.cpp) are made of. Included by sources compiled once per SIMD level, and by nothing else.
//
// [Note: order of a sum] Every column of a row is added up entry after entry, whichever way below is taken,
// and rows longer than kPartEntries in parts of that many. So the bits depend on the row alone: not on the
// number of threads, not on the SIMD level, not on the width.
#pragma once

#include <cstdint>

#include "cpu/segment.h"
#include "cpu/vector.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

constexpr int64_t kStreamWidth =
    256;  // from here on entries are read whole, into accumulators in the L1 cache
constexpr int64_t kStreamBlock = 2048;
// Entries added at a time there, which spares loads and stores of the accumulator. Entries in
// sequence of less than kTogetherBytes are added one by one: the processor reads a single stream faster.
constexpr int kTogether = 4;
constexpr int64_t kTogetherBytes = 4096;
constexpr int64_t kStreamAhead = 4096;  // bytes; the hardware's own prefetch stops at the end of a page
constexpr int64_t kAhead = 8;           // entries of a random read that are fetched before their turn
constexpr int64_t kFetchBytes = 1024;   // of a wide entry; the hardware follows from there

// The entries of all rows, in ptr's order: from(k) is where entry k lies, weight(k) what it is multiplied by.
// An entry out of range clears `ok` and reads the first instead; prefetch(k, ...) asks for a later one's
// columns.
template <class T>
struct Sequential {
  static constexpr bool kWeighted = false, kInSequence = true;
  const T* values;
  int64_t width;

  explicit Sequential(const RowSumInput& in) : values(static_cast<const T*>(in.values)), width(in.width) {}
  const T* from(int64_t k, bool&) const { return values + k * width; }
  Accumulator<T> weight(int64_t) const { return 1; }
  void prefetch(int64_t, int64_t, int64_t) const {}
};

template <class T>
inline void prefetch_columns(const T* values, int64_t row, int64_t width, int64_t column, int64_t columns) {
  // An integer, because the address may lie outside: it is never read.
  const auto from = reinterpret_cast<uintptr_t>(values) + uintptr_t(row * width + column) * sizeof(T);
  const int64_t bytes =
      columns * int64_t(sizeof(T)) < kFetchBytes ? columns * int64_t(sizeof(T)) : kFetchBytes;
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(from + uintptr_t(b)));
}

template <class T>
struct Permuted {
  static constexpr bool kWeighted = false, kInSequence = false;
  const T* values;
  const int64_t* perm;
  int64_t num_entries, width;

  explicit Permuted(const RowSumInput& in)
      : values(static_cast<const T*>(in.values)),
        perm(in.perm),
        num_entries(in.num_entries),
        width(in.width) {}
  const T* from(int64_t k, bool& ok) const {
    const int64_t e = perm[k];
    if (__builtin_expect(uint64_t(e) < uint64_t(num_entries), 1)) return values + e * width;
    ok = false;
    return values;
  }
  Accumulator<T> weight(int64_t) const { return 1; }
  void prefetch(int64_t k, int64_t column, int64_t columns) const {
    if (k + kAhead < num_entries) prefetch_columns(values, perm[k + kAhead], width, column, columns);
  }
};

template <class T, bool PERM>
struct Weighted {
  static constexpr bool kWeighted = true, kInSequence = false;
  const T* values;
  const int64_t *perm, *index;
  const Accumulator<T>* weights;
  int64_t num_entries, num_values, width;

  explicit Weighted(const RowSumInput& in)
      : values(static_cast<const T*>(in.values)),
        perm(in.perm),
        index(in.index),
        weights(static_cast<const Accumulator<T>*>(in.weight)),
        num_entries(in.num_entries),
        num_values(in.num_values),
        width(in.width) {}
  const T* from(int64_t k, bool& ok) const {
    const int64_t e = PERM ? perm[k] : k;
    if (__builtin_expect(!PERM || uint64_t(e) < uint64_t(num_entries), 1)) {
      const int64_t row = index[e];
      if (__builtin_expect(uint64_t(row) < uint64_t(num_values), 1)) return values + row * width;
    }
    ok = false;
    return values;
  }
  Accumulator<T> weight(int64_t k) const {
    if (!PERM) return weights[k];
    return uint64_t(perm[k]) < uint64_t(num_entries) ? weights[perm[k]] : 0;
  }
  void prefetch(int64_t k, int64_t column, int64_t columns) const {
    if (k + kAhead >= num_entries) return;
    const int64_t e = PERM ? perm[k + kAhead] : k + kAhead;
    if (!PERM || uint64_t(e) < uint64_t(num_entries))
      prefetch_columns(values, index[e], width, column, columns);
  }
};

template <class T, class Entries, class Value>
inline Value term(const Entries& entries, int64_t k, Value value) {
  if constexpr (Entries::kWeighted) return value * entries.weight(k);
  return value;
}

// Columns [column, column + VECTORS * lanes) of the sum over entries [begin, end), held in registers
// throughout.
template <int VECTORS, class T, class Entries>
inline void sum_vectors(const Entries& entries, int64_t begin, int64_t end, int64_t column,
                        Accumulator<T>* sum, bool& ok) {
  using Vector = typename VectorOf<Accumulator<T>>::type;
  constexpr int kLanes = int(sizeof(Vector) / sizeof(Accumulator<T>));
  Vector acc[VECTORS] = {};
  for (int64_t k = begin; k < end; ++k) {
    const T* from = entries.from(k, ok) + column;
    entries.prefetch(k, column, VECTORS * kLanes);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[v] += term<T>(entries, k, load(from + v * kLanes));
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(sum + column + v * kLanes, &acc[v], sizeof(Vector));
}

template <int COLUMNS, class T, class Entries>
inline void sum_scalars(const Entries& entries, int64_t begin, int64_t end, int64_t column,
                        Accumulator<T>* sum, bool& ok) {
  Accumulator<T> acc[COLUMNS] = {};
  for (int64_t k = begin; k < end; ++k) {
    const T* from = entries.from(k, ok) + column;
    entries.prefetch(k, column, COLUMNS);
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) acc[c] += term<T>(entries, k, widen(from[c]));
  }
#pragma GCC unroll 4
  for (int c = 0; c < COLUMNS; ++c) sum[column + c] = acc[c];
}

// Narrow rows: tiles of columns in registers, widest first; every tile reads the entries again, from the
// cache.
template <class T, class Entries>
inline void sum_tiles(const Entries& in, int64_t begin, int64_t end, Accumulator<T>* sum, bool& ok) {
  constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(Accumulator<T>));
  const int64_t width = in.width;
  int64_t column = 0;
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

// Adds columns [column, column + columns) of ENTRIES entries from k on, one after another, to sum.
template <int ENTRIES, class T, class Entries>
inline void add_entries(const Entries& entries, int64_t k, int64_t column, int64_t columns,
                        Accumulator<T>* __restrict sum, bool& ok) {
  using Vector = typename VectorOf<Accumulator<T>>::type;
  constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(Accumulator<T>));
  const T* from[ENTRIES];
  Accumulator<T> weight[ENTRIES];
#pragma GCC unroll 8
  for (int i = 0; i < ENTRIES; ++i) {
    from[i] = entries.from(k + i, ok) + column;
    weight[i] = entries.weight(k + i);
    entries.prefetch(k + i, column, columns);
  }
  const auto add = [&](int64_t c) {
    Vector acc = load(sum + c);
#pragma GCC unroll 8
    for (int i = 0; i < ENTRIES; ++i) {
      const Vector value = load(from[i] + c);
      acc += Entries::kWeighted ? value * weight[i] : value;
    }
    __builtin_memcpy(sum + c, &acc, sizeof acc);
  };
  int64_t c = 0;
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));  // elements in a line of the cache
  for (; Entries::kInSequence && c + kLine <= columns; c += kLine) {
#pragma GCC unroll 8
    for (int i = 0; i < ENTRIES; ++i)
      __builtin_prefetch(reinterpret_cast<const char*>(from[i] + c) + kStreamAhead);
#pragma GCC unroll 8
    for (int64_t v = 0; v < kLine; v += kLanes) add(c + v);
  }
  for (; c + kLanes <= columns; c += kLanes) add(c);
  for (; c < columns; ++c) {
#pragma GCC unroll 8
    for (int i = 0; i < ENTRIES; ++i) {
      const Accumulator<T> value = widen(from[i][c]);
      sum[c] += Entries::kWeighted ? value * weight[i] : value;
    }
  }
}

// Wide rows: entries are read once, some at a time, in sequence; the accumulator stays in the L1 cache.
template <class T, class Entries>
inline void sum_stream(const Entries& entries, int64_t begin, int64_t end, int64_t column, int64_t columns,
                       Accumulator<T>* sum, bool& ok) {
  for (int64_t c = 0; c < columns; ++c) sum[c] = 0;
  int64_t k = begin;
  const bool together = !Entries::kInSequence || columns * int64_t(sizeof(T)) >= kTogetherBytes;
  for (; together && k + kTogether <= end; k += kTogether)
    add_entries<kTogether, T>(entries, k, column, columns, sum, ok);
  for (; k < end; ++k) add_entries<1, T>(entries, k, column, columns, sum, ok);
}

// Columns [column, column + columns) of the sum over entries [begin, end); columns <= kStreamBlock.
template <class T, class Entries>
inline void sum_block(const Entries& entries, int64_t begin, int64_t end, int64_t column, int64_t columns,
                      Accumulator<T>* sum, bool& ok) {
  if (entries.width < kStreamWidth) {
    sum_tiles<T>(entries, begin, end, sum, ok);
  } else {
    sum_stream<T>(entries, begin, end, column, columns, sum, ok);
  }
}

inline int64_t block_columns(int64_t width, int64_t column) {
  return width - column < kStreamBlock ? width - column : kStreamBlock;
}

template <class T, class Entries>
bool sum_rows(const RowSumInput& in, void* out_pointer, int64_t row_begin, int64_t row_end) {
  const Entries entries(in);
  T* out = static_cast<T*>(out_pointer);
  bool ok = true;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t begin = in.ptr[row], end = in.ptr[row + 1];
    if (end - begin > kPartEntries) continue;
    const Accumulator<T> count = Accumulator<T>(in.mean && end > begin ? end - begin : 1);
    for (int64_t column = 0; column < in.width; column += kStreamBlock) {
      const int64_t columns = block_columns(in.width, column);
      T* to = out + row * in.width + column;
      if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
        sum_block<T>(entries, begin, end, column, columns, to, ok);
        if (in.mean)
          for (int64_t c = 0; c < columns; ++c) to[c] /= count;
      } else {
        alignas(64) Accumulator<T> sum[kStreamBlock];
        sum_block<T>(entries, begin, end, column, columns, sum, ok);
        if (in.mean)
          for (int64_t c = 0; c < columns; ++c) sum[c] /= count;
        for (int64_t c = 0; c < columns; ++c) narrow(sum[c], to + c);
      }
    }
  }
  return ok;
}

template <class T, class Entries>
bool sum_part(const RowSumInput& in, void* part, int64_t begin, int64_t end) {
  const Entries entries(in);
  bool ok = true;
  for (int64_t column = 0; column < in.width; column += kStreamBlock) {
    Accumulator<T>* sum = static_cast<Accumulator<T>*>(part) + column;
    sum_block<T>(entries, begin, end, column, block_columns(in.width, column), sum, ok);
  }
  return ok;
}

template <class T>
void sum_parts(const RowSumInput& in, const void* parts_pointer, int64_t num_parts, void* out_pointer,
               int64_t row) {
  const Accumulator<T>* parts = static_cast<const Accumulator<T>*>(parts_pointer);
  T* out = static_cast<T*>(out_pointer) + row * in.width;
  const Accumulator<T> count = Accumulator<T>(in.mean ? in.ptr[row + 1] - in.ptr[row] : 1);
  for (int64_t c = 0; c < in.width; ++c) {
    Accumulator<T> sum = parts[c];
    for (int64_t p = 1; p < num_parts; ++p) sum += parts[p * in.width + c];
    narrow(in.mean ? sum / count : sum, out + c);
  }
}

}  // namespace
}  // namespace megagnn::cpu::MEGAGNN_SIMD
