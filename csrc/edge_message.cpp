// The blockwise edge operation: schemas, checks, division over workers. The mathematics is in
// docs/kernels.md, the kernels in cpu/edge_message.cpp and cuda/edge_message.cuh, their order in
// edge_driver.h, the plan in edge_plan.cpp.
#include <string>

#include "binding.h"
#include "cpu/edge_message.h"
#include "devices.h"
#include "edge_driver.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/edge_message.h"
#endif

namespace megagnn {
namespace {

using Tensors = std::vector<Tensor>;

constexpr const char *kName = "edge_message", *kAny = "compiled";

// Positions in the lists of the operation, as in megagnn/ops/edge_message.py.
enum Input { kP, kQ, kR, kF, kNumInputs };  // then the same again for the tangents
enum Weight { kCentres, kW1c, kW2, kB2, kW3, kB3, kW4, kB4, kNumWeights };
enum Graph { kDestination, kSource, kPtr, kBlocks, kWorkers, kOrder, kRuns, kRunBegin, kNumGraph };
enum Spec { kFeature, kDirection, kActivation, kBounded, kPair, kBlas, kNumSpec };
enum Real { kEpsilon2, kCutoff, kSpread, kNumReals };
enum Bar { kSumBar, kVecBar, kSumTangentBar, kVecTangentBar, kNumBars };
constexpr int64_t kFields = 4;  // of a block and of a worker in the plan, see edge_plan.cpp

// Absent tensors are empty vectors.
bool absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.size(0) == 0; }

Tensor zeros(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
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
  check(fits, kName, kAny, name, " must have shape (", wanted, ") and type ",
        torch::headeronly::toString(like.scalar_type()), ", got (", got, ") and ",
        torch::headeronly::toString(tensor.scalar_type()));
}

EdgeCall check_edges(Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                     std::vector<double> reals) {
  check(inputs.size() == 2 * kNumInputs && weights.size() == kNumWeights && graph.size() == kNumGraph &&
            spec.size() == kNumSpec && reals.size() == kNumReals,
        kName, kAny, "the lists must have 8, 8, 8, 6 and 3 elements, got ", inputs.size(), ", ",
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
  check(p.dim() == 2 && w1c.dim() == 2 && w2.dim() == 2, kName, kAny, "p, w1c and w2 must be matrices, got ",
        p.dim(), ", ", w1c.dim(), " and ", w2.dim(), " dimensions");
  check(p.scalar_type() == ScalarType::Float || p.scalar_type() == ScalarType::Double, kName, kAny,
        "p must be float32 or float64, got ", torch::headeronly::toString(p.scalar_type()));
  call.num_atoms = p.size(0), call.num_sources = call.inputs[kQ].size(0);
  call.num_edges = call.graph[kDestination].size(0);
  call.hidden = p.size(1), call.message = w2.size(0), call.radial = w1c.size(1);
  call.vector = absent(w3) ? 0 : w3.size(0);
  call.pair = call.spec[kPair] != 0;
  call.num_workers = call.graph[kWorkers].size(0) / kFields;
  check(call.graph[kBlocks].is_cpu() && call.graph[kWorkers].is_cpu(), kName, kAny,
        "the plan must be on the CPU, got another device");
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
  if (call.spec[kFeature] == kBessel || call.spec[kFeature] == kGaussian) {
    check_shape("centres", call.weights[kCentres], p, {call.radial});
  } else {
    check(call.radial == 1, kName, kAny, "w1c must have one column for a distance as feature, got ",
          call.radial);
  }
  if (K) {
    check_shape("w3", w3, p, {K, M});
    check_shape("b3", call.weights[kB3], p, {K});
    check_shape("w4", call.weights[kW4], p, {K});
    if (!absent(call.weights[kB4])) check_shape("b4", call.weights[kB4], p, {1});
  }
  call.none = new_result(call.graph[kBlocks], 0);
  return call;
}

template <class T>
EdgeProblem<T> problem_of(const EdgeCall& call) {
  EdgeProblem<T> in{};
  in.hidden = call.hidden, in.message = call.message, in.vector = call.vector, in.radial = call.radial;
  in.feature = int(call.spec[kFeature]), in.direction = int(call.spec[kDirection]);
  in.activation = int(call.spec[kActivation]), in.bounded = call.spec[kBounded] != 0;
  in.epsilon2 = T(call.reals[kEpsilon2]), in.cutoff = T(call.reals[kCutoff]),
  in.spread = T(call.reals[kSpread]);
  in.centres = data<T>(call.weights[kCentres]);
  in.destination = call.integers(kDestination), in.source = call.integers(kSource),
  in.ptr = call.integers(kPtr);
  in.order = call.integers(kOrder), in.runs = call.integers(kRuns), in.run_begin = call.integers(kRunBegin);
  for (int plane = 0; plane < call.planes(); ++plane) {
    const Tensor* inputs = &call.inputs[size_t(plane) * kNumInputs];
    in.p[plane] = data<T>(inputs[kP]), in.q[plane] = data<T>(inputs[kQ]);
    in.r[plane] = data<T>(inputs[kR]), in.f[plane] = data<T>(inputs[kF]);
  }
  in.b2 = data<T>(call.weights[kB2]), in.b3 = data<T>(call.weights[kB3]);
  in.w4 = data<T>(call.weights[kW4]), in.b4 = data<T>(call.weights[kB4]);
  return in;
}

EdgeRange range_of(const EdgeCall& call, int64_t block) {
  const int64_t* fields = call.integers(kBlocks) + block * kFields;
  return {fields[0], fields[1], fields[2], fields[3]};
}

int64_t longest_block(const EdgeCall& call) {
  int64_t longest = 1;
  for (int64_t b = 0; b < call.graph[kBlocks].size(0) / kFields; ++b) {
    const EdgeRange range = range_of(call, b);
    longest = std::max(longest, range.end - range.begin);
  }
  return longest;
}

// The blocks of worker w, one after another: prepare(w), then run(worker, w, block, its range) for each.
template <class T, class Device, class Prepare, class Run>
void run_worker(const EdgeCall& call, int64_t w, Device& device, const EdgeProblem<T>& in,
                const EdgeTable<T>& table, const EdgeSaved<T>& saved, const Prepare& prepare,
                const Run& run) {
  const EdgeWeights<T> weights{data<T>(call.weights[kW1c]), data<T>(call.weights[kW2]),
                               data<T>(call.weights[kW3])};
  EdgeWorker<T, Device> worker(device, in, table.kernels[call.pair][in.activation], weights, saved, call.pair,
                               longest_block(call));
  const int64_t* fields = call.integers(kWorkers) + w * kFields;
  prepare(w);
  for (int64_t b = fields[0]; b < fields[1]; ++b) run(worker, w, b, range_of(call, b));
}

// All workers: threads of the CPU, or the one that feeds a CUDA stream.
template <class T, class Prepare, class Run>
void run_workers(const EdgeCall& call, EdgeProblem<T>& in, const EdgeSaved<T>& saved, const Prepare& prepare,
                 const Run& run) {
#ifdef MEGAGNN_WITH_CUDA
  if (!call.inputs[kP].is_cpu()) {
    const cuda::DeviceGuard guard(kName, call.inputs[kP].get_device());
    in.stream = guard.stream();
    CudaDevice device(call.inputs[kP]);
    if (call.num_workers) run_worker<T>(call, 0, device, in, cuda::edge_table<T>(), saved, prepare, run);
    return;
  }
#endif
  const auto work = [&](int64_t w) {
    CpuDevice device(call.spec[kBlas] != 0);
    run_worker<T>(call, w, device, in, cpu::edge_table<T>(), saved, prepare, run);
    return true;
  };
  if (call.num_workers == 1) {
    work(0);
  } else {
    all_of_tasks(call.num_workers, work);
  }
}

// Zeros for sum, vec and their tangents, appended to out; absent ones where there is nothing to compute.
template <class T>
void add_outputs(const EdgeCall& call, EdgeProblem<T>& in, bool wanted, Tensors& out) {
  const Tensor& like = call.inputs[kP];
  for (int plane = 0; plane < 2; ++plane) {
    const bool there = wanted && plane < call.planes();
    out.push_back(there ? zeros(like, {call.num_atoms, call.message}) : call.none);
    in.sum[plane] = out_data<T>(out.back());
    out.push_back(there && call.vector ? zeros(like, {call.num_atoms, 3}) : call.none);
    in.vec[plane] = out_data<T>(out.back());
  }
}

template <class T>
Tensors forward(const EdgeCall& call, bool save) {
  Tensors out;
  EdgeProblem<T> in = problem_of<T>(call);
  add_outputs(call, in, true, out);
  for (const int64_t width : {call.hidden, call.message, call.vector}) {
    out.push_back(save && width ? new_tensor(call.inputs[kP], {call.planes() * call.num_edges, width})
                                : call.none);
  }
  const EdgeSaved<T> saved{out_data<T>(out[4]), out_data<T>(out[5]), out_data<T>(out[6])};
  run_workers<T>(
      call, in, saved, [](int64_t) {},
      [](auto& worker, int64_t, int64_t block, const EdgeRange& range) { worker.forward(block, range); });
  return out;
}

// What the workers sum: gradients of the weights and of q. The first worker's go into the results; the others
// have memory of their own, added to it at the end in their order. q of several workers: rows between their
// first and last source.
template <class T>
class WorkerSums {
 public:
  WorkerSums(const EdgeCall& call, bool weights, Tensor* const q_bar[2]) : call_(call) {
    for (int k = kW1c; k < kNumWeights; ++k) {
      const Tensor& weight = call.weights[size_t(k)];
      const bool there = weights && !absent(weight);
      const std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
      results_.push_back(there ? zeros(call.inputs[kP], sizes) : call.none);
      sizes_.push_back(there ? 1 : 0);
      for (const int64_t size : sizes) sizes_.back() *= size;
    }
    for (int plane = 0; plane < call.planes(); ++plane) q_bar_[plane] = out_data<T>(*q_bar[plane]);
    own_.resize(size_t(std::max<int64_t>(call.num_workers, 1)));
  }

  // To be called by worker w itself, so that its memory is near it.
  void prepare(int64_t w) {
    Own& own = own_[size_t(w)];
    own.weights.resize(results_.size());
    for (size_t k = 0; k < results_.size() && w > 0; ++k) own.weights[k].assign(size_t(sizes_[k]), T(0));
    own.sums = EdgeSums<T>{{q_bar_[0], q_bar_[1]}, 0, of(w, kB2), of(w, kB3), of(w, kW4), of(w, kB4)};
    own.products = EdgeWeightSums<T>{of(w, kW1c), of(w, kW2), of(w, kW3)};
    if (call_.num_workers == 1) return;
    const int64_t* fields = call_.integers(kWorkers) + w * kFields;
    own.sums.first_source = fields[2];
    for (int plane = 0; plane < call_.planes(); ++plane) {
      own.q_bar[plane].assign(size_t((fields[3] - fields[2]) * call_.hidden), T(0));
      own.sums.q_bar[plane] = own.q_bar[plane].data();
    }
  }

  const EdgeSums<T>& sums(int64_t w) const { return own_[size_t(w)].sums; }
  const EdgeWeightSums<T>& products(int64_t w) const { return own_[size_t(w)].products; }

  // Adds up, and gives the gradients of the weights in the order of Weight, from w1c on.
  const Tensors& finish() {
    if (call_.num_workers > 1) {
      all_of_tasks(call_.num_workers, [&](int64_t t) {
        for (int plane = 0; plane < call_.planes(); ++plane) add_sources(plane, t);
        for (int64_t w = 1; w < call_.num_workers; ++w) add_weights(w, t);
        return true;
      });
    }
    return results_;
  }

 private:
  struct Own {
    std::vector<T> q_bar[2];
    std::vector<std::vector<T>> weights;
    EdgeSums<T> sums{};
    EdgeWeightSums<T> products{};
  };

  T* of(int64_t w, Weight which) {
    const size_t k = size_t(which) - kW1c;
    if (!sizes_[k]) return nullptr;
    return w == 0 ? out_data<T>(results_[k]) : own_[size_t(w)].weights[k].data();
  }

  // The share of task t of as many as there are workers.
  std::pair<int64_t, int64_t> share(int64_t t, int64_t count) const {
    const int64_t each = (count + call_.num_workers - 1) / call_.num_workers;
    return {std::min(t * each, count), std::min((t + 1) * each, count)};
  }

  void add_sources(int plane, int64_t t) {
    const auto [begin, end] = share(t, call_.num_sources);
    for (int64_t w = 0; w < call_.num_workers; ++w) {
      const int64_t* fields = call_.integers(kWorkers) + w * kFields;
      const T* from = own_[size_t(w)].q_bar[plane].data() - fields[2] * call_.hidden;
      const int64_t first = std::max(begin, fields[2]) * call_.hidden,
                    stop = std::min(end, fields[3]) * call_.hidden;
      for (int64_t k = first; k < stop; ++k) q_bar_[plane][k] += from[k];
    }
  }

  void add_weights(int64_t w, int64_t t) {
    for (size_t k = 0; k < results_.size(); ++k) {
      const auto [begin, end] = share(t, sizes_[k]);
      T* to = out_data<T>(results_[k]);
      const T* from = own_[size_t(w)].weights[k].data();
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
  }

  const EdgeCall& call_;
  Tensors results_;
  std::vector<int64_t> sizes_;
  T* q_bar_[2] = {};
  std::vector<Own> own_;
};

template <class T>
Tensors backward(const EdgeCall& call, const Tensors& saved_tensors, const Tensors& bars, bool geometry,
                 bool weights, bool outputs) {
  const Tensor& like = call.inputs[kP];
  EdgeProblem<T> in = problem_of<T>(call);
  Tensors out(2 * kNumInputs, call.none);
  Tensor* q_bar[2] = {};
  for (int plane = 0; plane < call.planes(); ++plane) {
    Tensor* bar = &out[size_t(plane) * kNumInputs];
    bar[kP] = zeros(like, {call.num_atoms, call.hidden});
    bar[kQ] = zeros(like, {call.num_sources, call.hidden});
    if (geometry) bar[kR] = zeros(like, {call.num_edges, 3});
    if (geometry && in.f[0]) bar[kF] = zeros(like, {call.num_edges});
    q_bar[plane] = &bar[kQ];
    in.p_bar[plane] = out_data<T>(bar[kP]), in.r_bar[plane] = out_data<T>(bar[kR]);
    in.f_bar[plane] = out_data<T>(bar[kF]);
    in.sum_bar[plane] = data<T>(bars[size_t(2 * plane)]),
    in.vec_bar[plane] = data<T>(bars[size_t(2 * plane + 1)]);
  }
  WorkerSums<T> sums(call, weights, q_bar);
  add_outputs(call, in, outputs, out);
  const EdgeSaved<T> saved{out_data<T>(saved_tensors[0]), out_data<T>(saved_tensors[1]),
                           out_data<T>(saved_tensors[2])};
  run_workers<T>(
      call, in, saved, [&](int64_t w) { sums.prepare(w); },
      [&](auto& worker, int64_t w, int64_t block, const EdgeRange& range) {
        worker.backward(block, range, sums.sums(w), sums.products(w));
      });
  const Tensors& weight_bars = sums.finish();
  out.insert(out.end(), weight_bars.begin(), weight_bars.end());
  return out;
}

Tensors edge_forward(Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                     std::vector<double> reals, bool save) {
  const EdgeCall call =
      check_edges(std::move(inputs), std::move(weights), std::move(graph), std::move(spec), std::move(reals));
  return call.inputs[kP].scalar_type() == ScalarType::Float ? forward<float>(call, save)
                                                            : forward<double>(call, save);
}

Tensors edge_backward(Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                      std::vector<double> reals, Tensors saved, Tensors bars, bool geometry, bool weight_bars,
                      bool outputs) {
  const EdgeCall call =
      check_edges(std::move(inputs), std::move(weights), std::move(graph), std::move(spec), std::move(reals));
  check(saved.size() == 3 && bars.size() == kNumBars, kName, kAny,
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
      "edge_message_forward(Tensor[] inputs, Tensor[] weights, Tensor[] graph, int[] spec, float[] reals, "
      "bool save)"
      " -> Tensor[]");
  library.def(
      "edge_message_backward(Tensor[] inputs, Tensor[] weights, Tensor[] graph, int[] spec, float[] reals,"
      " Tensor[] saved, Tensor[] bars, bool geometry, bool weight_bars, bool outputs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("edge_message_forward", TORCH_BOX(&megagnn::edge_forward));
  library.impl("edge_message_backward", TORCH_BOX(&megagnn::edge_backward));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("edge_message_forward", TORCH_BOX(&megagnn::edge_forward));
  library.impl("edge_message_backward", TORCH_BOX(&megagnn::edge_backward));
}
#endif
