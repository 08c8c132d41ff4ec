// K2: the blocks of a group meet in global memory. A step's values lie in one of two buffers by turns, in the L2 cache;
// each block has a flag that only it sets, to the number of its exchanges. Flags are zero when a launch begins.
//
// A buffer is written again after one exchange: a block writes for exchange e + 2 when it has seen that all have
// arrived at e + 1, and they arrive there after they have read what belongs to e.
//
// A wait has a bound. Where it was in vain, the block says so, waits for nobody any more, takes what it would have read
// for NaN, and sends NaN: it may write where a peer that is late still reads.
#pragma once

#include "cuda/args.h"
#include "cuda/ptx.cuh"

namespace fastrnn {

struct Group {
  const Meeting& m;
  const int blocks, rank, number;
  uint64_t* const flags;  // of this group's blocks
  uint64_t epoch = 0;     // exchanges that are over
  bool failed = false;    // has a wait of this block been in vain?

  FASTRNN_DEVICE Group(const Meeting& meeting, int group_blocks)
      : m(meeting),
        blocks(group_blocks),
        rank(int(blockIdx.x) % group_blocks),
        number(int(blockIdx.x) / group_blocks),
        flags(meeting.flags + number * group_blocks) {}

  // The buffer of the exchange that is over last, or of the next one.
  FASTRNN_DEVICE char* values(bool next, size_t bytes) const {
    return static_cast<char*>(m.values) + (size_t(number) * 2 + ((epoch + next) & 1)) * bytes;
  }

  // What sums begin with.
  FASTRNN_DEVICE float spoilt() const { return failed ? ptx::float_of(~0u) : 0.0f; }

  // This block has written its values for the next exchange.
  FASTRNN_DEVICE void arrive() const {
    ptx::sync_block();
    if (threadIdx.x == 0) {
      ptx::fence();
      ptx::flag_set(flags + rank, epoch + 1);
    }
  }

  // Until all blocks have arrived; a barrier of the block, too, at which its threads agree whether it was in vain.
  FASTRNN_DEVICE void wait() {
    ++epoch;
    bool late = false;
    if (!failed)
#pragma unroll 1
      for (int i = threadIdx.x; i < blocks; i += blockDim.x)
        if (!ptx::flag_wait(flags + i, epoch)) late = true;
    if (ptx::sync_block_or(late)) {
      failed = true;
      if (threadIdx.x == 0) ptx::raise(m.error);
    }
  }
};

// In the place of a group, for blocks that need none.
struct NoGroup {};

}  // namespace fastrnn
