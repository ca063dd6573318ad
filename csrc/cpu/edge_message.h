// The CPU kernels of the blockwise edge operation, of the SIMD level chosen for this machine
// (csrc/cpu/simd.cpp).
#pragma once

#include "edge_block.h"

namespace megagnn::cpu {

template <class T>
const EdgeTable<T>& edge_table();

}  // namespace megagnn::cpu
