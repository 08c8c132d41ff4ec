// The rows of a batch tile in time: which step comes next, where a row ends, where its state is cleared.
#pragma once

#include "cuda/args.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace fastrnn {

struct Rows {
  const int64_t* of_lengths;
  const uint8_t* of_resets;
  int T, B, first;  // first: row of the batch that this tile begins with
  bool reverse;
  int last;  // steps of the longest row

  FASTRNN_DEVICE Rows(const Sizes& n, const int64_t* lengths, const uint8_t* resets, int first_row, int rows,
                      int stream)
      : of_lengths(lengths), of_resets(resets), T(n.T), B(n.B), first(first_row), reverse(n.reverse >> stream & 1) {
    last = 0;
#pragma unroll 1
    for (int b = 0; b < rows; ++b) last = larger(last, length(b));
  }

  // Of row b of the tile: 0 where the batch has no such row.
  FASTRNN_DEVICE int length(int b) const {
    if (first + b >= B) return 0;
    if (!of_lengths) return T;
    const int64_t n = of_lengths[first + b];
    return n < 0 ? 0 : n > T ? T : int(n);
  }

  // Time of the n-th step of the forward pass.
  FASTRNN_DEVICE int time(int n) const { return reverse ? last - 1 - n : n; }

  // Is there a reset on the boundary that a stream crosses to enter step t?
  FASTRNN_DEVICE bool cut(int t, int b) const {
    const int boundary = reverse ? t + 1 : t;
    return of_resets && boundary < T && first + b < B && of_resets[size_t(boundary) * B + first + b];
  }
};

}  // namespace fastrnn
