// Matrix products on the CPU, of the library that torch brings: its BLAS where the symbol is exported, else
// torch's own addmm. One call is one thread's: inside a parallel region the library does not start threads of
// its own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstdint>

#include "check.h"

extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*,
                                  const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*,
                                  double*, const int*);
}

namespace megagnn {

// A row-major matrix, read as it is or transposed.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns;  // as it lies in memory
  bool transposed = false;
};

inline bool blas_available() { return sgemm_ && dgemm_; }

inline void blas_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                      const float* x, const int* ldx, const float* y, const int* ldy, const float* beta,
                      float* z, const int* ldz) {
  const float one = 1;
  sgemm_(ta, tb, m, n, k, &one, x, ldx, y, ldy, beta, z, ldz);
}
inline void blas_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                      const double* x, const int* ldx, const double* y, const int* ldy, const double* beta,
                      double* z, const int* ldz) {
  const double one = 1;
  dgemm_(ta, tb, m, n, k, &one, x, ldx, y, ldy, beta, z, ldz);
}

// A view of memory as a tensor, for the time of one call.
class Borrowed {
 public:
  template <class T>
  Borrowed(const T* data, int64_t rows, int64_t columns, bool transposed) {
    const int64_t sizes[2] = {transposed ? columns : rows, transposed ? rows : columns};
    const int64_t strides[2] = {transposed ? 1 : columns, transposed ? columns : 1};
    const int32_t dtype = sizeof(T) == 4 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
    check(aoti_torch_create_tensor_from_blob(const_cast<T*>(data), 2, sizes, strides, 0, dtype,
                                             aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS,
          "gemm", "cpu", "torch must make a view of memory, got an error");
  }
  ~Borrowed() { aoti_torch_delete_tensor_object(handle); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

  AtenTensorHandle handle = nullptr;
};

// z = x y + beta z for row-major matrices; z is (rows, columns).
template <class T>
void gemm(const Matrix<T>& x, const Matrix<T>& y, T beta, T* z, bool blas) {
  const int rows = int(x.transposed ? x.columns : x.rows), inner = int(x.transposed ? x.rows : x.columns);
  const int columns = int(y.transposed ? y.rows : y.columns);
  if (rows == 0 || columns == 0) return;
  if (blas) {  // BLAS counts by columns: it sees the transpose of everything, y first
    const int ldx = int(x.columns), ldy = int(y.columns);
    blas_gemm(y.transposed ? "T" : "N", x.transposed ? "T" : "N", &columns, &rows, &inner, y.data, &ldy,
              x.data, &ldx, &beta, z, &columns);
    return;
  }
  const Borrowed out(z, rows, columns, false), left(x.data, x.rows, x.columns, x.transposed),
      right(y.data, y.rows, y.columns, y.transposed);
  check(aoti_torch_cpu_addmm_out(out.handle, out.handle, left.handle, right.handle, double(beta), 1.0) ==
            AOTI_TORCH_SUCCESS,
        "gemm", "cpu", "torch must multiply the matrices, got an error");
}

}  // namespace megagnn
