// What the bindings of all operations share: tensors through torch's stable ABI (one build serves later
// releases of torch too), checks, allocation, division of the work over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/scalar.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/runtime.h"
#endif

namespace megagnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kSerialElements =
    32768;  // below this the start of a parallel region costs more than it saves
constexpr int64_t kTasksPerThread = 4;

inline Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Absent tensors are empty vectors.
inline bool absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.size(0) == 0; }

inline Tensor zeros(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

template <class T>
const T* data(const Tensor& tensor) {
  return absent(tensor) ? nullptr : static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* out_data(const Tensor& tensor) {
  return absent(tensor) ? nullptr : static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

inline cpu::Scalar scalar_of(const char* operation, const char* backend, const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Float:
      return cpu::kFloat32;
    case ScalarType::Double:
      return cpu::kFloat64;
    case ScalarType::BFloat16:
      return cpu::kBFloat16;
    default:
      fail(operation, backend, "values must be float32, float64 or bfloat16, got ",
           torch::headeronly::toString(values.scalar_type()));
  }
}

// Uninitialised, contiguous, of the type and device of `like`.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  int32_t dtype, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// Uninitialised, of the shape of values but for the first dimension.
inline Tensor new_result(const Tensor& values, int64_t rows) {
  std::vector<int64_t> sizes(values.sizes().begin(), values.sizes().end());
  sizes[0] = rows;
  return new_tensor(values, sizes);
}

// Calls task(i) for i in [0, num_tasks), in parallel; true when every call returned true.
template <class Task>
bool all_of_tasks(int64_t num_tasks, const Task& task) {
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!task(i)) ok.store(false, std::memory_order_relaxed);
    }
  });
  return ok;
}

inline int64_t num_tasks_for(int64_t elements) {
  if (elements < kSerialElements) return 1;
  const int64_t threads = torch::stable::get_num_threads();
  return threads == 1 ? 1 : std::min(threads * kTasksPerThread, elements / (kSerialElements / 4));
}

#ifdef MEGAGNN_WITH_CUDA
inline void check_launch(const char* operation, int error) {
  check(error == 0, operation, "cuda", "the kernel must start, got ", megagnn_cuda_error_string(error));
}
#endif

}  // namespace megagnn
