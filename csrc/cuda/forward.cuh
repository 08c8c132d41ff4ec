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

#include "cuda/group.cuh"
#include "cuda/rows.cuh"
#include "cuda/stationary.cuh"

namespace fastrnn {

constexpr int kThreads = 256;

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
          *meeting.failed ? Words{~0u, ~0u, ~0u, ~0u} : *reinterpret_cast<const Words*>(send + b * at.row + c);
    }
  }

  // All of h, a row by one warp.
  FASTRNN_DEVICE void collect_step(const Group& meeting) const {
    constexpr int kAtOnce = 4;  // chunks of a thread under way
    const int chunks = width() / kChunk;
    const auto* values = reinterpret_cast<const Words*>(meeting.values(false, kRows * width() * sizeof(T)));
    const bool failed = *meeting.failed;
#pragma unroll 1
    for (int b = threadIdx.x / 32; b < kRows; b += blockDim.x / 32)
#pragma unroll 1
      for (int c = lane; c < chunks; c += kAtOnce * 32) {
        const Words* from = values + b * chunks + c;
        auto* to = reinterpret_cast<Words*>(h + b * at.h_row) + c;
        Words v[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (c + k * 32 < chunks) v[k] = failed ? Words{~0u, ~0u, ~0u, ~0u} : ptx::load_far(from + k * 32);
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

// One thread's states, and what it does to them at a step.
template <class F, class Cell>
struct Carried {
  float s[Cell::kStates][F::kRows / 8][F::kOwn];
  float bias[Cell::kSplit + 1][F::kOwn];

  FASTRNN_DEVICE void load(const F& f, const Rows& rows) {
    using T = typename F::T;
#pragma unroll
    for (int e = 0; e < F::kOwn; ++e) {
      const int u = f.unit0 + f.unit(e);
#pragma unroll
      for (int k = 0; k < Cell::kSplit; ++k)
        bias[k][e] =
            f.p.bias && f.owner() && u < f.H
                ? ptx::to_float(static_cast<const T*>(f.p.bias)[(size_t(f.stream) * Cell::kSplit + k) * f.H + u])
                : 0.0f;
#pragma unroll
      for (int n = 0; n < F::kRows / 8; ++n)
#pragma unroll
        for (int k = 0; k < Cell::kStates; ++k) {
          const int b = f.row(n, e);
          const auto* from = static_cast<const T*>(k ? f.p.c0 : f.p.h0);
          const bool there = from && f.owner() && u < f.H && f.row0 + b < f.p.n.B && !rows.cut(rows.time(0), b);
          s[k][n][e] = there ? ptx::to_float(from[f.state_offset(b, u)]) : 0.0f;
        }
    }
  }

  // Step n at time t: from the sums `own` and the input in `stage`, where the tape takes its place.
  template <class Own>
  FASTRNN_DEVICE void step(const F& f, const Rows& rows, int n_step, const Own& own, typename F::T* stage,
                           typename F::T* h, int h_row) {
    using T = typename F::T;
    using Math = typename F::Math;
    constexpr int G = Cell::kGates, X = Cell::kSplit, V = Cell::kTape;
    const int t = rows.time(n_step);
#pragma unroll
    for (int n = 0; n < F::kRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < F::kOwn; ++e) {
        const int u = f.unit(e), b = f.row(n, e);
        Math a[G + X], before[Cell::kStates], after[Cell::kStates], tape[V ? V : 1];
#pragma unroll
        for (int g = 0; g < G; ++g) {
          const float x = ptx::to_float(stage[(g * F::kRows + b) * f.at.row + u]), r = f.take(own[g][n][e], g, n, e);
          if (g < G - X)
            a[g] = Math(x + r);
          else
            a[g] = Math(x), a[g + X] = Math(r + bias[g - (G - X)][e]);
        }
#pragma unroll
        for (int k = 0; k < Cell::kStates; ++k) before[k] = Math(s[k][n][e]);
        Cell::step(a, before, static_cast<const Math*>(nullptr), after, tape);
        const bool live = t < f.lengths[b];
#pragma unroll
        for (int k = 0; k < Cell::kStates; ++k) s[k][n][e] = live ? plain(after[k]) : s[k][n][e];
        f.out[b * f.at.row + u] = ptx::from_float<T>(live ? s[0][n][e] : 0.0f);
#pragma unroll
        for (int v = 0; v < V; ++v) stage[(v * F::kRows + b) * f.at.row + u] = ptx::from_float<T>(plain(tape[v]));
        if (Cell::kStates > 1 && f.p.c && f.row0 + b < f.p.n.B && f.unit0 + u < f.H)
          f.p.c[(f.steps() + f.step_row(t, b)) * f.H + f.unit0 + u] = live ? s[Cell::kStates - 1][n][e] : 0.0f;
        if (n_step + 1 < rows.last && rows.cut(rows.time(n_step + 1), b))
#pragma unroll
          for (int k = 0; k < Cell::kStates; ++k) s[k][n][e] = 0.0f;
        h[b * h_row + u] = F::operand(s[0][n][e]);
      }
  }

  FASTRNN_DEVICE void store(const F& f) const {
    if (!f.owner()) return;
#pragma unroll
    for (int n = 0; n < F::kRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < F::kOwn; ++e) {
        const int u = f.unit0 + f.unit(e), b = f.row(n, e);
        if (u < f.H && f.row0 + b < f.p.n.B)
#pragma unroll
          for (int k = 0; k < Cell::kStates; ++k)
            static_cast<typename F::T*>(k ? f.p.cn : f.p.hn)[f.state_offset(b, u)] =
                ptx::from_float<typename F::T>(s[k][n][e]);
      }
  }
};

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
  if constexpr (F::kCluster) {  // no block ends while its peers may still send to it
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

template <class Cell, class Number, int kSplit, int kTiles, int kBatch, int kExchange>
FASTRNN_DEVICE void run_forward(const ForwardArgs& p) {
  using F = Forward<Cell, Number, kSplit, kTiles, kBatch, kExchange>;
  FASTRNN_SHARED(memory);
  Stationary<Number, Cell::kGates, kTiles> weights;
  if constexpr (F::kGrid) {
    Group group(p.meeting, p.n.blocks, reinterpret_cast<int*>(memory));
    const int tiles = (p.n.B + F::kRows - 1) / F::kRows, first = group.number * p.meeting.items;
#pragma unroll 1
    for (int i = first; i < first + p.meeting.items && i < p.n.S * tiles; ++i) {
      const F f(p, memory, group.rank, i / tiles, i % tiles);
      ptx::sync_block();
      if (i == first || i % tiles == 0) f.load_weights(weights);
      run_steps<Cell>(f, weights, group);
    }
    group.leave(uint64_t(p.meeting.items) * p.n.T);
  } else {
    const int rank = F::kCluster ? int(ptx::cluster_rank()) : 0;
    const F f(p, memory, rank, blockIdx.y, int(blockIdx.x) / p.n.blocks);
    f.load_weights(weights);
    NoGroup none;
    run_steps<Cell>(f, weights, none);
  }
}

template <class Cell, class Number, int kSplit, int kTiles, int kBatch, int kExchange>
__global__ void __launch_bounds__(kThreads, 1) forward(const ForwardArgs p) {
  if constexpr (kExchange != kInCluster || ptx::kHasClusters)
    run_forward<Cell, Number, kSplit, kTiles, kBatch, kExchange>(p);
}

}  // namespace fastrnn
