// The blockwise edge operation: schemas, checks, division over workers. The mathematics is in
// docs/kernels.md, the kernels in cpu/edge_message.cpp and cuda/edge_message.cuh, their order in
// edge_driver.h, the plan in edge_plan.cpp, single stages in edge_stage.cpp.
#include "cpu/edge_message.h"
#include "binding.h"
#include "devices.h"
#include "edge_call.h"
#include "weight_sums.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/edge_message.h"
#endif

namespace megagnn {
namespace {

constexpr const char* kName = "edge_message";

EdgeCall check_edges(Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                     std::vector<double> reals) {
  EdgeCall call = take_lists(kName, std::move(inputs), std::move(weights), std::move(graph), std::move(spec),
                             std::move(reals));
  const Tensor &w2 = call.weights[kW2], &w3 = call.weights[kW3];
  check(w2.dim() == 2, kName, kAny, "w2 must be a matrix, got none");
  call.message = w2.size(0), call.vector = absent(w3) ? 0 : w3.size(0);
  check_shape(call, "w2", w2, {call.message, call.hidden});
  if (call.vector) check_shape(call, "w3", w3, {call.vector, call.message});
  check_inputs(call);
  return call;
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
    check_launch(kName, megagnn_cuda_last_error());
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
  for (const int64_t width : {call.message, call.vector}) {
    out.push_back(save && width ? new_tensor(call.inputs[kP], {call.planes() * call.num_edges, width})
                                : call.none);
  }
  const EdgeSaved<T> saved{out_data<T>(out[4]), out_data<T>(out[5])};
  run_workers<T>(
      call, in, saved, [](int64_t) {},
      [](auto& worker, int64_t, int64_t block, const EdgeRange& range) { worker.forward(block, range); });
  return out;
}

// What the workers sum: gradients of the weights and of q. The first worker's go into the results; q of
// several workers: rows of their own between their first and last source, added at the end in the workers'
// order.
template <class T>
class WorkerSums {
 public:
  WorkerSums(const EdgeCall& call, bool weights, Tensor* const q_bar[2])
      : call_(call),
        weights_(call.inputs[kP], Tensors(call.weights.begin() + kW1c, call.weights.end()), weights,
                 call.none, call.num_workers),
        own_(size_t(std::max<int64_t>(call.num_workers, 1))) {
    for (int plane = 0; plane < call.planes(); ++plane) q_bar_[plane] = out_data<T>(*q_bar[plane]);
  }

  // To be called by worker w itself, so that its memory is near it.
  void prepare(int64_t w) {
    weights_.prepare(w);
    Own& own = own_[size_t(w)];
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
        weights_.add(t, call_.num_workers);
        return true;
      });
    }
    return weights_.results();
  }

 private:
  struct Own {
    std::vector<T> q_bar[2];
    EdgeSums<T> sums{};
    EdgeWeightSums<T> products{};
  };

  T* of(int64_t w, Weight which) { return weights_.of(w, size_t(which) - kW1c); }

  // Rows of share t of as many as there are workers.
  void add_sources(int plane, int64_t t) {
    const int64_t each = (call_.num_sources + call_.num_workers - 1) / call_.num_workers;
    const int64_t begin = std::min(t * each, call_.num_sources),
                  end = std::min(begin + each, call_.num_sources);
    for (int64_t w = 0; w < call_.num_workers; ++w) {
      const int64_t* fields = call_.integers(kWorkers) + w * kFields;
      const T* from = own_[size_t(w)].q_bar[plane].data() - fields[2] * call_.hidden;
      const int64_t first = std::max(begin, fields[2]) * call_.hidden,
                    stop = std::min(end, fields[3]) * call_.hidden;
      for (int64_t k = first; k < stop; ++k) q_bar_[plane][k] += from[k];
    }
  }

  const EdgeCall& call_;
  WeightSums<T> weights_;
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
  const EdgeSaved<T> saved{out_data<T>(saved_tensors[0]), out_data<T>(saved_tensors[1])};
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
  check(saved.size() == 2 && bars.size() == kNumBars, kName, kAny,
        "there must be 2 kept tensors and 4 cotangents, got ", saved.size(), " and ", bars.size());
  for (Tensor& bar : bars) bar = make_contiguous(bar);
  for (int plane = 0; plane < call.planes(); ++plane) {
    check_shape(call, "sum_bar", bars[size_t(2 * plane)], {call.num_atoms, call.message});
    if (call.vector) check_shape(call, "vec_bar", bars[size_t(2 * plane + 1)], {call.num_atoms, 3});
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
