// A stack of its own for each emulated thread, and the switch between two of them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

class Fiber {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStack = 256 << 10;
#else
  static constexpr size_t kStack = 64 << 10;
#endif

  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void resume();             // from the scheduler: run until the fiber pauses
  void pause(bool forever);  // from the fiber: back to the scheduler
  void entered();            // first call in the entry function
  bool overflowed() const;   // has it written beyond the end of its stack?
  bool on_stack(const void* p) const { return p >= stack_ && p < stack_ + kStack; }

 private:
  char* stack_;
#if defined(__x86_64__)
  void* sp_ = nullptr;
  void* scheduler_ = nullptr;
#else
  ucontext_t context_, scheduler_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  void* scheduler_fake_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
#endif
};

}  // namespace simt
