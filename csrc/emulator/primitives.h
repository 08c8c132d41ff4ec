#pragma once

#include <string>
#include <vector>

#include "emulator/simt.h"

namespace fastrnn::primitives {

// What the kernel `name` of primitives.cpp puts out, with the bug of that number planted (0: none).
std::vector<float> run(const std::string& name, const std::vector<float>& in, int bug, int blocks,
                       const simt::Options& options);

}  // namespace fastrnn::primitives
