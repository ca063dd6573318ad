// The arguments that the blockwise edge operation and its single stages share: their lists, and checks.
#pragma once

#include <string>
#include <vector>

#include "binding.h"
#include "edge_driver.h"

namespace megagnn {

constexpr const char* kAny = "compiled";

// Positions in the lists of the operation, as compiled_arguments of megagnn/models/egnn/edge/runner.py fills
// them.
enum Input { kP, kQ, kR, kF, kNumInputs };  // then the same again for the tangents
enum Weight { kCentres, kW1c, kW2, kB2, kW3, kB3, kW4, kB4, kNumWeights };
enum Graph { kDestination, kSource, kPtr, kBlocks, kWorkers, kOrder, kRuns, kRunBegin, kNumGraph };
enum Spec { kFeature, kDirection, kActivation, kBounded, kPair, kBlas, kNumSpec };
enum Real { kEpsilon2, kCutoff, kSpread, kNumReals };
enum Bar { kSumBar, kVecBar, kSumTangentBar, kVecTangentBar, kNumBars };
constexpr int64_t kFields = 4;  // of a block and of a worker in the plan, see edge_plan.cpp

// The checked arguments. Lists are held here because contiguous() may have made their tensors.
struct EdgeCall {
  const char* name;  // of the operation, for errors
  Tensors inputs, weights, graph;
  std::vector<int64_t> spec;
  std::vector<double> reals;
  int64_t num_atoms = 0, num_sources = 0, num_edges = 0, num_workers = 0;
  int64_t hidden = 0, message = 0, vector = 0, radial = 0;
  bool pair = false;
  Tensor none;  // (0): stands for an absent tensor

  int64_t planes() const { return pair ? 2 : 1; }
  const int64_t* integers(Graph which) const {
    return static_cast<const int64_t*>(graph[which].const_data_ptr());
  }
};

// Fails unless the tensor has these sizes and the type of p.
inline void check_shape(const EdgeCall& call, const char* name, const Tensor& tensor,
                        std::vector<int64_t> sizes) {
  const Tensor& like = call.inputs[kP];
  bool fits = tensor.dim() == int64_t(sizes.size()) && tensor.scalar_type() == like.scalar_type();
  for (size_t d = 0; d < sizes.size() && fits; ++d) fits = tensor.size(int64_t(d)) == sizes[d];
  if (fits) return;
  std::string wanted, got;
  for (size_t d = 0; d < sizes.size(); ++d) wanted += (d ? ", " : "") + std::to_string(sizes[d]);
  for (int64_t d = 0; d < tensor.dim(); ++d) got += (d ? ", " : "") + std::to_string(tensor.size(d));
  fail(call.name, kAny, name, " must have shape (", wanted, ") and type ",
       torch::headeronly::toString(like.scalar_type()), ", got (", got, ") and ",
       torch::headeronly::toString(tensor.scalar_type()));
}

// Checks the lists and reads hidden and radial from p and w1c; the caller sets message and vector.
inline EdgeCall take_lists(const char* name, Tensors inputs, Tensors weights, Tensors graph,
                           std::vector<int64_t> spec, std::vector<double> reals) {
  check(inputs.size() == 2 * kNumInputs && weights.size() == kNumWeights && graph.size() == kNumGraph &&
            spec.size() == kNumSpec && reals.size() == kNumReals,
        name, kAny, "the lists must have 8, 8, 8, 6 and 3 elements, got ", inputs.size(), ", ",
        weights.size(), ", ", graph.size(), ", ", spec.size(), ", ", reals.size());
  for (Tensors* list : {&inputs, &weights, &graph}) {
    for (Tensor& tensor : *list) tensor = make_contiguous(tensor);
  }
  EdgeCall call{
      name, std::move(inputs), std::move(weights), std::move(graph), std::move(spec), std::move(reals)};
  const Tensor &p = call.inputs[kP], &w1c = call.weights[kW1c], &w2 = call.weights[kW2];
  check(p.dim() == 2 && w1c.dim() == 2 && (w2.dim() == 2 || absent(w2)), name, kAny,
        "p, w1c and w2 must be matrices, got ", p.dim(), ", ", w1c.dim(), " and ", w2.dim(), " dimensions");
  check(p.scalar_type() == ScalarType::Float || p.scalar_type() == ScalarType::Double, name, kAny,
        "p must be float32 or float64, got ", torch::headeronly::toString(p.scalar_type()));
  call.num_atoms = p.size(0), call.num_sources = call.inputs[kQ].size(0);
  call.num_edges = call.graph[kDestination].size(0);
  call.hidden = p.size(1), call.radial = w1c.size(1);
  call.pair = call.spec[kPair] != 0;
  call.num_workers = call.graph[kWorkers].size(0) / kFields;
  check(call.graph[kBlocks].is_cpu() && call.graph[kWorkers].is_cpu(), name, kAny,
        "the plan must be on the CPU, got another device");
  call.none = new_result(call.graph[kBlocks], 0);
  return call;
}

// Everything but w2 and w3, once the widths are known.
inline void check_inputs(const EdgeCall& call) {
  const int64_t E = call.num_edges, H = call.hidden, M = call.message, K = call.vector;
  for (int plane = 0; plane < call.planes(); ++plane) {
    const Tensor* in = &call.inputs[size_t(plane) * kNumInputs];
    check_shape(call, plane ? "p_tangent" : "p", in[kP], {call.num_atoms, H});
    check_shape(call, plane ? "q_tangent" : "q", in[kQ], {call.num_sources, H});
    check_shape(call, plane ? "r_tangent" : "r", in[kR], {E, 3});
    if (!absent(in[kF])) check_shape(call, plane ? "f_tangent" : "f", in[kF], {E});
  }
  const Tensors& weights = call.weights;
  check_shape(call, "w1c", weights[kW1c], {H, call.radial});
  check_shape(call, "b2", weights[kB2], {M});
  if (call.spec[kFeature] == kBessel || call.spec[kFeature] == kGaussian) {
    check_shape(call, "centres", weights[kCentres], {call.radial});
  } else {
    check(call.radial == 1, call.name, kAny, "w1c must have one column for a distance as feature, got ",
          call.radial);
  }
  if (!K) return;
  check_shape(call, "b3", weights[kB3], {K});
  check_shape(call, "w4", weights[kW4], {K});
  if (!absent(weights[kB4])) check_shape(call, "b4", weights[kB4], {1});
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

inline EdgeRange range_of(const EdgeCall& call, int64_t block) {
  const int64_t* fields = call.integers(kBlocks) + block * kFields;
  return {fields[0], fields[1], fields[2], fields[3]};
}

}  // namespace megagnn
