// CPU kernels of the Cartesian family's edge operation (megagnn/models/cartesian/edge.py): plain pointers, no
// torch. Compiled for float and double; numbers of a pair are its value and its tangent.
#pragma once

#include <cstdint>

#include "cartesian_message.h"
#include "cpu/scalar.h"

namespace megagnn::cpu {

using cartesian::kComponents, cartesian::kFields, cartesian::kNumPaths;

// Features or sums of `num_rows` atoms, (planes, num_rows, components, width) each; null where absent.
struct CartesianFields {
  void* data[kFields];
  int64_t num_rows, width;
  bool exchanged;  // of a pair: the first plane is the tangent
};

// The edges of some rows: those of row i are e = perm[ptr[i]], ... (perm null: ptr[i], ...).
struct CartesianEdges {
  const int64_t *ptr, *perm, *index;  // index: the atom at the other end
  const int64_t* first;               // the rows of weights [first, first + R) that an edge reads; null: 0
  int64_t num_edges, num_others, num_radial, num_rows;  // num_rows: of weights, R or more
  const void *basis[2], *unit[2];                       // (E, R) and (E, 3), values and tangents
};

// What the kernels read, in blocks of as many channels as a vector has lanes: features (atom, block, number,
// plane, lane), where a tensor's numbers are the six of its matrix; weights (block, row, path, lane), paths
// in the order of their numbers.
struct CartesianInput {
  CartesianEdges edges;
  const void *weight, *others, *rows;  // rows: cotangents of the sums, for gradients
};

struct CartesianGradients {
  void* weight;              // sums like CartesianInput::weight, or null
  void *basis[2], *unit[2];  // (E, R) and (E, 3), written; null where not wanted
};

struct CartesianKernels {
  int64_t lanes;
  // Atoms [begin, end) of the fields of `mask` (bit 0: scalars, 1: vectors, 2: tensors).
  void (*pack)(const CartesianFields& fields, int mask, bool pair, void* packed, int64_t begin, int64_t end);
  // The kernels below for a set of paths, bit p - 1 for path p; null where they were not compiled. They
  // return false at an index out of range.
  struct Set {
    int senders, receivers;  // fields, as in `mask`
    bool (*sum)(const CartesianInput& in, const CartesianFields& out, int64_t row_begin, int64_t row_end);
    bool (*gradient)(const CartesianInput& in, const CartesianGradients& out, int64_t width,
                     int64_t row_begin, int64_t row_end);
  };
  Set (*set)(uint32_t paths, bool pair);
};

}  // namespace megagnn::cpu
