#include "cuda/weighted.h"

#include "cuda/weighted.cuh"

using namespace megagnn::cuda;

extern "C" int megagnn_cuda_gather_weighted_sum(int scalar, const void* values, const void* weight,
                                                const int64_t* index, const int64_t* ptr, const int64_t* perm,
                                                void* out, int64_t num_rows, int64_t num_entries,
                                                int64_t width, void* workspace, void* stream) {
  const auto sum = scalar == 0   ? gather_weighted_sum<float>
                   : scalar == 1 ? gather_weighted_sum<double>
                                 : gather_weighted_sum<__nv_bfloat16>;
  sum(values, weight, index, ptr, perm, out, num_rows, num_entries, width, workspace,
      static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}

extern "C" int megagnn_cuda_gather_dot(int scalar, const void* left, const void* right,
                                       const int64_t* left_index, const int64_t* right_index, void* out,
                                       int64_t num_entries, int64_t width, void* stream) {
  const auto dot = scalar == 0   ? gather_dot<float>
                   : scalar == 1 ? gather_dot<double>
                                 : gather_dot<__nv_bfloat16>;
  dot(left, right, left_index, right_index, out, num_entries, width, static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}
