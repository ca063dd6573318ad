// Launchers of the weighted sum; conventions in segment.h.
#pragma once

#include "cuda/row_sum.h"

extern "C" {

// out (num_rows, width): sums over the entries e of each row of weight[e] * values[index[e]]; perm may be
// null. weight is float, or double where values are. workspace: row_sum_workspace bytes.
int megagnn_cuda_gather_weighted_sum(int scalar, const void* values, const void* weight, const int64_t* index,
                                     const int64_t* ptr, const int64_t* perm, void* out, int64_t num_rows,
                                     int64_t num_entries, int64_t width, void* workspace, void* stream);

// out (num_entries), of weight's type: left[left_index[e]] . right[right_index[e]].
int megagnn_cuda_gather_dot(int scalar, const void* left, const void* right, const int64_t* left_index,
                            const int64_t* right_index, void* out, int64_t num_entries, int64_t width,
                            void* stream);
}
