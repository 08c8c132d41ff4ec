// Gradients of weights from a few rows, as sums of outer products.
#pragma once

#include "cpu/engine.h"
#include "cpu/narrow.h"

namespace fastrnn::FASTRNN_ISA {

template <class T, class E>
FASTRNN_INLINE Vec<T> splat(const E* p) {
  if constexpr (sizeof(E) < sizeof(T))
    return Vec<T>(to_float(*p));
  else
    return Vec<T>(*p);
}

// One row of a weight's gradient and of its bias's: sum of gates[i][at] * in[i], where a null row is zero.
template <class T, class E>
void weight_row(int rows, const E* const* gates, int64_t at, const E* const* in, int64_t n, int64_t row, void* dw,
                void* db) {
  using V = Vec<T>;
  constexpr int W = V::kWidth;
  V scale[kFewRows], sum(T(0));
  for (int i = 0; i < rows; ++i) {
    scale[i] = splat<T>(gates[i] + at);
    sum = sum + scale[i];
  }
  if (db) store(static_cast<E*>(db) + row, sum, 1);
  for (int64_t k = 0; dw && k < n; k += W) {
    const int lanes = int(n - k < W ? n - k : W);
    V acc(T(0));
    for (int i = 0; i < rows; ++i)
      if (in[i]) acc = acc + scale[i] * load(in[i] + k, lanes);
    store(static_cast<E*>(dw) + row * n + k, acc, lanes);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
