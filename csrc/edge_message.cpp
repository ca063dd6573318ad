// The blockwise edge operation on the CPU: schemas, checks, plan, division over workers. The mathematics is
// in docs/kernels.md, the kernels in cpu/edge_message.cpp, their order in edge_driver.h.
#include <cmath>
#include <string>

#include "binding.h"
#include "edge_driver.h"

namespace megagnn {
namespace {

using Tensors = std::vector<Tensor>;

constexpr const char* kName = "edge_message";

// Positions in the lists of the operation, as in megagnn/ops/edge_message.py.
enum Input { kP, kQ, kR, kF, kNumInputs };  // then the same again for the tangents
enum Weight { kCentres, kW1c, kW2, kB2, kW3, kB3, kW4, kB4, kNumWeights };
enum Graph { kDestination, kSource, kBlocks, kWorkers, kNumGraph };
enum Spec { kFeature, kDirection, kActivation, kBounded, kPair, kBlas, kNumSpec };
enum Real { kEpsilon2, kCutoff, kSpread, kNumReals };
enum Bar { kSumBar, kVecBar, kSumTangentBar, kVecTangentBar, kNumBars };
constexpr int64_t kWorkerFields = 4;  // first block, end block, first source, end source

bool absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.size(0) == 0; }

Tensor zeros(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

// [Note: plan] Edges, sorted by destination, are cut into blocks of whole rows; a row longer than a block is
// cut itself. A worker takes neighbouring blocks and never part of a row, so destinations need no atomics;
// sums over sources go to rows of the worker's own, between the first and the last source it meets, and are
// added in the workers' order at the end. Bits therefore depend on the number of workers and on nothing else.
std::tuple<Tensor, Tensor> edge_plan(Tensor destination, Tensor source, Tensor ptr, int64_t num_sources,
                                     int64_t block_edges, int64_t max_workers) {
  check(block_edges > 0 && max_workers > 0, "edge_plan", "cpu",
        "block_edges and max_workers must be positive, got ", block_edges, " and ", max_workers);
  const Tensor ptr_c = make_contiguous(ptr), destination_c = make_contiguous(destination),
               source_c = make_contiguous(source);
  const int64_t* row_ptr = static_cast<const int64_t*>(ptr_c.const_data_ptr());
  const int64_t* to = static_cast<const int64_t*>(destination_c.const_data_ptr());
  const int64_t* from = static_cast<const int64_t*>(source_c.const_data_ptr());
  const int64_t num_rows = ptr.size(0) - 1, num_edges = destination.size(0);
  check(row_ptr[0] == 0 && row_ptr[num_rows] == num_edges && source.size(0) == num_edges, "edge_plan", "cpu",
        "ptr must rise from 0 to the number of edges, ", num_edges, ", got ", row_ptr[0], " to ",
        row_ptr[num_rows]);
  std::vector<int64_t> blocks{0};
  std::vector<bool> starts_row{true};
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t begin = row_ptr[row], end = row_ptr[row + 1];
    check(end >= begin, "edge_plan", "cpu", "ptr must rise, got ", begin, " before ", end);
    for (int64_t e = begin; e < end; ++e) {
      check(to[e] == row, "edge_plan", "cpu", "edges must be sorted by destination, got ", to[e], " in row ",
            row);
      check(uint64_t(from[e]) < uint64_t(num_sources), "edge_plan", "cpu", "sources must lie in [0, ",
            num_sources, "), got ", from[e]);
    }
    if (end - blocks.back() <= block_edges) continue;
    if (begin > blocks.back()) blocks.push_back(begin), starts_row.push_back(true);
    while (end - blocks.back() > block_edges)
      blocks.push_back(blocks.back() + block_edges), starts_row.push_back(false);
  }
  if (num_edges > blocks.back()) blocks.push_back(num_edges), starts_row.push_back(true);
  const int64_t num_blocks = int64_t(blocks.size()) - 1;
  std::vector<int64_t> workers;
  for (int64_t w = 0, first = 0; first < num_blocks; ++w) {
    int64_t end = first + 1;
    const int64_t goal = num_edges / max_workers * (w + 1);
    while (end < num_blocks &&
           (!starts_row[size_t(end)] || blocks[size_t(end)] < goal || w + 1 >= max_workers))
      ++end;
    const auto [low, high] = std::minmax_element(from + blocks[size_t(first)], from + blocks[size_t(end)]);
    workers.insert(workers.end(), {first, end, *low, *high + 1});
    first = end;
  }
  const auto vector_of = [&](const std::vector<int64_t>& values) {
    Tensor out = new_result(ptr_c, int64_t(values.size()));
    std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
    return out;
  };
  return {vector_of(blocks), vector_of(workers)};
}

template <class T>
const T* data(const Tensor& tensor) {
  return absent(tensor) ? nullptr : static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* out_data(const Tensor& tensor) {
  return absent(tensor) ? nullptr : static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

// The checked arguments. Lists are held here because contiguous() may have made their tensors.
struct EdgeCall {
  Tensors inputs, weights, graph;
  std::vector<int64_t> spec;
  std::vector<double> reals;
  int64_t num_atoms, num_sources, num_edges, hidden, message, vector, radial, num_workers;
  bool pair;
  Tensor none;  // (0): stands for an absent tensor

  int64_t planes() const { return pair ? 2 : 1; }
  const int64_t* integers(Graph which) const {
    return static_cast<const int64_t*>(graph[which].const_data_ptr());
  }
};

void check_shape(const char* name, const Tensor& tensor, const Tensor& like, std::vector<int64_t> sizes) {
  bool fits = tensor.dim() == int64_t(sizes.size()) && tensor.scalar_type() == like.scalar_type();
  std::string wanted;
  for (size_t d = 0; d < sizes.size(); ++d) {
    fits = fits && tensor.size(int64_t(d)) == sizes[d];
    wanted += (d ? ", " : "") + std::to_string(sizes[d]);
  }
  std::string got;
  for (int64_t d = 0; d < tensor.dim(); ++d) got += (d ? ", " : "") + std::to_string(tensor.size(d));
  check(fits, kName, "cpu", name, " must have shape (", wanted, ") and type ",
        torch::headeronly::toString(like.scalar_type()), ", got (", got, ") and ",
        torch::headeronly::toString(tensor.scalar_type()));
}

EdgeCall check_edges(Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                     std::vector<double> reals) {
  check(inputs.size() == 2 * kNumInputs && weights.size() == kNumWeights && graph.size() == kNumGraph &&
            spec.size() == kNumSpec && reals.size() == kNumReals,
        kName, "cpu", "the lists must have 8, 8, 4, 6 and 3 elements, got ", inputs.size(), ", ",
        weights.size(), ", ", graph.size(), ", ", spec.size(), ", ", reals.size());
  for (Tensors* list : {&inputs, &weights, &graph}) {
    for (Tensor& tensor : *list) tensor = make_contiguous(tensor);
  }
  EdgeCall call{std::move(inputs),
                std::move(weights),
                std::move(graph),
                std::move(spec),
                std::move(reals),
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                false,
                Tensor()};
  const Tensor &p = call.inputs[kP], &w1c = call.weights[kW1c], &w2 = call.weights[kW2],
               &w3 = call.weights[kW3];
  check(p.dim() == 2 && w1c.dim() == 2 && w2.dim() == 2, kName, "cpu", "p, w1c and w2 must be matrices, got ",
        p.dim(), ", ", w1c.dim(), " and ", w2.dim(), " dimensions");
  check(p.scalar_type() == ScalarType::Float || p.scalar_type() == ScalarType::Double, kName, "cpu",
        "p must be float32 or float64, got ", torch::headeronly::toString(p.scalar_type()));
  call.num_atoms = p.size(0), call.num_sources = call.inputs[kQ].size(0);
  call.num_edges = call.graph[kDestination].size(0);
  call.hidden = p.size(1), call.message = w2.size(0), call.radial = w1c.size(1);
  call.vector = absent(w3) ? 0 : w3.size(0);
  call.pair = call.spec[kPair] != 0;
  call.num_workers = call.graph[kWorkers].size(0) / kWorkerFields;
  const int64_t E = call.num_edges, H = call.hidden, M = call.message, K = call.vector;
  for (int plane = 0; plane < call.planes(); ++plane) {
    const Tensor* in = &call.inputs[size_t(plane) * kNumInputs];
    check_shape(plane ? "p_tangent" : "p", in[kP], p, {call.num_atoms, H});
    check_shape(plane ? "q_tangent" : "q", in[kQ], p, {call.num_sources, H});
    check_shape(plane ? "r_tangent" : "r", in[kR], p, {E, 3});
    if (!absent(in[kF])) check_shape(plane ? "f_tangent" : "f", in[kF], p, {E});
  }
  check_shape("w1c", w1c, p, {H, call.radial});
  check_shape("w2", w2, p, {M, H});
  check_shape("b2", call.weights[kB2], p, {M});
  if (call.spec[kFeature] == cpu::kBessel || call.spec[kFeature] == cpu::kGaussian) {
    check_shape("centres", call.weights[kCentres], p, {call.radial});
  } else {
    check(call.radial == 1, kName, "cpu", "w1c must have one column for a distance as feature, got ",
          call.radial);
  }
  if (K) {
    check_shape("w3", w3, p, {K, M});
    check_shape("b3", call.weights[kB3], p, {K});
    check_shape("w4", call.weights[kW4], p, {K});
  }
  call.none = new_result(call.graph[kBlocks], 0);
  return call;
}

template <class T>
cpu::EdgeProblem<T> problem_of(const EdgeCall& call) {
  cpu::EdgeProblem<T> in{};
  in.hidden = call.hidden, in.message = call.message, in.vector = call.vector, in.radial = call.radial;
  in.feature = int(call.spec[kFeature]), in.direction = int(call.spec[kDirection]);
  in.activation = int(call.spec[kActivation]), in.bounded = call.spec[kBounded] != 0;
  in.epsilon2 = T(call.reals[kEpsilon2]), in.cutoff = T(call.reals[kCutoff]),
  in.spread = T(call.reals[kSpread]);
  in.centres = data<T>(call.weights[kCentres]);
  in.destination = call.integers(kDestination), in.source = call.integers(kSource);
  for (int plane = 0; plane < call.planes(); ++plane) {
    const Tensor* inputs = &call.inputs[size_t(plane) * kNumInputs];
    in.p[plane] = data<T>(inputs[kP]), in.q[plane] = data<T>(inputs[kQ]);
    in.r[plane] = data<T>(inputs[kR]), in.f[plane] = data<T>(inputs[kF]);
  }
  in.b2 = data<T>(call.weights[kB2]), in.b3 = data<T>(call.weights[kB3]);
  in.w4 = data<T>(call.weights[kW4]), in.b4 = data<T>(call.weights[kB4]);
  return in;
}

template <class T>
EdgeWeights<T> weights_of(const EdgeCall& call) {
  return {data<T>(call.weights[kW1c]), data<T>(call.weights[kW2]), data<T>(call.weights[kW3])};
}

int64_t longest_block(const EdgeCall& call) {
  const int64_t* blocks = call.integers(kBlocks);
  int64_t longest = 1;
  for (int64_t b = 0; b + 1 < call.graph[kBlocks].size(0); ++b)
    longest = std::max(longest, blocks[b + 1] - blocks[b]);
  return longest;
}

// run(worker index, EdgeWorker, block begin, block end) for every block of every worker, workers in parallel.
template <class T, class Prepare, class Run>
void for_blocks(const EdgeCall& call, const cpu::EdgeProblem<T>& in, const EdgeSaved<T>& saved,
                const Prepare& prepare, const Run& run) {
  const cpu::EdgeKernels<T>& kernels = cpu::edge_table<T>().kernels[call.pair][in.activation];
  const bool blas = blas_available() && call.spec[kBlas] != 0;
  const int64_t longest = longest_block(call);
  const auto work = [&](int64_t w) {
    EdgeWorker<T> worker(in, kernels, weights_of<T>(call), saved, call.pair, blas, longest);
    const int64_t* fields = call.integers(kWorkers) + w * kWorkerFields;
    const int64_t* blocks = call.integers(kBlocks);
    prepare(w, fields);
    for (int64_t b = fields[0]; b < fields[1]; ++b) run(w, worker, blocks[b], blocks[b + 1]);
    return true;
  };
  if (call.num_workers == 1) {
    work(0);
  } else {
    all_of_tasks(call.num_workers, work);
  }
}

template <class T>
Tensors forward(const EdgeCall& call, bool save) {
  const Tensor& like = call.inputs[kP];
  Tensors out;
  cpu::EdgeProblem<T> in = problem_of<T>(call);
  for (int plane = 0; plane < 2; ++plane) {
    const bool there = plane < call.planes();
    out.push_back(there ? zeros(like, {call.num_atoms, call.message}) : call.none);
    out.push_back(there && call.vector ? zeros(like, {call.num_atoms, 3}) : call.none);
    in.sum[plane] = out_data<T>(out[size_t(2 * plane)]),
    in.vec[plane] = out_data<T>(out[size_t(2 * plane + 1)]);
  }
  for (const int64_t width : {call.hidden, call.message, call.vector}) {
    out.push_back(save && width ? new_tensor(like, {call.planes() * call.num_edges, width}) : call.none);
  }
  const EdgeSaved<T> saved{out_data<T>(out[4]), out_data<T>(out[5]), out_data<T>(out[6])};
  for_blocks<T>(
      call, in, saved, [](int64_t, const int64_t*) {},
      [](int64_t, EdgeWorker<T>& worker, int64_t begin, int64_t end) { worker.forward(begin, end); });
  return out;
}

// Gradients of the weights in the order of Weight, one set per worker; the first one's are the results.
template <class T>
struct WeightSums {
  WeightSums(const EdgeCall& call, bool wanted) : sizes(kNumWeights, 0) {
    for (int k = kW1c; k < kNumWeights && wanted; ++k) {
      if (!absent(call.weights[size_t(k)])) {
        sizes[size_t(k)] = 1;
        for (int64_t d = 0; d < call.weights[size_t(k)].dim(); ++d)
          sizes[size_t(k)] *= call.weights[size_t(k)].size(d);
      }
      total += sizes[size_t(k)];
    }
    memory.assign(size_t(total * std::max<int64_t>(call.num_workers, 1)), T(0));
  }
  T* of(int64_t worker, Weight which) {
    if (!sizes[which]) return nullptr;
    int64_t offset = worker * total;
    for (int k = 0; k < which; ++k) offset += sizes[size_t(k)];
    return memory.data() + offset;
  }
  std::vector<int64_t> sizes;
  int64_t total = 0;
  std::vector<T> memory;
};

// Sums over sources: each worker's own rows, added in the workers' order.
template <class T>
struct SourceSums {
  std::vector<std::vector<T>> rows[2];
};

template <class T>
void add_sources(const EdgeCall& call, const SourceSums<T>& sums, int plane, T* out) {
  const int64_t* fields = call.integers(kWorkers);
  const int64_t share = (call.num_sources + call.num_workers - 1) / call.num_workers;
  all_of_tasks(call.num_workers, [&](int64_t t) {
    for (int64_t w = 0; w < call.num_workers; ++w) {
      const int64_t first = fields[w * kWorkerFields + 2], end = fields[w * kWorkerFields + 3];
      const int64_t begin = std::max(first, t * share), stop = std::min(end, (t + 1) * share);
      const T* from = sums.rows[plane][size_t(w)].data() - first * call.hidden;
      for (int64_t k = begin * call.hidden; k < stop * call.hidden; ++k) out[k] += from[k];
    }
    return true;
  });
}

template <class T>
Tensors backward(const EdgeCall& call, const Tensors& saved_tensors, const Tensors& bars, bool geometry,
                 bool weights, bool outputs) {
  const Tensor& like = call.inputs[kP];
  cpu::EdgeProblem<T> in = problem_of<T>(call);
  Tensors out(2 * kNumInputs, call.none);
  Tensor q_bar[2];
  for (int plane = 0; plane < call.planes(); ++plane) {
    Tensor* bar = &out[size_t(plane) * kNumInputs];
    bar[kP] = zeros(like, {call.num_atoms, call.hidden});
    bar[kQ] = zeros(like, {call.num_sources, call.hidden});
    if (geometry) bar[kR] = zeros(like, {call.num_edges, 3});
    if (geometry && in.f[0]) bar[kF] = zeros(like, {call.num_edges});
    in.p_bar[plane] = out_data<T>(bar[kP]), in.r_bar[plane] = out_data<T>(bar[kR]);
    in.f_bar[plane] = out_data<T>(bar[kF]);
    in.sum_bar[plane] = data<T>(bars[size_t(2 * plane)]),
    in.vec_bar[plane] = data<T>(bars[size_t(2 * plane + 1)]);
  }
  for (int plane = 0; plane < 2; ++plane) {
    const bool there = outputs && plane < call.planes();
    out.push_back(there ? zeros(like, {call.num_atoms, call.message}) : call.none);
    out.push_back(there && call.vector ? zeros(like, {call.num_atoms, 3}) : call.none);
    in.sum[plane] = out_data<T>(out[size_t(2 * kNumInputs + 2 * plane)]);
    in.vec[plane] = out_data<T>(out[size_t(2 * kNumInputs + 2 * plane + 1)]);
  }
  const EdgeSaved<T> saved{out_data<T>(saved_tensors[0]), out_data<T>(saved_tensors[1]),
                           out_data<T>(saved_tensors[2])};
  WeightSums<T> weight_sums(call, weights);
  SourceSums<T> source_sums;
  const bool alone = call.num_workers <= 1;
  std::vector<cpu::EdgeSums<T>> sums(size_t(std::max<int64_t>(call.num_workers, 1)));
  for (int plane = 0; plane < call.planes(); ++plane) source_sums.rows[plane].resize(sums.size());
  for_blocks<T>(
      call, in, saved,
      [&](int64_t w, const int64_t* fields) {
        cpu::EdgeSums<T>& sum = sums[size_t(w)];
        sum.first_source = alone ? 0 : fields[2];
        for (int plane = 0; plane < call.planes(); ++plane) {
          std::vector<T>& rows = source_sums.rows[plane][size_t(w)];
          if (!alone) rows.assign(size_t((fields[3] - fields[2]) * call.hidden), T(0));
          sum.q_bar[plane] = alone ? out_data<T>(out[size_t(plane) * kNumInputs + kQ]) : rows.data();
        }
        sum.b2_bar = weight_sums.of(w, kB2), sum.b3_bar = weight_sums.of(w, kB3);
        sum.w4_bar = weight_sums.of(w, kW4), sum.b4_bar = weight_sums.of(w, kB4);
      },
      [&](int64_t w, EdgeWorker<T>& worker, int64_t begin, int64_t end) {
        worker.backward(begin, end, sums[size_t(w)],
                        {weight_sums.of(w, kW1c), weight_sums.of(w, kW2), weight_sums.of(w, kW3)});
      });
  for (int plane = 0; plane < call.planes() && !alone; ++plane) {
    add_sources(call, source_sums, plane, out_data<T>(out[size_t(plane) * kNumInputs + kQ]));
  }
  for (int k = kW1c; k < kNumWeights; ++k) {
    const int64_t size = weight_sums.sizes[size_t(k)];
    out.push_back(size ? new_result(call.weights[size_t(k)], call.weights[size_t(k)].size(0)) : call.none);
    T* result = out_data<T>(out.back());
    for (int64_t w = 0; w < std::max<int64_t>(call.num_workers, 1) && size; ++w) {
      const T* from = weight_sums.of(w, Weight(k));
      for (int64_t i = 0; i < size; ++i) result[i] = w ? result[i] + from[i] : from[i];
    }
  }
  return out;
}

Tensors edge_forward_cpu(Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                         std::vector<double> reals, bool save) {
  const EdgeCall call =
      check_edges(std::move(inputs), std::move(weights), std::move(graph), std::move(spec), std::move(reals));
  return call.inputs[kP].scalar_type() == ScalarType::Float ? forward<float>(call, save)
                                                            : forward<double>(call, save);
}

Tensors edge_backward_cpu(Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                          std::vector<double> reals, Tensors saved, Tensors bars, bool geometry,
                          bool weight_bars, bool outputs) {
  const EdgeCall call =
      check_edges(std::move(inputs), std::move(weights), std::move(graph), std::move(spec), std::move(reals));
  check(saved.size() == 3 && bars.size() == kNumBars, kName, "cpu",
        "there must be 3 kept tensors and 4 cotangents, got ", saved.size(), " and ", bars.size());
  for (Tensor& bar : bars) bar = make_contiguous(bar);
  for (int plane = 0; plane < call.planes(); ++plane) {
    check_shape("sum_bar", bars[size_t(2 * plane)], call.inputs[kP], {call.num_atoms, call.message});
    if (call.vector)
      check_shape("vec_bar", bars[size_t(2 * plane + 1)], call.inputs[kP], {call.num_atoms, 3});
  }
  return call.inputs[kP].scalar_type() == ScalarType::Float
             ? backward<float>(call, saved, bars, geometry, weight_bars, outputs)
             : backward<double>(call, saved, bars, geometry, weight_bars, outputs);
}

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def(
      "edge_plan(Tensor destination, Tensor source, Tensor ptr, int num_sources, int block_edges, int "
      "max_workers)"
      " -> (Tensor, Tensor)");
  library.def(
      "edge_message_forward(Tensor[] inputs, Tensor[] weights, Tensor[] graph, int[] spec, float[] reals, "
      "bool save)"
      " -> Tensor[]");
  library.def(
      "edge_message_backward(Tensor[] inputs, Tensor[] weights, Tensor[] graph, int[] spec, float[] reals,"
      " Tensor[] saved, Tensor[] bars, bool geometry, bool weight_bars, bool outputs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("edge_plan", TORCH_BOX(&megagnn::edge_plan));
  library.impl("edge_message_forward", TORCH_BOX(&megagnn::edge_forward_cpu));
  library.impl("edge_message_backward", TORCH_BOX(&megagnn::edge_backward_cpu));
}
