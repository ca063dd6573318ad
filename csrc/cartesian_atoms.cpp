// The atoms' side of the Cartesian family (megagnn/models/cartesian/atoms.py): the norm of all fields, gates
// and products of an atom's features, and their gradients, each in one pass over the atoms; of values, or of
// pairs of value and tangent ([Note: pairs] in cartesian_message.h). CPU; a GPU has the chain.
#include "cpu/cartesian_atoms.h"

#include <string>

#include "binding.h"
#include "cartesian_message.h"
#include "cpu/level.h"

namespace megagnn {

MEGAGNN_KERNEL_TABLE(cpu::AtomsKernels, cartesian_atoms)

namespace {

constexpr int kFields = cartesian::kFields;
constexpr const char* kFieldNames[kFields] = {"h", "v", "t"};

// One call: its checked tensors, which it holds, and what the kernels read.
class Call {
 public:
  // `like`: features of some field, (planes, atoms, ...) of a pair, else (atoms, ...).
  Call(const char* operation, const Tensor& like, bool pair)
      : operation_(operation), like_(like), pair_(pair), first_(pair ? 1 : 0) {
    check(like.dim() > first_ && (!pair || like.size(0) == 2) &&
              (like.scalar_type() == ScalarType::Float || like.scalar_type() == ScalarType::Double),
          operation, "cpu", "features must be matrices of float32 or float64, of a pair two, got ",
          like.dim(), " dimensions of ", torch::headeronly::toString(like.scalar_type()));
    raw.num_atoms = like.size(first_);
    const cpu::AtomsKernels& table = cartesian_atoms_kernels(scalar_of(operation, "cpu", like));
    kernels = pair ? &table.pair : &table.value;
  }

  cpu::AtomsCall raw{};
  const cpu::AtomsKernels::Set* kernels;

  std::vector<int64_t> sizes(int field, int64_t width) const {
    std::vector<int64_t> found = squares_sizes();
    found.back() = width;
    if (field) found.insert(found.end() - 1, cartesian::kComponents[field]);
    return found;
  }
  std::vector<int64_t> squares_sizes() const {
    return pair_ ? std::vector<int64_t>{2, raw.num_atoms, 1} : std::vector<int64_t>{raw.num_atoms, 1};
  }

  // A field that is there, of any width where that is negative.
  cpu::AtomField field(const char* what, int f, const Tensor& tensor, int64_t width = -1) {
    const std::vector<int64_t> wanted = sizes(f, width < 0 && tensor.dim() ? tensor.size(-1) : width);
    held_.push_back(checked(what, tensor, wanted));
    const Tensor& t = held_.back();
    static char nothing;  // an empty tensor has no address; null is for absent fields
    void* const address = const_cast<void*>(t.const_data_ptr());
    return {address ? address : &nothing, pair_ ? t.stride(0) : 0, t.stride(first_),
            f ? t.stride(first_ + 1) : 0, wanted.back()};
  }
  // Those of a list; absent ones are null. All have a width, or each its own.
  void fields(cpu::AtomField* to, const Tensors& tensors, int64_t width = -1) {
    for (int f = 0; f < kFields; ++f)
      if (!absent(tensors[size_t(f)])) to[f] = field(kFieldNames[f], f, tensors[size_t(f)], width);
  }
  const void* squares(const Tensor& tensor) {
    held_.push_back(make_contiguous(checked("squares", tensor, squares_sizes())));
    return held_.back().const_data_ptr();
  }
  // A weight of each channel, of the fields `of`.
  void weights(const Tensors& tensors, const cpu::AtomField* of) {
    for (int f = 0; f < kFields; ++f) {
      if (!of[f].data) continue;
      held_.push_back(make_contiguous(checked("weights", tensors[size_t(f)], {raw.in[f].width})));
      raw.weights[f] = held_.back().const_data_ptr();
    }
  }

  // New results: a field, squares.
  Tensor make(cpu::AtomField* to, int f, int64_t width) {
    const Tensor made = new_tensor(like_, sizes(f, width));
    *to = field("out", f, made, width);
    return made;
  }
  Tensor make_squares() {
    const Tensor made = new_tensor(like_, squares_sizes());
    raw.squares_out = made.mutable_data_ptr();
    return made;
  }
  Tensor none() const { return new_tensor(like_, {0}); }

  void run(cpu::AtomsKernels::Run kernel) const {
    const int64_t tasks = num_tasks_for(elements());
    all_of_tasks(tasks, [&](int64_t t) { return kernel(raw, begin(t, tasks), begin(t + 1, tasks)), true; });
  }
  // The same with gradients of weights, (width) of each field `of`, added up by task.
  template <class T>
  Tensors run(cpu::AtomsKernels::Run kernel, const cpu::AtomField* of) const {
    const int64_t tasks = std::max<int64_t>(1, num_tasks_for(elements()));
    Tensors sums;
    for (int f = 0; f < kFields; ++f)
      sums.push_back(of[f].data ? zeros(like_, {tasks, raw.in[f].width}) : none());
    all_of_tasks(tasks, [&](int64_t t) {
      cpu::AtomsCall own = raw;
      for (int f = 0; f < kFields; ++f)
        if (of[f].data) own.weight_bars[f] = out_data<T>(sums[size_t(f)]) + t * raw.in[f].width;
      kernel(own, begin(t, tasks), begin(t + 1, tasks));
      return true;
    });
    Tensors results;
    for (int f = 0; f < kFields; ++f) {
      const int64_t width = raw.in[f].width;
      results.push_back(of[f].data ? zeros(like_, {width}) : none());
      for (int64_t i = 0; of[f].data && i < tasks * width; ++i)
        out_data<T>(results.back())[i % width] += data<T>(sums[size_t(f)])[i];
    }
    return results;
  }
  Tensors run_backward(cpu::AtomsKernels::Run kernel, const cpu::AtomField* of, bool with_weights) const {
    if (with_weights) {
      return like_.scalar_type() == ScalarType::Float ? run<float>(kernel, of) : run<double>(kernel, of);
    }
    run(kernel);
    return Tensors(kFields, none());
  }

 private:
  // Of these sizes and the type of all, the last dimension dense.
  Tensor checked(const char* what, const Tensor& tensor, const std::vector<int64_t>& sizes) const {
    bool fits = tensor.dim() == int64_t(sizes.size()) && tensor.scalar_type() == like_.scalar_type();
    for (size_t d = 0; d < sizes.size() && fits; ++d) fits = tensor.size(int64_t(d)) == sizes[d];
    if (fits) return tensor.stride(-1) == 1 ? tensor : make_contiguous(tensor);
    std::string wanted, got;
    for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
    for (int64_t size : tensor.sizes()) got += (got.empty() ? "" : ", ") + std::to_string(size);
    fail(operation_, "cpu", what, " must have shape (", wanted, ") and type ",
         torch::headeronly::toString(like_.scalar_type()), ", got (", got, ") and ",
         torch::headeronly::toString(tensor.scalar_type()));
  }
  int64_t elements() const {
    int64_t numbers = 0;
    for (int f = 0; f < kFields; ++f)
      if (raw.in[f].data) numbers += cartesian::kComponents[f] * raw.in[f].width;
    return raw.num_atoms * numbers * (pair_ ? 2 : 1);
  }
  int64_t begin(int64_t t, int64_t tasks) const { return raw.num_atoms * t / tasks; }

  const char* operation_;
  Tensor like_;
  bool pair_;
  int64_t first_;  // the dimension of atoms
  Tensors held_;
};

// The first tensor that is there; each list must be of three.
template <class... Lists>
const Tensor& first_of(const char* operation, const Tensors& fields, const Lists&... lists) {
  check(fields.size() == kFields && (... && (lists.size() == kFields)), operation, "cpu",
        "lists must have three elements, for h, v and t, got others");
  for (const Tensor& tensor : fields)
    if (!absent(tensor)) return tensor;
  fail(operation, "cpu", "features must have a field, got none");
}

// Sum over the fields of factor |x + other|^2, and of each field that has another, the sum of both.
Tensors cartesian_squares(Tensors x, Tensors others, std::vector<double> factors, bool pair) {
  Call call("cartesian_squares", first_of("cartesian_squares", x, others, factors), pair);
  cpu::AtomsCall& raw = call.raw;
  call.fields(raw.in, x);
  Tensors results{call.make_squares()};
  for (int f = 0; f < kFields; ++f) {
    raw.factors[f] = factors[size_t(f)];
    const bool both = raw.in[f].data && !absent(others[size_t(f)]);
    if (both) raw.other[f] = call.field("other", f, others[size_t(f)], raw.in[f].width);
    results.push_back(both ? call.make(&raw.out[f], f, raw.in[f].width) : call.none());
  }
  call.run(call.kernels->squares);
  return results;
}

// Gradients of x, of which others have the same.
Tensors cartesian_squares_backward(Tensors x, Tensor squares_bar, Tensors bars, std::vector<double> factors,
                                   bool pair) {
  Call call("cartesian_squares_backward", first_of("cartesian_squares_backward", x, bars, factors), pair);
  cpu::AtomsCall& raw = call.raw;
  call.fields(raw.in, x);
  raw.squares = call.squares(squares_bar);
  Tensors results;
  for (int f = 0; f < kFields; ++f) {
    raw.factors[f] = factors[size_t(f)];
    const bool there = raw.in[f].data;
    if (there && !absent(bars[size_t(f)]))
      raw.other[f] = call.field("bar", f, bars[size_t(f)], raw.in[f].width);
    results.push_back(there ? call.make(&raw.out[f], f, raw.in[f].width) : call.none());
  }
  call.run(call.kernels->squares_backward);
  return results;
}

Tensors cartesian_scale(Tensors x, Tensor squares, Tensors gains, double epsilon, bool pair) {
  Call call("cartesian_scale", first_of("cartesian_scale", x, gains), pair);
  call.fields(call.raw.in, x);
  call.raw.squares = call.squares(squares), call.raw.epsilon = epsilon;
  call.weights(gains, call.raw.in);
  Tensors results;
  for (int f = 0; f < kFields; ++f) {
    results.push_back(call.raw.in[f].data ? call.make(&call.raw.out[f], f, call.raw.in[f].width)
                                          : call.none());
  }
  call.run(call.kernels->scale);
  return results;
}

// Gradients of x (3), squares, gains (3).
Tensors cartesian_scale_backward(Tensors x, Tensor squares, Tensors gains, Tensors bars, double epsilon,
                                 bool with_weights, bool pair) {
  Call call("cartesian_scale_backward", first_of("cartesian_scale_backward", x, gains, bars), pair);
  cpu::AtomsCall& raw = call.raw;
  call.fields(raw.in, x);
  raw.squares = call.squares(squares), raw.epsilon = epsilon;
  call.weights(gains, raw.in);
  Tensors results;
  for (int f = 0; f < kFields; ++f) {
    const bool there = raw.in[f].data;
    if (there) raw.other[f] = call.field("bar", f, bars[size_t(f)], raw.in[f].width);
    results.push_back(there ? call.make(&raw.out[f], f, raw.in[f].width) : call.none());
  }
  results.push_back(call.make_squares());
  const Tensors by_gains = call.run_backward(call.kernels->scale_backward, raw.in, with_weights);
  results.insert(results.end(), by_gains.begin(), by_gains.end());
  return results;
}

// Gates and products of an atom's features u, of the first `written` of h, v, t.
struct Products {
  Call call;
  cpu::AtomField written[kFields] = {};
  int64_t width, parts[kFields] = {2, 1, 0};

  Products(const char* operation, const Tensors& u, const Tensor& squares, const Tensor& gates,
           const Tensors& slopes, double epsilon, int64_t num_written, bool pair, const Tensors& bars)
      : call(operation, first_of(operation, u, slopes, bars), pair), width(u[0].size(-1)) {
    cpu::AtomsCall& raw = call.raw;
    call.fields(raw.in, u, width);
    const int64_t there = raw.in[2].data ? 3 : raw.in[1].data ? 2 : 1;
    check(raw.in[0].data && raw.in[1].data && num_written >= 1 && num_written <= there, operation, "cpu",
          "u must have h and v, and as many fields as are written, got ", there, " for ", num_written);
    if (there == 3) parts[0] = 3, parts[1] = 2, parts[2] = 3;
    raw.squares = call.squares(squares), raw.epsilon = epsilon;
    raw.gates = call.field("gates", 0, gates, num_written * width);
    for (int64_t f = 0; f < num_written; ++f) written[f] = raw.in[f];
    call.weights(slopes, written);
  }
};

// Parts side by side, (..., parts width), by field.
Tensors cartesian_products(Tensors u, Tensor squares, Tensor gates, Tensors slopes, double epsilon,
                           int64_t written, bool pair) {
  Products made("cartesian_products", u, squares, gates, slopes, epsilon, written, pair, u);
  cpu::AtomsCall& raw = made.call.raw;
  Tensors results;
  for (int f = 0; f < kFields; ++f) {
    results.push_back(made.written[f].data ? made.call.make(&raw.out[f], f, made.parts[f] * made.width)
                                           : made.call.none());
  }
  made.call.run(made.call.kernels->products);
  return results;
}

// Gradients of u (3), squares, gates, slopes (3).
Tensors cartesian_products_backward(Tensors u, Tensor squares, Tensor gates, Tensors slopes, Tensors bars,
                                    double epsilon, int64_t written, bool with_weights, bool pair) {
  Products made("cartesian_products_backward", u, squares, gates, slopes, epsilon, written, pair, bars);
  cpu::AtomsCall& raw = made.call.raw;
  Tensors results;
  for (int f = 0; f < kFields; ++f) {
    if (made.written[f].data)
      raw.other[f] = made.call.field("bar", f, bars[size_t(f)], made.parts[f] * made.width);
    results.push_back(raw.in[f].data ? made.call.make(&raw.out[f], f, made.width) : made.call.none());
  }
  results.push_back(made.call.make_squares());
  results.push_back(made.call.make(&raw.gates_bar, 0, written * made.width));
  const Tensors by_slopes =
      made.call.run_backward(made.call.kernels->products_backward, made.written, with_weights);
  results.insert(results.end(), by_slopes.begin(), by_slopes.end());
  return results;
}

}  // namespace
}  // namespace megagnn

// Lists have a tensor for each of h, v, t. With `pair` features and squares have a first dimension of two,
// value and tangent.
STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def("cartesian_squares(Tensor[] x, Tensor[] others, float[] factors, bool pair) -> Tensor[]");
  library.def(
      "cartesian_squares_backward(Tensor[] x, Tensor squares_bar, Tensor[] bars, float[] factors, bool pair)"
      " -> Tensor[]");
  library.def(
      "cartesian_scale(Tensor[] x, Tensor squares, Tensor[] gains, float epsilon, bool pair) -> Tensor[]");
  library.def(
      "cartesian_scale_backward(Tensor[] x, Tensor squares, Tensor[] gains, Tensor[] bars, float epsilon,"
      " bool with_weights, bool pair) -> Tensor[]");
  library.def(
      "cartesian_products(Tensor[] u, Tensor squares, Tensor gates, Tensor[] slopes, float epsilon,"
      " int written, bool pair) -> Tensor[]");
  library.def(
      "cartesian_products_backward(Tensor[] u, Tensor squares, Tensor gates, Tensor[] slopes, Tensor[] bars,"
      " float epsilon, int written, bool with_weights, bool pair) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("cartesian_squares", TORCH_BOX(&megagnn::cartesian_squares));
  library.impl("cartesian_squares_backward", TORCH_BOX(&megagnn::cartesian_squares_backward));
  library.impl("cartesian_scale", TORCH_BOX(&megagnn::cartesian_scale));
  library.impl("cartesian_scale_backward", TORCH_BOX(&megagnn::cartesian_scale_backward));
  library.impl("cartesian_products", TORCH_BOX(&megagnn::cartesian_products));
  library.impl("cartesian_products_backward", TORCH_BOX(&megagnn::cartesian_products_backward));
}
