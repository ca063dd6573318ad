// The edge operation of the Cartesian family (megagnn/models/cartesian/edge.py): sums over the neighbours of
// messages made channel by channel, and its gradients, each in one pass over the edges; of values, or of
// pairs of value and tangent ([Note: pairs] in cartesian_message.h).
#include "cpu/cartesian_edge.h"

#include <string>

#include "cpu/level.h"
#include "rows.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/cartesian_edge.h"
#endif

namespace megagnn {

MEGAGNN_KERNEL_TABLE(cpu::CartesianKernels, cartesian)

namespace {

constexpr int kFields = cpu::kFields;
constexpr const char* kFieldNames[kFields] = {"h", "v", "t"};

// Fails unless the tensor has these sizes and is of the type and device of `like`.
void check_sizes(Where where, const char* name, const Tensor& tensor, const Tensor& like,
                 const std::vector<int64_t>& sizes) {
  bool fits = tensor.dim() == int64_t(sizes.size()) && tensor.scalar_type() == like.scalar_type() &&
              tensor.device() == like.device();
  for (size_t d = 0; d < sizes.size() && fits; ++d) fits = tensor.size(int64_t(d)) == sizes[d];
  if (fits) return;
  std::string wanted, got;
  for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t size : tensor.sizes()) got += (got.empty() ? "" : ", ") + std::to_string(size);
  fail(where.operation, where.backend, name, " must have shape (", wanted, ") on the device of h and type ",
       torch::headeronly::toString(like.scalar_type()), ", got (", got, ") and ",
       torch::headeronly::toString(tensor.scalar_type()));
}

std::vector<int64_t> field_sizes(int64_t planes, int64_t rows, int field, int64_t width) {
  if (field == 0) return {planes, rows, width};
  return {planes, rows, cpu::kComponents[field], width};
}

// Whether kernels of the sums of a set, or of their gradients too, are compiled.
bool compiled(uint32_t set, bool gradients) {
  bool found = false;
  cartesian::for_sets([&](auto compiled) {
    using This = decltype(compiled);
    found = found || (set == This::kSet && (This::kGradient || !gradients));
  });
  return found;
}

// The checked arguments that both operations have.
struct Call {
  Where where;
  std::vector<int64_t> paths;
  uint32_t set = 0;
  bool pair = false;
  int64_t num_others = 0, width = 0, blocks = 0, num_radial = 0;
  int64_t num_weights = 0;  // of each path and channel; an edge reads num_radial of them
  Rows rows;
  Tensor weight, basis, unit, other;
  std::optional<Tensor> first;
  const cpu::CartesianKernels* kernels = nullptr;
  cpu::CartesianKernels::Set run{};

  int64_t planes() const { return pair ? 2 : 1; }
  int64_t num_paths() const { return int64_t(paths.size()); }
  // Where a path's weights are among the set's, in the order of their numbers.
  int64_t slot(int64_t path) const {
    return std::count_if(paths.begin(), paths.end(), [=](int64_t p) { return p < path; });
  }
};

// Where edges read different rows of weights.
void take_first(Call& call, const Tensor& first, const Tensor& weight) {
  const Where where = call.where;
  const int64_t E = call.rows.num_entries, R = call.num_radial;
  check_integers(where, "first", first, weight);
  check(first.size(0) == E, where.operation, where.backend,
        "first must be as long as index, the number of edges, got ", first.size(0), " and ", E);
  const int64_t rows = weight.dim() == 3 ? weight.size(2) : 0;
  check(rows >= R, where.operation, where.backend,
        "weight must have three dimensions, and a row for each of the ", R, " numbers of basis, got ",
        weight.dim(), " dimensions and ", rows, " rows");
  call.num_weights = rows, call.first = make_contiguous(first);
  if (!first.is_cpu()) return;
  const int64_t* const from = integers(*call.first);
  bool inside = true;
  for (int64_t e = 0; e < E; ++e) inside &= uint64_t(from[e]) <= uint64_t(rows - R);
  check(inside, where.operation, where.backend, "first must lie in [0, ", rows - R,
        "], got an element outside");
}

Call take(Where where, const Tensors& features, const Tensor& weight, const Tensor& basis, const Tensor& unit,
          std::vector<int64_t> paths, const Tensor& index, const Tensor& ptr,
          const std::optional<Tensor>& perm, const Tensor& other, const std::optional<Tensor>& first) {
  check(features.size() == kFields, where.operation, where.backend, "features must be three tensors, got ",
        features.size());
  const Tensor& h = features[0];
  check(h.dim() == 3 && (h.size(0) == 1 || h.size(0) == 2) &&
            (h.scalar_type() == ScalarType::Float || h.scalar_type() == ScalarType::Double),
        where.operation, where.backend,
        "h must be one or two matrices of float32 or float64, (1 or 2, N, F), got ", h.dim(),
        " dimensions of ", torch::headeronly::toString(h.scalar_type()));
  Call call{};
  call.where = where, call.paths = std::move(paths);
  for (int64_t p : call.paths) {
    check(p >= 1 && p <= cpu::kNumPaths && !(call.set >> (p - 1) & 1), where.operation, where.backend,
          "paths must be different numbers from 1 to ", cpu::kNumPaths, ", got ", p);
    call.set |= 1u << (p - 1);
  }
  call.rows = check_rows(where, h, index, ptr, perm);
  if (h.is_cpu()) check_ptr(where, call.rows);
  check_integers(where, "other", other, h);
  const int64_t E = call.rows.num_entries;
  check(other.size(0) == E, where.operation, where.backend,
        "index and other must be as long as each other, got ", E, " and ", other.size(0));
  call.pair = h.size(0) == 2, call.num_others = h.size(1), call.width = h.size(2);
  check(basis.dim() == 3, where.operation, where.backend, "basis must have three dimensions, got ",
        basis.dim());
  call.num_radial = basis.size(2);
  call.num_weights = call.num_radial;
  if (first) take_first(call, *first, weight);
  check_sizes(where, "weight", weight, h, {call.num_paths(), call.width, call.num_weights});
  check_sizes(where, "basis", basis, h, {call.planes(), E, call.num_radial});
  check_sizes(where, "unit", unit, h, {call.planes(), E, 3});
  call.weight = make_contiguous(weight), call.basis = make_contiguous(basis);
  call.unit = make_contiguous(unit), call.other = make_contiguous(other);
  check(compiled(call.set, false), where.operation, where.backend,
        "paths must be a set of megagnn/models/cartesian/messages.py, or the same from receivers to senders, "
        "got another");
  if (!h.is_cpu()) return call;
  call.kernels = &cartesian_kernels(scalar_of(where.operation, where.backend, h));
  call.blocks = (call.width + call.kernels->lanes - 1) / call.kernels->lanes;
  call.run = call.kernels->set(call.set, call.pair);
  return call;
}

void check_gradients(const Call& call, const Tensors& bars) {
  check(compiled(call.set, true) && bars.size() == kFields, call.where.operation, call.where.backend,
        "paths must be a set of megagnn/models/cartesian/messages.py and bars three tensors, got others");
}

// The fields of `mask`, which must be there; empty tensors for the others.
Tensors fields_of(const Call& call, const Tensors& tensors, int mask, int64_t num_rows) {
  Tensors found;
  for (int f = 0; f < kFields; ++f) {
    const bool there = mask >> f & 1;
    if (there) {
      check_sizes(call.where, kFieldNames[f], tensors[size_t(f)], call.weight,
                  field_sizes(call.planes(), num_rows, f, call.width));
    }
    found.push_back(there ? make_contiguous(tensors[size_t(f)]) : new_tensor(call.weight, {0}));
  }
  return found;
}

// Memory for the sums, empty tensors for fields that no path adds to.
Tensors new_sums(const Call& call) {
  Tensors results;
  for (int f = 0; f < kFields; ++f) {
    const bool there = cartesian::receivers(call.set) >> f & 1;
    results.push_back(
        new_tensor(call.weight, there ? field_sizes(call.planes(), call.rows.num_rows, f, call.width)
                                      : std::vector<int64_t>{0}));
  }
  return results;
}

// Memory for the gradients of weight, basis and unit; empty where not wanted.
Tensors new_gradients(const Call& call, bool weights, bool geometry) {
  const auto like = [&](const Tensor& x, bool wanted) {
    return new_tensor(call.weight, wanted ? std::vector<int64_t>(x.sizes().begin(), x.sizes().end())
                                          : std::vector<int64_t>{0});
  };
  return {like(call.weight, weights), like(call.basis, geometry), like(call.unit, geometry)};
}

// Features in the order in which the CPU kernels read them; the fields of `mask` must be there.
template <class T>
Tensor pack(const Call& call, const Tensors& tensors, int mask, int64_t num_rows, bool exchanged) {
  cpu::CartesianFields fields{{}, num_rows, call.width, exchanged};
  const Tensors held = fields_of(call, tensors, mask, num_rows);
  for (int f = 0; f < kFields; ++f) fields.data[f] = out_data<T>(held[size_t(f)]);
  const int64_t each = call.blocks * cartesian::numbers(mask) * call.planes() * call.kernels->lanes;
  const Tensor packed = new_tensor(call.weight, {num_rows * each});
  over_entries(num_rows, each, [&](int64_t begin, int64_t end) {
    call.kernels->pack(fields, mask, call.pair, packed.mutable_data_ptr(), begin, end);
    return true;
  });
  return packed;
}

// body(position in the weights (path, channel, row), position in the kernels' order).
template <class Body>
void over_weights(const Call& call, const Body& body) {
  const int64_t lanes = call.kernels->lanes, P = call.num_paths(), R = call.num_weights;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t slot = call.slot(call.paths[size_t(p)]);
    for (int64_t c = 0; c < call.width; ++c) {
      const int64_t at = (c / lanes * R * P + slot) * lanes + c % lanes;
      for (int64_t n = 0; n < R; ++n) body((p * call.width + c) * R + n, at + n * P * lanes);
    }
  }
}

template <class T>
Tensor pack_weights(const Call& call) {
  const Tensor packed =
      zeros(call.weight, {call.blocks * call.num_weights * call.num_paths() * call.kernels->lanes});
  const T* const from = data<T>(call.weight);
  T* const to = static_cast<T*>(packed.mutable_data_ptr());
  over_weights(call, [=](int64_t here, int64_t there) { to[there] = from[here]; });
  return packed;
}

template <class T>
cpu::CartesianInput input_of(const Call& call, const Tensor& weight, const Tensor& others) {
  const int64_t E = call.rows.num_entries, R = call.num_radial;
  const T *const basis = static_cast<const T*>(call.basis.const_data_ptr()),
                 *const unit = static_cast<const T*>(call.unit.const_data_ptr());
  return {{call.rows.ptr_data(),
           call.rows.perm_data(),
           integers(call.other),
           call.first ? integers(*call.first) : nullptr,
           E,
           call.num_others,
           R,
           call.num_weights,
           {basis, basis + E * R},
           {unit, unit + 3 * E}},
          weight.const_data_ptr(),
          others.const_data_ptr(),
          nullptr};
}

template <class T>
Tensors sum(const Call& call, const Tensors& features, bool exchanged) {
  const Tensor others = pack<T>(call, features, call.run.senders, call.num_others, exchanged);
  const Tensor weight = pack_weights<T>(call);
  cpu::CartesianFields out{{}, call.rows.num_rows, call.width, exchanged};
  const Tensors results = new_sums(call);
  for (int f = 0; f < kFields; ++f) out.data[f] = out_data<T>(results[size_t(f)]);
  const cpu::CartesianInput in = input_of<T>(call, weight, others);
  const bool ok = over_rows(in.edges.ptr, out.num_rows, call.width * call.num_paths(),
                            [&](int64_t begin, int64_t end) { return call.run.sum(in, out, begin, end); });
  check(ok, call.where.operation, call.where.backend, "other must lie in [0, ", call.num_others,
        ") and perm in [0, ", call.rows.num_entries, "), got an element outside");
  return results;
}

template <class T>
Tensors gradient(const Call& call, const Tensors& features, const Tensors& bars, bool weights,
                 bool geometry) {
  const int64_t E = call.rows.num_entries, R = call.num_radial, num_rows = call.rows.num_rows;
  const Tensor others = pack<T>(call, features, call.run.senders, call.num_others, false);
  const Tensor rows = pack<T>(call, bars, call.run.receivers, num_rows, true);
  const Tensor weight = pack_weights<T>(call);
  cpu::CartesianInput in = input_of<T>(call, weight, others);
  in.rows = rows.const_data_ptr();
  const Tensors results = new_gradients(call, weights, geometry);
  cpu::CartesianGradients out{};
  for (int64_t plane = 0; geometry && plane < call.planes(); ++plane) {
    out.basis[plane] = static_cast<T*>(results[1].mutable_data_ptr()) + plane * E * R;
    out.unit[plane] = static_cast<T*>(results[2].mutable_data_ptr()) + plane * E * 3;
  }
  const int64_t tasks = std::max<int64_t>(1, num_tasks_for((E + num_rows) * call.width * call.num_paths()));
  Tensors sums;  // of each task, added up in their order
  for (int64_t t = 0; t < (weights ? tasks : 0); ++t) sums.push_back(zeros(weight, {weight.numel()}));
  const bool ok = all_of_tasks(tasks, [&](int64_t t) {
    cpu::CartesianGradients own = out;
    if (weights) own.weight = sums[size_t(t)].mutable_data_ptr();
    return call.run.gradient(in, own, call.width, first_row(in.edges.ptr, num_rows, t, tasks),
                             first_row(in.edges.ptr, num_rows, t + 1, tasks));
  });
  check(ok, call.where.operation, call.where.backend, "other must lie in [0, ", call.num_others,
        ") and perm in [0, ", call.rows.num_entries, "), got an element outside");
  if (!weights) return results;
  T* const to = static_cast<T*>(results[0].mutable_data_ptr());
  over_weights(call, [&](int64_t here, int64_t there) {
    T total = 0;
    for (const Tensor& own : sums) total += static_cast<const T*>(own.const_data_ptr())[there];
    to[here] = total;
  });
  return results;
}

Tensors cartesian_edge_sum_cpu(Tensors features, Tensor weight, Tensor basis, Tensor unit,
                               std::vector<int64_t> paths, bool exchanged, Tensor index, Tensor ptr,
                               std::optional<Tensor> perm, Tensor other, std::optional<Tensor> first) {
  const Call call = take({"cartesian_edge_sum", "cpu"}, features, weight, basis, unit, std::move(paths),
                         index, ptr, perm, other, first);
  return weight.scalar_type() == ScalarType::Float ? sum<float>(call, features, exchanged)
                                                   : sum<double>(call, features, exchanged);
}

Tensors cartesian_edge_gradient_cpu(Tensors features, Tensors bars, Tensor weight, Tensor basis, Tensor unit,
                                    std::vector<int64_t> paths, bool weights, bool geometry, Tensor index,
                                    Tensor ptr, std::optional<Tensor> perm, Tensor other,
                                    std::optional<Tensor> first) {
  const Call call = take({"cartesian_edge_gradient", "cpu"}, features, weight, basis, unit, std::move(paths),
                         index, ptr, perm, other, first);
  check_gradients(call, bars);
  return weight.scalar_type() == ScalarType::Float
             ? gradient<float>(call, features, bars, weights, geometry)
             : gradient<double>(call, features, bars, weights, geometry);
}

#ifdef MEGAGNN_WITH_CUDA
// What the kernels of both operations read; `held` keeps it.
cuda::CartesianProblem problem_of(const Call& call, const Tensors& features, Tensors& held) {
  cuda::CartesianProblem in{};
  held = fields_of(call, features, cartesian::senders(call.set), call.num_others);
  for (size_t f = 0; f < kFields; ++f) in.features[f] = held[f].const_data_ptr();
  held.push_back(new_tensor(call.weight, {call.weight.numel()}));
  in.table = held.back().mutable_data_ptr();
  in.weight = call.weight.const_data_ptr(), in.basis = call.basis.const_data_ptr();
  in.unit = call.unit.const_data_ptr();
  in.ptr = call.rows.ptr_data(), in.perm = call.rows.perm_data(), in.index = call.rows.index_data();
  in.other = integers(call.other);
  in.first = call.first ? integers(*call.first) : nullptr;
  in.num_rows = call.rows.num_rows, in.num_others = call.num_others, in.num_edges = call.rows.num_entries;
  in.width = call.width, in.num_weights = call.num_weights, in.num_radial = call.num_radial;
  for (size_t p = 0; p < call.paths.size(); ++p) in.order[call.slot(call.paths[p])] = int64_t(p);
  return in;
}

Tensors cartesian_edge_sum_cuda(Tensors features, Tensor weight, Tensor basis, Tensor unit,
                                std::vector<int64_t> paths, bool exchanged, Tensor index, Tensor ptr,
                                std::optional<Tensor> perm, Tensor other, std::optional<Tensor> first) {
  const Call call = take({"cartesian_edge_sum", "cuda"}, features, weight, basis, unit, std::move(paths),
                         index, ptr, perm, other, first);
  const cuda::DeviceGuard guard(call.where.operation, weight.get_device());
  Tensors held;
  cuda::CartesianProblem in = problem_of(call, features, held);
  in.exchanged = exchanged;
  const Tensors results = new_sums(call);
  for (size_t f = 0; f < kFields; ++f) in.sums[f] = results[f].mutable_data_ptr();
  if (in.num_rows * in.width == 0) return results;
  check_launch(call.where.operation,
               megagnn_cuda_cartesian_edge_sum(scalar_of(call.where.operation, "cuda", weight), call.pair,
                                               call.set, &in, guard.stream()));
  return results;
}

Tensors cartesian_edge_gradient_cuda(Tensors features, Tensors bars, Tensor weight, Tensor basis, Tensor unit,
                                     std::vector<int64_t> paths, bool weights, bool geometry, Tensor index,
                                     Tensor ptr, std::optional<Tensor> perm, Tensor other,
                                     std::optional<Tensor> first) {
  const Call call = take({"cartesian_edge_gradient", "cuda"}, features, weight, basis, unit, std::move(paths),
                         index, ptr, perm, other, first);
  check_gradients(call, bars);
  const cuda::DeviceGuard guard(call.where.operation, weight.get_device());
  Tensors held;
  cuda::CartesianProblem in = problem_of(call, features, held);
  const Tensors cotangents = fields_of(call, bars, cartesian::receivers(call.set), in.num_rows);
  for (size_t f = 0; f < kFields; ++f) in.bars[f] = cotangents[f].const_data_ptr();
  in.num_parts = cuda::cartesian_parts(in.num_edges, in.width, in.num_weights);
  const Tensor parts = new_tensor(weight, {weights ? in.num_parts * weight.numel() : 0});
  in.parts = parts.mutable_data_ptr();
  const Tensors results = new_gradients(call, weights, geometry);
  if (weights) in.weight_bar = results[0].mutable_data_ptr();
  if (geometry) in.basis_bar = results[1].mutable_data_ptr(), in.unit_bar = results[2].mutable_data_ptr();
  check_launch(call.where.operation,
               megagnn_cuda_cartesian_edge_gradient(scalar_of(call.where.operation, "cuda", weight),
                                                    call.pair, call.set, &in, guard.stream()));
  return results;
}
#endif

}  // namespace
}  // namespace megagnn

// other: the atom at the other end of each edge. basis, unit and all features have a first dimension of one
// plane, or of two, value and tangent; `exchanged`: features and sums have the tangent first. first: of each
// edge, the row of weights that the first of its numbers in `basis` multiplies; without it that is 0.
STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def(
      "cartesian_edge_sum(Tensor[] features, Tensor weight, Tensor basis, Tensor unit, int[] paths, "
      "bool exchanged, Tensor index, Tensor ptr, Tensor? perm, Tensor other, Tensor? first=None) -> "
      "Tensor[]");
  library.def(
      "cartesian_edge_gradient(Tensor[] features, Tensor[] bars, Tensor weight, Tensor basis, Tensor unit, "
      "int[] paths, bool weights, bool geometry, Tensor index, Tensor ptr, Tensor? perm, Tensor other, "
      "Tensor? first=None) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("cartesian_edge_sum", TORCH_BOX(&megagnn::cartesian_edge_sum_cpu));
  library.impl("cartesian_edge_gradient", TORCH_BOX(&megagnn::cartesian_edge_gradient_cpu));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("cartesian_edge_sum", TORCH_BOX(&megagnn::cartesian_edge_sum_cuda));
  library.impl("cartesian_edge_gradient", TORCH_BOX(&megagnn::cartesian_edge_gradient_cuda));
}
#endif
