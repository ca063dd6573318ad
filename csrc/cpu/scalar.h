// Types of the tensors that the kernels take; the numbers are those the CUDA launchers use, too.
#pragma once

namespace megagnn::cpu {

enum Scalar { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kNumScalars = 3 };

}  // namespace megagnn::cpu
