// Matrix products in registers: a few rows times a few vectors of packed weights, and the packing.
#pragma once

#include "cpu/narrow.h"

namespace fastrnn::FASTRNN_ISA {

// A register tile: up to kMaxRows rows times up to kMaxVectors vectors of columns.
constexpr int kMaxRows = FASTRNN_REGISTERS == 32 ? 8 : 6, kMaxVectors = 4;

// Rows of a tile that holds `vectors` accumulators per row: what the registers have room for.
constexpr int tile_rows(int vectors) {
  const int rows = FASTRNN_REGISTERS == 32 ? (32 - vectors - 1) / vectors : (16 - 2) / vectors;
  return rows < kMaxRows ? rows : kMaxRows;
}
constexpr int kMaxTile = FASTRNN_REGISTERS == 32 ? 24 : 16;

// Cuts n rows into tiles of at most `most` rows, as even as can be: f(rows, first row).
template <class F>
FASTRNN_INLINE void for_tiles(int64_t n, int most, F&& f) {
  const int64_t tiles = (n + most - 1) / most;
  for (int64_t i = 0, first = 0; i < tiles; ++i) {
    const int rows = int(n / tiles + (i < n % tiles));
    f(rows, first);
    first += rows;
  }
}

// The operands of a tile: for row m and vector v,
//   out[m * out_pitch + v * width] = start[v][m * start_pitch[v]] + sum over k of a[m][offset + k] * w[v][k * stride]
// where `out`, `start` and `w` stand for whole vectors. The order of summation does not depend on the
// tile, so that every split of the rows gives the same bits. O is the type of the operands: T, or Bf16
// where the processor multiplies pairs of them; k and k + 1 then lie side by side in w, lane by lane.
template <class T, class O>
struct Tile {
  T* out;
  int64_t out_pitch;
  const T* start[kMaxVectors];
  int64_t start_pitch[kMaxVectors];
  const O* const* a;
  int64_t offset;
  const O* w[kMaxVectors];
  int64_t stride, K;
};

// How many k one instruction takes, and the instruction.
template <class T>
struct Multiply {
  static constexpr int kStep = 1;
  using Value = Vec<T>;
  static FASTRNN_INLINE Value splat(const T* p) { return Value(*p); }
  static FASTRNN_INLINE Value whole(const T* p) { return load(p); }
  static FASTRNN_INLINE Vec<T> add(Vec<T> c, Value x, Value y) { return c + x * y; }
};
#if defined(__AVX512BF16__)
template <>
struct Multiply<Bf16> {
  static constexpr int kStep = 2;
  using Value = __m512i;
  static FASTRNN_INLINE Value splat(const Bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static FASTRNN_INLINE Value whole(const Bf16* p) { return _mm512_loadu_si512(p); }
  static FASTRNN_INLINE Vec<float> add(Vec<float> c, Value x, Value y) {
    return (Vec<float>::Native)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)x, (__m512bh)y);
  }
};
#endif

template <class T, class O, int M, int V>
__attribute__((noinline)) void product_tile(const Tile<T, O>& t) {
  using Op = Multiply<O>;
  constexpr int width = Vec<T>::kWidth;
  Vec<T> c[M][V];
  const O *x[M], *b[V];
  T* const out = t.out;
  const int64_t pitch = t.out_pitch, K = t.K, stride = t.stride * Op::kStep;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) b[v] = t.w[v];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    x[m] = t.a[m] + t.offset;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[m][v] = load(t.start[v] + m * t.start_pitch[v]);
  }
  int64_t k = 0, at = 0;
  do {  // K > 0; a loop that may not run at all costs the registers
    typename Op::Value y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) y[v] = Op::whole(b[v] + at);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename Op::Value s = Op::splat(x[m] + k);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[m][v] = Op::add(c[m][v], s, y[v]);
    }
    at += stride;
  } while ((k += Op::kStep) < K);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + m * pitch + v * width, c[m][v]);
}

// The tile of M rows and V vectors, both known at run time only.
template <class T, class O>
FASTRNN_INLINE void product(int M, int V, const Tile<T, O>& t) {
  using Function = void (*)(const Tile<T, O>&);
#define FASTRNN_TILE(M, V) M <= tile_rows(V) ? product_tile < T, O, M <= tile_rows(V) ? M : 1, V > : nullptr
#define FASTRNN_TILES(V)                                                                                \
  {                                                                                                     \
    FASTRNN_TILE(1, V), FASTRNN_TILE(2, V), FASTRNN_TILE(3, V), FASTRNN_TILE(4, V), FASTRNN_TILE(5, V), \
        FASTRNN_TILE(6, V), FASTRNN_TILE(7, V), FASTRNN_TILE(8, V)                                      \
  }
  static constexpr Function functions[kMaxVectors][8] = {FASTRNN_TILES(1), FASTRNN_TILES(2), FASTRNN_TILES(3),
                                                         FASTRNN_TILES(4)};
#undef FASTRNN_TILES
#undef FASTRNN_TILE
  functions[V - 1][M - 1](t);
}

// Lane j of the result: the dot product of a with row j of w. For few rows in all, where packing
// would cost more than it saves.
template <class T, class O, class E>
__attribute__((noinline)) Vec<T> dots(const O* a, const E* w, int64_t ld, int64_t K, int lanes) {
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

#if defined(__AVX512BF16__)
// The same for pairs of Bf16; K is even. A pair moves as one 32-bit lane.
inline void pack_rows(const Bf16* w, int64_t ld, int64_t K, int lanes, Bf16* out, int64_t stride) {
  pack_rows(reinterpret_cast<const float*>(w), ld / 2, K / 2, lanes, reinterpret_cast<float*>(out), stride);
}
inline void pack_columns(const Bf16* w, int64_t ld, int64_t K, int lanes, Bf16* out) {
  for (int64_t k = 0; k < K; k += 2) {
    const __m512i even = (__m512i)load(w + k * ld, lanes).v, odd = (__m512i)load(w + (k + 1) * ld, lanes).v;
    _mm512_storeu_si512(out + k * Vec<float>::kWidth, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
  }
}
#endif

template <class T, class E>
__attribute__((noinline)) void convert(const E* in, int64_t n, T* out) {
  constexpr int width = Vec<T>::kWidth;
  for (int64_t i = 0; i < n; i += width) {
    const int lanes = int(n - i < width ? n - i : width);
    store(out + i, load(in + i, lanes), lanes);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
