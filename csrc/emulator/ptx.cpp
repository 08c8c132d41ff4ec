// Products and ldmatrix by the fragment layouts of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "... m16n8k8",
// "ldmatrix"), element by element as they stand there.
#include "emulator/ptx.h"

namespace fastrnn::ptx {

float to_float(fp16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return std::copysign(std::ldexp(float(mantissa), -24), float_of(sign | 0x3F800000u));
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <>
fp16 from_float<fp16>(float f) {  // to nearest, ties to even
  const uint16_t sign = uint16_t(bits_of(f) >> 16 & 0x8000);
  if (f != f) return {0x7FFF};
  const float a = std::fabs(f);
  if (a >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  if (a < 6.103515625e-05f) return {uint16_t(sign | uint16_t(std::nearbyint(a * 16777216.0f)))};
  const uint32_t u = bits_of(a) - (112u << 23);
  return {uint16_t(sign | ((u + 0xFFF + (u >> 13 & 1)) >> 13))};
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, Site at) {
  struct Argument {
    uint32_t* r;
    uint32_t address;
    Site at;
  } mine{r, address, at};
  simt::collective(&mine, ~0u, "ldmatrix", at, [](void** all) {
    // Lane 8 j + i brings the address of row i of matrix j; lane l gets word l % 4 of row l / 4 of each.
    for (int j = 0; j < 4; ++j)
      for (int l = 0; l < 32; ++l) {
        const auto* row = static_cast<Argument*>(all[8 * j + l / 4]);
        std::memcpy(&static_cast<Argument*>(all[l])->r[j], simt::shared_read(row->address, 16, row->at) + 4 * (l % 4),
                    4);
      }
  });
}

namespace {

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// Elements of 16 bits: two in a word, m16n8k16.
template <class T>
void product16(void** all) {
  simt::count_product();
  float a[16][16], b[16][8];
  const auto element = [](const uint32_t* words, int i) {
    return to_float(T{uint16_t(words[i / 2] >> (16 * (i % 2)))});
  };
  for (int l = 0; l < 32; ++l) {
    const auto* f = static_cast<Fragments*>(all[l]);
    const int group = l / 4, in_group = l % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][col] = element(f->a, i);
    }
    for (int i = 0; i < 4; ++i) b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = element(f->b, i);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? l / 4 : l / 4 + 8, col = l % 4 * 2 + (i & 1);
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      static_cast<Fragments*>(all[l])->d[i] += sum;
    }
}

// Elements of 32 bits of which the low 13 are ignored, m16n8k8.
void product32(void** all) {
  simt::count_product();
  float a[16][8], b[8][8];
  const auto element = [](uint32_t word) { return float_of(word & 0xFFFFE000u); };
  for (int l = 0; l < 32; ++l) {
    const auto* f = static_cast<Fragments*>(all[l]);
    const int group = l / 4, in_group = l % 4;
    for (int i = 0; i < 4; ++i) a[i % 2 ? group + 8 : group][i < 2 ? in_group : in_group + 4] = element(f->a[i]);
    for (int i = 0; i < 2; ++i) b[in_group + 4 * i][group] = element(f->b[i]);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? l / 4 : l / 4 + 8, col = l % 4 * 2 + (i & 1);
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][col];
      static_cast<Fragments*>(all[l])->d[i] += sum;
    }
}

void mma(float* d, const uint32_t* a, const uint32_t* b, const char* what, Site at, void (*compute)(void**)) {
  Fragments mine{d, a, b};
  simt::collective(&mine, ~0u, what, at, compute);
}

}  // namespace

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at) {
  mma(d, a, b, "mma.bf16", at, product16<bf16>);
}
void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at) {
  mma(d, a, b, "mma.f16", at, product16<fp16>);
}
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at) {
  mma(d, a, b, "mma.tf32", at, product32);
}

}  // namespace fastrnn::ptx
