// Memory and matrix products for the drivers, on the CPU and on CUDA, of the libraries that torch brings.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "binding.h"
#include "gemm.h"

extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*,
                                  const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*,
                                  double*, const int*);
#ifdef MEGAGNN_WITH_CUDA
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
#endif
}

namespace megagnn {

// Memory seen as a matrix by torch, for the time of one call.
class Borrowed {
 public:
  template <class T>
  Borrowed(const Matrix<T>& matrix, int32_t device_type, int32_t device_index) {
    const int64_t sizes[2] = {matrix.height(), matrix.length()};
    const int64_t strides[2] = {matrix.transposed ? 1 : matrix.columns,
                                matrix.transposed ? matrix.columns : 1};
    const int32_t dtype = sizeof(T) == 4 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
    check(aoti_torch_create_tensor_from_blob(const_cast<T*>(matrix.data), 2, sizes, strides, 0, dtype,
                                             device_type, device_index, &handle) == AOTI_TORCH_SUCCESS,
          "gemm", "torch", "torch must make a view of memory, got an error");
  }
  ~Borrowed() { aoti_torch_delete_tensor_object(handle); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

  AtenTensorHandle handle = nullptr;
};

// torch's addmm, called below the dispatcher.
template <class T, class Addmm>
void torch_gemm(const Matrix<T>& x, const Matrix<T>& y, T beta, T* z, const Addmm& addmm, int32_t device_type,
                int32_t device_index, T alpha = T(1)) {
  const Borrowed out(Matrix<T>{z, x.height(), y.length()}, device_type, device_index);
  const Borrowed left(x, device_type, device_index), right(y, device_type, device_index);
  check(addmm(out.handle, out.handle, left.handle, right.handle, double(beta), double(alpha)) ==
            AOTI_TORCH_SUCCESS,
        "gemm", "torch", "torch must multiply the matrices, got an error");
}

// One per thread: inside a parallel region the product library starts no threads of its own. BLAS by torch's
// exported symbol where there is one, else torch's addmm.
class CpuDevice {
 public:
  explicit CpuDevice(bool blas) : blas_(blas && sgemm_ && dgemm_) {}

  template <class T>
  T* allocate(int64_t count) {
    memory_.emplace_back(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64));
    check(memory_.back() != nullptr, "allocate", "cpu", "memory must suffice, got none for ", count,
          " numbers");
    return static_cast<T*>(memory_.back().get());
  }

  template <class T>
  void zero(T* data, int64_t count) {
    std::memset(data, 0, size_t(count) * sizeof(T));
  }

  // z = alpha x y + beta z.
  template <class T>
  void gemm(const Matrix<T>& x, const Matrix<T>& y, T beta, T* z, T alpha = T(1)) {
    if (x.height() == 0 || y.length() == 0) return;
    if (!blas_) {
      return torch_gemm(x, y, beta, z, aoti_torch_cpu_addmm_out, aoti_torch_device_type_cpu(), 0, alpha);
    }
    // BLAS counts by columns: it sees the transpose of everything, y first
    const int rows = int(x.height()), inner = int(x.length()), columns = int(y.length());
    const int ldx = int(x.columns), ldy = int(y.columns);
    blas_gemm(y.transposed ? "T" : "N", x.transposed ? "T" : "N", &columns, &rows, &inner, &alpha, y.data,
              &ldy, x.data, &ldx, &beta, z);
  }

 private:
  static void blas_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                        const float* alpha, const float* x, const int* ldx, const float* y, const int* ldy,
                        const float* beta, float* z) {
    sgemm_(ta, tb, m, n, k, alpha, x, ldx, y, ldy, beta, z, m);
  }
  static void blas_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                        const double* alpha, const double* x, const int* ldx, const double* y, const int* ldy,
                        const double* beta, double* z) {
    dgemm_(ta, tb, m, n, k, alpha, x, ldx, y, ldy, beta, z, m);
  }

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  bool blas_;
  std::vector<std::unique_ptr<void, Free>> memory_;
};

#ifdef MEGAGNN_WITH_CUDA
// Memory from torch's caching allocator, products by cuBLAS through torch, both on torch's current stream.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& like) : like_(like), index_(like.get_device()) {}

  template <class T>
  T* allocate(int64_t count) {
    memory_.push_back(new_tensor(like_, {count}));
    return static_cast<T*>(memory_.back().mutable_data_ptr());
  }

  template <class T>
  void zero(T* data, int64_t count) {
    const Borrowed view(Matrix<T>{data, 1, count}, aoti_torch_device_type_cuda(), index_);
    check(aoti_torch_zero_(view.handle) == AOTI_TORCH_SUCCESS, "zero", "cuda",
          "torch must clear memory, got an error");
  }

  template <class T>
  void gemm(const Matrix<T>& x, const Matrix<T>& y, T beta, T* z) {
    if (x.height() == 0 || y.length() == 0) return;
    torch_gemm(x, y, beta, z, aoti_torch_cuda_addmm_out, aoti_torch_device_type_cuda(), index_);
  }

 private:
  const Tensor& like_;
  int32_t index_;
  std::vector<Tensor> memory_;
};
#endif

}  // namespace megagnn
