// CUDA kernels of the blockwise edge operation, stage for stage those of cpu/edge_message.cpp
// (docs/kernels.md). No atomics: a sum belongs to one warp, or one thread block, and is made in an order that
// depends on the block of edges alone; the blocks of edges follow one another on the stream.
#pragma once

#include "cuda/vector.cuh"
#include "edge_block.h"

namespace megagnn::cuda {

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ void sine_cosine(float x, float* sine, float* cosine) { sincosf(x, sine, cosine); }
__device__ __forceinline__ void sine_cosine(double x, double* sine, double* cosine) {
  sincos(x, sine, cosine);
}
// 1 / x for x > 0, without the branches of a division, whose calls cost registers: up to two units in the
// last place off, and zero beyond the range of float. Newton's step doubles the digits.
__device__ __forceinline__ float inverse(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double inverse(double x) {
  double y = __fdividef(1.0f, x < 1e38 ? float(x) : 1e38f);
  y = y * (2.0 - (x < 1e38 ? x : 1e38) * y);
  return y * (2.0 - (x < 1e38 ? x : 1e38) * y);
}
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// Value and first two derivatives of a function of one variable.
template <class T>
struct Jet {
  T value, first, second;
};

template <class T, int ACTIVATION>
__device__ __forceinline__ Jet<T> activate(T x) {
  if constexpr (ACTIVATION == kSiLU) {
    const T e = exponential(x < T(-87) ? T(87) : -x), s = inverse(T(1) + e);
    const T y = x * s, product = s * (e * s);  // s (1 - s), without a difference
    return {y, s + x * product, product * (T(2) + x - T(2) * y)};
  } else {
    return {x < T(0) ? T(0) : x, x > T(0) ? T(1) : T(0), T(0)};
  }
}

__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

template <class T>
__device__ __forceinline__ Jet<T> direction_factor(int direction, T d) {
  if (direction == kVector) return {T(1), T(0), T(0)};
  const T u = inverse(direction == kUnit ? d : d + T(1));
  return {u, -u * u, T(2) * u * u * u};
}

template <class T>
__device__ __forceinline__ T dot3(const T* a, const T* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

template <class T>
__device__ __forceinline__ Jet<T> feature(const EdgeProblem<T>& in, T d, int64_t c) {
  if (in.feature == kDistance) return {d, T(1), T(0)};
  if (in.feature == kSquared) return {d * d - in.epsilon2, T(2) * d, T(2)};
  const T centre = in.centres[c];
  if (in.feature == kBessel) {
    T sine, cosine;
    sine_cosine(centre * d, &sine, &cosine);
    const T per_d = inverse(d), value = sine * (in.cutoff * per_d);
    const T first = (centre * cosine * in.cutoff - value) * per_d;
    return {value, first, -centre * centre * value - T(2) * per_d * first};
  }
  const T narrow = inverse(in.spread), offset = (d - centre) * narrow;
  const T value = exponential(T(-0.5) * offset * offset);
  return {value, -offset * value * narrow, (offset * offset - T(1)) * value * (narrow * narrow)};
}

// The edges of row `first_row + k` that lie in the block, counted from its first edge.
template <class T>
__device__ __forceinline__ void row_edges(const EdgeProblem<T>& in, const EdgeBlock<T>& block, int64_t row,
                                          int64_t* first, int64_t* end) {
  const int64_t begin = in.ptr[row] - block.begin, stop = in.ptr[row + 1] - block.begin;
  *first = begin > 0 ? begin : 0;
  *end = stop < block.count ? stop : block.count;
}

// One warp per edge and 32 features; the lane of feature 0 also writes the distance.
template <class T, bool PAIR>
__global__ void __launch_bounds__(kBlockThreads)
    edge_radial(const __grid_constant__ EdgeProblem<T> in, const __grid_constant__ EdgeBlock<T> block) {
  const int64_t k = warp_number(), c = channel(), i = k * in.radial + c;
  if (k >= block.count || c >= in.radial) return;
  const T* r = in.r[0] + 3 * (block.begin + k);
  const T d = root(dot3(r, r) + in.epsilon2);
  const T d_t = PAIR ? dot3(r, in.r[1] + 3 * (block.begin + k)) * inverse(d) : T(0);
  if (c == 0) {
    block.d[0][k] = d;
    if (PAIR) block.d[1][k] = d_t;
  }
  const Jet<T> jet = feature(in, d, c);
  block.rho[i] = in.feature == kSquared ? dot3(r, r) : jet.value;
  if (PAIR) block.rho[block.count * in.radial + i] = jet.first * d_t;
}

// One warp per edge and 32 channels: reads of p, q and writes of z lie side by side in a
// warp.
template <class T, bool PAIR, int ACTIVATION>
__global__ void __launch_bounds__(kBlockThreads)
    edge_before(const __grid_constant__ EdgeProblem<T> in, const __grid_constant__ EdgeBlock<T> block) {
  const int64_t k = warp_number(), c = channel(), width = in.hidden, plane = block.count * width;
  if (k >= block.count || c >= width) return;
  const int64_t e = block.begin + k, at = k * width + c;
  const int64_t to = in.destination[e] * width + c, from = in.source[e] * width + c;
  const T a = block.a[at] + (in.p[0][to] + in.q[0][from]);
  const Jet<T> jet = activate<T, ACTIVATION>(a);
  block.z[at] = jet.value;
  if constexpr (PAIR) {
    const T a_t = block.a[plane + at] + (in.p[1][to] + in.q[1][from]);
    block.z[plane + at] = jet.first * a_t;
    if (block.a_slope) block.a_slope[plane + at] = jet.second * a_t;
  }
  if (block.a_slope) block.a_slope[at] = jet.first;
}

// One warp per destination row and 32 channels: each lane owns a channel and walks over the row's edges.
template <class T, bool PAIR, int ACTIVATION>
__global__ void __launch_bounds__(kBlockThreads)
    edge_message(const __grid_constant__ EdgeProblem<T> in, const __grid_constant__ EdgeBlock<T> block) {
  const int64_t width = in.message, plane = block.count * width;
  const int64_t row = block.first_row + warp_number(), c = channel();
  if (warp_number() >= block.num_rows || c >= width) return;
  int64_t first, end;
  row_edges(in, block, row, &first, &end);
  T sum = 0, sum_t = 0;
#pragma unroll 1
  for (int64_t k = first; k < end; ++k) {
    const int64_t at = k * width + c, e = block.begin + k;
    const T f = in.f[0] ? in.f[0][e] : T(1);
    const Jet<T> jet = activate<T, ACTIVATION>(block.c[at] + in.b2[c]);
    sum += f * jet.value;
    if constexpr (PAIR) {
      const T c_t = block.c[plane + at], m_t = jet.first * c_t;
      sum_t += f * m_t + (in.f[1] ? in.f[1][e] : T(0)) * jet.value;
      if (block.m) block.m[plane + at] = m_t;
      if (block.c_slope) block.c_slope[plane + at] = jet.second * c_t;
    }
    if (block.m) block.m[at] = jet.value;
    if (block.c_slope) block.c_slope[at] = jet.first;
  }
  if (in.sum[0]) in.sum[0][row * width + c] += sum;
  if (PAIR && in.sum[1]) in.sum[1][row * width + c] += sum_t;
}

// One warp per edge, lanes over channels.
template <class T, bool PAIR, int ACTIVATION, bool SLOPE>
__global__ void __launch_bounds__(kBlockThreads)
    edge_scalar(const __grid_constant__ EdgeProblem<T> in, const __grid_constant__ EdgeBlock<T> block) {
  const int64_t k = warp_number(), width = in.vector, plane = block.count * width;
  if (k >= block.count) return;
  T sum = 0, sum_t = 0;
#pragma unroll 1
  for (int64_t c = threadIdx.x % kWarp; c < width; c += kWarp) {
    const int64_t at = k * width + c;
    const Jet<T> jet = activate<T, ACTIVATION>(block.g[at] + in.b3[c]);
    sum += in.w4[c] * jet.value;
    if constexpr (PAIR) {
      const T g_t = block.g[plane + at], u_t = jet.first * g_t;
      sum_t += in.w4[c] * u_t;
      if (SLOPE) block.u[plane + at] = u_t, block.g_bar[plane + at] = jet.second * g_t;
    }
    if (SLOPE) block.u[at] = jet.value, block.g_bar[at] = jet.first;
  }
  sum = warp_sum(sum);
  sum_t = PAIR ? warp_sum(sum_t) : T(0);
  if (threadIdx.x % kWarp != 0) return;
  block.w[0][k] = sum;
  if (PAIR) block.w[1][k] = sum_t;
}

// tanh(w + b4) of edge k, or w + b4, and its tangent.
template <class T, bool PAIR>
__device__ __forceinline__ void bounded_scalar(const EdgeProblem<T>& in, const EdgeBlock<T>& block, int64_t k,
                                               T w[2]) {
  w[0] = block.w[0][k] + (in.b4 ? in.b4[0] : T(0));
  w[1] = PAIR ? block.w[1][k] : T(0);
  if (!in.bounded) return;
  w[0] = hyperbolic_tangent(w[0]);
  w[1] *= T(1) - w[0] * w[0];
}

// kappa = f tanh(w) t(d) of an edge, the factor of r in vec, and its tangent.
template <class T, bool PAIR>
__device__ __forceinline__ void kappa_of_edge(const EdgeProblem<T>& in, const EdgeBlock<T>& block, int64_t k,
                                              const T w[2], T kappa[2]) {
  const int64_t e = block.begin + k;
  const Jet<T> t = direction_factor(in.direction, block.d[0][k]);
  const T f = in.f[0] ? in.f[0][e] : T(1), f_t = PAIR && in.f[1] ? in.f[1][e] : T(0);
  const T t_t = PAIR ? t.first * block.d[1][k] : T(0);
  kappa[0] = f * w[0] * t.value;
  kappa[1] = f_t * w[0] * t.value + f * (w[1] * t.value + w[0] * t_t);
}

// One warp per destination row and axis, lanes over the row's edges; their sums meet by shuffles.
template <class T, bool PAIR>
__global__ void __launch_bounds__(kBlockThreads)
    edge_vector(const __grid_constant__ EdgeProblem<T> in, const __grid_constant__ EdgeBlock<T> block) {
  const int64_t row = block.first_row + warp_number();
  const int lane = threadIdx.x % kWarp, axis = blockIdx.y;
  if (warp_number() >= block.num_rows) return;
  int64_t first, end;
  row_edges(in, block, row, &first, &end);
  T vec = 0, vec_t = 0;
#pragma unroll 1
  for (int64_t k = first + lane; k < end; k += kWarp) {
    const int64_t at = 3 * (block.begin + k) + axis;
    T w[2], kappa[2];
    bounded_scalar<T, PAIR>(in, block, k, w);
    kappa_of_edge<T, PAIR>(in, block, k, w, kappa);
    vec += kappa[0] * in.r[0][at];
    if (PAIR) vec_t += kappa[1] * in.r[0][at] + kappa[0] * in.r[1][at];
  }
  vec = warp_sum(vec);
  vec_t = PAIR ? warp_sum(vec_t) : T(0);
  if (lane != 0) return;
  in.vec[0][3 * row + axis] += vec;
  if (PAIR) in.vec[1][3 * row + axis] += vec_t;
}

// Cotangents of w for one edge, from those of vec; lane 0 writes what belongs to the edge. As scalar_backward
// on the CPU.
template <class T, bool PAIR>
__device__ __forceinline__ void scalar_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block,
                                                int64_t k, const T w[2], T w_bar[2]) {
  const int64_t e = block.begin + k, i = in.destination[e];
  const Jet<T> t = direction_factor(in.direction, block.d[0][k]);
  const T f = in.f[0] ? in.f[0][e] : T(1), f_t = PAIR && in.f[1] ? in.f[1][e] : T(0);
  const T t_t = PAIR ? t.first * block.d[1][k] : T(0);
  const T* r = in.r[0] + 3 * e;
  const T* vec_bar = in.vec_bar[0] + 3 * i;
  const T* vec_t_bar = PAIR ? in.vec_bar[1] + 3 * i : nullptr;
  const T kappa_bar = dot3(vec_bar, r) + (PAIR ? dot3(vec_t_bar, in.r[1] + 3 * e) : T(0));
  const T kappa_t_bar = PAIR ? dot3(vec_t_bar, r) : T(0);
  const T slope = in.bounded ? T(1) - w[0] * w[0] : T(1);
  w_bar[1] = kappa_t_bar * f * t.value;
  w_bar[0] = slope * (kappa_bar * f * t.value + kappa_t_bar * (f_t * t.value + f * t_t));
  if (in.bounded) w_bar[0] -= T(2) * w[0] * w[1] * w_bar[1];
  w_bar[1] *= slope;
  if (threadIdx.x % kWarp != 0) return;
  block.w_bar[0][k] = w_bar[0];
  if (PAIR) block.w_bar[1][k] = w_bar[1];
  if (in.f_bar[0]) in.f_bar[0][e] += kappa_bar * w[0] * t.value + kappa_t_bar * (w[1] * t.value + w[0] * t_t);
  if (PAIR && in.f_bar[1]) in.f_bar[1][e] += kappa_t_bar * w[0] * t.value;
  if (!in.r_bar[0]) return;
  T kappa[2];
  kappa_of_edge<T, PAIR>(in, block, k, w, kappa);
  const T t_t_bar = kappa_t_bar * f * w[0];
  T d_bar = (kappa_bar * f * w[0] + kappa_t_bar * (f_t * w[0] + f * w[1])) * t.first;
  if (PAIR) d_bar += t_t_bar * t.second * block.d[1][k];
  block.d_bar[0][k] += d_bar;
  if (PAIR) block.d_bar[1][k] += t_t_bar * t.first;
  for (int axis = 0; axis < 3; ++axis) {
    in.r_bar[0][3 * e + axis] += kappa[0] * vec_bar[axis] + (PAIR ? kappa[1] * vec_t_bar[axis] : T(0));
    if (PAIR) in.r_bar[1][3 * e + axis] += kappa[0] * vec_t_bar[axis];
  }
}

// One warp per edge, lanes over channels. vec is added by edge_vector beforehand where it is asked for.
template <class T, bool PAIR>
__global__ void __launch_bounds__(kBlockThreads)
    edge_vector_backward(const __grid_constant__ EdgeProblem<T> in,
                         const __grid_constant__ EdgeBlock<T> block) {
  const int64_t k = warp_number(), width = in.vector, plane = block.count * width;
  if (k >= block.count) return;
  T w[2], w_bar[2];
  bounded_scalar<T, PAIR>(in, block, k, w);
  scalar_backward<T, PAIR>(in, block, k, w, w_bar);
#pragma unroll 1
  for (int64_t c = threadIdx.x % kWarp; c < width; c += kWarp) {
    const int64_t at = k * width + c;
    const T first = block.g_bar[at], weight = in.w4[c];
    T g_bar = w_bar[0] * weight * first;
    if constexpr (PAIR) {
      g_bar += w_bar[1] * weight * block.g_bar[plane + at];
      block.g_bar[plane + at] = w_bar[1] * weight * first;
    }
    block.g_bar[at] = g_bar;
  }
}

// One warp per edge, lanes over channels; f_bar is summed over them by shuffles.
template <class T, bool PAIR>
__global__ void __launch_bounds__(kBlockThreads)
    edge_message_backward(const __grid_constant__ EdgeProblem<T> in,
                          const __grid_constant__ EdgeBlock<T> block) {
  const int64_t k = warp_number(), width = in.message, plane = block.count * width;
  if (k >= block.count) return;
  const int64_t e = block.begin + k, to = in.destination[e] * width;
  const T f = in.f[0] ? in.f[0][e] : T(1), f_t = PAIR && in.f[1] ? in.f[1][e] : T(0);
  T f_bar = 0, f_t_bar = 0;
#pragma unroll 1
  for (int64_t c = threadIdx.x % kWarp; c < width; c += kWarp) {
    const int64_t at = k * width + c;
    const T sum_bar = in.sum_bar[0][to + c], slope = block.c_slope[at], m = block.m[at];
    const T m_bar = f * sum_bar + (in.vector ? block.m_bar[at] : T(0));
    f_bar += sum_bar * m;
    T c_bar = m_bar * slope;
    if constexpr (PAIR) {
      const T sum_t_bar = in.sum_bar[1][to + c];
      const T m_t_bar = f * sum_t_bar + (in.vector ? block.m_bar[plane + at] : T(0));
      c_bar += f_t * sum_t_bar * slope + m_t_bar * block.c_slope[plane + at];
      f_bar += sum_t_bar * block.m[plane + at];
      f_t_bar += sum_t_bar * m;
      block.m_bar[plane + at] = m_t_bar * slope;
    }
    block.m_bar[at] = c_bar;
  }
  f_bar = warp_sum(f_bar);
  f_t_bar = PAIR ? warp_sum(f_t_bar) : T(0);
  if (threadIdx.x % kWarp != 0) return;
  if (in.f_bar[0]) in.f_bar[0][e] += f_bar;
  if (PAIR && in.f_bar[1]) in.f_bar[1][e] += f_t_bar;
}

// One warp per edge and 32 channels: z_bar becomes a_bar.
template <class T, bool PAIR>
__global__ void __launch_bounds__(kBlockThreads)
    edge_before_backward(const __grid_constant__ EdgeProblem<T> in,
                         const __grid_constant__ EdgeBlock<T> block) {
  const int64_t k = warp_number(), c = channel(), plane = block.count * in.hidden, at = k * in.hidden + c;
  if (k >= block.count || c >= in.hidden) return;
  const T slope = block.a_slope[at];
  T a_bar = block.z_bar[at] * slope;
  if constexpr (PAIR) {
    const T z_t_bar = block.z_bar[plane + at];
    a_bar += z_t_bar * block.a_slope[plane + at];
    block.z_bar[plane + at] = z_t_bar * slope;
  }
  block.z_bar[at] = a_bar;
}

// One warp per destination row, plane and 32 channels: p_bar of the row += its edges' a_bar.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    edge_sum_rows(const __grid_constant__ EdgeProblem<T> in, const __grid_constant__ EdgeBlock<T> block,
                  const T* a_bar, T* p_bar) {
  const int64_t width = in.hidden, row = block.first_row + warp_number(), c = channel();
  if (warp_number() >= block.num_rows || c >= width) return;
  int64_t first, end;
  row_edges(in, block, row, &first, &end);
  T sum = 0;
  for (int64_t k = first; k < end; ++k) sum += a_bar[k * width + c];
  p_bar[row * width + c] += sum;
}

// One warp per run (edges of the block with one source) and 32 channels: q_bar of the source += their a_bar.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    edge_sum_runs(const __grid_constant__ EdgeProblem<T> in, const __grid_constant__ EdgeBlock<T> block,
                  const T* a_bar, T* q_bar) {
  const int64_t width = in.hidden, run = in.runs[block.index] + warp_number(), c = channel();
  if (run >= in.runs[block.index + 1] || c >= width) return;
  T sum = 0;
  for (int64_t k = in.run_begin[run]; k < in.run_begin[run + 1]; ++k) {
    sum += a_bar[(in.order[k] - block.begin) * width + c];
  }
  q_bar[in.source[in.order[in.run_begin[run]]] * width + c] += sum;
}

constexpr int kColumnRows = 8;

// out[c] += sum_k weight[k] x[k, c] (weight null: 1): one thread block per 32 columns, 8 rows at a time; the
// eight partial sums meet in shared memory.
template <class T>
__global__ void __launch_bounds__(kWarp* kColumnRows)
    edge_sum_columns(const T* x, const T* weight, T* out, int64_t rows, int64_t width) {
  __shared__ T part[kColumnRows][kWarp];
  const int64_t c = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  T sum = 0;
  for (int64_t k = threadIdx.y; k < rows && c < width; k += kColumnRows) {
    sum += (weight ? weight[k] : T(1)) * x[k * width + c];
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= width) return;
  for (int y = 1; y < kColumnRows; ++y) sum += part[y][threadIdx.x];
  out[c] += sum;
}

// One thread per edge: rho_bar and d_bar to r_bar.
template <class T, bool PAIR>
__global__ void __launch_bounds__(kBlockThreads)
    edge_radial_backward(const __grid_constant__ EdgeProblem<T> in,
                         const __grid_constant__ EdgeBlock<T> block) {
  const int64_t k = thread_number();
  if (k >= block.count) return;
  const int64_t e = block.begin + k;
  const T d = block.d[0][k], d_t = PAIR ? block.d[1][k] : T(0), per_d = inverse(d);
  T d_bar = block.d_bar[0][k], d_t_bar = PAIR ? block.d_bar[1][k] : T(0);
  for (int64_t c = 0; c < in.radial; ++c) {
    const Jet<T> jet = feature(in, d, c);
    d_bar += block.rho_bar[k * in.radial + c] * jet.first;
    if constexpr (PAIR) {
      const T bar = block.rho_bar[(block.count + k) * in.radial + c];
      d_bar += bar * jet.second * d_t;
      d_t_bar += bar * jet.first;
    }
  }
  if (PAIR) d_bar -= d_t_bar * d_t * per_d;  // d_t = r . r_t / d
  for (int axis = 0; axis < 3; ++axis) {
    const T r = in.r[0][3 * e + axis];
    T r_bar = d_bar * r * per_d;
    if constexpr (PAIR) {
      r_bar += d_t_bar * in.r[1][3 * e + axis] * per_d;
      in.r_bar[1][3 * e + axis] += d_t_bar * r * per_d;
    }
    in.r_bar[0][3 * e + axis] += r_bar;
  }
}

}  // namespace megagnn::cuda
