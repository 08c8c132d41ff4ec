// Backward: the gradients that a thread carries in registers from step to step, and the cell's step back itself.
#pragma once

#include "cuda/layout.h"
#include "cuda/number.cuh"
#include "cuda/rows.cuh"

namespace fastrnn {

// One thread's elements: the gradients of their states, c after the step, and where the cell has values of a unit those
// and their gradients.
template <class F, class Cell>
struct CarriedBack {
  float ds[Cell::kStates][F::kElements], c[F::kElements];
  bool cut[F::kElements];
  float params[Cell::kParams + 1][F::kElements], dparams[Cell::kParams + 1][F::kElements];

  FASTRNN_DEVICE void load(const F& f, const Rows& rows) {
    using T = typename F::T;
#pragma unroll
    for (int i = 0; i < F::kElements; ++i) {
      const int x = threadIdx.x + i * blockDim.x, b = x % F::kRows, u = x / F::kRows;
      const bool there = u < f.units && f.unit0 + u < f.H && f.row0 + b < f.p.n.B;
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) {
        const auto* from = static_cast<const T*>(k ? f.p.dcn : f.p.dhn);
        ds[k][i] = there && from ? ptx::to_float(from[f.state_offset(b, f.unit0 + u)]) : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < Cell::kParams; ++k) {
        const auto* from = static_cast<const T*>(f.p.params) + (size_t(f.stream) * Cell::kParams + k) * f.H;
        params[k][i] = there ? ptx::to_float(from[f.unit0 + u]) : 0.0f;
        dparams[k][i] = 0.0f;
      }
      cut[i] = false, c[i] = 0.0f;
      if (F::kTwo && there && rows.last > 0)
        c[i] = f.p.c[(f.steps() + f.step_row(rows.time(rows.last - 1), b)) * f.H + f.unit0 + u];
    }
  }

  // The gradient of h after the n-th step from the end, without that of y.
  FASTRNN_DEVICE float gradient_of_h(const F& f, int n, int i, int b, int u) const {
    float dh = ds[0][i];
    if (n > 0 && !cut[i])
#pragma unroll 1
      for (int from = 0; from < f.at.shares; ++from) dh += *f.share(F::kGrid ? 0 : n & 1, from, u, b);
    return dh;
  }

  FASTRNN_DEVICE void step(const F& f, const Rows& rows, int n) {
    using T = typename F::T;
    using Math = typename F::Math;
    constexpr int G = Cell::kGates, X = Cell::kSplit, V = Cell::kTape, K = Cell::kParams;
    const int t = rows.time(rows.last - 1 - n);
    const char* stage = f.memory + f.at.stages + n % kBackwardStages * f.at.stage;
    T* gates = f.gates + (n & 1) * F::kRows * f.at.gate_row;
#pragma unroll
    for (int i = 0; i < F::kElements; ++i) {
      const int x = threadIdx.x + i * blockDim.x, b = x % F::kRows, u = x / F::kRows;
      if (u >= f.units) continue;
      const auto value = [&](int v) {
        return ptx::to_float(reinterpret_cast<const T*>(stage)[(v * F::kRows + b) * f.at.row + u]);
      };
      const float dh = gradient_of_h(f, n, i, b, u);
      const bool live = t < f.lengths[b], cleared = rows.cut(t, b);
      Math tape[V ? V : 1], before[Cell::kStates], after[Cell::kStates], d[G + X], back[Cell::kStates];
      Math own_params[K + 1], d_params[K + 1];
#pragma unroll
      for (int v = 0; v < V; ++v) tape[v] = Math(value(v));
      before[0] = Math(Cell::kReadsPreviousH && !cleared ? value(V + 1) : 0.0f);
      after[0] = Math(Cell::kReadsH ? value(V + 1) : 0.0f);
      back[0] = Math(dh + value(V));
      if constexpr (F::kTwo) {
        const float c_before = reinterpret_cast<const float*>(stage + f.at.c_at)[b * f.at.c_row + u];
        before[1] = Math(cleared ? 0.0f : c_before), after[1] = Math(c[i]);
        c[i] = c_before;
        const bool there = f.p.dc && f.unit0 + u < f.H && f.row0 + b < f.p.n.B;
        const size_t offset = (f.steps() + f.step_row(t, b)) * f.H + f.unit0 + u;
        back[1] = Math(ds[1][i] + (there ? ptx::to_float(static_cast<const T*>(f.p.dc)[offset]) : 0.0f));
      }
#pragma unroll
      for (int k = 0; k < K; ++k) own_params[k] = Math(params[k][i]);
      Cell::step_backward(tape, before, after, own_params, back, d, d_params);
#pragma unroll
      for (int k = 0; k < K; ++k) dparams[k][i] += live ? plain(d_params[k]) : 0.0f;
      ds[0][i] = cleared ? 0.0f : live ? plain(back[0]) : dh;
      if constexpr (F::kTwo) ds[1][i] = cleared ? 0.0f : live ? plain(back[1]) : ds[1][i];
      cut[i] = cleared;
#pragma unroll
      for (int k = 0; k < G + X; ++k)
        gates[b * f.at.gate_row + f.column(k) + u] = F::operand(live ? plain(d[k]) : 0.0f);
    }
  }

  FASTRNN_DEVICE void store(const F& f, int n) const {
#pragma unroll
    for (int i = 0; i < F::kElements; ++i) {
      // Opaque: or the offsets of the initial states, which are the same, would hold registers all along.
      const int x = ptx::opaque(threadIdx.x) + i * blockDim.x, b = x % F::kRows, u = x / F::kRows;
      if (u >= f.units || f.unit0 + u >= f.H || f.row0 + b >= f.p.n.B) continue;
      const size_t to = f.state_offset(b, f.unit0 + u);
      if (f.p.dh0)
        static_cast<typename F::T*>(f.p.dh0)[to] = ptx::from_float<typename F::T>(gradient_of_h(f, n, i, b, u));
      if (F::kTwo && f.p.dc0)
        static_cast<typename F::T*>(f.p.dc0)[to] = ptx::from_float<typename F::T>(ds[Cell::kStates - 1][i]);
      if (Cell::kParams && f.p.dparams)
#pragma unroll
        for (int k = 0; k < Cell::kParams; ++k)
          f.p.dparams[((size_t(f.stream) * Cell::kParams + k) * f.p.n.B + f.row0 + b) * f.H + f.unit0 + u] =
              dparams[k][i];
    }
  }
};

}  // namespace fastrnn
