#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace simt {
namespace {

constexpr uint64_t kCanary = 0xC0DEC0DEC0DEC0DEull;

std::vector<char*>& spare() {  // stacks are kept: mapping one costs more than a small kernel's thread
  static std::vector<char*> stacks;
  return stacks;
}

char* take_stack() {
  if (!spare().empty()) {
    char* s = spare().back();
    spare().pop_back();
    return s;
  }
  void* p = mmap(nullptr, Fiber::kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

}  // namespace

#if defined(__x86_64__)
extern "C" void fastrnn_simt_switch(void** save, void* to);
// The System V ABI leaves rbx, rbp and r12 to r15 to the callee.
asm(R"(
.text
.globl fastrnn_simt_switch
.hidden fastrnn_simt_switch
.type fastrnn_simt_switch,@function
fastrnn_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastrnn_simt_switch,.-fastrnn_simt_switch
)");
#endif

Fiber::Fiber(void (*entry)()) : stack_(take_stack()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStack);
#endif
  std::memcpy(stack_, &kCanary, sizeof kCanary);
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(stack_ + kStack - 64);
  *--sp = nullptr;  // so that rsp is 8 beyond a multiple of 16 on entry
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  sp_ = sp;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_, context_.uc_stack.ss_size = kStack, context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

Fiber::~Fiber() { spare().push_back(stack_); }

bool Fiber::overflowed() const { return std::memcmp(stack_, &kCanary, sizeof kCanary) != 0; }

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_, stack_, kStack);
#endif
#if defined(__x86_64__)
  fastrnn_simt_switch(&scheduler_, sp_);
#else
  swapcontext(&scheduler_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_size_);
#endif
}

void Fiber::pause(bool forever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake_, scheduler_bottom_, scheduler_size_);
#endif
  (void)forever;
#if defined(__x86_64__)
  fastrnn_simt_switch(&sp_, scheduler_);
#else
  swapcontext(&context_, &scheduler_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_, &scheduler_bottom_, &scheduler_size_);
#endif
}

}  // namespace simt
