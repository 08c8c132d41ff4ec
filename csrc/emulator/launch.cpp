#include "emulator/launch.h"

#include "cuda/find.cuh"
#include "cuda/launch.h"

namespace fastrnn {

simt::Options& emulator_options() {
  static simt::Options options;
  return options;
}

simt::Stats& emulator_stats() {
  static simt::Stats stats;
  return stats;
}

Limits limits(int) { return {90, 227 << 10, 16, 132}; }  // an H200

namespace {

template <class Kernel, class Args>
void run(Kernel kernel, const Plan& plan, const Args& args) {
  simt::Launch shape;
  shape.grid = {plan.grid_x, plan.grid_y, 1};
  shape.threads = plan.threads, shape.shared = size_t(plan.shared);
  shape.cluster = plan.kernel.exchange == kInCluster ? plan.slice.blocks : 1;
  emulator_stats() = simt::launch(shape, [&] { kernel(args); }, emulator_options());
}

}  // namespace

void launch(const Plan& plan, int cell, NumberId number, const ForwardArgs& args, void*) {
  run(find_forward(cell, number, plan.variant), plan, args);
}

void launch(const Plan& plan, int cell, NumberId number, const BackwardArgs& args, void*) {
  run(find_backward(cell, number, plan.variant), plan, args);
}

}  // namespace fastrnn
