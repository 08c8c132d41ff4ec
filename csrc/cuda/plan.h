// Which kernel runs a call, and how it is launched: host code, tests and the emulator all ask this one function.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/layout.h"

namespace fastrnn {

enum class NumberId { Bf16, Fp16, Tf32, Fp32, Count };

// What a device can do.
struct Limits {
  int capability;  // 90 for sm_90
  int shared;      // bytes of shared memory that a block may have
  int cluster;     // blocks in the largest cluster that there is room for, 1 without clusters
  int multiprocessors;
  uint32_t refused = 0;  // bit n: there is no room for a cluster of n blocks, though n < cluster
};

struct Request {
  int cell;  // in the order of cells/list.h
  NumberId number;
  bool backward;
  int S, B, H;
  int blocks = 0, variant = -1;  // asked for by tests and benchmarks; 0, -1: the plan chooses
  int kernel = 0;                // 1, 2: K1 or K2; 0: the plan chooses
  int groups = 0, warps = 0;     // likewise, of K2: groups of blocks side by side; warps of a backward block
};

struct Plan {
  std::string error;  // why no kernel runs this call, and the way out; empty if one does
  int variant = -1;   // in the table of its direction
  Variant kernel{};
  Slice slice{};
  int threads = 0, shared = 0;
  int depth = 0;  // elements of k of one row of weights, as a warp (backward: a block) has them
  unsigned grid_x = 0, grid_y = 0;
  int items = 1;        // K2: pairs of a stream and a batch tile that a group of blocks works on
  size_t exchange = 0;  // K2: bytes of global memory that all groups exchange their values in
  double cycles = 0;    // modelled, of one time step over the whole batch
};

// The kernels that are compiled. Weights take 96 to 144 of a thread's 255 registers, the edge beyond which compilers
// spill; FASTRNN's table of them (tests/cuda_kernels.json) is checked.
constexpr int kForwardVariants = 10, kBackwardVariants = 13;

// size: bytes of a number. What an exchange needs beside the weights is too much for 128 of them where numbers are
// wide.
constexpr Variant forward_variant(int i, int gates, int size) {
  const int split[] = {1, 2, 4, 4, 8};
  const Exchange exchange[] = {kAlone, kInCluster, kInCluster, kThroughGrid, kThroughGrid};
  return Variant{split[i / 2], (i % 2 || (i >= 2 && size == 4) ? 28 : 32) / gates / 2 * 2, 0, 1 + i % 2,
                 exchange[i / 2]};
}

constexpr Variant backward_variant(int i) {
  const int row_tiles[] = {1, 1, 2, 4, 6}, tiles[] = {32, 32, 16, 8, 6};
  if (i < 9) return Variant{1, tiles[i / 2], row_tiles[i / 2], 1 + i % 2, i < 2 ? kAlone : kInCluster};
  const int of_grid[4][2] = {{7, 4}, {6, 4}, {4, 8}, {4, 6}};
  return Variant{1, of_grid[i - 9][1], of_grid[i - 9][0], 2 - i % 2, kThroughGrid};
}

// Not compiled: what the plan would never choose. A row tile of 1 in a cluster leaves a warp too few products, unless
// its weights are wide; a test asks for each of the others.
constexpr bool backward_exists(int i, int gates, int size) {
  return !(backward_variant(i).exchange == kInCluster && backward_variant(i).row_tiles == 1) || gates * size >= 12;
}

Plan plan(const Request& request, const Limits& limits);
bool exists(const Request& request, int variant);  // is it compiled for this cell and number type?
std::string describe(const Plan& plan);

}  // namespace fastrnn
