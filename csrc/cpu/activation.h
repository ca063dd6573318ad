// CPU kernels that evaluate SiLU and do nothing else: what its evaluations cost the edge operation at the
// least, and how exact they are.
#pragma once

#include <cstdint>

namespace megagnn::cpu {

struct ActivationKernels {
  // value[k] = act(x[k]); with bar, also x_bar[k] = bar[k] act'(x[k]).
  void (*pass)(const void* x, const void* bar, void* value, void* x_bar, int64_t count);
};

}  // namespace megagnn::cpu
