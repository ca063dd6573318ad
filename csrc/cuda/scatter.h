// Launcher of the scatter; conventions in segment.h.
#pragma once

#include <cstdint>

extern "C" {

// out (num_rows, width), zeroed here, plus values (num_entries, width) at the rows that index names, by
// atomic additions. sums: num_rows * width floats for bfloat16, which is summed there; else not used.
int megagnn_cuda_scatter_add(int scalar, const void* values, const int64_t* index, void* out,
                             int64_t num_rows, int64_t num_entries, int64_t width, void* sums, void* stream);
}
