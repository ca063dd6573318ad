// The atoms' side of a layer: RMSNorm with the Linears that read it, and SiLU with the Linear that reads it.
// Each goes over blocks of atoms that stay in the cache, products and what lies between them; a worker
// (thread) takes neighbouring blocks, as torch does not divide products of so few rows. CPU; a GPU has the
// chain.
#include "cpu/node.h"

#include "binding.h"
#include "cpu/activation.h"
#include "cpu/level.h"
#include "devices.h"
#include "weight_sums.h"

namespace megagnn {

MEGAGNN_KERNEL_TABLE(cpu::NodeKernels, node)
MEGAGNN_KERNEL_TABLE(cpu::ActivationKernels, activation)

namespace {

constexpr int64_t kBlockRows = 128;

std::string shape_of(const Tensor& tensor) {
  std::string shape = tensor.dim() ? "" : "a number";
  for (int64_t d = 0; d < tensor.dim(); ++d) shape += (d ? " x " : "") + std::to_string(tensor.size(d));
  return shape;
}

// Checks of one call; all tensors must have the type of `like`. What comes back is contiguous.
struct Checked {
  const char* name;
  const Tensor& like;

  // Of any number of rows where that is negative.
  Tensor matrix(const char* what, const Tensor& tensor, int64_t rows, int64_t columns) const {
    const bool fits = tensor.dim() == 2 && tensor.size(1) == columns && (rows < 0 || tensor.size(0) == rows);
    const std::string height = rows < 0 ? "" : ", " + std::to_string(rows) + " rows";
    return of_type(fits, tensor, what, " must be a matrix of ", columns, " columns", height);
  }
  Tensor vector(const char* what, const Tensor& tensor, int64_t size) const {
    const bool fits = tensor.dim() == 1 && tensor.size(0) == size;
    return of_type(fits, tensor, what, " must be a vector of ", size, " elements");
  }

 private:
  template <class... Rule>
  Tensor of_type(bool fits, const Tensor& tensor, const Rule&... rule) const {
    check(fits && tensor.scalar_type() == like.scalar_type(), name, "cpu", rule..., " and type ",
          torch::headeronly::toString(like.scalar_type()), ", got ", shape_of(tensor), " and ",
          torch::headeronly::toString(tensor.scalar_type()));
    return make_contiguous(tensor);
  }
};

void check_features(const char* name, const Tensor& h) {
  check(h.dim() == 2 && (h.scalar_type() == ScalarType::Float || h.scalar_type() == ScalarType::Double), name,
        "cpu", "the features must be a matrix of float32 or float64, got ", shape_of(h), " and ",
        torch::headeronly::toString(h.scalar_type()));
}

// Blocks of rows, and the workers that take them.
struct Blocks {
  int64_t rows, block, workers;

  Blocks(int64_t num_rows, int64_t width) : rows(num_rows), block(std::max(kBlockRows, width)) {
    const int64_t count = (rows + block - 1) / block;
    workers = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count));
  }

  // task(w, device) once for each worker; then it takes its blocks by `each`.
  template <class Task>
  void run(const Task& task) const {
    const auto work = [&](int64_t w) {
      CpuDevice device(true);
      task(w, device);
      return true;
    };
    workers == 1 ? void(work(0)) : void(all_of_tasks(workers, work));
  }

  // body(first row, number of rows) for the blocks of worker w.
  template <class Body>
  void each(int64_t w, const Body& body) const {
    const int64_t end = rows * (w + 1) / workers;
    for (int64_t at = rows * w / workers; at < end; at += block) body(at, std::min(block, end - at));
  }
};

template <class T>
void finish(WeightSums<T>& sums, const Blocks& blocks) {
  if (blocks.workers == 1) return;
  all_of_tasks(blocks.workers, [&](int64_t t) {
    sums.add(t, blocks.workers);
    return true;
  });
}

// ---- RMSNorm and the Linears that read it

struct NormLinear {
  Tensor h, gain, none;  // no gain: no norm
  Tensors weights, biases;
  int64_t rows, width;

  bool has_norm() const { return !absent(gain); }
};

NormLinear check_norm_linear(const char* name, const Tensor& h, const Tensor& gain, Tensors weights,
                             Tensors biases) {
  check_features(name, h);
  const Checked checked{name, h};
  NormLinear call{make_contiguous(h), gain,      new_tensor(h, {0}), std::move(weights),
                  std::move(biases),  h.size(0), h.size(1)};
  if (call.has_norm()) call.gain = checked.vector("gain", gain, call.width);
  check(call.weights.size() == call.biases.size(), name, "cpu", "there must be a bias for each weight, got ",
        call.biases.size(), " for ", call.weights.size());
  for (size_t k = 0; k < call.weights.size(); ++k) {
    call.weights[k] = checked.matrix("weight", call.weights[k], -1, call.width);
    Tensor& bias = call.biases[k];
    if (!absent(bias)) bias = checked.vector("bias", bias, call.weights[k].size(0));
  }
  return call;
}

template <class T>
Tensors norm_linear_forward(const NormLinear& call, double eps) {
  const cpu::NodeKernels& kernels = node_kernels(scalar_of("norm_linear", "cpu", call.h));
  const int64_t width = call.width;
  Tensors out{call.has_norm() ? new_tensor(call.h, {call.rows}) : call.none};
  for (const Tensor& weight : call.weights) out.push_back(new_tensor(call.h, {call.rows, weight.size(0)}));
  const Blocks blocks(call.rows, width);
  blocks.run([&](int64_t w, CpuDevice& device) {
    T* const scratch = call.has_norm() ? device.allocate<T>(blocks.block * width) : nullptr;
    blocks.each(w, [&](int64_t at, int64_t rows) {
      const T* n = data<T>(call.h) + at * width;
      if (scratch) {
        kernels.normalise(n, data<T>(call.gain), eps, scratch, out_data<T>(out[0]) + at, rows, width);
        n = scratch;
      }
      for (size_t k = 0; k < call.weights.size(); ++k) {
        const int64_t to = call.weights[k].size(0);
        T* const y = out_data<T>(out[k + 1]) + at * to;
        const T* const bias = data<T>(call.biases[k]);
        if (bias) kernels.plus_row(nullptr, bias, 1, y, rows, to);
        device.gemm(Matrix<T>{n, rows, width}, Matrix<T>{data<T>(call.weights[k]), to, width, true},
                    T(bias ? 1 : 0), y);
      }
    });
  });
  return out;
}

template <class T>
Tensors norm_linear_backward(const NormLinear& call, const Tensor& inverse, const Tensors& bars,
                             bool features, bool weights) {
  const cpu::NodeKernels& kernels = node_kernels(scalar_of("norm_linear", "cpu", call.h));
  const int64_t width = call.width;
  const size_t count = call.weights.size();
  const Blocks blocks(call.rows, width);
  const bool has_norm = call.has_norm();
  Tensors summed{features ? call.gain : call.none};  // of the gain, the weights and the biases
  for (const Tensors* list : {&call.weights, &call.biases}) {
    for (const Tensor& tensor : *list) summed.push_back(weights ? tensor : call.none);
  }
  WeightSums<T> sums(call.h, summed, true, call.none, blocks.workers);
  Tensor h_bar = features ? new_tensor(call.h, {call.rows, width}) : call.none;
  blocks.run([&](int64_t w, CpuDevice& device) {
    sums.prepare(w);
    T* const n_scratch = has_norm && weights ? device.allocate<T>(blocks.block * width) : nullptr;
    T* const bar_scratch = has_norm && features ? device.allocate<T>(blocks.block * width) : nullptr;
    blocks.each(w, [&](int64_t at, int64_t rows) {
      const T *const h = data<T>(call.h) + at * width, *const gain = data<T>(call.gain);
      const T* const factors = has_norm ? data<T>(inverse) + at : nullptr;
      if (n_scratch) kernels.scale(h, factors, gain, n_scratch, rows, width);
      T* const to_h = features ? out_data<T>(h_bar) + at * width : nullptr;
      for (size_t k = 0; k < count; ++k) {
        const int64_t from = call.weights[k].size(0);
        const T* const bar = data<T>(bars[k]) + at * from;
        if (features) {
          device.gemm(Matrix<T>{bar, rows, from}, Matrix<T>{data<T>(call.weights[k]), from, width},
                      T(k ? 1 : 0), bar_scratch ? bar_scratch : to_h);
        }
        if (T* const weight_bar = sums.of(w, 1 + k)) {
          device.gemm(Matrix<T>{bar, rows, from, true}, Matrix<T>{n_scratch ? n_scratch : h, rows, width},
                      T(1), weight_bar);
        }
        if (T* const bias_bar = sums.of(w, 1 + count + k)) kernels.add_rows(bar, 1, bias_bar, rows, from);
      }
      if (bar_scratch) {
        kernels.normalise_backward(h, factors, gain, bar_scratch, to_h, sums.of(w, 0), rows, width);
      }
    });
  });
  finish(sums, blocks);
  Tensors out{h_bar};
  out.insert(out.end(), sums.results().begin(), sums.results().end());
  return out;
}

Tensors norm_linear(Tensor h, Tensor gain, double eps, Tensors weights, Tensors biases) {
  const NormLinear call = check_norm_linear("norm_linear", h, gain, std::move(weights), std::move(biases));
  return h.scalar_type() == ScalarType::Float ? norm_linear_forward<float>(call, eps)
                                              : norm_linear_forward<double>(call, eps);
}

// Gradients of h, gain, the weights, the biases; features: of the first two, weights: of the others.
Tensors norm_linear_gradients(Tensor h, Tensor gain, Tensor inverse, Tensors weights, Tensors biases,
                              Tensors bars, bool features, bool with_weights) {
  const char* const name = "norm_linear_backward";
  const NormLinear call = check_norm_linear(name, h, gain, std::move(weights), std::move(biases));
  const Checked checked{name, h};
  check(bars.size() == call.weights.size(), name, "cpu", "there must be a cotangent for each weight, got ",
        bars.size(), " for ", call.weights.size());
  for (size_t k = 0; k < bars.size(); ++k) {
    bars[k] = checked.matrix("cotangent", bars[k], call.rows, call.weights[k].size(0));
  }
  if (call.has_norm()) inverse = checked.vector("inverse", inverse, call.rows);
  return h.scalar_type() == ScalarType::Float
             ? norm_linear_backward<float>(call, inverse, bars, features, with_weights)
             : norm_linear_backward<double>(call, inverse, bars, features, with_weights);
}

// ---- SiLU and the Linear that reads it: y = h + c (silu(z) W^T + b), z = u + d s U^T

struct SiLULinear {
  Tensor u, s, s_weight, weight, bias, h, none;  // u: of the forward; of the backward, z
  double s_scale, scale;
  int64_t rows, hidden, side, width;

  bool has_side() const { return !absent(s_weight); }
};

SiLULinear check_silu_linear(const char* name, const Tensor& u, const Tensor& s, const Tensor& s_weight,
                             const Tensor& weight, const Tensor& bias, const Tensor& h, double s_scale,
                             double scale) {
  check_features(name, u);
  const Checked checked{name, u};
  SiLULinear call{make_contiguous(u),
                  s,
                  s_weight,
                  checked.matrix("weight", weight, -1, u.size(1)),
                  bias,
                  h,
                  new_tensor(u, {0}),
                  s_scale,
                  scale,
                  u.size(0),
                  u.size(1),
                  0,
                  weight.size(0)};
  if (call.has_side()) {
    call.side = s_weight.dim() == 2 ? s_weight.size(1) : 0;
    call.s_weight = checked.matrix("the weight of s", s_weight, call.hidden, call.side);
    call.s = checked.matrix("s", s, call.rows, call.side);
  }
  if (!absent(bias)) call.bias = checked.vector("bias", bias, call.width);
  if (!absent(h)) call.h = checked.matrix("h", h, call.rows, call.width);
  return call;
}

// y, and z where it is not u.
template <class T>
Tensors silu_linear_forward(const SiLULinear& call) {
  const cpu::Scalar scalar = scalar_of("silu_linear", "cpu", call.u);
  const cpu::NodeKernels& kernels = node_kernels(scalar);
  const auto activate = activation_kernels(scalar).pass;
  const int64_t hidden = call.hidden, width = call.width;
  Tensor y = new_tensor(call.u, {call.rows, width});
  Tensor z = call.has_side() ? new_tensor(call.u, {call.rows, hidden}) : call.none;
  const Blocks blocks(call.rows, std::max(hidden, width));
  blocks.run([&](int64_t w, CpuDevice& device) {
    T* const active = device.allocate<T>(blocks.block * hidden);
    blocks.each(w, [&](int64_t at, int64_t rows) {
      const T* before = data<T>(call.u) + at * hidden;
      if (call.has_side()) {
        T* const sum = out_data<T>(z) + at * hidden;
        std::memcpy(sum, before, size_t(rows * hidden) * sizeof(T));
        device.gemm(Matrix<T>{data<T>(call.s) + at * call.side, rows, call.side},
                    Matrix<T>{data<T>(call.s_weight), hidden, call.side, true}, T(1), sum, T(call.s_scale));
        before = sum;
      }
      activate(before, nullptr, active, nullptr, rows * hidden);
      T* const to = out_data<T>(y) + at * width;
      const T* const h = absent(call.h) ? nullptr : data<T>(call.h) + at * width;
      kernels.plus_row(h, data<T>(call.bias), call.scale, to, rows, width);
      device.gemm(Matrix<T>{active, rows, hidden}, Matrix<T>{data<T>(call.weight), width, hidden, true}, T(1),
                  to, T(call.scale));
    });
  });
  return {y, z};
}

template <class T>
Tensors silu_linear_backward(const SiLULinear& call, const Tensor& bar, bool side, bool weights) {
  const cpu::Scalar scalar = scalar_of("silu_linear", "cpu", call.u);
  const cpu::NodeKernels& kernels = node_kernels(scalar);
  const auto activate = activation_kernels(scalar).pass;
  const int64_t hidden = call.hidden, width = call.width;
  Tensor z_bar = new_tensor(call.u, {call.rows, hidden});
  Tensor s_bar = side && call.has_side() ? new_tensor(call.u, {call.rows, call.side}) : call.none;
  const Blocks blocks(call.rows, std::max(hidden, width));
  WeightSums<T> sums(call.u, {call.s_weight, call.weight, call.bias}, weights, call.none, blocks.workers);
  blocks.run([&](int64_t w, CpuDevice& device) {
    sums.prepare(w);
    T* const active = device.allocate<T>(blocks.block * hidden);
    blocks.each(w, [&](int64_t at, int64_t rows) {
      const Matrix<T> y_bar{data<T>(bar) + at * width, rows, width};
      T* const to_z = out_data<T>(z_bar) + at * hidden;
      device.gemm(y_bar, Matrix<T>{data<T>(call.weight), width, hidden}, T(0), to_z, T(call.scale));
      activate(data<T>(call.u) + at * hidden, to_z, active, to_z, rows * hidden);
      const Matrix<T> inner{to_z, rows, hidden};
      if (!absent(s_bar)) {
        device.gemm(inner, Matrix<T>{data<T>(call.s_weight), hidden, call.side}, T(0),
                    out_data<T>(s_bar) + at * call.side, T(call.s_scale));
      }
      if (T* const weight_bar = sums.of(w, 0)) {
        device.gemm(Matrix<T>{to_z, rows, hidden, true},
                    Matrix<T>{data<T>(call.s) + at * call.side, rows, call.side}, T(1), weight_bar,
                    T(call.s_scale));
      }
      if (T* const weight_bar = sums.of(w, 1)) {
        device.gemm(Matrix<T>{y_bar.data, rows, width, true}, Matrix<T>{active, rows, hidden}, T(1),
                    weight_bar, T(call.scale));
      }
      if (T* const bias_bar = sums.of(w, 2)) kernels.add_rows(y_bar.data, call.scale, bias_bar, rows, width);
    });
  });
  finish(sums, blocks);
  Tensors out{z_bar, s_bar};
  out.insert(out.end(), sums.results().begin(), sums.results().end());
  return out;
}

Tensors silu_linear(Tensor u, Tensor s, Tensor s_weight, Tensor weight, Tensor bias, Tensor h, double s_scale,
                    double scale) {
  const SiLULinear call = check_silu_linear("silu_linear", u, s, s_weight, weight, bias, h, s_scale, scale);
  return u.scalar_type() == ScalarType::Float ? silu_linear_forward<float>(call)
                                              : silu_linear_forward<double>(call);
}

// Gradients of u (or z), s, its weight, the weight, the bias; that of h is bar.
Tensors silu_linear_gradients(Tensor z, Tensor s, Tensor s_weight, Tensor weight, Tensor bias, Tensor bar,
                              double s_scale, double scale, bool side, bool weights) {
  const char* const name = "silu_linear_backward";
  const SiLULinear call =
      check_silu_linear(name, z, s, s_weight, weight, bias, new_tensor(z, {0}), s_scale, scale);
  bar = Checked{name, z}.matrix("cotangent", bar, call.rows, call.width);
  return z.scalar_type() == ScalarType::Float ? silu_linear_backward<float>(call, bar, side, weights)
                                              : silu_linear_backward<double>(call, bar, side, weights);
}

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def("norm_linear(Tensor h, Tensor gain, float eps, Tensor[] weights, Tensor[] biases) -> Tensor[]");
  library.def(
      "norm_linear_backward(Tensor h, Tensor gain, Tensor inverse, Tensor[] weights, Tensor[] biases,"
      " Tensor[] bars, bool features, bool with_weights) -> Tensor[]");
  library.def(
      "silu_linear(Tensor u, Tensor s, Tensor s_weight, Tensor weight, Tensor bias, Tensor h, float s_scale,"
      " float scale) -> Tensor[]");
  library.def(
      "silu_linear_backward(Tensor z, Tensor s, Tensor s_weight, Tensor weight, Tensor bias, Tensor bar,"
      " float s_scale, float scale, bool side, bool with_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("norm_linear", TORCH_BOX(&megagnn::norm_linear));
  library.impl("norm_linear_backward", TORCH_BOX(&megagnn::norm_linear_gradients));
  library.impl("silu_linear", TORCH_BOX(&megagnn::silu_linear));
  library.impl("silu_linear_backward", TORCH_BOX(&megagnn::silu_linear_gradients));
}
