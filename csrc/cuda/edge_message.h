// The CUDA kernels of the blockwise edge operation as a table of launchers, which EdgeProblem::stream orders.
#pragma once

#include "edge_block.h"

namespace megagnn::cuda {

template <class T>
const EdgeTable<T>& edge_table();

extern template const EdgeTable<float>& edge_table<float>();
extern template const EdgeTable<double>& edge_table<double>();

}  // namespace megagnn::cuda
