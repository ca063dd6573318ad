// SIMD levels compiled into the extension and the one in use.
#pragma once

namespace megagnn::cpu {

enum Level { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kNumLevels = 3 };

const char* level_name(int level);
bool level_available(int level);  // compiled in, and this processor has it
int level();                      // the one in use; the highest available unless set_level was called
bool set_level(int level);        // for tests and measurements; false where not available

}  // namespace megagnn::cpu
