// The driver of the blockwise edge operation (csrc/edge_driver.h) with the CUDA kernels, emulated, and plain loops
// for the matrix products. Lists of pointers are those of megagnn::edge_message_forward and _backward.
#include "cuda/edge_message.h"

#include <cstring>
#include <memory>
#include <vector>

#include "edge_driver.h"

namespace {

using namespace megagnn;

class LoopDevice {
 public:
  template <class T>
  T* allocate(int64_t count) {
    memory_.emplace_back(size_t(count) * sizeof(T), char(0x7f));  // not zero: nothing may rely on it
    return reinterpret_cast<T*>(memory_.back().data());
  }
  template <class T>
  void zero(T* data, int64_t count) {
    std::memset(data, 0, size_t(count) * sizeof(T));
  }
  template <class T>
  void gemm(const Matrix<T>& x, const Matrix<T>& y, T beta, T* z) {
    const auto at = [](const Matrix<T>& m, int64_t i, int64_t j) {
      return m.transposed ? m.data[j * m.columns + i] : m.data[i * m.columns + j];
    };
    for (int64_t i = 0; i < x.height(); ++i) {
      for (int64_t j = 0; j < y.length(); ++j) {
        T sum = 0;
        for (int64_t k = 0; k < x.length(); ++k) sum += at(x, i, k) * at(y, k, j);
        T* to = z + i * y.length() + j;
        *to = beta == T(0) ? sum : sum + beta * *to;
      }
    }
  }

 private:
  std::vector<std::vector<char>> memory_;
};

// inputs 8, weights 8 (centres, w1c, w2, b2, w3, b3, w4, b4), graph 8, saved 2, bars 4, results 8, outputs 4,
// weight results 7 (from w1c on).
template <class T>
void run(void* const* pointers, const int64_t* sizes, const double* reals, bool backward) {
  const auto number = [&](int k) { return static_cast<T*>(pointers[k]); };
  const auto integer = [&](int k) { return static_cast<const int64_t*>(pointers[k]); };
  EdgeProblem<T> in{};
  in.hidden = sizes[0], in.message = sizes[1], in.vector = sizes[2], in.radial = sizes[3];
  in.feature = int(sizes[4]), in.direction = int(sizes[5]), in.activation = int(sizes[6]), in.bounded = sizes[7];
  const bool pair = sizes[8];
  const int64_t num_blocks = sizes[9];
  in.epsilon2 = T(reals[0]), in.cutoff = T(reals[1]), in.spread = T(reals[2]);
  for (int plane = 0; plane < (pair ? 2 : 1); ++plane) {
    in.p[plane] = number(4 * plane), in.q[plane] = number(4 * plane + 1);
    in.r[plane] = number(4 * plane + 2), in.f[plane] = number(4 * plane + 3);
    in.sum_bar[plane] = number(26 + 2 * plane), in.vec_bar[plane] = number(27 + 2 * plane);
    in.p_bar[plane] = number(30 + 4 * plane), in.r_bar[plane] = number(32 + 4 * plane);
    in.f_bar[plane] = number(33 + 4 * plane);
    in.sum[plane] = number(38 + 2 * plane), in.vec[plane] = number(39 + 2 * plane);
  }
  in.centres = number(8), in.b2 = number(11), in.b3 = number(13), in.w4 = number(14), in.b4 = number(15);
  in.destination = integer(16), in.source = integer(17), in.ptr = integer(18);
  const int64_t* blocks = integer(19);
  in.order = integer(21), in.runs = integer(22), in.run_begin = integer(23);
  const EdgeWeights<T> weights{number(9), number(10), number(12)};
  const EdgeSaved<T> saved{number(24), number(25)};
  const EdgeSums<T> sums{{number(31), number(35)}, 0, number(44), number(46), number(47), number(48)};
  const EdgeWeightSums<T> products{number(42), number(43), number(45)};
  int64_t longest = 1;
  for (int64_t b = 0; b < num_blocks; ++b) longest = std::max(longest, blocks[4 * b + 1] - blocks[4 * b]);
  LoopDevice device;
  EdgeWorker<T, LoopDevice> worker(device, in, cuda::edge_table<T>().kernels[pair][in.activation], weights, saved,
                                   pair, longest);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const EdgeRange range{blocks[4 * b], blocks[4 * b + 1], blocks[4 * b + 2], blocks[4 * b + 3]};
    backward ? worker.backward(b, range, sums, products) : worker.forward(b, range);
  }
}

}  // namespace

extern "C" void megagnn_emulated_edges(int scalar, void* const* pointers, const int64_t* sizes, const double* reals,
                                       int backward) {
  scalar == 0 ? run<float>(pointers, sizes, reals, backward) : run<double>(pointers, sizes, reals, backward);
}
