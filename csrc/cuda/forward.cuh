// Forward: the recurrence of one tile of batch rows of one stream, all steps in one launch, the weights on the chip.
//
// C blocks work on 8 kBatch rows: a cluster or one block (K1), or a group of the grid (K2), which works on several
// tiles one after another. Block k owns `units` hidden units: its groups of kSplit warps own 16 units each, with every
// gate of them, so that one thread finds all gates of its units in its accumulators and carries their state in
// registers. The kSplit warps of a group share the sum over h and meet in shared memory; four of them at most have
// units of their own. h is kept whole in each block.
//
// K1 has two buffers of h by turns; a block sends its units of the new h to its peers. A buffer is overwritten at step
// n with what step n + 1 reads, when all have read it at step n - 1: a block sends at step n only after all of h from
// step n - 1 has arrived, and each group sends after its warps have read. K2: group.cuh.
#pragma once

#include "cuda/forward_state.cuh"
#include "cuda/forward_tile.cuh"
#include "cuda/tiles.cuh"

namespace fastrnn {

// All steps of the tile. `meeting`: a Group for K2.
template <class Cell, class F, class Weights, class Meet>
FASTRNN_DEVICE void run_steps(const F& f, const Weights& weights, Meet& meeting) {
  using T = typename F::T;
  constexpr int G = Cell::kGates, kBatch = F::kRows / 8;
  const ForwardArgs& p = f.p;
  const Rows rows(p.n, p.lengths, p.resets, f.row0, F::kRows, f.stream);
  f.load_h(rows);
  Carried<F, Cell> state;
  state.load(f, rows);
  const unsigned bytes = p.n.blocks * p.n.units * F::kRows * sizeof(T);  // of h
  if constexpr (F::kCluster) open_cluster(f.barrier, bytes);
  ptx::sync_block();
#pragma unroll
  for (int n = 0; n < kForwardStages - 1; ++n) f.fetch(rows, n);

#pragma unroll 1
  for (int n = 0; n < rows.last; ++n) {
    const int now = F::kGrid ? 0 : n & 1;
    if (n > 0) {
      if constexpr (F::kCluster) {
        ptx::mbarrier_wait(f.barrier + 8 * now, (n - 1) >> 1 & 1);
        if (threadIdx.x == 0 && n + 2 < rows.last) ptx::mbarrier_expect(f.barrier + 8 * now, bytes);
      } else if constexpr (F::kGrid) {
        meeting.wait();
        f.collect_step(meeting);
      } else {
        ptx::sync_block();
      }
    }
    float acc[G][kBatch][4] = {}, own[G][kBatch][F::kOwn];
    const T* operand = f.h + (now * F::kRows + f.lane % 8) * f.at.h_row + f.split * p.n.tiles * F::kTile;
    weights.multiply(acc, ptx::shared_address(operand) + f.lane / 8 * 16, f.at.h_row * int(sizeof(T)));
    f.give(acc, own);
    ptx::copy_wait<kForwardStages - 2>();
    f.sync_group();
    f.fetch(rows, n + kForwardStages - 1);
    T* stage = f.stages + n % kForwardStages * f.at.x_stage;
    if constexpr (F::kCluster || F::kGrid) {
      if (f.owner()) state.step(f, rows, n, own, stage, f.send, f.at.row);
    } else {
      state.step(f, rows, n, own, stage, f.h + (now ^ 1) * F::kRows * f.at.h_row + f.unit0, f.at.h_row);
    }
    f.sync_group();
    if (n + 1 < rows.last) {
      if constexpr (F::kCluster) f.send_step(now ^ 1);
      if constexpr (F::kGrid) f.post_step(meeting), meeting.arrive();
    }
    f.store_step(rows.time(n), stage);
  }
  ptx::copy_wait<0>();
  state.store(f);
  f.fill(rows);
  if constexpr (F::kCluster) close_cluster();
}

template <class Cell, class Number, int kSplit, int kTiles, int kBatch, int kExchange>
__global__ void __launch_bounds__(kThreads, 1) forward(const ForwardArgs p) {
  using F = Forward<Cell, Number, kSplit, kTiles, kBatch, kExchange>;
  if constexpr (kExchange != kInCluster || ptx::kHasClusters)
    each_tile<F, Stationary<Number, Cell::kGates, kTiles>>(
        p, [](const F& f, const auto& weights, auto& meeting) { run_steps<Cell>(f, weights, meeting); });
}

}  // namespace fastrnn
