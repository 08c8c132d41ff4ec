// What g++ -fsanitize=thread calls at each load and store: here they feed the emulator's detector of races.
// ThreadSanitizer itself is not linked, it knows nothing of blocks, clusters and mbarriers.
#include "emulator/machine.h"

namespace {

inline void seen(const void* address, int bytes, bool write, const void* pc) {
  simt::Machine* m = simt::machine;
  if (!m || !m->races || !m->current || m->current->fiber.on_stack(address)) return;
  simt::Site at;
  at.pc = pc;
  simt::record(address, bytes, write, write ? "a store" : "a load", at);
}

}  // namespace

#define FASTRNN_HOOK(N)                                                            \
  void __tsan_read##N(void* p) { seen(p, N, false, __builtin_return_address(0)); } \
  void __tsan_write##N(void* p) { seen(p, N, true, __builtin_return_address(0)); }
#define FASTRNN_UNALIGNED_HOOK(N)                                                            \
  void __tsan_unaligned_read##N(void* p) { seen(p, N, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##N(void* p) { seen(p, N, true, __builtin_return_address(0)); }

extern "C" {
FASTRNN_HOOK(1)
FASTRNN_HOOK(2)
FASTRNN_HOOK(4)
FASTRNN_HOOK(8)
FASTRNN_HOOK(16)
FASTRNN_UNALIGNED_HOOK(2)
FASTRNN_UNALIGNED_HOOK(4)
FASTRNN_UNALIGNED_HOOK(8)
FASTRNN_UNALIGNED_HOOK(16)
void __tsan_read_range(void* p, size_t n) { seen(p, int(n), false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { seen(p, int(n), true, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
