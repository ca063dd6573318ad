// Picks an operation's kernels at the SIMD level in use. For its binding, which is compiled once.
#pragma once

#include "cpu/scalar.h"
#include "cpu/simd.h"

// Declares the tables `name` of all levels, one Type per scalar type, and defines name_kernels(scalar). To be
// used in namespace megagnn.
#ifdef MEGAGNN_X86
#define MEGAGNN_KERNEL_TABLE(Type, name)                                \
  namespace cpu {                                                       \
  namespace baseline {                                                  \
  extern const Type name[kNumScalars];                                  \
  }                                                                     \
  namespace avx2 {                                                      \
  extern const Type name[kNumScalars];                                  \
  }                                                                     \
  namespace avx512 {                                                    \
  extern const Type name[kNumScalars];                                  \
  }                                                                     \
  }                                                                     \
  static const Type& name##_kernels(cpu::Scalar scalar) {               \
    if (cpu::level() == cpu::kAvx512) return cpu::avx512::name[scalar]; \
    if (cpu::level() == cpu::kAvx2) return cpu::avx2::name[scalar];     \
    return cpu::baseline::name[scalar];                                 \
  }
#else
#define MEGAGNN_KERNEL_TABLE(Type, name) \
  namespace cpu {                        \
  namespace baseline {                   \
  extern const Type name[kNumScalars];   \
  }                                      \
  }                                      \
  static const Type& name##_kernels(cpu::Scalar scalar) { return cpu::baseline::name[scalar]; }
#endif
