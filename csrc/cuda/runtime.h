// What the bindings need of torch's CUDA half. The symbols are weak, so that a library with CUDA kernels also
// loads on a CPU build of torch, where they are absent and no CUDA tensor can exist to need them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "check.h"

#ifndef USE_CUDA  // with it the shim's own header declares them
struct CUDAGuardOpaque;
using CUDAGuardHandle = CUDAGuardOpaque*;
#endif

extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t device_index,
                                                                  CUDAGuardHandle* guard);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
}

namespace megagnn::cuda {

// Makes a device current while it lives; stream() is torch's current stream there.
class DeviceGuard {
 public:
  DeviceGuard(const char* operation, int32_t device) : operation_(operation), device_(device) {
    check(aoti_torch_create_cuda_guard && aoti_torch_create_cuda_guard(device, &guard_) == AOTI_TORCH_SUCCESS,
          operation, "cuda", "torch must offer CUDA devices, got none from this build");
  }
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  void* stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream) == AOTI_TORCH_SUCCESS, operation_, "cuda",
          "torch must name its current stream, got an error");
    return stream;
  }

 private:
  const char* operation_;
  int32_t device_;
  CUDAGuardHandle guard_ = nullptr;
};

}  // namespace megagnn::cuda

extern "C" const char* megagnn_cuda_error_string(int error);  // csrc/cuda/runtime.cu
extern "C" int megagnn_cuda_last_error();                     // of the launches since it was last asked
