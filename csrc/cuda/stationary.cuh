// Weights that stay on the chip: M row tiles of 16 by `tiles` tiles of 32 bytes, the first kTiles of each row tile in
// registers, the rest in shared memory, both by fragments of mma. A warp multiplies them by rows of shared memory.
#pragma once

#include "cuda/layout.h"
#include "cuda/number.cuh"

namespace fastrnn {

template <class Number, int M, int kTiles>
struct Stationary {
  uint32_t w[M][kTiles ? kTiles : 1][4];
  uint32_t* rest;  // [tiles - kTiles][M][lane][4]
  int tiles, lane;

  FASTRNN_DEVICE void place(char* shared, int number_of_tiles, int this_lane) {
    rest = reinterpret_cast<uint32_t*>(shared), tiles = number_of_tiles, lane = this_lane;
  }

  // word(m, k, i) is word i of this lane's fragment of row tile m and tile k.
  template <class Word>
  FASTRNN_DEVICE void load(char* shared, int number_of_tiles, int this_lane, const Word& word) {
    place(shared, number_of_tiles, this_lane);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        if (k % 2 == 0) ptx::sync_warp();  // or all loads would be issued first, into registers that are not there
#pragma unroll
        for (int i = 0; i < 4; ++i) w[m][k][i] = Number::weight(word(m, k, i));
      }
#pragma unroll 1
    for (int k = kTiles; k < tiles; ++k)
#pragma unroll
      for (int m = 0; m < M; ++m)
        *at(k, m) = Words{Number::weight(word(m, k, 0)), Number::weight(word(m, k, 1)), Number::weight(word(m, k, 2)),
                          Number::weight(word(m, k, 3))};
  }

  // acc[m][n] += weights times the operand of batch tile n, whose row `lane % 8` begins, for this lane, at `row`.
  template <int N>
  FASTRNN_DEVICE void multiply(float (&acc)[M][N][4], uint32_t row, int row_bytes) const {
#pragma unroll
    for (int k = 0; k < kTiles; k += 2)
      if (k < tiles) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          uint32_t b[2][2];
          operands(b, row + n * 8 * row_bytes + k * 32);
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int m = 0; m < M; ++m) Number::product(acc[m][n], w[m][k + j], b[j]);
        }
      }
#pragma unroll 1
    for (int k = kTiles; k < tiles; k += 2) {
      uint32_t b[N][2][2];
#pragma unroll
      for (int n = 0; n < N; ++n) operands(b[n], row + n * 8 * row_bytes + k * 32);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const Words f = *at(k + j, m);
          const uint32_t a[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
          for (int n = 0; n < N; ++n) Number::product(acc[m][n], a, b[n][j]);
        }
    }
  }

 private:
  FASTRNN_DEVICE Words* at(int k, int m) const {
    return reinterpret_cast<Words*>(rest + (((k - kTiles) * M + m) * 32 + lane) * 4);
  }
  static FASTRNN_DEVICE void operands(uint32_t (&b)[2][2], uint32_t address) {  // of two tiles
    uint32_t r[4];
    ptx::ldmatrix_x4(r, address);
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }
};

}  // namespace fastrnn
