// Barriers, warps, mbarriers and asynchronous copies, by the PTX ISA.
#include <cstring>

#include "emulator/machine.h"

namespace simt {

void collective(void* argument, unsigned mask, const char* what, Site at, void (*compute)(void**)) {
  point(what, at);
  Thread* me = self();
  Warp* w = me->warp;
  if (!(mask >> me->lane & 1)) fail(std::string(what) + ": the calling lane is not in the mask");
  if (w->arrived == 0)
    w->mask = mask, w->what = what, w->site = at;
  else if (std::strcmp(w->what, what) || w->site.line != at.line || w->mask != mask)
    fail("warp divergence: " + describe(what, at) + " while other lanes wait in " + describe(w->what, w->site));
  w->arguments[me->lane] = argument;
  w->arrived |= 1u << me->lane;
  if (w->arrived != mask) return wait_at(what, at);
  w->arrived = 0;
  compute(w->arguments);
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && i != me->lane) make_ready(w->lanes[i]);
}

void sync_warp(unsigned mask, Site at) {
  Clock* clock = nullptr;
  collective(&clock, mask, "syncwarp", at, [](void**) {
    if (!machine->races) return;
    Warp* w = self()->warp;  // all release, then all acquire
    Clock all;
    for (int i = 0; i < 32; ++i)
      if (w->mask >> i & 1) machine->races->release(w->lanes[i]->id, all);
    for (int i = 0; i < 32; ++i)
      if (w->mask >> i & 1) machine->races->acquire(w->lanes[i]->id, all);
  });
}

namespace {

bool meet(int id, int threads, bool own, const char* what, Site at) {
  point(what, at);
  if (id < 0 || id > 15 || threads <= 0 || threads % 32) fail(std::string(what) + ": no such barrier or count");
  Thread* me = self();
  Barrier& b = me->block->barriers[id];
  if (b.count == 0) {
    b.wanted = threads, b.what = what, b.site = at, b.said = false;
    b.clock.clear();
  } else if (b.wanted != threads || std::strcmp(b.what, what)) {
    fail(std::string(what) + " " + std::to_string(id) + ": " + std::to_string(threads) + " threads here, " +
         std::to_string(b.wanted) + " in " + describe(b.what, b.site));
  }
  b.said |= own;
  release(b.clock);
  b.waiting.push_back(me);
  if (++b.count < b.wanted) {
    wait_at(what, at);
    return b.result;  // of this meeting: the next one needs this thread, too
  }
  b.count = 0, b.result = b.said;
  b.waiting.pop_back();
  if (machine->races) {
    for (Thread* t : b.waiting) machine->races->acquire(t->id, b.clock);
    acquire(b.clock);
  }
  make_ready(b.waiting);
  return b.result;
}

}  // namespace

void barrier(int id, int threads, Site at) { meet(id, threads, false, "bar.sync", at); }
bool barrier_or(int id, int threads, bool own, Site at) { return meet(id, threads, own, "bar.red.or", at); }

void cluster_arrive(Site at) {
  point("barrier.cluster.arrive", at);
  Thread* me = self();
  Cluster* c = me->block->cluster;
  if (me->arrived) fail("barrier.cluster: a second arrive without wait");
  me->arrived = true, me->phase = c->phase;
  release(c->gathering);
  if (++c->arrived < c->total) return;
  c->arrived = 0;
  ++c->phase;
  c->complete.swap(c->gathering);
  c->gathering.clear();
  make_ready(c->waiting);
}

void cluster_wait(Site at) {
  Thread* me = self();
  Cluster* c = me->block->cluster;
  if (!me->arrived) fail("barrier.cluster: wait without arrive");
  me->arrived = false;
  if (c->phase == me->phase) {
    c->waiting.push_back(me);
    wait_at("barrier.cluster.wait", at);
  }
  acquire(c->complete);
}

// ---- shared memory
namespace {

constexpr uint32_t kOffset = 0xFFFFFF;
constexpr uint64_t kCookie = 0x6D62617272696572ull;

Block* owner(uint32_t address) {
  const unsigned rank = (address >> 24) - 1;
  Cluster* c = self()->block->cluster;
  if (rank >= c->blocks.size()) fail("no address of shared memory");
  return c->blocks[rank].get();
}

char* resolve(uint32_t address, int bytes, bool local) {
  Block* b = owner(address);
  const uint32_t offset = address & kOffset;
  if (local && b != self()->block) fail("the address of another block where one of the own is required");
  if (!b->live) fail("access to the shared memory of a block that has ended");
  if (offset + bytes > machine->shape.shared) fail("access beyond the end of shared memory");
  if (offset % bytes) fail("misaligned access to shared memory");
  return b->shared.get() + offset;
}

MBarrier& mbarrier_at(Block* b, uint32_t address) {
  const auto found = b->mbarriers.find(address & kOffset);
  if (found == b->mbarriers.end()) fail("an mbarrier is used before its initialisation");
  if (std::memcmp(b->shared.get() + (address & kOffset), &kCookie, 8)) fail("an mbarrier was overwritten");
  return found->second;
}

void check_phase(MBarrier& m) {
  if (m.pending < 0) fail("mbarrier: more arrivals than its count");
  if (m.bytes >= 1 << 20 || m.bytes <= -(1 << 20)) fail("mbarrier: bytes out of range");
  if (m.pending || m.bytes) return;
  ++m.phase;
  m.pending = m.count;
  m.complete.swap(m.gathering);
  m.gathering.clear();
  make_ready(m.waiting);
}

}  // namespace

uint32_t shared_address(const void* p) {
  Block* b = self()->block;
  const ptrdiff_t offset = static_cast<const char*>(p) - b->shared.get();
  if (offset < 0 || offset > ptrdiff_t(machine->shape.shared)) fail("no address of this block's shared memory");
  return (b->rank + 1) << 24 | uint32_t(offset);
}

uint32_t map_to_rank(uint32_t address, unsigned rank) {
  if (rank >= self()->block->cluster->blocks.size()) fail("mapa: no such rank");
  return (rank + 1) << 24 | (address & kOffset);
}

const char* shared_read(uint32_t address, int bytes, Site at) {
  const char* p = resolve(address, bytes, true);
  record(p, bytes, false, "ldmatrix", at);
  return p;
}

void mbarrier_init(uint32_t address, uint32_t count, Site at) {
  char* p = resolve(address, 8, true);
  record(p, 8, true, "mbarrier.init", at);
  std::memcpy(p, &kCookie, 8);
  MBarrier m;
  m.count = count, m.pending = count;
  self()->block->mbarriers[address & kOffset] = m;
}

void mbarrier_expect(uint32_t address, int64_t bytes, Site at) {
  point("mbarrier.arrive.expect_tx", at);
  resolve(address, 8, true);
  MBarrier& m = mbarrier_at(owner(address), address);
  release(m.gathering);
  m.bytes += bytes, --m.pending;
  check_phase(m);
}

void mbarrier_arrive(uint32_t address, Site at) {
  point("mbarrier.arrive", at);
  resolve(address, 8, false);
  MBarrier& m = mbarrier_at(owner(address), address);
  release(m.gathering);
  --m.pending;
  check_phase(m);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site at) {
  point("mbarrier.try_wait", at);
  resolve(address, 8, true);
  if (parity > 1) fail("mbarrier: the parity is 0 or 1");
  MBarrier& m = mbarrier_at(self()->block, address);
  while ((m.phase & 1) == parity) {
    m.waiting.push_back(self());
    wait_at("mbarrier.try_wait", at);
  }
  acquire(m.complete);
}

void store_async(uint32_t address, const void* value, int bytes, uint32_t mbarrier, Site at) {
  point("st.async", at);
  char* target = resolve(address, bytes, false);
  resolve(mbarrier, 8, false);
  Block* b = owner(address);
  if (owner(mbarrier) != b) fail("st.async: data and mbarrier lie in different blocks");
  MBarrier& m = mbarrier_at(b, mbarrier);
  record(target, bytes, true, "st.async", at);
  release(m.gathering);
  ++machine->stats.stores;
  std::vector<char> data(static_cast<const char*>(value), static_cast<const char*>(value) + bytes);
  machine->deliveries.push_back({[target, data, b, mbarrier, bytes, at] {
                                   if (!b->live) fail(describe("st.async", at) + " reaches a block that has ended");
                                   std::memcpy(target, data.data(), bytes);
                                   MBarrier& reached = mbarrier_at(b, mbarrier);
                                   reached.bytes -= bytes;
                                   check_phase(reached);
                                 },
                                 b, at});
}

// ---- cp.async: carried out when it is issued or when it is waited for, by a coin
static void carry_out(const Copy& c) {
  if (c.bytes) std::memcpy(c.target, c.source, c.bytes);
  std::memset(c.target + c.bytes, 0, 16 - c.bytes);
}

void copy_async16(uint32_t target, const void* source, int bytes, Site at) {
  point("cp.async", at);
  if (bytes < 0 || bytes > 16) fail("cp.async: more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async: misaligned source");
  Copy c{resolve(target, 16, true), static_cast<const char*>(source), bytes, false, at};
  record(c.target, 16, true, "cp.async", at);
  if (bytes) record(source, bytes, false, "cp.async", at);
  c.done = machine->random.below(2);
  if (c.done)
    carry_out(c);
  else
    std::memset(c.target, 0xFF, 16);
  self()->open.push_back(c);
}

void copy_commit() {
  self()->groups.push_back(std::move(self()->open));
  self()->open.clear();
}

void copy_wait(int pending, Site at) {
  point("cp.async.wait_group", at);
  auto& groups = self()->groups;
  for (; int(groups.size()) > pending; groups.pop_front())
    for (const Copy& c : groups.front()) {
      record(c.target, 16, true, "cp.async", c.at);  // only from here on may others, after a barrier, read it
      if (!c.done) carry_out(c);
    }
}

// ---- flags in global memory
void fence(Site at) {
  point("fence", at);
  self()->fenced.clear();
  release(self()->fenced);
}

void flag_set(uint64_t* flag, uint64_t value, Site at) {
  point("st.relaxed", at);
  machine->flags[flag] = self()->fenced;
  *flag = value;
  machine->flags_changed = true;
}

void raise(int* flag, Site at) {
  point("st.relaxed.sys", at);
  *flag = 1;
}

bool flag_wait(const uint64_t* flag, uint64_t value, Site at) {
  point("ld.acquire", at);
  if (int64_t(machine->stats.waits++) == machine->options.in_vain) return false;
  Thread* me = self();
  if (*flag < value) {
    me->flag = flag, me->wanted = value, me->expired = false;
    machine->polling.push_back(me);
    wait_at("ld.acquire", at);
    if (me->expired) return false;
  }
  acquire(machine->flags[flag]);
  return true;
}

}  // namespace simt
