// Launcher of the CUDA kernel of AdamW: plain pointers, no torch, no CUDA headers. Returns a cudaError_t, 0
// for success.
#pragma once

#include <cstdint>

extern "C" {

// One step on flat buffers of `size` elements. weights, exp_avg and exp_avg_sq are of type `state` (0
// float32, 1 float64), grad of type `grad_type` (the same, or 2, bfloat16, beside float32). rounded, which
// may be null and else takes the weights as bfloat16, goes with float32 alone. The constants are those of
// AdamWScalars in csrc/cpu/adamw.h.
int megagnn_cuda_adamw(int state, int grad_type, void* weights, const void* grad, void* exp_avg,
                       void* exp_avg_sq, void* rounded, int64_t size, double grad_scale, double beta1,
                       double one_minus_beta1, double beta2, double one_minus_beta2, double decay,
                       double step_size, double root_scale, double eps, void* stream);
}
