#include "cuda/cartesian_edge.h"

#include "cuda/cartesian_edge.cuh"

namespace megagnn::cuda {
namespace {

template <class T, bool PAIR, uint32_t PATHS>
struct Launch {
  static constexpr int kCount = cartesian::count(PATHS);
  static int64_t size(const CartesianProblem& in) { return kCount * in.width * in.num_weights; }

  static void table(const CartesianProblem& in, cudaStream_t stream) {
    if (!size(in)) return;
    MEGAGNN_LAUNCH((cartesian_table<T>), threads_for(size(in)), dim3(kBlockThreads), 0, stream, in, kCount,
                   size(in));
  }
  static void sum(const CartesianProblem& in, cudaStream_t stream) {
    table(in, stream);
    MEGAGNN_LAUNCH((cartesian_sum<T, PAIR, PATHS>), warps_for(in.num_rows, in.width), dim3(kBlockThreads), 0,
                   stream, in);
  }
  static void gradient(const CartesianProblem& in, cudaStream_t stream) {
    if (in.unit_bar && in.num_edges) {
      table(in, stream);
      MEGAGNN_LAUNCH((cartesian_geometry<T, PAIR, PATHS>), warps_for(in.num_edges), dim3(kBlockThreads), 0,
                     stream, in);
    }
    if (!in.weight_bar || !size(in)) return;
    dim3 grid = warps_for(in.num_parts, in.width);
    grid.z = unsigned((in.num_weights + kWeightTile<T> - 1) / kWeightTile<T>);
    if (in.num_parts) {
      MEGAGNN_LAUNCH((cartesian_weight_parts<T, PAIR, PATHS>), grid, dim3(kBlockThreads), 0, stream, in);
    }
    MEGAGNN_LAUNCH((cartesian_add_parts<T>), threads_for(size(in)), dim3(kBlockThreads), 0, stream, in,
                   kCount, size(in));
  }
};

template <bool GRADIENT, class T, bool PAIR>
int launch(int64_t paths, const CartesianProblem& in, cudaStream_t stream) {
  bool found = false;
  cartesian::for_sets([&](auto compiled) {
    using This = decltype(compiled);
    if (paths != int64_t(This::kSet)) return;
    using Chosen = Launch<T, PAIR, This::kSet>;
    found = !GRADIENT || This::kGradient;
    if constexpr (!GRADIENT) {
      Chosen::sum(in, stream);
    } else if constexpr (This::kGradient) {
      Chosen::gradient(in, stream);
    }
  });
  return int(found ? cudaGetLastError() : cudaErrorInvalidValue);
}

template <bool GRADIENT>
int launch(int scalar, int pair, int64_t paths, const CartesianProblem& in, void* stream) {
  const auto run = scalar == 0 ? (pair ? launch<GRADIENT, float, true> : launch<GRADIENT, float, false>)
                               : (pair ? launch<GRADIENT, double, true> : launch<GRADIENT, double, false>);
  return run(paths, in, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace megagnn::cuda

extern "C" int megagnn_cuda_cartesian_edge_sum(int scalar, int pair, int64_t paths,
                                               const megagnn::cuda::CartesianProblem* problem, void* stream) {
  return megagnn::cuda::launch<false>(scalar, pair, paths, *problem, stream);
}

extern "C" int megagnn_cuda_cartesian_edge_gradient(int scalar, int pair, int64_t paths,
                                                    const megagnn::cuda::CartesianProblem* problem,
                                                    void* stream) {
  return megagnn::cuda::launch<true>(scalar, pair, paths, *problem, stream);
}
