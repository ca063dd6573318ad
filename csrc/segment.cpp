// Segment sum and mean over CSR rows and their transpose, the gather: schema, checks, calls of the kernels.
// Registered through torch's stable ABI, so that one build serves later releases of torch too.
#include "cpu/segment.h"

#include "rows.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/segment.h"
#endif

namespace megagnn {
namespace {

// A result of more bytes than this will not be found in the cache by whoever reads it.
constexpr int64_t kCacheBytes = int64_t(24) << 20;

Tensor reduce_cpu(const char* operation, const Tensor& values, const Tensor& index, const Tensor& ptr,
                  const std::optional<Tensor>& perm, bool mean) {
  const Where where{operation, "cpu"};
  const cpu::Scalar scalar = scalar_of(operation, "cpu", values);
  const Rows rows = check_rows(where, values, index, ptr, perm);
  const int64_t width = check_values(where, values, rows.num_entries, "entry");
  const int64_t longest = check_ptr(where, rows);
  const Tensor from = make_contiguous(values);
  Tensor result = new_result(values, rows.num_rows);
  const cpu::RowSumInput in{from.const_data_ptr(), rows.ptr_data(), rows.perm_data(),
                            rows.num_entries,      width,           mean};
  const bool ok = sum_over_rows(cpu::segment_kernels(scalar).sum, scalar, in, result.mutable_data_ptr(),
                                rows.num_rows, longest);
  check(ok, operation, "cpu", "perm must lie in [0, ", rows.num_entries, "), got an element outside");
  return result;
}

Tensor segment_sum_cpu(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  return reduce_cpu("segment_sum", values, index, ptr, perm, false);
}

Tensor segment_mean_cpu(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  return reduce_cpu("segment_mean", values, index, ptr, perm, true);
}

Tensor take_rows_cpu(const char* operation, const Tensor& values, const Tensor& index, int64_t width) {
  const int64_t num_entries = index.size(0), num_rows = values.size(0);
  const Tensor from = make_contiguous(values), entries = make_contiguous(index);
  Tensor result = new_result(values, num_entries);
  const bool past_cache = num_entries * width * int64_t(values.element_size()) > kCacheBytes;
  const cpu::GatherInput in{from.const_data_ptr(), integers(entries), num_rows, width, past_cache};
  const auto gather = cpu::segment_kernels(scalar_of(operation, "cpu", values)).gather;
  void* out = result.mutable_data_ptr();
  const bool ok = over_entries(num_entries, width,
                               [&](int64_t begin, int64_t end) { return gather(in, out, begin, end); });
  check(ok, operation, "cpu", "index must lie in [0, ", num_rows, "), got an element outside");
  return result;
}

Tensor gather_cpu(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  const Where where{"gather", "cpu"};
  scalar_of("gather", "cpu", values);
  const Rows rows = check_rows(where, values, index, ptr, perm);
  return take_rows_cpu("gather", values, rows.index,
                       check_values(where, values, rows.num_rows, "row of ptr"));
}

Tensor gather_rows_cpu(Tensor values, Tensor index) {
  const Where where{"gather_rows", "cpu"};
  scalar_of("gather_rows", "cpu", values);
  check_integers(where, "index", index, values);
  const int64_t num_rows = values.dim() ? values.size(0) : 0;
  return take_rows_cpu("gather_rows", values, index, check_values(where, values, num_rows, "row"));
}

#ifdef MEGAGNN_WITH_CUDA
Tensor reduce_cuda(const char* operation, const Tensor& values, const Tensor& index, const Tensor& ptr,
                   const std::optional<Tensor>& perm, bool mean) {
  const Where where{operation, "cuda"};
  const cpu::Scalar scalar = scalar_of(operation, "cuda", values);
  const Rows rows = check_rows(where, values, index, ptr, perm);
  const int64_t width = check_values(where, values, rows.num_entries, "entry");
  const cuda::DeviceGuard guard(operation, values.get_device());
  const Tensor from = make_contiguous(values);
  Tensor result = new_result(values, rows.num_rows);
  if (rows.num_rows * width == 0) return result;
  const int64_t workspace_bytes = cuda::row_sum_workspace(scalar, rows.num_entries, width);
  const Tensor workspace = new_bytes(values, workspace_bytes);
  check_launch(operation,
               megagnn_cuda_segment_sum(scalar, from.const_data_ptr(), rows.ptr_data(), rows.perm_data(),
                                        result.mutable_data_ptr(), rows.num_rows, rows.num_entries, width,
                                        mean, workspace.mutable_data_ptr(), guard.stream()));
  return result;
}

Tensor segment_sum_cuda(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  return reduce_cuda("segment_sum", values, index, ptr, perm, false);
}

Tensor segment_mean_cuda(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  return reduce_cuda("segment_mean", values, index, ptr, perm, true);
}

Tensor take_rows_cuda(const char* operation, const Tensor& values, const Tensor& index, int64_t width) {
  const cuda::DeviceGuard guard(operation, values.get_device());
  const Tensor from = make_contiguous(values), entries = make_contiguous(index);
  const int64_t num_entries = index.size(0);
  Tensor result = new_result(values, num_entries);
  if (num_entries * width == 0) return result;
  check_launch(operation, megagnn_cuda_gather(scalar_of(operation, "cuda", values), from.const_data_ptr(),
                                              integers(entries), result.mutable_data_ptr(), num_entries,
                                              width, guard.stream()));
  return result;
}

Tensor gather_cuda(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  const Where where{"gather", "cuda"};
  const Rows rows = check_rows(where, values, index, ptr, perm);
  return take_rows_cuda("gather", values, rows.index,
                        check_values(where, values, rows.num_rows, "row of ptr"));
}

Tensor gather_rows_cuda(Tensor values, Tensor index) {
  const Where where{"gather_rows", "cuda"};
  check_integers(where, "index", index, values);
  const int64_t num_rows = values.dim() ? values.size(0) : 0;
  return take_rows_cuda("gather_rows", values, index, check_values(where, values, num_rows, "row"));
}
#endif

}  // namespace
}  // namespace megagnn

// segment_sum and gather both take all of index, ptr and perm: each is the backward of the other.
STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def("segment_sum(Tensor values, Tensor index, Tensor ptr, Tensor? perm) -> Tensor");
  library.def("segment_mean(Tensor values, Tensor index, Tensor ptr, Tensor? perm) -> Tensor");
  library.def("gather(Tensor values, Tensor index, Tensor ptr, Tensor? perm) -> Tensor");
  library.def("gather_rows(Tensor values, Tensor index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("segment_sum", TORCH_BOX(&megagnn::segment_sum_cpu));
  library.impl("segment_mean", TORCH_BOX(&megagnn::segment_mean_cpu));
  library.impl("gather", TORCH_BOX(&megagnn::gather_cpu));
  library.impl("gather_rows", TORCH_BOX(&megagnn::gather_rows_cpu));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("segment_sum", TORCH_BOX(&megagnn::segment_sum_cuda));
  library.impl("segment_mean", TORCH_BOX(&megagnn::segment_mean_cuda));
  library.impl("gather", TORCH_BOX(&megagnn::gather_cuda));
  library.impl("gather_rows", TORCH_BOX(&megagnn::gather_rows_cuda));
}
#endif
