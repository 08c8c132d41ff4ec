// Launching what a plan says: on a GPU (cuda/launch.cu) or on the emulator (emulator/launch.cpp).
#pragma once

#include "cuda/args.h"
#include "cuda/plan.h"

namespace fastrnn {

// Of the current device. Throws std::runtime_error if there is none. Asks the driver for much: to be kept.
Limits limits(int device);

// Asynchronous on a GPU. `stream` is a cudaStream_t of the current device. Throws std::runtime_error, with the plan.
void launch(const Plan& plan, int cell, NumberId number, const ForwardArgs& args, void* stream);
void launch(const Plan& plan, int cell, NumberId number, const BackwardArgs& args, void* stream);

}  // namespace fastrnn
