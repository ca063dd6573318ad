// CPU kernels of the segment sum and its transpose, the gather: plain pointers, no torch.
// Shapes: values (E, width) row-major; ptr (N+1); perm (E) or null; index (E); out (N, width).
#pragma once

#include <cstdint>

#include "cpu/scalar.h"

namespace megagnn::cpu {

// A row with more entries is summed in parts of this many, in parallel, and the parts then added in order.
// It depends on nothing but the row, so the bits do not depend on the number of threads.
constexpr int64_t kPartEntries = 8192;

struct SegmentInput {
  const void* values;
  const int64_t* ptr;
  const int64_t* perm;  // null where the entries of a row lie one after another
  int64_t num_entries;
  int64_t width;
};

// One set per scalar type and SIMD level. Functions that read perm or index return false at an entry out of
// range.
struct SegmentKernels {
  // Rows [row_begin, row_end) of out; rows longer than kPartEntries are left alone.
  bool (*sum_rows)(const SegmentInput& in, void* out, int64_t row_begin, int64_t row_end);
  // Sum of the entries [begin, end) of ptr's order into part (width), in the accumulator's type.
  bool (*sum_part)(const SegmentInput& in, void* part, int64_t begin, int64_t end);
  // Sum of the parts (num_parts, width) into one row of out (width).
  void (*sum_parts)(const void* parts, int64_t num_parts, void* out, int64_t width);
  // out[e] = values[index[e]] for e in [begin, end), values of num_rows rows.
  bool (*gather)(const void* values, const int64_t* index, void* out, int64_t begin, int64_t end,
                 int64_t num_rows, int64_t width);
};

// Size in bytes of what sums are accumulated in: float for bfloat16, else the type itself.
constexpr int64_t accumulator_size(Scalar scalar) { return scalar == kFloat64 ? 8 : 4; }

// The kernels of the SIMD level chosen for this machine (csrc/cpu/simd.cpp).
const SegmentKernels& segment_kernels(Scalar scalar);

}  // namespace megagnn::cpu
