// The names of csrc/cuda/ptx.cuh for g++: the same kernels, run by the emulator.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator/simt.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define FASTRNN_DEVICE inline
#define FASTRNN_SHARED(name) char* const name = ::simt::shared_memory()
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

namespace fastrnn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct alignas(16) Words {
  uint32_t x, y, z, w;
};
struct alignas(8) Floats {
  float x, y;
};

namespace ptx {

using simt::Site;

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline int opaque(int x) { return x; }
inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return float_of(uint32_t(v.bits) << 16); }
float to_float(fp16 v);
template <class T>
T from_float(float f);
template <>
inline float from_float<float>(float f) {
  return f;
}
template <>
inline bf16 from_float<bf16>(float f) {  // to nearest, ties to even
  const uint32_t u = bits_of(f);
  return f != f ? bf16{0x7FFF} : bf16{uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
template <>
fp16 from_float<fp16>(float f);
inline float round_tf32(float f) { return f != f ? f : float_of((bits_of(f) + 0x1000) & 0xFFFFE000u); }

inline float tanh_unit(float x) { return std::tanh(x); }
inline float sigmoid_unit(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline void sync_warp(Site at = Site::here()) { simt::sync_warp(~0u, at); }
inline void sync_block(Site at = Site::here()) { simt::barrier(0, int(blockDim.x), at); }
inline bool sync_block_or(bool own, Site at = Site::here()) { return simt::barrier_or(0, int(blockDim.x), own, at); }
inline void sync_threads(int id, int n, Site at = Site::here()) { simt::barrier(id, n, at); }

inline uint32_t shared_address(const void* p) { return simt::shared_address(p); }
inline void copy_async16(uint32_t target, const void* source, int bytes, Site at = Site::here()) {
  simt::copy_async16(target, source, bytes, at);
}
inline void copy_commit() { simt::copy_commit(); }
template <int N>
void copy_wait(Site at = Site::here()) {
  simt::copy_wait(N, at);
}
void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, Site at = Site::here());
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at = Site::here());
void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at = Site::here());
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at = Site::here());

inline void fence(Site at = Site::here()) { simt::fence(at); }
inline void flag_set(uint64_t* flag, uint64_t value, Site at = Site::here()) { simt::flag_set(flag, value, at); }
inline bool flag_wait(const uint64_t* flag, uint64_t value, Site at = Site::here()) {
  return simt::flag_wait(flag, value, at);
}
inline void raise(int* flag, Site at = Site::here()) { simt::raise(flag, at); }
inline Words load_far(const Words* p) { return *p; }

constexpr bool kHasClusters = true;
inline unsigned cluster_rank() { return simt::cluster_rank(); }
inline uint32_t map_to_rank(uint32_t address, unsigned rank) { return simt::map_to_rank(address, rank); }
inline void cluster_arrive(Site at = Site::here()) { simt::cluster_arrive(at); }
inline void cluster_wait(Site at = Site::here()) { simt::cluster_wait(at); }
inline void mbarrier_init(uint32_t address, unsigned count, Site at = Site::here()) {
  simt::mbarrier_init(address, count, at);
}
inline void mbarrier_fence() {}
inline void mbarrier_expect(uint32_t address, unsigned bytes, Site at = Site::here()) {
  simt::mbarrier_expect(address, bytes, at);
}
inline void mbarrier_wait(uint32_t address, unsigned parity, Site at = Site::here()) {
  simt::mbarrier_wait(address, parity, at);
}
inline void store_async(uint32_t address, Words v, uint32_t mbarrier, Site at = Site::here()) {
  simt::store_async(address, &v, 16, mbarrier, at);
}
inline void store_async(uint32_t address, Floats v, uint32_t mbarrier, Site at = Site::here()) {
  simt::store_async(address, &v, 8, mbarrier, at);
}

}  // namespace ptx
}  // namespace fastrnn
