#include "cuda/plan.h"

#include <cstdio>

#include "cells/list.h"

namespace fastrnn {
namespace {

constexpr int kMostThreads = 256;

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

// Cycles of one step, in which all clusters that fit run side by side and the others wait for them. The constants are
// from published rates and latencies of sm_90 and have not been fitted to measurements: they rank, they do not predict.
double model(const Plan& p, const Request& r, const Facts& cell, const Limits& device) {
  const double products = r.number == NumberId::Fp32 ? 3 : 1;
  const double per_product = 6.4;  // of one mma on one of four tensor cores
  const double exchange = p.slice.blocks == 1 ? 60 : 650 + 15 * p.slice.blocks;
  const double per_element = 90;  // of a cell's arithmetic in one thread
  const int warps = p.threads / 32, rows = 8 * p.kernel.batch;
  const double row_tiles = r.backward ? p.kernel.row_tiles : cell.gates;
  const double issued = p.slice.tiles * row_tiles * p.kernel.batch * products * per_product * divide_up(warps, 4);
  const double read = double(larger(p.slice.tiles - p.kernel.tiles, 0)) * row_tiles * warps * kFragment / 128;
  const double elements = double(p.slice.units) * rows / p.threads * per_element;
  const double clusters = double(p.grid_x) / p.slice.blocks * p.grid_y;
  // A cluster lies within one GPC, of 16 multiprocessors that can be counted on.
  const int resident =
      p.slice.blocks == 1 ? device.multiprocessors : larger(device.multiprocessors / 16 * (16 / p.slice.blocks), 1);
  return divide_up(int(clusters), resident) * (issued + read + elements + exchange + 250);
}

Variant variant_of(const Request& r, const Facts& cell, int i) {
  return r.backward ? backward_variant(i) : forward_variant(i, cell.gates);
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
    const int row_tiles = p.slice.units * blocks / kUnits;
    const int warps = larger(divide_up(row_tiles, p.kernel.row_tiles), divide_up(p.slice.units * rows, 32 * 4));
    p.threads = 32 * warps;
    p.slice.tiles = round_up(divide_up(cell.gates * p.slice.units, tile), 2);
    p.shared =
        BackwardLayout(p.kernel, p.slice, cell.split, cell.tape + 1 + cell.history, cell.two, warps, size, tile).total;
  } else {
    p.threads = p.slice.units / kUnits * p.kernel.split * 32;
    p.slice.tiles = round_up(divide_up(divide_up(r.H, tile), p.kernel.split), 2);
    p.shared = ForwardLayout(p.kernel, p.slice, cell.gates, larger(cell.gates, cell.tape), size, tile).total;
  }
  p.depth = p.slice.tiles * tile;
  p.grid_x = unsigned(divide_up(r.B, rows) * blocks), p.grid_y = unsigned(r.S);
  if (p.threads > kMostThreads)
    p.error = "threads";
  else if (p.shared > device.shared)
    p.error = "shared memory";
  p.cycles = model(p, r, cell, device);
  return p;
}

std::string check(const Request& r) {
  if (r.cell < 0 || r.cell >= int(sizeof kCells / sizeof *kCells)) return "no such cell";
  if (int(r.number) < 0 || r.number >= NumberId::Count) return "no such number type";
  if (r.H < 1 || r.B < 1 || r.S < 1 || r.S > 32) return "H, B and S from 1 on, S up to 32, are required";
  if (r.H > 1 << 14) return "H beyond 16384";
  if (r.H % (16 / size_of(r.number))) return "H must be a multiple of " + std::to_string(16 / size_of(r.number));
  return "";
}

std::string too_large(const Request& r, const Limits& device, const Facts& cell, int least) {
  std::string text = std::string("no kernel keeps the weights of ") + cell.name + (r.backward ? ", backward," : "") +
                     " with H=" + std::to_string(r.H) + " on the chip";
  if (least)
    text += ": a block would need " + std::to_string((least + 1023) / 1024) + " KiB of shared memory, the device has " +
            std::to_string(device.shared / 1024);
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
    best.error = "the kernels need a GPU of compute capability 8.0 or later";
    return best;
  }
  const Facts& cell = kCells[r.cell];
  int least = 0;  // shared memory, of all candidates
  for (int v = 0; v < (r.backward ? kBackwardVariants : kForwardVariants); ++v) {
    if ((r.variant >= 0 && v != r.variant) || !exists(r, v)) continue;
    const bool cluster = variant_of(r, cell, v).cluster;
    for (int blocks = cluster ? 2 : 1; blocks <= (cluster ? device.cluster : 1); ++blocks) {
      if (r.blocks && blocks != r.blocks) continue;
      const Plan p = attempt(r, device, cell, v, blocks);
      if (p.error == "threads" || (blocks > 1 && p.slice.units * (blocks - 1) >= r.H))
        continue;  // a block without work
      if (!least || p.shared < least) least = p.shared;
      if (p.error.empty() && (best.variant < 0 || p.cycles < best.cycles)) best = p;
    }
  }
  if (best.variant < 0) best.error = too_large(r, device, cell, least);
  return best;
}

std::string describe(const Plan& p) {
  if (!p.error.empty()) return p.error;
  char text[256];
  std::snprintf(
      text, sizeof text,
      "%ux%u blocks of %d threads, %d to a cluster with %d units each, %d batch rows, %d of %d weight tiles in "
      "registers, %d KiB of shared memory",
      p.grid_x, p.grid_y, p.threads, p.slice.blocks, p.slice.units, 8 * p.kernel.batch,
      p.kernel.tiles < p.slice.tiles ? p.kernel.tiles : p.slice.tiles, p.slice.tiles, (p.shared + 1023) / 1024);
  return text;
}

}  // namespace fastrnn
