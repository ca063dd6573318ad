// CPU kernels between the matrix products of a layer's atoms: the norm, and sums over atoms. Matrices are
// (rows, width), row-major.
#pragma once

#include <cstdint>

namespace megagnn::cpu {

struct NodeKernels {
  // inverse = 1 / sqrt(mean h^2 + eps) for each row, n = h inverse gain.
  void (*normalise)(const void* h, const void* gain, double eps, void* n, void* inverse, int64_t rows,
                    int64_t width);
  // n = h inverse gain, made again.
  void (*scale)(const void* h, const void* inverse, const void* gain, void* n, int64_t rows, int64_t width);
  // With x = h inverse and b = n_bar gain, h_bar = inverse (b - x mean(b x)); gain_bar += n_bar x.
  void (*normalise_backward)(const void* h, const void* inverse, const void* gain, const void* n_bar,
                             void* h_bar, void* gain_bar, int64_t rows, int64_t width);
  // sums += factor times the sum of the rows of x.
  void (*add_rows)(const void* x, double factor, void* sums, int64_t rows, int64_t width);
  // y = h + factor row, for each row of h; a null h or row is zero.
  void (*plus_row)(const void* h, const void* row, double factor, void* y, int64_t rows, int64_t width);
};

}  // namespace megagnn::cpu
