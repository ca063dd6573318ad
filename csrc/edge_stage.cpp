// One stage of the blockwise edge operation on one block, in the caller's memory, so that the caller can put
// collectives between the stages (megagnn/models/egnn/edge/stages.py). The products are the caller's, too.
#include "cpu/edge_message.h"
#include "edge_call.h"
#ifdef MEGAGNN_WITH_CUDA
#include "cuda/edge_message.h"
#endif

namespace megagnn {
namespace {

constexpr const char* kName = "edge_stage";

// As in megagnn/models/egnn/edge/stages.py, like the lists below.
enum Stage {
  kRadial,
  kBefore,
  kMessage,
  kScalar,
  kVector,
  kVectorBackward,
  kMessageBackward,
  kBeforeBackward,
  kRadialBackward,
  kNumStages
};

// Of (planes, count).
enum Narrow { kD, kDBar, kW, kWBar, kNumNarrow };
// Of (planes * count, width).
enum Wide {
  kRho = kNumNarrow,
  kRhoBar,
  kA,
  kZ,
  kASlope,
  kZBar,
  kC,
  kM,
  kCSlope,
  kMBar,
  kG,
  kU,
  kGBar,
  kNumBuffers
};
constexpr const char* kBufferNames[kNumBuffers] = {"d",       "d_bar", "w",       "w_bar", "rho",  "rho_bar",
                                                   "a",       "z",     "a_slope", "z_bar", "c",    "m",
                                                   "c_slope", "m_bar", "g",       "u",     "g_bar"};

// Gradients of the inputs come first, in the order of Input, those of the tangents below them.
enum Result {
  kSum = 2 * kNumInputs,
  kVec,
  kSumTangent,
  kVecTangent,
  kB2Bar,
  kB3Bar,
  kW4Bar,
  kB4Bar,
  kNumResults
};
constexpr const char* kResultNames[kNumResults] = {
    "p_bar",         "q_bar",         "r_bar",  "f_bar", "p_tangent_bar", "q_tangent_bar",
    "r_tangent_bar", "f_tangent_bar", "sum",    "vec",   "sum_tangent",   "vec_tangent",
    "b2_bar",        "b3_bar",        "w4_bar", "b4_bar"};
constexpr const char* kBarNames[kNumBars] = {"sum_bar", "vec_bar", "sum_tangent_bar", "vec_tangent_bar"};

// What a stage cannot do without; anything else may be absent. Of results and bars those of the values, a
// pair needs the tangents' as well.
struct Needs {
  std::vector<int> buffers, results, bars;
};

const Needs& needs_of(Stage stage) {
  static const Needs needs[kNumStages] = {
      {{kD, kRho}, {}, {}},
      {{kA, kZ}, {}, {}},
      {{kC}, {}, {}},
      {{kG, kW}, {}, {}},
      {{kD, kW}, {kVec}, {}},
      {{kD, kDBar, kW, kWBar, kU, kGBar}, {}, {kVecBar}},
      {{kM, kCSlope, kMBar}, {}, {kSumBar}},
      {{kASlope, kZBar}, {kP, kQ}, {}},
      {{kD, kDBar, kRhoBar}, {kR}, {}},
  };
  return needs[stage];
}

struct StageCall {
  EdgeCall call;
  Stage stage;
  Tensors buffers, results, bars;
  int64_t index;
  EdgeRange range;
};

void check_tensor(const EdgeCall& call, const char* name, const Tensor& tensor, std::vector<int64_t> sizes) {
  check_shape(call, name, tensor, std::move(sizes));
  const Tensor& p = call.inputs[kP];
  check(tensor.is_contiguous() && tensor.is_cpu() == p.is_cpu() && tensor.get_device() == p.get_device(),
        kName, kAny, name, " must be contiguous and on the device of p, got another layout or device");
}

void check_buffers(const StageCall& stage) {
  const EdgeCall& call = stage.call;
  const int64_t count = stage.range.end - stage.range.begin;
  for (int k = 0; k < kNumBuffers; ++k) {
    if (absent(stage.buffers[size_t(k)])) continue;
    const int64_t width = k < kA ? call.radial : k < kC ? call.hidden : k < kG ? call.message : call.vector;
    const std::vector<int64_t> sizes = k < kNumNarrow ? std::vector<int64_t>{call.planes(), count}
                                                      : std::vector<int64_t>{call.planes() * count, width};
    check_tensor(call, kBufferNames[k], stage.buffers[size_t(k)], sizes);
  }
}

void check_results(const StageCall& stage) {
  const EdgeCall& call = stage.call;
  const int64_t N = call.num_atoms, E = call.num_edges, H = call.hidden, M = call.message, K = call.vector;
  const std::vector<int64_t> of_inputs[] = {{N, H}, {call.num_sources, H}, {E, 3}, {E}};
  const std::vector<int64_t> of_outputs[] = {{N, M}, {N, 3}}, of_weights[] = {{M}, {K}, {K}, {1}};
  for (int k = 0; k < kNumResults; ++k) {
    if (absent(stage.results[size_t(k)])) continue;
    check_tensor(call, kResultNames[k], stage.results[size_t(k)],
                 k < kSum     ? of_inputs[k % kNumInputs]
                 : k < kB2Bar ? of_outputs[(k - kSum) % 2]
                              : of_weights[k - kB2Bar]);
  }
  for (int k = 0; k < kNumBars; ++k) {
    if (!absent(stage.bars[size_t(k)]))
      check_tensor(call, kBarNames[k], stage.bars[size_t(k)], of_outputs[k % 2]);
  }
}

void check_present(const char* name, const Tensor& tensor) {
  check(!absent(tensor), kName, kAny, name, " must be given to this stage, got none");
}

void check_needs(const StageCall& stage) {
  const Needs& needs = needs_of(stage.stage);
  for (const int k : needs.buffers) check_present(kBufferNames[k], stage.buffers[size_t(k)]);
  const int planes = int(stage.call.planes());
  for (int plane = 0; plane < planes; ++plane) {
    for (const int k : needs.results) {
      const int at = k + plane * (k < kSum ? kNumInputs : 2);
      check_present(kResultNames[at], stage.results[size_t(at)]);
    }
    for (const int k : needs.bars) check_present(kBarNames[k + 2 * plane], stage.bars[size_t(k + 2 * plane)]);
  }
  const auto together = [](const char* first, const Tensor& one, const char* second, const Tensor& other) {
    check(absent(one) == absent(other), kName, kAny, first, " and ", second,
          " must be given together, got one of them");
  };
  const auto pair = [&](const Tensors& list, const char* const* names, int value, int tangent) {
    if (planes == 2) together(names[value], list[size_t(value)], names[tangent], list[size_t(tangent)]);
  };
  pair(stage.results, kResultNames, kR, kNumInputs + kR);
  pair(stage.results, kResultNames, kVec, kVecTangent);
  together("b3_bar", stage.results[kB3Bar], "w4_bar", stage.results[kW4Bar]);
  if (stage.stage == kScalar) together("u", stage.buffers[kU], "g_bar", stage.buffers[kGBar]);
}

template <class T>
EdgeProblem<T> stage_problem(const StageCall& stage) {
  EdgeProblem<T> in = problem_of<T>(stage.call);
  for (int plane = 0; plane < stage.call.planes(); ++plane) {
    const Tensor *bar = &stage.results[size_t(plane) * kNumInputs],
                 *out = &stage.results[size_t(kSum + 2 * plane)];
    in.p_bar[plane] = out_data<T>(bar[kP]), in.r_bar[plane] = out_data<T>(bar[kR]);
    in.f_bar[plane] = out_data<T>(bar[kF]);
    in.sum[plane] = out_data<T>(out[0]), in.vec[plane] = out_data<T>(out[1]);
    in.sum_bar[plane] = data<T>(stage.bars[size_t(2 * plane)]);
    in.vec_bar[plane] = data<T>(stage.bars[size_t(2 * plane + 1)]);
  }
  return in;
}

template <class T>
EdgeBlock<T> stage_block(const StageCall& stage) {
  const EdgeRange& range = stage.range;
  const auto of = [&](int k) { return out_data<T>(stage.buffers[size_t(k)]); };
  EdgeBlock<T> block{};
  block.index = stage.index, block.begin = range.begin, block.count = range.end - range.begin;
  block.first_row = range.first_row, block.num_rows = range.end_row - range.first_row;
  const auto plane_of = [&](int k, int plane) { return of(k) ? of(k) + plane * block.count : nullptr; };
  for (int plane = 0; plane < stage.call.planes(); ++plane) {
    block.d[plane] = plane_of(kD, plane), block.d_bar[plane] = plane_of(kDBar, plane);
    block.w[plane] = plane_of(kW, plane), block.w_bar[plane] = plane_of(kWBar, plane);
  }
  block.rho = of(kRho), block.rho_bar = of(kRhoBar);
  block.a = of(kA), block.z = of(kZ), block.a_slope = of(kASlope);
  block.z_bar = of(kZBar), block.c = of(kC), block.m = of(kM), block.c_slope = of(kCSlope);
  block.m_bar = of(kMBar), block.g = of(kG), block.u = of(kU), block.g_bar = of(kGBar);
  return block;
}

template <class T>
void call_kernel(const EdgeKernels<T>& kernels, Stage stage, const EdgeProblem<T>& in,
                 const EdgeBlock<T>& block, const EdgeSums<T>& sums) {
  switch (stage) {
    case kRadial:
      return kernels.radial(in, block);
    case kBefore:
      return kernels.before(in, block);
    case kMessage:
      return kernels.message(in, block);
    case kScalar:
      return kernels.scalar(in, block);
    case kVector:
      return kernels.vector(in, block);
    case kVectorBackward:
      return kernels.vector_backward(in, block, sums);
    case kMessageBackward:
      return kernels.message_backward(in, block, sums);
    case kBeforeBackward:
      return kernels.before_backward(in, block, sums);
    default:
      return kernels.radial_backward(in, block);
  }
}

template <class T>
void run_stage(const StageCall& stage) {
  EdgeProblem<T> in = stage_problem<T>(stage);
  const EdgeBlock<T> block = stage_block<T>(stage);
  const auto of = [&](int k) { return out_data<T>(stage.results[size_t(k)]); };
  const EdgeSums<T> sums{{of(kQ), of(kNumInputs + kQ)}, 0, of(kB2Bar), of(kB3Bar), of(kW4Bar), of(kB4Bar)};
#ifdef MEGAGNN_WITH_CUDA
  if (!stage.call.inputs[kP].is_cpu()) {
    const cuda::DeviceGuard guard(kName, stage.call.inputs[kP].get_device());
    in.stream = guard.stream();
    call_kernel(cuda::edge_table<T>().kernels[stage.call.pair][in.activation], stage.stage, in, block, sums);
    check_launch(kName, megagnn_cuda_last_error());
    return;
  }
#endif
  call_kernel(cpu::edge_table<T>().kernels[stage.call.pair][in.activation], stage.stage, in, block, sums);
}

void edge_stage(int64_t stage, Tensors inputs, Tensors weights, Tensors graph, std::vector<int64_t> spec,
                std::vector<double> reals, Tensors buffers, Tensors results, Tensors bars, int64_t block) {
  EdgeCall call = take_lists(kName, std::move(inputs), std::move(weights), std::move(graph), std::move(spec),
                             std::move(reals));
  const Tensor &b2 = call.weights[kB2], &b3 = call.weights[kB3];
  call.message = b2.size(0), call.vector = absent(b3) ? 0 : b3.size(0);
  check_inputs(call);
  check(buffers.size() == kNumBuffers && results.size() == kNumResults && bars.size() == kNumBars, kName,
        kAny, "there must be 17 buffers, 16 results and 4 cotangents, got ", buffers.size(), ", ",
        results.size(), " and ", bars.size());
  check(stage >= 0 && stage < kNumStages, kName, kAny, "there are stages 0 to 8, got ", stage);
  const bool of_vector = stage == kScalar || stage == kVector || stage == kVectorBackward;
  check(call.vector > 0 || !of_vector, kName, kAny, "this stage must have a vector branch, got no b3");
  const int64_t num_blocks = call.graph[kBlocks].size(0) / kFields;
  check(block >= 0 && block < num_blocks, kName, kAny, "the block must lie in [0, ", num_blocks, "), got ",
        block);
  const EdgeRange range = range_of(call, block);
  const StageCall all{std::move(call), Stage(stage), std::move(buffers), std::move(results), std::move(bars),
                      block,           range};
  check_buffers(all);
  check_results(all);
  check_needs(all);
  all.call.inputs[kP].scalar_type() == ScalarType::Float ? run_stage<float>(all) : run_stage<double>(all);
}

}  // namespace
}  // namespace megagnn

STABLE_TORCH_LIBRARY_FRAGMENT(megagnn, library) {
  library.def(
      "edge_stage(int stage, Tensor[] inputs, Tensor[] weights, Tensor[] graph, int[] spec, float[] reals, "
      "Tensor(a!)[] buffers, Tensor(b!)[] results, Tensor[] bars, int block) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megagnn, CPU, library) {
  library.impl("edge_stage", TORCH_BOX(&megagnn::edge_stage));
}

#ifdef MEGAGNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megagnn, CUDA, library) {
  library.impl("edge_stage", TORCH_BOX(&megagnn::edge_stage));
}
#endif
