#include "emulator/machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace simt {

Machine* machine = nullptr;

const Dim& thread_index() { return self()->index; }
const Dim& block_index() { return self()->block->index; }
const Dim& block_size() { return machine->block; }
const Dim& grid_size() { return machine->shape.grid; }
unsigned cluster_rank() { return self()->block->rank; }
char* shared_memory() { return self()->block->shared.get(); }
void count_product() { ++machine->stats.products; }

std::string name_of(const Thread* t) {
  return "block (" + std::to_string(t->block->index.x) + "," + std::to_string(t->block->index.y) + ") rank " +
         std::to_string(t->block->rank) + " warp " + std::to_string(t->index.x / 32) + " lane " +
         std::to_string(t->lane);
}

void fail(const std::string& message) {
  Thread* t = machine->current;
  if (!t) throw std::runtime_error(message);
  if (machine->error.empty()) machine->error = message + " [" + name_of(t) + "]";
  t->state = Thread::kWaiting;
  t->fiber.pause(true);
  std::abort();  // unreachable: a machine with an error resumes nobody
}

void make_ready(Thread* t) {
  t->state = Thread::kReady;
  t->warp->ready.push_back(t);
  if (!t->warp->listed) t->warp->listed = true, machine->ready.push_back(t->warp);
}

void make_ready(std::vector<Thread*>& all) {
  for (Thread* t : all) make_ready(t);
  all.clear();
}

void wait_at(const char* what, Site at) {
  Thread* t = self();
  t->what = what, t->site = at, t->state = Thread::kWaiting;
  t->fiber.pause(false);
}

void point(const char* what, Site at) {
  if (machine->random.below(machine->options.seed & 2 ? 8 : 64)) return;
  Thread* t = self();
  t->what = what, t->site = at;
  make_ready(t);
  t->fiber.pause(false);
}

void record(const void* address, int bytes, bool write, const char* what, Site at) {
  if (!machine->races) return;
  const auto name = [](size_t id) {
    for (const auto& c : machine->live)
      for (const auto& b : c->blocks)
        for (const auto& t : b->threads)
          if (t->id == id) return name_of(t.get());
    return std::string("a thread that has ended");
  };
  const std::string conflict = machine->races->access(self()->id, address, bytes, write, what, at, name);
  if (!conflict.empty()) fail(conflict);
}

static void thread_main() {
  Thread* t = self();
  t->fiber.entered();
  machine->kernel();
  if (!t->open.empty()) fail("a thread ends with cp.async that were not committed");
  for (const auto& group : t->groups)
    if (!group.empty()) fail("a thread ends with cp.async in flight");
  t->state = Thread::kDone;
  --t->block->live, --t->block->cluster->live;
  t->fiber.pause(true);
  std::abort();
}

Machine::Machine(const Launch& s, const std::function<void()>& k, const Options& o)
    : shape(s), block{unsigned(s.threads), 1, 1}, options(o), kernel(k), random(o.seed) {
  if (s.cluster < 1 || s.grid.x % s.cluster) throw std::runtime_error("grid.x is no multiple of the cluster size");
  if (s.threads < 32 || s.threads % 32 || s.threads > 1024)
    throw std::runtime_error("threads: expected a multiple of 32 up to 1024");
  if (o.races) races = std::make_unique<Races>(size_t(s.grid.x) * s.grid.y * s.threads);
}

void Machine::add_cluster(unsigned number) {
  const unsigned per_row = shape.grid.x / shape.cluster;
  auto cluster = std::make_unique<Cluster>();
  for (int r = 0; r < shape.cluster; ++r) {
    auto b = std::make_unique<Block>();
    b->index = {number % per_row * shape.cluster + r, number / per_row, 0};
    b->rank = unsigned(r), b->cluster = cluster.get();
    void* memory = nullptr;
    const size_t bytes = std::max<size_t>(shape.shared, 16);
    if (posix_memalign(&memory, 1024, bytes)) throw std::bad_alloc();
    std::memset(memory, 0xFF, bytes);  // NaN, and far from any index
    b->shared.reset(static_cast<char*>(memory));
    if (races) races->forget(memory, bytes);  // it may have held what belonged to blocks that have ended
    for (int i = 0; i < shape.threads; ++i) {
      if (i % 32 == 0) {
        b->warps.push_back(std::make_unique<Warp>());
        b->warps.back()->block = b.get(), b->warps.back()->priority = random.next();
      }
      Warp* w = b->warps.back().get();
      const size_t id = (size_t(number) * shape.cluster + r) * shape.threads + i;
      b->threads.push_back(std::make_unique<Thread>(thread_main, b.get(), w, i, id));
      w->lanes[i % 32] = b->threads.back().get();
      make_ready(b->threads.back().get());
    }
    b->live = shape.threads;
    cluster->blocks.push_back(std::move(b));
  }
  cluster->live = cluster->total = shape.threads * shape.cluster;
  live.push_back(std::move(cluster));
}

// By seed: any thread at random, or warps, or whole blocks, by a priority that changes now and then.
Thread* Machine::pick() {
  size_t k = 0;
  const uint64_t policy = options.seed % 3;
  if (policy == 0) {
    k = random.below(ready.size());
  } else {
    if (random.below(4096) == 0)
      for (auto& c : live)
        for (auto& b : c->blocks) {
          const uint32_t of_block = random.next();
          for (auto& w : b->warps) w->priority = policy == 1 ? random.next() : of_block;
        }
    for (size_t i = 1; i < ready.size(); ++i)
      if (ready[i]->priority > ready[k]->priority) k = i;
  }
  Warp* w = ready[k];
  const size_t j = random.below(w->ready.size());
  Thread* t = w->ready[j];
  w->ready[j] = w->ready.back(), w->ready.pop_back();
  if (w->ready.empty()) w->listed = false, ready[k] = ready.back(), ready.pop_back();
  return t;
}

void Machine::resume(Thread* t) {
  current = t;
  ++stats.switches;
  t->fiber.resume();
  current = nullptr;
  if (!error.empty()) throw std::runtime_error(error);
  if (t->fiber.overflowed()) throw std::runtime_error("the stack of a fiber has overflowed [" + name_of(t) + "]");
  if (t->state != Thread::kDone) return;
  if (t->block->live == 0)
    for (const Delivery& d : deliveries)
      if (d.target == t->block)
        throw std::runtime_error("a block ends with a store to it in flight: " + describe("st.async", d.site));
  if (t->block->cluster->live == 0) retire(t->block->cluster);
}

void Machine::retire(Cluster* c) {
  if (races)
    for (const auto& b : c->blocks) races->forget(b->shared.get(), shape.shared);
  live.erase(std::find_if(live.begin(), live.end(), [c](const auto& x) { return x.get() == c; }));
}

// One step of what happens by itself: a store that arrives, a flag that is seen. Late stores come with odd seeds.
bool Machine::deliver_or_poll() {
  const bool idle = ready.empty();
  if (!deliveries.empty() && (idle || (!(options.seed & 1) && random.below(8) == 0))) {
    const size_t k = random.below(deliveries.size());
    const Delivery d = std::move(deliveries[k]);
    deliveries[k] = std::move(deliveries.back()), deliveries.pop_back();
    d.deliver();
    return true;
  }
  if (!polling.empty() && flags_changed && (idle || random.below(64) == 0)) {
    flags_changed = false;
    std::vector<Thread*> still;
    for (Thread* t : polling) {
      if (*t->flag >= t->wanted)
        make_ready(t);
      else
        still.push_back(t);
    }
    polling = std::move(still);
    return true;
  }
  if (!polling.empty() && idle) {  // nobody will ever set these flags: the bounds of the waits pass
    for (Thread* t : polling) t->expired = true;
    make_ready(polling);
    return true;
  }
  return false;
}

std::string Machine::deadlock() const {
  std::map<std::string, std::pair<int, const Thread*>> places;
  for (const auto& c : live)
    for (const auto& b : c->blocks)
      for (const auto& t : b->threads) {
        if (t->state == Thread::kDone) continue;
        auto& place = places[describe(t->what, t->site)];
        if (!place.first++) place.second = t.get();
      }
  std::string report = "deadlock: all threads wait\n";
  for (const auto& p : places)
    report += "  " + std::to_string(p.second.first) + " in " + p.first + ", first " + name_of(p.second.second) + "\n";
  for (const auto& c : live)
    for (const auto& b : c->blocks)
      for (const auto& m : b->mbarriers) {
        if (m.second.waiting.empty()) continue;
        report += "  mbarrier at " + std::to_string(m.first) + " of block " + std::to_string(b->index.x) + ": phase " +
                  std::to_string(m.second.phase) + ", " + std::to_string(m.second.pending) + " arrivals and " +
                  std::to_string(m.second.bytes) + " bytes to come\n";
      }
  return report;
}

Stats Machine::run() {
  std::vector<unsigned> order(shape.grid.x / shape.cluster * shape.grid.y);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  size_t next = 0;
  while (next < order.size() || !live.empty()) {
    while (next < order.size() && int(live.size()) < options.resident) add_cluster(order[next++]);
    if (deliver_or_poll()) continue;
    if (ready.empty()) throw std::runtime_error(deadlock());
    resume(pick());
  }
  if (!deliveries.empty()) throw std::runtime_error("the grid ends with st.async in flight");
  return stats;
}

Stats launch(const Launch& shape, const std::function<void()>& kernel, const Options& options) {
  Machine m(shape, kernel, options);
  machine = &m;
  struct Leave {
    ~Leave() { machine = nullptr; }
  } leave;
  return m.run();
}

}  // namespace simt
