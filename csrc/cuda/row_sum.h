// What the launchers of sums over CSR rows need to know of them.
#pragma once

#include <cstdint>

namespace megagnn::cuda {

// Rows with more entries are summed by several blocks.
constexpr int64_t kSplitEntries = 1024;

// Bytes of the parts of long rows; scalar as in the launchers.
inline int64_t row_sum_workspace(int scalar, int64_t num_entries, int64_t width) {
  if (num_entries <= kSplitEntries) return 0;
  return (num_entries + kSplitEntries - 1) / kSplitEntries * 2 * width * (scalar == 1 ? 8 : 4);
}

}  // namespace megagnn::cuda
