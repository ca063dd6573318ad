// Errors of the operations: one sentence, "operation (backend): rule, got ...", raised as RuntimeError in
// Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace megagnn {

template <class... Parts>
[[noreturn]] inline void fail(const char* operation, const char* backend, const Parts&... parts) {
  std::ostringstream message;
  message << operation << " (" << backend << "): ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
inline void check(bool holds, const char* operation, const char* backend, const Parts&... parts) {
  if (__builtin_expect(!holds, 0)) fail(operation, backend, parts...);
}

}  // namespace megagnn
