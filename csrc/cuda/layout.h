// Where things lie in a block's shared memory, for the kernels and for the plan that must know the size.
#pragma once

#include "cells/math.h"

namespace fastrnn {

constexpr int kThreads = 256;      // of a block, at most
constexpr int kForwardStages = 3;  // steps whose input is under way or in use
constexpr int kBackwardStages = 4;
constexpr int kUnits = 16;      // of one tile of products
constexpr int kFragment = 512;  // bytes of one 16 x 32 byte tile of weights

// How the blocks that share a batch tile hear of each other: there is one, they are a cluster (both: K1), or they meet
// in global memory (K2).
enum Exchange { kAlone, kInCluster, kThroughGrid };

// What a kernel is made for at compile time.
struct Variant {
  int split;      // forward: warps that share the k of a tile
  int tiles;      // weight tiles per row tile that stay in registers
  int row_tiles;  // backward: row tiles of a warp (forward: one per gate)
  int batch;      // batch tiles of 8 rows
  int exchange;
};

// Of a thread of a backward kernel, in the part that is element by element: K2 has fewer units to a block.
FASTRNN_HD constexpr int elements(int exchange) { return exchange == kThroughGrid ? 2 : 4; }

// Sizes of a call that a layout depends on.
struct Slice {
  int units;       // of one block, a multiple of 16
  int blocks;      // that share a batch tile
  int tiles;       // along k, of one warp
  int rounds = 1;  // backward of K2: the row tiles of a warp, by as many as it keeps accumulators of
};

FASTRNN_HD constexpr int larger(int a, int b) { return a > b ? a : b; }

// Forward. Row lengths are padded by 16 bytes, so that rows of ldmatrix lie in different banks.
struct ForwardLayout {
  int h_row, h, row, x_stage, x, partial, out, send, weights, lengths, total;

  // gates: of the recurrent product; values: the larger of the rows of x and of the tape
  FASTRNN_HD ForwardLayout(const Variant& v, const Slice& s, int gates, int values, int size, int tile) {
    const int rows = 8 * v.batch, pad = 16 / size, groups = s.units / kUnits;
    row = kUnits + pad;
    h_row = larger(v.split * s.tiles * tile, s.units * s.blocks) + pad;
    x_stage = groups * values * rows * row;
    int at = 16;  // two mbarriers
    h = at, at += buffers(v) * rows * h_row * size;
    x = at, at += kForwardStages * x_stage * size;
    partial = at, at += groups * (v.split - 1) * gates * v.batch * 4 * 32 * 4;
    out = at, at += groups * rows * row * size;
    send = at, at += v.exchange != kAlone ? groups * rows * row * size : 0;
    weights = at, at += groups * v.split * larger(s.tiles - v.tiles, 0) * gates * kFragment;
    lengths = at, at += rows * 4;
    total = at;
  }
  static FASTRNN_HD constexpr int buffers(const Variant& v) { return v.exchange == kThroughGrid ? 1 : 2; }  // of h
};

// Backward. A step's gradients of the gates stand by rows of the batch: G of the recurrent part, that are multiplied,
// then the input part of the split gates. shares: of the gradient of h that are received and added up; K2 adds those of
// all blocks up to as many as there are threads for. rest: a warp's tiles of weights that are not in registers.
struct BackwardLayout {
  int gate_row, gates, split_at, shares, received, row, c_row, c_at, stage, stages, rest, weights, lengths, total;

  // values: rows of T that a step reads; two: is there a second state?
  FASTRNN_HD BackwardLayout(const Variant& v, const Slice& s, int split, int values, bool two, int warps, int size,
                            int tile) {
    const int rows = 8 * v.batch, pad = 16 / size;
    split_at = s.tiles * tile;
    gate_row = split_at + split * s.units + pad;
    row = s.units + pad;
    c_row = s.units + 4;
    c_at = values * rows * row * size;
    stage = c_at + (two ? rows * c_row * 4 : 0);
    int at = 16;
    const bool grid = v.exchange == kThroughGrid;
    gates = at, at += 2 * rows * gate_row * size;
    shares = grid ? larger(32 * warps * 4 / (s.units * rows), 1) : s.blocks;
    received = at, at += (grid ? 1 : 2) * shares * s.units * rows * 4;
    stages = at, at += kBackwardStages * stage;
    rest = (larger(s.tiles - v.tiles, 0) + (s.rounds - 1) * s.tiles) * v.row_tiles;
    weights = at, at += warps * rest * kFragment;
    lengths = at, at += rows * 4;
    total = at;
  }
};

}  // namespace fastrnn
