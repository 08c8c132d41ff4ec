// What the modules of the GPU and of the emulator have in common: the plan, and launches with tensors as addresses.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn {

void bind_gpu(pybind11::module_& module);

}  // namespace fastrnn
