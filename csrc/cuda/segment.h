// Launchers of the CUDA kernels: plain pointers, no torch, no CUDA headers. Each returns a cudaError_t, 0 for
// success. scalar: 0 float32, 1 float64, 2 bfloat16. Contents of ptr, perm and index are trusted: checking
// them would wait for the device at every call.
#pragma once

#include "cuda/row_sum.h"

extern "C" {

// out (num_rows, width): sums, or with mean means, of values[perm[ptr[i]:ptr[i+1]]]; perm may be null.
// workspace: row_sum_workspace bytes.
int megagnn_cuda_segment_sum(int scalar, const void* values, const int64_t* ptr, const int64_t* perm,
                             void* out, int64_t num_rows, int64_t num_entries, int64_t width, int mean,
                             void* workspace, void* stream);

// out (num_entries, width) = values[index].
int megagnn_cuda_gather(int scalar, const void* values, const int64_t* index, void* out, int64_t num_entries,
                        int64_t width, void* stream);
}
