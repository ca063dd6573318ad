// Fibers: a stack each, switched by hand. One fiber plays one CUDA thread, so that a kernel can be left in
// the middle, at a barrier, and gone on with later.
//
// x86-64 saves the registers that a function must keep and changes the stack pointer; elsewhere, and with
// MEGAGNN_EMULATION_UCONTEXT, swapcontext does so, with two system calls per switch. AddressSanitizer is told
// of each switch: it must know on which stack the program runs.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "race.h"

#if !defined(__x86_64__) && !defined(MEGAGNN_EMULATION_UCONTEXT)
#define MEGAGNN_EMULATION_UCONTEXT
#endif
#ifdef MEGAGNN_EMULATION_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef MEGAGNN_EMULATION_UCONTEXT
extern "C" void megagnn_switch_stack(void** save, void* load);
asm(R"(
  .pushsection .text
  .weak megagnn_switch_stack
  .hidden megagnn_switch_stack
  .type megagnn_switch_stack, @function
megagnn_switch_stack:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
  .size megagnn_switch_stack, . - megagnn_switch_stack
  .popsection
)");
#endif

namespace megagnn::emulation {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = size_t(256) << 10;  // room for the red zones
#else
constexpr size_t kStackBytes = size_t(64) << 10;
#endif

// The fiber with no stack of its own is the one the program started on.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { release(); }

  // The next switch to this fiber calls entry, which must never return.
  void prepare(void (*entry)()) {
#ifdef __SANITIZE_THREAD__
    release();  // another thread, and memory that none has touched
    thread_ = __tsan_create_fiber(0);
#endif
    if (!stack_) allocate();
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, kStackBytes);  // it may have been left in the middle of a function
#endif
#ifdef MEGAGNN_EMULATION_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, entry, 0);
#else
    // As megagnn_switch_stack leaves it: six registers, then where to return to. At entry the ABI wants the
    // stack pointer 8 bytes off a multiple of 16, as after a call.
    auto** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 2;
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    stack_pointer_ = top - 6;
#endif
  }

  // Leaves this fiber, which must be the running one, for another; returns when something switches back.
  void switch_to(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, other.bottom_, other.size_);
#endif
#ifdef __SANITIZE_THREAD__
    if (!stack_) thread_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(other.thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef MEGAGNN_EMULATION_UCONTEXT
    swapcontext(&context_, &other.context_);
#else
    megagnn_switch_stack(&stack_pointer_, other.stack_pointer_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // First thing in an entry: tells AddressSanitizer that the switch is over, and learns the stack it came
  // from.
  static void started([[maybe_unused]] Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
#endif
  }

 private:
  static constexpr size_t kGuardBytes = 4096;  // below the stack: an overflow faults and overwrites nothing

  void allocate() {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char*>(memory) + kGuardBytes;
#ifdef __SANITIZE_ADDRESS__
    bottom_ = stack_;
    size_ = kStackBytes;
#endif
  }

  void release() {
    if (!stack_) return;
    munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
    stack_ = nullptr;
#ifdef __SANITIZE_THREAD__
    __tsan_destroy_fiber(thread_);
#endif
  }

  char* stack_ = nullptr;
#ifdef __SANITIZE_THREAD__
  void* thread_ = nullptr;
#endif
#ifdef MEGAGNN_EMULATION_UCONTEXT
  ucontext_t context_ = {};
#else
  void* stack_pointer_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace megagnn::emulation
