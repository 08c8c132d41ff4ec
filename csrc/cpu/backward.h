// The time loop, backward, for any cell: from the gradients of y and of the final states to the
// gradients at the gates, of the initial states and, a chunk of steps at a time while its gates are
// in the cache, of x and of the weights. With 16-bit storage those of the weights are left to the
// caller, who finds all gates in `dgates`.
#pragma once

#include "cpu/share.h"
#include "cpu/weights.h"

namespace fastrnn::FASTRNN_ISA {

template <class C, class T, class E, class O = T>
class Backward : public Driver<Backward<C, T, E, O>, C, BackwardArgs, T, E, O> {
  using Base = Driver<Backward, C, BackwardArgs, T, E, O>;
  friend Base;
  using Base::a_, Base::plan_, Base::gu_, Base::gp_, Base::batch_, Base::unpacked_, Base::projected_, Base::zero_,
      Base::rows_;
  using Base::elements, Base::lanes, Base::meet, Base::steps, Base::time;
  using Base::W, Base::G, Base::D, Base::NS, Base::U, Base::K, Base::KV, Base::kNarrow, Base::kRolls;
  using typename Base::V;
  using Sums = WeightGradients<C, T, E>;

  Backward(const BackwardArgs& a, Plan p)
      : Base(a, p),
        gi_((a.I + W - 1) / W),
        sums_(!kNarrow && a.gradients && a.T * a.B > kFewRows),
        most_(a.B > kBlockRows         ? a.B
              : a.T * a.B < kBlockRows ? a.T * a.B
                                       : kBlockRows),
        own_(a.batch_sizes ? most_ : most_ / (a.B ? a.B : 1) * batch_),
        passing_(!unpacked_ && p.batch == 1 && a.T * a.B <= most_),
        late_(a.dx && !unpacked_ && !passing_ && goes_late(a)),
        in_dx_(late_ && !a.dgates),
        pitch_(in_dx_ ? a.I : D * a.H),
        before_(unpacked_ && !kNarrow ? Packing::None : Packing::Before),
        w_ih_(G * a.H, a.I, passing_ ? Packing::Passing : before_),
        w_hh_(G * a.H, a.P, before_),
        w_hr_(a.P, a.H, before_) {}

  void carve(Carver& m) {
    Base::carve_common(m);
    const int64_t S = a_.S, B = a_.B;
    w_hh_.carve(m, S, late_ ? gi_ : 0);
    w_hr_.carve(m, projected_ ? S : 0);
    if (late_) {
      w_ih_.follow(w_hh_);
    } else {
      w_ih_.carve(m, a_.dx ? S : 0);
    }
    dh_ = m.template take<T>(S * B * a_.P);
    dc_ = m.template take<T>(NS > 1 ? S * B * a_.H : 0);
    if constexpr (C::kParams) dp_ = m.template take<T>(S * B * K * gu_ * W);
    c0_ = m.template take<T>(kNarrow && NS > 1 ? S * B * a_.H : 0);
    total_ = m.template take<O>(projected_ ? S * B * a_.P : 0);
    dm_ = m.template take<T>(projected_ ? S * B * a_.H : 0);
    dgates_ = m.template take<O>(kRolls ? 2 * S * B * D * a_.H : 0);
    ring_ = m.template take<E>(a_.dgates || in_dx_ ? 0 : plan_.streams * most_ * D * a_.H);
    privates_ = m.template take<Private>(plan_.threads());
    for (int i = 0; i < plan_.threads(); ++i) {
      Private p;
      p.rows = m.template take<const O*>(batch_);
      p.previous = m.template take<int64_t>(batch_);
      p.chunk = m.template take<int64_t>(a_.dx ? own_ : 0);
      p.gates_of = m.template take<const O*>(a_.dx ? own_ : 0);
      p.w = m.template take<O>(a_.dx ? w_ih_.passing() : 0);
      Carver within = m;  // the gates that dx overwrites are copied after the loop, the scratch is of use within it
      p.gates = m.template take<O>((kRolls && a_.dx) || in_dx_ ? own_ * G * a_.H : 0);
      if (sums_) p.scratch.carve(in_dx_ ? within : m);
      m.reach(within);
      if (privates_) privates_[i] = p;
    }
  }

  struct Private {
    const O** rows;      // per batch row: the left side of a product
    int64_t* previous;   // per batch row: see Steps::previous
    int64_t* chunk;      // our rows of a chunk
    const O** gates_of;  // those rows' gates
    O* gates;            // copies of those rows' gates, where operands are copies or where dx takes their place
    O* w;                // granules of W_ih packed in passing, where there is a single chunk
    Scratch<T> scratch;  // for the gradients of weights
  };

  // ---- before the loop ---------------------------------------------------------------------------

  void prepare(const Share& t) {
    const StreamWeights& w = a_.weights[t.s];
    for (int64_t u = t.outs.begin + t.part; u < t.outs.end; u += plan_.batch) w_hh_.pack(w.w_hh, t.s, u);
    if (a_.dx && !late_) prepare_input(t);
    for (int64_t u = t.units.begin + t.part; projected_ && u < t.units.end; u += plan_.batch)
      w_hr_.pack(w.w_hr, t.s, u);
    for (int64_t u = t.units.begin + t.part; K && u < t.units.end; u += plan_.batch) Base::prepare_params(t, u);
    for (int64_t j = 0; j < t.count(a_.B); ++j) {
      const int64_t at = t.s * a_.B + t.row(j);
      begin(elements(a_.dhn), at * a_.P, a_.P, t.outs, dh_);
      if (NS > 1) begin(elements(a_.dcn), at * a_.H, a_.H, t.units, dc_);
      for (int k = 0; k < K; ++k)
        for (int64_t u = t.units.begin; u < t.units.end; ++u) store(dparam(t.s, t.row(j), k, u), V(T(0)));
      if (kNarrow && NS > 1 && a_.c0) convert(elements(a_.c0) + at * a_.H, a_.H, c0_ + at * a_.H);
    }
  }

  void prepare_input(const Share& t) {
    const Range ins = inputs(t);
    for (int64_t u = ins.begin + t.part; u < ins.end; u += plan_.batch) w_ih_.pack(a_.weights[t.s].w_ih, t.s, u);
  }

  // The gradient of a final state, which is where the loop starts from.
  void begin(const E* from, int64_t at, int64_t n, Range granules, T* to) {
    for (int64_t u = granules.begin; u < granules.end; ++u)
      store(to + at + u * W, from ? load(from + at + u * W, lanes(u, n)) : V(T(0)), lanes(u, n));
  }

  // ---- the loop ----------------------------------------------------------------------------------

  void stream(int id, const Share& t) {
    const Private& p = privates_[id];
    const Steps at = steps();
    for (int64_t k = a_.T - 1; k >= 0;) {
      const Chunk c(a_, at, t.s, k, most_);
      const int64_t first = k;
      for (; k > c.end; --k) step(t, p, at, c, k, t.count(at.active(time(t.s, k))));
      if (a_.dx && !late_) input_gradient(t, p, at, c, first);
      if (sums_ && Sums::wanted(a_.gradients[t.s])) weight_gradients(id, t, at, c);
      if (ring_) join(t);  // the next chunk takes its place
    }
    if (a_.gradients && !sums_) sums_of(id).few_rows(at, t.s, gates_at(t.s, 0, 0), t.units, t.outs);
    if (late_) late_input_gradient(t, p, at);
    if constexpr (C::kParams) add_params(t);
    finish(t);
  }

  // The gradients of the cell's own values: every batch row has its sum over the steps, and those are added up in the
  // order of the rows, so that the result does not depend on the number of threads.
  void add_params(const Share& t) {
    join(t);
    for (int64_t u = t.units.begin + t.part; u < t.units.end; u += plan_.batch)
      for (int k = 0; k < K; ++k) {
        V sum(T(0));
        for (int64_t b = 0; b < a_.B; ++b) sum = sum + load(dparam(t.s, b, k, u));
        store(static_cast<E*>(a_.dparams[t.s * K + k]) + u * W, sum, lanes(u, a_.H));
      }
  }
  T* dparam(int64_t s, int64_t b, int k, int64_t u) const { return dp_ + (((s * a_.B + b) * K + k) * gu_ + u) * W; }

  // Is dx made after the loop, from the gates of all steps? W_ih then takes the place of W_hh. Worth it where the
  // weight is large, and the gates, which are read from memory again, are not much larger. They lie in `dgates`, or
  // each row's in its row of dx.
  static bool goes_late(const BackwardArgs& a) {
    const int64_t weight = G * a.H * a.I, gates = a.T * a.B * D * a.H;
    return weight * int64_t(sizeof(T)) >= kLateBytes && gates <= 2 * weight &&
           (a.dgates || (!kNarrow && D * a.H <= a.I));
  }

  void late_input_gradient(const Share& t, const Private& p, const Steps& at) {
    join(t);  // W_hh has been read, and the gates for the gradients of the weights
    prepare_input(t);
    join(t);
    for (int64_t k = a_.T - 1; k >= 0;) {
      const Chunk c(a_, at, t.s, k, most_);
      input_gradient(t, p, at, c, k);
      k = c.end;
    }
  }

  void step(const Share& t, const Private& p, const Steps& at, const Chunk& c, int64_t k, int64_t n) {
    const int64_t when = time(t.s, k);
    for (int64_t j = 0; j < n; ++j) p.previous[j] = at.previous(when, t.row(j), a_.reverse[t.s]);
    if constexpr (Base::kProjects)
      if (projected_) through_projection(t, at, when, n, p.rows);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = at.row(when, t.row(j));
      E* gates = gates_at(t.s, c.row, row);
      O* rolled = kRolls ? dgates_ + ((k % 2 * a_.S + t.s) * a_.B + t.row(j)) * D * a_.H : nullptr;
      p.rows[j] = kRolls ? rolled : reinterpret_cast<O*>(gates);
      for (int64_t u = t.units.begin; u < t.units.end; ++u) cell(t, row, p.previous[j], j, u, gates, rolled);
    }
    meet(t);
    w_hh_.blocks(t.outs, k % 2 == 0, [&](int N, int64_t u) {
      for_tiles(n, tile_rows(N), [&](int M, int64_t j) { recurrent_tile(M, N, t, p, j, u); });
    });
  }

  // Where the gradients at a row's gates lie: in `dgates` or dx, or those of one chunk, from row `first` on, in a ring.
  E* gates_at(int64_t s, int64_t first, int64_t row) const {
    if (in_dx_) return static_cast<E*>(a_.dx) + (s * rows_ + row) * pitch_;
    if (a_.dgates) return static_cast<E*>(a_.dgates) + (s * rows_ + row) * pitch_;
    return ring_ + (s % plan_.streams * most_ + row - first) * pitch_;
  }

  // Among all threads of a stream.
  void join(const Share& t) {
    this->barriers_[1 + plan_.threads() + t.s % plan_.streams].wait(plan_.batch * plan_.units);
  }

  // dW += dgates^T x and dgates^T h_{t-1} over a chunk. Every thread has its columns of all batch rows, so
  // that the order of the sums does not depend on their number.
  void weight_gradients(int id, const Share& t, const Steps& at, const Chunk& c) {
    if constexpr (!kNarrow) {
      join(t);
      sums_of(id).add(at, t.s, c, gates_at(t.s, c.row, c.row), pitch_, privates_[id].scratch);
    }
  }

  Sums sums_of(int id) const {
    const int parts = plan_.batch * plan_.units;
    return Sums(a_, id % parts, parts);
  }

  Range inputs(const Share& t) const { return share(gi_, t.unit_part, plan_.units); }

  // dx = dx-gates W_ih, for our rows of a chunk, whose first step is k.
  void input_gradient(const Share& t, const Private& p, const Steps& at, const Chunk& c, int64_t k) {
    const int64_t K = G * a_.H;
    int64_t n = 0;
    for (; k > c.end; --k) {
      const int64_t when = time(t.s, k), active = t.count(at.active(when));
      for (int64_t j = 0; j < active; ++j) p.chunk[n++] = at.row(when, t.row(j));
    }
    for (int64_t j = 0; j < n; ++j) {
      const E* gates = gates_at(t.s, c.row, p.chunk[j]);
      const bool copied = kRolls || in_dx_;
      p.gates_of[j] = copied ? p.gates + j * K : reinterpret_cast<const O*>(gates);
      if constexpr (kRolls || !kNarrow)
        if (copied) convert(gates, K, p.gates + j * K);
    }
    if (in_dx_) meet(t);
    w_ih_.multiply(a_.weights[t.s].w_ih, t.s, inputs(t), p.gates_of, n, zero_, p.w,
                   [&](int64_t j) { return static_cast<E*>(a_.dx) + (t.s * rows_ + p.chunk[j]) * a_.I; });
  }

  // With a projection, h = W_hr m: completes dh and gives dm.
  void through_projection(const Share& t, const Steps& at, int64_t when, int64_t n, const O** rows) {
    const int64_t P = a_.P;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = at.row(when, t.row(j)), own = (t.s * a_.B + t.row(j)) * P;
      rows[j] = total_ + own;
      for (int64_t u = t.outs.begin; u < t.outs.end; ++u) {
        const int l = lanes(u, P);
        const V dh = load(dh_ + own + u * W, l) + load(elements(a_.dy) + (row * a_.S + t.s) * P + u * W, l);
        store(total_ + own + u * W, dh, l);
        store(static_cast<E*>(a_.dh) + (t.s * rows_ + row) * P + u * W, dh, l);
        store(dh_ + own + u * W, V(T(0)), l);
      }
    }
    meet(t);
    w_hr_.multiply(a_.weights[t.s].w_hr, t.s, t.units, rows, n, zero_, nullptr,
                   [&](int64_t j) { return dm_ + (t.s * a_.B + t.row(j)) * a_.H; });
  }

  // The cell's derivative on one vector of units, to the gates of its row and to their copy as operands.
  FASTRNN_INLINE void cell(const Share& t, int64_t row, int64_t previous, int64_t j, int64_t u, E* gates, O* rolled) {
    const int64_t H = a_.H, unit = u * W, b = t.s * a_.B + t.row(j), y = t.s * a_.P + unit;
    const int n = lanes(u, H);
    V s[NS], s1[NS], ds[NS], tape[C::kTape ? C::kTape : 1], d[D], own[KV], dp[KV];
    if constexpr (C::kParams) Base::load_params(t, u, own);
    const T* saved = static_cast<const T*>(a_.tape) + (t.s * rows_ + row) * C::kTape * H + unit;
    for (int v = 0; v < C::kTape; ++v) tape[v] = load(saved + v * H, n);
    ds[0] = projected_ ? load(dm_ + b * H + unit, n)
                       : load(dh_ + b * H + unit, n) + load(elements(a_.dy) + row * a_.S * a_.P + y, n);
    if (C::kReadsH) s1[0] = load(elements(a_.y) + row * a_.S * a_.P + y, n);
    if (C::kReadsPreviousH) {
      s[0] = V(T(0));
      if (previous >= 0) s[0] = load(elements(a_.y) + previous * a_.S * a_.P + y, n);
      if (previous == -1 && a_.h0) s[0] = load(elements(a_.h0) + b * a_.P + unit, n);
    }
    if (NS > 1) {
      const T* c = static_cast<const T*>(a_.c) + t.s * rows_ * H + unit;
      const T* c0 = kNarrow ? c0_ : static_cast<const T*>(a_.c0);
      ds[NS - 1] = load(dc_ + b * H + unit, n);
      if (a_.dc) ds[NS - 1] = ds[NS - 1] + load(elements(a_.dc) + (t.s * rows_ + row) * H + unit, n);
      s1[NS - 1] = load(c + row * H, n);
      s[NS - 1] = previous >= 0             ? load(c + previous * H, n)
                  : previous == -1 && a_.c0 ? load(c0 + b * H + unit, n)
                                            : V(T(0));
    }
    C::step_backward(tape, s, s1, K ? own : nullptr, ds, d, K ? dp : nullptr);
    for (int k = 0; k < K; ++k) {
      T* sum = dparam(t.s, t.row(j), k, u);
      store(sum, load(sum) + dp[k]);
    }
    for (int g = 0; g < D; ++g) {
      store(gates + g * H + unit, d[g], n);
      if (kRolls) store(rolled + g * H + unit, d[g], n);
    }
    if (!projected_) store(dh_ + b * H + unit, ds[0], n);
    if (NS > 1) store(dc_ + b * H + unit, previous == -2 ? V(T(0)) : ds[NS - 1], n);
  }

  // dh_{t-1} += dr W_hh: the plain gates in one run, then the split ones from their own columns.
  void recurrent_tile(int M, int N, const Share& t, const Private& p, int64_t j, int64_t u) {
    const int64_t H = a_.H, P = a_.P;
    alignas(64) T acc[kMaxTile * W];
    Tile<T, O> tile = w_hh_.tile(N, t.s, u, a_.weights[t.s].w_hh, zero_);
    tile.out = acc, tile.a = p.rows + j, tile.K = U * H;
    for (int v = 0; v < N; ++v) {  // lanes beyond a ragged end hold what follows, and are not stored
      tile.start[v] = dh_at(t, j, u + v);
      tile.start_pitch[v] = t.stride * P;
    }
    product(M, N, tile);
    for (int g = U; g < G; ++g) {
      for (int v = 0; v < N; ++v) {
        tile.w[v] += tile.K * tile.stride;
        tile.start[v] = acc + v * W, tile.start_pitch[v] = N * W;
      }
      tile.offset = (g + G - U) * H, tile.K = H;
      product(M, N, tile);
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v)
        store(dh_at(t, j + m, u + v), p.previous[j + m] == -2 ? V(T(0)) : load(acc + (m * N + v) * W), lanes(u + v, P));
  }

  T* dh_at(const Share& t, int64_t j, int64_t u) { return dh_ + (t.s * a_.B + t.row(j)) * a_.P + u * W; }

  void finish(const Share& t) {
    for (int64_t j = 0; j < t.count(a_.B); ++j) {
      const int64_t at = t.s * a_.B + t.row(j);
      if (a_.dh0) end(dh_, at * a_.P, a_.P, t.outs, static_cast<E*>(a_.dh0));
      if (NS > 1 && a_.dc0) end(dc_, at * a_.H, a_.H, t.units, static_cast<E*>(a_.dc0));
    }
  }

  void end(const T* from, int64_t at, int64_t n, Range granules, E* to) {
    for (int64_t u = granules.begin; u < granules.end; ++u)
      store(to + at + u * W, load(from + at + u * W, lanes(u, n)), lanes(u, n));
  }

  int64_t gi_;    // granules of I
  bool sums_;     // do we make the gradients of the weights, a chunk at a time?
  int64_t most_;  // most rows of a chunk
  int64_t own_;   // and of them most rows of one thread
  bool passing_, late_, in_dx_;
  int64_t pitch_;  // from row to row of the gates
  Packing before_;
  ColumnWeights<T, E, O> w_ih_, w_hh_, w_hr_;
  O *total_, *dgates_;
  E* ring_;
  T *dh_, *dc_, *c0_, *dm_, *dp_ = nullptr;
  Private* privates_;
};

}  // namespace fastrnn::FASTRNN_ISA
