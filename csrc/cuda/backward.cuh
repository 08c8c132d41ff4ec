// Backward: the way back of forward.cuh, from the last step to the first.
//
// Block k keeps the transpose of the rows of W_hh that belong to its units: row tiles are units of h_{t-1}, all of
// them, k runs over its own gates. From the gradients of its gates it makes its share of the gradient of all of
// h_{t-1}, and sends each peer that peer's units; these are added up in a fixed order. The gradients of the weights are
// products over all steps, made by the caller from what stands in `dgates`.
//
// K1's buffers change by turns as in the forward: a block sends at step n only after all shares of step n - 1 have
// arrived, and each block sends after all its threads have read those of step n - 2.
//
// A warp of K2 has more row tiles than accumulators, and goes through them in rounds; the first round's weights may be
// in registers.
#pragma once

#include "cuda/backward_state.cuh"
#include "cuda/backward_tile.cuh"
#include "cuda/tiles.cuh"

namespace fastrnn {

// All steps of the tile. `meeting`: a Group for K2.
template <class Cell, class Number, class F, class Weights, class Meet>
FASTRNN_DEVICE void run_steps_back(const F& f, const Weights& weights, Meet& meeting) {
  using T = typename F::T;
  const BackwardArgs& p = f.p;
  const Rows rows(p.n, p.lengths, p.resets, f.row0, F::kRows, f.stream);
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * F::kRows * f.at.gate_row; i += blockDim.x) f.gates[i] = T{};
#pragma unroll 1
  for (int b = threadIdx.x; b < F::kRows; b += blockDim.x) f.lengths[b] = rows.length(b);
  CarriedBack<F, Cell> state;
  state.load(f, rows);
  const unsigned bytes = p.n.blocks * p.n.units * F::kRows * 4;  // of all shares
  if constexpr (F::kCluster) open_cluster(f.barrier, bytes);
  ptx::sync_block();
#pragma unroll
  for (int n = 0; n < kBackwardStages - 1; ++n) f.fetch(rows, n);
  ptx::copy_wait<kBackwardStages - 2>();
  ptx::sync_block();

#pragma unroll 1
  for (int n = 0; n <= rows.last; ++n) {
    const int now = n & 1;
    if (n > 0) {
      if constexpr (F::kCluster) {
        ptx::mbarrier_wait(f.barrier + 8 * now, (n - 1) >> 1 & 1);
        if (threadIdx.x == 0 && n + 2 <= rows.last) ptx::mbarrier_expect(f.barrier + 8 * now, bytes);
      } else if constexpr (F::kGrid) {
        meeting.wait();
        f.collect(meeting);
      } else {
        ptx::sync_block();
      }
    }
    if (n == rows.last) break;
    state.step(f, rows, n);
    ptx::copy_wait<kBackwardStages - 3>();  // that of step n + 1 has come
    ptx::sync_block();
    f.fetch(rows, n + kBackwardStages - 1);
    const T* gates = f.gates + now * F::kRows * f.at.gate_row;
    f.share_out(weights, gates, now ^ 1, meeting);
    f.store(rows.time(rows.last - 1 - n), gates);
  }
  ptx::copy_wait<0>();
  state.store(f, rows.last);
#pragma unroll 1
  for (int t = rows.last; t < p.n.T; ++t) f.store(t, nullptr);
  if constexpr (F::kCluster) close_cluster();
}

template <class Cell, class Number, int kRowTiles, int kTiles, int kBatch, int kExchange>
__global__ void __launch_bounds__(kThreads, 1) backward(const BackwardArgs p) {
  using F = Backward<Cell, Number, kRowTiles, kTiles, kBatch, kExchange>;
  if constexpr (kExchange != kInCluster || ptx::kHasClusters)
    each_tile<F, Stationary<Number, kRowTiles, kTiles>>(
        p, [](const F& f, const auto& weights, auto& meeting) { run_steps_back<Cell, Number>(f, weights, meeting); });
}

}  // namespace fastrnn
