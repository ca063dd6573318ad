// CPU kernels of AdamW: plain pointers, no torch. All buffers are flat, of one length.
#pragma once

#include <cstdint>

#include "cpu/scalar.h"

namespace megagnn::cpu {

struct AdamWBuffers {
  void* weights;  // what is updated: the parameters, or their master copy
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* rounded;  // bfloat16 parameters, written from the master copy; null without one
};

// One step's constants (Loshchilov and Hutter 2019, Algorithm 2), computed in double for every type:
//   g = grad_scale grad;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   w = decay w - step_size m / (root_scale sqrt(v) + eps)
struct AdamWScalars {
  double grad_scale;
  double beta1, one_minus_beta1;
  double beta2, one_minus_beta2;
  double decay;       // 1 - lr weight_decay
  double step_size;   // lr / (1 - beta1^step)
  double root_scale;  // 1 / sqrt(1 - beta2^step)
  double eps;
};

// Updates elements [begin, end).
using AdamWKernel = void (*)(const AdamWBuffers& buffers, const AdamWScalars& scalars, int64_t begin,
                             int64_t end);

// One set per SIMD level: by the type of the weights and the moments (float32, float64; there are none of
// bfloat16), then that of the gradient (the same, or bfloat16 beside float32).
struct AdamWKernels {
  AdamWKernel update[kNumScalars][kNumScalars];          // null where there is no such combination
  AdamWKernel update_rounded[kNumScalars][kNumScalars];  // the same, and writes `rounded`
  // Sum of squares of values [begin, end), by the type of the values: for the norm of the gradient. Over no
  // more than kSquareRun values, which are added as float32 (float64 as they are).
  double (*square_sum[kNumScalars])(const void* values, int64_t begin, int64_t end);
};

// Sums of runs are added as float64, in order, so no error grows with the size of the buffer and no bit
// depends on the number of threads.
constexpr int64_t kSquareRun = 1024;

// The kernels of the SIMD level chosen for this machine (csrc/cpu/simd.cpp).
const AdamWKernels& adamw_kernels();

}  // namespace megagnn::cpu
