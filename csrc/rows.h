// What the bindings of the operations over CSR rows share: checks, division of the work, sums on the CPU.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "binding.h"
#include "cpu/segment.h"

namespace megagnn {

// Uninitialised, contiguous, on the device of `like`.
inline Tensor new_of_type(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  int32_t device_type, device_index, dtype = aoti_torch_dtype_uint8();
  if (type == ScalarType::Double) dtype = aoti_torch_dtype_float64();
  if (type == ScalarType::Float) dtype = aoti_torch_dtype_float32();
  if (type == ScalarType::Long) dtype = aoti_torch_dtype_int64();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// Memory for intermediate results, from torch's allocator.
inline Tensor new_bytes(const Tensor& like, int64_t size) {
  return new_of_type(like, {size}, ScalarType::Byte);
}

// Where an error is: the operation and its back end.
struct Where {
  const char *operation, *backend;
};

inline const int64_t* integers(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

inline void check_integers(Where where, const char* name, const Tensor& tensor, const Tensor& values) {
  check(tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long, where.operation, where.backend, name,
        " must be a vector of int64, got ", tensor.dim(), " dimensions of ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.device() == values.device(), where.operation, where.backend, name,
        " must be on the device of values, got another");
}

// The rows of Segments, checked. Tensors are held because contiguous() may have made them.
struct Rows {
  Tensor index, ptr;
  std::optional<Tensor> perm;
  int64_t num_rows, num_entries;

  const int64_t* perm_data() const { return perm ? integers(*perm) : nullptr; }
  const int64_t* ptr_data() const { return integers(ptr); }
  const int64_t* index_data() const { return integers(index); }
};

inline Rows check_rows(Where where, const Tensor& values, const Tensor& index, const Tensor& ptr,
                       const std::optional<Tensor>& perm) {
  check_integers(where, "index", index, values);
  check_integers(where, "ptr", ptr, values);
  const int64_t num_entries = index.size(0), num_rows = ptr.size(0) - 1;
  check(num_rows >= 0, where.operation, where.backend,
        "ptr must have one element more than there are rows, got none");
  if (perm) {
    check_integers(where, "perm", *perm, values);
    check(perm->size(0) == num_entries, where.operation, where.backend,
          "perm must have one element per entry, got ", perm->size(0), " for ", num_entries, " entries");
  }
  return {make_contiguous(index), make_contiguous(ptr),
          perm ? std::optional<Tensor>(make_contiguous(*perm)) : std::nullopt, num_rows, num_entries};
}

// Columns of values (num_rows, ...); `what` names what it must have one row for.
inline int64_t check_values(Where where, const Tensor& values, int64_t num_rows, const char* what) {
  check(values.dim() >= 1, where.operation, where.backend,
        "values must have at least one dimension, got none");
  check(values.size(0) == num_rows, where.operation, where.backend, "values must have one row per ", what,
        ", got ", values.size(0), " for ", num_rows);
  int64_t width = 1;
  for (int64_t d = 1; d < values.dim(); ++d) width *= values.size(d);
  return width;
}

// First row of task t of num_tasks, which divide rows + entries evenly, not rows: degrees differ.
inline int64_t first_row(const int64_t* ptr, int64_t num_rows, int64_t t, int64_t num_tasks) {
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
inline int64_t check_ptr(Where where, const Rows& rows) {
  const int64_t* ptr = rows.ptr_data();
  int64_t longest = 0, shortest = 0;
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const int64_t length = ptr[row + 1] - ptr[row];
    longest = std::max(longest, length);
    shortest = std::min(shortest, length);
  }
  check(ptr[0] == 0 && shortest >= 0 && ptr[rows.num_rows] == rows.num_entries, where.operation,
        where.backend, "ptr must rise from 0 to the number of entries, ", rows.num_entries, ", got ", ptr[0],
        " to ", ptr[rows.num_rows], shortest < 0 ? ", falling on the way" : "");
  return longest;
}

// Calls task(row_begin, row_end) over all rows, in parallel, balanced by entries; true when every call
// returned true.
template <class Task>
bool over_rows(const int64_t* ptr, int64_t num_rows, int64_t width, const Task& task) {
  const int64_t num_tasks = num_tasks_for((ptr[num_rows] + num_rows) * width);
  if (num_tasks == 1) return task(0, num_rows);
  return all_of_tasks(num_tasks, [&](int64_t t) {
    return task(first_row(ptr, num_rows, t, num_tasks), first_row(ptr, num_rows, t + 1, num_tasks));
  });
}

// Calls task(begin, end) over equal shares of the entries, in parallel.
template <class Task>
bool over_entries(int64_t num_entries, int64_t width, const Task& task) {
  const int64_t num_tasks = num_tasks_for(num_entries * width);
  if (num_tasks == 1) return task(0, num_entries);
  const int64_t share = (num_entries + num_tasks - 1) / num_tasks;
  return all_of_tasks(num_tasks, [&](int64_t t) {
    const int64_t begin = std::min(t * share, num_entries);
    return task(begin, std::min(begin + share, num_entries));
  });
}

// One row longer than kPartEntries: its parts in parallel, then their sum.
inline bool sum_long_row(const cpu::RowSumKernels& kernels, cpu::Scalar scalar, const cpu::RowSumInput& in,
                         void* out, int64_t row) {
  const int64_t begin = in.ptr[row], end = in.ptr[row + 1];
  const int64_t num_parts = (end - begin + cpu::kPartEntries - 1) / cpu::kPartEntries;
  const int64_t part_bytes = in.width * cpu::accumulator_size(scalar);
  std::vector<char> parts(size_t(num_parts * part_bytes));
  const bool ok = all_of_tasks(num_parts, [&](int64_t p) {
    const int64_t first = begin + p * cpu::kPartEntries;
    return kernels.sum_part(in, parts.data() + p * part_bytes, first,
                            std::min(end, first + cpu::kPartEntries));
  });
  kernels.sum_parts(in, parts.data(), num_parts, out, row);
  return ok;
}

// All rows of out (num_rows, width); false where perm or index left its range.
inline bool sum_over_rows(const cpu::RowSumKernels& kernels, cpu::Scalar scalar, const cpu::RowSumInput& in,
                          void* out, int64_t num_rows, int64_t longest) {
  if (num_rows * in.width == 0) return true;
  bool ok = over_rows(in.ptr, num_rows, in.width, [&](int64_t row_begin, int64_t row_end) {
    return kernels.sum_rows(in, out, row_begin, row_end);
  });
  for (int64_t row = 0; longest > cpu::kPartEntries && row < num_rows; ++row) {
    if (in.ptr[row + 1] - in.ptr[row] > cpu::kPartEntries) ok &= sum_long_row(kernels, scalar, in, out, row);
  }
  return ok;
}

}  // namespace megagnn
