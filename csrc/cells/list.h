// Every cell, in one list: the loops, the tables, the kernels' source files (cmake/instances.cmake) and Python's codes
// (fastrnn/backends/cpu.py) follow it.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

#define FASTRNN_FOR_EACH_CELL(DO) DO(Lstm) DO(Gru) DO(RnnTanh) DO(RnnRelu)

namespace fastrnn {

#define FASTRNN_ONE(C) +1
constexpr int kCellCount = 0 FASTRNN_FOR_EACH_CELL(FASTRNN_ONE);
#undef FASTRNN_ONE

}  // namespace fastrnn
