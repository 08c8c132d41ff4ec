#pragma once

#include <utility>

#include "cells/list.h"
#include "cuda/backward.cuh"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"

namespace fastrnn {

template <class Cell, class Number, int... I>
BackwardKernel pick_backward(int variant, std::integer_sequence<int, I...>) {
  static const BackwardKernel all[] = {backward<Cell, Number, backward_variant(I).row_tiles, backward_variant(I).tiles,
                                                backward_variant(I).batch, backward_variant(I).exchange>...};
  return all[variant];
}

template <class Cell, class Number>
BackwardKernel backward_kernel(int variant) {
  return pick_backward<Cell, Number>(variant, std::make_integer_sequence<int, kBackwardVariants>());
}

}  // namespace fastrnn
