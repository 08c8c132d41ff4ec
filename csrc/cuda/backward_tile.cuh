// Backward: what a block knows of a batch tile, and how values come and go: weights, what forward left, shares of the
// gradient of h, gradients of the gates. backward.cuh says who does what.
#pragma once

#include "cuda/group.cuh"
#include "cuda/rows.cuh"
#include "cuda/stationary.cuh"

namespace fastrnn {

template <class Cell, class Number, int kRowTiles, int kTiles, int kBatch, int kExchange>
struct Backward {
  using T = typename Number::Storage;
  using Math = typename Number::Math;
  static constexpr int G = Cell::kGates, X = Cell::kSplit, V = Cell::kTape, kStates = Cell::kStates, D = G + X;
  static constexpr bool kCluster = kExchange == kInCluster, kGrid = kExchange == kThroughGrid;
  static constexpr bool kTwo = kStates > 1, kHistory = Cell::kReadsH || Cell::kReadsPreviousH;
  static constexpr int kRows = 8 * kBatch;
  static constexpr int kElements = elements(kExchange);
  static constexpr int kValues = V + 1 + kHistory;  // tape, dy, h
  static constexpr int kChunk = 16 / sizeof(T);
  static FASTRNN_DEVICE T operand(float x) { return Number::operand(x); }

  const BackwardArgs& p;
  const BackwardLayout at;
  char* const memory;
  const int lane, warp, stream, H, units, rank;
  const int unit0, row0;  // of the block
  int* const lengths;
  T* gates;
  float* received;
  uint32_t barrier;

  FASTRNN_DEVICE Backward(const BackwardArgs& args, char* shared, int of_group, int of_stream, int tile)
      : p(args),
        at(Variant{0, kTiles, kRowTiles, kBatch, kExchange}, {args.n.units, args.n.blocks, args.n.tiles, args.n.rounds},
           X, kValues, kTwo, blockDim.x / 32, sizeof(T), Number::kTile),
        memory(shared),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        stream(of_stream),
        H(args.n.H),
        units(args.n.units),
        rank(of_group),
        unit0(rank * args.n.units),
        row0(tile * kRows),
        lengths(reinterpret_cast<int*>(shared + at.lengths)) {
    gates = reinterpret_cast<T*>(memory + at.gates);
    received = reinterpret_cast<float*>(memory + at.received);
    barrier = ptx::shared_address(memory);
  }

  FASTRNN_DEVICE size_t state_offset(int b, int u) const { return (size_t(stream) * p.n.B + row0 + b) * H + u; }
  FASTRNN_DEVICE size_t step_row(int t, int b) const { return size_t(t) * p.n.B + row0 + b; }
  FASTRNN_DEVICE size_t steps() const { return size_t(stream) * p.n.T * p.n.B; }
  FASTRNN_DEVICE size_t y_offset(int t, int b) const { return (step_row(t, b) * p.n.S + stream) * H; }
  FASTRNN_DEVICE float* share(int buffer, int from, int u, int b) const {
    return received + ((buffer * at.shares + from) * units + u) * kRows + b;
  }

  FASTRNN_DEVICE void load_weights(Stationary<Number, kRowTiles, kTiles>& weights) const {
    load_round(weights, 0, at.weights + warp * at.rest * kFragment);
    if constexpr (kGrid)
#pragma unroll 1
      for (int round = 1; round < p.n.rounds; ++round) {
        Stationary<Number, kRowTiles, 0> rest;
        load_round(rest, round, rest_at(round));
      }
  }
  template <class Weights>
  FASTRNN_DEVICE void load_round(Weights& weights, int round, int to) const {
    constexpr int kPerWord = 4 / int(sizeof(T));
    const int length = p.n.tiles * Number::kTile, h0 = row_tile(round, 0) * 16 + lane / 4;
    const T* w = static_cast<const T*>(p.weights) + ((size_t(stream) * p.n.blocks + rank) * H + h0) * length +
                 lane % 4 * kPerWord;
    weights.load(memory + to, p.n.tiles, lane, [&](int m, int k, int i) {
      const int h = m * 16 + 8 * (i & 1);
      const T* from = w + size_t(h) * length + k * Number::kTile + 4 * (i >> 1) * kPerWord;
      return k < p.n.tiles && h0 + h < H ? *reinterpret_cast<const uint32_t*>(from) : 0u;
    });
  }
  FASTRNN_DEVICE int row_tile(int round, int m) const {
    return (kGrid ? round * int(blockDim.x / 32) + warp : warp) * kRowTiles + m;
  }
  // Where this warp's weights of a round beyond the first lie.
  FASTRNN_DEVICE int rest_at(int round) const {
    const int before = larger(p.n.tiles - kTiles, 0) + (round - 1) * p.n.tiles;
    return at.weights + (warp * at.rest + before * kRowTiles) * kFragment;
  }

  // The step that came before step t in the forward pass of row b, or -1: its state is the initial one.
  FASTRNN_DEVICE int previous(const Rows& rows, int t, int b) const {
    if (!rows.reverse) return t - 1;
    return t + 1 < lengths[b] ? t + 1 : -1;
  }

  // What the step at time t reads, by chunks of 16 bytes.
  FASTRNN_DEVICE void fetch(const Rows& rows, int n) const {
    if (n < rows.last) {
      const int t = rows.time(rows.last - 1 - n);
      char* to = memory + at.stages + n % kBackwardStages * at.stage;
      fetch_values(rows, t, reinterpret_cast<T*>(to));
      if (kTwo) fetch_c(rows, t, reinterpret_cast<float*>(to + at.c_at));
    }
    ptx::copy_commit();
  }

  FASTRNN_DEVICE void fetch_values(const Rows& rows, int t, T* to) const {
    const int chunks = units / kChunk;
#pragma unroll 1
    for (int i = threadIdx.x; i < kValues * kRows * chunks; i += blockDim.x) {
      const int c = i % chunks * kChunk, b = i / chunks % kRows, v = i / chunks / kRows, u = unit0 + c;
      const auto *dy = static_cast<const T*>(p.dy), *y = static_cast<const T*>(p.y);
      const T* from = dy + y_offset(t, b) + u;
      bool there = row0 + b < p.n.B && u < H;
      if (V && v < V) {
        from = static_cast<const T*>(p.tape) + ((steps() + step_row(t, b)) * V + v) * H + u;
      } else if (kHistory && v > V) {
        const int s = Cell::kReadsH ? t : previous(rows, t, b);
        const auto* h0 = static_cast<const T*>(p.h0);
        there = there && (s >= 0 || h0);
        from = s >= 0 ? y + y_offset(s, b) + u : h0 + state_offset(b, u);
      }
      ptx::copy_async16(ptx::shared_address(to + (v * kRows + b) * at.row + c), there ? from : dy, there ? 16 : 0);
    }
  }

  FASTRNN_DEVICE void fetch_c(const Rows& rows, int t, float* to) const {
    const int chunks = units / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * chunks; i += blockDim.x) {
      const int c = i % chunks * 4, b = i / chunks, u = unit0 + c, s = previous(rows, t, b);
      const bool there = row0 + b < p.n.B && u < H && (s >= 0 || p.c0);
      const float* from = s >= 0 ? p.c + (steps() + step_row(s, b)) * H + u : p.c0 + state_offset(b, u);
      ptx::copy_async16(ptx::shared_address(to + b * at.c_row + c), there ? from : p.c, there ? 16 : 0);
    }
  }

  // K1: the shares of the gradient of h, from the accumulators to the blocks that own the units.
  FASTRNN_DEVICE void send(const float (&acc)[kRowTiles][kBatch][4], int buffer) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int h = row_tile(0, m) * 16, to = h / units, u = h % units + lane / 4;
      if (to < p.n.blocks)
#pragma unroll
        for (int n = 0; n < kBatch; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float* there = share(buffer, rank, u + 8 * e, n * 8 + lane % 4 * 2);
            const Floats value{acc[m][n][2 * e], acc[m][n][2 * e + 1]};
            if constexpr (kCluster)
              ptx::store_async(ptx::map_to_rank(ptx::shared_address(there), to), value,
                               ptx::map_to_rank(barrier + 8 * buffer, to));
            else
              *reinterpret_cast<Floats*>(there) = value;
          }
    }
  }

  // K2: to the exchange's buffer, (blocks that send, units of all blocks, kRows) in fp32. No unit is divided by the
  // units of a block, whose quotients would stay in registers from step to step.
  FASTRNN_DEVICE void post(const float (&acc)[kRowTiles][kBatch][4], int round, float* to) const {
    const int first = row_tile(round, 0) * 16;
    to += (size_t(rank) * width() + first + lane / 4) * kRows + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      if (first + m * 16 < width())
#pragma unroll
        for (int n = 0; n < kBatch; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            *reinterpret_cast<Floats*>(to + (m * 16 + 8 * e) * kRows + n * 8) =
                Floats{acc[m][n][2 * e], acc[m][n][2 * e + 1]};
  }
  FASTRNN_DEVICE int width() const { return units * p.n.blocks; }

  // This block's gates' gradients times its weights, to all.
  template <class Weights, class Meet>
  FASTRNN_DEVICE void share_out(const Weights& weights, const T* gates, int buffer, const Meet& meeting) const {
    const uint32_t operand = ptx::shared_address(gates + lane % 8 * at.gate_row) + lane / 8 * 16;
    if constexpr (kGrid) {
      auto* to = reinterpret_cast<float*>(meeting.values(true, exchange_bytes()));
      const float start = meeting.spoilt();
      multiply(weights, operand, start, [&](const auto& acc) { post(acc, 0, to); });
#pragma unroll 1
      for (int round = 1; round < p.n.rounds; ++round) {
        Stationary<Number, kRowTiles, 0> rest;
        rest.place(memory + rest_at(round), p.n.tiles, lane);
        if (row_tile(round, 0) * 16 < width())
          multiply(rest, operand, start, [&](const auto& acc) { post(acc, round, to); });
      }
      meeting.arrive();
    } else {
      multiply(weights, operand, 0.0f, [&](const auto& acc) { send(acc, buffer); });
    }
  }
  template <class Weights, class Use>
  FASTRNN_DEVICE void multiply(const Weights& weights, uint32_t operand, float start, const Use& use) const {
    float acc[kRowTiles][kBatch][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] = start;
    weights.multiply(acc, operand, at.gate_row * int(sizeof(T)));
    use(acc);
  }

  FASTRNN_DEVICE size_t exchange_bytes() const { return size_t(p.n.blocks) * p.n.blocks * units * kRows * 4; }

  // K2: the shares of all blocks, added up to at.shares in shared memory.
  FASTRNN_DEVICE void collect(const Group& meeting) const {
    constexpr int kAtOnce = 4;
    const int chunks = units * kRows / 4, blocks = p.n.blocks;
    const auto* from = reinterpret_cast<const Words*>(meeting.values(false, exchange_bytes())) + rank * chunks;
#pragma unroll 1
    for (int i = threadIdx.x; i < at.shares * chunks; i += blockDim.x) {
      const float start = meeting.spoilt();
      float sum[4] = {start, start, start, start};
#pragma unroll 1
      for (int first = i / chunks; first < blocks; first += kAtOnce * at.shares) {
        Words v[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int block = first + k * at.shares;
          v[k] = block < blocks ? ptx::load_far(from + block * (blocks * chunks) + i % chunks) : Words{0, 0, 0, 0};
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          sum[0] += ptx::float_of(v[k].x), sum[1] += ptx::float_of(v[k].y);
          sum[2] += ptx::float_of(v[k].z), sum[3] += ptx::float_of(v[k].w);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) received[i * 4 + k] = sum[k];
    }
    ptx::sync_block();
  }

  // Columns of the gates' gradients where output k stands: the input part of a split gate has a place of its own.
  FASTRNN_DEVICE int column(int k) const {
    if (k < G - X) return k * units;
    return k < G ? at.split_at + (k - (G - X)) * units : (k - X) * units;
  }

  FASTRNN_DEVICE void store(int t, const T* from) const {  // null: zeros
    const int chunks = units / kChunk;
#pragma unroll 1
    for (int i = threadIdx.x; i < D * kRows * chunks; i += blockDim.x) {
      const int c = i % chunks * kChunk, b = i / chunks % kRows, k = i / chunks / kRows;
      if (row0 + b < p.n.B && unit0 + c < H)
        *reinterpret_cast<Words*>(static_cast<T*>(p.dgates) + ((steps() + step_row(t, b)) * D + k) * H + unit0 + c) =
            from ? *reinterpret_cast<const Words*>(from + b * at.gate_row + column(k) + c) : Words{0, 0, 0, 0};
    }
  }
};

}  // namespace fastrnn
