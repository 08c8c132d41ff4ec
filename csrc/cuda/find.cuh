// A kernel by the ids of a plan's request.
#pragma once

#include "cells/list.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"

#define FASTRNN_FOR_EACH_NUMBER(DO, C) DO(C, Bf16) DO(C, Fp16) DO(C, Tf32) DO(C, Fp32)

namespace fastrnn {

#define FASTRNN_FIND(C, N) \
  if (c == cell && number == NumberId::N) found = FASTRNN_KERNEL<C, N>(variant);
#define FASTRNN_FIND_ALL(C)                \
  FASTRNN_FOR_EACH_NUMBER(FASTRNN_FIND, C) \
  ++c;
#define FASTRNN_KERNEL forward_kernel
inline ForwardKernel find_forward(int cell, NumberId number, int variant) {
  ForwardKernel found = nullptr;
  int c = 0;
  FASTRNN_FOR_EACH_CELL(FASTRNN_FIND_ALL)
  return found;
}
#undef FASTRNN_KERNEL
#define FASTRNN_KERNEL backward_kernel
inline BackwardKernel find_backward(int cell, NumberId number, int variant) {
  BackwardKernel found = nullptr;
  int c = 0;
  FASTRNN_FOR_EACH_CELL(FASTRNN_FIND_ALL)
  return found;
}
#undef FASTRNN_KERNEL
#undef FASTRNN_FIND_ALL
#undef FASTRNN_FIND

}  // namespace fastrnn
