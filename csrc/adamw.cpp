// AdamW on flat buffers, and the sum of squares that clipping needs: schema, checks, division of the work.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "binding.h"
#include "cpu/adamw.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/adamw.h"
#endif

namespace megagnn {
namespace {

constexpr int64_t kBlock = 1024;  // threads part at multiples of it, so that they share no cache line

struct Update {
  cpu::AdamWBuffers buffers;
  cpu::AdamWScalars scalars;
  cpu::Scalar state, grad;
  int64_t size;
};

void check_buffer(const char* backend, const char* name, const Tensor& tensor, const Tensor& param) {
  check(tensor.is_contiguous(), "adamw_", backend, name,
        " must be contiguous, got a strided view; pass the flat buffer itself");
  check(tensor.numel() == param.numel(), "adamw_", backend, name, " must have as many elements as param, ",
        param.numel(), ", got ", tensor.numel());
  check(tensor.device() == param.device(), "adamw_", backend, name,
        " must be on the device of param, got another");
}

void check_type(const char* backend, const char* name, const Tensor& tensor, ScalarType wanted) {
  check(tensor.scalar_type() == wanted, "adamw_", backend, name, " must be ",
        torch::headeronly::toString(wanted), " beside this param, got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

// float32 or float64 parameters with a state of their type, or bfloat16 ones with a float32 state and master.
void check_types(const char* backend, const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                 const Tensor& exp_avg_sq, const std::optional<Tensor>& master) {
  const bool rounded = scalar_of("adamw_", backend, param) == cpu::kBFloat16;
  check(rounded == master.has_value(), "adamw_", backend,
        "bfloat16 parameters and no others must have a float32 master copy, got ",
        torch::headeronly::toString(param.scalar_type()), master ? " with one" : " without one");
  const ScalarType state = rounded ? ScalarType::Float : param.scalar_type();
  check_type(backend, "exp_avg", exp_avg, state);
  check_type(backend, "exp_avg_sq", exp_avg_sq, state);
  if (master) check_type(backend, "master", *master, state);
  check(grad.scalar_type() == state ||
            (state == ScalarType::Float && grad.scalar_type() == ScalarType::BFloat16),
        "adamw_", backend, "grad must have the type of the moments, or be bfloat16 beside float32, got ",
        torch::headeronly::toString(grad.scalar_type()), " beside ", torch::headeronly::toString(state));
}

cpu::AdamWScalars make_scalars(double lr, double beta1, double beta2, double eps, double weight_decay,
                               int64_t step, double grad_scale) {
  return {grad_scale,
          beta1,
          1 - beta1,
          beta2,
          1 - beta2,
          1 - lr * weight_decay,
          lr / (1 - std::pow(beta1, double(step))),
          1 / std::sqrt(1 - std::pow(beta2, double(step))),
          eps};
}

Update make_update(const char* backend, const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                   const Tensor& exp_avg_sq, const std::optional<Tensor>& master,
                   const cpu::AdamWScalars& scalars, int64_t step) {
  check(step >= 1, "adamw_", backend, "step must count from 1, got ", step);
  check_buffer(backend, "param", param, param);
  check_buffer(backend, "grad", grad, param);
  check_buffer(backend, "exp_avg", exp_avg, param);
  check_buffer(backend, "exp_avg_sq", exp_avg_sq, param);
  if (master) check_buffer(backend, "master", *master, param);
  check_types(backend, param, grad, exp_avg, exp_avg_sq, master);
  const cpu::AdamWBuffers buffers{(master ? *master : param).mutable_data_ptr(), grad.const_data_ptr(),
                                  exp_avg.mutable_data_ptr(), exp_avg_sq.mutable_data_ptr(),
                                  master ? param.mutable_data_ptr() : nullptr};
  return {buffers, scalars, scalar_of("adamw_", backend, exp_avg), scalar_of("adamw_", backend, grad),
          param.numel()};
}

void adamw_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> master,
               double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
               double grad_scale) {
  const Update update =
      make_update("cpu", param, grad, exp_avg, exp_avg_sq, master,
                  make_scalars(lr, beta1, beta2, eps, weight_decay, step, grad_scale), step);
  const cpu::AdamWKernels& kernels = cpu::adamw_kernels();
  const cpu::AdamWKernel kernel =
      (update.buffers.rounded ? kernels.update_rounded : kernels.update)[update.state][update.grad];
  if (update.size < kSerialElements) {
    kernel(update.buffers, update.scalars, 0, update.size);
    return;
  }
  const int64_t num_blocks = (update.size + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, num_blocks, kSerialElements / 2 / kBlock, [&](int64_t first, int64_t last) {
    kernel(update.buffers, update.scalars, first * kBlock, std::min(last * kBlock, update.size));
  });
}

double square_sum_cpu(Tensor values) {
  const cpu::Scalar scalar = scalar_of("square_sum", "cpu", values);
  check(values.is_contiguous(), "square_sum", "cpu",
        "values must be contiguous, got a strided view; pass the flat buffer itself");
  const auto square_sum = cpu::adamw_kernels().square_sum[scalar];
  const void* from = values.const_data_ptr();
  const int64_t size = values.numel(), num_runs = (size + cpu::kSquareRun - 1) / cpu::kSquareRun;
  std::vector<double> sums(size_t(num_runs), 0.0);
  const auto sum_runs = [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      const int64_t begin = run * cpu::kSquareRun;
      sums[size_t(run)] = square_sum(from, begin, std::min(begin + cpu::kSquareRun, size));
    }
  };
  if (size < kSerialElements) {
    sum_runs(0, num_runs);
  } else {
    torch::stable::parallel_for(0, num_runs, kSerialElements / 2 / cpu::kSquareRun, sum_runs);
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

#ifdef MEGAGNN_WITH_CUDA
void adamw_cuda(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> master,
                double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                double grad_scale) {
  const Update update =
      make_update("cuda", param, grad, exp_avg, exp_avg_sq, master,
                  make_scalars(lr, beta1, beta2, eps, weight_decay, step, grad_scale), step);
  if (update.size == 0) return;
  const cuda::DeviceGuard guard("adamw_", param.get_device());
  const cpu::AdamWBuffers& b = update.buffers;
  const cpu::AdamWScalars& s = update.scalars;
  check_launch("adamw_", megagnn_cuda_adamw(update.state, update.grad, b.weights, b.grad, b.exp_avg,
                                            b.exp_avg_sq, b.rounded, update.size, s.grad_scale, s.beta1,
                                            s.one_minus_beta1, s.beta2, s.one_minus_beta2, s.decay,
                                            s.step_size, s.root_scale, s.eps, guard.stream()));
}
#endif

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def(
      "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale) -> ()");
  library.def("square_sum(Tensor values) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("adamw_", TORCH_BOX(&megagnn::adamw_cpu));
  library.impl("square_sum", TORCH_BOX(&megagnn::square_sum_cpu));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) { library.impl("adamw_", TORCH_BOX(&megagnn::adamw_cuda)); }
#endif
