// Forward: what a block knows of a batch tile, and how values come and go: weights, states, x, h, sums, outputs.
// forward.cuh says who does what.
#pragma once

#include "cuda/group.cuh"
#include "cuda/rows.cuh"
#include "cuda/stationary.cuh"

namespace fastrnn {

template <class Cell, class Number, int kSplit, int kTiles, int kBatch, int kExchange>
struct Forward {
  using T = typename Number::Storage;
  using Math = typename Number::Math;
  static constexpr int G = Cell::kGates, X = Cell::kSplit, V = Cell::kTape, kStates = Cell::kStates;
  static constexpr bool kCluster = kExchange == kInCluster, kGrid = kExchange == kThroughGrid;
  static constexpr int kTile = Number::kTile, kOwners = kSplit < 4 ? kSplit : 4, kOwn = 4 / kOwners, kRows = 8 * kBatch;
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kUnits / kChunk;  // elements in 16 bytes; chunks in 16 units
  static constexpr int kValues = G > V ? G : V, kGroup = 32 * kSplit;       // rows of a stage; threads of a group
  static FASTRNN_DEVICE T operand(float x) { return Number::operand(x); }

  const ForwardArgs& p;
  const ForwardLayout at;
  char* const memory;
  const int lane, group, split, in_group, groups, stream, H;
  const int unit0, row0;  // the first unit of the group, the first row of the tile
  int* const lengths;
  T *h, *stages, *out, *send;
  float* partial;
  uint32_t barrier;

  FASTRNN_DEVICE Forward(const ForwardArgs& args, char* shared, int rank, int of_stream, int tile)
      : p(args),
        at(Variant{kSplit, kTiles, 0, kBatch, kExchange}, {args.n.units, args.n.blocks, args.n.tiles}, G, kValues,
           sizeof(T), Number::kTile),
        memory(shared),
        lane(threadIdx.x % 32),
        group(threadIdx.x / kGroup),
        split(threadIdx.x % kGroup / 32),
        in_group(threadIdx.x % kGroup),
        groups(args.n.units / kUnits),
        stream(of_stream),
        H(args.n.H),
        unit0(rank * args.n.units + group * kUnits),
        row0(tile * kRows),
        lengths(reinterpret_cast<int*>(shared + at.lengths)) {
    h = reinterpret_cast<T*>(memory + at.h);
    stages = reinterpret_cast<T*>(memory + at.x) + group * kValues * kRows * at.row;
    out = reinterpret_cast<T*>(memory + at.out) + group * kRows * at.row;
    send = reinterpret_cast<T*>(memory + at.send) + group * kRows * at.row;
    partial = reinterpret_cast<float*>(memory + at.partial) + group * kOwners * (kSplit - 1) * G * kBatch * kOwn * 32;
    barrier = ptx::shared_address(memory);
  }

  // Element e of an owner's part of a 16 x 8 tile: its unit in the group, its row in the batch tile.
  FASTRNN_DEVICE bool owner() const { return kOwners == kSplit || split < kOwners; }
  FASTRNN_DEVICE int unit(int e) const { return lane / 4 + 8 * ((e + split * kOwn) >> 1); }
  FASTRNN_DEVICE int row(int n, int e) const { return n * 8 + lane % 4 * 2 + ((e + split * kOwn) & 1); }

  FASTRNN_DEVICE void sync_group() const {
    if (kSplit == 1)
      ptx::sync_warp();
    else
      ptx::sync_threads(1 + group, kGroup);
  }

  FASTRNN_DEVICE size_t state_offset(int b, int u) const { return (size_t(stream) * p.n.B + row0 + b) * H + u; }
  FASTRNN_DEVICE size_t step_row(int t, int b) const { return size_t(t) * p.n.B + row0 + b; }
  FASTRNN_DEVICE size_t steps() const { return size_t(stream) * p.n.T * p.n.B; }  // rows of the streams before

  FASTRNN_DEVICE void load_weights(Stationary<Number, G, kTiles>& weights) const {
    const auto* w = static_cast<const T*>(p.weights) + size_t(stream) * G * H * H;
    const int k0 = split * p.n.tiles * Number::kTile, first = unit0 + lane / 4, per_word = 4 / int(sizeof(T));
    weights.load(memory + at.weights + (group * kSplit + split) * larger(p.n.tiles - kTiles, 0) * G * kFragment,
                 p.n.tiles, lane, [&](int gate, int k, int i) {
                   const int u = first + 8 * (i & 1),
                             column = k0 + k * Number::kTile + (lane % 4 + 4 * (i >> 1)) * per_word;
                   const T* from = w + (size_t(gate) * H + u) * H + column;
                   return k < p.n.tiles && u < H && column < H ? *reinterpret_cast<const uint32_t*>(from) : 0u;
                 });
  }

  // h_0 into the first buffer, zeros where there is none; all zeros in a second one.
  FASTRNN_DEVICE void load_h(const Rows& rows) const {
    const auto* h0 = static_cast<const T*>(p.h0);
#pragma unroll 1
    for (int i = threadIdx.x; i < (kGrid ? 1 : 2) * kRows * at.h_row; i += blockDim.x) {
      const int b = i / at.h_row, u = i % at.h_row;
      const bool there = h0 && b < kRows && row0 + b < p.n.B && u < H && !rows.cut(rows.time(0), b);
      h[i] = there ? Number::operand(ptx::to_float(h0[state_offset(b, u)])) : T{};
    }
#pragma unroll 1
    for (int b = threadIdx.x; b < kRows; b += blockDim.x) lengths[b] = rows.length(b);
  }

  // The input of step n of this group, by chunks of 16 bytes.
  FASTRNN_DEVICE void fetch(const Rows& rows, int n) const {
    if (n < rows.last) {
      T* to = stages + n % kForwardStages * at.x_stage;
      const auto* x = static_cast<const T*>(p.x);
      const size_t first = (steps() + step_row(rows.time(n), 0)) * p.x_blocks * H;
#pragma unroll 1
      for (int i = in_group; i < G * kRows * kChunks; i += kGroup) {
        const int c = i % kChunks * kChunk, b = i / kChunks % kRows, gate = i / kChunks / kRows, u = unit0 + c;
        const bool there = row0 + b < p.n.B && u < H;
        ptx::copy_async16(ptx::shared_address(to + (gate * kRows + b) * at.row + c),
                          there ? x + first + (size_t(b) * p.x_blocks + gate) * H + u : x, there ? 16 : 0);
      }
    }
    ptx::copy_commit();
  }

  // Each warp adds up its own elements: the accumulators of the others come through shared memory.
  FASTRNN_DEVICE void give(const float (&acc)[G][kBatch][4], float (&own)[G][kBatch][kOwn]) const {
#pragma unroll
    for (int to = 0; to < kOwners; ++to)
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int n = 0; n < kBatch; ++n)
#pragma unroll
          for (int e = 0; e < kOwn; ++e) {
            if (to == split)
              own[g][n][e] = acc[g][n][to * kOwn + e];
            else
              partial[slot(to, split < to ? split : split - 1, g, n, e)] = acc[g][n][to * kOwn + e];
          }
  }
  FASTRNN_DEVICE int slot(int to, int from, int g, int n, int e) const {
    return ((((to * (kSplit - 1) + from) * G + g) * kBatch + n) * kOwn + e) * 32 + lane;
  }
  FASTRNN_DEVICE float take(float own, int g, int n, int e) const {
#pragma unroll
    for (int from = 0; from < kSplit - 1; ++from) own += partial[slot(split, from, g, n, e)];
    return own;
  }

  // A matrix (rows, 16 units) in shared memory to rows of global memory `stride` apart, those that are there.
  FASTRNN_DEVICE void store(T* to, size_t stride, const T* from) const {
#pragma unroll 1
    for (int i = in_group; i < kRows * kChunks; i += kGroup) {
      const int c = i % kChunks * kChunk, b = i / kChunks;
      if (row0 + b < p.n.B && unit0 + c < H)
        *reinterpret_cast<Words*>(to + b * stride + unit0 + c) = *reinterpret_cast<const Words*>(from + b * at.row + c);
    }
  }

  FASTRNN_DEVICE void store_step(int t, const T* tape) const {
    const size_t S = p.n.S;
    store(static_cast<T*>(p.y) + (step_row(t, 0) * S + stream) * H, S * H, out);
    if (V && p.tape)
#pragma unroll 1
      for (int v = 0; v < V; ++v)
        store(static_cast<T*>(p.tape) + ((steps() + step_row(t, 0)) * V + v) * H, size_t(V) * H,
              tape + v * kRows * at.row);
  }

  FASTRNN_DEVICE void send_step(int buffer) const {
#pragma unroll 1
    for (int i = in_group; i < p.n.blocks * kRows * kChunks; i += kGroup) {
      const int c = i % kChunks * kChunk, b = i / kChunks % kRows, to = i / kChunks / kRows;
      const uint32_t there = ptx::shared_address(h + (buffer * kRows + b) * at.h_row + unit0 + c);
      ptx::store_async(ptx::map_to_rank(there, to), *reinterpret_cast<const Words*>(send + b * at.row + c),
                       ptx::map_to_rank(barrier + 8 * buffer, to));
    }
  }

  // K2: this group's units of the new h, (kRows, units of all blocks) in the exchange's buffer. Ones are NaN in every
  // type.
  FASTRNN_DEVICE void post_step(const Group& meeting) const {
    T* to = reinterpret_cast<T*>(meeting.values(true, kRows * width() * sizeof(T))) + unit0;
#pragma unroll 1
    for (int i = in_group; i < kRows * kChunks; i += kGroup) {
      const int c = i % kChunks * kChunk, b = i / kChunks;
      *reinterpret_cast<Words*>(to + b * width() + c) =
          meeting.failed ? Words{~0u, ~0u, ~0u, ~0u} : *reinterpret_cast<const Words*>(send + b * at.row + c);
    }
  }

  // All of h, a row by one warp.
  FASTRNN_DEVICE void collect_step(const Group& meeting) const {
    constexpr int kAtOnce = 4;  // chunks of a thread under way
    const int chunks = width() / kChunk;
    const auto* values = reinterpret_cast<const Words*>(meeting.values(false, kRows * width() * sizeof(T)));
#pragma unroll 1
    for (int b = threadIdx.x / 32; b < kRows; b += blockDim.x / 32)
#pragma unroll 1
      for (int c = lane; c < chunks; c += kAtOnce * 32) {
        const Words* from = values + b * chunks + c;
        auto* to = reinterpret_cast<Words*>(h + b * at.h_row) + c;
        Words v[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (c + k * 32 < chunks) v[k] = meeting.failed ? Words{~0u, ~0u, ~0u, ~0u} : ptx::load_far(from + k * 32);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (c + k * 32 < chunks) to[k * 32] = v[k];
      }
    ptx::sync_block();
  }
  FASTRNN_DEVICE int width() const { return p.n.units * p.n.blocks; }

  // Zeros for the steps that no row of the tile has.
  FASTRNN_DEVICE void fill(const Rows& rows) const {
    sync_group();
#pragma unroll 1
    for (int i = in_group; i < kRows * at.row; i += kGroup) out[i] = T{};
    sync_group();
#pragma unroll 1
    for (int t = rows.last; t < p.n.T; ++t) {
      store(static_cast<T*>(p.y) + (step_row(t, 0) * p.n.S + stream) * H, size_t(p.n.S) * H, out);
      if (kStates > 1 && p.c)
#pragma unroll 1
        for (int i = in_group; i < kRows * kUnits; i += kGroup)
          if (row0 + i / kUnits < p.n.B && unit0 + i % kUnits < H)
            p.c[(steps() + step_row(t, i / kUnits)) * H + unit0 + i % kUnits] = 0.0f;
    }
  }
};

}  // namespace fastrnn
