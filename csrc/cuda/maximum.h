// Launcher of the segment maximum; conventions in segment.h.
#pragma once

#include <cstdint>

extern "C" {

// out (num_rows, width): maxima of values[perm[ptr[i]:ptr[i+1]]]; arg (num_rows, width): the entries they
// were taken from, the first of equal ones; 0 and -1 for rows without entries. perm may be null.
int megagnn_cuda_segment_max(int scalar, const void* values, const int64_t* ptr, const int64_t* perm,
                             void* out, int64_t* arg, int64_t num_rows, int64_t width, void* stream);
}
