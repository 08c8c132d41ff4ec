// The cells of a module, for Python: names in the order of their numbers, and sizes as in fastrnn/cells/base.py.
#pragma once

#include <pybind11/pybind11.h>

#include "cells/list.h"

namespace fastrnn {

inline pybind11::dict cell_sizes() {  // name: (gates, states, tape, dgates, params)
  pybind11::dict sizes;
#define FASTRNN_SIZES(C) \
  sizes[C::kName] = pybind11::make_tuple(C::kGates, C::kStates, C::kTape, C::kGates + C::kSplit, C::kParams);
  FASTRNN_FOR_EACH_CELL(FASTRNN_SIZES)
#undef FASTRNN_SIZES
  return sizes;
}

}  // namespace fastrnn
