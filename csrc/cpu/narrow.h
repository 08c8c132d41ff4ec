// bfloat16 and float16 as storage: conversion at loads and stores, arithmetic in float.
#pragma once

#include "cpu/vec.h"

namespace fastrnn::FASTRNN_ISA {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

FASTRNN_INLINE float to_float(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FASTRNN_INLINE void from_float(float f, Bf16* x) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  x->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FASTRNN_INLINE float to_float(Fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero and subnormals: mantissa * 2^-24, exact
    float f = float(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FASTRNN_INLINE void from_float(float f, Fp16* x) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to infinity
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // normal: rebias, to nearest even
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the mantissa and rounds
    float m;
    std::memcpy(&m, &magnitude, 4);
    m += 0.5f;
    std::memcpy(&half, &m, 4);
    half -= 0x3f000000;
  }
  x->bits = uint16_t(sign | half);
}

template <class E>
FASTRNN_INLINE Vec<float> load_narrow(const E* p, int n) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  if constexpr (__is_same(E, Fp16)) return (Vec<float>::Native)_mm512_cvtph_ps(bits);
  return (Vec<float>::Native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
#if defined(__F16C__)
  if constexpr (__is_same(E, Fp16)) {
    if (n == Vec<float>::kWidth) return (Vec<float>::Native)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
#endif
  float buffer[Vec<float>::kWidth] = {};
  for (int i = 0; i < n; ++i) buffer[i] = to_float(p[i]);
  return load(buffer);
#endif
}
template <class E>
FASTRNN_INLINE void store_narrow(E* p, Vec<float> x, int n) {
#if defined(__AVX512F__)
  const __mmask16 lanes = __mmask16((1u << n) - 1);
  if constexpr (__is_same(E, Fp16)) {
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  }
  const __m512i bits = _mm512_castps_si512((__m512)x.v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i high = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x.v, (__m512)x.v, _CMP_UNORD_Q);
  high = _mm512_mask_mov_epi32(_mm512_srli_epi32(high, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(high));
#else
  float buffer[Vec<float>::kWidth];
  store(buffer, x);
  for (int i = 0; i < n; ++i) from_float(buffer[i], p + i);
#endif
}

FASTRNN_INLINE Vec<float> load(const Bf16* p, int n) { return load_narrow(p, n); }
FASTRNN_INLINE Vec<float> load(const Fp16* p, int n) { return load_narrow(p, n); }
FASTRNN_INLINE void store(Bf16* p, Vec<float> x, int n) { store_narrow(p, x, n); }
FASTRNN_INLINE void store(Fp16* p, Vec<float> x, int n) { store_narrow(p, x, n); }

}  // namespace fastrnn::FASTRNN_ISA
