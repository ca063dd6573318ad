#include "cpu/simd.h"

#include <atomic>

#include "cpu/adamw.h"
#include "cpu/edge_message.h"
#include "cpu/segment.h"

namespace megagnn::cpu {

namespace baseline {
extern const AdamWKernels adamw;
extern const SegmentKernels segment[kNumScalars];
extern const EdgeTable<float> edge_float32;
extern const EdgeTable<double> edge_float64;
}  // namespace baseline
#ifdef MEGAGNN_X86
namespace avx2 {
extern const AdamWKernels adamw;
extern const SegmentKernels segment[kNumScalars];
extern const EdgeTable<float> edge_float32;
extern const EdgeTable<double> edge_float64;
}  // namespace avx2
namespace avx512 {
extern const AdamWKernels adamw;
extern const SegmentKernels segment[kNumScalars];
extern const EdgeTable<float> edge_float32;
extern const EdgeTable<double> edge_float64;
}  // namespace avx512
#endif

const char* level_name(int level) {
  static const char* const names[kNumLevels] = {"baseline", "avx2", "avx512"};
  return names[level];
}

bool level_available(int level) {
#ifdef MEGAGNN_X86
  if (level == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == kBaseline;
}

static std::atomic<int>& chosen() {
  static std::atomic<int> value = [] {
    int best = kBaseline;
    for (int level = kBaseline; level < kNumLevels; ++level) {
      if (level_available(level)) best = level;
    }
    return best;
  }();
  return value;
}

int level() { return chosen().load(std::memory_order_relaxed); }

bool set_level(int level) {
  if (level < 0 || level >= kNumLevels || !level_available(level)) return false;
  chosen().store(level, std::memory_order_relaxed);
  return true;
}

const AdamWKernels& adamw_kernels() {
#ifdef MEGAGNN_X86
  if (level() == kAvx512) return avx512::adamw;
  if (level() == kAvx2) return avx2::adamw;
#endif
  return baseline::adamw;
}

const SegmentKernels& segment_kernels(Scalar scalar) {
#ifdef MEGAGNN_X86
  if (level() == kAvx512) return avx512::segment[scalar];
  if (level() == kAvx2) return avx2::segment[scalar];
#endif
  return baseline::segment[scalar];
}

template <>
const EdgeTable<float>& edge_table<float>() {
#ifdef MEGAGNN_X86
  if (level() == kAvx512) return avx512::edge_float32;
  if (level() == kAvx2) return avx2::edge_float32;
#endif
  return baseline::edge_float32;
}

template <>
const EdgeTable<double>& edge_table<double>() {
#ifdef MEGAGNN_X86
  if (level() == kAvx512) return avx512::edge_float64;
  if (level() == kAvx2) return avx2::edge_float64;
#endif
  return baseline::edge_float64;
}

}  // namespace megagnn::cpu
