#include "cuda/maximum.h"

#include "cuda/maximum.cuh"

using namespace megagnn::cuda;

extern "C" int megagnn_cuda_segment_max(int scalar, const void* values, const int64_t* ptr,
                                        const int64_t* perm, void* out, int64_t* arg, int64_t num_rows,
                                        int64_t width, void* stream) {
  const auto max = scalar == 0   ? segment_max<float>
                   : scalar == 1 ? segment_max<double>
                                 : segment_max<__nv_bfloat16>;
  max(values, ptr, perm, out, arg, num_rows, width, static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}
