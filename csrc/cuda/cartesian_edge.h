// Launchers of the Cartesian family's edge operation (csrc/cartesian_edge.cpp); conventions in segment.h.
#pragma once

#include <cstdint>

#include "cartesian_message.h"

namespace megagnn::cuda {

// Everything has a first dimension of one plane, the values, or of two, values and tangents. Members are
// pointers and int64_t alone.
struct CartesianProblem {
  // (planes, atoms, components, width), with the tangents first where `exchanged`; null where absent
  const void *features[cartesian::kFields], *bars[cartesian::kFields];
  void* sums[cartesian::kFields];
  const void *weight, *basis, *unit;  // (paths, width, num_weights), (E, num_radial), (E, 3)
  // the edges of row i are perm[ptr[i]], ... (perm null: ptr[i], ...); index has the row of an edge, other
  // the atom at its other end
  const int64_t *ptr, *perm, *index, *other;
  // the rows [first, first + num_radial) of the weights' num_weights that an edge reads; null: 0
  const int64_t* first;
  void *table, *parts;  // workspace: (num_weights, paths, width), and of gradients `num_parts` times that
  void *weight_bar, *basis_bar, *unit_bar;  // null where not wanted; the last two together
  int64_t num_rows, num_others, num_edges, width, num_weights, num_radial, num_parts;
  int64_t exchanged;                    // features and sums; bars always are
  int64_t order[cartesian::kNumPaths];  // of the set's paths by number: which of the weights
};

// Runs of edges whose gradients of weights are added up one by one: so many that there is work for every
// multiprocessor of a large device, whatever the device is.
inline int64_t cartesian_parts(int64_t num_edges, int64_t width, int64_t num_weights) {
  const int64_t each = (width + 31) / 32 * ((num_weights + 3) / 4), wanted = 4096 / (each ? each : 1);
  const int64_t parts = wanted < 1 ? 1 : wanted > 512 ? 512 : wanted;
  return num_edges < 64 * parts ? (num_edges + 63) / 64 : parts;
}

}  // namespace megagnn::cuda

extern "C" {

// paths: a set, bit p - 1 for path p; cudaErrorInvalidValue where no kernels are compiled for it.
int megagnn_cuda_cartesian_edge_sum(int scalar, int pair, int64_t paths,
                                    const megagnn::cuda::CartesianProblem* problem, void* stream);

int megagnn_cuda_cartesian_edge_gradient(int scalar, int pair, int64_t paths,
                                         const megagnn::cuda::CartesianProblem* problem, void* stream);
}
