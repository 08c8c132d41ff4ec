// A weight that rows are multiplied with along its columns, y = x W, packed a granule of columns at a time
// or, for few rows in all, read where it lies.
#pragma once

#include "cpu/rows.h"

namespace fastrnn::FASTRNN_ISA {

// f(granules, first granule) over a range in blocks of at most `most`, forwards or backwards: going
// back and forth from step to step finds the last weights still in the cache.
template <class F>
FASTRNN_INLINE void for_blocks(Range r, int most, bool forwards, F&& f) {
  const int64_t n = (r.size() + most - 1) / most;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t u = r.begin + (forwards ? i : n - 1 - i) * most;
    f(int(r.end - u < most ? r.end - u : most), u);
  }
}

// W (K, n) of each stream.
template <class T, class E, class O>
class ColumnWeights {
  static constexpr int W = Vec<T>::kWidth;
  static constexpr int kBlock = 4;  // granules per register tile

 public:
  ColumnWeights(int64_t K, int64_t n, Packing packing) : K_(K), n_(n), packing_(packing) {}
  // With room for at least `span` granules of each stream.
  void carve(Carver& m, int64_t streams, int64_t span = 0) {
    span_ = span > count() ? span : count();
    packed_ = m.template take<O>(streams * span_ * K_ * W);
  }
  // Room that a thread needs to pack in passing.
  int64_t passing() const { return packing_ == Packing::Passing ? kBlock * K_ * W : 0; }
  // In the place of `other`, of the same K and with room enough, once that is not needed any more.
  void follow(const ColumnWeights& other) { packed_ = other.packed_, span_ = other.span_; }

  int lanes(int64_t u) const { return int(n_ - u * W < W ? n_ - u * W : W); }

  void pack(const void* w, int64_t s, int64_t u) const {
    if (packing_ != Packing::Passing && !in_place(u)) pack_granule(w, u, packed(s, u));
  }

  // f(granules, first) over a range; weights read in place and a packed rest do not mix.
  template <class F>
  FASTRNN_INLINE void blocks(Range r, bool forwards, F&& f) const {
    const int64_t whole = packing_ == Packing::None && r.size() && r.end * W > n_ ? r.end - 1 : r.end;
    for_blocks({r.begin, whole}, kBlock, forwards, f);
    if (whole < r.end) for_blocks({whole, r.end}, 1, true, f);
  }

  // A tile that multiplies with N granules, from u on, and starts from zero; `room` as for `multiply`.
  Tile<T, O> tile(int N, int64_t s, int64_t u, const void* w, const T* zero, const O* room = nullptr) const {
    Tile<T, O> tile;
    const bool here = in_place(u);
    const O* packed = room ? room : this->packed(s, u);
    for (int v = 0; v < N; ++v) {
      tile.w[v] = here ? static_cast<const O*>(w) + (u + v) * W : packed + v * K_ * W;
      tile.start[v] = zero, tile.start_pitch[v] = 0;
    }
    tile.out_pitch = N * W, tile.offset = 0, tile.stride = here ? n_ : W, tile.K = K_;
    return tile;
  }

  // out(j) = rows[j] W for n rows and a range of granules; `room` is the thread's, to pack them in passing.
  template <class F>
  FASTRNN_INLINE void multiply(const void* w, int64_t s, Range r, const O* const* rows, int64_t n, const T* zero,
                               O* room, F&& out) const {
    blocks(r, true, [&](int N, int64_t u) {
      for (int v = 0; packing_ == Packing::Passing && v < N; ++v) pack_granule(w, u + v, room + v * K_ * W);
      Tile<T, O> tile = this->tile(N, s, u, w, zero, packing_ == Packing::Passing ? room : nullptr);
      for_tiles(n, tile_rows(N), [&](int M, int64_t j) {
        alignas(64) T acc[kMaxTile * W];
        tile.out = acc, tile.a = rows + j;
        product(M, N, tile);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < N; ++v) store(out(j + m) + (u + v) * W, load(acc + (m * N + v) * W), lanes(u + v));
      });
    });
  }

 private:
  bool in_place(int64_t u) const { return packing_ == Packing::None && lanes(u) == W; }
  void pack_granule(const void* w, int64_t u, O* out) const {
    pack_columns(static_cast<const E*>(w) + u * W, n_, K_, lanes(u), out);
  }
  // Weights read in place are read in whole vectors, so a ragged last granule is packed all the same.
  int64_t count() const {
    return packing_ == Packing::Before ? (n_ + W - 1) / W : packing_ == Packing::None && n_ % W ? 1 : 0;
  }
  O* packed(int64_t s, int64_t u) const { return packed_ + (s * span_ + (packing_ == Packing::None ? 0 : u)) * K_ * W; }

  int64_t K_, n_, span_ = 0;
  Packing packing_;
  O* packed_ = nullptr;
};

}  // namespace fastrnn::FASTRNN_ISA
