#include "cuda/scatter.h"

#include "cuda/scatter.cuh"

using namespace megagnn::cuda;

extern "C" int megagnn_cuda_scatter_add(int scalar, const void* values, const int64_t* index, void* out,
                                        int64_t num_rows, int64_t num_entries, int64_t width, void* sums,
                                        void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  void* to = scalar == 2 ? sums : out;
  const cudaError_t error = cudaMemsetAsync(to, 0, size_t(num_rows * width * (scalar == 1 ? 8 : 4)), s);
  if (error != cudaSuccess) return int(error);
  const auto scatter = scalar == 0   ? scatter_add<float>
                       : scalar == 1 ? scatter_add<double>
                                     : scatter_add<__nv_bfloat16>;
  scatter(values, index, to, out, num_rows, num_entries, width, s);
  return int(cudaGetLastError());
}
