// What a launch is given. Tensors are contiguous, of the call's type T unless it says otherwise, on 16 bytes;
// H is a multiple of 16 / sizeof(T). S streams, N = T B rows, G gates, V tape values, D = G + split gates, K vectors of
// one value a unit (Cell::kParams).
#pragma once

#include <cstdint>

namespace fastrnn {

struct Sizes {
  int T, B, H, S;
  int units, blocks, tiles, rounds;  // the plan's Slice
  uint32_t reverse;                  // bit s: stream s runs from the last step to the first
  int hidden;                        // units that are not there to round H up
};

// Where the blocks of K2 meet (group.cuh); nulls for K1.
struct Meeting {
  uint64_t* flags;  // one of each block; zeros at first
  void* values;     // of each group two buffers, of the plan's size; undefined
  int* error;       // becomes 1 where a wait was in vain
  int items;        // pairs of a stream and a batch tile that a group works on, one after another
};

struct ForwardArgs {
  Sizes n;
  const void* x;           // (S, N, x_blocks H), the first G: W_ih x + b_ih, and b_hh but for the split gates
  const void* weights;     // (S, G H, H): W_hh
  const void* bias;        // (S, split H): b_hh of the split gates, or null
  const void* h0;          // (S, B, H), or null for zeros
  const void* c0;          // likewise, for cells with a second state
  const void* params;      // (S, K, H), for cells with K > 0
  void* y;                 // (T, B, S H), zero beyond a row's length
  void* hn;                // (S, B, H)
  void* cn;                // likewise
  void* tape;              // (S, N, V H), undefined beyond a row's length; or null; may be x, if x_blocks = V
  float* c;                // (S, N, H), the second state after each step, zero beyond a row's length; or null
  const int64_t* lengths;  // (B,), or null
  const uint8_t* resets;   // (T, B), or null: a boundary between t - 1 and t; false beyond a row's length
  int x_blocks;            // G or more
  Meeting meeting;
};

struct BackwardArgs {
  Sizes n;
  const void* weights;     // (S, blocks, H, k): of W_hh^T the columns of a block's units, gate by gate, then zeros
  const void* tape;        // (S, N, V H), from the forward
  const float* c;          // (S, N, H), from the forward
  const void* y;           // (T, B, S H)
  const void* h0;          // (S, B, H), or null for zeros
  const float* c0;         // (S, B, H), or null for zeros
  const void* dy;          // (T, B, S H)
  const void* dhn;         // (S, B, H), or null for zeros
  const void* dcn;         // likewise
  const void* dc;          // (S, N, H), gradient of the second state after each step; or null
  void* dgates;            // (S, N, D H): of the input part of each gate, then of the recurrent part of split gates;
                           // may be the tape, if V = D
  void* dh0;               // (S, B, H), or null
  void* dc0;               // likewise
  const void* params;      // (S, K, H), for cells with K > 0
  float* dparams;          // (S, K, B, H): of each row, added up over its steps; or null
  const int64_t* lengths;  // as in the forward
  const uint8_t* resets;
  Meeting meeting;
};

}  // namespace fastrnn
