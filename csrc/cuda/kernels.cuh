// The kernels of each cell and number type, by the number of their variant. One source file instantiates each pair
// (instance.cu.in), so that they compile side by side; it must not see find.cuh, which would instantiate them all.
#pragma once

#include "cuda/args.h"
#include "cuda/number.cuh"

namespace fastrnn {

using ForwardKernel = void (*)(ForwardArgs);
using BackwardKernel = void (*)(BackwardArgs);

template <class Cell, class Number>
ForwardKernel forward_kernel(int variant);
template <class Cell, class Number>
BackwardKernel backward_kernel(int variant);

}  // namespace fastrnn
