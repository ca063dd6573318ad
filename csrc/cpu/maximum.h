// CPU kernels of the maximum over CSR rows: plain pointers, no torch.
#pragma once

#include "cpu/segment.h"

namespace megagnn::cpu {

// In all of them arg (.., width) is the entry whose value was taken, the first of equal ones in ptr's order;
// a NaN counts as larger than any number. A row without entries gives 0 and -1.
struct MaximumKernels {
  // Rows [row_begin, row_end) of out and arg; rows longer than kPartEntries are left alone.
  bool (*max_rows)(const RowSumInput& in, void* out, int64_t* arg, int64_t row_begin, int64_t row_end);
  // Maximum of the entries [begin, end) of ptr's order, into out (width) and arg (width).
  bool (*max_part)(const RowSumInput& in, void* out, int64_t* arg, int64_t begin, int64_t end);
  // Maximum of parts (num_parts, width), with their args, into out and arg (width).
  void (*max_parts)(const void* parts, const int64_t* part_args, int64_t num_parts, int64_t width, void* out,
                    int64_t* arg);
};

}  // namespace megagnn::cpu
