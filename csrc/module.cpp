// The Python module megagnn._C. Loading it registers the operations; it offers only what describes the build.
#include <pybind11/pybind11.h>

#include "cpu/simd.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operations of megagnn; importing this registers them with torch.";
  module.attr("version") = MEGAGNN_VERSION;
  module.attr("compiler") = MEGAGNN_COMPILER;
  module.attr("flags") = MEGAGNN_FLAGS;
  module.attr("torch_version") = MEGAGNN_TORCH_VERSION;
  module.attr("cuda_archs") = MEGAGNN_CUDA_ARCHS;  // "" where built without CUDA
  module.def(
      "simd_levels",
      [] {
        py::list names;
        for (int level = 0; level < megagnn::cpu::kNumLevels; ++level) {
          if (megagnn::cpu::level_available(level)) names.append(megagnn::cpu::level_name(level));
        }
        return names;
      },
      "SIMD levels this processor can run, lowest first.");
  module.def(
      "simd_level", [] { return megagnn::cpu::level_name(megagnn::cpu::level()); }, "The level in use.");
  module.def(
      "set_simd_level",
      [](const std::string& name) {
        for (int level = 0; level < megagnn::cpu::kNumLevels; ++level) {
          if (name == megagnn::cpu::level_name(level) && megagnn::cpu::set_level(level)) return;
        }
        throw py::value_error("set_simd_level: the level must be one of simd_levels(), got " + name);
      },
      "Uses another level, for tests and measurements.");
}
