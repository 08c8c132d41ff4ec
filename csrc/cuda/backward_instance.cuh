#pragma once

#include <utility>

#include "cells/list.h"
#include "cuda/backward.cuh"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"

namespace fastrnn {

template <class Cell, class Number, int kVariant>
constexpr BackwardKernel backward_entry() {
  constexpr Variant v = backward_variant(kVariant);
  if constexpr (backward_exists(kVariant, Cell::kGates, sizeof(typename Number::Storage)))
    return backward<Cell, Number, v.row_tiles, v.tiles, v.batch, v.exchange>;
  else
    return nullptr;
}

template <class Cell, class Number, int... I>
BackwardKernel pick_backward(int variant, std::integer_sequence<int, I...>) {
  static const BackwardKernel all[] = {backward_entry<Cell, Number, I>()...};
  return all[variant];
}

template <class Cell, class Number>
BackwardKernel backward_kernel(int variant) {
  return pick_backward<Cell, Number>(variant, std::make_integer_sequence<int, kBackwardVariants>());
}

}  // namespace fastrnn
