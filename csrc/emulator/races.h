// A detector of races: two accesses to the same bytes, one of them a write, that no barrier orders.
//
// Each thread has a vector clock; operations that synchronise release into and acquire from others.
// Each pair of bytes that was touched remembers its last write and the reads since.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/simt.h"

namespace simt {

using Clock = std::vector<uint32_t>;

class Races {
 public:
  explicit Races(size_t threads) : clocks_(threads) {
    for (size_t i = 0; i < threads; ++i) clocks_[i].assign(threads, 0), clocks_[i][i] = 1;
  }

  void release(size_t thread, Clock& into);
  void acquire(size_t thread, const Clock& from);
  // An access, and what it conflicts with: empty if nothing. `name` describes a thread.
  std::string access(size_t thread, const void* address, int bytes, bool write, const char* what, Site at,
                     const std::function<std::string(size_t)>& name);
  void forget(const void* address, size_t bytes);  // memory that is given back

 private:
  struct Access {
    uint32_t thread = 0, time = 0;  // time 0: none
    const char* what = "";
    Site at;
  };
  struct Cell {
    Access write;
    std::vector<Access> reads;
  };
  bool ordered(const Access& before, size_t thread) const { return before.time <= clocks_[thread][before.thread]; }

  std::vector<Clock> clocks_;
  std::unordered_map<uintptr_t, Cell> cells_;
};

std::string describe(const char* what, const Site& at);

}  // namespace simt
