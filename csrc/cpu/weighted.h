// CPU kernels of the weighted sum, out[i] = sum over the entries e of row i of weight[e] * values[index[e]],
// and of the dot products per entry, which are its derivative by the weights: plain pointers, no torch.
#pragma once

#include "cpu/segment.h"

namespace megagnn::cpu {

struct DotInput {
  const void *left, *right;                 // (num_left, width), (num_right, width)
  const int64_t *left_index, *right_index;  // (E), (E)
  int64_t num_left, num_right, width;
};

struct WeightedKernels {
  RowSumKernels sum;
  // out[e] = left[left_index[e]] . right[right_index[e]] in the accumulator's type, for e in [begin, end);
  // false at an index out of range.
  bool (*dot)(const DotInput& in, void* out, int64_t begin, int64_t end);
};

}  // namespace megagnn::cpu
