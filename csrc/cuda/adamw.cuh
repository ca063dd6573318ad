// CUDA kernel of AdamW. No element depends on another, so there is nothing to synchronise.
#pragma once

#include "cuda/vector.cuh"

namespace megagnn::cuda {

template <class T, class Grad>
struct AdamWBuffers {
  T* weights;
  const Grad* grad;
  T* exp_avg;
  T* exp_avg_sq;
  __nv_bfloat16* rounded;  // null where the weights are the parameters
};

// One step's constants, in the type of the weights; see csrc/cpu/adamw.h.
template <class T>
struct AdamWScalars {
  T grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, root_scale, eps;
};

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

template <class T>
__device__ __forceinline__ void adamw_element(T& w, T grad, T& m, T& v, const AdamWScalars<T>& scalars) {
  grad *= scalars.grad_scale;
  m = scalars.beta1 * m + scalars.one_minus_beta1 * grad;
  v = scalars.beta2 * v + scalars.one_minus_beta2 * (grad * grad);
  w = scalars.decay * w - scalars.step_size * (m / (scalars.root_scale * square_root(v) + scalars.eps));
}

// One thread per pack of VECTOR neighbouring elements, then on by the size of the grid; the elements left
// over after the last whole pack go to the first threads of the grid, one each.
template <class T, class Grad, int VECTOR, bool ROUNDED>
__global__ void __launch_bounds__(kBlockThreads)
    adamw_kernel(AdamWBuffers<T, Grad> buffers, AdamWScalars<T> scalars, int64_t size) {
  const int64_t thread = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  const int64_t num_packs = size / VECTOR, stride = int64_t(gridDim.x) * kBlockThreads;
  for (int64_t i = thread; i < num_packs; i += stride) {
    auto w = reinterpret_cast<Pack<T, VECTOR>*>(buffers.weights)[i];
    auto m = reinterpret_cast<Pack<T, VECTOR>*>(buffers.exp_avg)[i];
    auto v = reinterpret_cast<Pack<T, VECTOR>*>(buffers.exp_avg_sq)[i];
    const auto grad = reinterpret_cast<const Pack<Grad, VECTOR>*>(buffers.grad)[i];
    Pack<__nv_bfloat16, VECTOR> rounded;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      adamw_element<T>(w.element[k], widen(grad.element[k]), m.element[k], v.element[k], scalars);
      if constexpr (ROUNDED) narrow(w.element[k], &rounded.element[k]);
    }
    reinterpret_cast<Pack<T, VECTOR>*>(buffers.weights)[i] = w;
    reinterpret_cast<Pack<T, VECTOR>*>(buffers.exp_avg)[i] = m;
    reinterpret_cast<Pack<T, VECTOR>*>(buffers.exp_avg_sq)[i] = v;
    if constexpr (ROUNDED) reinterpret_cast<Pack<__nv_bfloat16, VECTOR>*>(buffers.rounded)[i] = rounded;
  }
  const int64_t last = num_packs * VECTOR + thread;
  if (last >= size) return;
  adamw_element<T>(buffers.weights[last], widen(buffers.grad[last]), buffers.exp_avg[last],
                   buffers.exp_avg_sq[last], scalars);
  if constexpr (ROUNDED) narrow(buffers.weights[last], &buffers.rounded[last]);
}

template <class T, class Grad, int VECTOR, bool ROUNDED>
void launch_adamw(const AdamWBuffers<T, Grad>& buffers, const AdamWScalars<T>& scalars, int64_t size,
                  cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 8192;  // several rounds of every processor; more would only start and stop
  const int64_t threads = size / VECTOR > VECTOR ? size / VECTOR : VECTOR;
  const int64_t blocks = (threads + kBlockThreads - 1) / kBlockThreads;
  const dim3 grid(unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks)), block(kBlockThreads);
  MEGAGNN_LAUNCH((adamw_kernel<T, Grad, VECTOR, ROUNDED>), grid, block, 0, stream, buffers, scalars, size);
}

template <class T>
inline bool is_aligned(const T* pointer, int vector) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * unsigned(vector)) == 0;
}

// Packs of 16 bytes of the weights where every buffer is aligned to its pack, else single elements.
template <class T, class Grad, bool ROUNDED>
void adamw(const AdamWBuffers<T, Grad>& buffers, const AdamWScalars<T>& scalars, int64_t size,
           cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (is_aligned(buffers.weights, kVector) && is_aligned(buffers.grad, kVector) &&
      is_aligned(buffers.exp_avg, kVector) && is_aligned(buffers.exp_avg_sq, kVector) &&
      is_aligned(buffers.rounded, kVector)) {
    launch_adamw<T, Grad, kVector, ROUNDED>(buffers, scalars, size, stream);
  } else {
    launch_adamw<T, Grad, 1, ROUNDED>(buffers, scalars, size, stream);
  }
}

}  // namespace megagnn::cuda
