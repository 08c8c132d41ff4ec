#pragma once

#include <utility>

#include "cells/list.h"
#include "cuda/forward.cuh"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"

namespace fastrnn {

template <class Cell, class Number, int... I>
ForwardKernel pick_forward(int variant, std::integer_sequence<int, I...>) {
  static const ForwardKernel all[] = {
      forward<Cell, Number, forward_variant(I, Cell::kGates, sizeof(typename Number::Storage)).split,
              forward_variant(I, Cell::kGates, sizeof(typename Number::Storage)).tiles,
              forward_variant(I, Cell::kGates, sizeof(typename Number::Storage)).batch,
              forward_variant(I, Cell::kGates, sizeof(typename Number::Storage)).exchange>...};
  return all[variant];
}

template <class Cell, class Number>
ForwardKernel forward_kernel(int variant) {
  return pick_forward<Cell, Number>(variant, std::make_integer_sequence<int, kForwardVariants>());
}

}  // namespace fastrnn
