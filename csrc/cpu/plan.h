// How a call is cut over threads, and the barrier between them. Nothing here depends on a cell.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "cpu/engine.h"
#include "cpu/vec.h"

namespace fastrnn::FASTRNN_ISA {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range share(int64_t n, int part, int parts) { return {n * part / parts, n * (part + 1) / parts}; }

// Threads form a grid: streams x batch parts x unit parts. Streams never meet; batch parts neither;
// unit parts exchange h at every step, across a barrier.
struct Plan {
  int streams, batch, units;
  int threads() const { return streams * batch * units; }
};

// Per-step multiply-adds below which a barrier costs more than a second thread gains.
constexpr int64_t kBarrierWork = 16384;
// Multiply-adds below which waking a second thread does.
constexpr int64_t kThreadWork = 131072;
// Rows per thread from which a register tile is full enough, and recurrent weights that stay in a
// core's second-level cache.
constexpr int64_t kFullRows = 6;
constexpr int64_t kCacheBytes = 640 << 10;

inline Plan plan(const Problem& p, int gates, int64_t element) {
  const int64_t recurrent = p.H * p.P * gates, rows = p.T * p.B;
  const int64_t work = p.S * rows * (recurrent + gates * p.H * p.I);
  int64_t n = p.threads < processors() ? p.threads : processors();  // more would wait for each other
  if (n > work / kThreadWork) n = work / kThreadWork;
  if (n < 2) return {1, 1, 1};
  int streams = 1;
  for (int64_t d = p.S; d > 1; --d)
    if (p.S % d == 0 && d <= n) {
      streams = int(d);
      break;
    }
  n /= streams;
  int64_t batch = p.B / kFullRows;
  // Units split the weights among the cores: worth a barrier where they fit in the cache only so.
  const bool cached = recurrent * element <= kCacheBytes, split_cached = recurrent * element <= kCacheBytes * n;
  if (!cached && split_cached && p.B < 32 * n) batch = 1;
  if (rows <= kFewRows) batch = 1;  // see Backward::weight_gradients
  batch = batch < 1 ? 1 : batch > n ? n : batch;
  int64_t units = n / batch;
  const int64_t granules = (p.H + Vec<float>::kWidth - 1) / Vec<float>::kWidth;
  if (units > granules) units = granules;
  if (p.B * recurrent / units < kBarrierWork) units = 1;
  return {streams, int(batch), int(units)};
}

// A barrier among `parties` threads that spins, since steps last microseconds, and yields when a
// machine has more threads than cores.
class Barrier {
  static constexpr int kSpins = 400;  // some microseconds, longer than an even share of a step is late

 public:
  void wait(int parties) {
    if (parties == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(parties)) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
      if (++spins > kSpins) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// Hands out pieces of one block of scratch memory; a null base only measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 127) / 64 * 64;  // a spare vector: the ends may be read
    return p;
  }
  size_t used() const { return used_; }
  // As far as a copy of this one, which took the same memory for something else, has come.
  void reach(const Carver& copy) { used_ = copy.used_ > used_ ? copy.used_ : used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Which rows stand at which step, and which step comes before.
class Steps {
 public:
  // `starts` has room for T + 1 entries where the batch is packed.
  Steps(const Problem& p, int64_t* starts) : p_(p), starts_(starts) {}
  static int64_t room(const Problem& p) { return p.batch_sizes ? p.T + 1 : 0; }
  void fill() {
    if (!p_.batch_sizes) return;
    starts_[0] = 0;
    for (int64_t t = 0; t < p_.T; ++t) starts_[t + 1] = starts_[t] + p_.batch_sizes[t];
  }
  int64_t active(int64_t t) const { return p_.batch_sizes ? p_.batch_sizes[t] : p_.B; }
  int64_t row(int64_t t, int64_t b) const { return (p_.batch_sizes ? starts_[t] : t * p_.B) + b; }
  int64_t rows() const { return p_.batch_sizes ? starts_[p_.T] : p_.T * p_.B; }
  // The row that hands its state to (t, b), or -1 for the initial state, or -2 for a cleared one.
  int64_t previous(int64_t t, int64_t b, bool reverse) const {
    const int64_t before = reverse ? t + 1 : t - 1;
    const bool inside = before >= 0 && before < p_.T && b < active(before);
    // The boundary of a forward step is its own row's flag, of a reverse step that of the row before.
    if (p_.resets && (!reverse || inside) && p_.resets[row(reverse ? before : t, b)]) return -2;
    return inside ? row(before, b) : -1;
  }

 private:
  const Problem& p_;
  int64_t* starts_;
};

}  // namespace fastrnn::FASTRNN_ISA
