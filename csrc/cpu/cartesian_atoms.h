// CPU kernels of the atoms' side of the Cartesian family (megagnn/models/cartesian/atoms.py): plain pointers,
// no torch. Compiled for float and double.
#pragma once

#include <cstdint>

#include "cpu/scalar.h"

namespace megagnn::cpu {

// Features of atoms, (planes, atoms, components, width) with the last dimension dense; null where absent. Of
// cotangents and gradients of a pair the first plane is the tangent's.
struct AtomField {
  void* data;
  int64_t plane, row, component, width;  // strides, in numbers, and channels
};

// What one call reads and writes, each kernel what it names: features by field (h, v, t), `squares` (planes,
// atoms), weights of channels by field.
struct AtomsCall {
  AtomField in[3], other[3], out[3], gates, gates_bar;
  const void* squares;
  void* squares_out;
  const void* weights[3];
  void* weight_bars[3];  // added to
  double factors[3], epsilon;
  int64_t num_atoms;
};

// For atoms [begin, end). Names of cotangents end in _bar, and squares are one number per atom.
struct AtomsKernels {
  using Run = void (*)(const AtomsCall& call, int64_t begin, int64_t end);
  struct Set {
    // squares_out = sum over fields of factor |in + other|^2; out = in + other, of fields that have another.
    Run squares;
    // out = other + 2 factor in squares; other: cotangents, where there are any; squares: that of squares.
    Run squares_backward;
    // out = in weight / sqrt(squares + epsilon).
    Run scale;
    // Of other, the cotangents: out, squares_out, weight_bars.
    Run scale_backward;
    // Gates and products of u = in with slopes = weights; out: parts side by side.
    Run products;
    // Of other, the cotangents: out, gates_bar, squares_out, weight_bars.
    Run products_backward;
  };
  Set value, pair;
};

}  // namespace megagnn::cpu
