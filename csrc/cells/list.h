// Every cell, in one list: the loops, the tables, the kernels' source files (cmake/instances.cmake) and Python's codes
// (fastrnn/backends/cpu.py) follow it.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

#define FASTRNN_FOR_EACH_CELL(DO) DO(Lstm) DO(Gru) DO(RnnTanh) DO(RnnRelu)
