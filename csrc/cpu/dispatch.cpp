// Choice of the instruction set, scratch memory and threads: what all units share.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/engine.h"

namespace fastrnn {

namespace baseline {
const Kernels& kernels();
}
#if defined(FASTRNN_X86)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512bf16 {
const Kernels& kernels();
}
#endif

namespace {

struct Isa {
  const char* name;
  bool here;
  const Kernels& (*kernels)();
};

int list(Isa* out) {  // best first
  int n = 0;
#if defined(FASTRNN_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool bf16 = avx512 && avx2 && __builtin_cpu_supports("avx512bf16");
  out[n++] = {"avx512bf16", bf16, avx512bf16::kernels};
  out[n++] = {"avx512", avx512 && avx2, avx512::kernels};
  out[n++] = {"avx2", avx2, avx2::kernels};
#endif
  out[n++] = {"baseline", true, baseline::kernels};
  return n;
}

Isa choose() {
  Isa all[4];
  const int n = list(all);
  const char* forced = std::getenv("FASTRNN_ISA");
  for (int i = 0; i < n; ++i) {
    if (forced && *forced) {
      if (std::strcmp(forced, all[i].name) != 0) continue;
      if (!all[i].here) throw std::runtime_error("FASTRNN_ISA=" + std::string(forced) + ": this CPU cannot run it");
    }
    if (all[i].here) return all[i];
  }
  throw std::runtime_error("FASTRNN_ISA=" + std::string(forced) + ": there is no such instruction set");
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

// A child of fork has one thread, and OpenMP's team does not come along: work alone there.
bool forked = false;
[[maybe_unused]] const int watch_fork = [] {
#if defined(__linux__)
  return pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
  return 0;
#endif
}();

// Rounds `bytes` up to whole pages.
void* allocate(size_t& bytes) {
  constexpr size_t huge = size_t(2) << 20;
  const size_t alignment = bytes >= huge ? huge : 64;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == huge) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: fewer page faults
#endif
  return memory;
}

struct Workspace {
  void* memory = nullptr;
  size_t bytes = 0;
  int small = 0;  // calls in a row that needed a fraction of it
  ~Workspace() { std::free(memory); }
};

}  // namespace

const Kernels& kernels() { return chosen().kernels(); }
const char* isa() { return chosen().name; }

int isas(const char** names) {
  Isa all[4];
  const int n = list(all);
  int here = 0;
  for (int i = 0; i < n; ++i)
    if (all[i].here) names[here++] = all[i].name;
  return here;
}

int processors() {
#if defined(__linux__)
  static const int n = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1 << 30;
  }();
  return n;
#else
  return 1 << 30;
#endif
}

void* workspace(size_t bytes) {
  static thread_local Workspace w;
  constexpr size_t much = size_t(16) << 20;
  w.small = w.bytes > much && bytes < w.bytes / 8 ? w.small + 1 : 0;
  if (w.bytes < bytes || w.small > 100) {
    w.small = 0;
    std::free(w.memory);
    w.memory = nullptr;
    w.bytes = 0;
    w.memory = allocate(bytes);
    w.bytes = bytes;
  }
  return w.memory;
}

Pages::Pages(size_t bytes) : memory_(bytes ? allocate(bytes) : nullptr) {}
Pages::~Pages() { std::free(memory_); }

bool run_parallel(int threads, void (*body)(int, void*), void* arg) {
#if defined(_OPENMP)
  if (forked || omp_in_parallel()) return false;
  bool whole = false;
#pragma omp parallel num_threads(threads)
  {
    // All or none: the bodies wait for each other.
    if (omp_get_num_threads() == threads) {
      const int id = omp_get_thread_num();
      if (id == 0) whole = true;
      body(id, arg);
    }
  }
  return whole;
#else
  (void)threads, (void)body, (void)arg;
  return false;
#endif
}

}  // namespace fastrnn
