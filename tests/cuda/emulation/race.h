// What ThreadSanitizer is told, so that it finds races between CUDA threads: each is a fiber to it, ordered
// by barriers and by __syncwarp, not by shuffles, votes or the turns that the scheduler gives; threads of
// different blocks are ordered by nothing. It does not see the emulation's own accesses, and none that an
// atomic makes. Without -fsanitize=thread all of this is empty.
#pragma once

#include <memory>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace megagnn::emulation {

#ifdef __SANITIZE_THREAD__

constexpr bool kFindsRaces = true;

// Accesses of the fiber that made it are not seen while it lives.
class Unseen {
 public:
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// What comes before an arrival happens before what comes after a departure.
inline void arrive(char* at) { __tsan_release(at); }
inline void depart(char* from) { __tsan_acquire(from); }

#else

constexpr bool kFindsRaces = false;

struct Unseen {
  Unseen() {}  // not trivial: a variable of it is no unused one
  ~Unseen() {}
};
inline void arrive(char*) {}
inline void depart(char*) {}

#endif

// Places where the threads of one block meet; a new block has new ones.
struct Meeting {
  char barrier[2];  // in turn: a thread may arrive at the next barrier before another has left the last
  char warp[32];
  char end;
};

}  // namespace megagnn::emulation
