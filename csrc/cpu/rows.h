// A weight that rows are multiplied with along its rows, y = x W^T, G gates of n rows each: packed a granule of
// n at a time as (K, G, width), or, for few rows in all, read where it lies.
#pragma once

#include "cpu/plan.h"
#include "cpu/product.h"

namespace fastrnn::FASTRNN_ISA {

// When a weight is packed, and where it goes.
enum class Packing {
  None,     // read in place
  Before,   // all of it before the loop
  Passing,  // by each thread, a few granules at a time, right before their only product
};

template <class T, class E, class O, int G>
class RowWeights {
  using V = Vec<T>;
  static constexpr int W = V::kWidth;
  static constexpr int kGate = W * Multiply<O>::kStep;  // from gate to gate

 public:
  RowWeights(int64_t n, int64_t K, Packing packing) : n_(n), K_(K), packing_(packing) {}

  int64_t elements(int64_t streams) const { return packing_ == Packing::Before ? streams * granules() * granule() : 0; }
  void carve(Carver& m, int64_t streams) { packed_ = m.template take<O>(elements(streams)); }
  void place(void* memory) { packed_ = static_cast<O*>(memory); }
  // Room that a thread needs to pack `granules` in passing.
  int64_t passing(int granules) const { return packing_ == Packing::Passing ? granules * granule() : 0; }

  int lanes(int64_t u) const { return int(n_ - u * W < W ? n_ - u * W : W); }

  // Before the loop.
  void pack(const void* w, int64_t s, int64_t u) const {
    if (packing_ == Packing::Before) pack_granule(w, u, packed_ + (s * granules() + u) * granule());
  }

  // N granules from u on, packed; `room` is the caller's, for those packed in passing.
  const O* packed(const void* w, int64_t s, int64_t u, int N, O* room) const {
    if (packing_ != Packing::Passing) return packed_ + (s * granules() + u) * granule();
    for (int v = 0; v < N; ++v) pack_granule(w, u + v, room + v * granule());
    return room;
  }

  // tile += x . w^T for M rows and NV vectors of the granules from u on.
  FASTRNN_INLINE void add_product(int M, int NV, Tile<T, O>& tile, const void* w, const O* packed, int64_t u) const {
    if (packing_ == Packing::None) {
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < NV; ++v) {
          const int64_t at = u + v / G;
          const V sum = dots<T>(tile.a[m], static_cast<const E*>(w) + (v % G * n_ + at * W) * K_, K_, K_, lanes(at));
          store(tile.out + m * tile.out_pitch + v * W, load(tile.start[v] + m * tile.start_pitch[v]) + sum);
        }
    } else {
      for (int v = 0; v < NV; ++v) tile.w[v] = packed + v / G * granule() + v % G * kGate;
      tile.offset = 0, tile.stride = G * W, tile.K = K_;
      product(M, NV, tile);
    }
  }

 private:
  int64_t granules() const { return (n_ + W - 1) / W; }
  int64_t granule() const { return K_ * G * W; }
  void pack_granule(const void* w, int64_t u, O* out) const {
    for (int g = 0; g < G; ++g)
      pack_rows(static_cast<const E*>(w) + (g * n_ + u * W) * K_, K_, K_, lanes(u), out + g * kGate, G * W);
  }

  int64_t n_, K_;
  Packing packing_;
  O* packed_ = nullptr;
};

}  // namespace fastrnn::FASTRNN_ISA
