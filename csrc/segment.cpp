// Segment sum over CSR rows and its transpose, the gather: schema, checks, allocation, division of the work.
// Registered through torch's stable ABI, so that one build serves later releases of torch too.
#include <algorithm>
#include <optional>
#include <vector>

#include "binding.h"
#include "cpu/segment.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/runtime.h"
#include "cuda/segment.h"
#endif

namespace megagnn {
namespace {

// The checked arguments of either operation. Tensors are held here because contiguous() may have made them.
struct Call {
  Tensor values, index, ptr;
  std::optional<Tensor> perm;
  cpu::Scalar scalar;
  int64_t num_rows, num_entries, width;

  const int64_t* perm_data() const {
    return perm ? static_cast<const int64_t*>(perm->const_data_ptr()) : nullptr;
  }
  const int64_t* ptr_data() const { return static_cast<const int64_t*>(ptr.const_data_ptr()); }
  const int64_t* index_data() const { return static_cast<const int64_t*>(index.const_data_ptr()); }
};

void check_integers(const char* operation, const char* backend, const char* name, const Tensor& tensor,
                    const Tensor& values) {
  check(tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long, operation, backend, name,
        " must be a vector of int64, got ", tensor.dim(), " dimensions of ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.device() == values.device(), operation, backend, name,
        " must be on the device of values, got another");
}

// values must have one row per entry (segment_sum) or one per row (gather).
Call check_call(const char* operation, const char* backend, const Tensor& values, const Tensor& index,
                const Tensor& ptr, const std::optional<Tensor>& perm, bool values_are_entries) {
  const cpu::Scalar scalar = scalar_of(operation, backend, values);
  check_integers(operation, backend, "index", index, values);
  check_integers(operation, backend, "ptr", ptr, values);
  const int64_t num_entries = index.size(0), num_rows = ptr.size(0) - 1;
  check(num_rows >= 0, operation, backend, "ptr must have one element more than there are rows, got none");
  if (perm) {
    check_integers(operation, backend, "perm", *perm, values);
    check(perm->size(0) == num_entries, operation, backend, "perm must have one element per entry, got ",
          perm->size(0), " for ", num_entries, " entries");
  }
  const int64_t expected = values_are_entries ? num_entries : num_rows;
  check(values.dim() >= 1, operation, backend, "values must have at least one dimension, got none");
  check(values.size(0) == expected, operation, backend, "values must have one row per ",
        values_are_entries ? "entry, got " : "row of ptr, got ", values.size(0), " for ", expected);
  int64_t width = 1;
  for (int64_t d = 1; d < values.dim(); ++d) width *= values.size(d);
  return {make_contiguous(values),
          make_contiguous(index),
          make_contiguous(ptr),
          perm ? std::optional<Tensor>(make_contiguous(*perm)) : std::nullopt,
          scalar,
          num_rows,
          num_entries,
          width};
}

// First row of task t of num_tasks, which divide rows + entries evenly, not rows: degrees differ.
int64_t first_row(const int64_t* ptr, int64_t num_rows, int64_t t, int64_t num_tasks) {
  const int64_t goal = (ptr[num_rows] + num_rows) / num_tasks * t;
  if (t == num_tasks) return num_rows;
  int64_t low = 0, high = num_rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    (ptr[middle] + middle < goal) ? low = middle + 1 : high = middle;
  }
  return low;
}

// Length of the longest row. ptr must start at 0, never fall, and end at the number of entries.
int64_t check_ptr(const Call& call) {
  const int64_t* ptr = call.ptr_data();
  int64_t longest = 0, shortest = 0;
  for (int64_t row = 0; row < call.num_rows; ++row) {
    const int64_t length = ptr[row + 1] - ptr[row];
    longest = std::max(longest, length);
    shortest = std::min(shortest, length);
  }
  check(ptr[0] == 0 && shortest >= 0 && ptr[call.num_rows] == call.num_entries, "segment_sum", "cpu",
        "ptr must rise from 0 to the number of entries, ", call.num_entries, ", got ", ptr[0], " to ",
        ptr[call.num_rows], shortest < 0 ? ", falling on the way" : "");
  return longest;
}

// One row longer than kPartEntries: its parts in parallel, then their sum.
bool sum_long_row(const cpu::SegmentKernels& kernels, const Call& call, const cpu::SegmentInput& in,
                  char* out, int64_t row) {
  const int64_t begin = in.ptr[row], end = in.ptr[row + 1];
  const int64_t num_parts = (end - begin + cpu::kPartEntries - 1) / cpu::kPartEntries;
  const int64_t part_bytes = in.width * cpu::accumulator_size(call.scalar);
  std::vector<char> parts(size_t(num_parts * part_bytes));
  const bool ok = all_of_tasks(num_parts, [&](int64_t p) {
    const int64_t first = begin + p * cpu::kPartEntries;
    return kernels.sum_part(in, parts.data() + p * part_bytes, first,
                            std::min(end, first + cpu::kPartEntries));
  });
  kernels.sum_parts(parts.data(), num_parts, out + row * in.width * int64_t(call.values.element_size()),
                    in.width);
  return ok;
}

Tensor segment_sum_cpu(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  const Call call = check_call("segment_sum", "cpu", values, index, ptr, perm, true);
  const int64_t longest = check_ptr(call);
  Tensor result = new_result(call.values, call.num_rows);
  if (call.num_rows * call.width == 0) return result;
  const cpu::SegmentKernels& kernels = cpu::segment_kernels(call.scalar);
  const cpu::SegmentInput in{call.values.const_data_ptr(), call.ptr_data(), call.perm_data(),
                             call.num_entries, call.width};
  char* out = static_cast<char*>(result.mutable_data_ptr());
  const int64_t num_tasks = num_tasks_for((call.num_entries + call.num_rows) * call.width);
  bool ok =
      num_tasks == 1 ? kernels.sum_rows(in, out, 0, call.num_rows) : all_of_tasks(num_tasks, [&](int64_t t) {
        return kernels.sum_rows(in, out, first_row(in.ptr, call.num_rows, t, num_tasks),
                                first_row(in.ptr, call.num_rows, t + 1, num_tasks));
      });
  for (int64_t row = 0; longest > cpu::kPartEntries && row < call.num_rows; ++row) {
    if (in.ptr[row + 1] - in.ptr[row] > cpu::kPartEntries) ok &= sum_long_row(kernels, call, in, out, row);
  }
  check(ok, "segment_sum", "cpu", "perm must lie in [0, ", call.num_entries, "), got an element outside");
  return result;
}

Tensor gather_cpu(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  const Call call = check_call("gather", "cpu", values, index, ptr, perm, false);
  Tensor result = new_result(call.values, call.num_entries);
  const auto gather = cpu::segment_kernels(call.scalar).gather;
  const int64_t num_tasks = num_tasks_for(call.num_entries * call.width);
  const int64_t share = (call.num_entries + num_tasks - 1) / num_tasks;
  const void* from = call.values.const_data_ptr();
  void* out = result.mutable_data_ptr();
  const auto task = [&](int64_t t) {
    const int64_t begin = std::min(t * share, call.num_entries),
                  end = std::min(begin + share, call.num_entries);
    return gather(from, call.index_data(), out, begin, end, call.num_rows, call.width);
  };
  const bool ok = num_tasks == 1 ? task(0) : all_of_tasks(num_tasks, task);
  check(ok, "gather", "cpu", "index must lie in [0, ", call.num_rows, "), got an element outside");
  return result;
}

#ifdef MEGAGNN_WITH_CUDA
Tensor segment_sum_cuda(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  const Call call = check_call("segment_sum", "cuda", values, index, ptr, perm, true);
  const cuda::DeviceGuard guard("segment_sum", call.values.get_device());
  Tensor result = new_result(call.values, call.num_rows);
  if (call.num_rows * call.width == 0) return result;
  check_launch(
      "segment_sum",
      megagnn_cuda_segment_sum(call.scalar, call.values.const_data_ptr(), call.ptr_data(), call.perm_data(),
                               result.mutable_data_ptr(), call.num_rows, call.width, guard.stream()));
  return result;
}

Tensor gather_cuda(Tensor values, Tensor index, Tensor ptr, std::optional<Tensor> perm) {
  const Call call = check_call("gather", "cuda", values, index, ptr, perm, false);
  const cuda::DeviceGuard guard("gather", call.values.get_device());
  Tensor result = new_result(call.values, call.num_entries);
  if (call.num_entries * call.width == 0) return result;
  check_launch("gather",
               megagnn_cuda_gather(call.scalar, call.values.const_data_ptr(), call.index_data(),
                                   result.mutable_data_ptr(), call.num_entries, call.width, guard.stream()));
  return result;
}
#endif

}  // namespace
}  // namespace megagnn

// Both take all of index, ptr and perm: each is the backward of the other.
STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def("segment_sum(Tensor values, Tensor index, Tensor ptr, Tensor? perm) -> Tensor");
  library.def("gather(Tensor values, Tensor index, Tensor ptr, Tensor? perm) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("segment_sum", TORCH_BOX(&megagnn::segment_sum_cpu));
  library.impl("gather", TORCH_BOX(&megagnn::gather_cpu));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("segment_sum", TORCH_BOX(&megagnn::segment_sum_cuda));
  library.impl("gather", TORCH_BOX(&megagnn::gather_cuda));
}
#endif
