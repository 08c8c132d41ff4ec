// A SIMD vector as wide as the instruction set of this translation unit, with the functions that
// the cells and the loops need. Written with compiler vector extensions, so that one text serves
// SSE2, AVX2, AVX-512 and NEON; only masked and half-precision loads have special forms.
// Everything here lives in the namespace FASTRNN_ISA, so that no two units share a symbol.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#elif defined(__AVX__)
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#elif defined(__aarch64__)
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 32
#else
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 16
#endif

#define FASTRNN_INLINE inline __attribute__((always_inline))

namespace fastrnn::FASTRNN_ISA {

// The compiler's vectors of T and of integers as wide.
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Native __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double Native __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};

template <class T>
struct Vec {
  static constexpr int kWidth = FASTRNN_VECTOR_BYTES / sizeof(T);
  using Native = typename Lanes<T>::Native;
  using Mask = typename Lanes<T>::Mask;
  Native v;

  Vec() = default;
  FASTRNN_INLINE Vec(Native n) : v(n) {}
  FASTRNN_INLINE explicit Vec(T x) : v(x - Native{}) {}

  friend FASTRNN_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FASTRNN_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FASTRNN_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FASTRNN_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend FASTRNN_INLINE Vec operator-(Vec a) { return -a.v; }
  friend FASTRNN_INLINE Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
  friend FASTRNN_INLINE Mask operator<(Vec a, Vec b) { return a.v < b.v; }
  friend FASTRNN_INLINE Vec where(Mask m, Vec a, Vec b) { return m ? a.v : b.v; }
  friend FASTRNN_INLINE Vec abs(Vec a) { return a.v < 0 ? -a.v : a.v; }
};

// |x| with the sign of y.
template <class T>
FASTRNN_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> y) {
  typename Vec<T>::Mask a, b;
  std::memcpy(&a, &x.v, sizeof a);
  std::memcpy(&b, &y.v, sizeof b);
  typename Vec<T>::Mask sign;
  const Vec<T> negative(T(-0.0));
  std::memcpy(&sign, &negative.v, sizeof sign);
  a = (a & ~sign) | (b & sign);
  typename Vec<T>::Native out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}

// The nearest integer, for arguments in the range of the exponent.
template <class T>
FASTRNN_INLINE Vec<T> round(Vec<T> x) {
  const Vec<T> magic(sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0));  // 1.5 * 2^(bits of the mantissa)
  return x + magic - magic;
}

// x * 2^n for a whole number n.
template <class T>
FASTRNN_INLINE Vec<T> times_exp2(Vec<T> x, Vec<T> n) {
  using V = Vec<T>;
  constexpr bool single = sizeof(T) == 4;
#if defined(__AVX512F__)
  if constexpr (single) return (typename V::Native)_mm512_scalef_ps((__m512)x.v, (__m512)n.v);
#endif
  // Adding 1.5 * 2^mantissa leaves the whole number in the low bits.
  const V shifted = n + V(single ? T(12582912.0) : T(6755399441055744.0));
  typename V::Mask bits;
  std::memcpy(&bits, &shifted.v, sizeof bits);
  bits = (bits + (single ? 127 : 1023)) << (single ? 23 : 52);
  typename V::Native scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x * V(scale);
}

// x limited to low..high; a NaN passes. The instructions return their second operand for a NaN.
template <class T>
FASTRNN_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  using V = Vec<T>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (typename V::Native)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x.v));
  else
    return (typename V::Native)_mm512_min_pd(_mm512_set1_pd(high), _mm512_max_pd(_mm512_set1_pd(low), (__m512d)x.v));
#else
  x = where(x < V(low), V(low), x);
  return where(V(high) < x, V(high), x);
#endif
}

template <class V, class T, int N>
FASTRNN_INLINE V polynomial(V x, const T (&c)[N]) {
  V p(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) p = p * x + V(c[i]);
  return p;
}

// e^x, to about one unit in the last place; arguments beyond the range are clamped, NaN passes.
// Coefficients: S. L. Moshier, Cephes Mathematical Library (expf, exp, tanhf, tanh).
FASTRNN_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x = clamp(x, -87.0f, 89.0f);  // 89 becomes infinity, so that sigmoid ends at 0
  const V n = round(x * V(1.44269504088896341f));
  V r = x - n * V(0.693359375f);
  r = r - n * V(-2.12194440e-4f);
  constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  return times_exp2(polynomial(r, c) * (r * r) + (r + V(1.0f)), n);
}

FASTRNN_INLINE Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  x = clamp(x, -708.0, 710.0);
  const V n = round(x * V(1.4426950408889634073599));
  V r = x - n * V(6.93145751953125e-1);
  r = r - n * V(1.42860682030941723212e-6);
  const V z = r * r;
  constexpr double p[] = {1.26177193074810590878e-4, 3.02994407707441961300e-2, 9.99999999999999999910e-1};
  constexpr double q[] = {3.00198505138664455042e-6, 2.52448340349684104192e-3, 2.27265548208155028766e-1,
                          2.00000000000000000005e0};
  const V px = r * polynomial(z, p);
  return times_exp2(V(1.0) + V(2.0) * px / (polynomial(z, q) - px), n);
}

template <class T>
FASTRNN_INLINE Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x));
}

FASTRNN_INLINE Vec<float> tanh_near_zero(Vec<float> x) {
  constexpr float c[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                         -3.33332819422e-1f};
  const Vec<float> z = x * x;
  return x + x * z * polynomial(z, c);
}

FASTRNN_INLINE Vec<double> tanh_near_zero(Vec<double> x) {
  constexpr double p[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3};
  constexpr double q[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3};
  const Vec<double> z = x * x;
  return x + x * z * (polynomial(z, p) / polynomial(z, q));
}

// On |x|, with the sign put back: odd, and without the cancellation that e^2x brings for negative x.
template <class T>
FASTRNN_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const V a = abs(x);
  const V far = V(T(1)) - V(T(2)) / (exp(a + a) + V(T(1)));
  return where(a < V(T(0.625)), tanh_near_zero(x), with_sign(far, x));
}

// ---- loads and stores: whole vectors, and the first n lanes -------------------------------------

template <class T>
FASTRNN_INLINE Vec<T> load(const T* p) {
  typename Vec<T>::Native v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FASTRNN_INLINE void store(T* p, Vec<T> x) {
  std::memcpy(p, &x.v, sizeof x.v);
}

template <class T>
FASTRNN_INLINE Vec<T> load(const T* p, int n) {
  if (n == Vec<T>::kWidth) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (typename Vec<T>::Native)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (typename Vec<T>::Native)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#else
  typename Vec<T>::Native v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}
template <class T>
FASTRNN_INLINE void store(T* p, Vec<T> x, int n) {
  if (n == Vec<T>::kWidth) return store(p, x);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x.v);
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x.v);
#else
  std::memcpy(p, &x.v, n * sizeof(T));
#endif
}

// ---- transposition -------------------------------------------------------------------------------

template <class T>
FASTRNN_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>* low, Vec<T>* high) {
  using V = Vec<T>;
  constexpr int w = V::kWidth;
  typename V::Mask l, h;
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) {
    l[i] = i / 2 + (i % 2) * w;
    h[i] = w / 2 + i / 2 + (i % 2) * w;
  }
#if defined(__clang__)
  for (int i = 0; i < w; ++i) {
    low->v[i] = l[i] < w ? a.v[l[i]] : b.v[l[i] - w];
    high->v[i] = h[i] < w ? a.v[h[i]] : b.v[h[i] - w];
  }
#else
  *low = __builtin_shuffle(a.v, b.v, l);
  *high = __builtin_shuffle(a.v, b.v, h);
#endif
}

// Rows become columns, by log2(width) rounds of a perfect shuffle.
template <class T>
FASTRNN_INLINE void transpose(Vec<T> (&r)[Vec<T>::kWidth]) {
  constexpr int w = Vec<T>::kWidth;
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
    Vec<T> s[w];
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; ++i) interleave(r[i], r[i + w / 2], &s[2 * i], &s[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) r[i] = s[i];
  }
}

// The sums of a vector's worth of vectors, one per lane, by rounds that halve their number.
template <class T>
FASTRNN_INLINE Vec<T> sums(Vec<T> (&r)[Vec<T>::kWidth]) {
  constexpr int w = Vec<T>::kWidth;
#pragma GCC unroll 4
  for (int half = w / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      Vec<T> low, high;
      interleave(r[i], r[i + half], &low, &high);
      r[i] = low + high;
    }
  return r[0];
}

}  // namespace fastrnn::FASTRNN_ISA
