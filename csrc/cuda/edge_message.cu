#include "cuda/edge_message.h"

#include "cuda/edge_message.cuh"

namespace megagnn::cuda {
namespace {

#define MEGAGNN_STAGE(kernel, grid, ...) \
  MEGAGNN_LAUNCH(kernel, grid, dim3(kBlockThreads), 0, static_cast<cudaStream_t>(in.stream), __VA_ARGS__)

template <class T>
void sum_columns(const EdgeProblem<T>& in, const T* x, const T* weight, T* out, int64_t rows, int64_t width) {
  const dim3 grid(unsigned((width + kWarp - 1) / kWarp)), block(kWarp, kColumnRows);
  MEGAGNN_LAUNCH((edge_sum_columns<T>), grid, block, 0, static_cast<cudaStream_t>(in.stream), x, weight, out,
                 rows, width);
}

template <class T, bool PAIR>
void radial(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  MEGAGNN_STAGE((edge_radial<T, PAIR>), warps_for(block.count, in.radial), in, block);
}

template <class T, bool PAIR, int ACTIVATION>
void before(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  MEGAGNN_STAGE((edge_before<T, PAIR, ACTIVATION>), warps_for(block.count, in.hidden), in, block);
}

template <class T, bool PAIR, int ACTIVATION>
void message(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  MEGAGNN_STAGE((edge_message<T, PAIR, ACTIVATION>), warps_for(block.num_rows, in.message), in, block);
}

template <class T, bool PAIR, int ACTIVATION>
void scalar(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  if (block.u) {
    MEGAGNN_STAGE((edge_scalar<T, PAIR, ACTIVATION, true>), warps_for(block.count), in, block);
  } else {
    MEGAGNN_STAGE((edge_scalar<T, PAIR, ACTIVATION, false>), warps_for(block.count), in, block);
  }
}

template <class T, bool PAIR>
void vector(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  MEGAGNN_STAGE((edge_vector<T, PAIR>), warps_for(block.num_rows, 3 * kWarp), in,
                block);  // a row of the grid per axis
}

template <class T, bool PAIR>
void vector_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block, const EdgeSums<T>& sums) {
  if (in.vec[0]) vector<T, PAIR>(in, block);
  MEGAGNN_STAGE((edge_vector_backward<T, PAIR>), warps_for(block.count), in, block);
  if (!sums.w4_bar) return;
  const int64_t width = in.vector, plane = block.count * width;
  sum_columns<T>(in, block.u, block.w_bar[0], sums.w4_bar, block.count, width);
  if (PAIR) sum_columns<T>(in, block.u + plane, block.w_bar[1], sums.w4_bar, block.count, width);
  sum_columns<T>(in, block.g_bar, nullptr, sums.b3_bar, block.count, width);
  if (sums.b4_bar) sum_columns<T>(in, block.w_bar[0], nullptr, sums.b4_bar, block.count, 1);
}

template <class T, bool PAIR>
void message_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block, const EdgeSums<T>& sums) {
  MEGAGNN_STAGE((edge_message_backward<T, PAIR>), warps_for(block.count), in, block);
  if (sums.b2_bar) sum_columns<T>(in, block.m_bar, nullptr, sums.b2_bar, block.count, in.message);
}

template <class T, bool PAIR>
void before_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block, const EdgeSums<T>& sums) {
  MEGAGNN_STAGE((edge_before_backward<T, PAIR>), warps_for(block.count, in.hidden), in, block);
  for (int plane = 0; plane < (PAIR ? 2 : 1); ++plane) {
    const T* a_bar = block.z_bar + plane * block.count * in.hidden;
    MEGAGNN_STAGE((edge_sum_rows<T>), warps_for(block.num_rows, in.hidden), in, block, a_bar,
                  in.p_bar[plane]);
    MEGAGNN_STAGE((edge_sum_runs<T>), warps_for(block.count, in.hidden), in, block, a_bar, sums.q_bar[plane]);
  }
}

template <class T, bool PAIR>
void radial_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  MEGAGNN_STAGE((edge_radial_backward<T, PAIR>), threads_for(block.count), in, block);
}

template <class T, bool PAIR, int ACTIVATION>
constexpr EdgeKernels<T> kernels() {
  return {radial<T, PAIR>,
          before<T, PAIR, ACTIVATION>,
          message<T, PAIR, ACTIVATION>,
          scalar<T, PAIR, ACTIVATION>,
          vector<T, PAIR>,
          vector_backward<T, PAIR>,
          message_backward<T, PAIR>,
          before_backward<T, PAIR>,
          radial_backward<T, PAIR>};
}

}  // namespace

template <class T>
const EdgeTable<T>& edge_table() {
  static const EdgeTable<T> table = {{{kernels<T, false, kSiLU>(), kernels<T, false, kReLU>()},
                                      {kernels<T, true, kSiLU>(), kernels<T, true, kReLU>()}}};
  return table;
}

template const EdgeTable<float>& edge_table<float>();
template const EdgeTable<double>& edge_table<double>();

}  // namespace megagnn::cuda
