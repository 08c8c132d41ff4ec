// The number types of the kernels: how values are stored, multiplied and put through the cells.
//
//   Storage    of x, h, the weights and the tape in memory
//   kTile      elements of Storage along k in a tile of 32 bytes, the depth of one product
//   operand    what is stored of a value that will be multiplied
//   product    d += a b for one tile; fragments as in ptx.cuh
//   Math       the type that a cell calculates in, by the names of cells/math.h
#pragma once

#include "cells/math.h"
#include "cuda/ptx.cuh"

namespace fastrnn {

// fp32 whose functions are approximated, for results that are stored in 16 bits: with kTanhUnit to 11 bits.
template <bool kTanhUnit>
struct Approximate {
  float v;
  Approximate() = default;
  FASTRNN_HD explicit Approximate(float x) : v(x) {}
  friend FASTRNN_HD Approximate operator+(Approximate a, Approximate b) { return Approximate(a.v + b.v); }
  friend FASTRNN_HD Approximate operator-(Approximate a, Approximate b) { return Approximate(a.v - b.v); }
  friend FASTRNN_HD Approximate operator*(Approximate a, Approximate b) { return Approximate(a.v * b.v); }
  friend FASTRNN_HD bool operator<=(Approximate a, Approximate b) { return a.v <= b.v; }
  friend FASTRNN_HD Approximate tanh(Approximate x) {
    return Approximate(kTanhUnit ? ptx::tanh_unit(x.v) : 2.0f * ptx::sigmoid_unit(2.0f * x.v) - 1.0f);
  }
  friend FASTRNN_HD Approximate sigmoid(Approximate x) {
    return Approximate(kTanhUnit ? 0.5f * ptx::tanh_unit(0.5f * x.v) + 0.5f : ptx::sigmoid_unit(x.v));
  }
};

FASTRNN_HD float plain(float x) { return x; }
template <bool k>
FASTRNN_HD float plain(Approximate<k> x) {
  return x.v;
}

struct Bf16 {
  using Storage = bf16;
  using Math = Approximate<true>;
  static constexpr int kTile = 16;
  static FASTRNN_DEVICE bf16 operand(float x) { return ptx::from_float<bf16>(x); }
  static FASTRNN_DEVICE uint32_t weight(uint32_t word) { return word; }
  static FASTRNN_DEVICE void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_bf16(d, a, b);
  }
};

struct Fp16 {
  using Storage = fp16;
  using Math = Approximate<false>;
  static constexpr int kTile = 16;
  static FASTRNN_DEVICE fp16 operand(float x) { return ptx::from_float<fp16>(x); }
  static FASTRNN_DEVICE uint32_t weight(uint32_t word) { return word; }
  static FASTRNN_DEVICE void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_fp16(d, a, b);
  }
};

struct Tf32 {
  using Storage = float;
  using Math = float;
  static constexpr int kTile = 8;
  static FASTRNN_DEVICE float operand(float x) { return ptx::round_tf32(x); }
  static FASTRNN_DEVICE uint32_t weight(uint32_t word) { return ptx::bits_of(ptx::round_tf32(ptx::float_of(word))); }
  static FASTRNN_DEVICE void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_tf32(d, a, b);
  }
};

// Three products of tf32: a = high + low, each of 11 bits, without low times low. The tensor core cuts the high part
// off by itself. Modelled at 1.7 times the rate of FFMA for 8 rows; the error is about 4 units of the last place of
// fp32.
struct Fp32 {
  using Storage = float;
  using Math = float;
  static constexpr int kTile = 8;
  static FASTRNN_DEVICE float operand(float x) { return x; }
  static FASTRNN_DEVICE uint32_t weight(uint32_t word) { return word; }
  static FASTRNN_DEVICE uint32_t low(uint32_t word) {
    return ptx::bits_of(ptx::float_of(word) - ptx::float_of(word & 0xFFFFE000u));
  }
  static FASTRNN_DEVICE void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t al[4] = {low(a[0]), low(a[1]), low(a[2]), low(a[3])}, bl[2] = {low(b[0]), low(b[1])};
    ptx::mma_tf32(d, al, b);
    ptx::mma_tf32(d, a, bl);
    ptx::mma_tf32(d, a, b);
  }
};

}  // namespace fastrnn
