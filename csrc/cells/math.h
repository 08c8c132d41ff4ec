// Scalar functions that the cells are written with. The CPU engine brings the same names for its
// vector type (csrc/cpu/vec.h), found by argument-dependent lookup.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
#define FASTRNN_HD inline __attribute__((always_inline))
#endif

namespace fastrnn {

template <class F>
FASTRNN_HD F sigmoid(F x) {
  return F(1) / (F(1) + std::exp(-x));
}

FASTRNN_HD float tanh(float x) { return ::tanhf(x); }
FASTRNN_HD double tanh(double x) { return ::tanh(x); }

template <class F>
FASTRNN_HD F where(bool condition, F a, F b) {
  return condition ? a : b;
}

}  // namespace fastrnn
