// Compiled once for each SIMD level, like cpu/segment.cpp.
#include "cpu/activation.h"

#include "cpu/jet.h"
#include "cpu/scalar.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

template <class T>
void pass(const void* x_data, const void* bar_data, void* value_data, void* x_bar_data, int64_t count) {
  const T *const x = static_cast<const T*>(x_data), *const bar = static_cast<const T*>(bar_data);
  T *const value = static_cast<T*>(value_data), *const x_bar = static_cast<T*>(x_bar_data);
  for_columns<T>(count, [=](int64_t c, auto lanes) {
    const Jet<T> jet = activate<T, kSiLU>(load(x + c, lanes));
    store(value + c, jet.value, lanes);
    if (bar) store(x_bar + c, Vec<T>(load(bar + c, lanes) * jet.first), lanes);
  });
}

}  // namespace

extern const ActivationKernels activation[kNumScalars];
const ActivationKernels activation[kNumScalars] = {{pass<float>}, {pass<double>}, {nullptr}};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
