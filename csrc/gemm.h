// A matrix as the drivers pass it to a device's matrix product, z = x y + beta z: gemm(x, y, beta, z), all
// row-major; the CPU's takes a factor of x y, too.
#pragma once

#include <cstdint>

namespace megagnn {

// Read as it is or transposed.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns;  // as it lies in memory
  bool transposed = false;

  int64_t height() const { return transposed ? columns : rows; }
  int64_t length() const { return transposed ? rows : columns; }
};

}  // namespace megagnn
