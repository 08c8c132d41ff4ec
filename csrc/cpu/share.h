// What the forward and the backward loop have in common: the cut of a call into shares, row
// pointers, packing of all weights of a stream, and the start of the threads.
#pragma once

#include <new>
#include <type_traits>

#include "cpu/columns.h"

namespace fastrnn::FASTRNN_ISA {

// Rows (steps x batch) whose products with W_ih are made at once: enough to read the weights rarely,
// few enough to stay in the cache.
constexpr int64_t kChunkRows = 128;

// Packed weights of at least so many bytes, in calls of at least so many rows, lie in memory that is given back at the
// end (Forward): getting it anew then costs at most some 2 percent of the call.
constexpr int64_t kApartBytes = 3 << 20, kApartRows = 1024;

// A packed W_ih of at least so many bytes may take the place of W_hh at the end (Backward).
constexpr int64_t kLateBytes = 1 << 20;

// One thread's share of one stream.
struct Share {
  int64_t s;              // the stream
  int64_t first, stride;  // its batch rows: first, first + stride, ...
  Range units, outs;      // its granules of H and of P, a vector's width each
  int part;               // its place among the threads that share these units
  int unit_part;          // and among those that share these rows
  // How many of the first n batch rows are ours.
  int64_t count(int64_t n) const { return n > first ? (n - first + stride - 1) / stride : 0; }
  int64_t row(int64_t j) const { return first + j * stride; }
};

// Base of both loops. T is the arithmetic, E the storage and O the operand type of the products (T, or E
// where the processor multiplies it as it is). Loop is the derived class, which has carve(Carver&), prepare(Share&) and
// stream(thread, Share&), and may have apart() and place(memory).
template <class Loop, class C, class A, class T, class E, class O>
class Driver {
 public:
  using V = Vec<T>;
  static constexpr int W = V::kWidth, G = C::kGates, D = G + C::kSplit, NS = C::kStates, U = G - C::kSplit;
  static constexpr int K = C::kParams, KV = K ? K : 1;    // values of a unit, and room for them
  static constexpr bool kNarrow = !std::is_same_v<T, E>;  // storage narrower than arithmetic
  static constexpr bool kProjects = C::kProjects && std::is_same_v<O, T>;
  static constexpr bool kRolls = !std::is_same_v<O, E>;  // operands are copies of what is stored

  static void run(const A& a) {
    const Plan p = plan(a, G, sizeof(T));
    if (run(a, p)) return;
    if (!run(a, Plan{1, 1, 1})) __builtin_unreachable();  // one thread always runs
  }

 protected:
  Driver(const A& a, Plan plan)
      : a_(a),
        plan_(plan),
        gu_((a.H + W - 1) / W),
        gp_((a.P + W - 1) / W),
        batch_((a.B + plan.batch - 1) / plan.batch),
        chunk_(batch_ > kChunkRows ? batch_ : kChunkRows / (batch_ ? batch_ : 1) * batch_),
        unpacked_(a.T * a.B <= kFewRows),
        projected_(a.weights[0].w_hr != nullptr) {}

  int64_t apart() const { return 0; }  // bytes in memory of their own, for this call only
  void place(void*) {}

  void carve_common(Carver& m) {
    starts_ = m.take<int64_t>(Steps::room(a_));
    barriers_ = m.take<Barrier>(1 + plan_.threads() + plan_.streams);
    zero_ = m.take<T>((gu_ > gp_ ? gu_ : gp_) * W);
    if constexpr (C::kParams) params_ = m.take<T>(a_.S * K * gu_ * W);
  }

  // The cell's own values of a vector of units, in the arithmetic type.
  void prepare_params(const Share& t, int64_t u) {
    for (int k = 0; k < K; ++k) store(param(t, k, u), load(elements(a_.params[t.s * K + k]) + u * W, lanes(u, a_.H)));
  }
  FASTRNN_INLINE void load_params(const Share& t, int64_t u, V (&p)[KV]) const {
    for (int k = 0; k < K; ++k) p[k] = load(param(t, k, u));
  }

  Steps steps() const { return Steps(a_, starts_); }
  int64_t time(int64_t s, int64_t k) const { return a_.reverse[s] ? a_.T - 1 - k : k; }
  int lanes(int64_t granule, int64_t n) const { return int(n - granule * W < W ? n - granule * W : W); }
  static const E* elements(const void* p) { return static_cast<const E*>(p); }

  // Among the threads that share a stream and its batch rows.
  void meet(const Share& t) { barriers_[1 + (t.s % plan_.streams) * plan_.batch + t.first].wait(plan_.units); }

  const A& a_;
  Plan plan_;
  int64_t gu_, gp_;   // granules of H and of P
  int64_t batch_;     // most batch rows of a share
  int64_t chunk_;     // most rows of a chunk
  int64_t rows_ = 0;  // N
  bool unpacked_, projected_;
  int64_t* starts_ = nullptr;
  Barrier* barriers_ = nullptr;
  T *zero_ = nullptr, *params_ = nullptr;

 private:
  T* param(const Share& t, int k, int64_t u) const { return params_ + ((t.s * K + k) * gu_ + u) * W; }

  static bool run(const A& a, Plan p) {
    Loop loop(a, p);
    Carver measure(nullptr);
    loop.carve(measure);
    Carver memory(workspace(measure.used()));
    loop.carve(memory);
    const Pages apart(size_t(loop.apart()));
    if (apart.memory()) loop.place(apart.memory());
    loop.steps().fill();
    loop.rows_ = loop.steps().rows();
    for (int i = 0; i < 1 + p.threads() + p.streams; ++i) new (&loop.barriers_[i]) Barrier;
    std::memset(loop.zero_, 0, size_t(loop.gu_ > loop.gp_ ? loop.gu_ : loop.gp_) * W * sizeof(T));
    const auto body = [](int id, void* self) { static_cast<Loop*>(self)->worker(id); };
    if (p.threads() > 1) return run_parallel(p.threads(), body, &loop);
    body(0, &loop);
    return true;
  }

  Share share_of(int id) const {
    Share t;
    t.unit_part = id % plan_.units;
    t.units = share(gu_, t.unit_part, plan_.units);
    t.outs = share(gp_, t.unit_part, plan_.units);
    id /= plan_.units;
    t.first = t.part = id % plan_.batch;
    t.stride = plan_.batch;
    t.s = id / plan_.batch;
    return t;
  }

 public:
  void worker(int id) {
    Loop& loop = static_cast<Loop&>(*this);
    Share t = share_of(id);
    for (Share of = t; of.s < a_.S; of.s += plan_.streams) loop.prepare(of);
    barriers_[0].wait(plan_.threads());
    for (; t.s < a_.S; t.s += plan_.streams) loop.stream(id, t);
  }
};

}  // namespace fastrnn::FASTRNN_ISA
