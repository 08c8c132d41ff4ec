// The time loop, forward, for any cell.
//
// Each thread owns a stream's share of batch rows and of units. It goes through time in chunks: the
// input product of all steps of a chunk at once (so that W_ih is read once for many rows), then step
// by step the recurrent product, the cell on the accumulators, and one store of everything. A chunk
// is small, so its input product never leaves the cache.
#pragma once

#include "cpu/rows.h"
#include "cpu/share.h"

namespace fastrnn::FASTRNN_ISA {

template <class C, class T, class E, class O = T>
class Forward : public Driver<Forward<C, T, E, O>, C, ForwardArgs, T, E, O> {
  using Base = Driver<Forward, C, ForwardArgs, T, E, O>;
  friend Base;
  using Base::a_, Base::plan_, Base::gu_, Base::gp_, Base::batch_, Base::unpacked_, Base::projected_, Base::zero_,
      Base::rows_, Base::chunk_;
  using Base::elements, Base::lanes, Base::meet, Base::steps, Base::time;
  using Base::W, Base::G, Base::D, Base::NS, Base::U, Base::KV, Base::kNarrow, Base::kRolls;
  using typename Base::V;
  static constexpr int kBlock = G == 1 ? 4 : 1;  // granules per register tile

  // W_ih is packed in passing where each thread has a single chunk. Where it is large and the call long, it lies in
  // memory of its own, given back at the end: a backward, which needs more than a forward in all, then has room.
  Forward(const ForwardArgs& a, Plan p)
      : Base(a, p),
        before_(unpacked_ ? Packing::None : Packing::Before),
        w_ih_(a.H, a.I, p.batch == 1 && !unpacked_ && a.T * a.B <= chunk_ ? Packing::Passing : before_),
        w_hh_(a.H, a.P, before_),
        w_hr_(a.P, a.H, before_) {}

  int64_t apart() const {
    const int64_t bytes = w_ih_.elements(a_.S) * int64_t(sizeof(O));
    return bytes >= kApartBytes && a_.T * a_.B >= kApartRows ? bytes : 0;
  }
  void place(void* memory) { w_ih_.place(memory); }

  void carve(Carver& m) {
    Base::carve_common(m);
    const int64_t S = a_.S, B = a_.B;
    bias_ = m.template take<T>(S * D * gu_ * W);
    if (!apart()) w_ih_.carve(m, S);
    w_hh_.carve(m, S);
    w_hr_.carve(m, projected_ ? S : 0);
    h0_ = m.template take<O>(kRolls ? S * B * a_.P : 0);
    c0_ = m.template take<T>(kNarrow && NS > 1 ? S * B * a_.H : 0);
    h_ = m.template take<O>(kRolls ? 2 * S * B * a_.P : 0);
    c_ = m.template take<T>(NS > 1 && !a_.c ? S * B * a_.H : 0);
    m_ = m.template take<T>(projected_ && !a_.m ? S * B * a_.H : 0);
    privates_ = m.template take<Private>(plan_.threads());
    for (int i = 0; i < plan_.threads(); ++i) {
      Private p;
      p.xg = m.template take<T>(chunk_ * (gu_ / plan_.units + 1) * G * W);
      p.x = m.template take<O>(kRolls ? chunk_ * a_.I : 0);
      p.w = m.template take<O>(w_ih_.passing(kBlock));
      p.rows = m.template take<const O*>(chunk_);
      p.h = m.template take<const O*>(batch_);
      p.c = m.template take<const T*>(batch_);
      if (privates_) privates_[i] = p;
    }
  }

  struct Private {
    T* xg;           // (rows of the chunk, units, G, W): the input product
    O* x;            // (rows of the chunk, I), where operands are copies
    O* w;            // granules of W_ih packed in passing
    const O** rows;  // the rows of x
    const O** h;     // per batch row, h_{t-1} and c_{t-1} wherever they lie
    const T** c;
  };

  // ---- before the loop: packing ------------------------------------------------------------------

  void prepare(const Share& t) {
    const StreamWeights& w = a_.weights[t.s];
    const int64_t H = a_.H, P = a_.P;
    for (int64_t u = t.units.begin + t.part; u < t.units.end; u += plan_.batch) {
      prepare_bias(t, u);
      if constexpr (C::kParams) Base::prepare_params(t, u);
      w_ih_.pack(w.w_ih, t.s, u);
      w_hh_.pack(w.w_hh, t.s, u);
    }
    if (Base::kProjects && projected_)
      for (int64_t u = t.outs.begin + t.part; u < t.outs.end; u += plan_.batch) w_hr_.pack(w.w_hr, t.s, u);
    if constexpr (kNarrow) {
      for (int64_t j = 0; j < t.count(a_.B); ++j) {
        const int64_t at = t.s * a_.B + t.row(j);
        if constexpr (kRolls)
          if (a_.h0) convert(elements(a_.h0) + at * P, P, h0_ + at * P);
        if (NS > 1 && a_.c0) convert(elements(a_.c0) + at * H, H, c0_ + at * H);
      }
    }
  }

  // One bias for x + r of a plain gate, two for a split one.
  void prepare_bias(const Share& t, int64_t u) {
    const StreamWeights& w = a_.weights[t.s];
    const int n = lanes(u, a_.H);
    for (int g = 0; g < G; ++g) {
      const int64_t at = g * a_.H + u * W;
      V x(T(0)), r(T(0));
      if (w.b_ih) x = load(elements(w.b_ih) + at, n);
      if (w.b_hh) r = load(elements(w.b_hh) + at, n);
      store(bias(t.s, g, u), g < U ? x + r : x);
      if (g >= U) store(bias(t.s, g + G - U, u), r);
    }
  }

  T* bias(int64_t s, int gate, int64_t u) { return bias_ + ((s * D + gate) * gu_ + u) * W; }

  // ---- the loop ----------------------------------------------------------------------------------

  void stream(int id, const Share& t) {
    const Private p = privates_[id];
    for (int64_t j = 0; j < t.count(a_.B); ++j) {
      const int64_t at = t.s * a_.B + t.row(j);
      const O* h0 = kRolls ? h0_ : static_cast<const O*>(a_.h0);
      const T* c0 = kNarrow ? c0_ : static_cast<const T*>(a_.c0);
      p.h[j] = a_.h0 ? h0 + at * a_.P : zero_operand();
      p.c[j] = a_.c0 ? c0 + at * a_.H : zero_;
    }
    const Steps at = steps();
    for (int64_t k = 0; k < a_.T;) {
      int64_t rows = 0, end = k;
      for (; end < a_.T; ++end) {
        const int64_t n = t.count(at.active(time(t.s, end)));
        if (end > k && rows + n > chunk_) break;
        rows += n;
      }
      input_product(t, p, at, k, end);
      for (const T* xg = p.xg; k < end; ++k) {
        const int64_t n = t.count(at.active(time(t.s, k)));
        step(t, p, at, k, n, xg);
        xg += n * t.units.size() * G * W;
      }
    }
    finals(t, p);
  }

  void input_product(const Share& t, const Private& p, const Steps& at, int64_t k, int64_t end) {
    int64_t rows = 0;
    for (; k < end; ++k) {
      const int64_t when = time(t.s, k), n = t.count(at.active(when));
      for (int64_t j = 0; j < n; ++j, ++rows) {
        const E* x = elements(a_.x) + at.row(when, t.row(j)) * a_.I;
        if constexpr (kRolls) {
          convert(x, a_.I, p.x + rows * a_.I);
          p.rows[rows] = p.x + rows * a_.I;
        } else {
          p.rows[rows] = x;
        }
      }
    }
    const int64_t pitch = t.units.size() * G * W;
    const void* w = a_.weights[t.s].w_ih;
    for_blocks(t.units, kBlock, true, [&](int N, int64_t u) {
      const O* packed = w_ih_.packed(w, t.s, u, N, p.w);
      for_tiles(rows, tile_rows(N * G), [&](int M, int64_t j) {
        Tile<T, O> tile;
        tile.out = p.xg + j * pitch + (u - t.units.begin) * G * W;
        tile.out_pitch = pitch;
        tile.a = p.rows + j;
        for (int v = 0; v < N * G; ++v) tile.start[v] = bias(t.s, v % G, u + v / G), tile.start_pitch[v] = 0;
        w_ih_.add_product(M, N * G, tile, w, packed, u);
      });
    });
  }

  void step(const Share& t, const Private& p, const Steps& at, int64_t k, int64_t n, const T* xg) {
    const int64_t when = time(t.s, k);
    if (a_.resets)
      for (int64_t j = 0; j < n; ++j)
        if (at.previous(when, t.row(j), a_.reverse[t.s]) == -2) p.h[j] = zero_operand(), p.c[j] = zero_;
    for_blocks(t.units, kBlock, k % 2 == 0, [&](int N, int64_t u) {
      for_tiles(n, tile_rows(N * G), [&](int M, int64_t j) { step_tile(M, N, t, p, at, k, j, u, xg); });
    });
    if constexpr (Base::kProjects)
      if (projected_) {
        meet(t);
        project(t, p, at, k, n);
      }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = at.row(when, t.row(j));
      p.h[j] = h_target(t, row, j, k);
      if (NS > 1) p.c[j] = c_target(t, row, j);
    }
    meet(t);
  }

  // Where step k leaves h in the arithmetic type, where c and, with a projection, what it applies to.
  O* h_target(const Share& t, int64_t row, int64_t j, int64_t k) {
    if (kRolls) return h_ + ((k % 2 * a_.S + t.s) * a_.B + t.row(j)) * a_.P;
    return static_cast<O*>(a_.y) + (row * a_.S + t.s) * a_.P;
  }
  T* c_target(const Share& t, int64_t row, int64_t j) {
    if (a_.c) return static_cast<T*>(a_.c) + (t.s * rows_ + row) * a_.H;
    return c_ + (t.s * a_.B + t.row(j)) * a_.H;
  }
  T* m_target(const Share& t, int64_t row, int64_t j) {
    if (a_.m) return static_cast<T*>(a_.m) + (t.s * rows_ + row) * a_.H;
    return m_ + (t.s * a_.B + t.row(j)) * a_.H;
  }

  void step_tile(int M, int N, const Share& t, const Private& p, const Steps& at, int64_t k, int64_t j, int64_t u,
                 const T* xg) {
    alignas(64) T acc[kMaxTile * W];
    const int NV = N * G;
    const int64_t pitch = t.units.size() * G * W;
    const T* x = xg + j * pitch + (u - t.units.begin) * G * W;
    Tile<T, O> tile;
    tile.out = acc, tile.out_pitch = NV * W, tile.a = p.h + j;
    for (int b = 0, v = 0; b < N; ++b)
      for (int g = 0; g < G; ++g, ++v) {  // a split gate's r starts from its own bias, without x
        tile.start[v] = g < U ? x + v * W : bias(t.s, g + G - U, u + b);
        tile.start_pitch[v] = g < U ? pitch : 0;
      }
    const void* w = a_.weights[t.s].w_hh;
    w_hh_.add_product(M, NV, tile, w, w_hh_.packed(w, t.s, u, N, nullptr), u);
    const int64_t when = time(t.s, k);
    for (int m = 0; m < M; ++m) {
      const int64_t row = at.row(when, t.row(j + m));
      for (int b = 0; b < N; ++b) {
        V a[D];
        for (int g = 0; g < G; ++g) {
          const V sum = load(acc + (m * NV + b * G + g) * W);
          a[g] = g < U ? sum : load(x + m * pitch + (b * G + g) * W);
          if (g >= U) a[g + G - U] = sum;
        }
        finish(t, p, row, j + m, k, u + b, p.h[j + m], a);
      }
    }
  }

  // The cell on one vector of units, and the stores.
  FASTRNN_INLINE void finish(const Share& t, const Private& p, int64_t row, int64_t j, int64_t k, int64_t u, const O* h,
                             const V (&a)[D]) {
    const int64_t unit = u * W, H = a_.H;
    const int n = lanes(u, H);
    V s[NS], s1[NS], tape[C::kTape ? C::kTape : 1], own[KV];
    if constexpr (C::kParams) Base::load_params(t, u, own);
    if (C::kReadsPreviousH) s[0] = load(h + unit, n);
    if (NS > 1) s[NS - 1] = load(p.c[j] + unit, n);
    C::step(a, s, C::kParams ? own : nullptr, s1, tape);
    if (C::kTape && a_.tape) {
      T* out = static_cast<T*>(a_.tape) + (t.s * rows_ + row) * C::kTape * H + unit;
      for (int v = 0; v < C::kTape; ++v) store(out + v * H, tape[v], n);
    }
    if (NS > 1) store(c_target(t, row, j) + unit, s1[NS - 1], n);
    if (Base::kProjects && projected_) {
      store(m_target(t, row, j) + unit, s1[0], n);
    } else {
      store_h(t, row, j, k, u, s1[0], n);
    }
  }

  FASTRNN_INLINE void store_h(const Share& t, int64_t row, int64_t j, int64_t k, int64_t u, V h, int n) {
    store(static_cast<E*>(a_.y) + (row * a_.S + t.s) * a_.P + u * W, h, n);
    if (kRolls) store(h_target(t, row, j, k) + u * W, h, n);
  }

  void project(const Share& t, const Private& p, const Steps& at, int64_t k, int64_t n) {
    const int64_t when = time(t.s, k);
    const void* w = a_.weights[t.s].w_hr;
    for (int64_t j = 0; j < n; ++j) p.rows[j] = m_target(t, at.row(when, t.row(j)), j);
    for (int64_t u = t.outs.begin; u < t.outs.end; ++u) {
      for_tiles(n, tile_rows(1), [&](int M, int64_t j) {
        alignas(64) T acc[kMaxRows * W];
        Tile<T, O> tile;
        tile.out = acc, tile.out_pitch = W, tile.start[0] = zero_, tile.start_pitch[0] = 0, tile.a = p.rows + j;
        w_hr_.add_product(M, 1, tile, w, w_hr_.packed(w, t.s, u, 1, nullptr), u);
        for (int m = 0; m < M; ++m)
          store_h(t, at.row(when, t.row(j + m)), j + m, k, u, load(acc + m * W), lanes(u, a_.P));
      });
    }
  }

  void finals(const Share& t, const Private& p) {
    for (int64_t j = 0; j < t.count(a_.B); ++j) {
      const int64_t at = t.s * a_.B + t.row(j);
      for (int64_t u = t.outs.begin; u < t.outs.end; ++u) {
        const int n = lanes(u, a_.P);
        store(static_cast<E*>(a_.hn) + at * a_.P + u * W, load(p.h[j] + u * W, n), n);
      }
      if (NS == 1) continue;
      for (int64_t u = t.units.begin; u < t.units.end; ++u) {
        const int n = lanes(u, a_.H);
        store(static_cast<E*>(a_.cn) + at * a_.H + u * W, load(p.c[j] + u * W, n), n);
      }
    }
  }

  O* zero_operand() const { return reinterpret_cast<O*>(zero_); }

  Packing before_;
  RowWeights<T, E, O, G> w_ih_, w_hh_;
  RowWeights<T, E, O, 1> w_hr_;
  T *bias_, *c0_, *c_, *m_;
  O *h0_, *h_;
  Private* privates_;
};

}  // namespace fastrnn::FASTRNN_ISA
