// CPU kernels of sums over CSR rows and of their transpose, the gather: plain pointers, no torch.
// Shapes: values (E, width) row-major; ptr (N+1); perm (E) or null; index (E); out (N, width).
#pragma once

#include <cstdint>

#include "cpu/scalar.h"

namespace megagnn::cpu {

// A row with more entries is summed in parts of this many, in parallel, and the parts then added in order.
// It depends on nothing but the row, so the bits do not depend on the number of threads.
constexpr int64_t kPartEntries = 8192;

struct RowSumInput {
  const void* values;
  const int64_t* ptr;
  const int64_t* perm;  // null where the entries of a row lie one after another
  int64_t num_entries;
  int64_t width;
  bool mean = false;  // divides each sum by the number of its entries
  // Weighted sum (cpu/weighted.h): entry e is weight[e] times row index[e] of the num_values rows of values.
  const int64_t* index = nullptr;
  const void* weight = nullptr;  // in the accumulator's type
  int64_t num_values = 0;
};

// Functions that read perm or index return false at an element out of range.
struct RowSumKernels {
  // Rows [row_begin, row_end) of out; rows longer than kPartEntries are left alone.
  bool (*sum_rows)(const RowSumInput& in, void* out, int64_t row_begin, int64_t row_end);
  // Sum of the entries [begin, end) of ptr's order into part (width), in the accumulator's type.
  bool (*sum_part)(const RowSumInput& in, void* part, int64_t begin, int64_t end);
  // Sum of the parts (num_parts, width) into row `row` of out.
  void (*sum_parts)(const RowSumInput& in, const void* parts, int64_t num_parts, void* out, int64_t row);
};

struct GatherInput {
  const void* values;  // (num_values, width)
  const int64_t* index;
  int64_t num_values;
  int64_t width;
  bool past_cache;  // the result is larger than the cache, so writing it must not evict what is there
};

// One set per scalar type and SIMD level.
struct SegmentKernels {
  RowSumKernels sum;
  // out[e] = values[index[e]] for e in [begin, end).
  bool (*gather)(const GatherInput& in, void* out, int64_t begin, int64_t end);
};

// Size in bytes of what sums are accumulated in: float for bfloat16, else the type itself.
constexpr int64_t accumulator_size(Scalar scalar) { return scalar == kFloat64 ? 8 : 4; }

// The kernels of the SIMD level chosen for this machine (csrc/cpu/simd.cpp).
const SegmentKernels& segment_kernels(Scalar scalar);

}  // namespace megagnn::cpu
