// Vectors along edges and lattice translations, each in one pass over the edges: as chains of gathers,
// products and sums of (E, 3) they write and read that three to five times. CPU; a GPU has the chain.
#include "rows.h"

namespace megagnn {
namespace {

constexpr int64_t kAxes = 3;

void check_real(Where where, const char* name, const Tensor& tensor, const Tensor& like,
                std::vector<int64_t> rest) {
  bool fits = tensor.scalar_type() == like.scalar_type() && tensor.dim() == int64_t(rest.size()) + 1;
  for (size_t d = 0; d < rest.size() && fits; ++d) fits = tensor.size(int64_t(d) + 1) == rest[d];
  check(fits && (tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double),
        where.operation, where.backend, name,
        " must be float32 or float64, the same for all, with 3 columns, got ", tensor.dim(),
        " dimensions of ", torch::headeronly::toString(tensor.scalar_type()));
}

template <class T>
const T* reals(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
bool subtract_ends(const Tensor& to, const Tensor& from, const T* shift, const int64_t* destination,
                   const int64_t* source, T* out, int64_t num_edges) {
  const T *to_rows = reals<T>(to), *from_rows = reals<T>(from);
  const uint64_t num_to = uint64_t(to.size(0)), num_from = uint64_t(from.size(0));
  return over_entries(num_edges, 2 * kAxes, [=](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t i = destination[e], j = source[e];
      if (uint64_t(i) >= num_to || uint64_t(j) >= num_from) return false;
      for (int64_t axis = 0; axis < kAxes; ++axis) {
        const T x =
            shift ? from_rows[kAxes * j + axis] + shift[kAxes * e + axis] : from_rows[kAxes * j + axis];
        out[kAxes * e + axis] = x - to_rows[kAxes * i + axis];
      }
    }
    return true;
  });
}

// from[source] + shift - to[destination].
Tensor edge_difference_cpu(Tensor to, Tensor from, std::optional<Tensor> shift, Tensor destination,
                           Tensor source) {
  const Where where{"edge_difference", "cpu"};
  check_real(where, "to", to, to, {kAxes});
  check_real(where, "from", from, to, {kAxes});
  check_integers(where, "destination", destination, to);
  check_integers(where, "source", source, to);
  const int64_t num_edges = destination.size(0);
  check(source.size(0) == num_edges, where.operation, where.backend,
        "destination and source must be as long as each other, got ", num_edges, " and ", source.size(0));
  if (shift) {
    check_real(where, "shift", *shift, to, {kAxes});
    check(shift->size(0) == num_edges, where.operation, where.backend,
          "shift must have one row per edge, got ", shift->size(0), " for ", num_edges);
  }
  const Tensor a = make_contiguous(to), b = make_contiguous(from), i = make_contiguous(destination),
               j = make_contiguous(source), s = shift ? make_contiguous(*shift) : to;
  Tensor out = new_tensor(to, {num_edges, kAxes});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return subtract_ends<T>(a, b, shift ? reals<T>(s) : nullptr, integers(i), integers(j),
                            static_cast<T*>(out.mutable_data_ptr()), num_edges);
  };
  const bool ok = to.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
  check(ok, where.operation, where.backend, "destination must lie in [0, ", a.size(0), ") and source in [0, ",
        b.size(0), "), got an element outside");
  return out;
}

template <class T>
bool translate(const Tensor& cell, const T* shifts, const int64_t* structure, T* out, int64_t num_edges) {
  const T* cells = reals<T>(cell);
  const uint64_t num_cells = uint64_t(cell.size(0));
  return over_entries(num_edges, 2 * kAxes, [=](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      if (uint64_t(structure[e]) >= num_cells) return false;
      const T *n = shifts + kAxes * e, *c = cells + kAxes * kAxes * structure[e];
      for (int64_t axis = 0; axis < kAxes; ++axis) {
        out[kAxes * e + axis] = n[0] * c[axis] + n[1] * c[kAxes + axis] + n[2] * c[2 * kAxes + axis];
      }
    }
    return true;
  });
}

// The rows of each edge's cell, times its numbers of them, added up.
Tensor lattice_shift_cpu(Tensor cell, Tensor shifts, Tensor structure) {
  const Where where{"lattice_shift", "cpu"};
  check_real(where, "cell", cell, cell, {kAxes, kAxes});
  check_real(where, "shifts", shifts, cell, {kAxes});
  check_integers(where, "structure", structure, cell);
  const int64_t num_edges = shifts.size(0);
  check(structure.size(0) == num_edges, where.operation, where.backend,
        "structure must have one element per edge, got ", structure.size(0), " for ", num_edges);
  const Tensor cells = make_contiguous(cell), n = make_contiguous(shifts), of = make_contiguous(structure);
  Tensor out = new_tensor(cell, {num_edges, kAxes});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return translate<T>(cells, reals<T>(n), integers(of), static_cast<T*>(out.mutable_data_ptr()), num_edges);
  };
  const bool ok = cell.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
  check(ok, where.operation, where.backend, "structure must lie in [0, ", cell.size(0),
        "), got an element outside");
  return out;
}

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def(
      "edge_difference(Tensor to, Tensor sender, Tensor? shift, Tensor destination, Tensor source) -> "
      "Tensor");
  library.def("lattice_shift(Tensor cell, Tensor shifts, Tensor structure) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("edge_difference", TORCH_BOX(&megagnn::edge_difference_cpu));
  library.impl("lattice_shift", TORCH_BOX(&megagnn::lattice_shift_cpu));
}
