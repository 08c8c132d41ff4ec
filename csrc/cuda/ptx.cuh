// The operations of PTX that the kernels use, and the only inline assembly. Under g++ the same names come
// from csrc/emulator/ptx.h.
#pragma once

#include <cstdint>

#include "cells/math.h"

#if !defined(__CUDACC__)
#include "emulator/ptx.h"
#else
#define FASTRNN_DEVICE __device__ __forceinline__
#define FASTRNN_SHARED(name) extern __shared__ __align__(1024) char name[]

namespace fastrnn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct __align__(16) Words {  // 16 bytes
  uint32_t x, y, z, w;
};
struct __align__(8) Floats {
  float x, y;
};

namespace ptx {

// ---- conversions
FASTRNN_DEVICE float to_float(float v) { return v; }
FASTRNN_DEVICE float to_float(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
FASTRNN_DEVICE float to_float(fp16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
template <class T>
FASTRNN_DEVICE T from_float(float f);
template <>
FASTRNN_DEVICE float from_float<float>(float f) {
  return f;
}
template <>
FASTRNN_DEVICE bf16 from_float<bf16>(float f) {
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(f));
  return r;
}
template <>
FASTRNN_DEVICE fp16 from_float<fp16>(float f) {
  fp16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(f));
  return r;
}
FASTRNN_DEVICE float round_tf32(float f) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(f));
  return __uint_as_float(r);
}
FASTRNN_DEVICE uint32_t bits_of(float f) { return __float_as_uint(f); }
// x, which the compiler does not know to be x: what is made of it is made anew, not kept in a register.
FASTRNN_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
FASTRNN_DEVICE float float_of(uint32_t u) { return __uint_as_float(u); }

// ---- approximations: of 11 bits, of nearly 24
FASTRNN_HD float tanh_unit(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return ::tanhf(x);
#endif
}
FASTRNN_HD float sigmoid_unit(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, 1.0f + __expf(-x));
#else
  return 1.0f / (1.0f + ::expf(-x));
#endif
}

// ---- barriers
FASTRNN_DEVICE void sync_warp() { __syncwarp(); }
FASTRNN_DEVICE void sync_block() { __syncthreads(); }
FASTRNN_DEVICE bool sync_block_or(bool own) { return __syncthreads_or(own); }  // has one of the threads said so?
FASTRNN_DEVICE void sync_threads(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }

// ---- memory
FASTRNN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
FASTRNN_DEVICE void copy_async16(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(__cvta_generic_to_global(source)),
               "r"(bytes)
               : "memory");
}
FASTRNN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
FASTRNN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- flags in global memory, by which blocks that are no cluster hear of each other
FASTRNN_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FASTRNN_DEVICE void flag_set(uint64_t* flag, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
// Waits until the flag has reached `value`; false when kPatience nanoseconds were not enough.
FASTRNN_DEVICE bool flag_wait(const uint64_t* flag, uint64_t value) {
  constexpr uint64_t kPatience = 5'000'000'000;
  uint64_t seen, now, end = 0;
  for (unsigned looks = 1;; ++looks) {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
    if (seen >= value) return true;
    if (looks % 256) continue;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (end == 0) end = now + kPatience;
    if (now > end) return false;
  }
}
// Makes a flag that the host reads 1: any thread of any block may.
FASTRNN_DEVICE void raise(int* flag) { asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory"); }
// What another block has written, past this multiprocessor's own cache.
FASTRNN_DEVICE Words load_far(const Words* p) {
  Words v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// ---- tensor cores. Fragments by 32-bit words, the same for all types: word i of A is (row g + 8 (i % 2),
// word q + 4 (i / 2)) of 16 rows of 8 words, word i of B is (word q + 4 i) of column g; g, q = lane / 4, lane % 4.
FASTRNN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
#define FASTRNN_MMA(NAME, SHAPE)                                                            \
  FASTRNN_DEVICE void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                \
  }
FASTRNN_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTRNN_MMA(mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTRNN_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTRNN_MMA

// ---- clusters: sm_90 and later. On older targets the names exist and trap; the plan never goes there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#define FASTRNN_SM90(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHasClusters = false;
#define FASTRNN_SM90(...) __trap()
#endif
FASTRNN_DEVICE unsigned cluster_rank() {
  unsigned r = 0;
  FASTRNN_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
FASTRNN_DEVICE uint32_t map_to_rank(uint32_t address, unsigned rank) {
  uint32_t r = 0;
  FASTRNN_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
FASTRNN_DEVICE void cluster_arrive() { FASTRNN_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory"); }
FASTRNN_DEVICE void cluster_wait() { FASTRNN_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }
FASTRNN_DEVICE void mbarrier_init(uint32_t address, unsigned count) {
  FASTRNN_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
}
FASTRNN_DEVICE void mbarrier_fence() { FASTRNN_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
FASTRNN_DEVICE void mbarrier_expect(uint32_t address, unsigned bytes) {
  FASTRNN_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}
FASTRNN_DEVICE void mbarrier_wait(uint32_t address, unsigned parity) {
  unsigned done = 0;
  do {
    FASTRNN_SM90(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(address),
        "r"(parity) : "memory");
  } while (!done);
}
FASTRNN_DEVICE void store_async(uint32_t address, Words v, uint32_t mbarrier) {
  FASTRNN_SM90("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(address),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mbarrier) : "memory");
}
FASTRNN_DEVICE void store_async(uint32_t address, Floats v, uint32_t mbarrier) {
  FASTRNN_SM90("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(address),
               "f"(v.x), "f"(v.y), "r"(mbarrier) : "memory");
}

}  // namespace ptx
}  // namespace fastrnn
#endif
