// Scatter by unsorted indices without Segments: out[index[e]] += values[e].
// CPU: a stable counting sort of the entries by row, then the segment sum, so that no two threads share a row
// and the bits depend on nothing but the input. CUDA: atomic additions, in whatever order they come.
#include "cpu/segment.h"
#include "rows.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/scatter.h"
#endif

namespace megagnn {
namespace {

int64_t check_scatter(Where where, const Tensor& values, const Tensor& index, int64_t num_rows) {
  scalar_of(where.operation, where.backend, values);
  check_integers(where, "index", index, values);
  check(num_rows >= 0, where.operation, where.backend, "num_rows must not be negative, got ", num_rows);
  return check_values(where, values, index.size(0), "entry");
}

// Stable counting sort: ptr (num_rows + 1) and perm (num_entries) of the rows; false at an index out of
// range. Chunks of the entries count in parallel, each for itself; their counts in order of row, then chunk,
// are where each chunk writes.
bool sort_entries(const int64_t* index, int64_t num_entries, int64_t num_rows, int64_t* ptr, int64_t* perm) {
  int64_t num_chunks = num_entries < kSerialElements ? 1 : torch::stable::get_num_threads();
  if (num_chunks * num_rows > num_entries) num_chunks = 1;
  const int64_t share = (num_entries + num_chunks - 1) / num_chunks;
  std::vector<int64_t> counts(size_t(num_chunks * num_rows));
  const auto over_chunks = [&](const auto& task) {
    const auto chunk = [&](int64_t t) {
      return task(std::min(t * share, num_entries), std::min((t + 1) * share, num_entries),
                  counts.data() + t * num_rows);
    };
    return num_chunks == 1 ? chunk(0) : all_of_tasks(num_chunks, chunk);
  };
  const bool ok = over_chunks([&](int64_t begin, int64_t end, int64_t* count) {
    for (int64_t e = begin; e < end; ++e) {
      if (uint64_t(index[e]) >= uint64_t(num_rows)) return false;
      ++count[index[e]];
    }
    return true;
  });
  if (!ok) return false;
  int64_t total = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    ptr[row] = total;
    for (int64_t t = 0; t < num_chunks; ++t) {
      const int64_t count = counts[size_t(t * num_rows + row)];
      counts[size_t(t * num_rows + row)] = total;
      total += count;
    }
  }
  ptr[num_rows] = total;
  return over_chunks([&](int64_t begin, int64_t end, int64_t* next) {
    for (int64_t e = begin; e < end; ++e) perm[next[index[e]]++] = e;
    return true;
  });
}

Tensor scatter_add_cpu(Tensor values, Tensor index, int64_t num_rows) {
  const Where where{"scatter_add", "cpu"};
  const int64_t width = check_scatter(where, values, index, num_rows);
  const cpu::Scalar scalar = scalar_of(where.operation, where.backend, values);
  const Tensor from = make_contiguous(values), entries = make_contiguous(index);
  const int64_t num_entries = index.size(0);
  const Tensor order = new_of_type(values, {num_rows + 1 + num_entries}, ScalarType::Long);
  int64_t* ptr = static_cast<int64_t*>(order.mutable_data_ptr());
  int64_t* perm = ptr + num_rows + 1;
  check(sort_entries(integers(entries), num_entries, num_rows, ptr, perm), where.operation, where.backend,
        "index must lie in [0, ", num_rows, "), got an element outside");
  int64_t longest = 0;
  for (int64_t row = 0; row < num_rows; ++row) longest = std::max(longest, ptr[row + 1] - ptr[row]);
  Tensor result = new_result(values, num_rows);
  const cpu::RowSumInput in{from.const_data_ptr(), ptr, perm, num_entries, width};
  sum_over_rows(cpu::segment_kernels(scalar).sum, scalar, in, result.mutable_data_ptr(), num_rows, longest);
  return result;
}

#ifdef MEGAGNN_WITH_CUDA
Tensor scatter_add_cuda(Tensor values, Tensor index, int64_t num_rows) {
  const Where where{"scatter_add", "cuda"};
  const int64_t width = check_scatter(where, values, index, num_rows);
  const cpu::Scalar scalar = scalar_of(where.operation, where.backend, values);
  const cuda::DeviceGuard guard(where.operation, values.get_device());
  const Tensor from = make_contiguous(values), entries = make_contiguous(index);
  Tensor result = new_result(values, num_rows);
  if (num_rows * width == 0) return result;
  // bfloat16 is summed in float32, in memory of its own, and rounded once.
  const Tensor sums = new_bytes(values, scalar == cpu::kBFloat16 ? num_rows * width * 4 : 0);
  check_launch(where.operation, megagnn_cuda_scatter_add(scalar, from.const_data_ptr(), integers(entries),
                                                         result.mutable_data_ptr(), num_rows, index.size(0),
                                                         width, sums.mutable_data_ptr(), guard.stream()));
  return result;
}
#endif

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def("scatter_add(Tensor values, Tensor index, SymInt num_rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("scatter_add", TORCH_BOX(&megagnn::scatter_add_cpu));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("scatter_add", TORCH_BOX(&megagnn::scatter_add_cuda));
}
#endif
