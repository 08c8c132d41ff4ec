// What both directions have in common: which batch tiles a block works on, and how a cluster begins and ends with one.
#pragma once

#include "cuda/group.cuh"

namespace fastrnn {

// K1: the barriers of both buffers, each to expect `bytes`, are there before any block of the cluster sends. To be
// followed by a barrier of the block.
FASTRNN_DEVICE void open_cluster(uint32_t barrier, unsigned bytes) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init(barrier + 8, 1);
    ptx::mbarrier_fence();
    ptx::mbarrier_expect(barrier, bytes);
    ptx::mbarrier_expect(barrier + 8, bytes);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// No block ends while its peers may still send to it.
FASTRNN_DEVICE void close_cluster() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Calls `steps(tile, weights, meeting)` for each tile of this block, an F: K1 has one, K2 those of the group one after
// another, with the weights loaded once for each stream.
template <class F, class Weights, class Args, class Steps>
FASTRNN_DEVICE void each_tile(const Args& p, const Steps& steps) {
  FASTRNN_SHARED(memory);
  Weights weights;
  if constexpr (F::kGrid) {
    Group group(p.meeting, p.n.blocks);
    const int tiles = (p.n.B + F::kRows - 1) / F::kRows, first = group.number * p.meeting.items;
#pragma unroll 1
    for (int i = first; i < first + p.meeting.items && i < p.n.S * tiles; ++i) {
      const F f(p, memory, group.rank, i / tiles, i % tiles);
      ptx::sync_block();
      if (i == first || i % tiles == 0) f.load_weights(weights);
      steps(f, weights, group);
    }
  } else {
    const F f(p, memory, F::kCluster ? int(ptx::cluster_rank()) : 0, blockIdx.y, int(blockIdx.x) / p.n.blocks);
    f.load_weights(weights);
    NoGroup none;
    steps(f, weights, none);
  }
}

}  // namespace fastrnn
