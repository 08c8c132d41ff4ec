#pragma once

#include "emulator/simt.h"

namespace fastrnn {

simt::Options& emulator_options();  // of the launches to come
simt::Stats& emulator_stats();      // of the last one

}  // namespace fastrnn
