// The scheduler: runs the blocks of a launch one after another, and of a block each thread on its fiber until
// it waits for others or returns.
//
// A kernel that breaks a rule is stopped. The launch then leaves cudaErrorLaunchFailure behind, as a fault on
// a device would, and a message that names kernel, block, thread and line: see State::message.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "types.h"

using cudaStream_t = struct MegagnnEmulatedStream*;
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

inline uint3 threadIdx = {}, blockIdx = {};
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace megagnn::emulation {

// Where in the source an intrinsic is called. Two calls are the same where their lines are: unlike the
// address of the call, that stays so when the compiler copies code.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && std::string_view(file) == other.file;
  }
};

enum class Status { ready, at_block_barrier, at_warp_exchange, returned };

// What the lanes of a warp gave to one exchange.
struct Lanes {
  unsigned mask = 0;
  uint64_t value[warpSize] = {};
};

struct Thread {
  Fiber fiber;
  uint3 index = {};
  unsigned lane = 0, warp = 0;
  Status status = Status::returned;
  const char* operation = "";  // what it waits in, and where
  Site site = {};
  unsigned mask = 0;   // lanes that a warp exchange waits for
  bool reads = false;  // what other lanes gave
  uint64_t value = 0;
  Lanes lanes;  // of the last exchange
};

enum class Order { forward, reverse, random };

struct State {
  Order order = Order::forward;
  std::mt19937_64 random;
  std::string message;
  cudaError_t last_error = cudaSuccess;
  std::unordered_map<const void*, size_t> shared_limit;  // by kernel, where cudaFuncSetAttribute has set one

  // The launch that runs.
  std::string kernel;
  std::function<void()> body;
  std::unique_ptr<char[]> dynamic_shared;
  bool faulted = false;

  // Its block that runs.
  Fiber scheduler;
  std::vector<std::unique_ptr<Thread>> threads;
  size_t num_threads = 0, num_returned = 0, num_at_barrier = 0;
  Thread* running = nullptr;
  size_t barrier_count = 0, barrier_result = 0;  // threads with a true predicate
  size_t num_barriers = 0;                       // that were passed
  std::vector<std::unique_ptr<Meeting>> meetings;

  State() = default;
  ~State() {
    const Unseen unseen;
    threads.clear();
  }
};
inline State state;

inline std::string describe(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

inline std::string describe(const Thread& thread) {
  char mask[32] = "";
  if (thread.status == Status::at_warp_exchange)
    std::snprintf(mask, sizeof(mask), " with mask 0x%08x", thread.mask);
  const std::string name = "thread " + describe(thread.index);
  if (thread.status == Status::returned) return name + " has returned";
  if (thread.status == Status::ready) return name + " runs";
  return name + " waits in " + thread.operation + mask + " (" + thread.site.file + ":" +
         std::to_string(thread.site.line) + ")";
}

inline void report(const std::string& what) {
  if (state.faulted) return;  // what follows from the first fault is no news
  state.faulted = true;
  state.message = state.kernel + ", block " + describe(blockIdx) + ": " + what;
}

inline void yield() { state.running->fiber.switch_to(state.scheduler); }

// Ends the launch from within a kernel. The fibers of its block are never gone on with.
[[noreturn]] inline void fault(const std::string& what) {
  report(what);
  yield();
  std::abort();
}

[[noreturn]] inline void fault_at(const char* operation, Site site, const std::string& what) {
  fault("thread " + describe(state.running->index) + " in " + operation + " (" + site.file + ":" +
        std::to_string(site.line) + "): " + what);
}

inline void release_block_barrier() {
  const Thread& first = *state.threads[0];
  for (size_t i = 1; i < state.num_threads; ++i) {
    const Thread& other = *state.threads[i];
    if (!(other.site == first.site)) {
      return report("divergent barrier: " + describe(first) + ", " + describe(other));
    }
  }
  ++state.num_barriers;
  state.barrier_result = state.barrier_count;
  state.barrier_count = state.num_at_barrier = 0;
  for (size_t i = 0; i < state.num_threads; ++i) state.threads[i]->status = Status::ready;
}

// Devices since Volta count a thread that has returned as arrived, older ones hang: here it is a fault.
inline void check_nobody_left() {
  if (state.num_returned == 0 || state.num_at_barrier == 0) return;
  const Thread *left = nullptr, *waits = nullptr;
  for (size_t i = 0; i < state.num_threads; ++i) {
    const Thread& thread = *state.threads[i];
    if (thread.status == Status::returned && !left) left = &thread;
    if (thread.status == Status::at_block_barrier && !waits) waits = &thread;
  }
  report("divergent barrier: " + describe(*waits) + ", " + describe(*left));
}

// Waits for all threads of the block; returns for how many of them the predicate is true.
inline size_t block_barrier(const char* operation, bool predicate, Site site) {
  const Unseen unseen;
  Thread& me = *state.running;
  char* const meeting = &state.meetings.back()->barrier[state.num_barriers % 2];
  arrive(meeting);
  me.status = Status::at_block_barrier;
  me.operation = operation;
  me.site = site;
  state.barrier_count += predicate;
  ++state.num_at_barrier;
  check_nobody_left();
  if (state.num_at_barrier == state.num_threads) release_block_barrier();
  yield();  // also where all have arrived: who goes first is for the scheduler to say
  depart(meeting);
  return state.barrier_result;
}

inline Thread* lane_of(unsigned warp, unsigned lane) {
  const size_t i = size_t(warp) * warpSize + lane;
  return i < state.num_threads ? state.threads[i].get() : nullptr;
}

// Lets the lanes of an exchange go on where all have come, with what each of them gave.
inline void release_exchange(const Thread& last) {
  Lanes lanes;
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    const Thread* thread = lane_of(last.warp, lane);
    if (!(last.mask >> lane & 1) || !thread || thread->status == Status::returned) continue;
    if (thread->status != Status::at_warp_exchange || thread->mask != last.mask) return;
    if (std::string_view(thread->operation) != last.operation || !(thread->site == last.site)) {
      return report("lanes of one mask meet in different calls: " + describe(*thread) + ", " +
                    describe(last));
    }
    lanes.mask |= 1u << lane;
    lanes.value[lane] = thread->value;
  }
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if (!(lanes.mask >> lane & 1)) continue;
    Thread* thread = lane_of(last.warp, lane);
    thread->lanes = lanes;
    thread->status = Status::ready;
  }
}

// Waits for the lanes of a mask; returns what each gave. CUDA lets a mask name lanes that have returned and
// leaves their values undefined: here only calls that read none may name them.
inline const Lanes& warp_exchange(const char* operation, unsigned mask, uint64_t value, Site site,
                                  bool reads = true) {
  const Unseen unseen;
  Thread& me = *state.running;
  char* const meeting = &state.meetings.back()->warp[me.warp];
  if (!reads) arrive(meeting);
  if (!(mask >> me.lane & 1)) fault_at(operation, site, "its mask does not name the lane that calls");
  for (unsigned lane = 0; lane < warpSize && reads; ++lane) {
    const Thread* thread = mask >> lane & 1 ? lane_of(me.warp, lane) : &me;
    const char* why = !thread                              ? "is not in the block"
                      : thread->status == Status::returned ? "has returned"
                                                           : "";
    if (*why) fault_at(operation, site, "its mask names lane " + std::to_string(lane) + ", which " + why);
  }
  me.status = Status::at_warp_exchange;
  me.operation = operation;
  me.site = site;
  me.mask = mask;
  me.reads = reads;
  me.value = value;
  release_exchange(me);
  yield();
  if (!reads) depart(meeting);
  return me.lanes;
}

// What the return of a thread means for those that wait for it.
inline void leave(Thread& me) {
  const Unseen unseen;
  arrive(&state.meetings.back()->end);
  me.status = Status::returned;
  ++state.num_returned;
  check_nobody_left();
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    const Thread* other = lane_of(me.warp, lane);
    if (!other || other->status != Status::at_warp_exchange || !(other->mask >> me.lane & 1)) continue;
    if (other->reads) return report(describe(*other) + ", " + describe(me));
    release_exchange(*other);
  }
}

// Where every fiber starts.
inline void thread_entry() {
  Fiber::started(state.scheduler);
  state.body();
  leave(*state.running);
  yield();
  std::abort();
}

// Nothing can run and not all have returned.
inline void report_deadlock() {
  std::string what = "deadlock";
  const Thread* told[4] = {};  // one of each kind of wait will do
  size_t num_told = 0;
  for (size_t i = 0; i < state.num_threads && num_told < 4; ++i) {
    const Thread& thread = *state.threads[i];
    const bool known = std::any_of(told, told + num_told, [&](const Thread* other) {
      return other->status == thread.status &&
             (thread.status == Status::returned || other->site == thread.site);
    });
    if (known) continue;
    told[num_told++] = &thread;
    what += (num_told == 1 ? ": " : ", ") + describe(thread);
  }
  report(what);
}

// The order in which threads, or blocks, have their turn.
inline void arrange(std::vector<uint64_t>& turns) {
  std::iota(turns.begin(), turns.end(), uint64_t(0));
  if (state.order == Order::reverse) std::reverse(turns.begin(), turns.end());
  if (state.order == Order::random) std::shuffle(turns.begin(), turns.end(), state.random);
}

inline void run_block() {
  for (size_t i = 0; i < state.num_threads; ++i) {
    state.threads[i]->fiber.prepare(thread_entry);
    state.threads[i]->status = Status::ready;
  }
  state.num_returned = state.num_at_barrier = state.barrier_count = state.num_barriers = 0;
  state.meetings.push_back(std::make_unique<Meeting>());
  std::vector<uint64_t> turns(state.num_threads);
  while (state.num_returned < state.num_threads && !state.faulted) {
    arrange(turns);
    bool any = false;
    for (const uint64_t i : turns) {
      Thread& thread = *state.threads[i];
      if (thread.status != Status::ready) continue;
      any = true;
      state.running = &thread;
      threadIdx = thread.index;
      state.scheduler.switch_to(thread.fiber);
      if (state.faulted) return;
    }
    if (!any) report_deadlock();
  }
}

}  // namespace megagnn::emulation
