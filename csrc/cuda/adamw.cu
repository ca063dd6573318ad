#include "cuda/adamw.h"

#include "cuda/adamw.cuh"

using namespace megagnn::cuda;

namespace {

template <class T, class Grad, bool ROUNDED>
void run(void* weights, const void* grad, void* exp_avg, void* exp_avg_sq, void* rounded, int64_t size,
         const AdamWScalars<T>& scalars, void* stream) {
  const AdamWBuffers<T, Grad> buffers{static_cast<T*>(weights), static_cast<const Grad*>(grad),
                                      static_cast<T*>(exp_avg), static_cast<T*>(exp_avg_sq),
                                      static_cast<__nv_bfloat16*>(rounded)};
  adamw<T, Grad, ROUNDED>(buffers, scalars, size, static_cast<cudaStream_t>(stream));
}

}  // namespace

extern "C" int megagnn_cuda_adamw(int state, int grad_type, void* weights, const void* grad, void* exp_avg,
                                  void* exp_avg_sq, void* rounded, int64_t size, double grad_scale,
                                  double beta1, double one_minus_beta1, double beta2, double one_minus_beta2,
                                  double decay, double step_size, double root_scale, double eps,
                                  void* stream) {
  const AdamWScalars<double> d{grad_scale, beta1,     one_minus_beta1, beta2, one_minus_beta2,
                               decay,      step_size, root_scale,      eps};
  const AdamWScalars<float> f{float(grad_scale), float(beta1),           float(one_minus_beta1),
                              float(beta2),      float(one_minus_beta2), float(decay),
                              float(step_size),  float(root_scale),      float(eps)};
  using bfloat16 = __nv_bfloat16;
  if (state == 1) {
    run<double, double, false>(weights, grad, exp_avg, exp_avg_sq, nullptr, size, d, stream);
  } else if (grad_type == 0) {
    (rounded ? run<float, float, true> : run<float, float, false>)(weights, grad, exp_avg, exp_avg_sq,
                                                                   rounded, size, f, stream);
  } else {
    (rounded ? run<float, bfloat16, true> : run<float, bfloat16, false>)(weights, grad, exp_avg, exp_avg_sq,
                                                                         rounded, size, f, stream);
  }
  return int(cudaGetLastError());
}
