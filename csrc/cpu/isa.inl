// The body of one translation unit per instruction set: defines kernels_<name>().
#include "cells/list.h"
#include "cpu/backward.h"
#include "cpu/forward.h"

namespace fastrnn::FASTRNN_ISA {

const Kernels& kernels() {
#define FASTRNN_ROW(LOOP, C) \
  {LOOP<C, float, float>::run, LOOP<C, double, double>::run, LOOP<C, float, Bf16>::run, LOOP<C, float, Fp16>::run},
#define FASTRNN_FORWARD(C) FASTRNN_ROW(Forward, C)
#define FASTRNN_BACKWARD(C) FASTRNN_ROW(Backward, C)
  static constexpr Kernels table = {{FASTRNN_FOR_EACH_CELL(FASTRNN_FORWARD)},
                                    {FASTRNN_FOR_EACH_CELL(FASTRNN_BACKWARD)}};
  return table;
}

}  // namespace fastrnn::FASTRNN_ISA
