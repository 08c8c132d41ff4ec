// AVX-512 with dot products of pairs of bfloat16: its own loops for that type, the rest as for AVX-512.
#define FASTRNN_ISA avx512bf16
#include "cells/list.h"
#include "cpu/backward.h"
#include "cpu/forward.h"

namespace fastrnn::avx512 {
const Kernels& kernels();
}

namespace fastrnn::FASTRNN_ISA {

// Pairs need even sizes, and a projection feeds back in float.
bool pairs(const Problem& p) { return p.I % 2 == 0 && p.H % 2 == 0 && p.P % 2 == 0 && p.weights[0].w_hr == nullptr; }

template <class C>
void forward(const ForwardArgs& a) {
  pairs(a) ? Forward<C, float, Bf16, Bf16>::run(a) : Forward<C, float, Bf16>::run(a);
}

template <class C>
void backward(const BackwardArgs& a) {
  pairs(a) ? Backward<C, float, Bf16, Bf16>::run(a) : Backward<C, float, Bf16>::run(a);
}

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels t = avx512::kernels();
    int cell = 0;
#define FASTRNN_PAIRS(C)                              \
  t.forward[cell][int(DType::BFloat16)] = forward<C>; \
  t.backward[cell++][int(DType::BFloat16)] = backward<C>;
    FASTRNN_FOR_EACH_CELL(FASTRNN_PAIRS)
#undef FASTRNN_PAIRS
    return t;
  }();
  return table;
}

}  // namespace fastrnn::FASTRNN_ISA
