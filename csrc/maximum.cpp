// Maximum over CSR rows, with the entry that each was taken from.
#include "cpu/maximum.h"

#include <tuple>

#include "cpu/level.h"
#include "rows.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/maximum.h"
#endif

namespace megagnn {

MEGAGNN_KERNEL_TABLE(cpu::MaximumKernels, maximum)

namespace {

std::tuple<Tensor, Tensor> new_results(const Tensor& values, int64_t num_rows) {
  std::vector<int64_t> sizes(values.sizes().begin(), values.sizes().end());
  sizes[0] = num_rows;
  return {new_result(values, num_rows), new_of_type(values, sizes, ScalarType::Long)};
}

// One row longer than kPartEntries: its parts in parallel, then their maximum.
bool max_long_row(const cpu::MaximumKernels& kernels, int64_t element_size, const cpu::RowSumInput& in,
                  char* out, int64_t* arg, int64_t row) {
  const int64_t begin = in.ptr[row], end = in.ptr[row + 1], row_bytes = in.width * element_size;
  const int64_t num_parts = (end - begin + cpu::kPartEntries - 1) / cpu::kPartEntries;
  std::vector<char> parts(size_t(num_parts * row_bytes));
  std::vector<int64_t> args(size_t(num_parts * in.width));
  const bool ok = all_of_tasks(num_parts, [&](int64_t p) {
    const int64_t first = begin + p * cpu::kPartEntries;
    return kernels.max_part(in, parts.data() + p * row_bytes, args.data() + p * in.width, first,
                            std::min(end, first + cpu::kPartEntries));
  });
  kernels.max_parts(parts.data(), args.data(), num_parts, in.width, out + row * row_bytes,
                    arg + row * in.width);
  return ok;
}

std::tuple<Tensor, Tensor> segment_max_cpu(Tensor values, Tensor index, Tensor ptr,
                                           std::optional<Tensor> perm) {
  const Where where{"segment_max", "cpu"};
  const cpu::Scalar scalar = scalar_of(where.operation, where.backend, values);
  const Rows rows = check_rows(where, values, index, ptr, perm);
  const int64_t width = check_values(where, values, rows.num_entries, "entry");
  const int64_t longest = check_ptr(where, rows);
  const Tensor from = make_contiguous(values);
  const auto [result, argument] = new_results(values, rows.num_rows);
  if (rows.num_rows * width == 0) return {result, argument};
  const cpu::RowSumInput in{from.const_data_ptr(), rows.ptr_data(), rows.perm_data(), rows.num_entries,
                            width};
  const cpu::MaximumKernels& kernels = maximum_kernels(scalar);
  char* out = static_cast<char*>(result.mutable_data_ptr());
  int64_t* arg = static_cast<int64_t*>(argument.mutable_data_ptr());
  bool ok = over_rows(in.ptr, rows.num_rows, width, [&](int64_t row_begin, int64_t row_end) {
    return kernels.max_rows(in, out, arg, row_begin, row_end);
  });
  for (int64_t row = 0; longest > cpu::kPartEntries && row < rows.num_rows; ++row) {
    if (in.ptr[row + 1] - in.ptr[row] > cpu::kPartEntries)
      ok &= max_long_row(kernels, int64_t(values.element_size()), in, out, arg, row);
  }
  check(ok, where.operation, where.backend, "perm must lie in [0, ", rows.num_entries,
        "), got an element outside");
  return {result, argument};
}

#ifdef MEGAGNN_WITH_CUDA
std::tuple<Tensor, Tensor> segment_max_cuda(Tensor values, Tensor index, Tensor ptr,
                                            std::optional<Tensor> perm) {
  const Where where{"segment_max", "cuda"};
  const cpu::Scalar scalar = scalar_of(where.operation, where.backend, values);
  const Rows rows = check_rows(where, values, index, ptr, perm);
  const int64_t width = check_values(where, values, rows.num_entries, "entry");
  const cuda::DeviceGuard guard(where.operation, values.get_device());
  const Tensor from = make_contiguous(values);
  const auto [result, argument] = new_results(values, rows.num_rows);
  if (rows.num_rows * width == 0) return {result, argument};
  check_launch(where.operation, megagnn_cuda_segment_max(scalar, from.const_data_ptr(), rows.ptr_data(),
                                                         rows.perm_data(), result.mutable_data_ptr(),
                                                         static_cast<int64_t*>(argument.mutable_data_ptr()),
                                                         rows.num_rows, width, guard.stream()));
  return {result, argument};
}
#endif

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def("segment_max(Tensor values, Tensor index, Tensor ptr, Tensor? perm) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("segment_max", TORCH_BOX(&megagnn::segment_max_cpu));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("segment_max", TORCH_BOX(&megagnn::segment_max_cuda));
}
#endif
