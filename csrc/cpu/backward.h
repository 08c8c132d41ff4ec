// The time loop, backward, for any cell: from the gradients of y and of the final states to the
// gradients at the gates, of the initial states and, a chunk of steps at a time while its gates are
// in the cache, of x. Those of the weights are matrix products over all time steps, which the
// caller makes afterwards.
#pragma once

#include "cpu/outer.h"
#include "cpu/share.h"

namespace fastrnn::FASTRNN_ISA {

template <class C, class T, class E, class O = T>
class Backward : public Driver<Backward<C, T, E, O>, C, BackwardArgs, T, E, O> {
  using Base = Driver<Backward, C, BackwardArgs, T, E, O>;
  friend Base;
  using Base::a_, Base::plan_, Base::gu_, Base::gp_, Base::batch_, Base::unpacked_, Base::projected_, Base::zero_,
      Base::rows_;
  using Base::elements, Base::lanes, Base::meet, Base::steps, Base::time;
  using Base::W, Base::G, Base::D, Base::NS, Base::U, Base::kNarrow, Base::kRolls;
  using typename Base::V;
  static constexpr int kBlock = 4;  // granules per register tile

  Backward(const BackwardArgs& a, Plan p) : Base(a, p), gi_((a.I + W - 1) / W) { unpacked_ = unpacked_ && !kNarrow; }

  void carve(Carver& m) {
    Base::carve_common(m);
    const int64_t S = a_.S, B = a_.B;
    // Unpacked weights are read in whole vectors, so a ragged last granule is packed all the same.
    w_hh_ = m.template take<O>(S * packed(gp_, a_.P) * G * a_.H * W);
    w_hr_ = m.template take<O>(projected_ ? S * packed(gu_, a_.H) * a_.P * W : 0);
    w_ih_ = m.template take<O>(a_.dx ? S * packed(gi_, a_.I) * G * a_.H * W : 0);
    dh_ = m.template take<T>(S * B * a_.P);
    dc_ = m.template take<T>(NS > 1 ? S * B * a_.H : 0);
    c0_ = m.template take<T>(kNarrow && NS > 1 ? S * B * a_.H : 0);
    total_ = m.template take<O>(projected_ ? S * B * a_.P : 0);
    dm_ = m.template take<T>(projected_ ? S * B * a_.H : 0);
    dgates_ = m.template take<O>(kRolls ? 2 * S * B * D * a_.H : 0);
    privates_ = m.template take<Private>(plan_.threads());
    for (int i = 0; i < plan_.threads(); ++i) {
      Private p;
      p.rows = m.template take<const O*>(batch_);
      p.previous = m.template take<int64_t>(batch_);
      p.chunk = m.template take<int64_t>(this->chunk_);
      p.gates_of = m.template take<const O*>(a_.dx ? this->chunk_ : 0);
      p.gates = m.template take<O>(kRolls && a_.dx ? this->chunk_ * G * a_.H : 0);
      if (privates_) privates_[i] = p;
    }
  }

  struct Private {
    const O** rows;      // per batch row: the left side of a product
    int64_t* previous;   // per batch row: see Steps::previous
    int64_t* chunk;      // rows whose gates are ready and whose dx is not
    const O** gates_of;  // those rows' gates
    O* gates;            // copies of those rows' gates, where operands are copies
  };

  // ---- before the loop ---------------------------------------------------------------------------

  bool in_place(int64_t u, int64_t n) const { return unpacked_ && lanes(u, n) == W; }
  int64_t packed(int64_t granules, int64_t n) const { return !unpacked_ ? granules : n % W ? 1 : 0; }
  O* packed_hh(int64_t s, int64_t u) { return w_hh_ + (s * packed(gp_, a_.P) + (unpacked_ ? 0 : u)) * G * a_.H * W; }
  O* packed_ih(int64_t s, int64_t u) { return w_ih_ + (s * packed(gi_, a_.I) + (unpacked_ ? 0 : u)) * G * a_.H * W; }
  O* packed_hr(int64_t s, int64_t u) { return w_hr_ + (s * packed(gu_, a_.H) + (unpacked_ ? 0 : u)) * a_.P * W; }

  void prepare(const Share& t) {
    const StreamWeights& w = a_.weights[t.s];
    for (int64_t u = t.outs.begin + t.part; u < t.outs.end; u += plan_.batch)
      if (!in_place(u, a_.P)) pack_columns(elements(w.w_hh) + u * W, a_.P, G * a_.H, lanes(u, a_.P), packed_hh(t.s, u));
    const Range ins = inputs(t);
    for (int64_t u = ins.begin + t.part; a_.dx && u < ins.end; u += plan_.batch)
      if (!in_place(u, a_.I)) pack_columns(elements(w.w_ih) + u * W, a_.I, G * a_.H, lanes(u, a_.I), packed_ih(t.s, u));
    for (int64_t u = t.units.begin + t.part; projected_ && u < t.units.end; u += plan_.batch)
      if (!in_place(u, a_.H)) pack_columns(elements(w.w_hr) + u * W, a_.H, a_.P, lanes(u, a_.H), packed_hr(t.s, u));
    for (int64_t j = 0; j < t.count(a_.B); ++j) {
      const int64_t at = t.s * a_.B + t.row(j);
      begin(elements(a_.dhn), at * a_.P, a_.P, t.outs, dh_);
      if (NS > 1) begin(elements(a_.dcn), at * a_.H, a_.H, t.units, dc_);
      if (kNarrow && NS > 1 && a_.c0) convert(elements(a_.c0) + at * a_.H, a_.H, c0_ + at * a_.H);
    }
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
    int64_t pending = 0;
    for (int64_t k = a_.T - 1; k >= 0; --k) {
      const int64_t when = time(t.s, k), n = t.count(at.active(when));
      for (int64_t j = 0; j < n; ++j) p.previous[j] = at.previous(when, t.row(j), a_.reverse[t.s]);
      if constexpr (Base::kProjects)
        if (projected_) through_projection(t, at, when, n, p.rows);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t row = at.row(when, t.row(j));
        p.rows[j] = gates_target(t, row, j, k);
        for (int64_t u = t.units.begin; u < t.units.end; ++u) cell(t, row, p.previous[j], j, k, u);
      }
      if (a_.dx && pending + n > this->chunk_) {  // before the barrier: the others' share of this step is not there
        input_gradient(t, p, pending);
        pending = 0;
      }
      for (int64_t j = 0; a_.dx && j < n; ++j) p.chunk[pending++] = at.row(when, t.row(j));
      meet(t);
      blocks(t.outs, a_.P, k % 2 == 0, [&](int N, int64_t u) {
        for_tiles(n, tile_rows(N), [&](int M, int64_t j) { recurrent_tile(M, N, t, p, j, u); });
      });
    }
    if (a_.dx) input_gradient(t, p, pending);
    if (a_.gradients) weight_gradients(t, at);
    finish(t);
  }

  // dW = sum over the rows of dgates^T x and dgates^T h_{t-1}, for the gates of our own units.
  void weight_gradients(const Share& t, const Steps& at) {
    const E *x[kFewRows], *h[kFewRows], *gates[kFewRows];
    int rows = 0;
    for (int64_t when = 0; when < a_.T; ++when)
      for (int64_t b = 0; b < at.active(when); ++b, ++rows) {
        const int64_t row = at.row(when, b), before = at.previous(when, b, a_.reverse[t.s]);
        x[rows] = elements(a_.x) + row * a_.I;
        gates[rows] = elements(a_.dgates) + (t.s * rows_ + row) * D * a_.H;
        h[rows] = before >= 0             ? elements(a_.y) + (before * a_.S + t.s) * a_.P
                  : before == -1 && a_.h0 ? elements(a_.h0) + (t.s * a_.B + b) * a_.P
                                          : nullptr;
      }
    const StreamGradients& d = a_.gradients[t.s];
    const int64_t end = t.units.end * W < a_.H ? t.units.end * W : a_.H;
    for (int g = 0; g < G; ++g)
      for (int64_t unit = t.units.begin * W; unit < end; ++unit) {
        const int64_t at_x = g * a_.H + unit, at_h = (g < U ? g : g + G - U) * a_.H + unit;
        weight_row<T>(rows, gates, at_x, x, a_.I, at_x, d.w_ih, d.b_ih);
        weight_row<T>(rows, gates, at_h, h, a_.P, at_x, d.w_hh, d.b_hh);
      }
  }

  Range inputs(const Share& t) const { return share(gi_, t.unit_part, plan_.units); }

  // dx = dx-gates W_ih, for the rows of a chunk.
  void input_gradient(const Share& t, const Private& p, int64_t n) {
    const int64_t I = a_.I, K = G * a_.H;
    const E* gates = static_cast<const E*>(a_.dgates) + t.s * rows_ * D * a_.H;
    if constexpr (kRolls)
      for (int64_t j = 0; j < n; ++j) convert(gates + p.chunk[j] * D * a_.H, K, p.gates + j * K);
    for (int64_t j = 0; j < n; ++j)
      p.gates_of[j] = kRolls ? p.gates + j * K : reinterpret_cast<const O*>(gates + p.chunk[j] * D * a_.H);
    blocks(inputs(t), I, true, [&](int N, int64_t u) {
      Tile<T, O> tile = columns(N, u, I, a_.weights[t.s].w_ih, packed_ih(t.s, u), K);
      for_tiles(n, tile_rows(N), [&](int M, int64_t j) {
        alignas(64) T acc[kMaxTile * W];
        tile.out = acc, tile.a = p.gates_of + j;
        product(M, N, tile);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < N; ++v)
            store(static_cast<E*>(a_.dx) + (t.s * rows_ + p.chunk[j + m]) * I + (u + v) * W,
                  load(acc + (m * N + v) * W), lanes(u + v, I));
      });
    });
  }

  // A tile that multiplies with N granules of columns of w (K, n), from u on, and starts from zero.
  Tile<T, O> columns(int N, int64_t u, int64_t n, const void* w, const O* packed, int64_t K) {
    Tile<T, O> tile;
    const bool here = in_place(u, n);
    for (int v = 0; v < N; ++v) {
      tile.w[v] = here ? static_cast<const O*>(w) + (u + v) * W : packed + v * K * W;
      tile.start[v] = zero_, tile.start_pitch[v] = 0;
    }
    tile.out_pitch = N * W, tile.offset = 0, tile.stride = here ? n : W, tile.K = K;
    return tile;
  }

  // f(granules, first) over a range; weights read in place and a packed rest do not mix.
  template <class F>
  FASTRNN_INLINE void blocks(Range r, int64_t n, bool forwards, F&& f) {
    const int64_t whole = unpacked_ && r.size() && r.end * W > n ? r.end - 1 : r.end;
    for_blocks({r.begin, whole}, kBlock, forwards, f);
    if (whole < r.end) for_blocks({whole, r.end}, 1, true, f);
  }

  O* gates_target(const Share& t, int64_t row, int64_t j, int64_t k) {
    if (kRolls) return dgates_ + ((k % 2 * a_.S + t.s) * a_.B + t.row(j)) * D * a_.H;
    return static_cast<O*>(a_.dgates) + (t.s * rows_ + row) * D * a_.H;
  }

  // With a projection, h = W_hr m: completes dh and gives dm.
  void through_projection(const Share& t, const Steps& at, int64_t when, int64_t n, const O** rows) {
    const int64_t H = a_.H, P = a_.P;
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
    blocks(t.units, H, true, [&](int N, int64_t u) {
      Tile<T, O> tile = columns(N, u, H, a_.weights[t.s].w_hr, packed_hr(t.s, u), P);
      for_tiles(n, tile_rows(N), [&](int M, int64_t j) {
        alignas(64) T acc[kMaxTile * W];
        tile.out = acc, tile.a = rows + j;
        product(M, N, tile);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < N; ++v)
            store(dm_ + (t.s * a_.B + t.row(j + m)) * H + (u + v) * W, load(acc + (m * N + v) * W), lanes(u + v, H));
      });
    });
  }

  // The cell's derivative on one vector of units.
  FASTRNN_INLINE void cell(const Share& t, int64_t row, int64_t previous, int64_t j, int64_t k, int64_t u) {
    const int64_t H = a_.H, unit = u * W, b = t.s * a_.B + t.row(j), y = t.s * a_.P + unit;
    const int n = lanes(u, H);
    V s[NS], s1[NS], ds[NS], tape[C::kTape ? C::kTape : 1], d[D];
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
    C::step_backward(tape, s, s1, ds, d);
    for (int g = 0; g < D; ++g) {
      store(static_cast<E*>(a_.dgates) + ((t.s * rows_ + row) * D + g) * H + unit, d[g], n);
      if (kRolls) store(gates_target(t, row, j, k) + g * H + unit, d[g], n);
    }
    if (!projected_) store(dh_ + b * H + unit, ds[0], n);
    if (NS > 1) store(dc_ + b * H + unit, previous == -2 ? V(T(0)) : ds[NS - 1], n);
  }

  // dh_{t-1} += dr W_hh: the plain gates in one run, then the split ones from their own columns.
  void recurrent_tile(int M, int N, const Share& t, const Private& p, int64_t j, int64_t u) {
    const int64_t H = a_.H, P = a_.P;
    alignas(64) T acc[kMaxTile * W];
    Tile<T, O> tile = columns(N, u, P, a_.weights[t.s].w_hh, packed_hh(t.s, u), G * H);
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
      end(dh_, at * a_.P, a_.P, t.outs, static_cast<E*>(a_.dh0));
      if (NS > 1) end(dc_, at * a_.H, a_.H, t.units, static_cast<E*>(a_.dc0));
    }
  }

  void end(const T* from, int64_t at, int64_t n, Range granules, E* to) {
    for (int64_t u = granules.begin; u < granules.end; ++u)
      store(to + at + u * W, load(from + at + u * W, lanes(u, n)), lanes(u, n));
  }

  int64_t gi_;  // granules of I
  O *w_ih_, *w_hh_, *w_hr_, *total_, *dgates_;
  T *dh_, *dc_, *c0_, *dm_;
  Private* privates_;
};

}  // namespace fastrnn::FASTRNN_ISA
