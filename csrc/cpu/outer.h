// Sums over rows of outer products, which the gradients of weights are: a block of rows at a time, laid out
// for the register tiles of product.h, or a few rows as they lie.
#pragma once

#include "cpu/plan.h"
#include "cpu/product.h"

namespace fastrnn::FASTRNN_ISA {

// Most rows of a block, each of which costs one reading and writing of the sums, and most columns, which are
// to stay in the second-level cache. Measured with AVX-512 for H = 64 to 1024: 92 to 105 GF/s a core, 128
// and 512 rows as fast within 3 %, but for 128 at H = 1024, which lose 8 %.
constexpr int64_t kBlockRows = 256, kBlockColumns = 384;

// Columns of the left side, and the row of the sums where the first of them goes.
template <class T>
struct Run {
  Range columns;
  T* dw;
};

// What a thread needs for its blocks.
template <class T>
struct Scratch {
  static constexpr int W = Vec<T>::kWidth;
  static constexpr int64_t kPitch = kBlockRows + W;  // not a power of two, for the sake of the cache's sets
  const T** in;
  T *panel, *left;

  void carve(Carver& m) {
    in = m.take<const T*>(kBlockRows);
    panel = m.take<T>(kBlockRows * kMaxVectors * W);
    left = m.take<T>(kBlockColumns * kPitch);
  }
};

template <class T>
class OuterBlock {
  static constexpr int64_t kPitch = Scratch<T>::kPitch;
  using V = Vec<T>;
  static constexpr int W = V::kWidth;

 public:
  // `first`: the sums start here.
  OuterBlock(Range columns, int64_t rows, bool first, const Scratch<T>& scratch)
      : columns_(columns), rows_(rows), first_(first), left_(scratch.left), panel_(scratch.panel) {}

  int64_t rows() const { return rows_; }
  // Our part of some columns.
  Range clip(int64_t begin, int64_t end) const {
    const auto inside = [&](int64_t c) { return c < begin ? begin : c > end ? end : c; };
    return {inside(columns_.begin), inside(columns_.end)};
  }

  // Copies our columns of `rows` rows, `pitch` apart, so that a column's values lie side by side.
  void gather(const T* rows, int64_t pitch) {
    for (int64_t k = 0; k < rows_; k += W)
      pack_rows(rows + k * pitch + columns_.begin, pitch, columns_.size(), int(rows_ - k < W ? rows_ - k : W),
                left_ + k, kPitch);
  }

  // dw += left^T in, for each run; in[k] is row k of n values, or null for zeros.
  void multiply(const T* const* in, int64_t n, const Run<T>* runs, int count) {
    for_tiles((n + W - 1) / W, kMaxVectors, [&](int N, int64_t u) {
      const int last = int(n - (u + N - 1) * W < W ? n - (u + N - 1) * W : W);
      fill_panel(in, N, u, last);
      for (int r = 0; r < count; ++r) {
        T* dw = runs[r].dw + u * W;
        const Range c = runs[r].columns;
        for_tiles(c.size(), tile_rows(N), [&](int M, int64_t m) { tile(M, N, c.begin + m, dw + m * n, n, last); });
      }
    });
  }

  // db += the sums of columns over the rows.
  void sum(Range columns, T* db) {
    for (int64_t c = columns.begin; db && c < columns.end; c += W, db += W) {
      const int lanes = int(columns.end - c < W ? columns.end - c : W);
      V part[W];
      for (int i = 0; i < W; ++i) {
        const T* of = column(c + (i < lanes ? i : 0));
        part[i] = V(T(0));
        for (int64_t k = 0; k < rows_; k += W) part[i] = part[i] + load(of + k);
      }
      const V total = sums(part);
      store(db, first_ ? total : load(db, lanes) + total, lanes);
    }
  }

 private:
  const T* column(int64_t c) const { return left_ + (c - columns_.begin) * kPitch; }

  void fill_panel(const T* const* in, int N, int64_t u, int last) {
    T* out = panel_;
    for (int64_t k = 0; k < rows_; ++k)
      for (int v = 0; v < N; ++v, out += W)
        store(out, in[k] ? load(in[k] + (u + v) * W, v + 1 < N ? W : last) : V(T(0)));
  }

  // M rows of the sums times N vectors, the last of them of `last` lanes.
  FASTRNN_INLINE void tile(int M, int N, int64_t c, T* dw, int64_t n, int last) {
    alignas(64) T ragged[kMaxTile * W];
    alignas(64) static constexpr T zero[W] = {};
    const T* a[kMaxRows];
    const bool whole = last == W;
    for (int m = 0; m < M; ++m) {
      a[m] = column(c + m);
      for (int v = 0; !first_ && v < N; ++v) __builtin_prefetch(dw + (m + M) * n + v * W, 1);  // the next tile's sums
      for (int v = 0; !whole && !first_ && v < N; ++v)
        store(ragged + (m * N + v) * W, load(dw + m * n + v * W, v + 1 < N ? W : last));
    }
    Tile<T, T> t;
    t.out = whole ? dw : ragged, t.out_pitch = whole ? n : N * W;
    t.a = a, t.offset = 0, t.stride = N * W, t.K = rows_;
    for (int v = 0; v < N; ++v) {
      t.w[v] = panel_ + v * W;
      t.start[v] = first_ ? zero : t.out + v * W;
      t.start_pitch[v] = first_ ? 0 : t.out_pitch;
    }
    product(M, N, t);
    for (int m = 0; !whole && m < M; ++m)
      for (int v = 0; v < N; ++v) store(dw + m * n + v * W, load(ragged + (m * N + v) * W), v + 1 < N ? W : last);
  }

  Range columns_;
  int64_t rows_;
  bool first_;
  T *left_, *panel_;
};

// ---- few rows ------------------------------------------------------------------------------------

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
