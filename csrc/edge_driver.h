// Runs the stages of the blockwise edge operation over the blocks of one worker (docs/kernels.md): before,
// product, message, product, scalar, vector, and back. All memory of a block is this worker's scratch, reused
// from block to block. The same order serves every device: a Device has allocate<T>(count), kept as long as
// it lives, zero(data, count), and gemm (see gemm.h).
#pragma once

#include <algorithm>

#include "edge_block.h"
#include "gemm.h"

namespace megagnn {

// The weights of the three products, (H, R), (M, H), (K, M), and their gradients (null: not wanted).
template <class T>
struct EdgeWeights {
  const T *w1c, *w2, *w3;
};
template <class T>
struct EdgeWeightSums {
  T *w1c_bar, *w2_bar, *w3_bar;
};

// Pre-activations kept for the backward, (planes * E, width), a block's values above its tangents; null: not
// kept.
template <class T>
struct EdgeSaved {
  T *c, *g;
};

// One row of the plan.
struct EdgeRange {
  int64_t begin, end, first_row, end_row;
};

template <class T, class Device>
class EdgeWorker {
 public:
  EdgeWorker(Device& device, const EdgeProblem<T>& problem, const EdgeKernels<T>& kernels,
             const EdgeWeights<T>& weights, const EdgeSaved<T>& saved, bool pair, int64_t max_count)
      : device_(device), in_(problem), kernels_(kernels), weights_(weights), saved_(saved), pair_(pair) {
    const int64_t rows = max_count * (pair ? 2 : 1);
    const int64_t wide = pad(rows * std::max({in_.hidden, in_.message, in_.vector}));
    const int64_t radial = pad(rows * in_.radial), narrow = pad(max_count);
    T* next = device_.template allocate<T>(kBuffers * wide + 2 * radial + kNarrow * narrow);
    const auto take = [&next](int64_t count) {
      T* here = next;
      next += count;
      return here;
    };
    for (T*& buffer : buffer_) buffer = take(wide);
    for (T*& buffer : radial_) buffer = take(radial);
    for (int plane = 0; plane < 2; ++plane) {
      block_.d[plane] = take(narrow);
      block_.d_bar[plane] = take(narrow);
      block_.w[plane] = take(narrow);
      block_.w_bar[plane] = take(narrow);
    }
  }

  void forward(int64_t index, const EdgeRange& range) {
    start(index, range);
    before(nullptr);
    message(nullptr, in_.vector ? buffer_[2] : nullptr);
    if (!in_.vector) return;
    block_.g = kept(saved_.g, in_.vector, buffer_[3]);
    product(block_.m, in_.message, weights_.w3, in_.vector, block_.g);
    kernels_.scalar(in_, block_);
    kernels_.vector(in_, block_);
  }

  void backward(int64_t index, const EdgeRange& range, const EdgeSums<T>& sums,
                const EdgeWeightSums<T>& weight_sums) {
    start(index, range);
    for (T* d_bar : block_.d_bar) device_.zero(d_bar, block_.count);
    before(buffer_[1]);
    message(buffer_[3], buffer_[2]);
    block_.m_bar = buffer_[5];
    if (in_.vector) vector_backward(sums, weight_sums);
    kernels_.message_backward(in_, block_, sums);  // m_bar becomes c_bar
    gradient(block_.m_bar, in_.message, block_.z, in_.hidden, weight_sums.w2_bar);
    block_.z_bar = buffer_[2];
    back_product(block_.m_bar, in_.message, weights_.w2, in_.hidden, block_.z_bar);
    kernels_.before_backward(in_, block_, sums);  // z_bar becomes a_bar
    gradient(block_.z_bar, in_.hidden, block_.rho, in_.radial, weight_sums.w1c_bar);
    if (!in_.r_bar[0]) return;
    block_.rho_bar = radial_[1];
    back_product(block_.z_bar, in_.hidden, weights_.w1c, in_.radial, block_.rho_bar);
    kernels_.radial_backward(in_, block_);
  }

 private:
  static constexpr int kBuffers = 6, kNarrow = 8;
  static int64_t pad(int64_t count) { return (count + 15) / 16 * 16; }

  void start(int64_t index, const EdgeRange& range) {
    block_.index = index;
    block_.begin = range.begin;
    block_.count = range.end - range.begin;
    block_.first_row = range.first_row;
    block_.num_rows = range.end_row - range.first_row;
    block_.rho = radial_[0];
    kernels_.radial(in_, block_);
  }

  int64_t rows() const { return block_.count * (pair_ ? 2 : 1); }

  // Where this block's rows of a kept pre-activation lie, else scratch.
  T* kept(T* saved, int64_t width, T* scratch) const {
    return saved ? saved + block_.begin * (pair_ ? 2 : 1) * width : scratch;
  }

  // z, and of a backward the slopes. They are made again where c and g are kept, too: p and q are at hand.
  void before(T* slope) {
    T* a = buffer_[1];
    product(block_.rho, in_.radial, weights_.w1c, in_.hidden, a);
    block_.a = a;
    block_.z = buffer_[0];
    block_.a_slope = slope;
    kernels_.before(in_, block_);
  }

  void message(T* slope, T* m) {
    const bool complete = slope && saved_.c;
    block_.c = kept(saved_.c, in_.message, buffer_[3]);
    block_.m = m;
    block_.c_slope = slope;
    if (!complete) product(block_.z, in_.hidden, weights_.w2, in_.message, block_.c);
    kernels_.message(in_, block_);
  }

  void vector_backward(const EdgeSums<T>& sums, const EdgeWeightSums<T>& weight_sums) {
    block_.g = kept(saved_.g, in_.vector, buffer_[4]);
    block_.g_bar = buffer_[4];
    block_.u = block_.m_bar;  // free until m_bar is made
    if (!saved_.g) product(block_.m, in_.message, weights_.w3, in_.vector, block_.g);
    kernels_.scalar(in_, block_);
    kernels_.vector_backward(in_, block_, sums);
    gradient(block_.g_bar, in_.vector, block_.m, in_.message, weight_sums.w3_bar);
    back_product(block_.g_bar, in_.vector, weights_.w3, in_.message, block_.m_bar);
  }

  // y (rows, to) = x (rows, from) w^T, w (to, from).
  void product(const T* x, int64_t from, const T* w, int64_t to, T* y) {
    device_.gemm(Matrix<T>{x, rows(), from}, Matrix<T>{w, to, from, true}, T(0), y);
  }
  // x_bar (rows, from) = y_bar (rows, to) w.
  void back_product(const T* y_bar, int64_t to, const T* w, int64_t from, T* x_bar) {
    device_.gemm(Matrix<T>{y_bar, rows(), to}, Matrix<T>{w, to, from}, T(0), x_bar);
  }
  // w_bar (to, from) += y_bar^T x.
  void gradient(const T* y_bar, int64_t to, const T* x, int64_t from, T* w_bar) {
    if (w_bar) device_.gemm(Matrix<T>{y_bar, rows(), to, true}, Matrix<T>{x, rows(), from}, T(1), w_bar);
  }

  Device& device_;
  const EdgeProblem<T>& in_;
  const EdgeKernels<T>& kernels_;
  EdgeWeights<T> weights_;
  EdgeSaved<T> saved_;
  bool pair_;
  T *buffer_[kBuffers], *radial_[2];
  EdgeBlock<T> block_{};
};

}  // namespace megagnn
