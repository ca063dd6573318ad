// SiLU as the edge operation evaluates it, alone and as often as asked: for tools/bench/edge_message.py,
// which needs the rate of these evaluations on data that stay in the cache, and for tests of their accuracy.
#include "cpu/activation.h"

#include "binding.h"
#include "cpu/level.h"

namespace megagnn {

MEGAGNN_KERNEL_TABLE(cpu::ActivationKernels, activation)

namespace {

constexpr const char* kName = "silu_pass_";

// All (W, K), a row for each task; bar and x_bar of no elements: values alone.
void silu_pass(Tensor x, Tensor bar, Tensor value, Tensor x_bar, int64_t repeats) {
  const cpu::Scalar scalar = scalar_of(kName, "cpu", x);
  check(x.dim() == 2 && scalar != cpu::kBFloat16, kName, "cpu",
        "x must be a matrix of float32 or float64, got ", x.dim(), " dimensions of ",
        torch::headeronly::toString(x.scalar_type()));
  const bool with_bar = bar.numel() > 0;
  for (const Tensor* tensor : {&x, &value, &bar, &x_bar}) {
    if (!with_bar && (tensor == &bar || tensor == &x_bar)) continue;
    check(tensor->is_contiguous() && tensor->numel() == x.numel() && tensor->scalar_type() == x.scalar_type(),
          kName, "cpu", "all must be contiguous and of one type and size, got ", x.numel(), " and ",
          tensor->numel(), " elements");
  }
  const auto pass = activation_kernels(scalar).pass;
  const int64_t row = x.size(1) * int64_t(x.element_size());
  const auto begin = [](const Tensor& tensor, bool there) {
    return there ? static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) : nullptr;
  };
  char *const from = begin(x, true), *const to = begin(value, true), *const bars = begin(bar, with_bar),
              *const out = begin(x_bar, with_bar);
  all_of_tasks(x.size(0), [&](int64_t t) {
    const int64_t at = t * row, bar_at = with_bar ? at : 0;
    for (int64_t k = 0; k < repeats; ++k) pass(from + at, bars + bar_at, to + at, out + bar_at, x.size(1));
    return true;
  });
}

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def("silu_pass_(Tensor x, Tensor bar, Tensor(a!) value, Tensor(b!) x_bar, int repeats) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("silu_pass_", TORCH_BOX(&megagnn::silu_pass));
}
