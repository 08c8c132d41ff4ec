// Forward: the states that a thread carries in registers from step to step, and the cell's step itself.
#pragma once

#include "cuda/layout.h"
#include "cuda/number.cuh"
#include "cuda/rows.cuh"

namespace fastrnn {

// One thread's states, and what it does to them at a step.
template <class F, class Cell>
struct Carried {
  float s[Cell::kStates][F::kRows / 8][F::kOwn];
  float bias[Cell::kSplit + 1][F::kOwn], params[Cell::kParams + 1][F::kOwn];

  FASTRNN_DEVICE void load(const F& f, const Rows& rows) {
    using T = typename F::T;
#pragma unroll
    for (int e = 0; e < F::kOwn; ++e) {
      const int u = f.unit0 + f.unit(e);
#pragma unroll
      for (int k = 0; k < Cell::kSplit; ++k)
        bias[k][e] =
            f.p.bias && f.owner() && u < f.H
                ? ptx::to_float(static_cast<const T*>(f.p.bias)[(size_t(f.stream) * Cell::kSplit + k) * f.H + u])
                : 0.0f;
#pragma unroll
      for (int k = 0; k < Cell::kParams; ++k)
        params[k][e] =
            f.owner() && u < f.H
                ? ptx::to_float(static_cast<const T*>(f.p.params)[(size_t(f.stream) * Cell::kParams + k) * f.H + u])
                : 0.0f;
#pragma unroll
      for (int n = 0; n < F::kRows / 8; ++n)
#pragma unroll
        for (int k = 0; k < Cell::kStates; ++k) {
          const int b = f.row(n, e);
          const auto* from = static_cast<const T*>(k ? f.p.c0 : f.p.h0);
          const bool there = from && f.owner() && u < f.H && f.row0 + b < f.p.n.B && !rows.cut(rows.time(0), b);
          s[k][n][e] = there ? ptx::to_float(from[f.state_offset(b, u)]) : 0.0f;
        }
    }
  }

  // Step n at time t: from the sums `own` and the input in `stage`, where the tape takes its place.
  template <class Own>
  FASTRNN_DEVICE void step(const F& f, const Rows& rows, int n_step, const Own& own, typename F::T* stage,
                           typename F::T* h, int h_row) {
    using T = typename F::T;
    using Math = typename F::Math;
    constexpr int G = Cell::kGates, X = Cell::kSplit, V = Cell::kTape, K = Cell::kParams;
    const int t = rows.time(n_step);
#pragma unroll
    for (int n = 0; n < F::kRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < F::kOwn; ++e) {
        const int u = f.unit(e), b = f.row(n, e);
        Math a[G + X], before[Cell::kStates], after[Cell::kStates], tape[V ? V : 1], own_params[K + 1];
#pragma unroll
        for (int g = 0; g < G; ++g) {
          const float x = ptx::to_float(stage[(g * F::kRows + b) * f.at.row + u]), r = f.take(own[g][n][e], g, n, e);
          if (g < G - X)
            a[g] = Math(x + r);
          else
            a[g] = Math(x), a[g + X] = Math(r + bias[g - (G - X)][e]);
        }
#pragma unroll
        for (int k = 0; k < Cell::kStates; ++k) before[k] = Math(s[k][n][e]);
#pragma unroll
        for (int k = 0; k < K; ++k) own_params[k] = Math(params[k][e]);
        Cell::step(a, before, own_params, after, tape);
        const bool live = t < f.lengths[b];
#pragma unroll
        for (int k = 0; k < Cell::kStates; ++k) s[k][n][e] = live ? plain(after[k]) : s[k][n][e];
        f.out[b * f.at.row + u] = ptx::from_float<T>(live ? s[0][n][e] : 0.0f);
#pragma unroll
        for (int v = 0; v < V; ++v) stage[(v * F::kRows + b) * f.at.row + u] = ptx::from_float<T>(plain(tape[v]));
        if (Cell::kStates > 1 && f.p.c && f.row0 + b < f.p.n.B && f.unit0 + u < f.H)
          f.p.c[(f.steps() + f.step_row(t, b)) * f.H + f.unit0 + u] = live ? s[Cell::kStates - 1][n][e] : 0.0f;
        if (n_step + 1 < rows.last && rows.cut(rows.time(n_step + 1), b))
#pragma unroll
          for (int k = 0; k < Cell::kStates; ++k) s[k][n][e] = 0.0f;
        // Units of the padding are kept from the others: their zero weights make NaN of an infinite h.
        h[b * h_row + u] = f.unit0 + u < f.p.n.hidden ? F::operand(s[0][n][e]) : T{};
      }
  }

  FASTRNN_DEVICE void store(const F& f) const {
    if (!f.owner()) return;
#pragma unroll
    for (int n = 0; n < F::kRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < F::kOwn; ++e) {
        const int u = f.unit0 + f.unit(e), b = f.row(n, e);
        if (u < f.H && f.row0 + b < f.p.n.B)
#pragma unroll
          for (int k = 0; k < Cell::kStates; ++k)
            static_cast<typename F::T*>(k ? f.p.cn : f.p.hn)[f.state_offset(b, u)] =
                ptx::from_float<typename F::T>(s[k][n][e]);
      }
  }
};

}  // namespace fastrnn
