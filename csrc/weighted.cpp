// Weighted sum of gathered rows in one pass, out[i] = sum over the entries e of row i of weight[e] *
// values[index[e]], and the dot products per entry, its derivative by the weights.
#include "cpu/weighted.h"

#include "cpu/level.h"
#include "rows.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/weighted.h"
#endif

namespace megagnn {

MEGAGNN_KERNEL_TABLE(cpu::WeightedKernels, weighted)

namespace {

ScalarType accumulator_type(const Tensor& values) {
  return values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The checked arguments of the sum: the rows to sum into, and those of values that the entries take.
struct Call {
  cpu::Scalar scalar;
  Rows rows, source;
  Tensor values, weight;
  int64_t width;
};

Call check_sum(Where where, const Tensor& values, const Tensor& weight, Rows rows, Rows source) {
  const cpu::Scalar scalar = scalar_of(where.operation, where.backend, values);
  check(source.num_entries == rows.num_entries, where.operation, where.backend,
        "index and source_index must be as long as each other, got ", rows.num_entries, " and ",
        source.num_entries);
  check(weight.dim() == 1 && weight.size(0) == rows.num_entries, where.operation, where.backend,
        "weight must be a vector of one element per entry, got ", weight.dim(), " dimensions, ",
        weight.numel(), " elements for ", rows.num_entries, " entries");
  check(weight.scalar_type() == accumulator_type(values) && weight.device() == values.device(),
        where.operation, where.backend, "weight must be ",
        torch::headeronly::toString(accumulator_type(values)), " on the device of values, got ",
        torch::headeronly::toString(weight.scalar_type()));
  const int64_t width = check_values(where, values, source.num_rows, "row of source_ptr");
  return {scalar, rows, source, make_contiguous(values), make_contiguous(weight), width};
}

Tensor gather_weighted_sum_cpu(Tensor values, Tensor weight, Tensor index, Tensor ptr,
                               std::optional<Tensor> perm, Tensor source_index, Tensor source_ptr,
                               std::optional<Tensor> source_perm) {
  const Where where{"gather_weighted_sum", "cpu"};
  const Call call = check_sum(where, values, weight, check_rows(where, values, index, ptr, perm),
                              check_rows(where, values, source_index, source_ptr, source_perm));
  const int64_t longest = check_ptr(where, call.rows);
  Tensor result = new_result(values, call.rows.num_rows);
  cpu::RowSumInput in{call.values.const_data_ptr(), call.rows.ptr_data(), call.rows.perm_data(),
                      call.rows.num_entries, call.width};
  in.index = call.source.index_data();
  in.weight = call.weight.const_data_ptr();
  in.num_values = call.source.num_rows;
  const bool ok = sum_over_rows(weighted_kernels(call.scalar).sum, call.scalar, in, result.mutable_data_ptr(),
                                call.rows.num_rows, longest);
  check(ok, where.operation, where.backend, "source_index must lie in [0, ", in.num_values,
        ") and perm in [0, ", in.num_entries, "), got an element outside");
  return result;
}

// Width of the rows of left and right, which must agree in type, device and all but the number of rows.
int64_t check_dot(Where where, const Tensor& left, const Tensor& right, const Rows& left_rows,
                  const Rows& right_rows) {
  scalar_of(where.operation, where.backend, left);
  check(left.scalar_type() == right.scalar_type() && left.device() == right.device(), where.operation,
        where.backend, "left and right must have one type and device, got ",
        torch::headeronly::toString(left.scalar_type()), " and ",
        torch::headeronly::toString(right.scalar_type()));
  check(left.dim() >= 1 && left.dim() == right.dim(), where.operation, where.backend,
        "left and right must have the same number of dimensions, got ", left.dim(), " and ", right.dim());
  for (int64_t d = 1; d < left.dim(); ++d) {
    check(left.size(d) == right.size(d), where.operation, where.backend,
          "left and right must have rows of one shape, got ", left.size(d), " and ", right.size(d));
  }
  check(left_rows.num_entries == right_rows.num_entries, where.operation, where.backend,
        "left_index and right_index must be as long as each other, got ", left_rows.num_entries, " and ",
        right_rows.num_entries);
  check_values(where, right, right_rows.num_rows, "row of right_ptr");
  return check_values(where, left, left_rows.num_rows, "row of left_ptr");
}

Tensor gather_dot_cpu(Tensor left, Tensor right, Tensor left_index, Tensor left_ptr,
                      std::optional<Tensor> left_perm, Tensor right_index, Tensor right_ptr,
                      std::optional<Tensor> right_perm) {
  const Where where{"gather_dot", "cpu"};
  const Rows i = check_rows(where, left, left_index, left_ptr, left_perm),
             j = check_rows(where, left, right_index, right_ptr, right_perm);
  const int64_t width = check_dot(where, left, right, i, j);
  const Tensor a = make_contiguous(left), b = make_contiguous(right);
  Tensor result = new_of_type(left, {i.num_entries}, accumulator_type(left));
  const cpu::DotInput in{a.const_data_ptr(), b.const_data_ptr(), i.index_data(), j.index_data(),
                         i.num_rows,         j.num_rows,         width};
  const auto dot = weighted_kernels(scalar_of(where.operation, where.backend, left)).dot;
  void* out = result.mutable_data_ptr();
  const bool ok = over_entries(i.num_entries, 2 * width,
                               [&](int64_t begin, int64_t end) { return dot(in, out, begin, end); });
  check(ok, where.operation, where.backend, "left_index must lie in [0, ", in.num_left,
        ") and right_index in [0, ", in.num_right, "), got an element outside");
  return result;
}

#ifdef MEGAGNN_WITH_CUDA
Tensor gather_weighted_sum_cuda(Tensor values, Tensor weight, Tensor index, Tensor ptr,
                                std::optional<Tensor> perm, Tensor source_index, Tensor source_ptr,
                                std::optional<Tensor> source_perm) {
  const Where where{"gather_weighted_sum", "cuda"};
  const Call call = check_sum(where, values, weight, check_rows(where, values, index, ptr, perm),
                              check_rows(where, values, source_index, source_ptr, source_perm));
  const cuda::DeviceGuard guard(where.operation, values.get_device());
  Tensor result = new_result(values, call.rows.num_rows);
  if (call.rows.num_rows * call.width == 0) return result;
  const Tensor workspace =
      new_bytes(values, cuda::row_sum_workspace(call.scalar, call.rows.num_entries, call.width));
  check_launch(where.operation, megagnn_cuda_gather_weighted_sum(
                                    call.scalar, call.values.const_data_ptr(), call.weight.const_data_ptr(),
                                    call.source.index_data(), call.rows.ptr_data(), call.rows.perm_data(),
                                    result.mutable_data_ptr(), call.rows.num_rows, call.rows.num_entries,
                                    call.width, workspace.mutable_data_ptr(), guard.stream()));
  return result;
}

Tensor gather_dot_cuda(Tensor left, Tensor right, Tensor left_index, Tensor left_ptr,
                       std::optional<Tensor> left_perm, Tensor right_index, Tensor right_ptr,
                       std::optional<Tensor> right_perm) {
  const Where where{"gather_dot", "cuda"};
  const Rows i = check_rows(where, left, left_index, left_ptr, left_perm),
             j = check_rows(where, left, right_index, right_ptr, right_perm);
  const int64_t width = check_dot(where, left, right, i, j);
  const cuda::DeviceGuard guard(where.operation, left.get_device());
  const Tensor a = make_contiguous(left), b = make_contiguous(right);
  Tensor result = new_of_type(left, {i.num_entries}, accumulator_type(left));
  if (i.num_entries == 0) return result;
  check_launch(where.operation,
               megagnn_cuda_gather_dot(scalar_of(where.operation, where.backend, left), a.const_data_ptr(),
                                       b.const_data_ptr(), i.index_data(), j.index_data(),
                                       result.mutable_data_ptr(), i.num_entries, width, guard.stream()));
  return result;
}
#endif

}  // namespace
}  // namespace megagnn

// Each takes both sets of rows whole: they are one another's derivatives.
STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def(
      "gather_weighted_sum(Tensor values, Tensor weight, Tensor index, Tensor ptr, Tensor? perm, "
      "Tensor source_index, Tensor source_ptr, Tensor? source_perm) -> Tensor");
  library.def(
      "gather_dot(Tensor left, Tensor right, Tensor left_index, Tensor left_ptr, Tensor? left_perm, "
      "Tensor right_index, Tensor right_ptr, Tensor? right_perm) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("gather_weighted_sum", TORCH_BOX(&megagnn::gather_weighted_sum_cpu));
  library.impl("gather_dot", TORCH_BOX(&megagnn::gather_dot_cpu));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("gather_weighted_sum", TORCH_BOX(&megagnn::gather_weighted_sum_cuda));
  library.impl("gather_dot", TORCH_BOX(&megagnn::gather_dot_cuda));
}
#endif
