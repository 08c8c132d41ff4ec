// Matrix products in registers: a few rows times a few vectors of packed weights, and the packing.
#pragma once

#include "cpu/vec.h"

namespace fastrnn::FASTRNN_ISA {

// Rows of a register tile that holds `vectors` accumulators per row.
constexpr int tile_rows(int vectors) {
  constexpr bool many = FASTRNN_REGISTERS == 32;
  const int rows = many ? (32 - vectors - 1) / vectors : (16 - 2) / vectors;
  return rows > (many ? 8 : 6) ? (many ? 8 : 6) : rows;
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f(Int<n>) for a run-time n in 1..Max.
template <int Max, class F>
FASTRNN_INLINE void with_constant(int64_t n, F&& f) {
  if constexpr (Max > 0) {
    if (n == Max)
      f(Int<Max>{});
    else
      with_constant<Max - 1>(n, f);
  }
}

// Cuts n rows into tiles of at most Max rows, as even as can be: f(Int<rows>, first row).
template <int Max, class F>
FASTRNN_INLINE void for_tiles(int64_t n, F&& f) {
  const int64_t tiles = (n + Max - 1) / Max;
  for (int64_t i = 0, first = 0; i < tiles; ++i) {
    const int64_t rows = n / tiles + (i < n % tiles);
    with_constant<Max>(rows, [&](auto r) { f(r, first); });
    first += rows;
  }
}

// acc[m][v] += sum over k of a[m][k] * w[v][k * stride ...]. The order of summation does not depend
// on the tile, so that every split of the rows gives the same bits.
template <int M, int V, class T>
FASTRNN_INLINE void product(Vec<T> (&acc)[M][V], const T* const (&a)[M], const T* const (&w)[V], int64_t stride,
                            int64_t K) {
  Vec<T> c[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[m][v] = acc[m][v];
  int64_t at = 0;
  for (int64_t k = 0; k < K; ++k, at += stride) {
    Vec<T> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(w[v] + at);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<T> x(a[m][k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[m][v] = c[m][v] + x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = c[m][v];
}

// Lane j of the result: the dot product of a with row j of w. For few rows in all, where packing
// would cost more than it saves.
template <class T, class E>
__attribute__((noinline)) Vec<T> dots(const T* a, const E* w, int64_t ld, int64_t K, int lanes) {
  constexpr int width = Vec<T>::kWidth;
  constexpr int R = width < 4 ? width : 4;
  Vec<T> part[width];
  for (int j = 0; j < width; j += R) {
    Vec<T> c[R];
    const E* row[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      c[i] = Vec<T>(T(0));
      row[i] = w + (j + i < lanes ? j + i : lanes - 1) * ld;  // past the end: any row, not used
    }
    int64_t k = 0;
    for (; k + width <= K; k += width) {
      const Vec<T> x = load(a + k, width);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) c[i] = c[i] + x * load(row[i] + k, width);
    }
    if (k < K) {
      const Vec<T> x = load(a + k, int(K - k));
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) c[i] = c[i] + x * load(row[i] + k, int(K - k));
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) part[j + i] = c[i];
  }
  return sums(part);
}

// Rows of w become lanes: out[k * stride + lane] = w[lane][k], zero in the lanes beyond.
template <class T, class E>
__attribute__((noinline)) void pack_rows(const E* w, int64_t ld, int64_t K, int lanes, T* out, int64_t stride) {
  constexpr int width = Vec<T>::kWidth;
  for (int64_t k = 0; k < K; k += width) {
    const int n = int(K - k < width ? K - k : width);
    Vec<T> r[width];
#pragma GCC unroll 16
    for (int j = 0; j < width; ++j) r[j] = j < lanes ? load(w + j * ld + k, n) : Vec<T>(T(0));
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i)
      if (i < n) store(out + (k + i) * stride, r[i]);
  }
}

// Columns of w stay lanes: out[k * width + lane] = w[k][lane], zero in the lanes beyond.
template <class T, class E>
__attribute__((noinline)) void pack_columns(const E* w, int64_t ld, int64_t K, int lanes, T* out) {
  for (int64_t k = 0; k < K; ++k) store(out + k * Vec<T>::kWidth, load(w + k * ld, lanes));
}

template <class T, class E>
__attribute__((noinline)) void convert(const E* in, int64_t n, T* out) {
  constexpr int width = Vec<T>::kWidth;
  for (int64_t i = 0; i < n; i += width) {
    const int lanes = int(n - i < width ? n - i : width);
    store(out + i, load(in + i, lanes), lanes);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
