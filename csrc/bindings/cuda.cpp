// fastrnn._cuda: the kernels for Python. It loads on machines without a GPU or its driver.
#include "bindings/gpu.h"

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "fastrnn's CUDA kernels";
  fastrnn::bind_gpu(module);
  module.attr("architectures") = FASTRNN_CUDA_ARCHS;
}
