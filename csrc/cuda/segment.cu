#include "cuda/segment.h"

#include "cuda/segment.cuh"

using namespace megagnn::cuda;

extern "C" int megagnn_cuda_segment_sum(int scalar, const void* values, const int64_t* ptr,
                                        const int64_t* perm, void* out, int64_t num_rows, int64_t num_entries,
                                        int64_t width, int mean, void* workspace, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (scalar == 0)
    segment_sum<float>(values, ptr, perm, out, num_rows, num_entries, width, mean != 0, workspace, s);
  if (scalar == 1)
    segment_sum<double>(values, ptr, perm, out, num_rows, num_entries, width, mean != 0, workspace, s);
  if (scalar == 2)
    segment_sum<__nv_bfloat16>(values, ptr, perm, out, num_rows, num_entries, width, mean != 0, workspace, s);
  return int(cudaGetLastError());
}

extern "C" int megagnn_cuda_gather(int scalar, const void* values, const int64_t* index, void* out,
                                   int64_t num_entries, int64_t width, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (scalar == 0) gather<float>(values, index, out, num_entries, width, s);
  if (scalar == 1) gather<double>(values, index, out, num_entries, width, s);
  if (scalar == 2) gather<__nv_bfloat16>(values, index, out, num_entries, width, s);
  return int(cudaGetLastError());
}
