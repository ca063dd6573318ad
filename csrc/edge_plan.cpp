// How the edges of a batch are cut into blocks and divided over workers.
#include "binding.h"

namespace megagnn {
namespace {

constexpr const char* kName = "edge_plan";

// The edges' two ends, checked: sorted by destination, every source in range.
struct Ends {
  Tensor destination, source, ptr;
  int64_t num_rows, num_edges;

  const int64_t *to, *from, *rows;  // of those: asking torch for them costs a call
};

Ends check_ends(const Tensor& destination, const Tensor& source, const Tensor& ptr, int64_t num_sources) {
  check(destination.dim() == 1 && source.dim() == 1 && ptr.dim() == 1 && ptr.size(0) > 0 &&
            destination.scalar_type() == ScalarType::Long && source.scalar_type() == ScalarType::Long &&
            ptr.scalar_type() == ScalarType::Long,
        kName, "cpu", "destination, source and ptr must be vectors of int64, ptr not empty");
  Ends ends{make_contiguous(destination),
            make_contiguous(source),
            make_contiguous(ptr),
            ptr.size(0) - 1,
            destination.size(0),
            nullptr,
            nullptr,
            nullptr};
  ends.to = static_cast<const int64_t*>(ends.destination.const_data_ptr());
  ends.from = static_cast<const int64_t*>(ends.source.const_data_ptr());
  const int64_t* rows = ends.rows = static_cast<const int64_t*>(ends.ptr.const_data_ptr());
  check(rows[0] == 0 && rows[ends.num_rows] == ends.num_edges && source.size(0) == ends.num_edges, kName,
        "cpu", "ptr must rise from 0 to the number of edges, ", ends.num_edges, ", got ", rows[0], " to ",
        rows[ends.num_rows]);
  for (int64_t row = 0; row < ends.num_rows; ++row) {
    check(rows[row + 1] >= rows[row], kName, "cpu", "ptr must rise, got ", rows[row], " before ",
          rows[row + 1]);
    for (int64_t e = rows[row]; e < rows[row + 1]; ++e) {
      check(ends.to[e] == row, kName, "cpu", "edges must be sorted by destination, got ", ends.to[e],
            " in row ", row);
      check(uint64_t(ends.from[e]) < uint64_t(num_sources), kName, "cpu", "sources must lie in [0, ",
            num_sources, "), got ", ends.from[e]);
    }
  }
  return ends;
}

// First edges of the blocks, and at last the number of edges: whole rows, or pieces of one that is longer.
std::vector<int64_t> cut_blocks(const Ends& ends, int64_t block_edges) {
  std::vector<int64_t> bounds{0};
  for (int64_t row = 0; row < ends.num_rows; ++row) {
    const int64_t begin = ends.rows[row], end = ends.rows[row + 1];
    if (end - bounds.back() <= block_edges) continue;
    if (begin > bounds.back()) bounds.push_back(begin);
    while (end - bounds.back() > block_edges) bounds.push_back(bounds.back() + block_edges);
  }
  if (ends.num_edges > bounds.back()) bounds.push_back(ends.num_edges);
  return bounds;
}

Tensor vector_of(const std::vector<int64_t>& values, const Tensor& like) {
  Tensor out = new_tensor(like, {int64_t(values.size())});
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

// [Note: plan] A worker takes neighbouring blocks and never part of a row, so destinations need no atomics;
// sums over sources go to rows of the worker's own, between the first and the last source it meets, and are
// added in the workers' order at the end. Bits therefore depend on the number of workers and on nothing else.
//
// Returns blocks (4 each: first edge, end edge, first row, end row) and workers (4 each: first block, end
// block, first source, end source).
std::tuple<Tensor, Tensor> edge_plan(Tensor destination, Tensor source, Tensor ptr, int64_t num_sources,
                                     int64_t block_edges, int64_t max_workers) {
  check(block_edges > 0 && max_workers > 0, kName, "cpu",
        "block_edges and max_workers must be positive, got ", block_edges, " and ", max_workers);
  const Ends ends = check_ends(destination, source, ptr, num_sources);
  const std::vector<int64_t> bounds = cut_blocks(ends, block_edges);
  const int64_t num_blocks = int64_t(bounds.size()) - 1;
  const auto starts_row = [&](int64_t block) {
    const int64_t e = bounds[size_t(block)];
    return ends.rows[ends.to[e]] == e;
  };
  std::vector<int64_t> blocks, workers;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t begin = bounds[size_t(b)], end = bounds[size_t(b) + 1];
    blocks.insert(blocks.end(), {begin, end, ends.to[begin], ends.to[end - 1] + 1});
  }
  for (int64_t first = 0, w = 0; first < num_blocks; ++w) {
    const int64_t goal = w + 1 < max_workers ? ends.num_edges / max_workers * (w + 1) : ends.num_edges;
    int64_t end = first + 1;
    while (end < num_blocks && (!starts_row(end) || bounds[size_t(end)] < goal)) ++end;
    const int64_t* from = ends.from;
    const auto [low, high] = std::minmax_element(from + bounds[size_t(first)], from + bounds[size_t(end)]);
    workers.insert(workers.end(), {first, end, *low, *high + 1});
    first = end;
  }
  return {vector_of(blocks, ends.ptr), vector_of(workers, ends.ptr)};
}

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def(
      "edge_plan(Tensor destination, Tensor source, Tensor ptr, int num_sources, int block_edges, int "
      "max_workers)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("edge_plan", TORCH_BOX(&megagnn::edge_plan));
}
