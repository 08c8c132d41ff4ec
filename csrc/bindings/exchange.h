// Tensors as the engine sees them, through DLPack's C exchange interface: where they lie, and new ones.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/dlpack.h"
#include "cells/list.h"
#include "cpu/engine.h"

namespace fastrnn::exchange {

namespace py = pybind11;

struct CellSizes {
  int gates, states, tape, dgates, params;
};

#define FASTRNN_SIZES(C) CellSizes{C::kGates, C::kStates, C::kTape, C::kGates + C::kSplit, C::kParams},
constexpr CellSizes kCells[] = {FASTRNN_FOR_EACH_CELL(FASTRNN_SIZES)};
#undef FASTRNN_SIZES

extern const dlpack::ExchangeApi* api;  // null: this torch has none
extern PyObject *tensor_type, *parameter_type;

int dtype_of(const dlpack::Tensor& t);  // a DType, or -1

// One tensor, if it is contiguous memory of the CPU.
struct Look {
  dlpack::Tensor t;

  bool operator()(PyObject* object);
  bool has_shape(int64_t a, int64_t b) const { return t.ndim == 2 && t.shape[0] == a && t.shape[1] == b; }
  bool has_shape(int64_t a, int64_t b, int64_t c) const {
    return t.ndim == 3 && t.shape[0] == a && t.shape[1] == b && t.shape[2] == c;
  }
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
};

bool requires_grad(PyObject* tensor);

// Of torch's own type, and no view that negates what lies in memory.
bool plain(PyObject* object, PyObject* type, Look& look);

// A new tensor of `ndim` sizes.
py::object new_empty(PyObject* like, const int64_t* sizes, int ndim);

void bind(py::module_& module);  // set_exchange

}  // namespace fastrnn::exchange
