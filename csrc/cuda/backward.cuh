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

#include "cuda/forward.cuh"

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

// One thread's elements: the gradients of their states, and c after the step.
template <class F, class Cell>
struct CarriedBack {
  float ds[Cell::kStates][F::kElements], c[F::kElements];
  bool cut[F::kElements];

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
    constexpr int G = Cell::kGates, X = Cell::kSplit, V = Cell::kTape;
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
      Cell::step_backward(tape, before, after, static_cast<const Math*>(nullptr), back, d, static_cast<Math*>(nullptr));
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
    }
  }
};

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
  if constexpr (F::kCluster) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(f.barrier, 1);
      ptx::mbarrier_init(f.barrier + 8, 1);
      ptx::mbarrier_fence();
      ptx::mbarrier_expect(f.barrier, bytes);
      ptx::mbarrier_expect(f.barrier + 8, bytes);
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
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
  if constexpr (F::kCluster) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

template <class Cell, class Number, int kRowTiles, int kTiles, int kBatch, int kExchange>
FASTRNN_DEVICE void run_backward(const BackwardArgs& p) {
  using F = Backward<Cell, Number, kRowTiles, kTiles, kBatch, kExchange>;
  FASTRNN_SHARED(memory);
  Stationary<Number, kRowTiles, kTiles> weights;
  if constexpr (F::kGrid) {
    Group group(p.meeting, p.n.blocks, reinterpret_cast<int*>(memory));
    const int tiles = (p.n.B + F::kRows - 1) / F::kRows, first = group.number * p.meeting.items;
#pragma unroll 1
    for (int i = first; i < first + p.meeting.items && i < p.n.S * tiles; ++i) {
      const F f(p, memory, group.rank, i / tiles, i % tiles);
      ptx::sync_block();
      if (i == first || i % tiles == 0) f.load_weights(weights);
      run_steps_back<Cell, Number>(f, weights, group);
    }
    group.leave(uint64_t(p.meeting.items) * p.n.T);
  } else {
    const F f(p, memory, F::kCluster ? int(ptx::cluster_rank()) : 0, blockIdx.y, int(blockIdx.x) / p.n.blocks);
    f.load_weights(weights);
    NoGroup none;
    run_steps_back<Cell, Number>(f, weights, none);
  }
}

template <class Cell, class Number, int kRowTiles, int kTiles, int kBatch, int kExchange>
__global__ void __launch_bounds__(kThreads, 1) backward(const BackwardArgs p) {
  if constexpr (kExchange != kInCluster || ptx::kHasClusters)
    run_backward<Cell, Number, kRowTiles, kTiles, kBatch, kExchange>(p);
}

}  // namespace fastrnn
