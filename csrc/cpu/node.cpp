// Compiled once for each SIMD level, like cpu/segment.cpp.
#include "cpu/node.h"

#include <cmath>

#include "cpu/math.h"
#include "cpu/scalar.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

template <class T>
const T* in(const void* data) {
  return static_cast<const T*>(data);
}
template <class T>
T* out(void* data) {
  return static_cast<T*>(data);
}

template <class T>
void scale(const void* h_data, const void* inverse, const void* gain_data, void* n_data, int64_t rows,
           int64_t width) {
  const T* const gain = in<T>(gain_data);
  for (int64_t k = 0; k < rows; ++k) {
    const T* const h = in<T>(h_data) + k * width;
    T* const n = out<T>(n_data) + k * width;
    const T factor = in<T>(inverse)[k];
    for_columns<T>(width, [=](int64_t c, auto lanes) {
      store(n + c, Vec<T>(load(h + c, lanes) * factor * load(gain + c, lanes)), lanes);
    });
  }
}

template <class T>
void normalise(const void* h_data, const void* gain, double eps, void* n, void* inverse, int64_t rows,
               int64_t width) {
  for (int64_t k = 0; k < rows; ++k) {
    const T* const h = in<T>(h_data) + k * width;
    Vec<T> squares = {};
    for_columns<T>(width, [=, &squares](int64_t c, auto lanes) {
      const Vec<T> x = load(h + c, lanes);
      squares += x * x;
    });
    out<T>(inverse)[k] = T(1) / std::sqrt(sum_lanes<T>(squares) * (T(1) / T(width)) + T(eps));
  }
  scale<T>(h_data, inverse, gain, n, rows, width);
}

template <class T>
void normalise_backward(const void* h_data, const void* inverse, const void* gain_data,
                        const void* n_bar_data, void* h_bar_data, void* gain_bar_data, int64_t rows,
                        int64_t width) {
  const T* const gain = in<T>(gain_data);
  T* const gain_bar = out<T>(gain_bar_data);
  for (int64_t k = 0; k < rows; ++k) {
    const T *const h = in<T>(h_data) + k * width, *const n_bar = in<T>(n_bar_data) + k * width;
    T* const h_bar = out<T>(h_bar_data) + k * width;
    const T factor = in<T>(inverse)[k];
    Vec<T> along = {};
    for_columns<T>(width, [=, &along](int64_t c, auto lanes) {
      const Vec<T> bar = load(n_bar + c, lanes), part = bar * (load(h + c, lanes) * factor);
      along += part * load(gain + c, lanes);
      store(gain_bar + c, load(gain_bar + c, lanes) + part, lanes);
    });
    const T mean = sum_lanes<T>(along) * (T(1) / T(width));
    for_columns<T>(width, [=](int64_t c, auto lanes) {
      const Vec<T> bar = load(n_bar + c, lanes) * load(gain + c, lanes);
      store(h_bar + c, Vec<T>((bar - load(h + c, lanes) * (factor * mean)) * factor), lanes);
    });
  }
}

template <class T>
void add_rows(const void* x_data, double factor, void* sums_data, int64_t rows, int64_t width) {
  T* const sums = out<T>(sums_data);
  for_columns<T>(width, [=](int64_t c, auto lanes) {
    Vec<T> sum = {};
    for (int64_t k = 0; k < rows; ++k) sum += load(in<T>(x_data) + k * width + c, lanes);
    store(sums + c, load(sums + c, lanes) + T(factor) * sum, lanes);
  });
}

template <class T>
void plus_row(const void* h_data, const void* row_data, double factor, void* y_data, int64_t rows,
              int64_t width) {
  const T* const row = in<T>(row_data);
  for (int64_t k = 0; k < rows; ++k) {
    const T* const h = h_data ? in<T>(h_data) + k * width : nullptr;
    T* const y = out<T>(y_data) + k * width;
    for_columns<T>(width, [=](int64_t c, auto lanes) {
      Vec<T> sum = {};
      if (h) sum = load(h + c, lanes);
      if (row) sum += T(factor) * load(row + c, lanes);
      store(y + c, sum, lanes);
    });
  }
}

}  // namespace

extern const NodeKernels node[kNumScalars];
const NodeKernels node[kNumScalars] = {
    {normalise<float>, scale<float>, normalise_backward<float>, add_rows<float>, plus_row<float>},
    {normalise<double>, scale<double>, normalise_backward<double>, add_rows<double>, plus_row<double>},
    {}};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
