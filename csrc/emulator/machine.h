// The emulator's own data, for its source files only.
#pragma once

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/races.h"
#include "emulator/simt.h"

namespace simt {

struct Block;
struct Warp;
struct Cluster;

struct Random {  // xorshift64*
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 0x1234567ull) { next(), next(); }
  uint32_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return uint32_t((state * 0x2545F4914F6CDD1Dull) >> 32);
  }
  uint32_t below(size_t n) { return uint32_t((uint64_t(next()) * n) >> 32); }
};

struct Copy {  // a cp.async under way
  char* target;
  const char* source;
  int bytes;
  bool done;
  Site at;
};

struct Thread {
  enum State : uint8_t { kReady, kWaiting, kDone };
  Thread(void (*entry)(), Block* b, Warp* w, int i, size_t number)
      : fiber(entry), block(b), warp(w), lane(i % 32), id(number), index{unsigned(i), 0, 0} {}
  Fiber fiber;
  Block* block;
  Warp* warp;
  int lane;
  size_t id;  // among all of the launch
  Dim index;
  State state = kReady;
  const char* what = "start";  // where it waits
  Site site;
  const uint64_t* flag = nullptr;  // what it polls
  uint64_t wanted = 0;
  bool expired = false;
  Clock fenced;  // at its last fence
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  bool arrived = false;  // at the cluster's barrier, in phase
  uint64_t phase = 0;
};

struct Warp {
  Block* block;
  std::vector<Thread*> ready;
  Thread* lanes[32] = {};
  uint32_t priority = 0;
  bool listed = false;
  unsigned arrived = 0, mask = 0;  // lanes in the operation that is being gathered
  const char* what = "";
  Site site;
  void* arguments[32] = {};
};

struct Barrier {  // of a block
  int wanted = 0, count = 0;
  const char* what = "";
  bool said = false, result = false;  // bar.red.or: what is being gathered, and what came of the last one
  std::vector<Thread*> waiting;
  Site site;
  Clock clock;
};

struct MBarrier {
  uint32_t count = 0;
  int64_t pending = 0, bytes = 0;
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
  Clock gathering, complete;
};

struct Block {
  Dim index;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  Barrier barriers[16];
  std::map<uint32_t, MBarrier> mbarriers;
  int live = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0, arrived = 0, total = 0;
  uint64_t phase = 0;
  std::vector<Thread*> waiting;
  Clock gathering, complete;
};

struct Delivery {  // an st.async under way
  std::function<void()> deliver;
  Block* target;
  Site site;
};

struct Machine {
  Launch shape;
  Dim block;
  Options options;
  const std::function<void()>& kernel;
  Random random;
  Thread* current = nullptr;
  std::vector<std::unique_ptr<Cluster>> live;
  std::vector<Warp*> ready;  // warps with a thread that may go on
  std::vector<Delivery> deliveries;
  std::vector<Thread*> polling;
  bool flags_changed = false;
  std::string error;
  Stats stats;
  std::unique_ptr<Races> races;
  std::map<const uint64_t*, Clock> flags;

  Machine(const Launch& shape, const std::function<void()>& kernel, const Options& options);
  Stats run();

  void add_cluster(unsigned number);
  void resume(Thread* t);
  void retire(Cluster* c);
  bool deliver_or_poll();
  Thread* pick();
  std::string deadlock() const;
};

extern Machine* machine;

inline Thread* self() { return machine->current; }
void make_ready(Thread* t);
void make_ready(std::vector<Thread*>& all);
void wait_at(const char* what, Site at);
std::string name_of(const Thread* t);
void record(const void* address, int bytes, bool write, const char* what, Site at);  // for the detector of races
inline void release(Clock& into) {
  if (machine->races) machine->races->release(self()->id, into);
}
inline void acquire(const Clock& from) {
  if (machine->races) machine->races->acquire(self()->id, from);
}

}  // namespace simt
