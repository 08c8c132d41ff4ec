#include "cuda/plan.h"

#include <cstdio>
#include <vector>

#include "cells/list.h"

namespace fastrnn {
namespace {

constexpr int kMostThreads = 256;
constexpr int kMostUnits = 128;  // of a block of K2

struct Facts {
  const char* name;
  int gates, split, tape;
  bool two, history;  // a second state? does backward read h?
};
constexpr Facts kCells[] = {
#define FASTRNN_FACTS(C) {C::kName, C::kGates, C::kSplit, C::kTape, C::kStates > 1, C::kReadsH || C::kReadsPreviousH},
    FASTRNN_FOR_EACH_CELL(FASTRNN_FACTS)
#undef FASTRNN_FACTS
};

int size_of(NumberId n) { return n == NumberId::Bf16 || n == NumberId::Fp16 ? 2 : 4; }
int round_up(int a, int to) { return (a + to - 1) / to * to; }
int divide_up(int a, int b) { return (a + b - 1) / b; }

// The model's constants: from published rates and latencies of sm_90, in cycles, to be fitted to measurements on a GPU.
// Until then they rank kernels, they do not predict times.
namespace modelled {
constexpr double kProduct = 6.4;                      // of one mma on one of four tensor cores
constexpr double kElement = 90;                       // of a cell's arithmetic in one thread
constexpr double kSharedBytes = 128;                  // of weights in shared memory, a cycle
constexpr double kAlone = 60;                         // to exchange h within a block
constexpr double kCluster = 650, kClusterBlock = 15;  // within a cluster, and for each block of it
constexpr double kGrid = 1700, kGridBlock = 1;        // through the L2 cache, flags included
constexpr double kGridBytes = 24;                     // of L2 traffic, a cycle and multiprocessor
constexpr double kStep = 250;                         // all else
}  // namespace modelled

// Cycles of one step over the whole batch: what cannot run side by side adds up.
double model(const Plan& p, const Request& r, const Facts& cell, const Limits& device) {
  const double products = r.number == NumberId::Fp32 ? 3 : 1;
  const int warps = p.threads / 32, rows = 8 * p.kernel.batch, blocks = p.slice.blocks;
  const double row_tiles = r.backward ? p.kernel.row_tiles * p.slice.rounds : cell.gates;
  const double issued =
      p.slice.tiles * row_tiles * p.kernel.batch * products * modelled::kProduct * divide_up(warps, 4);
  const double kept = double(larger(p.kernel.tiles < p.slice.tiles ? p.kernel.tiles : p.slice.tiles, 0)) *
                      (r.backward ? p.kernel.row_tiles : cell.gates);  // weight tiles of a warp in registers
  const double read = (p.slice.tiles * row_tiles - kept) * warps * kFragment / modelled::kSharedBytes;
  const double elements = double(p.slice.units) * rows / p.threads * modelled::kElement;
  const double step = issued + read + elements + modelled::kStep;
  if (p.kernel.exchange == kThroughGrid) {
    const double bytes = r.backward ? 2.0 * rows * p.slice.units * blocks * 4
                                    : double(rows) * p.slice.units * blocks * size_of(r.number);
    return p.items * (step + modelled::kGrid + modelled::kGridBlock * blocks + bytes / modelled::kGridBytes);
  }
  const double clusters = double(p.grid_x) / blocks * p.grid_y;
  // A cluster lies within one GPC, of 16 multiprocessors that can be counted on.
  const int resident = blocks == 1 ? device.multiprocessors : larger(device.multiprocessors / 16 * (16 / blocks), 1);
  const double exchange = blocks == 1 ? modelled::kAlone : modelled::kCluster + modelled::kClusterBlock * blocks;
  return divide_up(int(clusters), resident) * (step + exchange);
}

Variant variant_of(const Request& r, const Facts& cell, int i) {
  return r.backward ? backward_variant(i) : forward_variant(i, cell.gates, size_of(r.number));
}

int warps_of_backward(const Request& r, const Plan& p) {
  const int rows = 8 * p.kernel.batch, row_tiles = p.slice.units * p.slice.blocks / kUnits;
  const int least = divide_up(p.slice.units * rows, 32 * elements(p.kernel.exchange));
  if (p.kernel.exchange == kThroughGrid) return r.warps ? larger(r.warps, least) : larger(kMostThreads / 32, least);
  return larger(divide_up(row_tiles, p.kernel.row_tiles), least);
}

// K2: as many groups as fit side by side, each with an equal number of batch tiles.
void divide_grid(Plan& p, const Request& r, const Limits& device) {
  const int rows = 8 * p.kernel.batch, all = r.S * divide_up(r.B, rows), blocks = p.slice.blocks;
  const int most = r.groups ? r.groups : device.multiprocessors / blocks;
  if (most < 1) {
    p.error = "multiprocessors";
    return;
  }
  p.items = divide_up(all, most);
  const int groups = divide_up(all, p.items);
  const size_t values = size_t(p.slice.units) * blocks * rows;  // of one exchange, all blocks to one
  p.exchange = size_t(groups) * 2 * (r.backward ? values * blocks * 4 : values * size_of(r.number));
  p.grid_x = unsigned(groups * blocks), p.grid_y = 1;
}

// One candidate; an error if it does not fit.
Plan attempt(const Request& r, const Limits& device, const Facts& cell, int variant, int blocks) {
  Plan p;
  p.variant = variant;
  p.kernel = variant_of(r, cell, variant);
  const int size = size_of(r.number), tile = 32 / size, rows = 8 * p.kernel.batch;
  p.slice.blocks = blocks;
  p.slice.units = round_up(divide_up(r.H, blocks), kUnits);
  if (r.backward) {
    const int warps = warps_of_backward(r, p);
    p.threads = 32 * warps;
    p.slice.tiles = round_up(divide_up(cell.gates * p.slice.units, tile), 2);
    p.slice.rounds = divide_up(p.slice.units * blocks / kUnits, warps * p.kernel.row_tiles);
    p.shared =
        BackwardLayout(p.kernel, p.slice, cell.split, cell.tape + 1 + cell.history, cell.two, warps, size, tile).total;
  } else {
    p.threads = p.slice.units / kUnits * p.kernel.split * 32;
    p.slice.tiles = round_up(divide_up(divide_up(r.H, tile), p.kernel.split), 2);
    p.shared = ForwardLayout(p.kernel, p.slice, cell.gates, larger(cell.gates, cell.tape), size, tile).total;
  }
  p.depth = p.slice.tiles * tile;
  p.grid_x = unsigned(divide_up(r.B, rows) * blocks), p.grid_y = unsigned(r.S);
  if (p.kernel.exchange == kThroughGrid) divide_grid(p, r, device);
  if (p.threads > kMostThreads)
    p.error = "threads";
  else if (p.error.empty() && p.shared > device.shared)
    p.error = "shared memory";
  p.cycles = model(p, r, cell, device);
  return p;
}

// The numbers of blocks that a kernel may run with, one batch tile to all of them.
std::vector<int> block_counts(const Request& r, const Limits& device, int exchange) {
  if (r.blocks) return (exchange == kAlone) == (r.blocks == 1) ? std::vector<int>{r.blocks} : std::vector<int>{};
  std::vector<int> counts;
  if (exchange == kAlone) counts = {1};
  if (exchange == kInCluster)
    for (int blocks = 2; blocks <= device.cluster; ++blocks)
      if (!(device.refused >> blocks & 1)) counts.push_back(blocks);
  if (exchange == kThroughGrid)
    for (int units = kUnits; units <= kMostUnits && units < r.H; units += kUnits)
      counts.push_back(divide_up(r.H, units));
  return counts;
}

std::string check(const Request& r) {
  if (r.cell < 0 || r.cell >= int(sizeof kCells / sizeof *kCells)) return "no such cell";
  if (int(r.number) < 0 || r.number >= NumberId::Count) return "no such number type";
  if (r.H < 1 || r.B < 1 || r.S < 1 || r.S > 32) return "H, B and S from 1 on, S up to 32, are required";
  if (r.H > 1 << 14) return "H is 16384 at most; use a smaller H or another backend";
  if (int64_t(r.S) * r.B > 1 << 26) return "directions times B are 2^26 at most; use a smaller B or another backend";
  if (r.H % (16 / size_of(r.number))) return "H must be a multiple of " + std::to_string(16 / size_of(r.number));
  return "";
}

std::string too_large(const Request& r, const Limits& device, const Facts& cell, int least) {
  std::string text = std::string("no kernel keeps the weights of ") + cell.name + (r.backward ? ", backward," : "") +
                     " with H=" + std::to_string(r.H) + " on the chip";
  if (least)
    text += ": a block would need " + std::to_string((least + 1023) / 1024) + " KiB of shared memory, each of the " +
            std::to_string(device.multiprocessors) + " multiprocessors has " + std::to_string(device.shared / 1024);
  else
    text += ": " + std::to_string(device.multiprocessors) + " multiprocessors are too few";
  return text + "; use a smaller H, a 16-bit type or another backend";
}

}  // namespace

bool exists(const Request& r, int variant) {
  return !r.backward || backward_exists(variant, kCells[r.cell].gates, size_of(r.number));
}

Plan plan(const Request& r, const Limits& device) {
  Plan best;
  best.error = check(r);
  if (!best.error.empty()) return best;
  if (device.capability < 80) {
    best.error = "the kernels need a GPU of compute capability 8.0 or later; use another backend";
    return best;
  }
  const Facts& cell = kCells[r.cell];
  int least = 0;  // shared memory, of all candidates
  for (int v = 0; v < (r.backward ? kBackwardVariants : kForwardVariants); ++v) {
    if ((r.variant >= 0 && v != r.variant) || !exists(r, v)) continue;
    const int exchange = variant_of(r, cell, v).exchange;
    if (r.kernel && r.kernel != (exchange == kThroughGrid ? 2 : 1)) continue;
    for (const int blocks : block_counts(r, device, exchange)) {
      const Plan p = attempt(r, device, cell, v, blocks);
      if (p.error == "threads" || p.error == "multiprocessors" || (blocks > 1 && p.slice.units * (blocks - 1) >= r.H))
        continue;  // the last: a block without work
      if (!least || p.shared < least) least = p.shared;
      if (p.error.empty() && (best.variant < 0 || p.cycles < best.cycles)) best = p;
    }
  }
  if (best.variant < 0) best.error = too_large(r, device, cell, least);
  return best;
}

std::string describe(const Plan& p) {
  if (!p.error.empty()) return p.error;
  const bool grid = p.kernel.exchange == kThroughGrid;
  const int in_registers = p.kernel.tiles < p.slice.tiles ? p.kernel.tiles : p.slice.tiles;
  char text[320], more[96] = "";
  if (p.items > 1) std::snprintf(more, sizeof more, ", %d batch tiles to a group one after another", p.items);
  std::snprintf(text, sizeof text,
                "%ux%u blocks of %d threads, %d to a %s with %d units each, %d batch rows, %d of %d weight tiles in "
                "registers, %d KiB of shared memory%s",
                p.grid_x, p.grid_y, p.threads, p.slice.blocks, grid ? "group of the grid" : "cluster", p.slice.units,
                8 * p.kernel.batch, in_registers, p.slice.tiles * p.slice.rounds, (p.shared + 1023) / 1024, more);
  return (grid ? "K2: " : "K1: ") + std::string(text);
}

}  // namespace fastrnn
